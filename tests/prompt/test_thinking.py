"""What a chat template lets a caller choose about thinking."""

from __future__ import annotations

import pytest

from argosy.prompt.thinking import Thinking, ThinkingSwitch, switch_of


@pytest.mark.parametrize(
    ("known", "switch"),
    [
        (set(), "none"), ({"clear_thinking", "x"}, "none"), ({"enable_thinking"}, "on-off"),
        ({"thinking", "x"}, "on-off"), ({"reasoning_effort"}, "efforts"), ({"reasoning_effort", "thinking"}, "both"),
    ],
)  # fmt: skip
def test_the_switch_says_what_a_template_passes_on(known: set[str], switch: ThinkingSwitch) -> None:
    assert switch_of(known) == switch
    assert bool(Thinking(thinks=False).variables(known)) == (switch in ("on-off", "both"))
    assert (Thinking(effort="low").shortfall(known) is None) == (switch in ("efforts", "both"))
