"""Granite-4 hybrids (4.0-h-tiny, h-small): Mamba-2 mixers, attention without rotary embedding in a few layers, and the
experts and factors of Granite-3 with a shared expert. Models without routed experts (4.0-h-micro) have that one alone;
some of them also have attention in every layer (4.0-micro), and are in GGUF of architecture `granite`.

A step of a mixer, dt, is not clamped: `time_step_limit` must be its default, which clamps nothing. In GGUF, layers with
a Mamba-2 mixer have 0 KV heads, and `rope.scaling.finetuned` says whether the others rotate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, MambaConfig, ModelConfig
from argosy.errors import CheckpointError
from argosy.model.families.attention import granite, granitemoe
from argosy.model.families.recurrent.mamba import (
    MAMBA_NAMES,
    MOST_OF_ONE,
    NO_LIMIT,
    read_gguf_mamba,
    require_even_shares,
)
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout

MODEL_TYPE = "granitemoehybrid"
GGUF_ARCHITECTURE = "granitehybrid"

_OWN_NAMES = {canonical: f"mamba.{name}" for canonical, name in MAMBA_NAMES.items()}
LAYOUTS = tuple(replace(one, layer_names={**one.layer_names, **_OWN_NAMES}) for one in granitemoe.LAYOUTS)
_MAMBA, _ATTENTION = (
    ("mamba", "linear_attention"),
    ("attention", "full_attention"),
)  # transformers 5 renames them


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `GraniteMoeHybridConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    channels = reader.integer("mamba_expand", default=2) * reader.integer("hidden_size", default=4096)
    heads = reader.integer("mamba_n_heads", default=128, most=MOST_OF_ONE)
    mamba = MambaConfig(
        num_heads=heads,
        head_dim=channels // heads,
        state_dim=reader.integer("mamba_d_state", default=256, most=MOST_OF_ONE),
        num_groups=reader.integer("mamba_n_groups", default=1),
        conv_width=reader.integer("mamba_d_conv", default=4, most=64),
        has_conv_bias=reader.flag("mamba_conv_bias", True),
        has_bias=reader.flag("mamba_proj_bias", False),
    )
    require_even_shares(
        mamba, channels, "config.json: mamba_expand * hidden_size, mamba_n_heads and mamba_n_groups"
    )
    reader.neutral("mamba_d_head", mamba.head_dim, "auto")
    # Of training, and how transformers cuts prompts, which changes no result.
    reader.passed("init_method", "mamba_chunk_size")
    reader.neutral("normalization_function", "rmsnorm")
    reader.neutral("time_step_limit", *NO_LIMIT)
    kinds = reader.layer_types(reader.integer("num_hidden_layers", default=32), (*_MAMBA, *_ATTENTION)) or ()
    has_rope = reader.optional_one_of("position_embedding_type", ("nope", "rope")) == "rope"
    config = granitemoe.read_granite(reader, MODEL_TYPE, shared=1024)
    if not has_rope:
        config = config.with_mixers(AttentionConfig, rope=None)
    return _with_mamba(config, mamba, [kind in _ATTENTION for kind in kinds])


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `granitehybrid`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    num_kv_heads, has_attention = reader.attention_layers()
    has_rope = reader.flag("rope.scaling.finetuned", True)
    has_experts = reader.integer("expert_count", 0, least=0) > 0
    read = granitemoe.read_granite_gguf if has_experts else granite.read_dense_gguf
    config = read(reader, MODEL_TYPE, num_kv_heads=num_kv_heads, has_rope=has_rope)
    config = _with_mamba(config, read_gguf_mamba(reader), has_attention)
    reader.finish()
    return read_gguf_layout(file, config, is_paired=True, has_rope_freqs=False)


def _with_mamba(config: ModelConfig, mamba: MambaConfig, has_attention: Sequence[bool]) -> ModelConfig:
    """Return the config of a model with attention in every layer, with Mamba-2 mixers in some layers instead."""
    if not any(has_attention):
        raise CheckpointError(
            "no layer has attention; expected layer_types with 'attention' or 'full_attention' in some layers",
            key="layer_types",
        )
    mixers = (config.attention if attends else mamba for attends in has_attention)
    return replace(
        config, layers=tuple(LayerConfig(mixer=mixer, is_moe=config.num_experts > 0) for mixer in mixers)
    )
