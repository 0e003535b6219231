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
  get firstElementChild() { return this.children.find((child) => typeof child !== "string"); }
  get told() { return [this.tagName, ...this.children.map((child) => child.told ?? child)]; }
}
globalThis.navigator ??= {};
globalThis.document = { createElement: (tag) => new Node(tag) };
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


def drawn(tmp_path: Path, texts: list[tuple[str, str, int, str]]) -> list[tuple[Any, float]]:
    """Draw texts, each a start, a piece, how often that is repeated, and an end."""
    for path in PAGE.glob("*.js"):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        [NODE or "", "--input-type=commonjs", "--eval", DRAW],
        input=json.dumps([str(tmp_path / "markdown.js"), texts]),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(told, seconds) for told, seconds in json.loads(done.stdout)]


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
}


def test_headings_lists_tables_and_links_are_told_apart(tmp_path: Path) -> None:
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
]  # fmt: skip


def test_drawing_takes_linear_time(tmp_path: Path) -> None:
    """Quadratic work would take 64 times as long for eight times the text."""
    texts = [
        (start, piece, times // len(piece), end)
        for start, piece, end in TEMPTING
        for times in (8_000, 64_000)
    ]
    found = iter([seconds for _, seconds in drawn(tmp_path, texts)])
    for tempting, few, many in zip(TEMPTING, found, found, strict=True):
        assert many < 24 * max(few, 2e-3), (tempting, few, many)
