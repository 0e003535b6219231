"""Write tiny Step-3.5 models as GGUF files, with the same weights dequantised beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFWriter

from tests.models.gguf_models import TypeOf, add, to_blocks
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors
from tests.models.tiny_step import FULL, head_counts, windows

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
    **{f"self_attn.{one}_norm": f"attn_{one}_norm" for one in "qk"},
    "self_attn.o_proj": "attn_output",
    "self_attn.g_proj": "attn_gate",
    "moe.gate": "ffn_gate_inp",
    "moe.router_bias": "exp_probs_b.bias",
    **{f"moe.{one}_proj": f"ffn_{one}_exps" for one in ("gate", "up", "down")},
    **{f"share_expert.{one}_proj": f"ffn_{one}_shexp" for one in ("gate", "up", "down")},
    **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
}
_MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_step_gguf(path: Path, config: RawConfig, type_of: TypeOf, *, seed: int) -> Path:
    """Write `path`, and the dequantised weights to a directory named `<path>.f32`; return that directory."""
    assert not config["num_nextn_predict_layers"]
    rng = np.random.default_rng([seed, 3])
    writer = GGUFWriter(path, "step35")
    add_metadata(writer, config)
    exact: dict[str, Array] = {}
    for hub_name, values in random_tensors(config, seed, "F32").items():
        exact[hub_name] = values
        stem = hub_name.removesuffix(".weight")
        if (name := _MODEL_NAMES.get(stem)) is None:
            layer, last = stem.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{_NAMES[last]}"
        name += "" if name.endswith(".bias") else ".weight"
        if values.ndim == 1:
            add(writer, name, values + 1 if "norm" in name else values, "F32")
            continue
        blocks, kept = to_blocks(values, type_of(name), rng)
        exact[hub_name] = kept.reshape(values.shape)
        add(writer, name, blocks, type_of(name))
    if config["rope_scaling"]:
        add(writer, "rope_freqs.weight", rope_factors(config), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    directory = path.with_name(path.name + ".f32")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    write_checkpoint(directory, {name: ("F32", values) for name, values in exact.items()})
    return directory


def rope_factors(config: RawConfig) -> Array:
    """The divisors of frequencies in layers without a window, behind which the file has ones."""
    scaling, layer, dim = config["rope_scaling"], config["layer_types"].index(FULL), config["head_dim"]
    frequency = config["rope_theta"][layer] ** -(np.arange(0, dim // 2, 2) / (dim // 2))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors = 1 / (kept + (1 - kept) / scaling["factor"])
    return np.concatenate([factors, np.ones(dim // 2 - len(factors))]).astype(np.float32)


def add_metadata(writer: GGUFWriter, config: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model."""
    num_layers = config["num_hidden_layers"]
    counts = [head_counts(config, layer) for layer in range(num_layers)]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count([heads for heads, _ in counts])
    writer.add_head_count_kv([groups for _, groups in counts])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"][0])
    writer.add_float32("step35.rope.freq_base_swa", config["rope_theta"][1])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([window > 0 for window in windows(config)])
    writer.add_expert_count(config["moe_num_experts"])
    writer.add_expert_used_count(config["moe_top_k"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["share_expert_dim"])
    writer.add_expert_weights_scale(config["moe_router_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(int(config["moe_layers_enum"].split(",")[0]))
    writer.add_array("step35.swiglu_clamp_exp", config["swiglu_limits"])
    writer.add_array("step35.swiglu_clamp_shexp", config["swiglu_limits_shared"])
    writer.add_tokenizer_model("none")
    writer.add_eos_token_id(config["eos_token_id"][0])
    writer.add_eot_token_id(config["eos_token_id"][1])
