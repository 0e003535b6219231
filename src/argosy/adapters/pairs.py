"""Collect an adapter's pairs under the model's own names, and give out those of one expert at a time.

    A reader finds modules, tensors and scales  ->  PairCollector  ->  AdapterFiles

Dense pairs are copied. Those of experts stay in the file until `read_expert`. Where files hold the columns of all
experts side by side (PEFT's `target_parameters`), one layer's are kept in memory, because all of its bytes must be read
for any expert: 2 * rank * experts * (2 * width + hidden) bytes in 16-bit formats.

Elsewhere: `names.py` finds modules; `peft.py` reads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from argosy.adapters.files import (
    AdapterFiles,
    EmbeddingPair,
    ExpertPart,
    LowRank,
    PairFormat,
    Replacement,
    Values,
)
from argosy.adapters.names import Dense, Expert, ModuleNames
from argosy.adapters.values import (
    MOST_RANK,
    AdapterTensors,
    as_format,
    common_format,
    format_of,
    widen,
)
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import quote
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel

_MATRICES = ("gate", "up", "down")
# Where a tensor holds the pairs of all experts: `down` [experts, rank, columns] and `up` [experts, rows, rank]; or
# `down` [rank * experts, columns] with the expert slowest, and `up` [rows, rank * experts] with it fastest or slowest.
ExpertOrder = Literal["stacked", "expert_fastest", "expert_slowest"]


def base_hint(base: object, config: ModelConfig) -> str:
    """Compare the base that an adapter names with the model."""
    asked = "was the adapter trained for another base?"
    if isinstance(base, str) and base:
        asked = f"the adapter was trained for {quote(base)}"
    return (
        f"{asked}; this model is a {config.family} with {config.num_layers} layers, hidden size {config.hidden_size} "
        f"and a vocabulary of {config.vocab_size}"
    )


@dataclass(frozen=True)
class _Source:
    """Where an expert's pair is: two tensors; with `order`, they hold those of all experts.

    is_swapped: the tensor called A holds `up`, and B holds `down`.
    """

    down: TensorRef
    up: TensorRef
    rank: int
    scale: float
    rows: slice
    order: ExpertOrder | None = None
    is_swapped: bool = False


class PairCollector:
    """The pairs found so far.

    Args:
        base: the adapter's own name for its base, of any type and length; None: it has none.
    """

    def __init__(
        self, tensors: AdapterTensors, config: ModelConfig, names: ModuleNames, base: object = None
    ) -> None:
        self.tensors, self.config, self.names = tensors, config, names
        self._hint = base_hint(base, config)
        self._dense: dict[str, list[LowRank]] = {}
        self._embedding: EmbeddingPair | None = None
        self._replaced: dict[str, Replacement] = {}
        self._experts: dict[tuple[int, int], dict[int | None, _Source]] = {}
        self._from: dict[object, str] = {}

    def add_dense(
        self,
        module: Dense,
        down: TensorRef,
        up: TensorRef,
        scale: float,
        *,
        up_is_turned: bool,
        magnitude: TensorRef | None = None,
    ) -> None:
        """Add the pair of a matrix: `down` [rank, columns]; `up` [rows, rank], or if turned [rank, rows].

        magnitude: [rows].
        """
        rows, columns = module.shape
        rank = down.shape[0] if down.shape else 0
        self.require_shape(down, (self.rank_of(down, rank), columns))
        self.require_shape(up, (rank, rows) if up_is_turned else (rows, rank))
        format, down_values, up_values = self.tensors.read_pair(down, up)
        own_up = up_values if up_is_turned else up_values.T
        lengths = self.magnitude(magnitude, rows)
        self.put_dense(module, format, down_values, own_up, scale, up.name, magnitude=lengths)

    def put_dense(
        self,
        module: Dense,
        format: PairFormat,
        down: Values,
        up: Values,
        scale: float,
        name: str,
        *,
        magnitude: NDArray[np.float32] | None = None,
    ) -> None:
        """Add the pair of a matrix from values: `down` [rank, columns], `up` [rank, rows], `magnitude` [rows]."""
        for part in module.parts:
            self._once(part.name, name)
            own_up = up if part.rows is None else up[:, part.rows]
            own_down = down if part.columns is None else down[:, part.columns]
            self._dense.setdefault(part.name, []).append(
                LowRank(
                    format=format,
                    down=np.ascontiguousarray(own_down),
                    up=np.ascontiguousarray(own_up),
                    scale=scale,
                    magnitude=magnitude if magnitude is None or part.rows is None else magnitude[part.rows],
                )
            )

    def magnitude(self, ref: TensorRef | None, count: int) -> NDArray[np.float32] | None:
        """Return the lengths of DoRA's rows, if there are any."""
        if ref is None:
            return None
        self.require_shape(ref, (count,))
        return widen(self.tensors.read(ref), format_of(ref))

    def add_embedding(
        self,
        rows: TensorRef,
        up: TensorRef,
        scale: float,
        *,
        rows_are_turned: bool,
        up_is_turned: bool,
        magnitude: NDArray[np.float32] | None = None,
    ) -> None:
        """Add the pair of the embedding table: `rows` [vocabulary, rank] and `up` [rank, hidden], or turned.

        magnitude: as `EmbeddingPair` has it.
        """
        vocabulary, hidden = self.names.shapes["embed"]
        rank = (up.shape[-1] if up_is_turned else up.shape[0]) if len(up.shape) == 2 else 0
        self.rank_of(up, rank)
        self.require_shape(rows, (rank, vocabulary) if rows_are_turned else (vocabulary, rank))
        self.require_shape(up, (hidden, rank) if up_is_turned else (rank, hidden))
        format, row_values, up_values = self.tensors.read_pair(rows, up)
        self._once("embed", rows.name)
        self._embedding = EmbeddingPair(
            format=format,
            rows=np.ascontiguousarray(row_values.T if rows_are_turned else row_values),
            up=np.ascontiguousarray(up_values.T if up_is_turned else up_values),
            scale=scale,
            magnitude=magnitude,
        )

    def replace(self, name: str, ref: TensorRef) -> None:
        """Add a matrix that replaces the base's."""
        self.require_shape(ref, self.names.shapes[name])
        self._once(name, ref.name)
        self._replaced[name] = Replacement(format=format_of(ref), values=self.tensors.read(ref))

    def add_expert(
        self,
        module: Expert,
        down: TensorRef,
        up: TensorRef,
        scale: float,
        *,
        order: ExpertOrder | None = None,
        is_swapped: bool = False,
    ) -> None:
        """Add pairs of one routed expert: `down` [rank, columns], `up` [rows, rank]; or with `order` those of all."""
        rows, columns = module.shape
        experts = self.config.num_experts
        if is_swapped:
            rows, columns = columns, rows
        if order == "stacked":
            rank = down.shape[1] if len(down.shape) == 3 else 0
            self.require_shape(down, (experts, self.rank_of(down, rank), columns))
            self.require_shape(up, (experts, rows, rank))
        elif order is not None:
            first = down.shape[0] if len(down.shape) == 2 else 0
            if first % experts:
                raise self.other_base(down, f"[a multiple of {experts} experts, {columns}]")
            rank = self.rank_of(down, first // experts)
            self.require_shape(down, (first, columns))
            self.require_shape(up, (rows, first))
        else:
            rank = down.shape[0] if down.shape else 0
            self.require_shape(down, (self.rank_of(down, rank), columns))
            self.require_shape(up, (rows, rank))
        for matrix, own_rows in module.rows.items():
            source = _Source(down, up, rank, scale, own_rows, order, is_swapped)
            of_layer = self._experts.setdefault((module.layer, matrix), {})
            if module.expert in of_layer or (None in of_layer) or (module.expert is None and of_layer):
                raise self.tensors.refuse(
                    down.name, f"is a second pair for {_MATRICES[matrix]} of experts in layer {module.layer}"
                )
            of_layer[module.expert] = source

    def require_shape(self, ref: TensorRef, expected: tuple[int, ...]) -> None:
        if ref.shape != expected:
            raise self.other_base(ref, str(list(expected)))

    def other_base(self, ref: TensorRef, expected: str) -> CheckpointError:
        """Return the error for a tensor that does not fit the model."""
        return CheckpointError(
            f"{ref.path.name}: {quote(ref.name)} is {list(ref.shape)}, and the model needs {expected}",
            hint=self._hint,
            path=ref.path,
            tensor=ref.name,
        )

    def no_module(self, name: str, module: str) -> UnsupportedModel:
        """Return the error for a tensor whose module the model does not have."""
        return self.tensors.refuse(
            name,
            f"belongs to {quote(module)}, which is no matrix that an adapter may change here",
            self._hint,
        )

    def rank_of(self, ref: TensorRef, rank: int) -> int:
        if not 1 <= rank <= MOST_RANK:
            raise CheckpointError(
                f"{ref.path.name}: {quote(ref.name)} is {list(ref.shape)}, a pair of rank {rank}; supported: 1 to "
                f"{MOST_RANK}",
                path=ref.path,
                tensor=ref.name,
            )
        return rank

    def finish(self, kind: Literal["peft", "gguf", "mlx"], digest: bytes, **more: Any) -> AdapterFiles:
        """Return everything found.

        Raises:
            UnsupportedModel: a tensor was not used, or the adapter has no pairs.
        """
        left = self.tensors.left()
        if left:
            also = f", and {len(left) - 1} more tensors are not" if len(left) > 1 else ""
            raise self.tensors.refuse(left[0], f"is not used{also}")
        if not (self._dense or self._embedding or self._replaced or self._experts):
            raise CheckpointError(f"{self.tensors.path.name} changes nothing", path=self.tensors.path)
        reader = _ExpertReader(self.tensors, self.config, self._experts)
        return AdapterFiles(
            path=self.tensors.path,
            kind=kind,
            digest=digest,
            dense={name: tuple(pairs) for name, pairs in self._dense.items()},
            embedding=self._embedding,
            replaced=self._replaced,
            experts=reader.parts,
            read_expert=reader.read if reader.parts else None,
            **more,
        )

    def _once(self, key: object, name: str) -> None:
        if key in self._from:
            raise self.tensors.refuse(name, f"changes {key}, which {quote(self._from[key])} changes as well")
        self._from[key] = name


class _ExpertReader:
    """Reads the part of an expert when it is asked for."""

    def __init__(
        self,
        tensors: AdapterTensors,
        config: ModelConfig,
        sources: Mapping[tuple[int, int], Mapping[int | None, _Source]],
    ) -> None:
        self._tensors, self._sources, self._num_experts = tensors, sources, config.num_experts
        self._kept: dict[tuple[str, bool], Values] = {}
        self._kept_layer = -1
        self._lock = threading.Lock()
        self.parts = {layer: self._part(config, layer) for layer in sorted({layer for layer, _ in sources})}

    def _part(self, config: ModelConfig, layer: int) -> ExpertPart:
        """Describe a layer. If scales of a matrix differ among experts, they are multiplied into `up` in float32."""
        ranks, scales, formats = [0, 0, 0], [1.0, 1.0, 1.0], set[PairFormat]()
        for matrix in range(3):
            sources = self._sources.get((layer, matrix), {}).values()
            if not sources:
                continue
            ranks[matrix] = max(source.rank for source in sources)
            found = {source.scale for source in sources}
            formats |= {format_of(ref) for source in sources for ref in (source.down, source.up)}
            if len(found) == 1:
                scales[matrix] = found.pop()
            else:
                formats.add("f32")
        return ExpertPart(
            format=common_format(formats),
            ranks=(ranks[0], ranks[1], ranks[2]),
            scales=(scales[0], scales[1], scales[2]),
            hidden=config.expert_hidden,
            width=config.expert_width_in(layer),
        )

    def read(self, layer: int, expert: int) -> bytes:
        """Return the bytes of an expert's part.

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        part, content = self.parts[layer], bytearray(self.parts[layer].nbytes)
        with self._lock:
            for matrix in range(3):
                sources = self._sources.get((layer, matrix), {})
                source = sources.get(expert) or sources.get(None)
                if source is None:
                    continue
                for start, shape, values in zip(
                    part.offsets[matrix],
                    part.shapes(matrix),
                    self._values(layer, expert, source, part, part.scales[matrix]),
                    strict=True,
                ):
                    padded = np.zeros(shape, values.dtype)
                    padded[: len(values)] = values
                    content[start : start + padded.nbytes] = padded.tobytes()
        return bytes(content)

    def _values(
        self, layer: int, expert: int, source: _Source, part: ExpertPart, scale: float
    ) -> tuple[Values, Values]:
        """Return `down` [rank, columns] and `up` [rank, rows] of an expert."""
        if source.order is None:
            down, up = self._tensors.read(source.down), self._tensors.read(source.up)
        elif source.order == "stacked":
            down, up = (self._tensors.read(ref.at(expert)) for ref in (source.down, source.up))
        else:
            down = self._tensors.read(source.down.rows(expert * source.rank, source.rank))
            up = self._side_by_side(layer, source)[expert]
        down, up = (
            as_format(values, format_of(ref), part.format)
            for values, ref in ((down, source.down), (up, source.up))
        )
        if source.is_swapped:
            down, up = up.T, down.T
        own_up = up[source.rows].T
        if source.scale != scale:  # folded, in float32
            own_up = own_up * np.float32(source.scale)
        return down, own_up

    def _side_by_side(self, layer: int, source: _Source) -> Values:
        """Return [experts, rows, rank] of a tensor [rows, rank * experts], kept until another layer is read."""
        if layer != self._kept_layer:
            self._kept.clear()
            self._kept_layer = layer
        key = source.up.name, source.order == "expert_fastest"
        if key not in self._kept:
            rows = source.up.shape[0]
            kept = np.empty(
                (self._num_experts, rows, source.rank), self._tensors.read(source.up.rows(0, 1)).dtype
            )
            step = max(1, (8 << 20) // max(1, source.up.nbytes // rows))
            for row in range(0, rows, step):
                count = min(step, rows - row)
                block = self._tensors.read(source.up.rows(row, count))
                if source.order == "expert_fastest":
                    kept[:, row : row + count] = block.reshape(count, source.rank, -1).transpose(2, 0, 1)
                else:
                    kept[:, row : row + count] = block.reshape(count, -1, source.rank).transpose(1, 0, 2)
            self._kept[key] = kept
        return self._kept[key]
