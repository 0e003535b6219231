"""Slots of several sizes in one arena, because the layers of a file may have experts of different sizes.

    sizes of experts  ->  SlotLayout: a few kinds of slots, in a fixed order  ->  Slots: a policy for each kind

In a Q4_K_M file, half of the layers have `down` in Q6_K. If each slot could hold the largest expert, the experts of the
other layers would leave an eighth of theirs unused. So layers whose experts are about as large share a kind of slots,
and each kind gets the same share of its experts: a budget that holds a third of all experts holds a third of each kind.

The kinds alternate in the arena, in proportion to their experts. So the first n slots are a cache for any n, and a
smaller cache gives back the end of the memory.

A slot counts as `SlotLayout.slot_bytes` in a memory plan, whatever its kind. That is the mean size of an expert, unless
a large kind has few experts: the smallest cache has a slot of each kind, and so more large ones than their share.

Elsewhere: `native/ops/cache_policy.h` decides within a kind; `cached_experts.h` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.files import ExpertRecord, ExpertRecords
from argosy.checkpoint.formats import round_up
from argosy.experts.files import LARGEST_ALIGNMENT, Key, memory_of
from argosy.experts.policy import CachePolicy

# Beside what its policy knows, an expert has: the place of a slot here and in native code, and its order; its number;
# its record, the size of that, and a reference to it. Vectors have up to twice the room.
_EXPERT_BYTES = 2 * 8 + 8 + 2 * (4 + 16 + 8)
# More kinds save little, and within a kind the policy is free to give a layer more slots than another.
_MOST_KINDS = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """Slots of one size, for the experts of some layers.

    places: int64 [experts], where each slot begins in the arena, in bytes.
    order: int64 [experts], how many slots of all kinds lie before each.
    """

    slot_bytes: int
    layers: tuple[int, ...]
    places: NDArray[np.int64]
    order: NDArray[np.int64]

    @property
    def num_experts(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where the slots of an arena lie: n slots fit in n * `slot_bytes`, if n is enough for the experts of a token."""

    slot_bytes: int
    kinds: tuple[Kind, ...]
    fewest: int

    def counts(self, num_slots: int) -> list[int]:
        """How many of the first slots are of each kind; with fewer than `fewest`, only what fits."""
        if num_slots < self.fewest:
            ends = sorted(int(end) for kind in self.kinds for end in kind.places + kind.slot_bytes)
            num_slots = sum(end <= num_slots * self.slot_bytes for end in ends[:num_slots])
        return [int(np.searchsorted(kind.order, num_slots)) for kind in self.kinds]

    def bookkeeping_bytes(self, num_slots: int, *, num_experts: int) -> int:
        """Most bytes that `Slots`, its policies and leases can hold, with at most `num_experts` in each layer."""
        in_policies = sum(
            CachePolicy.bytes(num_slots=count, num_layers=len(kind.layers), num_experts=num_experts)
            for kind, count in zip(self.kinds, self.counts(num_slots), strict=True)
        )
        return in_policies + _EXPERT_BYTES * sum(kind.num_experts for kind in self.kinds)


def lay_out(
    records: Mapping[Key, ExpertRecord], *, experts_per_token: int, alignment: int = LARGEST_ALIGNMENT
) -> SlotLayout:
    """Choose the kinds of slots with which most experts fit into a budget.

    Args:
        alignment: of reads, in bytes. A plan does not know it, so a smaller one changes nothing.
    """
    alignment = max(alignment, LARGEST_ALIGNMENT)
    sizes: dict[int, int] = {}  # of the largest expert of each layer
    num_experts: Counter[int] = Counter()
    for layer, _, count, record in ExpertRecords.of(records).runs():
        sizes[layer] = max(sizes.get(layer, 0), round_up(memory_of(record, alignment), alignment))
        num_experts[layer] += count
    groups = [[layer for layer in sizes if sizes[layer] == size] for size in sorted(set(sizes.values()))]
    fewest = min(len(records), experts_per_token)

    def joined(number: int) -> int:
        """Bytes that are lost if the experts of a group get slots of the next larger kind."""
        here, following = groups[number], groups[number + 1]
        return sum(num_experts[layer] for layer in here) * (sizes[following[0]] - sizes[here[0]])

    found: list[SlotLayout] = []
    while True:
        if len(groups) <= min(_MOST_KINDS, max(1, fewest)):
            kinds = [(sizes[group[0]], tuple(sorted(group))) for group in groups]
            found.append(_lay_out(kinds, num_experts, fewest))
        if len(groups) <= 1:
            break
        least = min(range(len(groups) - 1), key=joined)
        # The larger layer comes first: the size of a group is that of its first layer.
        groups[least : least + 2] = [groups[least + 1] + groups[least]]
    # Reversed, so that the layout with the fewest kinds wins among equally good ones.
    return min(reversed(found), key=lambda layout: layout.slot_bytes)


def _lay_out(
    kinds: Sequence[tuple[int, tuple[int, ...]]], num_experts: Mapping[int, int], fewest: int
) -> SlotLayout:
    """Lay out kinds of slots: (size, layers)."""
    counts = [sum(num_experts[layer] for layer in layers) for _, layers in kinds]
    number = np.repeat(np.arange(len(kinds)), counts)
    # The first slots are one of each kind, and after every slot each kind has its share. Of several kinds whose turn it
    # is, the smallest is first.
    turn = np.concatenate([np.arange(count) / count for count in counts]) if counts else np.zeros(0)
    number = number[np.lexsort((number, turn))]
    slot_sizes = np.array([size for size, _ in kinds], np.int64)[number]
    ends = np.cumsum(slot_sizes)
    num_slots = np.arange(1, len(ends) + 1)
    slot_bytes = int((-(-ends // num_slots))[fewest - 1 :].max(initial=0))
    return SlotLayout(
        round_up(slot_bytes, LARGEST_ALIGNMENT),
        tuple(
            Kind(size, layers, (ends - slot_sizes)[number == i], np.flatnonzero(number == i))
            for i, (size, layers) in enumerate(kinds)
        ),
        fewest,
    )


class Copy(NamedTuple):
    """An expert that moves, and the bytes of the arena from and to which it is copied."""

    key: Key
    begin: int
    to: int
    nbytes: int


class Slots:
    """The slots of all kinds, each with its own policy. Moves no bytes.

    Attributes:
        policies: the policy of each kind.
        policy_of: the policy of a layer's experts.
    """

    def __init__(self, layout: SlotLayout, *, num_slots: int, experts_per_token: int) -> None:
        self._layout = layout
        self.num_slots = num_slots
        self.policies: list[CachePolicy] = []
        self.policy_of: dict[int, CachePolicy] = {}
        self._num_experts = [kind.num_experts for kind in layout.kinds]
        for kind, count in zip(layout.kinds, layout.counts(num_slots), strict=True):
            made = CachePolicy(num_slots=count, layers=kind.layers, experts_per_token=experts_per_token)
            self.policies.append(made)
            self.policy_of.update(dict.fromkeys(kind.layers, made))

    def kinds(self) -> list[tuple[CachePolicy, list[int], list[int]]]:
        """The policy of each kind, its layers, and where its slots begin: for `_native.CachedExperts`."""
        return [
            (made, list(kind.layers), kind.places.tolist())
            for kind, made in zip(self._layout.kinds, self.policies, strict=True)
        ]

    @property
    def num_resident(self) -> int:
        return sum(each.num_resident for each in self.policies)

    @property
    def is_full(self) -> bool:
        """Whether no slot is left for another expert, or no expert for another slot."""
        return all(
            each.num_resident >= min(each.num_slots, num_experts)
            for each, num_experts in zip(self.policies, self._num_experts, strict=True)
        )

    def resident(self) -> set[Key]:
        return {key for each in self.policies for key in each.resident()}

    def slot(self, key: Key) -> int | None:
        """The slot of a resident expert among those of its kind, or None."""
        return self.policy_of[key[0]].slot(key)

    def resize(self, num_slots: int) -> None:
        """Have so many slots; see `CachePolicy.resize`."""
        self.num_slots = num_slots
        for each, count in zip(self.policies, self._layout.counts(num_slots), strict=True):
            if count != each.num_slots:
                each.resize(count)

    def moves(self, num_slots: int) -> list[Copy]:
        """Move the experts in slots from `num_slots` on; see `CachePolicy.moves`."""
        copies: list[Copy] = []
        for kind, each, count in zip(
            self._layout.kinds, self.policies, self._layout.counts(num_slots), strict=True
        ):
            places = kind.places
            copies += [
                Copy(key, int(places[slot]), int(places[to]), kind.slot_bytes)
                for key, slot, to in each.moves(max(count, each.num_slots))
            ]
        return copies
