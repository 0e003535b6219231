"""A page may ask for the hit rate of the last minutes as often as it likes: the answer is at hand, and names nobody."""

from __future__ import annotations

import numpy as np
import pytest

from argosy import _native
from argosy.config import Budget, EngineConfig, ModelConfig
from argosy.experts.recording import StepRoutes
from argosy.model.families import open_model
from argosy.observe.live import EVERY_S, FEWEST_TOKENS, LiveCache
from argosy.observe.recorder import Recorder
from tests.models.tiny import mixtral, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return open_model(write_model(tmp_path_factory.mktemp("model"), mixtral(), seed=1)).config


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def recorder_of(model: ModelConfig) -> Recorder:
    config = EngineConfig(budget=Budget(ram_bytes=1 << 30), threads=1)
    return Recorder(model, config, keeps_recent=True)


def record(recorder: Recorder, model: ModelConfig, num_tokens: int, *, lookups: int, hits: int) -> None:
    scores = np.random.default_rng(num_tokens).normal(size=(3, num_tokens, 6)) + np.arange(6)
    choices = np.argsort(-scores, axis=-1)[..., : model.experts_per_token].astype(np.int32)
    one = np.zeros(1, np.int32)
    steps = [StepRoutes(choices[:, at : at + 1], np.ones(1, bool), one, [7]) for at in range(num_tokens)]
    recorder.record(steps, lookups, hits)


def asked(live: LiveCache) -> object:
    live()
    if live._thread is not None:
        live._thread.join(10)
    return live._found


def test_it_says_nothing_until_enough_tokens_ran(model: ModelConfig) -> None:
    clock = Clock()
    recorder = recorder_of(model)
    live = LiveCache(recorder, num_experts=6, num_slots=9, clock=clock)
    assert asked(live) is None
    record(recorder, model, 2 * FEWEST_TOKENS - 1, lookups=1, hits=1)
    clock.now += EVERY_S
    assert asked(live) is None
    assert live() is None


def test_it_stands_beside_a_replay_of_the_same_choices(model: ModelConfig) -> None:
    recorder = recorder_of(model)
    record(recorder, model, 300, lookups=1000, hits=500)
    record(recorder, model, 400, lookups=2000, hits=1300)
    live = LiveCache(recorder, num_experts=6, num_slots=9, clock=Clock())
    found = asked(live)
    recent = recorder.recent()
    expected = {
        policy: np.divide(
            *reversed(
                _native.replay(
                    recent.choices, recent.steps, num_experts=6, policy=policy, num_slots=9, counted_from=350
                )
            )
        )
        for policy in ("lru", "optimum")
    }
    assert found is not None
    assert live() == found
    assert (live().tokens, live().lru, live().optimum) == (350, expected["lru"], expected["optimum"])  # type: ignore[union-attr]


def test_the_engine_s_rate_is_that_of_the_tokens_that_count(model: ModelConfig) -> None:
    recorder = recorder_of(model)
    for batch in range(1, 9):  # from the fifth batch on, nine of ten lookups hit
        record(recorder, model, 100, lookups=100 * batch, hits=90 * max(0, batch - 4))
    live = LiveCache(recorder, num_experts=6, num_slots=9, clock=Clock())
    asked(live)
    found = live()
    assert found is not None
    assert found.hit_rate == pytest.approx(0.9)


def test_however_often_it_is_asked_it_replays_once_in_a_while(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    recorder = recorder_of(model)
    record(recorder, model, 600, lookups=10, hits=5)
    live = LiveCache(recorder, num_experts=6, num_slots=9, clock=clock)
    replays = 0
    plain = live._find

    def find() -> None:
        nonlocal replays
        replays += 1
        plain()

    monkeypatch.setattr(live, "_find", find)
    for _ in range(100):
        asked(live)
    assert replays == 1
    clock.now += EVERY_S
    asked(live)
    assert replays == 2
