"""DeepSeek-V4.1 in numpy and float64, without caches: the formulas of the makers' `inference/model.py` and `engram.py`.

transformers has no class for it. Whole prompts only; a causal model's logits do not depend on how a prompt is cut.
Names and config keys are those of the released checkpoint (`text_config`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.models.safetensors_file import Array

RawConfig = dict[str, Any]
BLOCKED = -1  # a token that n-grams do not reach across: a picture's


def rms(x: Array, eps: float, weight: Array | float = 1.0) -> Array:
    normed: Array = weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return normed


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int) -> Array:
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    normed: Array = weights / weights.sum(axis=axis, keepdims=True)
    return normed


def frequencies(config: RawConfig, ratio: int) -> Array:
    """Return the inverse frequencies [pairs]; layers that compress have YaRN (arXiv:2309.00071)."""
    dim, rope = config["qk_rope_head_dim"], config["rope_scaling"]
    theta = config["compress_rope_theta"] if ratio else config["rope_theta"]
    plain: Array = theta ** -(np.arange(0, dim, 2) / dim)
    if not ratio:
        return plain
    original = rope["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(rope["beta_fast"])), 0), min(math.ceil(pair(rope["beta_slow"])), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    scaled: Array = plain / rope["factor"] * ramp + plain * (1 - ramp)
    return scaled


def rotate(x: Array, positions: Array, frequency: Array, *, backwards: bool = False) -> Array:
    """Rotate the last dimensions of x [n, ..., dim] in adjacent pairs."""
    dim = 2 * len(frequency)
    angle = positions[:, None] * frequency * (-1 if backwards else 1)
    angle = angle.reshape(len(x), *(1,) * (x.ndim - 2), -1)
    even, odd = x[..., -dim::2], x[..., 1 - dim :: 2]
    out = x.copy()
    out[..., -dim::2] = even * np.cos(angle) - odd * np.sin(angle)
    out[..., 1 - dim :: 2] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def mixes(
    streams: Array, weights: Mapping[str, Array], prefix: str, config: RawConfig
) -> tuple[Array, Array, Array]:
    """Return the weights of a sublayer's input [n, s] and output [n, s], and of the streams [n, from, to]."""
    count, eps = config["hc_mult"], config["hc_eps"]
    flat = streams.reshape(len(streams), -1)
    raw = rms(flat, config["rms_norm_eps"]) @ weights[prefix + "_fn"].T
    scale, base = weights[prefix + "_scale"], weights[prefix + "_base"]
    pre = sigmoid(raw[:, :count] * scale[0] + base[:count]) + eps
    post = 2 * sigmoid(raw[:, count : 2 * count] * scale[1] + base[count : 2 * count])
    comb = (raw[:, 2 * count :] * scale[2] + base[2 * count :]).reshape(-1, count, count)
    comb = softmax(comb, -1) + eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    for _ in range(config["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    return pre, post, comb


def is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def engram_rows(config: RawConfig, folded: Sequence[int]) -> dict[int, Array]:
    """Return the table rows of each token [n, rows] by layer; `folded` are ids after the token map, or BLOCKED."""
    grams, heads = config["engram_max_ngram_size"], config["engram_n_heads"]
    seen: set[int] = set()
    found = {}
    for layer in config["engram_layer_ids"]:
        primes = []
        for _ in range(grams - 1):
            candidate, row = config["engram_vocab_size"] - 1, []
            for _ in range(heads):
                candidate += 1
                while candidate in seen or not is_prime(candidate):
                    candidate += 1
                seen.add(candidate)
                row.append(candidate)
            primes.append(row)
        offsets = np.concatenate([[0], np.cumsum(np.ravel(primes))[:-1]])
        most = max(1, np.iinfo(np.int64).max // config["engram_compressed_vocab_size"] // 2)
        multipliers = np.random.default_rng(10007 * layer).integers(0, most, grams, dtype=np.int64) * 2 + 1
        rows = np.empty((len(folded), (grams - 1) * heads), np.int64)
        for at in range(len(folded)):
            is_blocked, rolling = False, 0
            for back in range(grams):
                is_blocked |= at < back or folded[at - back] == BLOCKED
                token = config["engram_pad_token_id"] if is_blocked else folded[at - back]
                rolling ^= int(token) * int(multipliers[back])
                if back:
                    rows[at, (back - 1) * heads : back * heads] = [rolling % p for p in primes[back - 1]]
        found[layer] = rows + offsets
    return found


@dataclass
class Shared:
    """What a source layer leaves for later ones."""

    latents: Array | None = None  # [rows, head_dim], rotated
    keys: Array | None = None  # [rows, index_head_dim], rotated
    chosen: Array | None = None  # bool [n, rows]
    candidates: Array | None = None  # bool [n, rows]


@dataclass
class DeepseekV41:
    """Logits of a checkpoint. `margin` is the smallest gap of a choice: of experts, rows or blocks.

    rows: position -> the vector there instead of a token's, of a picture.
    """

    config: RawConfig
    weights: Mapping[str, Array]
    margin: float = math.inf
    states: list[Array] = field(default_factory=list)  # the streams after each layer [n, s, hidden]
    rows: Mapping[int, Array] = field(default_factory=dict)

    def logits(self, token_ids: Sequence[int], folded: Sequence[int] | None = None) -> Array:
        """Return [n, vocab]. `folded` is as for `engram_rows`; None: the ids themselves."""
        config, weights, eps = self.config, self.weights, self.config["rms_norm_eps"]
        ids = list(token_ids if folded is None else folded)
        rows = engram_rows(config, [BLOCKED if at in self.rows else one for at, one in enumerate(ids)])
        hidden = self.embedded(token_ids)
        streams = np.repeat(hidden[:, None], config["hc_mult"], axis=1)
        pre = np.zeros(streams.shape[:2])
        pre[:, 0] = 1
        shared = Shared()
        for layer in range(config["num_hidden_layers"]):
            if layer in rows:
                streams = self.engram(layer, streams, rows[layer])
            for name, run in (("attn", self.attention), ("ffn", self.experts)):
                prefix = f"layers.{layer}."
                next_pre, post, comb = mixes(streams, weights, f"{prefix}hc_{name}", config)
                x = rms((pre[..., None] * streams).sum(axis=1), eps, weights[f"{prefix}{name}_norm.weight"])
                out = run(layer, x, shared)
                streams = post[..., None] * out[:, None] + np.einsum("nij,nid->njd", comb, streams)
                pre = next_pre
            self.states.append(streams)
        last = rms((pre[..., None] * streams).sum(axis=1), eps, weights["norm.weight"])
        logits: Array = last @ weights["head.weight"].T
        return logits

    def embedded(self, token_ids: Sequence[int]) -> Array:
        """Return [n, hidden]."""
        hidden = self.weights["embed.weight"][list(token_ids)]
        for position, row in self.rows.items():
            hidden[position] = row
        return hidden

    def engram(self, layer: int, streams: Array, rows: Array) -> Array:
        prefix, (_, count, hidden) = f"layers.{layer}.engram.", streams.shape
        eps = self.config["rms_norm_eps"]
        read = self.weights[prefix + "embed.weight"][rows].reshape(len(rows), -1)
        both = read @ self.weights[prefix + "wkv.weight"].T
        key, value = both[:, : count * hidden].reshape(streams.shape), both[:, count * hidden :]
        weight = self.weights[prefix + "q_weight"] * self.weights[prefix + "k_weight"]
        dot = (rms(streams, eps) * weight * rms(key, eps)).sum(axis=-1) / math.sqrt(hidden)
        gate = sigmoid(np.copysign(np.sqrt(np.maximum(np.abs(dot), 1e-6)), dot))
        gate[list(self.rows)] = 0
        return streams + gate[..., None] * value[:, None]

    def experts(self, layer: int, x: Array, _shared: Shared) -> Array:
        config, prefix = self.config, f"layers.{layer}.ffn."
        k = config["num_experts_per_tok"]
        scores = np.sqrt(np.logaddexp(0, x @ self.weights[prefix + "gate.weight"].T))
        biased = scores + self.biases(prefix, len(x))
        order = np.argsort(-biased, axis=1, kind="stable")
        ranked = np.take_along_axis(biased, order, 1)
        if ranked.shape[1] > k:
            self.note_gap(ranked[:, k - 1], ranked[:, k])
        out = self.network(prefix + "shared_experts.", x)
        for token in range(len(x)):
            weight = scores[token, order[token, :k]]
            if config["norm_topk_prob"] and k > 1:
                weight = weight / (weight.sum() + 1e-20)
            for expert, share in zip(order[token, :k], weight * config["routed_scaling_factor"], strict=True):
                out[token] += share * self.network(f"{prefix}experts.{expert}.", x[token])
        return out

    def biases(self, prefix: str, count: int) -> Array:
        """Return [n, experts]."""
        biases = np.repeat(self.weights[prefix + "gate.bias"][None], count, axis=0)
        for position in self.rows:
            biases[position] = self.weights[prefix + "gate.bias_vl"]
        return biases

    def network(self, prefix: str, x: Array) -> Array:
        limit = self.config["swiglu_limit"]
        gate, up = (x @ self.weights[f"{prefix}{name}.weight"].T for name in ("w1", "w3"))
        if limit:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        out: Array = (gate * sigmoid(gate) * up) @ self.weights[prefix + "w2.weight"].T
        return out

    def attention(self, layer: int, x: Array, shared: Shared) -> Array:
        config, prefix, eps = self.config, f"layers.{layer}.attn.", self.config["rms_norm_eps"]
        heads, dim, count = config["num_attention_heads"], config["head_dim"], len(x)
        ratio = config["compress_ratios"][layer]
        frequency, positions = frequencies(config, ratio), np.arange(count)
        rank = rms(self.linear(prefix + "wq_a", x), eps, self.weights[prefix + "q_norm.weight"])
        q = rotate(self.linear(prefix + "wq_b", rank).reshape(count, heads, dim), positions, frequency)
        kv = rms(self.linear(prefix + "wkv", x), eps, self.weights[prefix + "kv_norm.weight"])
        kv = rotate(kv, positions, frequency)
        distance = positions[:, None] - positions
        is_seen = (distance >= 0) & (distance < config["sliding_window"])
        if ratio:
            if layer in config["kv_source_layer_ids"]:
                self.compress(layer, x, shared)
            if layer in config["index_source_layer_ids"]:
                self.choose(layer, x, rank, shared)
            assert shared.latents is not None
            assert shared.chosen is not None
            kv = np.concatenate([kv, shared.latents])
            is_seen = np.concatenate([is_seen, shared.chosen], axis=1)
        scores = np.einsum("nhd,td->nht", q, kv) / math.sqrt(dim)
        scores = np.where(is_seen[:, None], scores, -np.inf)
        sinks = np.broadcast_to(self.weights[prefix + "attn_sink"][None, :, None], (count, heads, 1))
        share = softmax(np.concatenate([scores, sinks], axis=2), 2)[..., :-1]
        out = rotate(np.einsum("nht,td->nhd", share, kv), positions, frequency, backwards=True)
        groups = config["o_groups"]
        lower = self.weights[prefix + "wo_a.weight"].reshape(groups, config["o_lora_rank"], -1)
        low = np.einsum("ngd,grd->ngr", out.reshape(count, groups, -1), lower).reshape(count, -1)
        return self.linear(prefix + "wo_b", low)

    def compress(self, layer: int, x: Array, shared: Shared) -> None:
        """Write the rows of a source layer, each of `ratio` tokens, and their index keys."""
        config, prefix, eps = self.config, f"layers.{layer}.attn.", self.config["rms_norm_eps"]
        ratio = config["compress_ratios"][layer]
        frequency, rows = frequencies(config, ratio), len(x) // ratio
        kv = self.linear(prefix + "compressor.wkv", x)[: rows * ratio].reshape(rows, ratio, -1)
        if ratio > 1:
            gate = self.linear(prefix + "compressor.wgate", x)[: rows * ratio].reshape(rows, ratio, -1)
            kv = kv * softmax(gate, 1)
        latents = rms(kv.sum(axis=1), eps, self.weights[prefix + "compressor.norm.weight"])
        starts = ratio * np.arange(rows)
        keys = self.linear(prefix + "indexer.wk", latents)
        keys = rms(keys, eps, self.weights[prefix + "indexer.k_norm.weight"])
        shared.keys = rotate(keys, starts, frequency)
        shared.latents = rotate(latents, starts, frequency)

    def choose(self, layer: int, x: Array, rank: Array, shared: Shared) -> None:
        """Choose the rows that each token sees, from here to the next layer that chooses."""
        config, prefix, count = self.config, f"layers.{layer}.attn.indexer.", len(x)
        ratio, heads, dim = (
            config["compress_ratios"][layer],
            config["index_n_heads"],
            config["index_head_dim"],
        )
        assert shared.keys is not None
        q = self.linear(prefix + "wq_b", rank).reshape(count, heads, dim)
        q = rotate(q, np.arange(count), frequencies(config, ratio))
        weight = self.linear(prefix + "weights_proj", x) / math.sqrt(dim * heads)
        products = np.maximum(np.einsum("nhd,td->nht", q, shared.keys), 0)
        scores = np.einsum("nht,nh->nt", products, weight)
        complete = (np.arange(count) + 1) // ratio
        scores[np.arange(scores.shape[1]) >= complete[:, None]] = -np.inf
        source = config["candidate_source_layer_id"]
        if layer == source:
            shared.candidates = self.candidate_blocks(scores, complete)
        elif 0 <= source < layer:
            assert shared.candidates is not None
            scores[~shared.candidates] = -np.inf
        shared.chosen = self.best(scores, config["index_topk"])

    def candidate_blocks(self, scores: Array, complete: Array) -> Array:
        """Return the rows [n, rows] of the best blocks by their best row; the last block is always one of them."""
        size, rows = self.config["candidate_block_size"], scores.shape[1]
        padded = np.pad(scores, ((0, 0), (0, -rows % size)), constant_values=-np.inf)
        blocks = padded.reshape(len(scores), -1, size).max(axis=2)
        blocks[np.arange(blocks.shape[1]) == ((complete - 1) // size)[:, None]] = np.inf
        kept = self.best(blocks, self.config["candidate_topk_blocks"])
        return np.repeat(kept, size, axis=1)[:, :rows]

    def best(self, scores: Array, most: int) -> Array:
        """Return a mask of the `most` highest finite or infinite scores of each row; on a tie, the lower index."""
        chosen = np.zeros(scores.shape, bool)
        for row, mask in zip(scores, chosen, strict=True):
            order = [i for i in np.argsort(-row, kind="stable") if row[i] > -np.inf]
            mask[order[:most]] = True
            if len(order) > most:
                self.note_gap(row[order[most - 1]], row[order[most]])
        return chosen

    def note_gap(self, last: Array, first_left_out: Array) -> None:
        self.margin = min(self.margin, float(np.min(last - first_left_out)))

    def linear(self, name: str, x: Array) -> Array:
        y: Array = x @ self.weights[name + ".weight"].T
        return y
