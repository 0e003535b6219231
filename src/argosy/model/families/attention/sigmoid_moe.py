"""Code shared by families with grouped-query attention and the router of DeepSeek-V3 (arXiv:2412.19437).

    glm4_moe, solar_open, dots1, hy_v3, afmoe  ->  read_sigmoid_model  ->  ModelConfig
                                               ->  open_sigmoid_gguf   ->  ModelFiles

Dense layers come first; the others add shared experts to the routed ones. The families differ in defaults, in norms of
q and k, and in the names of keys and tensors, so a family file gives just these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.model.families.windows.windowed import layers_of
from argosy.model.reading.common_config import MoeDefaults, read_common
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.experts_config import (
    ReadRouter,
    read_dense_layers,
    read_grouped_router,
    read_mtp_layers,
    require_groups,
)
from argosy.model.reading.gguf_config import SIGMOID, GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout
from argosy.model.reading.rope_config import Axes


def read_sigmoid_model(
    reader: ConfigReader,
    family: str,
    defaults: MoeDefaults,
    *,
    read_router: ReadRouter,
    read_moe_layers: Callable[[ConfigReader, int], Sequence[bool]],
    read_windows: Callable[[ConfigReader, int], Sequence[int]] | None = None,
    **attention: Any,
) -> ModelConfig:
    """Read the config of any of these families; the caller calls `finish()`.

    Args:
        read_moe_layers, read_windows: given the number of layers, tell whether each has routed experts, and how many
            positions it sees, 0 for all.
        attention: further arguments of `AttentionConfig`.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    common = read_common(reader, defaults)
    num_layers = reader.integer("num_hidden_layers", default=defaults.num_layers, most=MOST_LAYERS)
    is_moe = read_moe_layers(reader, num_layers)
    windows = [0] * num_layers if read_windows is None else read_windows(reader, num_layers)
    attentions = {
        window: AttentionConfig(**common.attention, sliding_window=window, **attention)
        for window in set(windows)
    }
    expert_width = reader.integer("moe_intermediate_size", default=defaults.expert_width)
    num_shared = reader.integer("n_shared_experts", "num_shared_experts", default=defaults.num_shared_experts)
    return ModelConfig(
        family=family,
        layers=layers_of(windows, is_moe, attentions),
        expert_width=expert_width,
        router=read_router(reader, common.model["num_experts"], common.model["experts_per_token"]),
        dense_width=reader.integer("intermediate_size", default=defaults.dense_width),
        shared_width=num_shared * expert_width,
        num_mtp_layers=read_mtp_layers(reader, defaults.num_mtp_layers),
        **common.model,
    )


def open_sigmoid_gguf(
    file: GgufFile,
    architecture: str,
    family: str,
    *,
    names: Mapping[str, str] = {},
    axes: Axes | None = None,
    complete: Callable[[GgufConfigReader, ModelConfig], ModelConfig] = lambda _, config: config,
) -> ModelFiles:
    """Open a GGUF file; its tensors show whether q and k have norms and biases, and routers a bias for the choice.

    Args:
        names: the architecture's unusual names below `blk.{layer}.`.
        axes: as for `GgufConfigReader.common`.
        complete: reads what only this family has.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """

    def has(layer: int, canonical: str) -> bool:
        return dense_name(f"layers.{layer}.{canonical}", names) in file.tensors

    reader = GgufConfigReader(file, architecture)
    common = reader.common(has_partial_rope=True, axes=axes)
    num_layers = reader.num_layers()
    num_dense = next((layer for layer in range(num_layers) if has(layer, "router")), 0)
    if reader.has("leading_dense_block_count"):
        num_dense = read_dense_layers(reader, num_layers)
    reader.neutral("expert_gating_func", 0, SIGMOID)
    router = read_grouped_router(reader, is_sigmoid=True, has_choice_bias=has(num_dense, "choice_bias"))
    expert_width = reader.integer("expert_feed_forward_length")
    num_shared = reader.integer("expert_shared_count", 0, least=0)
    shared_width = reader.integer("expert_shared_feed_forward_length", num_shared * expert_width, least=0)
    if num_shared and num_shared * expert_width != shared_width:
        raise reader.unsupported(
            "expert_shared_count",
            num_shared,
            f"{shared_width / expert_width:g}, as expert_shared_feed_forward_length is {shared_width}",
        )
    attention = AttentionConfig(
        **common.attention,
        has_qkv_bias=has(0, "q_bias"),
        has_o_bias=has(0, "o_bias"),
        qk_norm="head" if has(0, "q_norm") else "none",
    )
    config = ModelConfig(
        family=family,
        layers=tuple(LayerConfig(mixer=attention, is_moe=layer >= num_dense) for layer in range(num_layers)),
        expert_width=expert_width,
        router=require_groups(router, common.model["num_experts"], common.model["experts_per_token"]),
        dense_width=reader.integer("feed_forward_length", 1 if num_dense == 0 else None),
        shared_width=shared_width,
        num_mtp_layers=reader.num_mtp_layers(),
        **common.model,
    )
    config = complete(reader, config)
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False, names=names)
