"""MiMo-V2.5 and V2.5-Pro: MiMo-V2-Flash with q, k and v in one tensor, and towers for pictures and sounds.

Only the text model runs: the towers' tensors, and layers for multi-token prediction (`model.mtp.`), are ignored. The
hub repeats theta and the share of a head that rotates in `rope_parameters`. Its GGUF files are MiMo-V2-Flash's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from argosy.checkpoint.untrusted_file import quote
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families.windows import mimo_v2_flash
from argosy.model.families.windows.mimo_v2_flash import GGUF_ARCHITECTURE, open_gguf
from argosy.model.families.windows.mimo_v2_rows import take_rows
from argosy.model.reading.common_config import VISION_KEYS
from argosy.model.reading.config_reader import ConfigReader

__all__ = ["GGUF_ARCHITECTURE", "LAYOUTS", "MODEL_TYPE", "open_gguf", "parse_config"]

MODEL_TYPE = "mimo_v2"

LAYOUTS = tuple(
    replace(
        layout,
        passed_over=r"model\.mtp\..*|(visual|audio_encoder|speech_embeddings)\..*",
        take_own=take_rows,
    )
    for layout in mimo_v2_flash.LAYOUTS
)

# Keys of the towers, of layers for multi-token prediction, and of the precision in which the makers' router runs.
_OF_TOWERS = (
    *VISION_KEYS, "audio_config", "processor_config", "num_nextn_predict_layers", "moe_router_dtype",
    *(f"{of}_{at}token_id" for of in ("audio", "image", "video") for at in ("", "start_", "end_")),
)  # fmt: skip
_REPEATED = ("rope_theta", "partial_rotary_factor")


def parse_config(raw: Mapping[str, object]) -> ModelConfig:
    """Read a `config.json`; an absent key gets the default of MiMo-V2-Flash.

    Raises:
        UnsupportedModel: a key or value asks for something that is not supported.
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    reader = ConfigReader(raw, MODEL_TYPE)
    reader.one_of(layout := "attention_projection_layout", "split", ("split", "fused_qkv"))
    if raw.get(scale := "attention_value_scale") is None:  # transformers' default is that of MiMo-V2-Flash
        raise CheckpointError(f"config.json does not give {scale}; expected the factor of values", key=scale)
    text = {key: value for key, value in _without_repeated(raw).items() if key not in (*_OF_TOWERS, layout)}
    return replace(mimo_v2_flash.parse_config(text), family=MODEL_TYPE)


def _without_repeated(raw: Mapping[str, object]) -> Mapping[str, object]:
    """Return the config without `rope_parameters` that only repeat other keys."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or not rope.keys() <= {"rope_type", "type", *_REPEATED}:
        return raw
    expected = {"rope_type": "default", "type": "default"} | {
        key: raw.get(key, rope.get(key)) for key in _REPEATED
    }
    for key, value in rope.items():
        if value != expected[key]:
            raise UnsupportedModel(
                f"config.json: rope_parameters gives {key} {quote(value)}; supported: {quote(expected[key])}",
                key=key,
                value=value,
                supported=expected[key],
            )
    rest = {key: value for key, value in raw.items() if key != "rope_parameters"}
    return {key: rope[key] for key in _REPEATED if key in rope} | rest
