"""POST /infill of llama-server, from which editors request the text at the cursor.

    input_prefix + prompt  ─┐
    input_suffix           ─┼─ the form that the model was trained with (`prompt/infill.py`) ─>  content
    input_extra            ─┘   snippets of other files, if they fit

A stream consists of unnamed server-sent events; the last one has `stop: true`. `n_predict: 0` only computes the
prompt, so that the next request finds it cached: editors send snippets ahead like this.

Elsewhere: `openai_completions.py` does the same with `suffix`; the path of a request is `serve/answer/respond.py`;
other routes of llama-server are `llama_server.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from argosy.config import SamplingParams
from argosy.engine.ledger import Ledger
from argosy.prompt.infill import Snippet
from argosy.serve.answer.answers import Ended, Said, Step
from argosy.serve.answer.fields import (
    MAX_TOKENS,
    WHOLE,
    Flag,
    Lenient,
    Name,
    NoEffect,
    NumTokens,
    Stop,
    Text,
    few,
    strays,
)
from argosy.serve.answer.request import Read, TextRequest
from argosy.serve.answer.respond import Exchange, respond
from argosy.serve.answer.sampling_fields import Sampling
from argosy.serve.answer.service import Service
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import OpenAIError
from argosy.serve.http.route import post_route

_MOST_SNIPPETS = 256
_ANSWER_TOKENS = 256  # room that snippets leave for an answer without a limit
_Milliseconds = Annotated[float, Field(ge=-1, le=1e12, strict=True)]


class Extra(Lenient):
    """A snippet of another file."""

    text: Text
    filename: Name | None = None


class InfillBody(Sampling):
    input_prefix: Text = Field(examples=["def add(a, b):\n"])
    input_suffix: Text = Field(examples=["\nprint(add(1, 2))"])
    prompt: Text | None = Field(None, description="Text behind `input_prefix`: the line before the cursor.")
    input_extra: Annotated[list[Extra], few(_MOST_SNIPPETS)] | None = Field(
        None,
        description="Snippets of other files, the most important last. The first are left out if not all of them fit.",
    )
    n_predict: (
        Annotated[
            int,
            Field(
                ge=-2,
                le=MAX_TOKENS,
                strict=True,
                description="Most tokens of the answer. -1 and -2: as many as the context holds. 0: only compute the "
                "prompt for later requests.",
            ),
            WHOLE,
        ]
        | None
    ) = None
    stop: Stop | Annotated[list[Stop], few(64)] | None = None
    # Internals of llama-server and how it reports them.
    cache_prompt: NoEffect[Flag] = None
    n_indent: NoEffect[NumTokens] = None
    t_max_prompt_ms: NoEffect[_Milliseconds] = None
    t_max_predict_ms: NoEffect[_Milliseconds] = None
    response_fields: NoEffect[Annotated[list[Name], few(64)]] = None
    return_progress: NoEffect[Flag] = None

    @property
    def limit(self) -> int | None:
        """The limit on the answer's tokens; None: the rest of the context."""
        return None if self.n_predict is None or self.n_predict < 0 else self.n_predict

    def request(self) -> TextRequest:
        """The texts around the gap, and the snippets."""
        # The prompt's last logits yield one token in any case; with 0 it is not sent.
        max_tokens = None if self.limit is None else max(1, self.limit)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return TextRequest(
            prompt=self.input_prefix + (self.prompt or ""),
            suffix=self.input_suffix,
            snippets=[Snippet(one.text, one.filename) for one in self.input_extra or ()],
            reserved_tokens=_ANSWER_TOKENS if self.limit is None else self.limit,
            params=SamplingParams(max_tokens=max_tokens, **self.sampling(stops)),
            ignored=[*self.ignored(), *strays("input_extra", self.input_extra or ())],
        )


class InfillTimings(Closed):
    """Computed tokens, without cached ones, and how long they took."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class InfillPiece(Closed):
    """A piece of a streamed answer."""

    index: Literal[0]
    content: str
    tokens: list[int]
    stop: Literal[False]
    id_slot: Literal[-1]
    tokens_predicted: int
    tokens_evaluated: int


class Filled(Closed):
    """A whole answer; or the last event of a stream, without content.

    tokens: always empty.   tokens_cached: prompt and answer together, which later requests may find.
    truncated: always false, because a prompt that does not fit is refused.
    """

    index: Literal[0]
    content: str
    tokens: list[int]
    stop: Literal[True]
    id_slot: Literal[-1]
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: Literal[False]
    stop_type: Literal["eos", "limit", "word", "content_filter"]
    stopping_word: str
    has_new_line: bool
    timings: InfillTimings


async def infill(body: InfillBody, request: Request) -> Response:
    """Fill in the text between two texts, as llama-server does."""
    return await respond(InfillExchange, body, request)


class InfillExchange(Exchange[InfillBody, InfillPiece | Filled]):
    def __init__(self, body: InfillBody, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._texts: list[str] = []
        self._has_new_line = False
        self._last: Filled | None = None

    def reads(self) -> list[Read]:
        return [self.body.request]

    def take(self, step: Step) -> Iterable[InfillPiece | Filled]:
        match step:
            case Said(text=text) if text and self.body.limit != 0:
                self._has_new_line |= "\n" in text
                return [self._piece(text)]
            case Ended():
                return [self._end(step)]
        return []

    def fold(self, event: InfillPiece | Filled) -> None:
        if event["stop"]:
            self._last = event
        else:
            self._texts.append(event["content"])

    def whole(self) -> Filled:
        assert self._last is not None
        return {**self._last, "content": "".join(self._texts)}

    def _piece(self, text: str) -> InfillPiece:
        return {
            "index": 0, "content": text, "tokens": [], "stop": False, "id_slot": -1,
            "tokens_predicted": self._num_predicted, "tokens_evaluated": self.answers.num_prompt_tokens,
        }  # fmt: skip

    def _end(self, step: Ended) -> Filled:
        result, num_evaluated = step.result, self.answers.num_prompt_tokens
        ends: dict[str, Literal["limit", "content_filter"]] = {
            "length": "limit",
            "content_filter": "content_filter",
        }
        is_word = isinstance(result.stopped_by, str)
        return {
            "index": 0, "content": "", "tokens": [], "stop": True, "id_slot": -1, "model": self.service.model.id,
            "tokens_predicted": self._num_predicted, "tokens_evaluated": num_evaluated,
            "tokens_cached": num_evaluated + self._num_predicted, "truncated": False,
            "stop_type": ends.get(step.finish, "word" if is_word else "eos"),
            "stopping_word": result.stopped_by if isinstance(result.stopped_by, str) else "",
            "has_new_line": self._has_new_line, "timings": _timings(result.ledger, self._num_predicted),
        }  # fmt: skip

    @property
    def _num_predicted(self) -> int:
        return 0 if self.body.limit == 0 else self.answers.num_new_tokens


def _timings(ledger: Ledger, num_predicted: int) -> InfillTimings:
    first_s = ledger.wall_s if ledger.time_to_first_token_s is None else ledger.time_to_first_token_s
    return {
        "cache_n": ledger.cached_tokens, "prompt_n": ledger.prompt_tokens - ledger.cached_tokens,
        "prompt_ms": first_s * 1e3, "prompt_per_second": ledger.prefill_tok_per_s or 0.0,
        "predicted_n": num_predicted, "predicted_ms": (ledger.decode_s or 0.0) * 1e3,
        "predicted_per_second": ledger.decode_tok_per_s or 0.0,
    }  # fmt: skip


ROUTES = (
    post_route("/infill", infill, Filled, screens="answers", events=InfillPiece | Filled | OpenAIError),
)  # fmt: skip
