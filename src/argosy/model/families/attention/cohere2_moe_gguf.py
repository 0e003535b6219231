"""Command-A-plus and North-Mini-Code in a GGUF file; `cohere2_moe.py` says what the models compute.

As in llama.cpp, an absent function of the router means sigmoids, dense layers rotate, and the sums of routed and shared
experts are averaged. Weights by softmax always sum to one, as in the model's other files, also where llama.cpp reads in
`expert_weights_norm` that they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import AttentionConfig, LayerConfig, ModelConfig
from argosy.model.families.windows.windowed import SLIDING, read_gguf_kinds
from argosy.model.reading.experts_config import read_dense_layers, read_grouped_router
from argosy.model.reading.gguf_config import SIGMOID, SOFTMAX, GgufConfigReader
from argosy.model.reading.gguf_layout import dense_name, read_gguf_layout

GGUF_ARCHITECTURE = "cohere2moe"


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `cohere2moe`.

    Raises:
        UnsupportedModel: a key, value or tensor type that is not supported.
        CheckpointError: a key or tensor is missing, malformed, or contradicts another.
    """
    reader = GgufConfigReader(file, GGUF_ARCHITECTURE)
    eps = "attention.layer_norm_rms_epsilon"
    is_rms = reader.is_set(eps)  # files with RMSNorm have the other epsilon, too
    reader.key("attention.layer_norm_epsilon")
    common = reader.common(norm_eps=eps if is_rms else "attention.layer_norm_epsilon")
    kinds, num_layers = read_gguf_kinds(reader, is_full_first=True), reader.num_layers()
    num_dense = read_dense_layers(reader, num_layers)
    if (function := reader.integer("expert_gating_func", SIGMOID, least=0)) not in (0, SOFTMAX, SIGMOID):
        raise reader.unsupported("expert_gating_func", function, "1 (softmax), 2 (sigmoid)")
    attention = AttentionConfig(
        **{**common.attention, "rope": replace(common.attention["rope"], is_interleaved=True)},
        sliding_window=reader.integer("attention.sliding_window", 0, least=0),
        has_qkv_bias=dense_name("layers.0.q_bias") in file.tensors,
        has_o_bias=dense_name("layers.0.o_bias") in file.tensors,
    )
    width, num_shared = (
        reader.integer("expert_feed_forward_length"),
        reader.integer("expert_shared_count", 0, least=0),
    )
    router = read_grouped_router(reader, is_sigmoid=function != SOFTMAX, has_choice_bias=False)
    router = replace(router, renormalize=router.renormalize or function == SOFTMAX, renormalize_eps=0.0)
    config = ModelConfig(
        family="cohere2_moe",
        layers=layers_of(
            kinds, [layer >= num_dense for layer in range(num_layers)], attention, dense_rotate=True
        ),
        expert_width=width,
        router=router,
        dense_width=reader.integer("feed_forward_length"),
        shared_width=reader.integer("expert_shared_feed_forward_length", num_shared * width, least=0),
        shared_is_averaged=num_shared > 0,
        norm_kind="rms" if is_rms else "layer",
        is_parallel=True,
        logit_scale=reader.number("logit_scale") or 1.0,
        num_mtp_layers=reader.num_mtp_layers(),
        **common.model,
    )
    reader.finish()
    return read_gguf_layout(file, config, is_paired=False, has_rope_freqs=False)


def layers_of(
    kinds: Sequence[str], is_moe: Sequence[bool], attention: AttentionConfig, *, dense_rotate: bool
) -> tuple[LayerConfig, ...]:
    """Return the layers of these kinds, of which `attention` is that of layers with a window."""
    rotating, plain = replace(attention, sliding_window=0), replace(attention, sliding_window=0, rope=None)
    full = {True: plain, False: rotating if dense_rotate else plain}
    return tuple(
        LayerConfig(mixer=attention if kind == SLIDING else full[moe], is_moe=moe)
        for kind, moe in zip(kinds, is_moe, strict=True)
    )
