"""Write tiny checkpoints as GGUF files in every block type, with the same weights dequantised beside them.

    config.json as the hub has it + a type for each tensor  ->  model.gguf
                                                            ->  directory with the dequantised weights in F32

The `gguf` package writes and reads the blocks, so only names and order are ours. Types to which it cannot quantise get
random blocks of the wanted size; each weight is then its block's value. Those that it cannot read either are decoded by
`tests/native/gguf_blocks.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from tests.models import (
    gguf_minimax,
    gguf_windows,
    tiny_dense,
    tiny_gqa,
    tiny_grouped,
    tiny_hunyuan,
    tiny_kda,
    tiny_llama4,
    tiny_ocr,
    tiny_windows,
)
from tests.models.gguf_cohere import add_cohere_metadata
from tests.models.gguf_kda import add_kda_metadata, as_stored, kda_name
from tests.models.rows import row_of
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, head_dim, moe_layers, num_experts, random_tensors, text_of
from tests.models.tiny_latent import INDEXED_FAMILIES, LATENT_FAMILIES, MISTRAL_FAMILIES
from tests.models.tiny_mtp import mtp_tensors
from tests.native import gguf_blocks
from tests.native.gguf_blocks import WITHOUT_PACKAGE, put_iq1_m_scales

_PAIRED = ("mixtral", "llama", "granite", "mistral", "ministral3")  # rows of q and k are in adjacent pairs
_SIGMOID = ("glm4_moe", *tiny_grouped.FAMILIES)
# Types to which the `gguf` package does not quantise: the offset of the float16 scale, the offset of the scale of the
# minima if there is one, and the factor that makes the mean 0. IQ1_M's scale lies in four words of its blocks;
# NVFP4 has four scales in FP8.
_RANDOM_TYPES: dict[str, tuple[int | None, int | None, float]] = {
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "NVFP4": (None, None, 0.0),
    "IQ4_NL": (0, None, 0.0),
    "IQ4_XS": (0, None, 0.0),
    "IQ2_XXS": (0, None, 0.0),
    "IQ2_XS": (0, None, 0.0),
    "IQ2_S": (0, None, 0.0),
    "IQ3_XXS": (0, None, 0.0),
    "IQ3_S": (0, None, 0.0),
    "IQ1_S": (0, None, 0.0),
    "IQ1_M": (None, None, 0.0),
}
BLOCK_TYPES = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0"),
    *_RANDOM_TYPES,
    *WITHOUT_PACKAGE,
)
TYPES = ("F32", "F16", "BF16", *BLOCK_TYPES)

TypeOf = Callable[[str], str]  # the GGUF name of a tensor -> its type

_NAMES = {
    "input_layernorm": "attn_norm",
    "pre_mlp_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "self_attn.gate_proj": "attn_gate",
    "self_attn.g_proj": "attn_gate",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "mlp.gate.wg": "ffn_gate_inp",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "attention.query_layernorm": "attn_q_norm",
    "attention.key_layernorm": "attn_k_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    **{
        f"block_sparse_moe.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")
    },
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.output_gate": "attn_gate",
    "self_attn.norm": "attn_norm_2",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    **{f"self_attn.index_{part}": f"indexer.{part}" for part in ("q_proj", "k_proj", "q_norm", "k_norm")},
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.router": "ffn_gate_inp",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.router": "ffn_gate_inp",
    **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"feed_forward.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "mlp.router.gate": "ffn_gate_inp",
    "mlp.shared_mlp.gate_proj": "ffn_gate_shexp",
    "mlp.shared_mlp.up_proj": "ffn_up_shexp",
    "mlp.shared_mlp.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
# Ling's attention has another name.
_NAMES = {name.replace("self_attn.", "attention."): to for name, to in _NAMES.items()} | _NAMES
# The GGUF tensors of gpt-oss's fused tensors, by the last part of their names; Llama-4's have halves.
_SLICES: dict[str, dict[str, Any]] = {
    "gate_up_proj": {"ffn_gate_exps.weight": np.s_[:, :, 0::2], "ffn_up_exps.weight": np.s_[:, :, 1::2]},
    "gate_up_proj_bias": {"ffn_gate_exps.bias": np.s_[:, 0::2], "ffn_up_exps.bias": np.s_[:, 1::2]},
    "down_proj": {"ffn_down_exps.weight": np.s_[:]},
    "down_proj_bias": {"ffn_down_exps.bias": np.s_[:]},
}
_MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.word_embeddings": "token_embd",
    "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
}
_SWIGLU = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def one_type(block_type: str) -> TypeOf:
    """Store all matrices in one type, and leave in F32 what llama.cpp's quantiser leaves in F32."""
    return lambda name: (
        "F32"
        if any(part in name for part in ("ffn_gate_inp", "norm", "sinks", "shortconv.conv", "ssm_conv1d"))
        or name.endswith(("bias", "exp_probs_b", "ssm_a"))
        else block_type
    )


def mixed(name: str) -> str:
    """Return types much like Q4_K_M's: more bits for the head, for values and for `down` of some layers."""
    if name == "output.weight" or ("attn_v" in name and name.endswith("weight")):
        return "Q6_K"
    if "ffn_down_exps" in name:
        return "Q6_K" if name.startswith("blk.0.") else "Q5_0" if name.startswith("blk.1.") else "Q4_K"
    return one_type("Q4_K")(name)


def mixed_small(name: str) -> str:
    """Return types of few bits, mixed as in Q2_K and IQ4_XS files, and Q5_1, which replaces Q5_K."""
    if "ffn_up_exps" in name:
        return "Q5_1"
    if "ffn_down_exps" in name:
        return "Q3_K" if name.startswith("blk.0.") else "IQ4_NL"
    if "attn_v" in name and name.endswith("weight"):
        return "MXFP4"
    return one_type("Q2_K" if "exps" in name else "IQ4_XS")(name)


def mixed_smallest(name: str) -> str:
    """Return types mixed as in files below three bits: each matrix of an expert has its own, and layers differ."""
    is_first = name.startswith("blk.0.")
    for part, types in (
        ("ffn_gate_exps", ("IQ2_XXS", "IQ1_M")),
        ("ffn_up_exps", ("IQ2_S", "IQ1_S")),
        ("ffn_down_exps", ("IQ3_S", "IQ2_XS")),
        ("attn_v.weight", ("Q4_K", "IQ3_S")),
        ("attn_output.weight", ("IQ2_XXS", "IQ3_XXS")),
    ):
        if part in name:
            return types[0 if is_first else 1]
    if name in ("token_embd.weight", "output.weight"):
        return "IQ3_S" if name == "token_embd.weight" else "IQ2_S"
    return one_type("IQ3_XXS")(name)


def mixed_of_ik(name: str) -> str:
    """Return types of ik_llama.cpp's, mixed as in files made with it, and in the first layer the ternary ones."""
    is_first = name.startswith("blk.0.")
    for part, types in (
        ("ffn_gate_exps", ("TQ1_0", "IQ2_KL")),
        ("ffn_up_exps", ("Q1_0", "IQ2_KS")),
        ("ffn_down_exps", ("Q2_0", "IQ3_KS")),
        ("attn_q.weight", ("TQ2_0", "IQ4_KS")),
        ("attn_k.weight", ("IQ2_K", "IQ3_K")),
        ("attn_v.weight", ("IQ5_K", "IQ6_K")),
    ):
        if part in name:
            return types[0 if is_first else 1]
    return one_type("IQ4_K" if name == "token_embd.weight" else "IQ5_KS")(name)


def write_gguf_model(
    path: Path,
    config: RawConfig,
    type_of: TypeOf,
    *,
    seed: int,
    split_experts: bool = False,
    split_kv: bool = True,
    tensors_per_part: int = 0,
    has_bare_first_part: bool = False,
    sections: tuple[int, ...] = (),
    metadata: Mapping[str, int | list[str]] | None = None,
    has_factors: bool = False,
    has_joined_experts: bool = False,
) -> Path:
    """Write `path`, and the dequantised weights to a directory named `<path>.f32`; return that directory.

    With `split_experts`, every expert is a separate tensor, as in files of early 2024. Without `split_kv`, keys and
    values of latent attention share one tensor, as in files from before April 2025. With `tensors_per_part`, the model
    is split into parts beside `path`, the first of which may have no tensors. With `sections`, the sizes of the
    position axes, the model is the text part of Qwen3-VL-MoE or GLM-4.5V. `metadata` has further numbers and lists.
    With `has_factors`, each matrix in NVFP4 has one in a tensor beside it, and one for activations, which is nonsense.
    With `has_joined_experts`, gate and up share a tensor, as after `--fuse-gate-up-exps`.
    """
    rng = np.random.default_rng([seed, 3])
    exact: dict[str, Array] = {}
    architecture = row_of(config).gguf
    assert architecture is not None, config["model_type"]
    writer = GGUFWriter(
        path,
        "qwen3vlmoe" if sections and architecture == "qwen3moe" else architecture,
        split_max_tensors=tensors_per_part,
        small_first_shard=has_bare_first_part,
    )
    text = config | text_of(config) | {"model_type": config["model_type"]}
    if config["model_type"] in LATENT_FAMILIES:
        add_latent_metadata(writer, text_of(config), split_kv=split_kv)
    elif config["model_type"] == "cohere2_moe":
        add_cohere_metadata(writer, config)
    elif config["model_type"] in tiny_kda.FAMILIES:
        add_kda_metadata(writer, config)
    else:
        add_metadata(writer, text)
    if sections:
        writer.add_rope_dimension_sections([*sections, 0])
        if architecture == "qwen3moe":
            writer.add_num_deepstack_layers(3)
    for key, value in (metadata or {}).items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    stacks: dict[str, list[Array]] = {}
    joined: dict[str, dict[str, tuple[Array, str]]] = {}
    factors: dict[str, list[float]] = {}
    tensors = mtp_tensors(config, seed) if num_draft_layers(config) else random_tensors(config, seed, "F32")
    for hub_name, values in separate(tensors, config).items():
        if not is_in_gguf(hub_name, config):
            exact[hub_name] = values
            continue
        if hub_name.rpartition(".")[2] in _SLICES:
            is_halved = config["model_type"] in tiny_llama4.FAMILIES
            exact[hub_name] = add_slices(writer, hub_name, values, type_of, rng, is_halved=is_halved)
            continue
        name, heads, is_expert = gguf_name(hub_name, config)
        if "attn_kv_b" in name and split_kv:
            exact[hub_name] = add_split_kv(writer, name, values, text_of(config), type_of, rng)
            continue
        type_name = type_of(name)
        # Norms of Gemma 3 and MiniMax-M3 are stored whole.
        is_whole = config["model_type"] in (*tiny_dense.GEMMA, "minimax_m3_vl")
        offset = 1.0 if is_whole and name.endswith("norm.weight") else 0.0
        blocks, kept = to_blocks(values.astype(np.float32) + np.float32(offset), type_name, rng)
        kept = kept - np.float32(offset)
        if has_factors and type_name == "NVFP4":
            factors.setdefault(name, []).append(rng.uniform(0.5, 2.0))
            kept = kept * np.float32(factors[name][-1])
        exact[hub_name] = kept.reshape(values.shape)
        blocks = as_stored(name, blocks, config)
        if name.endswith("shortconv.conv.weight"):
            blocks = blocks[:, 0]
        if name.endswith("ffn_gate_inp_shexp.weight"):
            blocks = blocks.reshape(-1)
        if heads:
            blocks = in_pairs(blocks, heads)
        if is_expert and not split_experts:
            stacks.setdefault(name, []).append(blocks)
            if len(stacks[name]) == num_experts(config):
                stack = np.stack(stacks.pop(name))
                if has_joined_experts and "down" not in name:
                    joined.setdefault(name.replace("ffn_up", "ffn_gate"), {})[name] = stack, type_name
                else:
                    add(writer, name, stack, type_name)
        else:
            add(writer, name if not is_expert else numbered(name, hub_name), blocks, type_name)
    assert not stacks
    for gate, pair in joined.items():
        (first, type_name), (second, _) = pair[gate], pair[gate.replace("ffn_gate", "ffn_up")]
        add(
            writer,
            gate.replace("ffn_gate", "ffn_gate_up"),
            np.concatenate((first, second), axis=1),
            type_name,
        )
    for name, numbers in factors.items():
        writer.add_tensor(name.removesuffix("weight") + "scale", np.array(numbers, np.float32))
        writer.add_tensor(
            name.removesuffix("weight") + "input_scale", np.full(len(numbers), np.nan, np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    directory = path.with_name(path.name + ".f32")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    write_checkpoint(directory, {name: ("F32", values) for name, values in exact.items()})
    return directory


def separate(tensors: dict[str, Array], config: RawConfig) -> dict[str, Array]:
    """Return Mistral's tensors with those of each expert apart."""
    if config["model_type"] not in MISTRAL_FAMILIES:
        return tensors
    found: dict[str, Array] = {}
    for name, values in tensors.items():
        block, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            found[name] = values
            continue
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for expert, matrix in enumerate(values):
            for part, half in zip(names, np.split(matrix, len(names)), strict=True):
                found[f"{block}.{expert}.{part}.weight"] = half
    return found


def num_draft_layers(config: RawConfig) -> int:
    """Return how many layers for multi-token prediction conversion keeps."""
    return int(config.get("num_nextn_predict_layers", 0)) if config["model_type"] == "glm4_moe" else 0


def add_slices(
    writer: GGUFWriter,
    hub_name: str,
    values: Array,
    type_of: TypeOf,
    rng: np.random.Generator,
    *,
    is_halved: bool,
) -> Array:
    """Write the GGUF tensors of a transposed tensor, inputs last; return it with its values as stored."""
    exact = np.empty(values.shape, np.float32)
    layer, last = hub_name.removeprefix("model.layers.").partition(".")[0], hub_name.rpartition(".")[2]
    slices = _SLICES[last]
    if is_halved and last == "gate_up_proj":
        half = values.shape[2] // 2
        slices = dict(zip(slices, (np.s_[:, :, :half], np.s_[:, :, half:]), strict=True))
    for part, where in slices.items():
        name = f"blk.{layer}.{part}"
        matrices = values[where].swapaxes(-1, -2) if values.ndim == 3 else values[where]
        blocks, kept = to_blocks(np.ascontiguousarray(matrices), type_of(name), rng)
        add(writer, name, blocks, type_of(name))
        kept = kept.reshape(matrices.shape)
        exact[where] = kept.swapaxes(-1, -2) if values.ndim == 3 else kept
    return exact


def add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model."""
    if config["model_type"] == tiny_hunyuan.FAMILY:
        writer.add_expert_shared_count(1)
        writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
        config = tiny_hunyuan.plain(config)
    width = config.get("intermediate_size_mlp", config["intermediate_size"])
    width = config.get("dense_intermediate_size", width)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"] + num_draft_layers(config))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(width)
    writer.add_head_count(config["num_attention_heads"])
    kv_heads = config["num_key_value_heads"]
    if config["model_type"] == "mimo_v2_flash":
        add_kinds_of_layers(writer, config)
    elif config["model_type"] == "lfm2_moe":
        writer.add_head_count_kv([0 if kind == "conv" else kv_heads for kind in config["layer_types"]])
    else:
        writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(config.get("v_head_dim", head_dim(config)))
    share = config.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(config.get("rotary_dim") or int(head_dim(config) * share))
    if config["model_type"] in tiny_windows.FAMILIES:
        gguf_windows.add_metadata(writer, config)
    else:
        rope = config.get("rope_parameters") or config
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    eps = (config.get(name) for name in ("rms_norm_eps", "layernorm_epsilon", "norm_eps"))
    writer.add_layer_norm_rms_eps(next(filter(None, eps)))
    if num_experts(config):
        writer.add_expert_count(num_experts(config))
        writer.add_expert_used_count(config["num_experts_per_tok"])
    scaling = config.get("rope_scaling")
    if config["model_type"] in ("gpt_oss", "solar_open") and scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if config["model_type"] == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(width)
    elif config["model_type"] == "llama4_text":
        add_llama4_metadata(writer, config)
    elif config["model_type"] == "minimax":
        writer.add_residual_scale(config["mlp_alpha_factor"])
        writer.add_array(
            "minimax-01.attention.recurrent_layers",
            [kind != "full_attention" for kind in config["layer_types"]],
        )
    elif config["model_type"] == "minimax_m2":
        writer.add_expert_feed_forward_length(width)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    elif config["model_type"] == "minimax_m3_vl":
        gguf_minimax.add_metadata(writer, config)
    elif config["model_type"] in tiny_dense.FAMILIES:
        add_dense_metadata(writer, config)
    elif config["model_type"] not in ("mixtral", "olmoe"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config["model_type"] == "lfm2_moe":
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    if config["model_type"] == "hy_v3":
        shared = config["num_shared_experts"] * config["moe_intermediate_size"]
        writer.add_expert_shared_feed_forward_length(shared)
        writer.add_expert_weights_scale(config["router_scaling_factor"])
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    elif config["model_type"] in _SIGMOID:
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config.get("n_shared_experts") or config["num_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_nextn_predict_layers(num_draft_layers(config))
        if config.get("n_group", 1) > 1:
            writer.add_expert_group_count(config["n_group"])
            writer.add_expert_group_used_count(config["topk_group"])
    if config["model_type"] in tiny_ocr.FAMILIES:
        writer.add_leading_dense_block_count(config["num_hidden_layers"] - len(moe_layers(config)))
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["model_type"] == "exaone_moe":
        writer.add_sliding_window(config["sliding_window"])
        kinds = tiny_grouped.exaone_kinds(config)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    if config["model_type"] == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_tokenizer_model("none")
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    if isinstance(eos, list):
        writer.add_eot_token_id(eos[1])
    may_start_dense = (
        *_SIGMOID,
        *tiny_windows.FAMILIES,
        *tiny_dense.FAMILIES,
        *tiny_ocr.FAMILIES,
        "lfm2_moe",
        "llama4_text",
        "mimo_v2_flash",
        "minimax_m3_vl",
    )
    assert config["model_type"] in may_start_dense or len(moe_layers(config)) == config["num_hidden_layers"]


def add_dense_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write what models without experts have of their own."""
    if config["model_type"] == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    scaling, window = config.get("rope_scaling"), config.get("sliding_window")
    if scaling is not None and scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if config["model_type"] in ("mistral", "ministral3", *tiny_dense.GEMMA) and window:
        writer.add_sliding_window(window)
    if config["model_type"] == "ministral3":
        rope = config["rope_parameters"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_float32("mistral3.attention.temperature_scale", rope["llama_4_scaling_beta"])
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)


def add_kinds_of_layers(writer: GGUFWriter, config: RawConfig) -> None:
    """Write what layers with a window have of their own, and MiMo's factor of values."""
    num_layers = config["num_hidden_layers"]
    writer.add_head_count_kv([tiny_gqa.kv_heads(config, layer) for layer in range(num_layers)])
    writer.add_sliding_window(config["sliding_window_size"])
    writer.add_sliding_window_pattern([window > 0 for window in tiny_gqa.windows(config)])
    writer.add_rope_freq_base_swa(config["swa_rope_theta"])
    writer.add_float32("mimo2.attention.value_scale", config["attention_value_scale"])


def add_llama4_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write Llama-4's keys, and the divisors of its frequencies, which is how llama3's scaling is stored."""
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    if (scaling := config["rope_scaling"]) is not None:
        dim = head_dim(config)
        frequency = config["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
        divisors = np.where(turns < scaling["low_freq_factor"], scaling["factor"], 1.0)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))


def add_latent_metadata(writer: GGUFWriter, config: RawConfig, *, split_kv: bool) -> None:
    """Write the script's metadata for latent attention, as today or before April 2025 (architecture deepseek2)."""
    key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1 if split_kv else config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    if split_kv:
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config["v_head_dim"])
    else:
        writer.add_key_length(key)
        writer.add_value_length(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    is_mistral = config["model_type"] == "mistral4"
    if is_mistral:
        writer.add_float32("mistral4.attention.temperature_scale", rope["llama_4_scaling_beta"])
        writer.add_uint32("mistral4.attention.temperature_length", rope["original_max_position_embeddings"])
    if (scaling := rope if is_mistral else config.get("rope_scaling")) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(scaling["beta_fast"]))
        writer.add_rope_scaling_yarn_beta_slow(float(scaling["beta_slow"]))
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    if "n_routed_experts" in config:
        add_routing_metadata(writer, config)
    else:
        writer.add_leading_dense_block_count(config["num_hidden_layers"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_count(0)
    if config["model_type"] in INDEXED_FAMILIES:
        prefix = f"{row_of(config).gguf}.attention.indexer."
        writer.add_uint32(prefix + "head_count", config["index_n_heads"])
        writer.add_uint32(prefix + "key_length", config["index_head_dim"])
        writer.add_uint32(prefix + "top_k", config["index_topk"])
        if config.get("indexer_types"):
            writer.add_array(prefix + "types", [kind == "full" for kind in config["indexer_types"]])
    writer.add_tokenizer_model("none")
    writer.add_bos_token_id(config.get("bos_token_id", 1))
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)


def add_routing_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the script's metadata for routers and experts of DeepSeek's."""
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    is_softmax = config["model_type"] in ("deepseek_v2", "mistral4")
    writer.add_expert_gating_func(
        gguf.ExpertGatingFuncType.SOFTMAX if is_softmax else gguf.ExpertGatingFuncType.SIGMOID
    )
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


def add_split_kv(
    writer: GGUFWriter, name: str, values: Array, config: RawConfig, type_of: TypeOf, rng: np.random.Generator
) -> Array:
    """Write `attn_k_b` [heads, rank, dims] and `attn_v_b` [heads, dims, rank]; return their values as stored."""
    heads, nope, rank = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    keys, value_rows = np.split(values.reshape(heads, -1, rank), [nope], axis=1)
    kept = []
    for part, matrix in (("attn_k_b", np.ascontiguousarray(keys.swapaxes(1, 2))), ("attn_v_b", value_rows)):
        part_name = name.replace("attn_kv_b", part)
        type_name = type_that_fits(type_of(part_name), matrix.shape[-1])
        blocks, exact = to_blocks(np.ascontiguousarray(matrix, np.float32), type_name, rng)
        add(writer, part_name, blocks, type_name)
        kept.append(exact.reshape(matrix.shape))
    return np.concatenate([kept[0].swapaxes(1, 2), kept[1]], axis=1).reshape(values.shape)


def type_that_fits(type_name: str, cols: int) -> str:
    """Return the type that llama.cpp's quantiser uses instead when rows are not whole blocks of a K type."""
    is_plain = type_name not in gguf_blocks.BLOCK_TYPES
    return type_name if is_plain or not cols % gguf_blocks.BLOCK_TYPES[type_name][1] else "Q8_0"


def is_in_gguf(hub_name: str, config: RawConfig) -> bool:
    """Return whether conversion keeps a tensor; it drops vision towers and most layers for multi-token prediction."""
    parts = hub_name.removeprefix("language_model.").split(".")
    num_layers = text_of(config)["num_hidden_layers"] + num_draft_layers(config)
    if parts[1] in ("sam_model", "projector"):
        return False
    return parts[0] in ("model", "lm_head") and not (parts[1] == "layers" and int(parts[2]) >= num_layers)


def gguf_name(hub_name: str, config: RawConfig) -> tuple[str, int, bool]:
    """Return the GGUF name, the number of heads with interleaved rows, and whether it is one expert's tensor."""
    if (own := kda_name(hub_name, config)) is not None:
        return own, 0, False
    part, _, suffix = hub_name.removeprefix("language_model.").rpartition(".")
    if suffix == "expert_bias" and config["model_type"] == "hy_v3":
        return f"blk.{part.split('.')[2]}.exp_probs_b", 0, False
    if suffix in ("e_score_correction_bias", "expert_bias"):
        return f"blk.{part.split('.')[2]}.exp_probs_b.bias", 0, False
    if part in _MODEL_NAMES:
        return f"{_MODEL_NAMES[part]}.{suffix}", 0, False
    layer, part = part.removeprefix("model.layers.").split(".", 1)
    if ".experts." in part:
        return f"blk.{layer}.ffn_{_SWIGLU[part.rpartition('.')[2]]}_exps.weight", 0, True
    heads = 0
    if config["model_type"] in _PAIRED and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if part == "self_attn.q_proj" else "num_key_value_heads"]
    if suffix in ("sinks", "attention_sink_bias"):
        return f"blk.{layer}.attn_sinks.weight", 0, False
    if suffix == "e_score_correction_bias":
        return f"blk.{layer}.exp_probs_b.bias", 0, False
    if (
        config["model_type"] in ("gpt_oss", "glm4_moe", "solar_open", "afmoe", *tiny_dense.GEMMA)
        and part == "post_attention_layernorm"
    ):
        return f"blk.{layer}.post_attention_norm.weight", 0, False
    return f"blk.{layer}.{_NAMES[part]}.{suffix}", heads, False


def numbered(name: str, hub_name: str) -> str:
    """Return the name of one expert's separate tensor."""
    expert = hub_name.split(".experts.")[1].partition(".")[0]
    return name.replace("_exps.", f".{expert}.")


def to_blocks(values: Array, type_name: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return a tensor's blocks in the file, rows first, and its values as stored."""
    if type_name in WITHOUT_PACKAGE:
        return blocks_without_package(type_name, values.shape, float(values.std()), rng)
    kind = GGMLQuantizationType[type_name]
    if type_name in _RANDOM_TYPES:
        blocks = random_blocks(type_name, values.shape, float(values.std()), rng)
    elif type_name == "F32":
        blocks = values
    else:
        assert values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        blocks = gguf.quantize(values.reshape(1, -1), kind).reshape(*values.shape[:-1], -1)
    return blocks, values_of(blocks, kind)


def values_of(blocks: Array, kind: GGMLQuantizationType) -> Array:
    """Return the values of blocks as one row: the package takes sixteen rows at a time, which are short here."""
    values = np.asarray(gguf.dequantize(blocks.reshape(1, -1), kind), np.float32)
    return values.reshape(*blocks.shape[:-1], -1)


def blocks_without_package(
    type_name: str, shape: tuple[int, ...], deviation: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return random blocks of the wanted standard deviation, and their values."""
    rows, cols, seed = int(np.prod(shape[:-1])), shape[-1], int(rng.integers(2**31))
    unit = gguf_blocks.dequantized(
        type_name, gguf_blocks.random_blocks(type_name, rows, cols, seed=seed, scale=1.0), rows, cols
    )
    scale = deviation / float(unit.std())
    blocks = gguf_blocks.random_blocks(type_name, rows, cols, seed=seed, scale=scale)
    return blocks.reshape(*shape[:-1], -1), gguf_blocks.dequantized(type_name, blocks, rows, cols)


def random_blocks(
    type_name: str, shape: tuple[int, ...], deviation: float, rng: np.random.Generator
) -> Array:
    """Return blocks of random bits whose values have mean 0 and about the wanted standard deviation."""
    kind = GGMLQuantizationType[type_name]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = int(np.prod(shape[:-1])), shape[-1]
    assert cols % block_values == 0
    blocks = rng.integers(0, 256, (rows * cols // block_values, block_bytes), np.uint8)
    scale_at, minima_at, balance = _RANDOM_TYPES[type_name]

    def set_scales(scale: Array) -> None:
        if type_name == "NVFP4":
            blocks[:, :4] = gguf.quants.NVFP4.fp32_to_ue4m3(scale).reshape(-1, 1)
        elif scale_at is None:
            put_iq1_m_scales(blocks, scale.astype(np.float16))
        else:
            blocks[:, scale_at : scale_at + 2] = scale.astype("<f2").reshape(-1, 1).view(np.uint8)
        if minima_at is not None:
            minima = (balance * scale).astype("<f2")
            blocks[:, minima_at : minima_at + 2] = minima.reshape(-1, 1).view(np.uint8)

    set_scales(np.ones(len(blocks)))
    unit = float(values_of(blocks, kind).std())
    set_scales(deviation / unit * rng.uniform(0.5, 1.5, len(blocks)))
    return blocks.reshape(*shape[:-1], -1)


def in_pairs(rows: Array, num_heads: int) -> Array:
    """Put row j of a head next to row j + half, as llama.cpp's conversion stores q and k of a llama."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def add(writer: GGUFWriter, name: str, blocks: Array, type_name: str) -> None:
    if type_name in ("F32", "F16"):
        writer.add_tensor(name, blocks)
    elif (
        type_name in WITHOUT_PACKAGE
    ):  # the writer only notes the number and the shape, unless the bytes are unsigned
        width, nbytes = gguf_blocks.BLOCK_TYPES[type_name][1:3]
        cols = blocks.shape[-1] // nbytes * width  # what precedes the blocks of a row is shorter than one
        number: Any = WITHOUT_PACKAGE[type_name]
        writer.add_tensor(name, blocks.view(np.int8), raw_shape=(*blocks.shape[:-1], cols), raw_dtype=number)
    else:
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[type_name])
