"""A scheduler whose blocks hold no bytes, and a rig that runs its steps as an engine would."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

from argosy.config import SamplingParams
from argosy.engine.media.spans import Spans
from argosy.engine.prefix import PrefixCache
from argosy.engine.sampler import SamplerState
from argosy.engine.scheduler import Scheduler
from argosy.engine.sequence import Sequence
from argosy.engine.steps import Scheduled
from argosy.kept.kv_cache import KvBlocks
from argosy.kept.kv_windows import NONE, KvWindows, WindowSizes
from argosy.kept.recurrent_state import StateSlots
from argosy.kept.tails import Tail
from argosy.model.step import Step

BLOCK_TOKENS = 4
NUM_EARLIER = 3  # tokens that n-grams reach back to


class NotedTokens:
    """KV blocks that record the tokens each position was computed from: its own and all before it."""

    def __init__(self, num_blocks: int, windows: KvWindows | None = None, tail: tuple[int, ...] = ()) -> None:
        self.noted: list[list[tuple[int, ...] | None]] = [[None] * BLOCK_TOKENS for _ in range(num_blocks)]
        self.windows = windows
        num_window_blocks = 0 if windows is None else windows.sizes.num_window_blocks
        self.noted_windows: list[list[tuple[int, ...] | None]] = [
            [None] * BLOCK_TOKENS for _ in range(num_window_blocks)
        ]
        self.tail = tail  # windows of the last layers
        self.num_run = [0] * len(tail)  # tokens for which each of them ran
        self.noted_tails = [
            [[None] * BLOCK_TOKENS for _ in range(num_window_blocks or num_blocks)] for _ in tail
        ]

    def copy_out(self, block: int, to: NDArray[np.uint8]) -> None:
        raise NotImplementedError

    def copy_in(self, block: int, saved: NDArray[np.uint8]) -> None:
        raise NotImplementedError

    def copy_block(self, from_block: int, to_block: int, is_windowed: bool = False) -> None:
        is_tail = is_windowed or self.windows is None
        for noted in (
            self.noted_windows if is_windowed else self.noted,
            *(self.noted_tails if is_tail else ()),
        ):
            noted[to_block] = list(noted[from_block])

    def run(self, scheduled: Scheduled) -> None:
        """Write what the step writes, and check that each token finds everything before it."""
        step = scheduled.step
        for row, slot, position in zip(step.sequence, step.slots, step.order, strict=True):
            sequence, at = scheduled.sequences[row], int(position)
            assert sequence.num_computed <= at
            tokens = tuple(sequence.tokens_from(0, at + 1))
            if step.earlier_ids is not None and at == sequence.num_computed:
                earlier = [-1] * NUM_EARLIER + list(tokens[:-1])
                assert step.earlier_ids[row].tolist() == earlier[-NUM_EARLIER:]
            assert int(step.block_table[row, at // BLOCK_TOKENS]) == slot // BLOCK_TOKENS
            self.noted[slot // BLOCK_TOKENS][slot % BLOCK_TOKENS] = tokens
            for before in range(at):
                block = int(step.block_table[row, before // BLOCK_TOKENS])
                assert self.noted[block][before % BLOCK_TOKENS] == tokens[: before + 1]
            if self.windows is not None:
                of_block = step.window_blocks
                assert of_block is not None
                self.noted_windows[of_block[slot // BLOCK_TOKENS]][slot % BLOCK_TOKENS] = tokens
                for seen in range(max(0, at - self.windows.sizes.window + 1), at):
                    place = int(of_block[step.block_table[row, seen // BLOCK_TOKENS]])
                    assert place != NONE
                    assert self.noted_windows[place][seen % BLOCK_TOKENS] == tokens[: seen + 1]
        if self.tail:
            self.run_tail(scheduled)

    def run_tail(self, scheduled: Scheduled) -> None:
        """Run the last layers for the tokens that they do not leave out; whoever is needed finds its windows."""
        step = scheduled.step
        num_left = [0] * len(self.tail)
        for token, (row, slot, position) in enumerate(
            zip(step.sequence, step.slots, step.order, strict=True)
        ):
            at, sequence = int(position), scheduled.sequences[row]
            tokens = tuple(sequence.tokens_from(0, at + 1))
            to_end = 0 if step.to_end is None else int(step.to_end[token])
            is_right, reach = True, 1 + sum(window - 1 for window in self.tail)
            for layer, window in enumerate(self.tail):
                if to_end >= reach:
                    break
                num_left[layer] += 1
                noted = self.noted_tails[layer]
                noted[self.place(step, slot // BLOCK_TOKENS)][slot % BLOCK_TOKENS] = (
                    tokens if is_right else None
                )
                for seen in range(max(0, at - window + 1), at):
                    place = self.place(step, int(step.block_table[row, seen // BLOCK_TOKENS]))
                    is_right &= noted[place][seen % BLOCK_TOKENS] == tokens[: seen + 1]
                reach -= window - 1
            assert is_right or to_end > 0
            assert to_end == 0 or at < sequence.reuse_limit
        self.num_run = [ran + more for ran, more in zip(self.num_run, num_left, strict=True)]

    def place(self, step: Step, block: int) -> int:
        return block if step.window_blocks is None else int(step.window_blocks[block])


class NotedStates:
    """A recurrent state that records the tokens each slot has seen, or None after a step failed midway."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.seen: list[tuple[int, ...] | None] = [()] * num_slots

    def position(self, slot: int) -> int:
        seen = self.seen[slot]
        return -1 if seen is None else len(seen)

    def copy_slot(self, from_slot: int, to_slot: int) -> None:
        self.seen[to_slot] = self.seen[from_slot]

    def run(self, scheduled: Scheduled) -> None:
        """Advance the states of a step; each must continue from the tokens it has already seen."""
        for row, sequence in enumerate(scheduled.sequences):
            slot = sequence.state_slot
            assert slot is not None
            first, *_, last = [*scheduled.step.order[scheduled.step.sequence == row].tolist()] * 2
            assert first == 0 or self.seen[slot] == tuple(sequence.tokens_from(0, first))
            self.seen[slot] = tuple(sequence.tokens_from(0, last + 1))


class Rig:
    """A scheduler and its blocks; `step` runs one step as the engine does."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        chunk_tokens: int = 8,
        max_sequences: int = 4,
        reuse: bool = False,
        states: StateSlots | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        windows: WindowSizes | None = None,
        num_earlier: int = NUM_EARLIER,
        tail: tuple[int, ...] = (),
    ) -> None:
        self.windows = None if windows is None else KvWindows(num_blocks, BLOCK_TOKENS, windows)
        self.blocks = KvBlocks(
            num_blocks,
            BLOCK_TOKENS,
            forgotten=states.forget if states else lambda key: None,
            windows=self.windows,
        )
        self.states = states
        self.memory = NotedTokens(num_blocks, self.windows, tail)
        self.cache = PrefixCache(
            self.blocks,
            self.memory,
            secret=bytes(32),
            identity=b"",
            states=states,
            is_on=reuse,
            tail=Tail(1 + sum(window - 1 for window in tail), max(tail), BLOCK_TOKENS) if tail else None,
        )
        self.scheduler = Scheduler(
            self.cache,
            chunk_tokens=chunk_tokens,
            max_sequences=max_sequences,
            num_earlier=num_earlier,
            clock=clock,
        )
        self.sequences: list[Sequence] = []
        self.finished: list[Sequence] = []
        self._numbers = count()

    def sequence(self, num_prompt: int, max_new: int = 4, *, first_id: int = 0, tenant: str = "") -> Sequence:
        """Make a sequence whose prompt is first_id, first_id + 1 ..."""
        return self.sequence_of(list(range(first_id, first_id + num_prompt)), max_new, tenant=tenant)

    def sequence_of(
        self, prompt: list[int], max_new: int = 4, *, tenant: str = "", spans: Spans | None = None
    ) -> Sequence:
        return Sequence(
            prompt,
            SamplingParams(max_tokens=max_new),
            number=next(self._numbers),
            max_new_tokens=max_new,
            sampler_state=SamplerState(prompt, 0),
            chain=self.cache.chain(tenant),
            tenant=tenant,
            spans=spans,
        )

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.sequences.append(one)
            self.scheduler.add(one)

    def step(self, new_id: int = 1000) -> Scheduled:
        while (scheduled := self.scheduler.next_step()) is None:
            pass  # rows of media are being made
        self.memory.run(scheduled)
        if self.states is not None and isinstance(self.states.state, NotedStates):
            self.states.state.run(scheduled)
        self.scheduler.commit(scheduled)
        for leader in scheduled.ready:
            for one in (leader, *self.scheduler.fork(leader)):
                one.new_ids.append(new_id)
                if len(one.new_ids) == one.max_new_tokens:
                    self.end(one)
        return scheduled

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.finished.append(sequence)

    @property
    def running(self) -> list[Sequence]:
        return self.scheduler._running

    def run(self, most_steps: int = 1000) -> list[Scheduled]:
        """Step until no work is left; return the steps."""
        done = []
        while self.scheduler.has_work:
            done.append(self.step())
            assert len(done) < most_steps
        return done

    def require_sound(self) -> None:
        """Check that every block and slot is in exactly one place, and that only running sequences hold any."""
        blocks, running = self.blocks, self.running
        assert blocks.num_free + blocks.num_kept + blocks.num_held == blocks.num_blocks
        holders: dict[int, int] = {}
        for one in running:
            assert len(set(one.blocks)) == len(one.blocks)
            for block in one.blocks:
                holders[block] = holders.get(block, 0) + 1
        assert len(holders) == blocks.num_held
        assert all(blocks._holders[block] == num for block, num in holders.items())
        assert len(blocks._free) == len(set(blocks._free))
        assert not set(blocks._free) & holders.keys()
        for one in self.sequences:
            if one not in running:
                assert not one.blocks
                assert one.state_slot is None
        assert set(self.scheduler._coming.values()) <= set(running)
        if self.states is not None:
            slots = [one.state_slot for one in running]
            assert len(set(slots)) == len(slots) == self.states.num_sequences - self.states.num_free
            assert len(self.states._unused) + self.states.num_snapshots == self.states.most_snapshots
        if (windows := self.windows) is not None:
            places = [place for place in windows.of_block.tolist() if place != NONE]
            assert sorted(places + windows._free) == list(range(windows.sizes.num_window_blocks))
            assert set(windows._in_use) == set(running)
            assert not any(windows.has(block) for block in blocks._free)
            users = [one.blocks[at] for one in running for at in windows._in_use[one]]
            assert all(windows._users[block] == users.count(block) for block in range(blocks.num_blocks))
            assert not set(windows._idle) & set(users)
            assert len(windows._ends) <= windows.sizes.most_ends


def num_prefill(scheduled: Scheduled) -> int:
    return int((~scheduled.step.is_decode).sum())
