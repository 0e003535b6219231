"""The configs of `deep_encoder.py`, in transformers' form and in DeepSeek's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from argosy.config import ModelConfig
from argosy.errors import CheckpointError
from argosy.model.encoders.grid import read_theta
from argosy.model.encoders.sam_vision import SamConfig
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader

_TILE, _WHOLE = 640, 1024  # sides in pixels, of DeepSeek-OCR
QUERIES = {"tile": 12, "whole": 16}  # on a side
_CLIP_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondConfig:
    """Sizes of the second encoder.

    position_side: rows on a side of the square whose positions CLIP learned.
    num_kv_heads, theta: of Qwen2.
    """

    kind: Literal["clip", "qwen2"]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    norm_eps: float
    position_side: int = 0
    theta: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepEncoderConfig:
    """Sizes of the tower; `tile_side` and `whole_side` are in patches."""

    sam: SamConfig
    second: SecondConfig
    out_size: int
    tile_side: int
    whole_side: int
    merge: int = 4

    @property
    def num_layers(self) -> int:
        return self.sam.num_layers

    @property
    def hidden_size(self) -> int:
        return self.sam.hidden_size

    @property
    def patch_size(self) -> int:
        return self.sam.patch_size

    @property
    def patch_values(self) -> int:
        return self.sam.patch_values

    @property
    def position_side(self) -> int:
        return self.whole_side

    @property
    def window_side(self) -> int:
        return self.tile_side

    @property
    def row_ends(self) -> int:
        """Learned rows at the end of a line of tokens."""
        return int(self.second.kind == "clip")


def read_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> DeepEncoderConfig:
    """Read `vision_config` of `DeepseekOcr2Config` in transformers 5.24.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    sam, own = _inner(reader, "sam_config"), _inner(reader, "encoder_config")
    sam.neutral("num_channels", 3)
    sam.one_of("hidden_act", "gelu", ("gelu",))
    sam.neutral("use_abs_pos", True)
    sam.neutral("use_rel_pos", True)
    sam.passed("scale")
    size = sam.integer("hidden_size", default=768)
    patch_size = sam.integer("patch_size", default=16, most=256)
    channels = sam.integers("downsample_channels", least=1, most=1 << 20) or (512, 896)
    layers = sam.integer("num_hidden_layers", default=12, most=MOST_LAYERS)
    given = sam.integers("global_attn_indexes", least=0, most=MOST_LAYERS)
    ratio = sam.number("mlp_ratio", 4.0)
    config = SamConfig(
        num_layers=layers,
        hidden_size=size,
        num_heads=sam.integer("num_attention_heads", default=12),
        mlp_width=sam.optional_integer("mlp_dim") or int(size * ratio),
        patch_size=patch_size,
        position_side=sam.integer("image_size", default=1024) // patch_size,
        window=sam.integer("window_size", default=14, most=1024),
        global_layers=frozenset(given if sam.has("global_attn_indexes") else (2, 5, 8, 11)),
        neck_width=sam.integer("output_channels", default=256),
        channels=(channels[0], channels[-1]),
        has_qkv_bias=sam.flag("qkv_bias", True),
        norm_eps=sam.number("layer_norm_eps", 1e-6),
    )
    if len(channels) != 2:
        raise sam.unsupported("downsample_channels", "two numbers")
    own.one_of("hidden_act", "silu", ("silu",))
    own.neutral("use_sliding_window", False)
    own.passed(
        "bos_token_id", "eos_token_id", "max_position_embeddings", "max_window_layers", "sliding_window"
    )
    own.passed("tie_word_embeddings", "vocab_size")
    heads = own.integer("num_attention_heads", default=32)
    second = SecondConfig(
        kind="qwen2",
        num_layers=own.integer("num_hidden_layers", default=32, most=MOST_LAYERS),
        hidden_size=own.integer("hidden_size", default=4096),
        num_heads=heads,
        num_kv_heads=own.optional_integer("num_key_value_heads", default=32) or heads,
        mlp_width=own.integer("intermediate_size", default=22_016),
        norm_eps=own.number("rms_norm_eps", 1e-6),
        theta=own.number("rope_theta", read_theta(own)),
    )
    if set(own.texts("layer_types") or ()) - {"full_attention"}:
        raise own.unsupported("layer_types", "full_attention")
    for one in (sam, own, reader):
        one.finish()
    return _checked(config, second, model, reader)


def read_hub_config(reader: ConfigReader, wrapper: ConfigReader, model: ModelConfig) -> DeepEncoderConfig:
    """Read `vision_config` of DeepSeek's own form.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.neutral("image_size", _WHOLE)
    reader.passed("mlp_ratio", "model_name")  # its code does not read them
    widths = _inner(reader, "width")
    sam = _inner(widths, "sam_vit_b")
    projector = _inner(wrapper, "projector_config")
    projector.neutral("projector_type", "linear")
    projector.neutral("n_embed", model.hidden_size)
    size = sam.integer("width", default=768)
    channels = sam.integers("downsample_channels", least=1, most=1 << 20) or (512, 1024)
    if widths.has("qwen2-0-5b"):
        own = _inner(widths, "qwen2-0-5b")
        second = SecondConfig(
            kind="qwen2",
            num_layers=24,
            hidden_size=own.integer("dim", default=896),
            num_heads=14,
            num_kv_heads=2,
            mlp_width=4864,
            norm_eps=1e-6,
            theta=1e6,
        )
        channels = (channels[0], second.hidden_size)  # the files have CLIP's number
        input_dim = second.hidden_size
    elif widths.has("clip-l-14-224"):
        own = _inner(widths, "clip-l-14-224")
        hidden, heads = own.integer("width", default=1024), own.integer("heads", default=16)
        second = SecondConfig(
            kind="clip",
            num_layers=own.integer("layers", default=24, most=MOST_LAYERS),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            mlp_width=4 * hidden,
            norm_eps=_CLIP_EPS,
            position_side=own.integer("image_size", default=224, most=1 << 16)
            // own.integer("patch_size", default=14, most=256),
        )
        input_dim = hidden + channels[-1]
    else:
        raise reader.unsupported("width", "sam_vit_b with clip-l-14-224 or qwen2-0-5b")
    projector.neutral("input_dim", input_dim)
    config = SamConfig(
        num_layers=sam.integer("layers", default=12, most=MOST_LAYERS),
        hidden_size=size,
        num_heads=sam.integer("heads", default=12),
        mlp_width=4 * size,
        patch_size=16,
        position_side=_WHOLE // 16,
        window=14,
        global_layers=frozenset(sam.integers("global_attn_indexes", least=0, most=MOST_LAYERS)),
        neck_width=256,
        channels=(channels[0], channels[-1]),
        has_qkv_bias=True,
        norm_eps=1e-6,
    )
    for one in (sam, own, widths, projector, reader):
        one.finish()
    return _checked(config, second, model, reader)


def _inner(reader: ConfigReader, key: str) -> ConfigReader:
    raw = reader.mapping(key) or {}
    return ConfigReader(
        {name: value for name, value in raw.items() if name != "model_type"}, "this tower", within=key
    )


def _checked(
    sam: SamConfig, second: SecondConfig, model: ModelConfig, reader: ConfigReader
) -> DeepEncoderConfig:
    """Raises:
    CheckpointError: sizes contradict each other.
    """
    for name, one in (("SAM", sam), ("the second encoder", second)):
        if one.hidden_size % one.num_heads:
            raise CheckpointError(
                f"{reader.where}: {name} has {one.num_heads} heads, expected a divisor of {one.hidden_size}, its size"
            )
    if sam.channels[1] != second.hidden_size:
        raise CheckpointError(
            f"{reader.where}: SAM makes rows of {sam.channels[1]} values (downsample_channels), and the second encoder "
            f"takes {second.hidden_size}",
            key="downsample_channels",
        )
    if second.num_heads % second.num_kv_heads or (second.kind == "qwen2" and second.head_dim % 2):
        raise CheckpointError(
            f"{reader.where}: the second encoder has {second.num_heads} heads of {second.head_dim}, expected an even "
            f"size and a multiple of its {second.num_kv_heads} heads of keys"
        )
    if not sam.position_side or (second.kind == "clip" and not second.position_side):
        raise CheckpointError(f"{reader.where}: image_size is below patch_size", key="image_size")
    is_clip = second.kind == "clip"
    return DeepEncoderConfig(
        sam=sam,
        second=second,
        out_size=model.hidden_size,
        tile_side=_TILE // sam.patch_size if is_clip else 4 * QUERIES["tile"],
        whole_side=_WHOLE // sam.patch_size if is_clip else 4 * QUERIES["whole"],
    )
