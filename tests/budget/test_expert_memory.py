"""Memory that experts have for a while comes and goes in pieces, and is with the system before anybody else uses it."""

from __future__ import annotations

import threading

import pytest

from argosy.budget.expert_memory import OWN, ExpertMemory
from argosy.config import MIB, ExpertSlots
from argosy.engine.turns import Turns
from argosy.errors import UsageError

SLOT_BYTES = 16 * MIB  # two slots are a piece
PIECE_S = 0.010  # what a piece takes


class Slots:
    """An expert cache that notes how many slots have memory, and how long it takes to give some back."""

    def __init__(self) -> None:
        self.num_slots = 100
        self.noted = [100]
        self.now = 0.0

    def resize(self, num_slots: int, *, held: int | None = None) -> None:
        assert held is not None
        assert held >= num_slots
        self.now += PIECE_S
        self.num_slots = num_slots
        self.noted.append(held)


@pytest.fixture
def cache() -> Slots:
    return Slots()


@pytest.fixture
def lock() -> Turns:
    return Turns()


@pytest.fixture
def memory(cache: Slots, lock: Turns) -> ExpertMemory:
    slots = ExpertSlots(own=100, lent=15, idle=5, num_experts=1000, slot_bytes=SLOT_BYTES)
    return ExpertMemory(cache, slots, lock=lock, clock=lambda: cache.now)  # type: ignore[arg-type]


def test_memory_that_is_lent_has_slots_up_to_the_most_that_there_can_be(
    memory: ExpertMemory, cache: Slots
) -> None:
    memory.allow("KV cache", 5 * SLOT_BYTES - 1)
    assert cache.noted[-1] == memory.num_slots == 104  # never more than what is lent
    memory.allow("prompts", 1)
    assert (cache.noted[-1], memory.num_slots) == (105, 105)
    memory.allow("pictures", 1000 * SLOT_BYTES)
    assert (cache.noted[-1], memory.num_slots) == (120, 120)
    memory.allow("KV cache", 0)
    assert cache.noted[-1] == 120  # pictures lend enough
    memory.allow("pictures", 0)
    assert (cache.noted[-1], memory.num_slots) == (100, 100)


def test_a_step_gets_what_it_needs_at_once(memory: ExpertMemory, cache: Slots) -> None:
    memory.step_s = 0.0
    memory.allow("KV cache", 10 * SLOT_BYTES)
    memory.allow("KV cache", 3 * SLOT_BYTES)
    assert cache.noted[-1] == 103


def test_others_take_memory_for_a_part_of_the_time_between_steps(memory: ExpertMemory, cache: Slots) -> None:
    memory.step_s = 8 * PIECE_S
    assert not memory.approach({OWN: 90 * SLOT_BYTES})
    assert cache.noted[1:] == [98, 96]  # a quarter of a step
    assert cache.num_slots == memory.num_slots == 90  # who leaves has left, and the others move in pieces
    memory.step_s = 0.0
    assert not memory.approach({OWN: 90 * SLOT_BYTES})
    assert cache.noted[3:] == [94]  # at least something
    assert memory.approach({"pictures": 10 * SLOT_BYTES})  # more is there at once
    assert (cache.noted[-1], cache.num_slots) == (100, 100)


def test_a_step_takes_memory_beside_others_who_wait_for_theirs(memory: ExpertMemory, cache: Slots) -> None:
    memory.allow("KV cache", 20 * SLOT_BYTES)
    assert not memory.approach({OWN: 90 * SLOT_BYTES})
    assert (cache.noted[-1], cache.num_slots) == (118, 110)
    memory.allow("KV cache", 14 * SLOT_BYTES)  # six slots for the step, and eight are still awaited
    assert (cache.noted[-1], cache.num_slots) == (112, 104)
    memory.allow("KV cache", 16 * SLOT_BYTES)
    assert (cache.noted[-1], cache.num_slots) == (112, 106)
    while not memory.approach({OWN: 90 * SLOT_BYTES}):
        pass
    assert (cache.noted[-1], cache.num_slots) == (106, 106)


def test_a_long_step_gives_all_of_it_at_once_and_what_was_begun_in_pieces(
    memory: ExpertMemory, cache: Slots
) -> None:
    memory.shrink(OWN, 95 * SLOT_BYTES)
    assert (cache.noted, cache.num_slots) == ([100, 95], 95)
    assert not memory.approach({OWN: 80 * SLOT_BYTES})
    assert (cache.noted[-1], cache.num_slots) == (93, 80)
    memory.shrink(OWN, 80 * SLOT_BYTES)
    assert cache.noted[2:] == [93, 80]
    memory.shrink(OWN, 110 * SLOT_BYTES)  # it only takes
    assert cache.noted[4:] == []


def test_steps_go_on_while_another_thread_takes_memory(
    memory: ExpertMemory, cache: Slots, lock: Turns
) -> None:
    steps: list[int] = []
    thread = threading.Thread(target=memory.allow_between_steps, args=(lambda: {OWN: 90 * SLOT_BYTES},))
    with lock:
        thread.start()
        while not lock._waiting:
            pass
    for _ in range(4):  # the lock goes to the thread, and comes back after each piece
        with lock:
            steps.append(cache.noted[-1])
            while not lock._waiting and thread.is_alive():
                pass
    thread.join(30)
    assert steps == [98, 96, 94, 92]
    assert cache.noted[-1] == 90


def test_whoever_has_waited_for_a_second_gets_the_rest_at_once(
    memory: ExpertMemory, cache: Slots, lock: Turns
) -> None:
    def take() -> dict[str, int]:
        assert lock._depth  # between two steps
        cache.now += 0.4  # it waited for a step
        return {OWN: 0}

    memory.allow_between_steps(take)
    assert cache.noted == [100, 98, 96, 94, 0]


def test_nothing_changes_once_it_is_closed(memory: ExpertMemory, cache: Slots) -> None:
    memory.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        memory.allow_between_steps(lambda: {OWN: 0})
    assert cache.noted == [100]
