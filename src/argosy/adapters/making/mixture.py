"""A Qwen2-MoE model in plain torch: frozen weights in float32, and LoRA pairs that learn.

    ids -> embedding -> layers x ( attention, shared expert + routed experts ) -> norm -> logits

The rows of a batch lie one after another without padding; only attention treats each by itself. `argosy adapt` compares
the logits with the engine's before it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.adapters.making.peft_files import Pair, Trained
from argosy.adapters.making.weights import Weights
from argosy.config import ModelConfig

_LOSS_ROWS = 256  # tokens whose logits are in memory at once


class LowRankPair(nn.Module):  # type: ignore[misc]
    """Adds scale * up (down x). Of experts, both have a first dimension for them. Starts as PEFT does: up is zero."""

    def __init__(self, rank: int, rows: int, cols: int, scale: float, experts: tuple[int, ...] = ()) -> None:
        super().__init__()
        bound = 1 / math.sqrt(cols)
        self.down = nn.Parameter(torch.empty(*experts, rank, cols).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(*experts, rows, rank))
        self.scale = scale

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        down, up = (self.down, self.up) if expert is None else (self.down[expert], self.up[expert])
        return self.scale * F.linear(F.linear(x, down), up)

    def trained(self) -> Pair:
        return Pair(*(one.detach().numpy().astype(np.float32) for one in (self.down, self.up)))


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """The sum of the cross entropy over a large vocabulary; logits live for some tokens only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        losses, gradients = [], []
        for at in range(0, len(hidden), _LOSS_ROWS):
            logits, wanted = hidden[at : at + _LOSS_ROWS] @ head.T, targets[at : at + _LOSS_ROWS, None]
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses.append((log_sum - logits.gather(1, wanted)).sum())
            if hidden.requires_grad:
                slope = logits.sub_(log_sum).exp_()
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=slope.dtype))
                gradients.append(slope @ head)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


class Mixture(nn.Module):  # type: ignore[misc]
    """The model with a pair for q, k, v and o of each layer, and for gate and up together and down of each expert.

    Args:
        config: `weights.require_trainable` has accepted it.
        rank, alpha: of every pair; its scale is alpha / rank.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.attention = config, config.attention
        self.rank, self.alpha = rank, alpha
        self.dense = {name: torch.from_numpy(values) for name, values in weights.dense.items()}
        self.gate_up = {layer: torch.from_numpy(values) for layer, values in weights.gate_up.items()}
        self.down = {layer: torch.from_numpy(values) for layer, values in weights.down.items()}
        self.pairs = nn.ModuleDict()
        for layer in range(config.num_layers):
            for name in "qkvo":
                rows, cols = self.dense[f"layers.{layer}.{name}"].shape
                self.pairs[f"{layer}_{name}"] = LowRankPair(rank, rows, cols, alpha / rank)
            for name, experts in (("gate_up", self.gate_up[layer]), ("down", self.down[layer])):
                count, rows, cols = experts.shape
                self.pairs[f"{layer}_{name}"] = LowRankPair(rank, rows, cols, alpha / rank, (count,))

    def trained(self) -> Trained:
        """The pairs as they are now."""
        return Trained(
            self.rank,
            self.alpha,
            [
                {name: self.pairs[f"{layer}_{name}"].trained() for name in (*"qkvo", "gate_up", "down")}
                for layer in range(self.config.num_layers)
            ],
        )

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the hidden states after the last norm, float32 [tokens of all rows, hidden_size].

        Args:
            rows: token ids, int64 [tokens] each.
        """
        lengths = [len(row) for row in rows]
        cos, sin = self._rotary(lengths)
        hidden = self.dense["embed"][torch.cat(list(rows))]
        for layer in range(self.config.num_layers):
            normed = self._norm(hidden, f"layers.{layer}.attn_norm")
            hidden = hidden + self._attention(layer, normed, lengths, cos, sin)
            hidden = hidden + self._networks(layer, self._norm(hidden, f"layers.{layer}.mlp_norm"))
        return self._norm(hidden, "final_norm")

    @property
    def head(self) -> Tensor:
        """[vocab_size, hidden_size]."""
        return self.dense["embed" if self.config.is_embedding_tied else "head"]

    def loss(self, rows: Sequence[Tensor], is_learned: Sequence[Tensor]) -> Tensor:
        """Return the sum of the losses of all learned tokens, in nats."""
        hidden = self(rows)
        starts = [0, *np.cumsum([len(row) for row in rows]).tolist()]
        before = torch.cat(
            [start + one[1:].nonzero()[:, 0] for start, one in zip(starts, is_learned, strict=False)]
        )
        targets = torch.cat([row[1:][one[1:]] for row, one in zip(rows, is_learned, strict=True)])
        total: Tensor = ChunkedCrossEntropy.apply(hidden[before], self.head, targets)
        return total

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits after each token, float32 [tokens, vocab_size]."""
        found: np.ndarray = (self([torch.tensor(ids)]) @ self.head.T).numpy()
        return found

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.dense[name], self.config.norm_eps)

    def _rotary(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        rope = self.attention.rope
        assert rope is not None
        pairs = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64)
        positions = torch.cat([torch.arange(length, dtype=torch.float64) for length in lengths])
        angles = torch.outer(positions, rope.theta ** (-pairs / rope.rotary_dim))
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().float(), angles.sin().float()

    def _project(self, layer: int, name: str, x: Tensor) -> Tensor:
        at = f"layers.{layer}.{name}"
        product = F.linear(x, self.dense[at], self.dense.get(f"{at}_bias"))
        added: Tensor = self.pairs[f"{layer}_{name}"](x)
        return product + added

    def _attention(self, layer: int, normed: Tensor, lengths: list[int], cos: Tensor, sin: Tensor) -> Tensor:
        def heads(name: str) -> Tensor:
            return self._project(layer, name, normed).view(len(normed), -1, self.attention.head_dim)

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        repeats = self.attention.num_heads // self.attention.num_kv_heads
        query = rotated(heads("q")).split(lengths)
        key = rotated(heads("k")).repeat_interleave(repeats, dim=1).split(lengths)
        value = heads("v").repeat_interleave(repeats, dim=1).split(lengths)
        mixed = [
            F.scaled_dot_product_attention(
                own_query.transpose(0, 1), own_key.transpose(0, 1), own_value.transpose(0, 1), is_causal=True
            ).transpose(0, 1)
            for own_query, own_key, own_value in zip(query, key, value, strict=True)
        ]
        return self._project(layer, "o", torch.cat(mixed).reshape(len(normed), -1))

    def _networks(self, layer: int, normed: Tensor) -> Tensor:
        at = f"layers.{layer}"
        gate, up = (F.linear(normed, self.dense[f"{at}.shared_{name}"]) for name in ("gate", "up"))
        shared = F.linear(F.silu(gate) * up, self.dense[f"{at}.shared_down"])
        shared = shared * torch.sigmoid(F.linear(normed, self.dense[f"{at}.shared_score"].view(1, -1)))
        scores = torch.softmax(F.linear(normed, self.dense[f"{at}.router"]), dim=-1)
        weights, chosen = scores.topk(self.config.experts_per_token, dim=-1)
        if self.config.router.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = chosen.reshape(-1).argsort(stable=True)
        token_at = order // self.config.experts_per_token
        counts = torch.bincount(chosen.reshape(-1), minlength=self.config.num_experts).tolist()
        outputs = [
            self._expert(layer, expert, rows)
            for expert, rows in enumerate(normed[token_at].split(counts))
            if len(rows)
        ]
        weighted = torch.cat(outputs) * weights.reshape(-1)[order, None]
        return shared.index_add(0, token_at, weighted)

    def _expert(self, layer: int, expert: int, rows: Tensor) -> Tensor:
        both = F.linear(rows, self.gate_up[layer][expert]) + self.pairs[f"{layer}_gate_up"](rows, expert)
        gate, up = both.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        added: Tensor = self.pairs[f"{layer}_down"](inner, expert)
        return F.linear(inner, self.down[layer][expert]) + added
