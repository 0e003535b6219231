"""Find the tensors of a weight: floats, or the codes, scales and zero points of its scheme.

    name, shape  ->  WeightAccounts.weight  ->  MatrixRef, which lands all parts in one matrix

Each storage of a scheme is a row of `STORAGES`: the format in memory, and the tensors with their dtypes, shapes and
block types. A format may depend on the dtype of the scales. The tensors in the files decide whether a matrix is
quantised; a quantised one that the config does not describe is refused, because codes alone do not tell their meaning.

Experts may be stacked along the first axis of every part, and gate and up in one tensor; so may q, k and v. `Slice` and
`Rows` say which part of them a matrix is.

Elsewhere: `schemes.py` describes schemes; `native/kernels/transcode.h` lists block types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast, get_args

from argosy.checkpoint.formats import fp8_parts
from argosy.checkpoint.landing import MatrixRef, Piece, Transcode, Transcoded
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.config import Format
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.reading.accounts import FLOAT_FORMATS, TensorAccounts
from argosy.model.reading.mlx_quantization import AS_ITS_TENSORS, scheme_of_tensors
from argosy.model.reading.schemes import Quantization, Scheme

MXFP4_GROUP = 32
# Tensors of quantised checkpoints that do not change weights: they round activations, keys and values.
PASSED_OVER = (
    *(
        f"{of}_{what}"
        for of in ("input", "output", ".q", ".k", ".v", ".kv", ".activation", "_activation", ".act")
        for what in ("scale", "zero_point", "global_scale")
    ),
    ".qscale_act",
)
# The last parts of names of codes, for which a checkpoint has no `weight`.
_CODES = ("weight_packed", "qweight")
_LARGEST_BIAS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a weight.

    names: its possible names, where the weight's own name ends in "weight".
    types: the allowed dtypes, and the block type of each; "" is checked and never read.
    shapes: the allowed shapes; errors name the first.
    is_text: whether it may be shorter than its shape; the block type gets its length.
    """

    names: tuple[str, ...]
    types: Mapping[str, str]
    shapes: tuple[tuple[int, ...], ...]
    is_required: bool = True
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """The parts of a weight, codes first, and its format in memory."""

    format: Format
    parts: tuple[Part, ...]


_FLOATS_16 = {"F16": "f16", "BF16": "bf16"}
E8M0 = ("U8", "F8_E8M0")  # dtypes
_FP8_DTYPES = ("F32", "BF16", "F16", *E8M0)
_FP8_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
_FP4_SCALES = ("weight_scale", "scale")


def _ceil(size: int, step: int) -> int:
    return -(-size // step)


def _grouped(scheme: Scheme, cols: int, scale_dtype: str | None, *, is_signed: bool) -> tuple[str, int] | str:
    """Return the format of integers in groups of columns, and the columns of a group in memory.

    A scale for each row is repeated for groups.
    """
    group = scheme.block[1] or next((size for size in (128, 64, 32) if cols % size == 0), 128)
    if scale_dtype is not None and scale_dtype not in _FLOATS_16:
        return f"scales in {' or '.join(_FLOATS_16)}, found {scale_dtype}"
    if cols % 32:
        return "columns in whole groups of 32"
    kind = "int" if is_signed else "uint"
    order = "" if _is_ordered(scheme) else "_act_order"
    return f"{kind}{scheme.bits}_{group}_{_FLOATS_16[scale_dtype or 'BF16']}{order}", group


def _is_ordered(scheme: Scheme) -> bool:
    """Whether the columns that share a scale are neighbours. A scale of a row is shared by all."""
    return scheme.is_ordered or not scheme.block[1]


def _of(format: str, part: str, *dtypes: str) -> dict[str, str]:
    return dict.fromkeys(dtypes, f"{format}:{part}")


def _pack_quantized(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    named = _grouped(scheme, cols, scale_dtype, is_signed=not scheme.has_zeros)
    if isinstance(named, str):
        return named
    format, group = named
    codes = _of(format, "codes", "I32")
    num_groups, scales, zeros = _ceil(cols, group), "scales", "zeros"
    if not scheme.block[1]:
        num_groups, scales, zeros = 1, "channel_scales", "channel_zeros"
    scale_types = _of(format, scales, *_FLOATS_16)
    if format == "int4_32_bf16" and scales == "scales":  # the older name
        format, codes, scale_types = "int4", {"I32": "int4_quants"}, {"BF16": "int4_scales"}
    parts = [
        Part(("weight_packed",), codes, ((rows, _ceil(cols * scheme.bits, 32)),)),
        Part(("weight_scale",), scale_types, ((rows, num_groups),)),
        Part(("weight_shape",), {"I32": "", "I64": ""}, ((2,),)),
    ]
    if scheme.has_zeros:
        shape = _ceil(rows * scheme.bits, 32), num_groups
        parts.append(Part(("weight_zero_point",), _of(format, zeros, "I32"), (shape,)))
    if not _is_ordered(scheme):
        parts.append(Part(("weight_g_idx",), _of(format, "g_idx", "I32"), ((cols,),)))
    return Stored(cast(Format, format), tuple(parts))


def _int_quantized(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    named = _grouped(scheme, cols, scale_dtype, is_signed=not scheme.has_zeros)
    if isinstance(named, str):
        return named
    format, group = named
    shapes: tuple[tuple[int, ...], ...] = ((rows, _ceil(cols, group)),)
    scales, zeros = "scales", "int8_zeros"
    if not scheme.block[1]:
        shapes, scales, zeros = ((rows, 1), (rows,)), "channel_scales", "int8_channel_zeros"
    parts = [
        Part(("weight",), _of(format, "int8_codes", "I8"), ((rows, cols),)),
        Part(("weight_scale",), _of(format, scales, *_FLOATS_16), shapes),
    ]
    if scheme.has_zeros:
        parts.append(Part(("weight_zero_point",), _of(format, zeros, "I8"), shapes))
    if not _is_ordered(scheme):
        parts.append(Part(("weight_g_idx",), _of(format, "g_idx", "I32"), ((cols,),)))
    return Stored(cast(Format, format), tuple(parts))


def _gptq(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    """Integers in groups of input columns, which are the first axis of every tensor."""
    named = _grouped(scheme, cols, scale_dtype, is_signed=False)
    if isinstance(named, str):
        return named
    format, group = named
    if rows * scheme.bits % 32:
        return f"rows in whole words: {rows} rows of {scheme.bits} bits are not"
    is_awq, num_groups = scheme.storage == "awq", _ceil(cols, group)
    scales, zeros = (
        "scales_by_group",
        {"gptq": "gptq_zeros", "gptq_v2": "gptq_v2_zeros"}.get(scheme.storage, "awq_zeros"),
    )
    order = "g_idx"
    if not scheme.block[1]:
        num_groups, scales, order = 1, "channel_scales", "channel_g_idx"
        zeros = {"gptq": "gptq_channel_zeros", "gptq_v2": "channel_zeros"}.get(scheme.storage, "")
        if not zeros:
            return "groups of 32, 64 or 128"
    words = rows * scheme.bits // 32
    codes = (cols, words) if is_awq else (cols * scheme.bits // 32, rows)
    parts = (
        Part(("qweight",), _of(format, "awq_codes" if is_awq else "gptq_codes", "I32"), (codes,)),
        Part(("scales",), _of(format, scales, *_FLOATS_16), ((num_groups, rows),)),
        Part(("qzeros",), _of(format, zeros, "I32"), ((num_groups, words),)),
        Part(("g_idx",), _of(format, order, "I32"), ((cols,),), is_required=not _is_ordered(scheme)),
    )
    return Stored(cast(Format, format), parts)


def _fp8(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    dtype = scale_dtype or "F32"
    if dtype not in _FP8_DTYPES:
        return f"scales in {', '.join(_FP8_DTYPES)}, found {dtype}"
    height, width = scheme.block[0] or rows, scheme.block[1] or cols
    found = fp8_parts((rows, cols), (height, width), dtype)
    if found is None:
        return "blocks of whole groups of 32 columns"
    format, codes, scales = found
    shapes: tuple[tuple[int, ...], ...] = ((_ceil(rows, height), _ceil(cols, width)),)
    if scheme.block == (0, 0):
        shapes = ((), (1,), (1, 1))
    elif scheme.block == (1, 0):
        shapes = ((rows, 1), (rows,))
    else:
        shapes += ((shapes[0][0], 1, shapes[0][1], 1),)  # modelopt's
    parts = (
        Part(("weight",), {"F8_E4M3": codes}, ((rows, cols),)),
        Part(_FP8_SCALES, {dtype: scales}, shapes),
    )
    return Stored(format, parts)


def _mxfp8(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    if cols % 32:
        return "columns in whole groups of 32"
    parts = (
        Part(("weight",), {"F8_E4M3": "mxfp8_codes"}, ((rows, cols),)),
        Part(("weight_scale",), dict.fromkeys(E8M0, "mxfp8_scales"), ((rows, cols // 32),)),
    )
    return Stored("mxfp8", parts)


def _mxfp4(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    if cols % MXFP4_GROUP:
        return f"columns in whole groups of {MXFP4_GROUP}"
    parts = (
        Part(("weight_packed", "weight"), dict.fromkeys(("U8", "I8"), "mxfp4_quants"), ((rows, cols // 2),)),
        Part(_FP4_SCALES, dict.fromkeys(E8M0, "mxfp4_scales"), ((rows, cols // MXFP4_GROUP),)),
    )
    return Stored("mxfp4", parts)


def _nvfp4(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    if cols % 16:
        return "columns in whole groups of 16"
    factor, block_type = "weight_scale_2", "nvfp4_factor"
    if scheme.storage == "nvfp4-divided":
        factor, block_type = "weight_global_scale", "nvfp4_divisor"
    parts = (
        Part(("weight_packed", "weight"), {"U8": "nvfp4_quants"}, ((rows, cols // 2),)),
        Part(("weight_scale",), {"F8_E4M3": "nvfp4_scales"}, ((rows, cols // 16),)),
        Part((factor,), {"F32": block_type}, ((), (1,))),
    )
    return Stored("nvfp4", parts)


def _mlx_affine(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    bits, group = scheme.bits, scheme.block[1]
    name = _FLOATS_16.get(scales := scale_dtype or "F16")
    if name is None or cols % group:
        return "whole groups, with scales in F16 or BF16"
    format = cast(Format, f"affine{bits}_{group}_{name}")
    parts = (
        Part(("weight",), {"U32": f"{format}:codes"}, ((rows, cols * bits // 32),)),
        Part(("scales",), {scales: f"{format}:scales"}, ((rows, cols // group),)),
        Part(("biases",), {scales: f"{format}:biases"}, ((rows, cols // group),)),
    )
    return Stored(format, parts)


_MLX_FACTOR = "global_scale"  # the largest magnitude of a matrix; not all have one


def _mlx_floats(format: Format, scales: str, largest: str = "", **fields: str) -> Storage:
    """The modes of MLX whose codes and scales are small floats; `largest` is a factor that a matrix may have."""

    def stored(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
        group = scheme.block[1]
        if cols % group:
            return f"whole groups of {group} columns"
        codes = f"{format}_codes" if scheme.bits == 8 else f"{format}_quants"
        parts = [
            Part(("weight",), {"U32": codes}, ((rows, cols * scheme.bits // 32),)),
            Part(("scales",), {"U8": scales}, ((rows, cols // group),)),
        ]
        if largest:
            parts.append(Part((_MLX_FACTOR,), {"F32": largest}, ((), (1,))))
        return Stored(format, tuple(parts))

    return Storage(stored, ("scales",), **fields)


_BNB4_BLOCK = 64  # columns that share a scale
_DOUBLE_BLOCK = 256  # scales that share a factor
_LONGEST_STATE = 4096


def _bnb_4bit(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    """bitsandbytes' nf4 and fp4, which a table in the file tells apart. Blocks go on from row to row."""
    if cols % _BNB4_BLOCK:
        return f"columns in whole blocks of {_BNB4_BLOCK}"
    num_scales = rows * cols // _BNB4_BLOCK
    format: Format = "bnb4_double" if scale_dtype == "U8" else "bnb4"
    states = tuple(f"weight.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4"))
    parts = [
        Part(("weight",), {"U8": f"{format}_codes"}, ((rows * cols // 2, 1),)),
        Part(("weight.quant_map",), {"F32": f"{format}_map"}, ((16,),)),
        Part(states, {"U8": f"{format}_state"}, ((_LONGEST_STATE,),), is_text=True),
    ]
    if format == "bnb4":
        return Stored(format, (*parts, Part(("weight.absmax",), {"F32": "bnb4_scales"}, ((num_scales,),))))
    parts += [
        Part(("weight.absmax",), {"U8": "bnb4_double_absmax"}, ((num_scales,),)),
        Part(
            ("weight.nested_absmax",),
            {"F32": "bnb4_double_factors"},
            ((_ceil(num_scales, _DOUBLE_BLOCK),),),
        ),
        Part(("weight.nested_quant_map",), {"F32": "bnb4_double_nested_map"}, ((256,),)),
    ]
    return Stored(format, tuple(parts))


def _bnb_8bit(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    parts = (
        Part(("weight",), {"I8": "int8_row_codes"}, ((rows, cols),)),
        Part(("SCB",), {"F32": "int8_row_largest"}, ((rows,),)),
        Part(("weight_format",), {"U8": "int8_row_order"}, ((), (1,)), is_required=False),
    )
    return Stored("int8_row", parts)


@dataclass(frozen=True, slots=True)
class Storage:
    """The tensors of a scheme.

    stored: says how a matrix [rows, cols] is stored if its scales have a dtype (None: they are missing), or what is
        supported instead.
    scales: the possible names of the scales.
    with_factor: the storage of matrices that also have MLX's factor.
    """

    stored: Callable[[Scheme, int, int, str | None], Stored | str]
    scales: tuple[str, ...] = ("weight_scale",)
    with_factor: str = ""


STORAGES: Mapping[str, Storage] = {
    "pack-quantized": Storage(_pack_quantized),
    "int-quantized": Storage(_int_quantized),
    "gptq": Storage(_gptq, ("scales",)),
    "gptq_v2": Storage(_gptq, ("scales",)),
    "awq": Storage(_gptq, ("scales",)),
    "fp8": Storage(_fp8, _FP8_SCALES),
    "mxfp8-quantized": Storage(_mxfp8),
    "mxfp4-pack-quantized": Storage(_mxfp4),
    "nvfp4": Storage(_nvfp4),
    "nvfp4-divided": Storage(_nvfp4),
    "bnb-4bit": Storage(_bnb_4bit, ("weight.absmax",)),
    "bnb-8bit": Storage(_bnb_8bit, ("SCB",)),
    "mlx-affine": Storage(_mlx_affine, ("scales",)),
    "mlx-mxfp4": _mlx_floats("mxfp4", "mxfp4_scales"),
    "mlx-mxfp8": _mlx_floats("mxfp8", "mxfp8_scales"),
    "mlx-nvfp4": _mlx_floats("nvfp4", "nvfp4_scales_alone", with_factor="mlx-nvfp4-scaled"),
    "mlx-nvfp4-scaled": _mlx_floats("nvfp4", "nvfp4_scales", "nvfp4_largest"),
}


@lru_cache(256)
def _stored(scheme: Scheme, rows: int, cols: int, scale_dtype: str | None) -> Stored | str:
    if (storage := STORAGES.get(scheme.storage)) is None:
        return ", ".join(STORAGES)
    stored = storage.stored(scheme, rows, cols, scale_dtype)
    if isinstance(stored, Stored) and stored.format not in get_args(Format):
        return "formats that have kernels"
    return stored


@dataclass(frozen=True, slots=True)
class Slice:
    """A matrix in stacked tensors [num_experts, num_matrices * rows, cols]."""

    num_experts: int
    expert: int
    num_matrices: int = 1
    matrix: int = 0

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of all matrices of an expert together."""
        return (self.num_matrices * shape[0], *shape[1:])

    def in_file(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a stacked part, given the part of all matrices of an expert together."""
        return (self.num_experts, *whole)

    def of(self, ref: TensorRef, shapes: tuple[tuple[int, ...], ...]) -> TensorRef | None:
        """Return this matrix's part, which has one of these shapes; None if its bytes are not contiguous."""
        one = ref.at(self.expert)
        if one.shape in shapes:  # also a factor that gate and up share
            return one
        count = self.num_matrices
        shape = next(
            (shape for shape in shapes if shape and one.shape == (count * shape[0], *shape[1:])), None
        )
        if shape is None:
            return None
        nbytes = one.nbytes // count
        return TensorRef(one.name, one.path, one.offset + self.matrix * nbytes, nbytes, one.dtype, shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix whose rows lie among `total` rows of others, from row `first` on."""

    total: int
    first: int
    count: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of all rows."""
        return (self.total, *shape[1:])

    def in_file(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a part, given the part of all rows."""
        return whole

    def of(self, ref: TensorRef, shapes: tuple[tuple[int, ...], ...]) -> TensorRef | None:
        """Return this matrix's part, which has one of these shapes; None if its bytes are not contiguous."""
        if ref.shape in shapes:  # of the whole tensor
            return ref
        shape = next((shape for shape in shapes if shape and ref.shape[1:] == shape[1:]), None)
        if shape is None or ref.shape[0] * self.count != shape[0] * self.total:
            return None
        first, rest = divmod(self.first * shape[0], self.count)
        return None if rest else ref.rows(first, shape[0])


def is_there(name: str, tensors: Mapping[str, TensorRef] | TensorAccounts) -> bool:
    """Whether a weight exists, or its codes do."""
    return name in tensors or any(one in tensors for codes in _CODES for one in _spellings(name, codes))


def _spellings(name: str, part: str) -> tuple[str, ...]:
    """Return the possible names of a weight's part: stacked weights have no "weight" in their names."""
    if name.endswith(".weight"):
        return (name.removesuffix("weight") + part,)
    return tuple(dict.fromkeys((name + part.removeprefix("weight"), f"{name}_{part}")))


def _by_head(shape: tuple[int, ...], num_heads: int) -> tuple[int, ...]:
    return (num_heads, shape[0] // num_heads, *shape[1:]) if num_heads else shape


class WeightAccounts(TensorAccounts):
    """Tensors of safetensors files, as weights."""

    def __init__(
        self, directory: Path, tensors: Mapping[str, TensorRef], quantization: Quantization | None
    ) -> None:
        super().__init__(directory, tensors, FLOAT_FORMATS)
        self._quantization = quantization

    def pass_over_zero_biases(self) -> None:
        """Account for biases of zeros, which AutoGPTQ writes for every module that it quantises."""
        for name in self._tensors:
            if (
                name.endswith(".bias")
                and name not in self._taken
                and name.removesuffix("bias") + "qweight" in self._tensors
                and (ref := self._tensors[name]).nbytes <= _LARGEST_BIAS_BYTES
            ):
                with open_regular(ref.path) as (descriptor, _):
                    if not any(read_at(descriptor, ref.nbytes, ref.offset, ref.path)):
                        self._taken.add(name)

    def weight(
        self, name: str, shape: tuple[int, ...], slice: Slice | Rows | None = None, *, num_heads: int = 0
    ) -> MatrixRef:
        """Take the tensor or tensors of a weight; which of them exist shows how it is stored.

        Args:
            num_heads: the tensors have an axis for heads before that of the rows of one; 0: they have not.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or `quantization_config` contradicts them.
            UnsupportedModel: a tensor has an unsupported dtype, or no kernel reads the scheme.
        """
        if (codes := self.codes_of(name)) is not None and len(shape) == 2:
            return self._coded(name, codes, (shape[0], shape[1]), slice, num_heads)
        if slice is not None:
            ref, format = self.take(name, slice.in_file(slice.whole(shape)))
            part = slice.of(ref, (shape,))
            assert part is not None
        else:
            part, format = self.take(name, _by_head(shape, num_heads))
        rows, cols = shape if len(shape) == 2 else (1, math.prod(shape))
        return MatrixRef.of(part, format, rows, cols)

    def codes_of(self, name: str) -> TensorRef | None:
        """Return the tensor with the codes of a quantised weight; None if it is a float, or missing."""
        ref = self._tensors.get(name)
        if ref is not None:
            return None if ref.dtype in FLOAT_FORMATS or len(ref.shape) < 2 else ref
        spelled = (one for codes in _CODES for one in _spellings(name, codes))
        return next((self._tensors[one] for one in spelled if one in self._tensors), None)

    def scheme_of(self, name: str, codes: TensorRef) -> Scheme:
        """Return the scheme of a weight, whose codes prove that it has one.

        Raises:
            CheckpointError: the config does not describe it.
        """
        said = self._quantization
        scheme = said.scheme_of(name.removesuffix(".weight")) if said is not None else None
        if scheme is None:
            raise CheckpointError(
                f"{codes.path.name}: {quote(codes.name)} is {codes.dtype}, the codes of a quantised weight, but "
                + (
                    "config.json has no quantization_config"
                    if said is None
                    else f"{said.where} says that it is not quantised"
                ),
                hint="config.json may belong to another version of the checkpoint; fetch both again",
                path=codes.path,
                tensor=codes.name,
            )
        return scheme

    def _coded(
        self, name: str, codes: TensorRef, shape: tuple[int, int], slice: Slice | Rows | None, num_heads: int
    ) -> MatrixRef:
        scheme = self.scheme_of(name, codes)
        if scheme.storage == AS_ITS_TENSORS:
            scheme = scheme_of_tensors(codes, self._tensors.get(self._name_of(name, ("scales",))), shape[1])
        stored = self._stored(name, codes, scheme, shape)
        together = stored
        if slice is not None and slice.whole(shape) != shape:
            step = max(scheme.block[0], 32 if scheme.has_zeros else 1)
            # Blocks of bitsandbytes go on from one matrix to the next.
            if shape[0] % step or scheme.storage == "bnb-4bit":
                raise self.unread(
                    codes, shape, scheme, "matrices in separate tensors, because some share scales here"
                )
            rows, cols = slice.whole(shape)
            together = self._stored(name, codes, scheme, (rows, cols))
        pieces: list[tuple[TensorRef, str]] = []
        for part, whole in zip(stored.parts, together.parts, strict=True):
            found = self._name_of(name, part.names)
            if not part.is_required and found not in self:
                continue
            shapes = part.shapes if slice is None else tuple(slice.in_file(shape) for shape in whole.shapes)
            if part.is_text and found in self:
                length = self._tensors[found].nbytes
                shapes = ((length,),) if 0 < length <= _LONGEST_STATE else shapes
            shapes = tuple(_by_head(one, num_heads) for one in shapes)
            ref, block_type = self.take_part(found, part.types, *shapes)
            own = ref if slice is None else slice.of(ref, part.shapes)
            if own is None:
                raise UnsupportedModel(
                    f"{ref.path.name}: {quote(found)} {list(ref.shape)} holds parts of several matrices that cannot be "
                    "separated; supported: matrices in separate tensors",
                    path=ref.path,
                    tensor=found,
                )
            if block_type:
                pieces.append((own, f"{block_type}_1x{own.nbytes}" if part.is_text else block_type))
        return in_parts(stored.format, shape, *pieces)

    def _name_of(self, name: str, parts: tuple[str, ...]) -> str:
        """Return the name of a weight's part that exists, or the first that it could have."""
        if len(parts) == 1 and name.endswith(".weight"):
            return name.removesuffix("weight") + parts[0]
        spelled = [one for part in parts for one in _spellings(name, part)]
        return next((one for one in spelled if one in self._tensors), spelled[0])

    def _stored(self, name: str, codes: TensorRef, scheme: Scheme, shape: tuple[int, int]) -> Stored:
        scales = None
        if (storage := STORAGES.get(scheme.storage)) is not None:
            if storage.with_factor and self._name_of(name, (_MLX_FACTOR,)) in self:
                scheme = replace(scheme, storage=storage.with_factor)
            scales = self._tensors.get(self._name_of(name, storage.scales))
        stored = _stored(scheme, *shape, None if scales is None else scales.dtype)
        if isinstance(stored, str):
            raise self.unread(codes, shape, scheme, stored)
        return stored

    def unread(
        self, codes: TensorRef, shape: tuple[int, int], scheme: Scheme, supported: str
    ) -> UnsupportedModel:
        """Return the error for a weight that no kernel reads as it is stored."""
        return UnsupportedModel(
            f"{codes.path.name}: {quote(codes.name)} holds a matrix {list(shape)} as {scheme}; "
            f"supported: {supported}",
            hint="get a GGUF of the model, or a checkpoint that stores this matrix in a supported way",
            path=codes.path,
            tensor=codes.name,
        )


def in_parts(format: Format, shape: tuple[int, int], *parts: tuple[TensorRef, str]) -> MatrixRef:
    """Make a matrix [rows, cols] of separate tensors, codes first, each with its block type."""
    rows, cols = shape
    first, *others = (
        Piece.of(ref, Transcode(block_type, format, rows, cols), completes=0) for ref, block_type in parts
    )
    assert first.transcode is not None
    return MatrixRef.of(
        parts[0][0], format, rows, cols, Transcoded(first.transcode.block_type, tuple(others))
    )
