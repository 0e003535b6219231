"""Working buffers of one forward pass, allocated once and counted in the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.config import MixerKind, ModelConfig

Array = NDArray[np.float32]

# Experts and order of the assignments (an assignment is one token and one of its experts).
_INTEGERS = ("expert_ids", "assignment", "group_token", "group_row")


def buffer_columns(config: ModelConfig) -> dict[str, int]:
    """Columns per token of every buffer; a column has four bytes."""
    hidden = config.hidden_size
    mixers = [_MIXER_COLUMNS[kind](config) for kind in {layer.mixer for layer in config.layers}]
    return {
        "hidden": hidden,
        "normed": hidden,
        "block": hidden,  # the output that a block adds to the hidden state
        **{name: max(columns.get(name, 0) for columns in mixers) for name in _MIXER_BUFFERS},
        "cosine": config.rope.rotary_dim // 2,
        "sine": config.rope.rotary_dim // 2,
        "router_logits": config.num_experts,
        "routing_weights": config.experts_per_token,
        "shared_score": 1,
        "expert_out": config.experts_per_token * hidden,
    } | dict.fromkeys(_INTEGERS, config.experts_per_token)


_MIXER_BUFFERS = ("query", "key", "value", "query_latent", "attended", "projected", "delta_gates")


def _attention_columns(config: ModelConfig) -> dict[str, int]:
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "query": query,
        "key": key,
        "value": key,
        "attended": query,
        "projected": 2 * query if config.has_output_gate else 0,
    }


def _latent_columns(config: ModelConfig) -> dict[str, int]:
    latent = config.latent
    assert latent is not None
    return {
        "query": config.num_heads * (latent.nope_dim + latent.rope_dim),
        "key": latent.kv_rank + latent.rope_dim,
        "query_latent": latent.query_rank,
        "attended": config.num_heads * latent.value_dim,
    }


def _delta_columns(config: ModelConfig) -> dict[str, int]:
    delta = config.delta
    assert delta is not None
    return {
        "projected": delta.conv_channels + delta.value_channels,
        "delta_gates": 2 * delta.num_value_heads,
        "attended": delta.value_channels,
    }


_MIXER_COLUMNS: Mapping[MixerKind, Callable[[ModelConfig], dict[str, int]]] = {
    "attention": _attention_columns,
    "latent": _latent_columns,
    "delta": _delta_columns,
}


def workspace_bytes(config: ModelConfig, max_tokens: int, threads: int) -> int:
    """Bytes of the buffers below and of native scratch memory, for a batch of `max_tokens`."""
    per_token = 4 * sum(buffer_columns(config).values())
    widest = max(config.expert_width * config.experts_per_token, config.dense_width, config.shared_width)
    # Gate and up of the widest FFN in float32, and quantised copies of them and of the FFN's input.
    per_token += 2 * 4 * widest + 2 * (widest + 2 * config.hidden_size)
    # The batch and other small arrays take less than two more rows.
    per_token += 2 * 4 * config.hidden_size
    mixers = {layer.mixer for layer in config.layers}
    return max_tokens * per_token + max(_MIXER_SCRATCH[kind](config, max_tokens, threads) for kind in mixers)


def _attention_scratch(config: ModelConfig, max_tokens: int, threads: int) -> int:
    # Each thread has 32 attention queries, each with 64 scores and its running sum (kernels/kernel_table.h).
    return threads * 32 * (64 + 2 * -(-config.head_dim // 16) * 16) * 4


def _latent_scratch(config: ModelConfig, max_tokens: int, threads: int) -> int:
    latent = config.latent
    assert latent is not None
    return _native.latent_scratch_bytes(
        config.num_heads, latent.nope_dim, latent.rope_dim, latent.kv_rank, max_tokens, threads
    )


def _delta_scratch(config: ModelConfig, max_tokens: int, threads: int) -> int:
    # The quantised input of its output product: two bytes per value, and a scale for every 32.
    assert config.delta is not None
    return max_tokens * 3 * config.delta.value_channels


_MIXER_SCRATCH: Mapping[MixerKind, Callable[[ModelConfig, int, int], int]] = {
    "attention": _attention_scratch,
    "latent": _latent_scratch,
    "delta": _delta_scratch,
}


class Workspace:
    """Named buffers [max_tokens, columns]: float32, or int32 for ids of experts and tokens."""

    def __init__(self, config: ModelConfig, max_tokens: int) -> None:
        self.buffers: Mapping[str, NDArray[Any]] = {
            name: np.empty((max_tokens, columns), np.int32 if name in _INTEGERS else np.float32)
            for name, columns in buffer_columns(config).items()
        }
