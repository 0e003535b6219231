"""Tiny checkpoints of Ling-2.5, which has the model type of Ling-3, lightning attention and latent attention."""

from __future__ import annotations

from typing import Any

from tests.models.rows import Row
from tests.models.tiny_kda import RawConfig, Shapes, bailing_hybrid, kda_tensor_shapes, latent_shapes
from tests.models.tiny_ring import is_linear

ARCHITECTURES = ["BailingMoeV2_5ForCausalLM"]
# Keys of Ling-3 that Ling-2.5's files lack.
_ABSENT = (
    "expert_swiglu_limit_list", "gated_attention_proj_granularity_type", "kda_lower_bound", "kda_safe_gate",
    "mtp_use_kda", "no_kda_lora", "scale_router_input", "scoring_func", "share_expert_swiglu_limit_list",
    "short_conv_kernel_size", "topk_method", "up_proj_norm", "use_kda_lora", "use_mla_nope", "use_nGPT", "value_norm",
)  # fmt: skip


def ling_2_5(**changes: Any) -> RawConfig:
    """A config.json with the keys of Ling-2.6-flash's."""
    return {
        **{key: value for key, value in bailing_hybrid().items() if key not in _ABSENT},
        "architectures": ARCHITECTURES,
        "group_norm_size": 2,
        "head_dim": 12,
        "linear_silu": False,
        "max_window_layers": 20,
        "num_kv_heads_for_linear_attn": 3,
        "q_lora_rank": 14,
    } | changes


def _shapes(config: RawConfig) -> Shapes:
    """Return names and shapes of every tensor in the hub's checkpoint of this config."""
    if config["architectures"] != ARCHITECTURES:
        return kda_tensor_shapes(config)
    shapes = kda_tensor_shapes(config | {"short_conv_kernel_size": 1})
    rows, hidden = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        attention = f"model.layers.{layer}.attention."
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(attention)}
        if is_linear(config, layer):
            of_mixer = {
                "query_key_value.weight": (3 * rows, hidden),
                "g_proj.weight": (rows, hidden),
                "g_norm.weight": (rows,),
                "dense.weight": (hidden, rows),
                "query_layernorm.weight": (config["head_dim"],),
                "key_layernorm.weight": (config["head_dim"],),
            }
        else:
            of_mixer = {
                name: shape for name, shape in latent_shapes(config).items() if name != "g_proj.weight"
            }
        shapes |= {attention + name: shape for name, shape in of_mixer.items()}
    return shapes


ROWS = {
    "bailing_hybrid": Row(
        shapes=_shapes,
        has_own_modules=True,
        gguf="bailingmoe3",
        has_own_spelling=True,
        chats=("ling3",),
    ),
}
