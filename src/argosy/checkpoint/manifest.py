"""The packed form of a model: its layout on disk, its manifest, opening and verifying it.

    DIR/argosy.json           the manifest, written last: formats, a checksum of every record, BLAKE3 of every file
    DIR/dense.bin             dense matrices, each at a multiple of 4096
    DIR/experts.bin           one record per routed expert, at multiples of the stride: gate, up, down, one read
    DIR/experts-1-of-4.bin    and so on instead, if the pack is divided for workers: one file for each share
    DIR/encoders.safetensors  tensors of the encoders for pictures and sound, unchanged, if the model has any
    DIR/config.json           and the files of the tokenizer and the processors of pictures and sound: copies
    DIR/metadata.gguf         instead of these copies if the pack was made from a GGUF: its metadata, without tensors

Records follow each other, layer by layer and expert by expert, at multiples of 4096, the block size that unbuffered
reads need. The same holds in each file of a divided pack (`shards.py`). Inside a record each matrix starts at a
multiple of 64. All records of a layer have the same layout; if formats differ between layers, the manifest lists the
formats of gate, up and down for each layer with experts. A directory without a manifest is not a pack, so an
unfinished pack never opens. The manifest is checked like any other file: sizes and shapes must follow from the config,
ranges must lie inside the files, and its own BLAKE3 must match.

A worker that runs only some shards may have a part of the directory: the manifest, config.json, the files of these
shards, and dense.bin if experts have biases.

Elsewhere: `pack.py` writes packs; the code that reads a record verifies its checksum.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import blake3
import numpy as np

from argosy import _native
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord, ExpertRecords, ModelFiles
from argosy.checkpoint.formats import matrix_bytes, round_up
from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.checkpoint.landing import MatrixRef, Piece
from argosy.checkpoint.safetensors import TensorRef, read_header
from argosy.checkpoint.shards import ALL_SHARDS, NUM_SHARDS, shard_of, shards_of_share
from argosy.checkpoint.untrusted_file import kind_of, open_regular, quote, read_object
from argosy.config import MEASURED_FORMATS, Format, ModelConfig
from argosy.errors import CheckpointError, CorruptRecord

MANIFEST_FILE = "argosy.json"
DENSE_FILE = "dense.bin"
EXPERTS_FILE = "experts.bin"
ENCODERS_FILE = "encoders.safetensors"
PARTIAL_SUFFIX = ".partial"
PACK_VERSION = 5

FILE_ALIGNMENT = 4096
MATRIX_ALIGNMENT = _native.MATRIX_ALIGNMENT
STORED_FORMATS: tuple[Format, ...] = get_args(Format)

Progress = Callable[[str, float], None]  # the current task, and the finished share of it


def expert_file(share: int, num_shares: int) -> str:
    """Return the name of the file with the experts of a share, 1 to `num_shares`."""
    return EXPERTS_FILE if num_shares == 1 else f"experts-{share}-of-{num_shares}.bin"


ExpertFormats = tuple[Format, ...]  # of an expert's matrices


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The places of an expert's matrices in its record, the same for every expert of a layer."""

    matrices: tuple[ExpertMatrix, ...]
    nbytes: int  # without the padding at the end
    stride: int  # from one record to the next


def record_layout(config: ModelConfig, layer: int, formats: ExpertFormats) -> RecordLayout:
    """Compute the record layout of a layer's experts, given the formats of their matrices."""
    matrices = []
    at = 0
    for format, (rows, cols) in zip(formats, expert_shapes(config, layer), strict=True):
        at = round_up(at, MATRIX_ALIGNMENT)
        matrices.append(ExpertMatrix(0, at, format, rows, cols))
        at += matrix_bytes(format, rows, cols)
    return RecordLayout(tuple(matrices), at, round_up(at, FILE_ALIGNMENT))


def lay_out_experts(
    config: ModelConfig, formats_of: Callable[[int], ExpertFormats], *, num_shares: int
) -> Iterator[tuple[tuple[int, int], str, int, RecordLayout]]:
    """Yield ((layer, expert), file, offset, layout) of every record of a pack, in order."""
    ends = [0] * num_shares
    for layer in config.moe_layers:
        layout = record_layout(config, layer, formats_of(layer))
        for expert in range(config.num_experts):
            share = shard_of(layer, expert) % num_shares
            yield (layer, expert), expert_file(share + 1, num_shares), ends[share], layout
            ends[share] += layout.stride


def lay_out_dense(config: ModelConfig, format_of: Callable[[str], Format], path: Path) -> list[MatrixRef]:
    """Return the dense matrices of a pack, one after another in `path`."""
    refs = []
    at = 0
    for name, shape in dense_shapes(config):
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        format = format_of(name)
        nbytes = matrix_bytes(format, rows, cols)
        refs.append(MatrixRef(name, path, at, nbytes, format, rows, cols))
        at = round_up(at + nbytes, FILE_ALIGNMENT)
    return refs


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `argosy.json`."""

    format: str  # as requested: bf16, q8, q4, or source
    config: ModelConfig
    dense_formats: Mapping[str, Format]
    dense_checksums: Mapping[str, int]
    expert_formats: Mapping[int, ExpertFormats]  # by layer
    num_shares: int  # number of files of experts
    expert_checksums: list[int]  # in record order
    encoder_checksums: Mapping[str, int]  # by tensor; empty if the pack has no encoders
    files: Mapping[str, tuple[int, str]]  # name -> bytes, BLAKE3

    def to_bytes(self) -> bytes:
        """Return the contents of the file. Equal manifests give equal bytes."""
        contents: dict[str, object] = {
            "format": self.format,
            "config": asdict(self.config),
            "dense": {
                name: {"format": format, "crc32c_wide": self.dense_checksums[name]}
                for name, format in self.dense_formats.items()
            },
            "experts": {"format": self._formats_to_json(), "crc32c_wide": self.expert_checksums},
            "files": {
                name: {"nbytes": nbytes, "blake3": digest} for name, (nbytes, digest) in self.files.items()
            },
        }
        if self.num_shares > 1:
            contents["num_shares"] = self.num_shares
        if self.encoder_checksums:
            contents["encoders"] = {"crc32c_wide": self.encoder_checksums}
        manifest = {"argosy_pack": PACK_VERSION, "blake3": _digest_of(contents), "contents": contents}
        return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()

    def _formats_to_json(self) -> object:
        """Return one format if all matrices of all experts share it; otherwise those of each layer with experts."""
        formats = {format for each in self.expert_formats.values() for format in each}
        if len(formats) == 1:
            return formats.pop()
        return [list(self.expert_formats[layer]) for layer in self.config.moe_layers]


def read_manifest(directory: Path) -> Manifest:
    """Read `argosy.json` and prove that it is intact.

    Raises:
        CheckpointError: the file is missing, damaged, malformed or of another version.
    """
    path = directory / MANIFEST_FILE
    raw = read_object(path)
    if raw.get("argosy_pack") != PACK_VERSION:
        raise CheckpointError(
            f"{MANIFEST_FILE} has version {quote(raw.get('argosy_pack'))}; this Argosy reads version {PACK_VERSION}",
            hint="pack the source again",
            path=path,
        )
    reader = _Strict(path)
    reader.keys(raw, "the manifest", "argosy_pack", "blake3", "contents")
    contents = reader.mapping(raw["contents"], "contents")
    if raw["blake3"] != _digest_of(contents):
        raise CheckpointError(
            f"{MANIFEST_FILE} does not match its own BLAKE3: it was changed or damaged", path=path
        )
    has_encoders = "encoders" in contents
    optional = [key for key in ("encoders", "num_shares") if key in contents]
    reader.keys(contents, "contents", "format", "config", "dense", "experts", "files", *optional)
    num_shares = contents.get("num_shares", 1)
    if type(num_shares) is not int or not 1 <= num_shares <= NUM_SHARDS:
        raise reader.wrong("num_shares", num_shares, f"a whole number from 1 to {NUM_SHARDS}")
    dense_formats: dict[str, Format] = {}
    dense_checksums: dict[str, int] = {}
    for name, entry in reader.mapping(contents["dense"], "dense").items():
        tensor = reader.keys(reader.mapping(entry, name), name, "format", "crc32c_wide")
        dense_formats[name] = reader.format(tensor["format"], name)
        dense_checksums[name] = reader.checksum(tensor["crc32c_wide"], name)
    experts = reader.keys(reader.mapping(contents["experts"], "experts"), "experts", "format", "crc32c_wide")
    checksums = experts["crc32c_wide"]
    if not isinstance(checksums, list):
        raise reader.wrong("experts.crc32c_wide", checksums, "a list")
    encoder_checksums: dict[str, int] = {}
    if has_encoders:
        encoders = reader.keys(reader.mapping(contents["encoders"], "encoders"), "encoders", "crc32c_wide")
        for name, value in reader.mapping(encoders["crc32c_wide"], "encoders.crc32c_wide").items():
            encoder_checksums[name] = reader.checksum(value, name)
    files: dict[str, tuple[int, str]] = {}
    for name, entry in reader.mapping(contents["files"], "files").items():
        file = reader.keys(reader.mapping(entry, name), name, "nbytes", "blake3")
        if "/" in name or name.startswith("."):
            raise reader.wrong("files", name, "plain file names")
        files[name] = reader.count(file["nbytes"], name), str(file["blake3"])
    config = cast(ModelConfig, _from_json(ModelConfig, contents["config"], "config", reader))
    if not config.layers or bool(config.moe_layers) != bool(config.num_experts):
        raise reader.wrong("config.layers", contents["config"]["layers"], "layers with routed experts")
    return Manifest(
        format=str(contents["format"]),
        config=config,
        dense_formats=dense_formats,
        dense_checksums=dense_checksums,
        expert_formats=reader.expert_formats(experts["format"], config),
        num_shares=num_shares,
        expert_checksums=[reader.checksum(value, "experts.crc32c_wide") for value in checksums],
        encoder_checksums=encoder_checksums,
        files=files,
    )


def open_pack(directory: str | Path, *, shards: int = ALL_SHARDS) -> ModelFiles | None:
    """Open the pack in `directory`; return None if it is not a pack.

    Args:
        shards: the shards whose experts will be read. Files that these shards do not need may be missing.

    Raises:
        CheckpointError: the pack is unfinished, or its manifest and files do not match.
    """
    directory = Path(directory)
    if directory.name.endswith(PARTIAL_SUFFIX):
        raise CheckpointError(
            f"{directory} is an unfinished pack",
            hint=f"`argosy pack SRC {directory.name.removesuffix(PARTIAL_SUFFIX)}` continues it",
            path=directory,
        )
    if not (directory / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(directory)
    config = manifest.config
    _check_files(directory, manifest, shards)
    expected = [name for name, _ in dense_shapes(config)]
    if sorted(expected) != sorted(manifest.dense_formats):
        odd = sorted(set(expected) ^ set(manifest.dense_formats))[0]
        fault = "does not have" if odd in expected else "has an unexpected"
        raise CheckpointError(f"{MANIFEST_FILE} {fault} tensor {quote(odd)}", path=directory, tensor=odd)
    num_records = len(config.moe_layers) * config.num_experts  # checked before laying out that many records
    if len(manifest.expert_checksums) != num_records:
        raise CheckpointError(
            f"{MANIFEST_FILE} has checksums for {len(manifest.expert_checksums)} experts, "
            f"expected {num_records}",
            path=directory,
        )
    dense = lay_out_dense(config, lambda name: manifest.dense_formats[name], directory / DENSE_FILE)
    records = list(
        lay_out_experts(config, manifest.expert_formats.__getitem__, num_shares=manifest.num_shares)
    )
    ends = dict.fromkeys(_expert_files(manifest), 0)
    ends |= {
        name: offset + layout.stride for _, name, offset, layout in records
    }  # the last record of each file decides
    ends[DENSE_FILE] = round_up(dense[-1].offset + dense[-1].nbytes, FILE_ALIGNMENT)
    for name, needed in ends.items():
        if manifest.files[name][0] != needed:
            raise CheckpointError(
                f"{name} has {manifest.files[name][0]} bytes, expected {needed}", path=directory / name
            )
    with_checksums = {ref.name: replace(ref, checksum=manifest.dense_checksums[ref.name]) for ref in dense}
    paths = {name: directory / name for name in ends}
    experts = ExpertRecords(
        (key, ExpertRecord.laid_out((Piece(paths[name], offset, layout.nbytes, checksum),), layout.matrices))
        for (key, name, offset, layout), checksum in zip(records, manifest.expert_checksums, strict=True)
    )
    encoders = _open_encoders(directory, manifest)
    return ModelFiles(directory, config, with_checksums, experts, is_packed=True, others=encoders)


def _open_encoders(directory: Path, manifest: Manifest) -> dict[str, TensorRef]:
    """Return the tensors of encoders by name; {} if the pack has none."""
    path = directory / ENCODERS_FILE
    if ENCODERS_FILE in manifest.files and not path.exists():  # a worker's partial copy
        return {}
    refs = read_header(path) if ENCODERS_FILE in manifest.files else {}
    if odd := sorted(refs.keys() ^ manifest.encoder_checksums.keys()):
        has_it, lacks_it = (
            (ENCODERS_FILE, MANIFEST_FILE) if odd[0] in refs else (MANIFEST_FILE, ENCODERS_FILE)
        )
        raise CheckpointError(
            f"{has_it} has tensor {quote(odd[0])}, but {lacks_it} does not", path=directory, tensor=odd[0]
        )
    return {name: replace(ref, checksum=manifest.encoder_checksums[name]) for name, ref in refs.items()}


def _expert_files(manifest: Manifest) -> list[str]:
    return [expert_file(share, manifest.num_shares) for share in range(1, manifest.num_shares + 1)]


def _check_files(directory: Path, manifest: Manifest, shards: int) -> None:
    """Compare sizes with the manifest. Files that `shards` do not need may be missing: see `open_pack`."""
    expert_files = _expert_files(manifest)
    for required in (DENSE_FILE, *expert_files):
        if required not in manifest.files:
            raise CheckpointError(f"{MANIFEST_FILE} does not list {required}", path=directory)
    needed = {
        name
        for share, name in enumerate(expert_files, 1)
        if shards & shards_of_share(share, manifest.num_shares)
    }
    if any(".expert_" in name for name in manifest.dense_formats):  # biases of experts
        needed.add(DENSE_FILE)
    for name, (nbytes, _) in manifest.files.items():
        if shards != ALL_SHARDS and name not in needed and not (directory / name).exists():
            continue
        with open_regular(directory / name) as (_, found):
            if found != nbytes:
                raise CheckpointError(
                    f"{name} has {found} bytes; {MANIFEST_FILE} says {nbytes}", path=directory / name
                )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_pack` read."""

    directory: Path
    num_files: int
    nbytes: int


def verify_pack(directory: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Read a pack from end to end and compare each file with its BLAKE3.

    Raises:
        CheckpointError: `directory` is not a pack, or a file has changed.
        CorruptRecord: a dense tensor or an expert has changed; the error names it.
    """
    directory = Path(directory)
    model = open_pack(directory)
    if model is None:
        raise CheckpointError(f"{directory} is not a pack: it has no {MANIFEST_FILE}", path=directory)
    files = read_manifest(directory).files
    total = sum(nbytes for nbytes, _ in files.values())
    done = 0
    for name, (_, expected) in files.items():
        hasher = blake3.blake3()
        with (directory / name).open("rb") as file:
            while chunk := file.read(8 << 20):
                hasher.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(f"verifying {name}", done / total)
        if hasher.hexdigest() != expected:
            raise _locate_damage(model, directory / name)
    return VerifyReport(directory, len(files), total)


def _locate_damage(model: ModelFiles, path: Path) -> CheckpointError:
    """Find the error that names the tensor or expert whose bytes changed."""
    if path.name in (DENSE_FILE, ENCODERS_FILE):
        for ref in (model.dense if path.name == DENSE_FILE else model.others).values():
            if checksum_of(path, ref.offset, ref.nbytes) != ref.checksum:
                return CorruptRecord(
                    f"{path.name}: {ref.name} changed since the pack was written", path=path, tensor=ref.name
                )
    for (layer, expert), record in model.experts.items():
        piece = record.pieces[0]
        if piece.path == path and checksum_of(path, piece.offset, piece.nbytes) != piece.checksum:
            return CorruptRecord(
                f"{path.name}: expert {expert} of layer {layer} changed since the pack was written",
                path=path,
                layer=layer,
                expert=expert,
            )
    return CheckpointError(f"{path.name} changed since the pack was written: its BLAKE3 differs", path=path)


def checksum_of(path: Path, offset: int, nbytes: int) -> int:
    """Return crc32c_wide of a range of a file."""
    from argosy import _native  # imported here because opening a pack does not need it

    if nbytes == 0:
        return int(_native.crc32c_wide(np.zeros(0, np.uint8)))
    return int(_native.crc32c_wide(np.memmap(path, np.uint8, "r", offset, (nbytes,))))


def _digest_of(contents: Mapping[str, object]) -> str:
    return blake3.blake3(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Strict:
    """Checks values from a manifest; each failure is a one-sentence error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, where: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {quote(where)} is {quote(value)}, {kind_of(value)}; expected {expected}",
            path=self.path,
        )

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(where, value, "an object")
        return value

    def keys(self, value: dict[str, Any], where: str, *expected: str) -> dict[str, Any]:
        if value.keys() != set(expected):
            raise self.wrong(where, sorted(value), f"the keys {', '.join(expected)}")
        return value

    def count(self, value: object, where: str) -> int:
        if type(value) is not int or not 0 <= value < 2**63:
            raise self.wrong(where, value, "a whole number from 0 to 2^63 - 1")
        return value

    def checksum(self, value: object, where: str) -> int:
        if type(value) is not int or not 0 <= value < 2**32:
            raise self.wrong(where, value, "a 32-bit checksum")
        return value

    def format(self, value: object, where: str) -> Format:
        if value not in STORED_FORMATS:
            raise self.wrong(
                where,
                value,
                f"one of {', '.join(MEASURED_FORMATS)}, or a grouped format, such as uint4_128_f16",
            )
        return value

    def expert_formats(self, value: object, config: ModelConfig) -> dict[int, ExpertFormats]:
        """Read the formats of an expert's matrices in each layer with experts, from one format for all or a list."""
        layers, count = config.moe_layers, 3 if config.activation.has_gate else 2
        if not isinstance(value, list):
            format = self.format(value, "experts.format")
            return dict.fromkeys(layers, (format,) * count)
        if len(value) != len(layers) or not all(
            isinstance(each, list) and len(each) == count for each in value
        ):
            expected = f"{count} formats for each of {len(layers)} layers"
            raise self.wrong("experts.format", value, expected)
        return {
            layer: tuple(self.format(item, "experts.format") for item in each)
            for layer, each in zip(layers, value, strict=True)
        }


def _option_with(options: list[Any], value: object, where: str, reader: _Strict) -> object:
    """Return the only option, or the dataclass that has the keys of `value`, and needs no others."""
    if len(options) == 1:
        return options[0]
    given = reader.mapping(value, where)
    found = []
    for option in options:
        known = {field.name: field.default is MISSING for field in fields(option)}
        if {name for name, is_needed in known.items() if is_needed} <= given.keys() <= known.keys():
            found.append(option)
    if not found:
        raise reader.wrong(where, sorted(given), f"the keys of {' or '.join(o.__name__ for o in options)}")
    return found[0]


def _from_json(kind: Any, value: object, where: str, reader: _Strict) -> object:
    """Rebuild a frozen config object from JSON, checking every type."""
    if is_dataclass(kind):
        given = reader.mapping(value, where)
        hints = get_type_hints(kind)
        known = {field.name: field for field in fields(kind)}
        for key in given:
            if key not in known:
                raise reader.wrong(where, key, f"one of the keys {', '.join(known)}")
        for name, field in known.items():
            if name not in given and field.default is MISSING and field.default_factory is MISSING:
                raise reader.wrong(where, sorted(given), f"the key {name}")
        arguments = {
            key: _from_json(hints[key], item, f"{where}.{key}", reader) for key, item in given.items()
        }
        return cast(Any, kind)(**arguments)
    origin = get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise reader.wrong(where, value, "a list")
        return tuple(_from_json(get_args(kind)[0], item, where, reader) for item in value)
    if origin is Literal:
        if value not in get_args(kind):
            raise reader.wrong(where, value, f"one of {', '.join(get_args(kind))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in get_args(kind) if option is not types.NoneType]
        return _from_json(_option_with(options, value, where, reader), value, where, reader)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise reader.wrong(where, value, kind.__name__)
    if kind is int and not 0 <= cast(int, value) < 2**63:
        raise reader.wrong(where, value, "a whole number from 0 to 2^63 - 1")
    return value
