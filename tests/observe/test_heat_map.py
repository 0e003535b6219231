"""The picture is valid SVG, and its cells are the shares."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from argosy.observe.heat_map import draw

_SVG = "{http://www.w3.org/2000/svg}"


def test_every_expert_that_is_chosen_has_a_cell_and_darker_means_more_often() -> None:
    shares = np.array([[[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]], [[1.0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]]])
    picture = ElementTree.fromstring(
        draw(shares, domains=("a & b", "<c>"), layers=(3, 7), title='of "x" <y>')
    )
    assert picture.get("aria-label") == 'of "x" <y>'
    said = [text.text for text in picture.iter(f"{_SVG}text")]
    assert {"a & b", "<c>", "3", "7", 'of "x" <y>'} <= set(said)
    paths = [(path.get("fill"), path.get("d") or "") for path in picture.iter(f"{_SVG}path")]
    assert sum(cells.count("M") for _, cells in paths) == np.count_nonzero(shares)
    lightness = [int((colour or "#")[1:3], 16) for colour, _ in paths]
    first, second = lightness[:2], lightness[2:]
    assert first == sorted(first, reverse=True)  # 0.25, then 0.5
    assert second == sorted(second, reverse=True)
    assert min(second) < min(first)  # all of a layer's choices
    frames = [rect for rect in picture.iter(f"{_SVG}rect") if rect.get("fill") == "none"]
    cell = re.match(r"M\d+ \d+h(\d+)v(\d+)h", paths[0][1])
    assert cell is not None
    width, height = map(int, cell.groups())
    assert [(one.get("width"), one.get("height")) for one in frames] == [
        (str(4 * width), str(2 * height))
    ] * 2


def test_a_large_model_makes_a_small_file_with_all_layers_inside() -> None:
    shares = np.random.default_rng(0).dirichlet(np.full(384, 0.3), size=(4, 60))
    text = draw(shares, domains=tuple("abcd"), layers=tuple(range(1, 61)), title="large")
    assert len(text) < 2_000_000
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', text)
    assert size is not None
    right, bottom = map(int, size.groups())
    for x, y in re.findall(r"M(\d+) (\d+)h", text):
        assert 0 <= int(x) < right
        assert 0 <= int(y) < bottom
