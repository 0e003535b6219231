"""The layers of Nemotron-3, and its GGUF files, in which the KV heads and the width of the network say what a layer is:
a Mamba-2 mixer has 0 of both. llama.cpp's own files always have a shared expert and a bias of the choice.
"""

from __future__ import annotations

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ActivationConfig, AttentionConfig, LayerConfig, MambaConfig, ModelConfig
from argosy.errors import UnsupportedModel
from argosy.model.families.recurrent.mamba import read_gguf_mamba
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import read_grouped_router, require_groups
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "nemotron_h_moe"
RELU2 = ActivationConfig(kind="relu2")
_LETTERS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-",
}  # fmt: skip


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `nemotron_h_moe`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    num_kv_heads, has_attention = reader.attention_layers()
    num_layers, num_mtp_layers = reader.num_layers(), reader.num_mtp_layers()
    widths = reader.integers("feed_forward_length", num_layers + num_mtp_layers, least=0)
    pattern = "".join(
        "*" if attends else "E" if width else "M"
        for attends, width in zip(has_attention, widths[:num_layers], strict=True)
    )
    common = reader.common(has_rope=False, num_kv_heads=num_kv_heads)
    reader.key("attention.layer_norm_epsilon")  # converters write it beside the epsilon that is used
    reader.neutral("expert_shared_count", 1)
    reader.neutral("expert_gating_func", SIGMOID)
    router = read_grouped_router(reader, is_sigmoid=True, has_choice_bias=True)
    config = ModelConfig(
        family="nemotron_h",
        layers=layers_of(pattern, read_gguf_mamba(reader), AttentionConfig(**common.attention)),
        expert_width=reader.integer("expert_feed_forward_length", most=max(widths)),
        shared_width=reader.integer("expert_shared_feed_forward_length"),
        expert_latent=reader.integer("moe_latent_size", 0, least=0),
        router=require_groups(router, common.model["num_experts"], common.model["experts_per_token"]),
        activation=RELU2,
        num_mtp_layers=num_mtp_layers,
        **common.model,
    )
    reader.finish()
    # Layers have one norm, but that for multi-token prediction has two.
    draft_norm = {f"layers.{num_layers}.mlp_norm": "post_attention_norm.weight"}
    names = {"mlp_norm": "attn_norm.weight", **draft_norm}
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=names)


def read_pattern(reader: ConfigReader) -> str:
    """Read the kind of each layer, as a letter: M, E, * or -. A list of names goes before a pattern of letters."""
    for name in ("layers_block_type", "layer_types"):
        if (kinds := reader.texts(name)) is not None:
            break
    pattern = reader.optional_text("hybrid_override_pattern")
    found = "".join(_LETTERS.get(kind, "?") for kind in kinds) if kinds is not None else pattern
    if not found or not set(found) <= set(_LETTERS.values()):
        raise reader.unsupported(
            "hybrid_override_pattern" if kinds is None else name,
            f"for each layer, one of {', '.join(_LETTERS)}",
        )
    return found


def layers_of(pattern: str, mamba: MambaConfig, attention: AttentionConfig) -> tuple[LayerConfig, ...]:
    """Return the layers of a pattern of letters: M Mamba-2, * attention, E experts, - a dense network.

    Raises:
        UnsupportedModel: no layer has attention.
    """
    if "*" not in pattern:
        raise UnsupportedModel(
            f"its layers are {pattern} (M Mamba-2, * attention, E experts, - dense); supported: patterns with "
            "attention in some layers",
            key="hybrid_override_pattern",
            value=pattern,
            supported="M, *, E, -",
        )
    kinds = {
        "M": LayerConfig(mixer=mamba, is_moe=False, has_network=False),
        "*": LayerConfig(mixer=attention, is_moe=False, has_network=False),
        "E": LayerConfig(mixer=None, is_moe=True),
        "-": LayerConfig(mixer=None, is_moe=False),
    }
    return tuple(kinds[letter] for letter in pattern)
