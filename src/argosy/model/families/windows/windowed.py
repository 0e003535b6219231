"""Code shared by families in which some layers have a sliding window and the others see all positions.

    config.json  ->  read_window, read_networks, layers_of  ->  ModelConfig
    GGUF         ->  read_gguf_kinds, read_gguf_ropes       ->  the same

Elsewhere: `reading/rope_config.py` reads a rotary embedding for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from argosy.checkpoint.gguf import GgufArray
from argosy.config import AttentionConfig, LayerConfig, ModelConfig, RopeConfig
from argosy.errors import CheckpointError
from argosy.model.families.attention.qwen_moe import read_moe_layers
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

FULL, SLIDING = "full_attention", "sliding_attention"
Kind = TypeVar("Kind", str, int)


def read_window(reader: ConfigReader, kinds: Sequence[str], default: int) -> int:
    """Read `sliding_window`, which may be null only if no layer has a window."""
    window = reader.optional_integer("sliding_window", default=default)
    if window is None and SLIDING in kinds:
        raise reader.unsupported("sliding_window", "a number, because layer_types asks for a window")
    return window or 0


def read_windows_behind(
    reader: ConfigReader, num_layers: int, window: int, first: int | None, missing: tuple[str, str]
) -> list[int]:
    """Return the window of each layer, 0 for all positions: by `layer_types`, otherwise of layers from `first` on.

    Args:
        first: None: no layer.
        missing: the key to refuse if `layer_types` asks for a window and there is none, and what it supports.
    """
    kinds = reader.layer_types(num_layers)
    if kinds is None:
        return [window if first is not None and layer >= first else 0 for layer in range(num_layers)]
    if not window and SLIDING in kinds:
        raise reader.unsupported(*missing)
    return [window if kind == SLIDING else 0 for kind in kinds]


def read_networks(reader: ConfigReader, num_layers: int, num_dense: int) -> list[bool]:
    """Read from `mlp_layer_types` which layers have routed experts; by default all but the first `num_dense`.

    Raises:
        CheckpointError: there are too few kinds, or no layer has experts, or `mlp_only_layers` and
            `decoder_sparse_step`, which transformers ignores, say something else.
    """
    kinds = reader.texts("mlp_layer_types")
    if kinds is None:
        kinds = ("dense",) * min(num_dense, num_layers - 1) + ("sparse",) * max(num_layers - num_dense, 1)
    if len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"} or "sparse" not in kinds:
        raise CheckpointError(
            f"config.json: mlp_layer_types has {len(kinds)} entries, expected 'dense' or 'sparse' for each of "
            f"{num_layers} layers, and at least one 'sparse'",
            key="mlp_layer_types",
        )
    is_moe = [kind == "sparse" for kind in kinds]
    repeated = ("mlp_only_layers", "decoder_sparse_step")
    if any(map(reader.has, repeated)) and list(read_moe_layers(reader, num_layers)) != is_moe:
        raise CheckpointError(
            f"config.json gives the dense layers twice, in mlp_layer_types and in {' and '.join(repeated)}, and they "
            "differ",
            key="mlp_layer_types",
        )
    return is_moe


def kinds_by_turns(num_layers: int, every: int) -> tuple[str, ...]:
    """Return the kinds of layers of which every n-th sees all positions."""
    return tuple(SLIDING if layer % every else FULL for layer in range(1, num_layers + 1))


def with_rotating_windows(config: ModelConfig, kinds: Sequence[str], window: int) -> ModelConfig:
    """Return a model with layers of these kinds, of which only those with a window have a rotary embedding.

    Args:
        config: the same with every layer seeing all positions; its first attention is that of all.
    """
    attention = config.attention
    attentions = {FULL: replace(attention, rope=None), SLIDING: replace(attention, sliding_window=window)}
    return replace(config, layers=layers_of(kinds, [layer.is_moe for layer in config.layers], attentions))


def layers_of(
    kinds: Sequence[Kind], is_moe: Sequence[bool], attentions: Mapping[Kind, AttentionConfig]
) -> tuple[LayerConfig, ...]:
    """Return the layers; layers of one kind share an attention. A kind may be the size of a window."""
    pairs = zip(kinds, is_moe, strict=True)
    return tuple(LayerConfig(mixer=attentions[kind], is_moe=moe) for kind, moe in pairs)


def read_gguf_kinds(reader: GgufConfigReader, *, is_full_first: bool = False) -> tuple[str, ...]:
    """Read the kind of each layer from an array, or a number n: each n-th layer sees all positions.

    Args:
        is_full_first: of n layers the first one sees all positions, not the last.
    """
    num_layers, name = reader.num_layers(), "attention.sliding_window_pattern"
    if not reader.integer("attention.sliding_window", 0, least=0):
        reader.key(name)
        return (FULL,) * num_layers
    if isinstance(array := reader.file.metadata.get(reader.key(name)), GgufArray):
        # Some converters leave out the layers for multi-token prediction.
        num_flags = num_layers + (reader.num_mtp_layers() if len(array) > num_layers else 0)
        flags: Sequence[bool] = reader.flags(name, num_flags) or ()
    else:
        period = reader.integer(name, 4, least=0)
        full = 0 if is_full_first else period - 1
        flags = [not period or layer % period != full for layer in range(num_layers)]
    return tuple(SLIDING if slides else FULL for slides in flags[:num_layers])


def read_gguf_ropes(reader: GgufConfigReader, head_dim: int, context_tokens: int) -> dict[str, RopeConfig]:
    """Read the rotary embedding of each kind of layer; only that of layers that see all positions may be scaled.

    Converters write config.json's attention factor of yarn, which llama.cpp ignores and computes from `factor`; the
    file's number counts, as in transformers.
    """
    full = reader.rope(reader.integer("rope.dimension_count", head_dim, most=head_dim), context_tokens)
    if full.kind == "yarn" and reader.has(name := "rope.scaling.yarn_attn_factor"):
        factor = reader.number("rope.scaling.attn_factor", 1.0)
        full = replace(full, attention_factor=factor * reader.number(name))
    sliding = RopeConfig(
        theta=reader.number("rope.freq_base_swa", full.theta),
        rotary_dim=reader.integer("rope.dimension_count_swa", full.rotary_dim, most=head_dim),
        original_context=context_tokens,
    )
    return {FULL: full, SLIDING: sliding}


def attentions_of(
    ropes: Mapping[str, RopeConfig | None], window: int, **attention: Any
) -> dict[str, AttentionConfig]:
    """Return the attention of each kind of layer; `attention` has the arguments that both share."""
    return {
        kind: AttentionConfig(**attention, rope=rope, sliding_window=window if kind == SLIDING else 0)
        for kind, rope in ropes.items()
    }
