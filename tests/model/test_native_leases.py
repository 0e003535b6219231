"""A stack runs layers out of a cache without Python, until a read fails or takes long; then Python goes on with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint.pack import pack
from argosy.errors import ReadFailed
from argosy.experts.cache import CachedRunner
from argosy.model.families import open_model
from tests.model.open_parts import Parts, Residency, make_steps, open_parts
from tests.model.test_stack import STEPS, decoder_of
from tests.models.tiny import qwen3_moe, write_model
from tests.native import _native_testing

NEVER = 1 << 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("leases")
    config = qwen3_moe(num_experts=16, num_experts_per_tok=4, num_hidden_layers=4)
    pack(open_model(write_model(root / "plain", config, seed=5)), root / "packed", format="q8")
    return root / "packed"


def logits(parts: Parts, decoder: Any = None) -> list[Any]:
    decoder = decoder or decoder_of(parts)
    return [decoder.forward(step) for step in make_steps(parts.config, STEPS)]


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[Any]:
    with open_parts(directory, "resident") as parts:
        return logits(parts)


@contextmanager
def cached(
    directory: Path, residency: Residency, faults: _native_testing.FaultyFileSystem | None = None
) -> Iterator[tuple[Parts, CachedRunner]]:
    with open_parts(directory, residency, file_system=faults) as parts:
        assert isinstance(parts.experts, CachedRunner)
        yield parts, parts.experts


def check_idle(runner: CachedRunner) -> None:
    """Check that no lease is open, and that it left nothing pinned."""
    core = runner.cache.core
    assert not core.is_open
    pinned = {key for policy in runner.cache.slots.policies for key in policy.pinned()}
    assert pinned <= {*core.kept, *core.early}


def num_opening_reads(directory: Path, residency: Residency) -> int:
    faults = _native_testing.FaultyFileSystem(NEVER, "eio")
    with cached(directory, residency, faults):
        return faults.num_reads


@pytest.mark.parametrize("residency", ["smallest cache", "guessing cache"])
def test_native_leases_compute_what_a_resident_model_does(
    directory: Path, expected: list[Any], residency: Residency
) -> None:
    with cached(directory, residency) as (parts, runner):
        found = logits(parts)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        stats, core = runner.stats, runner.cache.core
        assert core.num_run > 0
        assert core.num_run + runner._num_leased == stats.lookups == runner.cache.table.num_runs
        assert stats.hits < stats.lookups
        assert bool(stats.hits) == (residency == "guessing cache")
        check_idle(runner)


def test_native_and_python_leases_find_the_same_experts(
    directory: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for in_python in (False, True):
        with monkeypatch.context() as patch:
            if in_python:
                patch.setattr(CachedRunner, "elsewhere", None)
            with cached(directory, "smallest cache") as (parts, runner):
                runner.cache.core.trust(2)  # no guesses: how far one is read depends on the drive
                found = logits(parts)
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
                stats = runner.stats
                counts.append(
                    (stats.lookups, stats.hits, stats.decode_lookups, stats.decode_hits, stats.bytes_read)
                )
                assert bool(runner.cache.core.num_run) != in_python
    assert counts[0] == counts[1]


@pytest.mark.parametrize("nth", [1, 2, 9, 40])
def test_a_layer_whose_reads_take_long_goes_on_in_python(
    directory: Path, expected: list[Any], nth: int
) -> None:
    first = num_opening_reads(directory, "smallest cache")
    faults = _native_testing.FaultyFileSystem(first + nth, "hold")
    with cached(directory, "smallest cache", faults) as (parts, runner):
        runs: list[tuple[int, int, float]] = []
        decoder = decoder_of(parts)
        take_done = runner.cache.core.take_done

        def run(layer: int, dispatch: Any, rows: Any, out: Any) -> Any:
            runs.append((layer, runner.cache.core.num_in_flight, decoder.share_done))
            if len(runs) == 1:  # on a slow machine, other layers take long, too
                timer.start()
            return CachedRunner.run(runner, layer, dispatch, rows, out)

        runner.run = run  # type: ignore[method-assign]
        timer = threading.Timer(0.01, faults.release)
        found = logits(parts, decoder)
        timer.join()
        assert take_done() == []
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        _, in_flight, _ = runs[0]  # Python took over a lease whose read was held
        assert in_flight > 0
        # Layers that native code ran count, too.
        assert [share for _, _, share in runs] == [layer / parts.config.num_layers for layer, _, _ in runs]
        assert decoder.share_done == 0
        stats = runner.stats
        assert stats.lookups == runner.cache.core.num_run + runner._num_leased == runner.cache.table.num_runs
        check_idle(runner)


@pytest.mark.parametrize("nth", [1, 2, 9, 40])
def test_a_read_that_fails_ends_the_step_and_the_next_is_whole(
    directory: Path, expected: list[Any], nth: int
) -> None:
    first = num_opening_reads(directory, "smallest cache")
    faults = _native_testing.FaultyFileSystem(first + nth, "eio")
    with cached(directory, "smallest cache", faults) as (parts, runner):
        decoder = decoder_of(parts)
        failed: list[ReadFailed] = []
        found = []
        for step in make_steps(parts.config, STEPS):
            try:
                found.append(decoder.forward(step))
            except ReadFailed as error:
                failed.append(error)
                check_idle(runner)
                found.append(decoder.forward(step))
        (one,) = failed
        assert one.facts["layer"] in range(4)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        check_idle(runner)


def test_an_interrupt_while_a_layer_waits_leaves_nothing_behind(directory: Path, expected: list[Any]) -> None:
    first = num_opening_reads(directory, "smallest cache")
    faults = _native_testing.FaultyFileSystem(first + 1, "hold")
    with cached(directory, "smallest cache", faults) as (parts, runner):
        decoder = decoder_of(parts)
        (step, *_) = make_steps(parts.config, STEPS)

        def run(layer: int, dispatch: Any, rows: Any, out: Any) -> Any:
            timer.start()  # closing the lease waits for the read
            raise KeyboardInterrupt

        runner.run = run  # type: ignore[method-assign]
        timer = threading.Timer(0.05, faults.release)
        with pytest.raises(KeyboardInterrupt):
            decoder.forward(step)
        del runner.run
        assert np.array_equal(decoder.forward(step), expected[0])  # ends the lease that was left open
        timer.join()
        check_idle(runner)
