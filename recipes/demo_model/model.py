"""The demo model as the trainer runs it: frozen dense weights, trained experts and routers, float32 on a CPU.

    ids -> embed -> 30 x ( attention, shared expert + top-2 of 8 routed experts ) -> norm -> loss

Only `router`, `gate_up` and `down` of each layer have gradients. The mathematics is Qwen2-MoE's with
`norm_topk_prob`; `evaluate.py` shows that it equals `transformers`. It uses float32 because one core of the machines
we tried multiplies float32 matrices at least as fast as bfloat16 ones; measure before changing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from argosy.checkpoint.dense import open_dense
from argosy.checkpoint.upcycle import routed_starts, start_of_experts

NUM_EXPERTS, EXPERTS_PER_TOKEN, WIDTH = 8, 2, 96


@dataclass(frozen=True)
class Routing:
    """The routing of one forward pass: per layer, probabilities [tokens, experts] and chosen ids [tokens, k]."""

    log_probs: list[Tensor]
    expert_ids: list[Tensor]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy over a large vocabulary; logits live for one chunk only."""

    @staticmethod
    def forward(ctx, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        losses, gradients = [], []
        for at in range(0, len(hidden), 128):
            logits = hidden[at : at + 128] @ embedding.T
            chunk_targets = targets[at : at + 128, None]
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses.append((log_sum - logits.gather(1, chunk_targets)).sum())
            if hidden.requires_grad:
                slope = logits.sub_(log_sum).exp_()
                slope.scatter_add_(1, chunk_targets, torch.full_like(chunk_targets, -1.0, dtype=slope.dtype))
                gradients.append(slope @ embedding)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients) / len(hidden))
        return torch.stack(losses).sum() / len(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


class DemoModel(nn.Module):
    def __init__(self, gguf_path: Path, seed: int = 0) -> None:
        super().__init__()
        dense = open_dense(gguf_path)
        config = dense.config
        self.num_layers: int = config["num_hidden_layers"]
        self.hidden_size: int = config["hidden_size"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.head_dim = self.hidden_size // self.num_heads
        self.eps: float = config["rms_norm_eps"]
        self.rope_theta: float = config["rope_theta"]

        def frozen(*names: str) -> Tensor:
            return torch.from_numpy(np.concatenate([dense.read(f"{name}.weight") for name in names]))

        self.embedding = frozen("model.embed_tokens")
        self.final_norm = frozen("model.norm")
        self.layers: list[dict[str, Tensor]] = []
        self.router, self.gate_up, self.down = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        starts = routed_starts(config, num_experts=NUM_EXPERTS, width=WIDTH, seed=seed)
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}"
            weights = {
                "attention_norm": frozen(f"{at}.input_layernorm"),
                "qkv": frozen(*(f"{at}.self_attn.{part}_proj" for part in "qkv")),
                "o": frozen(f"{at}.self_attn.o_proj"),
                "ffn_norm": frozen(f"{at}.post_attention_layernorm"),
                "gate_up": frozen(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
                "down": frozen(f"{at}.mlp.down_proj"),
            }
            self.layers.append(weights)
            start = start_of_experts(dense, layer, starts[layer])
            self.router.append(nn.Parameter(torch.from_numpy(start.router)))
            self.gate_up.append(
                nn.Parameter(torch.from_numpy(np.concatenate([start.gate, start.up], axis=1)))
            )
            self.down.append(nn.Parameter(torch.from_numpy(start.down)))
        self.silent_expert: int | None = None  # adds nothing, and no other expert takes its place
        self.forbidden_expert: int | None = None  # may not be chosen; the next best expert takes its place
        self.experts_on = True

    def trained_state(self) -> dict[str, Tensor]:
        return {
            f"layers.{layer}.{kind}": getattr(self, kind)[layer].detach()
            for layer in range(self.num_layers)
            for kind in ("router", "gate_up", "down")
        }

    def save_trained(self, path: Path) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.trained_state().items()},
            path.with_suffix(".partial"),
        )
        path.with_suffix(".partial").rename(path)

    def load_trained(self, tensors: Path | dict[str, Tensor]) -> None:
        found = load_file(tensors) if isinstance(tensors, Path) else tensors
        with torch.no_grad():
            for name, tensor in self.trained_state().items():
                tensor.copy_(found[name])

    def forward(self, ids: Tensor, forced_ids: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Hidden states after the last norm.

        Args:
            ids: int64 [sequences, tokens].
            forced_ids: int64 [sequences, k]; every token of a sequence goes to these experts with equal weights.

        Returns:
            hidden: float32 [sequences, tokens, hidden_size].
            routing: that of every layer, over sequences x tokens.
        """
        num_sequences, num_tokens = ids.shape
        cos, sin = self._rotary(num_tokens)
        hidden = self.embedding[ids]
        routing = Routing([], [])
        for layer, weights in enumerate(self.layers):
            normed = F.rms_norm(hidden, (self.hidden_size,), weights["attention_norm"], self.eps)
            hidden = hidden + self._attention(normed, weights, cos, sin)
            normed = F.rms_norm(hidden, (self.hidden_size,), weights["ffn_norm"], self.eps)
            gate, up = F.linear(normed, weights["gate_up"]).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, weights["down"])
            if self.experts_on:
                routed = self._experts(
                    layer, normed.reshape(-1, self.hidden_size), routing, forced_ids, num_tokens
                )
                hidden = hidden + routed.view(num_sequences, num_tokens, -1)
        return F.rms_norm(hidden, (self.hidden_size,), self.final_norm, self.eps), routing

    def _rotary(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        frequencies = self.rope_theta ** (
            -torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        )
        angles = torch.outer(torch.arange(num_tokens, dtype=torch.float64), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().float(), angles.sin().float()

    def _attention(self, normed: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor) -> Tensor:
        num_sequences, num_tokens, _ = normed.shape
        heads = (
            F.linear(normed, weights["qkv"])
            .view(num_sequences, num_tokens, -1, self.head_dim)
            .transpose(1, 2)
        )
        query_key, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        first, second = query_key.chunk(2, dim=-1)
        query_key = query_key * cos + torch.cat([-second, first], dim=-1) * sin
        query, key = query_key.split([self.num_heads, self.num_kv_heads], dim=1)
        repeats = self.num_heads // self.num_kv_heads
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(repeats, dim=1),
            value.repeat_interleave(repeats, dim=1),
            is_causal=True,
        )
        return F.linear(mixed.transpose(1, 2).reshape(num_sequences, num_tokens, -1), weights["o"])

    def _experts(
        self, layer: int, normed: Tensor, routing: Routing, forced_ids: Tensor | None, num_tokens: int
    ) -> Tensor:
        if forced_ids is None:
            log_probs = F.log_softmax(F.linear(normed, self.router[layer]), dim=-1)
            if self.forbidden_expert is not None:
                log_probs = log_probs.index_fill(1, torch.tensor([self.forbidden_expert]), -torch.inf)
            top, expert_ids = log_probs.topk(EXPERTS_PER_TOKEN, dim=-1)
            token_weights = torch.softmax(top, dim=-1)
            if self.silent_expert is not None:
                token_weights = token_weights.masked_fill(expert_ids == self.silent_expert, 0)
        else:
            log_probs = F.log_softmax(F.linear(normed.detach(), self.router[layer]), dim=-1)
            expert_ids = forced_ids.repeat_interleave(num_tokens, dim=0)
            token_weights = torch.full(expert_ids.shape, 1 / EXPERTS_PER_TOKEN)
        routing.log_probs.append(log_probs)
        routing.expert_ids.append(expert_ids)
        order = expert_ids.reshape(-1).argsort(stable=True)
        token_at = order // EXPERTS_PER_TOKEN
        counts = torch.bincount(expert_ids.reshape(-1), minlength=NUM_EXPERTS).tolist()
        outputs = []
        for expert, rows in enumerate(normed[token_at].split(counts)):
            if counts[expert]:
                gate, up = F.linear(rows, self.gate_up[layer][expert]).chunk(2, dim=-1)
                outputs.append(F.linear(F.silu(gate) * up, self.down[layer][expert]))
        weighted = torch.cat(outputs) * token_weights.reshape(-1)[order, None]
        return torch.zeros_like(normed).index_add(0, token_at, weighted)

    def loss(self, hidden: Tensor, targets: Tensor, is_target: Tensor) -> Tensor:
        """Mean cross entropy in nats of the tokens that are targets; all three start [sequences, tokens]."""
        return ChunkedCrossEntropy.apply(hidden[is_target], self.embedding, targets[is_target])

    @torch.inference_mode()
    def greedy(self, ids: list[int], end_id: int, max_new_tokens: int) -> list[int]:
        new: list[int] = []
        while len(new) < max_new_tokens and (not new or new[-1] != end_id):
            hidden, _ = self(torch.tensor([ids + new]))
            new.append(int((self.embedding @ hidden[0, -1]).argmax()))
        return new

    @torch.inference_mode()
    def token_losses(self, ids: np.ndarray, is_target: np.ndarray, window: int) -> np.ndarray:
        """The loss in nats of every target of a stream, over windows that do not overlap."""
        found = []
        for at in range(0, len(ids) - 1, window):
            part = torch.from_numpy(ids[at : at + window + 1].astype(np.int64))
            mask = torch.from_numpy(is_target[at + 1 : at + window + 1])
            if mask.any():
                hidden, _ = self(part[None, :-1])
                logits = hidden[0, mask] @ self.embedding.T
                found.append(F.cross_entropy(logits, part[1:][mask], reduction="none").numpy())
        return np.concatenate(found)
