"""The layers of Nemotrons, and their GGUF files, in which KV heads and the width of the network say what a layer is: a
Mamba-2 mixer has 0 of both. Files of architecture `nemotron_h` have dense networks; those of `nemotron_h_moe` have
experts, always a shared expert and a bias of the choice, and, of Puzzle, widths and numbers of experts by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ActivationConfig, AttentionConfig, LayerConfig, MambaConfig, ModelConfig
from argosy.errors import UnsupportedModel
from argosy.model.families.recurrent.mamba import read_gguf_mamba
from argosy.model.reading.config_reader import MOST_EXPERTS, ConfigReader
from argosy.model.reading.experts_config import read_grouped_router, require_groups
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

GGUF_ARCHITECTURE = "nemotron_h_moe"
OTHER_ARCHITECTURES = ("nemotron_h",)
RELU2 = ActivationConfig(kind="relu2")
_LETTERS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-",
}  # fmt: skip


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `nemotron_h_moe`, or `nemotron_h`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    architecture = file.text("general.architecture")
    has_experts = architecture == GGUF_ARCHITECTURE
    reader = GgufConfigReader(file, architecture)
    num_kv_heads, has_attention = reader.attention_layers()
    num_layers, num_mtp_layers = reader.num_layers(), reader.num_mtp_layers()
    widths = reader.integers("feed_forward_length", num_layers + num_mtp_layers, least=0)
    network = "E" if has_experts else "-"
    pattern = "".join(
        "*" if attends else network if width else "M"
        for attends, width in zip(has_attention, widths[:num_layers], strict=True)
    )
    common = reader.common(has_rope=False, num_kv_heads=num_kv_heads, has_experts=False)
    reader.key("attention.layer_norm_epsilon")  # converters write it beside the epsilon that is used
    if not has_experts and len(found := set(widths) - {0}) > 1:
        raise reader.unsupported(
            "feed_forward_length", sorted(found), "the same width in every dense network"
        )
    config = ModelConfig(
        family="nemotron_h",
        layers=layers_of(pattern, read_gguf_mamba(reader), AttentionConfig(**common.attention)),
        dense_width=0 if has_experts else max(widths),
        activation=RELU2,
        num_mtp_layers=num_mtp_layers,
        **common.model,
    )
    if has_experts:
        config = _with_experts(config, reader)
    reader.finish()
    # Layers have one norm, but that for multi-token prediction has two.
    draft_norm = {f"layers.{num_layers}.mlp_norm": "post_attention_norm.weight"} if has_experts else {}
    names = {"mlp_norm": "attn_norm.weight", **draft_norm}
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=names)


def _with_experts(config: ModelConfig, reader: GgufConfigReader) -> ModelConfig:
    reader.neutral("expert_shared_count", 1)
    reader.neutral("expert_gating_func", SIGMOID)
    num_experts = reader.integer("expert_count", most=MOST_EXPERTS)
    every_layer = config.num_layers + config.num_mtp_layers
    chosen, widths = (
        reader.integers(name, every_layer, least=0)
        for name in ("expert_used_count", "expert_feed_forward_length")
    )
    router = read_grouped_router(reader, is_sigmoid=True, has_choice_bias=True)
    config = replace(
        config,
        num_experts=num_experts,
        shared_width=reader.integer("expert_shared_feed_forward_length"),
        expert_latent=reader.integer("moe_latent_size", 0, least=0),
        router=require_groups(router, num_experts, max(chosen)),
    )
    for name, counts, most in (
        ("expert_used_count", chosen, num_experts),
        ("expert_feed_forward_length", widths, max(widths)),
    ):
        if not all(0 < counts[layer] <= most for layer in config.moe_layers):
            expected = f"from 1 to {most} in every layer with experts"
            raise reader.unsupported(name, list(counts), expected)
    return with_experts_of(config, chosen, widths)


def with_experts_of(config: ModelConfig, chosen: Sequence[int], widths: Sequence[int]) -> ModelConfig:
    """Return the config with the experts per token and the expert width of each layer. Both lists may go on with layers
    for multi-token prediction.
    """
    moe = config.moe_layers
    most, widest = (max((counts[layer] for layer in moe), default=0) for counts in (chosen, widths))
    layers = list(config.layers)
    for layer in moe:
        own: dict[str, Any] = {}
        if chosen[layer] != most:
            own["experts_per_token"] = chosen[layer]
        if widths[layer] != widest:
            own["expert_width"] = widths[layer]
        layers[layer] = replace(layers[layer], **own)
    return replace(config, layers=tuple(layers), experts_per_token=most, expert_width=widest)


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
