"""Read towers from files of llama.cpp's converter (`mmproj-*.gguf`), in the terms of `encoder.py`.

    GgufFile  ->  read_towers  ->  config, names of tensors, settings of the processor

A GGUF model keeps its towers in a separate file of architecture `clip`. Its `clip.projector_type` names the tower, and
the text model names the family; a file with towers for pictures and for sound has a type for each. Weights keep their
values, but some are stored differently: the kernel that makes a hidden state from a patch of two frames is two
matrices, queries and keys of MoonViT have the pairs of an axis together, and Gemma's kernel has colours first.

The file contains the mean and deviation of colours, but for most towers no picture sizes. Sizes then come from the
released models' `preprocessor_config.json`, named below; llama.cpp uses its own.

Elsewhere: `checkpoint/gguf.py` finds and reads the file; `reading.py` makes `EncoderFiles` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from argosy.checkpoint.gguf import GgufArray, GgufFile
from argosy.checkpoint.untrusted_file import quote
from argosy.config import ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.media.parts import Kind
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.table import ENCODERS
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

_ARCHITECTURE = "clip"
_PARTS: Mapping[Kind, str] = {"picture": "vision", "sound": "audio"}  # as the keys name them
_NAMED_BESIDE = "give the file that was published with the model: `--mmproj PATH`"

_LAYER_NAMES = {
    "attn_norm": "ln1",
    "qkv": "attn_qkv",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_out",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_out_norm": "attn_post_norm",
    "mlp_norm": "ln2",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_out_norm": "ffn_post_norm",
}
_DEEPSTACK_NAMES = {"norm": "norm", "up": "fc1", "down": "fc2"}

Read = Callable[[GgufConfigReader], dict[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projector:
    """A kind of tower.

    kind: the kind of media that it encodes.
    families: a text model's family in GGUF -> the checkpoint whose tower it is, a key of `ENCODERS`.
    placeholder: the token that the chat template writes for a picture or a sound.
    read_config: the tower's config as in that checkpoint's `config.json`.
    read_settings: its `preprocessor_config.json`.
    names: tensors outside of layers, by canonical name, without `.weight` or `.bias`.
    whole_names: those whose names have neither.
    marks: the tokens before and after a span, if the chat template does not write them.
    stored: how the file differs from the checkpoint, as arguments of the tower's config.
    """

    kind: Kind = "picture"
    families: Mapping[str, str]
    placeholder: str
    read_config: Read
    read_settings: Read
    names: Mapping[str, str]
    whole_names: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[str, str] | None = None
    stored: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TowerInFile:
    """A tower as its file describes it.

    names: canonical name -> name of the tensor.
    placeholder, marks: as the projector has them.
    """

    encoder: Encoder
    config: Any
    names: Mapping[str, str]
    placeholder: str
    marks: tuple[str, str] | None
    settings: Mapping[str, object]


def read_towers(file: GgufFile, model: ModelConfig) -> dict[Kind, TowerInFile | ArgosyError]:
    """Read the descriptions of the towers; a tower that cannot run is represented by the error that says why.

    Args:
        model: the text model that the towers serve.

    Raises:
        UnsupportedModel: another kind of file.
        CheckpointError: the file has no tower, or its declaration is malformed.
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
    found: dict[Kind, TowerInFile | ArgosyError] = {}
    for kind, part in _PARTS.items():
        if file.flag(f"clip.has_{part}_encoder", False):
            try:
                found[kind] = _read_tower(file, model, kind)
            except (UnsupportedModel, CheckpointError) as error:
                found[kind] = error
    if not found:
        raise CheckpointError(
            f"{file.path.name} has neither clip.has_vision_encoder nor clip.has_audio_encoder", path=file.path
        )
    return found


def is_of(kind: Kind, tensor: str) -> bool:
    """Whether a tensor of the file belongs to the tower of this kind."""
    return tensor.startswith(("a.", "mm.a.")) == (kind == "sound")


def _read_tower(file: GgufFile, model: ModelConfig, kind: Kind) -> TowerInFile:
    part = _PARTS[kind]
    reader = GgufConfigReader(file, _ARCHITECTURE)
    key = f"{part}.projector_type" if reader.has(f"{part}.projector_type") else "projector_type"
    projector_type = file.text(reader.key(key))
    known = {name: one for name, one in _PROJECTORS.items() if one.kind == kind}
    projector = known.get(projector_type)
    if projector is None:
        raise reader.unsupported(key, projector_type, ", ".join(known))
    if model.family not in projector.families:
        raise UnsupportedModel(
            f"{file.path.name} has a tower of type {projector_type} for {kind}s, and the model beside it is a "
            f"{model.family}; this tower belongs to: {', '.join(projector.families)}",
            hint=_NAMED_BESIDE,
            path=file.path,
            key=key,
            value=projector_type,
            supported=list(projector.families),
        )
    encoders = ENCODERS.get(projector.families[model.family], ())
    if not (encoder := next((one for one in encoders if one.kind == kind), None)):
        raise UnsupportedModel(f"this installation is without the tower of {file.path.name}", path=file.path)
    raw = projector.read_config(reader)
    settings = projector.read_settings(reader)
    rows = reader.integer(f"{part}.projection_dim")
    _pass_others(reader, kind)
    reader.finish()
    if rows != model.hidden_size:
        raise CheckpointError(
            f"{file.path.name} makes rows of {rows} values for {kind}s, and the model beside it has a hidden size of "
            f"{model.hidden_size}",
            hint=_NAMED_BESIDE,
            path=file.path,
            key=f"clip.{part}.projection_dim",
        )
    own = ConfigReader(raw, model.family, file.path, within=f"clip.{part}")
    config = encoder.read(own, ConfigReader({}, model.family, file.path), model)
    config = replace(config, **projector.stored)
    layers = "v" if kind == "picture" else "a"
    names = {
        name: projector.whole_names.get(name) or _name(name, layers, projector.names, config)
        for name in encoder.tensors(config)
    }
    return TowerInFile(encoder, config, names, projector.placeholder, projector.marks, settings)


def _pass_others(reader: GgufConfigReader, kind: Kind) -> None:
    """Count keys of the other tower as read; keys without a part, such as `use_gelu`, belong to vision."""
    for key in reader.file.metadata:
        name = key.removeprefix(f"{_ARCHITECTURE}.")
        is_audio = name.startswith("audio.")
        if name.startswith("has_") or is_audio == (kind == "picture"):
            reader.key(name)


def _name(canonical: str, layers: str, names: Mapping[str, str], config: Any) -> str:
    """Return the name of a tensor in the file."""
    base, kind = canonical, "weight"
    if canonical.endswith("_bias"):
        base, kind = canonical.removesuffix("_bias"), "bias"
    if base in names:
        return f"{names[base]}.{kind}"
    first, _, rest = base.partition(".")
    number, _, last = rest.partition(".")
    if first == "patch":  # a frame after the first
        return f"{names['patch']}.weight.{number}"
    if first == "deepstack":  # numbered by the layer whose output it takes
        layer, last = config.deepstack_layers[int(number)], _DEEPSTACK_NAMES[last]
        return f"v.deepstack.{layer}.{last}.{kind}"
    assert first == "layers", canonical
    return f"{layers}.blk.{number}.{_LAYER_NAMES[last]}.{kind}"


# ── what all files have ─────────────────────────────────────────────────────────────────────────────────────────────


def _read_sizes(reader: GgufConfigReader) -> dict[str, object]:
    """Read sizes in the spelling of Qwen3-VL and GLM-4.5V."""
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


def _read_pixels(reader: GgufConfigReader, least: int, most: int, *, token: int, frames: int = 1) -> object:
    """Read the limits of a picture's pixels: from the file, which counts one frame, or from the released models.

    Args:
        least, most: limits of the released models, in `frames` frames, where a token has `token` x `token` pixels.
    """
    pixels = (_patch_size(reader) * _merge_size(reader)) ** 2
    given = {"shortest_edge": "vision.image_min_pixels", "longest_edge": "vision.image_max_pixels"}
    return {
        name: frames * reader.integer(key) if reader.has(key) else limit * pixels // token**2
        for (name, key), limit in zip(given.items(), (least, most), strict=True)
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
    """Return settings as in Qwen3-VL and Qwen3.6, or as in Qwen3-Omni, whose file also contains a tower for sound.

    They have 65,536 to 16,777,216 pixels, and 3,136 to 12,845,056; a token has 32 x 32.
    """
    limits = (3136, 12_845_056) if reader.file.flag("clip.has_audio_encoder", False) else (65_536, 16_777_216)
    return _read_colours(reader) | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": _patch_size(reader),
        "merge_size": _merge_size(reader),
        "size": _read_pixels(reader, *limits, token=32),
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
    """Return settings as in GLM-4.5V: 12,544 to 9,633,792 pixels, counted over two frames; a token has 28 x 28."""
    return _read_colours(reader) | {
        "image_processor_type": "Glm4vImageProcessor",
        "patch_size": _patch_size(reader),
        "merge_size": _merge_size(reader),
        "size": _read_pixels(reader, 12_544, 9_633_792, token=28, frames=2),
        "temporal_patch_size": 2,
    }


# ── Kimi-K2.5, K2.6 ─────────────────────────────────────────────────────────────────────────────────────────────────


def _read_kimi(reader: GgufConfigReader) -> dict[str, object]:
    reader.neutral("use_gelu", True)
    merge = reader.integer("vision.projector.scale_factor", most=16)
    metadata = reader.file  # these keys lack the prefix of the others
    reader.integer("vision.image_size")  # the position table has its own keys
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
    """Return settings as in Kimi-K2.5: at most 512 patches on a side; the file gives their total number, as pixels."""
    patch_size = _patch_size(reader)
    return _read_colours(reader) | {
        "image_processor_type": "Kimi_K25ImageProcessor",
        "max_patches": reader.integer("vision.image_max_pixels", least=patch_size**2) // patch_size**2,
        "merge_size": reader.integer("vision.projector.scale_factor", most=16),
        "patch_size": patch_size,
        "size": {"max_height": 512, "max_width": 512},
    }


# ── Gemma-4 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_gemma(reader: GgufConfigReader) -> dict[str, object]:
    """Read the config. The heads' sizes are those of the tensors, and the file has no rotary base, as in llama.cpp."""

    def size(name: str, axis: int) -> int:
        ref = reader.file.tensors.get(name)
        return ref.shape[axis] if ref is not None and len(ref.shape) > axis else 1

    num_heads = reader.integer("vision.attention.head_count")
    head_dim = max(1, size("v.blk.0.attn_q.weight", 0) // num_heads)
    reader.integer("vision.image_size")  # nothing depends on it
    return {
        "head_dim": head_dim,
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_hidden_layers": reader.integer("vision.block_count", most=MOST_LAYERS),
        "num_key_value_heads": max(1, size("v.blk.0.attn_k.weight", 0) // head_dim),
        "patch_size": _patch_size(reader),
        "pooling_kernel_size": _pooled(reader),
        "position_embedding_size": size("v.position_embd.weight", 1),
        "rms_norm_eps": reader.number("vision.attention.layer_norm_epsilon"),
        "standardize": "v.std_bias" in reader.file.tensors,
    }


def _pooled(reader: GgufConfigReader) -> int:
    return reader.integer("vision.projector.scale_factor", 3, most=16)


def _gemma_settings(reader: GgufConfigReader) -> dict[str, object]:
    """Return settings as in Gemma-4: 280 tokens, and colours from 0 to 1."""
    return _read_colours(reader) | {
        "do_normalize": True,
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": _patch_size(reader),
        "pooling_kernel_size": _pooled(reader),
    }


# ── the sound of Qwen3-Omni ─────────────────────────────────────────────────────────────────────────────────────────


def _read_omni_audio(reader: GgufConfigReader) -> dict[str, object]:
    if (eps := reader.number("audio.attention.layer_norm_epsilon", 1e-5)) != 1e-5:
        raise reader.unsupported("audio.attention.layer_norm_epsilon", eps, "1e-05")
    kernel = reader.file.tensors.get("a.conv2d.1.weight")
    return {
        "d_model": reader.integer("audio.embedding_length"),
        "downsample_hidden_size": 480 if kernel is None or not kernel.shape else kernel.shape[0],
        "encoder_attention_heads": reader.integer("audio.attention.head_count"),
        "encoder_ffn_dim": reader.integer("audio.feed_forward_length"),
        "encoder_layers": reader.integer("audio.block_count", most=MOST_LAYERS),
        "n_window": 50,  # the file has no windows: those of the released models
        "n_window_infer": 800,
        "num_mel_bins": reader.integer("audio.num_mel_bins", most=1024),
        "output_dim": reader.integer("audio.projection_dim"),
    }


def _omni_sound_settings(reader: GgufConfigReader) -> dict[str, object]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": reader.integer("audio.num_mel_bins", most=1024),
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
    "gemma4v": _Projector(
        families={"gemma4": "gemma4"},
        placeholder="<|image|>",
        marks=("<|image>", "<image|>"),
        read_config=_read_gemma,
        read_settings=_gemma_settings,
        names={"patch": "v.patch_embd", "position": "v.position_embd", "projection": "mm.input_projection"},
        whole_names={"standard_bias": "v.std_bias", "standard_norm": "v.std_scale"},
        stored={"has_colours_first": True},
    ),
    "qwen3a": _Projector(
        kind="sound",
        families={"qwen3_vl_moe": "qwen3_omni_moe"},
        placeholder="<|audio_pad|>",
        read_config=_read_omni_audio,
        read_settings=_omni_sound_settings,
        names={
            **{f"convolution.{i}": f"a.conv2d.{i + 1}" for i in range(3)},
            "join": "a.conv_out",
            "final_norm": "a.post_ln",
            "output.up": "mm.a.mlp.1",
            "output.down": "mm.a.mlp.2",
        },
    ),
}
"""By `clip.projector_type`."""
