"""DeepSeek-V4 in numpy and float64, without caches: the formulas of `modeling_deepseek_v4.py` in transformers 5.24.

Whole prompts only, as in `numpy_deepseek_v41.py`, which has what both have. Names and config keys are those of the
released checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.models.numpy_deepseek_v41 import (
    DeepseekV41,
    Shared,
    frequencies,
    mixes,
    rms,
    rotate,
    sigmoid,
    softmax,
)
from tests.models.safetensors_file import Array


@dataclass
class DeepseekV4(DeepseekV41):
    """Logits of a checkpoint. `margin` is the smallest gap of a choice: of experts or rows.

    spans: positions that see one another, of a picture (inference/model.py of V4-Flash-Vision).
    """

    spans: Sequence[range] = ()

    def logits(self, token_ids: Sequence[int], folded: Sequence[int] | None = None) -> Array:
        """Return [n, vocab]."""
        config, weights, eps = self.config, self.weights, self.config["rms_norm_eps"]
        self.token_ids = list(token_ids)
        hidden = self.embedded(token_ids)
        streams = np.repeat(hidden[:, None], config["hc_mult"], axis=1)
        for layer in range(config["num_hidden_layers"]):
            for name, run in (("attn", self.attention), ("ffn", self.experts)):
                prefix = f"layers.{layer}."
                pre, post, comb = mixes(streams, weights, f"{prefix}hc_{name}", config)
                x = rms((pre[..., None] * streams).sum(axis=1), eps, weights[f"{prefix}{name}_norm.weight"])
                out = run(layer, x, Shared())
                streams = post[..., None] * out[:, None] + np.einsum("nij,nid->njd", comb, streams)
            self.states.append(streams)
        flat = rms(streams.reshape(len(streams), -1), eps)
        pre = sigmoid(flat @ weights["hc_head_fn"].T * weights["hc_head_scale"] + weights["hc_head_base"])
        last = ((pre + config["hc_eps"])[..., None] * streams).sum(axis=1)
        logits: Array = rms(last, eps, weights["norm.weight"]) @ weights["head.weight"].T
        return logits

    def experts(self, layer: int, x: Array, shared: Shared) -> Array:
        if layer >= self.config["num_hash_layers"]:
            return super().experts(layer, x, shared)
        prefix = f"layers.{layer}.ffn."
        scores = np.sqrt(np.logaddexp(0, x @ self.weights[prefix + "gate.weight"].T))
        out, k = self.network(prefix + "shared_experts.", x), self.config["num_experts_per_tok"]
        for token, token_id in enumerate(self.token_ids):
            chosen = self.weights[prefix + "gate.tid2eid"][token_id].astype(int)
            if token in self.rows:
                biased = scores[token] + self.weights[prefix + "gate.bias_vl"]
                chosen = np.argsort(-biased, kind="stable")
                self.note_gap(biased[chosen[k - 1]], biased[chosen[k]])
                chosen = chosen[:k]
            weight = scores[token, chosen] / (scores[token, chosen].sum() + 1e-20)
            for expert, share in zip(chosen, weight * self.config["routed_scaling_factor"], strict=True):
                out[token] += share * self.network(f"{prefix}experts.{expert}.", x[token])
        return out

    def attention(self, layer: int, x: Array, _shared: Shared) -> Array:
        config, prefix, eps = self.config, f"layers.{layer}.attn.", self.config["rms_norm_eps"]
        heads, dim, count = config["num_attention_heads"], config["head_dim"], len(x)
        ratio = config["compress_ratios"][layer]
        frequency, positions = frequencies(config, ratio), np.arange(count)
        rank = rms(self.linear(prefix + "wq_a", x), eps, self.weights[prefix + "q_norm.weight"])
        q = rms(self.linear(prefix + "wq_b", rank).reshape(count, heads, dim), eps)
        q = rotate(q, positions, frequency)
        kv = rms(self.linear(prefix + "wkv", x), eps, self.weights[prefix + "kv_norm.weight"])
        kv = rotate(kv, positions, frequency)
        distance = positions[:, None] - positions
        is_seen = (distance >= 0) & (distance < config["sliding_window"])
        for span in self.spans:
            is_seen[span.start : span.stop, span.start : span.stop] = True
        if ratio:
            entries = self.pool(prefix + "compressor.", x, ratio, dim, frequency)
            is_complete = np.arange(len(entries)) < ((positions + 1) // ratio)[:, None]
            if ratio == 4:
                is_complete = self.choose_entries(prefix + "indexer.", x, rank, frequency, is_complete)
            kv, is_seen = np.concatenate([kv, entries]), np.concatenate([is_seen, is_complete], axis=1)
        scores = np.einsum("nhd,td->nht", q, kv) / math.sqrt(dim)
        scores = np.where(is_seen[:, None], scores, -np.inf)
        sinks = np.broadcast_to(self.weights[prefix + "attn_sink"][None, :, None], (count, heads, 1))
        share = softmax(np.concatenate([scores, sinks], axis=2), 2)[..., :-1]
        out = rotate(np.einsum("nht,td->nhd", share, kv), positions, frequency, backwards=True)
        groups = config["o_groups"]
        lower = self.weights[prefix + "wo_a.weight"].reshape(groups, config["o_lora_rank"], -1)
        low = np.einsum("ngd,grd->ngr", out.reshape(count, groups, -1), lower).reshape(count, -1)
        return self.linear(prefix + "wo_b", low)

    def pool(self, prefix: str, x: Array, ratio: int, dim: int, frequency: Array) -> Array:
        """Return the entries [n // ratio, dim]. With two projections, an entry joins the first half of the group before
        its own and the second half of its own.
        """
        rows = len(x) // ratio
        if not rows:
            return np.zeros((0, dim))
        kv, gate = (self.linear(prefix + name, x)[: rows * ratio] for name in ("wkv", "wgate"))
        kv = kv.reshape(rows, ratio, -1)
        gate = gate.reshape(rows, ratio, -1) + self.weights[prefix + "ape"]
        if kv.shape[-1] == 2 * dim:
            earlier, earlier_gate = np.zeros((rows, ratio, dim)), np.full((rows, ratio, dim), -np.inf)
            earlier[1:], earlier_gate[1:] = kv[:-1, :, :dim], gate[:-1, :, :dim]
            kv = np.concatenate([earlier, kv[..., dim:]], axis=1)
            gate = np.concatenate([earlier_gate, gate[..., dim:]], axis=1)
        mean = (kv * softmax(gate, 1)).sum(axis=1)
        entries = rms(mean, self.config["rms_norm_eps"], self.weights[prefix + "norm.weight"])
        return rotate(entries, ratio * np.arange(rows), frequency)

    def choose_entries(
        self, prefix: str, x: Array, rank: Array, frequency: Array, is_complete: Array
    ) -> Array:
        """Return which entries each token sees, of those that are complete: bool [n, entries]."""
        heads, dim, count = self.config["index_n_heads"], self.config["index_head_dim"], len(x)
        keys = self.pool(prefix + "compressor.", x, 4, dim, frequency)
        q = rotate(self.linear(prefix + "wq_b", rank).reshape(count, heads, dim), np.arange(count), frequency)
        weight = self.linear(prefix + "weights_proj", x) / math.sqrt(dim * heads)
        products = np.maximum(np.einsum("nhd,td->nht", q, keys), 0)
        scores = np.where(is_complete, np.einsum("nht,nh->nt", products, weight), -np.inf)
        return self.best(scores, self.config["index_topk"])
