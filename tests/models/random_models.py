"""Random configurations: families, flags, sizes and storage in combinations that nobody would write by hand.

Sizes are small and awkward on purpose: widths of one, odd column counts, one expert, all experts chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.models.configurations import Configuration
from tests.models.numpy_model import NumpyModel
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    moe_layers,
    olmoe,
    prompt_ids,
    qwen2_moe,
    qwen3_moe,
    respelt,
    write_model,
)
from tests.models.tiny_latent import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe_lite,
    kimi_k2,
    kimi_k25,
    yarn_of_all_dimensions,
)

# Router decisions closer than this may differ between float32 and float64.
SMALLEST_MARGIN = 1e-3


def random_configuration(seed: int) -> Configuration:
    """Return one configuration per seed; every family gets a sixth of the seeds."""
    rng = np.random.default_rng([seed, 2])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    num_kv_heads = pick(1, 2, 3)
    num_heads = num_kv_heads * pick(1, 2, 4)
    num_layers = pick(1, 2, 3, 5)
    num_experts = pick(1, 2, 5, 8, 19)
    dtype, torch_dtype = pick(
        ("BF16", "bfloat16"), ("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")
    )
    config: RawConfig = {
        "hidden_size": num_heads * 2 * pick(1, 2, 3, 5),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "num_hidden_layers": num_layers,
        "num_experts_per_tok": int(rng.integers(1, min(num_experts, 8) + 1)),
        "vocab_size": pick(17, 64, 200),
        "tie_word_embeddings": pick(True, False),
        "rms_norm_eps": pick(1e-5, 1e-6),
        "torch_dtype": torch_dtype,
        "rope_theta": pick(1e4, 1e6),
    }
    # Always explicit: without it transformers cannot scale Mixtral's positions.
    config["head_dim"] = pick(4, 8, 10, 16, 34)
    match seed % 6:
        case 0:
            config = mixtral(
                **config,
                intermediate_size=pick(1, 7, 32, 40),
                num_local_experts=num_experts,
                sliding_window=pick(None, 1, 5, 64),
            )
        case 1:
            config = qwen2_moe(
                **config,
                intermediate_size=pick(1, 31, 64),
                moe_intermediate_size=pick(1, 7, 32, 40),
                shared_expert_intermediate_size=pick(1, 16, 33),
                num_experts=num_experts,
                norm_topk_prob=pick(True, False),
                qkv_bias=pick(True, False),
                use_sliding_window=pick(True, False),
                sliding_window=pick(1, 5, 64),
                max_window_layers=pick(0, 2, 4),
            )
        case 2:
            config = qwen3_moe(
                **config,
                intermediate_size=pick(1, 31, 64),
                moe_intermediate_size=pick(1, 7, 32, 40),
                num_experts=num_experts,
                norm_topk_prob=pick(True, False),
                attention_bias=pick(True, False),
                use_sliding_window=pick(True, False),
                sliding_window=pick(1, 5, 64),
            )
        case 3:
            num_groups = pick(1, 2, 3)
            config = glm4_moe(
                **config | {"num_experts_per_tok": pick(1, 2), "head_dim": pick(8, 10, 16, 34)},
                intermediate_size=pick(1, 31, 64),
                moe_intermediate_size=pick(1, 7, 32, 40),
                n_routed_experts=num_groups * pick(2, 5, 8),
                n_group=num_groups,
                topk_group=int(rng.integers(1, num_groups + 1)),
                n_shared_experts=pick(1, 2),
                norm_topk_prob=pick(True, False),
                attention_bias=pick(True, False),
                use_qk_norm=pick(True, False),
                routed_scaling_factor=pick(1.0, 2.5),
                first_k_dense_replace=pick(0, num_layers - 1),
            )
            config["partial_rotary_factor"] = pick(1.0, 4.5 / config["head_dim"])
        case 4:
            config = olmoe(
                **config | {"head_dim": None},
                intermediate_size=pick(1, 7, 32, 40),
                num_experts=num_experts,
                norm_topk_prob=pick(True, False),
                attention_bias=pick(True, False),
                clip_qkv=pick(None, 0.7, 3.0),
            )
            del config["head_dim"]
        case 5:
            config = minimax_m2(
                **config,
                intermediate_size=pick(1, 7, 32, 40),
                num_local_experts=num_experts,
                rotary_dim=pick(2, 4, config["head_dim"]),
            )
    if config["model_type"].startswith("qwen"):
        dense = {
            "mlp_only_layers": [i for i in range(num_layers) if rng.random() < 0.2],
            "decoder_sparse_step": pick(1, 1, 2),
        }
        if moe_layers(config | dense):
            config |= dense
    scaling = pick(
        None,
        None,
        {"rope_type": "linear", "factor": pick(1.5, 4.0)},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "yarn",
            "factor": pick(2.0, 32.0),
            "original_max_position_embeddings": pick(8, 64),
            "beta_fast": pick(4.0, 32.0),
            "beta_slow": pick(0.5, 1.0),
            "truncate": pick(True, False),
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": pick(2.0, 4.0),
            "original_max_position_embeddings": pick(8, 32),
        },
    )
    if pick(True, False):
        config = respelt(config, theta=config["rope_theta"], **(scaling or {}))
    else:
        config["rope_scaling"] = scaling
    return Configuration(name=f"random_{seed}", config=config, dtype=dtype, num_shards=pick(1, 1, 2, 4))


def random_gpt_oss(seed: int) -> Configuration:
    """Do the same for gpt-oss: windows and limits with and without effect, all kinds of rotary embedding."""
    rng = np.random.default_rng([seed, 4])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    num_kv_heads = pick(1, 2, 3)
    num_heads = num_kv_heads * pick(1, 2, 4)
    num_layers = pick(1, 2, 3, 5)
    num_experts = pick(1, 2, 5, 8, 19)
    kinds = ["sliding_attention", "full_attention"]
    dtype, torch_dtype = pick(("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"))
    config = gpt_oss(
        hidden_size=num_heads * 2 * pick(1, 2, 3, 5),
        intermediate_size=pick(1, 7, 32, 40),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=pick(4, 8, 10, 16, 34),
        num_hidden_layers=num_layers,
        num_local_experts=num_experts,
        num_experts_per_tok=int(rng.integers(1, min(num_experts, 8) + 1)),
        vocab_size=pick(17, 64, 200),
        tie_word_embeddings=pick(True, False),
        attention_bias=pick(True, False),
        layer_types=pick(None, [kinds[rng.integers(2)] for _ in range(num_layers)]),
        sliding_window=pick(1, 5, 64),
        swiglu_limit=pick(0.3, 1.0, 7.0),
        swiglu_alpha=pick(1.0, 1.702),
        torch_dtype=torch_dtype,
        rope_scaling=pick(
            {"rope_type": "linear", "factor": 4.0},
            {
                "rope_type": "yarn",
                "factor": pick(2.0, 32.0),
                "original_max_position_embeddings": pick(8, 64),
                "truncate": pick(True, False),
            },
        ),
        initial_context_length=None,
    )
    return Configuration(
        name=f"random_gpt_oss_{seed}", config=config, dtype=dtype, num_shards=pick(1, 1, 2, 4)
    )


def random_latent_configuration(seed: int) -> Configuration:
    """Return one configuration per seed: DeepSeek-V2 and V3, Kimi-K2 and K2.5, and GLM-4.7-Flash in turn."""
    rng = np.random.default_rng([seed, 5])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    make = (deepseek_v2, deepseek_v3, kimi_k2, kimi_k25, glm4_moe_lite)[seed % 5]
    num_heads, num_layers, num_groups = pick(1, 2, 3, 17), pick(1, 2, 4), pick(1, 2, 3)
    experts_of_group = pick(2, 3, 5)
    dtype, torch_dtype = pick(("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"))
    config = make(
        hidden_size=num_heads * 2 * pick(1, 3, 5),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        num_hidden_layers=num_layers,
        first_k_dense_replace=pick(0, num_layers - 1),
        q_lora_rank=pick(None, 1, 17),
        kv_lora_rank=2 * pick(1, 8, 17),
        qk_nope_head_dim=2 * pick(1, 5, 16),
        qk_rope_head_dim=2 * pick(1, 3, 8),
        v_head_dim=pick(1, 7, 32),
        n_routed_experts=num_groups * experts_of_group,
        n_group=num_groups,
        topk_group=int(rng.integers(1, num_groups + 1)),
        num_experts_per_tok=pick(1, 2),
        n_shared_experts=pick(1, 2),
        moe_intermediate_size=pick(1, 7, 32),
        intermediate_size=pick(1, 31, 64),
        routed_scaling_factor=pick(1.0, 2.5),
        vocab_size=pick(17, 64),
        tie_word_embeddings=pick(True, False),
        rms_norm_eps=pick(1e-5, 1e-6),
        torch_dtype=torch_dtype,
        rope_theta=pick(1e4, 1e6),
        rope_scaling=pick(None, yarn_of_all_dimensions(pick(4.0, 40.0), 16, mscale=pick(0.7, 1.0))),
        **(
            {"topk_method": pick("greedy", "group_limited_greedy")}
            if make is deepseek_v2
            else {"norm_topk_prob": pick(True, False), "rope_interleave": pick(True, True, False)}
        ),
    )
    return Configuration(name=f"random_{config['model_type']}_{seed}", config=config, dtype=dtype)


def write_decided_model(directory: Path, configuration: Configuration, *, num_tokens: int) -> list[int]:
    """Write the model of the first seed whose prompt is routed without a near-tie; return the prompt."""
    for seed in range(1000):
        write_model(
            directory,
            configuration.config,
            seed=seed,
            dtype=configuration.dtype,
            num_shards=configuration.num_shards,
        )
        prompt = prompt_ids(configuration.config, seed, num_tokens)
        model = NumpyModel(directory)
        model.logits(prompt)
        if model.router_margin > SMALLEST_MARGIN:
            return prompt
    raise AssertionError(f"{configuration.name}: 1000 seeds, each with a near tie")
