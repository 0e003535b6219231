"""MiniMax-M3's metadata in GGUF files."""

from __future__ import annotations

import gguf
from gguf import GGUFWriter

from tests.models.tiny import RawConfig


def add_metadata(writer: GGUFWriter, text: RawConfig) -> None:
    """Write the script's metadata for MiniMax-M3's experts and indexer."""
    writer.add_expert_feed_forward_length(text["intermediate_size"])
    writer.add_expert_shared_count(text["n_shared_experts"])
    writer.add_expert_weights_scale(text["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(text["moe_layer_freq"].count(0))
    sparse = text["sparse_attention_config"]
    for name, key in (
        ("head_count", "num_index_heads"),
        ("key_length", "index_dim"),
        ("top_k", "topk_blocks"),
        ("block_size", "block_size"),
        ("local_blocks", "local_block"),
    ):
        writer.add_uint32(f"minimax-m3.attention.indexer.{name}", sparse[f"sparse_{key}"])
