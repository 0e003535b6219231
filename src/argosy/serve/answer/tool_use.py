"""Decide which tools apply to a request, the same way for every dialect.

    tools, tool_choice, parallel  ->  ToolUse.of  ->  told: the prompt      callable, must_call, parallel: the answer

Elsewhere: each dialect converts its own spelling of a choice to a `ToolChoice`; the grammar that then constrains the
answer is `prompt/formats/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from argosy.prompt.tools import Tool, check_tools, require_tools, tool_named

ToolMode = Literal["auto", "none", "required"]


class Choosing(Protocol):
    """A tool choice in a dialect's own spelling."""

    def asked(self) -> ToolChoice: ...


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """A client's choice about tool calls.

    mode: the model may call a tool, must not, or must.
    names: names of the callable tools; None means all.
    """

    mode: ToolMode = "auto"
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, given: ToolMode | Choosing | None) -> ToolChoice:
        """Convert a dialect's spelling; None means "auto"."""
        if given is None:
            return cls()
        return cls(given) if isinstance(given, str) else given.asked()


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The decision for one request.

    told: the tools in the prompt: all of them, even if not callable, so that prompts that differ only in the choice
        share a prefix.
    callable: the tools that may be called; a call of another tool is text.
    must_call: the answer must be a tool call.
    parallel: the answer may have more than one call.
    """

    told: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    must_call: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, *, parallel: bool) -> ToolUse:
        """Decide.

        Raises:
            UsageError: a tool is invalid, the choice names an unknown tool, or requires a call without any tools.
        """
        checked = check_tools(tools)
        if choice.mode == "none":
            return cls()
        chosen = checked
        if choice.names is not None:
            chosen = tuple(tool_named(checked, name) for name in dict.fromkeys(choice.names))
        if choice.mode == "required":
            require_tools(chosen)
        return cls(checked, chosen, choice.mode == "required", parallel)
