"""Forms of one tiny model with sharp distributions, and a few texts to compare them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from argosy.checkpoint.pack import pack
from argosy.evaluate.material import Material, PeopleGroup, Template
from argosy.model.families import open_model
from tests.cli.tiny_chat_model import write_chat_model
from tests.models.safetensors_file import read_safetensors, write_safetensors

Change = Callable[[str, np.ndarray], np.ndarray]

# A random model is unsure of every token, so what happens to its experts matters little. Larger output weights make it
# surer.
_SHARPER = 2.0


def write_sharp_model(directory: Path, change: Change = lambda name, values: values) -> Path:
    """A checkpoint whose experts `change` may change: (name of a tensor, float32 values) -> values."""
    write_chat_model(directory, context_tokens=512)
    path = directory / "model.safetensors"
    tensors = read_safetensors(path)
    for name, values in tensors.items():
        if name == "lm_head.weight":
            tensors[name] = values * _SHARPER
        elif ".experts." in name:
            tensors[name] = change(name, values)
    write_safetensors(path, {name: ("F32", values) for name, values in tensors.items()})
    return directory


def without_an_expert(name: str, values: np.ndarray) -> np.ndarray:
    """The first expert of every layer is zero, as a pack that lost it would have it."""
    return np.zeros_like(values) if ".experts.0." in name else values


def in_two_bits(name: str, values: np.ndarray) -> np.ndarray:
    """Four levels a row."""
    step = np.abs(values).max(axis=1, keepdims=True) / 1.5
    return (np.clip(np.round(values / step - 0.5), -2, 1) + 0.5) * step


def packed(source: Path, directory: Path, format: str) -> Path:
    pack(open_model(source), directory, format=format)
    return directory


def few_texts() -> Material:
    """Two languages, two templates in each, and groups in two dimensions."""
    groups = (
        PeopleGroup("colour", "red"),
        PeopleGroup("colour", "blue"),
        PeopleGroup("size", "tall"),
        PeopleGroup("size", "short"),
    )
    starts = ("{who} came in and was", "{who} spoke. It was", "{who} wrote and was", "{who} sang. It was")
    return Material(
        languages=("en", "de"),
        passages=(
            "The sea is wide and the ship is small. " * 4,
            "Das Meer ist weit, das Schiff ist klein. " * 4,
        ),
        groups=groups,
        templates=tuple(
            Template(language, start, " good.", " bad.")
            for language, own in (("en", starts), ("de", starts[::-1]))
            for start in own
        ),
        phrases={
            "en": tuple(f"a {group.name} one" for group in groups),
            "de": tuple(f"ein {group.name}" for group in groups),
        },
        digest="0" * 64,
    )
