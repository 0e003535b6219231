"""Measured steps correct what was forecast, whatever the limits of the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.engine import engine as engines
from argosy.errors import UsageError
from argosy.forecast import calibration, step_probe
from argosy.forecast.planning import HERE, find_place, forecaster, open_subject
from argosy.forecast.simulation import SimulatedServer
from argosy.forecast.step_probe import measured_servers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a context of 512 tokens."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    calibration._write_model(path, calibration._Size(layers=2, hidden=256, width=64, experts=16, chosen=4))
    return path


def measured(
    model: Path, context: int, at_once: int
) -> tuple[SimulatedServer, tuple[SimulatedServer, SimulatedServer, SimulatedServer]]:
    options: dict[str, Any] = {"context": context, "max_sequences": at_once, "threads": 1}
    with open_subject(str(model)) as subject:
        found, budget_bytes = forecaster(
            subject, find_place(HERE, model), memory="1GiB", streams=(1,), **options
        )
        plan = found.plan(budget_bytes)
        forecast = replace(found.servers(plan)[1], max_sequences=at_once)
    return forecast, measured_servers(str(model), plan, forecast, options | found.engine_options(plan))


def test_steps_are_measured_as_they_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test, a step takes 10 ms, and 1 ms for each token in it."""
    now = 0.0
    step = engines.Engine.step

    def timed(self: engines.Engine) -> Any:
        nonlocal now
        before = self.facts().tokens_run
        found = step(self)
        now += 0.01 + 0.001 * (self.facts().tokens_run - before)
        return found

    monkeypatch.setattr(engines.Engine, "step", timed)
    monkeypatch.setattr(step_probe, "time", SimpleNamespace(perf_counter=lambda: now))
    forecast, (fast, likely, slow) = measured(model, 512, 3)
    times = likely.step_times
    for streams in (1, 2, 3):
        assert times.decode_s(streams, 40) == pytest.approx(0.01 + 0.001 * streams, rel=0.04)
    for tokens in (16, 64, 192):
        assert times.mixed_s(0, 0.0, tokens, tokens / 2) == pytest.approx(0.01 + 0.001 * tokens, rel=0.02)
    assert times.mixed_s(3, 40.0, 64, 32.0) == pytest.approx(0.077, rel=0.04)
    assert [one.step_times.decode_s(1, 40) for one in (fast, slow)] == pytest.approx(
        [0.011 / 1.05, 0.011 * 1.05], rel=0.04
    )
    assert replace(likely, step_times=forecast.step_times) == forecast


@pytest.mark.parametrize(("context", "at_once"), [(64, 16), (80, 3), (512, 1)])
def test_a_short_context_or_few_places_are_measured_as_far_as_they_go(
    context: int, at_once: int, model: Path
) -> None:
    _, (_, likely, _) = measured(model, context, at_once)
    assert 0 < likely.step_times.decode_s(1, 10) < 1
    assert 0 < likely.step_times.mixed_s(1, 10, 8, 4.0) < 1


def test_a_context_without_room_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="needs a context of 64 tokens, and it has 32"):
        measured(model, 32, 1)
