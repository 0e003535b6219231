"""Before the first token: reads begin early, and nothing is left behind when the start fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, _native
from argosy.budget.allowances import growth_bytes
from argosy.budget.requirements import TOKENIZER_ROOM_BYTES
from argosy.checkpoint.gguf import GgufFile
from argosy.errors import CheckpointError, DoesNotFit
from argosy.experts.cache import CachedRunner
from argosy.experts.files import ExpertFiles
from argosy.experts.resident import ResidentReading
from argosy.model.families import open_model
from argosy.model.weights import DenseReading, load_dense
from argosy.prompt.tokenizer import Tokenizer
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.tiny import qwen3_moe, write_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", qwen3_moe(), seed=3)
    return tmp_path / "model"


def test_dense_weights_are_being_read_while_the_tokenizer_is_built(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    start, build, finish = DenseReading.__init__, Tokenizer.open, DenseReading.finish

    def note(name: str, call: object) -> object:
        def noted(*args: object, **kwargs: object) -> object:
            order.append(name)
            return call(*args, **kwargs)  # type: ignore[operator]

        return noted

    monkeypatch.setattr(DenseReading, "__init__", note("start", start))
    monkeypatch.setattr(Tokenizer, "open", staticmethod(note("tokenizer", build)))
    monkeypatch.setattr(DenseReading, "finish", note("finish", finish))
    with Engine.open(directory, memory="2GiB", threads=1):
        assert order == ["start", "tokenizer", "finish"]


def test_a_tokenizer_that_cannot_be_read_ends_the_reads(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "tokenizer.json").write_text("{}")
    pending: list[int] = []
    cancel = DenseReading.cancel

    def noted(reading: DenseReading) -> None:
        cancel(reading)
        pending.append(len(reading._in_flight))

    monkeypatch.setattr(DenseReading, "cancel", noted)
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Engine.open(directory, memory="2GiB", threads=1)
    assert pending == [0]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which came first: the tokenizer, or the reading of all experts."""
    order: list[str] = []
    start, build = ResidentReading.__init__, Tokenizer.open

    def started(reading: ResidentReading, store: _native.Store, files: ExpertFiles) -> None:
        order.append("experts")
        start(reading, store, files)

    def built(path: Path, header: GgufFile | None) -> Tokenizer | None:
        order.append("tokenizer")
        return build(path, header)

    monkeypatch.setattr(ResidentReading, "__init__", started)
    monkeypatch.setattr(Tokenizer, "open", staticmethod(built))
    return order


def test_experts_are_read_early_only_if_they_fit_with_room_to_spare(
    directory: Path, order: list[str]
) -> None:
    with Engine.open(directory, memory="2GiB", threads=1) as engine:
        assert order == ["experts", "tokenizer"]
        needed, expected = engine.plan.total_bytes, engine.logits([1, 2, 3]).tolist()
    order.clear()
    with Engine.open(directory, memory=needed + TOKENIZER_ROOM_BYTES // 2, threads=1) as engine:
        assert order == ["tokenizer", "experts"]
        assert engine.plan.slots.is_resident
        assert engine.logits([1, 2, 3]).tolist() == expected
    order.clear()
    with Engine.open(
        directory, memory="2GiB", threads=1, expert_slots=engine.config.experts_per_token
    ) as engine:
        assert order == ["tokenizer"]
        assert engine.logits([1, 2, 3]).tolist() == expected


def test_experts_read_early_make_way_for_an_unexpectedly_large_tokenizer(
    directory: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"memory": "2GiB", "threads": 1, "context": 64, "chunk_tokens": 16}
    with Engine.open(directory, **settings) as engine:
        plan, expected = engine.plan, engine.logits([1, 2, 3]).tolist()
        assert engine._started.model.experts is not None
        assert engine._started.model.experts.resident is not None
        landed_bytes = engine._started.model.weights.nbytes + engine._started.model.experts.resident.nbytes
    # This leaves room for one token's experts, but not for all experts.
    growth = growth_bytes(engine.settings, plan.context_tokens, has_media=False)
    others = plan.total_bytes - plan.expert_bytes - plan.process_bytes + growth
    held = plan.budget_bytes - others - engine.config.experts_per_token * plan.slots.slot_bytes
    monkeypatch.setattr("argosy.engine.start.process_bytes", lambda tokenizer: held + landed_bytes)
    order.clear()
    with Engine.open(directory, **settings) as engine:
        assert order == ["experts", "tokenizer"]
        assert isinstance(engine._started.model.experts, CachedRunner)
        assert engine.plan.slots.own == engine.config.experts_per_token
        assert engine.logits([1, 2, 3]).tolist() == expected


def test_a_budget_that_is_too_small_reads_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a read began")

    monkeypatch.setattr(DenseReading, "__init__", refuse)
    monkeypatch.setattr(ResidentReading, "__init__", refuse)
    with pytest.raises(DoesNotFit, match=r"the budget is 1\.0 MiB"):
        Engine.open(directory, memory="1MiB", threads=1)


def test_reads_that_are_cancelled_leave_none_pending(directory: Path) -> None:
    files = open_model(directory)
    store = _native.Store(1)
    try:
        reading = DenseReading(store, files.dense, open_file=store.open)
        reading.cancel()
        assert store.pending() == 0
        weights = load_dense(store, files.dense, open_file=store.open)
        assert weights.nbytes >= sum(vector.nbytes for vector in weights.vectors.values())
        assert store.pending() == 0
    finally:
        store.close()


def test_the_budget_that_a_refusal_names_works_where_readers_transcode(tmp_path: Path) -> None:
    # The buffers of the first reads are already in the plan, and must not also count as the process's own memory.
    config = qwen3_moe(vocab_size=32768, hidden_size=256, moe_intermediate_size=32)
    write_gguf_model(tmp_path / "model.gguf", config, one_type("Q8_0"), seed=3)
    start = (
        "import sys\n"
        "from argosy import Engine\n"
        "from argosy.errors import DoesNotFit\n"
        "try:\n"
        "    Engine.open(sys.argv[1], memory=sys.argv[2], threads=1).close()\n"
        "except DoesNotFit as error:\n"
        "    print(error.hint)\n"
    )

    def hint_of(memory: str) -> str:
        command = [sys.executable, "-c", start, str(tmp_path / "model.gguf"), memory]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    named = re.search(r"--memory (\d+MiB)", hint_of("20MiB"))
    assert named is not None
    assert hint_of(named[1]) == ""
