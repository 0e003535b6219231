"""Send files to workers that have none: first a list, then any part of the listed files.

    list: name, size and bytes at the beginning of each file   ->   the worker opens these   ->   asks for its experts

The list tells a worker which bytes it needs to open the model: the configuration and the headers of weight files.
The worker finds its experts in them itself, so every format is copied the same way. Files are named by their place
in the list, so a worker cannot request any other file.

Bytes read here stay out of the kernel's cache and therefore out of the engine's budget. While the engine answers a
request, all copies share a limited rate (`Pace`).

Elsewhere: `copy_link.py` is the protocol; `copied.py` is the other side; `placement.allot` divides the shards.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.manifest import DENSE_FILE, ENCODERS_FILE, MANIFEST_FILE, read_manifest
from argosy.checkpoint.pack_contents import goes_with_weights
from argosy.checkpoint.safetensors import TENSOR_FILES
from argosy.checkpoint.untrusted_file import open_regular, read_at
from argosy.cluster.copy_link import LIST_BYTES, PIECE_BYTES, THE_LIST, Ask, CopyEnd
from argosy.errors import ArgosyError, CheckpointError, UsageError

COPY_BYTES = LIST_BYTES + 3 * PIECE_BYTES  # the most memory that one copy takes on this side
_WEIGHTS_SUFFIX = ".safetensors"


class CopySource:
    """The files of a model that workers may copy.

    Raises:
        CheckpointError: a file is gone.   UsageError: there are too many files to list.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._opens = "" if files.path.is_dir() else files.path.name
        heads = _head_bytes(files)
        self._paths = sorted(heads)
        self._sizes = [path.stat().st_size for path in self._paths]
        self._files = [
            [path.name, nbytes, min(nbytes, heads[path])]
            for path, nbytes in zip(self._paths, self._sizes, strict=True)
        ]
        if len(self.listing(0)) > LIST_BYTES - 64:
            raise UsageError(f"{files.path} has too many files to be copied to workers")

    def listing(self, shards: int) -> bytes:
        """The list and the mask of shards to copy, as JSON."""
        return json.dumps({"files": self._files, "opens": self._opens, "shards": shards}).encode()

    def read(self, ask: Ask) -> bytes:
        """Read the bytes that a worker requests.

        Raises:
            CheckpointError: the file does not have these bytes or cannot be read.
        """
        if ask.file >= len(self._paths) or not 1 <= ask.nbytes <= PIECE_BYTES:
            raise CheckpointError("there is no such file, or not that many bytes at once")
        path, nbytes = self._paths[ask.file], self._sizes[ask.file]
        if ask.offset + ask.nbytes > nbytes:
            raise CheckpointError(f"{path.name} has {nbytes} bytes")
        with open_regular(path) as (descriptor, found):
            if found != nbytes:
                raise CheckpointError(f"{path.name} has changed since this engine opened it")
            data = read_at(descriptor, ask.nbytes, ask.offset, path)
            os.posix_fadvise(descriptor, ask.offset, ask.nbytes, os.POSIX_FADV_DONTNEED)
        return data


def _head_bytes(files: ModelFiles) -> dict[Path, int]:
    """Bytes at the beginning of each file that precede the weights."""
    if files.is_packed:
        weights = {DENSE_FILE, *(record.pieces[0].path.name for record in files.experts.values())}
        found = {files.path / MANIFEST_FILE: (files.path / MANIFEST_FILE).stat().st_size}
        for name, (nbytes, _) in read_manifest(files.path).files.items():
            path = files.path / name
            is_tower = name == ENCODERS_FILE
            found[path] = 0 if name in weights else _header_bytes(path) if is_tower else nbytes
        return found
    if files.header is not None:
        starts: dict[Path, int] = {files.header.path: files.header.path.stat().st_size}
        for ref in files.header.tensors.values():
            starts[ref.path] = min(starts.get(ref.path, ref.offset), ref.offset)
        return starts
    return {
        path: _header_bytes(path) if path.suffix == _WEIGHTS_SUFFIX else path.stat().st_size
        for path in files.path.iterdir()
        if (path.suffix == _WEIGHTS_SUFFIX or path.name in TENSOR_FILES or goes_with_weights(path.name))
        and path.is_file()
    }


def _header_bytes(path: Path) -> int:
    """The header size of a safetensors file, in bytes."""
    with open_regular(path) as (descriptor, nbytes):
        return 8 + int.from_bytes(read_at(descriptor, 8, 0, path), "little") if nbytes >= 8 else nbytes


class Pace:
    """The shared rate of all copies: limited while the engine answers a request, unlimited otherwise.

    Args:
        bytes_per_s: the limit while answering.   is_busy: tells whether the engine is answering a request.
    """

    def __init__(
        self,
        bytes_per_s: float,
        is_busy: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_per_s, self._is_busy, self._clock = bytes_per_s, is_busy, clock
        self._next_at = 0.0
        self._lock = threading.Lock()

    def pause_s(self, nbytes: int) -> float:
        """Seconds to wait before reading `nbytes` more."""
        with self._lock:
            now = self._clock()
            if not self._is_busy():
                self._next_at = now
                return 0.0
            begin = max(now, self._next_at)
            self._next_at = begin + nbytes / self._bytes_per_s
            return begin - now


def serve_copy(
    end: CopyEnd,
    source: CopySource,
    shards: int,
    *,
    pace: Pace,
    sent: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Answer a worker until it ends the connection, or `stop` is set.

    Args:
        shards: mask of the shards to copy.   sent: called with the size of each answer.

    Raises:
        PeerNotUsable: the connection failed, or the worker violates the protocol.
    """
    while (ask := end.next_ask()) is not None:
        if ask.file == THE_LIST:
            end.answer(ask, source.listing(shards))
            continue
        if stop.wait(pace.pause_s(min(ask.nbytes, PIECE_BYTES))):
            return
        try:
            data = source.read(ask)
        except (ArgosyError, OSError) as error:
            end.refuse(ask, str(error))
            continue
        end.answer(ask, data)
        sent(len(data))
