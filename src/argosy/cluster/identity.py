"""Identify a model's experts by 32 bytes, equal on every machine with the same files.

    records of all experts (sizes, formats, checksums), and samples of their bytes  ->  fingerprint

Reading every byte of a terabyte would take too long at the start of a group. A pack stores a checksum for every
expert, and the fingerprint covers these wherever they are: a worker may have part of a pack, or one that is divided
differently. For other files, the fingerprint covers the geometry, the file sizes, the place of each expert, and 4
KiB of a few hundred experts, in all of which two trainings of one architecture differ. It does not detect a single
flipped bit on a drive; `--verify` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from blake3 import blake3

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.fingerprint import SAMPLE_BYTES, Place, block_types, middle_of, read_samples
from argosy.checkpoint.landing import MatrixRef

_SAMPLES = 256


def fingerprint(files: ModelFiles) -> bytes:
    """32 bytes, equal for the same experts in the same format; names of files and directories do not matter.

    Raises:
        ReadFailed: a file cannot be read.
    """
    digest = blake3(repr(files.config).encode())
    for key in sorted(files.experts):
        record = files.experts[key]
        pieces = [
            (piece.offset if piece.checksum is None else None, piece.nbytes, piece.checksum)
            for piece in record.pieces
        ]
        digest.update(repr((key, record.formats, pieces, block_types(record.pieces))).encode())
    for name, ref in _biases(files):
        digest.update(repr((name, ref.checksum)).encode())
    places = list(samples(files))
    for _, nbytes, sampled in read_samples(sorted({path for path, _, _ in places}), places):
        digest.update(nbytes.to_bytes(8, "little"))
        digest.update(sampled)
    return digest.digest()


def samples(files: ModelFiles) -> Iterator[Place]:
    """(path, offset, bytes) of each range that a fingerprint reads from files without checksums."""
    keys = sorted(files.experts)
    for key in islice(keys, 0, None, max(1, len(keys) // _SAMPLES)):
        for piece in files.experts[key].pieces:
            if piece.checksum is None:
                yield middle_of(piece.path, piece.offset, piece.nbytes)
    for _, ref in _biases(files):
        if ref.checksum is None:
            yield ref.path, ref.offset, min(ref.nbytes, SAMPLE_BYTES)


def _biases(files: ModelFiles) -> list[tuple[str, MatrixRef]]:
    """The experts' biases, which are stored among the dense tensors."""
    return [(name, ref) for name, ref in sorted(files.dense.items()) if name.endswith("_bias")]
