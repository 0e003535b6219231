"""Working buffers of one forward pass, allocated once and counted in the memory plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.config import ModelConfig

Array = NDArray[np.float32]

# Experts and order of the assignments (one token, one of its experts).
_INTEGERS = ("expert_ids", "assignment", "group_token", "group_row")


def buffer_columns(config: ModelConfig) -> dict[str, int]:
    """Columns per token of every buffer, of four bytes each."""
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    hidden, delta = config.hidden_size, config.delta
    gated = 2 * query if config.has_output_gate else 0
    return {
        "hidden": hidden,
        "normed": hidden,
        "block": hidden,  # what a block adds to the hidden state
        "query": query,
        "key": key,
        "value": key,
        "attended": max(query, delta.value_channels if delta else 0),
        "projected": max(gated, delta.conv_channels + delta.value_channels if delta else 0),
        "delta_gates": 2 * delta.num_value_heads if delta else 0,
        "cosine": config.rope.rotary_dim // 2,
        "sine": config.rope.rotary_dim // 2,
        "router_logits": config.num_experts,
        "routing_weights": config.experts_per_token,
        "shared_score": 1,
        "expert_out": config.experts_per_token * hidden,
    } | dict.fromkeys(_INTEGERS, config.experts_per_token)


def workspace_bytes(config: ModelConfig, max_tokens: int, threads: int) -> int:
    """Bytes of the buffers below and of the native scratch behind them, for a batch of `max_tokens`."""
    per_token = 4 * sum(buffer_columns(config).values())
    widest = max(config.expert_width * config.experts_per_token, config.dense_width, config.shared_width)
    # Gate and up of the widest FFN in float32, and a quantised copy of them and of the FFN's input.
    per_token += 2 * 4 * widest + 2 * (widest + 2 * config.hidden_size)
    # The batch and other small arrays take less than two more rows.
    per_token += 2 * 4 * config.hidden_size
    # Per thread 32 queries of attention, each with 64 scores and its running sum (kernels/kernel_table.h).
    attention = threads * 32 * (64 + 2 * -(-config.head_dim // 16) * 16) * 4
    return max_tokens * per_token + attention


class Workspace:
    """Named buffers of [max_tokens, columns]: float32, and int32 where experts and tokens are counted."""

    def __init__(self, config: ModelConfig, max_tokens: int) -> None:
        self.buffers: Mapping[str, NDArray[Any]] = {
            name: np.empty((max_tokens, columns), np.int32 if name in _INTEGERS else np.float32)
            for name, columns in buffer_columns(config).items()
        }
