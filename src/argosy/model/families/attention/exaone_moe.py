"""K-EXAONE (236B-A23B, LG): a rotary embedding only in layers with a window, and the router of DeepSeek-V3.

Three of four layers have the window. Heads of q and k are normed; the first layer is dense. The layer for multi-token
prediction (`mtp.`) is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile
from argosy.config import ModelConfig
from argosy.model.families.attention.sigmoid_moe import open_sigmoid_gguf, read_sigmoid_model
from argosy.model.families.latent import deepseek
from argosy.model.families.windows.windowed import FULL, SLIDING, read_gguf_kinds, with_rotating_windows
from argosy.model.reading.common_config import MoeDefaults
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.experts_config import layers_by_type, read_sigmoid_router
from argosy.model.reading.gguf_config import GgufConfigReader

MODEL_TYPE = "exaone_moe"
GGUF_ARCHITECTURE = "exaone-moe"
_PATTERN = "sliding_window_pattern"

_SEPARATE, _FUSED = (replace(layout, passed_over=r"mtp\..*") for layout in deepseek.LAYOUTS)
_NAMES = {**_SEPARATE.layer_names, "choice_bias": "mlp.e_score_correction_bias"}
LAYOUTS = (replace(_SEPARATE, layer_names=_NAMES), _FUSED)

_DEFAULTS = MoeDefaults(
    vocab_size=102_400,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    context_tokens=2048,
    dense_width=16_384,
    expert_width=1024,
    num_experts=64,
    experts_per_token=8,
    num_shared_experts=1,
    eos_id=53,
    bos_id=1,
)


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of `ExaoneMoeConfig` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    aliases = {"first_last_k_dense_replace": "first_k_dense_replace"}  # of the first release
    reader = ConfigReader(raw, MODEL_TYPE, aliases=aliases)
    config = read_sigmoid_model(
        reader,
        MODEL_TYPE,
        _DEFAULTS,
        read_router=read_sigmoid_router(2.5, 1, 1),
        read_moe_layers=layers_by_type(1),
        qk_norm="head",
    )
    reader.neutral("is_moe_layer", [layer.is_moe for layer in config.layers], None)
    kinds = _read_kinds(reader, raw.get(_PATTERN, 4), config.num_layers)
    config = with_rotating_windows(config, kinds, reader.integer("sliding_window", default=4096))
    reader.finish()
    return config


def open_gguf(file: GgufFile) -> ModelFiles:
    """Open a GGUF file of architecture `exaone-moe`. Raises what `open_sigmoid_gguf` raises."""

    def complete(reader: GgufConfigReader, config: ModelConfig) -> ModelConfig:
        kinds = read_gguf_kinds(reader)
        return with_rotating_windows(config, kinds, reader.integer("attention.sliding_window"))

    return open_sigmoid_gguf(file, GGUF_ARCHITECTURE, MODEL_TYPE, complete=complete)


def _read_kinds(reader: ConfigReader, pattern: object, num_layers: int) -> Sequence[str]:
    """Read `layer_types`, or else a pattern: each n-th layer sees all positions, or letters that say it by turns."""
    reader.passed(_PATTERN)
    if (kinds := reader.layer_types(num_layers)) is not None:
        return kinds
    if type(pattern) is int and pattern > 0:
        pattern = "L" * min(pattern - 1, num_layers) + "G"
    if not isinstance(pattern, str) or not pattern or not set(pattern) <= {"L", "G"}:
        raise reader.unsupported(_PATTERN, "a whole number from 1, or letters L and G, such as LLLG")
    return [SLIDING if pattern[layer % len(pattern)] == "L" else FULL for layer in range(num_layers)]
