"""Calls that step an engine until answers are there, for programs that have nothing else to do meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from argosy.config import Pooling, SamplingParams
from argosy.engine.pooling import shortened
from argosy.engine.requests import PromptLike
from argosy.engine.sequence import Result, TokenEvent
from argosy.engine.sequence import Sequence as EngineSequence

_EMBEDDED_AT_ONCE = 64  # texts that wait or run together


class BlockingCalls(ABC):
    """`stream`, `generate`, `generate_batch` and `embed`, on top of `prepare`, `enqueue`, `step` and `cancel`."""

    @abstractmethod
    def prepare(self, prompt: PromptLike, params: SamplingParams | None = None) -> list[EngineSequence]: ...

    @abstractmethod
    def prepare_embedding(
        self, text: str | Sequence[int], *, pooling: Pooling | None = None, tenant: str = ""
    ) -> list[EngineSequence]: ...

    @abstractmethod
    def enqueue(self, sequences: Sequence[EngineSequence], *, has_room: bool = False) -> None: ...

    @abstractmethod
    def step(self) -> list[TokenEvent]: ...

    @abstractmethod
    def cancel(self, sequence: EngineSequence) -> None: ...

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Yield the events of one answer as they come; the last has the result. Closing the iterator cancels it.

        Raises:
            ArgosyError: the answer cannot be finished, because a read failed or its grammar cannot be followed.
        """
        (sequence,) = self.prepare(prompt, params)
        try:
            self.enqueue([sequence])
            while sequence.events or sequence.result is None:
                while sequence.events:
                    yield sequence.events.popleft()
                if sequence.result is None:
                    self.step()
            sequence.result.require()
        finally:
            self.cancel(sequence)

    def generate(self, prompt: PromptLike, params: SamplingParams | None = None) -> Result:
        """Return one whole answer. Raises what `stream` raises."""
        return self.generate_batch([prompt], params)[0]

    def generate_batch(
        self,
        prompts: Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> list[Result]:
        """Answer several prompts together, each as it would be alone. Raises what `stream` raises."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        sequences: list[EngineSequence] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                sequences += self.prepare(prompt, own)
            self.enqueue(sequences)
            while any(sequence.result is None for sequence in sequences):
                self.step()
            return [one.result.require() for one in sequences if one.result is not None]
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
    ) -> NDArray[np.float32]:
        """The embeddings of texts, or of lists of token ids: float32 [texts, dimensions], each of length 1.

        A text is taken as it is: an instruction that the model expects before it is up to the caller.

        Args:
            pooling: the mean of the hidden states, or that of the last token; None: what the checkpoint declares.
            dimensions: only so many of the first dimensions, for models that were trained for it; None: all.

        Raises:
            PromptTooLong: a text is longer than the context.
            UsageError: a text is empty, or the model has fewer dimensions.
            UnsupportedModel: the checkpoint declares a pooling that is not supported.
        """
        vectors = []
        for start in range(0, len(texts), _EMBEDDED_AT_ONCE):
            sequences: list[EngineSequence] = []
            try:
                for text in texts[start : start + _EMBEDDED_AT_ONCE]:
                    sequences += self.prepare_embedding(text, pooling=pooling)
                self.enqueue(sequences)
                while any(sequence.result is None for sequence in sequences):
                    self.step()
                for sequence in sequences:
                    assert sequence.result is not None
                    vector = sequence.result.require().embedding
                    assert vector is not None
                    vectors.append(vector if dimensions is None else shortened(vector, dimensions))
            finally:
                for sequence in sequences:
                    self.cancel(sequence)
        return np.array(vectors, np.float32)
