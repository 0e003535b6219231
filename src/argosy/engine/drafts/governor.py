"""Let a drafter propose only while that makes answers faster, judging by measured step times.

    each step: tokens proposed, seconds  ->  what proposals cost      ┐
    each answer: confirmed of proposed   ->  how often they are right ┴─>  utility  ->  how many to propose

Tokens of a step share its weights. But more tokens choose more experts, and more experts must be read. So proposals
cost time; how much depends on the model, the machine and the budget.

While S answers decode, the *utility* of proposing w tokens for one of them is the ratio of tokens per second with and
without these proposals:

    (S + expected) / S / cost(S, w)         expected = p + p^2 + ... + p^w

p is the share of this answer's proposals that were right; older proposals count less. `cost` is the time of a step
with w proposals relative to a step without; it includes reads of missing experts and the drafter's own time. It is the
median of the last such steps, each compared with plain steps of its time, because other processes and longer contexts
slow both kinds alike.

An answer begins with a trial of single tokens. If the highest utility is above `ON_ABOVE`, the answer continues with
the number of proposals that reaches it. It stops when the utility is below `OFF_BELOW` even for a p one standard
deviation higher: p comes from a few proposals, and a pause costs more than some wrong proposals. Then it pauses before
the next trial, at first for `FIRST_PAUSE` tokens, and twice as long each time.

Nothing is proposed while more than `DRAFTED_AT_ONCE` sequences run, whose tokens share the weights already, nor while
the drive reads for more than `BUSY` of the time, when every missing expert costs its whole read.

The governor decides only when tokens come, never which: any choice here gives the same text.

Elsewhere: `engine/scheduler.py` asks before each step, and counts it afterwards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from statistics import median
from typing import NamedTuple

from argosy.config import DRAFTED_AT_ONCE
from argosy.engine.sequence import Sequence

ON_ABOVE, OFF_BELOW = 1.05, 1.02
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024  # tokens
# Shares of time in which the drive reads: above the first, no proposals; below the second, proposals resume.
BUSY, QUIET = 0.8, 0.7
TRIED = 2  # single tokens that a trial proposes in any case
PLAIN_EVERY = 24  # steps between plain steps, which keep the cost of a plain step current
_FEWEST_PLAIN = 2  # steps without proposals before the first one with some
_PAID_OFF = 16  # after this many proposals since a trial, the next pause is short again
# A trial begins with this many assumed proposals, of which the second number were right.
_SEEN, _RIGHT = 2.0, 1.4
_KEPT = 0.95  # weight of earlier proposals at each count
_REMEMBERED = 5  # steps of a kind in the median
_VALID_STEPS = 256  # steps after which a cost is forgotten if no step of its kind ran
_FIRST_COST = 0.3  # cost of a proposed token, as a share of a step, until it is measured
_BUSY_KEPT = 0.9  # weight of earlier steps in how busy the drive is


class Outcome(NamedTuple):
    """The result of a sequence's proposals in a step.

    must_rerun: the recurrent state was restored, so the confirmed tokens run again in the next step.
    """

    num_proposed: int = 0
    num_confirmed: int = 0
    must_rerun: bool = False


class _Answer:
    """The record of a sequence's proposals."""

    def __init__(self) -> None:
        self.pause = FIRST_PAUSE  # tokens of the next pause
        self.must_rerun = False
        self.begin_trial()

    def begin_trial(self) -> None:
        self.tries_left, self.paused_for = TRIED, 0
        self.is_on = False
        self.seen, self.right = _SEEN, _RIGHT
        self.num_proposed = 0  # since the trial began

    def begin_pause(self) -> None:
        self.paused_for = self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def count(self, outcome: Outcome) -> None:
        self.must_rerun = outcome.must_rerun
        if self.paused_for:
            self.paused_for -= 1
            if not self.paused_for:
                self.begin_trial()
        if not outcome.num_proposed:
            return
        self.tries_left = max(0, self.tries_left - 1)
        self.num_proposed += outcome.num_proposed
        if self.num_proposed >= _PAID_OFF and self.is_on:
            self.pause = FIRST_PAUSE
        is_wrong = outcome.num_confirmed < outcome.num_proposed
        self.seen = _KEPT * self.seen + outcome.num_confirmed + is_wrong
        self.right = _KEPT * self.right + outcome.num_confirmed

    @property
    def right_share(self) -> float:
        return self.right / self.seen

    @property
    def deviation(self) -> float:
        """Return the standard deviation of that share."""
        return math.sqrt(self.right_share * (1.0 - self.right_share) / self.seen)


class _Cost:
    """Step times of one kind relative to plain steps, and the number of the last such step."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=_REMEMBERED)
        self.measured_at = 0


class Governor:
    """Decides how many tokens a drafter may propose for each sequence, and adds up the time that proposals saved.

    Args:
        draft_tokens: most tokens per sequence and step.
        busy_s: returns the seconds that the drive has spent reading so far.
    """

    def __init__(self, draft_tokens: int, busy_s: Callable[[], float] = lambda: 0.0) -> None:
        self._draft_tokens = draft_tokens
        self._busy_s = busy_s
        self._answers: dict[Sequence, _Answer] = {}
        self._plain_s: dict[int, deque[float]] = {}  # by number of sequences: seconds of the last steps
        self._costs: dict[tuple[int, int], _Cost] = {}  # by sequences and tokens proposed
        # Steps that ran tokens again: extra seconds, as a share of a plain step.
        self._rerun_costs: deque[float] = deque(maxlen=_REMEMBERED)
        self._num_steps = 0
        self._num_since_plain = 0  # steps
        self._busy, self._is_busy = 0.0, False
        # When the last step ended: the time, and `busy_s` then.
        self._last_end: tuple[float, float] | None = None
        # An estimate: seconds that the same tokens would have taken without proposals, less the seconds that they
        # took.
        self.won_s = 0.0

    def most(self, sequence: Sequence, num_sequences: int) -> int:
        """Return the number of tokens to propose for one of `num_sequences` running sequences."""
        if num_sequences > DRAFTED_AT_ONCE or self._is_busy:
            return 0
        plain = self._plain_s.get(num_sequences, ())
        if len(plain) < _FEWEST_PLAIN or self._num_since_plain >= PLAIN_EVERY:
            return 0
        if (answer := self._answers.get(sequence)) is None:
            answer = self._answers[sequence] = _Answer()
        if answer.must_rerun or answer.paused_for:
            return 0
        if answer.tries_left:
            return 1
        utility, width = self._best(answer.right_share, num_sequences)
        if answer.is_on:
            hoped, _ = self._best(min(1.0, answer.right_share + answer.deviation), num_sequences)
            answer.is_on = hoped > OFF_BELOW
        else:
            answer.is_on = utility > ON_ABOVE
        if not answer.is_on:
            answer.begin_pause()
            return 0
        return width

    def _best(self, right_share: float, num_sequences: int) -> tuple[float, int]:
        """Return the highest utility, and the fewest proposals that reach it."""
        utility, width = max(
            (self.utility(right_share, num_sequences, width), -width)
            for width in range(1, self._draft_tokens + 1)
        )
        return utility, -width

    def utility(self, right_share: float, num_sequences: int, width: int) -> float:
        """Return the tokens per second with `width` proposals for one of the sequences, relative to none."""
        cost = 1.0 + self._extra_cost(num_sequences, width)
        if self._rerun_costs:
            cost += (1.0 - math.pow(right_share, width)) * median(self._rerun_costs)
        expected = math.fsum(math.pow(right_share, rank) for rank in range(1, width + 1))
        return (num_sequences + expected) / num_sequences / max(cost, 1e-9)

    def _extra_cost(self, num_sequences: int, width: int) -> float:
        """Return the extra cost of `width` proposals: measured, or in proportion to the nearest measured width."""
        measured = [one for one in range(1, self._draft_tokens + 1) if (num_sequences, one) in self._costs]
        if not measured:
            return _FIRST_COST * width
        nearest = max((one for one in measured if one <= width), default=measured[0])
        return (median(self._costs[num_sequences, nearest].last) - 1.0) * width / nearest

    def count(self, outcomes: Mapping[Sequence, Outcome], *, seconds: float, now: float) -> None:
        """Count a step in which every sequence decoded.

        Args:
            outcomes: by sequence, for every sequence in the step.
            seconds: duration of the step, including proposing and sampling.
            now: when the step ended.
        """
        self._note_drive(now)
        num_sequences = len(outcomes)
        is_rerun = False
        proposed = confirmed = 0
        for sequence, outcome in outcomes.items():
            proposed += outcome.num_proposed
            confirmed += outcome.num_confirmed
            if (answer := self._answers.get(sequence)) is not None:
                is_rerun |= answer.must_rerun
                answer.count(outcome)
        self._num_since_plain = self._num_since_plain + 1 if proposed or is_rerun else 0
        plain = self._plain_s.setdefault(num_sequences, deque(maxlen=_REMEMBERED))
        self._num_steps += 1
        if not proposed and not is_rerun:
            plain.append(seconds)
            return
        if not plain:
            return
        plain_s = median(plain)
        won_s = plain_s * (1 + confirmed / num_sequences) - seconds
        self.won_s += won_s
        for sequence in outcomes:
            sequence.won_s += won_s / num_sequences
        if not is_rerun:
            self._note_cost((num_sequences, proposed), seconds / max(plain_s, 1e-9))
        elif not proposed:
            self._rerun_costs.append(seconds / max(plain_s, 1e-9) - 1.0)

    def _note_cost(self, of_kind: tuple[int, int], cost: float) -> None:
        # Old measurements expire: one slow moment may have made proposals look too expensive to try.
        old = [kind for kind, one in self._costs.items() if self._num_steps - one.measured_at > _VALID_STEPS]
        for kind in old:
            del self._costs[kind]
        found = self._costs.setdefault(of_kind, _Cost())
        found.last.append(cost)
        found.measured_at = self._num_steps

    def count_upkeep(self, sequences: Collection[Sequence], seconds: float) -> None:
        """Count the time that the drafter took after a step, whether or not it proposed anything."""
        self.won_s -= seconds
        for sequence in sequences:
            sequence.won_s -= seconds / len(sequences)

    def count_other(self) -> None:
        """Count a step that also ran prompts."""
        self._last_end = None  # reads for prompts say nothing about decoding

    def _note_drive(self, now: float) -> None:
        busy_s, before = self._busy_s(), self._last_end
        self._last_end = now, busy_s
        if before is None or now <= before[0]:
            return
        share = min(1.0, (busy_s - before[1]) / (now - before[0]))
        self._busy = _BUSY_KEPT * self._busy + (1.0 - _BUSY_KEPT) * share
        self._is_busy = self._busy > (QUIET if self._is_busy else BUSY)

    def forget(self, sequence: Sequence) -> None:
        """Drop the record of a sequence that ended or was preempted."""
        self._answers.pop(sequence, None)
