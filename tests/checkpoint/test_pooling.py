"""The pooling of embeddings, as the files of a checkpoint declare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint.pack import pack
from argosy.checkpoint.pooling import declared_pooling
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from tests.models import gguf_models
from tests.models.tiny import qwen3_moe, write_model

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pooling") / "model", qwen3_moe(), seed=1)


@pytest.fixture
def directory(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may add files to."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def declare(directory: Path, config: dict[str, Any], *modules: dict[str, Any]) -> None:
    (directory / "modules.json").write_text(json.dumps(modules or [TRANSFORMER, POOLING, NORMALIZE]))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))


def test_a_checkpoint_that_declares_nothing_has_no_pooling(directory: Path) -> None:
    assert declared_pooling(open_model(directory)) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "word_embedding_dimension": 32,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_cls_token": False,
            },
            "mean",
        ),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_sentence_transformers_files_are_read_and_kept_by_packs(
    directory: Path, tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    declare(directory, config)
    files = open_model(directory)
    assert declared_pooling(files) == expected
    pack(files, tmp_path / "pack", format="source")
    assert declared_pooling(open_model(tmp_path / "pack")) == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"pooling_mode_cls_token": True},
            "asks for pooling 'cls_token' of embeddings; supported: mean_tokens, lasttoken",
        ),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "'max_tokens and mean_tokens'"),
        ({"pooling_mode_mean_tokens": 1}, "asks for pooling 'none'"),
    ],
)
def test_another_pooling_is_refused_by_name_by_a_pack_too(
    directory: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    declare(directory, config)
    files = open_model(directory)
    with pytest.raises(UnsupportedModel, match=said):
        declared_pooling(files)
    pack(files, tmp_path / "pack", format="source")
    with pytest.raises(UnsupportedModel, match=said):
        declared_pooling(open_model(tmp_path / "pack"))


def test_a_layer_after_the_pooling_is_refused(directory: Path, tmp_path: Path) -> None:
    declare(directory, {"pooling_mode_mean_tokens": True}, TRANSFORMER, POOLING, DENSE)
    files = open_model(directory)
    with pytest.raises(UnsupportedModel, match="a module 'Dense' of embeddings"):
        declared_pooling(files)
    pack(files, tmp_path / "pack", format="source")
    with pytest.raises(UnsupportedModel, match="a module 'Dense'"):
        declared_pooling(open_model(tmp_path / "pack"))


def test_a_checkpoint_without_the_files_of_its_modules_is_packed_and_pooling_fails_as_before(
    directory: Path, tmp_path: Path
) -> None:
    declare(directory, {"pooling_mode_mean_tokens": True})
    (directory / POOLING["path"] / "config.json").unlink()
    pack(open_model(directory), tmp_path / "pack", format="source")
    for path in (directory, tmp_path / "pack"):
        with pytest.raises(CheckpointError, match=r"config\.json is missing"):
            declared_pooling(open_model(path))


@pytest.mark.parametrize("path", ["../other", "/etc", "a/b", "", 7, None])
def test_a_module_is_a_directory_of_the_checkpoint(directory: Path, path: object) -> None:
    declare(directory, {}, TRANSFORMER, {**POOLING, "path": path})
    with pytest.raises(CheckpointError, match="expected the name of a directory"):
        declared_pooling(open_model(directory))


@pytest.mark.parametrize("text", ["{}", "[1]", "[", '[{"type": 1, "type": 2}]'])
def test_a_damaged_list_of_modules_is_refused(directory: Path, text: str) -> None:
    (directory / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        declared_pooling(open_model(directory))


@pytest.mark.parametrize(
    ("number", "expected"), [(None, None), (0, None), (1, "mean"), (3, "last"), (2, "cls"), (4, "rank")]
)
def test_a_gguf_names_its_pooling_by_a_number(
    tmp_path: Path, number: int | None, expected: str | None
) -> None:
    path = tmp_path / "model.gguf"
    config = qwen3_moe(hidden_size=32, moe_intermediate_size=32)
    more = {} if number is None else {"qwen3moe.pooling_type": number}
    gguf_models.write_gguf_model(path, config, gguf_models.one_type("F32"), seed=1, metadata=more)
    files = open_model(path)
    if expected in ("cls", "rank"):
        with pytest.raises(UnsupportedModel, match=f"asks for pooling '{expected}'"):
            declared_pooling(files)
        return
    assert declared_pooling(files) == expected
    pack(files, tmp_path / "pack", format="source")
    assert declared_pooling(open_model(tmp_path / "pack")) == expected
