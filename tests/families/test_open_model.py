"""Opening a directory as ModelFiles accounts for every tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.landing import check_vector
from argosy.checkpoint.safetensors import open_tensors
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading.layout import Layout, read_layout
from tests.checkpoint.raw_files import write_raw
from tests.models.configurations import CONFIGURATIONS, Configuration
from tests.models.rows import row_of
from tests.models.safetensors_file import Array, decode, read_checkpoint, write_checkpoint
from tests.models.tiny import (
    RawConfig,
    expert_names,
    glm4_moe,
    minimax_m2,
    mixtral,
    moe_layers,
    num_experts,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    random_tensors,
    text_of,
)
from tests.models.tiny import write_model as write_tiny_model

MAKERS = (mixtral, qwen2_moe, qwen3_moe, glm4_moe, olmoe, minimax_m2)
every_family = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)

DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
NUMPY = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


def write(
    directory: Path, config: RawConfig, change: Callable[[dict[str, Array]], None] | None = None
) -> Path:
    """Write a tiny model whose tensors `change` has modified."""
    tensors = random_tensors(config, 3, "BF16")
    if change is not None:
        change(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(directory, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(directory)
    return str(caught.value)


def stored(path: Path, offset: int, format: str, rows: int, cols: int) -> Array:
    """The values of a matrix, read from where ModelFiles locates it."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)[
        offset : offset + rows * cols * np.dtype(NUMPY[format]).itemsize
    ]
    return decode(DTYPE[format], raw.view(NUMPY[format])).reshape(rows, cols)


def expert_matrix(files: ModelFiles, layer: int, expert: int, name: str) -> Array:
    record = files.experts[layer, expert]
    matrix = getattr(record, name)
    piece = record.pieces[matrix.piece]
    assert matrix.offset + matrix.rows * matrix.cols * np.dtype(NUMPY[matrix.format]).itemsize <= piece.nbytes
    return stored(piece.path, piece.offset + matrix.offset, matrix.format, matrix.rows, matrix.cols)


def hub_names(config: RawConfig, layer: int, expert: int) -> tuple[str, str, str]:
    prefix = "language_model." if "text_config" in config else ""
    block, (gate, up, down) = expert_names(config, f"{prefix}model.layers.{layer}.")
    base = f"{block}experts.{expert}."
    return f"{base}{gate}.weight", f"{base}{up}.weight", f"{base}{down}.weight"


def is_another_part_s(name: str, config: RawConfig) -> bool:
    """Whether a tensor belongs to a vision tower or a multi-token prediction layer."""
    text, (first, *rest) = text_of(config), name.removeprefix("language_model.").split(".")
    is_mtp = rest[0] == "layers" and int(rest[1]) >= text["num_hidden_layers"]
    is_norm_of_dense = rest[2:3] == ["post_mlp_layernorm"] and int(rest[1]) not in moe_layers(config)
    is_norm_of_dense &= text["model_type"] == "axk1"
    return is_mtp or is_norm_of_dense or first in ("vision_tower", "mm_projector", "multi_modal_projector")


# Families that do not store one tensor per expert matrix have tests of their own.
SEPARATE = [one for one in CONFIGURATIONS if not row_of(one.config).has_own_experts]


@pytest.mark.parametrize("configuration", SEPARATE, ids=lambda configuration: configuration.name)
def test_every_tensor_is_located(tmp_path: Path, configuration: Configuration) -> None:
    config = configuration.config
    write_tiny_model(tmp_path, config, seed=1, dtype=configuration.dtype, num_shards=configuration.num_shards)
    tensors = read_checkpoint(tmp_path)

    files = open_model(tmp_path)

    for ref in files.dense.values():
        found = stored(ref.path, ref.offset, ref.format, ref.rows, ref.cols)
        assert np.array_equal(found.reshape(tensors[ref.name].shape), tensors[ref.name])
    assert files.experts.keys() == {(i, e) for i in moe_layers(config) for e in range(num_experts(config))}
    used = {ref.name for ref in files.dense.values()}
    for layer, expert in files.experts:
        names = hub_names(config, layer, expert)
        used |= set(names)
        for name, hub_name in zip(("gate", "up", "down"), names, strict=True):
            assert np.array_equal(expert_matrix(files, layer, expert, name), tensors[hub_name])
        assert len(files.experts[layer, expert].pieces) == 3
        assert all(piece.checksum is None for piece in files.experts[layer, expert].pieces)
    assert used == {name for name in tensors if not is_another_part_s(name, config)}
    assert files.dense_bytes + files.expert_bytes == sum(
        tensors[name].size * (4 if configuration.dtype == "F32" else 2) for name in used
    )
    assert not files.is_packed
    assert ("head" in files.dense) != text_of(config)["tie_word_embeddings"]


def test_tensors_get_their_canonical_names(tmp_path: Path) -> None:
    write(tmp_path, qwen2_moe(mlp_only_layers=[1]))

    names = {name: ref.name for name, ref in open_model(tmp_path).dense.items()}

    assert names["embed"] == "model.embed_tokens.weight"
    assert names["head"] == "lm_head.weight"
    assert names["final_norm"] == "model.norm.weight"
    assert names["layers.0.attn_norm"] == "model.layers.0.input_layernorm.weight"
    assert names["layers.0.mlp_norm"] == "model.layers.0.post_attention_layernorm.weight"
    assert names["layers.0.q"] == "model.layers.0.self_attn.q_proj.weight"
    assert names["layers.0.k_bias"] == "model.layers.0.self_attn.k_proj.bias"
    assert names["layers.0.router"] == "model.layers.0.mlp.gate.weight"
    assert names["layers.0.shared_up"] == "model.layers.0.mlp.shared_expert.up_proj.weight"
    assert names["layers.0.shared_score"] == "model.layers.0.mlp.shared_expert_gate.weight"
    assert names["layers.1.down"] == "model.layers.1.mlp.down_proj.weight"
    assert "layers.1.router" not in names


def fuse(config: RawConfig, tensors: dict[str, Array]) -> dict[str, Array]:
    """The layout that transformers 5 writes with `save_original_format=False`."""
    fused = {
        name.replace("block_sparse_moe.", "mlp."): t for name, t in tensors.items() if ".experts." not in name
    }
    for layer in moe_layers(config):
        triples = [
            [tensors[name] for name in hub_names(config, layer, expert)]
            for expert in range(num_experts(config))
        ]
        base = f"model.layers.{layer}.mlp.experts."
        fused[base + "gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in triples])
        fused[base + "down_proj"] = np.stack([down for _, _, down in triples])
    return fused


@every_family
def test_fused_experts_are_read_as_two_pieces(tmp_path: Path, make: Any) -> None:
    config = make()
    tensors = random_tensors(config, 3, "BF16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path, {name: ("BF16", tensor) for name, tensor in fuse(config, tensors).items()})

    files = open_model(tmp_path)

    for layer, expert in files.experts:
        assert len(files.experts[layer, expert].pieces) == 2
        for name, hub_name in zip(("gate", "up", "down"), hub_names(config, layer, expert), strict=True):
            assert np.array_equal(expert_matrix(files, layer, expert, name), tensors[hub_name])


def test_fused_experts_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    config = qwen3_moe()
    tensors = fuse(config, random_tensors(config, 3, "BF16"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = tensors[name].transpose(0, 2, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path, {name: ("BF16", tensor) for name, tensor in tensors.items()})

    assert refusal(tmp_path) == f"model.safetensors: {name} is [6, 32, 48], expected [6, 48, 32]"


@every_family
def test_a_missing_tensor_is_named(tmp_path: Path, make: Any) -> None:
    for name in ("model.layers.1.self_attn.k_proj.weight", hub_names(make(), 2, 5)[1], "model.norm.weight"):
        write(tmp_path, make(), lambda tensors, name=name: tensors.pop(name))

        assert re.fullmatch(
            rf"{re.escape(name)} is missing from the \d+ tensors in .*\nhint: .*", refusal(tmp_path)
        )


@every_family
def test_a_tensor_of_the_wrong_shape_is_refused_with_both_shapes(tmp_path: Path, make: Any) -> None:
    name = hub_names(make(), 1, 3)[2]

    def cut(tensors: dict[str, Array]) -> None:
        tensors[name] = tensors[name][:, :-1]

    write(tmp_path, make(), cut)

    rows, cols = random_tensors(make(), 3, "BF16")[name].shape
    assert (
        refusal(tmp_path) == f"model.safetensors: {name} is [{rows}, {cols - 1}], expected [{rows}, {cols}]"
    )


@every_family
def test_an_unexpected_tensor_is_refused(tmp_path: Path, make: Any) -> None:
    def add(tensors: dict[str, Array]) -> None:
        tensors["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
        tensors["model.layers.1.self_attn.sinks"] = np.zeros(4, np.float32)

    write(tmp_path, make(), add)

    assert refusal(tmp_path) == (
        f"model.safetensors: model.layers.0.self_attn.sinks [4] and 1 more: a {make()['model_type']} model with this "
        "config.json has no such tensor"
    )


def test_an_extra_layer_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(qwen3_moe(num_hidden_layers=4), 3, "BF16")
    write(tmp_path, qwen3_moe(), lambda kept: kept.update(tensors))
    assert "model.layers.3." in refusal(tmp_path)


def test_constants_from_old_exporters_are_ignored(tmp_path: Path) -> None:
    def add(tensors: dict[str, Array]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
        tensors["model.rotary_emb.inv_freq"] = np.zeros(5, np.float32)

    open_model(write(tmp_path, mixtral(), add))


def within(directory: Path, config: RawConfig, layout: Layout, model_config: ModelConfig) -> ModelFiles:
    """Open the text model of a larger checkpoint, in which its tensor names have the prefix `language_model.`."""
    tensors = {f"language_model.{name}": tensor for name, tensor in random_tensors(config, 3, "BF16").items()}
    tensors["vision_tower.patch.proj.weight"] = tensors["vision.weight"] = np.ones((2, 2), np.float32)
    write_checkpoint(directory, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    return read_layout(directory, model_config, (layout,), open_tensors(directory))


def test_a_text_model_may_have_a_prefix_and_ignored_neighbours(tmp_path: Path) -> None:
    config = FAMILIES["qwen3_moe"].parse_config(qwen3_moe())
    layout = replace(
        FAMILIES["qwen3_moe"].LAYOUTS[0],
        prefix="language_model.model.",
        head_name="language_model.lm_head.weight",
    )
    with pytest.raises(CheckpointError, match=r"vision_tower.patch.proj.weight \[2, 2\]"):
        within(tmp_path, qwen3_moe(), replace(layout, passed_over=r"vision\..*"), config)

    files = within(tmp_path, qwen3_moe(), replace(layout, passed_over=r"vision(_tower)?\..*"), config)

    assert files.dense["head"].name == "language_model.lm_head.weight"
    assert files.dense["layers.2.q"].name == "language_model.model.layers.2.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is missing"):
        within(tmp_path, qwen3_moe(), FAMILIES["qwen3_moe"].LAYOUTS[0], config)


def test_multi_token_prediction_layers_are_recognised_and_ignored(tmp_path: Path) -> None:
    write(tmp_path, qwen3_moe(num_hidden_layers=5))
    config = FAMILIES["qwen3_moe"].parse_config(qwen3_moe())
    layouts = FAMILIES["qwen3_moe"].LAYOUTS
    with pytest.raises(CheckpointError, match=r"model.layers.4.*and \d+ more"):
        read_layout(tmp_path, replace(config, num_mtp_layers=1), layouts, open_tensors(tmp_path))

    files = read_layout(tmp_path, replace(config, num_mtp_layers=2), layouts, open_tensors(tmp_path))

    assert files.config.num_layers == 3
    assert {layer for layer, _ in files.experts} == {0, 1, 2}


def test_a_head_in_the_files_overrides_tied_embeddings_in_the_config(tmp_path: Path) -> None:
    config = qwen3_moe(tie_word_embeddings=True)

    def add(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"] = np.ones((112, 32), np.float32)

    files = open_model(write(tmp_path, config, add))

    assert not files.config.is_embedding_tied
    assert files.dense["head"].name == "lm_head.weight"


def test_a_dtype_that_no_kernel_reads_is_refused(tmp_path: Path) -> None:
    config = mixtral()
    tensors: dict[str, tuple[str, Array]] = {
        name: ("BF16", tensor) for name, tensor in random_tensors(config, 3, "BF16").items()
    }
    tensors["model.norm.weight"] = ("I32", np.zeros(40, np.int32))
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path, tensors)

    with pytest.raises(UnsupportedModel, match=r"model.norm.weight is I32; supported: F32, F16, BF16"):
        open_model(tmp_path)


def test_float32_norms_with_bf16_are_fine_but_experts_need_one_format(tmp_path: Path) -> None:
    config = mixtral()
    tensors: dict[str, tuple[str, Array]] = {
        name: ("F32" if "norm" in name else "BF16", tensor)
        for name, tensor in random_tensors(config, 3, "BF16").items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path, tensors)
    assert open_model(tmp_path).dense["final_norm"].format == "f32"

    name = hub_names(config, 1, 2)[1]
    tensors[name] = ("F16", tensors[name][1])
    write_checkpoint(tmp_path, tensors)
    assert "up of expert 2 in layer 1 is f16, but expert 0 is bf16" in refusal(tmp_path)


# Directories and the small files


def test_a_directory_without_a_model_gives_an_error_with_the_expected_files(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no model: looked for argosy.json (a pack), for config.json with model.safetensors or "
        "model.safetensors.index.json, and for a .gguf file"
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert refusal(tmp_path).endswith(", found model.safetensors without config.json")


def test_a_config_without_weights_gives_an_error_with_the_expected_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(mixtral()))
    assert "holds no safetensors: looked for model.safetensors and model.safetensors.index.json" in refusal(
        tmp_path
    )

    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "found pytorch_model.bin, a format that can run code" in refusal(tmp_path)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == f"{tmp_path / 'gone'} does not exist"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is neither a .gguf file nor a directory with" in refusal(tmp_path / "model.safetensors")


def test_a_file_of_a_model_names_its_directory_and_any_other_file_does_not(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for hint in (None, f"try {tmp_path}"):
        with pytest.raises(CheckpointError) as refused:
            open_model(file)
        assert refused.value.hint == hint
        (tmp_path / "config.json").write_bytes(b"{}")


@pytest.mark.parametrize("model_type", ["phimoe", "jamba", None, 7, ["mixtral"]])
def test_an_unknown_family_is_refused_by_name(tmp_path: Path, model_type: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    with pytest.raises(
        UnsupportedModel, match=r"model_type '.*'; supported: qwen3, .*mixtral, qwen2_moe, qwen3_moe"
    ):
        open_model(tmp_path)


def test_generation_config_overrides_the_end_tokens(tmp_path: Path) -> None:
    write(tmp_path, qwen3_moe(eos_token_id=2))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5], "temperature": 0.6}))
    assert open_model(tmp_path).config.eos_ids == (7, 5)

    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert open_model(tmp_path).config.eos_ids == (2,)

    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    assert refusal(tmp_path).startswith("generation_config.json: eos_token_id is 'x', text")


def test_a_config_that_claims_many_layers_is_refused_cheaply(tmp_path: Path) -> None:
    write(tmp_path, mixtral())
    config = mixtral(num_hidden_layers=4096, num_local_experts=65_536)
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert "model.layers.0.block_sparse_moe.gate.weight is [6, 40], expected [65536, 40]" in refusal(tmp_path)


# Norms


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite_is_refused_by_name(value: float) -> None:
    values = np.ones(8, np.float32)
    check_vector("model.norm.weight", values)
    values[5] = value

    with pytest.raises(CheckpointError) as caught:
        check_vector("model.norm.weight", values, Path("a/model.safetensors"))

    found = re.escape(f"model.safetensors: model.norm.weight holds {value} at position 5 of 8")
    assert re.match(found, str(caught.value))
    assert caught.value.facts["tensor"] == "model.norm.weight"


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "extra.weight"])  # required; unexpected
def test_a_shape_of_a_thousand_dimensions_gives_a_short_error(tmp_path: Path, name: str) -> None:
    write_tiny_model(tmp_path, qwen3_moe(), seed=1)
    tensors = read_checkpoint(tmp_path)
    raw = {known: tensor for known, tensor in tensors.items() if known != name}
    header, data = {}, b""
    for known, tensor in raw.items():
        begin, data = len(data), data + np.ascontiguousarray(tensor, np.float32).tobytes()
        header[known] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
    header[name] = {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [len(data), len(data) + 4]}
    write_raw(tmp_path / "model.safetensors", header, data + bytes(4))
    said = refusal(tmp_path)
    assert name in said
    assert len(said) < 600
