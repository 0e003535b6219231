"""A calibration measures every rate of a forecast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argosy import _native
from argosy.forecast import calibration, drive_rates, product_rates
from argosy.machine.rates import Rates, guess


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_everything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_rates, "_SAMPLE_S", 0.001)
    monkeypatch.setattr(product_rates, "_PROBE_S", 60.0)
    monkeypatch.setattr(product_rates, "MIB", 1 << 16)  # of the memory that is probed
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    monkeypatch.setattr(drive_rates, "_DRIVE_S", 0.02)
    monkeypatch.setattr(calibration, "_STEPS", 6)
    monkeypatch.setattr(calibration, "_TURNS", 1)
    for name, layers in (("_FEW", 2), ("_MANY", 4), ("_MIDDLING", 2), ("_LARGE", 2)):
        size = getattr(calibration, name)
        monkeypatch.setattr(calibration, name, size._replace(layers=layers, hidden=size.hidden // 2))
    monkeypatch.setattr(product_rates, "_ARENA_BYTES", 16 << 20)
    monkeypatch.setattr(product_rates, "_KEYS_BYTES", 1 << 20)
    big = tmp_path / "model.safetensors"
    big.write_bytes(bytes(96 << 20))
    told: list[str] = []
    rates = calibration.calibrate([big], threads=2, progress=lambda what, share: told.append(what))

    assert rates.is_measured
    assert rates.source.startswith("measured 20")
    assert rates.waits.keys() == rates.operations.keys() == guess("", 1).waits.keys()
    assert rates.encoder_operations > 1e8
    assert [size for size, _ in rates.drive] == [256 << 10, 1 << 20, 4 << 20, 16 << 20]
    assert Rates.from_value(json.loads(json.dumps(rates.as_dict()))) == rates
    assert told[-1] == "done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_rate_is_the_median_of_its_rounds_beside_the_probes_and_their_variation_widens_the_ranges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(product_rates, "_ARENA_BYTES", 16 << 20)
    monkeypatch.setattr(product_rates, "_KEYS_BYTES", 1 << 20)
    runtime = _native.Runtime(1)
    kernels = product_rates.Kernels(runtime, 1)
    monkeypatch.setattr(product_rates._native, "memory_probe", lambda threads, nbytes: 1e6)
    cold = {id(one.call) for one in kernels._calls if one.name.startswith("cold ")}
    # In the second round a neighbour takes half of the core.
    for seconds, int8 in ((1.0, 9e9), (4.0, 4.5e9), (2.2, 9e9)):
        monkeypatch.setattr(product_rates._native, "int8_probe", lambda threads, int8=int8: int8)
        # A call with cold weights has 12 MiB of them, which is more matrices than a call with cached ones.
        monkeypatch.setattr(
            product_rates,
            "_median_s",
            lambda call, seconds=seconds: seconds * (20 if id(call) in cold else 1),
        )
        kernels.measure()
    rates, varied, wait = kernels.rates, kernels.varied, kernels.wait("q4", 8)
    share, int8_operations = kernels.share_of_memory("keys and values f32"), kernels.int8_operations
    kernels.close()
    runtime.close()
    assert varied == 4.0
    assert int8_operations == pytest.approx(3 / (2 / 9e9 + 1 / 4.5e9))
    # Without the neighbour the rounds take 1, 2 and 2.2 seconds.
    assert rates["q4 64"] == pytest.approx(4 * 64 * 768 * 2048 / 2.0 * int8_operations / 9e9)
    assert share == pytest.approx(2 * 1024 * 16 * 128 * 4 / 2.2 / 1e6)
    nbytes = _native.matrix_bytes("q4", 768, 2048)
    matrices = (12 << 20) // nbytes
    assert wait == pytest.approx((44.0 / matrices - 2.2 / 2) / (nbytes / 1e6))


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([0.5, 1.1, 2.2], (0.5, 0.1)),  # layers with misses at 0.5, and further misses at 0.1
        ([0.7, 1.4, 1.4], (0.55, 0.0)),  # fewer with more misses
        ([0.0, 0.2, 1.4], (0.0, 0.2)),
    ],
)
def test_the_first_miss_of_a_layer_and_further_ones_have_costs_of_their_own(
    costs: list[float], expected: tuple[float, float]
) -> None:
    samples = [(1.0, 1.0, costs[0]), (2.0, 3.0, costs[1]), (3.0, 10.0, costs[2])]
    assert calibration._solved(samples) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("reading_s", "computing_s", "together_s", "overlap"),
    [
        (1.0, 2.0, 2.0, 1.0),
        (1.0, 2.0, 3.0, 0.0),
        (2.0, 1.0, 2.5, 0.5),
        (1.0, 1.0, 2.5, 0.0),
        (1.0, 1.0, 0.9, 1.0),
    ],
)
def test_overlap_is_the_share_of_the_shorter_that_is_hidden(
    reading_s: float, computing_s: float, together_s: float, overlap: float
) -> None:
    assert drive_rates._overlap(reading_s, computing_s, together_s) == overlap
