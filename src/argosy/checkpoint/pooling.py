"""Read how a checkpoint pools hidden states into an embedding, if its files say so.

    modules.json, 1_Pooling/config.json  (sentence-transformers)  ──┐
    modules.json, pooling.json           (a pack of that)         ──┼──>  "mean", "last", or None: not declared
    <architecture>.pooling_type          (GGUF)                   ──┘

Elsewhere: `engine/pooling.py` pools.
"""

from __future__ import annotations

import re
from pathlib import Path

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.gguf_names import GGUF_METADATA_FILE
from argosy.checkpoint.untrusted_file import JSON_LIMIT_BYTES, open_regular, quote, read_at, read_object
from argosy.config import Pooling
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.strict_json import JsonError, parse_json

MODULES_FILE = "modules.json"
POOLING_FILE = "pooling.json"  # in a pack: the configuration of its pooling module

_PREFIX = "pooling_mode_"
_NAMES: dict[str, Pooling] = {"mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}
_GGUF_NAMES = ("none", "mean", "cls", "last", "rank")
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")  # no effect: every embedding is normalised
_MODULE_PATH = re.compile(r"[A-Za-z0-9_-]{1,64}")
# The name of a module's file in a checkpoint.
MODULE_CONFIG = re.compile(rf"{_MODULE_PATH.pattern}/config\.json")
_HINT = "`--pooling mean` or `--pooling last` pools in that way anyway"


def declared_pooling(files: ModelFiles) -> Pooling | None:
    """Return the pooling that a checkpoint declares, or None.

    Raises:
        UnsupportedModel: it declares another pooling, or a further layer.   CheckpointError: a file is malformed.
    """
    path = files.path
    if not path.is_dir():
        return _of_gguf(files.header or read_gguf(path))
    if (path / GGUF_METADATA_FILE).is_file():
        return _of_gguf(read_gguf(path / GGUF_METADATA_FILE))
    if files.header is not None:
        return _of_gguf(files.header)
    found = pooling_config(path)
    return None if found is None else _of_config(found)


def pooling_config(directory: Path) -> Path | None:
    """Return the file that configures a checkpoint's pooling module, if it has one.

    Raises: what `declared_pooling` raises.
    """
    if not (directory / MODULES_FILE).is_file():
        return None
    found = None
    for module in _modules(directory / MODULES_FILE):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _KNOWN_MODULES:
            raise _unsupported(directory / MODULES_FILE, "a module", kind, ", ".join(_KNOWN_MODULES))
        if kind == "Pooling":
            place = module.get("path")
            if not isinstance(place, str) or not _MODULE_PATH.fullmatch(place):
                raise CheckpointError(
                    f"{MODULES_FILE}: the path of a module is {quote(place)}, expected the name of a directory",
                    path=directory / MODULES_FILE,
                )
            found = directory / POOLING_FILE
            if not found.is_file():
                found = directory / place / "config.json"
    return found


def _modules(path: Path) -> list[dict[str, object]]:
    with open_regular(path) as (descriptor, size):
        if size > JSON_LIMIT_BYTES:
            raise CheckpointError(
                f"{path.name} is {size} bytes long; at most {JSON_LIMIT_BYTES} are read", path=path
            )
        data = read_at(descriptor, size, 0, path)
    try:
        found = parse_json(data)
    except JsonError as error:
        raise CheckpointError(f"{path.name} {error.fault}", path=path) from error
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise CheckpointError(f"{path.name} is not a list of modules", path=path)
    return found


def _of_config(path: Path) -> Pooling:
    config = read_object(path)
    mode = config.get("pooling_mode")
    chosen = [mode] if mode is not None else []
    chosen += [
        key.removeprefix(_PREFIX)
        for key, value in config.items()
        if key.startswith(_PREFIX) and value is True
    ]
    if len(chosen) != 1 or chosen[0] not in _NAMES:
        raise _unsupported(
            path, "pooling", " and ".join(map(str, chosen)) or "none", "mean_tokens, lasttoken"
        )
    return _NAMES[str(chosen[0])]


def _of_gguf(file: GgufFile) -> Pooling | None:
    number = file.integer(f"{file.text('general.architecture')}.pooling_type", 0, most=len(_GGUF_NAMES) - 1)
    name = _GGUF_NAMES[number]
    if name == "none":
        return None
    if name not in ("mean", "last"):
        raise _unsupported(file.path, "pooling", name, "mean, last")
    return "mean" if name == "mean" else "last"


def _unsupported(path: Path, what: str, found: str, supported: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path.name} asks for {what} '{quote(found)}' of embeddings; supported: {supported}",
        hint=_HINT,
        path=path,
    )
