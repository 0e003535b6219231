"""Search a hub for models by words in their names, and tell which ones Argosy may run.

    words  ->  search  ->  one request for the most downloaded  ->  Hit: name, format, parameters, downloads, licence

The facts about a model come from the hub's tags and from the architecture that the hub read in GGUF files, so no
file is opened. Tags are strangers' words: only known ones count.

Elsewhere: `checkpoint/hub.py` bounds the answer; `places.py` finds the models of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from argosy.checkpoint.hub import Hub, Source, hub_address, is_hub_name
from argosy.checkpoint.untrusted_file import quote
from argosy.errors import UsageError
from argosy.library.places import Model, find_models
from argosy.model.families import FAMILIES, gguf_families

MOST_ASKED = 100  # models that the hub is asked for, most downloaded first
_MOST_BYTES = 4 << 20
_LONGEST_WORDS = 200
_MOST_TAGS = 500
_LONGEST_LICENCE = 40
_LARGEST_NUMBER = 10**15
_EXPAND = ("downloads", "gated", "gguf", "safetensors", "tags")
# Tags of weights in unsupported formats, and of weights that are not a complete model.
_NOT_READ = {"exl2", "exl3", "hqq", "aqlm", "vptq", "peft", "lora"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A model on the hub.

    format: GGUF, safetensors, or "" for others.
    num_parameters, downloads: None if the hub does not say. Downloads are those of the last 30 days.
    licence: as stated in its tags, or "".
    is_gated: its owner must grant access.
    may_run: None if the hub does not say what it is.
    """

    name: str
    format: str
    num_parameters: int | None
    downloads: int | None
    licence: str
    is_gated: bool
    may_run: bool | None


def search(words: str) -> list[Hit]:
    """The models on the hub whose names contain the words, most downloaded first.

    Raises:
        UsageError: there are no words or too many.
        FetchFailed: the hub cannot be reached, or refuses.   CheckpointError: its answer is malformed.
    """
    words = " ".join(words.split())
    if not 0 < len(words) <= _LONGEST_WORDS:
        raise UsageError(
            f"a search needs 1 to {_LONGEST_WORDS} characters, found {len(words)}",
            hint="for example `argosy search qwen3 30b`",
        )
    query = [("search", words), ("sort", "downloads"), ("limit", str(MOST_ASKED))]
    query += [("expand", field) for field in _EXPAND]
    entries = Hub(Source(hub_address()), most_bytes=_MOST_BYTES).search(query, _MOST_BYTES)
    hits = [_hit(entry) for entry in entries[:MOST_ASKED] if isinstance(entry, dict)]
    return [hit for hit in hits if hit is not None]


def search_here(words: str) -> list[Model]:
    """The models on this machine whose names contain all the words."""
    wanted = words.lower().split()
    return [model for model in find_models().models if all(word in model.name.lower() for word in wanted)]


def _hit(entry: Mapping[str, object]) -> Hit | None:
    name = entry.get("id")
    if not isinstance(name, str) or not is_hub_name(name):
        return None
    tags = _tags(entry.get("tags"))
    gguf, tensors = entry.get("gguf"), entry.get("safetensors")
    gguf = gguf if isinstance(gguf, dict) else {}
    tensors = tensors if isinstance(tensors, dict) else {}
    is_gguf = "gguf" in tags
    licences = [tag.removeprefix("license:") for tag in tags if tag.startswith("license:")]
    return Hit(
        name=name,
        format="GGUF" if is_gguf else "safetensors" if "safetensors" in tags else "",
        num_parameters=_number(gguf.get("total") if is_gguf else tensors.get("total")),
        downloads=_number(entry.get("downloads")),
        licence=quote(licences[0][:_LONGEST_LICENCE]) if licences else "",
        is_gated=entry.get("gated") not in (None, False),
        may_run=_may_run(set(tags), gguf.get("architecture")),
    )


def _tags(value: object) -> list[str]:
    return [tag for tag in value[:_MOST_TAGS] if isinstance(tag, str)] if isinstance(value, list) else []


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST_NUMBER else None


def _may_run(tags: set[str], architecture: object) -> bool | None:
    """Whether a model belongs to a built-in family; None for a GGUF file that the hub does not describe."""
    if tags & _NOT_READ:
        return False
    if "gguf" in tags:
        if isinstance(architecture, str):
            return architecture in gguf_families()
        return True if tags & FAMILIES.keys() else None
    return "safetensors" in tags and bool(tags & FAMILIES.keys())
