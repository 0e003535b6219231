"""What happens before the first token: reads begin early, and nothing stays behind when the start fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from argosy import Engine, _native
from argosy.errors import CheckpointError, DoesNotFit
from argosy.model.families import open_model
from argosy.model.weights import DenseReading, load_dense
from argosy.prompt.tokenizer import Tokenizer
from tests.models.tiny import qwen3_moe, write_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", qwen3_moe(), seed=3)
    return tmp_path / "model"


def test_dense_weights_are_on_their_way_while_the_tokenizer_is_built(
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
    with Engine(directory, memory="1GiB", threads=1):
        assert order == ["start", "tokenizer", "finish"]


def test_a_tokenizer_that_cannot_be_read_ends_the_reads(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "tokenizer.json").write_text("{}")
    pending: list[int] = []
    cancel = DenseReading.cancel

    def noted(reading: DenseReading) -> None:
        cancel(reading)
        pending.append(0 if reading._steps.gi_frame is None else 1)

    monkeypatch.setattr(DenseReading, "cancel", noted)
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Engine(directory, memory="1GiB", threads=1)
    assert pending == [0]


def test_a_budget_that_is_too_small_reads_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a read began")

    monkeypatch.setattr(DenseReading, "__init__", refuse)
    with pytest.raises(DoesNotFit, match=r"the budget is 1\.0 MiB"):
        Engine(directory, memory="1MiB", threads=1)


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
