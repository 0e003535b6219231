"""Read GGUF files of Gemma-4.

Heads of layers with a window have keys of their own (`_swa`). Full layers rotate whole heads, but `rope_freqs.weight`
divides by 1e30 the frequencies of pairs that should not turn. A full layer without `attn_v` has its keys as values.
Files in NVFP4 fold the factors of experts into those of their matrices. `gemma4.py` describes the model.
"""

from __future__ import annotations

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import LayerConfig, RopeConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families.wrappers.gemma import make_config, make_layer
from argosy.model.reading.config_reader import MOST_LAYERS
from argosy.model.reading.gguf_config import GgufConfigReader, frequency_factors
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "gemma4"
_NEVER = 1e30  # a pair whose frequency is divided by this does not turn

_NAMES = {
    "layer_scale": "layer_output_scale.weight",
    "router_norm": "ffn_gate_inp.scale",
    "expert_scale": "ffn_down_exps.scale",
    "expert_norm": "pre_ffw_norm_2.weight",
    "expert_post_norm": "post_ffw_norm_2.weight",
    "shared_gate": "ffn_gate.weight",
    "shared_up": "ffn_up.weight",
    "shared_down": "ffn_down.weight",
    "shared_post_norm": "post_ffw_norm_1.weight",
}


def open_gguf(file: GgufFile) -> ModelFiles:
    """The model in a GGUF file of architecture `gemma4`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    if not reader.has("expert_count"):
        raise UnsupportedModel(
            f"{file.path.name} is a Gemma-4 without experts; supported: those with experts (26B-A4B)",
            path=file.path,
            key=reader.key("expert_count"),
        )
    reader.neutral("attention.shared_kv_layers", 0)
    reader.neutral("embedding_length_per_layer_input", 0)
    sizes = reader.sizes()
    config = make_config(
        layers=_read_layers(reader),
        expert_width=reader.integer("expert_feed_forward_length"),
        shared_width=reader.integer("feed_forward_length"),
        logit_cap=reader.number("final_logit_softcapping")
        if reader.is_set("final_logit_softcapping")
        else 0.0,
        has_expert_scale="blk.0.ffn_down_exps.scale" in file.tensors,
        **sizes,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=True, names=_NAMES)


def _read_layers(reader: GgufConfigReader) -> tuple[LayerConfig, ...]:
    file, num_layers = reader.file, reader.integer("block_count", most=MOST_LAYERS)
    has_window = reader.flags("attention.sliding_window_pattern", num_layers)
    if has_window is None:
        raise file.wrong(reader.key("attention.sliding_window_pattern"), None, "a flag for each layer")
    window = reader.integer("attention.sliding_window")
    num_heads = reader.integer("attention.head_count")
    num_kv_heads = reader.integers("attention.head_count_kv", num_layers, default=num_heads)
    kinds = {
        True: _read_heads(reader, "_swa"),
        False: _read_heads(reader, ""),
    }
    if not all(has_window) and "rope_freqs.weight" not in file.tensors:
        raise CheckpointError(f"{file.path.name} has no tensor rope_freqs.weight", path=file.path)
    layers: list[LayerConfig] = []
    made: dict[LayerConfig, LayerConfig] = {}  # equal layers share one object
    for layer, (is_windowed, kv_heads) in enumerate(zip(has_window, num_kv_heads, strict=True)):
        if num_heads % kv_heads:
            raise reader.unsupported(
                "attention.head_count_kv", kv_heads, f"divisors of {num_heads}, the number of heads"
            )
        head_dim, rope = kinds[is_windowed]
        one = make_layer(
            window=window if is_windowed else 0,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            is_causal=not is_windowed,
            keys_are_values=not is_windowed and f"blk.{layer}.attn_v.weight" not in file.tensors,
        )
        layers.append(made.setdefault(one, one))
    return tuple(layers)


def _read_heads(reader: GgufConfigReader, suffix: str) -> tuple[int, RopeConfig]:
    """Read the size and rotary embedding of heads in layers with a window (`_swa`), or in those without."""
    head_dim = reader.integer(f"attention.key_length{suffix}")
    reader.neutral(f"attention.value_length{suffix}", head_dim)
    reader.neutral(f"rope.dimension_count{suffix}", head_dim)
    theta = reader.number(f"rope.freq_base{suffix}", 10_000.0)
    if head_dim % 2:
        raise reader.unsupported(f"attention.key_length{suffix}", head_dim, "an even number")
    if suffix:
        return head_dim, RopeConfig(theta=theta, rotary_dim=head_dim)
    factors = frequency_factors(reader.file, head_dim) or (1.0,) * (head_dim // 2)
    turning = factors.count(1.0)
    if max(factors[:turning], default=0.0) != 1.0 or min(factors[turning:], default=_NEVER) < _NEVER:
        raise UnsupportedModel(
            f"{reader.file.path.name}: rope_freqs.weight divides frequencies by other numbers; supported: 1 for the "
            f"first pairs, and {_NEVER} for those that do not turn",
            path=reader.file.path,
            tensor="rope_freqs.weight",
        )
    return head_dim, RopeConfig(theta=theta, rotary_dim=head_dim, kind="proportional", turning_pairs=turning)
