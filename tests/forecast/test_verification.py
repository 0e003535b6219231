"""Decode steps stand beside their prediction, and the part that is off is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from argosy.budget.memory_plan import MemoryPlan
from argosy.config import GIB, Budget, EngineConfig
from argosy.engine.ledger import DecodeSteps, Ledger
from argosy.forecast.assumed import assume_pack
from argosy.forecast.forecast import Forecaster
from argosy.forecast.speed import Range
from argosy.forecast.verification import Row, Verification, compare_decode
from argosy.machine import resources
from argosy.machine.rates import guess
from argosy.model.families import FAMILIES
from tests.families.published import PUBLISHED

NUM_STEPS, CONTEXT = 50, 700


@pytest.fixture(scope="module")
def qwen() -> Forecaster:
    raw = next(model.config for model in PUBLISHED if model.name == "Qwen3-30B-A3B")
    files = assume_pack(FAMILIES["qwen3_moe"].parse_config(raw), "q4", Path("config.json"))
    rates = guess("AMD Ryzen 9 7950X", 16, drive_bytes_per_s=6e9)
    config = EngineConfig(budget=Budget(ram_bytes=1), threads=16)
    return Forecaster(files, config, rates, process_bytes=100 << 20)


def as_predicted(speeds: Forecaster, plan: MemoryPlan, streams: int) -> DecodeSteps:
    """Steps that take exactly what is predicted of them."""
    expected = speeds.decode(plan, streams, context=CONTEXT)
    parts = {name: NUM_STEPS * seconds for name, seconds in expected.parts.items()}
    lookups = 100_000
    return DecodeSteps(
        num_steps=NUM_STEPS,
        num_tokens=NUM_STEPS * streams,
        seconds=sum(parts.values()),
        context=float(CONTEXT),
        lookups=lookups,
        hits=round(lookups * expected.hit_rate.likely),
        bytes_read=round(expected.drive_bytes_per_token.likely * NUM_STEPS * streams),
        parts={
            "attention_and_dense": parts["dense weights"] + parts["keys and values"],
            "expert_compute": parts["experts in memory"],
            "waiting_for_reads": parts["waiting for the drive"],
            "router": 0.25 * parts["overhead"],
            "other": 0.75 * parts["overhead"],
        },
    )


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("gib", [6, 64])
def test_steps_that_go_as_predicted_have_no_error(qwen: Forecaster, streams: int, gib: int) -> None:
    plan = qwen.plan(gib * GIB)
    found = compare_decode(qwen, plan, as_predicted(qwen, plan, streams))

    streamed = [] if plan.slots.is_resident else ["hit rate", "drive, decode"]
    assert [row.name for row in found.rows] == ["decode", *streamed]
    for row in found.rows:
        assert row.error == pytest.approx(0.0, abs=1e-4)
        assert row.is_within
    for predicted, measured in found.parts_ms.values():
        assert predicted == pytest.approx(measured, rel=1e-3)


def test_the_part_that_takes_longer_than_predicted_is_named(qwen: Forecaster) -> None:
    plan = qwen.plan(6 * GIB)
    steps = as_predicted(qwen, plan, 1)
    slow = {**steps.parts, "waiting_for_reads": steps.parts["waiting_for_reads"] + 3.0}
    found = compare_decode(qwen, plan, replace(steps, parts=slow, seconds=steps.seconds + 3.0))

    assert found.off == "waiting for reads"
    predicted, measured = found.parts_ms["waiting for reads"]
    assert measured - predicted == pytest.approx(3000.0 / NUM_STEPS, rel=1e-3)
    assert found.rows[0].error > 0.05


def test_steps_are_the_difference_of_two_ledgers_and_add_up() -> None:
    before = Ledger(
        new_tokens=10, wall_s=2.0, lookups=50, hits=20, bytes_read=7, parts={"router": 1.5, "other": 0.5}
    )
    after = Ledger(
        new_tokens=16, wall_s=5.0, lookups=90, hits=50, bytes_read=9, parts={"router": 4.0, "other": 1.0}
    )
    one = DecodeSteps.between(before, after, num_steps=3, context=100.0)

    assert (one.num_tokens, one.seconds, one.lookups, one.hits, one.bytes_read) == (6, 3.0, 40, 30, 2)
    assert one.parts == {"router": 2.5, "other": 0.5}
    both = one + replace(one, num_steps=1, context=200.0)
    assert (both.num_steps, both.num_tokens, both.context) == (4, 12, 125.0)
    assert both.parts == {"router": 5.0, "other": 1.0}


def test_the_bytes_of_a_prompt_have_a_range_as_wide_as_the_error_of_hit_rates(qwen: Forecaster) -> None:
    found = qwen.prompt(qwen.plan(6 * GIB), 256).drive_bytes
    assert found.low < 0.95 * found.likely < found.likely < 1.05 * found.likely < found.high
    resident = qwen.prompt(qwen.plan(64 * GIB), 256).drive_bytes
    assert resident == (0.0, 0.0, 0.0)


def test_quantities_of_four_digits_are_shown_in_a_larger_unit() -> None:
    rows = (
        Row("drive, prompt", "MB", Range(3900.0, 4120.0, 4400.0), 4450.0),
        Row("drive, decode", "MB/token", Range(70.3, 104.0, 138.0), 83.0),
        Row("memory, peak", "MiB", Range(0.0, 1638.4, 1638.4), 1620.0),
        Row("decode", "tok/s", Range(900.0, 1234.0, 2000.0), 1400.0),
    )
    lines = Verification(rows, {"overhead": (1.0, 1.0)}).lines()
    prompt, decode, memory, rate = (" ".join(line.split()) for line in lines[1:5])
    assert prompt == "drive, prompt, GB 4.12 (3.9 to 4.4) 4.45 -7% outside its range"
    assert decode == "drive, decode, MB/token 104 (70.3 to 138) 83 +25%"
    assert memory == "memory, peak, GiB 1.6 (0 to 1.6) 1.58 +1%"
    assert rate == "decode, tok/s 1234 (900 to 2000) 1400 -12%"


def test_the_peak_of_memory_begins_anew_when_a_model_is_verified() -> None:
    taken = bytearray(b"x" * (64 << 20))
    before = resources.peak_bytes()
    del taken
    if not resources.reset_peak():
        pytest.skip("this kernel does not let a process forget its peak")
    after = resources.peak_bytes()
    assert before is not None
    assert after is not None
    assert after <= before - (60 << 20)
