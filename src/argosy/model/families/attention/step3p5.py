"""Step-3.5-Flash (196B-A11B, StepFun): gates of heads, layers with a window that have more heads, limited activations.

Experts are chosen and weighted as in DeepSeek-V3, without groups. Norms store their weight minus one. Only layers
without a window rotate a part of the dimensions, and have scaled frequencies. Lists have a number for each layer, and
go on for layers of multi-token prediction, which are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import LayerConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.families.attention.step3p5_attention import read_mixers
from argosy.model.families.attention.step3p5_gguf import GGUF_ARCHITECTURE, open_gguf
from argosy.model.reading.config_reader import MOST_EXPERTS, MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import read_mtp_layers, with_limits
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config", "read_text"]

MODEL_TYPE = "step3p5"

_PARTS = ("gate", "up", "down")
_NAMES = {
    **ATTENTION_NAMES,
    "attn_gate": "self_attn.g_proj.weight",
    **{p: f"mlp.{p}_proj.weight" for p in _PARTS},
}
LAYOUTS = (
    Layout(
        layer_names={
            **_NAMES, "router": "moe.gate.weight", "choice_bias": "moe.router_bias",
            **{f"shared_{part}": f"share_expert.{part}_proj.weight" for part in _PARTS},
        },
        stacked_names=("moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight"),
        passed_over=r"(vision_model|vit_large_projector)\..*",
    ),
)  # fmt: skip

# Keys with the only value that the released files have.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "att_impl_type": ("GQA",), "gating": (True, "per-head"), "moe_every_n_layer": (1,), "moe_layer_offset": (0,),
    "moe_router_activation": ("sigmoid",), "norm_expert_weight": (True,), "sink": (False,), "use_moe": (True,),
    "use_bidirectional_attention": (False, None), "use_head_wise_attn_gate": (True,), "use_moe_router_bias": (True,),
    "use_qk_norm": (True,), "zero_centered": (True,), "yarn_only_types": (["full_attention"],), "hidden_act": ("silu",),
}  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`, as `Step3p7TextConfig` in transformers 5.24 does; raises the errors of `parse_wrapper`."""
    config = read_text(reader := ConfigReader(raw, MODEL_TYPE))
    reader.finish()
    return config


def read_text(reader: ConfigReader, family: str = MODEL_TYPE) -> ModelConfig:
    """Read the same; the caller calls `finish()`."""
    num_layers = reader.integer("num_hidden_layers", default=45, most=MOST_LAYERS)
    num_mtp = read_mtp_layers(reader, 0)
    for name, accepted in _NEUTRAL.items():
        reader.neutral(name, *accepted)
    reader.neutral("use_rope_layers", None, [], [True] * num_layers, [True] * (num_layers + num_mtp))
    reader.passed("max_seq_len", "need_fp32_gate", "mtp_layer_types", "mtp_mlp_layer_types", "sliding_window")
    listed = reader.optional_text("moe_layers_enum")
    sparse = [number.strip() for number in (listed or ",".join(map(str, range(3, num_layers)))).split(",")]
    if listed and not all(map(str.isdecimal, sparse)):
        raise reader.unsupported("moe_layers_enum", "numbers of layers with commas between them")
    kinds = ("dense", "sparse")
    networks = reader.layer_types(num_layers, kinds, name="mlp_layer_types", num_mtp_layers=num_mtp)
    networks = networks or tuple(kinds[str(layer) in sparse] for layer in range(num_layers))
    if "sparse" not in networks:
        raise CheckpointError(f"config.json leaves none of the {num_layers} layers with routed experts")
    num_experts = reader.integer("n_routed_experts", "moe_num_experts", default=288, most=MOST_EXPERTS)
    config = ModelConfig(
        family=family,
        vocab_size=reader.integer("vocab_size", default=128_815),
        hidden_size=reader.integer("hidden_size", default=4096),
        layers=tuple(
            LayerConfig(mixer=mixer, is_moe=network == "sparse")
            for mixer, network in zip(read_mixers(reader, num_layers, num_mtp), networks, strict=True)
        ),
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        context_tokens=reader.integer("max_position_embeddings", default=128_000),
        num_experts=num_experts,
        experts_per_token=reader.integer("num_experts_per_tok", "moe_top_k", default=8, most=num_experts),
        expert_width=reader.integer("moe_intermediate_size", default=1280),
        router=RouterConfig(
            score="sigmoid", has_choice_bias=True, scale=reader.number("moe_router_scaling_factor", 1.0)
        ),
        dense_width=reader.integer("intermediate_size", default=11_264),
        shared_width=reader.integer("share_expert_dim", "share_expert_dims", default=1280),
        norm_offset=1.0,
        is_embedding_tied=reader.flag("tie_word_embeddings", False),
        draft_form=None,  # they have windows, and no experts
        num_mtp_layers=num_mtp,
        eos_ids=reader.token_ids("eos_token_id"),
        bos_id=next(iter(reader.token_ids("bos_token_id")), None),
    )
    limits = ("swiglu_limits", "swiglu_limits_shared")
    return with_limits(config, *(reader.numbers_of_layers(name, num_layers, num_mtp) for name in limits))
