"""The tensors of an adapter's file, each taken once; no value is trusted before all are proved finite.

    refs of a header  ->  AdapterTensors  ->  values, bounded and finite; a digest; what nobody took

Elsewhere: `checkpoint/safetensors.py` and `checkpoint/gguf.py` prove where the bytes are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blake3
import numpy as np
from numpy.typing import NDArray

from argosy.adapters.files import PairFormat, Values
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.errors import CheckpointError, UnsupportedModel

_FORMATS: Mapping[str, PairFormat] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_DTYPES: Mapping[PairFormat, str] = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
# The bits of the exponent, all set in NaN and infinity.
_EXPONENTS: Mapping[PairFormat, tuple[str, int]] = {
    "f32": ("<u4", 0x7F80_0000),
    "f16": ("<u2", 0x7C00),
    "bf16": ("<u2", 0x7F80),
}
_BLOCK_BYTES = 4 << 20  # read at once
MOST_RANK = 1024
MOST_TOKENS = 4096  # of an invocation
_MOST_TENSORS = 1_000_000


def widen(values: Values, format: PairFormat) -> NDArray[np.float32]:
    """Return values as float32, exactly."""
    if format == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def common_format(formats: Iterable[PairFormat]) -> PairFormat:
    """Return the one format of several tensors, or float32, which holds all of them."""
    found = set(formats)
    return found.pop() if len(found) == 1 else "f32"


def as_format(values: Values, format: PairFormat, wanted: PairFormat) -> Values:
    """Return values in the same format, or in float32."""
    return values if format == wanted else widen(values, format)


class AdapterTensors:
    """The tensors of an adapter, by their names in its file."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorRef]) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._taken: set[str] = set()
        if not tensors:
            raise CheckpointError(f"{path.name} has no tensors", path=path)
        if len(tensors) > _MOST_TENSORS:
            raise CheckpointError(
                f"{path.name} has {len(tensors)} tensors; at most {_MOST_TENSORS} are read", path=path
            )
        with open_regular(path) as (descriptor, _):
            self._identity = _identity_of(descriptor)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def take(self, name: str) -> TensorRef:
        """Return a tensor, which is accounted for from now on.

        Raises:
            CheckpointError: it is missing.   UnsupportedModel: its dtype is not read.
        """
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.path.name}: {quote(name)} is missing, the partner of a tensor that is there",
                path=self.path,
                tensor=name,
            )
        ref = self._tensors[name]
        if ref.dtype not in _FORMATS:
            raise UnsupportedModel(
                f"{self.path.name}: {quote(name)} is {ref.dtype}; supported: {', '.join(_FORMATS)}",
                path=self.path,
                tensor=name,
            )
        self._taken.add(name)
        return ref

    def left(self) -> list[str]:
        """Return the names that nobody has taken."""
        return [name for name in self._tensors if name not in self._taken]

    def refuse(self, name: str, sentence: str, hint: str | None = None) -> UnsupportedModel:
        """Return the error for a tensor that cannot be used."""
        return UnsupportedModel(
            f"{self.path.name}: {quote(name)} {sentence}", hint=hint, path=self.path, tensor=name
        )

    def read(self, ref: TensorRef) -> Values:
        """Return the values of a tensor, in its shape."""
        with self._open() as descriptor:
            raw = read_at(descriptor, ref.nbytes, ref.offset, ref.path)
        return np.frombuffer(raw, _DTYPES[format_of(ref)]).reshape(ref.shape)

    def read_pair(self, first: TensorRef, second: TensorRef) -> tuple[PairFormat, Values, Values]:
        """Return their one format, and the values of both in it."""
        format = common_format((format_of(first), format_of(second)))
        one, other = (as_format(self.read(ref), format_of(ref), format) for ref in (first, second))
        return format, one, other

    def prove(self, about: bytes) -> bytes:
        """Read every tensor once, and return the digest of all of them and of `about`.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file is cut.
        """
        hasher = blake3.blake3(about)
        with self._open() as descriptor:
            for name in sorted(self._tensors):
                ref = self._tensors[name]
                hasher.update(f"{name}\0{ref.dtype}\0{ref.shape}\0".encode())
                for first in range(0, ref.nbytes, _BLOCK_BYTES):
                    nbytes = min(_BLOCK_BYTES, ref.nbytes - first)
                    block = read_at(descriptor, nbytes, ref.offset + first, ref.path)
                    hasher.update(block)
                    if ref.dtype in _FORMATS:
                        _require_finite(ref, block, first)
        return hasher.digest()

    @contextmanager
    def _open(self) -> Iterator[int]:
        with open_regular(self.path) as (descriptor, _):
            if _identity_of(descriptor) != self._identity:
                raise CheckpointError(
                    f"{self.path.name} has changed since the adapter was opened",
                    hint="load the adapter again",
                    path=self.path,
                )
            yield descriptor


def format_of(ref: TensorRef) -> PairFormat:
    return _FORMATS[ref.dtype]


def _identity_of(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _require_finite(ref: TensorRef, block: bytes, first: int) -> None:
    kind, exponent = _EXPONENTS[format_of(ref)]
    bits: NDArray[Any] = np.frombuffer(block, kind)
    wrong = np.flatnonzero(bits & bits.dtype.type(exponent) == exponent)
    if wrong.size:
        raise CheckpointError(
            f"{ref.path.name}: {quote(ref.name)} is NaN or infinite at position "
            f"{first // bits.itemsize + int(wrong[0])}; expected finite numbers",
            hint="the file is damaged, or its training diverged",
            path=ref.path,
            tensor=ref.name,
        )
