"""The grids in iq_grids.h are those of the `gguf` package, and the names of iq1's entries follow their rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import quants

HEADER = Path(__file__).parents[2] / "native" / "kernels" / "iq_grids.h"
IQ3_XXS = (4, 12, 20, 28, 36, 44, 52, 62)


def table(name: str) -> list[int]:
    found = re.search(rf"{name}\[(\d+)\] = {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    assert found is not None
    values = [int(value, 0) for value in found[2].split(",")]
    assert len(values) == int(found[1])
    return values


def values_in(codes: Sequence[int], alphabet: Sequence[int], bits: int, columns: int) -> np.ndarray:
    shifts = bits * np.arange(columns)
    return np.array(alphabet)[np.array(codes)[:, None] >> shifts & (1 << bits) - 1]


@pytest.mark.parametrize(
    ("kind", "name", "alphabet", "columns"),
    [
        ("IQ2_XXS", "kIq2XxsGrid", (8, 25, 43, 0), 8),
        ("IQ2_XS", "kIq2XsGrid", (8, 25, 43, 0), 8),
        ("IQ2_S", "kIq2SGrid", (8, 25, 43, 0), 8),
        ("IQ3_XXS", "kIq3XxsGrid", IQ3_XXS, 4),
        ("IQ3_S", "kIq3SGrid", tuple(range(1, 16, 2)), 4),
    ],
)
def test_grids_are_those_of_the_gguf_package(
    kind: str, name: str, alphabet: tuple[int, ...], columns: int
) -> None:
    found = values_in(table(name), alphabet, 2 if columns == 8 else 3, columns)
    np.testing.assert_array_equal(found, grid_of(kind))


def grid_of(kind: str) -> np.ndarray:
    quant = getattr(quants, kind)
    quant.init_grid()
    grid = np.asarray(quant.grid)
    return grid.reshape(-1, grid.shape[-1]).astype(int)


def test_iq1s_entries_lie_at_their_names() -> None:
    found = values_in(table("kIq1Grid"), (-1, 0, 1, 0), 2, 8)
    np.testing.assert_array_equal(found[table("kIq1Names")], grid_of("IQ1_S"))


def test_iq1s_names_follow_their_rule() -> None:
    last_halves = (grid_of("IQ1_S")[:, 4:] + 1) @ 4 ** np.arange(4)
    left: dict[int, list[int]] = {}
    for index, half in enumerate(last_halves.tolist()):
        left.setdefault(half, []).append(index)
    names, begins = [0] * 2048, []
    for u in range(128):
        by_size = sorted((len(indices), half) for half, indices in left.items() if indices)
        smallest, largest = left[by_size[0][1]], left[by_size[-1][1]]
        begins.append(len(smallest) if len(smallest) < 16 else 0)
        for v in range(16):
            names[(smallest if v < begins[u] else largest).pop(0)] = u + 128 * v
    assert table("kIq1Names") == names
    assert table("kIq1From") == begins


def test_a_lookup_by_seven_bits_finds_the_last_half() -> None:
    halves = np.array(table("kIq1Grid")).reshape(16, 128) >> 8  # [v, u]
    for u, begin in enumerate(table("kIq1From")):
        assert len(set(halves[:begin, u])) <= 1
        assert len(set(halves[begin:, u])) == 1
