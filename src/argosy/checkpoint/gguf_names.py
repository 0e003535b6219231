"""Find the GGUF files of a model by name: its parts, its vision tower in the same directory, the format of its
weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError

GGUF_SUFFIX = ".gguf"
GGUF_METADATA_FILE = "metadata.gguf"  # in a pack made from a GGUF: its metadata, without tensors
MMPROJ_METADATA_FILE = "mmproj-metadata.gguf"  # the same for the file with its vision tower

_FORMAT_IN_NAME = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:(?:[IT]?Q\d{1,2}|(?:MX|NV)FP4)(?:_[A-Z0-9]{1,16}){0,4}|BF16|F16|F32))$",
    re.IGNORECASE,
)
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_name(stem: str, number: int, count: int) -> str:
    """Return the name of a part of a split model; parts are numbered from 1."""
    return f"{stem}-{number:05}-of-{count:05}{GGUF_SUFFIX}"


def first_part(path: Path) -> Path:
    """Return the first part of the split model to which `path` belongs, going by its name; otherwise `path`."""
    if name := PART_NAME.fullmatch(path.name):
        return path.with_name(part_name(name["stem"], 1, int(name["count"])))
    return path


def format_in_name(stem: str) -> str:
    """Return the format at the end of a GGUF file's name, such as Q4_K_M or UD-IQ2_XXS; "" if there is none."""
    found = _FORMAT_IN_NAME.search(stem)
    return found[1].upper() if found else ""


def is_tower(name: str) -> bool:
    """Whether a file's name says that it contains a vision tower: llama.cpp calls it mmproj."""
    return "mmproj" in name and name.endswith(GGUF_SUFFIX)


def is_model(name: str) -> bool:
    """Whether a file's name says that it contains weights of a model: neither a tower nor an importance matrix.

    Files quantised with an importance matrix may be named after it as well, and keep a format in their names.
    """
    stem = name.removesuffix(GGUF_SUFFIX).lower()
    before = stem.removesuffix("imatrix").rstrip("-._")
    is_measurement = stem.startswith("imatrix") or stem.endswith("imatrix")
    has_format = bool(format_in_name(stem) or format_in_name(before))
    return name.endswith(GGUF_SUFFIX) and not is_tower(name) and (has_format or not is_measurement)


def find_gguf(directory: Path) -> Path | None:
    """Return the only GGUF file in `directory`, or the first part of its only split model; None if there is none.

    A model's vision tower and its importance matrix do not count.

    Raises:
        CheckpointError: there are several models.
    """
    entries = sorted(entry for entry in directory.iterdir() if entry.suffix == GGUF_SUFFIX)
    models = [entry for entry in entries if is_model(entry.name)] or entries
    found = list(dict.fromkeys(map(first_part, models)))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory} holds {len(found)} models as {GGUF_SUFFIX} files: "
            f"{', '.join(quote(path.name) for path in found[:8])}",
            hint=f"give one of them, for example {found[0]}",
            path=directory,
        )
    return found[0] if found else None


def find_mmproj(model: Path) -> Path | None:
    """Return the only file, going by its name, with a vision tower in a GGUF model's directory; None if there is none.

    Raises:
        CheckpointError: there are several such files.
    """
    try:
        entries = sorted(entry for entry in model.parent.iterdir() if entry.suffix == GGUF_SUFFIX)
    except PermissionError:  # files in such a directory can be opened by name
        return None
    found = [entry for entry in entries if is_tower(entry.name) and entry.name != model.name]
    if len(found) > 1:
        raise CheckpointError(
            f"{model.parent} holds {len(found)} files that may have the vision tower of {model.name}: "
            f"{', '.join(quote(path.name) for path in found[:8])}",
            hint=f"name one of them, for example `--mmproj {found[0]}`",
            path=model.parent,
        )
    return found[0] if found else None
