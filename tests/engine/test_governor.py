"""The governor lets drafts run while they pay, by the times that it is told: there is no clock in these tests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, pairwise
from random import Random

import pytest

from argosy.config import DRAFTED_AT_ONCE
from argosy.engine.drafts.governor import FIRST_PAUSE, PLAIN_EVERY, TRIED, Governor, Outcome
from argosy.engine.sequence import Sequence
from tests.engine.scheduling import Rig

PLAIN_S = 0.1


class Machine:
    """Steps that take PLAIN_S, and `cost` times that for each proposed token.

    Args:
        right: how many of the proposed tokens are confirmed, at most.
    """

    def __init__(
        self,
        cost: float,
        right: Callable[[int], int],
        *,
        draft_tokens: int = 3,
        sequences: int = 1,
        busy: float = 0.0,
        rerun_s: float | None = None,
    ) -> None:
        rig = Rig()
        self.sequences: list[Sequence] = [rig.sequence(4) for _ in range(sequences)]
        self.cost, self.right, self.busy, self.rerun_s = cost, right, busy, rerun_s
        self.now = self.busy_s = 0.0
        self.speed, self.slow_widths = 1.0, set[int]()
        self.governor = Governor(draft_tokens, lambda: self.busy_s)
        self.num_tokens = 0
        self.must_rerun = False

    def step(self) -> int:
        """Run a step; return how many tokens were proposed for the first sequence."""
        widths = [self.governor.most(one, len(self.sequences)) for one in self.sequences]
        seconds = PLAIN_S * (1 + self.cost * sum(widths))
        if self.must_rerun:
            assert not any(widths)
            assert self.rerun_s is not None
            seconds += self.rerun_s
        seconds *= (10 if sum(widths) in self.slow_widths else 1) / self.speed
        confirmed = [min(width, self.right(width)) if width else 0 for width in widths]
        self.must_rerun = self.rerun_s is not None and confirmed != widths
        self.now += seconds
        self.busy_s += self.busy * seconds
        outcomes = {
            one: Outcome(width, right, self.rerun_s is not None and right < width)
            for one, width, right in zip(self.sequences, widths, confirmed, strict=True)
        }
        self.governor.count(outcomes, seconds=seconds, now=self.now)
        self.num_tokens += len(self.sequences) + sum(confirmed)
        return widths[0]

    def run(self, num_steps: int) -> list[int]:
        return [self.step() for _ in range(num_steps)]


def test_it_measures_plain_steps_first_and_then_tries_single_tokens() -> None:
    assert Machine(0.2, lambda width: 0).run(2 + TRIED)[: 2 + TRIED] == [0, 0, 1, 1]


def test_right_proposals_grow_to_the_number_that_pays_most() -> None:
    assert Machine(0.2, lambda width: width).run(26)[-20:] == [3] * 20


def test_it_wins_what_it_says_that_it_wins() -> None:
    machine = Machine(0.2, lambda width: width)
    machine.run(300)
    assert machine.num_tokens * PLAIN_S / machine.now > 2.0
    assert machine.governor.won_s == pytest.approx(machine.num_tokens * PLAIN_S - machine.now)
    assert machine.sequences[0].won_s == pytest.approx(machine.governor.won_s)


def test_wrong_proposals_cost_two_percent_at_most() -> None:
    machine = Machine(0.4, lambda width: 0)
    widths = machine.run(2000)
    assert machine.num_tokens * PLAIN_S / machine.now > 0.98
    assert machine.governor.won_s == pytest.approx(machine.num_tokens * PLAIN_S - machine.now)
    trials = [at for at in range(1, 2000) if widths[at] and not widths[at - 1]]
    pauses = [after - before for before, after in pairwise(trials)]
    assert pauses[0] >= FIRST_PAUSE
    assert pauses[1] > 1.5 * pauses[0]


def test_some_wrong_proposals_in_a_row_end_none_that_pay() -> None:
    """With a cost of 0.42 and a share of 0.6, every pause loses a tenth of the speed."""
    random = Random(1)
    machine = Machine(0.42, lambda width: int(random.random() < 0.6), draft_tokens=1)
    widths = machine.run(2000)
    assert sum(widths) > 0.85 * len(widths)
    assert machine.num_tokens * PLAIN_S / machine.now > 1.09
    machine.right = lambda width: 0
    assert sum(machine.run(100)) < 20  # and many in a row do


def test_proposals_as_dear_as_tokens_are_not_made() -> None:
    """Every one is right, and a step takes as much longer as there are tokens in it."""
    machine = Machine(1.0, lambda width: width)
    widths = machine.run(1000)
    assert max(widths) == 1
    assert sum(widths) < 20


def test_a_later_trial_finds_that_an_answer_has_become_predictable() -> None:
    machine = Machine(0.2, lambda width: 0)
    machine.run(40)
    machine.right = lambda width: width
    assert machine.run(300)[-30:].count(3) >= 28


def test_a_step_without_proposals_runs_now_and_then() -> None:
    widths = Machine(0.2, lambda width: width).run(3 * PLAIN_EVERY + 10)
    assert widths[10:].count(0) == 3


def test_a_machine_that_becomes_slower_or_faster_is_measured_again() -> None:
    machine = Machine(0.2, lambda width: width)
    machine.run(60)
    for speed in (0.2, 5.0, 1.0):
        machine.speed = speed
        machine.run(400)
        assert machine.run(PLAIN_EVERY + 1).count(3) >= PLAIN_EVERY


def test_a_slow_moment_is_forgotten() -> None:
    """The first steps with three tokens take as long as ten; the machine is never that slow again."""
    machine = Machine(0.2, lambda width: width)
    machine.slow_widths = {3}
    assert 3 in machine.run(30)
    assert machine.run(20).count(3) == 0
    machine.slow_widths = set()
    assert machine.run(600)[-50:].count(3) >= 45


def test_nothing_is_proposed_beside_more_sequences() -> None:
    assert max(Machine(0.1, lambda width: width, sequences=DRAFTED_AT_ONCE).run(60)) == 3
    assert max(Machine(0.1, lambda width: width, sequences=DRAFTED_AT_ONCE + 1).run(60)) == 0


def test_nothing_is_proposed_while_the_drive_is_busy() -> None:
    machine = Machine(0.1, lambda width: width, busy=0.95)
    machine.run(60)
    assert machine.run(60) == [0] * 60
    machine.busy = 0.75
    machine.run(10)
    assert machine.run(60) == [0] * 60  # less busy, and not yet quiet
    machine.busy = 0.5
    machine.run(10)
    assert max(machine.run(60)) == 3


def test_steps_with_prompts_tell_nothing_about_the_drive() -> None:
    machine = Machine(0.1, lambda width: width)
    widths = []
    for _ in range(60):
        widths.append(machine.step())
        machine.now += 1.0
        machine.busy_s += 1.0
        machine.governor.count_other()
    assert widths[-20:].count(3) >= 19


def test_running_confirmed_tokens_again_is_part_of_the_price() -> None:
    """A recurrent state that goes back costs more than a rejected token alone."""

    def every_other() -> Callable[[int], int]:
        turns = cycle((1, 0))
        return lambda width: next(turns)

    assert sum(Machine(0.1, every_other(), draft_tokens=1).run(500)) > 300
    assert sum(Machine(0.1, every_other(), draft_tokens=1, rerun_s=2 * PLAIN_S).run(500)) < 50


def test_an_ended_sequence_is_forgotten() -> None:
    machine = Machine(0.2, lambda width: width)
    machine.run(10)
    machine.governor.forget(machine.sequences[0])
    assert not machine.governor._answers
