"""Hunyuan-A13B: the meaning of its config and GGUF files, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.checkpoint.gguf import read_gguf
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, mean_divergence
from tests.families.hub_ling import HUNYUAN_A13B
from tests.helpers.mixers import in_float32
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_hunyuan import FAMILY, hunyuan


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[FAMILY].parse_config(raw)


def test_heads_are_normed_after_they_rotate_and_alpha_multiplies_theta() -> None:
    config = parse(HUNYUAN_A13B)
    attention = config.attention
    assert (attention.qk_norm, attention.is_norm_last, attention.head_dim) == ("head", True, 128)
    assert attention.rope is not None
    assert attention.rope.theta == pytest.approx(11_158_839.925)
    assert (attention.rope.kind, attention.rope.rotary_dim) == ("default", 128)
    assert (config.experts_per_token, config.expert_width, config.shared_width) == (8, 3072, 3072)
    assert (config.router.score, config.router.renormalize, config.router.scale) == ("softmax", True, 1.0)
    assert (config.moe_layers, config.is_embedding_tied) == (tuple(range(32)), True)


def test_other_spellings_mean_the_same() -> None:
    config = parse(hunyuan())
    assert parse(hunyuan(model_type="hunyuan")) == config
    assert parse(hunyuan(moe_topk=2, moe_intermediate_size=9, num_shared_expert=1)) == config
    rope = {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0}
    assert parse(hunyuan(rope_parameters=rope, rope_scaling=None)) == config
    first_release = {key: value for key, value in hunyuan().items() if key != "head_dim"}
    assert parse(first_release) == config
    unscaled = parse(hunyuan(rope_scaling=None)).attention.rope
    assert unscaled is not None
    assert unscaled.theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe_topk": [2, 2, 3]}, "moe_topk [2, 2, 3]; supported: the same number in every layer"),
        ({"moe_topk": [2, 2]}, "moe_topk [2, 2]; supported: the same number in every layer"),
        ({"moe_intermediate_size": [9, 8, 9]}, "moe_intermediate_size [9, 8, 9]; supported: the same number"),
        ({"num_experts": []}, "num_experts []; supported: the same number"),
        ({"moe_intermediate_size": 8}, "moe_intermediate_size 8; supported: 9"),
        ({"num_shared_expert": [2, 2, 2]}, "num_shared_expert 2; supported: 1"),
        ({"moe_topk": [6, 6, 6]}, "moe_topk is 6, a whole number; expected a whole number from 1 to 5"),
        ({"use_cla": True}, "use_cla true; supported: false"),
        ({"use_mla": True}, "use_mla true; supported: false"),
        ({"use_qk_norm": False}, "use_qk_norm false; supported: true"),
        ({"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe false; supported: true"),
        ({"use_rotary_pos_emb": False}, "use_rotary_pos_emb false; supported: true"),
        ({"norm_topk_prob": False}, "norm_topk_prob false; supported: true"),
        ({"norm_type": "layer"}, "norm_type 'layer'; supported: 'rms'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5; supported: 1 or null"),
        ({"moe_layer_num_skipped": 1}, "moe_layer_num_skipped 1; supported: 0"),
        ({"group_limited_greedy": True}, "group_limited_greedy true; supported: false"),
        ({"position_embedding_xdrope": True}, "position_embedding_xdrope true; supported: false"),
        ({"kv_lora_rank": 512}, "kv_lora_rank 512; supported: null"),
        ({"attention_head_dim": 12}, "attention_head_dim as 12 and head_dim"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.alpha null; supported: a number with"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type 'yarn'; supported: default, dynamic"),
        ({"rope_scaling": {"alpha": 2.0}}, "rope_scaling.alpha 2.0; supported: a number with kind 'dynamic'"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1e10}}, "rope_scaling.alpha 10000000000.0; supported: at most"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 2.0, "odd": 1}}, "odd"),
        ({"moe_capacity": 1}, "sets moe_capacity to 1"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_ask_for(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel)) as refused:
        parse(hunyuan(**changes))
    assert sentence in str(refused.value)


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "attention_head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "moe_topk": 4,  # a rounded score that changed a choice would hide what rounding costs
}


@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_a_gguf_answers_as_its_dequantised_weights(type_name: str, tmp_path: Path) -> None:
    config = hunyuan(**SIZES)
    path = tmp_path / "model.gguf"
    directory = write_gguf_model(path, config, one_type(type_name), seed=3)
    prompt = prompt_ids(config, 5)
    logits = []
    for place in (directory, path):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    if type_name == "F32":
        assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert mean_divergence(logits[0], logits[1]) <= LARGEST_DIVERGENCE


def test_a_gguf_means_the_same_as_config_json(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, hunyuan(), one_type("F32"), seed=3)
    assert open_model(path).config == in_float32(parse(hunyuan()))
    file = read_gguf(path)
    for key, value in (("expert_shared_count", 2), ("expert_shared_feed_forward_length", 18), ("odd", 3)):
        metadata = dict(file.metadata) | {f"hunyuan-moe.{key}": value}
        with pytest.raises(UnsupportedModel, match=key):
            FAMILIES[FAMILY].open_gguf(replace(file, metadata=metadata))
