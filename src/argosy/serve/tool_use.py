"""Which tools apply to a request: decided here once, for every dialect.

    tools, tool_choice, parallel  ->  ToolUse.of  ->  told: the prompt      callable, must_call, parallel: the answer

Elsewhere: each dialect spells a choice in its own way and makes a `ToolChoice` of it; what an answer may say then is a
grammar (`prompt/formats/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from argosy.errors import UsageError
from argosy.prompt.tools import Tool, check_tools, tool_named

ToolMode = Literal["auto", "none", "required"]


class Choosing(Protocol):
    """A choice in a dialect's own spelling."""

    def asked(self) -> ToolChoice: ...


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a client says about calls.

    mode: the model may call, must not, or has to.
    names: of the tools that may be called; None: all.
    """

    mode: ToolMode = "auto"
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, given: ToolMode | Choosing | None) -> ToolChoice:
        """As a dialect's own spelling has it; nothing said is "auto"."""
        if given is None:
            return cls()
        return cls(given) if isinstance(given, str) else given.asked()


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What was decided.

    told: the tools that the prompt tells the model of: all of them, whichever may be called, so that prompts which
        differ in the choice alone begin alike.
    callable: those that may be called; a call of another is text.
    must_call: the answer is a call.
    parallel: more than one call may be made.
    """

    told: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    must_call: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, *, parallel: bool) -> ToolUse:
        """Decide.

        Raises:
            UsageError: a tool is none, the choice names one that is not there, or a call is asked for without tools.
        """
        checked = check_tools(tools)
        if choice.mode == "none":
            return cls()
        chosen = checked
        if choice.names is not None:
            chosen = tuple(tool_named(checked, name) for name in dict.fromkeys(choice.names))
        if choice.mode == "required" and not chosen:
            raise UsageError("tool_choice asks for a call, and there are no tools", param="tool_choice")
        return cls(checked, chosen, choice.mode == "required", parallel)
