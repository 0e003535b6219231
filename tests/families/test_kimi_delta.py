"""Kimi-Linear and Ling-3: the meaning of the configs, the defaults of absent keys, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from argosy.config import ActivationConfig, KimiDeltaConfig, LatentConfig, ModelConfig, RouterConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from tests.models import gguf_models
from tests.models.tiny import RawConfig
from tests.models.tiny_kda import bailing_hybrid, kimi_linear


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_kimi_linear_s_config_is_read() -> None:
    config = parse(kimi_linear())
    delta = KimiDeltaConfig(num_heads=3, head_dim=10, conv_width=4, decay_rank=10, gate_rank=10)
    latent = LatentConfig(
        num_heads=3, query_rank=0, kv_rank=18, nope_dim=10, rope_dim=6, value_dim=12, norm_eps=1e-6, rope=None
    )
    assert [layer.mixer for layer in config.layers] == [delta, latent, delta]
    assert config.recurrent_layers == (0, 2)
    assert config.moe_layers == (1, 2)
    assert config.router == RouterConfig(
        score="sigmoid", has_choice_bias=True, renormalize=True, renormalize_eps=1e-20, scale=2.446
    )
    assert (config.context_tokens, config.shared_width, config.norm_eps) == (128, 9, 1e-5)


def test_ling_3_s_config_is_read() -> None:
    config = parse(bailing_hybrid(kda_lower_bound=-3))
    delta = KimiDeltaConfig(num_heads=3, head_dim=10, conv_width=4, floor=-3.0)
    latent = config.layers[1].mixer
    assert [layer.mixer for layer in config.layers] == [delta, latent, delta, latent]
    assert isinstance(latent, LatentConfig)
    assert latent.rope is not None
    assert (latent.output_gate, latent.rope.is_interleaved, latent.rope.theta) == ("heads", True, 6e5)
    assert (config.router.num_groups, config.router.kept_groups, config.router.scale) == (3, 2, 2.5)


def test_ling_3_flash_limits_the_activations_of_its_last_layers() -> None:
    config = parse(
        bailing_hybrid(
            expert_swiglu_limit_list=[0, 0, 0, 4.0], share_expert_swiglu_limit_list=[0, 0, 5.0, 7.0]
        )
    )
    limits = [(one.activation, one.shared_activation) for one in config.layers]
    four, five, seven = (ActivationConfig(kind="silu_capped", limit=limit) for limit in (4.0, 5.0, 7.0))
    assert limits == [(None, None), (None, None), (None, five), (four, seven)]
    draft = replace(config, num_mtp_layers=1).draft_only.layers[-1]
    assert (draft.activation, draft.shared_activation) == (None, None)


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    kimi, ling = parse({"model_type": "kimi_linear"}), parse({"model_type": "bailing_hybrid"})
    assert (kimi.num_layers, kimi.hidden_size, kimi.num_experts, kimi.experts_per_token) == (27, 2304, 256, 8)
    assert [i for i in range(27) if i not in kimi.recurrent_layers] == [4, 8, 12, 16, 20, 24]
    assert kimi.layers[0].mixer == KimiDeltaConfig(
        num_heads=32, head_dim=128, conv_width=4, decay_rank=128, gate_rank=128
    )
    assert (kimi.eos_ids, kimi.bos_id, kimi.moe_layers[0]) == ((163_586,), 163_584, 1)
    assert (ling.num_layers, ling.hidden_size, ling.num_experts, ling.num_mtp_layers) == (42, 2560, 512, 1)
    assert [i for i in range(42) if i not in ling.recurrent_layers] == [5, 11, 17, 23, 29, 35, 41]
    assert ling.layers[0].mixer == KimiDeltaConfig(num_heads=32, head_dim=128, conv_width=4, floor=-5.0)
    assert (ling.eos_ids, ling.bos_id, ling.moe_layers[0]) == ((156_895,), None, 2)


def test_transformers_spelling_of_kimi_linear_is_read() -> None:
    config = kimi_linear()
    linear = config.pop("linear_attn_config")
    plain = parse(kimi_linear())
    written = {
        "linear_num_heads": linear["num_heads"],
        "linear_head_dim": linear["head_dim"],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    }
    assert parse(config | written) == plain
    assert parse(config | written | {"linear_attn_config": linear}) == plain


LINEAR = kimi_linear()["linear_attn_config"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (kimi_linear(mla_use_nope=False), "asks for mla_use_nope false; supported: true"),
        (kimi_linear(moe_router_activation_func="softmax"),
         "asks for moe_router_activation_func 'softmax'; supported: sigmoid"),
        (kimi_linear(linear_attn_config=LINEAR | {"kda_layers": [1, 2, 3]}), "expected each from 1 to 3"),
        (kimi_linear(linear_attn_config=LINEAR | {"kda_layers": [1, 4]}), "a list of whole numbers from 1 to 3"),
        (kimi_linear(linear_attn_config=LINEAR | {"gate_lower_bound": -5}), "sets gate_lower_bound to -5"),
        (kimi_linear(layer_types=["full_attention"] * 3), "as in layer_types"),
        (kimi_linear(model_max_length=0), "model_max_length is 0"),
        (kimi_linear(max_position_embeddings=64), "gives model_max_length as 128 and max_position_embeddings"),
        (bailing_hybrid(kda_safe_gate=False), "asks for kda_safe_gate false; supported: true"),
        (bailing_hybrid(head_dim=2**31 - 1), "expected a whole number from 1 to 65536"),
        (bailing_hybrid(kda_lower_bound=5), "kda_lower_bound is 5, a whole number; expected a number below zero"),
        (bailing_hybrid(no_kda_lora=False), "asks for no_kda_lora false; supported: true"),
        (bailing_hybrid(use_mla_nope=True), "asks for use_mla_nope true; supported: false"),
        (bailing_hybrid(group_norm_size=4), "asks for group_norm_size 4; supported: 1"),
        (bailing_hybrid(layer_group_size=3), "supported: a divisor of num_hidden_layers, 4"),
        (bailing_hybrid(expert_swiglu_limit_list=[0, 4.0]), "a number from 0 on for each of 4 layers"),
        (bailing_hybrid(share_expert_swiglu_limit_list=[0, 0, 0, -1]), "a number from 0 on for each of 4 layers"),
        (bailing_hybrid(share_expert_swiglu_limit_list=[0, 0, 0, False]), "a number from 0 on for each of 4 layers"),
        (bailing_hybrid(moe_shared_expert_intermediate_size=8), "asks for moe_shared_expert_intermediate_size 8"),
    ],
)  # fmt: skip
def test_unsupported_features_are_refused_by_name(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(config)
    assert sentence in str(caught.value)


HEADS = "attention.head_count_kv"


@pytest.mark.parametrize(
    ("raw", "key", "value", "sentence"),
    [
        (kimi_linear(), HEADS, None, "has no key kimi-linear.attention.head_count_kv"),
        (kimi_linear(), HEADS, [0, 1], "a whole number from 0 on for each of 3 layers"),
        (kimi_linear(), HEADS, [0, 2, 0], "head_count_kv 2; supported: 1 in layers with keys"),
        (kimi_linear(), "attention.key_length", 25, "key_length is 25, expected 24"),
        (kimi_linear(), "attention.key_length_mla", 6, "heads of 6 dimensions, of which 6 rotate"),
        (kimi_linear(), "expert_gating_func", 1, "expert_gating_func 1; supported: 2 (sigmoid)"),
        (kimi_linear(), "kda.head_dim", 11, "blk.0.attn_q.weight is [30, 28], expected [33, 28]"),
        (kimi_linear(), "ssm.conv_kernel", 65, "a whole number from 1 to 64"),
        (bailing_hybrid(), "kda.safe_gate", False, "kda.safe_gate False; supported: true"),
        (bailing_hybrid(), "kda.gate_lower_bound", 1.0, "expected a number below zero"),
        (bailing_hybrid(), "swiglu_clamp_exp", [0.0, 0.0], "a number from 0 on for each of 4 layers"),
    ],
)
def test_odd_metadata_of_a_gguf_are_refused(
    raw: RawConfig, key: str, value: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_metadata = gguf_models.add_kda_metadata

    def add_odd(writer: GGUFWriter, config: RawConfig) -> None:
        add_metadata(writer, config)
        (pairs,) = writer.kv_data
        if value is None:
            del pairs[f"{writer.arch}.{key}"]
        else:
            pairs[f"{writer.arch}.{key}"].value = value

    monkeypatch.setattr(gguf_models, "add_kda_metadata", add_odd)
    gguf_models.write_gguf_model(tmp_path / "model.gguf", raw, gguf_models.one_type("F32"), seed=1)
    with pytest.raises(ArgosyError) as caught:
        open_model(tmp_path / "model.gguf")
    assert sentence in str(caught.value)
