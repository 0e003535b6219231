"""Calls that step an engine until answers are there, for programs that have nothing else to do meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from argosy.config import SamplingParams
from argosy.engine.requests import PromptLike
from argosy.engine.sequence import Result, TokenEvent
from argosy.engine.sequence import Sequence as EngineSequence


class BlockingCalls(ABC):
    """`stream`, `generate` and `generate_batch`, on top of `submit`, `step` and `cancel`."""

    @abstractmethod
    def submit(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, tenant: str = ""
    ) -> EngineSequence: ...

    @abstractmethod
    def step(self) -> list[TokenEvent]: ...

    @abstractmethod
    def cancel(self, sequence: EngineSequence) -> None: ...

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Yield the events of one answer as they come; the last has the result. Closing the iterator cancels it.

        Raises:
            ArgosyError: the answer cannot be finished, because a read failed or its grammar cannot be followed.
        """
        sequence = self.submit(prompt, params)
        try:
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
                sequences.append(self.submit(prompt, own))
            while any(sequence.result is None for sequence in sequences):
                self.step()
            return [one.result.require() for one in sequences if one.result is not None]
        finally:
            for sequence in sequences:
                self.cancel(sequence)
