"""Turn the logits of a step into tokens of answers, end answers, and count their cost.

    logits of a sequence's wanted rows ─ sampler ─ append ─> Accepted ─ the scheduler has committed ─> events

With proposed tokens, a sequence has several rows: the first follows its last token, each further one a proposal. The
sampler chooses from a row as if there were no proposals. If its choice is the proposal, the next row is valid as well.
So proposals never change the tokens of an answer.

Elsewhere: `sampler.py` chooses a token; `sequence.py` knows when an answer ends; the engine commits between `accept`
and `Accepted.end`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from argosy.engine.admission import Admission
from argosy.engine.drafts.governor import Governor
from argosy.engine.energy import EnergyShares
from argosy.engine.ledger import Ledger
from argosy.engine.sampler import Sampler, with_logprobs
from argosy.engine.sequence import FinishReason, Result, TokenEvent, TokenLogprob
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.engine.steps import Scheduled
from argosy.errors import ArgosyError
from argosy.machine import resources
from argosy.machine.energy import EnergyMeter
from argosy.model.clock import PartClock
from argosy.model.model import Model


@dataclass(slots=True)
class Accepted:
    """One sequence's share of a step: an event for each new token, and the reason if the answer ends."""

    sequence: EngineSequence
    events: list[TokenEvent] = field(default_factory=list)
    reason: FinishReason | None = None
    error: ArgosyError | None = None

    def end(self, result: Result) -> None:
        """Attach the result to the last event, unless an error ended the answer after it."""
        if self.events and self.error is None:
            self.events[-1] = replace(self.events[-1], finish_reason=self.reason, result=result)

    @property
    def num_confirmed(self) -> int:
        """The number of proposals that became part of the answer: all new tokens but the last were proposed."""
        return max(0, len(self.events) - 1)


class Answers:
    """Samples, ends and counts.

    Args:
        end_ids: tokens that end any answer, unless they are ignored.
        admission: learns when a sequence ends.
        model: provides rows of the last step; its expert runner, if any, counts look-ups and reads.
        rows_at_once: rows of logits for which the memory plan has room.
        governor: knows the time that proposals saved; None: unknown.
    """

    def __init__(
        self,
        end_ids: Collection[int],
        admission: Admission,
        *,
        clock: PartClock,
        model: Model,
        rows_at_once: int,
        governor: Governor | None = None,
    ) -> None:
        self._energy = EnergyShares(EnergyMeter.find(), partial(_bytes_read, model))
        self._governor = governor
        self.sampler = Sampler(end_ids)
        self._admission = admission
        self._end_ids = end_ids
        self._clock = clock
        self._model = model
        self._rows_at_once = rows_at_once
        self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._proposed_tokens = self._confirmed_tokens = 0
        clock.mark("other")
        self._seconds_at_start = dict(clock.seconds)

    def start(self, sequence: EngineSequence, counters: Ledger) -> None:
        """Note that a sequence was queued; `counters` is the ledger at that time."""
        sequence.counters_at_start = counters
        self._energy.start(sequence)

    def begin(self) -> None:
        """Note that a step begins."""
        self._energy.begin()

    def read_prompts(self, scheduled: Scheduled) -> list[Accepted]:
        """Read the rows of prompts that a step computed besides those of `accept`: for log-probabilities and
        embeddings.

        Returns:
            The sequences that end: their embedding is complete, or their request cannot be computed.
        """
        self._energy.note(scheduled)
        if scheduled.counts is None:  # every sequence decodes
            return []
        return self._note_prompts(scheduled) + self._pool(scheduled)

    def accept(
        self, sequence: EngineSequence, rows: NDArray[np.float32], proposals: Sequence[int] = ()
    ) -> Accepted:
        """Choose tokens and append them, as long as the sampler chooses the proposed tokens.

        Args:
            rows: logits, float32 [1 + proposals, vocab_size].
        """
        accepted = Accepted(sequence)
        self._note_first(sequence)
        if not sequence.max_new_tokens:
            accepted.reason = "length"
            return accepted
        for number, logits in enumerate(rows):
            try:
                sampled = self.sampler.sample(
                    logits, sequence.params, sequence.sampler_state, sequence.constraint
                )
            except ArgosyError as error:  # affects only this sequence
                accepted.reason, accepted.error = "error", error
                break
            self._clock.mark("sampling")
            self._new_tokens += 1
            logprob = None
            if sequence.logprobs is not None and sampled.logprob is not None:
                logprob = TokenLogprob(sampled.token_id, sampled.logprob, sampled.top_logprobs)
                sequence.logprobs.append(logprob)
            text, accepted.reason = sequence.append(sampled.token_id, self._end_ids)
            accepted.events.append(TokenEvent(sampled.token_id, text, logprob, None, None))
            self._clock.mark("other")
            is_proposed = number < len(proposals) and sampled.token_id == proposals[number]
            if accepted.reason is not None or not is_proposed:
                break
        if proposals:
            self._proposed_tokens += len(proposals)
            self._confirmed_tokens += accepted.num_confirmed
            sequence.num_proposed += len(proposals)
            sequence.num_confirmed += accepted.num_confirmed
        return accepted

    def _note_prompts(self, scheduled: Scheduled) -> list[Accepted]:
        """Record log-probabilities of the prompt tokens that follow a step's tokens, where a request wants them."""
        ended = []
        for number, sequence in enumerate(scheduled.sequences):
            noted, prompt_ids = sequence.prompt_logprobs, sequence.prompt_ids
            if noted is None or len(noted) >= len(prompt_ids):
                continue
            rows = np.flatnonzero(scheduled.step.sequence == number)
            order = scheduled.step.order[rows]
            rows = rows[(order >= len(noted) - 1) & (order < len(prompt_ids) - 1)]
            count = sequence.params.prompt_logprobs
            assert count is not None
            try:
                for part in self._in_parts(rows):
                    for logits in self._model.logits(part):
                        found = with_logprobs(prompt_ids[len(noted)], logits, count)
                        assert found.logprob is not None
                        noted.append(TokenLogprob(found.token_id, found.logprob, found.top_logprobs))
            except ArgosyError as error:  # affects only this sequence
                ended.append(Accepted(sequence, reason="error", error=error))
        return ended

    def _pool(self, scheduled: Scheduled) -> list[Accepted]:
        """Give each pool the rows of a step that it needs.

        A pooled text takes no row of logits, and its sum is smaller than such a row; so the memory plan covers it.
        """
        complete: list[Accepted] = []
        for number, sequence in enumerate(scheduled.sequences):
            if (pool := sequence.pool) is None:
                continue
            rows = np.flatnonzero(scheduled.step.sequence == number)
            rows = rows[scheduled.step.order[rows] >= pool.needed_from]
            for part in self._in_parts(rows):
                pool.read(self._model, part)
            if not pool.is_complete:
                continue
            self._note_first(sequence)
            try:
                sequence.embedding = pool.vector()
                complete.append(Accepted(sequence, reason="stop"))
            except ArgosyError as error:  # affects only this sequence
                complete.append(Accepted(sequence, reason="error", error=error))
        return complete

    def _in_parts(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        for start in range(0, len(rows), self._rows_at_once):
            yield rows[start : start + self._rows_at_once]

    def _note_first(self, sequence: EngineSequence) -> None:
        """Count a prompt when it is computed for the first time."""
        if sequence.first_token_at is None:
            sequence.first_token_at = perf_counter()
            self._prompt_tokens += len(sequence.prompt_ids)
            self._cached_tokens += sequence.cached_tokens or 0

    def result(
        self, sequence: EngineSequence, reason: FinishReason, error: ArgosyError | None = None
    ) -> Result:
        """End a sequence: set and return its result."""
        self._energy.settle()
        self._admission.count_end(perf_counter())
        prompt, new = len(sequence.prompt_ids), len(sequence.new_ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        sequence.result = Result(
            text=sequence.text,
            token_ids=sequence.new_ids,
            finish_reason=reason,
            logprobs=sequence.logprobs,
            usage=usage | {"cached_tokens": sequence.cached_tokens or 0},
            seed=sequence.sampler_state.seed,
            ledger=self._ledger_since(sequence),
            stopped_by=sequence.stopped_by,
            prompt_logprobs=sequence.prompt_logprobs,
            error=error,
            embedding=sequence.embedding,
            num_marked=0 if (mark := sequence.sampler_state.mark) is None else mark.num_marked,
        )
        return sequence.result

    @property
    def ledger(self) -> Ledger:
        """Return totals since the engine started."""
        stats = None if self._model.experts is None else self._model.experts.stats
        self._clock.mark("other")
        seconds, metered = self._clock.seconds, self._energy.total
        rows = self._model.table_counts
        return Ledger(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            new_tokens=self._new_tokens,
            proposed_tokens=self._proposed_tokens,
            confirmed_tokens=self._confirmed_tokens,
            won_s=None if self._governor is None else self._governor.won_s,
            wall_s=sum(seconds.values()) - sum(self._seconds_at_start.values()),
            lookups=stats.lookups if stats else 0,
            hits=stats.hits if stats else 0,
            bytes_read=_bytes_read(self._model),
            rows=rows.asked,
            rows_found=rows.found,
            rows_late=rows.late,
            peak_bytes=resources.peak_bytes(),
            energy_j=None if metered is None else metered.joules,
            drive_energy_j=None if metered is None else metered.drive_j,
            parts={part: s - self._seconds_at_start[part] for part, s in seconds.items()},
        )

    def _ledger_since(self, sequence: EngineSequence) -> Ledger:
        now, before = self.ledger, sequence.counters_at_start
        first, scheduled = sequence.first_token_at, sequence.scheduled_at
        metered = None if self._energy.total is None else sequence.metered
        return Ledger(
            prompt_tokens=len(sequence.prompt_ids),
            cached_tokens=sequence.cached_tokens or 0,
            new_tokens=len(sequence.new_ids),
            proposed_tokens=sequence.num_proposed,
            confirmed_tokens=sequence.num_confirmed,
            won_s=None if self._governor is None else sequence.won_s,
            wall_s=now.wall_s - before.wall_s,
            queue_s=None if scheduled is None else scheduled - sequence.started_at,
            time_to_first_token_s=None if first is None else first - sequence.started_at,
            decode_s=None if first is None else perf_counter() - first,
            lookups=now.lookups - before.lookups,
            hits=now.hits - before.hits,
            bytes_read=now.bytes_read - before.bytes_read,
            rows=now.rows - before.rows,
            rows_found=now.rows_found - before.rows_found,
            rows_late=now.rows_late - before.rows_late,
            peak_bytes=now.peak_bytes,
            energy_j=None if metered is None else metered.joules,
            drive_energy_j=None if metered is None else metered.drive_j,
            parts={part: seconds - before.parts[part] for part, seconds in now.parts.items()},
        )


def _bytes_read(model: Model) -> int:
    """Return the bytes of experts and of rows of tables that were read."""
    of_experts = 0 if model.experts is None else model.experts.stats.bytes_read
    return of_experts + model.table_counts.bytes_read
