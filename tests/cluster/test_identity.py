"""The hosts of experts change how fast a token comes, never which token: compared with one machine, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint.pack import pack
from argosy.cluster import runner as runner_module
from argosy.cluster.group import Group
from argosy.experts.cache import ExpertCache
from argosy.model.families import open_model
from tests.cluster.rigs import (
    BLOCKS,
    CONFIG,
    DRIVE,
    GPT_OSS,
    GREEDY,
    PROMPT,
    SEEDED,
    answers,
    open_engine,
    visible,
    worker_thread,
)
from tests.models.gguf_models import mixed, write_gguf_model
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_kda import bailing_hybrid
from tests.models.tiny_latent import deepseek_v3
from tests.models.tiny_llama4 import llama4_text
from tests.models.tiny_mamba import nemotron_h, nemotron_h_puzzle

DEEPSEEK = deepseek_v3(max_position_embeddings=1024, n_routed_experts=12)  # a dense layer first
# Experts whose arithmetic differs: latent ones without a gate, of several widths; limits by layer; weighted inputs.
ARITHMETIC = {
    "latent": nemotron_h(max_position_embeddings=1024, moe_latent_size=12),
    "widths": nemotron_h_puzzle(max_position_embeddings=1024),
    "limits": bailing_hybrid(max_position_embeddings=1024, expert_swiglu_limit_list=[0.0, 0.2, 0.0, 0.1]),
    "weighted inputs": llama4_text(max_position_embeddings=1024, num_local_experts=9),
}
FORMATS: dict[str, RawConfig] = {
    "bf16": CONFIG, "q8": CONFIG, "q4": CONFIG, "mxfp4 with biases": GPT_OSS, "gguf": BLOCKS, "deepseek": DEEPSEEK,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cluster")
    found = {"bf16": write_model(root / "bf16", CONFIG, seed=3)}
    for format in ("q8", "q4"):
        found[format] = root / format
        pack(open_model(found["bf16"]), found[format], format=format)
    write_mxfp4_model(root / "mxfp4", GPT_OSS, seed=3)
    found["mxfp4 with biases"] = root / "mxfp4"
    found["gguf"] = root / "model.gguf"
    write_gguf_model(found["gguf"], BLOCKS, seed=3, type_of=mixed)
    found["deepseek"] = write_model(root / "deepseek", DEEPSEEK, seed=3)
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", ARITHMETIC)
def test_workers_compute_what_experts_of_a_family_compute(name: str, tmp_path: Path) -> None:
    config = ARITHMETIC[name]
    model, prompt = (
        runnable(write_model(tmp_path / "model", config, seed=3), tmp_path),
        prompt_ids(config, 5, 37),
    )
    with open_engine(model) as engine:
        expected = answers(engine, prompt)
    with (
        worker_thread(model, num_slots=4) as (address, _),
        Group([address], local=False) as group,
        open_engine(model, group) as engine,
    ):
        assert answers(engine, prompt) == expected
        assert sum(one["experts_run"] for one in group.status()) == engine.ledger.lookups > 0


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, list[tuple[Any, ...]]]:
    """The answers of one machine."""
    found = {}
    for format, config in FORMATS.items():
        with open_engine(models[format]) as engine:
            found[format] = answers(engine, prompt_ids(config, 5, 37))
    return found


@pytest.fixture(scope="module")
def workers(models: dict[str, Path]) -> Iterator[list[str]]:
    """Four workers of the same model with different budgets, the smallest for two experts more than a token needs."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(worker_thread(models["q8"], num_slots=slots, most_coordinators=8))[0]
            for slots in (6, 12, 18, 24)
        ]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_any_number_of_workers_changes_nothing(
    num_workers: int, replicas: int, models: dict[str, Path], workers: list[str], alone: dict[str, Any]
) -> None:
    with (
        Group(workers[:num_workers], replicas=replicas, local=False) as group,
        open_engine(models["q8"], group) as engine,
    ):
        assert answers(engine) == alone["q8"]
        status = group.status()
        num_owned = len(open_model(models["q8"]).experts) * min(replicas, num_workers)
        assert sum(one["experts_owned"] for one in status) == num_owned
        assert sum(one["experts_run"] for one in status) == engine.ledger.lookups


@pytest.mark.parametrize("slots", [4, 20])
def test_experts_of_this_machine_take_part_and_change_nothing(
    slots: int, models: dict[str, Path], workers: list[str], alone: dict[str, Any]
) -> None:
    with (
        Group(workers[:2], disk_bytes_per_s=DRIVE) as group,
        open_engine(models["q8"], group, expert_slots=slots) as engine,
    ):
        assert answers(engine) == alone["q8"]
        remote = sum(one["experts_run"] for one in group.status())
        assert 0 < remote < engine.ledger.lookups


@pytest.mark.parametrize(
    ("options", "local", "python_begins"),
    [({}, False, False), ({}, True, False), ({"expert_slots": 12}, True, True)],
    ids=["none here", "all here", "a cache here"],
)
def test_python_begins_a_layer_only_if_this_machine_reads_experts(
    options: dict[str, int],
    local: bool,
    python_begins: bool,
    models: dict[str, Path],
    workers: list[str],
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = []
    begin = runner_module._Round.begin
    monkeypatch.setattr(runner_module._Round, "begin", lambda self: (begun.append(1), begin(self)))
    with (
        Group(workers[1:3], disk_bytes_per_s=DRIVE, local=local) as group,
        open_engine(models["q8"], group, **options) as engine,
    ):
        assert answers(engine) == alone["q8"]
        remote = sum(one["experts_run"] for one in group.status())
        assert remote == engine.ledger.lookups if not local else 0 < remote < engine.ledger.lookups
    assert bool(begun) == python_begins


def test_workers_are_told_what_the_next_layer_may_ask_for(
    models: dict[str, Path], workers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(ExpertCache, "wants_guess", lambda self, is_sweep: True)
    monkeypatch.setattr(
        ExpertCache,
        "guess",
        lambda self, layer, by_rank, is_sweep: guessed.append((layer, {e for rank in by_rank for e in rank})),
    )
    with Group(workers[2:], local=False) as group, open_engine(models["q8"], group) as engine:
        engine.generate(PROMPT, GREEDY)
    assert {layer for layer, _ in guessed} == set(open_model(models["q8"]).config.moe_layers[1:])
    assert all(experts for _, experts in guessed)


EVEN_SHARDS = sum(1 << shard for shard in range(0, 64, 2))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_of_experts_gives_the_same_bits(
    format: str, models: dict[str, Path], alone: dict[str, Any]
) -> None:
    """One worker reads half of the experts as they are asked for, the other has its half in memory."""
    with (
        worker_thread(models[format], shards=EVEN_SHARDS, num_slots=8) as (first, cached),
        worker_thread(models[format], shards=EVEN_SHARDS << 1) as (second, resident),
        Group([first, second], local=False) as group,
        open_engine(models[format], group, chunk_tokens=16) as engine,
    ):
        assert resident.runner.resident is not None
        assert cached.runner.resident is None
        assert answers(engine, prompt_ids(FORMATS[format], 5, 37)) == alone[format]
        shares = [worker.plan.num_experts for worker in (cached, resident)]
        assert sum(shares) == len(open_model(models[format]).experts)
        assert [one["experts_owned"] for one in group.status()] == shares


def test_several_answers_at_once_change_nothing(
    models: dict[str, Path], workers: list[str], alone: dict[str, Any]
) -> None:
    others = [prompt_ids(CONFIG, seed, 5 + 9 * seed) for seed in range(3)]
    with (
        Group(workers[:3], disk_bytes_per_s=DRIVE) as group,
        open_engine(models["q8"], group, expert_slots=12, chunk_tokens=16) as engine,
    ):
        prompts = [PROMPT, PROMPT, *others]
        found = engine.generate_batch(prompts, [GREEDY, SEEDED, GREEDY, GREEDY, GREEDY])
    assert [visible(result) for result in found[:2]] == alone["q8"]
