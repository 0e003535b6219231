"""Whether a model thinks before it answers, expressed in its chat template's variables.

    --no-think, "think": false, reasoning_effort  ->  Thinking  ->  enable_thinking, thinking, reasoning_effort

Templates name these variables differently, and many have none: then a caller has no choice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from argosy.config import EFFORTS

_SWITCHES = ("enable_thinking", "thinking")  # Qwen3, GLM and others; DeepSeek
_EFFORT = "reasoning_effort"  # gpt-oss and others


ThinkingSwitch = Literal["none", "on-off", "efforts", "both"]
"""What a chat template lets a caller choose: nothing, whether to think, how much, or both."""


def switch_of(known: Collection[str]) -> ThinkingSwitch:
    """The on/off switch among a template's variables."""
    if _EFFORT not in known:
        return "on-off" if set(_SWITCHES) & set(known) else "none"
    return "both" if set(_SWITCHES) & set(known) else "efforts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """What the caller requests; None leaves it to the template. If both are given, `thinks` decides.

    effort: `low`, `medium`, `high` or another that the template knows; `none` means no thinking.
    """

    thinks: bool | None = None
    effort: str | None = None

    @property
    def is_asked(self) -> bool:
        """Whether anything is requested."""
        return self != Thinking()

    def variables(self, known: Collection[str]) -> dict[str, Any]:
        """The template variables that express the request, among the known ones; empty if the template has none for
        it.
        """
        found: dict[str, Any] = {}
        thinks = self.thinks
        if self.effort is not None:
            if _EFFORT in known and self.effort != "none":
                found[_EFFORT] = self.effort
            if thinks is None:
                thinks = self.effort != "none"
        if thinks is not None:
            found |= {name: thinks for name in _SWITCHES if name in known}
        return found

    def shortfall(self, known: Collection[str]) -> str | None:
        """A sentence about the part of the request that a template cannot express; None if it expresses all."""
        if not self.is_asked:
            return None
        if not self.variables(known):
            if _EFFORT in known:
                return "this model can be told how much to think (--effort low), but not whether to"
            return "this model cannot be told whether to think: its chat template has no switch for that"
        if self.effort is not None and _EFFORT not in known:
            return f"this model knows no effort, so '{self.effort}' only tells it to think"
        return None


WORDS = {
    "on": Thinking(thinks=True),
    "off": Thinking(thinks=False),
    **{effort: Thinking(effort=effort) for effort in EFFORTS},
}
"""What may be requested, as a word for the command line."""
