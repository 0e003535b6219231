"""The native module: arithmetic, threads and bytes.

Arrays are C-contiguous; float arrays are float32 and integers int32 unless a docstring says otherwise. A wrong size,
dtype, range or name raises ValueError with what was found and what was expected. Every operation releases the GIL.
One `Runtime` runs one operation at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Format = Literal[
    "f32", "f16", "bf16", "f8",
    "q8", "q4", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4",
    "int4",
]  # fmt: skip
InstructionSet = Literal["plain", "avx2", "avx512"]
AskAhead = Literal["off", "one_level", "two_levels"]
Activation = tuple[Literal["silu", "clamped"], float, float]  # kind, limit, alpha
_Floats = NDArray[np.float32]
_Ints = NDArray[np.int32]
_Bytes = NDArray[np.uint8]

# Kernels (native/kernels, native/ops).
#
# Promise: for one row and one token the floating-point operations and their order are the same whatever else is in
# the call, the number of threads and the alignment of the weights.

def instruction_sets() -> list[InstructionSet]:
    """Those this CPU can run, worst first."""

def use_instruction_set(name: str) -> None:
    """Run on `name` from now on. Without a call the best one runs."""

def instruction_set() -> InstructionSet: ...

class Runtime:
    """A pool of threads, the caller among them, and scratch memory that only grows.

    Args:
        num_threads: at most 1024.
        ask_ahead: whether products with one token prefetch quantised weights, and into how many caches
            (`ask_ahead_probe`). No result depends on it. None: off with AVX-512, one level without.

    Raises:
        RuntimeError: the system refuses a thread.
    """

    def __init__(self, num_threads: int, ask_ahead: AskAhead | None = None) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def ask_ahead(self) -> AskAhead: ...
    @property
    def scratch_bytes(self) -> int: ...
    def close(self) -> None:
        """End the threads and give back the scratch; operations then raise ValueError."""

def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a matrix (layout: native/kernels/formats.h)."""

def quantize(format: Format, weights: _Floats, out: _Bytes, runtime: Runtime | None = None) -> None:
    """Write weights [rows, cols] to `out` [matrix_bytes] as f32, f16, bf16, or q8 or q4 on the threads of `runtime`.

    The bytes are the same on every instruction set. q4 scales have the least squared error of a list of candidates. A
    group of 32 with an infinity or a NaN gets a NaN scale. The other formats only hold what a file has.
    """

def transcode(
    block_type: str, data: _Bytes, rows: int, cols: int, interleaved: int = 1, out: _Bytes | None = None
) -> _Bytes:
    """Blocks of a matrix [rows, cols] as the bytes of its slot format, without loss.

    Q8_0 becomes q8, Q4_0 q4, GGUF's other types the format of their name; cols is a multiple of their block's 32 or
    256. `int4_quants`, `int4_scales`, `mxfp4_quants`, `mxfp4_scales`, `f8_codes`, `f8_scales` and `f8_scales_bf16`
    (native/kernels/transcode.h) write only their part of the matrix: to `out` [matrix_bytes], which is returned, or
    beside zeros. `interleaved` matrices of `rows` rows each, row by row in `data`, come out one behind the other.

    Raises:
        ValueError: a code of f8 is NaN, or a scale gives weights that no float32 holds.
    """

def dequantize(format: Format, data: _Bytes, rows: int, cols: int) -> _Floats:
    """The weights [rows, cols] that the products see."""

class Matrix:
    """Weights inside an arena or a uint8 array, which it keeps alive. Any offset works; 64 is the fastest."""

    def __init__(self, memory: Arena | _Bytes, offset: int, format: Format, rows: int, cols: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def format(self) -> Format: ...

def matmul(runtime: Runtime, matrices: Sequence[Matrix], x: _Floats, outs: Sequence[_Floats]) -> None:
    """outs[i] = x matrices[i]^T, for x [tokens, cols] and outs[i] [tokens, rows of matrix i].

    With quantised weights x becomes int8 (beside q8: int16) per group of 32, once for all matrices.
    """

def embed(runtime: Runtime, matrix: Matrix, ids: _Ints, out: _Floats) -> None:
    """out[t] = row ids[t] of the matrix."""

def rms_norm(runtime: Runtime, x: _Floats, weight: _Floats, eps: float, out: _Floats) -> None:
    """out[n] = x[n] / sqrt(mean(x[n]^2) + eps) * weight, for x [n, cols]; out may be x."""

def rope(runtime: Runtime, x: _Floats, cosine: _Floats, sine: _Floats, is_interleaved: bool = False) -> None:
    """Rotate x [tokens, heads, head_dim] in place, by cosine and sine [tokens, pairs].

    Dimension i turns with dimension i + pairs, or, interleaved, dimension 2 i with 2 i + 1; dimensions from 2 * pairs
    on stay.
    """

class Routing:
    """How the experts of a token follow from its router logits (native/kernels/route.h).

    Scores are the softmax over all experts, or each one's sigmoid. The k best are chosen by score plus `choice_bias`,
    of the best `kept_groups` of `num_groups` groups of equal size; a group is worth its best expert, or the sum of its
    best two. On a tie the lower id wins. Routing weights are the scores, without the bias, of those chosen; with
    `renormalize` divided by their sum plus `renormalize_eps`; times `scale`.

    Args:
        experts_per_token: k.
        choice_bias: [experts]; None for none.
    """

    def __init__(
        self,
        experts_per_token: int,
        *,
        score: Literal["softmax", "sigmoid"],
        choice_bias: _Floats | None = None,
        num_groups: int = 1,
        kept_groups: int = 1,
        group_score: Literal["max", "top2"] = "top2",
        renormalize: bool,
        renormalize_eps: float = 0.0,
        scale: float = 1.0,
    ) -> None: ...

def route(runtime: Runtime, routing: Routing, logits: _Floats, ids: _Ints, weights: _Floats) -> None:
    """Logits [tokens, experts] -> ids (best first) and routing weights [tokens, k].

    Raises:
        ValueError: the routing does not fit the number of experts.
    """

def combine(runtime: Runtime, expert_out: _Floats, weights: _Floats, out: _Floats) -> None:
    """out[t] += sum over j, ascending, of weights[t, j] * expert_out[t * k + j]."""

def mul_sigmoid(runtime: Runtime, gate: _Floats, x: _Floats) -> None:
    """x[n] *= sigmoid(gate[n]), elementwise, for x and gate [n, cols]."""

def add_sigmoid_gated(runtime: Runtime, x: _Floats, gate_logit: _Floats, out: _Floats) -> None:
    """out[t] += sigmoid(gate_logit[t]) * x[t], for x and out [tokens, hidden]."""

def swiglu_experts(
    runtime: Runtime,
    arena: Arena,
    formats: Sequence[Format],
    hidden: int,
    width: int,
    offsets: NDArray[np.int64],
    x: _Floats,
    starts: _Ints,
    token: _Ints,
    row: _Ints,
    out: _Floats,
    *,
    activation: Activation = ("silu", 0.0, 0.0),
    gate_bias: _Floats | None = None,
    up_bias: _Floats | None = None,
    down_bias: _Floats | None = None,
) -> None:
    """Run each expert on its tokens: out[row[a]] = activation(x Wg^T + bg, x Wu^T + bu) Wd^T + bd, x = x[token[a]].

    Args:
        formats: of gate, up and down.
        offsets: int64 [experts, 3], where gate and up [width, hidden] and down [hidden, width] begin in the arena.
        x: [tokens, hidden].
        starts: [experts + 1]; expert i runs assignments starts[i] to starts[i + 1], and the last is their number.
        token: [assignments], row of x.
        row: [assignments], row of `out`, each at most once.
        out: [any, hidden]; rows that `row` does not name stay as they are.
        activation: of gate and up.
        gate_bias, up_bias: [experts, width].   down_bias: [experts, hidden].
    """

def swiglu(
    runtime: Runtime,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    x: _Floats,
    out: _Floats,
    activation: Activation = ("silu", 0.0, 0.0),
) -> None:
    """The same for one network and all tokens of x [tokens, hidden]: a dense layer or a shared expert."""

class KvShape:
    """What a layer keeps of each position in a KvCache."""

    @staticmethod
    def keys_values(kv_heads: int, head_dim: int) -> KvShape:
        """A key and a value for each KV head. Positions of a block and dimensions of values are padded to 16."""

    @staticmethod
    def latent(dim: int) -> KvShape:
        """One vector that all heads share, and nothing else."""

    @staticmethod
    def none() -> KvShape:
        """Nothing: the layer has a recurrent state."""

def kv_cache_bytes(
    layers: Sequence[KvShape], num_blocks: int, block_tokens: int, dtype: Literal["f32", "f16"]
) -> int:
    """What a KvCache takes."""

class KvCache:
    """What all layers keep of the positions they have seen; memory appears when it is first written."""

    def __init__(
        self, layers: Sequence[KvShape], num_blocks: int, block_tokens: int, dtype: Literal["f32", "f16"]
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def block_bytes(self) -> int:
        """Of one block, all layers."""

    def copy_out(self, block: int, to: _Bytes) -> None:
        """All of a block into `to` [block_bytes]."""

    def copy_in(self, block: int, saved: _Bytes) -> None:
        """What `copy_out` gave, into any block of a cache of the same shapes."""

    def copy_block(self, from_block: int, to_block: int) -> None: ...

def kv_write(
    runtime: Runtime, kv: KvCache, layer: int, keys: _Floats, values: _Floats, slots: NDArray[np.int64]
) -> None:
    """Store keys and values [tokens, kv_heads, head_dim]; slot = block * block_tokens + offset, int64 [tokens]."""

def attention(
    runtime: Runtime,
    kv: KvCache,
    layer: int,
    q: _Floats,
    block_table: _Ints,
    sequence: _Ints,
    position: _Ints,
    scale: float,
    window: int,
    out: _Floats,
    sinks: _Floats | None = None,
) -> None:
    """Causal grouped-query attention; tokens of a sequence that stand next to each other share its keys.

    Args:
        q: [tokens, heads, head_dim], heads a multiple of kv_heads.
        block_table: [sequences, max_blocks]; position p of sequence s lies in block block_table[s, p // block_tokens].
        sequence, position: [tokens]. A token sees the positions up to its own, which must be written already.
        window: a token sees its last `window` positions, itself included; 0 for all.
        out: [tokens, heads * head_dim].
        sinks: [heads], a score of each head that takes weight and adds nothing; None for none.
    """

def latent_write(
    runtime: Runtime, kv: KvCache, layer: int, vectors: _Floats, slots: NDArray[np.int64]
) -> None:
    """Store the latent vectors [tokens, dim] of a layer that keeps such; slots as for `kv_write`."""

def latent_attention(
    runtime: Runtime,
    kv: KvCache,
    layer: int,
    q: _Floats,
    key_up: Matrix,
    value_up: Matrix,
    block_table: _Ints,
    sequence: _Ints,
    position: _Ints,
    scale: float,
    out: _Floats,
) -> None:
    """Causal multi-head latent attention (arXiv:2405.04434) in its absorbed form, over vectors that heads share.

    Args:
        q: [tokens, heads, nope_dim + rope_dim], its last rope_dim dimensions turned.
        key_up: [heads * kv_rank, nope_dim]. For each head, what makes a query of kv_rank dimensions of nope_dim.
        value_up: [heads * value_dim, kv_rank]. For each head, what makes its result of the weighted sum of latents.
        block_table, sequence, position: as for `attention`.
        out: [tokens, heads * value_dim].
    """

def latent_scratch_bytes(
    num_heads: int, nope_dim: int, rope_dim: int, kv_rank: int, max_tokens: int, num_threads: int
) -> int:
    """What `latent_attention` takes of a runtime's scratch, at most.

    Raises:
        ValueError: a size is below 0 or beyond 2^30, or the scratch would have more than 2^62 bytes.
    """

# The layers of a decoder (native/ops/stack.h), as one operation.

_DeltaSizes = tuple[int, int, int, int, int]  # key heads, value heads, key dim, value dim, conv width

def recurrent_state_bytes(num_slots: int, num_layers: int, sizes: _DeltaSizes) -> int:
    """What a RecurrentState takes."""

class RecurrentState:
    """What gated delta nets remember of the sequences that run, a slot for each; memory appears when first written.

    A slot stands at a position: the number of tokens it has seen. A run of tokens goes on from there, or begins anew
    with zeros at position 0. A step that failed half-way leaves position -1.

    Args:
        num_layers: those with a gated delta net, all of the same sizes.
    """

    def __init__(self, num_slots: int, num_layers: int, sizes: _DeltaSizes) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def slot_floats(self) -> int:
        """float32 numbers of one slot, all layers."""

    def position(self, slot: int) -> int: ...
    def restart(self, slot: int) -> None:
        """Back to position 0."""

    def copy_out(self, slot: int, to: _Floats) -> None:
        """All of a slot into `to` [slot_floats]."""

    def copy_in(self, slot: int, saved: _Floats, position: int) -> None:
        """What `copy_out` gave at `position`, into any slot."""

    def copy_slot(self, from_slot: int, to_slot: int) -> None:
        """State and position."""

def gated_delta(
    runtime: Runtime,
    state: RecurrentState,
    layer: int,
    qkv: _Floats,
    z: _Floats,
    b: _Floats,
    a: _Floats,
    runs: NDArray[np.int64],
    *,
    conv: _Floats,
    rate: _Floats,
    dt_bias: _Floats,
    norm: _Floats,
    eps: float,
    is_tiled: bool,
    out: _Floats,
) -> None:
    """A gated delta net (native/kernels/gated_delta.h) behind its projections; overwrites qkv, b and a.

    After the last layer the slots stand behind their runs.

    Args:
        layer: of the state.
        qkv: [tokens, channels], q of all key heads, then k, then v.   z: [tokens, value heads * value dim].
        b, a: [tokens, value heads].
        runs: [runs, 3], begin and end of the tokens of each sequence, and its slot.
        conv: [width, channels].   rate, dt_bias: [value heads].   norm: [value dim].
        is_tiled: value head i goes with key head i modulo key heads, not i // (value heads of each).
        out: [tokens, value heads * value dim].
    """

class Mixer:
    """How a layer lets positions see each other."""

class Ffn:
    """The feed-forward network of a layer."""

def grouped_query_attention(
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    *,
    num_heads: int,
    window: int,
    scale: float,
    query_bias: _Floats | None = None,
    key_bias: _Floats | None = None,
    value_bias: _Floats | None = None,
    output_bias: _Floats | None = None,
    query_norm: _Floats | None = None,
    key_norm: _Floats | None = None,
    is_norm_flat: bool = False,
    limit: float = 0.0,
    sinks: _Floats | None = None,
    has_gate: bool = False,
) -> Mixer:
    """q, k, v -> norm -> cut off -> rotary -> KV cache -> attention -> output projection.

    Args:
        query, output: [heads * head_dim, hidden] and back.   key, value: [kv_heads * head_dim, hidden].
        window, scale: as for `attention`.
        query_bias ...: one number per row of the matrix; None for none.
        query_norm, key_norm: of each head, [head_dim]; flat: of all heads at once, a number per row; both or none.
        limit: q, k and v are cut off at both signs of it; 0: not.
        sinks: [heads], as for `attention`.
        has_gate: query has rows [query, gate] of each head; what a head saw is taken times sigmoid of its gate.
    """

def gated_delta_net(
    qkv: Matrix,
    b: Matrix,
    output: Matrix,
    *,
    z: Matrix | None = None,
    a: Matrix | None = None,
    conv: _Floats,
    rate: _Floats,
    dt_bias: _Floats,
    norm: _Floats,
    sizes: _DeltaSizes,
    is_tiled: bool,
    state_layer: int,
) -> Mixer:
    """Projections -> `gated_delta` -> output projection. Vectors and `is_tiled` are as there.

    Args:
        qkv: [channels, hidden]. Without z: [q, k, v, z] of the first key head and its value heads, then of the next.
        b: [value heads, hidden]. Without a: [b, a] of the first key head's value heads, then of the next's.
        output: [hidden, value heads * value dim].
        state_layer: of the recurrent state.
    """

def multi_head_latent_attention(
    query: Matrix,
    kv_down: Matrix,
    key_up: Matrix,
    value_up: Matrix,
    output: Matrix,
    *,
    num_heads: int,
    rope_dim: int,
    scale: float,
    norm_eps: float,
    kv_norm: _Floats,
    query_down: Matrix | None = None,
    query_norm: _Floats | None = None,
) -> Mixer:
    """Query and compressed keys and values -> norms -> rotary -> KV cache -> attention -> output projection.

    Args:
        query: [heads * (nope_dim + rope_dim), query_rank], or of the hidden state without `query_down`.
        kv_down: [kv_rank + rope_dim, hidden].   kv_norm: [kv_rank].
        key_up, value_up, scale: as for `latent_attention`.
        output: [hidden, heads * value_dim].
        query_down, query_norm: [query_rank, hidden] and [query_rank], both or none.
        norm_eps: of both norms.
    """

def dense_ffn(gate: Matrix, up: Matrix, down: Matrix) -> Ffn:
    """SwiGLU of every token: gate and up [width, hidden], down [hidden, width]."""

def routed_ffn(
    router: Matrix,
    routing: Routing,
    *,
    router_bias: _Floats | None = None,
    width: int,
    formats: Sequence[Format],
    shared: Sequence[Matrix] | None = None,
    shared_score: Matrix | None = None,
    gate_bias: _Floats | None = None,
    up_bias: _Floats | None = None,
    down_bias: _Floats | None = None,
) -> Ffn:
    """Experts of `width` that the router chooses, as `route` does, and a shared one for every token.

    Args:
        router: [experts, hidden].
        router_bias: [experts], added to the router's product; None for none.
        formats: of gate, up and down of the routed experts.
        shared: gate, up and down of the shared expert.
        shared_score: [1, hidden]; the shared expert's output is taken times sigmoid(shared_score . x).
        gate_bias, up_bias: of the routed experts, experts * width numbers.   down_bias: experts * hidden.
    """

class Rotary:
    """Angles of the rotary position embedding: position * inverse_frequency (float64 [pairs], in radians).

    Computed in float64, as are the cosines and sines times `scale`; then rounded to float32. `is_interleaved`: which
    dimensions make a pair, as for `rope`.
    """

    def __init__(
        self, inverse_frequency: NDArray[np.float64], scale: float, is_interleaved: bool = False
    ) -> None: ...
    def angles(self, runtime: Runtime, position: _Ints, cosine: _Floats, sine: _Floats) -> None:
        """Positions [tokens] -> cosine and sine [tokens, pairs], as `rope` takes them."""

class Stack:
    """Embedding, layers and head of a decoder, run without Python between them; one step at a time.

    It keeps everything it is given alive. Its bits are those of the operations above, called one by one.

    Args:
        embedding, head: [vocabulary, hidden].   final_norm: [hidden].
        activation: of all feed-forward networks.
        layers: (norm [hidden], mixer, norm [hidden], feed-forward network) of each layer of `kv`.
        buffers: working memory by name, [max_tokens, columns] each (`model.workspace`).
        arena: where routed experts lie; None leaves them out of every sum.
        offsets: int64 [layers, experts, 3], where gate, up and down begin in the arena; with an arena.
        is_leased: a step stops where a layer has chosen its experts, and an expert lies where `offsets` say when it
            runs. Else every expert lies there for good.
        recurrent: of the layers with a gated delta net.
    """

    def __init__(
        self,
        runtime: Runtime,
        kv: KvCache,
        *,
        embedding: Matrix,
        head: Matrix,
        final_norm: _Floats,
        norm_eps: float,
        rotary: Rotary,
        activation: Activation,
        layers: Sequence[tuple[_Floats, Mixer, _Floats, Ffn]],
        buffers: Mapping[str, NDArray[Any]],
        arena: Arena | None,
        offsets: NDArray[np.int64] | None,
        is_leased: bool,
        recurrent: RecurrentState | None = None,
    ) -> None: ...
    def begin(
        self,
        token_ids: _Ints,
        position: _Ints,
        sequence: _Ints,
        slots: NDArray[np.int64],
        is_decode: NDArray[np.bool_],
        block_table: _Ints,
        last_rows: NDArray[np.int64],
        logits: _Floats,
        state_slots: _Ints | None = None,
    ) -> None:
        """Start a step, whatever became of the one before; nothing is computed yet.

        Args:
            token_ids, position, sequence, slots, is_decode: [tokens]; slots int64, is_decode bool.
            block_table: [sequences, blocks].
            last_rows: int64 [rows], tokens whose logits are wanted.
            logits: [rows, vocabulary], written at the end of the step.
            state_slots: [sequences], slots of the recurrent state; None without one.

        Raises:
            ValueError: something is out of range; or, with a recurrent state, tokens of a sequence are not consecutive,
                or do not go on where its slot stands.
        """

    def advance(self) -> tuple[int, list[int], list[int]] | None:
        """Run on until the step is done (None), or a layer waits for leased experts.

        Then: the layer, the experts its tokens chose (ascending), and those of them that only prompt tokens chose. All
        must have been run before the next call. ^C ends the call between two layers, and with it the step.
        """

    def look_ahead(self) -> list[list[int]]:
        """What the next layer with routed experts would choose from the present hidden state, while a layer waits.

        The experts that tokens rank first, then those that they rank second and nobody first ...: one list for each of
        `experts_per_token` ranks. Empty where no such layer follows.

        Raises:
            ValueError: experts of the layer that waits have run already; it works in their memory.
        """

    def run_shared(self) -> None:
        """Run the shared expert of the layer that waits, if it has one; once, before the next `advance`."""

    def run_experts(self, expert_ids: Sequence[int]) -> None:
        """Run experts of the layer that waits, each once."""

    def logits(self, rows: NDArray[np.int64], out: _Floats) -> None:
        """Logits [rows, vocabulary] of any tokens of the step that is done."""

    def take_seconds(self) -> tuple[float, float, float]:
        """Seconds of the router, of attention and dense networks, and of routed experts since the last call."""

    def take_lookups(self) -> int:
        """Resident experts that were used since the last call, counted once per layer and step."""

    def take_uses(self, out: NDArray[np.int64]) -> None:
        """How often tokens chose each expert since the last call, into [layers, most experts of a layer]."""

# Probes (native/ops/machine_probe.h): how fast this machine is right now. The best of several passes.

def memory_probe(threads: int, nbytes: int) -> float:
    """Bytes per second at which `threads` threads together read `nbytes` on huge pages with the widest loads.

    Takes `nbytes` of memory while it runs; below the size of the last cache it measures that cache.

    Raises:
        ValueError: threads below 1, or less than 4 MiB a thread.   MemoryError: no such memory.
    """

def ask_ahead_probe(threads: int) -> AskAhead:
    """The `ask_ahead` with which this machine reads the weights of one token fastest; off on a tie.

    It takes some tens of milliseconds, and 8 MiB of memory meanwhile. Without AVX-512 nothing is measured.

    Raises:
        ValueError: threads below 1.   MemoryError: no such memory.   RuntimeError: the system refuses a thread.
    """

def int8_probe(threads: int) -> float:
    """Integer operations per second, two per multiply-add, of the instruction that products with q4 weights use."""

# Store (native/store).

class Arena:
    """One private block of memory, aligned to 2 MiB and on huge pages; a page takes memory once it is written.

    Raises:
        MemoryError: the system would not reserve it.
    """

    def __init__(self, nbytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def array(self) -> _Bytes:
        """A view of all bytes. It keeps the memory, also after close()."""

    def populate(self) -> None:
        """Give pages to all of it, for a thread that has time; ends early when another thread closes it."""

    def close(self) -> None:
        """Let go of the memory; it goes back to the system with the last view, matrix or read that uses it."""

class FileSystem:
    """Where a store's reads go."""

class RealFileSystem(FileSystem):
    """The kernel's files. `has_queue` False: as on a system without asynchronous reads."""

    def __init__(self, has_queue: bool = True) -> None: ...

class FaultyFileSystem(FileSystem):
    """For tests: `num_faults` reads from the `fail_read`-th on (counted from 1) meet a fault.

    eio: fails. eintr: interrupted, to be tried again. short: half the bytes, to be read on. truncated: end of file.
    flip: one wrong bit in the middle. delay: comes `delay_seconds` later. These are reads from the drive, and then the
    page cache is not asked. Of reads from the page cache: uncached: it lost the bytes. short_cached: it has the first
    half. no_cache: it cannot say.
    """

    def __init__(
        self,
        fail_read: int,
        kind: Literal[
            "eio", "eintr", "short", "truncated", "flip", "delay", "uncached", "short_cached", "no_cache"
        ],
        num_faults: int = 1,
        delay_seconds: float = 0.05,
        inner: FileSystem | None = None,
    ) -> None: ...
    @property
    def num_reads(self) -> int: ...

# file_id, offset, nbytes, dest_offset; to be transcoded: and block_type, rows, cols, which may be followed by how many
# matrices of so many rows lie interleaved.
Piece = (
    tuple[int, int, int, int]
    | tuple[int, int, int, int, str, int, int]
    | tuple[int, int, int, int, str, int, int, int]
)
STAGING_BYTES: int

class Record:
    """Pieces that are read together, and the crc32c_wide of each or none: parsed once, fetched any number of times."""

    def __init__(self, pieces: Sequence[Piece], checksums: Sequence[int] | None = None) -> None: ...
    @property
    def pieces(self) -> list[tuple[int, int, int, int]]:
        """Where each is, and where it goes: without what it is transcoded from."""

def record_bytes(num_pieces: int, has_checksums: bool) -> int:
    """Bytes of heap that a `Record` takes beside its Python object."""

def request_bytes(piece_bytes: Sequence[int]) -> int:
    """Most bytes of heap that a ticket takes until it is done, for a record with pieces of so many bytes."""

Urgency = Literal["now", "soon", "maybe"]

class Store:
    """Threads that read pieces of files into arenas, at most 1024.

    Raises:
        RuntimeError: the system refuses a thread.
    """

    def __init__(self, num_readers: int, file_system: FileSystem | None = None) -> None: ...
    def open(self, path: str, direct: bool = True) -> int:
        """A file id. O_DIRECT if the file system takes it, else buffered, with the page cache dropped behind reads.

        With O_DIRECT, too, what the page cache holds when it is read comes from there; nothing is added to it.

        Raises:
            OSError: the file cannot be opened, or is not a regular file.
        """

    def info(self, file_id: int) -> tuple[str, int, int, bool, str]:
        """path, size, alignment, is_direct, why_not_direct. The alignment is at least 4096."""

    def fetch(self, arena: Arena, pieces: Sequence[Piece], checksums: Sequence[int] | None = None) -> int:
        """Start reading pieces (file_id, offset, nbytes, dest_offset); a ticket.

        A plain piece is rounded outwards to the alignment: its bytes begin at dest_offset + offset % alignment, and
        dest_offset is a multiple of the alignment. A checksum is the crc32c_wide of exactly the piece.

        A piece (..., block_type, rows, cols) is a matrix of GGUF blocks ("Q4_0"): a reader turns it into the slot
        format that belongs to them, beginning exactly at dest_offset, a multiple of 64. It has no checksum.
        """

    def fetch_many(
        self, arena: Arena, records: Sequence[tuple[Record, int]], urgency: Urgency = "now"
    ) -> list[int]:
        """The same for several (record, base) in one go, a ticket each; `base` is added to each dest_offset.

        now: somebody waits. soon: goes behind that. maybe: a guess, read only while the drive has little else to do.
        """

    def hurry(self, tickets: Sequence[int]) -> None:
        """Somebody waits for these now."""

    def wait_any(
        self, tickets: Sequence[int], block: bool = True
    ) -> list[tuple[int, str | None, str | None]]:
        """Block until one is done; all that are done as (ticket, error sentence, kind of error).

        Kinds: "io", "checksum", "short", "not finite" (a code or scale that is no number), "dropped".

        They are forgotten. Nothing is written for a ticket that is done, also when it failed. ^C ends the wait and
        leaves the tickets as they are. With `block` false only those that are done already.
        """

    def drop(self, tickets: Sequence[int]) -> list[int]:
        """Read no more of these; forget those of which nothing has begun, and return them. Never waits.

        The others end, as "dropped" unless all of it had begun, and are to be waited for.
        """

    def cancel(self, ticket: int) -> bool:
        """Forget a ticket once its bytes no longer move: what has not begun is dropped. False: not known."""

    def pending(self) -> int:
        """Tickets that are not done."""

    @property
    def staging_bytes(self) -> int:
        """What the readers may come to hold to transcode from, STAGING_BYTES each."""

    @property
    def staging_held_bytes(self) -> int:
        """What they hold of it now."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether the kernel reads by itself; else the readers call pread."""

    def stats(self) -> dict[str, float]:
        """bytes_read, and cached_bytes of them from the page cache; reads; busy_seconds of wall time.

        read_seconds are summed over reads, from begin to end; checksum_ and transcode_seconds over readers.
        """

    def close(self) -> None:
        """Join the readers and close the files. What was not read fails."""

def crc32c_wide(buffer: bytes | bytearray | memoryview | NDArray[Any]) -> int:
    """Checksum of a record: CRC32C over the CRC32Cs of four quarters (native/store/crc32c.h)."""

def drive_probe(path: str, record_bytes: int, num_records: int, num_readers: int, direct: bool) -> float:
    """Bytes per second of reading records at shuffled places into huge-page buffers.

    Raises:
        OSError: cannot be opened or read.   RuntimeError: `direct` is refused.   ValueError: less than one record.
    """
