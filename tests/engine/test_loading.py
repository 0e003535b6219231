"""A model that is loaded beside others gives way to them until its experts are in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import SamplingParams
from argosy.engine.engine import Engine
from argosy.engine.shared import Ready, make_ready
from argosy.errors import DoesNotFit
from argosy.experts.cache import CachedRunner
from argosy.open.models import configure, open_files
from tests.cli.tiny_chat_model import write_chat_model

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = np.random.default_rng(3).integers(0, 400, 9).tolist()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> list[Ready]:
    path = write_chat_model(tmp_path_factory.mktemp("loading") / "model")
    files = open_files(path)
    config = configure(path, files, memory="2GiB", threads=1)
    ready, _ = make_ready([(name, files, config) for name in ("one", "two")], claims=(), recorder=None)
    return ready


@pytest.fixture
def engines(ready: list[Ready]) -> Iterator[tuple[Engine, Engine]]:
    """Two engines that share the cores; none has experts in memory."""
    opened = [one.open(0) for one in ready]
    yield opened[0], opened[1]
    for one, engine in zip(ready, opened, strict=True):
        one.close(engine)


class Watched:
    """The leases of an engine's experts, without native layers; calls `meanwhile` before each wait for reads."""

    def __init__(self, engine: Engine, meanwhile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CachedRunner, "elsewhere", None)
        self._core, self.meanwhile = engine._started.model.cache.core, meanwhile
        monkeypatch.setattr(engine._started.model.cache, "core", self)

    def collect(self) -> None:
        self.meanwhile()
        self._core.collect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def test_steps_of_others_run_while_a_first_prompt_waits_for_its_experts(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, loading = engines
    expected = busy.generate(PROMPT, PARAMS).token_ids
    other = busy.submit(PROMPT, PARAMS)
    num_steps = 0

    def step_of_the_other() -> None:
        nonlocal num_steps
        if other.result is None:
            num_steps += 1
            stepper = threading.Thread(target=busy.step, daemon=True)
            stepper.start()
            stepper.join(30)
            assert not stepper.is_alive()  # it did not wait for the cores

    Watched(loading, step_of_the_other, monkeypatch)
    first = loading.submit(PROMPT, PARAMS)
    loading.step()
    assert num_steps >= 1
    assert len(first.new_ids) == 1
    while first.result is None:
        loading.step()
    while other.result is None:
        busy.step()
    assert first.new_ids == other.new_ids == expected


def test_a_step_of_a_model_that_is_in_memory_keeps_the_cores(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = engines
    lent: list[bool] = []
    Watched(engine, lambda: lent.append(engine._started.turns._owner is None), monkeypatch)
    sequence = engine.submit(PROMPT, PARAMS)
    engine.step()
    assert any(lent)
    assert engine._started.model.cache.slots.is_full
    lent.clear()
    while sequence.result is None:
        engine.step()
    engine.generate([*PROMPT, 3], PARAMS)
    assert lent  # it waited for reads
    assert not any(lent)


def test_steps_are_in_the_foreground_once_no_slot_is_free(
    ready: list[Ready], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = engines
    is_ahead = threading.Event()
    waited: list[bool] = []

    def give_way(seconds: float) -> None:
        # In the foreground, whoever gives way waits until the step is over.
        threading.Thread(
            target=lambda: (ready[1]._foreground.give_way(3600), is_ahead.set()), daemon=True
        ).start()
        waited.append(not is_ahead.wait(seconds))

    watched = Watched(engine, lambda: waited or give_way(30), monkeypatch)
    engine.generate(PROMPT, PARAMS)
    assert waited == [False]
    is_ahead.clear()
    waited.clear()
    watched.meanwhile = lambda: waited or give_way(0.1)
    engine.generate([*PROMPT, 3], PARAMS)
    assert waited == [True]
    assert is_ahead.wait(30)


def test_nothing_commits_memory_after_an_engine_is_closed(ready: list[Ready]) -> None:
    with ready[0]._foreground:  # threads that give way take long
        engine = ready[0].open(ready[0].most_bytes)
        ready[0].close(engine)
        assert "argosy-populate" not in [thread.name for thread in threading.enumerate()]


def test_calls_of_an_engine_do_not_wait_for_steps_of_others(engines: tuple[Engine, Engine]) -> None:
    busy, loading = engines

    def calls() -> None:
        sequence = busy.submit(PROMPT, PARAMS)
        busy.facts()
        busy.resize(busy.plan.total_bytes, is_share=True)
        busy.cancel(sequence)

    with loading._lock, loading._started.turns:  # a step
        caller = threading.Thread(target=calls, daemon=True)
        caller.start()
        caller.join(30)
        assert not caller.is_alive()


def test_a_model_is_opened_with_more_than_the_budget_that_it_was_planned_for_even_where_no_addresses_are_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.engine.start.may_reserve", lambda: False)  # as with `ulimit -v`
    path = write_chat_model(tmp_path / "model")
    files = open_files(path)
    config = configure(path, files, memory="2GiB", threads=1)
    (tight,), _ = make_ready([("tight", files, config)], claims=(), recorder=None)
    with pytest.raises(DoesNotFit) as refused:
        tight.fit(2 << 30)
    needed = refused.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    tight.fit((4 << 30) - needed)  # exactly enough for its floor
    assert tight.plan.slots.reachable < tight.plan.slots.num_experts

    engine = tight.open(tight.most_bytes)  # the server has got a larger budget since
    assert engine.facts().expert_slots == engine.plan.slots.num_experts
    assert len(engine.generate(PROMPT, PARAMS).token_ids) == 4
    tight.close(engine)
