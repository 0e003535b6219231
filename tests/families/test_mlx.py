"""MLX's settings are read strictly, and checked against the tensors; a file that lies is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint.safetensors import TensorRef
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading import mlx
from argosy.model.reading.mlx_quantization import scheme_of_tensors
from argosy.model.reading.quantization import read_quantization
from tests.models.mlx_models import DIRECTORY
from tests.models.rows import rows
from tests.models.safetensors_file import edit_header

Q, K, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm_head"
Settings = dict[str, Any]


def test_every_family_has_its_changes_in_the_table() -> None:
    without = {name for name, row in rows().items() if row.without_mlx}
    assert not without & mlx.FAMILIES
    assert {family.MODEL_TYPE for family in FAMILIES.values()} == mlx.FAMILIES | without


def copied(tmp_path: Path, **settings: Any) -> Path:
    """A copy of a checkpoint, with other settings; Q's, K's and HEAD's under `q`, `k` and `head`, None removes them."""
    directory = tmp_path / "model"
    shutil.copytree(DIRECTORY / "qwen3_moe_affine", directory)
    raw = json.loads((directory / "config.json").read_text())
    quantization = raw["quantization"]
    for key, value in settings.items():
        path = {"q": Q, "k": K, "head": HEAD}.get(key, key)
        if value is None:
            del quantization[path]
        else:
            quantization[path] = value
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    return directory


def formats_of(directory: Path) -> dict[str, str]:
    dense = open_model(directory).dense
    return {name: dense[name].format for name in ("layers.0.q", "layers.0.k", "head")}


FORMATS = {"layers.0.q": "affine5_128_bf16", "layers.0.k": "bf16", "head": "affine8_32_bf16"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q": None},  # its tensors tell
        {"bits": 8, "group_size": 128},  # the settings of most modules
        {"mode": "mxfp4", "group_size": 32},
        {"q": True},
        {"k": False},
        {"vision_tower.blocks.0.attn": {"bits": 4, "group_size": 64}, "model.layers.99.x": False},
        {"head": {"bits": 8, "group_size": 32, "mode": "affine"}},
    ],
)
def test_tensors_tell_what_the_settings_of_a_module_leave_open(settings: Settings, tmp_path: Path) -> None:
    assert formats_of(copied(tmp_path, **settings)) == FORMATS


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"q": {"bits": 4, "group_size": 128}}, f"{Q}.weight is [128, 20], expected [128, 16]"),
        ({"q": {"bits": 5, "group_size": 32}}, f"{Q}.scales is [128, 1], expected [128, 4]"),
        ({"q": {"mode": "mxfp8"}}, f"{Q}.weight is [128, 20], expected [128, 32]"),
        ({"head": {"mode": "mxfp8"}}, f"{HEAD}.scales is BF16; supported: U8"),
        ({"head": {}}, f"{HEAD}.weight is [48, 32], expected [48, 16]"),  # 4 bits in groups of 64
        ({"q": False}, f"{Q}.weight is U32, the codes of a quantised weight, but the quantization of config.json"),
        ({"q": {"bits": 7}}, f"quantization.{Q}.bits 7; supported: 2, 3, 4, 5, 6, 8"),
        ({"q": {"bits": 0}}, f"quantization.{Q}.bits 0; supported"),
        ({"q": {"bits": True}}, f"quantization.{Q}.bits true; supported"),
        ({"q": {"group_size": 48}}, f"quantization.{Q}.group_size 48; supported: 32, 64, 128"),
        ({"q": {"mode": "nf4"}}, f"quantization.{Q}.mode 'nf4'"),
        ({"q": {"mode": "nvfp4", "group_size": 32}}, f"quantization.{Q}.group_size 32; supported: 16"),
        ({"q": {"global_scale": True}}, f"quantization.{Q}.global_scale true"),
        ({"q": 4}, f"quantization.{Q} 4"),
        ({"quant_method": "mlx"}, "quantization.quant_method 'mlx'"),
        ({"mode": "affine2"}, "quantization.mode 'affine2'"),
        ({"group_size": -1}, "quantization.group_size -1"),
    ],
)  # fmt: skip
def test_settings_that_contradict_the_tensors_or_are_unknown_are_refused(
    settings: Settings, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgosyError) as error:
        open_model(copied(tmp_path, **settings))
    assert said in str(error.value)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    return edit


def reshaped(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[name]["shape"] = list(shape)

    return edit


def added(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for entry in header.values())
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    return edit


EXPERTS = "model.layers.0.mlp.switch_mlp.gate_proj"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (renamed(f"{K}.weight", f"{K}.other"), f"{K}.weight is missing"),
        (renamed(f"{HEAD}.biases", f"{HEAD}.bias2"), f"{HEAD}.biases is missing"),
        (renamed(f"{HEAD}.scales", f"{HEAD}.scales2"), f"{HEAD}.scales is missing"),
        (reshaped(f"{HEAD}.scales", 24, 8), f"{HEAD}.scales is [24, 8], expected [48, 4]"),
        (reshaped(f"{HEAD}.biases", 192), f"{HEAD}.biases is [192], expected [48, 4]"),
        (reshaped(f"{EXPERTS}.scales", 1, 64, 2), f"{EXPERTS}.scales is [1, 64, 2], expected [2, 32, 2]"),
        (added(f"{EXPERTS}.global_scale"), f"{EXPERTS}.global_scale [0]: a qwen3_moe model"),
    ],
)
def test_a_file_whose_tensors_do_not_belong_together_is_refused(
    edit: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    directory = copied(tmp_path)
    (directory / "model.safetensors.index.json").unlink()
    edit_header(directory / "model.safetensors", edit)
    with pytest.raises(ArgosyError) as error:
        open_model(directory)
    assert said in str(error.value)


def tensor(name: str, dtype: str, *shape: int) -> TensorRef:
    return TensorRef(name, Path("model.safetensors"), 0, 0, dtype, shape)


@pytest.mark.parametrize(
    ("codes", "scales", "cols", "scheme"),
    [
        ((8, 12), ("BF16", 8, 1), 128, "mlx-affine, 3 bits, symmetric, groups of 128"),
        ((2, 8, 16), ("F16", 2, 8, 2), 64, "mlx-affine, 8 bits, symmetric, groups of 32"),
        ((8, 4), ("U8", 8, 1), 32, "mlx-mxfp4, 4 bits, symmetric, groups of 32"),
        ((8, 4), ("U8", 8, 2), 32, "mlx-nvfp4, 4 bits, symmetric, groups of 16"),
        ((8, 8), ("U8", 8, 1), 32, "mlx-mxfp8, 8 bits, symmetric, groups of 32"),
        ((8, 8), ("U8", 8, 2), 32, None),
        ((8, 3), ("U8", 8, 1), 32, None),
        ((8, 7), ("BF16", 8, 1), 32, None),
        ((8, 1), ("BF16", 8, 1), 32, None),
        ((8, 5), ("BF16", 8, 1), 33, None),
        ((8, 4), ("BF16", 8, 3), 32, None),
        ((8, 4), ("BF16", 8, 0), 32, None),
        ((8, 4), ("BF16",), 32, None),
        ((8, 4), None, 32, None),
    ],
)
def test_shapes_tell_the_mode(
    codes: tuple[int, ...], scales: tuple[Any, ...] | None, cols: int, scheme: str | None
) -> None:
    found = None if scales is None else tensor("x.scales", *scales)
    if scheme is not None:
        assert str(scheme_of_tensors(tensor("x.weight", "U32", *codes), found, cols)) == scheme
        return
    with pytest.raises(CheckpointError, match=r"x\.weight .*(fits no mode|scales are missing)"):
        scheme_of_tensors(tensor("x.weight", "U32", *codes), found, cols)


def test_settings_are_found_where_programs_write_them_and_must_agree() -> None:
    given = {"group_size": 64, "bits": 4}
    for other in (None, given, {"quant_method": "fp8", "weight_block_size": [128, 128]}):
        found = read_quantization({"quantization": given, "quantization_config": other})
        assert found is not None
        assert found.method == "mlx"
    alone = read_quantization({"quantization_config": given})
    assert alone is not None
    assert alone.method == "mlx"
    inside = read_quantization({"text_config": {"quantization": given}})
    assert inside is not None
    assert inside.method == "mlx"
    with pytest.raises(
        CheckpointError, match="two different values of quantization, one of them in text_config"
    ):
        read_quantization({"quantization": given, "text_config": {"quantization": {"bits": 8}}})
    with pytest.raises(CheckpointError, match="quantization and quantization_config with different values"):
        read_quantization({"quantization": given, "quantization_config": {"group_size": 64, "bits": 8}})
    with pytest.raises(UnsupportedModel, match="quantization 4"):
        read_quantization({"quantization": 4})
