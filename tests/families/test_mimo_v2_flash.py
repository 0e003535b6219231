"""MiMo-V2-Flash: the meaning of the config, both spellings, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy.config import AttentionConfig, ModelConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from tests.families.published import mimo_v2_flash as published
from tests.models.configurations_gqa import CONFIGURATIONS
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.tiny_gqa import mimo_v2_flash


def parse(raw: dict[str, Any]) -> ModelConfig:
    return FAMILIES["mimo_v2_flash"].parse_config(raw)


def attentions(config: ModelConfig) -> list[AttentionConfig]:
    mixers = [layer.mixer for layer in config.layers]
    assert all(isinstance(mixer, AttentionConfig) for mixer in mixers)
    return mixers  # type: ignore[return-value]


def test_the_released_config_gives_two_kinds_of_layers() -> None:
    config = parse(published())
    full, sliding = attentions(config)[:2]
    assert (full.num_heads, full.num_kv_heads, full.head_dim, full.value_dim) == (64, 4, 192, 128)
    assert (full.sliding_window, full.has_sinks, full.value_scale) == (0, False, 0.707)
    assert full.rope is not None
    assert sliding.rope is not None
    assert (full.rope.rotary_dim, full.rope.theta) == (64, 5e6)
    # 128 positions before its own, as in SGLang and transformers.
    assert (sliding.num_kv_heads, sliding.sliding_window, sliding.has_sinks) == (8, 129, True)
    assert (sliding.rope.rotary_dim, sliding.rope.theta) == (64, 1e4)
    assert [i for i, one in enumerate(attentions(config)) if one == full] == [
        0,
        5,
        11,
        17,
        23,
        29,
        35,
        41,
        47,
    ]
    assert config.moe_layers == tuple(range(1, 48))
    assert (config.router.scale, config.shared_width) == (1.0, 0)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "mimo_v2_flash"})
    released = parse(published())
    assert config.layers == released.layers
    assert (config.hidden_size, config.num_experts, config.vocab_size) == (4096, 256, 152_576)


def test_a_gguf_file_has_the_same_layers(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, mimo_v2_flash(), one_type("F32"), seed=3)
    found, expected = open_model(path).config, parse(mimo_v2_flash())
    for one, other in zip(attentions(found), attentions(expected), strict=True):
        assert one.rope is not None
        assert other.rope is not None
        assert (one.rope.theta, one.rope.rotary_dim) == (other.rope.theta, other.rope.rotary_dim)
        assert replace(one, rope=None) == replace(other, rope=None)
    assert (found.moe_layers, found.router) == (expected.moe_layers, expected.router)


def test_transformers_spelling_names_kinds_and_gives_each_its_rotary_embedding() -> None:
    sliding, full, _ = attentions(parse(CONFIGURATIONS[1].config))
    assert (sliding.sliding_window, full.sliding_window, full.value_scale) == (9, 0, 1.0)
    assert full.rope is not None
    assert sliding.rope is not None
    assert (full.rope.rotary_dim, full.rope.theta) == (6, 1e4)
    assert (sliding.rope.rotary_dim, sliding.rope.theta) == (10, 3e2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_full_attention_sink_bias": True}, "add_full_attention_sink_bias true; supported: false"),
        ({"add_swa_attention_sink_bias": False}, "add_swa_attention_sink_bias false; supported: true"),
        ({"swa_head_dim": 16}, "swa_head_dim 16; supported: 18"),
        ({"swa_num_key_value_heads": 3}, "swa_num_key_value_heads is 3, expected a divisor of 4 heads"),
        ({"n_shared_experts": 1}, "n_shared_experts 1"),
        ({"hybrid_layer_pattern": [0, 1]}, "gives 2 layers, expected 3"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor as 0.3 of 18 dimensions"),
        ({"attention_projection_layout": "fused_qkv"}, "attention_projection_layout"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgosyError, match=message):
        parse(mimo_v2_flash(**changes))
