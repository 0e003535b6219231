"""Decide which expert to evict: plain bookkeeping that can be replayed on a recorded trace.

The oldest expert is evicted. Its age takes three facts into account:

- **Layers take turns.** An expert can only be asked for when its layer runs, so its age is the number of turns of its
  own layer since its last use. Of two equally old experts, the one whose layer has just had its turn is evicted: it is
  needed last.
- **Use repeats.** An expert is younger by BONUS_TURNS for each doubling of its uses; a use counts half after
  HALF_LIFE_TURNS. Uses are remembered after an expert is evicted.
- **Every layer comes round.** A layer keeps its last `floor` experts (an equal share of the slots, at most
  `experts_per_token`) while another layer can give one. Otherwise, with fewer slots than one token uses, each expert
  would be evicted just before it is needed again.

Prompt tokens sweep through nearly every expert once per chunk. Experts that only they ask for take free slots, then
only the slots of a small window, newest first: the next sweep comes in the same order, so the experts swept in last
are needed last. Experts that decode uses stay; experts that were only swept in are evicted first. So are experts that
were only guessed: they take no more slots than one token asks for in a layer, and the oldest of them goes first.

Finding the expert to evict takes O(log slots). Within a layer all ages grow alike, so each layer has a heap by a
constant (`worth`), and one heap of the layers above their floor compares their oldest experts. An entry in either heap
may be too old, never too young; it is corrected when it reaches the top.

Elsewhere: `cache.py` reads; `benchmarks/replay.py` measures policies on recorded routing, and `docs/experiments.md`
has the results.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush, heapreplace
from math import log2
from typing import NamedTuple

from argosy.experts.files import Key, dict_bytes

BONUS_TURNS = 4.0
HALF_LIFE_TURNS = 16.0
# worth = turn of the last use * _GROWTH + BONUS_TURNS * log2(uses then), and age = turn now * _GROWTH - worth: as the
# use count decays, the bonus shrinks by BONUS_TURNS every HALF_LIFE_TURNS.
_GROWTH = 1.0 + BONUS_TURNS / HALF_LIFE_TURNS
_DECAY = [0.5 ** (turns / HALF_LIFE_TURNS) for turns in range(int(20 * HALF_LIFE_TURNS))]

# (minus the age, minus the time of its layer's turn, layer, turn of the layer)
_Oldest = tuple[float, int, int, int]


class _Layer:
    """The state of a layer's experts. Experts in the sweep's window have no slot here."""

    __slots__ = ("heap", "passed", "pinned", "slots", "turn", "uses", "worth")

    def __init__(self) -> None:
        self.turn = 0
        self.passed = 0  # minus the time of its last turn
        self.slots: dict[int, int] = {}
        self.pinned: set[int] = set()  # including those in the window
        self.worth: dict[int, float] = {}
        self.uses: dict[int, tuple[float, int]] = {}  # expert -> use count, and the turn it is from
        self.heap: list[tuple[float, int]] = []  # (worth, expert)

    def count_use(self, expert: int) -> float:
        """Count a use; return the expert's new worth."""
        uses, turn = 1.0, self.turn
        if (before := self.uses.get(expert)) is not None:
            count, then = before
            if turn - then < len(_DECAY):
                uses += count * _DECAY[turn - then]
        self.uses[expert] = uses, turn
        return turn * _GROWTH + BONUS_TURNS * log2(uses)


# Upper bounds for the bytes of Python objects. An expert that was used has a tuple, a float and an int. A slot has its
# number (also in the list of free slots), its expert's worth twice, and a heap entry. A slot in the window has its key
# and a node of the `OrderedDict`.
_USED_BYTES = 64 + 32 + 32
_SLOT_BYTES = (32 + 9) + 2 * 32 + (64 + 9)
_WINDOW_BYTES = 64 + 2 * 48


def bookkeeping_bytes(*, num_slots: int, num_layers: int, num_experts: int) -> int:
    """Most bytes that a policy can hold, with `num_experts` in each layer.

    A dict never shrinks, so the dicts of a layer may have grown for all of its experts.
    """
    num_slots = min(num_slots, num_layers * num_experts)
    most = min(num_slots, num_experts)  # in one layer
    layer_bytes = dict_bytes(num_experts) + num_experts * _USED_BYTES
    layer_bytes += 2 * dict_bytes(most) + sys.getsizeof(set(range(most)))
    window = num_slots // 4
    return (
        num_layers * layer_bytes + num_slots * _SLOT_BYTES + window * _WINDOW_BYTES + 2 * dict_bytes(window)
    )


class Move(NamedTuple):
    """An expert whose slot goes, and the slot that it gets instead."""

    key: Key
    slot: int
    to: int


class CachePolicy:
    """Tracks which expert is in which slot, and chooses the next one to evict. Moves no bytes.

    Args:
        layers: those whose experts may have these slots.
    """

    def __init__(self, *, num_slots: int, layers: Collection[int], experts_per_token: int) -> None:
        self._experts_per_token = experts_per_token
        self.guess_slots = experts_per_token
        self._free: list[int] = []
        self._reserved: list[int] = []  # one for each expert in a slot that goes
        self._clock = 0
        self._layers = {layer: _Layer() for layer in layers}
        # A heap; entries of an earlier turn, or of a layer at its floor, are void.
        self._oldest: list[_Oldest] = []
        self._window: OrderedDict[Key, int] = OrderedDict()  # swept in or guessed, oldest first
        self._pinned_in_window: set[Key] = set()
        self.num_slots = 0
        self.resize(num_slots)

    def resize(self, num_slots: int) -> None:
        """Have so many slots, numbered from 0.

        If there are more experts than slots, those are evicted that misses of decode would displace next. The others
        stay where they are. `moves` brings those in slots that go to lower ones, which nobody else gets until then.
        """
        self.floor = min(self._experts_per_token, num_slots // max(1, len(self._layers)))
        # A sweep gets at most a quarter of the cache, but never less than one token asks for.
        self.window_slots = max(self._experts_per_token, num_slots // 4)
        for layer in self._layers:  # the floor is lower, so they may have experts to give
            self._note_oldest(layer)
        for _ in range(self.num_resident - num_slots):
            slot = self._from_window(newest=False)
            if slot is None:
                slot = self._evict_oldest(None)
            assert slot is not None  # otherwise more experts are pinned than there will be slots
        self.num_slots = num_slots
        used = {slot for here in self._layers.values() for slot in here.slots.values()}
        used.update(self._window.values())
        num_beyond = sum(slot >= num_slots for slot in used)
        # The last one is taken next. Low slots are, so that few experts have to move when there are fewer slots.
        free = [slot for slot in reversed(range(num_slots)) if slot not in used]
        self._reserved, self._free = free[:num_beyond], free[num_beyond:]

    def moves(self, num_slots: int) -> list[Move]:
        """Move the experts in slots from `num_slots` on, which is no less than the number of slots. None may be pinned.

        Returns:
            What has to be copied now, to slots that hold nothing.
        """
        assert num_slots >= self.num_slots
        moves: list[Move] = []
        if not self._reserved:
            return moves
        for number, here in self._layers.items():
            going = [(expert, slot) for expert, slot in here.slots.items() if slot >= num_slots]
            for expert, slot in going:
                here.slots[expert] = self._move((number, expert), slot, moves)
        for key, slot in self._window.items():
            if slot >= num_slots:
                self._window[key] = self._move(key, slot, moves)
        return moves

    def _move(self, key: Key, slot: int, moves: list[Move]) -> int:
        assert key[1] not in self._layers[key[0]].pinned
        moves.append(Move(key, slot, self._reserved.pop()))
        return moves[-1].to

    def slot(self, key: Key) -> int | None:
        """The slot of a resident expert, or None."""
        slot = self._layers[key[0]].slots.get(key[1])
        return self._window.get(key) if slot is None else slot

    @property
    def num_resident(self) -> int:
        return self.num_slots - len(self._free)

    def resident(self) -> set[Key]:
        lasting = {(number, expert) for number, layer in self._layers.items() for expert in layer.slots}
        return lasting | set(self._window)

    def begin(self, layer: int) -> None:
        """Begin a layer's turn in decode: its experts are a turn older."""
        self._clock += 1
        here = self._layers[layer]
        here.turn += 1
        here.passed = -self._clock
        if len(here.slots) > self.floor:
            self._note_oldest(layer)
        if len(self._oldest) > 8 * len(self._layers):
            self._oldest = sorted(entry for entry in self._oldest if entry[3] == self._layers[entry[2]].turn)

    def find(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Split a layer's experts into those with a slot and those without; the order stays."""
        slots, window = self._layers[layer].slots, self._window
        hits: list[int] = []
        missing: list[int] = []
        for expert in experts:
            (hits if expert in slots or (window and (layer, expert) in window) else missing).append(expert)
        return hits, missing

    def use(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> None:
        """Record hits of a layer, and pin them. A sweep does not make an expert younger."""
        here = self._layers[layer]
        here.pinned.update(experts)
        if is_scan:
            window = self._window
            self._pinned_in_window.update(
                [(layer, expert) for expert in experts if (layer, expert) in window]
            )
            return
        slots, worth = here.slots, here.worth
        for expert in experts:
            if expert in slots:
                worth[expert] = here.count_use(expert)
            else:
                key = layer, expert
                self._pinned_in_window.discard(key)
                self._keep(layer, expert, self._window.pop(key))

    def admit(self, key: Key, *, is_scan: bool, is_guess: bool = False) -> int | None:
        """Find a slot for a missing expert, evicting another if necessary, and pin it. None means: wait for an unpin.

        A guess is a scan that may take fewer slots from others.
        """
        if self._free:
            slot: int | None = self._free.pop()
        elif is_guess:
            has_room = len(self._window) < self.guess_slots
            slot = self._evict_oldest(key[0]) if has_room else self._from_window(newest=False)
        elif is_scan:
            slot = self._slot_for_sweep(key[0])
        else:
            slot = self._from_window(newest=False)
            if slot is None:
                slot = self._evict_oldest(key[0])
        if slot is None:
            return None
        self._layers[key[0]].pinned.add(key[1])
        if is_scan:
            self._window[key] = slot
            self._pinned_in_window.add(key)
        else:
            self._keep(*key, slot)
        return slot

    def unpin(self, layer: int, experts: Iterable[int]) -> None:
        self._layers[layer].pinned.difference_update(experts)
        if self._pinned_in_window:
            self._pinned_in_window.difference_update([(layer, expert) for expert in experts])

    def drop(self, key: Key) -> None:
        """Forget an expert whose bytes never arrived."""
        self.unpin(key[0], [key[1]])
        slot = self._window.pop(key, None)
        if slot is None:
            here = self._layers[key[0]]
            slot = here.slots.pop(key[1])
            del here.worth[key[1]]
        if slot >= self.num_slots:  # that slot goes
            slot = self._reserved.pop()
        self._free.append(slot)

    def _keep(self, layer: int, expert: int, slot: int) -> None:
        """Keep an expert in its slot beyond the window, and count a use."""
        here = self._layers[layer]
        worth = here.count_use(expert)
        here.slots[expert], here.worth[expert] = slot, worth
        heappush(here.heap, (worth, expert))
        above = len(here.slots) - self.floor
        if above == 1 or (above > 1 and here.heap[0][1] == expert):
            self._note_oldest(layer)

    def _note_oldest(self, layer: int) -> None:
        here = self._layers[layer]
        if here.heap:
            bound = here.heap[0][0] - here.turn * _GROWTH
            heappush(self._oldest, (bound, here.passed, layer, here.turn))

    def _slot_for_sweep(self, layer: int) -> int | None:
        """A slot from others while the window is small, then from the window; at most its size is pinned at once."""
        if len(self._pinned_in_window) >= self.window_slots:
            return None
        slot = self._evict_oldest(layer) if len(self._window) < self.window_slots else None
        return self._from_window(newest=True) if slot is None else slot

    def _from_window(self, *, newest: bool) -> int | None:
        keys = reversed(self._window) if newest else iter(self._window)
        key = next((key for key in keys if key[1] not in self._layers[key[0]].pinned), None)
        return None if key is None else self._window.pop(key)

    def _evict_oldest(self, asking_layer: int | None) -> int | None:
        """The slot of the oldest unpinned expert; a layer at its floor gives one only as a last resort.

        Args:
            asking_layer: may give one at its floor, too, because it gets one; None: nobody asks.
        """
        if asking_layer is not None and len(self._layers[asking_layer].slots) <= self.floor:
            self._note_oldest(asking_layer)
        slot = self._evict(asking_layer, self.floor)
        if slot is None and self.floor:
            for layer in self._layers:
                self._note_oldest(layer)
            slot = self._evict(asking_layer, 0)
        return slot

    def _evict(self, asking_layer: int | None, floor: int) -> int | None:
        slot = None
        pinned: list[tuple[int, tuple[float, int]]] = []  # layer, and its heap entry
        while self._oldest and slot is None:
            bound, passed, layer, turn = self._oldest[0]
            here = self._layers[layer]
            if turn != here.turn or (layer != asking_layer and len(here.slots) <= floor):
                heappop(self._oldest)
                continue
            worth = self._least_worth(layer, pinned)
            if worth is None:
                heappop(self._oldest)
            elif worth - turn * _GROWTH > bound:
                heapreplace(self._oldest, (worth - turn * _GROWTH, passed, layer, turn))
            else:
                _, expert = heappop(here.heap)
                del here.worth[expert]
                slot = here.slots.pop(expert)
        for layer, held in pinned:
            heappush(self._layers[layer].heap, held)
        for layer in {layer for layer, _ in pinned}:
            self._note_oldest(layer)
        return slot

    def _least_worth(self, layer: int, pinned: list[tuple[int, tuple[float, int]]]) -> float | None:
        """Bring a layer's oldest unpinned expert to the top of its heap; move the pinned ones before it to `pinned`."""
        here = self._layers[layer]
        while here.heap:
            worth, expert = here.heap[0]
            now = here.worth.get(expert)
            if now is None:  # it was dropped
                heappop(here.heap)
            elif now != worth:  # it was used since
                heapreplace(here.heap, (now, expert))
            elif expert in here.pinned:
                pinned.append((layer, heappop(here.heap)))
            else:
                return worth
        return None
