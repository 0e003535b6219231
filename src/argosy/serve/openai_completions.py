"""OpenAI's Completions: POST /v1/completions, which continues text or token ids.

`echo` with `logprobs` returns the log-probability of every prompt token, which lm-eval uses for scoring. Several
prompts run together; a stream sends their choices as they are made.

Elsewhere: answers are `core.py`; sending them is `streams.py`.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired, cast

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import SamplingParams
from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.serve.core import Answers, Ended, Progress, Said, Service, steps_of
from argosy.serve.fields import (
    MAX_TOKENS,
    Closed,
    Effort,
    Flag,
    MinusOne,
    NoEffect,
    NumAnswers,
    NumBest,
    NumTokens,
    OpenAISampling,
    ReadOfPrompt,
    Text,
    Thinking,
    ThinkingSwitch,
    Timings,
    TokenId,
    Usage,
    few,
    ignored_header,
    limit_of,
)
from argosy.serve.gate import Caller
from argosy.serve.logprobs import Speller, finite
from argosy.serve.rules import absent, any_of, at_most_one, given
from argosy.serve.streams import DONE, EventStream, sse, until_gone
from argosy.serve.structured_outputs import Formed

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import StreamDecoder

_MAX_PROMPTS = 64
Ids = Annotated[list[TokenId], few(MAX_TOKENS, at_least=1)]
_FALSE = {"enum": [False, None]}


class CompletionBody(Formed, Thinking, OpenAISampling):
    RULES = (
        at_most_one(*Formed.model_fields),
        any_of(
            {"properties": {"max_tokens": {"not": {"const": 0}}}},
            given("logprobs", echo={"const": True}),
        ),
        any_of({"properties": {"echo": _FALSE}}, {"properties": {"stream": _FALSE}}, absent("logprobs")),
    )

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], few(_MAX_PROMPTS, at_least=1)]
        | Annotated[list[Ids], few(_MAX_PROMPTS, at_least=1)]
    ) = Field(examples=["Once upon a time"])
    max_tokens: NumTokens | MinusOne | None = None
    echo: Flag | None = None
    logprobs: NumBest | None = None
    best_of: NumAnswers | None = None
    # A raw prompt has no chat template that could use these fields.
    thinking: NoEffect[Flag | ThinkingSwitch] = None
    enable_thinking: NoEffect[Flag] = None
    include_reasoning: NoEffect[Flag] = None
    reasoning_effort: NoEffect[Effort] = None

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def params(self, caller: Caller) -> SamplingParams:
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        has_scores = bool(self.echo) and self.logprobs is not None
        if max_tokens == 0 and not has_scores:
            raise UsageError("max_tokens can be 0 only with echo and logprobs", param="max_tokens")
        if has_scores and self.stream:
            raise UsageError(
                "log-probabilities of a prompt cannot be streamed",
                hint="leave out stream or echo",
                param="echo",
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UsageError("best_of must equal n: every answer is returned", param="best_of")
        return SamplingParams(
            max_tokens=limit_of(max_tokens),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if has_scores else None,
            grammar=self.form(None, caller),
            **self.sampling(self.stops),
        )


class Scored(Closed):
    """Parallel lists with one item per token; the first token of a prompt has no log-probability.

    text_offset: where in `text` each token begins, in characters; a token that begins within a character has the
        offset of that character.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Closed):
    index: int
    text: str
    logprobs: Scored | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Closed):
    """A whole completion, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage]
    timings: NotRequired[Timings]
    prompt_progress: NotRequired[ReadOfPrompt]


async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue a text."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    # Only once, with the first prompt: schemas can be long.
    read_params = functools.cache(lambda: body.params(caller))
    opened: list[Answers] = []
    try:
        for prompt in body.prompts:
            opened.append(await service.open_text(prompt, read_params, caller, body.n or 1))  # noqa: PERF401  cancelled below
    except BaseException:
        for answers in opened:
            answers.cancel()
        raise
    dialect = _Completions(service, body, opened)

    def close() -> None:
        for each in opened:
            each.cancel()

    headers = ignored_header(body.ignored())
    if body.stream:
        return EventStream(dialect.stream(), caller, close, headers=headers)
    return JSONResponse(await until_gone(request, dialect.whole(), close), headers=headers)


class _Completions:
    def __init__(self, service: Service, body: CompletionBody, opened: list[Answers]) -> None:
        self._service, self._body, self._opened = service, body, opened
        self._id, self._created = "cmpl-" + secrets.token_hex(12), int(time.time())
        self._keeps_special = body.skip_special_tokens is False
        self._speller = Speller(service.tokenizer, keep_special=self._keeps_special)

    async def whole(self) -> Completion:
        ended: dict[tuple[int, int], Ended] = {}
        async with AsyncExitStack() as stack:
            for answers in self._opened:
                await stack.enter_async_context(answers)
            async for at, step in steps_of(self._opened):
                if isinstance(step, Ended):
                    ended[at, step.answer] = step
        choices = [self._choice(at, self._opened[at], step) for (at, _), step in sorted(ended.items())]
        return self._with_timings({**self._piece(choices), "usage": self._usage()})

    async def stream(self) -> AsyncIterator[bytes]:
        async with AsyncExitStack() as stack:
            for answers in self._opened:
                await stack.enter_async_context(answers)
            places: dict[tuple[int, int], _Places] = {}
            async for at, step in steps_of(self._opened):
                match step:
                    case Progress() if self._body.return_progress:
                        yield sse({**self._piece([]), "prompt_progress": step.as_dict()})
                    case Said():
                        text, scored, answer = step.text, None, (at, step.answer)
                        if answer not in places:
                            places[answer] = self._places()
                            if self._body.echo:
                                text = self._prompt_text(self._opened[at]) + text
                        if step.logprob is not None:
                            offsets = places[answer].of([step.logprob.token_id])
                            scored = self._scored([step.logprob], offsets)
                        yield self._chunk(at, step.answer, text, scored, None)
                    case Ended():
                        yield self._chunk(at, step.answer, "", None, _reason(step))
            last = self._with_timings(self._piece([]))
            if self._body.stream_options and self._body.stream_options.include_usage:
                last["usage"] = self._usage()
            if "usage" in last or "timings" in last:
                yield sse(last)
            yield sse(DONE)

    def _chunk(
        self, at: int, answer: int, text: str, scored: Scored | None, finish: Literal["stop", "length"] | None
    ) -> bytes:
        number = at * (self._body.n or 1) + answer
        piece = self._piece([{"index": number, "text": text, "logprobs": scored, "finish_reason": finish}])
        if self._body.tells_usage_always:
            piece["usage"] = self._usage()
        return sse(piece)

    def _piece(self, choices: list[TextChoice]) -> Completion:
        return {
            "id": self._id, "object": "text_completion", "created": self._created,
            "model": self._service.model.id, "choices": choices,
        }  # fmt: skip

    def _choice(self, at: int, answers: Answers, step: Ended) -> TextChoice:
        result, text, scored = step.result, step.result.text, None
        prompt = self._prompt_text(answers) if self._body.echo else ""
        if self._body.logprobs is not None:
            found: list[TokenLogprob | None] = list(result.logprobs or ())
            offsets = self._places(len(prompt)).of([one.token_id for one in found if one is not None])
            if self._body.echo:
                ids = answers.prompt.token_ids or ()
                found = [*(result.prompt_logprobs or ()), *found]
                offsets = [*self._places(is_start=True).of(ids), *offsets]
            scored = self._scored(found, offsets, (answers.prompt.token_ids or (0,))[0])
        text = prompt + text
        number = at * (self._body.n or 1) + step.answer
        return {"index": number, "text": text, "logprobs": scored, "finish_reason": _reason(step)}

    def _prompt_text(self, answers: Answers) -> str:
        """The text of the prompt: as given, or decoded from its token ids."""
        tokenizer, prompt = self._service.tokenizer, answers.prompt
        if prompt.text or tokenizer is None:
            return prompt.text
        return tokenizer.decode(prompt.token_ids or (), keep_special=self._keeps_special)

    def _places(self, at: int = 0, *, is_start: bool = False) -> _Places:
        tokenizer = self._service.tokenizer
        if tokenizer is None:
            return _Places(None, at)
        return _Places(tokenizer.stream(keep_special=self._keeps_special, is_start=is_start), at)

    def _scored(
        self, found: Sequence[TokenLogprob | None], offsets: Sequence[int], first_id: int = 0
    ) -> Scored:
        """Log-probabilities in the form of this dialect; `first_id`, the first prompt token, has none."""
        spell = self._speller.marked_text_of
        best: list[dict[str, float] | None] = []
        for item in found:
            spelled: dict[str, float] = {}
            for token_id, value in () if item is None else item.top:
                # The best comes first, and wins over other tokens with the same spelling.
                spelled.setdefault(spell(token_id), finite(value))
            best.append(None if item is None else spelled)
        return {
            "tokens": [spell(first_id if item is None else item.token_id) for item in found],
            "token_logprobs": [None if item is None else finite(item.logprob) for item in found],
            "top_logprobs": best, "text_offset": list(offsets),
        }  # fmt: skip

    def _usage(self) -> Usage:
        prompt = sum(answers.num_prompt_tokens for answers in self._opened)
        new = sum(answers.num_new_tokens for answers in self._opened)
        cached = sum(answers.num_cached_tokens for answers in self._opened)
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _with_timings(self, piece: Completion) -> Completion:
        """Add the ledger, if requested."""
        first = self._opened[0].results[0]
        if not self._body.timings or first is None:
            return piece
        return {**piece, "timings": cast(Timings, first.ledger.as_dict())}


class _Places:
    """Finds where the tokens of a text begin; `at` is the offset of the first token, in characters."""

    def __init__(self, decoder: StreamDecoder | None, at: int) -> None:
        self._decoder, self._at = decoder, at

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        found = []
        for token_id in token_ids:
            found.append(self._at)
            self._at += 0 if self._decoder is None else len(self._decoder.push(token_id))
        return found


def _reason(step: Ended) -> Literal["stop", "length"]:
    return "length" if step.finish == "length" else "stop"
