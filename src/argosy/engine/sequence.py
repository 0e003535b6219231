"""One prompt and its answer while they are in the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from argosy.config import SamplingParams
from argosy.engine.ledger import Ledger
from argosy.engine.sampler import SamplerState
from argosy.prompt.stop import StopStrings
from argosy.prompt.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of the chosen token, and of the best ones when asked for."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A finished answer. `token_ids` holds the end token too where one ended it; `text` does not."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    usage: dict[str, int]
    seed: int
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token. `text` may be empty while a character is half made; `result` comes with the last event."""

    token_id: int
    text: str
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    result: Result | None


class Sequence:
    """Tokens, KV blocks and sampling state of one request."""

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        sampler_state: SamplerState,
        decoder: StreamDecoder | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.max_new_tokens = max_new_tokens
        self.sampler_state = sampler_state
        self.decoder = decoder
        self.stop_strings = StopStrings(params.stop) if params.stop else None
        self.new_ids: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprob] | None = [] if params.logprobs is not None else None
        self.num_computed = 0  # tokens whose keys and values are in the KV cache
        self.blocks: list[int] = []
        self.state_slot: int | None = None  # of the recurrent state, while it runs and layers have one
        self.result: Result | None = None  # set when it has finished
        self.events: deque[TokenEvent] = deque()
        self.started_at = 0.0
        self.first_token_at: float | None = None
        self.counters_at_start = Ledger()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.new_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.prompt_ids)

    def tokens_from(self, start: int, count: int) -> list[int]:
        """Token ids at positions start to start + count."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.new_ids[start - prompt : start - prompt + count]
        return self.prompt_ids[start : start + count]
