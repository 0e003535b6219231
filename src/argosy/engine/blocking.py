"""Calls that step an engine until answers are complete, for programs that have nothing else to do meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from argosy.config import ModelConfig, Pooling, SamplingParams
from argosy.engine.pooling import LogitsReader, shortened
from argosy.engine.requests import PromptLike, Requests
from argosy.engine.sequence import Result, TokenEvent
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.engine.turns import Turns
from argosy.errors import UsageError

_EMBEDDED_AT_ONCE = 64  # texts that wait or run together


class BlockingCalls(ABC):
    """`stream`, `generate`, `generate_batch`, `embed` and `logits`, on top of `submit` and `step`."""

    config: ModelConfig
    requests: Requests
    _lock: Turns  # held for each step, and for each call between two steps

    @property
    @abstractmethod
    def has_work(self) -> bool: ...

    @abstractmethod
    def enqueue(self, sequences: Sequence[EngineSequence], *, has_room: bool = False) -> None: ...

    @abstractmethod
    def step(self) -> list[TokenEvent]: ...

    @abstractmethod
    def cancel(self, sequence: EngineSequence) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, tenant: str = "", adapter: str | None = None
    ) -> EngineSequence:  # fmt: skip
        """Queue a prompt. Its events collect in `.events` as `step` is called.

        Args:
            tenant: the request's owner. Tenants get equal shares of the engine and never share prefixes.
            adapter: the name of one of `Engine.adapters`; None: the model answers without one.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            Overloaded: too many sequences are already waiting.
            UsageError: `PromptBuilder.build` refuses the prompt, this model cannot honour the parameters, or there is
                no such adapter.
        """
        sequences = self.requests.prepare(prompt, params, tenant=tenant, adapter=adapter)
        self.enqueue(sequences)
        return sequences[0]

    def stream(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[TokenEvent]:
        """Yield the events of one answer as they arrive; the last has the result. Closing the iterator cancels the
        answer.

        Raises:
            ArgosyError: the answer cannot be finished, because a read failed or its grammar cannot be followed.
        """
        (sequence,) = self.requests.prepare(prompt, params, adapter=adapter)
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

    def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Result:
        """Return one whole answer. Raises what `stream` raises."""
        return self.generate_batch([prompt], params, adapter=adapter)[0]

    def generate_batch(
        self,
        prompts: Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answer several prompts together, each as it would be alone; lists have parameters and adapters of each.
        Raises what `stream` raises.
        """
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else adapter
        asked = zip(prompts, each, names, strict=True)
        prepared = [self.requests.prepare(prompt, own, adapter=name) for prompt, own, name in asked]
        return self._finish_all([one for sequences in prepared for one in sequences])

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the embeddings of texts, or of lists of token ids: float32 [texts, dimensions], each of length 1.

        Texts are used unchanged: if the model expects an instruction before a text, the caller must add it.

        Args:
            pooling: the mean of the hidden states, or the last token's state; None: the pooling that the checkpoint
            declares.
            dimensions: keep only the first dimensions, for models trained for it; None: all.

        Raises:
            PromptTooLong: a text is longer than the context.
            UsageError: a text is empty, or the model has fewer dimensions.
            UnsupportedModel: the checkpoint declares a pooling that is not supported.
        """
        vectors = []
        for start in range(0, len(texts), _EMBEDDED_AT_ONCE):
            some = texts[start : start + _EMBEDDED_AT_ONCE]
            prepare = partial(self.requests.prepare_embedding, pooling=pooling, adapter=adapter)
            prepared = [prepare(text) for text in some]
            for result in self._finish_all(prepared):
                assert result.embedding is not None
                vectors.append(
                    result.embedding if dimensions is None else shortened(result.embedding, dimensions)
                )
        return np.array(vectors, np.float32)

    def logits(self, token_ids: Sequence[int], *, adapter: str | None = None) -> NDArray[np.float32]:
        """Return next-token logits at every position: float32 [tokens, vocab_size]. Needs no tokenizer.

        The array is not part of the memory plan; `read_logits` passes the same rows a few at a time, within the plan.
        """
        out = np.empty((len(token_ids), self.config.vocab_size), np.float32)

        def keep(first: int, rows: NDArray[np.float32]) -> None:
            out[first : first + len(rows)] = rows

        self.read_logits(token_ids, keep, adapter=adapter)
        return out

    def read_logits(
        self, token_ids: Sequence[int], take: Callable[[int, NDArray[np.float32]], None], *, adapter: str | None = None
    ) -> None:  # fmt: skip
        """Call `take` with the next-token logits of all positions, in order, a few at a time.

        Args:
            take: receives the position of the first row, and the rows: float32 [rows, vocab_size], at most
                `settings.max_sequences` rows. The memory plan has room for these and two copies.

        Raises:
            UsageError: the engine has other sequences.
        """
        (sequence,) = self.requests.prepare(list(token_ids), SamplingParams(max_tokens=1), adapter=adapter)
        sequence.pool = LogitsReader(len(token_ids), take)
        with (
            self._lock
        ):  # until the last row: a failed step of another thread would cancel this sequence as well
            if self.has_work:
                raise UsageError("logits are read alone; finish or cancel the other sequences first")
            self._finish_all([sequence])

    def _finish_all(self, sequences: list[EngineSequence]) -> list[Result]:
        """Queue sequences and step until each has its result."""
        try:
            self.enqueue(sequences)
            while any(sequence.result is None for sequence in sequences):
                self.step()
            return [one.result.require() for one in sequences if one.result is not None]
        finally:
            for sequence in sequences:
                self.cancel(sequence)
