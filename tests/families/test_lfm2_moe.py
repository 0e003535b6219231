"""LFM2-MoE: the meaning of the config, the defaults of absent keys, names of tensors, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RouterConfig, ShortConvConfig
from argosy.errors import ArgosyError, CheckpointError
from argosy.model.families import FAMILIES, open_model
from tests.families.published import lfm2_moe as published
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, write_model
from tests.models.tiny_recurrent import lfm2_moe


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["lfm2_moe"].parse_config(raw)


def test_the_hub_s_config_is_read() -> None:
    config = parse(published((2, 6, 10, 14, 18, 21), 24, 32, 1792))

    conv = ShortConvConfig(channels=2048, conv_width=3)
    attention = AttentionConfig(
        num_heads=32, num_kv_heads=8, head_dim=64, rope=config.attention.rope, qk_norm="head"
    )
    assert config.layers[0] == config.layers[1] == LayerConfig(mixer=conv, is_moe=False)
    assert config.layers[2] == LayerConfig(mixer=attention, is_moe=True)
    assert config.layers[3] == LayerConfig(mixer=conv, is_moe=True)
    assert [i for i in range(24) if i not in config.recurrent_layers] == [2, 6, 10, 14, 18, 21]
    assert config.router == RouterConfig(
        score="sigmoid", has_choice_bias=True, renormalize=True, renormalize_eps=1e-6
    )
    assert (config.dense_width, config.expert_width, config.experts_per_token) == (7168, 1792, 4)
    assert (config.norm_eps, config.attention.rope.theta, config.eos_ids) == (1e-5, 1e6, (7,))
    assert config.is_embedding_tied


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "lfm2_moe", "layer_types": ["conv"] * 31 + ["full_attention"]})

    assert (config.vocab_size, config.hidden_size, config.num_layers) == (65_536, 2048, 32)
    assert (config.num_experts, config.experts_per_token, config.context_tokens) == (32, 4, 128_000)
    assert config.moe_layers == tuple(range(2, 32))
    assert config.layers[0].mixer == ShortConvConfig(channels=2048, conv_width=3)
    assert (config.eos_ids, config.bos_id, config.is_embedding_tied) == ((2,), 1, True)


def test_flags_are_read() -> None:
    assert parse(lfm2_moe(conv_bias=True, conv_L_cache=5)).layers[0].mixer == ShortConvConfig(
        channels=28, conv_width=5, has_bias=True
    )
    router = parse(lfm2_moe(norm_topk_prob=False, use_expert_bias=False, routed_scaling_factor=2.5)).router
    assert router == RouterConfig(score="sigmoid", renormalize=False, scale=2.5)
    plain = {key: value for key, value in lfm2_moe().items() if key != "tie_embedding"}
    assert parse(plain).is_embedding_tied
    assert not parse(plain | {"tie_word_embeddings": False}).is_embedding_tied
    # Liquid's own key decides, as in transformers.
    assert not parse(plain | {"tie_word_embeddings": True, "tie_embedding": False}).is_embedding_tied


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_types": None}, "config.json lacks layer_types, the kind of each layer"),
        ({"layer_types": ["conv", "mamba", "conv"]}, "asks for layer_types 'mamba'; supported: conv, full_attention"),
        ({"layer_types": ["conv"]}, "layer_types has 1 entries, expected one for each of 3 layers"),
        ({"num_dense_layers": 3}, "num_dense_layers is 3, a whole number; expected a whole number from 0 to 2"),
        ({"conv_L_cache": 0}, "conv_L_cache is 0, a whole number; expected a whole number from 1 to 64"),
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu'; supported: silu"),
        ({"sliding_window": 8}, "sets sliding_window to 8, but lfm2_moe does not know this key"),
    ],
)  # fmt: skip
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(lfm2_moe(**changes))
    assert sentence in str(caught.value)


def test_mlx_s_names_are_read(tmp_path: Path) -> None:
    """Experts are stacked, networks are gate, up and down, and the taps are a convolution's second axis (mlx-lm)."""
    config = lfm2_moe()
    directory = write_model(tmp_path, config, seed=1)
    hub, tensors = open_model(directory), read_checkpoint(directory)
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name in [name for name in tensors if name.endswith("conv.conv.weight")]:
        tensors[name] = tensors[name].swapaxes(1, 2)
    for part, mlx_name in parts.items():
        tensors[f"model.layers.0.feed_forward.{mlx_name}.weight"] = tensors.pop(
            f"model.layers.0.feed_forward.{part}.weight"
        )
        for layer in (1, 2):
            block = f"model.layers.{layer}.feed_forward."
            matrices = [tensors.pop(f"{block}experts.{expert}.{part}.weight") for expert in range(5)]
            tensors[f"{block}switch_mlp.{mlx_name}.weight"] = np.stack(matrices)
    write_checkpoint(directory, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    found = open_model(directory)
    assert found.config == hub.config
    assert found.dense.keys() == hub.dense.keys()
    assert (found.dense["layers.0.shortconv_conv"].rows, found.dense["layers.0.shortconv_conv"].cols) == (
        28,
        3,
    )
    assert found.experts.keys() == hub.experts.keys()


def test_fused_experts_are_read_as_separate_ones(tmp_path: Path) -> None:
    config = lfm2_moe()
    separate = write_model(tmp_path / "separate", config, seed=1)
    tensors = read_checkpoint(separate)
    for layer in (1, 2):
        block = f"model.layers.{layer}.feed_forward.experts."
        names = [[f"{block}{expert}.w{i}.weight" for expert in range(5)] for i in (1, 3, 2)]
        gate, up, down = (np.stack([tensors.pop(name) for name in row]) for row in names)
        tensors[block + "gate_up_proj"], tensors[block + "down_proj"] = (
            np.concatenate((gate, up), axis=1),
            down,
        )
    fused = write_model(tmp_path / "fused", config, seed=1)
    write_checkpoint(fused, {name: ("BF16", tensor) for name, tensor in tensors.items()})
    one, other = open_model(separate), open_model(fused)
    assert one.config == other.config
    assert one.experts.keys() == other.experts.keys()
    assert {record.nbytes for record in one.experts.values()} == {
        record.nbytes for record in other.experts.values()
    }


def test_in_gguf_layers_without_kv_heads_have_a_convolution(tmp_path: Path) -> None:
    config = lfm2_moe(hidden_size=32, num_attention_heads=2)
    write_gguf_model(tmp_path / "model.gguf", config, one_type("F32"), seed=1)
    hub, found = parse(config), open_model(tmp_path / "model.gguf").config
    assert found.layers == hub.layers
    assert found.router == hub.router
    assert found.recurrent_layers == (0, 2)


@pytest.mark.parametrize(
    ("heads", "sentence"),
    [
        ([0, 2], "an array of 2, expected a whole number from 0 on for each of 3 layers"),
        ([0, 1, 2], "expected 0 in some layers, and the same number above 0 in the others"),
        ([0, 0, 0], "expected 0 in some layers, and the same number above 0 in the others"),
    ],
)
def test_odd_numbers_of_kv_heads_are_refused(
    heads: list[int], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        GGUFWriter,
        "add_head_count_kv",
        lambda self, _: self.add_array("lfm2moe.attention.head_count_kv", heads),
    )
    write_gguf_model(tmp_path / "model.gguf", lfm2_moe(hidden_size=32), one_type("F32"), seed=1)
    with pytest.raises((CheckpointError, ArgosyError)) as caught:
        open_model(tmp_path / "model.gguf")
    assert "lfm2moe.attention.head_count_kv" in str(caught.value)
    assert sentence.removeprefix("expected ") in str(caught.value)
