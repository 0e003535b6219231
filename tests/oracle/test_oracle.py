"""Fresh checkpoints against transformers: other seeds and sizes than the committed references, and random flags.

The tests need torch and transformers (`make test-oracle`). The reference is float32 arithmetic on the stored weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from argosy.model.rope import angle_scale, inverse_frequency
from tests.helpers.mixers import windows
from tests.models.configurations import CONFIGURATIONS, Configuration
from tests.models.make_models import answer, decoder_of, load, make, scaled
from tests.models.random_models import random_configuration, random_gpt_oss, write_decided_model
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.rows import row_of
from tests.models.runnable import runnable
from tests.models.safetensors_file import read_safetensors
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    prompt_ids,
    qwen2_moe,
    qwen3_moe,
    write_model,
)
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_latent import deepseek_v2, deepseek_v3
from tests.models.tiny_mamba import nemotron_h

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

FIRST_SEED = 20_000
SCALED = tuple(replace(c, config=scaled(c.config, 1.7)) for c in CONFIGURATIONS)
RANDOM = tuple(random_configuration(seed) for seed in range(1000, 1024))
RANDOM += tuple(random_gpt_oss(seed) for seed in range(1000, 1008))

# Sizes at which every loop of a kernel runs many times, and no dimension is a multiple of a vector.
LARGE = (
    Configuration(
        name="mixtral_large",
        config=mixtral(
            hidden_size=260, intermediate_size=333, num_local_experts=8, num_hidden_layers=4, head_dim=34
        ),
    ),
    Configuration(
        name="qwen2_moe_large",
        config=qwen2_moe(
            hidden_size=264,
            num_attention_heads=6,
            num_key_value_heads=2,
            moe_intermediate_size=90,
            shared_expert_intermediate_size=300,
            num_experts=24,
            num_experts_per_tok=4,
        ),
    ),
    Configuration(
        name="qwen3_moe_large",
        config=qwen3_moe(
            hidden_size=250,
            moe_intermediate_size=70,
            num_attention_heads=8,
            head_dim=48,
            num_experts=32,
            num_experts_per_tok=8,
        ),
    ),
    Configuration(
        name="glm4_moe_large",
        config=glm4_moe(
            hidden_size=250,
            moe_intermediate_size=70,
            num_attention_heads=6,
            head_dim=44,
            use_qk_norm=True,
            num_hidden_layers=2,
            n_routed_experts=12,  # sigmoid scores lie closer than a softmax's: more experts would give near ties
            n_group=3,
            topk_group=2,
            num_experts_per_tok=3,
            routed_scaling_factor=2.5,
        ),
    ),
    Configuration(
        name="olmoe_large",
        config=olmoe(
            hidden_size=264,
            intermediate_size=70,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_experts=24,
        ),
    ),
    Configuration(
        name="nemotron_h_dense",
        config=nemotron_h(
            hidden_size=128,
            hybrid_override_pattern="M-*M-M",
            intermediate_size=200,
            mamba_head_dim=24,
            mamba_num_heads=12,
            n_groups=3,
            num_hidden_layers=6,
            ssm_state_size=40,
        ),
    ),
    Configuration(
        name="minimax_m2_large",
        config=minimax_m2(
            hidden_size=250,
            intermediate_size=70,
            num_attention_heads=6,
            head_dim=48,
            rotary_dim=26,
            num_hidden_layers=2,
            num_local_experts=10,
            num_experts_per_tok=4,
        ),
    ),
    Configuration(
        name="deepseek_v2_large",
        config=deepseek_v2(
            hidden_size=255,
            num_attention_heads=17,
            num_key_value_heads=17,
            moe_intermediate_size=70,
            n_routed_experts=24,
            num_experts_per_tok=6,
            qk_nope_head_dim=30,
            qk_rope_head_dim=18,
            v_head_dim=34,
            kv_lora_rank=70,
            n_group=2,
            topk_group=1,
            topk_method="group_limited_greedy",
            routed_scaling_factor=4.0,
        ),
    ),
    Configuration(
        name="deepseek_v3_large",
        config=deepseek_v3(
            hidden_size=250,
            num_attention_heads=20,
            num_key_value_heads=20,
            moe_intermediate_size=70,
            n_routed_experts=20,
            num_experts_per_tok=4,
            qk_nope_head_dim=37,
            qk_rope_head_dim=22,
            v_head_dim=33,
            kv_lora_rank=75,
            q_lora_rank=99,
            n_group=2,
            topk_group=1,
            num_hidden_layers=2,
        ),
    ),
    Configuration(
        name="gpt_oss_large",
        config=gpt_oss(
            hidden_size=250,
            intermediate_size=90,
            num_attention_heads=8,
            head_dim=48,
            num_local_experts=24,
            num_experts_per_tok=4,
            sliding_window=13,
        ),
    ),
    Configuration(
        name="gemma4_large",
        config=gemma4(
            hidden_size=250,
            intermediate_size=90,
            moe_intermediate_size=70,
            num_attention_heads=8,
            head_dim=48,
            global_head_dim=94,
            num_experts=24,
            top_k_experts=4,
            sliding_window=13,
        ),
    ),
)


def name_of(configuration: Configuration) -> str:
    return configuration.name


@pytest.mark.parametrize("configuration", [*SCALED, *LARGE], ids=name_of)
def test_logits_and_greedy_continuation_equal_transformers(
    configuration: Configuration, tmp_path: Path
) -> None:
    reference = make(configuration, tmp_path, first_seed=FIRST_SEED)
    prompt = [int(i) for i in read_safetensors(tmp_path / "ref.safetensors")["input_ids"]]
    greedy = SamplingParams(max_tokens=len(reference.greedy), ignore_eos=True)
    model = runnable(tmp_path, tmp_path)
    for instruction_set in _native.instruction_sets():
        with Engine.open(
            model, memory="8GiB", kv_dtype="f32", threads=1, instruction_set=instruction_set
        ) as engine:
            logits = engine.logits(prompt)
            tokens = engine.generate(prompt, greedy).token_ids
        assert difference(logits, reference.logits) <= LARGEST_DIFFERENCE, instruction_set
        assert tokens == reference.greedy, instruction_set


@pytest.mark.parametrize("configuration", RANDOM, ids=name_of)
def test_random_configurations_equal_transformers(configuration: Configuration, tmp_path: Path) -> None:
    prompt = write_decided_model(tmp_path, configuration, num_tokens=24)
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(
        runnable(tmp_path, tmp_path), memory="8GiB", kv_dtype="f32", threads=1, chunk_tokens=7
    ) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


def test_a_long_prompt_equals_transformers(tmp_path: Path) -> None:
    """Hundreds of positions need sums over many keys, many KV blocks, and several chunks."""
    config = qwen3_moe(max_position_embeddings=2048, num_experts=16, num_experts_per_tok=4, hidden_size=64)
    for seed in range(FIRST_SEED, FIRST_SEED + 100):
        write_model(tmp_path, config, seed=seed)
        prompt = prompt_ids(config, seed, 700)
        reference = answer(load(tmp_path), prompt, num_tokens=1)
        if reference.router_margin > 1e-4:
            break
    with Engine.open(
        tmp_path, memory="8GiB", kv_dtype="f32", threads=2, expert_slots=8, chunk_tokens=256
    ) as engine:
        assert difference(engine.logits(prompt), reference.logits) <= LARGEST_DIFFERENCE


# The others' modules in transformers have other names than those read here; their logits are compared.
PLAIN = [c for c in (*CONFIGURATIONS, *RANDOM) if not row_of(c.config).has_own_modules]


@pytest.mark.parametrize("configuration", PLAIN, ids=name_of)
def test_a_config_means_what_transformers_reads_from_it(configuration: Configuration, tmp_path: Path) -> None:
    write_model(tmp_path, configuration.config, seed=1)
    ours = open_model(tmp_path).config
    model = load(tmp_path)
    decoder = decoder_of(model)
    theirs, layers = model.config.get_text_config(), decoder.layers
    attention = [layer.self_attn for layer in layers]

    assert ours.num_layers == len(layers) == theirs.num_hidden_layers
    assert [layer.is_moe for layer in ours.layers] == [hasattr(layer.mlp, "experts") for layer in layers]
    assert windows(ours) == [window_of(theirs, module) for module in attention]
    assert ours.attention.head_dim == attention[0].head_dim
    assert (ours.attention.num_heads, ours.attention.num_kv_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert (ours.vocab_size, ours.hidden_size) == tuple(decoder.embed_tokens.weight.shape)
    assert ours.norm_eps == layers[0].input_layernorm.variance_epsilon
    assert ours.is_embedding_tied == (model.lm_head.weight is decoder.embed_tokens.weight)
    assert (ours.attention.qk_norm != "none") == hasattr(attention[0], "q_norm")
    if ours.attention.qk_norm != "none":
        width = {"head": ours.attention.head_dim, "flat": ours.attention.num_heads * ours.attention.head_dim}[
            ours.attention.qk_norm
        ]
        assert attention[0].q_norm.weight.shape == (width,)
    assert (ours.attention.qkv_limit or None) == getattr(theirs, "clip_qkv", None)
    assert ours.attention.has_qkv_bias == (attention[0].q_proj.bias is not None)
    assert ours.attention.has_o_bias == (attention[0].o_proj.bias is not None)
    assert ours.context_tokens == theirs.max_position_embeddings
    routers = [
        layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
        for layer in layers
        if hasattr(layer.mlp, "experts")
    ]
    assert bool(ours.num_experts) == bool(routers)
    if routers:
        assert ours.num_experts == routers[0].num_experts
        assert ours.experts_per_token == routers[0].top_k
        assert ours.router.renormalize == getattr(routers[0], "norm_topk_prob", True)
        assert ours.router.scale == getattr(routers[0], "routed_scaling_factor", 1.0)
        assert ours.router.num_groups == getattr(routers[0], "num_group", 1)
        assert ours.router.kept_groups == getattr(routers[0], "topk_group", 1)
        moe = layers[ours.moe_layers[0]].mlp
        shared = getattr(moe, "shared_expert", None) or getattr(moe, "shared_experts", None)
        assert ours.shared_width == (shared.gate_proj.out_features if shared else 0)
    eos = theirs.eos_token_id
    if eos is None:  # Qwen3-Omni's thinker has only the end of a turn
        eos = configuration.config["im_end_token_id"]
    assert ours.eos_ids == tuple(eos if isinstance(eos, list) else [eos])

    rotary = decoder.rotary_emb
    np.testing.assert_allclose(inverse_frequency(ours.attention.rope), rotary.inv_freq.numpy(), rtol=1e-6)
    assert angle_scale(ours.attention.rope) == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name_of)
def test_a_config_describes_as_many_weights_as_transformers_has(
    configuration: Configuration, tmp_path: Path
) -> None:
    """In whatever modules: every family has weights, an embedding, a head, and layers with experts or without."""
    write_model(tmp_path, configuration.config, seed=1)
    ours, model = open_model(tmp_path).config, load(tmp_path)
    decoder, head, embedding = decoder_of(model), model.get_output_embeddings(), model.get_input_embeddings()
    weights = {id(weight): weight.numel() for weight in (*decoder.parameters(), head.weight)}
    # Biases for the choice, Gemma's factors of layers, experts by token; a file without such a bias leaves zeros.
    biases = sum(
        buffer.numel()
        for name, buffer in decoder.named_buffers()
        if name.endswith(("bias", "layer_scalar", "tid2eid")) and buffer.any()
    )
    padding = sum(  # rows at the end of a table that no hash gives
        (len(rows := table.ngram_embedding.weight) - int(table.ngram_heads_vocab_sizes.sum())) * rows.shape[1]
        for table in decoder.modules()
        if hasattr(table, "ngram_heads_vocab_sizes")
    )

    assert count_parameters(ours)[0] == sum(weights.values()) + biases - padding
    assert (ours.vocab_size, ours.hidden_size) == tuple(embedding.weight.shape)
    assert ours.is_embedding_tied == (head.weight is embedding.weight)
    assert ours.num_layers == len(decoder.layers)
    has_experts = [
        any(type(module).__name__.endswith("Experts") for module in layer.modules())
        for layer in decoder.layers
    ]
    assert [layer.is_moe for layer in ours.layers] == has_experts


def window_of(config: transformers.PreTrainedConfig, attention: torch.nn.Module) -> int:
    """The window that transformers applies in this layer; 0 means full attention."""
    if config.model_type in ("mixtral", "mistral"):
        return config.sliding_window or 0
    return getattr(attention, "sliding_window", None) or 0


# In Mixtral and Qwen3-MoE, an absent num_key_value_heads does not mean the number of heads.
DEFAULT_KV_HEADS = {
    "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4, "glm4_moe": 8, "olmoe": 16, "minimax_m2": 8,
}  # fmt: skip
OPTIONAL_KEYS = ["head_dim", "rope_theta", "num_key_value_heads", "norm_topk_prob", "rms_norm_eps"]


@pytest.mark.parametrize(
    "family", [mixtral, qwen2_moe, qwen3_moe, glm4_moe, olmoe, minimax_m2], ids=lambda family: family.__name__
)
@pytest.mark.parametrize("missing", OPTIONAL_KEYS)
def test_an_absent_key_has_the_default_of_transformers(
    family: Callable[..., RawConfig], missing: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 16, "head_dim": 4}
    if family is minimax_m2:
        if missing == "head_dim":
            pytest.skip("128 there, whatever the other sizes are: too large a model for this test")
        sizes["rotary_dim"] = 2
    config = family(**sizes, num_key_value_heads=DEFAULT_KV_HEADS[family.__name__])
    write_model(tmp_path, config, seed=2)
    without = {key: value for key, value in config.items() if key != missing}
    (tmp_path / "config.json").write_text(json.dumps(without))
    prompt = prompt_ids(config, 2, 8)
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(tmp_path, memory="8GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    "missing",
    ["head_dim", "rope_theta", "rope_scaling", "num_key_value_heads", "rms_norm_eps", "attention_bias",
     "layer_types", "sliding_window", "swiglu_limit"],
)  # fmt: skip
def test_an_absent_key_of_gpt_oss_has_the_default_of_transformers(missing: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 16, "head_dim": 64}
    config = gpt_oss(**sizes, num_key_value_heads=8)
    if missing == "rope_scaling":
        config["initial_context_length"] = 4096
    write_model(tmp_path, config, seed=2)
    without = {key: value for key, value in config.items() if key != missing}
    (tmp_path / "config.json").write_text(json.dumps(without))
    prompt = prompt_ids(config, 2, 8)
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(runnable(tmp_path, tmp_path), memory="8GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


# Every expert is chosen, as a rounded router score that changed a choice would hide what rounding itself costs.
ALL_CHOSEN = [
    mixtral(hidden_size=128, intermediate_size=96, num_experts_per_tok=6),
    qwen2_moe(hidden_size=128, moe_intermediate_size=96, num_experts_per_tok=6, norm_topk_prob=True),
    qwen3_moe(hidden_size=128, moe_intermediate_size=96, num_experts_per_tok=6),
    glm4_moe(hidden_size=128, moe_intermediate_size=96, num_experts_per_tok=6, intermediate_size=192),
    olmoe(hidden_size=128, intermediate_size=96, num_experts_per_tok=6),
    minimax_m2(hidden_size=128, intermediate_size=96, num_experts_per_tok=6),
    gpt_oss(hidden_size=128, intermediate_size=96, num_experts_per_tok=5),
    deepseek_v3(hidden_size=128, moe_intermediate_size=96, num_experts_per_tok=8, n_group=1, topk_group=1),
    gemma4(hidden_size=128, intermediate_size=96, moe_intermediate_size=96, top_k_experts=6),
]


@pytest.mark.parametrize("config", ALL_CHOSEN, ids=lambda config: config["model_type"])
def test_a_pack_answers_like_its_source(config: RawConfig, tmp_path: Path) -> None:
    """bf16 keeps every bit of a bf16 checkpoint; q8 rounds weights and activations to eight bits, q4 weights to four.

    Random weights have no structure that hides rounding; the bounds are about three times the values found. A wrong
    scale, row or column costs more than one nat.
    """
    write_model(tmp_path / "source", config, seed=FIRST_SEED)
    prompt = prompt_ids(config, FIRST_SEED)
    with torch.no_grad():
        expected = load(tmp_path / "source")(input_ids=torch.tensor([prompt])).logits[0].numpy()
    logits = {}
    for format in ("bf16", "q8", "q4"):
        pack(open_model(tmp_path / "source"), tmp_path / format, format=format)
        with Engine.open(tmp_path / format, memory="8GiB", kv_dtype="f32", threads=1) as engine:
            logits[format] = engine.logits(prompt)

    assert difference(logits["bf16"], expected) <= LARGEST_DIFFERENCE
    assert mean_divergence(expected, logits["q8"]) < 0.002
    assert mean_divergence(expected, logits["q4"]) < 0.04
