"""A tower's arithmetic, in blocks of rows small enough that decoding never waits long for one.

    for each block of rows:  norm -> product and activation -> ...,  then yield

The shape of an input decides how it is divided. With exact products, a row's result does not depend on its block.

Elsewhere: the operations are native (`native/ops/encoder.h`); a tower's file says which of them it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.model.weights import DenseWeights

Rows = NDArray[np.float32]
Steps = Generator[None, None, None]
Gelu = Literal["erf", "tanh", "quick"]
Finish = Literal["store", "add", "multiply", "gelu_erf", "gelu_tanh", "gelu_quick", "silu"]
Config = TypeVar("Config")

# Between two yields: floating-point operations of products, and rows (for work that the products do not show).
MOST_FLOP = 3_000_000_000
MOST_ROWS = 1024
# Native products take this many rows at a time; fewer rows cost nearly as much.
_PANEL_ROWS = 64

FLOAT_BYTES = 4
# Python objects and arrays whose sizes do not depend on the input.
OVERHEAD_BYTES = 1 << 16


def block_rows(num_rows: int, flop_per_row: int) -> int:
    """Return the rows of the largest block: whole panels, unless one panel is too much work."""
    rows = max(1, MOST_FLOP // flop_per_row)
    return min(num_rows, MOST_ROWS, rows // _PANEL_ROWS * _PANEL_ROWS or rows)


def block_floats(num_rows: int, flop_per_row: int, floats_per_row: int) -> int:
    """Return the values of the largest block."""
    return block_rows(num_rows, flop_per_row) * floats_per_row


def columns(x: Rows, count: int) -> list[Rows]:
    """Divide x [rows, columns] into `count` views of equal width."""
    width = x.shape[1] // count
    return [x[:, at * width : (at + 1) * width] for at in range(count)]


def in_blocks(work: Callable[[slice], None], rows: range, flop_per_row: int) -> Steps:
    """Do the work on all rows, a block at a time."""
    step = block_rows(max(1, len(rows)), flop_per_row)
    for start in range(rows.start, rows.stop, step):
        work(slice(start, min(start + step, rows.stop)))
        yield


def sinusoids(positions: NDArray[np.int64], frequencies: NDArray[np.float64]) -> Rows:
    """Return sines, then cosines, of the angles of positions: [positions, 2 * frequencies]."""
    angles = positions[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Operations:
    """The operations of a tower: its weights by canonical name, and the threads that work on them.

    Args:
        is_exact: products and attention are float32; otherwise the CPU may multiply in bfloat16 where weights are
            bfloat16 (`_native.linear`, `_native.attend_rounded`).
    """

    def __init__(self, weights: DenseWeights, runtime: _native.Runtime, *, is_exact: bool) -> None:
        self._matrices, self._vectors = weights.matrices, weights.vectors
        self._runtime, self._is_exact = runtime, is_exact

    def flop_per_row(self, *names: str) -> int:
        """Return the floating-point operations of the products with these matrices, for one row."""
        return sum(2 * self._matrices[name].rows * self._matrices[name].cols for name in names)

    def num_rows(self, name: str) -> int:
        """Return the rows of a matrix."""
        return self._matrices[name].rows

    def vector(self, name: str) -> Rows:
        return self._vectors[name]

    def linear(self, name: str, x: Rows, out: Rows | None = None, *, finish: Finish = "store") -> Rows:
        """Compute x W^T + bias, if there is a bias: [rows, rows of W]; `finish` names the activation that follows."""
        matrix = self._matrices[name]
        if out is None:
            out = np.empty((len(x), matrix.rows), np.float32)
        bias = self._vectors.get(f"{name}_bias")
        _native.linear(self._runtime, matrix, x, out, bias, finish=finish, exact=self._is_exact)
        return out

    def layer_norm(self, name: str, x: Rows, eps: float) -> Rows:
        out = np.empty_like(x)
        _native.layer_norm(self._runtime, x, self._vectors[name], self._vectors.get(f"{name}_bias"), eps, out)
        return out

    def rms_norm(self, name: str | None, x: Rows, eps: float) -> Rows:
        """Apply RMSNorm; without a name, there is no weight."""
        weight = np.ones(x.shape[1], np.float32) if name is None else self._vectors[name]
        out = np.empty_like(x)
        _native.rms_norm(self._runtime, x, weight, eps, out)
        return out

    def gelu(self, x: Rows, kind: Gelu) -> Rows:
        """Apply GELU in place."""
        _native.gelu(self._runtime, x, kind)
        return x

    def add_product(self, name: str, x: Rows, out: Rows, factor: str | None) -> None:
        """Add x W^T + bias to `out`, times the vector `factor` if there is one."""
        if factor is None:
            self.linear(name, x, out, finish="add")
            return
        product = self.linear(name, x)
        product *= self.vector(factor)
        out += product

    def gelu_mlp(
        self,
        layer: str,
        hidden: Rows,
        eps: float,
        gelu: Literal["gelu_erf", "gelu_tanh", "gelu_quick"],
        factor: str | None = None,
    ) -> Steps:
        """Add the MLP of a layer, LayerNorm `mlp_norm` and matrices `up` and `down`, to `hidden`, times `factor`."""

        def work(rows: slice) -> None:
            normed = self.layer_norm(f"{layer}.mlp_norm", hidden[rows], eps)
            wide = self.linear(f"{layer}.up", normed, finish=gelu)
            self.add_product(f"{layer}.down", wide, hidden[rows], factor)

        return in_blocks(work, range(len(hidden)), self.flop_per_row(f"{layer}.up", f"{layer}.down"))

    def gated_mlp(
        self,
        name: str,
        x: Rows,
        out: Rows | None = None,
        *,
        activation: Literal["silu", "gelu_erf", "gelu_tanh"] = "silu",
        finish: Finish = "store",
        limit: float = 0.0,
    ) -> Rows:
        """The matrices `gate`, `up` and `down` of `name`. Not 0, `limit` cuts off gates before silu, and both sides of
        what they multiply.
        """
        if limit:
            gate, wide = self.linear(f"{name}.gate", x), self.linear(f"{name}.up", x)
            np.minimum(gate, limit, out=gate)
            np.clip(wide, -limit, limit, out=wide)
            wide *= gate
            with np.errstate(over="ignore"):  # a gate far below zero becomes zero
                np.exp(np.negative(gate, out=gate), out=gate)
            gate += 1
            wide /= gate
        else:
            wide = self.linear(f"{name}.gate", x, finish=activation)
            self.linear(f"{name}.up", x, wide, finish="multiply")
        return self.linear(f"{name}.down", wide, out, finish=finish)

    def rows_of(self, name: str, ids: NDArray[np.int32]) -> Rows:
        """Rows of a matrix."""
        out = np.empty((len(ids), self._matrices[name].cols), np.float32)
        _native.embed(self._runtime, self._matrices[name], ids, out)
        return out

    def rotate(self, x: Rows, cosine: Rows, sine: Rows, *, is_interleaved: bool) -> None:
        """Rotate x [rows, heads, head_dim] in place; rows may be strided."""
        _native.rope(self._runtime, x, cosine, sine, is_interleaved)

    def attend_all(self, query: Rows, key: Rows, value: Rows, scale: float, out: Rows) -> None:
        """Compute attention in which each query sees every key: all [rows, heads, head_dim]."""
        _native.attend(self._runtime, query, key, value, scale, out)

    def self_attention(
        self, layer: str, hidden: Rows, eps: float, *, num_heads: int, segments: Iterable[range]
    ) -> Steps:
        """Add to `hidden` the attention of a layer: LayerNorm `attn_norm` and matrices `q`, `k`, `v` and `o`."""
        query, key, value = (np.empty_like(hidden) for _ in range(3))

        def project(rows: slice) -> None:
            normed = self.layer_norm(f"{layer}.attn_norm", hidden[rows], eps)
            for name, out in (("q", query), ("k", key), ("v", value)):
                self.linear(f"{layer}.{name}", normed, out[rows])

        flop = self.flop_per_row(*(f"{layer}.{name}" for name in ("q", "k", "v")))
        yield from in_blocks(project, range(len(hidden)), flop)
        head_dim = hidden.shape[1] // num_heads
        yield from self.add_attention(layer, hidden, query, key, value, head_dim=head_dim, segments=segments)

    def add_attention(
        self,
        layer: str,
        hidden: Rows,
        query: Rows,
        key: Rows,
        value: Rows,
        *,
        head_dim: int,
        segments: Iterable[range],
        factor: str | None = None,
    ) -> Steps:
        """Add to `hidden` the product of matrix `o` of a layer with its heads' attention, scaled by their width, times
        the vector `factor` if there is one.
        """

        def add(rows: slice, heads: Rows) -> None:
            self.add_product(f"{layer}.o", heads, hidden[rows], factor)

        yield from self.attend(
            query,
            key,
            value,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            segments=segments,
            output=f"{layer}.o",
            project=add,
        )

    def attend(
        self,
        query: Rows,
        key: Rows,
        value: Rows,
        *,
        head_dim: int,
        scale: float,
        segments: Iterable[range],
        output: str,
        project: Callable[[slice, Rows], None],
    ) -> Steps:
        """Compute attention in which each row sees its whole segment and nothing else, and the product after it.

        Args:
            query: [rows, heads * head_dim].   key, value: [rows, KV heads * head_dim].
            segments: ranges of rows that cover all rows.
            output: the matrix that `project` applies to the heads' results.
            project: receives a block of rows, and the heads' results [rows, heads * head_dim].
        """
        query, key, value = (x.reshape(len(x), -1, head_dim) for x in (query, key, value))
        is_rounded = self._runtime.rounds and not self._is_exact and self._matrices[output].format == "bf16"

        def work(rows: slice) -> None:
            heads = np.empty(query[rows].shape, np.float32)
            if rounded is None:
                self.attend_all(query[rows], key[seen], value[seen], scale, heads)
            else:
                _native.attend_rounded(
                    self._runtime, query[rows], rounded, len(segment), key.shape[1], scale, heads
                )
            project(rows, heads.reshape(len(heads), -1))

        for segment in segments:
            seen, rounded = slice(segment.start, segment.stop), None
            if is_rounded:
                rounded = np.empty(_native.rounded_keys_bytes(len(segment), *key.shape[1:]), np.uint8)
                _native.round_keys(self._runtime, key[seen], value[seen], rounded)
            flop = attention_flop(len(segment), query[0].size) + self.flop_per_row(output)
            yield from in_blocks(work, segment, flop)


def gelu_mlp_floats(num_rows: int, width: int, mlp_width: int) -> int:
    """Return the most float32 values that `Operations.gelu_mlp` allocates."""
    return block_floats(num_rows, 4 * width * mlp_width, width + mlp_width)


def attention_flop(num_seen: int, width: int) -> int:
    """Return the floating-point operations of attention for one row, without the product after it."""
    return 4 * num_seen * width


def attention_floats(num_seen: int, width: int, key_width: int, output_flop: int, project: int = 0) -> int:
    """Return the most float32 values that `Operations.attend` allocates for a segment.

    Args:
        output_flop: floating-point operations, per row, of the product after attention.
        project: the most values that this product allocates per row.
    """
    rounded = -(-_native.rounded_keys_bytes(num_seen, 1, key_width) // FLOAT_BYTES)
    return rounded + block_floats(num_seen, attention_flop(num_seen, width) + output_flop, width + project)


class Tower(Generic[Config]):
    """The weights and threads of a tower; `encode` may be run for several inputs at the same time.

    Args:
        is_exact: products are float32; otherwise the CPU may multiply blocks of rows in bfloat16.
    """

    def __init__(
        self, config: Config, weights: DenseWeights, runtime: _native.Runtime, *, is_exact: bool = False
    ) -> None:
        self._config = config
        self._operations = Operations(weights, runtime, is_exact=is_exact)
