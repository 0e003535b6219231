"""Qwen3 (arXiv:2505.09388) without experts; Qwen3-Embedding, Qwen3-Reranker and Qwen3Guard-Gen are models of this
family.

Each head of q and k is normed before rotation. `attention_bias` adds a bias to q, k, v and o. With
`use_sliding_window`, layers from `max_window_layers` on have a window, or those for which `layer_types` says so.

In a reranker's GGUF, llama.cpp's converter keeps the head's rows of yes and no in a tensor of their own. If the head is
the embedding table, as in Qwen3-Reranker-0.6B and 4B, they are copies, and the model is complete without them. Of a
head of its own (8B), nothing else is left; such a file is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufArray, GgufFile
from argosy.checkpoint.landing import read_values
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import ModelConfig
from argosy.errors import UnsupportedModel
from argosy.model.families.attention.dense import LAYOUTS, open_dense_gguf, read_dense_model
from argosy.model.families.windows.windowed import read_windows_behind
from argosy.model.reading.common_config import CommonDefaults
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "qwen3"
GGUF_ARCHITECTURE = "qwen3"

_LABELS, _TOKENS = "qwen3.classifier.output_labels", "tokenizer.ggml.tokens"
# Cosine of a row and its copy in other blocks: rows of different tokens are nearly orthogonal.
_LEAST_LIKENESS = 0.9

_DEFAULTS = CommonDefaults(
    vocab_size=151_936,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    context_tokens=32_768,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `Qwen3Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    has_bias = reader.flag("attention_bias", False)
    config = read_dense_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        num_layers=32,
        dense_width=22_016,
        read_windows=read_windows,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        qk_norm="head",
    )
    reader.finish()
    return config


def read_windows(reader: ConfigReader, num_layers: int) -> Sequence[int]:
    """Read the window of each layer, 0 if it has none; see above."""
    window = reader.optional_integer("sliding_window", default=4096) or 0
    if not reader.flag("use_sliding_window", False):
        window = 0
    first = reader.integer("max_window_layers", default=28, least=0)
    missing = "layer_types", "full_attention, because the other keys turn windows off"
    return read_windows_behind(reader, num_layers, window, first, missing)


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `qwen3`: no layer has a window. Raises what `open_dense_gguf` raises."""
    if (head := file.tensors.get("cls.output.weight")) is not None:
        if not _is_in_embedding(head, file):
            raise UnsupportedModel(
                f"{file.path.name} has only the rows of its head that score documents, in {head.name}; supported: "
                "files with the whole head, or whose head is the embedding table",
                hint="get the reranker as safetensors, or a GGUF made without that conversion",
                path=file.path,
                tensor=head.name,
            )
        file = replace(
            file,
            tensors={name: ref for name, ref in file.tensors.items() if ref is not head},
            metadata={key: value for key, value in file.metadata.items() if key != _LABELS},
        )
    return open_dense_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, qk_norm="head")


def _is_in_embedding(head: TensorRef, file: GgufFile) -> bool:
    """Whether the rows of a head are those of its two labels, which are tokens, in the embedding table."""
    embed = file.tensors.get("token_embd.weight")
    lists = [file.texts(key) for key in (_LABELS, _TOKENS) if isinstance(file.metadata.get(key), GgufArray)]
    if embed is None or len(lists) < 2 or head.shape != (2, *embed.shape[1:]) or len(lists[0]) != 2:
        return False
    labels, tokens = lists
    if not set(labels) <= set(tokens[: embed.shape[0]]):
        return False
    copies = (read_values(embed.rows(tokens.index(label), 1))[0] for label in labels)
    return all(
        one @ other > _LEAST_LIKENESS * np.linalg.norm(one) * np.linalg.norm(other)
        for one, other in zip(read_values(head), copies, strict=True)
    )
