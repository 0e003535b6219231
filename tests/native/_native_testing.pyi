"""What only tests and benchmarks call of the native module."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy
from numpy.typing import NDArray

import argosy._native
from argosy._native import Activation, Urgency, _DeltaSizes, _MambaSizes, _PoolSizes
from argosy.config import Format

# Written by `make stubs` from native/tests/native_testing.cpp: edit it there.

class RealFileSystem(argosy._native.FileSystem):
    """
    The kernel's files. `has_queue` False imitates a system without asynchronous reads.
    """

    def __init__(self, has_queue: bool = True) -> None: ...

class FaultyFileSystem(argosy._native.FileSystem):
    """
    `num_faults` reads, starting with read number `fail_read` (counted from 1), have a fault.

    Reads from the drive, which then bypass the page cache. eio: fails. eintr: is interrupted and must be retried.
    short: returns half of the bytes; the rest must be read. truncated: end of file. flip: one wrong bit in the middle.
    delay: returns `delay_seconds` later. hold: returns when `release` is called.

    Reads from the page cache. uncached: it lost the bytes. short_cached: it has the first half. no_cache: it cannot
    tell what it has.
    """

    def __init__(
        self,
        fail_read: int,
        kind: Literal[
            "eio",
            "eintr",
            "short",
            "truncated",
            "flip",
            "delay",
            "hold",
            "uncached",
            "short_cached",
            "no_cache",
        ],
        num_faults: int = 1,
        delay_seconds: float = 0.05,
        inner: argosy._native.FileSystem | None = None,
    ) -> None: ...
    def release(self) -> None:
        """Let the reads that are held, and all later ones, go on."""

    @property
    def num_reads(self) -> int: ...

class ReadsInPython(argosy._native.ExpertReads):
    """
    Reads that a test answers.

    Args:
        store: an object with the methods `hurry`, `wait_any`, `drop` and `cancel` of a `Store`.
        fetch: (places, urgency) -> tickets.
        bytes_of: the bytes that are read for an expert.
    """

    def __init__(
        self,
        store: object,
        fetch: Callable[[Sequence[tuple[tuple[int, int], int]], Urgency], Sequence[int]],
        bytes_of: Callable[[tuple[int, int]], int],
    ) -> None: ...

def route(
    runtime: argosy._native.Runtime,
    routing: argosy._native.Routing,
    logits: NDArray[numpy.float32],
    ids: NDArray[numpy.int32],
    weights: NDArray[numpy.float32],
) -> None:
    """
    Write ids (best first) and routing weights [tokens, k] from logits [tokens, experts].

    Raises:
        ValueError: the routing does not fit the number of experts.
    """

def combine(
    runtime: argosy._native.Runtime,
    expert_out: NDArray[numpy.float32],
    weights: NDArray[numpy.float32],
    out: NDArray[numpy.float32],
) -> None:
    """
    out[t] += sum over ascending j of weights[t, j] * expert_out[t * k + j].
    """

def add_sigmoid_gated(
    runtime: argosy._native.Runtime,
    x: NDArray[numpy.float32],
    gate_logit: NDArray[numpy.float32],
    out: NDArray[numpy.float32],
) -> None:
    """
    out[t] += sigmoid(gate_logit[t]) * x[t], for x and out [tokens, hidden].
    """

def mul_gate(
    runtime: argosy._native.Runtime,
    gate: NDArray[numpy.float32],
    x: NDArray[numpy.float32],
    is_softplus: bool = False,
) -> None:
    """
    x[n] *= sigmoid or softplus of gate[n], elementwise, for x [n, cols] and gate [n, cols] or [n, 1].
    """

def soft_cap(runtime: argosy._native.Runtime, x: NDArray[numpy.float32], cap: float) -> None:
    """x = cap * tanh(x / cap), in place, for x [rows, cols]."""

def swiglu_experts(
    runtime: argosy._native.Runtime,
    arena: argosy._native.Arena,
    formats: Sequence[Format],
    hidden: int,
    width: int,
    offsets: NDArray[numpy.int64],
    x: NDArray[numpy.float32],
    starts: NDArray[numpy.int32],
    token: NDArray[numpy.int32],
    row: NDArray[numpy.int32],
    out: NDArray[numpy.float32],
    *,
    activation: Activation = ("silu", 0.0, 0.0),
    gate_bias: NDArray[numpy.float32] | None = None,
    up_bias: NDArray[numpy.float32] | None = None,
    down_bias: NDArray[numpy.float32] | None = None,
) -> None:
    """
    Run each expert on its tokens: out[row[a]] = activation(x Wg^T + bg, x Wu^T + bu) Wd^T + bd, x = x[token[a]].

    Args:
        formats: formats of gate, up and down, or of up and down if the activation has no gate.
        offsets: int64 [experts, 3 or 2], where gate and up [width, hidden] and down [hidden, width] begin in the arena.
        x: [tokens, hidden].
        starts: [experts + 1]; expert i runs assignments starts[i] to starts[i + 1]; the last entry is their number.
        token: [assignments], the row of x.
        row: [assignments], the row of `out`, each at most once.
        out: [any, hidden]; rows that are not in `row` do not change.
        activation: the activation of gate and up.
        gate_bias, up_bias: [experts, width].   down_bias: [experts, hidden].
    """

def swiglu(
    runtime: argosy._native.Runtime,
    gate: argosy._native.Matrix | None,
    up: argosy._native.Matrix,
    down: argosy._native.Matrix,
    x: NDArray[numpy.float32],
    out: NDArray[numpy.float32],
    activation: Activation = ("silu", 0.0, 0.0),
) -> None:
    """
    Run one network on all tokens of x [tokens, hidden]: a dense layer or a shared expert.
    """

def latent_write(
    runtime: argosy._native.Runtime,
    kv: argosy._native.KvCache,
    layer: int,
    vectors: NDArray[numpy.float32],
    slots: NDArray[numpy.int64],
) -> None:
    """
    Store the latent vectors [tokens, dim] of a layer with `KvShape.latent`; slots as for `kv_write`.
    """

def latent_attention(
    runtime: argosy._native.Runtime,
    kv: argosy._native.KvCache,
    layer: int,
    q: NDArray[numpy.float32],
    key_up: argosy._native.Matrix,
    value_up: argosy._native.Matrix,
    block_table: NDArray[numpy.int32],
    sequence: NDArray[numpy.int32],
    order: NDArray[numpy.int32],
    scale: float,
    out: NDArray[numpy.float32],
    sees_until: NDArray[numpy.int32] | None = None,
    chosen: NDArray[numpy.int32] | None = None,
) -> None:
    """
    Multi-head latent attention (arXiv:2405.04434) in its absorbed form, over vectors that all heads share.

    Args:
        q: [tokens, heads, nope_dim + rope_dim], with the last rope_dim dimensions rotated.
        key_up: [heads * kv_rank, nope_dim]. For each head, maps a query from nope_dim to kv_rank dimensions.
        value_up: [heads * value_dim, kv_rank]. For each head, maps the weighted sum of latent vectors to its result.
        block_table, sequence, order, sees_until: as for `attention`.
        out: [tokens, heads * value_dim].
        chosen: [tokens, count], the positions that a token sees which would see more than `count`.
    """

def index_write(
    runtime: argosy._native.Runtime,
    kv: argosy._native.KvCache,
    layer: int,
    keys: NDArray[numpy.float32],
    slots: NDArray[numpy.int64],
) -> None:
    """Store the index keys [tokens, index_dim] of a layer."""

def choose_positions(
    runtime: argosy._native.Runtime,
    kv: argosy._native.KvCache,
    layer: int,
    q: NDArray[numpy.float32],
    weights: NDArray[numpy.float32],
    block_table: NDArray[numpy.int32],
    sequence: NDArray[numpy.int32],
    order: NDArray[numpy.int32],
    chosen: NDArray[numpy.int32],
    sees_until: NDArray[numpy.int32] | None = None,
) -> None:
    """
    Choose the positions of each token that sees more than `count` (native/ops/latent_index.h).

    Args:
        q: [tokens, heads, index_dim].   weights: [tokens, heads].
        block_table, sequence, order, sees_until: as for `attention`.
        chosen: [tokens, count]; rows of tokens that see all their positions do not change.
    """

def block_attention(
    runtime: argosy._native.Runtime,
    kv: argosy._native.KvCache,
    layer: int,
    q: NDArray[numpy.float32],
    index_q: NDArray[numpy.float32],
    block_table: NDArray[numpy.int32],
    sequence: NDArray[numpy.int32],
    order: NDArray[numpy.int32],
    block_size: int,
    num_local: int,
    scale: float,
    chosen: NDArray[numpy.int32],
    out: NDArray[numpy.float32],
) -> None:
    """
    Choose blocks for each token and KV head, and attend to them (native/ops/latent_index.h).

    Args:
        q, block_table, sequence, order, scale, out: as for `attention`.
        index_q: [tokens, kv_heads, index_dim].
        chosen: [tokens, kv_heads, blocks]; rows of tokens that see all their blocks do not change.
    """

def joint_attention(
    runtime: argosy._native.Runtime,
    kv: argosy._native.KvCache,
    layer: int,
    q: NDArray[numpy.float32],
    block_table: NDArray[numpy.int32],
    sequence: NDArray[numpy.int32],
    order: NDArray[numpy.int32],
    chosen: NDArray[numpy.int32],
    size: int,
    scale: float,
    sinks: NDArray[numpy.float32] | None,
    out: NDArray[numpy.float32],
) -> None:
    """
    Attend to blocks of `size` positions that all KV heads share, and to the unfinished block (native/ops/attention.h).

    Args:
        q, block_table, sequence, order, scale, sinks, out: as for `attention`.
        chosen: [tokens, blocks], ascending; rows of tokens that see no more whole blocks are not read.
    """

def gated_delta(
    runtime: argosy._native.Runtime,
    state: argosy._native.RecurrentState,
    layer: int,
    qkv: NDArray[numpy.float32],
    z: NDArray[numpy.float32],
    b: NDArray[numpy.float32],
    a: NDArray[numpy.float32],
    runs: NDArray[numpy.int64],
    *,
    conv: NDArray[numpy.float32],
    rate: NDArray[numpy.float32],
    dt_bias: NDArray[numpy.float32],
    norm: NDArray[numpy.float32],
    eps: float,
    sizes: _DeltaSizes,
    is_tiled: bool,
    out: NDArray[numpy.float32],
    floor: float | None = None,
) -> None:
    """
    A gated delta net (native/kernels/gated_delta.h) after its projections; overwrites qkv, b and a.

    With a floor, Kimi Delta Attention: each key dimension has a value of `a` and of dt_bias, and conv is one row, the
    [width, channels] of q, of k and of v.

    After the last layer, the slots are at the end of their runs.

    Args:
        layer: the layer of the state.
        qkv: [tokens, channels], q of all key heads, then k, then v.   z: [tokens, value heads * value dim].
        b, a: [tokens, value heads].
        runs: [runs, 3], first and end token of each sequence, and its slot.
        conv: [width, channels].   rate, dt_bias: [value heads].   norm: [value dim].
        is_tiled: value head i uses key head i modulo key heads, instead of i // (value heads per key head).
        out: [tokens, value heads * value dim].
    """

def lightning_attention(
    runtime: argosy._native.Runtime,
    state: argosy._native.RecurrentState,
    layer: int,
    q: NDArray[numpy.float32],
    k: NDArray[numpy.float32],
    v: NDArray[numpy.float32],
    runs: NDArray[numpy.int64],
    *,
    decay: NDArray[numpy.float32],
    scale: float,
    out: NDArray[numpy.float32],
) -> None:
    """
    Lightning attention (native/kernels/gated_delta.h) between its norms.

    Args:
        q, k, v, out: [tokens, heads * head dim].   decay: [heads].   runs: as for `gated_delta`.
    """

def causal_conv(
    runtime: argosy._native.Runtime,
    state: argosy._native.RecurrentState,
    layer: int,
    x: NDArray[numpy.float32],
    in_gate: NDArray[numpy.float32] | None,
    out_gate: NDArray[numpy.float32] | None,
    runs: NDArray[numpy.int64],
    *,
    weights: NDArray[numpy.float32],
    bias: NDArray[numpy.float32] | None = None,
    out: NDArray[numpy.float32],
) -> None:
    """
    silu(conv(x)), or with gates out_gate * conv(in_gate * x) (native/kernels/causal_conv.h).

    Args:
        x, in_gate, out_gate, out: [tokens, channels]; both gates or none.
        runs: as for `gated_delta`.   weights: [width, channels].   bias: [channels].
    """

def pool(
    runtime: argosy._native.Runtime,
    state: argosy._native.RecurrentState,
    layer: int,
    vectors: NDArray[numpy.float32],
    gates: NDArray[numpy.float32] | None,
    bias: NDArray[numpy.float32] | None,
    runs: NDArray[numpy.int64],
    *,
    sizes: _PoolSizes,
    out: NDArray[numpy.float32],
    begins: NDArray[numpy.float32],
) -> int:
    """
    Gather tokens in groups (native/ops/pool.h); return how many entries they completed. Runs cover all tokens.

    Args:
        vectors, gates: [tokens, columns].   bias: [ratio, columns].   runs: as for `gated_delta`.
        out: [tokens, dim]; the first rows become the entries.
        begins: [3 * tokens]; the first elements become the positions at which the groups of entries begin.
    """

def mamba_recurrence(
    runtime: argosy._native.Runtime,
    state: argosy._native.RecurrentState,
    layer: int,
    projected: NDArray[numpy.float32],
    runs: NDArray[numpy.int64],
    *,
    conv: NDArray[numpy.float32],
    conv_bias: NDArray[numpy.float32] | None = None,
    rate: NDArray[numpy.float32],
    dt_bias: NDArray[numpy.float32],
    skip: NDArray[numpy.float32],
    norm: NDArray[numpy.float32],
    eps: float,
    sizes: _MambaSizes,
    dt_limit: tuple[float, float],
    out: NDArray[numpy.float32],
) -> None:
    """
    A Mamba-2 mixer (native/ops/mamba.h) between its projections; overwrites `projected` [tokens, z, x, B, C, dt].

    Args:
        runs: as for `gated_delta`.   out: [tokens, heads * head dim].   The others are those of `mamba`.
    """
