"""Towers are found in a checkpoint's files, read with the engine's readers, and refused by name."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.safetensors import open_tensors
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.media.parts import Kind
from argosy.model.encoders.reading import EncoderFiles, Encoders, find_encoders
from argosy.model.encoders.table import ENCODERS
from tests.model.encoders.open_tower import PARTS, finish
from tests.model.encoders.test_towers import encode
from tests.model.encoders.test_towers import open_tower as open_reference
from tests.models.mlx_models import MLX_TOWERS
from tests.models.safetensors_file import read_safetensors, write_safetensors
from tests.models.tiny_encoders import REFERENCE
from tests.native import _native_testing

PLACES: list[tuple[str, str, Kind]] = [
    ("qwen3_vl_moe", "qwen3_vl_moe", "picture"),
    ("qwen3_5_moe", "qwen3_5_moe", "picture"),
    ("qwen3_omni_moe", "qwen3_omni_moe", "picture"),
    ("qwen3_omni_moe_audio", "qwen3_omni_moe", "sound"),
    ("glm4v_moe", "glm4v_moe", "picture"),
    ("glm5_next", "glm5_next", "picture"),
    ("minimax_m3_vl", "minimax_m3_vl", "picture"),
    ("kimi_k25", "kimi_k25", "picture"),
    ("kimi_k3", "kimi_k3", "picture"),
    ("deepseek_v4", "deepseek_v4", "picture"),
    ("deepseek_v41", "deepseek_v41", "picture"),
    ("gemma4", "gemma4", "picture"),
    ("llama4", "llama4", "picture"),
    ("mistral3", "mistral3", "picture"),
    ("internvl", "internvl", "picture"),
    ("step3p7", "step3p7", "picture"),
    ("qwen2_moe", "qwen2_moe", "picture"),
    ("qwen2_moe_audio", "qwen2_moe", "sound"),
]


def model_files(directory: Path) -> ModelFiles:
    """A model whose text part is left out."""
    raw = json.loads((directory / "config.json").read_text())
    inner = raw.get("thinker_config", raw)
    config: Any = SimpleNamespace(
        family=raw["model_type"],
        vocab_size=64,
        hidden_size=inner.get("text_config", inner)["hidden_size"],
        latent=None,
        norm_eps=inner.get("text_config", inner).get("rms_norm_eps"),
    )
    config.num_heads = 1
    return ModelFiles(directory, config, {}, {}, others=open_tensors(directory))


def held(num_reads: int) -> _native_testing.FaultyFileSystem:
    """Files whose first reads end when they are released."""
    return _native_testing.FaultyFileSystem(1, "hold", num_faults=num_reads)


@contextmanager
def opened(directory: Path, file_system: _native.FileSystem | None = None) -> Iterator[Encoders]:
    files = {
        kind: found
        for kind, found in find_encoders(model_files(directory)).items()
        if isinstance(found, EncoderFiles)
    }
    store = _native.Store(1, file_system)
    try:
        yield Encoders(files, store, _native.Runtime(1), open_file=store.open)
    finally:
        store.close()


def test_every_tower_of_the_table_is_tested() -> None:
    assert {(family, one.kind) for family, encoders in ENCODERS.items() for one in encoders} == {
        *((family, kind) for _, family, kind in PLACES),
        ("kimi_vl", "picture"),
        ("mistral4", "picture"),
        ("ministral3", "picture"),
        ("internvl_chat", "picture"),
        ("deepseek_ocr2", "picture"),  # in whole models
        ("deepseek_vl_v2", "picture"),
        ("qwen4_exp", "picture"),
    }


def test_kimi_vl_has_the_tower_of_kimi_k25_under_other_names(tmp_path: Path) -> None:
    _, config, reference = open_reference("kimi_k25", is_exact=False)
    shutil.copytree(REFERENCE / "kimi_k25", tmp_path, dirs_exist_ok=True)
    names = (
        ("model.", ""),
        ("mm_projector", "multi_modal_projector"),
        ("proj.0", "linear_1"),
        ("proj.2", "linear_2"),
    )
    values = {}
    for name, value in read_safetensors(REFERENCE / "kimi_k25" / "model.safetensors").items():
        renamed = reduce(lambda found, pair: found.replace(*pair), names, name)
        values[renamed] = "BF16", value
    write_safetensors(tmp_path / "model.safetensors", values)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "kimi_vl"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with opened(tmp_path) as encoders:
        assert encoders.files["picture"].config == config
        tower = finish(encoders.open("picture"))
        expected, found = encode("kimi_k25", reference, 0), encode("kimi_k25", tower, 0)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        assert encoders.files["picture"].video is None


@pytest.mark.parametrize(("name", "family", "kind"), PLACES)
def test_a_tower_read_from_its_files_gives_the_same_rows(name: str, family: str, kind: Kind) -> None:
    _, config, reference = open_reference(name, is_exact=False)
    with opened(REFERENCE / name) as encoders:
        assert encoders.files[kind].encoder is next(one for one in ENCODERS[family] if one.kind == kind)
        assert encoders.files[kind].config == config
        assert PARTS[name].prefix == encoders.files[kind].encoder.prefix
        tower = finish(encoders.open(kind))
        assert finish(encoders.open(kind)) is tower
        expected, found = encode(name, reference, 0), encode(name, tower, 0)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        assert found.additions.keys() == expected.additions.keys()
        encoders.drop()
        assert finish(encoders.open(kind)) is not tower


def as_mlx_vlm_writes(tmp_path: Path, name: str) -> Path:
    """A copy of a reference with the names and axes of mlx-vlm (`make_mlx_towers.py`)."""
    shutil.copytree(REFERENCE / name, tmp_path / name)
    values = read_safetensors(REFERENCE / name / "model.safetensors")
    turned = {}
    for hub, (theirs, shape) in json.loads(MLX_TOWERS.read_text())[name].items():
        value = values[hub] if list(values[hub].shape) == shape else np.moveaxis(values[hub], 1, -1)
        assert list(value.shape) == shape
        turned[theirs] = "BF16", value
    write_safetensors(tmp_path / name / "model.safetensors", turned)
    return tmp_path / name


# The demo's towers are not in mlx-vlm, and it keeps the names and axes of Llama-4's.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, family, kind in PLACES
        if family
        not in (
            *("qwen2_moe", "llama4", "internvl", "step3p7", "glm5_next", "minimax_m3_vl", "kimi_k3"),
            *("deepseek_v4", "deepseek_v41"),
        )
    ],
)
def test_a_tower_that_mlx_vlm_wrote_gives_the_same_rows(name: str, kind: Kind, tmp_path: Path) -> None:
    _, _, reference = open_reference(name, is_exact=False)
    with opened(as_mlx_vlm_writes(tmp_path, name)) as encoders:
        tower = finish(encoders.open(kind))
        expected, found = encode(name, reference, 0), encode(name, tower, 0)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)
        for layer, addition in expected.additions.items():
            np.testing.assert_array_equal(found.additions[layer], addition)


def test_a_quantised_tower_of_mlx_is_refused_with_the_reason(tmp_path: Path) -> None:
    directory = as_mlx_vlm_writes(tmp_path, "qwen3_vl_moe")
    values = read_safetensors(directory / "model.safetensors")
    tensors = {name: ("BF16", value) for name, value in values.items()}
    name = "vision_tower.blocks.0.mlp.linear_fc1"
    tensors[f"{name}.weight"] = "I32", np.zeros((40, 3), np.int32)
    tensors[f"{name}.scales"] = "BF16", np.zeros((40, 1), np.float32)
    write_safetensors(directory / "model.safetensors", tensors)
    found = find_encoders(model_files(directory))["picture"]
    assert isinstance(found, UnsupportedModel)
    assert f"{name}.weight is quantised (its scales are {name}.scales); supported: towers in F32" in str(
        found
    )


def test_whoever_opens_a_tower_shares_its_reads() -> None:
    drive = held(2)
    with opened(REFERENCE / "qwen3_vl_moe", drive) as encoders:
        first = encoders.open("picture")
        next(first)
        first.close()  # the request was cancelled; the reads continue
        second, third = encoders.open("picture"), encoders.open("picture")
        next(second)
        (reading,) = encoders._reading.values()
        next(third)
        assert list(encoders._reading.values()) == [reading]
        drive.release()
        assert finish(third) is finish(second)
        assert not encoders._reading


def test_a_tower_may_be_dropped_while_it_is_read() -> None:
    drive = held(1)
    with opened(REFERENCE / "qwen3_vl_moe", drive) as encoders:
        next(encoders.open("picture"))
        releasing = threading.Timer(0.05, drive.release)
        releasing.start()
        encoders.drop()
        releasing.join()
        assert encoders._store.pending() == 0
        assert finish(encoders.open("picture")) is not None


def test_a_slow_drive_keeps_nobody_waiting_for_a_tower() -> None:
    drive = held(1)
    with opened(REFERENCE / "qwen3_vl_moe", drive) as encoders:
        reading = encoders.open("picture")
        for _ in range(3):  # for one tensor
            next(reading)
        drive.release()
        assert finish(reading) is not None


def changed(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A copy of a reference whose vision_config has other values."""
    directory = tmp_path / name
    shutil.copytree(REFERENCE / name, directory)
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["vision_config"] |= changes
    path.write_text(json.dumps(raw))
    return directory


def test_a_tower_that_is_not_supported_is_named_and_keeps_nothing_else_from_running(tmp_path: Path) -> None:
    found = find_encoders(model_files(changed(tmp_path, "qwen3_vl_moe", hidden_act="relu6")))
    assert isinstance(found["picture"], UnsupportedModel)
    assert "vision_config asks for hidden_act 'relu6'" in str(found["picture"])


def test_a_tower_of_other_shapes_is_named(tmp_path: Path) -> None:
    found = find_encoders(model_files(changed(tmp_path, "qwen3_vl_moe", intermediate_size=11)))
    assert isinstance(found["picture"], CheckpointError)
    assert "linear_fc1.weight is" in str(found["picture"])


def test_a_placeholder_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    directory = changed(tmp_path, "qwen3_vl_moe")
    raw = json.loads((directory / "config.json").read_text()) | {"image_token_id": 64}
    (directory / "config.json").write_text(json.dumps(raw))
    found = find_encoders(model_files(directory))["picture"]
    assert isinstance(found, CheckpointError)
    assert "gives image_token_id as 64; the vocabulary has 64" in str(found)


def test_a_checkpoint_without_the_towers_tensors_has_none() -> None:
    files = model_files(REFERENCE / "qwen3_vl_moe")
    text_alone = ModelFiles(files.path, files.config, {}, {})
    assert find_encoders(text_alone) == {}
