"""MiniMax-Text-01 and M1: the meaning of both spellings of the config, refusals, and partial rotary embedding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.config import AttentionConfig, LightningConfig, ModelConfig, RouterConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from argosy.model.families.recurrent.lightning import slopes_of_heads
from tests.families.published import minimax_m1
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import write_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, random_tensors, write_model
from tests.models.tiny_minimax import by_makers, minimax


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_the_hub_s_config_is_read() -> None:
    config = parse(minimax_m1())
    assert [i for i in range(80) if i not in config.recurrent_layers] == list(range(7, 80, 8))
    rope = config.attention.rope
    assert rope is not None
    assert (rope.theta, rope.rotary_dim) == (1e7, 64)
    assert config.attention == AttentionConfig(num_heads=64, num_kv_heads=8, head_dim=128, rope=rope)
    lightning = config.layers[79 - 1].mixer
    assert isinstance(lightning, LightningConfig)
    assert lightning == LightningConfig(
        slopes=lightning.slopes, head_dim=128, norm_eps=1e-6, has_silu=True, has_joined_qkv=True
    )
    assert lightning.slopes[0] == pytest.approx(2 ** (-8 / 64) * (1 - 78 / 79 + 1e-5))
    assert lightning.slopes[63] == pytest.approx(2**-8 * (1 - 78 / 79 + 1e-5))
    assert (config.normed_residual, config.residual_scale) == (3.5565588200778455, 1.0)
    assert config.router == RouterConfig(renormalize=True)
    assert (config.expert_width, config.num_experts, config.experts_per_token) == (9216, 32, 2)


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "minimax"})
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (32_000, 4096, 32)
    assert config.recurrent_layers == tuple(range(1, 32, 2))
    assert (config.expert_width, config.num_experts, config.context_tokens) == (14_336, 8, 131_072)
    assert (config.normed_residual, config.residual_scale, config.eos_ids) == (1.0, 1.0, (2,))


def test_both_spellings_mean_the_same() -> None:
    config = minimax(rotary_dim=4)
    assert parse(by_makers(config)) == parse(config)
    assert parse(by_makers(config, model_type="minimax_text_01")) == parse(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_types": ["linear_attention"]}, "gives 1 layers, expected 3, each linear_attention or full_attention"),
        ({"linear_attn_alpha_factor": 2.0}, "linear_attn_alpha_factor 2.0; supported: 1.9, as full_attn_alpha_factor"),
        ({"mlp_beta_factor": 0.5}, "asks for mlp_beta_factor 0.5; supported: 1.0, as full_attn_beta_factor"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads 6; supported: a power of two"),
        ({"num_attention_heads": 2**30}, "has 1073741824 heads; supported: at most 65536"),
        ({"rotary_dim": 5}, "rotary_dim is 5, expected an even number of at most 6"),
        ({"sliding_window": 8}, "asks for sliding_window 8; supported: null"),
        ({"shared_intermediate_size": 64}, "asks for shared_intermediate_size 64; supported: 0"),
        ({"postnorm": False}, "asks for postnorm false; supported: true: blocks add to their normed input"),
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu'; supported: silu"),
        ({"unheard": 1}, "sets unheard to 1, but minimax does not know this key"),
    ],
)  # fmt: skip
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(minimax(**changes))
    assert sentence in str(caught.value)


def test_in_the_makers_code_an_absent_postnorm_is_another_network() -> None:
    config = by_makers(minimax())
    del config["postnorm"]
    with pytest.raises(ArgosyError, match="asks for postnorm null; supported: true"):
        parse(config)


def test_the_makers_files_rotate_a_part_of_a_head(tmp_path: Path) -> None:
    config = minimax(rotary_dim=4)
    write_model(tmp_path / "ours", config, seed=3)
    write_model(tmp_path / "theirs", config, seed=3)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(by_makers(config)))
    prompt = prompt_ids(config, 3)
    expected = NumpyModel(tmp_path / "ours").logits(prompt)
    for name in ("ours", "theirs"):
        with Engine.open(tmp_path / name, memory="4GiB", kv_dtype="f32", threads=1) as engine:
            assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


def test_constants_that_transformers_saves_are_passed_over(tmp_path: Path) -> None:
    tensors = random_tensors(minimax(), 1, "F32")
    write_model(tmp_path, minimax(), seed=1)
    for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
        tensors[f"model.layers.0.self_attn.{name}"] = tensors["model.norm.weight"]
    write_checkpoint(tmp_path, {name: ("F32", tensor) for name, tensor in tensors.items()})
    assert "layers.0.lightning_qkv" in open_model(tmp_path).dense


@pytest.mark.parametrize("interval", [None, 8])
def test_in_gguf_layers_with_softmax_attention_are_listed_or_come_at_an_interval(
    interval: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (
        ["linear_attention"] * 3 + ["full_attention"]
        if interval is None
        else ["linear_attention"] * 7 + ["full_attention"]
    )
    config = minimax(hidden_size=32, layer_types=kinds, num_hidden_layers=len(kinds), rotary_dim=4)
    if interval is not None:
        monkeypatch.setattr("gguf.GGUFWriter.add_array", lambda *_: None)
    write_gguf_model(tmp_path / "model.gguf", config, one_type("F32"), seed=1)
    found = open_model(tmp_path / "model.gguf").config
    assert found == replace(parse(config), eos_ids=found.eos_ids, bos_id=found.bos_id)


def test_heads_beyond_a_power_of_two_get_every_other_slope_of_twice_as_many() -> None:
    """As in ALiBi's code, from which the makers took theirs."""
    assert slopes_of_heads(4, 1.0) == (2**-2, 2**-4, 2**-6, 2**-8)
    assert slopes_of_heads(6, 2.0) == tuple(2 * x for x in (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3))
