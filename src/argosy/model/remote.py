"""Read the headers of a model that is not on this machine: a few megabytes, however large it is.

    OWNER/NAME, https://...  ->  fetch_headers  ->  a directory of files with holes  ->  open_model, as for any model

Each file in the directory begins with the header of the remote file and has the same length, but takes no space: a
hole follows the header. So these files undergo every check of a model on disk. `config.json` is fetched whole.

The tensors of all safetensors shards are listed in one file. If the headers of all shards exceed the limit, only those
of the first shards and the last are read, and a layer with missing tensors is assumed to be like others of its kind;
`RemoteHeaders.num_read` gives the number.

Elsewhere: `checkpoint/hub.py` reads ranges of remote files.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from argosy.checkpoint.geometry import require_countable
from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.gguf_names import GGUF_SUFFIX, PART_NAME, format_in_name, is_model, part_name
from argosy.checkpoint.hub import Hub, Source
from argosy.checkpoint.safetensors import (
    DTYPE_BITS,
    HEADER_LIMIT_BYTES,
    INDEX_FILE,
    SHARD,
    SINGLE_FILE,
    TENSOR_FILES,
    TensorRef,
    read_header,
    weight_files,
)
from argosy.checkpoint.sampling import GENERATION_FILE
from argosy.checkpoint.untrusted_file import parse_object, quote
from argosy.config import LayerConfig, ModelConfig
from argosy.directory import Directory
from argosy.errors import CheckpointError, DiskFull, UnsupportedModel, UsageError
from argosy.experts.resident import Progress
from argosy.model.families import CONFIG_FILE, PARAMS_FILE, read_config
from argosy.model.reading.quantization import MODELOPT_FILE
from argosy.prompt.tokenizer import TOKENIZER_FILE

SAFETENSORS_BYTES = 7 << 20  # most bytes read of a safetensors model, config.json and lists of files included
GGUF_BYTES = 32 << 20  # a header contains the vocabulary: 6 to 12 MB
_CONFIG_BYTES = 1 << 20
_TENSORS_OF_FILE = 4000  # in the files that stand for the remote ones
_INDEX_BYTES = 512 << 10  # a larger list of tensors repeats what the headers say, at half of what is read
_HEADER_BYTES = 6 << 20  # all shards together
_FIRST_GGUF_BYTES, _FIRST_PART_BYTES = 2 << 20, 32 << 10  # a model's first part, and each other one
_NUM_AT_ONCE = 8
_MOST_SHARDS = 2000
_LAYER = re.compile(r"(.*?\blayers\.)(\d{1,6})(\..+)")
_EXPERT = re.compile(r"(.*\bexperts\.)(\d{1,6})(\..+)")


@dataclass(frozen=True, slots=True)
class RemoteHeaders:
    """The headers of a remote model.

    path: the path for `open_model`.
    file_bytes: size of all the model's files with weights.
    num_shards, num_read: the number of files with weights, and of headers that were read.
    tokenizer_bytes: size of its tokenizer.json; 0: there is none, or the GGUF file contains the tokenizer.
    """

    path: Path
    file_bytes: int
    num_shards: int
    num_read: int
    bytes_read: int
    tokenizer_bytes: int


@contextmanager
def fetch_headers(source: Source, *, progress: Progress | None = None) -> Iterator[RemoteHeaders]:
    """Fetch the headers of a model into a directory that lasts as long as the context.

    Raises:
        FetchFailed: the server cannot be reached, or refuses.
        CheckpointError: there is no model, or an answer is malformed or contradicts itself.
        UsageError: a repository has several GGUF files, and the source does not say which.
    """
    with tempfile.TemporaryDirectory(prefix="argosy-headers-") as directory:
        yield _fetch(source, Path(directory), progress or (lambda what, share: None))


def _fetch(source: Source, directory: Path, tell: Progress) -> RemoteHeaders:
    tell("reading headers", 0.0)
    if not source.repository:
        hub = Hub(source, most_bytes=GGUF_BYTES)
        stem = source.url.rpartition("/")[0]
        return _fetch_gguf(hub, [source.url.rpartition("/")[2]], lambda name: f"{stem}/{name}", directory)
    listing = Hub(source, most_bytes=GGUF_BYTES)
    listed = listing.list_files()
    names = listed.names

    def url_of(name: str) -> str:
        return listing.url_of(listed.revision, name)

    weights = choose_weights(names, source)
    if weights[0].endswith(GGUF_SUFFIX):
        return _fetch_gguf(listing, weights, url_of, directory)
    hub = Hub(source, most_bytes=SAFETENSORS_BYTES - listing.bytes_read)
    headers = _fetch_safetensors(hub, names, weights, url_of, directory, tell)
    tell("done", 1.0)
    return headers


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One of a repository's models as GGUF files.

    stem: the name of its file, or the common part of its parts' names.
    parts: its files, in order.
    """

    stem: str
    parts: tuple[str, ...]

    @property
    def num_parts(self) -> int:
        """The number of its parts according to their names, even if some are missing."""
        match = PART_NAME.fullmatch(self.parts[0])
        return int(match["count"]) if match is not None else 1

    @property
    def format(self) -> str:
        return format_in_name(self.stem)


def gguf_models(names: Sequence[str], part: str = "") -> list[GgufModel]:
    """List the models in GGUF files of a repository; with `part`, those whose names contain it.

    A format, or the name of a file or of its folder, selects only that model, even if longer names contain it; so does
    a format without the publisher's "UD-" where no other file has it.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if is_model(name.rpartition("/")[2]):
            split = PART_NAME.fullmatch(name)
            found.setdefault(split["stem"] if split else name.removesuffix(GGUF_SUFFIX), []).append(name)
    models = [GgufModel(stem, tuple(parts)) for stem, parts in found.items()]
    split = PART_NAME.fullmatch(part)
    wanted = (split["stem"] if split else part.removesuffix(GGUF_SUFFIX)).lower()

    def paths_of(model: GgufModel) -> tuple[str, ...]:
        folder, _, file = model.stem.lower().rpartition("/")
        return model.stem.lower(), folder, file

    for exact in (
        [model for model in models if wanted == model.format.lower()],
        [model for model in models if wanted in paths_of(model)],
        [model for model in models if f"ud-{wanted}" == model.format.lower()],
    ):
        if part and len(exact) == 1:
            return exact
    return [model for model in models if wanted in model.stem.lower()]


def choose_weights(names: Sequence[str], source: Source) -> list[str]:
    """Choose the files with the weights of the model that a source names, among all files of its repository.

    The result is the parts of one GGUF model if the source names a part or there are no safetensors; otherwise all
    shards.

    Raises:
        CheckpointError: there is no model, or a part of it is missing.
        UsageError: there are several GGUF models, and the source does not say which.
    """
    if source.part or (gguf_models(names) and not has_tensors(names)):
        return _chosen(names, source)
    if CONFIG_FILE not in names and PARAMS_FILE not in names:
        raise CheckpointError(
            f"{source.repository} holds no model: looked for {CONFIG_FILE} and for a {GGUF_SUFFIX} file",
            path=source.url,
        )
    return _shards(names, source)


def has_tensors(names: Sequence[str]) -> bool:
    """Whether a repository contains a model as safetensors."""
    return bool(weight_files(names)[0])


# ── safetensors ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _fetch_safetensors(
    hub: Hub,
    names: Sequence[str],
    shards: Sequence[str],
    url_of: Callable[[str], str],
    directory: Path,
    tell: Progress,
) -> RemoteHeaders:
    for name in (CONFIG_FILE, PARAMS_FILE, GENERATION_FILE, MODELOPT_FILE):
        if name in names:
            (directory / name).write_bytes(hub.read_all(url_of(name), _CONFIG_BYTES))
    _, config = read_config(directory)
    index = _index(hub, names, url_of)
    found, sizes, num_read = _read_shards(hub, shards, url_of, directory, tell)
    if num_read == len(shards):
        _require_same_names(index, found)
    else:
        found = _completed(found, config)
    _write_headers(directory, found)
    tokenizer_bytes = 0
    if TOKENIZER_FILE in names:
        tokenizer_bytes = hub.read(url_of(TOKENIZER_FILE), 0, 1).file_bytes
    return RemoteHeaders(directory, sum(sizes), len(shards), num_read, hub.bytes_read, tokenizer_bytes)


def _shards(names: Sequence[str], source: Source) -> list[str]:
    """Return the safetensors files of a model, in order."""
    files, _ = weight_files(names)
    if len(files) == 1 and files[0] in TENSOR_FILES:
        return files
    matches = [match for name in files if (match := SHARD.fullmatch(name))]
    numbered = {int(match["number"]): match[0] for match in matches}
    counts = {int(match["count"]) for match in matches}
    if (
        len(counts) != 1
        or not 1 <= len(numbered) <= _MOST_SHARDS
        or set(numbered) not in (set(range(1, max(counts) + 1)), set(range(max(counts))))
    ):
        raise CheckpointError(
            f"{source.repository} holds no whole set of safetensors: looked for {SINGLE_FILE}, and for each of "
            f"model-00001-of-0000N.safetensors; found {len(numbered)}",
            path=source.url,
        )
    return [numbered[number] for number in sorted(numbered)]


def _index(hub: Hub, names: Sequence[str], url_of: Callable[[str], str]) -> Mapping[str, object]:
    """Return the shard of each tensor according to the index; empty if there is no index, or it is large."""
    files, index = weight_files(names)
    if files[0] in TENSOR_FILES or index not in names:
        return {}
    if hub.read(url_of(index), 0, 1).file_bytes > _INDEX_BYTES:
        return {}
    entries = parse_object(hub.read_all(url_of(index), _INDEX_BYTES), Path(index)).get("weight_map")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{index} has no weight_map", path=Path(index))
    return entries


def _read_shards(
    hub: Hub, shards: Sequence[str], url_of: Callable[[str], str], directory: Path, tell: Progress
) -> tuple[dict[str, TensorRef], list[int], int]:
    """Return tensors by name, the size of every shard, and the number of headers read.

    The last and first shards come first, because they contain the tensors outside layers.
    """
    order = [len(shards) - 1, *range(len(shards) - 1)]
    found: dict[str, TensorRef] = {}
    sizes = [0] * len(shards)
    with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        starts = pool.map(lambda name: hub.read(url_of(name), 0, 8), shards)
        lengths = []
        for number, start in enumerate(starts):
            lengths.append(_header_bytes(start.data, start.file_bytes, shards[number]))
            sizes[number] = start.file_bytes
            tell("reading headers", 0.3 * number / len(shards))
        chosen: list[int] = []
        total = 0
        for number in order:
            total += lengths[number]
            if chosen and total > _HEADER_BYTES:
                break
            chosen.append(number)
        headers = pool.map(lambda number: hub.read(url_of(shards[number]), 8, lengths[number]), chosen)
        for done, (number, header) in enumerate(zip(chosen, headers, strict=True)):
            path = directory / shards[number]
            size = lengths[number].to_bytes(8, "little")
            _write_with_hole(path, size + header.data, sizes[number])
            for name, ref in read_header(path).items():
                if name in found:
                    raise CheckpointError(
                        f"{shards[number]} holds {quote(name)}, as {found[name].path.name} does"
                    )
                found[name] = ref
            # The names and offsets are known, and other headers need the room.
            with Directory(directory) as own:
                own.remove(path.name)
            tell("reading headers", 0.3 + 0.7 * done / len(chosen))
    return found, sizes, len(chosen)


def _header_bytes(data: bytes, file_bytes: int, name: str) -> int:
    """Return the length of a header, checked before anything is read or allocated for it."""
    length = int.from_bytes(data, "little")
    if len(data) < 8 or length > HEADER_LIMIT_BYTES or 8 + length > file_bytes:
        raise CheckpointError(
            f"{name} claims a header of {length} bytes; at most {HEADER_LIMIT_BYTES} are read, and the file has "
            f"{file_bytes}",
            path=Path(name),
        )
    return length


def _require_same_names(index: Mapping[str, object], found: Mapping[str, TensorRef]) -> None:
    list_of_names = f"{next(iter(found.values())).path.name.partition('-')[0]}.safetensors.index.json"
    for name, shard in index.items():
        if name not in found or found[name].path.name != shard:
            where = f"{found[name].path.name} does" if name in found else "no shard does"
            raise CheckpointError(
                f"{list_of_names} says that {quote(shard)} holds {quote(name)}, but {where}",
                path=Path(list_of_names),
            )
    if index and len(index) != len(found):
        extra = next(name for name in found if name not in index)
        raise CheckpointError(f"{list_of_names} does not list {quote(extra)}", path=Path(list_of_names))


_Kind = tuple[str, tuple[int, ...]]  # dtype and shape


def _completed(found: Mapping[str, TensorRef], config: ModelConfig) -> dict[str, TensorRef]:
    """Add the tensors of layers and experts whose headers were not read, modelled on others of their kind.

    Layers with equal settings have the same tensors, and so do all experts of a layer.
    """
    require_countable(config)
    complete = dict(found)
    kinds: dict[tuple[str, LayerConfig], dict[str, _Kind]] = {}
    for name, ref in found.items():
        if (layer := _LAYER.fullmatch(name)) is None or int(layer[2]) >= config.num_layers:
            continue
        tail = _EXPERT.sub(r"\1{}\3", layer[3])
        kinds.setdefault((layer[1], config.layers[int(layer[2])]), {})[tail] = ref.dtype, ref.shape
    path = Path(SINGLE_FILE)
    for prefix in {prefix for prefix, _ in kinds}:
        for number, settings in enumerate(config.layers):
            for tail, (dtype, shape) in kinds.get((prefix, settings), {}).items():
                experts: Sequence[int | None] = range(config.num_experts) if "{}" in tail else (None,)
                for expert in experts:
                    name = f"{prefix}{number}{tail.replace('{}', str(expert))}"
                    if name not in complete:
                        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
                        complete[name] = TensorRef(name, path, 0, nbytes, dtype, shape)
    return complete


def _write_headers(directory: Path, tensors: Mapping[str, TensorRef]) -> None:
    """Write safetensors files with all the tensors, as headers and holes, and an index if there are several files."""
    refs = list(tensors.values())
    num_files = max(1, -(-len(refs) // _TENSORS_OF_FILE))
    weight_map = {}
    for number in range(num_files):
        name = SINGLE_FILE if num_files == 1 else f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        entries, end = {}, 0
        for ref in refs[number * _TENSORS_OF_FILE : (number + 1) * _TENSORS_OF_FILE]:
            entries[ref.name] = {
                "dtype": ref.dtype, "shape": list(ref.shape), "data_offsets": [end, end + ref.nbytes],
            }  # fmt: skip
            end += ref.nbytes
            weight_map[ref.name] = name
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        _write_with_hole(directory / name, len(text).to_bytes(8, "little") + text, 8 + len(text) + end)
    if num_files > 1:
        index = json.dumps({"weight_map": weight_map}).encode()
        _write_with_hole(directory / INDEX_FILE, index, len(index))


def _write_with_hole(path: Path, beginning: bytes, file_bytes: int) -> None:
    try:
        with path.open("wb") as file:
            file.write(beginning)
            file.truncate(file_bytes)
    except OSError as error:
        raise DiskFull(
            f"a file of {file_bytes} bytes, nearly all of it a hole, cannot be made in {path.parent}: {error.strerror}",
            hint="TMPDIR names another directory",
            path=path.parent,
            needed_bytes=len(beginning),
        ) from error


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _chosen(names: Sequence[str], source: Source) -> list[str]:
    """Return the parts of the only GGUF model that the source names."""
    models = gguf_models(names, source.part)
    if len(models) == 1:
        (model,) = models
        if len(model.parts) != model.num_parts:
            raise CheckpointError(
                f"{source.repository} has {len(model.parts)} of the {model.num_parts} parts of {quote(model.stem)}",
                path=source.url,
            )
        return list(model.parts)
    shown = ", ".join(quote(model.stem.rpartition("/")[2]) for model in models[:8])
    if not models:
        raise CheckpointError(
            f"{source.repository} has no {GGUF_SUFFIX} file with '{quote(source.part)}' in its name",
            hint=f"`argosy pull {source.repository} --formats` lists what it has",
            path=source.url,
        )
    raise UsageError(
        f"{source.repository} has {len(models)} models as {GGUF_SUFFIX} files: {shown}",
        hint=f"name one by a part of its name, for example {source.repository}:Q4_K_M",
    )


def _fetch_gguf(
    hub: Hub, names: Sequence[str], url_of: Callable[[str], str], directory: Path
) -> RemoteHeaders:
    if len(names) == 1 and (part := PART_NAME.fullmatch(names[0])) is not None:
        count = int(part["count"])
        names = [part_name(part["stem"], number, count) for number in range(1, count + 1)]
    if len(names) > _MOST_SHARDS:
        raise CheckpointError(f"{quote(names[0])} has more than {_MOST_SHARDS} parts", path=hub.source.url)
    paths = [directory / name.rpartition("/")[2] for name in names]
    held: list[int] = []  # bytes of each part
    for name, path in zip(names, paths, strict=True):
        first = hub.read(url_of(name), 0, _FIRST_PART_BYTES if held else _FIRST_GGUF_BYTES)
        _write_with_hole(path, first.data, first.file_bytes)
        held.append(len(first.data))
    while True:
        try:
            read_gguf(paths[0])
            break
        except UnsupportedModel:
            raise
        except CheckpointError:
            # A truncated header ends in zeros, which are not a tensor: reading more of it may help.
            cut = [i for i, path in enumerate(paths) if held[i] < path.stat().st_size]
            if not cut or hub.bytes_read + sum(held[i] for i in cut) > GGUF_BYTES:
                raise
            for i in cut:
                more = hub.read(url_of(names[i]), held[i], held[i])
                with paths[i].open("r+b") as file:
                    file.seek(held[i])
                    file.write(more.data)
                held[i] += len(more.data)
    total = sum(path.stat().st_size for path in paths)
    return RemoteHeaders(paths[0], total, len(names), len(names), hub.bytes_read, 0)
