"""Qwen3.8-Flash-Next in numpy and float64: gated residual streams, and rows of an n-gram table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.models.numpy_delta import delta_net, silu
from tests.models.safetensors_file import Array
from tests.models.tiny_qwen4 import RawConfig, table_multipliers, table_primes

if TYPE_CHECKING:
    from tests.models.numpy_model import NumpyModel, Places


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def logits(
    model: NumpyModel, token_ids: list[int], places: Places, media: tuple[Array, Array] | None
) -> Array:
    """Return logits, float64 [tokens, vocab]. media: rows, and the vectors that replace their embeddings."""
    config, tensors = model.config, model.tensors
    count, kinds = config["hc_count"], config["layer_types"]
    hidden = tensors["model.embed_tokens.weight"][token_ids]
    if media is not None:
        hidden[media[0]] = media[1]
    streams = np.repeat(hidden[:, None], count, axis=1)
    for layer, kind in enumerate(kinds):
        prefix = f"model.layers.{layer}."
        if layer + 1 in config["ple_layer_ids"]:
            table = config["ple_layer_ids"].index(layer + 1)
            streams = streams + ngrams(model, prefix + "ple.", token_ids, table, streams)
        read, into = mix(model, prefix + "attn_hyper_connection.", streams)
        if kind == "linear_attention":
            out = delta_net(config, tensors, prefix + "linear_attn.", read)
        else:
            out = model.attention(layer, read, places)
        streams = streams + into[..., None] * out[:, None]
        read, into = mix(model, prefix + "mlp_hyper_connection.", streams)
        streams = streams + into[..., None] * model.feed_forward(layer, read)[:, None]
        model.hidden_states.append(streams.mean(axis=1))
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    found: Array = mix(model, "model.hyper_connection_mixer.", streams)[0] @ tensors[head].T
    return found


def norm(model: NumpyModel, name: str, streams: Array) -> Array:
    """Norm each stream; weights are zero-centred."""
    weight = 1 + model.tensors[name + ".weight"].reshape(streams.shape[1:])
    scale = np.sqrt((streams**2).mean(axis=2, keepdims=True) + model.config["rms_norm_eps"])
    return weight * streams / scale


def mix(model: NumpyModel, name: str, streams: Array) -> tuple[Array, Array]:
    """Return what a part reads, and the weights with which each stream takes what it gives."""
    normed, count = norm(model, name + "hc_norm", streams), streams.shape[1]
    flat = normed.reshape(len(streams), -1)
    low = silu(flat @ model.tensors[name + "input_mix_weight_down.weight"].T / count)
    gates = sigmoid(low @ model.tensors[name + "input_mix_weight_up.weight"].T).reshape(streams.shape)
    inject = model.tensors.get(name + "block_inject_weight.weight")
    into = np.zeros(0) if inject is None else 2 * sigmoid(flat @ inject.T / count)
    return (gates * normed).mean(axis=1), into


def ngrams(model: NumpyModel, name: str, token_ids: list[int], table: int, streams: Array) -> Array:
    """Return what rows of the n-gram table add."""
    config, tensors, shape = model.config, model.tensors, streams.shape
    parts = range(config["split_ngram_parts"])
    rows = np.concatenate([tensors[f"{name}ple_embedding.ngram_embedding.shard_{i}.weight"] for i in parts])
    x = rows[hashes(config, token_ids, table)].reshape(shape[0], -1)
    keys = norm(model, name + "norm_key", (x @ tensors[name + "key_proj.weight"].T).reshape(shape))
    dots = (keys * norm(model, name + "norm_query", streams)).sum(axis=2) / np.sqrt(shape[2])
    gates = sigmoid(np.sign(dots) * np.sqrt(np.maximum(np.abs(dots), 1e-6)))
    gated = gates[..., None] * (x @ tensors[name + "value_proj.weight"].T)[:, None]
    normed = norm(model, name + "norm_conv", gated)
    taps, mixed = tensors[name + "conv1d.weight"][:, 0].T, np.zeros_like(gated)
    for tap, weights in enumerate(taps):
        back = (len(taps) - 1 - tap) * config["ngram_size"]
        mixed[back:] += weights.reshape(shape[1:]) * normed[: max(0, shape[0] - back)]
    return gated + silu(mixed)


def hashes(config: RawConfig, token_ids: list[int], table: int) -> list[list[int]]:
    """Return the rows of each token."""
    size, per_length, end = config["ngram_size"], config["heads_per_ngram"], config["eos_token_id"]
    primes, multipliers = table_primes(config, table), table_multipliers(config, table)
    found = []
    for at, token in enumerate(token_ids):
        mixed, is_over, rows = token * multipliers[0], False, []
        for distance in range(1, size):
            is_over = is_over or at < distance or token_ids[at - distance] == end
            mixed ^= (end if is_over else token_ids[at - distance]) * multipliers[distance]
            heads = range((distance - 1) * per_length, distance * per_length)
            rows += [mixed % primes[head] + sum(primes[:head]) for head in heads]
        found.append(rows)
    return found
