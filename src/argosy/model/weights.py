"""Read the weights that every token needs into private memory, at drive speed.

Dense weights are read, not mapped: under memory pressure, the system reclaims mapped pages first. Matrices stay in the
format of their file, or get the slot format of their GGUF blocks; norms, biases, and blocks of encoders become float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import MatrixRef, check_vector, in_halves, matrix_bytes, taps_first
from argosy.checkpoint.gguf import SLOT_FORMATS
from argosy.checkpoint.latent_up import key_value_matrix, passing_bytes, split, split_shapes
from argosy.checkpoint.manifest import round_up
from argosy.errors import CheckpointError, CorruptRecord, ReadFailed

Vector = NDArray[np.float32]

# Norms that a family may store minus an offset; norms inside a mixer are stored without one.
_OFFSET_NORMS = frozenset({
    "attn_norm", "mlp_norm", "final_norm", "q_norm", "k_norm",
    "draft_token_norm", "draft_state_norm", "draft_final_norm",
})  # fmt: skip

# The most tensors read at once. The limit is high because no read can be issued while the tokenizer is being built.
_MOST_IN_FLIGHT = 256
_ANY_NUMBER = 1 << 62


def is_vector(name: str) -> bool:
    """Whether it is a norm, bias, factor or sink, or a delta net's convolution or rate; all others are matrices."""
    return name.endswith(("norm", "_bias", "_scale", "sinks", "delta_conv", "delta_rate"))


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Matrices and float32 vectors by canonical name, and the memory that holds the matrices.

    The weights of a causal convolution are [width, channels]. `k_up` and `v_up` replace `kv_up`
    (`checkpoint/latent_up.py`).
    """

    matrices: Mapping[str, _native.Matrix]
    vectors: Mapping[str, Vector]
    arena: _native.Arena

    @property
    def nbytes(self) -> int:
        """Bytes of memory, including the gaps between matrices."""
        return self.arena.nbytes + sum(vector.nbytes for vector in self.vectors.values())


def _passes_scratch(ref: MatrixRef) -> bool:
    """Whether it lands in scratch memory first: it is split in two, its rows of blocks are reordered before they are
    transcoded, or its blocks become floats. Readers can do none of these."""
    is_reordered = ref.block_type is not None and ref.paired_heads > 0
    return ref.key_value_rows is not None or is_reordered or ref.is_widened


def _scratch_bytes(ref: MatrixRef, alignment: int) -> int:
    """Bytes of scratch memory for a matrix that lands there first; codes and scales are transcoded on the way."""
    return round_up(ref.landed_bytes, alignment) if ref.scales is not None else _read_bytes(ref, alignment)


def _read_bytes(ref: MatrixRef, alignment: int) -> int:
    # A block to spare on each side: reads are rounded outwards to whole blocks.
    return round_up(ref.offset % alignment + ref.nbytes, alignment)


def _split_places(ref: MatrixRef, alignment: int) -> tuple[int, int]:
    """Bytes reserved for k_up and v_up."""
    key, value = (round_up(matrix_bytes(*shape), alignment) for shape in split_shapes(key_value_matrix(ref)))
    return key, value


def _place_bytes(ref: MatrixRef, alignment: int) -> int:
    if ref.key_value_rows is not None:
        return sum(_split_places(ref, alignment))
    if ref.block_type is not None:
        return round_up(ref.landed_bytes, alignment)
    return _read_bytes(ref, alignment)


def _reordering_bytes(ref: MatrixRef, alignment: int) -> int:
    """Bytes needed to reorder rows while it lands."""
    if ref.key_value_rows is not None:
        landed = ref.landed_bytes if ref.block_type is not None and ref.scales is None else 0
        return _scratch_bytes(ref, alignment) + landed + passing_bytes(key_value_matrix(ref))
    if ref.block_type is not None and _passes_scratch(ref):
        blocks = matrix_bytes(SLOT_FORMATS[ref.block_type], ref.rows, ref.cols)
        return _read_bytes(ref, alignment) + ref.nbytes + ref.landed_bytes + (blocks if ref.is_widened else 0)
    return ref.nbytes if ref.paired_heads or ref.taps else 0


def dense_footprint(refs: Mapping[str, MatrixRef], alignment: int = 4096) -> int:
    """Bytes of memory that `load_dense` will take."""
    places = sum(_place_bytes(ref, alignment) for ref in refs.values())
    vectors = sum(4 * ref.rows * ref.cols for name, ref in refs.items() if is_vector(name))
    return places + vectors + max((_reordering_bytes(ref, alignment) for ref in refs.values()), default=0)


class DenseReading:
    """Reads dense tensors into memory while the caller does something else.

    Reads start when this is created. `finish` or `cancel` ends them; `advance` continues them for a moment.

    Args:
        norm_offset: added to the weights of norms (`ModelConfig.norm_offset`).
        urgency: how urgent the reads are, beside those of others (`_native.Store.fetch_many`).
        most_bytes: bytes to be read at any time, unless one tensor has more.
    """

    def __init__(
        self,
        store: _native.Store,
        refs: Mapping[str, MatrixRef],
        *,
        open_file: Callable[[str], int],
        norm_offset: float = 0.0,
        progress: Callable[[str, float], None] | None = None,
        urgency: _native.Urgency = "now",
        most_bytes: int = _ANY_NUMBER,
    ) -> None:
        self._steps = _read_dense(store, refs, open_file, norm_offset, progress, urgency, most_bytes)
        next(self._steps)

    def finish(self) -> DenseWeights:
        """Wait for every tensor.

        Raises:
            ReadFailed: the drive failed.   CorruptRecord: a packed tensor does not match its checksum.
            CheckpointError: a norm or bias holds NaN or infinity.
        """
        while (weights := self.advance(None)) is None:
            pass
        return weights

    def advance(self, most_ms: int | None) -> DenseWeights | None:
        """Wait until a tensor lands, at most so long; return the weights once all have landed.

        Raises:
            ReadFailed, CorruptRecord, CheckpointError: as `finish`.
        """
        try:
            self._steps.send(most_ms)
        except StopIteration as done:
            weights: DenseWeights = done.value
            return weights
        return None

    def cancel(self) -> None:
        """Wait until no read moves bytes, and discard all reads; harmless after `finish`."""
        self._steps.close()


def load_dense(
    store: _native.Store,
    refs: Mapping[str, MatrixRef],
    *,
    open_file: Callable[[str], int],
    norm_offset: float = 0.0,
    progress: Callable[[str, float], None] | None = None,
) -> DenseWeights:
    """Read every dense tensor and wait: `DenseReading` in one call."""
    return DenseReading(store, refs, open_file=open_file, norm_offset=norm_offset, progress=progress).finish()


def _read_dense(
    store: _native.Store,
    refs: Mapping[str, MatrixRef],
    open_file: Callable[[str], int],
    norm_offset: float,
    progress: Callable[[str, float], None] | None,
    urgency: _native.Urgency,
    most_bytes: int,
) -> Generator[None, int | None, DenseWeights]:
    """Start the first reads; then receive, again and again, for how many milliseconds to wait for one to land."""
    paths = {str(ref.path) for ref in refs.values()}
    paths |= {str(ref.scales.path) for ref in refs.values() if ref.scales is not None}
    file_ids = {path: open_file(path) for path in sorted(paths)}
    alignment = max(store.info(file_id)[2] for file_id in file_ids.values())
    arena = _native.Arena(max(1, sum(_place_bytes(ref, alignment) for ref in refs.values())))
    # Matrices that land in scratch memory share it, so they are read last, one at a time.
    scratch = _native.Arena(
        max((_scratch_bytes(ref, alignment) for ref in refs.values() if _passes_scratch(ref)), default=1)
    )
    waiting = deque(sorted(refs, key=lambda name: _passes_scratch(refs[name])))
    places: dict[str, int] = {}
    end = 0
    for name in waiting:
        places[name] = end
        end += _place_bytes(refs[name], alignment)
    in_flight: dict[int, str] = {}
    matrices: dict[str, _native.Matrix] = {}
    vectors: dict[str, Vector] = {}
    total_bytes, done_bytes = sum(ref.read_bytes for ref in refs.values()), 0
    bytes_in_flight = 0

    def start(target: _native.Arena, pieces: list[_native.Piece], checksum: int | None = None) -> int:
        record = _native.Record(pieces, None if checksum is None else [checksum])
        return store.fetch_many(target, [(record, 0)], urgency)[0]

    def fetch(name: str) -> int:
        ref = refs[name]
        piece = (file_ids[str(ref.path)], ref.offset, ref.nbytes)
        if ref.scales is not None:
            assert ref.block_type is not None
            assert ref.scales.transcode is not None
            target, at = (scratch, 0) if _passes_scratch(ref) else (arena, places[name])
            others = (file_ids[str(ref.scales.path)], ref.scales.offset, ref.scales.nbytes)
            return start(
                target,
                [
                    (*piece, at, ref.block_type, ref.rows, ref.cols),
                    (*others, at, ref.scales.transcode.block_type, ref.rows, ref.cols),
                ],
            )
        if _passes_scratch(ref):
            return start(scratch, [(*piece, 0)], ref.checksum)
        if ref.block_type is not None:
            return start(arena, [(*piece, places[name], ref.block_type, ref.rows, ref.cols)])
        return start(arena, [(*piece, places[name])], ref.checksum)

    def land(name: str) -> None:
        ref, start = refs[name], places[name]
        if ref.key_value_rows is not None:
            land_split(name)
            return
        if ref.block_type is None:
            start += ref.offset % alignment
        memory = arena.array()[start : start + (ref.landed_bytes if ref.turn is None else ref.nbytes)]
        if ref.block_type is not None and _passes_scratch(ref):
            raw = scratch.array()[ref.offset % alignment :][: ref.nbytes].reshape(ref.rows, -1)
            blocks = (
                (in_halves(raw, ref.paired_heads) if ref.paired_heads else raw).reshape(-1).view(np.uint8)
            )
            landed = _native.transcode(ref.block_type, blocks, ref.rows, ref.cols)
            if ref.is_widened:
                values = _native.dequantize(SLOT_FORMATS[ref.block_type], landed, ref.rows, ref.cols)
                check_vector(ref.name, values)
                landed = values.reshape(-1).view(np.uint8)
            memory[:] = landed
        elif ref.paired_heads:
            memory[:] = in_halves(memory.reshape(ref.rows, -1), ref.paired_heads).reshape(-1)
        elif ref.taps:
            values_of = memory.view(f"V{ref.nbytes // (ref.rows * ref.cols)}").reshape(ref.rows, -1)
            memory[:] = taps_first(values_of, ref.taps).reshape(-1).view(np.uint8)
        if is_vector(name):
            cols = ref.cols if ref.turn is None else 2 * ref.cols
            values = _native.dequantize(ref.format, memory, ref.rows, cols).reshape(-1)
            if ref.turn is not None:
                values = np.ascontiguousarray(values[ref.turn :: 2])
            check_vector(ref.name, values)
            if name.rpartition(".")[2] in _OFFSET_NORMS:
                values += np.float32(norm_offset)
            # In memory it is stored position by position, with channels side by side.
            if name.endswith("delta_conv"):
                values = np.ascontiguousarray(values.reshape(ref.rows, ref.cols).T)
            vectors[name] = values
        else:
            matrices[name] = _native.Matrix(arena, start, ref.format, ref.rows, ref.cols)

    def land_split(name: str) -> None:
        ref, start = refs[name], places[name]
        if ref.scales is not None:
            matrix = scratch.array()[: ref.landed_bytes]
        else:
            matrix = scratch.array()[ref.offset % alignment :][: ref.nbytes]
        if ref.block_type is not None and ref.scales is None:
            matrix = _native.transcode(ref.block_type, matrix, ref.rows, ref.cols)
        starts = start, start + _split_places(ref, alignment)[0]
        kv_up = key_value_matrix(ref)
        shapes = split_shapes(kv_up)
        halves = [
            arena.array()[at : at + matrix_bytes(*shape)] for at, shape in zip(starts, shapes, strict=True)
        ]
        split(kv_up, matrix, halves[0], halves[1])
        for part, at, shape in zip(("k_up", "v_up"), starts, shapes, strict=True):
            matrices[name.removesuffix("kv_up") + part] = _native.Matrix(arena, at, *shape)

    def issue() -> None:
        nonlocal bytes_in_flight
        while waiting and len(in_flight) < (1 if _passes_scratch(refs[waiting[0]]) else _MOST_IN_FLIGHT):
            nbytes = refs[waiting[0]].read_bytes
            if in_flight and bytes_in_flight + nbytes > most_bytes:
                return
            name = waiting.popleft()
            in_flight[fetch(name)] = name
            bytes_in_flight += nbytes

    try:
        issue()
        most_ms = yield
        while waiting or in_flight:
            issue()
            for ticket, message, kind in store.wait_any(list(in_flight), most_ms):
                name = in_flight.pop(ticket)
                ref = refs[name]
                bytes_in_flight -= ref.read_bytes
                if message is not None and kind == "not finite":
                    raise CheckpointError(f"{ref.name}: {message}", path=str(ref.path), tensor=ref.name)
                if message is not None:
                    error = CorruptRecord if kind == "checksum" else ReadFailed
                    raise error(
                        f"{ref.path.name}: {ref.name}: {message}", path=str(ref.path), tensor=ref.name
                    )
                land(name)
                done_bytes += ref.read_bytes
                if progress is not None:
                    progress("reading dense weights", done_bytes / total_bytes)
            if waiting or in_flight:
                most_ms = yield
    finally:
        for ticket in in_flight:
            store.cancel(ticket)
    return DenseWeights(matrices, vectors, arena)
