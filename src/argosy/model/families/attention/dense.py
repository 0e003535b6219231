"""Code shared by families without experts: the names of their tensors, and how their configs are read.

A model without experts is in memory as a whole: nothing of it streams from the drive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.model.families.windows.windowed import layers_of
from argosy.model.reading.common_config import CommonDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.reading.gguf_layout import read_gguf_layout
from argosy.model.reading.layout import ATTENTION_NAMES, Layout

LAYER_NAMES = {
    **ATTENTION_NAMES,
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_LAYOUT = Layout(layer_names=LAYER_NAMES)
# Models that embed (Qwen3-Embedding) are stored without "model." and without a head, whatever tie_word_embeddings says.
LAYOUTS = (_LAYOUT, replace(_LAYOUT, prefix="", may_lack_head=True))


def read_dense_model(
    reader: ConfigReader,
    family: str,
    defaults: CommonDefaults,
    *,
    num_layers: int,
    dense_width: int,
    read_windows: Callable[[ConfigReader, int], Sequence[int]] | None = None,
    **attention: Any,
) -> ModelConfig:
    """Read a config of this kind; the caller calls `finish()`.

    Args:
        num_layers, dense_width: defaults of absent keys.
        read_windows: given the number of layers, reads the sliding window of each, 0 for full attention; None: the
            family has no windows.
        attention: more arguments of `AttentionConfig`.
    """
    num_layers = reader.integer("num_hidden_layers", default=num_layers, most=MOST_LAYERS)
    common = read_common(reader, defaults)
    windows = [0] * num_layers if read_windows is None else read_windows(reader, num_layers)
    return ModelConfig(
        family=family,
        layers=make_layers(windows, **common.attention, **attention),
        dense_width=reader.integer("intermediate_size", default=dense_width),
        **common.model,
    )


def make_layers(windows: Sequence[int], **attention: Any) -> tuple[LayerConfig, ...]:
    """Return a layer for each of `windows`; `attention` are the other arguments of `AttentionConfig`."""
    attentions = {window: AttentionConfig(sliding_window=window, **attention) for window in set(windows)}
    return layers_of(windows, [False] * len(windows), attentions)


def open_dense_gguf(file: GgufFile, architecture: str, family: str, **attention: Any) -> ModelFiles:
    """Open the model in a GGUF file of an architecture without experts; `attention` as in `read_dense_model`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, architecture)
    common = reader.common(has_experts=False)
    config = ModelConfig(
        family=family,
        layers=make_layers([0] * reader.num_layers(), **common.attention, **attention),
        dense_width=reader.integer("feed_forward_length"),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)
