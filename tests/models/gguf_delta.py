"""Write tiny Qwen3-Next, Qwen3.5-MoE and Qwen3.8 models as GGUF files, with the same weights dequantised beside them.

llama.cpp's conversion changes three things: norms hold one plus their weight, except the norm inside a delta net; A_log
becomes -e^A_log; rows are sorted by part, and in qwen35moe value heads by their place within their key head.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from tests.models.gguf_models import TypeOf, add, to_blocks
from tests.models.rows import row_of
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import random_tensors
from tests.models.tiny_delta import RawConfig
from tests.models.tiny_qwen4 import table_multipliers, table_primes

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "self_attn.indexer.q_layernorm.weight": "indexer.q_norm.weight",
    "self_attn.indexer.k_layernorm.weight": "indexer.k_norm.weight",
    "ple.key_proj.weight": "ple_key.weight",
    "ple.value_proj.weight": "ple_value.weight",
    "ple.norm_key.weight": "ple_norm_key.weight",
    "ple.norm_query.weight": "ple_norm_query.weight",
    "ple.norm_conv.weight": "ple_norm_conv.weight",
    "ple.conv1d.weight": "ple_conv1d.weight",
}
_MIX_NAMES = {
    "hc_norm": "norm",
    "input_mix_weight_down": "down",
    "input_mix_weight_up": "up",
    "block_inject_weight": "inject",
}
_NAMES |= {
    f"{module}_hyper_connection.{part}.weight": f"hc_{name}_{kind}.weight"
    for module, name in (("attn", "attn"), ("mlp", "ffn"))
    for part, kind in _MIX_NAMES.items()
}
_TABLE = "per_layer_token_embd.weight"
_MODEL_NAMES = {
    **{
        f"model.hyper_connection_mixer.{part}.weight": f"output_hc_{kind}.weight"
        for part, kind in _MIX_NAMES.items()
    },
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_delta_gguf(
    path: Path, config: RawConfig, type_of: TypeOf, *, seed: int, has_ssm_in: bool = False
) -> Path:
    """Write `path`, and the dequantised weights to a directory named `<path>.f32`; return that directory.

    With `has_ssm_in`, q, k, v and z of qwen3next share one matrix, as in its first files.
    """
    rng = np.random.default_rng([seed, 3])
    writer = GGUFWriter(path, row_of(config).gguf)
    add_metadata(writer, config)
    tensors = random_tensors(config, seed, "F32")
    exact: dict[str, Array] = {}
    parts: dict[str, list[Array]] = {}
    for hub_name, values in tensors.items():
        if hub_name.startswith("mtp."):
            continue
        exact[hub_name] = np.empty_like(values)
        for name, where in places(hub_name, values, config, has_ssm_in):
            taken = np.ascontiguousarray(values[where])
            if taken.ndim == 1 or "conv1d" in name or "ffn_gate_inp" in name:
                exact[hub_name][where] = taken
                add(writer, name, stored_vector(name, taken), "F32")
                continue
            blocks, kept = to_blocks(taken, type_of(name), rng)
            exact[hub_name][where] = kept.reshape(taken.shape)
            if ".experts." in hub_name and blocks.ndim == 2:
                parts.setdefault(name, []).append(blocks)
                if len(parts[name]) < config["num_experts"]:
                    continue
                blocks = np.stack(parts.pop(name))
            elif name == _TABLE:
                parts.setdefault(name, []).append(blocks)
                if len(parts[name]) < config["split_ngram_parts"]:
                    continue
                blocks = np.concatenate(parts.pop(name))
            add(writer, name, blocks, type_of(name))
    assert not parts
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    directory = path.with_name(path.name + ".f32")
    directory.mkdir()
    dtype = "torch_dtype" if "torch_dtype" in config else "dtype"
    (directory / "config.json").write_text(json.dumps({**config, dtype: "float32"}))
    write_checkpoint(directory, {name: ("F32", values) for name, values in exact.items()})
    return directory


def stored_vector(name: str, values: Array) -> Array:
    """Return a float32 tensor as the conversion stores it."""
    if name.endswith("ssm_a"):
        return -np.exp(values)
    if (name.endswith("norm.weight") and "ssm_norm" not in name) or "ple_norm" in name:
        return 1 + values
    return values.reshape(len(values), -1).squeeze() if "conv1d" in name or len(values) == 1 else values


def places(
    hub_name: str, values: Array, config: RawConfig, has_ssm_in: bool
) -> list[tuple[str, tuple[Array | slice, ...]]]:
    """Return the GGUF tensors that a tensor of the hub becomes, and the indices of its elements in each, in order."""
    if hub_name in _MODEL_NAMES:
        return [(_MODEL_NAMES[hub_name], (slice(None),))]
    _, _, layer, last = hub_name.split(".", 3)
    block = f"blk.{layer}."
    if "ngram_embedding" in last:
        return [(_TABLE, (slice(None),))]
    if last.endswith("index_qk_proj.weight"):
        queries = config["indexer_n_heads"] * config["indexer_head_dim"]
        return [
            (f"{block}indexer.q_proj.weight", (slice(queries),)),
            (f"{block}indexer.k_proj.weight", (slice(queries, None),)),
        ]
    if last.startswith("mlp.experts."):
        if last.endswith("gate_up_proj"):
            width = values.shape[1] // 2
            halves = (slice(None), slice(width)), (slice(None), slice(width, None))
            return [
                (f"{block}ffn_{part}_exps.weight", half)
                for part, half in zip(("gate", "up"), halves, strict=True)
            ]
        part = next(part for part in ("gate", "up", "down") if f"{part}_proj" in last)
        return [(f"{block}ffn_{part}_exps.weight", (slice(None),))]
    if last == "linear_attn.in_proj_qkvz.weight":
        if has_ssm_in:
            return [(block + "ssm_in.weight", (slice(None),))]
        qkv, z = rows_by_part(config)
        return [(block + "attn_qkv.weight", (qkv,)), (block + "attn_gate.weight", (z,))]
    return [(block + _NAMES[last], order(last, config))]


def rows_by_part(config: RawConfig) -> tuple[Array, Array]:
    """Return the rows of q, k and v, and those of z, in a matrix that stores them key head by key head."""
    heads, key_dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    rows = np.arange(heads * 2 * (key_dim + values)).reshape(heads, -1)
    q, k, v, z = (part.reshape(-1) for part in np.split(rows, np.cumsum([key_dim, key_dim, values]), axis=1))
    return np.concatenate([q, k, v]), z


def order(last: str, config: RawConfig) -> tuple[Array | slice, ...]:
    """Return the order of qwen35moe's value heads: the first of every key head, then the second of every key head."""
    everything = slice(None)
    if config["model_type"] == "qwen3_next" or not last.startswith("linear_attn."):
        return (everything,)
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = np.arange(value_heads).reshape(key_heads, -1).T.reshape(-1)
    channels = (
        np.arange(value_heads * config["linear_value_head_dim"]).reshape(value_heads, -1)[heads].reshape(-1)
    )
    match last.removeprefix("linear_attn."):
        case "A_log" | "dt_bias" | "in_proj_a.weight" | "in_proj_b.weight":
            return (heads,)
        case "in_proj_z.weight":
            return (channels,)
        case "out_proj.weight":
            return (everything, channels)
        case "in_proj_qkv.weight" | "conv1d.weight":
            keys = 2 * key_heads * config["linear_key_head_dim"]
            return (np.concatenate([np.arange(keys), keys + channels]),)
    return (everything,)


def recurrent_layers(config: RawConfig) -> list[bool]:
    if config["model_type"] == "qwen4_exp_text":
        return [kind == "linear_attention" for kind in config["layer_types"]]
    return [
        (layer + 1) % config["full_attention_interval"] != 0 for layer in range(config["num_hidden_layers"])
    ]


def add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model."""
    rope = config.get("rope_parameters") or config
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent_layers(config))
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    if config["model_type"] == "qwen4_exp_text":
        _add_qwen4_metadata(writer, config)
    if config["model_type"] == "qwen3_next":
        writer.add_feed_forward_length(config["intermediate_size"])
    else:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_tokenizer_model("none")
    writer.add_eos_token_id(config["eos_token_id"])


def _add_qwen4_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write keys that the released package `gguf` does not know."""

    def add(name: str, value: int) -> None:
        writer.add_uint32(f"{writer.arch}.{name}", value)

    def add_all(name: str, values: list[int]) -> None:
        writer.add_key_value(f"{writer.arch}.{name}", values, GGUFValueType.ARRAY, GGUFValueType.UINT64)

    add("hyper_connection.count", config["hc_count"])
    add("hyper_connection.low_rank", config["hc_lowrank"])
    add("attention.indexer.head_count", config["indexer_n_heads"])
    add("attention.indexer.key_length", config["indexer_head_dim"])
    add("attention.indexer.top_k", config["indexer_budget"])
    ratio, heads = config["indexer_compress_ratio"], config["heads_per_ngram"]
    writer.add_array(
        f"{writer.arch}.attention.compress_ratios", [0 if one else ratio for one in recurrent_layers(config)]
    )
    (layer,) = config["ple_layer_ids"]
    writer.add_array(f"{writer.arch}.ple.layers", [layer - 1])
    add("ple.ngram_size", config["ngram_size"])
    add("ple.heads_per_ngram", heads)
    add("ple.conv_kernel", config["ple_conv_kernel_size"])
    add("ple.eos_token_id", config["eos_token_id"])
    add("embedding_length_per_layer_input", config["ple_embed_dim"] // (config["ngram_size"] - 1) // heads)
    primes = table_primes(config, 0)
    add_all("ple.layer_multipliers", table_multipliers(config, 0))
    add_all("ple.head_offsets", [sum(primes[:head]) for head in range(len(primes))])
    add_all("ple.head_vocab_sizes", primes)
