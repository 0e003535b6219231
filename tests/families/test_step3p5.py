"""Step-3.5 and 3.7: the meaning of the configs, both spellings, refusals, and GGUF files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.config import ActivationConfig, AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from argosy.errors import ArgosyError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.families.published import STEP_37_FLASH
from tests.models.gguf_models import one_type
from tests.models.gguf_step import write_step_gguf
from tests.models.numpy_model import NumpyModel, softmax
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_step import FULL, SLIDING, respelt, step3p5, step3p7


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def attentions(config: ModelConfig) -> list[AttentionConfig]:
    mixers = [layer.mixer for layer in config.layers]
    assert all(isinstance(mixer, AttentionConfig) for mixer in mixers)
    return mixers  # type: ignore[return-value]


def test_the_released_config_gives_two_kinds_of_layers() -> None:
    config = parse(STEP_37_FLASH)
    full, sliding = attentions(config)[:2]
    assert (full.num_heads, full.num_kv_heads, full.head_dim, full.sliding_window) == (64, 8, 128, 0)
    assert (sliding.num_heads, sliding.num_kv_heads, sliding.sliding_window) == (96, 8, 512)
    assert (full.output_gate, full.gate_activation, full.qk_norm) == ("heads", "sigmoid", "head")
    assert (full.scale, full.has_qkv_bias, full.has_o_bias) == (128**-0.5, False, False)
    assert full.rope is not None
    assert (full.rope.rotary_dim, full.rope.theta, full.rope.kind, full.rope.factor) == (
        64,
        5e6,
        "llama3",
        2.0,
    )
    assert sliding.rope == RopeConfig(theta=1e4, rotary_dim=128, original_context=262_144)
    assert [i for i, one in enumerate(attentions(config)) if one == full] == list(range(0, 45, 4))
    assert config.moe_layers == tuple(range(3, 45))
    assert config.router == RouterConfig(score="sigmoid", has_choice_bias=True, scale=3.0)
    assert (config.shared_width, config.norm_offset, config.num_mtp_layers) == (1280, 1.0, 3)
    assert (config.eos_ids, config.context_tokens) == ((1, 2, 128_007), 262_144)
    limited = [(one.activation, one.shared_activation) for one in config.layers]
    seven, sixteen = (ActivationConfig(kind="silu_capped", limit=limit) for limit in (7.0, 16.0))
    assert limited == [*[(None, None)] * 43, *[(seven, sixteen)] * 2]


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "step3p5"})
    (full,) = set(attentions(config))
    assert (full.num_heads, full.num_kv_heads, full.head_dim, full.sliding_window) == (64, 8, 128, 0)
    assert full.rope == RopeConfig(theta=1e4, rotary_dim=128, original_context=128_000)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (45, 4096, 128_815)
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (288, 8, 1280)
    assert (config.moe_layers[0], config.dense_width, config.router.scale) == (3, 11_264, 1.0)


def test_both_spellings_mean_the_same_alone_and_in_step_3_7() -> None:
    plain = parse(step3p5())
    assert parse(respelt(step3p5())) == plain
    wrapped = parse(step3p7())
    assert wrapped == replace(plain, family="step3p7")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_head_wise_attn_gate": False}, "asks for use_head_wise_attn_gate false; supported: true"),
        ({"moe_router_activation": "softmax"}, "asks for moe_router_activation 'softmax'"),
        ({"norm_expert_weight": False}, "asks for norm_expert_weight false"),
        ({"yarn_only_types": [SLIDING]}, "asks for yarn_only_types"),
        ({"use_rope_layers": [True, False, True, True]}, "asks for use_rope_layers"),
        ({"sink": True}, "asks for sink true; supported: false"),
        ({"zero_centered": False}, "asks for zero_centered false"),
        ({"use_moe_router_bias": False}, "asks for use_moe_router_bias false"),
        ({"moe_layers_enum": "1;2"}, "asks for moe_layers_enum '1;2'; supported: numbers of layers"),
        ({"moe_layers_enum": "7"}, "leaves none of the 4 layers with routed experts"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types has 2 entries, expected one for each of 4 layers"),
        ({"layer_types": [FULL] * 6}, "layer_types has 6 entries"),
        ({"layer_types": ["chunked_attention"] * 4}, "asks for layer_types 'chunked_attention'"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"rope_theta": [1e4, 1e4]}, "rope_theta is"),
        ({"partial_rotary_factors": [0.5, 1.5, 1, 0.5]}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"swiglu_limits": [0, 0, 0]}, "swiglu_limits is"),
        ({"attention_other_setting": {"num_attention_heads": 5}}, "layers have 5 heads, expected a multiple of 2"),
        ({"attention_other_setting": {"head_dim": 4}}, "attention_other_setting asks for head_dim 4"),
        ({"attention_other_setting": {"attention_type": FULL}}, "attention_other_setting asks for attention_type"),
        ({"attention_other_setting": {"v_head_dim": 4}}, "attention_other_setting sets v_head_dim"),
        ({"per_layer_config": {"1": {"num_attention_heads": 8}}}, "per_layer_config.1 asks for num_attention_heads 8"),
        ({"gqa_v_norm": True}, "sets gqa_v_norm to true"),
    ],
)  # fmt: skip
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(step3p5(**changes))
    assert sentence in str(caught.value)


def test_layers_for_multi_token_prediction_are_passed_over(tmp_path: Path) -> None:
    files = open_model(write_model(tmp_path, step3p5(), seed=2))
    assert (files.config.num_layers, files.config.num_mtp_layers, files.draft) == (4, 1, None)
    with pytest.raises(UnsupportedModel, match="no layer for multi-token prediction that can be used"):
        files.with_draft_layer()
    assert not any(name.startswith("layers.4.") for name in files.dense)


_TRIMMED = {
    "layer_types": [FULL, SLIDING, SLIDING, FULL],
    "num_nextn_predict_layers": 0,
    "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
    "rope_theta": [5000000.0, 10000.0, 10000.0, 5000000.0],
    "swiglu_limits": [0.0, 0.0, 0.0, 0.06],
    "swiglu_limits_shared": [0.05, 0.0, 0.0, 0.1],
}
_OTHER = {"num_attention_heads": 3, "num_attention_groups": 3}
_WIDE = {
    "hidden_size": 64,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "share_expert_dim": 64,
    "intermediate_size": 96,
}


@pytest.mark.parametrize(
    ("type_name", "changes"),
    [
        ("F32", {}),
        ("F32", {"rope_scaling": None, "attention_other_setting": _OTHER}),
        ("Q8_0", _WIDE),
    ],
)  # fmt: skip
def test_a_gguf_file_answers_as_its_dequantised_weights(
    type_name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = step3p5(**_TRIMMED | {"moe_top_k": 5} | changes)
    directory = write_step_gguf(tmp_path / "model.gguf", config, one_type(type_name), seed=7)
    prompt = prompt_ids(config, 7)
    expected = NumpyModel(directory).logits(prompt)
    with Engine.open(tmp_path / "model.gguf", memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)
    if type_name == "F32":
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    p, q = softmax(expected), softmax(logits.astype(np.float64))
    assert float((p * np.log(p / q)).sum(axis=1).mean()) <= 0.002
