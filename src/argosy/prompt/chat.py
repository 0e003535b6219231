"""Renders messages as a conversation, with the model's chat template.

    messages, tools -> check -> shape -> template, in its own process -> segments

A template is a program from a model's directory. It runs in `template_worker.py` with limits on time, memory and
output, and it cannot reclassify a caller's text: that text is marked character by character, and only text that the
template itself wrote may become a control token. A template that computes new text from a caller's (beyond cutting,
trimming, repeating and changing case) is refused.

Elsewhere: `messages.py` and `tools.py` check what a client sends; `template_shape.py` finds what a template expects;
`taint.py` marks text; `tokenizer.py` turns segments into ids.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from argosy.confined_process import START_SECONDS, ConfinedProcess, Gone
from argosy.errors import ArgosyError, CheckpointError, UsageError
from argosy.prompt.generic_tools import with_generic_tools
from argosy.prompt.json_text import plain_json
from argosy.prompt.messages import Turn
from argosy.prompt.template_shape import Shape, find_shape, in_order_of_calls
from argosy.prompt.tools import Tool

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Segment

Variables = Mapping[str, str | float | bool | None]

_MAX_RENDERED = 1 << 21  # characters; a template takes up to 40 bytes of memory per character

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_RENDER_SECONDS = 5.0
_RENDER_SECONDS_PER_MILLION = 4.0  # per million characters of input
_MOST_WORKERS = 2  # a server's claims count the second one (`SERVER_GROWTH_BYTES`)
_INSTEAD = "give the model text to continue instead: `--raw`"
_TEMPLATE_CHARACTERS = 1 << 20  # a template may write this much beyond twice its input


class ChatTemplate:
    """A model's chat template and the processes that render it.

    The first process is `worker`, if one has already been started. A second one starts when the first is busy, so
    that other conversations do not wait for a slow one. Each ends after two idle seconds.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        render_seconds: float = _RENDER_SECONDS,
        worker: Worker | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._render_seconds = render_seconds
        self._idle = [] if worker is None else [worker]
        self._lock = threading.Lock()  # guards _idle
        self._places = threading.Semaphore(_MOST_WORKERS)
        self._found_shape: Shape | None = None

    def segments(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Tool] = (),
        *,
        is_generic: bool = False,
        add_generation_prompt: bool = True,
        variables: Variables | None = None,
    ) -> list[Segment]:
        """Render a conversation as (is the caller's, text) segments in order.

        Args:
            turns: checked messages.
            tools: tools that the model may call.
            is_generic: write tools, calls and results into the texts of turns, even if the template supports them.
            add_generation_prompt: open the assistant's turn for an answer.
            variables: further template variables, such as `enable_thinking`; text in them counts as the caller's.

        Raises:
            UsageError: the template does not read a variable, does not support tools, or refuses the conversation or
                has no place for part of it.
            CheckpointError: the template fails, does not finish, or hides the origin of its text.
        """
        if variables:
            self._check_variables(variables)
        if is_generic:
            turns = with_generic_tools(turns, tools, takes_system=self.shape.takes_system)
            tools = ()
        if tools and not self.shape.takes_tools:
            raise UsageError(
                "this model's chat template does not support tools",
                hint="leave `tools` out, or run a model that can call tools",
            )
        if tools or not all(map(_is_plain, turns[:1])) or not all(map(_is_plainer, turns[1:])):
            messages = self.shape.messages(turns)
        else:  # every template supports these messages, so the first prompt does not wait for the shape
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        made_tools = [tool.as_template_reads_it() for tool in tools] or None
        segments: list[Segment] = []
        for given in (messages, map(_in_parts, messages)):
            answer = self._render(list(given), made_tools, dict(variables or {}), add_generation_prompt)
            if "segments" not in answer:
                break
            segments = [(bool(is_callers), str(text)) for is_callers, text in answer["segments"]]
            # Some templates (Llama-Guard-4) print nothing of a content that is not a list of parts.
            is_printed = any(is_callers for is_callers, _ in segments)
            if is_printed or not any(turn.content.strip() for turn in turns):
                return segments
        if segments:
            raise UsageError("this model's chat template prints nothing of the conversation")
        raise _failure(str(answer.get("kind")), str(answer.get("message")))

    @property
    def shape(self) -> Shape:
        """The kinds of messages that the template reads and prints, found once by rendering a dozen small
        conversations.
        """
        if self._found_shape is None:
            answer = self._ask({"read": self.source}, self._render_seconds)
            if "variables" not in answer:
                raise _failure(str(answer.get("kind")), str(answer.get("message")))
            variables = frozenset(answer["variables"]) - _RESERVED - self._special_tokens.keys()
            self._found_shape = find_shape(variables, frozenset(answer["names"]), self._attempt)
        return self._found_shape

    def join_texts(self, texts: Sequence[str]) -> str:
        """Join adjacent texts of a message into one that the template prints in the same way."""
        return self.shape.join_texts(texts) if len(texts) > 1 else "".join(texts)

    def in_order(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Return `turns` with results in the order of their calls, unless the template prints which they answer."""
        is_alone = sum(turn.role == "tool" for turn in turns) < 2
        return turns if is_alone or self.shape.names_results else in_order_of_calls(turns)

    def _attempt(self, messages: list[dict[str, Any]], tools: list[dict[str, object]] | None) -> str | None:
        answer = self._render(messages, tools, {}, True)
        return "".join(text for _, text in answer["segments"]) if "segments" in answer else None

    def _check_variables(self, variables: Variables) -> None:
        for name, value in variables.items():
            if name in _RESERVED or name in self._special_tokens:
                raise UsageError(f"variable '{name}' cannot be set: templates reserve that name")
            if not isinstance(value, str | int | float | None):
                raise UsageError(
                    f"variable '{name}' is a {type(value).__name__}, expected text, a number or a boolean"
                )
            plain_json(value, f"variable '{name}'")
            if name not in self.shape.variables:
                known = ", ".join(sorted(self.shape.variables)) or "none"
                raise UsageError(
                    f"this model's chat template does not read the variable '{name}'; it reads: {known}"
                )

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, object]] | None,
        variables: dict[str, Any],
        add_generation_prompt: bool,
    ) -> dict[str, Any]:
        fixed = {"documents": None, "add_generation_prompt": add_generation_prompt, **self._special_tokens}
        given = {"messages": messages, "tools": tools, "variables": variables}
        length = len(json.dumps(given, ensure_ascii=False))
        return self._ask(
            {
                "template": self.source,
                "fixed": fixed,
                **given,
                "max_characters": _TEMPLATE_CHARACTERS + 2 * length,
            },
            self._render_seconds + _RENDER_SECONDS_PER_MILLION * length / 1e6,
        )

    def close(self) -> None:
        """End the processes that are idle; a busy one ends by itself."""
        with self._lock:
            while self._idle:
                self._idle.pop().stop()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        line = json.dumps(request).encode("ascii")
        with self._places:
            for take in (self._take_idle, Worker):  # an idle process may have just ended
                worker = take()
                try:
                    answer = worker.ask(line, seconds)
                except Gone:
                    worker.stop()
                except BaseException:
                    worker.stop()
                    raise
                else:
                    with self._lock:
                        self._idle.append(worker)
                    return answer
        raise CheckpointError("the chat template process ended without an answer")

    def _take_idle(self) -> Worker:
        """The most recently used process, or a new one; processes that have ended are dropped."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                worker.stop()
        return Worker()


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its text as the only part of a list."""
    content = message["content"]
    if not content or isinstance(content[0], dict):
        return message
    pieces = [(True, content)] if isinstance(content, str) else content
    return {**message, "content": [{"type": "text", "text": pieces}]}


def _is_plain(turn: Turn) -> bool:
    """Whether every template accepts this turn unchanged."""
    return turn == Turn(turn.role, turn.content) and turn.role not in ("developer", "tool")


def _is_plainer(turn: Turn) -> bool:
    """Whether every template accepts this turn unchanged after the first."""
    return _is_plain(turn) and turn.role != "system"


def _failure(kind: str, message: str) -> ArgosyError:
    if kind == "refused":
        return UsageError(f"the model's chat template refuses this conversation: {message}")
    if kind == "computed":
        return CheckpointError(
            f"the model's chat template cannot be used safely: {message}",
            hint="it alters callers' text, which could then pass for the template's own; "
            "give the model text to continue instead: `--raw`, or Prompt.raw(text)",
        )
    return CheckpointError(
        f"the model's chat template fails: {message}",
        hint=f"{_INSTEAD}, or Prompt.raw(text)",
    )


class Worker:
    """One process of `template_worker.py`; it renders any template, so it may start before the template is known."""

    def __init__(self) -> None:
        zone = {
            name: os.environ[name] for name in ("TZ",) if name in os.environ
        }  # templates read the local time
        self._process = ConfinedProcess(
            "argosy.prompt.template_worker",
            ("jinja2",),
            purpose="chat templates",
            hint=_INSTEAD,
            environment=zone,
        )

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive

    def stop(self) -> None:
        self._process.stop()

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Ask for one answer, within `seconds`.

        Raises:
            Gone: the process ended before it answered, or broke the protocol.
            CheckpointError: no answer came in time.
        """
        # A character takes at most 12 bytes, as in "\ud83d\ude00".
        longest = 12 * (2 * len(request) + _TEMPLATE_CHARACTERS)
        allowed = START_SECONDS
        try:
            self._process.await_ready()
            allowed = seconds
            self._process.write(request + b"\n", time.monotonic() + seconds)
            line, rest = self._process.read_line(longest, time.monotonic() + seconds)
        except Gone as gone:
            if gone.is_late:
                raise CheckpointError(
                    f"the model's chat template fails: it did not finish within {allowed:.1f} seconds",
                    hint=f"{_INSTEAD}, or Prompt.raw(text)",
                ) from None
            raise
        if rest:
            raise Gone
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


def up_to_end_of(content: str, segments: Sequence[Segment]) -> list[Segment]:
    """Cut a rendered conversation at the end of the last turn's `content`, so that it can be continued.

    Trailing white space, which templates trim, is restored.

    Raises:
        UsageError: the template prints something else there.
    """
    at = max((at for at, (is_callers, _) in enumerate(segments) if is_callers), default=None)
    printed = "" if at is None else segments[at][1].rstrip()
    if at is None or not printed.endswith(content.strip()):
        raise UsageError(
            "this model's chat template alters the end of an assistant message, "
            "so a last message from the assistant cannot be continued",
            hint="end the conversation with a user message",
        )
    return [*segments[:at], (True, printed + content[len(content.rstrip()) :])]


def require_renderable(turns: Sequence[Turn]) -> None:
    num_characters = sum(
        len(turn.content) + len(turn.reasoning) + sum(len(call.text) for call in turn.calls) for turn in turns
    )
    if num_characters > _MAX_RENDERED:
        raise UsageError(
            f"the conversation has {num_characters} characters; at most {_MAX_RENDERED} can be rendered",
            hint="shorten the conversation",
        )
