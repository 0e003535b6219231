"""The one adapter at a path is found by its content; several are an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from argosy.adapters.reading import open_adapter
from argosy.checkpoint.files import ModelFiles
from argosy.errors import ArgosyError
from argosy.model.families import open_model
from tests.adapters.adapter_files import pair, write_gguf_adapter, write_peft
from tests.models.gguf_models import write_gguf_model
from tests.models.tiny import qwen3_moe

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    path = tmp_path_factory.mktemp("base") / "model.gguf"
    write_gguf_model(path, qwen3_moe(), lambda _: "F32", seed=0)
    return open_model(path)


@pytest.fixture
def place(tmp_path: Path, base: ModelFiles) -> Path:
    """A PEFT directory with its GGUF copy."""
    ref = base.dense["layers.1.q"]
    both = pair(ref.rows, ref.cols)
    write_gguf_adapter(tmp_path / "x.gguf", {"blk.1.attn_q.weight": both}, architecture="qwen3moe")
    return write_peft(tmp_path, {Q: both})


def test_a_gguf_adapter_is_found_by_its_first_bytes(place: Path, base: ModelFiles) -> None:
    named = (place / "x.gguf").rename(place / "sha256-0123")
    assert open_adapter(named, base).kind == "gguf"


def test_the_copy_that_llama_cpp_s_converter_leaves_is_not_a_second_adapter(
    place: Path, base: ModelFiles
) -> None:
    assert open_adapter(place, base).kind == "peft"
    (place / "adapter_config.json").unlink()
    assert open_adapter(place, base).kind == "gguf"


def test_several_adapters_are_not_chosen_from(place: Path, base: ModelFiles) -> None:
    shutil.copy(place / "adapter_model.safetensors", place / "adapters.safetensors")
    with pytest.raises(
        ArgosyError, match=r"adapter_model\.safetensors of PEFT and adapters\.safetensors of mlx"
    ):
        open_adapter(place, base)
    (place / "adapter_config.json").unlink()
    shutil.copy(place / "x.gguf", place / "y.gguf")
    with pytest.raises(ArgosyError, match="holds 2 GGUF files"):
        open_adapter(place, base)


def test_no_adapter(place: Path, tmp_path: Path, base: ModelFiles) -> None:
    (place / "empty").mkdir()
    for path, sentence in (
        (place / "absent", "does not exist"),
        (place / "empty", "holds no adapter"),
        (place / "adapter_model.safetensors", "neither a directory nor a GGUF file"),
    ):
        with pytest.raises(ArgosyError, match=sentence):
            open_adapter(path, base)
    with pytest.raises(ArgosyError, match="holds no adapter"):
        open_adapter(place / "empty", base)


@pytest.mark.parametrize("zeros", ["01", "001", "１"])
def test_a_layer_has_one_spelling(zeros: str, tmp_path: Path, base: ModelFiles) -> None:
    ref = base.dense["layers.1.q"]
    path = write_peft(tmp_path, {Q.replace("1", zeros): pair(ref.rows, ref.cols)})
    with pytest.raises(ArgosyError, match="no matrix that an adapter may change"):
        open_adapter(path, base)
