"""A group's memory in the engine's process is planned, and small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.cluster.group import Group
from argosy.errors import UsageError
from argosy.model.families import open_model
from tests.cluster.rigs import CONFIG, GREEDY, MIB, PROMPT, open_engine, worker_thread
from tests.models.tiny import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory") / "model", CONFIG, seed=3)


def test_a_group_takes_less_than_64_mib_beside_kimi_k2() -> None:
    config = SimpleNamespace(
        hidden_size=7168,
        expert_hidden=7168,
        num_layers=61,
        num_experts=384,
        experts_per_token=8,
        moe_layers=tuple(range(1, 61)),
    )  # fmt: skip
    files: Any = SimpleNamespace(config=config, experts=range(60 * 384))
    with Group([f"10.0.0.{i}:7070" for i in range(8)], verify=0.01) as group:
        assert group.nbytes(files) < 64 * MIB


def test_the_engine_plans_what_its_group_takes(model: Path) -> None:
    with (
        worker_thread(model) as (address, _),
        Group([address]) as group,
        open_engine(model, group, expert_slots=6) as engine,
    ):
        assert engine.plan.claimed["group_bytes"] == group.nbytes(open_model(model)) > 0
        assert {label: nbytes for label, nbytes, _ in engine.plan.lines()}["group"] > 0
        engine.generate(PROMPT, GREEDY)
        assert group._exchange is not None
        assert group._exchange.buffer_bytes < engine.plan.claimed["group_bytes"]


def test_an_engine_that_runs_no_experts_keeps_no_cache_of_them(model: Path) -> None:
    with (
        worker_thread(model) as (address, _),
        Group([address], local=False) as group,
        open_engine(model, group) as engine,
    ):
        assert engine.plan.slots.own == CONFIG["num_experts_per_tok"]


def test_a_group_has_nothing_to_run_for_an_engine_without_experts(model: Path) -> None:
    with Group(["127.0.0.1:1"]) as group, pytest.raises(UsageError, match="runs without routed experts"):
        open_engine(model, group, experts_off=True)


def test_steps_are_no_longer_than_workers_take(model: Path) -> None:
    with (
        worker_thread(model) as (address, _),
        Group([address], local=False) as group,
        open_engine(model, group, chunk_tokens=1024) as engine,
    ):
        assert engine.plan.chunk_tokens + engine.settings.decode_tokens <= group.most_rows
    with Group(["127.0.0.1:1"]) as group, pytest.raises(UsageError, match="tokens may decode in a step"):
        open_engine(model, group, max_sequences=630)
