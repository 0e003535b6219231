"""Describe a checkpoint's layers to the native stack that runs them: the matrices, norms and sizes of each layer.

A layer is a mixer, which lets positions see each other, and a feed-forward network, each with its own norms. A family
with another kind of mixer or network adds a function here and its counterpart in native/ops/stack.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from argosy import _native
from argosy.config import MixerKind, ModelConfig
from argosy.errors import CheckpointError
from argosy.experts.files import Arithmetic
from argosy.model.weights import DenseWeights, Vector


def describe_layers(config: ModelConfig, weights: DenseWeights) -> list[_native.Layer]:
    """Describe every layer of a model, using the memory of `weights`."""
    vectors = weights.vectors
    return [
        _native.Layer(
            vectors[f"layers.{i}.attn_norm"],
            _MIXERS[layer.mixer](config, i, weights),
            vectors[f"layers.{i}.mlp_norm"],
            _routed_ffn(config, i, weights) if layer.is_moe else _dense_ffn(i, weights),
            rotary=config.ropes.index(config.rope_of(i)),
            mixer_post_norm=vectors.get(f"layers.{i}.attn_post_norm"),
            ffn_post_norm=vectors.get(f"layers.{i}.mlp_post_norm"),
            scale=float(vectors[f"layers.{i}.layer_scale"][0]) if config.has_layer_scale else 1.0,
        )
        for i, layer in enumerate(config.layers)
    ]


def kv_shapes(config: ModelConfig) -> list[_native.KvShape]:
    """Return the data that each layer keeps per position."""
    return [_KV_SHAPES[layer.mixer](config, i) for i, layer in enumerate(config.layers)]


def stack_sizes(config: ModelConfig) -> _native.StackSizes:
    """Return the dimensions of all layers, from which native code computes its working memory."""
    sizes = _native.StackSizes(config.hidden_size, sum(rope.rotary_dim // 2 for rope in config.ropes))
    if config.has_post_norms:
        sizes.add_ffn_post_norm()
    for i, layer in enumerate(config.layers):
        _ADD_MIXER_SIZES[layer.mixer](sizes, config, i)
        if layer.is_moe:
            sizes.add_routed(
                config.num_experts,
                config.experts_per_token,
                config.expert_width,
                config.shared_width,
                config.has_expert_norms,
            )
        else:
            sizes.add_dense(config.dense_width)
    return sizes


def describe_activation(config: ModelConfig) -> _native.Activation:
    """Describe the activation between the products of a feed-forward network."""
    activation = config.activation
    return activation.kind, activation.limit, activation.alpha


def describe_experts(config: ModelConfig, weights: DenseWeights) -> Arithmetic:
    """Describe the arithmetic of the routed experts; it uses the memory of `weights`."""
    vectors = weights.vectors

    def bias(layer: int, part: str) -> Vector | None:
        flat = vectors.get(f"layers.{layer}.expert_{part}_bias")
        return None if flat is None else flat.reshape(config.num_experts, -1)

    return Arithmetic(
        describe_activation(config),
        {layer: (bias(layer, "gate"), bias(layer, "up"), bias(layer, "down")) for layer in config.moe_layers},
    )


def _attention(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Mixer:
    """Grouped-query attention (arXiv:2305.13245)."""
    name, head_dim = f"layers.{layer}.", config.head_dim_of(layer)
    query, key, output = (weights.matrices[name + part] for part in "qko")
    return _native.grouped_query_attention(
        query,
        key,
        None if config.layers[layer].keys_are_values else weights.matrices[name + "v"],
        output,
        num_heads=config.num_heads,
        window=config.layers[layer].sliding_window,
        scale=config.attention_scale or head_dim**-0.5,
        query_bias=weights.vectors.get(name + "q_bias"),
        key_bias=weights.vectors.get(name + "k_bias"),
        value_bias=weights.vectors.get(name + "v_bias"),
        output_bias=weights.vectors.get(name + "o_bias"),
        query_norm=weights.vectors.get(name + "q_norm"),
        key_norm=weights.vectors.get(name + "k_norm"),
        is_norm_flat=config.qk_norm == "flat",
        limit=config.qkv_limit,
        sinks=weights.vectors.get(name + "sinks"),
        has_gate=config.has_output_gate,
        value_norm=np.ones(head_dim, np.float32) if config.has_value_norm else None,
        is_causal=config.layers[layer].is_causal,
    )


def _delta(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Mixer:
    """A gated delta net (arXiv:2412.06464)."""
    delta, name = config.delta, f"layers.{layer}.delta_"
    assert delta is not None
    matrices = weights.matrices
    return _native.gated_delta_net(
        matrices[name + ("qkvz" if delta.has_joined_qkvz else "qkv")],
        matrices[name + ("ba" if delta.has_joined_ba else "b")],
        matrices[name + "out"],
        z=None if delta.has_joined_qkvz else matrices[name + "z"],
        a=None if delta.has_joined_ba else matrices[name + "a"],
        conv=weights.vectors[name + "conv"],
        rate=_decay_rate(name + "rate", weights, is_log=delta.is_rate_log),
        dt_bias=weights.vectors[name + "dt_bias"],
        norm=weights.vectors[name + "norm"],
        sizes=delta.sizes,
        is_tiled=delta.is_tiled,
        state_layer=config.delta_layers.index(layer),
    )


def _decay_rate(name: str, weights: DenseWeights, *, is_log: bool) -> Vector:
    """The decay rate of each head.

    Raises:
        CheckpointError: a rate would make the state grow from token to token, or turn it into NaN.
    """
    rate = weights.vectors[name]
    with np.errstate(over="ignore"):
        rate = -np.exp(rate) if is_log else rate
    wrong = np.flatnonzero(~(np.isfinite(rate) & (rate <= 0)))
    if wrong.size:
        raise CheckpointError(
            f"{name} gives head {wrong[0]} a decay of e^({rate[wrong[0]]} * softplus), expected a rate of 0 or less",
            hint="the file is damaged, or the model was already broken when it was saved",
            tensor=name,
        )
    return rate


def _latent(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Mixer:
    """Multi-head latent attention (arXiv:2405.04434). Loading split kv_up into k_up, transposed, and v_up."""
    latent, name = config.latent, f"layers.{layer}."
    assert latent is not None
    return _native.multi_head_latent_attention(
        weights.matrices[name + ("q_up" if latent.query_rank else "q")],
        weights.matrices[name + "kv_down"],
        weights.matrices[name + "k_up"],
        weights.matrices[name + "v_up"],
        weights.matrices[name + "o"],
        num_heads=config.num_heads,
        rope_dim=latent.rope_dim,
        scale=config.attention_scale or (latent.nope_dim + latent.rope_dim) ** -0.5,
        norm_eps=latent.norm_eps,
        kv_norm=weights.vectors[name + "kv_norm"],
        query_down=weights.matrices.get(name + "q_down"),
        query_norm=weights.vectors.get(name + "q_down_norm"),
    )


_MIXERS: Mapping[MixerKind, Callable[[ModelConfig, int, DenseWeights], _native.Mixer]] = {
    "attention": _attention,
    "delta": _delta,
    "latent": _latent,
}


def _latent_dim(config: ModelConfig) -> int:
    assert config.latent is not None
    return config.latent.kv_rank + config.latent.rope_dim


_KV_SHAPES: Mapping[MixerKind, Callable[[ModelConfig, int], _native.KvShape]] = {
    "attention": lambda config, layer: _native.KvShape.keys_values(
        config.kv_heads_of(layer),
        config.head_dim_of(layer),
        is_windowed=config.layers[layer].sliding_window > 0,
    ),
    "delta": lambda config, layer: _native.KvShape.none(),
    "latent": lambda config, layer: _native.KvShape.latent(_latent_dim(config)),
}


def _add_attention_sizes(sizes: _native.StackSizes, config: ModelConfig, layer: int) -> None:
    sizes.add_attention(
        config.num_heads, config.kv_heads_of(layer), config.head_dim_of(layer), config.has_output_gate
    )


def _add_latent_sizes(sizes: _native.StackSizes, config: ModelConfig, layer: int) -> None:
    latent = config.latent
    assert latent is not None
    sizes.add_latent_attention(
        config.num_heads,
        latent.nope_dim,
        latent.rope_dim,
        latent.kv_rank,
        latent.value_dim,
        latent.query_rank,
    )


def _add_delta_sizes(sizes: _native.StackSizes, config: ModelConfig, layer: int) -> None:
    assert config.delta is not None
    sizes.add_delta_net(config.delta.sizes)


_ADD_MIXER_SIZES: Mapping[MixerKind, Callable[[_native.StackSizes, ModelConfig, int], None]] = {
    "attention": _add_attention_sizes,
    "delta": _add_delta_sizes,
    "latent": _add_latent_sizes,
}


def _dense_ffn(layer: int, weights: DenseWeights) -> _native.Ffn:
    """SwiGLU (arXiv:2002.05202)."""
    return _native.dense_ffn(*(weights.matrices[f"layers.{layer}.{part}"] for part in ("gate", "up", "down")))


def _routed_ffn(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Ffn:
    """Routed experts, and a shared expert if the family has one."""
    name = f"layers.{layer}."
    shared = None
    if config.shared_width:
        shared = (
            weights.matrices[name + "shared_gate"],
            weights.matrices[name + "shared_up"],
            weights.matrices[name + "shared_down"],
        )
    router_norm = None
    if config.router.has_norm:
        router_norm = weights.vectors[name + "router_norm"] * np.float32(config.hidden_size**-0.5)
    return _native.routed_ffn(
        weights.matrices[name + "router"],
        routing(config, layer, weights),
        router_bias=weights.vectors.get(name + "router_bias"),
        width=config.expert_width,
        shared=shared,
        shared_score=weights.matrices[name + "shared_score"] if config.shared_is_gated else None,
        router_norm=router_norm,
        norm=weights.vectors.get(name + "expert_norm"),
        post_norm=weights.vectors.get(name + "expert_post_norm"),
        shared_post_norm=weights.vectors.get(name + "shared_post_norm"),
    )


def routing(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Routing:
    """Describe how a layer chooses experts from its router's product and bias."""
    router = config.router
    return _native.Routing(
        config.experts_per_token,
        score=router.score,
        choice_bias=weights.vectors.get(f"layers.{layer}.choice_bias"),
        num_groups=router.num_groups,
        kept_groups=router.kept_groups,
        group_score=router.group_score,
        renormalize=router.renormalize,
        renormalize_eps=router.renormalize_eps,
        scale=router.scale,
        expert_scale=weights.vectors.get(f"layers.{layer}.expert_scale"),
    )
