"""Write tiny Gemma-4 models as GGUF files, with the same weights dequantised beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from tests.models.gguf_models import TypeOf, add, to_blocks
from tests.models.safetensors_file import Array, write_checkpoint
from tests.models.tiny import RawConfig, random_tensors
from tests.models.tiny_gemma import PREFIX, heads, layer_kinds

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    **{f"self_attn.{one}_proj.weight": f"attn_{one}.weight" for one in "qkv"},
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    **{f"mlp.{one}_proj.weight": f"ffn_{one}.weight" for one in ("gate", "up", "down")},
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_MODEL_NAMES = {
    f"{PREFIX}embed_tokens.weight": "token_embd.weight",
    f"{PREFIX}norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gemma_gguf(
    path: Path, config: RawConfig, type_of: TypeOf, *, seed: int, are_experts_apart: bool = False
) -> Path:
    """Write `path`, and the dequantised weights to a directory named `<path>.f32`; return that directory.

    With `are_experts_apart`, gate and up of experts have a tensor each.
    """
    rng = np.random.default_rng([seed, 3])
    text = config["text_config"]
    writer = GGUFWriter(path, "gemma4")
    add_metadata(writer, text)
    exact: dict[str, Array] = {}
    for hub_name, values in random_tensors(config, seed, "F32").items():
        exact[hub_name] = values
        if hub_name.startswith(("model.vision_tower.", "model.embed_vision.")):
            continue
        if (name := _MODEL_NAMES.get(hub_name)) is None:
            layer, last = hub_name.removeprefix(f"{PREFIX}layers.").split(".", 1)
            name = f"blk.{layer}.{_NAMES[last]}"
        if values.ndim == 1:
            add(writer, name, values, "F32")
            continue
        blocks, kept = to_blocks(values, type_of(name), rng)
        exact[hub_name] = kept.reshape(values.shape)
        if are_experts_apart and "gate_up" in name:
            for part, half in zip(("gate", "up"), np.split(blocks, 2, axis=1), strict=True):
                add(writer, name.replace("gate_up", part), np.ascontiguousarray(half), type_of(name))
        else:
            add(writer, name, blocks, type_of(name))
    pairs = text["global_head_dim"] // 2
    turning = int(text["rope_parameters"]["full_attention"]["partial_rotary_factor"] * pairs)
    add(
        writer, "rope_freqs.weight", np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32), "F32"
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    directory = path.with_name(path.name + ".f32")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    write_checkpoint(directory, {name: ("F32", values) for name, values in exact.items()})
    return directory


def add_metadata(writer: GGUFWriter, text: RawConfig) -> None:
    """Write the metadata that llama.cpp's conversion script writes for such a model."""
    kinds = layer_kinds(text)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv([heads(text, layer)[0] for layer in range(len(kinds))])
    for size, more in ((text["global_head_dim"], ""), (text["head_dim"], "_swa")):
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            writer.add_uint32(f"gemma4.{name}{more}", size)
    writer.add_rope_freq_base(text["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_float32(
        "gemma4.rope.freq_base_swa", text["rope_parameters"]["sliding_attention"]["rope_theta"]
    )
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["top_k_experts"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_final_logit_softcapping(text["final_logit_softcapping"])
    writer.add_sliding_window(text["sliding_window"])
    writer.add_array(
        "gemma4.attention.sliding_window_pattern", [kind == "sliding_attention" for kind in kinds]
    )
    writer.add_uint32("gemma4.attention.shared_kv_layers", 0)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
    writer.add_tokenizer_model("none")
    writer.add_eos_token_id(1)
