"""Families with latent attention against transformers: configs, a long prompt, and a wrapper of several parts.

`test_oracle.py` checks logits and greedy tokens of all configurations, at other seeds and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from argosy import Engine
from argosy.model.families import open_model
from argosy.model.rope import angle_scale, inverse_frequency
from tests.models.configuration import Configuration
from tests.models.configurations_latent import CONFIGURATIONS
from tests.models.make_models import answer, load
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_latent import deepseek_v2, deepseek_v3, glm4_moe_lite, kimi_k25

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

FIRST_SEED = 40_000


# Mistral's scale of scores follows its makers, and A.X-K1's tensors decide what its config does not say.
DEEPSEEKS = [
    one for one in CONFIGURATIONS if one.config["model_type"] not in ("mistral3", "mistral4", "axk1")
]


@pytest.mark.parametrize("configuration", DEEPSEEKS, ids=lambda configuration: configuration.name)
def test_a_config_means_what_transformers_reads_from_it(configuration: Configuration, tmp_path: Path) -> None:
    write_model(tmp_path, configuration.config, seed=1)
    ours = open_model(tmp_path).config
    model = load(tmp_path)
    theirs, layers = model.config, model.model.layers
    attention = layers[0].self_attn
    latent = ours.latent
    assert latent is not None

    assert [layer.is_moe for layer in ours.layers] == [hasattr(layer.mlp, "experts") for layer in layers]
    assert (latent.query_rank or None, latent.kv_rank) == (attention.q_lora_rank, attention.kv_lora_rank)
    assert (latent.nope_dim, latent.rope_dim) == (attention.qk_nope_head_dim, attention.qk_rope_head_dim)
    assert (latent.value_dim, latent.head_dim) == (attention.v_head_dim, attention.qk_head_dim)
    assert latent.norm_eps == attention.kv_a_layernorm.variance_epsilon
    assert latent.scale == pytest.approx(attention.scaling, rel=1e-12)
    assert latent.num_heads == theirs.num_attention_heads == theirs.num_key_value_heads
    assert (ours.vocab_size, ours.hidden_size) == tuple(model.model.embed_tokens.weight.shape)
    assert ours.norm_eps == layers[0].input_layernorm.variance_epsilon
    assert ours.is_embedding_tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert ours.context_tokens == theirs.max_position_embeddings

    moe = layers[ours.moe_layers[0]].mlp
    router = moe.gate
    assert (ours.num_experts, ours.experts_per_token) == (router.num_experts, router.top_k)
    assert ours.router.scale == router.routed_scaling_factor
    assert ours.router.has_choice_bias == hasattr(router, "e_score_correction_bias")
    assert ours.router.renormalize == getattr(router, "norm_topk_prob", False)
    if getattr(router, "topk_method", "group_limited_greedy") != "greedy":
        assert (ours.router.num_groups, ours.router.kept_groups) == (router.num_group, router.topk_group)
    assert ours.shared_width == moe.shared_experts.gate_proj.out_features

    rotary = model.model.rotary_emb
    np.testing.assert_allclose(inverse_frequency(latent.rope), rotary.inv_freq.numpy(), rtol=1e-6)
    assert angle_scale(latent.rope) == pytest.approx(rotary.attention_scaling, rel=1e-12)


# Each key has its default value, so that dropping the key leaves the model unchanged.
DEFAULTS: dict[Callable[..., RawConfig], RawConfig] = {
    deepseek_v2: {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_shared_experts": 2, "first_k_dense_replace": 0},
    deepseek_v3: {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "n_shared_experts": 1, "n_group": 8,
        "topk_group": 4, "n_routed_experts": 16, "first_k_dense_replace": 3, "num_hidden_layers": 4,
        "rope_interleave": True, "norm_topk_prob": True,
    },
    glm4_moe_lite: {
        "kv_lora_rank": 512, "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "first_k_dense_replace": 1,
        "rope_interleave": True,
    },
}  # fmt: skip
SIZES_ALONE = ("n_routed_experts", "num_hidden_layers")  # sizes of this test, not of the family
COMMON_KEYS = ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "rope_scaling")
OPTIONAL_KEYS = [
    *((family, name) for family, sizes in DEFAULTS.items() for name in sizes if name not in SIZES_ALONE),
    *((family, name) for family in DEFAULTS for name in COMMON_KEYS),
    (deepseek_v2, "topk_method"),
    (deepseek_v2, "num_key_value_heads"),
]


@pytest.mark.parametrize(
    ("family", "missing"),
    OPTIONAL_KEYS,
    ids=[f"{family.__name__}-{missing}" for family, missing in OPTIONAL_KEYS],
)
def test_an_absent_key_has_the_default_of_transformers(
    family: Callable[..., RawConfig], missing: str, tmp_path: Path
) -> None:
    config = family(**DEFAULTS[family])
    if missing == "rope_theta":
        config |= {"rope_theta": 10000.0}
    write_model(tmp_path, config, seed=2)
    without = {key: value for key, value in config.items() if key != missing}
    (tmp_path / "config.json").write_text(json.dumps(without))
    prompt = prompt_ids(config, 2, 8)
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(tmp_path, memory="8GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


def test_a_long_prompt_equals_transformers(tmp_path: Path) -> None:
    """Hundreds of positions need sums over several sections of vectors, many KV blocks, and several chunks."""
    config = deepseek_v3(
        max_position_embeddings=2048,
        n_routed_experts=16,
        hidden_size=64,
        num_attention_heads=18,
        num_key_value_heads=18,
    )
    for seed in range(FIRST_SEED, FIRST_SEED + 100):
        write_model(tmp_path, config, seed=seed)
        prompt = prompt_ids(config, seed, 700)
        reference = answer(load(tmp_path), prompt, num_tokens=1)
        if reference.router_margin > 1e-5:
            break
    with Engine.open(
        tmp_path, memory="8GiB", kv_dtype="f32", threads=2, expert_slots=8, chunk_tokens=256
    ) as engine:
        assert difference(engine.logits(prompt), reference.logits) <= LARGEST_DIFFERENCE


def test_the_text_part_of_a_wrapper_is_the_one_transformers_reads(tmp_path: Path) -> None:
    """`load` reads only the text model; here the class of the whole model reads the hub's names."""
    config = kimi_k25()
    config["vision_config"] = {
        "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 2,
    }  # fmt: skip
    write_model(tmp_path, config, seed=3)
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    assert not [name for name in report["missing_keys"] if "language_model" in name or "lm_head" in name]
    prompt = prompt_ids(config, 3)
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(tmp_path, memory="8GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE
