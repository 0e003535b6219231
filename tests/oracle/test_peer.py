"""GGUF files against llama.cpp: Argosy computes the same logits from a file.

llama.cpp comes as llama-cpp-python in an environment of its own (`make peer` builds it, `ARGOSY_PEER_PYTHON` names
another interpreter); without it these tests are skipped. llama.cpp keeps keys and values in 16 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from tests.models.gguf_deepseek_v4 import write_gguf
from tests.models.gguf_delta import write_delta_gguf
from tests.models.gguf_k3 import write_k3_gguf
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.gguf_step import write_step_gguf
from tests.models.numpy_deepseek_v4 import DeepseekV4
from tests.models.references import mean_divergence
from tests.models.safetensors_file import Array
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    olmoe,
    prompt_ids,
    qwen3_moe,
    random_tensors,
)
from tests.models.tiny_deepseek_v4 import deepseek_v4
from tests.models.tiny_delta import qwen3_5_moe_text, qwen3_next
from tests.models.tiny_gqa import mimo_v2_flash
from tests.models.tiny_k3 import PEER_BLOCKS, PEER_SEED, kimi_k3_for_peer
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_latent import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k2,
    mistral4,
    yarn_of_all_dimensions,
)
from tests.models.tiny_llama4 import OF_GGUF, llama4_text
from tests.models.tiny_minimax import minimax
from tests.models.tiny_minimax_m3 import minimax_m3
from tests.models.tiny_qwen4 import qwen4_exp_text
from tests.models.tiny_recurrent import lfm2_moe
from tests.models.tiny_step import FULL, SLIDING, step3p5

ROOT = Path(__file__).parents[2]
PEER = Path(os.environ.get("ARGOSY_PEER_PYTHON") or ROOT / "build" / "peer-venv" / "bin" / "python")

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no llama-cpp-python: {PEER} does not exist")

# Mean KL in nats; keys and values in 16 bits cost 6e-7, a wrong scale or frequency more than 1e-3.
LARGEST_DIVERGENCE = 1e-5

# The yarn bounds are passed explicitly, because the class overrides those of the file with its own.
SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, ids, out, yarn = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
model = Llama(path, n_ctx=max(64, len(ids)), logits_all=True, verbose=False, n_threads=1, **yarn)
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)]))
"""


def peer_logits(path: Path, token_ids: list[int], **yarn: float) -> Array:
    """The logits of llama.cpp, float32 [tokens, vocab]."""
    out = path.with_suffix(".npy")
    subprocess.run(
        [PEER, "-c", SCRIPT, path, json.dumps(token_ids), out, json.dumps(yarn)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return np.asarray(np.load(out))


LATENT: dict[str, Any] = {
    "hidden_size": 256,
    "kv_lora_rank": 256,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 64,
    "intermediate_size": 96,
}
MODELS: dict[str, RawConfig] = {
    "DeepSeek-V2": deepseek_v2(**LATENT, rope_scaling=yarn_of_all_dimensions(40.0, 16, mscale=0.707)),
    "DeepSeek-V3": deepseek_v3(**LATENT),
    "Kimi-K2": kimi_k2(**LATENT),
    "GLM-4.7-Flash": glm4_moe_lite(**LATENT | {"v_head_dim": 96}),
    # With a factor above 1, llama.cpp would multiply scores by yarn's magnitude (`mistral4.py`).
    "Mistral-Small-4": mistral4(**LATENT, rope_parameters=mistral4()["rope_parameters"] | {"factor": 1.0}),
    "Mistral-Small-4 in groups": mistral4(
        **LATENT, n_group=3, topk_group=2, rope_parameters=mistral4()["rope_parameters"] | {"factor": 1.0}
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("split_kv", [True, False])
def test_logits_of_latent_attention_are_llama_cpp_s(name: str, split_kv: bool, tmp_path: Path) -> None:
    config, path = MODELS[name], tmp_path / "model.gguf"
    write_gguf_model(path, config, one_type("F32"), seed=7, split_kv=split_kv)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)
    scaling = config.get("rope_parameters", config.get("rope_scaling")) or {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    yarn = {f"yarn_{key}": float(scaling[key]) for key in ("beta_fast", "beta_slow")}

    assert mean_divergence(peer_logits(path, prompt, **yarn), logits) <= LARGEST_DIVERGENCE


INDEXED: dict[str, Any] = {"index_head_dim": 128, "index_n_heads": 8, "index_topk": 12}
INDEXED_MODELS: dict[str, RawConfig] = {
    "DeepSeek-V3.2": deepseek_v32(**LATENT, **INDEXED),
    "GLM-5.2": glm_moe_dsa(
        **LATENT | INDEXED, head_dim=32, qk_head_dim=64, num_hidden_layers=4,
        indexer_types=["full", "full", "shared", "full"],
    ),
}  # fmt: skip


# llama.cpp keeps index keys in 16 bits: with this seed, no choice is so near that rounding changes it.
@pytest.mark.parametrize("name", INDEXED_MODELS)
def test_logits_over_the_positions_that_an_indexer_chooses_are_llama_cpp_s(name: str, tmp_path: Path) -> None:
    config, path = INDEXED_MODELS[name], tmp_path / "model.gguf"
    write_gguf_model(path, config, one_type("F32"), seed=8)
    prompt = prompt_ids(config, 8)
    assert len(prompt) > 2 * config["index_topk"]
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)

    assert mean_divergence(peer_logits(path, prompt), logits) <= LARGEST_DIVERGENCE


# llama.cpp chooses blocks only with flash attention; otherwise it attends to all positions.
MINIMAX_M3 = minimax_m3(
    hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=64, rotary_dim=32,
    partial_rotary_factor=0.5, num_local_experts=6, index={"sparse_index_dim": 64, "sparse_topk_blocks": 3},
)  # fmt: skip


def test_logits_over_the_blocks_that_an_indexer_chooses_are_llama_cpp_s(tmp_path: Path) -> None:
    path, prompt = tmp_path / "model.gguf", prompt_ids(MINIMAX_M3, 7, 110)
    write_gguf_model(path, MINIMAX_M3, one_type("F32"), seed=7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)
    assert mean_divergence(peer_logits(path, prompt, flash_attn=True), logits) <= LARGEST_DIVERGENCE


# llama.cpp keeps entries and their index keys in 16 bits, which changes a choice between near scores: one token in two
# hundred here. With these seeds no choice changes.
@pytest.mark.parametrize("seed", [0, 33])
def test_logits_over_pools_and_windows_are_llama_cpp_s(seed: int, tmp_path: Path) -> None:
    config = deepseek_v4(
        hidden_size=64, head_dim=64, qk_rope_head_dim=32, index_head_dim=64, q_lora_rank=32,
        o_lora_rank=32, moe_intermediate_size=32, sliding_window=16,
    )  # fmt: skip
    tensors, path = random_tensors(config, seed, "F32"), tmp_path / "model.gguf"
    write_gguf(path, config, tensors)
    prompt = np.random.default_rng(seed).integers(3, config["vocab_size"], 150).tolist()
    model = DeepseekV4(config, {name: one.astype(np.float64) for name, one in tensors.items()})
    model.logits(prompt)
    assert model.margin > 3e-4
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)
    assert mean_divergence(peer_logits(path, prompt), logits) <= LARGEST_DIVERGENCE


@pytest.mark.parametrize("block", PEER_BLOCKS)
def test_logits_of_a_bank_of_hidden_states_are_llama_cpp_s(block: int, tmp_path: Path) -> None:
    config = kimi_k3_for_peer(block)
    path, prompt = tmp_path / "model.gguf", prompt_ids(config, PEER_SEED)
    write_k3_gguf(path, config, random_tensors(config, PEER_SEED, "F32"))
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)
    assert mean_divergence(peer_logits(path, prompt), logits) <= LARGEST_DIVERGENCE


SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 256,
}  # fmt: skip
GLM: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 256}
HEADS: dict[str, RawConfig] = {
    "GLM-4.5-Air": glm4_moe(**SIZES, **GLM, n_routed_experts=6),
    "GLM-4.6": glm4_moe(
        **SIZES,
        **GLM,
        n_routed_experts=6,
        use_qk_norm=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=2,
    ),
    "GLM in groups": glm4_moe(
        **SIZES, **GLM, n_routed_experts=24, n_group=4, topk_group=2, num_experts_per_tok=4
    ),
    "OLMoE": olmoe(**SIZES, num_key_value_heads=8, num_experts=6),
    # llama.cpp counts the position itself in a window, so the prompt ends before the window's edge.
    "MiMo-V2-Flash": mimo_v2_flash(
        **SIZES,
        num_key_value_heads=2,
        head_dim=96,
        v_head_dim=64,
        moe_intermediate_size=256,
        n_routed_experts=6,
        sliding_window_size=64,
    ),
    "LFM2-MoE": lfm2_moe(**SIZES, num_key_value_heads=2, moe_intermediate_size=256, num_experts=6),
    "MiniMax-Text-01": minimax(
        **SIZES,
        num_key_value_heads=2,
        head_dim=64,
        rotary_dim=32,
        num_local_experts=6,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "MiniMax-M2": minimax_m2(**SIZES, num_key_value_heads=2, head_dim=64, rotary_dim=32, num_local_experts=6),
}


def divergence_from_peer(path: Path, config: RawConfig, type_name: str) -> float:
    write_gguf_model(path, config, one_type(type_name), seed=7)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)
    return mean_divergence(peer_logits(path, prompt), logits)


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_partial_rotary_flat_norms_and_sigmoid_routers_are_llama_cpp_s(
    name: str, tmp_path: Path
) -> None:
    assert divergence_from_peer(tmp_path / "model.gguf", HEADS[name], "F32") <= LARGEST_DIVERGENCE


def test_chunks_and_the_growth_of_queries_are_llama_cpp_s(tmp_path: Path) -> None:
    """In a prompt that crosses the first chunk's end. With one expert, no rounding of keys changes a choice."""
    path, num_tokens = tmp_path / "model.gguf", OF_GGUF["attention_chunk_size"] + 40
    config = llama4_text(
        **OF_GGUF, num_local_experts=1, max_position_embeddings=16_384, hidden_size=64, head_dim=32
    )
    write_gguf_model(path, config, one_type("F32"), seed=7)
    prompt = prompt_ids(config, 7, num_tokens)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1, context=num_tokens + 1) as engine:
        logits = engine.logits(prompt)

    expected = peer_logits(path, prompt)
    for part in (slice(0, -41), slice(-41, None)):
        assert mean_divergence(expected[part], logits[part]) <= LARGEST_DIVERGENCE


@pytest.mark.parametrize("heads", [6, 4])
def test_logits_of_limited_activations_and_windows_with_other_heads_are_llama_cpp_s(
    heads: int, tmp_path: Path
) -> None:
    config = step3p5(
        attention_other_setting={"num_attention_heads": heads},
        layer_types=[FULL, SLIDING, SLIDING, FULL],
        num_nextn_predict_layers=0,
        partial_rotary_factors=[0.5, 1.0, 1.0, 0.5],
        rope_theta=[5000000.0, 10000.0, 10000.0, 5000000.0],
        swiglu_limits=[0.0, 0.0, 0.04, 0.06],
        swiglu_limits_shared=[0.05, 0.0, 0.07, 0.1],
    )
    path = tmp_path / "model.gguf"
    write_step_gguf(path, config, one_type("F32"), seed=7)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)

    assert mean_divergence(peer_logits(path, prompt), logits) <= LARGEST_DIVERGENCE


# Text parts of models that also see: images have positions on several axes, and text has them on one.
SEEING: dict[str, tuple[RawConfig, tuple[int, ...]]] = {
    "Qwen3-VL-MoE": (
        qwen3_moe(**SIZES, num_key_value_heads=2, head_dim=64, moe_intermediate_size=256, num_experts=6),
        (12, 10, 10),
    ),
    "GLM-4.5V": (HEADS["GLM-4.5-Air"], (4, 6, 6)),
}


@pytest.mark.parametrize("name", SEEING)
def test_logits_of_text_with_three_position_axes_are_llama_cpp_s(name: str, tmp_path: Path) -> None:
    config, sections = SEEING[name]
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config, one_type("F32"), seed=7, sections=sections)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)

    assert mean_divergence(peer_logits(path, prompt), logits) <= LARGEST_DIVERGENCE


# llama.cpp's delta nets allow key heads of any width, but value heads must have the same width.
DELTA: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
DELTA_MODELS: dict[str, RawConfig] = {
    "Qwen3-Next": qwen3_next(**DELTA, linear_num_value_heads=4),
    "Qwen3-Next, a value head for each key head": qwen3_next(**DELTA, linear_num_value_heads=2),
    "Qwen3.5-MoE": qwen3_5_moe_text(**DELTA, linear_num_value_heads=6),
    "Qwen3.8": qwen4_exp_text(
        **DELTA,
        hc_lowrank=32,
        heads_per_ngram=4,
        indexer_budget=32,  # the whole prompt: llama.cpp keeps index keys in float16, which changes choices
        indexer_head_dim=64,
        linear_num_value_heads=4,
        ple_embed_dim=256,
    ),
}


# With Q8_0 weights, activations have 16 bits in Argosy and 8 in llama.cpp, so every expert is chosen.
@pytest.mark.parametrize("name", DELTA_MODELS)
@pytest.mark.parametrize(
    ("type_name", "experts_per_token", "largest"), [("F32", 2, LARGEST_DIVERGENCE), ("Q8_0", 6, 0.002)]
)
def test_logits_of_gated_delta_nets_are_llama_cpp_s(
    name: str, type_name: str, experts_per_token: int, largest: float, tmp_path: Path
) -> None:
    config = DELTA_MODELS[name] | {"num_experts_per_tok": experts_per_token}
    path = tmp_path / "model.gguf"
    write_delta_gguf(path, config, one_type(type_name), seed=7)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)

    assert mean_divergence(peer_logits(path, prompt), logits) <= largest


def test_q_k_v_and_z_are_read_from_one_matrix_as_in_llama_cpp(tmp_path: Path) -> None:
    config, path = DELTA_MODELS["Qwen3-Next"], tmp_path / "model.gguf"
    write_delta_gguf(path, config, one_type("F32"), seed=7, has_ssm_in=True)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)

    assert mean_divergence(peer_logits(path, prompt), logits) <= LARGEST_DIVERGENCE


# llama.cpp chooses among all experts of Kimi-Linear, and its queries have no low rank.
KDA: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
}
KDA_MODELS: dict[str, RawConfig] = {
    "Kimi-Linear": kimi_linear(
        **KDA,
        linear_attn_config={
            "full_attn_layers": [2],
            "head_dim": 64,
            "kda_layers": [1, 3],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        qk_rope_head_dim=32,
    ),
    "Ling-3": bailing_hybrid(
        **KDA,
        expert_swiglu_limit_list=[0.0, 0.04, 0.0, 0.05],
        head_dim=64,
        moe_shared_expert_intermediate_size=256,
        q_lora_rank=64,
        share_expert_swiglu_limit_list=[0.0, 0.0, 0.03, 0.04],
    ),
}


# With Q8_0 weights, every expert is chosen, as above.
@pytest.mark.parametrize("name", KDA_MODELS)
@pytest.mark.parametrize(
    ("type_name", "experts_per_token", "largest"), [("F32", 2, LARGEST_DIVERGENCE), ("Q8_0", 6, 0.002)]
)
def test_logits_of_kimi_delta_attention_are_llama_cpp_s(
    name: str, type_name: str, experts_per_token: int, largest: float, tmp_path: Path
) -> None:
    config = KDA_MODELS[name] | dict.fromkeys(
        ("num_experts_per_token", "num_experts_per_tok"), experts_per_token
    )
    if type_name == "Q8_0":
        config |= {"n_group": 1, "topk_group": 1}
    assert divergence_from_peer(tmp_path / "model.gguf", config, type_name) <= largest


# Every expert is chosen, as a rounded score that changed a choice would hide what 8-bit activations cost.
@pytest.mark.parametrize("name", ["GLM-4.6", "OLMoE", "MiniMax-M2", "MiniMax-Text-01", "LFM2-MoE"])
def test_logits_of_quantised_models_are_close_to_llama_cpp_s(name: str, tmp_path: Path) -> None:
    config = HEADS[name] | {"num_experts_per_tok": 6}
    assert divergence_from_peer(tmp_path / "model.gguf", config, "Q8_0") <= 0.002


# llama.cpp rounds the yarn bounds, and gpt-oss does not. With MXFP4, activations have 8 bits in both.
@pytest.mark.parametrize(("type_name", "largest"), [("F32", 1e-4), ("MXFP4", 0.002)])
def test_logits_of_sinks_windows_and_biases_are_llama_cpp_s(
    type_name: str, largest: float, tmp_path: Path
) -> None:
    # Every expert is chosen, as a rounded score that changed a choice would hide what rounding costs.
    config = gpt_oss(
        hidden_size=256,
        intermediate_size=256,
        head_dim=64,
        num_attention_heads=8,
        num_hidden_layers=4,
        num_local_experts=6,
        num_experts_per_tok=6,
        max_position_embeddings=131_072,
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    )
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config, one_type(type_name), seed=7)
    prompt = prompt_ids(config, 7)
    with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt)

    assert mean_divergence(peer_logits(path, prompt), logits) <= largest
