"""Count which experts the routers choose while a model runs.

    choices of a step  ->  Recorder  ->  uses of each expert, reuse by the next token, working set
                                     ->  the last choices in order, for a replay

Each block of BLOCK_TOKENS tokens in a lane is counted with a few array operations. A lane holds the decode tokens
of one sequence after another, as a single user would see them; concurrent sequences have a lane each.

The experts that ran can reveal the text, so a recorder stays in memory. The saved summary names no expert
(`saved.py`).

Elsewhere: `experts/hit_rate.py` has the working set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from argosy.config import EngineConfig, ModelConfig
from argosy.errors import UsageError
from argosy.experts.hit_rate import ReuseGaps, WorkingSet
from argosy.experts.recording import StepRoutes
from argosy.observe.replay import replay_bytes

BLOCK_TOKENS = 128
MOST_LANES = 8  # with more concurrent sequences, only uses are counted
MOST_RECENT_TOKENS = 2048
_MOST_RECENT_CHOICES = 1 << 19  # over all layers; replaying them takes a tenth of a second
_OBJECT_BYTES = 2400  # Python objects of a lane, or of the recorder itself
_PAIRS_TOGETHER = 1 << 16  # pairs of choices, of a token and its predecessor, compared at once

Choices = NDArray[np.uint16]  # [tokens, routed layers, experts per token], best first


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """The counts so far. Uses reveal text, so add up many tokens before showing them."""

    layers: tuple[int, ...]  # the numbers of the routed layers in the model
    prompt_tokens: int
    decode_tokens: int
    prompt_uses: NDArray[np.int64]  # [layers, experts]
    decode_uses: NDArray[np.int64]
    reused: NDArray[np.int64]  # [layers]: choices of a decode token that its predecessor also made
    following_tokens: int  # decode tokens with a predecessor
    working_set: WorkingSet | None  # None: no decode token yet

    def next_token_reuse(self, experts_per_token: int) -> NDArray[np.float64]:
        """By layer, the fraction of a token's experts that the preceding token also chose."""
        return self.reused / max(1, self.following_tokens * experts_per_token)


@dataclass(frozen=True, slots=True)
class RecentRouting:
    """The last decode tokens in order, with the engine's lookup and hit counters when each was recorded."""

    choices: Choices
    steps: NDArray[np.int64]
    lookups: NDArray[np.int64]
    hits: NDArray[np.int64]


class Recorder:
    """A `RoutingRecorder` (`experts/recording.py`) that counts choices. One thread records; any thread may read."""

    def __init__(self, model: ModelConfig, config: EngineConfig, *, keeps_recent: bool = False) -> None:
        self._layers = model.moe_layers
        self._num_experts, self._k = model.num_experts, model.experts_per_token
        self._most_lanes = min(MOST_LANES, config.max_sequences)
        self._lanes: list[_Lane] = []
        self._lane_of: dict[int, _Lane] = {}  # by the number of the sequence
        shape = len(self._layers), self._num_experts
        self._uses: NDArray[np.int64] = np.zeros((2, *shape), np.int64)  # in prompts, in decode
        # The experts of all layers are numbered together, [layers, 1].
        self._first_of_layer: NDArray[np.int64] = self._num_experts * np.arange(len(self._layers))[:, None]
        self._num_tokens = [0, 0]
        self._recent: _Ring | None = None
        if keeps_recent:
            num_tokens = min(
                MOST_RECENT_TOKENS, max(1, _MOST_RECENT_CHOICES // (len(self._layers) * self._k))
            )
            self._recent = _Ring(num_tokens, len(self._layers), self._k)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The most bytes that it will ever hold, including a replay of the last choices."""
        num_layers, k = len(self._layers), self._k
        lane = BLOCK_TOKENS * (2 * num_layers * k + 8)
        lane += ReuseGaps.kept_bytes(num_layers, self._num_experts) + 2 * _OBJECT_BYTES
        # Besides the lanes: a counted block of one of them, and pairs of choices.
        block = BLOCK_TOKENS * num_layers * k * (2 + 8) + ReuseGaps.counting_bytes(num_layers, k)
        pairs = 2 * max(_PAIRS_TOGETHER, num_layers * k * k)
        nbytes = self._most_lanes * lane + 4 * self._uses.nbytes + 4 * _OBJECT_BYTES + block + pairs
        if self._recent is not None:
            nbytes += 2 * self._recent.nbytes + replay_bytes(
                self._recent.num_tokens, num_layers=num_layers, num_experts=self._num_experts, k=k
            )
        return nbytes

    def record(self, steps: Sequence[StepRoutes], lookups: int, hits: int) -> None:
        with self._lock:
            for numbers, group in groupby(steps, key=lambda step: step.numbers):
                self._count_steps(list(group), numbers, (lookups, hits))

    def _count_steps(self, steps: list[StepRoutes], numbers: list[int], counters: tuple[int, int]) -> None:
        """Count steps of the same sequences."""
        choices = np.concatenate([step.choices for step in steps], axis=1).transpose(1, 0, 2)
        is_decode = np.concatenate([step.is_decode for step in steps])
        owners = np.array(numbers)[np.concatenate([step.sequence for step in steps])]
        if not is_decode.all():
            self._count_uses(choices[~is_decode], is_decode=False)
            choices, owners = choices[is_decode], owners[is_decode]
        for number in dict.fromkeys(owners.tolist()):
            own = choices if len(numbers) == 1 else choices[owners == number]
            if (lane := self._find_lane(number, numbers)) is None:
                self._count_uses(own, is_decode=True)
                continue
            for block in lane.add(own, number):
                self._count_uses(block, is_decode=True)
        if self._recent is not None and len(choices):
            sizes = [np.count_nonzero(step.is_decode) for step in steps]
            self._recent.add(choices, np.repeat(np.arange(len(steps)), sizes), counters)

    def counts(self) -> RoutingCounts:
        """Everything recorded, up to the latest token."""
        with self._lock:
            for lane in self._lanes:
                self._count_uses(lane.take(), is_decode=True)
            try:
                working_set = WorkingSet.of(
                    [lane.gaps for lane in self._lanes],
                    layers=self._layers,
                    num_experts=self._num_experts,
                    experts_per_token=self._k,
                )
            except UsageError:
                working_set = None
            return RoutingCounts(
                layers=self._layers,
                prompt_tokens=self._num_tokens[0],
                decode_tokens=self._num_tokens[1],
                prompt_uses=self._uses[0].copy(),
                decode_uses=self._uses[1].copy(),
                reused=sum((lane.reused for lane in self._lanes), np.zeros(len(self._layers), np.int64)),
                following_tokens=sum(lane.num_following for lane in self._lanes),
                working_set=working_set,
            )

    def recent(self) -> RecentRouting:
        """The last decode tokens in the order of their steps; requires `keeps_recent`."""
        assert self._recent is not None
        with self._lock:
            return self._recent.in_order()

    def _find_lane(self, number: int, running: list[int]) -> _Lane | None:
        """The sequence's lane: its own, otherwise the most recently idle one, a new one, or none."""
        if (lane := self._lane_of.pop(number, None)) is None:
            idle = next((other for other in reversed(self._lane_of) if other not in running), None)
            if idle is not None:
                lane = self._lane_of.pop(idle)
            elif len(self._lanes) < self._most_lanes:
                lane = _Lane(len(self._layers), self._num_experts, self._k)
                self._lanes.append(lane)
            else:
                return None
        self._lane_of[number] = lane  # the latest is last
        return lane

    def _count_uses(self, choices: NDArray[np.integer], *, is_decode: bool) -> None:
        """Count the uses in choices [tokens, layers, k]."""
        uses = self._uses[int(is_decode)]
        for start in range(0, len(choices), BLOCK_TOKENS):
            block = choices[start : start + BLOCK_TOKENS]
            numbers = (block + self._first_of_layer)[block >= 0]  # -1: the layer left out the token
            uses += np.bincount(numbers, minlength=uses.size).reshape(uses.shape)
        self._num_tokens[int(is_decode)] += len(choices)


class _Lane:
    """The decode tokens of one sequence after another, counted block by block."""

    def __init__(self, num_layers: int, num_experts: int, k: int) -> None:
        self.gaps = ReuseGaps(num_layers, num_experts)
        self.reused: NDArray[np.int64] = np.zeros(num_layers, np.int64)
        self.num_following = 0
        # Row 0 is the token before the block.
        self._block: Choices = np.zeros((1 + BLOCK_TOKENS, num_layers, k), np.uint16)
        self._numbers: NDArray[np.int64] = np.full(1 + BLOCK_TOKENS, -1, np.int64)
        self._num_held = 0

    def add(self, choices: NDArray[np.integer], number: int) -> Iterator[Choices]:
        """Take the choices [tokens, layers, k] of a sequence's next tokens; count and yield each block that fills
        up.
        """
        at = 0
        while at < len(choices):
            count = min(len(choices) - at, BLOCK_TOKENS - self._num_held)
            places = slice(1 + self._num_held, 1 + self._num_held + count)
            self._block[places] = choices[at : at + count]
            self._numbers[places] = number
            self._num_held += count
            at += count
            if self._num_held == BLOCK_TOKENS:
                yield self.take()

    def take(self) -> Choices:
        """Count the block and begin the next; return it, valid until a token is added."""
        end = 1 + self._num_held
        block, before = self._block[1:end], self._block[: end - 1]
        follows = self._numbers[1:end] == self._numbers[: end - 1]
        if self._num_held:
            self.gaps.count(block)
        _, num_layers, k = block.shape
        num_tokens = max(1, _PAIRS_TOGETHER // (num_layers * k * k))
        for start in range(0, len(block), num_tokens):
            rows = slice(start, start + num_tokens)
            pairs = block[rows, :, :, None] == before[rows, :, None, :]
            pairs &= follows[rows, None, None, None]
            self.reused += np.count_nonzero(pairs, axis=(0, 2, 3))
        self.num_following += int(follows.sum())
        taken = block.copy()
        self._block[0], self._numbers[0] = self._block[end - 1], self._numbers[end - 1]
        self._num_held = 0
        return taken


class _Ring:
    """The last tokens, each with its step and the counters when it was added."""

    def __init__(self, num_tokens: int, num_layers: int, k: int) -> None:
        self.num_tokens = num_tokens
        self._choices: Choices = np.zeros((num_tokens, num_layers, k), np.uint16)
        self._facts: NDArray[np.int64] = np.zeros((3, num_tokens), np.int64)  # steps, lookups, hits
        self._num_steps = self._num_added = 0

    @property
    def nbytes(self) -> int:
        return self._choices.nbytes + self._facts.nbytes

    def add(self, choices: NDArray[np.integer], steps: NDArray[np.int64], counters: tuple[int, int]) -> None:
        """Add tokens [tokens, layers, k] of the given steps, numbered from 0."""
        choices, following = choices[-self.num_tokens :], self._num_steps + int(steps[-1]) + 1
        steps = steps[-self.num_tokens :]
        places = np.arange(self._num_added, self._num_added + len(choices)) % self.num_tokens
        self._choices[places] = choices
        self._facts[0, places] = self._num_steps + steps
        self._facts[1:, places] = np.array(counters)[:, None]
        self._num_steps = following
        self._num_added += len(choices)

    def in_order(self) -> RecentRouting:
        held = min(self._num_added, self.num_tokens)
        places = np.arange(self._num_added - held, self._num_added) % self.num_tokens
        return RecentRouting(self._choices[places], *(facts[places] for facts in self._facts))
