"""Benchmarks count and print what they say they do."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

import common
from argosy.model.families import open_model
from divergence import divergence
from engines import token_operations
from make_checkpoint import make_model, raw_config

HIDDEN, WIDTH, HEADS, HEAD_DIM = 512, 256, 4, 128
RAW = raw_config(
    hidden=HIDDEN, layers=2, experts=4, experts_per_token=2, width=WIDTH, heads=HEADS, kv_heads=2, vocab=1024
)
# The products of a layer: q and o, k and v, three matrices of two experts.
PRODUCTS = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * 2 * HEAD_DIM + 2 * 3 * HIDDEN * WIDTH


@pytest.mark.parametrize(("format", "passes"), [("Q4_0", 1), ("Q8_0", 2), ("F16", 0)])
def test_q8_products_are_executed_twice_and_count_as_useful_once(
    tmp_path: Path, format: str, passes: int
) -> None:
    files = open_model(make_model(tmp_path / "model.gguf", RAW, format=format))
    operations = token_operations(files)
    assert operations.executed == passes * 2 * 2 * PRODUCTS
    assert operations.useful == min(passes, 1) * 2 * 2 * PRODUCTS


def test_a_share_is_judged_by_the_median_of_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    report = common.Report("shares")
    assert report.shares("two", [0.8, 0.9], target=">= 0.86") == pytest.approx(0.85)
    assert report.ratio("quotient", 3, 4, target="<= 0.75") == 0.75
    assert math.isnan(report.ratio("nothing", 1, 0, target=">= 1"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["missed", "met", "not measured"]
    with (tmp_path / "shares.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["samples"] for row in rows[:2]] == ["[0.8, 0.9]", "[0.75]"]


def test_divergence_is_the_kl_sum() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    found, agrees = divergence(np.log(np.array([p, p], np.float32)), np.log(np.array([q, p], np.float32)))
    np.testing.assert_allclose(found, [(p * np.log(p / q)).sum(), 0], atol=1e-7)
    assert agrees.tolist() == [False, True]
