"""MiniMax-Text-01 and MiniMax-M1 (456B-A46B): lightning attention, and softmax attention in every eighth layer.

A block adds to its own normed input, times alpha, instead of the hidden state. The norm of lightning attention's output
has an epsilon of its own, 1e-6, as in MiniMax's code and transformers; llama.cpp takes the model's. Only `rotary_dim`
dimensions of a head rotate, as in MiniMax's code, vLLM and llama.cpp; transformers 5.24 ignores this key and rotates
all. With a number of heads that is no power of two, transformers has other slopes than the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, LightningConfig, ModelConfig, RouterConfig
from argosy.model.families.attention import mixtral
from argosy.model.families.attention.minimax_m2 import read_rotary_dim
from argosy.model.families.recurrent.lightning import slopes_of_heads
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import read_kinds
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

MODEL_TYPE = "minimax"
OTHER_TYPES = ("minimax_text_01", "minimax_m1")  # MiniMax's own code, where the factors have other keys
GGUF_ARCHITECTURE = "minimax-01"

_NAMES = {"qkv": "qkv_proj", "gate": "output_gate", "norm": "norm", "out": "out_proj"}
_IN_GGUF = {"qkv": "attn_qkv", "gate": "attn_gate", "norm": "attn_norm_2", "out": "attn_output"}
_LIGHTNING = {f"lightning_{name}": f"self_attn.{in_file}.weight" for name, in_file in _NAMES.items()}
# That transformers saves.
_CONSTANTS = r"model\.layers\.\d+\.self_attn\.(slope_rate|(query|key|diagonal)_decay)"
LAYOUTS = tuple(
    replace(layout, layer_names={**layout.layer_names, **_LIGHTNING}, passed_over=_CONSTANTS)
    for layout in mixtral.LAYOUTS
)
_ALIASES = {
    f"layernorm_{theirs}_{factor}": f"{ours}_{factor}_factor"
    for ours, theirs in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp"))
    for factor in ("alpha", "beta")
}
_DEFAULTS = CommonDefaults(
    vocab_size=32_000, hidden_size=4096, num_heads=32, num_kv_heads=8, rope_theta=1_000_000.0, norm_eps=1e-5,
    context_tokens=131_072, num_experts=8, experts_per_token=2, eos_id=2, bos_id=1,
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `MiniMaxConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE, aliases=_ALIASES)
    common = read_common(reader, _DEFAULTS)
    num_layers = reader.integer("num_hidden_layers", default=32, most=MOST_LAYERS)
    names, default = ("linear_attention", "full_attention"), [(i + 1) % 2 for i in range(num_layers)]
    kinds = read_kinds(reader, "layer_types", "attn_type_list", names, default)
    if raw.get("postnorm", raw.get("model_type") == MODEL_TYPE) is not True:
        raise reader.unsupported("postnorm", "true: blocks add to their normed input")
    reader.passed("postnorm", "shared_moe_mode", "block_size")  # of shared experts, and of a way to compute
    reader.neutral("sliding_window", None)
    reader.neutral("shared_intermediate_size", 0, [0])
    attention = AttentionConfig(**common.attention)
    if attention.num_heads & (attention.num_heads - 1):
        raise reader.unsupported("num_attention_heads", "a power of two")
    attention = replace(attention, rope=read_rotary_dim(reader, attention))
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers(attention, [kind == "full_attention" for kind in kinds]),
        expert_width=reader.integer("intermediate_size", default=14_336),
        router=RouterConfig(renormalize=True),
        normed_residual=_read_factor(reader, "alpha_factor"),
        residual_scale=_read_factor(reader, "beta_factor"),
        **common.model,
    )
    reader.finish()
    return config


def _read_factor(reader: ConfigReader, name: str) -> float:
    """Read a factor of all blocks, of which each kind has a key."""
    first = reader.number(f"full_attn_{name}", 1.0)
    for key in (f"linear_attn_{name}", f"mlp_{name}"):
        if reader.number(key, 1.0) != first:
            raise reader.unsupported(key, f"{first}, as full_attn_{name}")
    return first


def _layers(attention: AttentionConfig, attends: Sequence[bool]) -> tuple[LayerConfig, ...]:
    def lightning(layer: int) -> LightningConfig:
        slopes = slopes_of_heads(attention.num_heads, 1 - layer / max(len(attends) - 1, 1) + 1e-5)
        dim = attention.head_dim
        return LightningConfig(slopes=slopes, head_dim=dim, norm_eps=1e-6, has_silu=True, has_joined_qkv=True)

    mixers = (attention if found else lightning(layer) for layer, found in enumerate(attends))
    return tuple(LayerConfig(mixer=mixer, is_moe=True) for mixer in mixers)


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `minimax-01`; the errors are those of `GgufConfigReader`."""
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    common, num_layers = reader.common(has_partial_rope=True), reader.num_layers()
    interval = reader.integer("full_attention_interval", 8)
    by_interval = [(layer + 1) % interval > 0 for layer in range(num_layers)]
    recurrent = reader.flags("attention.recurrent_layers", num_layers) or by_interval
    config = ModelConfig(
        family=MODEL_TYPE,
        layers=_layers(AttentionConfig(**common.attention), [not found for found in recurrent]),
        expert_width=reader.integer("feed_forward_length"),
        router=RouterConfig(renormalize=True),
        normed_residual=reader.number("residual_scale"),
        **common.model,
    )
    reader.finish()
    names = {f"lightning_{name}": f"{in_file}.weight" for name, in_file in _IN_GGUF.items()}
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=names)
