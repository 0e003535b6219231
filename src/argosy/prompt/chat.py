"""From messages to a prompt, by the model's chat template.

    messages -> check -> template, in a process of its own -> segments -> tokenizer -> Prompt

A template is a program from a model's directory. It runs in `template_worker.py` under bounds of time, memory and
output, and it never gets to decide what a caller's text is: that text is marked character by character, and only what
the template itself wrote may become a control token. A template that makes new text of a caller's (beyond
cutting, trimming, repeating and changing case) is refused.

Elsewhere: how text is marked is `taint.py`; how segments become ids is `tokenizer.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argosy.errors import ArgosyError, CheckpointError, UsageError
from argosy.prompt.prompt import Message, Prompt

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Segment, Tokenizer

__all__ = ["ROLES", "ChatTemplate", "Prompt", "check_messages", "render"]

ROLES = ("system", "developer", "user", "assistant", "tool")

_START_SECONDS = 30.0  # an interpreter and jinja2: 0.1 s on an idle machine
_RENDER_SECONDS = 5.0
_RENDER_SECONDS_PER_MILLION = 4.0  # characters of the messages
_TEMPLATE_CHARACTERS = 1 << 20  # what a template may write, beyond the messages twice


def check_messages(
    messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[dict[str, str]]:
    """The messages as plain dicts, or a sentence about the first thing that is wrong with them.

    Raises:
        UsageError: none, an unknown role or key, content that is not text, or nothing for the model to answer.
    """
    if not messages:
        raise UsageError("a conversation needs at least one message")
    checked = []
    for at, message in enumerate(messages):
        unknown = [key for key in message if key not in ("role", "content")]
        if unknown:
            raise UsageError(f"message {at}: unknown key '{unknown[0]}'; known: role, content")
        for key in ("role", "content"):
            if key not in message:
                raise UsageError(f"message {at}: no '{key}'")
            if not isinstance(message[key], str):
                raise UsageError(f"message {at}: {key} is a {type(message[key]).__name__}, expected text")
        if message["role"] not in ROLES:
            raise UsageError(f"message {at}: unknown role '{message['role']}'; known: {', '.join(ROLES)}")
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise UsageError(f"message {at}: the text holds half a character (a lone surrogate)") from None
        checked.append({"role": str(message["role"]), "content": str(message["content"])})
    if add_generation_prompt and checked[-1]["role"] == "assistant":
        raise UsageError("the last message is the assistant's, so there is nothing to answer")
    return checked


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, str | float | bool | None] | None = None,
) -> Prompt:
    """The prompt that asks a model to go on with `messages`.

    Args:
        messages: role and content each.
        tokenizer: of the same model as `template`.
        template: renders the messages.
        add_generation_prompt: open the assistant's turn, for it to be answered.
        variables: further variables of the template (`enable_thinking`); text in them is a caller's text.

    Raises:
        UsageError: messages that cannot be meant, or that the template refuses.
        CheckpointError: the template fails, does not end, or hides whose text it writes.
    """
    segments = template.segments(messages, add_generation_prompt=add_generation_prompt, variables=variables)
    return Prompt(tuple(tokenizer.encode_segments(segments)), "".join(text for _, text in segments))


class ChatTemplate:
    """A model's chat template, and the process that renders it.

    The process is `worker`, if it was started before; it starts with the first use otherwise, and ends two seconds
    after the last.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        render_seconds: float = _RENDER_SECONDS,
        worker: Worker | None = None,
    ) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        self._render_seconds = render_seconds
        self._worker = worker
        self._lock = threading.Lock()

    def segments(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, str | float | bool | None] | None = None,
    ) -> list[Segment]:
        """Render `messages`: (is the caller's, text) in order. Errors as `render`."""
        checked = check_messages(messages, add_generation_prompt=add_generation_prompt)
        variables = dict(variables or {})
        taken = {*self._special_tokens, "messages", "add_generation_prompt", "tools", "documents"}
        if clash := taken & variables.keys():
            raise UsageError(
                f"'{min(clash)}' is not a variable to be set: it has its own meaning in templates"
            )
        for name, value in variables.items():
            if not isinstance(value, str | int | float | None):
                raise UsageError(
                    f"variable '{name}' is a {type(value).__name__}, expected text, a number or a truth"
                )
        length = sum(len(message["content"]) for message in checked)
        fixed = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        request = {
            "template": self._source,
            "messages": checked,
            "fixed": {**self._special_tokens, **fixed},
            "variables": variables,
            "max_characters": _TEMPLATE_CHARACTERS + 2 * length,
        }
        seconds = self._render_seconds + _RENDER_SECONDS_PER_MILLION * length / 1e6
        with self._lock:
            answer = self._ask(json.dumps(request).encode("ascii"), seconds)
        if "segments" in answer:
            return [(bool(is_callers), str(text)) for is_callers, text in answer["segments"]]
        raise _failure(str(answer.get("kind")), str(answer.get("message")))

    def close(self) -> None:
        with self._lock:
            if self._worker is not None:
                self._worker.stop()
                self._worker = None

    def _ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        for _ in range(2):  # the first process may have gone to rest just now
            if self._worker is None or not self._worker.is_alive:
                self._worker = Worker()
            try:
                return self._worker.ask(request, seconds)
            except _Gone:
                self._worker.stop()
                self._worker = None
            except BaseException:
                self._worker.stop()
                self._worker = None
                raise
        raise CheckpointError("the process that renders the chat template ended without an answer")


def _failure(kind: str, message: str) -> ArgosyError:
    if kind == "refused":
        return UsageError(f"the model's chat template refuses this conversation: {message}")
    if kind == "computed":
        return CheckpointError(
            f"the model's chat template cannot be used safely: {message}",
            hint="it changes what callers say, so their text could pass for the template's own; "
            "give the model text to continue instead: `--raw`, or Prompt.raw(text)",
        )
    return CheckpointError(
        f"the model's chat template fails: {message}",
        hint="give the model text to continue instead: `--raw`, or Prompt.raw(text)",
    )


class _Gone(Exception):
    """The process ended, or was about to."""


class Worker:
    """One process of `template_worker.py`: it is ready once, then answers line by line.

    Any template can be rendered by any worker, so one may be started before the template is known.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("jinja2")
        if spec is None or spec.origin is None or not sys.executable:
            missing = "a Python interpreter to start" if not sys.executable else "the package jinja2"
            raise ArgosyError(
                f"chat templates need {missing}", hint="or give the model text to continue: `--raw`"
            )
        paths = [str(Path(__file__).resolve().parents[2]), str(Path(spec.origin).parents[1])]
        code = f"import sys; sys.path[:0] = {paths!r}; from argosy.prompt.template_worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            bufsize=0,
        )
        self._is_ready = False
        self._stop = weakref.finalize(self, _end, self._process)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._stop()

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """One answer, within `seconds`.

        Raises:
            _Gone: the process ended before it answered.
            CheckpointError: no answer in time, or more of it than there can be.
        """
        if not self._is_ready:
            self._read_line(64, _START_SECONDS)
            self._is_ready = True
        assert self._process.stdin is not None
        view = memoryview(request + b"\n")
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except OSError:
            raise _Gone from None
        longest = 12 * (
            2 * len(request) + _TEMPLATE_CHARACTERS
        )  # "\ud83d\ude00" is the longest way to write one
        answer = json.loads(self._read_line(longest, seconds))
        assert isinstance(answer, dict)
        return answer

    def _read_line(self, longest: int, seconds: float) -> bytes:
        assert self._process.stdout is not None
        source, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        parts: list[bytes] = []
        length = 0
        while not parts or not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([source], [], [], left)[0]:
                raise CheckpointError(
                    f"the model's chat template fails: it did not end within {seconds:.1f} seconds",
                    hint="give the model text to continue instead: `--raw`, or Prompt.raw(text)",
                )
            part = os.read(source, 1 << 16)
            length += len(part)
            if not part or length > longest:
                raise _Gone
            parts.append(part)
        return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker and forget it."""
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
