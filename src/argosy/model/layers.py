"""Describe a checkpoint's layers to the native stack that runs them: the matrices, norms and sizes of each layer.

A layer is a mixer, which lets positions see each other, and a feed-forward network, each with its own norms, or only
one of them (mixers.py). A family with another kind of network adds a function here and its counterpart in
native/ops/stack.h.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from argosy import _native
from argosy.config import (
    ActivationConfig,
    BankResidual,
    GatedResidual,
    Mixer,
    ModelConfig,
    NgramConfig,
    RotaryMixer,
    SinkhornResidual,
)
from argosy.experts.files import Arithmetic
from argosy.model.mixers import add_mixer_sizes, describe_mixer, further_stores, kv_shape, state_shape
from argosy.model.weights import DenseWeights, Vector


def describe_layers(
    config: ModelConfig, weights: DenseWeights, layers: range, tables: Mapping[int, _native.TableRows] = {}
) -> list[_native.Layer]:
    """Describe some layers of a model, using the memory of `weights`, and the n-gram tables by layer."""
    vectors, reaches = weights.vectors, config.reaches
    return [
        _native.Layer(
            vectors.get(f"layers.{i}.attn_norm"),
            describe_mixer(config, i, weights),
            vectors.get(f"layers.{i}.mlp_norm"),
            _ffn(config, i, weights),
            rotary=_rotary(config, layer.mixer),
            mixer_post_norm=vectors.get(f"layers.{i}.attn_post_norm"),
            ffn_post_norm=vectors.get(f"layers.{i}.mlp_post_norm"),
            scale=float(vectors[f"layers.{i}.layer_scale"][0]) if config.has_layer_scale else 1.0,
            is_parallel=config.is_parallel,
            mixer_scale=config.residual_scale,
            ffn_scale=_ffn_scale(config, i),
            normed_residual=config.normed_residual,
            mixer_mix=_mixer_mix(config, i, weights),
            ffn_mix=_mix(config, f"layers.{i}.mlp_mix", weights) if layer.has_network else None,
            ngrams=None if layer.ngrams is None else _ngrams(config, i, layer.ngrams, weights, tables[i]),
            reach=reaches[i],
        )
        for i, layer in enumerate(config.layers[layers.start : layers.stop], layers.start)
    ]


def _ngrams(
    config: ModelConfig,
    layer: int,
    ngrams: NgramConfig,
    weights: DenseWeights,
    table: _native.TableRows,
) -> _native.Ngrams:
    """The n-gram sublayer (Engram, arXiv:2601.07372). Taps that its convolution skips are zeros."""
    name, vectors = f"layers.{layer}.ngram_", weights.vectors
    conv = None
    if ngrams.conv_width:
        taps = vectors[name + "conv"]
        conv = np.zeros((ngrams.conv_span, taps.shape[1]), np.float32)
        conv[:: ngrams.conv_dilation] = taps
    return _native.ngrams(
        table,
        weights.matrices[name + "key"],
        weights.matrices[name + "value"],
        key_norm=vectors[name + "key_norm"],
        query_norm=vectors[name + "query_norm"],
        conv=conv,
        conv_norm=vectors.get(name + "conv_norm"),
        state_layer=len(config.recurrent_layers) + _conv_layers(config).index(layer)
        if ngrams.conv_width
        else 0,
    )


def _conv_layers(config: ModelConfig) -> list[int]:
    """The layers whose n-gram sublayer has a convolution; their states follow those of the mixers."""
    return [
        i for i, layer in enumerate(config.layers) if layer.ngrams is not None and layer.ngrams.conv_width
    ]


def describe_residual(config: ModelConfig, weights: DenseWeights) -> _native.Residual | None:
    """Describe the residual streams, using the memory of `weights`; None: there is one hidden state."""
    match config.residual:
        case SinkhornResidual() as residual:
            heads = {"mean": _native.mean_mix, "carried": _native.carried_mix}
            own = _mix(config, "head_mix", weights) if residual.head == "own" else None
            return _native.Residual(
                residual.num_streams,
                own or heads[residual.head](),
                iterations=residual.iterations,
                eps=residual.eps,
                is_lagged=residual.is_lagged,
                magnitude=residual.magnitude,
            )
        case GatedResidual() | BankResidual() as residual:
            head = _mix(config, "head_mix", weights)
            assert head is not None
            return _native.Residual(residual.num_streams, head)
    return None


def _mixer_mix(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.StreamMix | None:
    if config.layers[layer].mixer is None:
        return None
    starts_block = isinstance(config.residual, BankResidual) and layer % config.residual.block == 0
    return _mix(config, f"layers.{layer}.attn_mix", weights, starts_block=starts_block)


def _mix(
    config: ModelConfig, name: str, weights: DenseWeights, *, starts_block: bool = False
) -> _native.StreamMix | None:
    """How a part of the model reads residual streams, and writes them."""
    matrices, vectors = weights.matrices, weights.vectors
    match config.residual:
        case SinkhornResidual():
            return _native.sinkhorn_mix(matrices[name], vectors[f"{name}_bias"], vectors[f"{name}_scale"])
        case GatedResidual():
            return _native.gated_mix(
                vectors[f"{name}_norm"],
                matrices[f"{name}_down"],
                matrices[f"{name}_up"],
                matrices.get(f"{name}_inject"),
            )
        case BankResidual():
            scale, norm = vectors[f"{name}_scale"], vectors.get(f"{name}_norm")
            return _native.bank_mix(scale if norm is None else scale * norm, starts_block)
    return None


def _rotary(config: ModelConfig, mixer: Mixer | None) -> int | None:
    """Return the number of the mixer's rotary embedding, or None if nothing rotates."""
    rope = mixer.rope if isinstance(mixer, RotaryMixer) else None
    return None if rope is None else config.ropes.index(rope)


def kv_shapes(config: ModelConfig) -> list[_native.KvShape]:
    """Return the data that each layer keeps per position; then further stores of some layers."""
    further = [shape for layer in config.layers for shape in further_stores(layer.mixer)]
    return [kv_shape(layer.mixer) for layer in config.layers] + further


def state_shapes(config: ModelConfig) -> list[_native.StateShape]:
    """Return the state that each recurrent layer keeps per sequence."""
    shapes = [state_shape(config.layers[i].mixer) for i in config.recurrent_layers]
    for number in _conv_layers(config):
        ngrams = config.layers[number].ngrams
        assert ngrams is not None
        shapes.append(
            _native.StateShape.short_conv(config.num_streams * config.hidden_size, ngrams.conv_span)
        )
    return shapes


def stack_sizes(config: ModelConfig) -> _native.StackSizes:
    """Return the dimensions of all layers, from which native code computes its working memory."""
    sizes = _native.StackSizes(config.hidden_size, sum(rope.rotary_dim // 2 for rope in config.ropes))
    is_apart = config.has_post_norms or config.has_moe_post_norm
    if is_apart or any(_ffn_scale(config, i) != 1 for i in range(config.num_layers)):
        sizes.add_ffn_post_norm()
    match config.residual:
        case SinkhornResidual(num_streams=streams) as residual:
            sizes.add_residual(streams, residual.num_weights)
        case GatedResidual(num_streams=streams, rank=rank):
            sizes.add_residual(streams, streams, rank)
        case BankResidual(num_streams=streams):
            sizes.add_residual(streams, streams)
    for i, layer in enumerate(config.layers):
        add_mixer_sizes(sizes, layer.mixer)
        if layer.ngrams is not None:
            sizes.add_ngrams(layer.ngrams.width, config.num_streams)
        if layer.is_moe:
            sizes.add_routed(
                config.num_experts,
                config.chosen_in(i),
                config.expert_width_in(i),
                config.shared_width,
                config.has_expert_norms or config.router.weighs_input,
                config.expert_latent,
            )
        elif layer.has_network:
            sizes.add_dense(config.dense_width)
    return sizes


def describe_activation(activation: ActivationConfig) -> _native.Activation:
    """Describe the activation between the products of a feed-forward network."""
    return activation.kind, activation.limit, activation.alpha


def _own_activation(activation: ActivationConfig | None) -> _native.Activation | None:
    return None if activation is None else describe_activation(activation)


def describe_experts(config: ModelConfig, weights: DenseWeights) -> Arithmetic:
    """Describe the arithmetic of the routed experts; it uses the memory of `weights`."""
    vectors = weights.vectors

    def bias(layer: int, part: str) -> Vector | None:
        flat = vectors.get(f"layers.{layer}.expert_{part}_bias")
        return None if flat is None else flat.reshape(config.num_experts, -1)

    return Arithmetic(
        describe_activation(config.activation),
        {layer: (bias(layer, "gate"), bias(layer, "up"), bias(layer, "down")) for layer in config.moe_layers},
        {layer: _own_activation(config.layers[layer].activation) for layer in config.moe_layers},
    )


def _ffn(config: ModelConfig, number: int, weights: DenseWeights) -> _native.Ffn | None:
    """SwiGLU (arXiv:2002.05202), or another activation between its products; or routed experts."""
    layer = config.layers[number]
    if layer.is_moe:
        return _routed_ffn(config, number, weights)
    if not layer.has_network:
        return None
    return _native.dense_ffn(
        *_network(f"layers.{number}.", weights), activation=_own_activation(layer.activation)
    )


def _network(
    prefix: str, weights: DenseWeights
) -> tuple[_native.Matrix | None, _native.Matrix, _native.Matrix]:
    """Return gate, up and down of a network that every token runs through."""
    matrices = weights.matrices
    return matrices.get(prefix + "gate"), matrices[prefix + "up"], matrices[prefix + "down"]


def _ffn_scale(config: ModelConfig, layer: int) -> float:
    """Return the factor of what a layer's networks add together."""
    is_averaged = config.shared_is_averaged and config.layers[layer].is_moe
    return config.residual_scale * (0.5 if is_averaged else 1.0)


def _routed_ffn(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Ffn:
    """Routed experts, and a shared expert if the family has one."""
    name = f"layers.{layer}."
    router_norm = None
    if config.router.has_norm:
        router_norm = weights.vectors[name + "router_norm"] * np.float32(config.hidden_size**-0.5)
    return _native.routed_ffn(
        weights.matrices[name + "router"],
        routing(config, layer, weights),
        router_bias=weights.vectors.get(name + "router_bias"),
        width=config.expert_width_in(layer),
        shared=_network(name + "shared_", weights) if config.shared_width else None,
        shared_score=weights.matrices[name + "shared_score"] if config.shared_is_gated else None,
        router_norm=router_norm,
        norm=weights.vectors.get(name + "expert_norm"),
        post_norm=weights.vectors.get(name + "expert_post_norm"),
        shared_post_norm=weights.vectors.get(name + "shared_post_norm"),
        shared_activation=_own_activation(config.layers[layer].shared_activation),
        latent=(
            (weights.matrices[name + "latent_down"], weights.matrices[name + "latent_up"])
            if config.expert_latent
            else None
        ),
        latent_norm=weights.vectors.get(name + "latent_norm"),
        router_logit_cap=config.router.logit_cap,
        weighs_input=config.router.weighs_input,
        token_experts=weights.matrices.get(name + "token_experts"),
    )


def routing(config: ModelConfig, layer: int, weights: DenseWeights) -> _native.Routing:
    """Describe how a layer chooses experts from its router's product and bias."""
    router = config.router
    return _native.Routing(
        config.chosen_in(layer),
        score=router.score,
        choice_bias=weights.vectors.get(f"layers.{layer}.choice_bias"),
        num_groups=router.num_groups,
        kept_groups=router.kept_groups,
        group_score=router.group_score,
        renormalize=router.renormalize,
        renormalize_eps=router.renormalize_eps,
        renormalize_least=router.renormalize_least,
        scale=router.scale,
        expert_scale=weights.vectors.get(f"layers.{layer}.expert_scale"),
        media_bias=weights.vectors.get(f"layers.{layer}.media_bias"),
    )
