"""The names and axes of MLX's checkpoints, which mlx-lm and mlx-vlm write: what each family's `sanitize` there changes.

    a family's first layout + its row of `_FORMS`  ->  mlx_layouts  ->  the same tensors under MLX's names

The experts of a layer are stacked: each of gate, up and down is a tensor [experts, rows, columns]. Norms that the hub
stores minus one are stored whole, a convolution's taps are the second of its three axes, and the layer for multi-token
prediction is left out. Files of latent attention hold either kv_b_proj, or its two halves head by head.

A family without a row is refused: its `sanitize` may have changed values that no shape shows.

Sources: `models/*.py` of mlx-lm 0.32 and `models/*/` of mlx-vlm 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from argosy.model.reading.layout import Layout

_TEXT = "model."
_IN_WRAPPER = "language_model.model."
_TOWERS = (
    r"(vision_tower|vision_model|audio_tower|embed_vision|embed_audio|multi_modal_projector|mm_projector)\..*"
)
_DRAFTS = r"(language_model\.)?(model\.)?mtp\..*"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What differs from the family's layout."""

    experts: str = "mlp.switch_mlp"
    matrices: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # of the experts
    prefixes: tuple[str, ...] = (_TEXT,)
    names: Mapping[str, str] = field(default_factory=dict)
    # Names that only some of the files have: a layout for each.
    variants: tuple[Mapping[str, str], ...] = ({},)
    has_own_biases: bool = False  # of gate, up and down of the experts
    passed_over: str | None = None


_LATENT = {"k_up": "self_attn.embed_q.weight", "v_up": "self_attn.unembed_out.weight"}
_LFM2 = {name: f"feed_forward.{name}_proj.weight" for name in ("gate", "up", "down")}
_ROUTER_OF_LING = {"router": "mlp.gate.gate_proj.weight"}
_LATENT_OF_LING = {name: in_file.replace("self_attn", "attention") for name, in_file in _LATENT.items()}
_KIMI_LINEAR = {
    "router": "mlp.gate.weight",
    "choice_bias": "mlp.e_score_correction_bias",
    **{f"shared_{part}": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"kda_{part}_conv": f"self_attn.{part}_conv.conv.weight" for part in "qkv"},
}
_STEP = {
    "router": "mlp.gate.gate.weight",
    "choice_bias": "mlp.gate.router_bias",
    **{f"shared_{part}": f"mlp.share_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
}
_WRAPPED = _Form(prefixes=(_IN_WRAPPER,), passed_over=_TOWERS)
_DELTA = _Form(passed_over=_DRAFTS)

_FORMS: Mapping[str, _Form] = {
    "mixtral": _Form(experts="block_sparse_moe.switch_mlp"),
    "llama4": replace(_WRAPPED, experts="feed_forward.experts"),
    "minimax_m2": _Form(experts="block_sparse_moe.switch_mlp", passed_over=_DRAFTS),
    "mimo_v2_flash": _Form(passed_over=_DRAFTS),
    "qwen2_moe": _Form(),
    "qwen3_moe": _Form(),
    "internvl": _WRAPPED,
    "internvl_chat": _WRAPPED,
    "mellum": _Form(),
    "hunyuan_v1_moe": _Form(),
    "youtu": _Form(),
    "exaone_moe": _Form(names={"choice_bias": "mlp.gate.e_score_correction_bias"}),
    "afmoe": _Form(experts="mlp.experts"),
    "laguna": _Form(
        prefixes=(_TEXT, _IN_WRAPPER),
        names={"router": "mlp.gate.proj.weight", "choice_bias": "mlp.gate.e_score_correction_bias"},
    ),
    "olmoe": _Form(),
    "solar_open": _Form(),
    "step3p5": _Form(names=_STEP, passed_over=_DRAFTS),
    "granitemoe": _Form(experts="block_sparse_moe.switch_mlp"),
    "granitemoehybrid": _Form(experts="block_sparse_moe.switch_mlp"),
    "nemotron_h": _Form(
        experts="mixer.switch_mlp", matrices=("fc1", "fc2"), prefixes=("backbone.",), passed_over=_DRAFTS
    ),
    "lfm2_moe": _Form(experts="feed_forward.switch_mlp", names=_LFM2),
    "glm4_moe": _Form(),
    "dots1": _Form(experts="mlp.experts"),
    "gpt_oss": _Form(experts="mlp.experts", has_own_biases=True),
    "deepseek_v2": _Form(),
    "deepseek_v3": _Form(names=_LATENT),
    "kimi_k2": _Form(names=_LATENT),
    "kimi_vl": _WRAPPED,
    "mistral4": _Form(),
    "mistral3": _WRAPPED,
    "kimi_k25": replace(_WRAPPED, names=_LATENT),
    "glm4_moe_lite": _Form(names=_LATENT),
    "deepseek_v32": _Form(names=_LATENT),
    "glm_moe_dsa": _Form(names=_LATENT),
    "kimi_linear": _Form(names=_LATENT | _KIMI_LINEAR),
    "bailing_moe": _Form(names=_ROUTER_OF_LING),
    "bailing_moe_linear": _Form(names=_ROUTER_OF_LING),
    "bailing_hybrid": _Form(names=_LATENT_OF_LING, variants=({}, _ROUTER_OF_LING)),  # Ling-3, Ling-2.5
    "qwen3_next": _DELTA,
    "qwen3_5_moe": replace(_WRAPPED, passed_over=f"{_TOWERS}|{_DRAFTS}"),
    "qwen3_5_moe_text": replace(_DELTA, prefixes=(_TEXT, _IN_WRAPPER)),
    "qwen3_vl_moe": _WRAPPED,
    "glm4v_moe": _WRAPPED,
    "gemma4": replace(_WRAPPED, experts="experts.switch_glu"),
    "qwen3_omni_moe": _Form(
        prefixes=("thinker.language_model.model.",),
        passed_over=r"(talker|code2wav|thinker\.(audio_tower|vision_tower))\..*",
    ),
}
FAMILIES = frozenset(_FORMS)


def mlx_layouts(family: str, layout: Layout) -> Iterator[Layout]:
    """Yield the layouts of MLX's checkpoints of a family, made from the family's first layout."""
    form = _FORMS.get(family)
    if form is None:
        return
    names = {**layout.layer_names, **form.names}
    if form.has_own_biases:
        names |= {
            f"expert_{name}_bias": f"{form.experts}.{name}_proj.bias" for name in ("gate", "up", "down")
        }
    for prefix, more in product(form.prefixes, form.variants):
        yield Layout(
            layer_names={**names, **more},
            joined=layout.joined,
            stacked_names=tuple(f"{form.experts}.{name}.weight" for name in form.matrices),
            prefix=prefix,
            head_name=f"{prefix.removesuffix('model.').removesuffix('backbone.')}lm_head.weight",
            embed_name=layout.embed_name,
            final_norm_name=layout.final_norm_name,
            passed_over=form.passed_over,
            is_mlx=True,
        )
