"""Predict the hit rate of the expert cache from how soon the router chooses experts again.

    uses of experts  ->  ReuseGaps, one a layer  ->  WorkingSet: a few curves a layer  ->  hit rate at any size

Two curves of a layer, counted over decode tokens, give the whole range of budgets:

- **Distinct experts** in T tokens, W(T). A cache that evicts the least recently used expert holds the experts of its
  last T tokens, for the T at which they fill it; the next token misses what it adds to them (P. J. Denning, "The
  working set model for program behavior", 1968): `hit rate = 1 - (W(T + 1) - W(T)) / experts_per_token`.
- **Experts up to an age**. The engine's cache evicts the oldest expert, and its age takes uses into account
  (`native/ops/cache_policy.h`). It depends on the layer's past alone and not on the size of the cache. So a cache holds
  the experts below some age, the one at which they fill it, and the hit rate is the share of uses below that age.

The second curve gives the engine's own hit rate; the first says how many experts a chunk or several sequences at once
need. Neither curve reveals the order of uses or the number of an expert.

A recorder makes a `WorkingSet` from one `ReuseGaps` per timeline. A timeline is the decode tokens of one sequence
after another; sequences that run at once have a timeline each. `count` takes the choices of the timeline's next
tokens, in batches of any size; `WorkingSet.of` joins timelines, and `as_dict` is the content of the file. Prompt
tokens are left out: they sweep through the layers, and the cache treats them separately.

Elsewhere: `benchmarks/hit_rate.py` compares predictions with the cache itself on recorded routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.config import ModelConfig
from argosy.directory import read_named
from argosy.errors import UsageError
from argosy.experts.policy import BONUS_TURNS, HALF_LIFE_TURNS
from argosy.strict_json import JsonError, parse_json

Floats = NDArray[np.float64]

# Two points for each doubling: 1 2 3 4 6 8 12 ... 16384.
WINDOWS: tuple[int, ...] = tuple(sorted({1} | {2**n for n in range(1, 15)} | {3 * 2**n for n in range(13)}))
# Measured on recorded answers (`benchmarks/hit_rate.py`), and published spreads of hit rates at one size.
RECORDED_ERROR, PRIOR_ERROR = 0.03, 0.10
# Hit rate by share of experts with a slot, for models without recordings: from fine-grained models (Qwen3-30B in six
# domains, GLM-5.2 in service, recorded answers) and from Mixtral 8x7B (https://pypi.org/project/moe-policylang/),
# which balances its eight experts.
_FINE = ((0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 0.76, 1.0), (0.0, 0.13, 0.35, 0.57, 0.70, 0.89, 0.97, 1.0))
_COARSE = ((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.195, 0.464, 0.71, 1.0))
_FEWEST_FINE, _MOST_COARSE = 64, 16  # experts of a layer
# Ages in turns of a layer; experts that were used often have ages below zero.
AGES: tuple[int, ...] = (*range(-18, 9), *(window for window in WINDOWS if window > 8))

_GROWTH = 1.0 + BONUS_TURNS / HALF_LIFE_TURNS  # an age grows by this in a turn, as in the policy
_WARM_TURNS = 32  # the beginning of a timeline, when the cache would still be filling
_CHOICES_TOGETHER = 8192  # choices counted at once: their arrays fit a processor cache
_ARRAYS_AT_ONCE = 20  # during counting, of 8 bytes per choice
# Tokens; uses that count for less than 2^(-128 / HALF_LIFE_TURNS) would be lost in float64 sums.
_TOGETHER = 128
_FORMAT = "argosy-working-set-1"
MOST_JSON_BYTES = 8 << 20  # 1000 layers take 1 MB
_MOST_LAYERS = 4096


class ReuseGaps:
    """Counts, for each layer of one timeline, after how many tokens and at what age each expert is chosen again.

    **Distinct experts.** An expert chosen at tokens a < b and not between them has a gap of b - a. For each window
    length T, it is absent from the windows of T tokens that lie wholly inside a gap longer than T (gap - T of them),
    before its first use, or after its last. So the mean number of distinct experts in a window of T tokens follows
    exactly, without looking at any window (X. Xiang et al., "HOTL: a higher order theory of locality", ASPLOS 2013):

        W(T) = used - (sum of (gap - T) over gaps > T  +  sum of (first - T) over first > T
                       +  sum of (rest - T) over rest > T) / (tokens - T + 1)

    where `used` experts were chosen at all, `first` is the number of the token that first used an expert (the first
    token is number 1), and `rest` is `tokens + 1` minus the number of the token that last used it. For each T, only
    the count and the sum of the gaps longer than T matter; both are kept for each interval between neighbours in
    WINDOWS.

    **Ages.** A use gives an expert the age -BONUS_TURNS * log2(uses), where a use counts half after HALF_LIFE_TURNS,
    and each further token adds 1 + BONUS_TURNS / HALF_LIFE_TURNS until its next use. The ages at both ends of that
    time say for how long the expert was at most a given age; as above, their count and their sum between neighbours in
    AGES are enough. The calculation treats time as continuous, so an expert may count for up to half a token more or
    less.


    Layers do not depend on each other; they are counted together because a few operations on long arrays take much less
    time than many on short ones.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_tokens = 0
        self.num_layers, self._num_experts = num_layers, num_experts
        # The token that used each expert first, counted from 1; 0: not used yet.
        self._first: NDArray[np.int64] = np.zeros((num_layers, num_experts), np.int64)
        self._last = np.zeros_like(self._first)
        self._uses: Floats = np.zeros(self._first.shape)  # at the expert's last use
        # In (WINDOWS[i-1], WINDOWS[i]].
        self._gap_count: NDArray[np.int64] = np.zeros((num_layers, len(WINDOWS) + 1), np.int64)
        self._gap_total = np.zeros_like(self._gap_count)
        self._ages = _AgeSums(num_layers)

    @staticmethod
    def kept_bytes(num_layers: int, num_experts: int) -> int:
        """Return the bytes that one `ReuseGaps` keeps."""
        return 8 * num_layers * (3 * num_experts + 2 * (len(WINDOWS) + 1) + 5 * (len(AGES) + 1))

    @staticmethod
    def counting_bytes(num_layers: int, experts_per_token: int) -> int:
        """Return the most additional bytes while `count` runs."""
        choices = min(_CHOICES_TOGETHER, _TOGETHER * num_layers * experts_per_token)
        return 8 * _ARRAYS_AT_ONCE * choices

    def count(self, experts: NDArray[np.integer[Any]]) -> None:
        """Count the next tokens.

        Args:
            experts: [tokens, layers, experts_per_token], each expert of a row once, in any order.
        """
        experts_per_token = experts.shape[2]
        for start in range(0, len(experts), _TOGETHER):
            tokens = experts[start : start + _TOGETHER]
            num_layers = max(1, _CHOICES_TOGETHER // (len(tokens) * experts_per_token))
            for layer in range(0, self.num_layers, num_layers):
                self._count(tokens[:, layer : layer + num_layers], layer)
            self.num_tokens += len(tokens)

    def _count(self, experts: NDArray[np.integer[Any]], first_layer: int) -> None:
        """Count tokens in the layers from `first_layer` on."""
        _, num_layers, experts_per_token = experts.shape
        here = slice(first_layer, first_layer + num_layers)
        last, recent_uses = self._last[here].reshape(-1), self._uses[here].reshape(-1)  # views
        # Indices of the chosen experts among all experts of these layers.
        chosen = (experts + self._num_experts * np.arange(num_layers)[:, None]).reshape(-1)
        # By layer and expert, then by token; NumPy sorts 16-bit numbers by counting.
        order = np.argsort(chosen.astype(np.uint16) if last.size <= 1 << 16 else chosen, kind="stable")
        chosen = chosen[order]
        times = order // (num_layers * experts_per_token) + (self.num_tokens + 1)
        starts = np.ones(len(chosen), bool)  # where an expert's uses begin
        starts[1:] = chosen[1:] != chosen[:-1]
        earlier = np.empty_like(times)
        earlier[1:] = times[:-1]
        earlier[starts] = last[chosen[starts]]
        is_repeat = earlier > 0
        layers = first_layer + chosen[is_repeat] // self._num_experts

        gaps = (times - earlier)[is_repeat]
        places = _WINDOW_OF_GAP[np.minimum(gaps, len(_WINDOW_OF_GAP) - 1)]
        _add(self._gap_count, layers, places)
        _add(self._gap_total, layers, places, gaps)

        # uses at time t = sum over its uses at times s of 2^((s - t) / HALF_LIFE_TURNS)
        weights = 2.0 ** ((times - self.num_tokens) / HALF_LIFE_TURNS)
        before = recent_uses[chosen[starts]] * 2.0 ** (
            (last[chosen[starts]] - self.num_tokens) / HALF_LIFE_TURNS
        )
        sums = np.cumsum(weights)
        group = np.cumsum(starts) - 1
        sums += (before - (sums - weights)[starts])[group]
        uses = sums / weights
        earlier_uses = np.empty_like(uses)
        earlier_uses[1:] = uses[:-1]
        earlier_uses[starts] = recent_uses[chosen[starts]]
        self._ages.add(layers, earlier[is_repeat], times[is_repeat], earlier_uses[is_repeat], is_used=True)

        self._first[here].reshape(-1)[chosen[~is_repeat]] = times[~is_repeat]
        last[chosen] = times  # the last write per expert is its latest use
        recent_uses[chosen] = uses

    def sums(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return distinct experts [layers, windows], summed over all windows of each length in WINDOWS, and the number
        of windows.
        """
        windows = np.array(WINDOWS, np.int64)

        def longer(of_gaps: NDArray[np.int64]) -> NDArray[np.int64]:
            total: NDArray[np.int64] = of_gaps.sum(axis=1, keepdims=True)
            return total - np.cumsum(of_gaps, axis=1)[:, :-1]

        absent = longer(self._gap_total) - windows * longer(self._gap_count)
        used = self._first > 0
        for layer, of_layer in enumerate(used):
            first, last = self._first[layer, of_layer], self._last[layer, of_layer]
            for ends in (first, self.num_tokens + 1 - last):
                absent[layer] += np.maximum(ends - windows[:, None], 0).sum(axis=1)
        num_windows = np.maximum(self.num_tokens - windows + 1, 0)
        distinct = used.sum(axis=1, keepdims=True) * num_windows - absent
        return np.where(num_windows > 0, distinct, 0), num_windows

    def aged_sums(self) -> tuple[Floats, Floats, int]:
        """Return, for each of AGES, the experts [layers, ages] up to that age summed over tokens, the uses of such
        experts, and the number of these tokens.
        """
        layers, experts = np.nonzero(self._first)
        ages = self._ages.copy()
        ends = np.full(len(layers), self.num_tokens)
        ages.add(layers, self._last[layers, experts], ends, self._uses[layers, experts], is_used=False)
        return *ages.curves(), max(0, self.num_tokens - _WARM_TURNS)


def _add(
    sums: NDArray[Any], layers: NDArray[np.int64], places: NDArray[Any], values: NDArray[Any] | None = None
) -> None:
    """Add values, or 1 if there are none, to sums [layers, places]."""
    num_layers, num_places = sums.shape
    found = np.bincount(layers * num_places + places, values, minlength=num_layers * num_places)
    sums += found.reshape(sums.shape).astype(sums.dtype, copy=False)


def _places_of(points: Sequence[int], *, least: int) -> NDArray[np.int64]:
    """For the whole numbers from `least` to one beyond the last point, find the first point not below each."""
    return np.searchsorted(points, np.arange(least, points[-1] + 2), side="left")


_WINDOW_OF_GAP = _places_of(WINDOWS, least=0)
_AGE_OF = _places_of(AGES, least=AGES[0])


class _AgeSums:
    """Sums over the times from one use of an expert to the next: how long the expert was at most each of AGES old.

    The expert ages from `youngest` to `oldest`. Up to an age A it counts for max(0, A - youngest) - max(0, A -
    oldest), divided by how much it ages per token. The count and the sum of both ends, by interval of AGES, give this
    for every A.
    """

    def __init__(self, num_layers: int) -> None:
        # [layers, places]: youngest, oldest; in (AGES[i-1], AGES[i]]
        self._counts, self._totals = (
            [np.zeros((num_layers, len(AGES) + 1)) for _ in range(2)] for _ in range(2)
        )
        self._used = np.zeros((num_layers, len(AGES) + 1))  # by age at the next use

    def copy(self) -> _AgeSums:
        other = _AgeSums(len(self._used))
        other._counts, other._totals = (
            [sums.copy() for sums in both] for both in (self._counts, self._totals)
        )
        other._used = self._used
        return other

    def add(
        self,
        layers: NDArray[np.int64],
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        uses: Floats,
        *,
        is_used: bool,
    ) -> None:
        """Add the times from after tokens `begins` up to tokens `ends`; if `is_used`, `ends` use the expert again."""
        if not (counted := ends > _WARM_TURNS).all():
            layers, begins, ends, uses = layers[counted], begins[counted], ends[counted], uses[counted]
        fresh = -BONUS_TURNS * np.log2(np.maximum(uses, 1.0))
        oldest = fresh + (ends - begins) * _GROWTH
        if is_used:
            _add(self._used, layers, _age_places(oldest))
        youngest = fresh + (np.maximum(begins, _WARM_TURNS) - begins) * _GROWTH
        for end, exact in enumerate((youngest, oldest)):
            ages = exact + _GROWTH / 2  # a token sits in the middle of the time that it represents
            places = _age_places(ages)
            _add(self._counts[end], layers, places)
            _add(self._totals[end], layers, places, ages)

    def curves(self) -> tuple[Floats, Floats]:
        up_to = [
            np.array(AGES) * np.cumsum(counts, axis=1)[:, :-1] - np.cumsum(totals, axis=1)[:, :-1]
            for counts, totals in zip(self._counts, self._totals, strict=True)
        ]
        resident = np.maximum(up_to[0] - up_to[1], 0.0) / _GROWTH
        return np.maximum.accumulate(resident, axis=1), np.cumsum(self._used, axis=1)[:, :-1]


def _age_places(ages: Floats) -> NDArray[np.int64]:
    """Return, for each age, the place of the first of AGES that is not below it."""
    return _AGE_OF[np.clip(np.ceil(ages).astype(np.int64) - AGES[0], 0, len(_AGE_OF) - 1)]


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """The experts that a model's layers need, by window and by age. In JSON, keyed by a layer's number in the model:

        {"format": "argosy-working-set-1", "num_experts": 128, "experts_per_token": 8, "tokens": 51200,
         "windows": [1, 2, 3, 4, ...], "ages": [-18, -17, ...],
         "layers": {"0": {"distinct": [8.0, 12.1, ...], "resident": [0.1, ...], "found": [0.1, ...]}, "1": ...}}

    windows: the first of WINDOWS, up to the longest window that was counted.
    distinct: mean distinct experts in each of `windows`.
    resident, found: means over tokens: experts up to each of AGES before the token, and how many of them the token
        chooses. None if the recording is too short, and in a prior.
    """

    num_experts: int
    experts_per_token: int
    num_tokens: int  # counted; 0 for a prior
    windows: tuple[int, ...]
    layers: tuple[int, ...]
    distinct: Floats  # [layers, windows]
    resident: Floats | None = None  # [layers, ages]
    found: Floats | None = None

    @classmethod
    def of(
        cls,
        timelines: Sequence[ReuseGaps],
        *,
        layers: Sequence[int],
        num_experts: int,
        experts_per_token: int,
    ) -> WorkingSet:
        """Join the gaps of timelines.

        Args:
            layers: the numbers of the layers in the model, ascending.

        Raises:
            UsageError: no token was counted.
        """
        if not (num_tokens := sum(gaps.num_tokens for gaps in timelines)):
            raise UsageError("no decode token was recorded, so there is no working set")
        sums = [gaps.sums() for gaps in timelines]
        num_windows = np.sum([counted for _, counted in sums], axis=0)
        kept = [i for i, count in enumerate(num_windows) if count > 0]
        distinct = np.sum([found for found, _ in sums], axis=0).astype(np.float64)
        residents, founds, counts = zip(*(gaps.aged_sums() for gaps in timelines), strict=True)
        num_aged = sum(counts)
        resident, found = (np.sum(sums, axis=0) / max(1, num_aged) for sums in (residents, founds))
        return cls(
            num_experts,
            experts_per_token,
            num_tokens,
            tuple(WINDOWS[i] for i in kept),
            tuple(layers),
            distinct[:, kept] / num_windows[kept],
            resident if num_aged else None,
            found if num_aged else None,
        )

    @classmethod
    def prior(cls, layers: Sequence[int], *, num_experts: int, experts_per_token: int) -> WorkingSet:
        """Return the likely curve of a model without recordings: the curve that yields the published hit rates."""
        shares, hit_rates = _typical_hit_rates(num_experts)
        at, distinct = 1, [float(experts_per_token)]
        for _ in range(WINDOWS[-1] - 1):
            share = distinct[-1] / num_experts
            while share > shares[at]:
                at += 1
            along = (share - shares[at - 1]) / (shares[at] - shares[at - 1])
            hit_rate = hit_rates[at - 1] + along * (hit_rates[at] - hit_rates[at - 1])
            distinct.append(min(float(num_experts), distinct[-1] + experts_per_token * (1.0 - hit_rate)))
        row = np.array(distinct)[np.array(WINDOWS) - 1]
        return cls(num_experts, experts_per_token, 0, WINDOWS, tuple(layers), np.tile(row, (len(layers), 1)))

    @property
    def error(self) -> float:
        """Return the margin of error of a hit rate, for workloads like the recorded one; for a prior, for any
        workload.
        """
        return RECORDED_ERROR if self.num_tokens else PRIOR_ERROR

    def require_model(self, model: ModelConfig) -> None:
        """Check that this working set fits `model`.

        Raises:
            UsageError: the working set belongs to another model.
        """
        found = len(self.layers), self.num_experts, self.experts_per_token
        needed = len(model.moe_layers), model.num_experts, model.experts_per_token
        if found != needed or self.layers != model.moe_layers:
            raise UsageError(
                f"the working set belongs to a model with {found[0]} layers of {found[1]} experts, {found[2]} per "
                f"token; this one has {needed[0]} layers of {needed[1]}, {needed[2]} per token",
                hint="record one with `argosy routes`",
            )

    def distinct_in(self, num_tokens: float) -> Floats:
        """Return the mean distinct experts [layers] in `tokens` tokens."""
        rows = np.maximum(self.distinct, 1e-9)
        if len(self.windows) == 1:
            return np.minimum(rows[:, 0] * num_tokens, self.num_experts)
        times = np.log(self.windows)
        at = float(np.log(num_tokens))
        right = int(np.clip(np.searchsorted(times, at), 1, len(times) - 1))
        # W grows like a power of T between two points; beyond the last, as before it.
        share = (at - times[right - 1]) / (times[right] - times[right - 1])
        logs = np.log(rows[:, right - 1]) * (1.0 - share) + np.log(rows[:, right]) * share
        return np.asarray(np.minimum(np.exp(logs), self.num_experts))

    def of_streams(self, num_streams: int) -> tuple[WorkingSet, WorkingSet]:
        """Return the working sets of steps with `num_streams` sequences at once: on one subject, and on unrelated
        subjects.

        `experts_per_token` still counts what one token chooses; `distinct_in(1)` is what a step needs.
        """
        if num_streams == 1:
            return self, self
        together = np.stack([self.distinct_in(num_streams * window) for window in self.windows], axis=1)
        apart = self.num_experts * (1.0 - (1.0 - self.distinct / self.num_experts) ** num_streams)
        return (
            replace(self, distinct=together, resident=None, found=None),
            replace(self, distinct=apart, resident=None, found=None),
        )

    def lru_hit_rate(self, num_slots: float) -> float:
        """Return the hit rate of a cache that evicts the least recently used expert of all layers.

        The rate is 0 when the other layers fill the cache before a layer has its next turn.
        """
        one_layer = float(self.distinct_in(1).mean())
        left = num_slots - (len(self.layers) - 1) * one_layer
        return self._lru(max(num_slots, len(self.layers) * one_layer)) * float(
            np.clip(left / one_layer, 0, 1)
        )

    def hit_rate(self, num_slots: float) -> float:
        """Return the warm hit rate of the engine's cache with `num_slots` slots."""
        if num_slots >= len(self.layers) * self.num_experts:
            return 1.0
        if self.resident is None or self.found is None:
            return self._lru(num_slots)
        # A layer keeps its last experts, so its share of a full cache never falls below this.
        floor = min(self.experts_per_token, num_slots // len(self.layers))
        kept = np.maximum(self.resident, floor)
        found = np.stack(
            [
                np.maximum(uses, np.interp(floor, ages, uses))
                for ages, uses in zip(self.resident, self.found, strict=True)
            ]
        )
        totals, uses = kept.sum(axis=0), found.sum(axis=0) / (self.experts_per_token * len(self.layers))
        rate = float(np.interp(num_slots, totals, uses))
        if np.interp(num_slots, totals, AGES) < 0:
            # A missing expert is older than all that stay, but it holds a slot until the next layer needs that slot.
            rate = float(np.interp(num_slots - self.experts_per_token * (1.0 - rate), totals, uses))
        return rate

    def _lru(self, num_slots: float) -> float:
        one, two = self.distinct_in(1).sum(), self.distinct_in(2).sum()
        if num_slots < one:  # part of the last token's experts remain
            return float(num_slots / one * (1.0 - (two - one) / one))
        shortest, longest = 0.0, np.log(4.0 * WINDOWS[-1])
        for _ in range(40):
            middle = (shortest + longest) / 2
            if self.distinct_in(np.exp(middle)).sum() < num_slots:
                shortest = middle
            else:
                longest = middle
        tokens = float(np.exp(shortest))
        return float(1.0 - (self.distinct_in(tokens + 1.0).sum() - self.distinct_in(tokens).sum()) / one)

    def as_dict(self) -> dict[str, object]:
        def rows(values: Floats) -> list[list[float]]:
            return [[round(value, 4) for value in row] for row in values.tolist()]

        curves = {"distinct": rows(self.distinct)}
        if self.resident is not None and self.found is not None:
            curves |= {"resident": rows(self.resident), "found": rows(self.found)}
        return {
            "format": _FORMAT,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "tokens": self.num_tokens,
            "windows": list(self.windows),
            **({"ages": list(AGES)} if self.resident is not None else {}),
            "layers": {
                str(layer): {name: values[i] for name, values in curves.items()}
                for i, layer in enumerate(self.layers)
            },
        }

    @classmethod
    def read(cls, path: Path) -> WorkingSet:
        """Read the file that holds what `as_dict` wrote.

        Raises:
            UsageError: the file holds something else.   OSError: it cannot be read.
        """
        return cls.from_json(read_named(path, MOST_JSON_BYTES + 1))

    @classmethod
    def from_json(cls, data: bytes) -> WorkingSet:
        """Read what `as_dict` wrote.

        Raises:
            UsageError: `data` is not such a file; the message says what is wrong.
        """
        try:
            if len(data) > MOST_JSON_BYTES:
                raise JsonError(f"is {len(data)} bytes long; at most {MOST_JSON_BYTES} are read")
            return _checked(parse_json(data))
        except JsonError as error:
            raise UsageError(
                f"the working set cannot be read: {error}", hint="record it again with `argosy routes`"
            ) from None


@cache
def _typical_hit_rates(num_experts: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return published hit rates of models with that many experts per layer, by share of experts with a slot."""
    fineness = np.log(num_experts / _MOST_COARSE) / np.log(_FEWEST_FINE / _MOST_COARSE)
    fineness = min(1.0, max(0.0, float(fineness)))
    shares = sorted({*_FINE[0], *_COARSE[0]})
    found = fineness * np.interp(shares, *_FINE) + (1.0 - fineness) * np.interp(shares, *_COARSE)
    return tuple(shares), tuple(found.tolist())


def typical_hit_rate(share: float, *, num_experts: int) -> float:
    """Return the likely hit rate of a model without recordings if `share` of its experts have a slot."""
    return float(np.interp(share, *_typical_hit_rates(num_experts)))


def _checked(value: object) -> WorkingSet:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise JsonError(f"is not an object with `format` {_FORMAT!r}")
    num_experts = _whole(value, "num_experts", 1, 1 << 16)
    experts_per_token = _whole(value, "experts_per_token", 1, num_experts)
    num_tokens = _whole(value, "tokens", 1, 1 << 60)
    windows = value.get("windows")
    if not isinstance(windows, list) or not windows or windows != list(WINDOWS[: len(windows)]):
        raise JsonError(f"has `windows` other than the first of {WINDOWS[:4]}...")
    ages = value.get("ages")
    if ages is not None and ages != list(AGES):
        raise JsonError(f"has `ages` other than {AGES[0]} to {AGES[-1]}")
    layers = value.get("layers")
    if not isinstance(layers, dict) or not 1 <= len(layers) <= _MOST_LAYERS:
        raise JsonError(f"has no `layers`, or more than {_MOST_LAYERS}")
    names = sorted(layers, key=_layer_number)

    def curve(key: str, num_points: int, most: float) -> Floats:
        return np.stack([_rising(layers[name], name, key, num_points, most) for name in names])

    return WorkingSet(
        num_experts,
        experts_per_token,
        num_tokens,
        tuple(windows),
        tuple(_layer_number(name) for name in names),
        curve("distinct", len(windows), num_experts),
        None if ages is None else curve("resident", len(AGES), num_experts),
        None if ages is None else curve("found", len(AGES), experts_per_token),
    )


def _layer_number(name: str) -> int:
    if not name.isascii() or not name.isdigit() or len(name) > 4 or name != str(int(name)):
        raise JsonError("has a layer whose name is not its number")
    return int(name)


def _rising(layer: object, name: str, key: str, num_points: int, most: float) -> Floats:
    row = layer.get(key) if isinstance(layer, dict) else None
    if (
        not isinstance(row, list)
        or len(row) != num_points
        or not all(type(item) in (int, float) for item in row)
    ):
        raise JsonError(f"has no list of {num_points} numbers as `{key}` of layer {name}")
    curve = np.array(row, np.float64)
    if np.any(np.diff(curve) < 0) or curve[0] < 0 or curve[-1] > most + 0.001:
        raise JsonError(f"has numbers as `{key}` of layer {name} that do not rise from 0 to at most {most}")
    return curve


def _whole(value: Mapping[str, object], key: str, least: int, most: int) -> int:
    found = value.get(key)
    if type(found) is not int or not least <= found <= most:
        raise JsonError(f"has no `{key}` from {least} to {most}")
    return found
