"""Which expert leaves the cache: plain bookkeeping that can be replayed on a recorded trace.

The oldest leaves, by an age that knows three things of experts:

- **A layer comes round.** An expert can only be asked for when its layer is, so age counts the turns of its own layer
  since it was used. Of two that are equally old, the one whose layer has just had its turn leaves: it is needed last.
- **Use repeats.** An expert that was used more often is younger by BONUS_TURNS for each doubling of its uses; a use
  counts half after HALF_LIFE_TURNS. Uses are remembered when an expert leaves.
- **Every layer has its turn.** A layer keeps its last `floor` experts (an equal share of the slots, at most
  `experts_per_token`) while others can give one: else, with fewer slots than one token touches, each expert would
  leave just before it is needed again.

Prompt tokens sweep through nearly every expert once per chunk. What they alone ask for takes free slots, and then only
the slots of a small window, newest first: a sweep comes round again in the same order, so what was swept last is
needed last. What decode uses stays; what was only swept in leaves first. So does what was only guessed, which takes no
more slots than one token asks for in a layer, and there the oldest goes first.

Finding who leaves takes O(log slots): within a layer ages grow alike, so each layer has a heap by what does not change
(`worth`), and one heap of the layers above their floor compares their oldest. Entries of both may say too old, never
too young: they are put right when they come to the top.

Elsewhere: the reads are `cache.py`; `benchmarks/replay.py` measures policies on recorded routing, and
`docs/experiments.md` has what was measured.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush, heapreplace
from math import log2

from argosy.experts.source import Key, dict_bytes

BONUS_TURNS = 4.0
HALF_LIFE_TURNS = 16.0
# worth = turn of the last use * _GROWTH + BONUS_TURNS * log2(uses then), and age = turn now * _GROWTH - worth: a use
# count that halves takes the bonus away at the rate of BONUS_TURNS in HALF_LIFE_TURNS.
_GROWTH = 1.0 + BONUS_TURNS / HALF_LIFE_TURNS
_DECAY = [0.5 ** (turns / HALF_LIFE_TURNS) for turns in range(int(20 * HALF_LIFE_TURNS))]

_Oldest = tuple[
    float, int, int, int
]  # (minus the age, minus when its layer had its turn, layer, turn of the layer)


class _Layer:
    """What is known of the experts of a layer. Those in the sweep's window have no slot here."""

    __slots__ = ("heap", "passed", "pinned", "slots", "turn", "uses", "worth")

    def __init__(self) -> None:
        self.turn = 0
        self.passed = 0  # minus the time of its last turn
        self.slots: dict[int, int] = {}
        self.pinned: set[int] = set()  # those in the window, too
        self.worth: dict[int, float] = {}
        self.uses: dict[int, tuple[float, int]] = {}  # how often, and as of which turn
        self.heap: list[tuple[float, int]] = []  # (worth, expert)

    def count_use(self, expert: int) -> float:
        """Count a use, and return what the expert is worth now."""
        uses, turn = 1.0, self.turn
        if (before := self.uses.get(expert)) is not None:
            count, then = before
            if turn - then < len(_DECAY):
                uses += count * _DECAY[turn - then]
        self.uses[expert] = uses, turn
        return turn * _GROWTH + BONUS_TURNS * log2(uses)


# Most bytes of Python objects: of an expert that was used, a tuple, a float and an int; of a slot, its number (in the
# list of free ones, too), the worth of its expert twice, and an entry of the heap; of a slot in the window, its key and
# a node of the `OrderedDict`.
_USED_BYTES = 64 + 32 + 32
_SLOT_BYTES = (32 + 9) + 2 * 32 + (64 + 9)
_WINDOW_BYTES = 64 + 2 * 48


def bookkeeping_bytes(*, num_slots: int, num_layers: int, num_experts: int) -> int:
    """Most bytes that a policy comes to hold, with so many experts in each layer.

    A dict keeps the size that it once had, so those of a layer may have grown for all of its experts.
    """
    num_slots = min(num_slots, num_layers * num_experts)
    most = min(num_slots, num_experts)  # in one layer
    layer_bytes = dict_bytes(num_experts) + num_experts * _USED_BYTES
    layer_bytes += 2 * dict_bytes(most) + sys.getsizeof(set(range(most)))
    window = num_slots // 4
    return (
        num_layers * layer_bytes + num_slots * _SLOT_BYTES + window * _WINDOW_BYTES + 2 * dict_bytes(window)
    )


class CachePolicy:
    """Which expert is in which slot, and which one leaves next. Knows nothing of bytes."""

    def __init__(self, *, num_slots: int, num_layers: int, experts_per_token: int) -> None:
        self.num_slots = num_slots
        self.floor = min(experts_per_token, num_slots // max(1, num_layers))
        # A quarter of the cache at most is given to a sweep, and never less than one token asks for.
        self.window_slots = max(experts_per_token, num_slots // 4)
        self.guess_slots = experts_per_token
        self._free = list(range(num_slots - 1, -1, -1))
        self._clock = 0
        self._layers = [_Layer() for _ in range(num_layers)]
        self._oldest: list[
            _Oldest
        ] = []  # a heap; entries of an earlier turn, or of a layer at its floor, are void
        self._window: OrderedDict[Key, int] = OrderedDict()  # swept in or guessed, oldest first
        self._pinned_in_window: set[Key] = set()

    def slot(self, key: Key) -> int | None:
        """The slot of a resident expert, or None."""
        slot = self._layers[key[0]].slots.get(key[1])
        return self._window.get(key) if slot is None else slot

    @property
    def num_resident(self) -> int:
        return self.num_slots - len(self._free)

    def resident(self) -> set[Key]:
        lasting = {(number, expert) for number, layer in enumerate(self._layers) for expert in layer.slots}
        return lasting | set(self._window)

    def begin(self, layer: int) -> None:
        """Decode has come to a layer: its experts are a turn older."""
        self._clock += 1
        here = self._layers[layer]
        here.turn += 1
        here.passed = -self._clock
        if len(here.slots) > self.floor:
            self._note_oldest(layer)
        if len(self._oldest) > 8 * len(self._layers):
            self._oldest = sorted(entry for entry in self._oldest if entry[3] == self._layers[entry[2]].turn)

    def find(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Those of a layer's experts that have a slot, and those that have none; in the order given."""
        slots, window = self._layers[layer].slots, self._window
        hits: list[int] = []
        missing: list[int] = []
        for expert in experts:
            (hits if expert in slots or (window and (layer, expert) in window) else missing).append(expert)
        return hits, missing

    def use(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> None:
        """Note hits of a layer, and pin them. A sweep does not make an expert younger."""
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
        """Find a slot for a missing expert, evicting another if need be, and pin it. None: wait for an unpin.

        A guess is a scan that takes fewer slots from others.
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
        self._free.append(slot)

    def _keep(self, layer: int, expert: int, slot: int) -> None:
        """Give an expert a lasting place, for a use that is counted now."""
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
        """From the window; from others only while the window is small, and never more at once than the window has."""
        if len(self._pinned_in_window) >= self.window_slots:
            return None
        slot = self._evict_oldest(layer) if len(self._window) < self.window_slots else None
        return self._from_window(newest=True) if slot is None else slot

    def _from_window(self, *, newest: bool) -> int | None:
        keys = reversed(self._window) if newest else iter(self._window)
        key = next((key for key in keys if key[1] not in self._layers[key[0]].pinned), None)
        return None if key is None else self._window.pop(key)

    def _evict_oldest(self, asking_layer: int) -> int | None:
        """The slot of the oldest that is not pinned; layers with no more than their floor give one only at last."""
        if len(self._layers[asking_layer].slots) <= self.floor:
            self._note_oldest(asking_layer)
        slot = self._evict(asking_layer, self.floor)
        if slot is None and self.floor:
            for layer in range(len(self._layers)):
                self._note_oldest(layer)
            slot = self._evict(asking_layer, 0)
        return slot

    def _evict(self, asking_layer: int, floor: int) -> int | None:
        slot = None
        pinned: list[tuple[int, tuple[float, int]]] = []  # layer, and what was in its heap
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
        """Bring the oldest of a layer that is not pinned to the top of its heap; those before it go to `pinned`."""
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
