"""The answers of Chat Completions and Completions: chunks with choices, usage, the ledger and prefill progress.

Elsewhere: a dialect's own choices are in its file; the path of a request is `serve/answer/respond.py`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

from argosy.serve.answer.answers import Progress
from argosy.serve.answer.logprobs import Speller
from argosy.serve.answer.respond import Event, Exchange
from argosy.serve.answer.sampling_fields import OpenAISampling
from argosy.serve.answer.service import Service
from argosy.serve.answer.usage import Usage
from argosy.serve.http.caller import Caller

Body = TypeVar("Body", bound=OpenAISampling)

_TEXTS = ("content", "reasoning_content", "arguments", "text")  # fields that a stream sends piecewise


class ChunkExchange(Exchange[Body, Event]):
    """An exchange whose events are chunks.

    Attributes:
        id_prefix: the prefix of the answer's id.
        chunk_type: the value of `object` in a chunk.
    """

    ends_with_done = True
    id_prefix: ClassVar[str]
    chunk_type: ClassVar[str]

    def __init__(self, body: Body, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._folded: dict[int, dict[str, Any]] = {}  # choices by index
        self._id, self._created = self.id_prefix + secrets.token_hex(12), int(time.time())
        self.keeps_special = body.skip_special_tokens is False
        self.speller = Speller(service.tokenizer, keep_special=self.keeps_special)

    def fold(self, event: Event) -> None:
        for choice in event["choices"]:
            join(self._folded.setdefault(choice["index"], {}), choice)

    def folded(self) -> list[dict[str, Any]]:
        """The choices of all folded events, by index."""
        return [joined(self._folded[index]) for index in sorted(self._folded)]

    def chunk(self, choices: list[Any], **more: Any) -> Event:
        """A chunk with these choices and further fields."""
        made = {
            "id": self._id, "object": self.chunk_type, "created": self._created, "model": self.service.model.id,
            "choices": choices, **more,
        }  # fmt: skip
        return cast(Event, made)

    def chunk_of(self, choice: Any) -> Event:
        """A chunk with one choice and, if requested, the usage so far."""
        usage = {"usage": self.usage()} if self.body.tells_usage_always else {}
        return self.chunk([choice], **usage)

    def progress(self, step: Progress) -> list[Event]:
        """The chunk that reports prefill progress, if requested."""
        return [self.chunk([], prompt_progress=step.as_dict())] if self.body.return_progress else []

    def last(self, facts: dict[str, Any]) -> list[Event]:
        """The chunk for facts known only at the end, if there are any."""
        return [self.chunk([], **facts)] if facts else []

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def usage(self) -> Usage:
        """The usage so far."""
        prompt, new = self.answers.num_prompt_tokens, self.answers.num_new_tokens
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": self.answers.prompt_tokens(),
        }  # fmt: skip

    def timings(self) -> dict[str, Any]:
        """The ledger of the first answer as a field, if requested."""
        first = self.answers.results[0]
        return {} if not self.body.timings or first is None else {"timings": first.ledger.as_dict()}


class _Pieces(list[str]):
    """A text as a list of pieces, because appending each piece to a string would copy the whole text each time."""


def join(whole: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a delta to the whole: append text, extend lists, join calls by their index."""
    for name, value in delta.items():
        if isinstance(value, str) and name in _TEXTS:
            whole.setdefault(name, _Pieces()).append(value)
        elif name == "tool_calls":
            for call in value:
                join(whole.setdefault(name, {}).setdefault(call["index"], {}), call)
        elif isinstance(value, dict):
            join(whole.setdefault(name, {}), value)
        elif isinstance(value, list):
            whole.setdefault(name, []).extend(value)
        elif value is not None:
            whole[name] = value


def joined(value: Any) -> Any:
    """The result of `join`, with each text as one string."""
    if isinstance(value, _Pieces):
        return "".join(value)
    if isinstance(value, dict):
        return {name: joined(one) for name, one in value.items()}
    return value
