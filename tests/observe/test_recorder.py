"""A recorder counts what tokens chose, whatever the steps were, and a step never notices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import Budget, EngineConfig, ModelConfig
from argosy.experts.hit_rate import WINDOWS
from argosy.experts.recording import StepRoutes
from argosy.model.families import open_model
from argosy.observe.recorder import BLOCK_TOKENS, MOST_LANES, Recorder
from tests.models.tiny import mixtral, prompt_ids, qwen2_moe, write_model

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of six experts, the second of them without experts."""
    config = qwen2_moe(mlp_only_layers=[1], num_hidden_layers=4)
    return write_model(tmp_path_factory.mktemp("model"), config, seed=7)


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelConfig:
    return open_model(directory).config


def settings(max_sequences: int = 4) -> EngineConfig:
    return EngineConfig(budget=Budget(ram_bytes=1 << 30), threads=1, max_sequences=max_sequences)


@dataclass
class Told:
    """Steps of random choices, and each sequence's decode tokens in order."""

    steps: list[StepRoutes]
    prompts: list[NDArray[np.int32]]
    decoded: dict[int, list[NDArray[np.int32]]]  # by number: [layers, k]


def random_steps(model: ModelConfig, *, num_steps: int, most_sequences: int, seed: int = 0) -> Told:
    """Sequences that begin with a prompt, decode, and end; in each step some prompt tokens or one token each."""
    rng = np.random.default_rng(seed)
    told = Told([], [], {})
    running: list[int] = []
    following = 0
    for _ in range(num_steps):
        new = []
        if len(running) < most_sequences and rng.random() < 0.2:
            new.append(following)
            following += 1
        elif running and rng.random() < 0.05:
            running.pop(int(rng.integers(len(running))))
        numbers = [*running, *new]
        counts = [1] * len(running) + [int(rng.integers(1, 9)) for _ in new]
        if numbers:
            tokens = sum(counts)
            scores = rng.normal(size=(len(model.moe_layers), tokens, model.num_experts))
            choices = np.argsort(scores, axis=-1)[..., : model.experts_per_token].astype(np.int32)
            is_decode = np.arange(tokens) < len(running)
            sequence = np.repeat(np.arange(len(numbers), dtype=np.int32), counts)
            told.steps.append(StepRoutes(choices, is_decode, sequence, numbers))
            told.prompts.append(choices[:, ~is_decode])
            for row, number in enumerate(running):
                told.decoded.setdefault(number, []).append(choices[:, row])
        running += new
    return told


def uses_of(model: ModelConfig, choices: NDArray[np.int32]) -> NDArray[np.int64]:
    """[layers, experts] from [layers, tokens, k]."""
    found: NDArray[np.int64] = np.zeros((len(model.moe_layers), model.num_experts), np.int64)
    for layer, chosen in enumerate(choices):
        np.add.at(found[layer], chosen.ravel(), 1)
    return found


@pytest.mark.parametrize("most_sequences", [1, 3, MOST_LANES + 2])
def test_every_choice_is_counted_whatever_the_steps_were(model: ModelConfig, most_sequences: int) -> None:
    told = random_steps(model, num_steps=3 * BLOCK_TOKENS, most_sequences=most_sequences)
    recorder = Recorder(model, settings(most_sequences))
    for at in range(0, len(told.steps), 50):
        recorder.record(told.steps[at : at + 50], 0, 0)
        recorder.counts()  # in the middle of a block
    found = recorder.counts()

    decoded = np.concatenate([np.stack(tokens, 1) for tokens in told.decoded.values()], axis=1)
    prompts = np.concatenate(told.prompts, axis=1)
    np.testing.assert_array_equal(found.decode_uses, uses_of(model, decoded))
    np.testing.assert_array_equal(found.prompt_uses, uses_of(model, prompts))
    assert (found.prompt_tokens, found.decode_tokens) == (prompts.shape[1], decoded.shape[1])
    if most_sequences <= MOST_LANES:
        reused = sum(
            (before[:, :, None] == now[:, None, :]).sum(axis=(1, 2))
            for tokens in told.decoded.values()
            for before, now in pairwise(tokens)
        )
        np.testing.assert_array_equal(found.reused, reused)
        assert found.following_tokens == sum(len(tokens) - 1 for tokens in told.decoded.values())


def windows_of(choices: NDArray[np.int32]) -> Iterator[tuple[int, list[float]]]:
    """For each window length, the mean distinct experts of each layer, by looking at every window."""
    for length in WINDOWS:
        if length > choices.shape[1]:
            return
        starts = range(choices.shape[1] - length + 1)
        yield (
            length,
            [float(np.mean([len(np.unique(layer[at : at + length])) for at in starts])) for layer in choices],
        )


def test_the_working_set_is_that_of_one_answer_after_another(model: ModelConfig) -> None:
    told = random_steps(model, num_steps=150, most_sequences=1)
    recorder = Recorder(model, settings())
    recorder.record(told.steps, 0, 0)
    working_set = recorder.counts().working_set
    assert working_set is not None
    one = np.concatenate([np.stack(tokens, 1) for tokens in told.decoded.values()], axis=1)
    expected = dict(windows_of(one))
    assert working_set.layers == model.moe_layers
    assert working_set.windows == tuple(expected)
    np.testing.assert_allclose(working_set.distinct.T, list(expected.values()), atol=1e-9)


def test_answers_at_the_same_time_have_working_sets_of_their_own(model: ModelConfig) -> None:
    """Two sequences of which each repeats one choice: a single order of both would be twice as wide."""
    num_layers, k = len(model.moe_layers), model.experts_per_token
    recorder = Recorder(model, settings())
    choices = np.zeros((num_layers, 2, k), np.int32)
    choices[:, 0], choices[:, 1] = range(k), range(k, 2 * k)
    recorder.record(20 * [StepRoutes(choices, np.ones(2, bool), np.arange(2, dtype=np.int32), [3, 4])], 0, 0)
    working_set = recorder.counts().working_set
    assert working_set is not None
    assert (working_set.distinct == k).all()


def test_nothing_is_known_before_the_first_decode_token(model: ModelConfig) -> None:
    recorder = Recorder(model, settings())
    assert recorder.counts().working_set is None
    assert recorder.counts().next_token_reuse(2).tolist() == [0.0] * len(model.moe_layers)


def test_the_last_tokens_are_kept_in_order_with_the_counters_of_their_steps(model: ModelConfig) -> None:
    told = random_steps(model, num_steps=200, most_sequences=3, seed=2)
    recorder = Recorder(model, settings(), keeps_recent=True)
    assert recorder._recent is not None
    recorder._recent = type(recorder._recent)(70, len(model.moe_layers), model.experts_per_token)
    tokens: list[Any] = []
    facts: list[tuple[int, int, int]] = []
    number = 0
    for at in range(0, len(told.steps), 30):
        recorder.record(told.steps[at : at + 30], 10 * at, 7 * at)
        for step in told.steps[at : at + 30]:
            for row in np.flatnonzero(step.is_decode):
                tokens.append(step.choices[:, row])
                facts.append((number, 10 * at, 7 * at))
            number += 1
        recent = recorder.recent()
        np.testing.assert_array_equal(
            recent.choices, np.array(tokens[-70:]).reshape(-1, *recent.choices.shape[1:])
        )
        found = list(zip(recent.steps.tolist(), recent.lookups.tolist(), recent.hits.tolist(), strict=True))
        expected = facts[-70:]
        assert [row[1:] for row in found] == [row[1:] for row in expected]
        assert np.array_equal(np.diff(recent.steps) > 0, np.diff([row[0] for row in expected]) > 0)
    assert len(tokens) > 140


@pytest.mark.parametrize("keeps_recent", [False, True])
def test_it_never_holds_more_than_it_says(model: ModelConfig, keeps_recent: bool) -> None:
    import tracemalloc

    told = random_steps(model, num_steps=600, most_sequences=MOST_LANES, seed=3)
    tracemalloc.start()
    recorder = Recorder(model, settings(MOST_LANES), keeps_recent=keeps_recent)
    for at in range(0, len(told.steps), 100):
        recorder.record(told.steps[at : at + 100], 0, 0)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(recorder._lanes) == MOST_LANES
    assert 0.2 * recorder.nbytes < held < most < recorder.nbytes, (held, most, recorder.nbytes)


@pytest.mark.parametrize("expert_slots", [None, 5])
def test_an_engine_answers_the_same_and_its_recorder_hears_every_choice(
    directory: Path, model: ModelConfig, expert_slots: int | None
) -> None:
    prompts = [prompt_ids(mixtral(), seed, 9) for seed in range(3)]
    heard: dict[int, list[NDArray[np.int32]]] = {layer: [] for layer in model.moe_layers}
    options: dict[str, Any] = {
        "memory": "2GiB", "threads": 1, "expert_slots": expert_slots, "prefix_reuse": False, "max_sequences": 2,
    }  # fmt: skip
    with Engine.open(
        directory, observe_routes=lambda layer, ids: heard[layer].append(ids.copy()), **options
    ) as engine:
        expected = [result.token_ids for result in engine.generate_batch(prompts, PARAMS)]
    made: list[Recorder] = []

    def open_recorder(files: ModelFiles, config: EngineConfig) -> Recorder:
        made.append(Recorder(files.config, config, keeps_recent=True))
        return made[-1]

    with Engine.open(directory, recorder=open_recorder, **options) as engine:
        assert [result.token_ids for result in engine.generate_batch(prompts, PARAMS)] == expected
        engine.tell_recorder()
        counts, recent = made[0].counts(), made[0].recent()
        parts = {part.key: part.nbytes for part in engine.plan.parts()}
        stats = engine._started.model.experts.stats  # type: ignore[union-attr]
    everything = np.stack([np.concatenate(heard[layer]) for layer in model.moe_layers])
    np.testing.assert_array_equal(counts.prompt_uses + counts.decode_uses, uses_of(model, everything))
    assert counts.prompt_tokens == sum(map(len, prompts))
    assert (
        counts.decode_tokens == 3 * (24 - 1) == len(recent.choices)
    )  # the last token of an answer never runs
    assert parts["routing_bytes"] == made[0].nbytes > 0
    if expert_slots is not None:
        # The engine looks up the distinct experts of a step, as a replay of the recorded choices does.
        lookups, _ = _native.replay(
            recent.choices, recent.steps, num_experts=model.num_experts, policy="lru", num_slots=5
        )
        assert lookups == stats.decode_lookups == recent.lookups[-1] > stats.decode_hits > 0


def test_a_model_without_routed_experts_to_run_has_no_recorder(directory: Path) -> None:
    def open_recorder(files: ModelFiles, config: EngineConfig) -> Recorder:
        raise AssertionError("nothing can be recorded")

    with Engine.open(directory, memory="2GiB", experts_off=True, recorder=open_recorder) as engine:
        assert engine.settings.claims == ()
