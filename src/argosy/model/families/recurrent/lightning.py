"""Code shared by families with lightning attention (arXiv:2401.04658): how fast each head forgets, and Ling's layers.

In Ling's hybrids, Ring-linear 2.0 and Ling-2.5, the last layer of a group has other attention, and so have layers
behind the last whole group.
"""

from __future__ import annotations

from dataclasses import replace
from math import floor, log2

from argosy.config import LightningConfig, ModelConfig, RopeConfig
from argosy.errors import UnsupportedModel
from argosy.model.families.recurrent.mamba import MOST_OF_ONE
from argosy.model.reading.config_reader import ConfigReader

# Of Ling's hybrids: the three in the first line are the rows of one matrix.
LIGHTNING_NAMES = {
    **dict.fromkeys(("lightning_q", "lightning_k", "lightning_v"), "attention.query_key_value.weight"),
    "lightning_q_norm": "attention.query_layernorm.weight",
    "lightning_k_norm": "attention.key_layernorm.weight",
    "lightning_gate": "attention.g_proj.weight",
    "lightning_norm": "attention.g_norm.weight",
    "lightning_out": "attention.dense.weight",
}
JOINED_LIGHTNING = ("lightning_q", "lightning_k", "lightning_v")


def slopes_of_heads(num_heads: int, factor: float) -> tuple[float, ...]:
    """Return the slopes of a layer's heads, those of ALiBi (arXiv:2108.12409) times `factor`.

    If the number of heads is a power of two, they are 2^(-8 (head + 1) / heads). Otherwise the heads beyond the last
    power of two get every other slope of a model with twice that many heads.

    Raises:
        UnsupportedModel: more heads than any model has, whose slopes would fill the memory.
    """
    if num_heads > MOST_OF_ONE:
        raise UnsupportedModel(
            f"lightning attention has {num_heads} heads; supported: at most {MOST_OF_ONE}",
            key="num_attention_heads",
            value=num_heads,
            supported=f"at most {MOST_OF_ONE}",
        )
    whole = 2 ** floor(log2(num_heads))
    slopes = [2.0 ** (-8 * (head + 1) / whole) for head in range(whole)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / whole) for head in range(num_heads - whole)]
    return tuple(slope * factor for slope in slopes)


def with_lightning_layers(
    reader: ConfigReader,
    config: ModelConfig,
    *,
    num_heads: int,
    head_dim: int,
    rope: RopeConfig,
    has_qk_norm: bool,
    numbered_from: int,
) -> ModelConfig:
    """Read the keys of Ling's lightning attention, and return the model with it in all but the last layers of groups.

    Args:
        numbered_from: the number of the first layer in the formula of slopes.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing or malformed.
    """
    reader.neutral("use_qkv_bias", False)
    for key in ("linear_rope", "linear_scale"):
        reader.neutral(key, True)
    reader.neutral("num_kv_heads_for_linear_attn", 0, None, num_heads)
    groups = reader.integer("group_norm_size", default=1, most=num_heads * head_dim)
    if num_heads * head_dim % groups:
        raise reader.unsupported(
            "group_norm_size", f"a divisor of {num_heads * head_dim}, the rows of all heads"
        )
    size = reader.integer("layer_group_size", default=None)
    lightning = LightningConfig(
        slopes=(),
        head_dim=head_dim,
        norm_eps=config.norm_eps,
        num_groups=groups,
        rope=rope,
        has_qk_norm=has_qk_norm,
        has_silu=reader.flag("linear_silu", False),
        scale=head_dim**-0.5,
    )
    layers = list(config.layers)
    for layer in range(config.num_layers // size * size):
        if (layer + 1) % size:
            factor = 1 - (layer + numbered_from) / max(config.num_layers - 1, 1) + 1e-5
            mixer = replace(lightning, slopes=slopes_of_heads(num_heads, factor))
            layers[layer] = replace(layers[layer], mixer=mixer)
    return replace(config, layers=tuple(layers))
