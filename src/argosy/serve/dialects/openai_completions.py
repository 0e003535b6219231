"""OpenAI's Completions: POST /v1/completions, which continues text or token ids.

`echo` with `logprobs` returns the log-probability of every prompt token, which lm-eval uses for scoring. Several
prompts run together; a stream sends their choices as they are generated. With `suffix` the model fills in the text
between the two, if it was trained to (`prompt/infill.py`).

Elsewhere: the path of a request is `serve/answer/respond.py`; chunks are `openai_chunks.py`; answers are
`serve/answer/answers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, cast

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from argosy.config import SamplingParams
from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.serve.answer.answers import Ended, Progress, Said, Step
from argosy.serve.answer.check import check_of
from argosy.serve.answer.fields import (
    MAX_TOKENS,
    Effort,
    Flag,
    MinusOne,
    NoEffect,
    NumAnswers,
    NumBest,
    NumTokens,
    Stop,
    Text,
    TokenId,
    TokenLimit,
    few,
    limit_of,
)
from argosy.serve.answer.logprobs import finite
from argosy.serve.answer.request import Read, TextRequest
from argosy.serve.answer.respond import respond
from argosy.serve.answer.rules import at_most_one
from argosy.serve.answer.sampling_fields import OpenAISampling, Thinking, ThinkingSwitch
from argosy.serve.answer.service import Service
from argosy.serve.answer.structured_outputs import Formed
from argosy.serve.answer.usage import ReadOfPrompt, Timings, Usage
from argosy.serve.dialects.openai_chunks import ChunkExchange, join
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import OpenAIError
from argosy.serve.http.route import post_route

if TYPE_CHECKING:
    from argosy.prompt.prompt import Prompt
    from argosy.prompt.stream_decoder import StreamDecoder

_MAX_PROMPTS = 64
Ids = Annotated[list[TokenId], few(MAX_TOKENS, at_least=1)]


class CompletionBody(Formed, Thinking, OpenAISampling):
    RULES = (at_most_one(*Formed.model_fields),)

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], few(_MAX_PROMPTS, at_least=1)]
        | Annotated[list[Ids], few(_MAX_PROMPTS, at_least=1)]
    ) = Field(examples=["Once upon a time"])
    suffix: Text | None = Field(None, description="The text behind the gap that the model fills in.")
    max_tokens: NumTokens | MinusOne | None = None
    # Other servers' names for `max_tokens` and `stop`, all of which SillyTavern sends.
    max_new_tokens: TokenLimit | None = None
    n_predict: TokenLimit | None = None
    num_predict: TokenLimit | None = None
    stopping_strings: Annotated[list[Stop], few(16)] | None = None
    echo: Flag | None = None
    logprobs: NumBest | None = None
    best_of: NumAnswers | None = None
    # A raw prompt has no chat template to use these fields.
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
        limit = self.one_of("max_tokens", "max_new_tokens", "n_predict", "num_predict")
        max_tokens = 16 if limit is None else limit
        has_scores = bool(self.echo) and self.logprobs is not None
        if max_tokens == 0 and not has_scores:
            raise UsageError("max_tokens can be 0 only with echo and logprobs", param="max_tokens")
        if has_scores and self.stream:
            raise UsageError(
                "log-probabilities of a prompt cannot be streamed",
                hint="leave out stream or echo",
                param="echo",
            )
        if self.suffix is not None and self.echo:
            raise UsageError("a prompt with a suffix cannot be echoed", hint="leave out echo", param="echo")
        if self.suffix is not None and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise UsageError("a suffix needs a prompt of text, found token ids", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UsageError("best_of must equal n: every answer is returned", param="best_of")
        return SamplingParams(
            max_tokens=limit_of(max_tokens),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if has_scores else None,
            grammar=self.form(None, caller),
            **self.sampling(self.stops),
        )

    @property
    def stops(self) -> Sequence[str]:
        self.one_of("stop", "stopping_strings")
        return super().stops or self.stopping_strings or ()


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
    finish_reason: Literal["stop", "length", "content_filter"] | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


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
    return await respond(CompletionExchange, body, request)


class CompletionExchange(ChunkExchange[CompletionBody, Completion]):
    id_prefix = "cmpl-"
    chunk_type = "text_completion"

    def __init__(self, body: CompletionBody, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._begun: dict[int, _Offsets] = {}  # token offsets of answers that have begun

    def reads(self) -> Sequence[Read]:
        return [partial(self._read, prompt) for prompt in self.body.prompts]

    @cached_property
    def _params(self) -> SamplingParams:
        return self.body.params(self.caller)  # only once for all prompts, because schemas can be long

    def _read(self, prompt: str | Sequence[int]) -> TextRequest:
        return TextRequest(
            prompt=prompt, params=self._params, suffix=self.body.suffix, num_answers=self.body.n or 1,
            ignored=self.body.ignored(),
        )  # fmt: skip

    def take(self, step: Step) -> list[Completion]:
        if isinstance(step, Progress):
            return self.progress(step)
        number, text, scored = step.answer, "", None
        tokens: dict[str, list[int]] = {}
        tells = self.body.return_token_ids and self.answers.tells_token_ids
        if number not in self._begun:
            text = self._echoed(number)
            self._begun[number] = self._offsets(len(text))
            tokens = {"prompt_token_ids": list(self._prompt(number).token_ids or ())} if tells else {}
        if isinstance(step, Said):
            text += step.text
            if step.logprob is not None:
                scored = self._scored([step.logprob], self._begun[number].of([step.logprob.token_id]))
            if tells:
                tokens["token_ids"] = list(step.token_ids)
        finish = _reason(step) if isinstance(step, Ended) else None
        choice: dict[str, Any] = {"index": number, "text": text, "logprobs": scored, "finish_reason": finish}
        return [self.chunk_of(choice | tokens)]

    async def end(self) -> list[Completion]:
        return self.last(self.timings() | ({"usage": self.usage()} if self.wants_usage else {}))

    def whole(self) -> Completion:
        choices = [self._choice(folded) for folded in self.folded()]
        return cast(Completion, {**self.chunk(choices), "usage": self.usage(), **self.timings()})

    def _choice(self, folded: dict[str, Any]) -> TextChoice:
        number, scored = folded["index"], None
        if self.body.logprobs is not None:
            # A prompt's scores cannot be streamed, because they are known only at the end.
            scored = self._scored_prompt(number) if self.body.echo else self._scored([], [])
            join(cast(dict[str, Any], scored), folded.get("logprobs", {}))
        made: dict[str, Any] = {
            "index": number, "text": folded["text"], "logprobs": scored, "finish_reason": folded["finish_reason"],
            **{name: folded[name] for name in ("token_ids", "prompt_token_ids") if name in folded},
        }  # fmt: skip
        return cast(TextChoice, made)

    def _echoed(self, number: int) -> str:
        """The text of an answer's prompt, if requested, as given or decoded from its token ids."""
        tokenizer, prompt = self.service.tokenizer, self._prompt(number)
        if not self.body.echo:
            return ""
        if prompt.text or tokenizer is None:
            return check_of(self.caller).restored(prompt.text)
        return tokenizer.decode(prompt.token_ids or (), keep_special=self.keeps_special)

    def _prompt(self, number: int) -> Prompt:
        return self.answers.prompts[number // (self.body.n or 1)]

    def _offsets(self, at: int = 0, *, is_start: bool = False) -> _Offsets:
        tokenizer = self.service.tokenizer
        if tokenizer is None:
            return _Offsets(None, at)
        return _Offsets(tokenizer.stream(keep_special=self.keeps_special, is_start=is_start), at)

    def _scored_prompt(self, number: int) -> Scored:
        result, ids = self.answers.results[number], self._prompt(number).token_ids or (0,)
        assert result is not None
        return self._scored(result.prompt_logprobs or (), self._offsets(is_start=True).of(ids), ids[0])

    def _scored(
        self, found: Sequence[TokenLogprob | None], offsets: Sequence[int], first_id: int = 0
    ) -> Scored:
        """Log-probabilities in this dialect's shape; `first_id`, the first prompt token, has none."""
        spell = self.speller.marked_text_of
        best: list[dict[str, float] | None] = []
        for item in found:
            spelled: dict[str, float] = {}
            for token_id, value in () if item is None else item.top:
                # The best comes first and wins over other tokens with the same spelling.
                spelled.setdefault(spell(token_id), finite(value))
            best.append(None if item is None else spelled)
        return {
            "tokens": [spell(first_id if item is None else item.token_id) for item in found],
            "token_logprobs": [None if item is None else finite(item.logprob) for item in found],
            "top_logprobs": best, "text_offset": list(offsets),
        }  # fmt: skip


class _Offsets:
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


def _reason(step: Ended) -> Literal["stop", "length", "content_filter"]:
    return "stop" if step.finish == "tool_calls" else step.finish


ROUTES = (
    post_route(
        "/v1/completions", completions, Completion, screens="answers",
        events=Completion | OpenAIError, has_done=True,
    ),
)  # fmt: skip
