"""Read the part of `config.json` that all families share; each family has its own defaults.

    ConfigReader + defaults  ->  read_common  ->  arguments of `ModelConfig` and `AttentionConfig`

Elsewhere: `GgufConfigReader.common` does the same for GGUF metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from argosy.config import ModelConfig
from argosy.model.reading.config_reader import MOST_EXPERTS, ConfigReader
from argosy.model.reading.rope_config import Axes, read_rope

# Keys of a wrapper: the vision tower, and the placeholders of images and video in a prompt.
VISION_KEYS = (
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonDefaults:
    """A family's defaults of absent keys, as in its config class in transformers 5.24.

    num_kv_heads: None means as many as heads.
    num_experts, experts_per_token: None means that the file must give it, 0 that the family has no experts.
    rotary_dim: how many dimensions of a head rotate; None means all, or the part that the file gives.
    partial_rotary_factor: the default of that part; None means that files of this family do not give it.
    axes: as for `read_rope`.
    norm_eps_name: the key of the norms' epsilon.
    is_embedding_tied: whether the head is the embedding.
    hidden_acts: the names that `hidden_act` may have, the default first.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None
    rope_theta: float
    norm_eps: float
    context_tokens: int
    num_experts: int | None = 0
    experts_per_token: int | None = 0
    head_dim: int | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    rotary_dim: int | None = None
    partial_rotary_factor: float | None = None
    axes: Axes | None = None
    norm_eps_name: str = "rms_norm_eps"
    is_embedding_tied: bool = False
    hidden_acts: tuple[str, ...] = ("silu",)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeDefaults(CommonDefaults):
    """The same for families with dense layers first, then layers with routed and shared experts."""

    num_layers: int
    dense_width: int
    expert_width: int
    num_shared_experts: int | None  # None: the file must give it
    num_mtp_layers: int = 0


class Common(NamedTuple):
    """What `read_common` found: arguments of `ModelConfig`, and of `AttentionConfig`."""

    model: dict[str, Any]
    attention: dict[str, Any]


def read_common(reader: ConfigReader, defaults: CommonDefaults) -> Common:
    """Read sizes, heads, rotary embedding, experts and token ids.

    Raises:
        UnsupportedModel: a rotary embedding or activation that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    common = read_sizes(reader, defaults)
    rope = read_rope(
        reader,
        head_dim=defaults.rotary_dim or common.attention["head_dim"],
        context_tokens=common.model["context_tokens"],
        default_theta=defaults.rope_theta,
        default_partial=defaults.partial_rotary_factor,
        axes=defaults.axes,
    )
    return Common(common.model, common.attention | {"rope": rope})


def read_sizes(reader: ConfigReader, defaults: CommonDefaults) -> Common:
    """Read the same but the rotary embedding, of which a model may have one for each kind of layer."""
    shape = reader.attention_shape(
        hidden_size=defaults.hidden_size,
        num_heads=defaults.num_heads,
        num_kv_heads=defaults.num_kv_heads,
        head_dim=defaults.head_dim,
    )
    context_tokens = reader.integer("max_position_embeddings", default=defaults.context_tokens)
    reader.one_of("hidden_act", defaults.hidden_acts[0], defaults.hidden_acts)
    heads = shape._asdict()
    model = {
        "vocab_size": reader.integer("vocab_size", default=defaults.vocab_size),
        "hidden_size": heads.pop("hidden_size"),
        "norm_eps": reader.number(defaults.norm_eps_name, defaults.norm_eps),
        "context_tokens": context_tokens,
        "is_embedding_tied": reader.flag("tie_word_embeddings", defaults.is_embedding_tied),
        "eos_ids": reader.token_ids("eos_token_id", defaults.eos_id),
        "bos_id": next(iter(reader.token_ids("bos_token_id", defaults.bos_id)), None),
    }
    if defaults.num_experts != 0:
        model |= _experts(reader, defaults)
    return Common(model, heads)


def _experts(reader: ConfigReader, defaults: CommonDefaults) -> dict[str, int]:
    num_experts = reader.integer(
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        default=defaults.num_experts,
        most=MOST_EXPERTS,
    )
    experts_per_token = reader.integer(
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_k",
        default=defaults.experts_per_token,
        most=num_experts,
    )
    return {"num_experts": num_experts, "experts_per_token": experts_per_token}


def parse_wrapper(
    raw: Mapping[str, object],
    family: str,
    model_types: tuple[str, ...],
    read_text: Callable[[ConfigReader], ModelConfig],
    *more_keys: str,
) -> ModelConfig:
    """Read the text model in `text_config` of a config with further keys for images and video.

    Args:
        model_types: the model types that `text_config` may name.
        read_text: reads it; an absent key gets the default of the family's config class.
        more_keys: ignored keys in addition to `VISION_KEYS`.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    wrapper = ConfigReader(raw, family)
    text = wrapper.nested("text_config", *model_types)
    config = read_text(text)
    text.finish()
    config = in_wrapper(config, wrapper)
    wrapper.passed(*VISION_KEYS, *more_keys)
    wrapper.finish()
    return config


def in_wrapper(config: ModelConfig, wrapper: ConfigReader) -> ModelConfig:
    """Complete a wrapper's text model with the wrapper's own keys for a tied head and for tokens that start and end a
    text.
    """
    return replace(
        config,
        is_embedding_tied=wrapper.flag("tie_word_embeddings", config.is_embedding_tied),
        eos_ids=wrapper.token_ids("eos_token_id") or config.eos_ids,
        bos_id=next(iter(wrapper.token_ids("bos_token_id")), config.bos_id),
    )
