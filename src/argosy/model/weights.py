"""Read the weights that every token needs into private memory, at drive speed.

Dense weights are read, not mapped: under memory pressure, the system reclaims mapped pages first. Matrices keep the
format of their file, or get the slot format of their GGUF blocks; norms, biases, and blocks of encoders become
float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.formats import round_up
from argosy.checkpoint.landing import MatrixRef, check_vector
from argosy.errors import CheckpointError, CorruptRecord, ReadFailed
from argosy.model.tables import Tables

Vector = NDArray[np.float32]

# Norms that a family may store minus an offset; norms inside a mixer are stored without one.
_OFFSET_NORMS = frozenset({
    "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "final_norm", "q_norm", "k_norm",
    "draft_token_norm", "draft_state_norm", "draft_final_norm", "index_q_norm", "index_k_norm",
    "ngram_key_norm", "ngram_query_norm", "ngram_conv_norm", "attn_mix_norm", "mlp_mix_norm", "head_mix_norm",
})  # fmt: skip

# The most tensors read at once. The limit is high because no read can be issued while the tokenizer is being built.
_MOST_IN_FLIGHT = 256
_ANY_NUMBER = 1 << 62


def is_vector(name: str) -> bool:
    """Whether a tensor is a norm, bias, factor or sink, or a recurrent layer's convolution or rate; all others
    are matrices.
    """
    return name.endswith(("norm", "_bias", "_scale", "sinks", "_conv", "_rate", "_skip"))


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Matrices and float32 vectors by canonical name, and the memory that holds the matrices.

    The weights of a causal convolution are [width, channels]. `k_up` and `v_up` replace `kv_up`
    (`checkpoint/latent_up.py`). `tables` stay on the drive; None: no layer has one.
    """

    matrices: Mapping[str, _native.Matrix]
    vectors: Mapping[str, Vector]
    arena: _native.Arena
    tables: Tables | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of memory, including the gaps between matrices."""
        return self.arena.nbytes + sum(vector.nbytes for vector in self.vectors.values())


def _scratch_bytes(ref: MatrixRef, alignment: int) -> int:
    """Return the bytes of scratch memory in which a tensor first lands."""
    if not ref.landing.needs_scratch:
        return 0
    return round_up(ref.pieces[0].place_bytes(alignment), alignment)


def _place_bytes(name: str, ref: MatrixRef, alignment: int) -> int:
    """Bytes reserved for its matrices."""
    if not ref.landing.needs_scratch:
        return round_up(ref.pieces[0].place_bytes(alignment), alignment)
    return sum(round_up(shape.nbytes, alignment) for shape in ref.landing.shapes(name, ref).values())


def dense_footprint(refs: Mapping[str, MatrixRef], alignment: int = 4096) -> int:
    """Return the bytes of memory that `load_dense` will take."""
    places = sum(_place_bytes(name, ref, alignment) for name, ref in refs.items())
    vectors = sum(4 * ref.rows * ref.cols for name, ref in refs.items() if is_vector(name))
    landing = (_scratch_bytes(ref, alignment) + ref.landing.working_bytes(ref) for ref in refs.values())
    return places + vectors + max(landing, default=0)


class DenseReading:
    """Reads dense tensors into memory while the caller does something else.

    Reads start at construction. `finish` or `cancel` ends them; `advance` continues them for a moment.

    Args:
        norm_offset: added to the weights of norms (`ModelConfig.norm_offset`).
        urgency: how urgent the reads are relative to other reads (`_native.Store.fetch_many`).
        most_bytes: the most bytes in flight, unless one tensor has more.
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
        self._store, self._refs = store, refs
        self._norm_offset, self._progress = norm_offset, progress
        self._urgency, self._most_bytes = urgency, most_bytes
        paths = {str(piece.path) for ref in refs.values() for piece in ref.pieces}
        self._file_ids = {path: open_file(path) for path in sorted(paths)}
        self._alignment = max(store.info(file_id)[2] for file_id in self._file_ids.values())
        # Tensors that need scratch memory share it, so they are read last, one at a time.
        self._scratch = _native.Arena(
            max(1, *(_scratch_bytes(ref, self._alignment) for ref in refs.values()))
        )
        self._waiting = deque(sorted(refs, key=lambda name: refs[name].landing.needs_scratch))
        self._in_flight: dict[int, str] = {}  # by ticket
        self._bytes_in_flight = 0
        self._places: dict[str, int] = {}
        end = 0
        for name in self._waiting:
            self._places[name] = end
            end += _place_bytes(name, refs[name], self._alignment)
        self._arena = _native.Arena(max(1, end))
        self._matrices: dict[str, _native.Matrix] = {}
        self._vectors: dict[str, Vector] = {}
        self._total_bytes, self._done_bytes = sum(ref.read_bytes for ref in refs.values()), 0
        try:
            self._start_reads()
        except BaseException:
            self.cancel()
            raise

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
        """Wait until a tensor lands or the timeout passes; return the weights once all have landed.

        Raises:
            ReadFailed, CorruptRecord, CheckpointError: as `finish`.
        """
        try:
            if self._in_flight:
                for ticket, message, kind in self._store.wait_any(list(self._in_flight), most_ms):
                    self._end_read(self._in_flight.pop(ticket), message, kind)
                self._start_reads()
        except BaseException:
            self.cancel()
            raise
        if self._in_flight:
            return None
        weights = DenseWeights(self._matrices, self._vectors, self._arena)
        self.cancel()
        return weights

    def cancel(self) -> None:
        """Wait until no read moves bytes, and discard all reads; harmless after `finish`."""
        self._waiting.clear()
        while self._in_flight:
            self._store.cancel(self._in_flight.popitem()[0])
        # Free the memory now, however long this object is kept.
        self._scratch = self._arena = _native.Arena(1)
        self._matrices, self._vectors = {}, {}

    def _start_reads(self) -> None:
        """Start reads up to the limit."""
        while self._waiting:
            name = self._waiting[0]
            ref = self._refs[name]
            if len(self._in_flight) >= (1 if ref.landing.needs_scratch else _MOST_IN_FLIGHT):
                return
            if self._in_flight and self._bytes_in_flight + ref.read_bytes > self._most_bytes:
                return
            place = 0 if ref.landing.needs_scratch else self._places[name]
            pieces = [piece.read_into(place, self._file_ids[str(piece.path)]) for piece in ref.pieces]
            checksum = ref.pieces[0].checksum
            record = _native.Record(pieces, None if checksum is None else [checksum])
            target = self._scratch if ref.landing.needs_scratch else self._arena
            (ticket,) = self._store.fetch_many(target, [(record, 0)], self._urgency)
            self._in_flight[ticket] = self._waiting.popleft()
            self._bytes_in_flight += ref.read_bytes

    def _end_read(self, name: str, message: str | None, kind: str | None) -> None:
        ref = self._refs[name]
        self._bytes_in_flight -= ref.read_bytes
        if message is not None:
            if kind == "not finite":
                raise CheckpointError(f"{ref.name}: {message}", path=str(ref.path), tensor=ref.name)
            error = CorruptRecord if kind == "checksum" else ReadFailed
            raise error(f"{ref.path.name}: {ref.name}: {message}", path=str(ref.path), tensor=ref.name)
        self._land(name, ref)
        self._done_bytes += ref.read_bytes
        if self._progress is not None:
            self._progress("reading dense weights", self._done_bytes / self._total_bytes)

    def _land(self, name: str, ref: MatrixRef) -> None:
        """Turn landed bytes into matrices and vectors."""
        piece, memory = ref.pieces[0], self._arena.array()
        inset, start = piece.inset(self._alignment), self._places[name]
        if ref.landing.needs_scratch:
            landed = self._scratch.array()[inset:][: piece.landed_bytes]
        else:
            start += inset
            landed = memory[start:][: piece.landed_bytes]
        shapes = ref.landing.shapes(name, ref)
        starts = []
        for shape in shapes.values():
            starts.append(start)
            start += round_up(shape.nbytes, self._alignment)
        places = [memory[at:][: shape.nbytes] for at, shape in zip(starts, shapes.values(), strict=True)]
        ref.landing.land(ref, landed, places)
        for (result, shape), at, place in zip(shapes.items(), starts, places, strict=True):
            if is_vector(result):
                self._vectors[result] = self._vector(result, ref, place)
            else:
                self._matrices[result] = _native.Matrix(self._arena, at, *shape)

    def _vector(self, name: str, ref: MatrixRef, place: NDArray[np.uint8]) -> Vector:
        values = _native.dequantize(ref.format, place, ref.rows, ref.cols).reshape(-1)
        check_vector(ref.name, values)
        if name.rpartition(".")[2] in _OFFSET_NORMS:
            values += np.float32(self._norm_offset)
        # In memory it is stored position by position, with channels side by side.
        if name.endswith("_conv"):
            values = np.ascontiguousarray(values.reshape(ref.rows, ref.cols).T)
        return values


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
