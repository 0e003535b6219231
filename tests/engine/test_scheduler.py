"""Which tokens run in the next step: decode never waits, prompts share the chunk, and free blocks limit admission."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from argosy.engine.steps import CannotRun, Scheduled
from argosy.kept.kv_windows import WindowSizes
from argosy.kept.recurrent_state import StateSlots
from tests.engine.scheduling import BLOCK_TOKENS, NotedStates, Rig, num_prefill
from tests.helpers.examples import given_few


def test_a_prompt_is_prefilled_in_chunks_and_its_last_token_gives_the_first_answer() -> None:
    rig = Rig(chunk_tokens=8)
    rig.add(rig.sequence(19))
    sizes, ready = [], []
    for _ in range(3):
        scheduled = rig.step()
        sizes.append(scheduled.step.num_tokens)
        ready.append(len(scheduled.ready))
    assert sizes == [8, 8, 3]
    assert ready == [0, 0, 1]
    assert scheduled.step.wanted.tolist() == [2]
    assert scheduled.step.order.tolist() == [16, 17, 18]
    assert scheduled.step.token_ids.tolist() == [16, 17, 18]


def test_decode_gets_its_token_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    rig = Rig(chunk_tokens=4)
    short = rig.sequence(3, max_new=9)
    rig.add(short)
    rig.step()
    rig.add(rig.sequence(40))
    for expected in range(2, 9):
        scheduled = rig.step()
        assert short in scheduled.ready
        assert len(short.new_ids) == expected
        assert num_prefill(scheduled) == 4  # decode takes nothing from the prompt's share


def test_prompts_share_the_chunk_first_come_first_served() -> None:
    rig = Rig(chunk_tokens=8)
    rig.add(rig.sequence(5), rig.sequence(20, first_id=100), rig.sequence(6, first_id=200))
    first = rig.step()
    assert first.step.token_ids.tolist() == [0, 1, 2, 3, 4, 100, 101, 102]
    second = rig.step()
    assert second.step.token_ids.tolist() == [1000, *range(103, 111)]
    assert second.step.is_decode.tolist() == [True] + [False] * 8


def test_at_most_max_sequences_run_at_once() -> None:
    rig = Rig(max_sequences=2, chunk_tokens=32)
    rig.add(*(rig.sequence(2, max_new=3) for _ in range(5)))
    order = []
    while rig.scheduler.has_work:
        scheduled = rig.step()
        assert len(scheduled.ready) <= 2
        order += [one for one in rig.finished if one not in order]
    assert order == rig.sequences  # first come, first served


def test_a_sequence_that_waits_says_for_what() -> None:
    rig = Rig(num_blocks=8, max_sequences=2, chunk_tokens=2, reuse=True)
    first, same, large, last = (
        rig.sequence(8, max_new=4), rig.sequence(8, max_new=4), rig.sequence(24, first_id=100),
        rig.sequence(1, first_id=300),
    )  # fmt: skip
    rig.add(first, same)
    rig.step()
    assert rig.scheduler.why_waiting(same) == "prompt"
    rig.scheduler.remove(same)
    rig.add(large)
    rig.step()
    assert rig.scheduler.why_waiting(large) == "memory"
    rig.scheduler.remove(large)
    rig.add(rig.sequence(1, first_id=200), last)
    rig.step()
    assert rig.scheduler.why_waiting(last) == "turn"


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_a_cancelled_sequence_gives_its_blocks_back(num_steps: int) -> None:
    """It is cancelled while it waits, during prefill and while it decodes."""
    rig = Rig(num_blocks=8, chunk_tokens=8)
    victim = rig.sequence(10, max_new=9)
    rig.add(victim)
    for _ in range(num_steps):
        rig.step()
    rig.scheduler.remove(victim)
    assert rig.blocks.num_free == 8
    assert victim.blocks == []
    assert not rig.scheduler.has_work


def test_cancelling_one_sequence_leaves_the_others_unchanged() -> None:
    rig = Rig(chunk_tokens=16)
    kept, victim = rig.sequence(6, max_new=6), rig.sequence(6, max_new=6, first_id=100)
    rig.add(kept, victim)
    rig.step()
    before = list(kept.blocks)
    rig.scheduler.remove(victim)
    scheduled = rig.step()
    assert scheduled.ready == [kept]
    assert kept.blocks == before


def test_slots_lie_in_the_blocks_of_the_sequence() -> None:
    rig = Rig(chunk_tokens=32)
    one, other = rig.sequence(6, max_new=3), rig.sequence(7, max_new=3, first_id=50)
    rig.add(one, other)
    rig.step()
    step = rig.step().step
    assert step.sequence.tolist() == [0, 1]
    assert step.order.tolist() == [6, 7]
    expected = [
        s.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for s, p in ((one, 6), (other, 7))
    ]
    assert step.slots.tolist() == expected
    for row, s in enumerate((one, other)):
        assert step.block_table[row, : len(s.blocks)].tolist() == s.blocks


# ── blocks on demand ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sequence_starts_with_blocks_for_its_prompt_and_takes_more_one_by_one() -> None:
    rig = Rig(chunk_tokens=32)
    one = rig.sequence(6, max_new=9)
    rig.add(one)
    held = []
    while rig.scheduler.has_work:
        rig.step()
        held.append(len(one.blocks))
    assert held == [2, 2, 2, 3, 3, 3, 3, 4, 0]  # 6 to 13 tokens in blocks of 4, then it finishes


def test_a_sequence_waits_until_its_prompt_fits_and_all_others_can_grow() -> None:
    rig = Rig(num_blocks=6, chunk_tokens=32)
    rig.add(rig.sequence(9, max_new=3), rig.sequence(7, max_new=2, first_id=50))  # 3 and 2 blocks of 6
    assert rig.step().ready == [rig.sequences[0]]
    while not rig.finished:
        assert rig.step().ready == [rig.sequences[0]]
    assert rig.step().ready == [rig.sequences[1]]


def test_the_youngest_sequence_is_preempted_when_blocks_run_out_and_recomputed() -> None:
    rig = Rig(num_blocks=6, chunk_tokens=32)
    old, young = rig.sequence(7, max_new=9), rig.sequence(3, max_new=9, first_id=50)
    rig.add(old, young)
    while len(young.new_ids) < 5:
        rig.step()
    assert rig.scheduler.num_preempted == 0
    while not rig.scheduler.num_preempted:
        rig.step(new_id=2000)
    assert young.blocks == []
    assert young.num_computed == 0
    kept = list(young.new_ids)
    rig.run()
    assert rig.finished == [old, young]
    assert young.new_ids[: len(kept)] == kept
    assert len(young.new_ids) == 9


def test_the_oldest_sequence_is_never_preempted() -> None:
    rig = Rig(num_blocks=5, chunk_tokens=32)
    sequences = [rig.sequence(2, max_new=15, first_id=50 * i) for i in range(4)]
    rig.add(*sequences)
    while rig.scheduler.has_work:
        first = next(one for one in sequences if one not in rig.finished)
        rig.step()
        assert first in rig.finished or first.num_computed == first.num_tokens - 1
    assert rig.finished == sequences
    assert rig.scheduler.num_preempted > 0


def test_a_failed_step_runs_again_unchanged() -> None:
    rig = Rig(chunk_tokens=8)
    rig.add(rig.sequence(5, max_new=3), rig.sequence(12, first_id=50))
    rig.step()
    failed = rig.scheduler.next_step()
    rig.scheduler.failed(failed)
    again = rig.scheduler.next_step()
    for name in ("token_ids", "order", "slots", "block_table", "is_decode", "wanted"):
        assert getattr(again.step, name).tolist() == getattr(failed.step, name).tolist()


def test_a_sequence_that_does_not_fit_while_nothing_runs_ends_with_the_numbers() -> None:
    rig = Rig(num_blocks=6)
    rig.blocks.take(2)  # nothing gives them back
    large, small = rig.sequence(17), rig.sequence(8)
    rig.add(large, small)
    with pytest.raises(CannotRun) as stuck:
        rig.step()
    assert stuck.value.sequence is large
    assert "it needs 5 KV blocks, and 4 of 6 are free while no other runs" in str(stuck.value)
    rig.end(large)
    rig.run()
    assert rig.finished == [large, small]


# ── fairness ────────────────────────────────────────────────────────────────────────────────────────────────────────


def prompt_tokens(rig: Rig, scheduled: Scheduled) -> dict[str, int]:
    """Count the prompt tokens of each tenant in a step."""
    assert scheduled.counts is not None
    found: dict[str, int] = {}
    for one, count in zip(scheduled.sequences, scheduled.counts, strict=True):
        found[one.tenant] = found.get(one.tenant, 0) + count
    return found


def test_tenants_share_the_chunk_equally_and_an_unused_share_goes_to_others() -> None:
    rig = Rig(chunk_tokens=12, max_sequences=8)
    for first_id in (0, 100, 200):
        rig.add(rig.sequence(30, first_id=first_id, tenant="many"))
    rig.add(rig.sequence(30, first_id=300, tenant="one"), rig.sequence(2, first_id=400, tenant="short"))
    first, second = (prompt_tokens(rig, rig.step()) for _ in range(2))
    assert first == {"many": 5, "one": 5, "short": 2}
    assert second == {"many": 6, "one": 6, "short": 1}  # the first new token of "short"


def test_a_chunk_of_one_token_rotates_among_tenants() -> None:
    rig = Rig(chunk_tokens=1)
    rig.add(*(rig.sequence(9, first_id=100 * i, tenant=name) for i, name in enumerate("abc")))
    served = [next(iter(prompt_tokens(rig, rig.step()))) for _ in range(6)]
    assert sorted(served[:3]) == sorted(served[3:]) == ["a", "b", "c"]


def test_the_tenant_with_the_fewest_running_sequences_goes_next() -> None:
    rig = Rig(max_sequences=3, chunk_tokens=64)
    flood = [rig.sequence(3, max_new=4 + i, first_id=10 * i, tenant="flood") for i in range(6)]
    rig.add(*flood)
    rig.step()
    late = rig.sequence(3, first_id=500, tenant="late")
    rig.add(late)
    while len(rig.finished) < 1:
        rig.step()
    rig.step()
    assert rig.running == [flood[2], late]


def test_no_sequence_overtakes_one_that_waits_for_blocks() -> None:
    rig = Rig(num_blocks=10, chunk_tokens=64)
    rig.add(rig.sequence(20, max_new=6))
    rig.step()
    large, small = rig.sequence(24, first_id=100), rig.sequence(2, first_id=200)
    rig.add(large, small)
    while large not in rig.running:
        assert small not in rig.running
        rig.step()


class SteppedClock:
    """A clock whose steps take the time that a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, rig: Rig, *, chunk_s: float, decode_s: float) -> Scheduled:
        scheduled = rig.scheduler.next_step()
        self.now += chunk_s if num_prefill(scheduled) else decode_s
        rig.scheduler.commit(scheduled)
        for one in scheduled.ready:
            one.new_ids.append(1)
            if len(one.new_ids) == one.max_new_tokens:
                rig.end(one)
        return scheduled


def test_prompts_get_at_most_about_half_of_the_time_while_others_decode() -> None:
    """A step with a chunk takes 4 s, one without 0.25 s."""
    clock = SteppedClock()
    rig = Rig(chunk_tokens=4, num_blocks=200, clock=clock)
    rig.add(rig.sequence(3, max_new=400))
    rig.step()
    rig.add(rig.sequence(60, max_new=1, first_id=100))
    taken: list[bool] = []
    while not rig.finished:
        taken.append(num_prefill(clock.step(rig, chunk_s=4.0, decode_s=0.25)) > 0)
    assert taken[:36] == [True] + [False] * 16 + [True] + [False] * 15 + [True] + [False] * 2
    prompt_s, decode_s = 4.0 * sum(taken), 0.25 * (len(taken) - sum(taken))
    assert 0.45 <= prompt_s / (prompt_s + decode_s) <= 0.55


def test_prompts_get_all_of_the_time_while_nothing_decodes() -> None:
    clock = SteppedClock()
    rig = Rig(chunk_tokens=4, clock=clock)
    rig.add(rig.sequence(20, max_new=1), rig.sequence(20, max_new=1, first_id=100))
    for _ in range(10):
        assert num_prefill(clock.step(rig, chunk_s=5.0, decode_s=1.0)) == 4


def test_a_short_prompt_that_costs_no_more_than_a_token_delays_no_other() -> None:
    clock = SteppedClock()
    rig = Rig(chunk_tokens=4, clock=clock, num_blocks=200)
    rig.add(rig.sequence(3, max_new=100))
    for _ in range(3):
        clock.step(rig, chunk_s=1.0, decode_s=1.0)
    rig.add(rig.sequence(12, max_new=2, first_id=100))
    assert [num_prefill(clock.step(rig, chunk_s=1.0, decode_s=1.0)) for _ in range(3)] == [4, 4, 4]


# ── shared prefixes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sequence_waits_for_another_that_computes_its_prefix_and_continues_from_there() -> None:
    rig = Rig(chunk_tokens=8, reuse=True)
    first = rig.sequence(21, max_new=3)
    second = rig.sequence_of([*range(18), 700, 701], max_new=3)
    rig.add(first, second)
    for _ in range(2):
        rig.step()
        assert rig.running == [first]
    rig.step()
    assert second.cached_tokens == 16
    assert second.blocks[:4] == first.blocks[:4]
    assert second.num_computed == 19  # the first had its last 5 tokens in the same chunk
    rig.run()
    rig.require_sound()


def test_a_sequence_that_waits_for_a_prefix_does_not_delay_others() -> None:
    rig = Rig(chunk_tokens=4, reuse=True)
    rig.add(rig.sequence(16), rig.sequence(17), rig.sequence(3, first_id=500))
    rig.step()
    assert [one.prompt_ids[0] for one in rig.running] == [0, 500]


def test_a_sequence_that_waits_for_a_prefix_continues_alone_when_the_other_is_cancelled() -> None:
    rig = Rig(chunk_tokens=4, reuse=True)
    first, second = rig.sequence(30), rig.sequence(31)
    rig.add(first, second)
    rig.step()
    rig.end(first)
    rig.run()
    assert second.cached_tokens == 4
    assert len(second.new_ids) == 4


def test_no_prefix_is_found_for_another_tenant_or_with_reuse_off() -> None:
    for reuse, tenant in ((True, "other"), (False, "one")):
        rig = Rig(chunk_tokens=64, reuse=reuse)
        rig.add(rig.sequence(20, tenant="one"))
        rig.run()
        again = rig.sequence(20, tenant=tenant)
        rig.add(again)
        rig.run()
        assert again.cached_tokens == 0


def test_the_last_token_of_a_prompt_is_computed_even_if_the_whole_prompt_is_cached() -> None:
    rig = Rig(chunk_tokens=64, reuse=True)
    rig.add(rig.sequence(16))
    rig.run()
    again = rig.sequence(16)
    rig.add(again)
    assert rig.step().ready == [again]
    assert again.cached_tokens == 12


def test_the_next_turn_finds_the_blocks_of_an_answer() -> None:
    rig = Rig(chunk_tokens=64, reuse=True)
    first = rig.sequence(6, max_new=12)
    rig.add(first)
    rig.run()
    following = rig.sequence_of([*first.prompt_ids, *first.new_ids, 7, 8, 9])
    rig.add(following)
    rig.run()
    assert following.cached_tokens == 16  # of 17 that have keys and values


def test_answers_to_one_prompt_fork_after_it_and_share_its_full_blocks() -> None:
    rig = Rig(chunk_tokens=8, reuse=True, max_sequences=3)
    leader, *followers = (rig.sequence(10, max_new=3) for _ in range(4))
    for one in followers:
        one.leader = leader
    leader.followers = list(followers)
    rig.add(leader, *followers)
    rig.step()
    assert rig.running == [leader]
    rig.step()
    assert rig.running == [leader, *followers[:2]]  # the third finds the prompt when there is room
    assert [one.blocks[:2] for one in rig.running] == [leader.blocks[:2]] * 3
    assert len({one.blocks[2] for one in rig.running}) == 3
    rig.run()
    assert [one.cached_tokens for one in (leader, *followers)] == [0, 10, 10, 8]
    rig.require_sound()


# ── nothing leaks ───────────────────────────────────────────────────────────────────────────────────────────────────


def shared_prompt(shape: tuple[int, int, int]) -> list[int]:
    """Make a prompt; those of one group share a prefix and diverge after its length."""
    group, length, own = shape
    return [group * 100 + at for at in range(length)] + [1000 * own + at for at in range(own)]


asked = st.tuples(
    st.tuples(st.integers(0, 2), st.integers(1, 24), st.integers(0, 6)),  # group, shared and own tokens
    st.integers(1, 9),  # length of the answer
    st.integers(0, 14),  # the step in which it is submitted
    st.sampled_from("ab"),  # tenant
    st.integers(1, 3),  # number of answers
)


@given_few(
    st.lists(asked, min_size=1, max_size=10),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(10, 24),
    st.sampled_from([None, 0, 1, 3]),
    st.sampled_from([None, 1, 2, 5, 8, 9]),
    st.sampled_from([(), (), (1,), (3,), (5, 2), (2, 4, 6)]),
    st.data(),
    few=60,
    many=200,
)
def test_whatever_comes_and_goes_each_answer_is_computed_from_its_own_tokens_and_nothing_leaks(
    coming: list[tuple[tuple[int, int, int], int, int, str, int]],
    chunk_tokens: int,
    max_sequences: int,
    num_blocks: int,
    num_snapshots: int | None,
    window: int | None,
    tail: tuple[int, ...],
    data: st.DataObject,
) -> None:
    """Sequences come, fork, find prefixes, are preempted, fail, finish or are cancelled.

    Some models have recurrent states, some have layers with a sliding window, with as few blocks as can be enough,
    some have both, and in some the last layers keep nothing but a window.
    """
    states = windows = None
    if window is not None:
        window = max(window, *tail, 1)
        seen, step_blocks = (
            -(-(window - 1) // BLOCK_TOKENS) + 1,
            -(-(chunk_tokens + max_sequences) // BLOCK_TOKENS),
        )
        windows = WindowSizes(max_sequences * (seen + 1) + step_blocks, window, most_ends=2)
    if num_snapshots is not None:
        num_slots = max(1, max_sequences - 1)
        noted = NotedStates(num_slots + num_snapshots)
        states = StateSlots(noted, num_slots)  # type: ignore[arg-type]
    rig = Rig(
        num_blocks=num_blocks,
        chunk_tokens=chunk_tokens,
        max_sequences=max_sequences,
        reuse=True,
        states=states,
        windows=windows,
        tail=tail,
    )
    left = sorted(coming, key=lambda one: one[2])
    for step in range(2000):
        while left and left[0][2] <= step:
            shape, max_new, _, tenant, num_answers = left.pop(0)
            ones = [rig.sequence_of(shared_prompt(shape), max_new, tenant=tenant) for _ in range(num_answers)]
            for follower in ones[1:]:
                follower.leader = ones[0]
            ones[0].followers = ones[1:]
            rig.add(*ones)
        if not rig.scheduler.has_work:
            if not left:
                break
            continue
        oldest = min((one for one in rig.running), key=lambda one: one.number, default=None)
        scheduled = rig.step(new_id=data.draw(st.integers(50, 52)))
        assert num_prefill(scheduled) <= chunk_tokens
        assert scheduled.step.num_tokens <= chunk_tokens + max_sequences
        assert oldest is None or oldest in rig.running or oldest in rig.finished
        rig.require_sound()
        what = data.draw(st.integers(0, 19))
        alive = [one for one in rig.sequences if one not in rig.finished]
        if what == 0 and alive:
            rig.end(data.draw(st.sampled_from(alive)))
        elif what == 1 and rig.running:
            failed = rig.scheduler.next_step()
            if states is not None:
                for one in failed.sequences:  # as a failed native step leaves them
                    assert one.state_slot is not None
                    noted.seen[one.state_slot] = None
            rig.scheduler.failed(failed)
        elif what == 2:
            rig.blocks.forget("a")
        rig.require_sound()
    assert not rig.scheduler.has_work
    assert len(rig.finished) == len(rig.sequences)
    assert rig.blocks.num_held == 0
    assert states is None or states.num_free == states.num_sequences


# ── fewer blocks ────────────────────────────────────────────────────────────────────────────────────────────────────


@given_few(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=6),
    st.lists(st.integers(0, 24), min_size=1, max_size=12),
    st.booleans(),
    few=25,
    many=60,
)
def test_every_sequence_comes_to_its_end_while_blocks_come_and_go(
    asked: list[tuple[int, int]], sizes: list[int], reuse: bool
) -> None:
    rig = Rig(num_blocks=24, reuse=reuse)
    sequences = [rig.sequence(*one, first_id=40 * (number % 3)) for number, one in enumerate(asked)]
    rig.add(*sequences)
    for number in range(400):
        if not rig.scheduler.has_work:
            break
        num_blocks = max(sizes[number % len(sizes)], rig.scheduler.num_blocks_needed)
        rig.scheduler.resize_kv(num_blocks)
        rig.require_sound()
        assert rig.blocks.num_blocks == num_blocks
        assert rig.blocks.num_used <= num_blocks
        rig.step()
    rig.scheduler.resize_kv(24)
    rig.run()
    assert sorted(rig.finished, key=lambda one: one.number) == sequences
    assert rig.blocks.num_held == 0
    assert rig.blocks.num_available == 24


def test_fewer_blocks_preempt_those_who_hold_others_and_forget_the_prefixes_there() -> None:
    rig = Rig(num_blocks=16, chunk_tokens=32, reuse=True)
    first, second = rig.sequence(8, max_new=8), rig.sequence(8, max_new=8, first_id=50)
    rig.add(first, second)
    rig.step()
    assert max(first.blocks) < min(second.blocks)  # the lowest free block is taken first
    rig.scheduler.resize_kv(len(first.blocks) + 1)
    assert rig.running == [first]
    assert second.num_computed == 0
    assert rig.scheduler.num_blocks_needed == 4
    rig.scheduler.resize_kv(4)
    rig.run()
    assert rig.finished == [first, second]


def test_whoever_uses_blocks_says_so_before() -> None:
    rig = Rig(num_blocks=16)
    used: list[int] = []
    rig.blocks.before_use = used.append
    blocks = rig.blocks.take(3)
    assert used == [3]
    more = rig.blocks.take(2)
    rig.blocks.give_back(blocks)
    assert used == [3, 5]
    assert rig.blocks.num_used == 5
    assert rig.blocks.take(1) == [0]
    assert used == [3, 5, 1]
    rig.blocks.give_back(more)
    assert rig.blocks.num_used == 1
