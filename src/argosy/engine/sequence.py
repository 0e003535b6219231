"""One prompt and its answer while it is in the engine."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from argosy.config import SamplingParams
from argosy.engine.energy import Metered
from argosy.engine.ledger import Ledger
from argosy.engine.media.spans import Spans
from argosy.engine.pooling import LogitsReader, Pool
from argosy.engine.sampler import SamplerState
from argosy.errors import ArgosyError
from argosy.kept.chain import Chain
from argosy.kept.tails import PromptEnds
from argosy.prompt.stop import StopStrings
from argosy.prompt.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from argosy.adapters.registry import AdapterUse
    from argosy.engine.grammar.constraint import Constraint

FinishReason = Literal["stop", "length", "cancelled", "error"]
# turn: the maximum of sequences is running. memory: no room for its keys and values. prompt: another request
# computes the beginning of its prompt. model: its model is being loaded. room: other models occupy the memory for its
# model.
WaitReason = Literal["turn", "memory", "prompt", "model", "room"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of the chosen token, and of the best tokens if requested."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A finished answer. `token_ids` includes the token that ended it, if a token did; `text` does not.

    stopped_by: the stop string, end token or stop token that ended it; None for any other end.
    prompt_logprobs: if requested, one per prompt token, None for the first.
    error: why the answer could not be finished, with `finish_reason` "error".
    embedding: the embedding, if the text was submitted for one: float32 [hidden_size], of length 1.
    num_marked: tokens that were chosen with the watermark.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    usage: dict[str, int]
    seed: int
    ledger: Ledger
    stopped_by: str | int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: ArgosyError | None = None
    embedding: NDArray[np.float32] | None = None
    num_marked: int = 0

    def require(self) -> Result:
        """Return this result if the answer could be finished.

        Raises:
            ArgosyError: the error that ended it.
        """
        if self.error is not None:
            raise self.error
        return self


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token. `text` may be empty while a character is incomplete; the last event has the `result`."""

    token_id: int
    text: str
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    result: Result | None


class Sequence:
    """Tokens, KV blocks and sampling state of one request.

    Args:
        number: order of arrival; earlier sequences have lower numbers.
        tenant: the owner; tenants get equal shares of the engine and share nothing else.
        chain: contents of its full KV blocks.
        constraint: the grammar that the answer must follow.
        spans: the media in the prompt, which contains placeholders at their positions; None: text alone.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        number: int,
        max_new_tokens: int,
        sampler_state: SamplerState,
        chain: Chain,
        decoder: StreamDecoder | None = None,
        tenant: str = "",
        constraint: Constraint | None = None,
        spans: Spans | None = None,
    ) -> None:
        # The request, from `requests.py`.
        self.prompt_ids = prompt_ids
        self.params = params
        self.number = number
        self.tenant = tenant
        self.max_new_tokens = max_new_tokens
        self.spans = spans
        self.adapter: AdapterUse | None = None  # None: the model answers without one
        # Reads hidden states or logits of the prompt; there is then no answer.
        self.pool: Pool | LogitsReader | None = None
        self.leader: Sequence | None = None  # the sequence that computes the same prompt for both
        self.followers: list[Sequence] = []
        self.can_reuse = True  # False: every token has to be computed
        self.started_at = 0.0

        # The answer, for the sampler and `append`.
        self.sampler_state = sampler_state
        self.decoder = decoder
        self.constraint = constraint
        self.stop_strings = StopStrings(params.stop) if params.stop else None
        self.new_ids: list[int] = []
        self.text = ""
        self.stopped_by: str | int | None = None

        # The scheduler's: memory held by the sequence, all of it given back when it is preempted or ends.
        self.num_computed = 0  # tokens whose keys and values are in the KV cache
        self.prefill_until = len(prompt_ids)  # number of tokens known when it last started
        self.blocks: list[int] = []
        self.state_slot: int | None = None  # its slot while it runs, if some layer has a recurrent state
        self.waits_for: bytes | None = None  # a block that another sequence is about to compute
        self.scheduled_at: float | None = None  # when it first ran
        self.failed_until = 0  # the end of its last step in which a read failed; 0: none failed
        self.computed_at = 0.0  # when `num_computed` last grew in a step

        # The prefix cache's.
        self.chain = chain
        self.loading: range | None = None  # blocks to load from files before it can run
        # Blocks from here on are computed, because a file could not be read.
        self.load_until = sys.maxsize
        self.cached_tokens: int | None = None  # hits when the sequence first started
        self.snapshots_at: set[int] = set()  # positions at which to snapshot the recurrent state
        self.ends_at: set[int] = set()  # positions at which window blocks of the prefix are kept
        self.last_snapshot = 0  # position of the latest snapshot taken in the answer; 0: none
        self.tail_ends: PromptEnds | None = None  # None: every layer runs for all of its tokens

        # From `answers.py`, `energy.py` and `drafts/governor.py`.
        self.logprobs: list[TokenLogprob] | None = [] if params.logprobs is not None else None
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.embedding: NDArray[np.float32] | None = None  # set when the pool is complete
        self.first_token_at: float | None = None
        self.counters_at_start = Ledger()
        self.metered: Metered | None = None  # the energy that it used; None: nothing measures it
        self.num_proposed = self.num_confirmed = 0  # tokens of drafts
        self.won_s = 0.0  # its part of `Governor.won_s`
        self.events: deque[TokenEvent] = deque()
        self.result: Result | None = None  # set at the end

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.new_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.prefill_until

    @property
    def reuse_limit(self) -> int:
        """The most tokens that may be reused: neither the last token nor any whose logits or hidden states
        are needed.
        """
        if not self.can_reuse:
            return 0
        if self.pool is not None:
            return self.pool.needed_from
        wanted = self.prompt_logprobs
        if wanted is not None and len(wanted) < len(self.prompt_ids):
            return len(wanted) - 1
        return self.num_tokens - 1

    def tokens_from(self, start: int, count: int) -> list[int]:
        """Return the token ids at positions start to start + count."""
        prompt, end = len(self.prompt_ids), start + count
        if start >= prompt:
            return self.new_ids[start - prompt : end - prompt]
        return self.prompt_ids[start:end] + self.new_ids[: max(0, end - prompt)]

    def marks_from(self, start: int, count: int) -> bytes:
        """Return digests of what else positions start to start + count were computed from: media, and the adapter."""
        media = b"" if self.spans is None else self.spans.mark(start, count)
        return media if self.adapter is None else media + self.adapter.mark(start, count)

    def resume(self, token_ids: Iterable[int]) -> None:
        """Replay the beginning of the answer, which the end of the prompt contains: it affects later tokens, but is
        not output.
        """
        for token_id in token_ids:
            self.sampler_state.accept(token_id)
            if self.constraint is not None:
                self.constraint.accept(token_id)
            text = "" if self.decoder is None else self.decoder.push(token_id)
            if self.stop_strings is not None:
                self.stop_strings.push(text)

    def append(self, token_id: int, end_ids: Collection[int]) -> tuple[str, FinishReason | None]:
        """Append a token of the answer. Return the text that is now final, and the reason if the answer ends.

        Args:
            end_ids: tokens that end any answer, unless `ignore_eos` is set.
        """
        self.new_ids.append(token_id)
        params = self.params
        text = ""
        reason: FinishReason | None = None
        if token_id in params.stop_token_ids or (token_id in end_ids and not params.ignore_eos):
            reason, self.stopped_by = "stop", token_id
        elif self.decoder is not None:
            text = self.decoder.push(token_id)
        if reason is None and self.constraint is not None and self.constraint.is_finished:
            reason = "stop"
        if reason is None and len(self.new_ids) >= self.max_new_tokens:
            reason = "length"
        if reason is not None and self.decoder is not None:
            text += self.decoder.finish()
        if self.stop_strings is not None and len(self.new_ids) > params.min_tokens:
            text, hit = self.stop_strings.push(text)
            if hit is not None:
                reason, self.stopped_by = "stop", hit
            elif reason is not None:
                text += self.stop_strings.finish()
        self.text += text
        return text, reason
