"""TeX becomes MathML: `math.js` in node, as `markdown.js` draws it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.serve.test_markdown import NODE, drawn

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

# Formulas of answers, with the text of the MathML that KaTeX 0.19 makes of them, without spaces.
FORMULAS = json.loads((Path(__file__).parent / "formulas.json").read_text(encoding="utf-8"))
SAME = str.maketrans({"\u2223": "|", "\u2225": "\u2016", "\u2192": None, "\u27f6": None})
ACCENTS = "^~\u20d7\u02c6\u02c9\u02d9\u02dc\u00a8\u00af\u00b4\u203e"


def spelled(text: str) -> str:
    """A text without spaces and accents, for which there are several signs."""
    plain = unicodedata.normalize("NFKC", "".join(sign for sign in text if sign not in ACCENTS)).translate(
        SAME
    )
    return "".join(sign for sign in plain if not sign.isspace() and unicodedata.category(sign)[0] not in "CM")


def text_of(told: Any) -> str:
    return told if isinstance(told, str) else "".join(text_of(child) for child in told[1:])


def test_formulas_spell_what_katex_spells(tmp_path: Path) -> None:
    found = drawn(tmp_path, [(f"$${tex}$$", "", 0, "") for tex, _ in FORMULAS])
    assert len(FORMULAS) >= 30
    for (tex, text), (told, _) in zip(FORMULAS, found, strict=True):
        assert told[0][1][1][0] == "MATH", tex
        assert spelled(text_of(told[0])) == spelled(text), tex


X = ["MI", "x"]
DRAWN = {
    r"x_1^2": ["MSUBSUP", X, ["MN", "1"], ["MN", "2"]],
    r"\frac12": ["MFRAC", ["MN", "1"], ["MN", "2"]],
    r"{1 \over x}": ["MROW", ["MFRAC", ["MN", "1"], X]],
    r"\sqrt[3]{x}": ["MROOT", X, ["MN", "3"]],
    r"\sum_{x}": ["MUNDER", ["MO", "\u2211"], X],
    r"\int_x^1": ["MSUBSUP", ["MO", "\u222b"], X, ["MN", "1"]],
    r"\int\limits_x": ["MUNDER", ["MO", "\u222b"], X],
    r"x''": ["MSUP", X, ["MO", "\u2032\u2032"]],
    r"\text{if  }": ["MTEXT", "if\u00a0"],
    r"\mathbb{R}": ["MI", "\u211d"],
    r"\mathrm{kg}": ["MI", "kg"],
    r"\foo": ["MTEXT", "\\foo"],
    r"\left(x\right.": ["MROW", ["MO", "("], X],
    r"\begin{matrix}x&1\\[2pt]x\\\end{matrix}": [
        "MTABLE", ["MTR", ["MTD", X], ["MTD", ["MN", "1"]]], ["MTR", ["MTD", X]],
    ],
    r"\begin{matrix}x\\\hline 1\end{matrix}": ["MTABLE", ["MTR", ["MTD", X]], ["MTR", ["MTD", ["MN", "1"]]]],
    r"\ce{H2 -> x^+}": [
        "MROW", ["MSUB", ["MI", "H"], ["MN", "2"]], ["MO", "\u2192"], ["MSUP", X, ["MO", "+"]],
    ],
    r"<b>": ["MO", "<"],
}  # fmt: skip


def test_each_construct_has_its_element_and_an_unknown_command_is_shown(tmp_path: Path) -> None:
    found = drawn(tmp_path, [(f"${tex}$", "", 0, "") for tex in DRAWN])
    shown = {tex: told[0][1][1][1] for tex, (told, _) in zip(DRAWN, found, strict=True)}
    assert shown == DRAWN


MALFORMED = [
    r"\frac{1}", "x^", "{x", "x}", r"\left(x", r"x\right)", r"\begin{matrix}x", r"\begin{matrix}x\end{cases}",
    r"\sqrt[3", r"\text{x", "x&^", "{" * 99 + "x" + "}" * 99, r"\sqrt" * 99 + "x", "x" * 30_000,
]  # fmt: skip


def test_a_formula_that_cannot_be_drawn_is_shown_as_its_source(tmp_path: Path) -> None:
    found = drawn(tmp_path, [(f"${tex}$", "", 0, "") for tex in MALFORMED])
    assert [told for told, _ in found] == [[["P", ["CODE", f"${tex}$"]]] for tex in MALFORMED]


PLAIN = [
    "costs $5 and $6 today", "$5 million or $6", "a $x", "US$5/mo and 10$ or more", "echo $HOME and $PATH", "$ x $",
    r"\(x", r"\[x", "$$x", "$x $y", "price: $$ - cheap, $$$ - expensive", "$x$5", r"\begin{align}x",
    r"\begin{foo}x\end{foo}",
]  # fmt: skip


def test_money_and_open_formulas_stay_as_they_are(tmp_path: Path) -> None:
    found = drawn(tmp_path, [(text, "", 0, "") for text in PLAIN])
    assert [told for told, _ in found] == [[["P", text]] for text in PLAIN]


def test_code_is_never_a_formula(tmp_path: Path) -> None:
    (spans, _), (block, _) = drawn(
        tmp_path, [("`$x$` and $5 or `\\(y\\)`", "", 0, ""), ("```\n$$x$$\n```", "", 0, "")]
    )
    assert spans == [["P", ["CODE", "$x$"], " and $5 or ", ["CODE", "\\(y\\)"]]]
    assert text_of(block[0]) == "text$$x$$"


def test_the_lines_of_a_formula_are_no_list(tmp_path: Path) -> None:
    for opening, closing in (("$$", "$$"), (r"\[", r"\]"), (r"\begin{align}", r"\end{align}")):
        ((told, _),) = drawn(tmp_path, [(f"We get\n{opening}\n= x\n- 1\n# {closing}\nend", "", 0, "")])
        assert [block[0] for block in told] == ["P"]
        assert text_of(told[0]) == "We get=x\u22121#end"


TEMPTING = [
    "{", "}", r"\left(", r"\text{", r"\text{$x$", "x^", "^x", r"\frac", r"\begin{matrix}", r"\sqrt[", "'", r"\\[", "&",
    r"\mathrm{abc}", r"\not", r"\over", r"\displaystyle", r"\substack{x", " ", "1.", r"\hspace{",
]  # fmt: skip


def test_drawing_a_formula_takes_linear_time(tmp_path: Path) -> None:
    """Quadratic work would take 64 times as long for eight times the text."""
    texts = [("$$a", piece, times // len(piece), "$$") for piece in TEMPTING for times in (2_000, 16_000)]
    found = iter([seconds for _, seconds in drawn(tmp_path, texts)])
    for piece, few, many in zip(TEMPTING, found, found, strict=True):
        assert many < 24 * max(few, 5e-3), (piece, few, many)
