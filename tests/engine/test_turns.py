from __future__ import annotations

import threading
import time
from itertools import pairwise

from argosy.engine.turns import Turns


def test_threads_that_want_it_all_the_time_take_turns() -> None:
    turns, taken = Turns(), []
    is_done = threading.Event()

    def work(name: str) -> None:
        while not is_done.is_set():
            with turns:
                taken.append(name)
                time.sleep(0.001)  # native code frees the interpreter meanwhile

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    while len(taken) < 100:
        time.sleep(0.01)
    is_done.set()
    for thread in threads:
        thread.join()
    both = taken[taken.index("b") : 90]
    repeats = sum(before == after for before, after in pairwise(both))
    assert len(both) > 50
    assert repeats <= 5


def test_those_who_wait_are_served_in_their_order() -> None:
    turns, order = Turns(), []
    threads = []
    with turns:
        for number in range(5):
            thread = threading.Thread(target=lambda number=number: _note(turns, order, number))
            thread.start()
            while len(turns._waiting) <= number:
                pass
            threads.append(thread)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def _note(turns: Turns, order: list[int], number: int) -> None:
    with turns:
        order.append(number)


def test_its_owner_may_take_it_again() -> None:
    turns = Turns()
    with turns, turns:
        pass
    other = threading.Thread(target=turns.acquire)
    other.start()
    other.join(5)
    assert not other.is_alive()


def test_it_tells_whether_it_was_free() -> None:
    turns, was_free = Turns(), []
    assert turns.acquire()
    assert turns.acquire()
    other = threading.Thread(target=lambda: was_free.append(turns.acquire()))
    other.start()
    while not turns._waiting:
        pass
    turns.release()
    assert not was_free
    turns.release()
    other.join()
    assert was_free == [False]
