"""List the contents of a pack: its units in the order of writing, each with its sources, and the small files.

Elsewhere: `manifest.py` defines the layout; `pack.py` writes the units; `pack_conversion.py` converts matrices.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

from argosy.checkpoint.files import MATRIX_NAMES, ModelFiles
from argosy.checkpoint.formats import is_quantised, matrix_bytes, round_up
from argosy.checkpoint.geometry import expert_shapes, packed_config, packed_format
from argosy.checkpoint.gguf import GgufFile, metadata_only
from argosy.checkpoint.gguf_names import GGUF_METADATA_FILE, MMPROJ_METADATA_FILE
from argosy.checkpoint.landing import Halves, MatrixRef
from argosy.checkpoint.manifest import (
    DENSE_FILE,
    ENCODERS_FILE,
    FILE_ALIGNMENT,
    ExpertFormats,
    lay_out_dense,
    lay_out_experts,
)
from argosy.checkpoint.pooling import MODULES_FILE, POOLING_FILE, pooling_config
from argosy.checkpoint.safetensors import DTYPE_BITS, TensorRef
from argosy.checkpoint.safetensors_write import safetensors_header
from argosy.checkpoint.untrusted_file import JSON_LIMIT_BYTES, open_regular, quote, read_at
from argosy.config import Format, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel

# Formats in which models are released: their weights are exact.
REQUANTISED: tuple[Format, ...] = ("f8", "f8_row", "f8_32", "mxfp8", "int4", "mxfp4", "nvfp4")

_NOTABLY_SMALLER = 0.9

_COPIED_NAMES = (
    "config.json", "hf_quant_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "params.json", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "merges.txt", "tiktoken.model", "hy.tiktoken", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", MODULES_FILE, GGUF_METADATA_FILE, MMPROJ_METADATA_FILE,
)  # fmt: skip
_COPIED_PREFIXES = ("LICENSE", "LICENCE", "NOTICE")


class Source(NamedTuple):
    """One of the matrices that a tensor becomes."""

    ref: MatrixRef
    number: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """Data that is written and journalled together: one dense matrix, one expert with its three matrices, one tensor of
    an encoder, or the header of the encoders' file.
    """

    file: str
    offset: int
    nbytes: int
    end: int  # end of the unit, padding included
    parts: tuple[tuple[Source, Format, int], ...] = ()  # source, format to write, offset inside
    copied: TensorRef | bytes = b""  # copied unchanged if there are no parts

    @property
    def paths(self) -> set[Path]:
        """The source files of the unit."""
        if isinstance(self.copied, TensorRef):
            return {self.copied.path}
        return {piece.path for source, _, _ in self.parts for piece in source.ref.pieces}


@dataclass(frozen=True)
class Contents:
    """Everything that a pack holds, except small files.

    config: describes the pack's tensors.
    units: in the order of writing: dense matrices, experts, encoders.
    """

    config: ModelConfig
    dense: list[MatrixRef]
    units: list[Unit]
    num_encoder_units: int

    @property
    def nbytes(self) -> int:
        return sum(unit.end - unit.offset for unit in self.units)

    @property
    def experts(self) -> slice:
        """The units that are experts."""
        return slice(len(self.dense), len(self.units) - self.num_encoder_units)

    def expert_formats(self) -> dict[int, ExpertFormats]:
        """The formats of an expert's matrices by layer."""
        first_of_layers = self.units[self.experts][:: self.config.num_experts or 1]
        return {
            layer: tuple(format for _, format, _ in unit.parts)
            for layer, unit in zip(self.config.moe_layers, first_of_layers, strict=True)
        }

    @property
    def encoder_header(self) -> bytes | None:
        """The header of the encoders' file, which fixes the place of each tensor; None if there is no such file."""
        if not self.num_encoder_units:
            return None
        header = self.units[-self.num_encoder_units].copied
        assert isinstance(header, bytes)
        return header


def contents_of(files: ModelFiles, format: str, num_shares: int, encoders: list[TensorRef]) -> Contents:
    """List the contents of a pack of `files`; `encoders` are the tensors of encoders to include."""
    config = config_of_pack(files, format)
    units = []

    def dense_format(name: str) -> Format:
        return (
            _dense_source(files, name).ref.format
            if format == "source"
            else packed_format(name, format, config)
        )

    dense = lay_out_dense(config, dense_format, Path(DENSE_FILE))
    for target in dense:
        source = _dense_source(files, target.name)
        end = round_up(target.offset + target.nbytes, FILE_ALIGNMENT)
        units.append(Unit(DENSE_FILE, target.offset, target.nbytes, end, ((source, target.format, 0),)))

    def expert_formats(layer: int) -> ExpertFormats:
        if format == "source":
            return files.expert_formats(layer)
        return (cast(Format, format),) * len(expert_shapes(config, layer))

    for (layer, expert), file, start, layout in lay_out_experts(
        config, expert_formats, num_shares=num_shares
    ):
        record = files.experts[layer, expert]
        parts = tuple(
            (
                Source(record.matrix(name, f"{name} of expert {expert} in layer {layer}")),
                matrix.format,
                matrix.offset,
            )
            for name, matrix in zip(MATRIX_NAMES[-len(layout.matrices) :], layout.matrices, strict=True)
        )
        units.append(Unit(file, start, layout.nbytes, start + layout.stride, parts))
    encoder_units = _encoder_units(encoders)
    return Contents(config, dense, [*units, *encoder_units], len(encoder_units))


def config_of_pack(files: ModelFiles, format: str) -> ModelConfig:
    """Return the config that describes the pack's tensors: the source's, unless kv_up is written in two halves."""
    if format != "source":
        return packed_config(files.config)
    stored = [ref for name, ref in files.dense.items() if name.endswith(".kv_up")]
    keeps_bits = all(
        shape.format == ref.format for ref in stored for shape in ref.landing.shapes("", ref).values()
    )
    return packed_config(files.config) if keeps_bits else files.config


def _encoder_units(tensors: list[TensorRef]) -> list[Unit]:
    """Return the units of a safetensors file with these tensors; empty if there are no tensors."""
    if not tensors:
        return []
    header = safetensors_header((ref.name, *_in_safetensors(ref)) for ref in tensors)
    units = [Unit(ENCODERS_FILE, 0, len(header), len(header), copied=header)]
    for ref in tensors:
        at = units[-1].end
        units.append(Unit(ENCODERS_FILE, at, ref.nbytes, at + ref.nbytes, copied=ref))
    return units


def _in_safetensors(ref: TensorRef) -> tuple[str, tuple[int, ...]]:
    """Return type and shape of a tensor: blocks of a GGUF file, for which safetensors lacks a type, are
    rows of bytes.
    """
    if ref.dtype in DTYPE_BITS:
        return ref.dtype, ref.shape
    *rows, _ = ref.shape
    return "U8", (*rows, ref.nbytes // math.prod(rows))


def _dense_source(files: ModelFiles, name: str) -> Source:
    """Find the source of a dense tensor. k_up and v_up come from kv_up if the source lacks them."""
    if (ref := files.dense.get(name)) is None:
        layer, _, last = name.rpartition(".")
        ref = files.dense[f"{layer}.kv_up"]
        return Source(ref, list(ref.landing.shapes("kv_up", ref)).index(last))
    return Source(replace(ref, landing=ref.landing.whole) if isinstance(ref.landing, Halves) else ref)


def quantised_formats(files: ModelFiles) -> str:
    """Return the quantised formats that rule out requantising: of the experts, otherwise of the dense
    matrices; or ''.
    """
    experts = {format for layer in files.config.moe_layers for format in files.expert_formats(layer)}
    for formats in (experts, {ref.format for ref in files.dense.values()}):
        if quantised := sorted(
            format for format in formats if is_quantised(format) and format not in REQUANTISED
        ):
            return "+".join(quantised)
    return ""


def smaller_formats(files: ModelFiles) -> list[Format]:
    """Return the formats of packs whose experts, or dense matrices if there are none, are notably smaller."""
    if files.tables or quantised_formats(files):
        return []
    formats = {format for layer in files.config.moe_layers for format in files.expert_formats(layer)}
    formats = formats or {ref.format for ref in files.dense.values() if ref.rows > 1}
    now = max(map(_sample_bytes, formats))
    offered: tuple[Format, ...] = ("q8", "q4")
    return [format for format in offered if _sample_bytes(format) <= _NOTABLY_SMALLER * now]


def _sample_bytes(format: Format) -> int:
    return matrix_bytes(format, 1024, 1024)


def goes_with_weights(name: str) -> bool:
    """Whether a file belongs to a model's config, tokenizer, processors or licence."""
    return name in _COPIED_NAMES or is_licence(name)


def is_licence(name: str) -> bool:
    return name.startswith(_COPIED_PREFIXES)


def files_to_copy(path: Path) -> list[Path]:
    """Return a model's files of config, tokenizer, processors and licence; for a GGUF only the licence."""
    directory = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in directory.iterdir())
    if path.is_dir():
        chosen = [name for name in names if goes_with_weights(name)]
    else:
        chosen = [name for name in names if is_licence(name)]
    paths = [directory / name for name in chosen if (directory / name).is_file()]
    for found in paths:
        try:
            found.name.encode()
        except UnicodeEncodeError:  # the manifest, which is JSON, would be unreadable
            raise CheckpointError(
                f"{quote(found.name)}: its name is not UTF-8 text", hint="rename it", path=found
            ) from None
        if found.stat().st_size > JSON_LIMIT_BYTES:
            raise CheckpointError(
                f"{found.name} is {found.stat().st_size} bytes long; at most {JSON_LIMIT_BYTES} are read"
            )
    return paths


def files_to_make(files: ModelFiles, *, has_encoders: bool) -> dict[str, bytes]:
    """Make the files that are not plain copies: the metadata of a GGUF and of its vision tower, and a
    pooling module.
    """
    if files.path.is_dir():
        return _pooling_file(files.path)
    made = {GGUF_METADATA_FILE: metadata_only(files.path)}
    if has_encoders and isinstance(files.mmproj, GgufFile):
        made[MMPROJ_METADATA_FILE] = metadata_only(files.mmproj.path)
    return made


def _pooling_file(directory: Path) -> dict[str, bytes]:
    """Find the configuration of an embedding model's pooling module, which has its own directory in the checkpoint."""
    # Opening the pack reports the fault, from the copied list of modules.
    with suppress(UnsupportedModel, CheckpointError):
        if (path := pooling_config(directory)) is not None:
            with open_regular(path) as (descriptor, size):
                return {POOLING_FILE: read_at(descriptor, min(size, JSON_LIMIT_BYTES), 0, path)}
    return {}
