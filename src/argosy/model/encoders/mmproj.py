"""Towers in files of llama.cpp's converter (`mmproj-*.gguf`): what such a file says, in the terms of `table.py`.

    GgufFile  ->  read_tower  ->  config, names of tensors, settings of the processor

A GGUF model has its tower in a file of its own, of architecture `clip`. Its `clip.projector_type` names the tower, and
the text model beside it the family. Weights keep their values; two are stored in another form: the kernel that makes a
hidden state from a patch of two frames is two matrices, and queries and keys of MoonViT have the pairs of an axis
together.

The file has mean and deviation of colours, but for most towers no size of pictures. Sizes are then those of the
released models' `preprocessor_config.json`, which are named below; llama.cpp has its own.

Elsewhere: `checkpoint/gguf.py` finds and reads the file; `reading.py` makes an `EncoderFiles` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from argosy.checkpoint.gguf import GgufArray, GgufFile
from argosy.checkpoint.untrusted_file import quote
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.encoders.table import ENCODERS, Encoder
from argosy.model.families.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.families.gguf_config import GgufConfigReader

_ARCHITECTURE = "clip"
_TYPE_KEYS = (
    "projector_type",
    "vision.projector_type",
)  # the second in files that also have a tower for sound

_LAYER_NAMES = {
    "attn_norm": "ln1",
    "qkv": "attn_qkv",
    "o": "attn_out",
    "mlp_norm": "ln2",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}

Read = Callable[[GgufConfigReader], dict[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projector:
    """A kind of tower.

    families: of a text model in GGUF -> of the checkpoint whose tower it is, a key of `ENCODERS`.
    placeholder: the token that the chat template writes for a picture.
    read_config: `vision_config` as in that checkpoint's `config.json`.
    read_settings: its `preprocessor_config.json`.
    names: of tensors outside of layers, by canonical name, without `.weight` or `.bias`.
    stored: how the file differs from the checkpoint, as arguments of the tower's config.
    """

    families: Mapping[str, str]
    placeholder: str
    read_config: Read
    read_settings: Read
    names: Mapping[str, str]
    stored: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TowerInFile:
    """What a file says about its tower; `names` are those of its tensors by canonical name."""

    encoder: Encoder
    config: Any
    names: Mapping[str, str]
    placeholder: str
    settings: Mapping[str, object]


def read_tower(file: GgufFile, model: ModelConfig) -> TowerInFile:
    """Read the description of the tower for pictures.

    Args:
        model: the text model beside it.

    Raises:
        UnsupportedModel: another kind of file or tower, one for other text models, or a key or value that is not
            supported.
        CheckpointError: a key is missing or malformed, or the tower makes rows of another size.
    """
    architecture = file.text("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UnsupportedModel(
            f"{file.path.name} has architecture '{quote(architecture)}'; a file with a vision tower has "
            f"'{_ARCHITECTURE}'",
            path=file.path,
            key="general.architecture",
            value=architecture,
            supported=(_ARCHITECTURE,),
        )
    reader = GgufConfigReader(file, _ARCHITECTURE)
    key = next((key for key in _TYPE_KEYS if reader.has(key)), _TYPE_KEYS[0])
    kind = file.text(reader.key(key))
    projector = _PROJECTORS.get(kind)
    if projector is None:
        raise reader.unsupported(key, kind, ", ".join(_PROJECTORS))
    if model.family not in projector.families:
        raise UnsupportedModel(
            f"{file.path.name} has a vision tower of type {kind}, and the model beside it is a {model.family}; this "
            f"tower belongs to: {', '.join(projector.families)}",
            hint="give the file that was published with the model: `--mmproj PATH`",
            path=file.path,
            key=key,
            value=kind,
            supported=list(projector.families),
        )
    (encoder,) = ENCODERS[projector.families[model.family]]
    reader.neutral("has_vision_encoder", True)
    raw = projector.read_config(reader)
    settings = projector.read_settings(reader)
    rows = reader.integer("vision.projection_dim")
    reader.finish()
    if rows != model.hidden_size:
        raise CheckpointError(
            f"{file.path.name} makes rows of {rows} values, and the model beside it has a hidden size of "
            f"{model.hidden_size}",
            hint="give the file that was published with the model: `--mmproj PATH`",
            path=file.path,
            key="clip.vision.projection_dim",
        )
    own = ConfigReader(raw, model.family, file.path, within="clip.vision")
    config = encoder.read(own, ConfigReader({}, model.family, file.path), model)
    config = replace(config, **projector.stored)
    names = {name: _name(name, projector.names, config) for name in encoder.tensors(config)}
    return TowerInFile(encoder, config, names, projector.placeholder, settings)


def _name(canonical: str, names: Mapping[str, str], config: Any) -> str:
    """The name of a tensor in the file."""
    base, kind = canonical, "weight"
    if canonical.endswith("_bias"):
        base, kind = canonical.removesuffix("_bias"), "bias"
    if base.startswith("patch."):  # of a frame after the first
        return f"{names['patch']}.weight{base.removeprefix('patch')}"
    first, _, rest = base.partition(".")
    number, _, last = rest.partition(".")
    if first == "layers":
        return f"v.blk.{number}.{_LAYER_NAMES[last]}.{kind}"
    if first == "deepstack":  # numbered by the layer whose output it takes
        layer = config.deepstack_layers[int(number)]
        return f"v.deepstack.{layer}.{ {'norm': 'norm', 'up': 'fc1', 'down': 'fc2'}[last] }.{kind}"
    return f"{names[base]}.{kind}"


# ── what all files have ─────────────────────────────────────────────────────────────────────────────────────────────


def _read_sizes(reader: GgufConfigReader) -> dict[str, object]:
    """Sizes in the spelling of Qwen3-VL and GLM-4.5V."""
    return {
        "depth": reader.integer("vision.block_count", most=MOST_LAYERS),
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "num_heads": reader.integer("vision.attention.head_count"),
        "out_hidden_size": reader.integer("vision.projection_dim"),
        "patch_size": _patch_size(reader),
        "spatial_merge_size": _merge_size(reader),
    }


def _patch_size(reader: GgufConfigReader) -> int:
    return reader.integer("vision.patch_size", most=256)


def _merge_size(reader: GgufConfigReader) -> int:
    return reader.integer("vision.spatial_merge_size", 2, most=16)


def _read_colours(reader: GgufConfigReader) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in ("image_mean", "image_std"):
        key = reader.key(f"vision.{name}")
        value = reader.file.metadata.get(key)
        if isinstance(value, GgufArray) and len(value) != 3:
            raise reader.file.wrong(key, value, "an array of three numbers")
        found[name] = reader.file.numbers(key)
    return found


def _read_pixels(reader: GgufConfigReader, least_tokens: int, most_tokens: int, *, frames: int) -> object:
    """Limits of a picture's pixels; the file may have them, and counts one frame."""
    pixels = (_patch_size(reader) * _merge_size(reader)) ** 2
    return {
        "shortest_edge": frames * reader.integer("vision.image_min_pixels", least_tokens * pixels),
        "longest_edge": frames * reader.integer("vision.image_max_pixels", most_tokens * pixels),
    }


# ── Qwen3-VL, Qwen3.5 ───────────────────────────────────────────────────────────────────────────────────────────────


def _read_qwen(reader: GgufConfigReader) -> dict[str, object]:
    raw = _read_sizes(reader)
    reader.neutral("use_gelu", True)
    # The converter writes the text model's; the tower's is always 1e-6.
    reader.number("vision.attention.layer_norm_epsilon", 1e-6)
    patches_a_side = reader.integer("vision.image_size") // _patch_size(reader)
    num_layers = reader.integer("vision.block_count", most=MOST_LAYERS)
    deepstack = reader.flags("vision.is_deepstack_layers", num_layers) or ()
    return raw | {
        "deepstack_visual_indexes": [layer for layer, is_merged in enumerate(deepstack) if is_merged],
        "num_position_embeddings": patches_a_side**2,
        "temporal_patch_size": 2,
    }


def _qwen_settings(reader: GgufConfigReader) -> dict[str, object]:
    """As Qwen3-VL's and Qwen3.6's: 65,536 to 16,777,216 pixels, with tokens of 32 x 32 pixels."""
    return _read_colours(reader) | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": _patch_size(reader),
        "merge_size": _merge_size(reader),
        "size": _read_pixels(reader, 64, 16_384, frames=1),
        "temporal_patch_size": 2,
    }


# ── GLM-4.5V, GLM-4.6V ──────────────────────────────────────────────────────────────────────────────────────────────


def _read_glm(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_silu", True)
    return _read_sizes(reader) | {
        "attention_bias": "v.blk.0.attn_qkv.bias" in reader.file.tensors,
        "image_size": reader.integer("vision.image_size"),
        "rms_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "temporal_patch_size": 2,
    }


def _glm_settings(reader: GgufConfigReader) -> dict[str, object]:
    """As GLM-4.5V's: 12,544 to 9,633,792 pixels of two frames, with tokens of 28 x 28 pixels."""
    return _read_colours(reader) | {
        "image_processor_type": "Glm4vImageProcessor",
        "patch_size": _patch_size(reader),
        "merge_size": _merge_size(reader),
        "size": _read_pixels(reader, 8, 6144, frames=2),
        "temporal_patch_size": 2,
    }


# ── Kimi-K2.5, K2.6 ─────────────────────────────────────────────────────────────────────────────────────────────────


def _read_kimi(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_gelu", True)
    merge = reader.integer("vision.projector.scale_factor", most=16)
    metadata = reader.file  # these keys lack the prefix of the others
    reader.integer("vision.image_size")  # of the position table, which has its own keys
    reader.integer("vision.image_min_pixels", least=0)  # the reference processor enlarges no picture
    return {
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "merge_kernel_size": [merge, merge],
        "num_attention_heads": reader.integer("vision.attention.head_count"),
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "patch_size": _patch_size(reader),
        "pos_emb_height": metadata.integer("vision.pos_emb_height", least=1),
        "pos_emb_time": metadata.integer("vision.pos_emb_time", least=1),
        "pos_emb_width": metadata.integer("vision.pos_emb_width", least=1),
        "projector_ln_eps": reader.number("vision.attention.layer_norm_epsilon"),
    }


def _kimi_settings(reader: GgufConfigReader) -> dict[str, object]:
    """As Kimi-K2.5's: at most 512 patches on a side; the file has their number in all, as pixels."""
    patch_size = _patch_size(reader)
    return _read_colours(reader) | {
        "image_processor_type": "Kimi_K25ImageProcessor",
        "max_patches": reader.integer("vision.image_max_pixels", least=patch_size**2) // patch_size**2,
        "merge_size": reader.integer("vision.projector.scale_factor", most=16),
        "patch_size": patch_size,
        "size": {"max_height": 512, "max_width": 512},
    }


_PROJECTORS: Mapping[str, _Projector] = {
    "qwen3vl_merger": _Projector(
        families={"qwen3_vl_moe": "qwen3_vl_moe", "qwen3_5_moe_text": "qwen3_5_moe"},
        placeholder="<|image_pad|>",
        read_config=_read_qwen,
        read_settings=_qwen_settings,
        names={
            "patch": "v.patch_embd",
            "position": "v.position_embd",
            "merger.norm": "v.post_ln",
            "merger.up": "mm.0",
            "merger.down": "mm.2",
        },
        stored={"are_frames_apart": True},
    ),
    "glm4v": _Projector(
        families={"glm4_moe": "glm4v_moe"},
        placeholder="<|image|>",
        read_config=_read_glm,
        read_settings=_glm_settings,
        names={
            "patch": "v.patch_embd",
            "patch_norm": "v.norm_embd",
            "position": "v.position_embd",
            "final_norm": "v.post_ln",
            "join": "mm.patch_merger",
            "merger.in": "mm.model.fc",
            "merger.norm": "mm.post_norm",
            "merger.gate": "mm.gate",
            "merger.up": "mm.up",
            "merger.down": "mm.down",
        },
        stored={"are_frames_apart": True},
    ),
    "kimik25": _Projector(
        families={"deepseek_v3": "kimi_k25"},
        placeholder="<|media_pad|>",
        read_config=_read_kimi,
        read_settings=_kimi_settings,
        names={
            "patch": "v.patch_embd",
            "position": "v.position_embd",
            "final_norm": "v.post_ln",
            "projector.norm": "mm.input_norm",
            "projector.up": "mm.1",
            "projector.down": "mm.2",
        },
        stored={"pair_order": "columns first"},
    ),
}
"""By `clip.projector_type`."""
