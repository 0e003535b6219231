"""Guess the next tokens of an answer cheaply, so that one step of the model can confirm several of them.

A draft only saves time: the sampler chooses every token from the model's own logits (`engine/answers.py`), so text with
a drafter equals text without.

Elsewhere: `lookup.py` is a drafter; `governor.py` decides when a drafter may propose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from argosy.engine.sequence import Sequence as EngineSequence


class Drafter(Protocol):
    """Proposes tokens, in the thread that steps the engine."""

    def propose(self, sequence: EngineSequence, most: int) -> Sequence[int]:
        """Guess at most `most` tokens that follow `sequence.prompt_ids` and `sequence.new_ids`; may be empty.

        Called at most once per decoding sequence and step.
        """
        ...

    def forget(self, sequence: EngineSequence) -> None:
        """Drop the state of a sequence that ended or was preempted; the sequence may come back."""
        ...
