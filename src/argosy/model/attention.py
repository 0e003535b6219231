"""The attention block: normalised hidden state -> q, k, v -> rotary -> KV cache -> attention -> output projection."""

from __future__ import annotations

from argosy import _native
from argosy.config import ModelConfig
from argosy.model.batch import Batch
from argosy.model.weights import DenseWeights, Vector
from argosy.model.workspace import Array, Workspace


class Attention:
    """Grouped-query attention of one layer (GQA, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int, weights: DenseWeights) -> None:
        name = f"layers.{layer}."
        self.config = config
        self.layer = layer
        self.window = config.layers[layer].sliding_window
        self.norm = weights.vectors[name + "attn_norm"]
        self.query, self.key, self.value, self.output = (weights.matrices[name + part] for part in "qkvo")
        self.biases: dict[str, Vector] = {
            part: weights.vectors[name + part + "_bias"]
            for part in "qkvo"
            if name + part + "_bias" in weights.vectors
        }
        self.head_norms = (
            (weights.vectors[name + "q_norm"], weights.vectors[name + "k_norm"])
            if config.has_qk_norm
            else None
        )

    def add_to(
        self,
        hidden: Array,
        batch: Batch,
        angles: tuple[Array, Array],
        kv: _native.KvCache,
        runtime: _native.Runtime,
        workspace: Workspace,
    ) -> None:
        """Add the block's output to `hidden` float32 [tokens, hidden_size], in place."""
        config, tokens = self.config, batch.num_tokens
        normed = workspace.take("normed", tokens)
        query = workspace.take("query", tokens)
        key, value = workspace.take("key", tokens), workspace.take("value", tokens)
        attended, block = workspace.take("attended", tokens), workspace.take("block", tokens)

        _native.rms_norm(runtime, hidden, self.norm, config.norm_eps, normed)
        _native.matmul(runtime, [self.query, self.key, self.value], normed, [query, key, value])
        for part, bias in self.biases.items():
            if part != "o":
                {"q": query, "k": key, "v": value}[part][...] += bias

        query_heads = query.reshape(tokens, config.num_heads, config.head_dim)
        key_heads = key.reshape(tokens, config.num_kv_heads, config.head_dim)
        value_heads = value.reshape(tokens, config.num_kv_heads, config.head_dim)
        if self.head_norms is not None:
            for heads, norm in zip((query_heads, key_heads), self.head_norms, strict=True):
                rows = heads.reshape(-1, config.head_dim)
                _native.rms_norm(runtime, rows, norm, config.norm_eps, rows)
        _native.rope(runtime, query_heads, *angles)
        _native.rope(runtime, key_heads, *angles)

        _native.kv_write(runtime, kv, self.layer, key_heads, value_heads, batch.slots)
        _native.attention(
            runtime,
            kv,
            self.layer,
            query_heads,
            batch.block_table,
            batch.sequence,
            batch.positions,
            config.head_dim**-0.5,
            self.window,
            attended,
        )
        _native.matmul(runtime, [self.output], attended, [block])
        if "o" in self.biases:
            block += self.biases["o"]
        hidden += block
