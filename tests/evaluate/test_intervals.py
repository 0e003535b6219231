"""Intervals hold as often as they say, all at once where they say so, and are 0 wide where nothing differs."""

from __future__ import annotations

import numpy as np
import pytest

from argosy.evaluate import intervals
from argosy.evaluate.intervals import Estimate, mean, ratio, simultaneous


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough resamples for a share of a hundred repetitions."""
    monkeypatch.setattr(intervals, "_NUM_RESAMPLES", 800)


def test_equal_values_have_no_interval_and_the_same_values_always_the_same_one() -> None:
    assert ratio(np.zeros(20), np.ones(20)) == Estimate(0.0, 0.0, 0.0)
    assert simultaneous(np.zeros((20, 3))) == [Estimate(0.0, 0.0, 0.0)] * 3
    assert mean(np.full(7, 0.25)) == Estimate(0.25, 0.25, 0.25)
    values = np.random.default_rng(1).normal(size=(30, 4))
    assert simultaneous(values) == simultaneous(values)
    assert mean(values[:, 0]) == mean(values[:, 0])


def test_a_ratio_weighs_each_text_by_its_tokens() -> None:
    sums, counts = np.array([1.0, 9.0]), np.array([10, 30])
    found = ratio(sums, counts)
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.3))
    # One long text and nineteen short ones: most resamples have the long one, and then it decides.
    counts = np.array([10_000] + [1] * 19)
    long = ratio(np.where(counts > 1, 0.1, 0.9) * counts, counts)
    assert long.low < 0.11
    assert long.high > 0.89


def test_intervals_of_skewed_differences_hold_in_about_95_of_100_cases() -> None:
    random = np.random.default_rng(5)
    held = sum(
        found.low <= 1.0 <= found.high for found in (mean(random.exponential(size=60)) for _ in range(150))
    )
    assert 0.87 <= held / 150 <= 0.99


def test_the_intervals_of_21_groups_hold_at_once() -> None:
    random = np.random.default_rng(6)
    false_alarms = {"at once": 0, "alone": 0}
    for _ in range(60):
        values = random.normal(size=(60, 21))
        false_alarms["at once"] += any(one.excludes_zero for one in simultaneous(values))
        errors = values.std(axis=0, ddof=1) / np.sqrt(60)
        false_alarms["alone"] += bool((np.abs(values.mean(axis=0)) > 2.0 * errors).any())
    assert false_alarms["at once"] / 60 <= 0.15
    assert false_alarms["alone"] / 60 >= 0.4  # what the wider intervals prevent


def test_one_shifted_group_among_many_is_found() -> None:
    values = np.random.default_rng(7).normal(size=(60, 21))
    values[:, 4] += 1.0
    assert [number for number, one in enumerate(simultaneous(values)) if one.excludes_zero] == [4]
