"""Removals are read strictly, and a change of losses is told with its error."""

from __future__ import annotations

import numpy as np
import pytest

from argosy.errors import UsageError
from argosy.observe.ablation import compare, parse_removals

LAYERS = (1, 2, 4)


def test_removals_name_one_expert_in_one_layer_or_in_all() -> None:
    found = parse_removals("1:3, *:0,4:5,1:3", layers=LAYERS, num_experts=6)
    assert [(one.name, one.experts) for one in found] == [
        ("1:3", {1: (3,)}),
        ("*:0", {1: (0,), 2: (0,), 4: (0,)}),
        ("4:5", {4: (5,)}),
    ]
    every = parse_removals("all", layers=LAYERS, num_experts=6)
    assert [one.name for one in every] == [f"{layer}:{expert}" for layer in LAYERS for expert in range(6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read at ''"),
        ("3", "cannot be read at '3'"),
        ("1:2;2:3", "cannot be read at"),
        ("1:-1", "cannot be read at"),
        ("1:²", "cannot be read at"),
        ("1:" + "9" * 99, "cannot be read at"),
        ("3:0", "layer 3; layers 1 to 4 have routed experts"),
        ("1:6", "expert 6, and a layer has 0 to 5"),
        ("all,1:2", "cannot be read at 'all'"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_removals(text, layers=LAYERS, num_experts=6)


def test_a_change_is_that_of_the_same_tokens() -> None:
    before = np.array([1.0, 2.0, 3.0, 4.0])
    change = compare("1:2", "maths", before, before + np.array([0.1, 0.2, 0.1, 0.2]))
    assert change.perplexity == pytest.approx(np.exp(2.65))
    assert change.rise == pytest.approx(np.exp(0.15) - 1)
    assert change.standard_errors == pytest.approx(0.15 / (np.std([0.1, 0.2, 0.1, 0.2], ddof=1) / 2))
    assert compare("1:2", "maths", before, before).standard_errors == 0.0
