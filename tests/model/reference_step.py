"""A decoder step as separate operations, one after the other; the native stack must equal it bit for bit.

Every operation is called from Python on whole steps. This decoder keeps its own copy of the experts, and groups tokens
by expert itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.config import (
    ActivationConfig,
    AttentionConfig,
    DeltaConfig,
    Format,
    IndexConfig,
    KimiDeltaConfig,
    LatentConfig,
    LightningConfig,
    MambaConfig,
    ModelConfig,
    QueryScale,
    RopeConfig,
    ShortConvConfig,
)
from argosy.experts.files import ExpertFiles
from argosy.model.layers import describe_activation, routing
from argosy.model.rope import rotary
from argosy.model.step import Step
from argosy.model.weights import DenseWeights
from tests.native import _native_testing

Floats = NDArray[np.float32]


def _query_factor(scale: QueryScale | None, step: Step) -> Floats:
    """The factor of each token's queries [tokens, 1, 1]."""
    if scale is None:
        return np.ones((step.num_tokens, 1, 1), np.float32)
    periods = (np.asarray(step.order, np.int64) + scale.offset) // scale.period
    return (1 + float(np.float32(scale.beta)) * np.log1p(periods.astype(np.float64)))[:, None, None].astype(
        np.float32
    )


def _positions(step: Step) -> NDArray[np.int32] | Floats:
    """Return rotary positions: one row for all axes, or one row for each axis."""
    return step.order if step.angles is None else step.angles


class ReferenceExperts:
    """All experts in memory, with the offsets int64 [experts, 3] of a layer's gate, up and down."""

    def __init__(self, store: _native.Store, files: ExpertFiles) -> None:
        places, nbytes = files.places()
        self.arena = _native.Arena(nbytes)
        tickets = files.fetch(self.arena, list(places.items()))
        while tickets:
            done = store.wait_any(tickets)
            assert all(message is None for _, message, _ in done)
            tickets = [ticket for ticket in tickets if ticket not in {landed for landed, _, _ in done}]
        self._records = files.records
        starts = files._starts()
        self._offsets = {
            (layer, expert): np.array(starts[layer][expert], np.int64) + at
            for (layer, expert), at in places.items()
        }

    def formats(self, layer: int) -> Sequence[Format]:
        return self._records[layer, 0].formats

    def offsets(self, layer: int, experts: Sequence[int]) -> NDArray[np.int64]:
        return np.stack([self._offsets[layer, expert] for expert in experts])


class ReferenceDecoder:
    """Compute the logits of every token of a step; `tapped` holds the hidden states at the last step's taps."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseWeights,
        experts: ReferenceExperts | None,
        kv: _native.KvCache,
        runtime: _native.Runtime,
        recurrent: _native.RecurrentState | None = None,
    ) -> None:
        self.config, self.weights, self.experts, self.kv, self.runtime = config, weights, experts, kv, runtime
        self.recurrent = recurrent
        self.tapped: dict[int, Floats] = {}

    def logits(self, step: Step) -> Floats:
        embedding = self.weights.matrices["embed"]
        hidden = np.empty((step.num_tokens, self.config.hidden_size), np.float32)
        _native.embed(self.runtime, embedding, step.token_ids, hidden)
        hidden *= np.float32(self.config.embedding_scale)
        if step.overrides is not None:
            hidden[step.overrides.rows] = step.overrides.embeddings
        for layer in range(self.config.num_layers):
            before = hidden.copy()
            match self.config.layers[layer].mixer:
                case DeltaConfig() as delta:
                    self._add_delta(hidden, layer, step, delta)
                case KimiDeltaConfig() as delta:
                    self._add_kimi_delta(hidden, layer, step, delta)
                case LightningConfig() as lightning:
                    self._add_lightning(hidden, layer, step, lightning)
                case ShortConvConfig():
                    self._add_short_conv(hidden, layer, step)
                case MambaConfig() as mamba:
                    self._add_mamba(hidden, layer, step, mamba)
                case LatentConfig() as latent:
                    self._add_latent_attention(hidden, layer, step, latent)
                case AttentionConfig() as attention:
                    self._add_attention(hidden, layer, step, attention)
            if self.config.layers[layer].has_network:
                self._add_ffn(hidden, layer, before if self.config.is_parallel else hidden)
            if self.config.has_layer_scale:
                hidden *= self.weights.vectors[f"layers.{layer}.layer_scale"]
            for addition in step.additions:
                if addition.layer == layer:
                    hidden[addition.rows] += addition.vectors
            if layer in step.taps:
                self.tapped[layer] = hidden.copy()
        head = embedding if self.config.is_embedding_tied else self.weights.matrices["head"]
        logits = self._product(head, self._norm_hidden(hidden, "final_norm"))
        logits *= np.float32(self.config.logit_scale)
        if self.config.logit_cap:
            _native_testing.soft_cap(self.runtime, logits, self.config.logit_cap)
        return logits

    def _norm(self, x: Floats, name: str, eps: float | None = None) -> Floats:
        return self._norm_by(x, self.weights.vectors[name], eps)

    def _norm_by(self, x: Floats, weight: Floats, eps: float | None = None) -> Floats:
        out = np.empty_like(x)
        _native.rms_norm(self.runtime, x, weight, eps or self.config.norm_eps, out)
        return out

    def _norm_hidden(self, x: Floats, name: str) -> Floats:
        """Norm the hidden state, unless the layer has no such norm."""
        weight = self.weights.vectors.get(name)
        if weight is None or self.config.norm_kind == "rms":
            return self._norm_if_any(x, name)
        out = np.empty_like(x)
        _native.layer_norm(self.runtime, x, weight, None, self.config.norm_eps, out)
        return out

    def _read(self, hidden: Floats, name: str) -> Floats:
        """Return what a block reads; it may also replace the hidden state to which the block adds."""
        normed = self._norm_hidden(hidden, name)
        if self.config.normed_residual:
            hidden[:] = normed * np.float32(self.config.normed_residual)
        return normed

    def _norm_if_any(self, x: Floats, name: str) -> Floats:
        return self._norm(x, name) if name in self.weights.vectors else x

    def _rotate(self, heads: Floats, rope: RopeConfig | None, step: Step) -> None:
        if rope is None:
            return
        cosine, sine = np.empty((2, step.num_tokens, rope.rotary_dim // 2), np.float32)
        rotary(rope).angles(self.runtime, _positions(step), cosine, sine)
        _native.rope(self.runtime, heads, cosine, sine, rope.is_interleaved)

    def _add_mixed(self, hidden: Floats, mixed: Floats, layer: int) -> None:
        mixed = self._norm_if_any(mixed, f"layers.{layer}.attn_post_norm")
        hidden += mixed * np.float32(self.config.residual_scale)

    def _product(self, matrix: _native.Matrix, x: Floats) -> Floats:
        out = np.empty((len(x), matrix.rows), np.float32)
        _native.matmul(self.runtime, [matrix], x, [out])
        return out

    def _projection(self, name: str, x: Floats) -> Floats:
        out = self._product(self.weights.matrices[name], x)
        if name + "_bias" in self.weights.vectors:
            out += self.weights.vectors[name + "_bias"]
        return out

    def _add_attention(self, hidden: Floats, layer: int, step: Step, attention: AttentionConfig) -> None:
        tokens, name, head_dim = step.num_tokens, f"layers.{layer}.", attention.head_dim
        normed = self._read(hidden, name + "attn_norm")
        query, key = (self._projection(name + part, normed).reshape(tokens, -1, head_dim) for part in "qk")
        value = key.copy()
        if not attention.keys_are_values:
            value = self._projection(name + "v", normed).reshape(tokens, -1, attention.width_of_values)
        if attention.output_gate == "query":
            query, gate = np.ascontiguousarray(query[:, 0::2]), np.ascontiguousarray(query[:, 1::2])
        if not attention.is_norm_last:
            query, key = self._norm_heads(query, key, name, attention)
        if attention.has_value_norm:
            width = value.shape[-1]
            value = self._norm_by(value.reshape(-1, width), np.ones(width, np.float32)).reshape(value.shape)
        if attention.qkv_limit:
            query, key, value = (
                np.clip(x, -attention.qkv_limit, attention.qkv_limit) for x in (query, key, value)
            )
        value = value * np.float32(attention.value_scale)
        for heads in (query, key):
            self._rotate(heads, attention.rope, step)
        if attention.is_norm_last:
            query, key = self._norm_heads(query, key, name, attention)
        query = query * _query_factor(attention.query_scale, step)
        _native.kv_write(self.runtime, self.kv, layer, key, value, step.slots)
        attended = np.empty((tokens, attention.num_heads * value.shape[-1]), np.float32)
        _native.attention(
            self.runtime,
            self.kv,
            layer,
            query,
            step.block_table,
            step.sequence,
            step.order,
            attention.scale or head_dim**-0.5,
            attention.sliding_window,
            attended,
            self.weights.vectors.get(name + "sinks"),
            None if attention.is_causal else step.sees_until,
            attention.is_chunked,
        )
        if attention.gate_rows:
            gate = self._product(self.weights.matrices[name + "attn_gate"], normed)
        if attention.output_gate != "none":
            is_softplus = attention.gate_activation == "softplus"
            by = (
                gate.reshape(-1, 1) if attention.output_gate == "heads" else gate.reshape(-1, value.shape[-1])
            )
            _native_testing.mul_gate(self.runtime, by, attended.reshape(len(by), -1), is_softplus)
        self._add_mixed(hidden, self._projection(name + "o", attended), layer)

    def _norm_heads(
        self, query: Floats, key: Floats, name: str, attention: AttentionConfig
    ) -> tuple[Floats, Floats]:
        if attention.qk_norm == "none":
            return query, key

        def normed(x: Floats, name: str) -> Floats:
            weight = self.weights.vectors.get(name, np.ones(attention.head_dim, np.float32))
            return self._norm_by(np.ascontiguousarray(x).reshape(-1, len(weight)), weight).reshape(x.shape)

        return normed(query, name + "q_norm"), normed(key, name + "k_norm")

    def _add_delta(self, hidden: Floats, layer: int, step: Step, delta: DeltaConfig) -> None:
        name, vectors = f"layers.{layer}.", self.weights.vectors
        assert self.recurrent is not None
        normed = self._read(hidden, name + "attn_norm")
        name += "delta_"
        if delta.has_joined_qkvz:
            ends = np.cumsum([delta.key_dim, delta.key_dim, delta.value_channels // delta.num_key_heads])
            *qkv, z = self._parts_of_key_heads(name + "qkvz", normed, ends)
            qkv = np.concatenate(qkv, axis=1)
        else:
            qkv, z = self._projection(name + "qkv", normed), self._projection(name + "z", normed)
        if delta.has_joined_ba:
            b, a = self._parts_of_key_heads(
                name + "ba", normed, [delta.num_value_heads // delta.num_key_heads]
            )
        else:
            b, a = self._projection(name + "b", normed), self._projection(name + "a", normed)
        out = np.empty((len(normed), delta.value_channels), np.float32)
        _native_testing.gated_delta(
            self.runtime,
            self.recurrent,
            self.config.recurrent_layers.index(layer),
            qkv,
            z,
            b,
            a,
            self._runs(layer, step),
            conv=vectors[name + "conv"],
            rate=-np.exp(vectors[name + "rate"]) if delta.is_rate_log else vectors[name + "rate"],
            dt_bias=vectors[name + "dt_bias"],
            norm=vectors[name + "norm"],
            eps=self.config.norm_eps,
            sizes=delta.sizes,
            is_tiled=delta.is_tiled,
            out=out,
        )
        self._add_mixed(hidden, self._projection(name + "out", out), layer)

    def _add_kimi_delta(self, hidden: Floats, layer: int, step: Step, delta: KimiDeltaConfig) -> None:
        assert self.recurrent is not None
        name, vectors = f"layers.{layer}.kda_", self.weights.vectors
        normed = self._read(hidden, f"layers.{layer}.attn_norm")

        def factored(part: str) -> Floats:
            has_down = name + part + "_down" in self.weights.matrices
            return self._projection(
                name + part, self._projection(f"{name}{part}_down", normed) if has_down else normed
            )

        rate = vectors[name + "rate"]
        out = np.empty((len(normed), delta.channels), np.float32)
        _native_testing.gated_delta(
            self.runtime,
            self.recurrent,
            self.config.recurrent_layers.index(layer),
            np.concatenate([self._projection(name + part, normed) for part in "qkv"], axis=1),
            factored("gate"),
            self._projection(name + "beta", normed),
            factored("decay"),
            self._runs(layer, step),
            conv=np.concatenate([vectors[f"{name}{part}_conv"].reshape(1, -1) for part in "qkv"], axis=1),
            rate=-np.exp(rate) if delta.is_rate_log else -np.abs(rate),
            dt_bias=vectors[name + "dt_bias"],
            norm=vectors[name + "norm"],
            eps=self.config.norm_eps,
            sizes=delta.sizes,
            is_tiled=False,
            out=out,
            floor=delta.floor,
        )
        self._add_mixed(hidden, self._projection(name + "out", out), layer)

    def _add_lightning(self, hidden: Floats, layer: int, step: Step, lightning: LightningConfig) -> None:
        assert self.recurrent is not None
        name, tokens = f"layers.{layer}.lightning_", step.num_tokens
        normed = self._read(hidden, f"layers.{layer}.attn_norm")
        if lightning.has_joined_qkv:
            joined = self._projection(name + "qkv", normed).reshape(tokens, lightning.num_heads, -1)
            q, k, v = (np.ascontiguousarray(part) for part in np.split(joined, 3, axis=2))
        else:
            shape = (tokens, lightning.num_heads, lightning.head_dim)
            q, k, v = (self._projection(name + part, normed).reshape(shape) for part in "qkv")
        if lightning.has_silu:
            for part in (q, k, v):
                rows = part.reshape(tokens, -1)
                _native_testing.mul_gate(self.runtime, rows.copy(), rows, False)
        if lightning.has_qk_norm:
            q, k = (
                self._norm(part.reshape(-1, lightning.head_dim), f"{name}{which}_norm").reshape(part.shape)
                for part, which in ((q, "q"), (k, "k"))
            )
        for heads in (q, k):
            self._rotate(heads, lightning.rope, step)
        out = np.empty((tokens, lightning.channels), np.float32)
        _native_testing.lightning_attention(
            self.runtime,
            self.recurrent,
            self.config.recurrent_layers.index(layer),
            *(part.reshape(tokens, -1) for part in (q, k, v)),
            self._runs(layer, step),
            decay=np.exp(-np.array(lightning.slopes)).astype(np.float32),
            scale=lightning.scale,
            out=out,
        )
        groups = out.reshape(tokens, lightning.num_groups, -1)
        weight = self.weights.vectors[name + "norm"].reshape(lightning.num_groups, -1)
        parts = [
            self._norm_by(np.ascontiguousarray(groups[:, i]), weight[i], lightning.norm_eps)
            for i in range(lightning.num_groups)
        ]
        out = np.ascontiguousarray(np.concatenate(parts, axis=1))
        _native_testing.mul_gate(self.runtime, self._projection(name + "gate", normed), out, False)
        self._add_mixed(hidden, self._projection(name + "out", out), layer)

    def _runs(self, layer: int, step: Step) -> NDArray[np.int64]:
        """Return the first and end token of each sequence and its slot; new sequences start over in the first layer."""
        assert self.recurrent is not None
        assert step.state_slots is not None
        starts = [0, *(np.flatnonzero(np.diff(step.sequence)) + 1), step.num_tokens]
        slots = [int(step.state_slots[step.sequence[begin]]) for begin in starts[:-1]]
        if layer == self.config.recurrent_layers[0]:
            for begin, slot in zip(starts, slots, strict=False):
                if step.order[begin] == 0:
                    self.recurrent.restart(slot)
        return np.array(list(zip(starts, starts[1:], slots, strict=False)), np.int64)

    def _add_short_conv(self, hidden: Floats, layer: int, step: Step) -> None:
        assert self.recurrent is not None
        name, vectors = f"layers.{layer}.", self.weights.vectors
        projected = self._projection(name + "shortconv_in", self._read(hidden, name + "attn_norm"))
        b, c, x = (np.ascontiguousarray(part) for part in np.split(projected, 3, axis=1))
        name += "shortconv_"
        out = np.empty_like(x)
        _native_testing.causal_conv(
            self.runtime,
            self.recurrent,
            self.config.recurrent_layers.index(layer),
            x,
            b,
            c,
            self._runs(layer, step),
            weights=vectors[name + "conv"],
            bias=vectors.get(name + "conv_bias"),
            out=out,
        )
        self._add_mixed(hidden, self._projection(name + "out", out), layer)

    def _add_mamba(self, hidden: Floats, layer: int, step: Step, mamba: MambaConfig) -> None:
        assert self.recurrent is not None
        name, vectors = f"layers.{layer}.mamba_", self.weights.vectors
        projected = self._projection(name + "in", self._read(hidden, f"layers.{layer}.attn_norm"))
        out = np.empty((len(projected), mamba.channels), np.float32)
        _native_testing.mamba_recurrence(
            self.runtime,
            self.recurrent,
            self.config.recurrent_layers.index(layer),
            projected,
            self._runs(layer, step),
            conv=vectors[name + "conv"],
            conv_bias=vectors.get(name + "conv_bias"),
            rate=-np.exp(vectors[name + "rate"]) if mamba.is_rate_log else vectors[name + "rate"],
            dt_bias=vectors[name + "dt_bias"],
            skip=vectors[name + "skip"],
            norm=vectors[name + "norm"],
            eps=self.config.norm_eps,
            sizes=mamba.sizes,
            dt_limit=(mamba.least_dt, mamba.most_dt or float("inf")),
            out=out,
        )
        self._add_mixed(hidden, self._projection(name + "out", out), layer)

    def _parts_of_key_heads(self, name: str, x: Floats, ends: Sequence[int]) -> list[Floats]:
        """Regroup a matrix's output from key head by key head to part by part."""
        assert self.config.delta is not None
        heads = self._projection(name, x).reshape(len(x), self.config.delta.num_key_heads, -1)
        return [np.ascontiguousarray(part.reshape(len(x), -1)) for part in np.split(heads, ends, axis=2)]

    def _add_latent_attention(self, hidden: Floats, layer: int, step: Step, latent: LatentConfig) -> None:
        tokens, name = step.num_tokens, f"layers.{layer}."
        query = normed = self._read(hidden, name + "attn_norm")
        if latent.query_rank:
            down = self._product(self.weights.matrices[name + "q_down"], normed)
            query = self._norm(down, name + "q_down_norm", latent.norm_eps)
        if latent.own_index is not None:
            self._chosen = self._choose(latent.own_index, layer, step, normed, query)
        query = self._product(self.weights.matrices[name + ("q_up" if latent.query_rank else "q")], query)
        query = query.reshape(tokens, latent.num_heads, -1)
        vectors = self._product(self.weights.matrices[name + "kv_down"], normed)
        compressed = vectors[:, : latent.kv_rank].copy()
        vectors[:, : latent.kv_rank] = self._norm(compressed, name + "kv_norm", latent.norm_eps)
        for turning in (query[:, :, latent.nope_dim :], vectors[:, None, latent.kv_rank :]):
            turned = turning.copy()
            self._rotate(turned, latent.rope, step)
            turning[:] = turned
        query = query * _query_factor(latent.query_scale, step)
        _native_testing.latent_write(self.runtime, self.kv, layer, vectors, step.slots)
        attended = np.empty((tokens, latent.num_heads * latent.value_dim), np.float32)
        _native_testing.latent_attention(
            self.runtime,
            self.kv,
            layer,
            query,
            self.weights.matrices[name + "k_up"],
            self.weights.matrices[name + "v_up"],
            step.block_table,
            step.sequence,
            step.order,
            latent.scale or latent.head_dim**-0.5,
            attended,
            step.sees_until,
            self._chosen if latent.num_chosen else None,
        )
        if latent.gate_rows:
            gates = self._product(self.weights.matrices[name + "attn_gate"], normed)
            gates = gates.reshape(tokens * latent.num_heads, -1)
            _native_testing.mul_gate(self.runtime, gates, attended.reshape(len(gates), -1), False)
        self._add_mixed(hidden, self._projection(name + "o", attended), layer)

    def _choose(
        self, index: IndexConfig, layer: int, step: Step, normed: Floats, query_latent: Floats
    ) -> NDArray[np.int32]:
        name, tokens = f"layers.{layer}.index_", step.num_tokens
        key = self._product(self.weights.matrices[name + "k"], normed)
        weight, bias = (self.weights.vectors[name + part] for part in ("k_norm", "k_norm_bias"))
        _native.layer_norm(self.runtime, key, weight, bias, index.norm_eps, key)
        query = self._product(self.weights.matrices[name + "q"], query_latent)
        query = query.reshape(tokens, index.num_heads, -1)
        mixer = self.config.layers[layer].mixer
        assert isinstance(mixer, LatentConfig)
        rope = replace(mixer.rope, is_interleaved=index.is_interleaved)
        for turning in (query, key[:, None]):
            self._rotate(turning, rope, step)
        weights = self._product(self.weights.matrices[name + "weights"], normed)
        weights *= np.float32(1) / np.sqrt(np.float32(index.num_heads * index.head_dim))
        _native_testing.index_write(self.runtime, self.kv, layer, key, step.slots)
        chosen = np.full((tokens, index.num_chosen), -1, np.int32)
        _native_testing.choose_positions(
            self.runtime,
            self.kv,
            layer,
            query,
            weights,
            step.block_table,
            step.sequence,
            step.order,
            chosen,
            step.sees_until,
        )
        return chosen

    def _add_ffn(self, hidden: Floats, layer: int, read: Floats) -> None:
        is_averaged = self.config.shared_is_averaged and self.config.layers[layer].is_moe
        scale = np.float32(self.config.residual_scale * (0.5 if is_averaged else 1.0))
        if f"layers.{layer}.mlp_post_norm" not in self.weights.vectors and scale == 1:
            self._add_networks(hidden, read, layer)
            return
        out = np.zeros_like(hidden)
        self._add_networks(out, read, layer)
        hidden += self._norm_if_any(out, f"layers.{layer}.mlp_post_norm") * scale

    def _add_networks(self, out: Floats, hidden: Floats, layer: int) -> None:
        """Add the outputs of the networks of a layer, in their order, to `out`, which may be `hidden`."""
        name = f"layers.{layer}."
        normed = self._read(hidden, name + ("attn_norm" if self.config.is_parallel else "mlp_norm"))
        if not self.config.layers[layer].is_moe:
            activation = self.config.layers[layer].activation
            out += self._swiglu(activation, normed, *(name + part for part in ("gate", "up", "down")))
            return
        router_in = expert_in = normed
        if self.config.router.has_norm:
            factor = np.float32(self.config.hidden_size**-0.5)
            router_in = self._norm_by(hidden, self.weights.vectors[name + "router_norm"] * factor)
        if self.config.has_expert_norms:
            expert_in = self._norm(hidden, name + "expert_norm")
        self._add_shared(out, normed, layer)
        if self.experts is None:
            return
        if self.config.has_expert_norms:
            routed = np.zeros_like(out)
            self._add_routed(routed, router_in, expert_in, layer, self.experts)
            out += self._norm(routed, name + "expert_post_norm")
        elif self.config.expert_latent:
            latent = np.zeros((len(out), self.config.expert_latent), np.float32)
            self._add_routed(
                latent, router_in, self._projection(name + "latent_down", normed), layer, self.experts
            )
            if self.config.has_latent_norm:
                latent = self._norm(latent, name + "latent_norm", self.config.norm_eps)
            out += self._projection(name + "latent_up", latent)
        else:
            self._add_routed(out, router_in, expert_in, layer, self.experts)

    def _swiglu(self, activation: ActivationConfig | None, x: Floats, *names: str) -> Floats:
        out = np.empty_like(x)
        gate, up, down = (self.weights.matrices.get(name) for name in names)
        assert up is not None
        assert down is not None
        act = describe_activation(activation or self.config.activation)
        _native_testing.swiglu(self.runtime, gate, up, down, x, out, act)
        return out

    def _add_shared(self, hidden: Floats, normed: Floats, layer: int) -> None:
        if not self.config.shared_width:
            return
        name, activation = f"layers.{layer}.", self.config.layers[layer].shared_activation
        out = self._swiglu(
            activation, normed, *(name + part for part in ("shared_gate", "shared_up", "shared_down"))
        )
        out = self._norm_if_any(out, name + "shared_post_norm")
        if self.config.shared_is_gated:
            score = self._product(self.weights.matrices[name + "shared_score"], normed)
            _native_testing.add_sigmoid_gated(self.runtime, out, score.reshape(-1), hidden)
        else:
            hidden += out

    def _add_routed(
        self, hidden: Floats, router_in: Floats, expert_in: Floats, layer: int, experts: ReferenceExperts
    ) -> None:
        config, k = self.config, self.config.chosen_in(layer)
        logits = self._projection(f"layers.{layer}.router", router_in)
        if config.router.logit_cap:
            _native_testing.soft_cap(self.runtime, logits, config.router.logit_cap)
        ids, weights = np.empty((len(hidden), k), np.int32), np.empty((len(hidden), k), np.float32)
        _native_testing.route(self.runtime, routing(config, layer, self.weights), logits, ids, weights)
        if config.router.weighs_input:
            expert_in, weights = expert_in * weights, np.ones_like(weights)

        flat = ids.reshape(-1)
        chosen = sorted(set(flat.tolist()))
        rows = [np.flatnonzero(flat == expert).astype(np.int32) for expert in chosen]
        row = np.concatenate(rows)
        biases = {
            f"{part}_bias": table.reshape(config.num_experts, -1)[chosen]
            for part in ("gate", "up", "down")
            if (table := self.weights.vectors.get(f"layers.{layer}.expert_{part}_bias")) is not None
        }
        out = np.empty((flat.size, config.expert_hidden), np.float32)
        _native_testing.swiglu_experts(
            self.runtime,
            experts.arena,
            experts.formats(layer),
            config.expert_hidden,
            config.expert_width_in(layer),
            experts.offsets(layer, chosen),
            expert_in,
            np.cumsum([0, *(len(each) for each in rows)], dtype=np.int32),
            row // np.int32(k),
            row,
            out,
            activation=describe_activation(config.layers[layer].activation or config.activation),
            **biases,
        )
        _native_testing.combine(self.runtime, out, weights, hidden)
