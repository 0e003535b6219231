"""The probes of `argosy._native` return speeds, and refuse what they cannot measure."""

from __future__ import annotations

import pytest

from argosy import _native as native


@pytest.mark.parametrize("threads", [1, 2])
def test_probes_give_plausible_speeds(threads: int) -> None:
    assert 1e8 < native.memory_probe(threads, 32 << 20) < 1e13
    assert 1e8 < native.int8_probe(threads) < 1e15


def test_probes_refuse_what_they_cannot_measure() -> None:
    with pytest.raises(ValueError, match="threads is 0, expected 1 to 1024"):
        native.int8_probe(0)
    with pytest.raises(ValueError, match="expected 8388608 or more for 2 threads"):
        native.memory_probe(2, (8 << 20) - 1)
