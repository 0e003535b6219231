"""An adapter in memory, ready for a model's steps: its dense pairs in one block, beside the matrices that they change.

    AdapterFiles, factor  ->  load_adapter  ->  LoadedAdapter  ->  Model.set_adapter(number, ...)

The user's factor multiplies the scale of every pair; a replaced matrix has no scale. An adapter with the factor 0 is no
adapter: its tokens have the number -1 in `Step.adapters`, as those of the base.

Elsewhere: native/ops/stack_adapter.h does the arithmetic; the parts of experts are not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from argosy import _native
from argosy.adapters.files import PAIR_ALIGNMENT, AdapterFiles, LowRank, PairFormat, Values
from argosy.adapters.magnitudes import Factors, Floats
from argosy.adapters.targets import is_replaceable, target_shapes
from argosy.adapters.values import widen
from argosy.checkpoint.formats import round_up
from argosy.config import LatentConfig, ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.model import LoadedAdapter
from argosy.model.weights import DenseWeights

_NETWORKS = (("gate", "up", "down"), ("shared_gate", "shared_up", "shared_down"))
_MOST_RANK = 4096  # of all pairs of a matrix; `kMostRank` in native/ops/stack_adapter.h
_Pair = tuple[_native.Matrix, _native.Matrix, float, _native.Matrix | None]


def dense_bytes(files: AdapterFiles, config: ModelConfig) -> int:
    """Return `LoadedAdapter.nbytes` before the adapter is loaded. It must fit the model (`require_fit`)."""
    return sum(_room(values) for values in _stored(files, config)) + _native.StackAdapter.scratch_bytes


def network_ranks(files: AdapterFiles, config: ModelConfig) -> int:
    """Return the most that the ranks of gate, up and down of a dense network, a shared or a routed expert add up to.

    Steps take scratch memory for them (`StackSizes.scratch_bytes`).
    """
    ranks = [sum(part.ranks) for part in files.experts.values()]
    for layer in range(config.num_layers):
        for names in _NETWORKS:
            pairs = (files.dense.get(f"layers.{layer}.{name}", ()) for name in names)
            ranks.append(sum(pair.rank for matrix in pairs for pair in matrix))
    return max(ranks)


def load_adapter(
    files: AdapterFiles, config: ModelConfig, weights: DenseWeights, *, factor: float = 1.0
) -> LoadedAdapter:
    """Copy the dense part of an adapter into one block of memory.

    Args:
        config: the model's, without draft layers (`ModelFiles.own_config`).
        factor: multiplies the scale of every pair.

    Raises:
        UnsupportedModel, CheckpointError: as `require_fit`, and `Factors.of_rows`.
    """
    require_fit(files, config)
    factors = Factors(files.path, factor)
    memory = _Memory(sum(_room(values) for values in _stored(files, config)), factor)
    stack = _native.StackAdapter(network_ranks(files, config))
    joined: dict[str, LowRank] = {}
    for name, pairs in files.dense.items():
        if _is_joined(name):
            joined[name] = _joined(pairs, target_shapes(config)[name][0])
            continue
        base = weights.matrices[config.head_name if name == "head" else name]
        for pair in pairs:
            stack.add_pair(base, memory.pair(pair, factors.of_rows(name, pair, base)), pair.row_begin)
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in joined):
        _add_joined(stack, prefix, joined, config, weights, memory, factors)
    if (one := files.embedding) is not None:
        base = weights.matrices["embed"]
        rows, up = memory.place(one.rows, one.format), memory.place(one.up, one.format)
        by = memory.place_factors(factors.of_embedding(one, base))
        stack.add_embedding(base, (rows, up, one.scale * factor, by))
    for name, replacement in files.replaced.items():
        matrix = memory.place(replacement.values, replacement.format)
        if name == "embed":
            stack.replace_embedding(weights.matrices[name], matrix)
        else:
            stack.replace(weights.matrices[config.head_name if name == "head" else name], matrix)
    return LoadedAdapter(stack=stack, nbytes=dense_bytes(files, config))


class _Memory:
    """One block of memory that fills up. `factor` multiplies the scales of pairs."""

    def __init__(self, nbytes: int, factor: float) -> None:
        self._arena, self._end = _native.Arena(max(1, nbytes)), 0
        self._factor = factor

    def place(self, values: Values, format: PairFormat) -> _native.Matrix:
        at, self._end = self._end, self._end + _room(values)
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._arena.array()[at : at + len(content)] = content
        return _native.Matrix(self._arena, at, format, *values.shape)

    def place_factors(self, factors: Floats | None) -> _native.Matrix | None:
        return None if factors is None else self.place(factors, "f32")

    def pair(self, pair: LowRank, factors: Floats | None) -> _Pair:
        down, up = self.place(pair.down, pair.format), self.place(pair.up, pair.format)
        return down, up, pair.scale * self._factor, self.place_factors(factors)


def _add_joined(
    stack: _native.StackAdapter,
    prefix: str,
    joined: Mapping[str, LowRank],
    config: ModelConfig,
    weights: DenseWeights,
    memory: _Memory,
    factors: Factors,
) -> None:
    """Add the pairs of a layer's networks and of its latent attention."""

    def placed(name: str) -> _Pair | None:
        key = f"{prefix}.{name}"
        pair = joined.get(key)
        return None if pair is None else memory.pair(pair, factors.of_rows(key, pair, weights.matrices[key]))

    for names in _NETWORKS:
        gate, up, down = map(placed, names)
        if gate or up or down:
            stack.add_network(weights.matrices[f"{prefix}.{names[1]}"], gate, up, down)
    mixer = config.layers[int(prefix.split(".")[1])].mixer
    keys, values = joined.get(f"{prefix}.k_up"), joined.get(f"{prefix}.v_up")
    if isinstance(mixer, LatentConfig) and (keys or values):
        key_base, value_base = weights.matrices[f"{prefix}.k_up"], weights.matrices[f"{prefix}.v_up"]
        of_keys = of_values = None
        if keys is not None:  # absorbed, their matrix is transposed
            by = factors.of_keys(f"{prefix}.k_up", keys, key_base, mixer.num_heads)
            of_keys = memory.pair(replace(keys, down=_by_head(keys.up, mixer.num_heads), up=keys.down), by)
        if values is not None:
            by = factors.of_rows(f"{prefix}.v_up", values, value_base)
            of_values = memory.pair(replace(values, up=_by_head(values.up, mixer.num_heads)), by)
        stack.add_latent(key_base, value_base, mixer.num_heads, of_keys, of_values)


def _by_head(up: Values, num_heads: int) -> Values:
    """[rank, heads * rows] -> [heads * rank, rows]"""
    rank, rows = up.shape[0], up.shape[1] // num_heads
    by_head: Values = up.reshape(rank, num_heads, rows).transpose(1, 0, 2).reshape(num_heads * rank, rows)
    return by_head


def require_fit(files: AdapterFiles, config: ModelConfig) -> None:
    """Check that the dense part of an adapter fits a model.

    Raises:
        UnsupportedModel: it changes a matrix that no adapter can change.
        CheckpointError: a pair does not have the shape of its matrix.
    """
    shapes = target_shapes(config)
    for name in (*files.dense, *files.replaced):
        if name not in shapes or (name in files.replaced and not is_replaceable(name)):
            change = "replaces" if name in files.replaced else "has a pair for"
            raise UnsupportedModel(
                f"{files.path.name} {change} {name}, which no adapter can change in this model",
                hint="train it without this target",
                path=files.path,
                tensor=name,
            )
    wanted: list[tuple[str, Values, tuple[int, ...]]] = []
    for name, pairs in files.dense.items():
        rows, columns = shapes[name]
        if (rank := sum(pair.rank for pair in pairs)) > _MOST_RANK:
            raise UnsupportedModel(
                f"{files.path.name}: the pairs of {name} have rank {rank}; at most {_MOST_RANK} is supported",
                path=files.path,
                tensor=name,
            )
        for pair in pairs:
            last = pair.row_begin + pair.up.shape[1]
            if not 0 <= pair.row_begin < last <= rows:
                raise CheckpointError(
                    f"{files.path.name}: a pair changes rows {pair.row_begin} to {last - 1} of {name}, it has {rows}",
                    path=str(files.path),
                    tensor=name,
                )
            wanted.append((name, pair.down, (pair.rank, columns)))
            wanted.append((name, pair.up, (pair.rank, last - pair.row_begin)))
            if pair.magnitude is not None:
                if len(pairs) > 1:
                    raise UnsupportedModel(
                        f"{files.path.name} has magnitudes for {name} and {len(pairs)} pairs; DoRA has one pair",
                        path=files.path,
                        tensor=name,
                    )
                wanted.append((name, pair.magnitude, (last - pair.row_begin,)))
    if (embedding := files.embedding) is not None:
        rank = len(embedding.up)
        vocab_size, hidden = shapes["embed"]
        wanted.append(("embed", embedding.rows, (vocab_size, rank)))
        wanted.append(("embed", embedding.up, (rank, hidden)))
        if (lengths := embedding.magnitude) is not None:
            wanted.append(("embed", lengths, (1, hidden) if len(lengths) == 1 else (vocab_size, 1)))
    wanted += [(name, one.values, shapes[name]) for name, one in files.replaced.items()]
    for name, values, shape in wanted:
        if values.shape != shape or not shape[0]:
            raise CheckpointError(
                f"{files.path.name}: a part of the adapter for {name} is {list(values.shape)}, expected {list(shape)}",
                path=str(files.path),
                tensor=name,
            )


def _joined(pairs: tuple[LowRank, ...], rows: int) -> LowRank:
    """Return one pair that changes all rows. Several become one in float32, with zeros where they change nothing."""
    if len(pairs) == 1 and pairs[0].up.shape[1] == rows:
        return pairs[0]
    down = np.concatenate([widen(pair.down, pair.format) for pair in pairs])
    up = np.zeros((len(down), rows), np.float32)
    first = 0
    for pair in pairs:
        begin, count = pair.row_begin, pair.up.shape[1]
        up[first : first + pair.rank, begin : begin + count] = np.float32(pair.scale) * widen(
            pair.up, pair.format
        )
        first += pair.rank
    return LowRank(format="f32", down=down, up=up, scale=1.0)


def _is_joined(name: str) -> bool:
    """Whether native code takes one pair for all rows of this matrix."""
    return name.rpartition(".")[2] in {*_NETWORKS[0], *_NETWORKS[1], "k_up", "v_up"}


def _stored(files: AdapterFiles, config: ModelConfig) -> Iterator[Values]:
    """The arrays that memory will hold."""
    shapes = target_shapes(config)
    for name, pairs in files.dense.items():
        for pair in (_joined(pairs, shapes[name][0]),) if _is_joined(name) else pairs:
            yield from _arrays(pair.down, pair.up, pair.magnitude)
    if files.embedding is not None:
        yield from _arrays(files.embedding.rows, files.embedding.up, files.embedding.magnitude)
    for replacement in files.replaced.values():
        yield replacement.values


def _arrays(*arrays: Values | None) -> Iterator[Values]:
    """Those that are there. Factors take the room of their magnitudes."""
    return (one for one in arrays if one is not None)


def _room(values: Values) -> int:
    return round_up(values.nbytes, PAIR_ALIGNMENT)
