"""Which tokens run in the next step: decode never waits, prompts share the chunk, blocks decide who gets in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.config import SamplingParams
from argosy.engine.kv_cache import KvBlocks
from argosy.engine.sampler import SamplerState
from argosy.engine.scheduler import Scheduled, Scheduler
from argosy.engine.sequence import Sequence

BLOCK_TOKENS = 4


def sequence(num_prompt: int, max_new: int = 4, *, first_id: int = 0) -> Sequence:
    prompt = list(range(first_id, first_id + num_prompt))
    return Sequence(
        prompt,
        SamplingParams(max_tokens=max_new),
        max_new_tokens=max_new,
        sampler_state=SamplerState(prompt, 0),
        decoder=None,
    )


class Rig:
    """A scheduler and its blocks; `step` does what the engine does with a batch."""

    def __init__(self, *, num_blocks: int = 64, chunk_tokens: int = 8, max_sequences: int = 4) -> None:
        self.blocks = KvBlocks(num_blocks, BLOCK_TOKENS)
        self.scheduler = Scheduler(self.blocks, chunk_tokens=chunk_tokens, max_sequences=max_sequences)
        self.sequences: list[Sequence] = []
        self.finished: list[Sequence] = []

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.sequences.append(one)
            self.scheduler.add(one)

    def step(self, new_id: int = 1000) -> Scheduled:
        scheduled = self.scheduler.next_batch()
        for one in scheduled.ready:
            one.new_ids.append(new_id)
            if len(one.new_ids) == one.max_new_tokens:
                self.scheduler.remove(one)
                self.finished.append(one)
        return scheduled


def num_prefill(scheduled: Scheduled) -> int:
    return int((~scheduled.batch.is_decode).sum())


def test_a_prompt_is_prefilled_in_chunks_and_its_last_token_gives_the_first_answer() -> None:
    rig = Rig(chunk_tokens=8)
    rig.add(sequence(19))
    sizes, ready = [], []
    for _ in range(3):
        scheduled = rig.step()
        sizes.append(scheduled.batch.num_tokens)
        ready.append(len(scheduled.ready))
    assert sizes == [8, 8, 3]
    assert ready == [0, 0, 1]
    assert scheduled.batch.last_rows.tolist() == [2]
    assert scheduled.batch.positions.tolist() == [16, 17, 18]
    assert scheduled.batch.token_ids.tolist() == [16, 17, 18]


def test_decode_gets_its_token_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    rig = Rig(chunk_tokens=4)
    short = sequence(3, max_new=9)
    rig.add(short)
    rig.step()
    rig.add(sequence(40))
    for expected in range(2, 9):
        scheduled = rig.step()
        assert short in scheduled.ready
        assert len(short.new_ids) == expected
        assert num_prefill(scheduled) == 4  # the prompt's share is not eaten up by decode


def test_prompts_share_the_chunk_first_come_first_served() -> None:
    rig = Rig(chunk_tokens=8)
    rig.add(sequence(5), sequence(20, first_id=100), sequence(6, first_id=200))
    first = rig.step()
    assert first.batch.token_ids.tolist() == [0, 1, 2, 3, 4, 100, 101, 102]
    second = rig.step()
    assert second.batch.token_ids.tolist() == [1000, *range(103, 111)]
    assert second.batch.is_decode.tolist() == [True] + [False] * 8


def test_a_sequence_waits_until_its_prompt_and_whole_answer_have_blocks() -> None:
    rig = Rig(num_blocks=5, chunk_tokens=32)
    rig.add(sequence(9, max_new=3), sequence(5, max_new=4))  # 3 and 3 blocks of 5
    first = rig.step()
    assert len(first.ready) == 1
    assert rig.blocks.num_free == 2
    while len(rig.finished) < 1:
        assert len(rig.step().ready) == 1
    assert rig.step().ready == [rig.sequences[1]]


def test_at_most_so_many_sequences_run_at_once() -> None:
    rig = Rig(max_sequences=2, chunk_tokens=32)
    rig.add(*(sequence(2, max_new=3) for _ in range(5)))
    order = []
    while rig.scheduler.has_work:
        scheduled = rig.step()
        assert len(scheduled.ready) <= 2
        order += [one for one in rig.finished if one not in order]
    assert order == rig.sequences  # first come, first served


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_a_cancelled_sequence_gives_its_blocks_back(num_steps: int) -> None:
    """While it waits, while its prompt is prefilled, while it decodes."""
    rig = Rig(num_blocks=8, chunk_tokens=8)
    victim = sequence(10, max_new=9)
    rig.add(victim)
    for _ in range(num_steps):
        rig.step()
    rig.scheduler.remove(victim)
    assert rig.blocks.num_free == 8
    assert victim.blocks == []
    assert not rig.scheduler.has_work


def test_cancelling_one_leaves_the_others_as_they_were() -> None:
    rig = Rig(chunk_tokens=16)
    kept, victim = sequence(6, max_new=6), sequence(6, max_new=6, first_id=100)
    rig.add(kept, victim)
    rig.step()
    before = list(kept.blocks)
    rig.scheduler.remove(victim)
    scheduled = rig.step()
    assert scheduled.ready == [kept]
    assert kept.blocks == before


def test_slots_are_the_blocks_of_the_sequence() -> None:
    rig = Rig(chunk_tokens=32)
    one, other = sequence(6, max_new=3), sequence(7, max_new=3, first_id=50)
    rig.add(one, other)
    rig.step()
    batch = rig.step().batch
    assert batch.sequence.tolist() == [0, 1]
    assert batch.positions.tolist() == [6, 7]
    expected = [
        s.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for s, p in ((one, 6), (other, 7))
    ]
    assert batch.slots.tolist() == expected
    for row, s in enumerate((one, other)):
        assert batch.block_table[row, : len(s.blocks)].tolist() == s.blocks


requests = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10)), min_size=1, max_size=12
)  # prompt, answer, the step in which it comes


@given(requests, st.integers(1, 12), st.integers(1, 5), st.integers(9, 24), st.data())
@settings(deadline=None, max_examples=150)
def test_every_token_is_computed_once_in_order_and_no_block_has_two_owners(
    asked: list[tuple[int, int, int]],
    chunk_tokens: int,
    max_sequences: int,
    num_blocks: int,
    data: st.DataObject,
) -> None:
    rig = Rig(num_blocks=num_blocks, chunk_tokens=chunk_tokens, max_sequences=max_sequences)
    coming = sorted(asked, key=lambda request: request[2])
    for step in range(500):
        while coming and coming[0][2] <= step:
            rig.add(sequence(*coming.pop(0)[:2]))
        if not rig.scheduler.has_work:
            if not coming:
                break
            continue
        decoding = [one for one in rig.sequences if one.blocks and not one.is_prefilling]
        computed = {id(one): one.num_computed for one in rig.sequences}
        scheduled = rig.step(new_id=1000 + step)
        batch = scheduled.batch

        assert num_prefill(scheduled) <= chunk_tokens
        assert batch.num_tokens <= chunk_tokens + max_sequences
        assert all(one in scheduled.ready for one in decoding)  # none starves
        assert len(set(batch.slots.tolist())) == batch.num_tokens
        running = [one for one in rig.sequences if one.blocks]
        owned = [block for one in running for block in one.blocks]
        assert len(owned) == len(set(owned)) == num_blocks - rig.blocks.num_free
        advanced = sum(one.num_computed - computed[id(one)] for one in rig.sequences)
        assert advanced == batch.num_tokens > 0
        if running and data.draw(st.integers(0, 19)) == 0:
            rig.scheduler.remove(running[0])
            rig.finished.append(running[0])
    assert not rig.scheduler.has_work
    assert len(rig.finished) == len(asked)
    assert rig.blocks.num_free == num_blocks
