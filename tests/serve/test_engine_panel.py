"""The page's panel writes what the server tells: `engine_panel.js` in node, with a page of plain objects."""

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

# Shows states one after another; prints, for each, whether an element is hidden and its texts.
SHOW = """
class Node {
  constructor() { this.dataset = {}; this.children = []; this.style = {}; this.classList = { toggle() {} }; }
  setAttribute() {}
  querySelector() { return null; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  get texts() { return this.children.flatMap((child) => typeof child === "string" ? [child] : child.texts); }
}
const nodes = {};
globalThis.document = { createElement: () => new Node(), getElementById: (id) => nodes[id] ??= new Node() };
const [module, states, ids] = JSON.parse(process.argv[1]);
const { showState } = await import(module);
console.log(JSON.stringify(states.map((state) => {
  showState(state);
  return Object.fromEntries(ids.map((id) => [id, [nodes[id].hidden ?? false, nodes[id].texts]]));
})));
"""


def shown(tmp_path: Path, states: list[dict[str, Any]], *ids: str) -> list[dict[str, Any]]:
    for name in ("engine_panel.js", "units.js"):
        shutil.copy(PAGE / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    argument = json.dumps([str(tmp_path / "engine_panel.js"), states, ids])
    done = subprocess.run(
        [NODE or "", "--input-type=module", "--eval", SHOW, argument],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_the_panel_shows_workers_as_top_does_and_nothing_without_any(tmp_path: Path) -> None:
    worker = {
        "host": "10.0.0.2:7070", "state": "ready", "why": "", "experts_owned": 12032, "resident": 1570,
        "hit_rate": 0.62, "p50_us": 210.0, "p99_us": 9800.0, "bytes_out": 1_200_000_000, "bytes_in": 2_400_000_000,
        "experts_rerouted": 7,
    }  # fmt: skip
    other = worker | {"host": "b:1", "state": "copying", "why": "1.2 GiB are copied", "hit_rate": None}
    other |= {"experts_owned": 253, "resident": 360}
    alone, group = shown(
        tmp_path, [{}, {"workers": [worker, other]}], "workers", "workers-total", "workers-facts"
    )

    assert alone["workers"][0] is True
    assert group["workers"][0] is False
    assert group["workers-total"][1] == ["1 of 2 ready"]
    assert group["workers-facts"][1] == [
        "10.0.0.2:7070",
        "ready",
        "owns 12,032 experts, 1,570 in memory, hit rate 0.62",
        "round trip 0.21 ms, 99th percentile 9.80 ms; 7 experts rerouted",
        "1.2 GB sent, 2.4 GB received",
        "b:1",
        "copying",
        "owns 253 experts, all in memory",
        "round trip 0.21 ms, 99th percentile 9.80 ms; 7 experts rerouted",
        "1.2 GB sent, 2.4 GB received",
        "1.2 GiB are copied",
    ]
