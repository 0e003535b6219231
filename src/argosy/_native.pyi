"""
The native module: arithmetic, threads and bytes.

Arrays are C-contiguous; where rows may be strided, only each row is. Float arrays are float32 and integer arrays
int32 unless their type says otherwise. A wrong size, dtype, range or name raises ValueError with the found and the
expected value. Every operation releases the GIL. One `Runtime` runs one operation at a time.

For one row and one token, the floating-point operations of a kernel (native/kernels, native/ops) and their order do
not depend on the rest of the call, the number of threads or the alignment of the weights. One exception is documented
at `linear`.

Probes (native/ops/machine_probe.h) measure how fast this machine is right now: the best of several passes. They run
the kernels of `instruction_set`, or of the best one.

Constants:
    LARGEST_SIZE: most rows and most columns of a matrix.
    MATRIX_ALIGNMENT: bytes; where a transcoded matrix begins in an arena, and a matrix in a pack's record.
    PANEL_ROWS: rows of a quantised matrix that are interleaved.
    F8_BLOCK: rows and columns of a block of an f8 matrix, whose weights share a scale.
    STAGING_BYTES: most bytes that one reader of a `Store` holds for transcoding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy
from numpy.typing import NDArray

from argosy.config import Format, KvDtype, Tuning

# Written by `make stubs` from native/bind: edit it there.

InstructionSet = Literal["plain", "avx2", "amx", "avx512"]
Activation = tuple[
    Literal["silu", "clamped", "gelu_tanh", "silu_limited", "silu_capped", "relu2", "situ"], float, float
]  # kind, limit, alpha
Gelu = Literal["erf", "tanh", "quick"]
Finish = Literal["store", "add", "multiply", "gelu_erf", "gelu_tanh", "gelu_quick", "silu"]
Urgency = Literal["now", "soon", "maybe"]
# file_id, offset, nbytes, dest_offset. A piece to transcode adds block_type, rows, cols, optionally followed by
# the number of interleaved matrices with that many rows.
Piece = (
    tuple[int, int, int, int]
    | tuple[int, int, int, int, str, int, int]
    | tuple[int, int, int, int, str, int, int, int]
)
_DeltaSizes = tuple[int, int, int, int, int]  # key heads, value heads, key dim, value dim, conv width
_MambaSizes = tuple[int, int, int, int, int]  # heads, head dim, state dim, groups, conv width
_PoolSizes = tuple[int, int, bool]  # ratio, dim, whether groups overlap
_Buffer = bytes | bytearray | memoryview | NDArray[Any]

class Foreground:
    """
    Counts work that somebody waits for: `with foreground:` surrounds it. Others give way to it meanwhile: each of their
    threads works for `share` of the time, above 0 and at most 1.
    """

    def __init__(self, share: float) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, kind: object | None, error: object | None, trace: object | None) -> None: ...
    def give_way(self, worked_seconds: float) -> None:
        """
        Call it after so many seconds of work in the background: waits until there is no work in the foreground, or
        until the work took no more than its share of the time.
        """

class Arena:
    """
    One private block of memory, aligned to 2 MiB and on huge pages; a page takes memory when it is first written.

    Raises:
        MemoryError: the system refuses to reserve it.
    """

    def __init__(self, nbytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def array(self) -> NDArray[numpy.uint8]:
        """A view of all bytes. It keeps the memory alive, even after close()."""

    def populate(self, foreground: Foreground | None = None) -> None:
        """
        Commit all pages, in a background thread that gives way to `foreground`; ends early if another thread closes
        the arena or makes it smaller.
        """

    def resize(self, nbytes: int) -> None:
        """
        Use only the first `nbytes` from now on, at most what the arena was made with. The system gets the pages beyond
        at once; they are zero if the arena grows again. Nothing may be using them.
        """

    def close(self) -> None:
        """
        Release the memory; the system gets it back when the last view, matrix or read that uses it ends.
        """

class FileSystem:
    """The file system that a store reads from."""

class Record:
    """
    Pieces that are read together, with the crc32c_wide of each or none; parsed once, fetched any number of times.
    """

    def __init__(self, pieces: Sequence[Piece], checksums: Sequence[int] | None = None) -> None: ...
    @property
    def pieces(self) -> list[tuple[int, int, int, int]]:
        """The source and destination of each piece, without its transcoding."""

def record_bytes(num_pieces: int, has_checksums: bool) -> int:
    """Heap bytes of a `Record` in addition to its Python object."""

def request_bytes(piece_bytes: Sequence[int]) -> int:
    """
    Most heap bytes that a ticket takes until it is done, for a record with pieces of `piece_bytes`.
    """

class Store:
    """
    Threads, at most 1024, that read pieces of files into arenas.

    Args:
        bytes_per_s: imitate a drive that is no faster; None: do not.
        foreground: read few pieces at once and give way to this work, until `leave_background`; None: do not.

    Raises:
        RuntimeError: the system refuses to start a thread.
    """

    def __init__(
        self,
        num_readers: int,
        file_system: FileSystem | None = None,
        bytes_per_s: int | None = None,
        foreground: Foreground | None = None,
    ) -> None: ...
    def open(self, path: str, direct: bool = True) -> int:
        """
        Open a file and return its id. Uses O_DIRECT if the file system accepts it; otherwise reads are buffered, and
        the page cache is dropped after them.

        Even with O_DIRECT, bytes in the page cache are read from there; nothing is added to it.

        Raises:
            OSError: the file cannot be opened, or is not a regular file.
        """

    def info(self, file_id: int) -> tuple[str, int, int, bool, str]:
        """
        path, size, alignment, is_direct, why_not_direct. The alignment is at least 4096.
        """

    def fetch(self, arena: Arena, pieces: Sequence[Piece], checksums: Sequence[int] | None = None) -> int:
        """
        Start reading pieces (file_id, offset, nbytes, dest_offset); return a ticket.

        A plain piece is rounded outwards to the alignment: its bytes begin at dest_offset + offset % alignment, and
        dest_offset is a multiple of the alignment. A checksum is the crc32c_wide of exactly the piece.

        A piece (..., block_type, rows, cols) is a matrix of GGUF blocks ("Q4_0"): a reader transcodes it to the
        corresponding slot format, beginning exactly at dest_offset, a multiple of 64. It has no checksum.
        """

    def fetch_many(
        self, arena: Arena, records: Sequence[tuple[Record, int]], urgency: Urgency = "now"
    ) -> list[int]:
        """
        The same for several (record, base) at once, with a ticket for each; `base` is added to each dest_offset.

        now: a caller is waiting. soon: read after those. maybe: a guess, read only while the drive has little to do.
        """

    def hurry(self, tickets: Sequence[int]) -> None:
        """Make these urgent: a caller is now waiting for them."""

    def wait_any(
        self, tickets: Sequence[int], most_ms: int | None = None
    ) -> list[tuple[int, str | None, str | None]]:
        """
        Wait until a ticket is done, for at most `most_ms`; return every finished one as (ticket, error message,
        kind of error).

        Kinds: "io", "checksum", "short", "not finite" (a code or scale that is not a number), "dropped".

        Returned tickets are forgotten. After a ticket is done, even if it failed, nothing more is written for it. ^C
        ends the wait and does not change the tickets.
        """

    def drop(self, tickets: Sequence[int]) -> list[int]:
        """
        Stop reading these; forget those with no read begun, and return them. Never waits.

        The others end, as "dropped" unless all their reads had begun, and must be waited for.
        """

    def cancel(self, ticket: int) -> bool:
        """
        Drop reads of a ticket that have not begun, wait for the others, and forget it. False: unknown ticket.
        """

    def pending(self) -> int:
        """The number of tickets that are not done."""

    @property
    def staging_bytes(self) -> int:
        """Most bytes that readers may hold for transcoding, STAGING_BYTES each."""

    @property
    def staging_held_bytes(self) -> int:
        """Bytes that readers hold for transcoding now."""

    @property
    def is_asynchronous(self) -> bool:
        """
        Whether the kernel reads asynchronously; otherwise the readers call pread.
        """

    def stats(self) -> dict[str, float]:
        """
        bytes_read, with cached_bytes of them from the page cache; reads; busy_seconds of wall time.

        read_seconds are summed over reads, from begin to end; checksum_ and transcode_seconds are summed over readers.
        """

    def leave_background(self) -> None:
        """Read as much at once as the drive takes, and give way to nothing."""

    def close(self) -> None:
        """Join the readers and close the files. Unfinished reads fail."""

def trim_heap() -> None:
    """Return freed heap memory to the system, if the C library can."""

STAGING_BYTES: int = 2097152

def crc32c_wide(buffer: _Buffer) -> int:
    """
    The checksum of a record: CRC32C over the CRC32Cs of its four quarters (native/store/crc32c.h).
    """

def drive_probe(path: str, record_bytes: int, num_records: int, num_readers: int, direct: bool) -> float:
    """
    Bytes per second of reading records in shuffled order into huge-page buffers.

    Raises:
        OSError: `path` cannot be opened or read.   RuntimeError: `direct` is refused.
        ValueError: the file has less than one record.
    """

def instruction_sets() -> list[InstructionSet]:
    """The instruction sets that this CPU supports, worst first."""

def product_scratch_bytes(num_threads: int, instruction_set: str | None = None) -> int:
    """The most memory that products of a Runtime take besides its scratch."""

def amx_state() -> str:
    """
    absent: the CPU has no AMX, or not what kernels need; refused: the system lets this process use none; usable.
    """

def amx_formats() -> list[Format]:
    """
    Formats whose products can run on the tiles of AMX; none if the CPU or the system has no tiles.
    """

def measured_as(format: str) -> str:
    """
    The format that is measured in place of a format: for a grouped format, one of as many bits with the same
    arithmetic; any other is measured itself.
    """

def coded_formats() -> list[Format]:
    """Formats whose products decode the weights before they multiply them."""

FEWEST_FOR_TWO_PANELS: int = 2

MOST_FOR_ONE_PANEL: int = 8

def default_tuning() -> Tuning:
    """How products run if nothing was measured."""

class Runtime:
    """
    The kernels of one instruction set, a pool of threads, including the caller, and scratch memory.

    Args:
        num_threads: at most 1024.
        tunings: how products with the weights of each quantised format run (`product_probe` measures it); formats that
            are left out have `default_tuning()`. It does not affect results.
        instruction_set: one of `instruction_sets()`, for all operations of this runtime; None: the best one.

    Raises:
        RuntimeError: the system refuses to start a thread.
    """

    def __init__(
        self,
        num_threads: int,
        tunings: Mapping[Format, Tuning] | None = None,
        instruction_set: str | None = None,
    ) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def tunings(self) -> dict[Format, Tuning]: ...
    @property
    def instruction_set(self) -> InstructionSet: ...
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def operations(self) -> tuple[int, int]:
        """
        Operations so far of products whose format can run on the tiles of AMX: on tiles, and all. (0, 0) without AMX.
        """

    @property
    def rounds(self) -> bool:
        """
        Whether `linear` may round to bfloat16: the CPU multiplies that faster than float32.
        """

    def close(self) -> None:
        """
        End the threads and free the scratch memory; later operations raise ValueError.
        """

def matrix_bytes(format: Format, rows: int, cols: int) -> int:
    """
    Bytes of a matrix (layout: native/kernels/formats.h).

    Raises:
        ValueError: more than LARGEST_SIZE rows or columns.
    """

def f8_scales_bytes(cols: int) -> int:
    """
    Bytes of the scales before each F8_BLOCK rows of codes of an f8 matrix.
    """

LARGEST_SIZE: int = 1073741824

MATRIX_ALIGNMENT: int = 64

PANEL_ROWS: int = 16

F8_BLOCK: int = 128

def quantize(
    format: Format, weights: NDArray[numpy.float32], out: NDArray[numpy.uint8], runtime: Runtime | None = None
) -> None:
    """
    Write weights [rows, cols] to `out` [matrix_bytes] as f32, f16, bf16, or q8 or q4 on the threads of `runtime`.

    The bytes are the same on every instruction set. q4 scales are the candidates with the least squared error. A
    group of 32 with an infinity or a NaN gets a NaN scale. The other formats can only come from a file.
    """

def transcode(
    block_type: str,
    data: NDArray[numpy.uint8],
    rows: int,
    cols: int,
    interleaved: int = 1,
    out: NDArray[numpy.uint8] | None = None,
) -> NDArray[numpy.uint8]:
    """
    Convert the blocks of a matrix [rows, cols] to the bytes of its slot format, without loss.

    The bytes are the same on every instruction set.

    Q8_0 becomes q8, Q4_0 becomes q4, and GGUF's other types become the format with their name; cols is a multiple of
    their block size, 32, 64 or 256. Types with lower-case names, such as `int4_quants` and `f8_scales_64x128`
    (native/kernels/transcode.h), and parts of grouped formats, such as `uint4_128_f16:gptq_codes` (grouped_parts.h),
    write only their part of the matrix: into `out` [matrix_bytes], which is returned, or into new zeros.
    `interleaved` matrices with `rows` rows each, which alternate row by row in `data`, come out one after another.

    Raises:
        ValueError: the data holds what its type refuses: a code that is NaN, a scale that is no number or too
            large, a stored zero that programs disagree about, or columns whose groups are not in order.
    """

def put_in_act_order(format: Format, matrix: NDArray[numpy.uint8], rows: int, cols: int) -> None:
    """
    Complete a matrix of an `act_order` format after `transcode` has written all its parts; a Store does it itself.

    Raises:
        ValueError: g_idx names a group that the matrix does not have, or a group has more or fewer columns than the
            format says; `matrix` is undefined then.
    """

def dequantize(format: Format, data: NDArray[numpy.uint8], rows: int, cols: int) -> NDArray[numpy.float32]:
    """
    The weights [rows, cols] as products use them, with the same bits on every instruction set.
    """

class Matrix:
    """
    Weights inside an arena or a uint8 array, which it keeps alive. Any offset works; multiples of 64 are fastest.
    """

    def __init__(
        self, memory: Arena | NDArray[numpy.uint8], offset: int, format: Format, rows: int, cols: int
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def format(self) -> Format: ...

def matmul(
    runtime: Runtime,
    matrices: Sequence[Matrix],
    x: NDArray[numpy.float32],
    outs: Sequence[NDArray[numpy.float32]],
) -> None:
    """
    outs[i] = x matrices[i]^T, for x [tokens, cols] and outs[i] [tokens, rows of matrix i].

    With quantised weights, x is quantised per group of 32 to int8 (int16 with q8), once for all matrices.
    """

def embed(runtime: Runtime, matrix: Matrix, ids: NDArray[numpy.int32], out: NDArray[numpy.float32]) -> None:
    """out[t] = row ids[t] of the matrix."""

def rms_norm(
    runtime: Runtime,
    x: NDArray[numpy.float32],
    weight: NDArray[numpy.float32],
    eps: float,
    out: NDArray[numpy.float32],
) -> None:
    """
    out[n] = x[n] / sqrt(mean(x[n]^2) + eps) * weight, for x [n, cols]; out may be x.
    """

def rope(
    runtime: Runtime,
    x: NDArray[numpy.float32],
    cosine: NDArray[numpy.float32],
    sine: NDArray[numpy.float32],
    is_interleaved: bool = False,
) -> None:
    """
    Rotate x [tokens, heads, head_dim] in place, by cosine and sine [tokens, pairs]. Rows of x may be strided.

    Dimension i is paired with i + pairs; if interleaved, dimension 2 i is paired with 2 i + 1. Dimensions from
    2 * pairs on do not change.
    """

class Routing:
    """
    How a token's experts are chosen from its router logits (native/kernels/route.h).

    Scores are the softmax over all experts, or the sigmoid or sqrt(softplus) of each. The k best experts by score plus
    `choice_bias` are chosen from the best `kept_groups` of `num_groups` groups of equal size; a group is scored by its
    best expert, or by the sum of its best two. On a tie the lower id wins. Routing weights are the scores of the chosen
    experts, without the bias; with `renormalize`, divided by their sum plus `renormalize_eps`, or by
    `renormalize_least` if that is more; then multiplied by `scale`, and by the expert's own scale.

    Args:
        experts_per_token: k.
        choice_bias: [experts]; None means no bias.
        expert_scale: [experts]; None means 1 for each.
        media_bias: [experts], the `choice_bias` of tokens of media, which is their own choice where token ids decide
            for others; None means that theirs is the same.
    """

    def __init__(
        self,
        experts_per_token: int,
        *,
        score: Literal["softmax", "sigmoid", "sqrt_softplus"],
        choice_bias: NDArray[numpy.float32] | None = None,
        num_groups: int = 1,
        kept_groups: int = 1,
        group_score: Literal["max", "top2"] = "top2",
        renormalize: bool,
        renormalize_eps: float = 0.0,
        renormalize_least: float = 0.0,
        scale: float = 1.0,
        expert_scale: NDArray[numpy.float32] | None = None,
        media_bias: NDArray[numpy.float32] | None = None,
    ) -> None: ...

class KvShape:
    """The data that a layer keeps per position in a KvCache."""

    @staticmethod
    def keys_values(
        kv_heads: int,
        head_dim: int,
        is_windowed: bool = False,
        value_dim: int | None = None,
        index_dim: int = 0,
    ) -> KvShape:
        """
        A key and a value for each KV head. Positions per block and value dimensions are padded to 16.

        A windowed layer lies in window blocks, of which a KvCache may have fewer. Values have the size of keys unless
        `value_dim` is given. There is also an index key of `index_dim` elements, if it is not 0.
        """

    @staticmethod
    def latent(dim: int, index_dim: int = 0, is_windowed: bool = False) -> KvShape:
        """
        Only one vector, shared by all heads; and an index key of `index_dim` elements, if it is not 0.
        """

    @staticmethod
    def pooled(dim: int, positions_per_entry: int) -> KvShape:
        """
        One vector for each group of so many positions, which all heads share. The number divides the positions of a
        block or is a multiple of them.
        """

    @property
    def positions_per_entry(self) -> int: ...
    @property
    def is_windowed(self) -> bool:
        """Whether it lies in window blocks."""

    @staticmethod
    def none() -> KvShape:
        """Nothing: the layer has a recurrent state."""

def kv_cache_bytes(
    layers: Sequence[KvShape],
    num_blocks: int,
    block_tokens: int,
    dtype: KvDtype,
    num_window_blocks: int | None = None,
) -> int:
    """Bytes of a KvCache."""

def kv_layer_parts(shape: KvShape, num_blocks: int, block_tokens: int, dtype: KvDtype) -> list[int]:
    """
    Bytes of a layer's keys and values, or of its latent vectors; then of index keys. They lie in a KvCache in this
    order.
    """

class KvCache:
    """
    The data that all layers keep of past positions; memory is committed when it is first written.

    Args:
        num_window_blocks: blocks of windowed layers; None means num_blocks, and that the blocks are the same.
    """

    def __init__(
        self,
        layers: Sequence[KvShape],
        num_blocks: int,
        block_tokens: int,
        dtype: KvDtype,
        num_window_blocks: int | None = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers without window blocks."""

    def held_bytes(self, num_blocks: int) -> int:
        """
        Most bytes in memory while nothing was written to other blocks than the first `num_blocks`.
        """

    def release(self, num_blocks: int) -> None:
        """
        Give the memory of all but the first `num_blocks` back to the system, as far as `held_bytes` says. The data of
        the others are lost.
        """

    def copy_out(self, block: int, to: NDArray[numpy.uint8]) -> None:
        """Copy a whole block into `to` [block_bytes]."""

    def copy_in(self, block: int, saved: NDArray[numpy.uint8]) -> None:
        """
        Copy data from `copy_out` into any block of a cache with the same shapes.
        """

    def copy_block(self, from_block: int, to_block: int, is_windowed: bool = False) -> None:
        """
        Copy a block of all layers without window blocks, or a window block of the others.
        """

def kv_write(
    runtime: Runtime,
    kv: KvCache,
    layer: int,
    keys: NDArray[numpy.float32],
    values: NDArray[numpy.float32],
    slots: NDArray[numpy.int64],
) -> None:
    """
    Store keys [tokens, kv_heads, head_dim] and values [tokens, kv_heads, value_dim]; slot = block * block_tokens +
    offset, int64 [tokens].
    """

def attention(
    runtime: Runtime,
    kv: KvCache,
    layer: int,
    q: NDArray[numpy.float32],
    block_table: NDArray[numpy.int32],
    sequence: NDArray[numpy.int32],
    order: NDArray[numpy.int32],
    scale: float,
    window: int,
    out: NDArray[numpy.float32],
    sinks: NDArray[numpy.float32] | None = None,
    sees_until: NDArray[numpy.int32] | None = None,
    is_chunked: bool = False,
) -> None:
    """
    Grouped-query attention; adjacent tokens of a sequence share one pass over its keys.

    Args:
        q: [tokens, heads, head_dim], heads a multiple of kv_heads.
        block_table: [sequences, max_blocks]; position p of sequence s is in block block_table[s, p // block_tokens].
        sequence, order: [tokens], a row of `block_table` and the index in the sequence.
        window: positions begin at order - window + 1; 0 means at 0.
        out: [tokens, heads * value_dim].
        sinks: [heads], a score per head that takes weight and adds nothing; None means no sinks.
        sees_until: [tokens], the end of the positions that a token sees, which must have been written; None means
            order + 1: its own position is the last.
        is_chunked: positions begin at order // window * window instead.
    """

def linear(
    runtime: Runtime,
    matrix: Matrix,
    x: NDArray[numpy.float32],
    out: NDArray[numpy.float32],
    bias: NDArray[numpy.float32] | None = None,
    *,
    finish: Finish = "store",
    exact: bool = False,
) -> None:
    """
    out = x matrix^T + bias, for x [tokens, cols], out [tokens, rows] and bias [rows].

    Rows of x and out may be strided; x and out must not overlap. With bf16 weights and 16 tokens or more, x is rounded
    to bfloat16 if the CPU multiplies that faster (`Runtime.rounds`), unless `exact`. Sums are float32.

    Args:
        finish: store the result, add it to out, multiply out by it, or store an activation of it.
    """

def layer_norm(
    runtime: Runtime,
    x: NDArray[numpy.float32],
    weight: NDArray[numpy.float32],
    bias: NDArray[numpy.float32] | None,
    eps: float,
    out: NDArray[numpy.float32],
) -> None:
    """
    out[n] = (x[n] - mean) / sqrt(variance + eps) * weight + bias, for x [n, cols]; out may be x.
    """

def gelu(runtime: Runtime, x: NDArray[numpy.float32], kind: Gelu) -> None:
    """
    Replace each element of x [n, cols] by x * P(normal <= x): exactly (erf), or by one of two approximations.

    tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).   quick: x * sigmoid(1.702 x).
    """

def attend(
    runtime: Runtime,
    query: NDArray[numpy.float32],
    key: NDArray[numpy.float32],
    value: NDArray[numpy.float32],
    scale: float,
    out: NDArray[numpy.float32],
) -> None:
    """
    out[t, h] = sum over s of softmax over s (scale * query[t, h] . key[s, k]) * value[s, k]: no mask.

    k is the KV head that head h shares with its neighbours. Rows may be strided; out may be query.

    Args:
        query, out: [tokens, heads, dim].
        key, value: [keys, kv_heads, dim], at least one key; kv_heads divides heads.
    """

def rounded_keys_bytes(num_keys: int, num_kv_heads: int, dim: int) -> int:
    """Bytes that `round_keys` writes."""

def round_keys(
    runtime: Runtime,
    key: NDArray[numpy.float32],
    value: NDArray[numpy.float32],
    rounded: NDArray[numpy.uint8],
) -> None:
    """
    Round keys and values [keys, kv_heads, dim] to bfloat16, in the layout that `attend_rounded` reads.

    Needs `Runtime.rounds`. Rows may be strided.
    """

def attend_rounded(
    runtime: Runtime,
    query: NDArray[numpy.float32],
    rounded: NDArray[numpy.uint8],
    num_keys: int,
    num_kv_heads: int,
    scale: float,
    out: NDArray[numpy.float32],
) -> None:
    """
    `attend` with keys and values from `round_keys`, and queries and weights rounded to bfloat16; sums are float32.
    """

class Dispatch:
    """
    The experts that the tokens of a layer chose, and the assignments (a token and one of its experts) of each.

    Args:
        choices: [tokens, experts per token], the experts of each token, best first.
        is_decode: bool [tokens], False for prompt tokens.
        adapters: [tokens], the number of each token's adapter, -1 for none.
    """

    def __init__(
        self,
        choices: NDArray[numpy.int32],
        is_decode: NDArray[numpy.bool_],
        num_experts: int,
        adapters: NDArray[numpy.int32] | None = None,
    ) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def experts_per_token(self) -> int:
        """ValueError in a worker."""

    @property
    def num_assignments(self) -> int: ...
    @property
    def experts(self) -> list[int]:
        """The experts that any token chose, ascending."""

    @property
    def scan(self) -> list[int]:
        """The experts that only prompt tokens chose."""

    def assignments(self, expert: int) -> list[int]:
        """
        The assignments of an expert: token * experts per token + rank, ascending.
        """

    def choices(self) -> NDArray[numpy.int32]:
        """
        The experts of each token, best first: [tokens, experts per token], a new array.

        Raises:
            ValueError: `only` or the coordinator left some out.
        """

    def only(self, experts: Sequence[int]) -> Dispatch:
        """
        The same tokens and assignments, without other experts than these.

        Raises:
            ValueError: no token chose an expert, or it is named twice.
        """

class LayerExperts:
    """
    Experts of a layer that run elsewhere, while a step continues without Python.
    """

class ExpertAdapter:
    """
    The low-rank pairs of an adapter beside routed experts, in an arena: the part of each expert, and where it lies.

    A part holds `down` and `up` of the gate, up and down pairs in turn, laid out by `ExpertPart` of
    argosy.adapters.files. The adapter does not know which parts have landed: the caller that places a part does.
    """

    def __init__(self, arena: Arena) -> None: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""

    def add_layer(
        self,
        layer: int,
        *,
        format: Format,
        ranks: Sequence[int],
        scales: Sequence[float],
        hidden: int,
        width: int,
        num_experts: int,
    ) -> None:
        """
        Describe the pairs of a layer; no part has a place yet.

        Args:
            format: f32, f16 or bf16.
            ranks, scales: of gate, up and down. A matrix of rank 0 has no pair.
        """

    def part_bytes(self, layer: int) -> int:
        """Bytes of one expert's part."""

    def offsets(self, layer: int) -> list[list[int]]:
        """Where `down` and `up` of gate, of up and of down begin in a part."""

    def place(self, places: Sequence[tuple[tuple[int, int], int]]) -> None:
        """
        From now on, the part of each (layer, expert) begins at that byte of the arena; -1: it is not there.
        """

    def has_places(self, layer: int, experts: Sequence[int]) -> bool:
        """
        Whether all of these experts have their part in memory; True for a layer without pairs.
        """

class ExpertTable:
    """
    Routed experts whose weights are in an arena: where each lies, and how to run it.

    It does not know which weights have landed; whoever places an expert sees to that.

    Args:
        hidden: the size of the experts' inputs and outputs.
        activation: the activation of gate and up.
    """

    def __init__(self, arena: Arena, *, hidden: int, activation: Activation) -> None: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""

    @property
    def num_runs(self) -> int:
        """The number of experts that have run, counted once per layer and step."""

    def add_layer(
        self,
        layer: int,
        *,
        formats: Sequence[Format],
        width: int,
        starts: NDArray[numpy.int64],
        gate_bias: NDArray[numpy.float32] | None = None,
        up_bias: NDArray[numpy.float32] | None = None,
        down_bias: NDArray[numpy.float32] | None = None,
        activation: Activation | None = None,
    ) -> None:
        """
        Describe the experts of a layer; none has a place yet.

        Args:
            formats: formats of gate, up and down, or of up and down if the activation has no gate.
            starts: int64 [experts, 3 or 2], bytes from an expert's place to gate and up [width, hidden] and down
                [hidden, width].
            gate_bias, up_bias: [experts, width].   down_bias: [experts, hidden].
            activation: None means the table's.
        """

    def place(self, places: Sequence[tuple[tuple[int, int], int]]) -> None:
        """
        From now on, the memory of each (layer, expert) begins at that byte of the arena.
        """

    def set_adapter(self, number: int, adapter: ExpertAdapter | None) -> None:
        """
        From now on, the experts of tokens of adapter `number` have these pairs beside them; None: they have none.

        Only while nothing runs.

        Raises:
            ValueError: the adapter has a layer or a pair that the table lacks, or another size.
        """

    def run(
        self,
        runtime: Runtime,
        layer: int,
        experts: Sequence[int],
        dispatch: Dispatch,
        rows: NDArray[numpy.float32],
        out: NDArray[numpy.float32],
    ) -> float:
        """
        Write the outputs of some experts of a dispatch, each named once; return the seconds that it took.

        Args:
            rows: [tokens, hidden].
            out: [assignments, hidden], a row for each assignment; the rows of other experts do not change.

        Raises:
            ValueError: no token chose an expert, or it has no place, or its pairs are not in memory.
        """

class CachePolicy:
    """
    Decides which expert gets which slot, and which one leaves (native/ops/cache_policy.h). Moves no bytes.

    Keys are (layer, expert).

    Args:
        layers: the layers whose experts may use these slots.
    """

    def __init__(self, *, num_slots: int, layers: Sequence[int], experts_per_token: int) -> None: ...
    def copy(self) -> CachePolicy:
        """A policy in the same state."""

    def resize(self, num_slots: int) -> None:
        """
        Change the number of slots; slots are numbered from 0.

        If there are more experts than slots, those that misses of decode would displace next are evicted. The others
        stay in place. `moves` brings experts in removed slots to lower ones, which stay reserved until then.
        """

    def moves(self, num_slots: int) -> list[tuple[tuple[int, int], int, int]]:
        """
        Move the experts in slots from `num_slots` on, which is no less than the number of slots. None may be pinned.

        Returns:
            The copies to make now, (expert, its slot, its new slot); the new slots are empty.
        """

    def begin(self, layer: int) -> None:
        """Begin a layer's turn in decode: its experts are a turn older."""

    def find(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """
        Split a layer's experts into those with a slot and those without; the order stays.
        """

    def use(self, layer: int, experts: Sequence[int], *, is_scan: bool) -> None:
        """
        Record hits of a layer, and pin them. A sweep does not make an expert younger.
        """

    def admit(self, key: tuple[int, int], *, is_scan: bool, is_guess: bool = False) -> int | None:
        """
        Find a slot for a missing expert, evicting another if necessary, and pin it. None means: wait for an unpin.

        A guess is a scan that may take fewer slots from others.
        """

    def unpin(self, layer: int, experts: Sequence[int]) -> None: ...
    def drop(self, key: tuple[int, int]) -> None:
        """Forget an expert whose bytes never arrived."""

    def slot(self, key: tuple[int, int]) -> int | None:
        """The slot of a resident expert, or None."""

    def resident(self) -> list[tuple[int, int]]:
        """The experts that have a slot, by layer and number."""

    def pinned(self) -> list[tuple[int, int]]: ...
    def window(self) -> list[tuple[int, int]]:
        """The experts that were only swept in or guessed, the oldest first."""

    def ages(self) -> list[tuple[float, int, tuple[int, int], bool]]:
        """
        The experts outside the window: (age, the last turn of its layer, expert, whether it is pinned).

        The oldest expert is evicted first. Among experts of equal age, the one whose layer had its turn most recently
        goes first.
        """

    @property
    def num_slots(self) -> int: ...
    @property
    def num_resident(self) -> int: ...
    @property
    def floor(self) -> int:
        """Experts that a layer keeps while another layer can give one."""

    @property
    def window_slots(self) -> int:
        """Most slots of a sweep."""

    @property
    def guess_slots(self) -> int:
        """Most slots of guesses."""

    @staticmethod
    def bytes(*, num_slots: int, num_layers: int, num_experts: int) -> int:
        """Most bytes that a policy can hold, with `num_experts` in each layer."""

class LeaseCounts:
    """
    Counters of a cache since it was created; see `argosy.experts.runner.RunnerStats`.
    """

    @property
    def lookups(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def reads_ahead(self) -> int: ...
    @property
    def idle_reads(self) -> int: ...
    @property
    def decode_lookups(self) -> int: ...
    @property
    def decode_hits(self) -> int: ...
    @property
    def parts_ahead(self) -> int: ...
    @property
    def parts_late(self) -> int: ...

class ExpertReads:
    """Reads of experts into the slots of a `CachedExperts`."""

class StoreReads(ExpertReads):
    """
    Reads by a store into an arena.

    Args:
        record_of: returns the record of (layer, expert); called once, before its first read.
    """

    def __init__(
        self, store: Store, arena: Arena, record_of: Callable[[tuple[int, int]], Record]
    ) -> None: ...

class PartReads(ExpertReads):
    """
    Reads by a store of parts that lie in a file, those of a layer one after another.

    Args:
        stride: bytes from one part to the next.
        layers: by layer, where its first part begins, the bytes of each, and the crc32c_wide of each.
    """

    def __init__(
        self,
        store: Store,
        arena: Arena,
        file_id: int,
        *,
        stride: int,
        layers: Mapping[int, tuple[int, int, Sequence[int]]],
    ) -> None: ...

class PartCache:
    """
    The parts of experts that one adapter brings, one per slot (native/ops/part_cache.h).

    Args:
        policy: decides which part gets which slot; slot i begins at byte i * slot_bytes. Its layers are those of the
            adapter.
        adapter: learns where parts lie.
        num_parts: the parts of all experts.
    """

    def __init__(
        self,
        reads: ExpertReads,
        policy: CachePolicy,
        adapter: ExpertAdapter,
        *,
        slot_bytes: int,
        num_parts: int,
    ) -> None: ...

class CachedExperts(LayerExperts):
    """
    Leases of the experts of a layer; memory holds one expert per slot (native/ops/cached_experts.h).

    As `LayerExperts`, a stack runs layers without Python, unless a read fails or a layer takes long; then the lease
    stays open. One thread at a time; counters may be read by any.

    Args:
        reads: how experts are read into the arena of the table.
        table: receives the place of each expert.
        kinds: the policy of each kind of slots, its layers, and where its slots begin in the arena.
        keys: the experts that may be read.
        look_ahead: read guesses for decode.
        reads_all: while there is a slot for every expert, also read experts that no token chose.
    """

    def __init__(
        self,
        reads: ExpertReads,
        table: ExpertTable,
        *,
        kinds: Sequence[tuple[CachePolicy, Sequence[int], Sequence[int]]],
        keys: Sequence[tuple[int, int]],
        experts_per_token: int,
        look_ahead: bool,
        reads_all: bool,
    ) -> None: ...
    def open(
        self, layer: int, experts: Sequence[int], scan: Sequence[int], pairs: Sequence[tuple[int, int]] = []
    ) -> None:
        """
        Open a lease of experts of a layer, each named once; a lease that is still open ends.

        Args:
            scan: experts that only prompt tokens chose.
            pairs: (expert, adapter) of the tokens that chose them; others than those of `set_parts` count for nothing.
        """

    def open_for(self, layer: int, dispatch: Dispatch) -> None:
        """Open a lease of the experts of a dispatch, and of their parts."""

    def set_parts(self, adapter: int, parts: PartCache | None) -> None:
        """
        From now on, experts of tokens with this adapter need these parts; None: no parts that are read.

        A lease that is open ends.
        """

    def group(self) -> list[int] | None:
        """
        The experts to compute next; empty: all are done. None: wait with `collect`, unless there is a `failure`.

        The weights of the previous group may move.
        """

    def collect(self) -> None:
        """Wait until a read of the open lease has ended."""

    @property
    def failure(self) -> tuple[tuple[int, int], str, str] | None:
        """The read of the open lease that failed: (expert, message, kind)."""

    @property
    def failed_adapter(self) -> int:
        """
        The adapter whose part could not be read; -1: it was the expert itself, or there is no failure.
        """

    def end(self, *, is_whole: bool) -> None:
        """
        End the open lease, if there is one. No read of it is in flight then.

        Args:
            is_whole: it was not cut short.
        """

    @property
    def is_open(self) -> bool: ...
    def is_running(self, dispatch: Dispatch) -> bool:
        """Whether the open lease is for this dispatch, begun by the stack."""

    def take_done(self) -> list[int]:
        """The experts of the open lease that the stack has run."""

    @property
    def num_in_flight(self) -> int:
        """Reads of the open lease."""

    @property
    def is_short_of_slots(self) -> bool:
        """Whether experts of the open lease wait for a slot."""

    def wants_guess(self, *, is_sweep: bool) -> bool:
        """Whether a guess would be of use in this step."""

    def guess(
        self,
        layer: int,
        by_rank: Sequence[Sequence[int]],
        *,
        is_sweep: bool,
        pairs: Sequence[tuple[int, int]] = [],
    ) -> None:
        """
        Announce which experts the next lease may need, best first. Never waits.

        Args:
            pairs: (expert, adapter) of the tokens for which experts are guessed.
        """

    def forget_hint(self) -> None:
        """
        Release what the last guess still holds, except reads that have begun. Never waits.
        """

    def collect_early(self) -> None:
        """Wait until a read ends that no lease waits for."""

    @property
    def early(self) -> list[tuple[int, int]]:
        """Experts whose reads have begun although no lease waits for them."""

    @property
    def num_early(self) -> int:
        """Reads that no lease waits for, also of parts."""

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Guessed experts that stay in memory until the next lease."""

    def trust(self, least_right: float) -> None:
        """From now on, trust ranks of guesses that are right at least so often."""

    def is_trusted(self, rank: int, *, is_sweep: bool) -> bool: ...
    @property
    def has_all(self) -> bool:
        """Whether every expert has landed; between two steps."""

    @property
    def counts(self) -> LeaseCounts: ...
    @property
    def num_run(self) -> int:
        """Experts that the stack has run, counted once per layer and step."""

    def cancel_early(self) -> None:
        """End all reads that no lease waits for."""

BONUS_TURNS: float = 4.0

HALF_LIFE_TURNS: float = 16.0

class LinkError(ConnectionError):
    pass

class ExchangeTimes:
    """
    Microseconds from sending requests to their last outputs: a moving average, in which the latest counts for an
    eighth, and quantiles of the latest 64.
    """

    @property
    def count(self) -> int: ...
    @property
    def ewma_us(self) -> float: ...
    @property
    def p50_us(self) -> float: ...
    @property
    def p99_us(self) -> float: ...

class PeerStats:
    """
    One connection of an `Exchange`, up to now. `queued_bytes` wait for the socket; `num_late` experts were answered
    after another peer, or after their ticket was forgotten. Requests of at most 32 rows are in `few_rows`.
    """

    @property
    def is_connected(self) -> bool: ...
    @property
    def failure(self) -> str:
        """Why it is not connected; empty if it is."""

    @property
    def num_outstanding(self) -> int:
        """Requests without a complete answer."""

    @property
    def oldest_outstanding_us(self) -> int: ...
    @property
    def num_late(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def few_rows(self) -> ExchangeTimes: ...
    @property
    def many_rows(self) -> ExchangeTimes: ...

class ExchangeEvent:
    """
    Without a failure: the outputs of `experts` are in `out`. With one: the peer does not send those of `experts`.

    ended: the connection was closed or lost. protocol: the peer broke the protocol. silent: it sent nothing for too
    long. These close the connection. refused: the peer refused the request, with `code`. full: it has 16 requests
    without an answer, and this one was not sent.
    """

    @property
    def peer(self) -> int: ...
    @property
    def experts(self) -> list[int]: ...
    @property
    def failure(self) -> Literal["ended", "refused", "protocol", "silent", "full"] | None: ...
    @property
    def code(self) -> int: ...
    @property
    def message(self) -> str: ...

class Exchange:
    """
    The coordinator's connections to its workers. Any thread may call it; no call waits for a peer but `receive`.

    Args:
        num_experts: routed experts of each layer; 0: a layer without.
        most_rows, most_assignments: limits of one request; the workers' limits are the same.
    """

    def __init__(
        self, *, hidden: int, num_experts: Sequence[int], most_rows: int, most_assignments: int
    ) -> None: ...
    def add(self, fd: int) -> int:
        """
        Take over a connected stream socket with a `WorkerLink` at its other end; return the peer's id.

        Raises:
            ValueError: `fd` is not such a socket, and stays the caller's; or there are 256 peers.
        """

    def remove(self, peer: int) -> None:
        """Close a connection and forget its statistics."""

    @property
    def peers(self) -> list[int]:
        """The connected peers."""

    def send(
        self,
        layer: int,
        dispatch: Dispatch,
        rows: NDArray[numpy.float32],
        out: NDArray[numpy.float32],
        shares: Mapping[int, Sequence[int]],
    ) -> int:
        """
        Ask peers for outputs of a dispatch; return a ticket, which must be forgotten in the end.

        `rows` and `out` stay in use until then; `out` is written only inside `receive`. A peer that is gone or full is
        an event of the ticket.

        Args:
            rows: [tokens, hidden].   out: [assignments, hidden].
            shares: the experts that each peer runs.

        Raises:
            ValueError: no token chose an expert, a request exceeds the limits, no peer ever had an id, or there are 64
                tickets. Nothing was sent then.
        """

    def resend(self, ticket: int, shares: Mapping[int, Sequence[int]]) -> None:
        """Ask further peers for missing experts; the first complete answer wins."""

    def receive(self, ticket: int, timeout_us: int) -> list[ExchangeEvent]:
        """
        Wait for events of a ticket; empty if the time is over, or if no peer owes it an answer.
        """

    def drop(self, ticket: int, experts: Sequence[int]) -> None:
        """
        The caller writes the outputs of these experts from now on; answers that still arrive for them are dropped.

        Raises:
            ValueError: no token chose an expert; nothing was dropped then.
        """

    def forget(self, ticket: int) -> None:
        """Cancel open requests. Nothing reads `rows` or writes `out` after this."""

    def guess(self, peer: int, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        """
        Tell a peer which experts may be requested next (`ExpertRunner.guess`); dropped if the peer is gone or
        full.
        """

    def tend(self, silence_us: int) -> list[tuple[int, str]]:
        """
        Ping idle peers, drop late answers, and give up peers that owe something and sent nothing for `silence_us`.

        To be called about once a second from a background thread. A peer that a ticket waits for has seven times as
        long.

        Returns:
            the peers that failed in here, and why.
        """

    def status(self, peer: int) -> bytes:
        """The status of a worker when it last answered `tend`; empty before."""

    def stats(self, peer: int) -> PeerStats: ...
    def inject(
        self,
        peer: int,
        *,
        delay_us: int = 0,
        bytes_per_s: int | None = None,
        bytes_to_live: int | None = None,
        is_stalled: bool = False,
    ) -> None:
        """
        For tests and benchmarks: make a connection faulty from now on.

        Args:
            delay_us: from `send` to the first byte on the wire.
            bytes_per_s: in each direction.
            bytes_to_live: after so many bytes in both directions, the connection is lost.
            is_stalled: nothing moves.
        """

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers now."""

    def close(self) -> None:
        """Close all connections."""

class Owner:
    """
    A host that can run experts: a worker, or this machine. Any thread may read and change it.

    Attributes:
        peer: its connection; None: there is none, or it is this machine.
        is_slow: it was late and still owes an answer.
        is_set_aside: its results differed from those of others.
        is_resident: it holds every expert in memory.
        num_run, num_rerouted, num_verified, num_mismatches: counts of experts, once per layer and step: those that it
            ran, that went to another owner after it, that another owner also computed, and whose bits then differed.
    """

    def __init__(self, name: str) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def peer(self) -> int | None: ...
    @peer.setter
    def peer(self, peer: int | None) -> None: ...
    @property
    def is_slow(self) -> bool: ...
    @is_slow.setter
    def is_slow(self, arg: bool, /) -> None: ...
    @property
    def is_set_aside(self) -> bool: ...
    @is_set_aside.setter
    def is_set_aside(self, arg: bool, /) -> None: ...
    @property
    def is_resident(self) -> bool: ...
    @is_resident.setter
    def is_resident(self, arg: bool, /) -> None: ...
    @property
    def num_run(self) -> int: ...
    @num_run.setter
    def num_run(self, arg: int, /) -> None: ...
    @property
    def num_rerouted(self) -> int: ...
    @num_rerouted.setter
    def num_rerouted(self, arg: int, /) -> None: ...
    @property
    def num_verified(self) -> int: ...
    @num_verified.setter
    def num_verified(self, arg: int, /) -> None: ...
    @property
    def num_mismatches(self) -> int: ...
    @num_mismatches.setter
    def num_mismatches(self, arg: int, /) -> None: ...
    def set_rates(self, record_bytes: int, disk_bytes_per_s: float) -> None:
        """
        Estimate the seconds that an expert of this size takes here; 0 for the drive: unknown.
        """

    @property
    def hit_s(self) -> float:
        """Seconds to run an expert in memory."""

    @property
    def miss_s(self) -> float:
        """Seconds to read and run an expert."""

    def remember(self, num_slots: int, *, num_layers: int, num_experts: int) -> None:
        """
        From now on remember the last `num_slots` experts that it ran, and no earlier one.

        Takes 8 bytes for each expert of the model.
        """

    def forget(self) -> None:
        """Forget its experts: it may have been restarted."""

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """It has run these experts."""

    def has(self, layer: int, expert: int) -> bool:
        """Whether it probably has an expert in memory."""

    @property
    def num_remembered(self) -> int: ...

class Owners:
    """
    The owners of every expert of a model. It never changes: a new plan is another table.

    Args:
        hosts: workers, and this machine if it runs experts.
        table: int16 [layers, experts, replicas], indices of `hosts`, the first owner before the second; -1: none.
        here: this machine, one of `hosts`; None: it runs no experts.
    """

    def __init__(
        self, hosts: Sequence[Owner], table: NDArray[numpy.int16], here: Owner | None = None
    ) -> None: ...
    @property
    def hosts(self) -> list[Owner]: ...
    @property
    def here(self) -> Owner: ...
    def owners_of(self, layer: int, expert: int) -> list[Owner]: ...
    def candidates(self, layer: int, expert: int, tried: Sequence[Owner]) -> list[Owner]:
        """
        The hosts that can be asked for an expert now, besides those that were tried.

        They are the owners that are expected to answer in time; without one, this machine; without it, slow owners.
        """

    def choose(self, layer: int, experts: Sequence[int]) -> list[tuple[Owner, list[int]]]:
        """
        Give each expert of a layer to a candidate: one that has it in memory, otherwise the one that is done first.

        Assigns hits first, because a busy drive does not delay them, and then each miss to the host with the shorter
        queue; on a tie the first owner wins. Leaves out experts without a candidate.

        Returns:
            owners with their experts, in the order of `experts`.
        """

    def split_guess(self, layer: int, by_rank: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """
        Split a guess of a layer's experts among the hosts that will be asked.

        Returns:
            experts by host and rank; nothing for a host that has everything in memory.
        """

    def is_usable(self, owner: Owner) -> bool:
        """
        Whether an owner can take requests now and is expected to answer in time.
        """

class AskedCounts:
    """
    Experts requested from owners, counted once per layer and step; a hit was probably in the owner's memory.
    """

    @property
    def lookups(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def decode_lookups(self) -> int: ...
    @property
    def decode_hits(self) -> int: ...

class BegunLayer:
    """
    A layer whose experts were requested from owners. The caller that takes it over forgets its ticket.
    """

    @property
    def layer(self) -> int: ...
    @property
    def ticket(self) -> int: ...
    @property
    def owners(self) -> Owners:
        """The table that it began with."""

    @property
    def done(self) -> list[int]:
        """Experts whose outputs have arrived."""

    @property
    def shares(self) -> list[tuple[Owner, int, list[int], float]]:
        """
        (owner, peer, experts that it still owes, deadline in seconds of `time.monotonic`).
        """

    @property
    def failures(self) -> list[ExchangeEvent]: ...

class GroupExperts(LayerExperts):
    """
    The experts of a group's layers, run by their owners without Python as long as nothing goes wrong.

    When an owner fails, is late, or takes long, the stack stops at the layer; `take_over` returns what was begun.
    """

    def __init__(self, exchange: Exchange) -> None: ...
    def use(self, owners: Owners, table: ExpertTable | None) -> None:
        """
        Before a step: set the owners of experts.

        Args:
            table: experts in memory here. None: a step stops at a layer of which this machine runs experts.
        """

    def take_over(self) -> BegunLayer | None:
        """The layer at which the stack stopped, if it was begun; otherwise None."""

    def abandon(self) -> None:
        """Forget a layer that was begun, if there is one."""

    def guess(
        self, owners: Owners, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool
    ) -> list[list[int]]:
        """
        Pass a guess (`ExpertRunner.guess`) on to the workers concerned; return the ranks of this machine.
        """

    @staticmethod
    def wants_guess(owners: Owners) -> bool:
        """Whether a guess would help a worker."""

    def patience_s(self, owner: Owner, peer: int, layer: int, num_rows: int, experts: Sequence[int]) -> float:
        """
        Seconds until an answer is late: max(4 * usual, 50 ms + bytes / bandwidth).

        While the times of an owner are hardly known, it has a second, twice the time of its reads, and some more.
        """

    def count_asked(self, owner: Owner, layer: int, dispatch: Dispatch, experts: Sequence[int]) -> None:
        """Count experts requested from a worker."""

    @property
    def counts(self) -> AskedCounts: ...

class WorkerRequest:
    """
    Rows and assignments of a request, with their own numbering. The arrays are the link's memory, which the next
    request overwrites.
    """

    @property
    def layer(self) -> int: ...
    @property
    def dispatch(self) -> Dispatch: ...
    @property
    def rows(self) -> NDArray[numpy.float32]:
        """[rows, hidden]"""

    @property
    def out(self) -> NDArray[numpy.float32]:
        """[assignments, hidden], to be written."""

class WorkerGuess:
    """The experts that the coordinator may request next."""

    @property
    def layer(self) -> int: ...
    @property
    def by_rank(self) -> list[list[int]]: ...
    @property
    def is_sweep(self) -> bool: ...

class WorkerLink:
    """
    A worker's end of one connection: one request after another. One thread serves it; any thread may call
    `interrupt`, `close` and `status`.

    Takes over `fd`, a connected stream socket. Its memory is `worker_link_bytes`, from the start.

    Raises:
        ValueError: `fd` is not such a socket, and stays the caller's.   MemoryError.
    """

    def __init__(
        self, fd: int, *, hidden: int, num_experts: Sequence[int], most_rows: int, most_assignments: int
    ) -> None: ...
    def next(
        self, most_ms: int | None = None
    ) -> WorkerRequest | WorkerGuess | Literal["interrupted", "idle"] | None:
        """
        Wait for a request or a guess; "idle" after `most_ms`, "interrupted" after `interrupt`, None at the end.

        Raises:
            LinkError: the coordinator broke the protocol, or the connection was lost inside a request; it is closed.
            ValueError: the current request has experts without an answer, or another thread serves the link.
        """

    def answer(self, experts: Sequence[int]) -> None:
        """
        Send the outputs of some experts of the request, each once. Does nothing if the request was cancelled.

        Raises:
            LinkError: the connection was lost.   ValueError: an expert waits for no answer.
        """

    def refuse(self, code: int, message: str) -> None:
        """End the request without the outputs that were not sent."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the request was cancelled, which ends it. Never waits."""

    def serve_resident(self, runtime: Runtime, table: ExpertTable) -> bool:
        """
        Answer requests from a table, without Python.

        Returns:
            False when the connection has ended. True after `interrupt`, and when a request needs an expert that has no
            place, which `next` then returns.

        Raises:
            what `next` and `ExpertTable.run` raise.
        """

    def interrupt(self) -> None:
        """
        Make the running call of `next` or `serve_resident`, or the following one, return.
        """

    @property
    def status(self) -> bytes:
        """At most 4096 bytes that the coordinator sees after `Exchange.tend`."""

    @status.setter
    def status(self, arg: bytes, /) -> None: ...
    @property
    def buffer_bytes(self) -> int:
        """The bytes of its buffers."""

    def close(self) -> None:
        """End the connection; a running call of `next` returns None."""

def worker_link_bytes(
    *, hidden: int, num_experts: Sequence[int], most_rows: int, most_assignments: int
) -> int:
    """Bytes of the buffers of a `WorkerLink`."""

def exchange_bytes(
    *, hidden: int, num_experts: Sequence[int], most_rows: int, most_assignments: int, num_peers: int
) -> int:
    """Most bytes of the buffers of an `Exchange`."""

def sources_hash() -> str:
    """
    64 hexadecimal digits: a hash of the sources that decide the bits of a sum; the compiler is not part of it.
    """

class StateShape:
    """
    The float32 values that a layer keeps of a sequence: last inputs of its convolution and the matrices of its heads,
    or what its pools have gathered.
    """

    @staticmethod
    def delta_net(sizes: _DeltaSizes) -> StateShape: ...
    @staticmethod
    def short_conv(channels: int, width: int) -> StateShape: ...
    @staticmethod
    def mamba(sizes: _MambaSizes) -> StateShape: ...
    @staticmethod
    def pools(pools: Sequence[_PoolSizes]) -> StateShape:
        """
        What the pools of a layer have gathered of unfinished groups, one after another.
        """

    @property
    def window_floats(self) -> int: ...
    @property
    def matrix_floats(self) -> int: ...

def recurrent_state_bytes(num_slots: int, layers: Sequence[StateShape]) -> int:
    """Bytes of a RecurrentState."""

class RecurrentState:
    """
    What layers keep of a sequence as a whole, one slot per running sequence; memory is committed when it is first
    written.

    The position of a slot is the number of tokens it has seen. A run of tokens continues from there, or starts over
    from zeros at position 0. A step that failed halfway leaves position -1.

    Args:
        layers: the layers that have a recurrent state, in their order.
    """

    def __init__(self, num_slots: int, layers: Sequence[StateShape]) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def slot_floats(self) -> int:
        """The number of float32 values in one slot, all layers."""

    def position(self, slot: int) -> int: ...
    def restart(self, slot: int) -> None:
        """Reset a slot to position 0."""

    def copy_out(self, slot: int, to: NDArray[numpy.float32]) -> None:
        """Copy a whole slot into `to` [slot_floats]."""

    def copy_in(self, slot: int, saved: NDArray[numpy.float32], position: int) -> None:
        """Copy data that `copy_out` saved at `position` into any slot."""

    def copy_slot(self, from_slot: int, to_slot: int) -> None:
        """Copy state and position."""

class Mixer:
    """The part of a layer that lets positions see each other."""

class BlockIndexer:
    """
    Chooses the blocks of positions that the heads of each KV head see: the token's own and the num_local - 1 before
    it, then those with the highest product of an index query and the index key of a position.

    Args:
        query: [KV heads * dim, hidden].   key: [dim, hidden].
        query_norm, key_norm: [dim], of each head; then the first dimensions rotate as the layer's.
        num_chosen: blocks of block_size positions, which a KvCache's blocks must divide.
        pool: with any number of heads, which choose together, and num_local 0: a block has one key, the mean of its
            positions' before norm and rotary, in this store of the KV cache; unfinished blocks are in this layer of the
            recurrent state.
    """

    def __init__(
        self,
        query: Matrix,
        key: Matrix,
        *,
        query_norm: NDArray[numpy.float32],
        key_norm: NDArray[numpy.float32],
        num_chosen: int,
        block_size: int,
        num_local: int = 0,
        pool: tuple[int, int] | None = None,
    ) -> None: ...

def grouped_query_attention(
    query: Matrix,
    key: Matrix,
    value: Matrix | None,
    output: Matrix,
    *,
    num_heads: int,
    window: int,
    scale: float,
    query_bias: NDArray[numpy.float32] | None = None,
    key_bias: NDArray[numpy.float32] | None = None,
    value_bias: NDArray[numpy.float32] | None = None,
    output_bias: NDArray[numpy.float32] | None = None,
    query_norm: NDArray[numpy.float32] | None = None,
    key_norm: NDArray[numpy.float32] | None = None,
    is_norm_flat: bool = False,
    limit: float = 0.0,
    sinks: NDArray[numpy.float32] | None = None,
    has_gate: bool = False,
    value_norm: NDArray[numpy.float32] | None = None,
    is_causal: bool = False,
    is_norm_last: bool = False,
    value_scale: float = 1.0,
    is_chunked: bool = False,
    gate: Matrix | None = None,
    gate_kind: Literal["sigmoid", "softplus"] = "sigmoid",
    query_scale: tuple[float, int, int] = (0.0, 1, 0),
    indexer: BlockIndexer | None = None,
) -> Mixer:
    """
    q, k, v -> norm -> clamp -> rotary -> KV cache -> attention -> output projection.

    Args:
        query: [heads * head_dim, hidden].   output: [hidden, heads * value_dim].
        key, value: [kv_heads * head_dim, hidden] and [kv_heads * value_dim, hidden].
        value: None means that the keys, before their norm, are the values.
        window, is_chunked, scale: as for `attention`.
        query_bias ...: one number per row of the matrix; None means no bias.
        query_norm, key_norm: per head, [head_dim]; if flat, over all heads at once, one number per row; both or none.
        is_norm_last: they come after rotary.
        limit: q, k and v are clamped to [-limit, limit] before rotary; 0 means no clamping.
        sinks: [heads], as for `attention`.
        has_gate: query has rows [query, gate] for each head; a head's output is multiplied by sigmoid of its gate.
        value_norm: [value_dim], applied to each head; None means no norm.
        value_scale: multiplies the values.
        is_causal: no token sees a position after its own, whatever a step's `sees_until` says.
        gate: [heads, hidden] or [heads * value_dim, hidden]; the result of each head, or each of its elements, is
            multiplied by `gate_kind` of the gate's product with the layer's input.
        query_scale: beta, period, offset: queries are multiplied by 1 + beta * log(1 + (position + offset) // period).
        indexer: chooses the positions that a token sees, with is_causal and without a window; None means all.
    """

def gated_delta_net(
    qkv: Matrix,
    b: Matrix,
    output: Matrix,
    *,
    z: Matrix | None = None,
    a: Matrix | None = None,
    conv: NDArray[numpy.float32],
    rate: NDArray[numpy.float32],
    dt_bias: NDArray[numpy.float32],
    norm: NDArray[numpy.float32],
    sizes: _DeltaSizes,
    is_tiled: bool,
    state_layer: int,
    has_sigmoid_gate: bool = False,
) -> Mixer:
    """
    Projections -> `gated_delta` -> output projection. Vectors and `is_tiled` are as for `gated_delta`.

    Args:
        qkv: [channels, hidden]. Without z: [q, k, v, z] of the first key head and its value heads, then of the next.
        b: [value heads, hidden]. Without a: [b, a] of the first key head's value heads, then of the next's.
        output: [hidden, value heads * value dim].
        state_layer: the layer of the recurrent state.
    """

class PositionIndexer:
    """
    Chooses the positions that latent attention sees, by the lightning indexer (arXiv:2512.02556).

    Args:
        query: [heads * dim, query_rank].   key: [dim, hidden].   weights: [heads, hidden].
        key_norm, key_norm_bias: [dim], of a LayerNorm with epsilon `norm_eps`.
        has_interleaved_pairs: which of the dimensions from `rope_begin` on rotate together, as for `rope`, whatever the
            layer's rotary embedding says.
        gate, gate_bias: [dim, hidden] and [size, dim], both or none; with them, keys belong to groups of `size`
            positions, as `KvShape.pooled` stores them, and nothing rotates.
        store: the number of a pooled KvShape in the KV cache, for these keys.
        state_layer: the layer of the recurrent state that has only this pool's.
    """

    def __init__(
        self,
        query: Matrix,
        key: Matrix,
        weights: Matrix,
        *,
        key_norm: NDArray[numpy.float32],
        key_norm_bias: NDArray[numpy.float32],
        norm_eps: float,
        has_interleaved_pairs: bool,
        rope_begin: int = 0,
        gate: Matrix | None = None,
        gate_bias: NDArray[numpy.float32] | None = None,
        store: int = 0,
        state_layer: int = 0,
    ) -> None: ...

def kimi_delta_attention(
    query: Matrix,
    key: Matrix,
    value: Matrix,
    beta: Matrix,
    decay: Matrix,
    gate: Matrix,
    output: Matrix,
    *,
    decay_down: Matrix | None = None,
    gate_down: Matrix | None = None,
    conv: tuple[NDArray[numpy.float32], NDArray[numpy.float32], NDArray[numpy.float32]],
    rate: NDArray[numpy.float32],
    dt_bias: NDArray[numpy.float32],
    norm: NDArray[numpy.float32],
    floor: float,
    sizes: _DeltaSizes,
    state_layer: int,
) -> Mixer:
    """
    A delta net with a decay for each key dimension (arXiv:2510.26692). Values are like keys in heads and dimensions.

    A decay is e^(rate softplus(decay x + dt_bias)), or e^(floor sigmoid(-rate (decay x + dt_bias))).

    Args:
        query, key, value: [heads * dim, hidden].   beta: [heads, hidden].
        decay, gate: [heads * dim, hidden]; or their columns are the rows of decay_down and gate_down [rank, hidden].
        output: [hidden, heads * dim].
        conv: of q, k and v, [width, heads * dim].   rate: [heads], negative.   dt_bias: [heads * dim].
        norm: [dim], of each head's output, which is then multiplied by sigmoid(gate x).
        floor: the least logarithm of a decay; 0 means that there is none.
        state_layer: the layer of the recurrent state.
    """

def lightning_attention(
    query: Matrix,
    key: Matrix | None,
    value: Matrix | None,
    gate: Matrix,
    output: Matrix,
    *,
    num_heads: int,
    has_silu: bool = False,
    query_norm: NDArray[numpy.float32] | None = None,
    key_norm: NDArray[numpy.float32] | None = None,
    decay: NDArray[numpy.float32],
    norm: NDArray[numpy.float32],
    norm_eps: float,
    num_groups: int,
    scale: float,
    state_layer: int,
) -> Mixer:
    """
    Linear attention that each head forgets at a fixed rate (arXiv:2401.04658): S = decay S + k v^T.

    Args:
        query, key, value, gate: [heads * head dim, hidden].   output: [hidden, heads * head dim].
        key, value: None means that query has the rows of q, k and v of each head in turn; then nothing rotates.
        has_silu: q, k and v become silu of themselves, before their norms.
        query_norm, key_norm: [head dim], of each head, before rotary; both or none.
        decay: [heads].
        norm: [heads * head dim], of `num_groups` equal parts of all heads' output, with epsilon `norm_eps`; the output
            is then multiplied by sigmoid(gate x).
        scale: multiplies q . k.
        state_layer: the layer of the recurrent state, whose sizes are (heads, heads, head dim, head dim, 1).
    """

def short_conv(
    input: Matrix,
    output: Matrix,
    *,
    conv: NDArray[numpy.float32],
    conv_bias: NDArray[numpy.float32] | None = None,
    input_bias: NDArray[numpy.float32] | None = None,
    output_bias: NDArray[numpy.float32] | None = None,
    state_layer: int,
) -> Mixer:
    """
    A convolution with two gates: [B, C, x] = input projection; C * conv(B * x) -> output projection.

    Args:
        input, output: [3 * hidden, hidden] and [hidden, hidden].
        conv: [width, hidden], depthwise and causal.   conv_bias: [hidden]; None means no bias.
        input_bias, output_bias: one number per row of the matrix; None means no bias.
        state_layer: the layer of the recurrent state.
    """

def mamba(
    input: Matrix,
    output: Matrix,
    *,
    conv: NDArray[numpy.float32],
    conv_bias: NDArray[numpy.float32] | None = None,
    rate: NDArray[numpy.float32],
    dt_bias: NDArray[numpy.float32],
    skip: NDArray[numpy.float32],
    norm: NDArray[numpy.float32],
    sizes: _MambaSizes,
    dt_limit: tuple[float, float],
    input_bias: NDArray[numpy.float32] | None = None,
    output_bias: NDArray[numpy.float32] | None = None,
    state_layer: int,
) -> Mixer:
    """
    A Mamba-2 mixer (arXiv:2405.21060): [z, x, B, C, dt] = input projection; convolution over x, B and C, silu ->
    recurrence -> gate silu(z) -> norm within groups -> output projection.

    Args:
        input, output: [2 * channels + 2 * groups * state dim + heads, hidden] and [hidden, channels], where channels
            are heads * head dim.
        conv: [width, channels + 2 * groups * state dim].   conv_bias: one number per column; None means no bias.
        rate, dt_bias, skip: [heads]. dt = softplus(dt + dt_bias); the state decays by e^(rate dt); skip * x is added.
        norm: [channels].
        dt_limit: dt is clamped to these bounds.
        input_bias, output_bias: one number per row of the matrix; None means no bias.
        state_layer: the layer of the recurrent state.
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
    kv_norm: NDArray[numpy.float32],
    query_down: Matrix | None = None,
    query_norm: NDArray[numpy.float32] | None = None,
    num_chosen: int = 0,
    indexer: PositionIndexer | None = None,
    gate: Matrix | None = None,
    gate_kind: Literal["sigmoid", "softplus"] = "sigmoid",
    query_scale: tuple[float, int, int] = (0.0, 1, 0),
    group_size: int = 1,
    sinks: NDArray[numpy.float32] | None = None,
) -> Mixer:
    """
    Query and compressed keys and values -> norms -> rotary -> KV cache -> attention -> output projection.

    Args:
        query: [heads * (nope_dim + rope_dim), query_rank]; without `query_down`, [..., hidden].
        kv_down: [kv_rank + rope_dim, hidden].   kv_norm: [kv_rank].
        key_up, value_up, scale: as for `latent_attention`.
        output: [hidden, heads * value_dim].
        query_down, query_norm: [query_rank, hidden] and [query_rank], both or none.
        norm_eps: the epsilon of both norms.
        num_chosen, group_size: a token sees at most so many groups of so many positions, and its unfinished one; 0
            means all.
        indexer: chooses them; None means that the layer sees what the last layer with an indexer chose.
        gate, gate_kind, query_scale, sinks: as for `grouped_query_attention`.
    """

class Pool:
    """
    Entries that stand for groups of positions (native/ops/pool.h), normed and rotated where their groups begin.

    Args:
        vectors, gates: [columns, hidden]: `dim` columns, or twice as many if groups overlap. Without gates, an entry is
            the mean of its group.
        sizes: ratio, dim, whether groups overlap.
        bias: [ratio, columns], added to the gates.   norm: [dim].
        store: the number of a pooled KvShape in the KV cache.
    """

    def __init__(
        self,
        vectors: Matrix,
        gates: Matrix | None,
        *,
        sizes: _PoolSizes,
        bias: NDArray[numpy.float32] | None = None,
        norm: NDArray[numpy.float32],
        store: int,
    ) -> None: ...

class EntryIndexer:
    """
    Chooses the entries of a pool that a token sees, by index keys.

    Args:
        query: [heads * dim of keys, query_rank].   weights: [heads, hidden].
        pool: its entries are the keys.
        key, key_norm: [dim of keys, head_dim] and [dim of keys]: keys are made of the layer's entries before these
            rotate, and kept in `store`, the number of a pooled KvShape. With neither, an earlier layer did so.
        candidates: blocks, and entries of a block: the choice is made inside so many blocks, those with the best
            entries by the scores of the last layer with `finds_candidates`.
    """

    def __init__(
        self,
        query: Matrix,
        weights: Matrix,
        *,
        pool: Pool | None = None,
        key: Matrix | None = None,
        key_norm: NDArray[numpy.float32] | None = None,
        store: int = 0,
        candidates: tuple[int, int] | None = None,
        finds_candidates: bool = False,
    ) -> None: ...

def compressed_attention(
    query_down: Matrix,
    query: Matrix,
    key_value: Matrix,
    group_output: Matrix,
    output: Matrix,
    *,
    num_heads: int,
    num_groups: int,
    rope_dim: int,
    window: int,
    scale: float,
    norm_eps: float,
    query_norm: NDArray[numpy.float32],
    kv_norm: NDArray[numpy.float32],
    head_norm: NDArray[numpy.float32] | None = None,
    sinks: NDArray[numpy.float32] | None = None,
    pool: Pool | None = None,
    entries: tuple[int, int] | None = None,
    indexer: EntryIndexer | None = None,
    num_chosen: int = 0,
    state_layer: int = 0,
) -> Mixer:
    """
    DeepSeek-V4's attention: a position's one vector is key and value of all heads; the last dimensions rotate, and
    those of the result are rotated back. A token sees a window, and entries of the pool.

    Args:
        query_down: [query_rank, hidden].   query: [heads * head_dim, query_rank].   key_value: [head_dim, hidden].
        group_output: [groups * rank, heads / groups * head_dim]: each group of heads has `rank` of the rows.
        output: [hidden, groups * rank].
        rope_dim: dimensions that rotate.
        window, scale, sinks: as for `attention`.
        norm_eps: the epsilon of all norms.
        query_norm, kv_norm: [query_rank] and [head_dim].
        head_norm: [head_dim], of each head's query; None means no norm.
        pool: of head_dim; its entries are seen.
        entries: store and ratio of an earlier layer's pool, whose entries are seen. With neither, a token sees only its
            window.
        num_chosen: the entries that a token sees at most; 0 means all.
        indexer: chooses them; None means those that the last layer with an indexer chose.
        state_layer: the layer of the recurrent state, if the pool has a ratio above 1.
    """

class StreamMix:
    """How a sublayer reads and writes residual streams."""

def sinkhorn_mix(matrix: Matrix, base: NDArray[numpy.float32], scale: NDArray[numpy.float32]) -> StreamMix:
    """
    Manifold-constrained hyper-connections of n streams (arXiv:2512.24880; native/ops/residual.h).

    Args:
        matrix: [n (2 + n), n * hidden], rows of the input's, the output's and the streams' weights; without iterations
            [2 n, n * hidden], and before the head [n, n * hidden].
        base: one number for each row.   scale: [3]; without iterations [2], before the head [1].
    """

def gated_mix(
    norm: NDArray[numpy.float32], down: Matrix, up: Matrix, inject: Matrix | None = None
) -> StreamMix:
    """
    Streams that are normed, and gated by a product of low rank (Qwen3.8; native/ops/residual.h).

    Args:
        norm: [n * hidden].   down: [rank, n * hidden].   up: [n * hidden, rank].
        inject: [n, n * hidden]; None before the head.
    """

def bank_mix(weight: NDArray[numpy.float32], starts_block: bool = False) -> StreamMix:
    """
    A bank of earlier hidden states, which is read with the current one (Kimi-K3; native/ops/residual.h).

    Args:
        weight: [hidden].
        starts_block: after this sublayer has read, the hidden state goes to the bank. Blocks that start are fewer than
            the streams.
    """

def mean_mix() -> StreamMix:
    """The mean of the streams, for the head."""

def carried_mix() -> StreamMix:
    """
    The sum of the streams with the input weights that the last sublayer left, for the head.
    """

class Residual:
    """
    The residual streams of a Stack.

    Args:
        head: how the streams become what the final norm reads.
        iterations, eps, magnitude: of `sinkhorn_mix`; without iterations, streams are not mixed.
        is_lagged: the input weights of a sublayer are for the next one; those of the first are [1, 0, ...].
    """

    def __init__(
        self,
        num_streams: int,
        head: StreamMix,
        *,
        iterations: int = 0,
        eps: float = 0.0,
        is_lagged: bool = False,
        magnitude: float = 2.0,
    ) -> None: ...

def table_rows_bytes(
    format: Format,
    num_rows: int,
    cols: int,
    parts: Sequence[tuple[str | None, Sequence[tuple[int, int, int]]]],
    cache_bytes: int,
    most_rows: int,
) -> int:
    """Bytes of memory of a TableRows."""

class TableRows:
    """
    Rows of a table that stays on the drive, with a cache of those that were used last (native/ops/table_rows.h).

    Args:
        format: f32, f16 or bf16, or the slot format of every part.
        parts: the tensors with the bytes of a row: the block type, None for plain values, and segments of rows (first
            row, file of the store, offset of that row).
        cache_bytes: of cached rows and of what says which they are.
        most_rows: of one `begin`.
    """

    def __init__(
        self,
        store: Store,
        format: Format,
        num_rows: int,
        cols: int,
        parts: Sequence[tuple[str | None, Sequence[tuple[int, int, int]]]],
        cache_bytes: int,
        most_rows: int,
    ) -> None: ...
    def begin(self, rows: NDArray[numpy.int64]) -> None:
        """
        Start to collect rows, whatever became of those of the last call; -1 is a row of zeros.
        """

    def advance(self, most_ms: int) -> bool:
        """
        Wait for the rows; return whether all of them are there, or have failed.
        """

    def write(self, runtime: Runtime, out: NDArray[numpy.float32]) -> bool:
        """
        Write float32 [rows, cols] after `advance` has returned True; return False for a `fault`.
        """

    @property
    def fault(self) -> tuple[str, str | None, list[int]] | None:
        """
        The error of reads that failed, its kind, and which rows of `begin` are missing; None: there is none.
        """

    @property
    def stats(self) -> tuple[int, int, int, int, int]:
        """
        Rows asked for, found in the cache, and late; rows read, and the bytes of their pages.
        """

    @property
    def num_cached(self) -> int:
        """Rows that the cache can hold."""

class Ngrams:
    """The n-gram sublayer of a layer; made by `ngrams`."""

def ngrams(
    table: TableRows,
    key: Matrix,
    value: Matrix,
    *,
    key_norm: NDArray[numpy.float32],
    query_norm: NDArray[numpy.float32],
    conv: NDArray[numpy.float32] | None = None,
    conv_norm: NDArray[numpy.float32] | None = None,
    state_layer: int = 0,
) -> Ngrams:
    """
    Rows of a table, gated by the residual streams that they join (native/ops/ngrams.h).

    Args:
        key: [streams * hidden, width], where width is the values of the rows of a token.   value: [hidden, width].
        key_norm, query_norm, conv_norm: [streams * hidden].
        conv: [positions, streams * hidden], depthwise and causal, of the gated values; None means no convolution.
        state_layer: its layer of the recurrent state.
    """

class StackAdapter:
    """
    What an adapter changes in a Stack (native/ops/stack_adapter.h): pairs of down, up and scale, in f32, f16 or bf16,
    and factors in f32.

    All matrices lie in arenas, which it keeps alive; `base` is a matrix of the stack. A pair adds
    `scale * up^T (down x)` to a product, and then multiplies its rows by `factors` [1, rows], unless these are None.
    `Stack.set_adapter` uses what has been added by then.

    Args:
        ranks: the most that the ranks of gate, up and down of a dense network, or of any expert, add up to.
    """

    def __init__(self, ranks: int = 0) -> None: ...
    def add_pair(
        self, base: Matrix, pair: tuple[Matrix, Matrix, float, Matrix | None], row_begin: int = 0
    ) -> None:
        """
        Add a pair to the product with `base`, from row `row_begin` on: down [rank, columns], up [rank, rows].
        """

    def add_network(
        self,
        up_base: Matrix,
        gate: tuple[Matrix, Matrix, float, Matrix | None] | None,
        up: tuple[Matrix, Matrix, float, Matrix | None] | None,
        down: tuple[Matrix, Matrix, float, Matrix | None] | None,
    ) -> None:
        """
        Add pairs to the dense network or shared expert with this `up`. None means no pair.
        """

    def add_latent(
        self,
        key_base: Matrix,
        value_base: Matrix,
        num_heads: int,
        key: tuple[Matrix, Matrix, float, Matrix | None] | None,
        value: tuple[Matrix, Matrix, float, Matrix | None] | None,
    ) -> None:
        """
        Add pairs to the absorbed matrices of latent attention.

        Args:
            key_base, value_base: k_up [heads * kv_rank, nope_dim], v_up [heads * value_dim, kv_rank].
            key: down [heads * rank, nope_dim], up [rank, kv_rank].
            value: down [rank, kv_rank], up [heads * rank, value_dim].

        Factors are [1, heads * nope_dim] and [1, heads * value_dim].
        """

    def add_embedding(self, base: Matrix, pair: tuple[Matrix, Matrix, float, Matrix | None]) -> None:
        """
        Add `scale * rows[id] up` to the embedding of a token, before the model's factor: rows [vocabulary, rank], up
        [rank, hidden], factors [1, hidden], or [vocabulary, 1] of tokens.
        """

    def replace(self, base: Matrix, matrix: Matrix) -> None:
        """
        Multiply by this matrix instead of `base`, of the same shape, before pairs are added.
        """

    def replace_embedding(self, base: Matrix, matrix: Matrix) -> None:
        """Embed by this matrix instead of `base`, of the same shape."""

    scratch_bytes: Final[int] = ...
    """The most scratch memory that all adapters of a stack take together."""

def merged_squares(
    matrix: Matrix,
    first: int,
    t: NDArray[numpy.float32],
    vectors: NDArray[numpy.float32],
    out: NDArray[numpy.float64],
    of_columns: bool = False,
) -> None:
    """
    Write the sums of squares of some rows of `matrix + t vectors`, or add those of their columns.

    Args:
        first: the row of `matrix` that t[0] belongs to.
        t, vectors: [rows, rank], [rank, columns].
        out: float64 [rows], or of columns [columns].
    """

class Ffn:
    """The feed-forward network of a layer."""

class Layer:
    """
    A layer of a Stack: norm -> mixer -> sum, norm -> feed-forward network -> sum.

    Args:
        mixer_norm, ffn_norm: [hidden]; [2, hidden], weight and bias, of a LayerNorm; None means no norm.
        mixer, ffn: one of them may be None.
        rotary: the one of the stack's rotary embeddings that the mixer uses; None means that nothing rotates.
        mixer_post_norm: [hidden], of what the mixer adds to the hidden state; None means no norm.
        ffn_post_norm: the same for what the layer's feed-forward networks add together.
        scale: multiplies the hidden state after the layer.
        is_parallel: the network reads what the mixer reads, after mixer_norm, and there is no ffn_norm.
        mixer_scale, ffn_scale: multiply what the mixer, or the networks together, add to the hidden state.
        normed_residual: not 0 means that they add it to this factor times what they read, instead.
        mixer_mix, ffn_mix: how they read and write residual streams; None with one hidden state.
        ngrams: rows of a table, added before the mixer reads the hidden state. Its table has begun to read the rows of
            a step before the step begins.
        reach: not 0 means that the networks of this layer and all later layers run only for tokens whose `to_end` in
            the step is smaller. Later layers see only a window.
    """

    def __init__(
        self,
        mixer_norm: NDArray[numpy.float32] | None,
        mixer: Mixer | None,
        ffn_norm: NDArray[numpy.float32] | None,
        ffn: Ffn | None,
        *,
        rotary: int | None = 0,
        mixer_post_norm: NDArray[numpy.float32] | None = None,
        ffn_post_norm: NDArray[numpy.float32] | None = None,
        scale: float = 1.0,
        is_parallel: bool = False,
        mixer_scale: float = 1.0,
        ffn_scale: float = 1.0,
        normed_residual: float = 0.0,
        mixer_mix: StreamMix | None = None,
        ffn_mix: StreamMix | None = None,
        ngrams: Ngrams | None = None,
        reach: int = 0,
    ) -> None: ...

def dense_ffn(gate: Matrix | None, up: Matrix, down: Matrix, *, activation: Activation | None = None) -> Ffn:
    """
    A network for every token: gate and up [width, hidden], down [hidden, width].

    Args:
        gate: None if the activation has none.
        activation: None means the stack's.
    """

def routed_ffn(
    router: Matrix,
    routing: Routing,
    *,
    router_bias: NDArray[numpy.float32] | None = None,
    width: int,
    shared: tuple[Matrix | None, Matrix, Matrix] | None = None,
    shared_score: Matrix | None = None,
    router_norm: NDArray[numpy.float32] | None = None,
    norm: NDArray[numpy.float32] | None = None,
    post_norm: NDArray[numpy.float32] | None = None,
    shared_post_norm: NDArray[numpy.float32] | None = None,
    shared_activation: Activation | None = None,
    latent: tuple[Matrix, Matrix] | None = None,
    router_logit_cap: float = 0.0,
    weighs_input: bool = False,
    latent_norm: NDArray[numpy.float32] | None = None,
    token_experts: Matrix | None = None,
) -> Ffn:
    """
    Experts of `width` chosen by the router, as in `route`, and a shared expert for every token.

    Args:
        router: [experts, hidden].
        router_bias: [experts], added to the router's product; None means no bias.
        shared: gate, up and down of the shared expert; the gate is None if the activation has none.
        shared_score: [1, hidden]; the shared expert's output is multiplied by sigmoid(shared_score . x).
        router_norm, norm: [hidden]; the router, or the routed experts, read the hidden state after this norm instead
            of the layer's.
        post_norm, shared_post_norm: [hidden], of the weighted sum of the routed experts, and of the shared expert's
            output; None means no norm.
        shared_activation: of the shared expert; None means the stack's.
        latent: down [latent, hidden] and up [hidden, latent]: the routed experts read down . x, and up . (their sum) is
            added.
        router_logit_cap: logits become cap * tanh(logit / cap) before `routing`; 0 means that they stay.
        weighs_input: the weight of a token's only expert multiplies the expert's input instead of its output.
        latent_norm: [latent], of an RMSNorm of the latent experts' weighted sum; None means no norm.
        token_experts: f32 [vocabulary, k], the experts of each token; None means that tokens choose.
    """

class Rotary:
    """
    Angles of the rotary position embedding: position * inverse_frequency (float64 [pairs], in radians).

    Angles, and cosines and sines times `scale`, are computed in float64, then rounded to float32. `is_interleaved` says
    which dimensions form a pair, as for `rope`.

    Args:
        axes: [pairs], the axis whose position rotates each pair (m-rope, arXiv:2409.12191), from 0 to 7; empty means 0
            for all of them.
    """

    def __init__(
        self,
        inverse_frequency: NDArray[numpy.float64],
        scale: float,
        is_interleaved: bool = False,
        axes: Sequence[int] = [],
    ) -> None: ...
    def angles(
        self,
        runtime: Runtime,
        positions: NDArray[numpy.int32] | NDArray[numpy.float32],
        cosine: NDArray[numpy.float32],
        sine: NDArray[numpy.float32],
    ) -> None:
        """
        Write cosine and sine [tokens, pairs] for `rope`.

        Args:
            positions: int32 [tokens], the same on every axis; or float32 [axes, tokens].
        """

class StackSizes:
    """
    The dimensions of a Stack's layers, from which its working memory follows (native/ops/stack_sizes.h).

    Add every layer; 0 stands for a part that a layer does not have. Two are equal if their memory is.

    Args:
        num_pairs: pairs of dimensions that the rotary embeddings rotate, all of them together.

    Raises:
        ValueError: a dimension is outside 0 to 2^30, or the memory would exceed 2^62 bytes.
    """

    def __init__(self, hidden: int, num_pairs: int) -> None: ...
    def add_attention(
        self,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        has_gate: bool,
        value_dim: int | None = None,
        gate_rows: int = 0,
        index_dim: int = 0,
        num_chosen: int = 0,
        block_size: int = 0,
        joint_heads: int = 0,
    ) -> None:
        """
        index_dim, num_chosen and block_size are those of a block indexer, of which joint_heads choose together.
        """

    def add_latent_attention(
        self,
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        kv_rank: int,
        value_dim: int,
        query_rank: int,
        index_heads: int = 0,
        index_dim: int = 0,
        num_chosen: int = 0,
        gate_rows: int = 0,
        group_size: int = 1,
    ) -> None:
        """
        index_heads, index_dim, num_chosen and group_size are those of an indexer.
        """

    def add_compressed_attention(
        self,
        num_heads: int,
        head_dim: int,
        query_rank: int,
        num_groups: int,
        output_rank: int,
        rope_dim: int = 0,
        pool: _PoolSizes | None = None,
        has_gates: bool = False,
        num_chosen: int = 0,
        index: tuple[int, int] | None = None,
        keys: _PoolSizes | None = None,
        has_entry_keys: bool = False,
        candidates: tuple[int, int] | None = None,
    ) -> None:
        """
        index: heads and dimension of an indexer; keys, if it has a pool; candidates as for `EntryIndexer`.
        """

    def add_delta_net(self, sizes: _DeltaSizes) -> None: ...
    def add_kimi_delta(self, sizes: _DeltaSizes, latent_rows: int) -> None:
        """latent_rows: of decay_down and gate_down together."""

    def add_short_conv(self, channels: int) -> None: ...
    def add_mamba(self, sizes: _MambaSizes) -> None: ...
    def add_ngrams(self, width: int, streams: int) -> None:
        """width: values of the rows of a token."""

    def add_dense(self, width: int) -> None: ...
    def add_routed(
        self,
        num_experts: int,
        experts_per_token: int,
        width: int,
        shared_width: int,
        has_own_input: bool = False,
        latent: int = 0,
    ) -> None:
        """
        Add a layer's routed experts and its shared expert.

        Args:
            has_own_input: the routed experts read something else than the shared expert.
            latent: the size of what they read and write; 0 means the hidden size.
        """

    def add_residual(self, num_streams: int, weights: int, rank: int = 0) -> None:
        """
        Add residual streams: the most rows of a matrix that gives weights, and the rank of `gated_mix`.
        """

    def add_ffn_post_norm(self) -> None:
        """
        Add the sum of a layer's feed-forward networks, for its norm or its factor.
        """

    def buffer_bytes(self, max_tokens: int) -> int:
        """Bytes that a Stack allocates for steps of at most `max_tokens`."""

    def dispatch_bytes(self, max_tokens: int) -> int:
        """
        Most bytes that a step allocates: a layer's dispatch, and arrays of experts that run or are predicted.
        """

    def scratch_bytes(
        self,
        max_tokens: int,
        num_threads: int,
        has_quants: bool = True,
        has_act_order: bool = True,
        ranks: int = 0,
    ) -> int:
        """
        Bytes of scratch memory that a Stack reserves in its Runtime: no operation of a step takes more. `ranks` is that
        of its `StackAdapter`s, the largest.

        Without `has_quants`, the bytes that operations take if no weights are quantised, and without `has_act_order`,
        if none are in an `act_order` format: the rest of what is reserved is never touched.
        """

    def __eq__(self, other: object, /) -> bool: ...

class Stack:
    """
    Embedding, layers and head of a decoder (native/ops/stack.h), run without Python in between; one step at a time.

    It keeps its arguments alive. Its results equal those of the operations above, called one by one, bit for bit.

    Args:
        embedding, head: [vocabulary, hidden].   final_norm: as in `Layer`.
        activation: the activation of dense networks and shared experts that have none of their own.
        rotaries: the rotary embeddings that layers choose from.
        layers: with keys and values in the layers of `kv` from `first_layer` on.
        max_tokens: most tokens of a step; working memory is allocated for them.
        resident: a table of every routed expert; see `use_experts`.
        experts_off: leave routed experts out of every sum.
        recurrent: the state of the layers without keys and values.
        embedding_scale: multiplies embeddings, but not those that a step gives.
        logit_scale: multiplies logits.
        logit_cap: logits become cap * tanh(logit / cap); 0 means that they stay.
        norm_kind: RMSNorm or LayerNorm, for all norms of the hidden state.
        first_layer: the number of the first layer, in `kv` and for those who run its experts.
        residual: None means one hidden state.
    """

    def __init__(
        self,
        runtime: Runtime,
        kv: KvCache,
        *,
        embedding: Matrix,
        head: Matrix,
        final_norm: NDArray[numpy.float32] | None,
        norm_eps: float,
        rotaries: Sequence[Rotary],
        activation: Activation,
        layers: Sequence[Layer],
        max_tokens: int,
        resident: ExpertTable | None = None,
        experts_off: bool = False,
        recurrent: RecurrentState | None = None,
        embedding_scale: float = 1.0,
        logit_cap: float = 0.0,
        first_layer: int = 0,
        logit_scale: float = 1.0,
        norm_kind: Literal["rms", "layer"] = "rms",
        residual: Residual | None = None,
    ) -> None: ...
    def begin(
        self,
        token_ids: NDArray[numpy.int32],
        sequence: NDArray[numpy.int32],
        slots: NDArray[numpy.int64],
        is_decode: NDArray[numpy.bool_],
        block_table: NDArray[numpy.int32],
        order: NDArray[numpy.int32],
        wanted: NDArray[numpy.int64],
        logits: NDArray[numpy.float32],
        state_slots: NDArray[numpy.int32] | None = None,
        angles: NDArray[numpy.float32] | None = None,
        sees_until: NDArray[numpy.int32] | None = None,
        overrides: tuple[NDArray[numpy.int64], NDArray[numpy.float32]] | None = None,
        additions: Sequence[tuple[int, NDArray[numpy.int64], NDArray[numpy.float32]]] = [],
        taps: Sequence[tuple[int, NDArray[numpy.float32]]] = [],
        choices: NDArray[numpy.int32] | None = None,
        window_blocks: NDArray[numpy.int32] | None = None,
        to_end: NDArray[numpy.int32] | None = None,
        adapters: NDArray[numpy.int32] | None = None,
    ) -> None:
        """
        Start a step, even if the last one did not finish; nothing is computed yet.

        Args:
            logits: [wanted, vocabulary], written at the end of the step.
            taps: layers, and [tokens, hidden] for the hidden state after each of them.
            choices: [routed layers, tokens, k], for the experts of each token, best first; -1 where a layer leaves
                the token out.
            The others are the fields of `model.step.Step`.

        Raises:
            ValueError: a value is out of range; or, with a recurrent state, tokens of a sequence are not consecutive,
                or do not continue at its slot's position; or, with `to_end`, the step wants something of a token that
                layers leave out.
        """

    def advance(self, between_layers: Callable[[], None] | None = None) -> tuple[int, Dispatch] | None:
        """
        Continue until the step is done (None), or a layer waits for experts: the layer, and its dispatch.

        All experts of the dispatch must be finished before the next call. ^C ends the call, and the step, between two
        layers.

        Args:
            between_layers: called about every 50 ms, between two layers; it may call `use_experts`. An exception ends
                the call, and the step.
        """

    def look_ahead(self) -> list[list[int]]:
        """
        While a layer waits, the experts that the next layer would choose from the current hidden state.

        Returns the experts that any token ranks first, then those that any ranks second and none first ...: one list
        for each of `experts_per_token` ranks. Empty if no later layer has routed experts.
        """

    def run_shared(self) -> None:
        """
        Run the shared expert of the waiting layer, if it has one; once, before the next `advance`.
        """

    def finish_experts(self, experts: Sequence[int]) -> None:
        """
        Announce that the outputs of these experts of the waiting layer are in `expert_out`; each once.
        """

    def rows(self) -> NDArray[numpy.float32]:
        """
        While a layer waits, the input of its experts: [tokens, hidden or latent], a read-only view.
        """

    def expert_out(self) -> NDArray[numpy.float32]:
        """
        While a layer waits, where the outputs of its experts belong: [tokens * experts per token, hidden or latent], a
        view.

        Row token * experts per token + rank is for that token and its expert of that rank.
        """

    def final_states(self, rows: NDArray[numpy.int64], out: NDArray[numpy.float32]) -> None:
        """
        Hidden states [rows, hidden] after the final norm, of tokens of the finished step that are `left`.
        """

    def logits(self, rows: NDArray[numpy.int64], out: NDArray[numpy.float32]) -> None:
        """
        Logits [rows, vocabulary] of tokens of the finished step that are `left`.
        """

    def hidden(self) -> NDArray[numpy.float32]:
        """
        A read-only view of the hidden state [tokens, hidden] of the last step, as the last operation left it.

        Raises:
            ValueError: layers left out some of its tokens.
        """

    @property
    def left(self) -> list[int] | None:
        """
        The tokens of the last step that no layer has left out, in ascending order; None: all of them.
        """

    def expert_ids(self) -> NDArray[numpy.int32]:
        """
        A read-only view of the choices in the layer that chose last: [tokens that are `left`, k], best first.

        k is 0 until a layer of the last step has chosen. The view is valid until the next layer chooses.
        """

    def resize(self, max_tokens: int) -> None:
        """
        Limit the tokens of a step from the next one on, to at most the number at construction. Gives memory that such
        steps do not need back to the system, and discards the results of the last step.
        """

    def use_experts(self, experts: ExpertTable | LayerExperts | None | None) -> None:
        """
        Choose who runs the routed experts from the next step on: a table that holds all of them, or other processes.
        With None, a step stops after each layer has chosen its experts.
        """

    def forbid(self, layer: int, experts: Sequence[int]) -> None:
        """
        From the next step on, no token chooses these experts of a layer; an empty list allows all again.

        Raises:
            ValueError: the layer has no such experts, or a group of them would keep too few.
        """

    def set_adapter(self, number: int, adapter: StackAdapter | None) -> None:
        """
        Choose the adapter of tokens with this number in `adapters`, from the next step on. None: no token may have it.

        Raises:
            ValueError: a step runs with tokens of this number.
        """

    @property
    def layers_done(self) -> int:
        """
        The layers that the step has run; 0 once it is done. Any thread may call this while it runs.
        """

    @property
    def sizes(self) -> StackSizes: ...
    @property
    def buffer_bytes(self) -> int:
        """Bytes of the allocated working memory, without scratch."""

    def take_seconds(self) -> tuple[float, float, float, float]:
        """
        Seconds since the last call in the router, in attention and dense networks, in routed experts, and waiting for
        experts that run elsewhere.
        """

    def take_uses(self, out: NDArray[numpy.int64]) -> None:
        """
        Write how often tokens chose each expert since the last call to `out` [layers, most experts of a layer].
        """

def memory_probe(threads: int, nbytes: int, instruction_set: str | None = None) -> float:
    """
    Bytes per second at which `threads` threads together read `nbytes` on huge pages with the widest loads.

    Takes `nbytes` of memory while it runs. If that fits the last-level cache, it measures the cache.

    Raises:
        ValueError: threads below 1, or less than 4 MiB per thread.   MemoryError: not enough memory.
    """

def product_probe(
    threads: int,
    trials: Sequence[tuple[Format, int, Tuning]],
    nbytes: int,
    passes: int,
    instruction_set: str | None = None,
) -> list[float]:
    """
    Bytes of weights per second that products read, for each trial: a quantised format, tokens, and a tuning.

    The weights are in no cache, and the best of `passes` passes counts; the trials take turns. A pass over 8 MiB takes
    one to three milliseconds. Takes `nbytes` of memory while it runs, and up to a fifth more for 32 tokens.

    Raises:
        ValueError: threads below 1, a format that is not quantised, tokens outside 1 to 32, nbytes outside 1 MiB to
            1 GiB, or passes outside 1 to 1000.
        MemoryError: not enough memory.   RuntimeError: the system refuses to start a thread.
    """

def int8_probe(threads: int, instruction_set: str | None = None) -> float:
    """
    Integer operations per second of the instruction that q4 products use; a multiply-add counts as two.
    """

def replay(
    experts: NDArray[numpy.uint16],
    steps: NDArray[numpy.int64],
    *,
    num_experts: int,
    policy: str,
    num_slots: int,
    counted_from: int = 0,
) -> tuple[int, int]:
    """
    Lookups and hits that a cache would have had on recorded choices (native/ops/replay.h).

    Args:
        experts: uint16 [tokens, layers, k].   steps: int64 [tokens], never decreasing; tokens of a step ask together.
        policy: lru, lfu or optimum.
        counted_from: the first token that counts; those before it only fill the cache.
    """

def ngram_words(key: bytes, ngrams: NDArray[numpy.uint32], words: NDArray[numpy.uint64]) -> None:
    """
    Keyed bits of n-grams, for a watermark (native/ops/watermark.h).

    Args:
        key: 16 bytes.   ngrams: uint32 [n, size], 1 to 63 ids each.   words: uint64 [n], overwritten.
    """

def tournament(words: NDArray[numpy.uint64], weights: NDArray[numpy.float64], *, depth: int) -> None:
    """
    Reweigh tokens by a tournament of `depth` rounds (native/ops/watermark.h).

    Args:
        words: uint64 [tokens], the bits of each.   weights: float64 [tokens], which sum to 1; changed in place.
        depth: 0 to 64.
    """
