"""Ling-2.5: the meaning of the config, refusals, and what tells it from Ling-3. Logits: `tests/engine/test_mlx.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, SamplingParams
from argosy.config import LatentConfig, LightningConfig, ModelConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES
from tests.families.hub_ling import LING_2_6_FLASH
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_ling import ling_2_5
from tests.models.tiny_mtp import write_mtp_model


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["bailing_hybrid"].parse_config(raw)


def test_the_hub_s_config_is_read() -> None:
    config = parse(LING_2_6_FLASH)
    assert [i for i in range(32) if i not in config.recurrent_layers] == [7, 15, 23, 31]
    latent, first, last = (config.layers[layer].mixer for layer in (7, 0, 30))
    assert isinstance(latent, LatentConfig)
    assert latent.rope is not None
    assert latent == LatentConfig(
        num_heads=32, query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, norm_eps=1e-6,
        rope=latent.rope, scale=192**-0.5,
    )  # fmt: skip
    assert (latent.rope.rotary_dim, latent.rope.is_interleaved, latent.rope.theta) == (64, True, 6e6)
    assert isinstance(first, LightningConfig)
    assert isinstance(last, LightningConfig)
    assert first.rope is not None
    assert first == LightningConfig(
        slopes=first.slopes, head_dim=128, norm_eps=1e-6, num_groups=4, rope=first.rope, has_qk_norm=True,
        scale=128**-0.5,
    )  # fmt: skip
    assert (first.rope.rotary_dim, first.rope.is_interleaved, first.rope.theta) == (64, False, 6e6)
    assert first.slopes[0] == pytest.approx(2**-0.25 * (1 + 1e-5))
    assert last.slopes[31] == pytest.approx(2**-8 * (1 / 31 + 1e-5))
    assert (config.router.num_groups, config.router.kept_groups, config.router.scale) == (8, 4, 2.5)
    assert (config.eos_ids, config.num_mtp_layers, config.moe_layers[0]) == ((156_895,), 1, 1)


def test_layers_behind_the_last_whole_group_have_latent_attention() -> None:
    assert parse(ling_2_5(num_hidden_layers=8, layer_group_size=3)).recurrent_layers == (0, 1, 3, 4)


def test_compressed_vectors_are_normed_with_the_config_s_epsilon() -> None:
    latent = parse(ling_2_5(rms_norm_eps=1e-4)).latent
    assert latent is not None
    assert latent.norm_eps == 1e-4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_group_size": None}, "layer_group_size is null"),
        ({"group_norm_size": 5}, "group_norm_size 5; supported: a divisor of 36, the rows of all heads"),
        ({"use_qkv_bias": True}, "asks for use_qkv_bias true; supported: false"),
        ({"use_bias": True}, "asks for use_bias true; supported: false"),
        ({"linear_rope": False}, "asks for linear_rope false; supported: true"),
        ({"num_kv_heads_for_linear_attn": 2}, "asks for num_kv_heads_for_linear_attn 2; supported: 0"),
        ({"num_key_value_heads": 1}, "gives num_key_value_heads as 1, expected 3"),
        ({"score_function": "softmax"}, "asks for score_function 'softmax'; supported: 'sigmoid'"),
        ({"norm_topk_prob": False}, "asks for norm_topk_prob false; supported: true"),
        ({"moe_router_enable_expert_bias": False}, "enable_expert_bias false; supported: true"),
        ({"moe_shared_expert_intermediate_size": 8}, "asks for moe_shared_expert_intermediate_size 8"),
        ({"partial_rotary_factor": 0.1}, "asks for partial_rotary_factor 0.1; supported: a share of 12"),
        ({"partial_rotary_factor": 1.5}, "asks for partial_rotary_factor 1.5; supported: a share of 12"),
        ({"rotary_dim": 12}, "asks for rotary_dim 12; supported: 6"),
        ({"qk_head_dim": 12}, "asks for qk_head_dim 12; supported: 16"),
        ({"kda_lower_bound": -5.0}, "sets kda_lower_bound to -5.0"),
        # Without its name it would be read as Ling-3.
        ({"architectures": ["BailingHybridForCausalLM"]}, "asks for linear_silu false; supported: true"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(ling_2_5(**changes))
    assert sentence in str(caught.value)


def test_its_layer_for_multi_token_prediction_drafts_and_changes_no_answer(tmp_path: Path) -> None:
    """What such a layer drafts is compared with numpy for Ling-3 (`test_mtp.py`), whose layer differs by its gates."""
    config = ling_2_5(max_position_embeddings=256)
    write_mtp_model(tmp_path, config, seed=3)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    answers = []
    for speculate in ("off", "mtp"):
        with Engine.open(tmp_path, memory="2GiB", threads=1, speculate=speculate) as engine:
            answers.append(engine.generate(prompt_ids(config, 1, 40), params).token_ids)
    assert answers[0] == answers[1]
