"""Check requests, and create the sequences of their answers. Safe from any thread, even while an engine steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.pooling import declared_pooling
from argosy.config import ModelConfig, Pooling, SamplingDefaults, SamplingParams
from argosy.engine.media.spans import Spans
from argosy.engine.pooling import Pool
from argosy.engine.sampler import SamplerState, derived_seed
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.engine.start import Started
from argosy.engine.watermark import MarkedAnswer, Watermark
from argosy.errors import ArgosyError, CheckpointError, PromptTooLong, UsageError
from argosy.media.parts import Part
from argosy.prompt.messages import Message
from argosy.prompt.prompt import Prompt
from argosy.prompt.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from argosy.adapters.registry import Adapters, AdapterUse
    from argosy.engine.grammar.constraint import Constraint

PromptLike = str | Sequence[int] | Sequence[Message] | Sequence[Part] | Prompt


class Requests:
    """Makes sequences for one engine.

    Attributes:
        context_tokens: the room for a prompt and its answer; may change.
        adapters: what a request may name; None: there was never any.

    Args:
        pooling: the pooling of embeddings if a request does not name one.
        watermark: marks sampled text; None: no watermark.
        defaults: sampling values for fields that a request leaves to the model.
    """

    def __init__(
        self,
        started: Started,
        files: ModelFiles,
        *,
        pooling: Pooling | None,
        watermark: Watermark | None,
        defaults: SamplingDefaults,
    ) -> None:
        self._started = started
        self._vocabulary = started.vocabulary
        self.context_tokens = started.plan.context_tokens
        self._chunk_tokens = started.plan.chunk_tokens
        self._model: ModelConfig = files.config
        self._pooling = _find_pooling(files, pooling)
        self._watermark = watermark
        self._defaults = defaults
        self._numbers = itertools.count()
        self.adapters: Adapters | None = None

    @property
    def pooling(self) -> Pooling:
        """The pooling of hidden states into embeddings, if a request does not name one.

        Raises:
            UnsupportedModel: the checkpoint declares a pooling that is not supported.
        """
        if isinstance(self._pooling, ArgosyError):
            raise self._pooling
        return self._pooling

    def prepare(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        num_answers: int = 1,
        tenant: str = "",
        adapter: str | None = None,
    ) -> list[EngineSequence]:
        """Check a request and make one sequence per answer, which the model with `adapter` computes.

        The first answer computes the prompt, and the others continue from there. Each has its own seed, derived from
        the request's.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            UsageError: `PromptBuilder.build` refuses the prompt, this model cannot honour the parameters, or there is
                no such adapter.
        """
        self._started.require_open()
        params = (params or SamplingParams()).fill_in(self._defaults)
        started_at = perf_counter()
        if num_answers < 1:
            raise UsageError(f"num_answers must be at least 1, found {num_answers}")
        built = self._started.prompts.build(prompt, tenant=tenant)
        prompt_ids = list(built.token_ids or ())
        available, least = self.context_tokens, max(1, params.min_tokens)
        if len(prompt_ids) + least > available:
            raise PromptTooLong.of(len(prompt_ids), available, for_answer=least)
        self._require_possible(params)
        left, use = available - len(prompt_ids), self._use(adapter, prompt_ids)
        sequences: list[EngineSequence] = []
        for number in range(num_answers):
            seed = params.seed if not sequences else derived_seed(sequences[0].sampler_state.seed, number)
            sequence = EngineSequence(
                prompt_ids,
                params,
                number=next(self._numbers),
                max_new_tokens=left if params.max_tokens is None else min(params.max_tokens, left),
                sampler_state=SamplerState(prompt_ids, seed, self._mark(params)),
                chain=self._started.cache.chain(tenant),
                decoder=self._decoder_of(built, params),
                tenant=tenant,
                constraint=self._constraint(params, tenant),
                spans=self._spans(built, params),
            )
            sequence.started_at = started_at
            sequence.adapter = use
            sequence.resume(prompt_ids[len(prompt_ids) - built.num_answered :])
            if sequences:
                sequence.leader = sequences[0]
                sequences[0].followers.append(sequence)
            sequences.append(sequence)
        return sequences

    def prepare_embedding(
        self, text: str | Sequence[int], *, pooling: Pooling | None = None, tenant: str = "", adapter: str | None = None
    ) -> EngineSequence:  # fmt: skip
        """Check a text and make the sequence that computes its embedding.

        Args:
            text: the text without a chat template, to which the tokenizer adds its special tokens; or token ids.
            pooling: None: the engine's.

        Raises:
            PromptTooLong: the text is longer than the context.
            UnsupportedModel: the checkpoint declares a pooling that is not supported.
            UsageError: the text is empty, the model cannot process it, or there is no such adapter.
        """
        self._started.require_open()
        pooling = pooling or self.pooling
        started_at = perf_counter()
        prompt_ids = list(self._started.prompts.whole_text(text).token_ids or ())
        if len(prompt_ids) > self.context_tokens:
            raise PromptTooLong.of(len(prompt_ids), self.context_tokens, for_answer=0)
        sequence = EngineSequence(
            prompt_ids,
            SamplingParams(),
            number=next(self._numbers),
            max_new_tokens=0,
            sampler_state=SamplerState(prompt_ids, seed=0),
            chain=self._started.cache.chain(tenant),
            tenant=tenant,
        )
        sequence.pool = Pool(pooling, len(prompt_ids))
        sequence.adapter = self._use(adapter, prompt_ids)
        sequence.started_at = started_at
        return sequence

    def _spans(self, prompt: Prompt, params: SamplingParams) -> Spans | None:
        if not prompt.spans:
            return None
        if params.prompt_logprobs is not None:
            raise UsageError("prompt_logprobs needs a prompt of text alone: media have no log-probabilities")
        for _, span in prompt.spans:
            if span.sees_both_ways and span.num_positions > self._chunk_tokens:
                raise UsageError(
                    f"a span of kind {span.kind} fills {span.num_positions} positions that see one another, and a"
                    f" step has at most {self._chunk_tokens} prompt tokens",
                    hint="allow longer steps with chunk_tokens, or make the picture smaller",
                )
        return Spans(
            prompt.spans,
            hidden_size=self._model.hidden_size,
            num_layers=self._model.num_layers,
            num_axes=self._model.num_axes,
        )

    def _use(self, adapter: str | None, prompt_ids: Sequence[int]) -> AdapterUse | None:
        if adapter is None:
            return None
        if self.adapters is None:
            raise UsageError(f"unknown adapter {adapter[:80]!a}: this engine has none")
        return self.adapters.use(adapter, prompt_ids)

    def require_room(self, sequences: Sequence[EngineSequence]) -> None:
        """Check sequences once more when they are queued: the context may have shrunk since they were created, and
        their adapter may be gone.

        Raises:
            PromptTooLong: one of them does not fit.   UsageError: the adapter was dropped.
        """
        for one in sequences:
            if one.adapter is not None and self.adapters is not None:
                self.adapters.require(one.adapter)
            if len(one.prompt_ids) + one.max_new_tokens > self.context_tokens:
                raise PromptTooLong.of(
                    len(one.prompt_ids), self.context_tokens, for_answer=one.max_new_tokens
                )

    def forget(self, tenant: str) -> None:
        """Forget a tenant's compiled grammars."""
        if not isinstance(self._vocabulary.grammars, UsageError):
            self._vocabulary.grammars.forget(tenant)

    def _mark(self, params: SamplingParams) -> MarkedAnswer | None:
        if self._watermark is None or not params.watermark or params.temperature == 0:
            return None
        return self._watermark.begin()

    def _decoder_of(self, prompt: Prompt, params: SamplingParams) -> StreamDecoder | None:
        if self._vocabulary.tokenizer is None:
            return None
        return self._vocabulary.tokenizer.stream(
            keep_special=not params.skip_special_tokens, is_start=prompt.is_conversation
        )

    def _constraint(self, params: SamplingParams, tenant: str) -> Constraint | None:
        if params.grammar is None:
            return None
        grammars = self._vocabulary.grammars
        if isinstance(grammars, UsageError):
            raise grammars
        return grammars.compile(params.grammar, tenant)

    def _require_possible(self, params: SamplingParams) -> None:
        """Refuse parameters that this model cannot honour."""
        if params.stop and self._vocabulary.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
        for name, token_ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < self._model.vocab_size:
                    raise UsageError(
                        f"{name} names token {token_id}; the vocabulary has {self._model.vocab_size}"
                    )


def _find_pooling(files: ModelFiles, given: Pooling | None) -> Pooling | ArgosyError:
    """Return the pooling of embeddings, or the error to raise when a request wants an embedding."""
    try:
        return given or declared_pooling(files) or "last"
    except CheckpointError as error:
        return error
