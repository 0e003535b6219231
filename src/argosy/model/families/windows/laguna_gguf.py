"""What every Laguna computes, and its GGUF files; `laguna.py` describes the model and reads config.json.

Tensors show the kind of gate. The files do not say whether the router's logits are capped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import LayerConfig, ModelConfig, RopeConfig, RouterConfig
from argosy.errors import CheckpointError
from argosy.model.families.windows.windowed import (
    attentions_of,
    read_gguf_kinds,
    read_gguf_ropes,
)
from argosy.model.reading.experts_config import read_dense_layers
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout

MODEL_TYPE = "laguna"
GGUF_ARCHITECTURE = "laguna"


def make_config(
    kinds: Sequence[str],
    num_heads: Sequence[int],
    is_moe: Sequence[bool],
    ropes: Mapping[str, RopeConfig],
    attention: Mapping[str, Any],
    *,
    window: int,
    scale: float,
    logit_cap: float = 0.0,
    **sizes: Any,
) -> ModelConfig:
    """A model of this family.

    Args:
        kinds, num_heads, is_moe: those of each layer.
        ropes: the rotary embedding of each kind of layer.
        attention, sizes: more arguments of `AttentionConfig` and `ModelConfig`.
        scale, logit_cap: the router's.

    Raises:
        CheckpointError: there are not as many numbers of heads as layers, or KV heads do not divide one.
    """
    num_kv_heads = attention["num_kv_heads"]
    if len(num_heads) != len(kinds) or any(heads % num_kv_heads for heads in num_heads):
        raise CheckpointError(
            f"the model gives {len(num_heads)} numbers of heads (num_attention_heads_per_layer, or "
            f"attention.head_count), {sorted(set(num_heads))}; expected one for each of {len(kinds)} layers, multiples "
            f"of {num_kv_heads} KV heads",
            key="num_attention_heads_per_layer",
        )
    mixers = {
        heads: attentions_of(
            ropes, window, num_heads=heads, qk_norm="head", gate_activation="softplus", **attention
        )
        for heads in set(num_heads)
    }
    return ModelConfig(
        family=MODEL_TYPE,
        layers=tuple(
            LayerConfig(mixer=mixers[heads][kind], is_moe=moe)
            for heads, kind, moe in zip(num_heads, kinds, is_moe, strict=True)
        ),
        router=RouterConfig(score="sigmoid", has_choice_bias=True, scale=scale, logit_cap=logit_cap),
        **sizes,
    )


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `laguna`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    reader.neutral("nextn_predict_layers", 0)
    sizes, num_layers = reader.sizes(), reader.num_layers()
    num_heads = reader.integers("attention.head_count", num_layers)
    head_dim = reader.integer("attention.key_length", sizes["hidden_size"] // num_heads[0])
    reader.neutral("attention.value_length", head_dim)
    gate = file.tensors.get(dense_name("layers.0.attn_gate"))
    is_of_heads = gate is None or gate.shape[:1] == (num_heads[0],)
    num_dense, expert_width = (
        read_dense_layers(reader, num_layers),
        reader.integer("expert_feed_forward_length"),
    )
    reader.neutral("expert_gating_func", 0, SIGMOID)
    reader.neutral("expert_weights_norm", True)
    reader.neutral("expert_shared_count", 1)
    config = make_config(
        read_gguf_kinds(reader, is_full_first=True),
        num_heads,
        [layer >= num_dense for layer in range(num_layers)],
        read_gguf_ropes(reader, head_dim, sizes["context_tokens"]),
        {
            "num_kv_heads": reader.integer("attention.head_count_kv", num_heads[0]),
            "head_dim": head_dim,
            "output_gate": "heads" if is_of_heads else "elements",
        },
        window=reader.integer("attention.sliding_window", 0, least=0),
        scale=reader.number("expert_weights_scale", 1.0),
        expert_width=expert_width,
        shared_width=reader.integer("expert_shared_feed_forward_length", expert_width),
        dense_width=reader.integer("feed_forward_length"),
        **sizes,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)
