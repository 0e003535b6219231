"""Account for every tensor of a checkpoint: each is taken once by name, and an unclaimed tensor is refused.

Elsewhere: `layout.py` (safetensors) and `gguf_layout.py` know names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from argosy.checkpoint.files import DraftFiles, ExpertRecords, require_one_format_a_layer
from argosy.checkpoint.geometry import draft_shapes
from argosy.checkpoint.landing import Indices, MatrixRef
from argosy.checkpoint.safetensors import TensorRef, Tensors
from argosy.checkpoint.untrusted_file import quote
from argosy.config import Format, ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel

# The safetensors dtypes that kernels read directly; F8_E4M3 is not among them, because it needs a scale.
FLOAT_FORMATS: Mapping[str, Format] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

_Format = TypeVar("_Format", Format, str, None)


class Taken:
    """The names of tensors that were taken: a byte for each tensor.

    Attributes:
        last: the names that were added one by one, until someone clears it.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._is_taken = bytearray(len(tensors))
        self.last: list[str] = []

    def add(self, name: str) -> None:
        self._is_taken[self._tensors.rows[name]] = 1
        self.last.append(name)

    def add_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._is_taken[row] = 1

    def __contains__(self, name: str) -> bool:
        return bool(self._is_taken[self._tensors.rows[name]])


class TensorAccounts:
    """Takes tensors by name, and knows in the end which ones were not taken.

    Args:
        path: the directory or file that contains them.
        formats: the types that kernels read, and the format of each in memory.
        hint: advice in the error about an unsupported type.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorRef],
        formats: Mapping[str, Format],
        hint: str | None = None,
    ) -> None:
        self.path = path
        self._tensors = Tensors.of(tensors)
        self._formats = formats
        self._hint = hint
        self._taken = Taken(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shapes: tuple[int, ...]) -> tuple[TensorRef, Format]:
        """Take the tensor `name`, which must have one of the expected shapes; return it and its format.

        Some files store a vector with axes of length one more.

        Raises:
            CheckpointError: the tensor is missing, or has another shape.
            UnsupportedModel: no kernel reads its type.
        """
        ref = self._tensors.get(name)
        if ref is not None and any(_is_alike(ref.shape, shape) for shape in shapes):
            shapes = (ref.shape,)
        return self._take(name, shapes, self._formats)

    def take_rows(
        self, name: str, shapes: Sequence[tuple[int, ...]], number: int
    ) -> tuple[TensorRef, Format]:
        """Take one of the matrices, or vectors, that the tensor `name` holds one after another.

        Args:
            shapes: those of all of them.
            number: which of them.

        Raises:
            The same errors as `take`.
        """
        rows = [shape[0] for shape in shapes]
        ref, format = self.take(name, (sum(rows), *shapes[0][1:]))
        return ref.rows(sum(rows[:number]), rows[number]), format

    def take_any(self, name: str) -> TensorRef:
        """Take an existing tensor of any type and shape, which the caller checks."""
        self._taken.add(name)
        return self._tensors[name]

    def take_bytes(self, name: str, *shapes: tuple[int, ...]) -> TensorRef:
        """Take a tensor of bytes that the layout knows how to read."""
        return self._take(name, shapes, {"U8": None})[0]

    def take_part(
        self, name: str, types: Mapping[str, str], *shapes: tuple[int, ...]
    ) -> tuple[TensorRef, str]:
        """Take codes or scales; `types` maps the allowed dtypes to block types."""
        return self._take(name, shapes, types)

    def _take(
        self, name: str, shapes: tuple[tuple[int, ...], ...], formats: Mapping[str, _Format]
    ) -> tuple[TensorRef, _Format]:
        ref = self._tensors.get(name)
        if ref is None:
            raise CheckpointError(
                f"{name} is missing from the {len(self._tensors)} tensors in {self.path}",
                hint="the config may be that of another model, or the download incomplete",
                path=self.path,
                tensor=name,
            )
        if ref.shape not in shapes:
            raise CheckpointError(
                f"{ref.path.name}: {name} is {quote(list(ref.shape))}, expected {list(shapes[0])}",
                path=ref.path,
                tensor=name,
                found=ref.shape,
                expected=shapes[0],
            )
        if ref.dtype not in formats:
            raise UnsupportedModel(
                f"{ref.path.name}: {name} is {ref.dtype}; supported: {', '.join(formats)}",
                hint=self._hint,
                path=ref.path,
                tensor=name,
                key="dtype",
                value=ref.dtype,
                supported=list(formats),
            )
        self._taken.add(name)
        return ref, formats[ref.dtype]

    def indices(self, name: str, shape: tuple[int, int], count: int) -> MatrixRef:
        """Take a table of whole numbers from 0 to `count` - 1, as a float32 matrix."""
        ref, dtype = self.take_part(name, {"I32": "<i4", "I64": "<i8"}, shape)
        return MatrixRef.of(ref, "f32", *shape, Indices(dtype, count))

    def pass_over(self, ends: tuple[str, ...]) -> None:
        """Account for tensors that are not needed, whose names have one of these ends."""
        for name in self._tensors:
            if name.endswith(ends):
                self._taken.add(name)

    def refuse_extra(
        self, config: ModelConfig, is_passed_over: Callable[[str], object], described_by: str
    ) -> dict[str, TensorRef]:
        """Refuse tensors that were not taken. Return tensors that are known to be irrelevant to the text model.

        Args:
            is_passed_over: recognises the exceptions by name: constants that writers leave behind, vision towers.
            described_by: the source of the model's description, such as "this config.json".

        Raises:
            CheckpointError: names the first tensor that was not taken, and how many more there are.
        """
        others = {name: self._tensors[name] for name in self._tensors if name not in self._taken}
        extra = [name for name in others if not is_passed_over(name)]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            ref = self._tensors[extra[0]]
            raise CheckpointError(
                f"{ref.path.name}: {quote(extra[0])} {quote(list(ref.shape))}{more}: a {config.family} model with "
                f"{described_by} has no such tensor",
                path=ref.path,
                tensor=extra[0],
                extra=extra,
            )
        return others


def _is_alike(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether they are equal but for axes of length one in a file's vector or matrix."""
    if len(found) <= len(expected) or len(expected) > 2:
        return found == expected
    return [size for size in found if size > 1] == [size for size in expected if size > 1]


def read_draft(
    config: ModelConfig,
    path: Path,
    dense_of: Callable[[ModelConfig, str, tuple[int, ...]], MatrixRef],
    experts_of: Callable[[ModelConfig], ExpertRecords],
) -> DraftFiles | ArgosyError:
    """Read the first layer for multi-token prediction. A model with a damaged one runs without it.

    Args:
        path: the checkpoint, for errors.
        dense_of: takes the dense tensor with this canonical name and shape.
        experts_of: takes the experts of the last layer.

    Returns:
        The layer, or why it cannot be used.
    """
    alone = config.draft_only
    try:
        dense = {name: dense_of(alone, name, shape) for name, shape in draft_shapes(alone)}
        experts = experts_of(alone)
        require_one_format_a_layer(experts, path)
    except (CheckpointError, UnsupportedModel) as error:
        return error
    return DraftFiles(alone.layers[-1], dense, experts)
