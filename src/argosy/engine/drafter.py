"""Guess the next tokens of an answer cheaply, so that one step of the model can confirm several of them.

A draft only saves time: the sampler chooses every token from the model's own logits (`answers.py`), so text with a
drafter equals text without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from argosy.engine.sequence import Sequence as EngineSequence


class Drafter(Protocol):
    """Proposes tokens; called once per decoding sequence and step, in the thread that steps the engine."""

    def propose(self, sequence: EngineSequence, most: int) -> Sequence[int]:
        """Guess the tokens that follow `sequence.prompt_ids` and `sequence.new_ids`, at most `most`; may be empty."""
        ...
