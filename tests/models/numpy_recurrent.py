"""Short convolutions in numpy and float64, and LFM2-MoE's tensors under the names of other families."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from tests.models.safetensors_file import Array
from tests.models.tiny_recurrent import RawConfig

_RESPELT = {
    r"operator_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
    r"embedding_norm": "norm",
    r"self_attn\.out_proj": "self_attn.o_proj",
    r"self_attn\.([qk])_layernorm": r"self_attn.\1_norm",
    r"feed_forward\.": "mlp.",
    r"\.w1\.": ".gate_proj.",
    r"\.w3\.": ".up_proj.",
    r"\.w2\.": ".down_proj.",
}


def respelt(name: str) -> str:
    """Return the name that most families give to this tensor of LFM2-MoE."""
    for pattern, replacement in _RESPELT.items():
        name = re.sub(pattern, replacement, name)
    return name


def short_conv(tensors: Mapping[str, Array], prefix: str, x: Array) -> Array:
    """Return what the layer adds for the normed input x [tokens, hidden]; its tensors' names start with `prefix`."""

    def linear(name: str, x: Array) -> Array:
        return x @ tensors[f"{prefix}{name}.weight"].T + tensors.get(f"{prefix}{name}.bias", 0)

    b, c, gated = np.split(linear("in_proj", x), 3, axis=1)
    filters = tensors[prefix + "conv.weight"][:, 0]
    return linear("out_proj", c * (convolve(b * gated, filters) + tensors.get(prefix + "conv.bias", 0)))


def convolve(x: Array, filters: Array) -> Array:
    """Return the causal convolution of x [tokens, channels] with filters [channels, width]."""
    width = filters.shape[1]
    padded = np.vstack([np.zeros((width - 1, x.shape[1])), x])
    return np.stack([(filters.T * padded[t : t + width]).sum(axis=0) for t in range(len(x))])


def with_common_keys(config: RawConfig) -> RawConfig:
    """Return LFM2-MoE's config with the keys of other families added."""
    is_tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    return config | {"rms_norm_eps": config["norm_eps"], "tie_word_embeddings": is_tied}
