"""The FFN of a layer: route each token, lease the experts, compute each group as it lands, combine.

    normed hidden  ->  router  ->  dispatch  ->  experts (and the shared expert)  ->  combine

Every assignment (one token, one of its experts) has a row of its own until all are there; the weighted sum then runs
in the router's order. So the order in which experts land, and who else is in the batch, change nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.config import ModelConfig
from argosy.experts.source import ExpertGroup, ExpertSource
from argosy.model.batch import Batch
from argosy.model.weights import DenseWeights
from argosy.model.workspace import Array, Workspace

Mark = Callable[[str], None]
RouteObserver = Callable[[int, NDArray[np.int32]], None]  # layer, expert_ids [tokens, k]


class DenseFfn:
    """A layer without routed experts: SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, layer: int, weights: DenseWeights) -> None:
        name = f"layers.{layer}."
        self.norm_eps = config.norm_eps
        self.norm = weights.vectors[name + "mlp_norm"]
        self.gate, self.up, self.down = (weights.matrices[name + part] for part in ("gate", "up", "down"))

    def add_to(
        self, hidden: Array, batch: Batch, runtime: _native.Runtime, workspace: Workspace, mark: Mark
    ) -> None:
        """Add the block's output to `hidden` float32 [tokens, hidden_size], in place."""
        normed, block = (workspace.take(name, batch.num_tokens) for name in ("normed", "block"))
        _native.rms_norm(runtime, hidden, self.norm, self.norm_eps, normed)
        _native.swiglu(runtime, self.gate, self.up, self.down, normed, block)
        hidden += block
        mark("attention_and_dense")


class MoeFfn:
    """A layer with routed experts, and a shared one where the family has it."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: DenseWeights,
        experts: ExpertSource | None,
        observe: RouteObserver | None = None,
    ) -> None:
        name = f"layers.{layer}."
        self.config = config
        self.layer = layer
        self.experts = experts
        self.observe = observe
        self.norm = weights.vectors[name + "mlp_norm"]
        self.router = weights.matrices[name + "router"]
        self.shared = (
            (
                weights.matrices[name + "shared_gate"],
                weights.matrices[name + "shared_up"],
                weights.matrices[name + "shared_down"],
            )
            if config.shared_width
            else None
        )
        self.shared_score = weights.matrices[name + "shared_score"] if config.shared_is_gated else None

    def add_to(
        self, hidden: Array, batch: Batch, runtime: _native.Runtime, workspace: Workspace, mark: Mark
    ) -> None:
        """Add the block's output to `hidden` float32 [tokens, hidden_size], in place.

        With `experts` None the routed sum is left out: what remains is the shared expert.
        """
        tokens = batch.num_tokens
        normed = workspace.take("normed", tokens)
        _native.rms_norm(runtime, hidden, self.norm, self.config.norm_eps, normed)
        mark("attention_and_dense")
        if self.experts is None:
            self._add_shared(hidden, normed, runtime, workspace)
            mark("attention_and_dense")
            return

        weights = self._route(normed, runtime, workspace)
        expert_ids = workspace.expert_ids[:tokens]
        dispatch = _Dispatch(expert_ids, batch.is_decode)
        expert_out = workspace.take("expert_out", tokens).reshape(-1, self.config.hidden_size)
        if self.observe is not None:
            self.observe(self.layer, expert_ids)
        mark("router")
        with self.experts.lease(self.layer, dispatch.expert_ids, dispatch.scan) as lease:
            self._add_shared(hidden, normed, runtime, workspace)  # while the first reads run
            mark("attention_and_dense")
            for group in lease:
                mark("waiting_for_reads")
                _native.swiglu_experts(
                    runtime,
                    self.experts.arena,
                    self.experts.formats(self.layer)[0],
                    self.config.hidden_size,
                    self.config.expert_width,
                    group.offsets,
                    normed,
                    *dispatch.assignments(group),
                    expert_out,
                )
                mark("expert_compute")
        _native.combine(runtime, expert_out, weights, hidden)
        mark("expert_compute")

    def _route(self, normed: Array, runtime: _native.Runtime, workspace: Workspace) -> Array:
        tokens = len(normed)
        logits, weights = (workspace.take(name, tokens) for name in ("router_logits", "routing_weights"))
        _native.matmul(runtime, [self.router], normed, [logits])
        _native.route(
            runtime,
            logits,
            self.config.experts_per_token,
            self.config.router.renormalize,
            workspace.expert_ids[:tokens],
            weights,
        )
        return weights

    def _add_shared(
        self, hidden: Array, normed: Array, runtime: _native.Runtime, workspace: Workspace
    ) -> None:
        if self.shared is None:
            return
        tokens = len(normed)
        block, score = workspace.take("block", tokens), workspace.take("shared_score", tokens)
        _native.swiglu(runtime, *self.shared, normed, block)
        if self.shared_score is None:
            hidden += block
            return
        _native.matmul(runtime, [self.shared_score], normed, [score])
        _native.add_sigmoid_gated(runtime, block, score.reshape(-1), hidden)


class _Dispatch:
    """Tokens grouped by expert: assignment a = token * k + rank."""

    def __init__(self, expert_ids: NDArray[np.int32], is_decode: NDArray[np.bool_]) -> None:
        self.experts_per_token = expert_ids.shape[1]
        flat = expert_ids.reshape(-1)
        self._order = np.argsort(flat, kind="stable").astype(np.int32)
        distinct, starts = np.unique(flat[self._order], return_index=True)
        self.expert_ids: list[int] = distinct.tolist()
        ends = [*starts[1:].tolist(), len(flat)]
        self._range = dict(zip(self.expert_ids, zip(starts.tolist(), ends, strict=True), strict=True))
        self.scan: frozenset[int] = frozenset()
        if not is_decode.all():
            self.scan = frozenset(self.expert_ids) - frozenset(expert_ids[is_decode].reshape(-1).tolist())

    def assignments(
        self, group: ExpertGroup
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """starts [experts + 1], token [assignments], row [assignments] of a group of experts."""
        ranges = [self._range[expert] for expert in group.expert_ids]
        starts = np.zeros(len(ranges) + 1, np.int32)
        np.cumsum([end - start for start, end in ranges], out=starts[1:])
        row = np.concatenate([self._order[start:end] for start, end in ranges])
        return starts, row // np.int32(self.experts_per_token), row
