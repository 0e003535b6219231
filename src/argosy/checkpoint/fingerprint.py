"""Identify a model by 64 hexadecimal digits, without reading all of its bytes.

    configuration, files, place and types of every tensor, checksums of a pack, samples of other files  ->  fingerprint

Models of different geometry or format have different fingerprints. For a pack, the fingerprint covers every byte, as
well as the pack's checksums do (CRC-32C: they detect accidents, not forgery). In other files it reads 4 KiB from the
middle of some tensors: two trainings of one architecture differ in all of them, but a single changed weight elsewhere
goes unnoticed.

Elsewhere: `cluster/identity.py` identifies only the experts, whatever the files are called.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.landing import Piece
from argosy.errors import ReadFailed

NUM_SAMPLES = 32  # number of samples of tensors that every token needs, and of experts
SAMPLE_BYTES = 4096

Item = TypeVar("Item")
Place = tuple[Path, int, int]  # file, offset, bytes


def fingerprint(files: ModelFiles) -> str:
    """Return a SHA-256 that is equal for equal models under the same file names.

    Raises:
        ReadFailed: a file cannot be read.
    """
    digest = hashlib.sha256(repr(files.config).encode())
    refs = sorted(files.dense.items())
    for name, ref in refs:
        facts = name, ref.path.name, ref.offset, ref.nbytes, ref.format, ref.rows, ref.cols, ref.checksum
        digest.update(repr((*facts, block_types(ref.pieces))).encode())
    for key, record in sorted(files.experts.items()):
        pieces = [(piece.path.name, piece.offset, piece.nbytes, piece.checksum) for piece in record.pieces]
        digest.update(repr((key, record.formats, pieces, block_types(record.pieces))).encode())
    unchecked = [ref for _, ref in refs if ref.checksum is None]
    places = [middle_of(ref.path, ref.offset, ref.nbytes) for ref in _spread(unchecked)]
    records = [record for _, record in sorted(files.experts.items())]
    unchecked_experts = [record for record in records if any(one.checksum is None for one in record.pieces)]
    for record in _spread(unchecked_experts):
        places += [middle_of(piece.path, piece.offset, piece.nbytes) for piece in record.pieces]
    for path, nbytes, sampled in read_samples(files.weight_paths, sorted(set(places))):
        digest.update(repr((path.name, nbytes)).encode())
        digest.update(sampled)
    return digest.hexdigest()


def block_types(pieces: Iterable[Piece]) -> list[str]:
    """Return how the bytes of transcoded pieces are read: the same file has other weights with other settings."""
    return [piece.transcode.block_type for piece in pieces if piece.transcode is not None]


def middle_of(path: Path, offset: int, nbytes: int) -> Place:
    """Return the sample of a part of a file: 4 KiB from its middle, or all of it if it is shorter."""
    sampled = min(nbytes, SAMPLE_BYTES)
    return path, offset + (nbytes - sampled) // 2, sampled


def read_samples(paths: Iterable[Path], places: Iterable[Place]) -> Iterator[tuple[Path, int, bytes]]:
    """Read the places of each file in order; yield the file, its size, and the concatenated bytes.

    Raises:
        ReadFailed: a file cannot be read.
    """
    by_path: dict[Path, list[tuple[int, int]]] = {path: [] for path in paths}
    for path, at, nbytes in places:
        by_path[path].append((at, nbytes))
    for path, parts in by_path.items():
        try:
            with path.open("rb", buffering=0) as file:
                sampled = b"".join(os.pread(file.fileno(), nbytes, at) for at, nbytes in parts)
                yield path, os.fstat(file.fileno()).st_size, sampled
        except OSError as error:
            raise ReadFailed(f"{path.name} cannot be read: {error.strerror}", path=str(path)) from None


def _spread(items: list[Item]) -> Iterator[Item]:
    """Choose at most NUM_SAMPLES items, spread over the whole list."""
    return islice(items, 0, None, max(1, -(-len(items) // NUM_SAMPLES)))
