"""Propose tokens with the checkpoint's own layer for multi-token prediction.

    a step is committed  ─ hidden states of its positions ─  catch up: the tokens that followed ─ draft layer ─> state
    propose: state ─ head ─> token ─ draft layer ─> state ─ head ─> token ...

Every position of a prompt or an answer runs through the draft layer once, so the layer's keys and values exist
wherever the model's do, including shared prefixes, forks and files. Positions of a prompt run after their step.
Positions of an answer run when it proposes, `MOST_BEHIND` at a time while it pauses, and at its end. So a paused
answer pays for little more than 1/32 of the layer. If an answer is cancelled or preempted, the positions that were
still to run keep their old contents, and a sequence that continues from them may draft worse.

Elsewhere: `model/draft_layer.py` computes; `governor.py` decides whether proposals pay.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from argosy.engine.sequence import Sequence
from argosy.engine.steps import Scheduled
from argosy.errors import ArgosyError
from argosy.model.draft_layer import MOST_BEHIND
from argosy.model.model import Model
from argosy.model.step import Step


class _Followed:
    """The draft layer's progress in a sequence: `num_run` positions, then hidden states that wait."""

    def __init__(self, num_run: int) -> None:
        self.num_run = num_run
        self.waiting: list[NDArray[np.float32]] = []
        self.state: NDArray[np.float32] | None = None  # after the last position: float32 [1, hidden_size]

    @property
    def num_behind(self) -> int:
        return sum(len(states) for states in self.waiting)

    @property
    def end(self) -> int:
        return self.num_run + self.num_behind


class MtpDrafter:
    """Proposes the likeliest tokens.

    Attributes:
        fault: why the drafter has stopped: an expert of the draft layer could not be read. Answers continue without it.

    Args:
        model: has a draft layer.
        block_tokens: positions of a KV block.
    """

    def __init__(self, model: Model, block_tokens: int) -> None:
        assert model.draft is not None
        self._model, self._layer, self._block_tokens = model, model.draft, block_tokens
        self._followed: dict[Sequence, _Followed] = {}
        self.fault: ArgosyError | None = None

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """Propose at most `most` tokens; fewer at the end of the sequence's last KV block."""
        followed = self._followed.get(sequence)
        if followed is None or followed.end != sequence.num_tokens - 1:
            return []
        proposed: list[int] = []
        try:
            self._catch_up(sequence, followed)
            state = followed.state
            assert state is not None
            for position in range(followed.end, followed.end + most):
                proposed.append(int(self._layer.logits(state)[0].argmax()))
                if len(proposed) == most or position >= len(sequence.blocks) * self._block_tokens:
                    break
                # The model has not computed this position; its own run will overwrite these values.
                known = self._layer.following(state)
                state = self._layer.run(self._step(sequence, position, proposed[-1:]), known)
        except ArgosyError as error:
            self._stop(error)
        return proposed

    def note(self, scheduled: Scheduled, ended: Collection[Sequence] = ()) -> None:
        """Take the hidden states that a step computed, after its tokens were committed.

        Args:
            ended: sequences that will not run again.
        """
        step = scheduled.step
        for number, sequence in enumerate(scheduled.sequences):
            if self.fault is not None:
                return
            if sequence.pool is not None:
                continue
            rows = np.flatnonzero(step.sequence == number)
            first = int(step.order[rows[0]])
            # A position also needs the token after it.
            count = min(sequence.num_computed - first, sequence.num_tokens - 1 - first)
            followed = self._followed.get(sequence)
            try:
                if count < 1:  # a rejected proposal restored the recurrent state from before the step
                    if followed is not None and sequence in ended:
                        self._catch_up(sequence, followed)
                    continue
                if followed is None or followed.end != first:
                    followed = self._followed[sequence] = _Followed(first)
                must_run = first < len(sequence.prompt_ids) or sequence in ended or bool(sequence.followers)
                for begin in range(0, count, self._layer.max_tokens):
                    part = rows[begin : min(count, begin + self._layer.max_tokens)]
                    followed.waiting.append(self._model.final_states(part))
                    if must_run or followed.num_behind >= MOST_BEHIND:
                        self._catch_up(sequence, followed)
            except ArgosyError as error:
                self._stop(error)

    def _catch_up(self, sequence: Sequence, followed: _Followed) -> None:
        """Run the positions whose hidden states wait."""
        if not followed.waiting:
            return
        waiting, followed.waiting = np.concatenate(followed.waiting), []
        for begin in range(0, len(waiting), self._layer.max_tokens):
            states = waiting[begin : begin + self._layer.max_tokens]
            following = sequence.tokens_from(followed.num_run + 1, len(states))
            after = self._layer.run(self._step(sequence, followed.num_run, following), states)
            followed.num_run += len(states)
            followed.state = after[-1:].copy()

    def _step(self, sequence: Sequence, start: int, following: list[int]) -> Step:
        """Build a step for positions of a sequence from `start` on, each with the token that follows it."""
        count = len(following)
        order = np.arange(start, start + count, dtype=np.int32)
        table = np.array([sequence.blocks], np.int32)
        blocks, offsets = np.divmod(order, self._block_tokens)
        return Step(
            token_ids=np.array(following, np.int32),
            sequence=np.zeros(count, np.int32),
            slots=table[0, blocks].astype(np.int64) * self._block_tokens + offsets,
            block_table=table,
            is_decode=np.full(count, start >= len(sequence.prompt_ids)),
            order=order,
            wanted=np.empty(0, np.int64),
            angles=None if sequence.spans is None else sequence.spans.angles(start, count),
        )

    def _stop(self, error: ArgosyError) -> None:
        self.fault = error
        self._followed.clear()

    def forget(self, sequence: Sequence) -> None:
        self._followed.pop(sequence, None)
