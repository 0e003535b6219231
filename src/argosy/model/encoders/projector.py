"""How a file of llama.cpp's converter (`mmproj-*.gguf`) describes a tower, and what all such files have.

Elsewhere: each tower's file has its `PROJECTORS`; `mmproj.py` reads files by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from argosy.checkpoint.gguf import GgufArray
from argosy.media.parts import Kind
from argosy.model.reading.config_reader import MOST_LAYERS
from argosy.model.reading.gguf_config import GgufConfigReader

Read = Callable[[GgufConfigReader], dict[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    """A kind of tower.

    kind: the kind of media that it encodes.
    families: a text model's family in GGUF -> the checkpoint whose tower it is, a key of `ENCODERS`.
    placeholder: the token that the chat template writes for a picture or a sound.
    read_config: the tower's config as in that checkpoint's `config.json`.
    read_settings: its `preprocessor_config.json`.
    names: tensors outside of layers, by canonical name, without `.weight` or `.bias`.
    whole_names: those whose names have neither.
    layers: a stack's first part of a canonical name -> that of the file, and the names that are its own there.
    marks: the tokens before and after a span, if the chat template does not write them.
    stored: how the file differs from the checkpoint, as arguments of the tower's config.
    unused: tensors that the tower does not need.
    renamed: parts of names, and what some files have instead.
    """

    kind: Kind = "picture"
    families: Mapping[str, str]
    placeholder: str
    read_config: Read
    read_settings: Read
    names: Mapping[str, str]
    whole_names: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)
    marks: tuple[str, str] | None = None
    stored: Mapping[str, object] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def read_sizes(reader: GgufConfigReader) -> dict[str, object]:
    """Read sizes in the spelling of Qwen3-VL and GLM-4.5V."""
    return {
        "depth": reader.integer("vision.block_count", most=MOST_LAYERS),
        "hidden_size": reader.integer("vision.embedding_length"),
        "intermediate_size": reader.integer("vision.feed_forward_length"),
        "num_heads": reader.integer("vision.attention.head_count"),
        "out_hidden_size": reader.integer("vision.projection_dim"),
        "patch_size": read_patch_size(reader),
        "spatial_merge_size": read_merge_size(reader),
    }


def read_patch_size(reader: GgufConfigReader) -> int:
    return reader.integer("vision.patch_size", most=256)


def read_merge_size(reader: GgufConfigReader) -> int:
    return reader.integer("vision.spatial_merge_size", 2, most=16)


def read_colours(reader: GgufConfigReader) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in ("image_mean", "image_std"):
        key = reader.key(f"vision.{name}")
        value = reader.file.metadata.get(key)
        if isinstance(value, GgufArray) and len(value) != 3:
            raise reader.file.wrong(key, value, "an array of three numbers")
        found[name] = reader.file.numbers(key)
    return found


def read_pixels(reader: GgufConfigReader, least: int, most: int, *, token: int, frames: int = 1) -> object:
    """Read the limits of a picture's pixels: from the file, which counts one frame, or from the released models.

    Args:
        least, most: limits of the released models, in `frames` frames, where a token has `token` x `token` pixels.
    """
    pixels = (read_patch_size(reader) * read_merge_size(reader)) ** 2
    given = {"shortest_edge": "vision.image_min_pixels", "longest_edge": "vision.image_max_pixels"}
    return {
        name: frames * reader.integer(key) if reader.has(key) else limit * pixels // token**2
        for (name, key), limit in zip(given.items(), (least, most), strict=True)
    }
