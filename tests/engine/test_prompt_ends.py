"""The last layers of some models leave out most tokens of a prompt, and change no bit of any answer.

The models are a MiMo, and a DeepSeek-V4 with pools and residual streams, whose last two layers see only windows; and a
DeepSeek-V4.1, whose last three layers see entries of an earlier one and what it found best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.files import ModelFiles
from argosy.cluster.group import Group
from argosy.config import EngineConfig
from argosy.experts.recording import StepRoutes
from argosy.model.families import open_model
from tests.cluster.rigs import worker_thread
from tests.engine.scheduling import BLOCK_TOKENS, Rig
from tests.models.tiny import prompt_ids, qwen3_moe, write_model
from tests.models.tiny_deepseek_v4 import deepseek_v4, write_deepseek_v4
from tests.models.tiny_deepseek_v41 import deepseek_v41, write_deepseek_v41
from tests.models.tiny_gqa import mimo_v2_flash

CONFIGS = {
    "mimo": mimo_v2_flash(
        hybrid_layer_pattern=[0, 1, 0, 1, 1],
        max_position_embeddings=1024,
        moe_layer_freq=[0, 1, 1, 1, 1],
        num_hidden_layers=5,
    ),
    "deepseek_v4": deepseek_v4(compress_ratios=[0, 4, 4, 0, 0], num_hidden_layers=5),
    "deepseek_v41": deepseek_v41(
        num_hidden_layers=7,
        compress_ratios=[0, 2, 2, 1, 1, 0, 1],
        kv_source_layer_ids=[1, 3],
        index_source_layer_ids=[1, 3, 6],
        engram_layer_ids=[1],
    ),
}
WRITE: dict[str, Callable[..., Any]] = {
    "mimo": write_model, "deepseek_v4": write_deepseek_v4, "deepseek_v41": write_deepseek_v41,
}  # fmt: skip
REACHES = {"mimo": (0, 0, 15, 8, 1), "deepseek_v4": (0, 0, 11, 6, 1), "deepseek_v41": (0, 0, 0, 13, 9, 5, 1)}
PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=3)


# ── the scheduler and the prefixes ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("tail", "chunk_tokens"), [((3,), 64), ((5, 2), 3), ((2, 4, 6), 64), ((9, 9), 3)])
def test_a_prefix_of_any_length_is_reused_as_far_as_its_tail_is_complete(
    tail: tuple[int, ...], chunk_tokens: int
) -> None:
    """The rig checks that each token that is needed finds what it sees. The third prompt finds the whole prefix."""
    for shared in range(0, 40, 3):
        for own in (1, 23):
            rig = Rig(chunk_tokens=chunk_tokens, reuse=True, tail=tail)
            prefix = list(range(shared))
            prompts = [[*prefix, *range(100 * i, 100 * i + own)] for i in range(2, 5)]
            for prompt in ([*range(40)], *prompts):
                last = rig.sequence_of(prompt)
                rig.add(last)
                rig.run()
            assert last.cached_tokens == min(shared, shared + own - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            following = rig.sequence_of([*prompts[-1], *last.new_ids, 7])
            rig.add(following)
            rig.run()
            assert following.cached_tokens == (len(following.prompt_ids) - 2) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.mark.parametrize("num_steps", [1, 4, 5, 6, 8])
def test_prompts_that_run_together_diverge_where_the_tail_is_complete(num_steps: int) -> None:
    """The second one comes after some steps of the first; its tail begins with position 19."""
    rig = Rig(chunk_tokens=4, reuse=True, tail=(3, 4))
    first, second = (rig.sequence_of([*range(24), *range(at, at + 7)]) for at in (100, 200))
    rig.add(first)
    for _ in range(num_steps):
        rig.step()
    rig.add(second)
    rig.run()
    assert second.cached_tokens == (24 if num_steps < 5 else 16)


def test_the_last_layers_run_only_for_the_ends_of_prompts() -> None:
    rig = Rig(chunk_tokens=16, tail=(5, 2))
    rig.add(rig.sequence(39, max_new=3))
    rig.run()
    # From position 36 on every layer runs: 3 of the prompt, and 2 of the answer; before it the windows.
    assert rig.memory.num_run == [5 + 5, 5 + 1]


# ── the engine ──────────────────────────────────────────────────────────────────────────────────────────────────


class Choices:
    """A recorder that counts the choices of prompts, by layer."""

    nbytes = 0

    def __init__(self, files: ModelFiles, config: EngineConfig) -> None:
        self.num_chosen = np.zeros(len(files.config.moe_layers), np.int64)

    def record(self, steps: list[StepRoutes], lookups: int, hits: int) -> None:
        for step in steps:
            self.num_chosen += (step.choices[:, ~step.is_decode] >= 0).all(axis=2).sum(axis=1)


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ends") / request.param
    directory.mkdir()
    WRITE[request.param](directory, CONFIGS[request.param], seed=5)
    return directory


def engine_of(directory: Path, **options: Any) -> Engine:
    return Engine.open(directory, **{"memory": "1GiB", "threads": 1, "chunk_tokens": 64} | options)


def prompt(seed: int, length: int) -> list[int]:
    return prompt_ids(CONFIGS["mimo"], seed, length)


@cache
def in_full(directory: Path, ids: tuple[int, ...]) -> Any:
    """The answer if every layer runs for every token, because log-probabilities of the prompt are wanted."""
    with engine_of(directory, prefix_reuse=False) as engine:
        return visible(engine.generate(list(ids), replace(PARAMS, prompt_logprobs=0)))


def visible(result: Any) -> Any:
    return result.token_ids, result.logprobs


@pytest.mark.parametrize("chunk_tokens", [1, 7, 256])
@pytest.mark.parametrize("streams", ["resident", "cached"])
def test_answers_are_those_of_a_full_run(directory: Path, chunk_tokens: int, streams: str) -> None:
    prompts = [prompt(seed, length) for seed, length in enumerate((1, 12, 13, 29, 48, 100))]
    options = {} if streams == "resident" else {"expert_slots": 8, "speculate": "lookup"}
    with engine_of(directory, chunk_tokens=chunk_tokens, **options) as engine:
        results = [engine.generate(prompts[-1], PARAMS), *engine.generate_batch(prompts, PARAMS)]
    for ids, result in zip([prompts[-1], *prompts], results, strict=True):
        assert visible(result) == in_full(directory, tuple(ids))


@pytest.mark.parametrize("wants_prompt", [False, True])
def test_prompts_read_experts_of_the_last_layers_only_for_their_ends(
    directory: Path, wants_prompt: bool
) -> None:
    made: list[Choices] = []

    def open_recorder(files: ModelFiles, config: EngineConfig) -> Choices:
        made.append(Choices(files, config))
        return made[-1]

    with engine_of(directory, recorder=open_recorder) as engine:
        engine.generate(prompt(1, 100), replace(PARAMS, prompt_logprobs=0) if wants_prompt else PARAMS)
        engine.tell_recorder()
    reaches = REACHES[directory.name][-4:]
    # Every layer runs from position 96 on, and each of the last ones for its windows before it.
    of_ends = [3 + reach if reach else 100 for reach in reaches]
    assert made[0].num_chosen[-4:].tolist() == ([100] * 4 if wants_prompt else of_ends)


def test_prefixes_and_turns_give_the_answers_of_full_runs(directory: Path) -> None:
    shared = prompt(1, 70)
    ends = ((70, 30), (64, 9), (63, 30), (49, 2), (20, 30), (64, 3))
    prompts = [shared[:at] + prompt(at, own) for at, own in ends]
    with engine_of(directory, chunk_tokens=32) as engine:
        for ids in prompts:
            result = engine.generate(ids, PARAMS)
            assert visible(result) == in_full(directory, tuple(ids))
            following = ids + result.token_ids + [3]
            assert visible(engine.generate(following, PARAMS)) == in_full(directory, tuple(following))


def test_preempted_prompts_give_the_answers_of_full_runs(directory: Path) -> None:
    prompts = [prompt(seed, 30) for seed in range(4)]
    with engine_of(directory, context=112) as engine:
        results = engine.generate_batch(prompts, replace(PARAMS, max_tokens=24))
        assert engine.facts().num_preempted > 0
    with engine_of(directory, prefix_reuse=False) as engine:
        for ids, result in zip(prompts, results, strict=True):
            whole = engine.generate(ids, replace(PARAMS, max_tokens=24, prompt_logprobs=0))
            assert visible(result) == visible(whole)


def test_embeddings_after_answers_read_every_token(directory: Path) -> None:
    ids, poolings = prompt(1, 100), ("mean", "last")
    with engine_of(directory) as engine:
        engine.generate(ids, PARAMS)
        found = [engine.embed([ids], pooling=pooling) for pooling in poolings]
        assert visible(engine.generate(ids, PARAMS)) == in_full(directory, tuple(ids))
    with engine_of(directory, prefix_reuse=False) as engine:
        for embedding, pooling in zip(found, poolings, strict=True):
            assert np.array_equal(embedding, engine.embed([ids], pooling=pooling))


def test_prompts_whose_prefixes_are_kept_in_files_run_in_full(directory: Path, tmp_path: Path) -> None:
    """A file can serve any later prompt, which may end anywhere."""
    shared = prompt(1, 70)
    with engine_of(directory, kv_dir=tmp_path) as engine:
        assert engine.settings.leaves_out_tokens is False
        engine.generate(shared + prompt(2, 30), PARAMS)
    with engine_of(directory, kv_dir=tmp_path) as engine:
        for ids in (shared + prompt(2, 30), shared[:49] + prompt(3, 9)):
            assert visible(engine.generate(ids, PARAMS)) == in_full(directory, tuple(ids))


def test_experts_of_other_processes_give_the_answers_of_full_runs(directory: Path) -> None:
    ids = prompt(1, 100)
    with (
        worker_thread(directory) as (address, _),
        Group([address], local=False) as group,
        engine_of(directory, experts=group, chunk_tokens=32) as engine,
    ):
        assert visible(engine.generate(ids, PARAMS)) == in_full(directory, tuple(ids))


# ── which layers ────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_last_layers_that_keep_nothing_but_a_window_leave_tokens_out(
    directory: Path, tmp_path: Path
) -> None:
    config = open_model(directory).config
    assert config.reaches == REACHES[directory.name]
    few = replace(config, layers=(*config.layers[:3] * 4, *config.layers[3:]))
    assert not any(few.reaches)  # few of many layers are not worth it
    write_model(tmp_path, qwen3_moe(), seed=1)
    assert not any(open_model(tmp_path).config.reaches)
