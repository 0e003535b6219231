"""Find the family whose configs read most like that of an unknown one, and the keys in which they differ.

    raw config  ->  parse_config of each family, without the keys that it refuses  ->  Nearest, or None

Elsewhere: `__init__.py` refuses the unknown family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from argosy.checkpoint.untrusted_file import quote
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.reading.config_reader import HARMLESS, NEUTRAL

_FEWEST_KEYS = 8  # that say something about the model
_MOST_DIFFERENCES = 8
_MOST_KEYS = 1000

Parse = Callable[[Mapping[str, object]], ModelConfig]


class Nearest(NamedTuple):
    """A known family, and the keys of the unknown one's config that it refuses."""

    family: str
    differences: tuple[str, ...]
    is_text_part: bool  # it is the family of the text model inside a config for images or sound too

    def __str__(self) -> str:
        part = "its text_config reads" if self.is_text_part else "it reads"
        if not self.differences:
            return (
                f"{part} like {self.family} in every key; if it is one under another name, write that model_type into "
                "config.json: tensors that a model of this family does not have are refused"
            )
        shown = ", ".join(map(quote, self.differences))
        return f"{part} most like {self.family}, which does not know {shown} with the values given there"


def find_nearest(raw: Mapping[str, object], families: Iterable[tuple[str, Parse]]) -> Nearest | None:
    """Return the family that refuses the fewest keys of a config; None if that does not read like a known model.

    Args:
        families: the model type of each family, and its `parse_config`.
    """
    text = raw.get("text_config")
    keys = dict(text if isinstance(text, dict) else raw)
    known = keys.keys() - HARMLESS - NEUTRAL.keys()
    if not _FEWEST_KEYS <= len(known) <= _MOST_KEYS:
        return None
    most, nearest = min(_MOST_DIFFERENCES, len(known) // 2), None
    for family, parse in families:
        found = _differences(keys | {"model_type": family}, parse, most)
        if found is not None:
            nearest, most = Nearest(family, found, isinstance(text, dict)), len(found) - 1
        if most < 0:
            break
    return nearest


def _differences(keys: dict[str, object], parse: Parse, most: int) -> tuple[str, ...] | None:
    """Return the keys without which a config is one of a family; None if they are more than `most`."""
    found: list[str] = []
    while True:
        try:
            parse(keys)
            return tuple(found)
        except (CheckpointError, UnsupportedModel) as error:
            key = error.facts.get("key")
            if not isinstance(key, str) or key not in keys or len(found) == most:
                return None
            del keys[key]
            found.append(key)
