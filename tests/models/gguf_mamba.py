"""Write tiny Granite-4 hybrids and Nemotron-3 models as GGUF files, with the same weights dequantised beside them.

llama.cpp's conversion splits Granite's gate and up, stacks Nemotron's experts, turns A_log into -e^A_log, and stores
the mixer's norm by groups; rows of Granite's q and k are put in rotary pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from tests.models.gguf_models import TypeOf, add, in_pairs, to_blocks
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors
from tests.models.tiny_mamba import mamba_sizes, of_layer, pattern


def architecture_of(config: RawConfig) -> str:
    if config["model_type"] == "granitemoehybrid":
        return "granitehybrid" if "M" in pattern(config) else "granite"
    return "nemotron_h_moe" if "E" in pattern(config) else "nemotron_h"


_MODEL_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Of the layers for multi-token prediction, which form one layer in GGUF.
_MTP_NAMES = {
    "0.enorm.weight": "nextn.enorm.weight",
    "0.hnorm.weight": "nextn.hnorm.weight",
    "0.eh_proj.weight": "nextn.eh_proj.weight",
    "1.norm.weight": "post_attention_norm.weight",
    "1.final_layernorm.weight": "nextn.shared_head_norm.weight",
}
_MAMBA = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "A_log": "ssm_a",
    "dt_bias": "ssm_dt.bias",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
_ATTENTION = {f"{name}_proj.weight": f"attn_{name}.weight" for name in "qkv"} | {
    "o_proj.weight": "attn_output.weight"
}
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "norm.weight": "attn_norm.weight",
    **{f"mamba.{name}": to for name, to in _MAMBA.items()},
    **{f"self_attn.{name}": to for name, to in _ATTENTION.items()},
    **{f"mixer.{name}": to for name, to in (_MAMBA | _ATTENTION).items()},
    "block_sparse_moe.router.layer.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.input_linear.weight": "ffn_{}_exps.weight",
    "block_sparse_moe.output_linear.weight": "ffn_down_exps.weight",
    "shared_mlp.input_linear.weight": "ffn_{}_shexp.weight",
    "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
    **{f"mixer.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("up", "down")},
    **{f"mixer.{part}_proj.weight": f"ffn_{part}.weight" for part in ("up", "down")},
}


def write_mamba_gguf(
    path: Path, config: RawConfig, type_of: TypeOf, *, seed: int, metadata: dict[str, Any] | None = None
) -> Path:
    """Write `path`, and the dequantised weights to a directory named `<path>.f32`; return that directory.

    `metadata` replaces the arrays of the architecture's keys.
    """
    rng = np.random.default_rng([seed, 3])
    writer = GGUFWriter(path, architecture_of(config))
    _add_metadata(writer, config, metadata or {})
    exact: dict[str, Array] = {}
    stacks: dict[str, list[Array]] = {}

    def put(name: str, values: Array) -> Array:
        type_name = type_of(name) if values.ndim > 1 and "ssm_conv1d" not in name else "F32"
        blocks, kept = to_blocks(np.ascontiguousarray(values, np.float32), type_name, rng)
        kept = kept.reshape(values.shape)
        if ".experts." in name:
            stack = name.split(".experts.", maxsplit=1)[0]
            stacks.setdefault(stack, []).append(blocks)
            if len(stacks[stack]) == config["n_routed_experts"]:
                add(writer, stack, np.stack(stacks.pop(stack)), type_name)
            return kept
        if name.endswith(("attn_q.weight", "attn_k.weight")) and config["model_type"] == "granitemoehybrid":
            heads = config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
            blocks = in_pairs(blocks, heads)
        if name.endswith(("ssm_a", "ssm_d")):
            blocks = (-np.exp(blocks) if name.endswith("ssm_a") else blocks)[:, None]
        elif name.endswith("ssm_norm.weight"):
            blocks = blocks.reshape(mamba_sizes(config)[3], -1)
        add(writer, name, blocks, type_name)
        return kept

    for hub_name, values in random_tensors(config, seed, "F32").items():
        name = _gguf_name(hub_name, config)
        if config.get("num_local_experts") == 0:
            name = name.replace("_shexp", "")
        if "{}" in name:
            halves = zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True)
            exact[hub_name] = np.concatenate([put(name.format(part), half) for part, half in halves], axis=-2)
        elif name.endswith("ssm_conv1d.weight"):
            exact[hub_name] = put(name, values[:, 0])[:, None]
        else:
            exact[hub_name] = put(name, values)
    assert not stacks
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    directory = path.with_name(path.name + ".f32")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    write_checkpoint(directory, {name: ("F32", values) for name, values in exact.items()})
    return directory


def _gguf_name(hub_name: str, config: RawConfig) -> str:
    """Return the name in the file; one expert's has its number behind `.experts.`."""
    name = hub_name.removeprefix("model.").removeprefix("backbone.")
    if name.startswith("mtp."):
        numbered = name.removeprefix("mtp.layers.")
        if numbered in _MTP_NAMES:
            return f"blk.{len(pattern(config))}.{_MTP_NAMES[numbered]}"
        name = f"layers.{len(pattern(config))}.{numbered[2:]}"
    if not name.startswith("layers."):
        return _MODEL_NAMES[name]
    _, layer, name = name.split(".", 2)
    if name.startswith("mixer.experts."):
        _, _, expert, part, _ = name.split(".")
        return f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight.experts.{expert}"
    return f"blk.{layer}.{_NAMES[name]}"


def _widths(config: RawConfig, kinds: list[str]) -> list[int]:
    """Return the width of each layer's network, 0 in layers with a mixer alone."""
    return [
        of_layer(config, i)["moe_intermediate_size"]
        if "E" in kind
        else config["intermediate_size"] * (kind == "-")
        for i, kind in enumerate(kinds)
    ]


def _add_metadata(writer: GGUFWriter, config: RawConfig, changes: dict[str, Any]) -> None:
    num_mtp_layers = config.get("num_nextn_predict_layers", 0)
    kinds, kv_heads = [*pattern(config), *["*E"] * num_mtp_layers], config["num_key_value_heads"]
    heads, dim, state, groups, taps = mamba_sizes(config)
    is_granite = config["model_type"] == "granitemoehybrid"
    arrays: dict[str, Any] = {
        "attention.head_count_kv": [kv_heads if "*" in kind else 0 for kind in kinds],
        "feed_forward_length": config["intermediate_size"] if is_granite else _widths(config, kinds),
    }
    if "block_configs" in config:
        arrays["expert_feed_forward_length"] = arrays["feed_forward_length"]
        arrays["expert_used_count"] = [one.get("num_experts_per_tok", 0) for one in config["block_configs"]]
    elif not is_granite and "E" in pattern(config):
        arrays["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if "num_experts_per_tok" in config and architecture_of(config) != "nemotron_h":
        arrays["expert_used_count"] = config["num_experts_per_tok"]
    for name, value in (arrays | changes).items():
        key = f"{architecture_of(config)}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(len(kinds))
    writer.add_context_length(2**20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_rope_scaling_finetuned(architecture_of(config) == "granite")
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["layer_norm_epsilon"])
    writer.add_ssm_conv_kernel(taps)
    writer.add_ssm_inner_size(heads * dim)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(groups)
    if is_granite:
        writer.add_expert_count(config["num_local_experts"])
        if "expert_shared_feed_forward_length" not in changes:
            writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture_of(config) == "nemotron_h_moe":
        writer.add_expert_count(config["n_routed_experts"])
        writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        if num_mtp_layers:
            writer.add_nextn_predict_layers(num_mtp_layers)
        if config.get("moe_latent_size"):
            writer.add_moe_latent_size(config["moe_latent_size"])
    writer.add_tokenizer_model("none")
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
