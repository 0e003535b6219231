"""Nemotron-3 Puzzle (Nemotron-Labs-3-Puzzle-75B-A9B): Nemotron-3 Super in which layers differ in how many experts a
token chooses and how wide they are.

`block_configs` has an object for each layer, with its kind and those two numbers, and alone says what the layers are,
as in NVIDIA's code and llama.cpp's converter: `layers_block_type` and `hybrid_override_pattern` repeat it. It may also
hold sizes that are the same in every layer; NVIDIA's code then drops them outside. In GGUF it is a `nemotron_h_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families.recurrent import nemotron_h
from argosy.model.families.recurrent.nemotron_h import GGUF_ARCHITECTURE, LAYOUTS, open_gguf
from argosy.model.families.recurrent.nemotron_h_gguf import with_experts_of
from argosy.model.reading.config_reader import MOST_EXPERTS, ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "nemotron_h_puzzle"

_CHOSEN, _WIDTH = "num_experts_per_tok", "moe_intermediate_size"
# For each kind of layer, the keys that must have the same value in all layers.
_SAME: Mapping[str, tuple[str, ...]] = {
    "mamba": ("ssm_state_size",),
    "attention": ("sliding_window",),
    "mlp": ("intermediate_size",),
    "moe": (
        "n_routed_experts", "moe_latent_size", "moe_shared_expert_intermediate_size", "routed_scaling_factor",
        "n_group", "topk_group", "norm_topk_prob",
    ),
}  # fmt: skip
# `blockwise_members` lists the keys in `block_configs`.
_REPEATED = (
    "block_configs", "blockwise_members", "mtp_block_configs", "layers_block_type", "hybrid_override_pattern",
)  # fmt: skip


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; keys outside of `block_configs` are those of `nemotron_h`.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    blocks = raw.get("block_configs")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        raise CheckpointError(
            "config.json: expected block_configs with an object for each layer", key="block_configs"
        )
    kinds, chosen, widths = [], [], []
    own: dict[str, dict[int, object]] = {}  # values by key and layer
    for number, block in enumerate(blocks):
        reader = ConfigReader(block, MODEL_TYPE, within=f"block_configs[{number}]")
        kind = reader.one_of("block_type", "", tuple(_SAME))
        is_moe = kind == "moe"
        kinds.append(kind)
        chosen.append(reader.integer(_CHOSEN, default=None, most=MOST_EXPERTS) if is_moe else 0)
        widths.append(reader.integer(_WIDTH, default=None) if is_moe else 0)
        reader.passed(*_SAME[kind])
        reader.finish()
        for key in _SAME[kind]:
            value = block.get(key)
            own.setdefault(key, {})[number] = raw.get(key) if value is None else value
    outside = {key: value for key, value in raw.items() if key not in _REPEATED}
    for key, values in own.items():
        outside.pop(key, None)
        first, *others = dict.fromkeys(map(repr, values.values()))
        if others:
            raise UnsupportedModel(
                f"config.json: block_configs gives {key} as {first} and {others[0]}; supported: layers of one kind "
                f"differ only in {_CHOSEN} and {_WIDTH}",
                key="block_configs",
            )
        if (value := next(iter(values.values()))) is not None:
            outside[key] = value
    if outside.get("num_hidden_layers") is None:
        outside["num_hidden_layers"] = len(blocks)
    merged = {**outside, "model_type": nemotron_h.MODEL_TYPE, "layers_block_type": kinds}
    if "moe" in kinds:
        merged |= {_CHOSEN: max(chosen), _WIDTH: max(widths)}
    config = replace(nemotron_h.parse_config(merged), family=MODEL_TYPE)
    return with_experts_of(config, chosen, widths) if "moe" in kinds else config
