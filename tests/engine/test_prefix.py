"""Prefix hits change how fast a token comes, never which token comes.

For every kind of mixer, an answer has the same tokens and log-probabilities as alone when its prefix was found, shared
while it was computed, forked, recomputed after preemption, or read from another process's file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, SamplingParams, _native
from argosy.config import KV_BLOCK_TOKENS, KvDir
from argosy.directory import Directory
from argosy.engine.sequence import Sequence
from argosy.kept import prefix_files
from tests.helpers.examples import few_of
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, gpt_oss, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_deepseek_v4 import deepseek_v4
from tests.models.tiny_deepseek_v41 import deepseek_v41, write_deepseek_v41
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_dense import gemma3_text
from tests.models.tiny_flint import lara_mini
from tests.models.tiny_glm5 import glm5_next
from tests.models.tiny_k3 import kimi_k3
from tests.models.tiny_kda import bailing_hybrid
from tests.models.tiny_latent import deepseek_v3, glm_moe_dsa
from tests.models.tiny_llama4 import llama4_text
from tests.models.tiny_mamba import nemotron_h
from tests.models.tiny_minimax import minimax
from tests.models.tiny_minimax_m3 import minimax_m3
from tests.models.tiny_qwen4 import qwen4_exp_text
from tests.models.tiny_recurrent import lfm2_moe

NUM_NEW = 24
GREEDY = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_tokens=NUM_NEW, temperature=0.9, seed=5, ignore_eos=True, logprobs=2)

CONFIGS: dict[str, RawConfig] = {
    "attention": qwen3_moe(max_position_embeddings=1024),
    "windows and sinks": gpt_oss(
        max_position_embeddings=1024,
        hidden_size=96,
        intermediate_size=64,
        initial_context_length=1024,
        rope_scaling={"rope_type": "yarn", "factor": 8.0},
    ),
    "chunks": llama4_text(  # that end within a block of keys, at its end, and after the prefix found
        max_position_embeddings=1024,
        attention_chunk_size=40,
        hidden_size=72,
        intermediate_size=40,
        num_local_experts=9,
    ),
    "latent": deepseek_v3(max_position_embeddings=1024),
    "indexed": glm_moe_dsa(max_position_embeddings=1024),
    "delta": qwen3_next(max_position_embeddings=1024),
    "windows and pools": deepseek_v4(sliding_window=37),
    "convolutions": lfm2_moe(max_position_embeddings=1024),
    "mamba": nemotron_h(max_position_embeddings=1024),
    "kimi delta": bailing_hybrid(  # and latent attention; activations have limits by layer
        max_position_embeddings=1024,
        expert_swiglu_limit_list=[0.0, 0.2, 0.0, 0.1],
        share_expert_swiglu_limit_list=[0.0, 0.1, 0.0, 0.2],
    ),
    "lightning": minimax(max_position_embeddings=1024),
    "no experts": gemma3_text(max_position_embeddings=1024),
    "windows and delta": lara_mini(max_position_embeddings=1024),
    "kimi delta and a bank": kimi_k3(max_position_embeddings=1024),
    "kimi delta and chosen pools": glm5_next(max_position_embeddings=1024, index_kpool=4, index_topk=8),
    "chosen blocks": minimax_m3(max_position_embeddings=1024),
    "delta and small blocks": qwen4_exp_text(max_position_embeddings=1024),
    "windows and shared pools": deepseek_v41(sliding_window=37),
}
WRITERS: dict[str, Callable[..., Any]] = {"gpt_oss": write_mxfp4_model, "deepseek_v41": write_deepseek_v41}
RECURRENT = {
    "delta", "convolutions", "mamba", "kimi delta", "lightning", "windows and pools", "windows and delta",
    "windows and shared pools",
    "kimi delta and a bank", "kimi delta and chosen pools", "delta and small blocks",
}  # fmt: skip
IN_SHORT = [*list(CONFIGS)[:9], "kimi delta and a bank"]


@dataclass(frozen=True)
class Model:
    mixer: str
    directory: Path

    def prompt(self, seed: int, length: int) -> list[int]:
        return prompt_ids(CONFIGS[self.mixer], seed, length)

    def engine(self, **options: Any) -> Engine:
        return Engine.open(self.directory, **{"memory": "4GiB", "threads": 1, "chunk_tokens": 64} | options)

    def alone(self, prompt: list[int], params: SamplingParams = GREEDY) -> Any:
        return answer_alone(self, tuple(prompt), params.temperature)


@cache
def answer_alone(model: Model, prompt: tuple[int, ...], temperature: float) -> Any:
    with model.engine(prefix_reuse=False) as engine:
        return visible(engine.generate(list(prompt), GREEDY if temperature == 0 else SAMPLED))


def visible(result: Any) -> tuple[Any, ...]:
    return result.token_ids, result.logprobs, result.finish_reason


def cached(result: Any) -> int:
    assert result.usage["cached_tokens"] == result.ledger.cached_tokens
    return int(result.usage["cached_tokens"])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prefix")
    for mixer, config in CONFIGS.items():
        WRITERS.get(config["model_type"], write_model)(root / mixer, config, seed=3)
    return {mixer: runnable(root / mixer, root) for mixer in CONFIGS}


@pytest.fixture(params=few_of(CONFIGS, IN_SHORT))
def model(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Model:
    return Model(request.param, directories[request.param])


def run(engine: Engine, *sequences: Sequence) -> None:
    while any(one.result is None for one in sequences):
        engine.step()


def test_a_prompt_that_was_computed_before_is_found_and_its_answer_is_the_same(model: Model) -> None:
    prompt = model.prompt(1, 300)
    with model.engine() as engine:
        first, second = engine.generate(prompt, GREEDY), engine.generate(prompt, GREEDY)
        sampled = engine.generate(prompt, SAMPLED)
    assert [cached(result) for result in (first, second, sampled)] == [0, 288, 288]
    assert visible(first) == visible(second) == model.alone(prompt)
    assert visible(sampled) == model.alone(prompt, SAMPLED)


def test_a_prompt_that_was_cancelled_halfway_is_computed_from_there(model: Model) -> None:
    """Clients drop a request whose prompt takes long, and send it again."""
    prompt = model.prompt(1, 300)
    with model.engine() as engine:
        dropped = engine.submit(prompt, GREEDY)
        for _ in range(3):
            engine.step()
        num_computed = dropped.num_computed
        engine.cancel(dropped)
        num_before = engine.facts().tokens_run
        again = engine.generate(prompt, GREEDY)
        num_run = engine.facts().tokens_run - num_before
    assert num_computed == num_before == 192
    assert cached(again) == num_computed
    assert num_run == 300 - num_computed + NUM_NEW - 1
    assert visible(again) == model.alone(prompt)


def test_a_prompt_that_was_cancelled_beside_others_is_computed_from_its_last_full_block(model: Model) -> None:
    """The others leave it parts of steps that do not end with a block."""
    prompt, other = model.prompt(1, 300), model.prompt(2, 84)
    with model.engine() as engine:
        beside = engine.submit(other, GREEDY)
        dropped = engine.submit(prompt, GREEDY)
        while dropped.num_computed < 150:
            engine.step()
        num_computed = dropped.num_computed
        engine.cancel(dropped)
        run(engine, beside)
        again = engine.generate(prompt, GREEDY)
    assert num_computed < 300
    assert cached(again) == num_computed - num_computed % KV_BLOCK_TOKENS
    assert visible(again) == model.alone(prompt)


def test_a_prompt_that_diverges_from_another_is_computed_from_there(model: Model) -> None:
    shared = model.prompt(1, 100)
    prompts = [shared + model.prompt(seed, 40) for seed in (2, 3, 4)]
    with model.engine() as engine:
        results = [engine.generate(prompt, GREEDY) for prompt in prompts]
    # A recurrent state resumes only from a snapshot, and only the second prompt shows where the prompts diverge.
    assert [cached(result) for result in results] == ([0, 0, 96] if model.mixer in RECURRENT else [0, 96, 96])
    for prompt, result in zip(prompts, results, strict=True):
        assert visible(result) == model.alone(prompt)


def test_the_next_turn_finds_the_previous_answer(model: Model) -> None:
    prompt = model.prompt(1, 90)
    params = replace(GREEDY, max_tokens=60)
    with model.engine() as engine:
        first = engine.generate(prompt, params)
        following = prompt + first.token_ids + model.prompt(2, 30)
        second = engine.generate(following, GREEDY)
    assert cached(second) == (128 if model.mixer in RECURRENT else 144)
    assert visible(second) == model.alone(following)


def test_prompts_submitted_together_compute_their_shared_prefix_once(model: Model) -> None:
    shared = model.prompt(1, 100)
    prompts = [shared + model.prompt(seed, 20) for seed in (2, 3, 4)]
    with model.engine(chunk_tokens=32) as engine:
        results = engine.generate_batch(prompts, GREEDY)
        num_run = engine.facts().tokens_run
    for prompt, result in zip(prompts, results, strict=True):
        assert visible(result) == model.alone(prompt)
    assert [cached(result) for result in results] == [0, 96, 96]
    assert num_run == 3 * (120 + NUM_NEW - 1) - 2 * 96


def test_answers_to_one_prompt_compute_it_once_and_follow_their_seeds(model: Model) -> None:
    prompt = model.prompt(1, 83)
    with model.engine() as engine:
        sequences = engine.requests.prepare(prompt, SAMPLED, num_answers=3)
        engine.enqueue(sequences)
        run(engine, *sequences)
        num_run = engine.facts().tokens_run
        seeds = [one.result.seed for one in sequences if one.result is not None]
        alone = [engine.generate(prompt, replace(SAMPLED, seed=seed)) for seed in seeds]
    assert num_run == 83 + 3 * (NUM_NEW - 1)
    assert len(set(seeds)) == 3
    assert seeds[0] == SAMPLED.seed
    assert [visible(one.result) for one in sequences] == [visible(result) for result in alone]
    assert len({tuple(result.token_ids) for result in alone}) == 3
    with model.engine() as engine:
        again = engine.requests.prepare(prompt, SAMPLED, num_answers=3)
    assert [one.sampler_state.seed for one in again] == seeds


def test_a_preempted_sequence_has_the_answer_it_has_alone(model: Model) -> None:
    """There are blocks for 160 positions, and five answers need 48 each."""
    prompts = [model.prompt(seed, 10) for seed in range(5)]
    params = [GREEDY, SAMPLED, GREEDY, SAMPLED, GREEDY]
    for reuse in (False, True):
        with model.engine(context=160, prefix_reuse=reuse) as engine:
            results = engine.generate_batch(prompts, params)
            facts = engine.facts()
        assert facts.num_preempted > 0
        assert facts.kv_blocks_held == 0
        for prompt, result, own in zip(prompts, results, params, strict=True):
            assert visible(result) == model.alone(prompt, own)


def test_no_prefix_is_found_across_tenants(model: Model) -> None:
    prompt = model.prompt(1, 300)
    with model.engine() as engine:
        found = []
        for tenant in ("a", "b", "a"):
            one = engine.submit(prompt, GREEDY, tenant=tenant)
            run(engine, one)
            found.append(cached(one.result))
        engine.forget("a")
        one = engine.submit(prompt, GREEDY, tenant="a")
        run(engine, one)
    assert found == [0, 0, 288]
    assert cached(one.result) == 0


def test_answers_are_the_same_while_others_come_and_go(model: Model) -> None:
    prompts = [model.prompt(seed, length) for seed, length in ((1, 70), (2, 130), (1, 60), (4, 9), (1, 70))]
    with model.engine(context=320, chunk_tokens=16, max_sequences=3) as engine:
        sequences = []
        for prompt in prompts:
            sequences.append(engine.submit(prompt, GREEDY))
            noise = engine.submit([*prompt[:50], 7], GREEDY)
            for _ in range(3):
                engine.step()
            engine.cancel(noise)
        run(engine, *sequences)
        assert engine.facts().kv_blocks_held == 0
    for prompt, one in zip(prompts, sequences, strict=True):
        assert visible(one.result) == model.alone(prompt)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_next_process_finds_a_prompt_in_files_and_answers_the_same(model: Model, tmp_path: Path) -> None:
    prompt = model.prompt(1, 300)
    with model.engine(kv_dir=tmp_path / "kv") as engine:
        first = engine.generate(prompt, GREEDY)
    with model.engine(kv_dir=tmp_path / "kv") as engine:
        second = engine.generate(prompt, GREEDY)
        num_run = engine.facts().tokens_run
    assert cached(second) == 288
    assert num_run == 300 - 288 + NUM_NEW - 1
    assert visible(first) == visible(second) == model.alone(prompt)


@pytest.mark.parametrize(("less_bytes", "num_found"), [(0, 288), (1, 0)])
def test_a_prompt_that_takes_more_than_half_of_the_room_for_files_is_not_written(
    directories: dict[str, Path], tmp_path: Path, less_bytes: int, num_found: int
) -> None:
    model = Model("latent", directories["latent"])
    prompt = model.prompt(1, 300)
    with model.engine(kv_dir=tmp_path / "sizes") as engine:
        assert engine._started.cache._files is not None
        file_bytes = engine._started.cache._files.file_bytes("kv")
    room = KvDir(path=tmp_path / "kv", max_bytes=2 * (300 // KV_BLOCK_TOKENS) * file_bytes - less_bytes)
    for expected in (0, num_found):
        with model.engine(kv_dir=room) as engine:
            assert cached(engine.generate(prompt, GREEDY)) == expected


@pytest.mark.parametrize(
    "model", few_of([name for name in CONFIGS if name != "chunks"], ("attention", "delta")), indirect=True
)
def test_another_model_kv_type_instruction_set_or_tenant_finds_nothing_in_files(
    model: Model, tmp_path: Path
) -> None:
    prompt = model.prompt(1, 300)
    directory = KvDir(path=tmp_path)
    with model.engine(kv_dir=directory) as engine:
        engine.generate(prompt, GREEDY)
    for kv_dtype in ("f16", "q8"):
        with model.engine(kv_dir=directory, kv_dtype=kv_dtype) as engine:
            first = engine.generate(prompt, GREEDY)
            assert cached(first) == 0
        with model.engine(kv_dir=directory, kv_dtype=kv_dtype) as engine:
            again = engine.generate(prompt, GREEDY)
            assert cached(again) > 0
            assert visible(again) == visible(first)
    if _native.instruction_sets() != ["plain"]:
        with model.engine(kv_dir=directory, instruction_set="plain") as engine:
            assert cached(engine.generate(prompt, GREEDY)) == 0
    with model.engine(kv_dir=directory) as engine:
        one = engine.submit(prompt, GREEDY, tenant="other")
        run(engine, one)
        assert cached(one.result) == 0
    weights = next(model.directory.glob("*.safetensors"))
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    try:
        with model.engine(kv_dir=directory) as engine:
            assert cached(engine.generate(prompt, GREEDY)) == 0
    finally:
        os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", ["kv", "state"])
@pytest.mark.parametrize("what", ["flip", "cut", "another's", "missing"])
def test_a_damaged_file_is_not_trusted_and_its_prompt_is_recomputed_and_rewritten(
    model: Model, tmp_path: Path, what: str, kind: str
) -> None:
    prompt = model.prompt(1, 300)
    with model.engine(kv_dir=tmp_path) as engine:
        engine.generate(prompt, GREEDY)
    files = sorted(tmp_path.glob(f"*/*.{kind}"))
    if kind == "state":
        if model.mixer not in RECURRENT:
            assert files == []
            return
        files *= 2
    else:
        assert len(files) == 18
    victim = files[1]
    data = bytearray(victim.read_bytes())
    if what == "flip":
        data[-100] ^= 1
        victim.write_bytes(data)
    elif what == "cut":
        victim.write_bytes(data[:-1])
    elif what == "another's":
        victim.write_bytes(
            next(tmp_path.glob("*/*.kv")).read_bytes()[::-1] if kind == "state" else files[0].read_bytes()
        )
    else:
        victim.unlink()
    for is_whole in (False, True):
        with model.engine(kv_dir=tmp_path) as engine:
            result = engine.generate(prompt, GREEDY)
        assert (cached(result) == 288) == is_whole
        assert visible(result) == model.alone(prompt)


@pytest.mark.parametrize("kind", ["kv", "state"])
def test_a_file_that_cannot_be_read_costs_only_the_reuse(
    model: Model, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.prompt(1, 300)
    with model.engine(kv_dir=tmp_path) as engine:
        engine.generate(prompt, GREEDY)
    read_one, num_failed = prefix_files._read_into, 0

    def fail(root: Directory, path: Path, size: int, buffer: Any) -> bool:
        nonlocal num_failed
        if path.suffix != f".{kind}":
            return read_one(root, path, size, buffer)
        num_failed += 1
        if num_failed > 100:
            raise AssertionError("the same files are read again and again")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(prefix_files, "_read_into", fail)
    with model.engine(kv_dir=tmp_path) as engine:
        result = engine.generate(prompt, GREEDY)
    assert (num_failed > 0) == (kind == "kv" or model.mixer in RECURRENT)
    assert cached(result) == (0 if num_failed else 288)
    assert visible(result) == model.alone(prompt)


def test_buffers_for_states_and_blocks_in_files_are_in_the_memory_plan(model: Model, tmp_path: Path) -> None:
    # So many sequences that layers with a window have as many blocks as the others, as they do with files.
    with model.engine(max_sequences=32) as without, model.engine(max_sequences=32, kv_dir=tmp_path) as engine:
        assert engine._started.cache._files is not None
        held = len(engine._started.cache._files._reading) + 3 * len(
            engine._started.cache._files._writable.get()
        )
        assert engine.plan.working_bytes - without.plan.working_bytes == held
