"""Answers are drawn in time that grows with them: `markdown.js` in node, with a document of plain objects."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "src" / "argosy" / "serve" / "page"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

# Draws texts; prints, for each, its nodes as [tag, child, ...] and the processor time of the fastest of three runs.
DRAW = """
class Node {
  constructor(tag) { this.tagName = tag.toUpperCase(); this.children = []; this.classList = { add() {} }; }
  setAttribute() {}
  addEventListener() {}
  append(...children) { this.children.push(...children); }
  prepend(...children) { this.children.unshift(...children); }
  get firstElementChild() { return this.children.find((child) => typeof child !== "string"); }
  get told() { return [this.tagName, ...this.children.map((child) => child.told ?? child)]; }
}
globalThis.navigator ??= {};
globalThis.document = { createElement: (tag) => new Node(tag), createElementNS: (space, tag) => new Node(tag) };
const [module, texts] = JSON.parse(require("node:fs").readFileSync(0, "utf-8"));
import(module).then(({ MarkdownView }) => {
  const draw = ([start, piece, count, end]) => {
    const text = start + piece.repeat(count) + end;
    let told, fastest = Infinity;
    for (let run = 0; run < 3 && fastest > 1e4; run += 1) {
      const container = new Node("div");
      const begin = process.cpuUsage();
      new MarkdownView(container).update(text);
      const spent = process.cpuUsage(begin);
      fastest = Math.min(fastest, spent.user + spent.system);
      told = container.told.slice(1);
    }
    return [count ? null : told, fastest / 1e6];
  };
  console.log(JSON.stringify(texts.map(draw)));
});
"""


# Draws an answer as it grows; prints, for each number of pieces, how many nodes were made, whether the end looks as if
# it had been drawn at once, and the processor time.
GROW = """
let numMade = 0;
class Node {
  constructor(tag) { numMade += 1; this.tag = tag; this.children = []; this.classList = { add() {} }; }
  setAttribute() {}
  addEventListener() {}
  append(...children) { for (const one of children) { if (one.tag) one.parent = this; this.children.push(one); } }
  prepend(...children) { this.children.unshift(...children); }
  replaceWith(other) {
    this.parent.children[this.parent.children.lastIndexOf(this)] = other;
    other.parent = this.parent;
  }
  remove() { this.parent.children.splice(this.parent.children.lastIndexOf(this), 1); }
  get firstElementChild() { return this.children.find((child) => typeof child !== "string"); }
  get lastElementChild() { return this.children.at(-1); }
  get told() { return [this.tag, ...this.children.map((child) => child.told ?? child)]; }
}
globalThis.navigator ??= {};
globalThis.document = { createElement: (tag) => new Node(tag), createElementNS: (space, tag) => new Node(tag) };
const [module, [piece, counts]] = JSON.parse(require("node:fs").readFileSync(0, "utf-8"));
import(module).then(({ MarkdownView }) => {
  console.log(JSON.stringify(counts.map((count) => {
    const text = piece.repeat(count);
    const [container, whole] = [new Node("div"), new Node("div")];
    const view = new MarkdownView(container);
    numMade = 0;
    const begin = process.cpuUsage();
    for (let end = 1; end <= text.length; end += 5) view.update(text.slice(0, end));
    view.update(text);
    const [made, { user }] = [numMade, process.cpuUsage(begin)];
    new MarkdownView(whole).update(text);
    return [made, JSON.stringify(container.told) === JSON.stringify(whole.told), user / 1e6];
  })));
});
"""


def run(tmp_path: Path, program: str, given: Any) -> Any:
    """Run a program in node with the page's modules; it reads the path of one and what is given, and prints JSON."""
    for path in PAGE.glob("*.js"):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        [NODE or "", "--input-type=commonjs", "--eval", program],
        input=json.dumps([str(tmp_path / "markdown.js"), given]),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def drawn(tmp_path: Path, texts: list[tuple[str, str, int, str]]) -> list[tuple[Any, float]]:
    """Draw texts, each a start, a piece, how often that is repeated, and an end."""
    return [(told, seconds) for told, seconds in run(tmp_path, DRAW, texts)]


SHOWN = {
    "# a": [["H3", "a"]],
    "## a b  ## ": [["H3", "a b  ##"]],
    "## a b  ##": [["H3", "a b"]],
    "# # a##": [["H3", "# a"]],
    "#a": [["P", "#a"]],
    "####### a": [["P", "####### a"]],
    "- a\n\n\n- b\n\nc": [["UL", ["LI", ["P", "a"]], ["LI", ["P", "b"]]], ["P", "c"]],
    "-   a\r b": [["UL", ["LI", ["P", "a\r b"]]]],
    "a | b\n--|:-:\n1 | 2": [
        [
            "DIV",
            [
                "TABLE",
                ["THEAD", ["TR", ["TH", "a"], ["TH", "b"]]],
                ["TBODY", ["TR", ["TD", "1"], ["TD", "2"]]],
            ],
        ]
    ],
    "a | b\n | --- | :-- |\t": [
        ["DIV", ["TABLE", ["THEAD", ["TR", ["TH", "a"], ["TH", "b"]]], ["TBODY"]]],
    ],
    "a | b\n-- --|-": [["P", "a | b", ["BR"], "-- --|-"]],
    "a | b\n||-|": [["P", "a | b", ["BR"], "||-|"]],
    "a | b\n---": [["P", "a | b", ["BR"], "---"]],
    '[a]( https://b.c/d(e) "t" ) [f]() [g](h': [["P", ["A", "a"], " [f]() [g](h"]],
    "- [x] a\n- [ ] b\n- [y] c": [
        [
            "UL",
            ["LI", ["P", ["SPAN", "\u2611"], " ", "a"]],
            ["LI", ["P", ["SPAN", "\u2610"], " ", "b"]],
            ["LI", ["P", "[y] c"]],
        ]
    ],
    "<details>\n<summary>a *b*</summary>\n\n<b>c\n</details>\nd": [
        ["DETAILS", ["SUMMARY", "a ", ["EM", "b"]], ["P", "<b>c"]],
        ["P", "d"],
    ],
    "<details><summary>a</summary>b</details>": [["DETAILS", ["SUMMARY", "a"], ["P", "b"]]],
    "<details>\na": [["DETAILS", ["SUMMARY", "Details"], ["P", "a"]]],
    "<details onclick=x>a": [["P", "<details onclick=x>a"]],
}


def test_headings_lists_tasks_folds_tables_and_links_are_told_apart(tmp_path: Path) -> None:
    found = drawn(tmp_path, [(text, "", 0, "") for text in SHOWN])
    assert dict(zip(SHOWN, (told for told, _ in found), strict=True)) == SHOWN


TEMPTING = [
    ("# a", " ", "b"),
    ("# ", " ", "\u2028b"),
    ("- ", " ", "a\u2028b"),
    ("a | b\n", " ", "x-"),
    ("a | b\n|", " ", "-x"),
    ("- a\n", "\n", "- b"),
    ("", "[", "]"),
    ("", "[a](" + " " * 500, "x"),
    ("", " *a", ""),
    ("", "_a", ""),
    ("", "`", "a``"),
    ("", "|", "\n-"),
    ("", "<details>\n", ""),
    ("", "<details>\n", "</details>\n" * 9),
    ("<details>\n<summary>", "<a", ""),
    ("", "$a", ""),
    ("", "$ab cd ", "$"),
    ("", "$$", "a"),
    ("", "\\[", "a\\]"),
    ("", "\\[\n# a\n", "\n\n\\]"),
    ("", "\\begin{align}", ""),
    ("", "$" + "x" * 90 + "\n", ""),
    *(("", piece, "") for piece in (
        "*", "**a", "_a ", "*a ", "~~a", "***a** ", "[a](", "![", "[a](http://x ", "https://a.b ", "`", "`` ", "`a``b",
        "> ", "- ", "  - a\n", "1. a\n\n", "|a\n|-\n", "# #x", "\\", "```\n", "\n \n",
    )),
]  # fmt: skip


@pytest.mark.parametrize("least", [4_000, pytest.param(8_000, marks=pytest.mark.full)])
def test_drawing_takes_linear_time(tmp_path: Path, least: int) -> None:
    """Quadratic work would take 64 times as long for eight times the text."""
    texts = [
        (start, piece, times // len(piece), end)
        for start, piece, end in TEMPTING
        for times in (least, 8 * least)
    ]
    found = iter([seconds for _, seconds in drawn(tmp_path, texts)])
    for tempting, few, many in zip(TEMPTING, found, found, strict=True):
        assert many < 24 * max(few, 5e-3), (tempting, few, many)


GROWING = [
    "A paragraph with **bold** words.\n- a\n- b\n\n",
    "$$\n= a\n- b\n+ c\n$$\n\n1. $x$\n\n   more\n2. y\n",
    "| a | b |\n|---|---|\n| $c$ | d |\n\n```py\n# x\n```\n",
    "<details>\n<summary>a</summary>\n\n- b\n</details>\n# c\n> d\ne\n",
]


@pytest.mark.parametrize("piece", GROWING)
def test_a_growing_answer_draws_only_its_end_again(tmp_path: Path, piece: str) -> None:
    """Drawing all of it again would make 16 times as many nodes for four times the pieces."""
    (few, is_same, _), (many, is_still_same, _) = run(tmp_path, GROW, [piece, [10, 40]])
    assert is_same
    assert is_still_same
    assert many < 6 * few, (few, many)


def test_reading_a_growing_answer_takes_linear_time(tmp_path: Path) -> None:
    (_, _, few), (_, _, many) = run(tmp_path, GROW, ["some words of a paragraph\n\n", [300, 2400]])
    assert many < 24 * max(few, 2e-2), (few, many)
