"""Batch -> hidden state -> logits: embedding, layers, head.

One decoder runs every family; what differs is in `ModelConfig`, and a family's file says how its checkpoint maps
to it. All sums have one fixed order, so a token's logits do not depend on the batch it ran in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.config import ModelConfig
from argosy.experts.source import ExpertSource
from argosy.model.attention import Attention
from argosy.model.batch import Batch
from argosy.model.moe import DenseFfn, Mark, MoeFfn, RouteObserver
from argosy.model.rope import Rope
from argosy.model.weights import DenseWeights
from argosy.model.workspace import Array, Workspace


class Decoder:
    """A decoder-only transformer with mixture-of-experts layers."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseWeights,
        experts: ExpertSource | None,
        kv: _native.KvCache,
        runtime: _native.Runtime,
        workspace: Workspace,
        *,
        mark: Mark,
        observe: RouteObserver | None = None,
    ) -> None:
        self.config = config
        self.kv = kv
        self._runtime = runtime
        self._workspace = workspace
        self._mark = mark
        self._rope = Rope(config.rope)
        self._embed = weights.matrices["embed"]
        self._head = self._embed if config.is_embedding_tied else weights.matrices["head"]
        self._final_norm = weights.vectors["final_norm"]
        self._layers = [
            (
                Attention(config, i, weights),
                MoeFfn(config, i, weights, experts, observe)
                if layer.is_moe
                else DenseFfn(config, i, weights),
            )
            for i, layer in enumerate(config.layers)
        ]

    def forward(self, batch: Batch) -> Array:
        """Run all layers; returns float32 [tokens, hidden_size], valid until the next call."""
        hidden = self._workspace.take("hidden", batch.num_tokens)
        _native.embed(self._runtime, self._embed, batch.token_ids, hidden)
        angles = self._rope.angles(batch.positions)
        self._mark("attention_and_dense")
        for attention, ffn in self._layers:
            attention.add_to(hidden, batch, angles, self.kv, self._runtime, self._workspace)
            ffn.add_to(hidden, batch, self._runtime, self._workspace, self._mark)
        return hidden

    def logits(self, hidden: Array, rows: NDArray[np.int64]) -> Array:
        """Logits of some rows of `hidden`: float32 [rows, vocab_size], a fresh array."""
        chosen = np.ascontiguousarray(hidden[rows])
        _native.rms_norm(self._runtime, chosen, self._final_norm, self.config.norm_eps, chosen)
        out = np.empty((len(rows), self.config.vocab_size), np.float32)
        _native.matmul(self._runtime, [self._head], chosen, [out])
        self._mark("attention_and_dense")
        return out
