"""Predict how often the expert cache has what the router asks for, from how soon experts are asked for again.

    gaps between uses  ->  WorkingSet  W_l(T): mean distinct experts of layer l in T tokens  ->  hit rate at any size

A cache that evicts the least recently used expert holds the experts of its last T tokens, for the T at which they fill
it. The next token misses what it adds to them, so `hit rate = 1 - (W(T + 1) - W(T)) / experts_per_token`
(P. J. Denning, "The working set model for program behavior", 1968). One curve of a few numbers a layer gives the
whole range of budgets. It is counted over decode tokens only, and holds no order and no expert's number.

How a recorder makes it: one `ReuseGaps` for each layer of a timeline, where a timeline is the decode tokens of one
sequence after another. Sequences that run at once have a timeline each. `count` takes the choices of the timeline's
next tokens, as many at a time as is convenient; `WorkingSet.of` joins layers and timelines. Prompt tokens are left
out: they sweep through the layers, and the cache treats them apart.

Elsewhere: `experts/policy.py` evicts; `benchmarks/replay.py` replays it on recorded routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

# Two points for each doubling: 1 2 3 4 6 8 12 ... 16384.
WINDOWS: tuple[int, ...] = tuple(sorted({1} | {2**n for n in range(1, 15)} | {3 * 2**n for n in range(13)}))
_FORMAT = "argosy-working-set-1"
MOST_JSON_BYTES = 8 << 20  # 1000 layers of 28 numbers take 0.5 MB


class ReuseGaps:
    """Counts, for one layer of one timeline, after how many tokens each expert is chosen again.

    An expert chosen at tokens a < b and not between them has a gap of b - a. For each window length T, it is absent
    from the windows of T tokens that lie wholly inside a gap longer than T (gap - T of them), before its first use
    or after its last. So the mean number of distinct experts in a window of T tokens is, exactly and with no window
    looked at (X. Xiang et al., "HOTL: a higher order theory of locality", ASPLOS 2013):

        W(T) = used - (sum of (gap - T) over gaps > T  +  sum of (first - T) over first > T
                       +  sum of (rest - T) over rest > T) / (tokens - T + 1)

    where `used` experts were chosen at all, `first` is the number of the token of an expert's first use (the first
    token has number 1), and `rest` is `tokens + 1` minus the number of its last. For each T the gaps longer than T
    need only their count and their sum; they are kept for each interval between two neighbours in WINDOWS.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_tokens = 0
        self._first: NDArray[np.int64] = np.zeros(num_experts, np.int64)  # 0: not used yet
        self._last: NDArray[np.int64] = np.zeros(num_experts, np.int64)
        self._count: NDArray[np.int64] = np.zeros(
            len(WINDOWS) + 1, np.int64
        )  # gaps in (WINDOWS[i-1], WINDOWS[i]]
        self._total: NDArray[np.int64] = np.zeros(len(WINDOWS) + 1, np.int64)  # the sum of these gaps

    def count(self, experts: NDArray[np.integer[Any]]) -> None:
        """Count the next tokens.

        Args:
            experts: [tokens, experts_per_token], each expert of a row once, in any order.
        """
        num_tokens, experts_per_token = experts.shape
        chosen = experts.ravel()
        order = np.argsort(chosen, kind="stable")  # by expert, then by token
        chosen = chosen[order]
        times = order // experts_per_token + (self.num_tokens + 1)
        is_new = np.ones(len(chosen), bool)
        is_new[1:] = chosen[1:] != chosen[:-1]
        previous = np.empty_like(times)
        previous[1:] = times[:-1]
        previous[is_new] = self._last[chosen[is_new]]
        is_first = previous == 0
        self._first[chosen[is_first]] = times[is_first]
        self._last[chosen] = times  # the latest of each expert is written last
        gaps = (times - previous)[~is_first]
        places = np.searchsorted(WINDOWS, gaps, side="left")
        self._count += np.bincount(places, minlength=len(self._count))
        self._total += np.bincount(places, weights=gaps, minlength=len(self._total)).astype(np.int64)
        self.num_tokens += num_tokens

    def sums(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distinct experts summed over all windows of each length in WINDOWS, and the number of these windows."""
        windows = np.array(WINDOWS, np.int64)
        longer_count = self._count.sum() - np.cumsum(self._count)[:-1]
        longer_total = self._total.sum() - np.cumsum(self._total)[:-1]
        absent = longer_total - windows * longer_count
        used = self._first > 0
        for ends in (self._first[used], self.num_tokens + 1 - self._last[used]):
            absent += np.maximum(ends[None, :] - windows[:, None], 0).sum(axis=1)
        num_windows = np.maximum(self.num_tokens - windows + 1, 0)
        return np.where(num_windows > 0, used.sum() * num_windows - absent, 0), num_windows


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Mean distinct experts of each layer in T tokens, for T in `windows`.

    `windows` begins at 1 and ends at the longest window that was counted; a longer one is extrapolated. In JSON:

        {"format": "argosy-working-set-1", "num_experts": 128, "experts_per_token": 8, "tokens": 51200,
         "windows": [1, 2, 3, 4, ...], "layers": {"0": [8.0, 12.1, ...], "1": ...}}

    with a layer's number in the model as its key: layers without routed experts are absent.
    """

    num_experts: int
    experts_per_token: int
    num_tokens: int  # counted; 0 for a prior
    windows: tuple[int, ...]
    layers: tuple[int, ...]
    distinct: NDArray[np.float64]  # [layers, windows]

    @classmethod
    def of(
        cls, layers: Mapping[int, Sequence[ReuseGaps]], *, num_experts: int, experts_per_token: int
    ) -> WorkingSet:
        """Join the gaps of each layer: one `ReuseGaps` for each timeline, every layer with the same timelines.

        Raises:
            UsageError: no token was counted.
        """
        numbers = sorted(layers)
        tokens = {sum(gaps.num_tokens for gaps in layers[number]) for number in numbers}
        assert len(tokens) <= 1, "layers of different timelines"
        if not tokens or not (num_tokens := tokens.pop()):
            raise UsageError("no decode token was recorded, so there is no working set")
        sums = [[gaps.sums() for gaps in layers[number]] for number in numbers]
        num_windows = np.sum([counted for _, counted in sums[0]], axis=0)
        kept = [i for i, count in enumerate(num_windows) if count > 0]
        distinct = np.array([sum(found for found, _ in timelines) for timelines in sums], np.float64)
        return cls(
            num_experts,
            experts_per_token,
            num_tokens,
            tuple(WINDOWS[i] for i in kept),
            tuple(numbers),
            distinct[:, kept] / num_windows[kept],
        )

    def as_dict(self) -> dict[str, object]:
        return {
            "format": _FORMAT,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "tokens": self.num_tokens,
            "windows": list(self.windows),
            "layers": {
                str(layer): [round(value, 4) for value in row]
                for layer, row in zip(self.layers, self.distinct.tolist(), strict=True)
            },
        }

    @classmethod
    def from_json(cls, data: bytes) -> WorkingSet:
        """Read what `as_dict` wrote.

        Raises:
            UsageError: `data` is no such file; says what is wrong.
        """
        try:
            if len(data) > MOST_JSON_BYTES:
                raise JsonError(f"is {len(data)} bytes long; at most {MOST_JSON_BYTES} are read")
            return _checked(parse_json(data))
        except JsonError as error:
            raise UsageError(
                f"the working set cannot be read: {error}", hint="record it again with `argosy routes`"
            ) from None


def _checked(value: object) -> WorkingSet:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise JsonError(f"is not an object with `format` {_FORMAT!r}")
    num_experts = _whole(value, "num_experts", 1, 1 << 16)
    experts_per_token = _whole(value, "experts_per_token", 1, num_experts)
    num_tokens = _whole(value, "tokens", 1, 1 << 60)
    windows = value.get("windows")
    if not isinstance(windows, list) or tuple(windows) != WINDOWS[: len(windows)] or not windows:
        raise JsonError(f"has `windows` other than the first of {WINDOWS[:4]}...")
    layers = value.get("layers")
    if not isinstance(layers, dict) or not 1 <= len(layers) <= 4096:
        raise JsonError("has no `layers`, or more than 4096")
    curves: dict[int, NDArray[np.float64]] = {}
    for name, row in layers.items():
        if not name.isascii() or not name.isdigit() or len(name) > 4 or name != str(int(name)):
            raise JsonError("has a layer whose name is not its number")
        is_curve = isinstance(row, list) and len(row) == len(windows)
        if not is_curve or not all(type(item) in (int, float) for item in row):
            raise JsonError(f"has no number for each of `windows` in layer {name}")
        curve = np.array(row, np.float64)
        if np.any(np.diff(curve) < 0) or curve[0] < 0 or curve[-1] > num_experts + 0.001:
            raise JsonError(f"has numbers in layer {name} that do not rise from 0 to at most {num_experts}")
        curves[int(name)] = curve
    numbers = sorted(curves)
    return WorkingSet(
        num_experts,
        experts_per_token,
        num_tokens,
        tuple(windows),
        tuple(numbers),
        np.stack([curves[number] for number in numbers]),
    )


def _whole(value: Mapping[str, object], key: str, least: int, most: int) -> int:
    found = value.get(key)
    if type(found) is not int or not least <= found <= most:
        raise JsonError(f"has no `{key}` from {least} to {most}")
    return found
