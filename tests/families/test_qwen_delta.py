"""Qwen3-Next and Qwen3.5-MoE: the meaning of configs, tensors and GGUF metadata, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from argosy import Engine
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.safetensors import open_tensors
from argosy.config import DeltaConfig, LayerConfig, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.models import gguf_delta
from tests.models.gguf_delta import write_delta_gguf
from tests.models.gguf_models import one_type
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import prompt_ids, random_tensors
from tests.models.tiny_delta import RawConfig, qwen3_5_moe, qwen3_5_moe_text, qwen3_next

# ── released models ─────────────────────────────────────────────────────────────────────────────────────────────────

# config.json of Qwen3-Next-80B-A3B-Instruct.
NEXT_80B = qwen3_next(
    bos_token_id=151643,
    eos_token_id=151645,
    full_attention_interval=4,
    head_dim=256,
    hidden_size=2048,
    intermediate_size=5120,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_value_head_dim=128,
    max_position_embeddings=262144,
    moe_intermediate_size=512,
    num_attention_heads=16,
    num_experts=512,
    num_experts_per_tok=10,
    num_hidden_layers=48,
    num_key_value_heads=2,
    shared_expert_intermediate_size=512,
    vocab_size=151936,
)


def qwen35(
    hidden: int, layers: int, heads: int, value_heads: int, experts: int, k: int, width: int
) -> RawConfig:
    """The config.json of a Qwen3.5 or Qwen3.6 with these sizes."""
    sections = {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}
    return qwen3_5_moe(
        eos_token_id=248044,
        full_attention_interval=4,
        head_dim=256,
        hidden_size=hidden,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        linear_key_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_value_head_dim=128,
        max_position_embeddings=262144,
        moe_intermediate_size=width,
        num_attention_heads=heads,
        num_experts=experts,
        num_experts_per_tok=k,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        rope_parameters=sections
        | {"partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        shared_expert_intermediate_size=width,
        vocab_size=248320,
    )


@pytest.mark.parametrize(
    ("raw", "billions"),
    [
        (NEXT_80B, 79.7),
        (qwen35(2048, 40, 16, 32, 256, 8, 512), 35.1 - 0.45),  # without the vision tower
        (qwen35(3072, 48, 32, 64, 256, 8, 1024), 122.6 - 0.45),
        (qwen35(4096, 60, 32, 64, 512, 10, 1024), 396.8 - 0.45),
    ],
    ids=["Qwen3-Next-80B-A3B", "Qwen3.6-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"],
)
def test_released_configs_give_the_published_size(raw: RawConfig, billions: float) -> None:
    config = FAMILIES[raw["model_type"]].parse_config(raw)
    assert count_parameters(config)[0] == pytest.approx(billions * 1e9, rel=0.005)
    assert len(config.recurrent_layers) == config.num_layers * 3 // 4
    assert config.attention.rope.rotary_dim == 64
    assert config.context_tokens == 262144


# ── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


def kind_of(layer: LayerConfig) -> str:
    return "delta" if isinstance(layer.mixer, DeltaConfig) else "attention"


def parse(config: RawConfig) -> ModelConfig:
    return FAMILIES[config["model_type"]].parse_config(config)


def test_the_interval_or_layer_types_decide_the_layers() -> None:
    def mixers(**changes: Any) -> str:
        return "".join(
            kind_of(layer)[0] for layer in parse(qwen3_next(num_hidden_layers=5, **changes)).layers
        )

    assert mixers(full_attention_interval=2) == "dadad"
    assert mixers(full_attention_interval=4) == "dddad"
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention"]
    assert mixers(layer_types=kinds) == "addad"


def test_the_wrapper_s_keys_override_the_text_config() -> None:
    config = qwen3_5_moe(eos_token_id=7, bos_token_id=5)
    assert (parse(config).eos_ids, parse(config).bos_id, parse(config).is_embedding_tied) == ((7,), 5, False)
    config |= {"eos_token_id": [8, 9], "bos_token_id": 6, "tie_word_embeddings": True}
    assert (parse(config).eos_ids, parse(config).bos_id, parse(config).is_embedding_tied) == ((8, 9), 6, True)
    assert parse(config).family == "qwen3_5_moe"


REFUSED = {
    "asks for attn_output_gate false; supported: true": qwen3_5_moe_text(attn_output_gate=False),
    "asks for norm_topk_prob false; supported: true": qwen3_5_moe_text(norm_topk_prob=False),
    "asks for mamba_ssm_dtype 'bfloat16'; supported: 'float32'": qwen3_5_moe(mamba_ssm_dtype="bfloat16"),
    "asks for layer_types 'sliding_attention'; supported: linear_attention, full_attention": qwen3_next(
        layer_types=["sliding_attention"] * 3
    ),
    "asks for use_sliding_window true; supported: false": qwen3_next(use_sliding_window=True),
    "text_config sets hc_count to 4, but qwen3_5_moe does not know this key": qwen3_5_moe(hc_count=4),
    "sets linear_conv_bias to true": qwen3_next(linear_conv_bias=True),
    "rope_parameters sets mrope_section": qwen3_next(
        rope_theta=1e4, rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1]}
    ),
    "asks for model_type 'qwen4_exp_text'; supported: qwen3_5_moe_text": qwen3_5_moe(
        model_type="qwen4_exp_text"
    ),
}
CONTRADICTIONS = {
    "linear_num_value_heads is 5, expected a multiple of linear_num_key_heads, which is 2": qwen3_next(
        linear_num_value_heads=5
    ),
    "layer_types has 2 entries, expected one for each of 3 layers": qwen3_5_moe_text(
        layer_types=["linear_attention", "full_attention"]
    ),
    "linear_conv_kernel_dim is 0": qwen3_next(linear_conv_kernel_dim=0),
    "partial_rotary_factor as 0.3 of 10 dimensions": qwen3_next(partial_rotary_factor=0.3, head_dim=10),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_unsupported_features_are_refused_by_name(sentence: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        parse(REFUSED[sentence])
    assert sentence in str(caught.value)


@pytest.mark.parametrize("sentence", CONTRADICTIONS)
def test_contradictions_are_refused(sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(CONTRADICTIONS[sentence])
    assert sentence in str(caught.value)


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(directory: Path, config: RawConfig, change: Callable[[dict[str, Array]], None]) -> Path:
    """Write a tiny model whose tensors `change` has modified."""
    directory.mkdir(exist_ok=True)
    tensors = random_tensors(config, 3, "BF16")
    change(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(directory, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    return directory


def one_by_one(tensors: dict[str, Array]) -> None:
    """Store experts as the hub's FP8 repositories do."""
    for name in [name for name in tensors if name.endswith("mlp.experts.gate_up_proj")]:
        base = name.removesuffix("gate_up_proj")
        down = tensors.pop(base + "down_proj")
        for expert, gate_up in enumerate(tensors.pop(name)):
            gate, up = np.split(gate_up, 2)
            for part, values in (("gate", gate), ("up", up), ("down", down[expert])):
                tensors[f"{base}{expert}.{part}_proj.weight"] = values


def fused(tensors: dict[str, Array]) -> None:
    """Store experts as transformers 5 may write them."""
    layers = {name.partition("mlp.experts.")[0] for name in tensors if "mlp.experts." in name}
    for layer in layers:
        base = layer + "mlp.experts."
        each = [
            [tensors.pop(f"{base}{expert}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for expert in range(5)
        ]
        tensors[base + "gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in each])
        tensors[base + "down_proj"] = np.stack([down for _, _, down in each])


def without_prefix(tensors: dict[str, Array]) -> None:
    for name in [name for name in tensors if name.startswith("model.language_model.")]:
        tensors[name.replace("language_model.", "")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (qwen3_5_moe(), one_by_one),
        (qwen3_5_moe_text(), one_by_one),
        (qwen3_next(), fused),
        (qwen3_5_moe(), without_prefix),
    ],
    ids=["qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "qwen3_5_moe without its prefix"],
)
def test_every_layout_of_the_same_weights_gives_the_same_logits(
    config: RawConfig, change: Callable[[dict[str, Array]], None], tmp_path: Path
) -> None:
    prompt = prompt_ids(config, 3, 12)
    logits = []
    for name, edit in (("plain", lambda tensors: None), ("changed", change)):
        with Engine.open(write(tmp_path / name, config, edit), memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    np.testing.assert_array_equal(*logits)


def test_vision_and_multi_token_prediction_are_ignored_and_use_no_memory(tmp_path: Path) -> None:
    directory = write(tmp_path, qwen3_5_moe(), lambda tensors: None)
    files = open_model(directory)
    read = {ref.name for ref in files.dense.values()}
    left = set(open_tensors(directory)) - read
    assert {name for name in left if ".experts." not in name} == {
        "mtp.fc.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "model.visual.patch_embed.proj.bias",
        "model.visual.pos_embed.weight",
    }


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (qwen3_next, "model.layers.0.linear_attn.in_proj_qkvz.weight"),
        (qwen3_next, "model.layers.2.linear_attn.A_log"),
        (qwen3_5_moe, "model.language_model.layers.0.linear_attn.conv1d.weight"),
        (qwen3_5_moe_text, "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_a_missing_tensor_is_named(make: Callable[[], RawConfig], name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name.replace('.', '[.]')} is missing from the"):
        open_model(write(tmp_path, make(), lambda tensors: tensors.__delitem__(name)))


def test_a_tensor_of_the_other_mixer_is_refused(tmp_path: Path) -> None:
    extra = "model.layers.0.self_attn.q_proj.weight"
    directory = write(tmp_path, qwen3_next(), lambda tensors: tensors.update({extra: np.zeros((4, 4))}))
    with pytest.raises(CheckpointError, match=r"q_proj[.]weight.*this config[.]json has no such tensor"):
        open_model(directory)


def test_a_convolution_of_the_wrong_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    name = "model.layers.0.linear_attn.conv1d.weight"
    directory = write(tmp_path, qwen3_next(), lambda tensors: tensors.update({name: tensors[name][:, 0]}))
    with pytest.raises(CheckpointError, match=r"conv1d.weight is \[76, 4\], expected \[76, 1, 4\]"):
        open_model(directory)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────

GGUF_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}


def write_gguf(
    path: Path, config: RawConfig, monkeypatch: pytest.MonkeyPatch, extra: Callable[[GGUFWriter], object]
) -> Path:
    plain = gguf_delta.add_metadata

    def add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
        plain(writer, config)
        extra(writer)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_delta, "add_metadata", add_metadata)
        write_delta_gguf(path, config, one_type("Q8_0"), seed=1)
    return path


@pytest.mark.parametrize("make", [qwen3_next, qwen3_5_moe_text], ids=lambda make: make.__name__)
def test_metadata_means_the_same_as_config_json(
    make: Callable[..., RawConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf", make(**GGUF_SIZES), monkeypatch, lambda writer: None)
    ours, hub = open_model(path).config, open_model(path.with_name("model.gguf.f32")).config
    assert ours.delta is not None
    assert hub.delta is not None
    assert ours.delta.sizes == hub.delta.sizes
    assert ours.attention == hub.attention
    assert [kind_of(layer) for layer in ours.layers] == [kind_of(layer) for layer in hub.layers]
    same = ("router", "expert_width", "shared_width", "shared_is_gated")
    for name in (*same, "norm_eps", "vocab_size", "num_experts", "eos_ids"):
        assert getattr(ours, name) == getattr(hub, name), name
    assert (ours.norm_offset, hub.norm_offset) == (0, 1)
    assert ours.delta.is_tiled == (make is qwen3_5_moe_text)


RECURRENT = "qwen3next.attention.recurrent_layers"


def list_layers(writer: GGUFWriter, layers: list[Any] | None) -> None:
    """List these layers as recurrent, or write no list."""
    del writer.kv_data[0][RECURRENT]
    if layers is not None:
        writer.add_array(RECURRENT, layers)


def test_without_a_list_of_layers_attention_comes_at_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, qwen3_next(**GGUF_SIZES), monkeypatch, lambda writer: list_layers(writer, None))
    mixers = [kind_of(layer) for layer in open_model(path).config.layers]
    assert mixers == ["delta", "attention", "delta"]


def test_a_list_of_layers_overrides_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_converted(writer: GGUFWriter) -> None:
        # Converters write 4 for every model; the interval of this model is 2.
        writer.kv_data[0]["qwen3next.full_attention_interval"].value = 4

    path = write_gguf(tmp_path / "model.gguf", qwen3_next(**GGUF_SIZES), monkeypatch, as_converted)
    assert open_model(path).config.recurrent_layers == (0, 2)


def test_the_list_of_layers_may_hold_0_and_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"  # llama.cpp itself saves numbers
    write_gguf(path, qwen3_next(**GGUF_SIZES), monkeypatch, lambda writer: list_layers(writer, [1, 0, 1]))
    assert open_model(path).config.recurrent_layers == (0, 2)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([True, False], r"recurrent_layers is an array of 2, expected true or false for each of 3 layers"),
        ([0, 1, 2], r"recurrent_layers is an array of 3, expected true or false for each of 3 layers"),
        ([True, True, False], r"blk\.1\.attn_qkv\.weight is missing"),
        ([True, False, False], r"blk\.2\.attn_qkv\.weight is \[96, 32\], expected \[192, 32\]"),
    ],
)
def test_a_list_of_layers_that_contradicts_the_file_is_refused(
    layers: list[Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, qwen3_next(**GGUF_SIZES), monkeypatch, lambda writer: list_layers(writer, layers))
    with pytest.raises(CheckpointError, match=sentence):
        open_model(path)


def test_multi_token_prediction_layers_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_mtp(writer: GGUFWriter) -> None:
        writer.add_nextn_predict_layers(1)
        writer.kv_data[0]["qwen3next.block_count"].value = 4
        writer.kv_data[0][RECURRENT].value.append(False)
        writer.add_tensor("blk.3.nextn.eh_proj.weight", np.zeros((4, 4), np.float32))

    config = qwen3_next(**GGUF_SIZES)
    files = open_model(write_gguf(tmp_path / "model.gguf", config, monkeypatch, add_mtp))
    assert files.config.num_layers == 3
    assert list(files.config.mtp_layers) == [3]
    assert not any(ref.name.startswith("blk.3.") for ref in files.dense.values())


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (lambda writer: writer.add_ssm_dt_b_c_rms(True), "qwen3next does not know this key"),
        (lambda writer: writer.add_sliding_window(8), "qwen3next does not know this key"),
        (lambda writer: writer.add_ssm_inner_size(30), "inner_size is 30, in 4 value heads for 2 key heads"),
    ],
)
def test_unknown_or_inconsistent_metadata_is_refused(
    extra: Callable[[GGUFWriter], object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop("qwen3next.ssm.inner_size") if "inner_size" in sentence else None
        extra(writer)

    path = write_gguf(tmp_path / "model.gguf", qwen3_next(**GGUF_SIZES), monkeypatch, replace)
    with pytest.raises((UnsupportedModel, CheckpointError), match=sentence):
        open_model(path)
