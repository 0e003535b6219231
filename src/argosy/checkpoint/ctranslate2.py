"""Find the variables of a CTranslate2 `model.bin` and prove where their bytes are, without reading them.

    model.bin  ->  read_model_bin  ->  ModelBin: name of the model, {variable: TensorRef}, scalars, aliases

The file is a header (version, name and revision of the model), then one variable after another (name, shape, type,
length, bytes), then pairs of names that mean the same variable. All numbers are little-endian. Nothing is trusted:
each length is compared with the file, and with shape times type, before anything is read.

Elsewhere: `model/whisper/files.py` says which variables a model must have.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from argosy.checkpoint.safetensors import DTYPE_BITS, TensorRef
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.errors import CheckpointError, UnsupportedModel

_VERSION = 6
_DTYPES = ("F32", "I8", "I16", "I32", "F16", "BF16")  # by their number in the file
_SCALARS = {"F32": "<f", "I8": "<b", "I16": "<h", "I32": "<i"}
_MOST_VARIABLES = 1 << 16
_MOST_AXES = 4


@dataclass(frozen=True, slots=True)
class ModelBin:
    """The contents of a file.

    name: the kind of model, such as `WhisperSpec`.
    tensors: variables with axes, by name.
    scalars: the values of variables without axes.
    aliases: other name -> name of a variable.
    """

    name: str
    revision: int
    tensors: dict[str, TensorRef]
    scalars: dict[str, float]
    aliases: dict[str, str]


def read_model_bin(path: Path) -> ModelBin:
    """Read everything but the values of tensors.

    Raises:
        CheckpointError: the file is truncated or contradicts itself.   UnsupportedModel: it has another version.
    """
    with open_regular(path) as (descriptor, file_bytes):
        return _Reader(path, descriptor, file_bytes).read()


class _Reader:
    def __init__(self, path: Path, descriptor: int, file_bytes: int) -> None:
        self._path, self._descriptor, self._file_bytes = path, descriptor, file_bytes
        self._at = 0

    def read(self) -> ModelBin:
        version = self._number("<I")
        if version != _VERSION:
            raise UnsupportedModel(
                f"{self._path.name} has version {version} of CTranslate2's format; supported: {_VERSION}",
                hint="convert the model again with a current ct2-transformers-converter",
                path=self._path,
                key="version",
                value=version,
                supported=[_VERSION],
            )
        name, revision = self._name(), self._number("<I")
        tensors: dict[str, TensorRef] = {}
        scalars: dict[str, float] = {}
        for _ in range(self._count("variables")):
            ref = self._variable()
            if ref.name in tensors or ref.name in scalars:
                self._refuse(f"has the variable {quote(ref.name)} twice")
            if ref.shape:
                tensors[ref.name] = ref
            elif ref.dtype in _SCALARS:
                data = read_at(self._descriptor, ref.nbytes, ref.offset, self._path)
                scalars[ref.name] = struct.unpack(_SCALARS[ref.dtype], data)[0]
            else:
                self._refuse(f"has the scalar {quote(ref.name)} of type {ref.dtype}")
        aliases = {}
        for _ in range(self._count("aliases")):
            other = self._name()
            aliases[other] = self._name()
        if self._at != self._file_bytes:
            self._refuse(f"has {self._file_bytes - self._at} bytes after its end")
        return ModelBin(name, revision, tensors, scalars, aliases)

    def _variable(self) -> TensorRef:
        name = self._name()
        num_axes = self._number("<B")
        if num_axes > _MOST_AXES:
            self._refuse(f"gives {quote(name)} {num_axes} axes; at most {_MOST_AXES} are known")
        shape = tuple(self._number("<I") for _ in range(num_axes))
        dtype_number, nbytes = self._number("<B"), self._number("<I")
        if dtype_number >= len(_DTYPES):
            self._refuse(f"gives {quote(name)} the type {dtype_number}; known: 0 to {len(_DTYPES) - 1}")
        dtype = _DTYPES[dtype_number]
        expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
        if nbytes != expected:
            self._refuse(f"gives {quote(name)} {nbytes} bytes; {dtype} {list(shape)} has {expected}")
        offset = self._at
        self._skip(nbytes)
        return TensorRef(name, self._path, offset, nbytes, dtype, shape)

    def _count(self, what: str) -> int:
        count = self._number("<I")
        if count > _MOST_VARIABLES:
            self._refuse(f"claims {count} {what}; at most {_MOST_VARIABLES} are read")
        return count

    def _name(self) -> str:
        """Read a text that ends with a zero byte, which its length includes."""
        data = self._take(self._number("<H"))
        try:
            return data.removesuffix(b"\0").decode("ascii")
        except UnicodeDecodeError:
            self._refuse(f"has a name that is not ASCII at byte {self._at - len(data)}")

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _take(self, nbytes: int) -> bytes:
        start = self._at
        self._skip(nbytes)
        return read_at(self._descriptor, nbytes, start, self._path)

    def _skip(self, nbytes: int) -> None:
        if nbytes > self._file_bytes - self._at:
            raise CheckpointError(
                f"{self._path.name} ends at byte {self._file_bytes}; expected {nbytes} bytes at {self._at}",
                hint="the download may be incomplete",
                path=self._path,
            )
        self._at += nbytes

    def _refuse(self, sentence: str) -> NoReturn:
        raise CheckpointError(f"{self._path.name} {sentence}", path=self._path)
