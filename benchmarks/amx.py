"""How much faster are products and attention on the tiles of AMX than on AVX-512? Both in turn, on one machine.

    python benchmarks/amx.py [--threads 1] [--tokens 8 16 32 64 128] [--positions 2048 8192]

Products take weights that no cache holds: quantised ones with tiles from the first token on and without any, whose bits
must be equal; bfloat16 and FP8 ones in the instruction sets `amx` and `avx512`, whose largest difference is printed and
must be small. Attention is that of the same two instruction sets, for a chunk of a prompt and for one token. Latent
attention includes its products with kv_up, and a token must have the same bits alone and in a chunk. A ratio is the
median over rounds, each of which runs both sides. On a machine without AMX, the script says so and stops.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from argosy import _native
from argosy.config import Format, KvDtype
from argosy.machine import tuning
from attention import BLOCK, SCALE
from common import Report, Sample
from kernels import ARENA_BYTES, Matrices, finite_bits, product_operations
from latent_attention import NOPE, ROPE, VALUE
from latent_attention import Sequence as LatentSequence

# Issue 19, row 4: 4-bit weights, and q8, by tokens; attention of a prompt.
TARGETS = {
    ("q4", 32): ">= 1.15", ("q4", 64): ">= 1.4", ("q4", 128): ">= 1.5", ("q8", 128): ">= 1.2",
}  # fmt: skip
FLOAT_TOKENS = (1, 8, 32, 128)
LARGEST_ERROR = 1e-4  # of an output, beside the largest of all; activations keep 16 bits
HEADS, KV_HEADS, HEAD_DIM, CHUNK = 32, 4, 128, 64
LATENT_HEADS = (16, 128)  # of DeepSeek-V2-Lite and DeepSeek-V3


def in_turn(works: Sequence[Callable[[], object]], rounds: int, seconds: float) -> list[list[float]]:
    """For each piece of work, its shortest time in each round."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, found, strict=True):
            best, end = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < end:
                begin = time.perf_counter()
                work()
                best = min(best, time.perf_counter() - begin)
            times.append(best)
    return found


def product(
    runtime: _native.Runtime, matrices: Matrices, tokens: int
) -> tuple[Callable[[], None], np.ndarray]:
    x = np.random.default_rng(1).standard_normal((tokens, matrices.cols), np.float32)
    out = np.empty((tokens, matrices.rows), np.float32)
    return lambda: _native.matmul(runtime, matrices.take(1), x, [out]), out


def products(report: Report, options: argparse.Namespace) -> None:
    memory = _native.Arena(ARENA_BYTES)
    finite_bits(memory)
    default = tuning.default_tuning()
    sides = [
        _native.Runtime(options.threads, dict.fromkeys(tuning.FORMATS, default._replace(amx_from=number)))
        for number in (1, 0)
    ]
    for name in _native.amx_formats():
        matrices = Matrices(memory, name, options.rows, options.cols)
        for tokens in options.tokens:
            works, outs = zip(*(product(side, matrices, tokens) for side in sides), strict=True)
            for work in works:
                matrices._next = 0
                work()
            if not np.array_equal(*outs):
                raise SystemExit(f"{name}, {tokens} tokens: AMX and AVX-512 computed other bits")
            with Sample() as sample:
                tiles, avx512 = in_turn(works, options.rounds, options.seconds)
            rate = product_operations(matrices, tokens) / statistics.median(tiles) / 1e9
            report.shares(
                f"{name}, {tokens} tokens, {rate:.0f} Gop/s on tiles",
                [slow / fast for fast, slow in zip(tiles, avx512, strict=True)],
                target=TARGETS.get((name, tokens), ""), format=name, tokens=tokens, others=str(sample),
            )  # fmt: skip


def float_products(report: Report, options: argparse.Namespace) -> None:
    memory = _native.Arena(ARENA_BYTES)
    finite_bits(memory)
    sides = [_native.Runtime(options.threads, None, name) for name in ("amx", "avx512")]
    formats: tuple[Format, ...] = ("bf16", "f8")
    for name, tokens in itertools.product(formats, FLOAT_TOKENS):
        matrices = Matrices(memory, name, options.rows, options.cols)
        works, outs = zip(*(product(side, matrices, tokens) for side in sides), strict=True)
        for work in works:
            matrices._next = 0
            work()
        error = float(np.abs(outs[0] - outs[1]).max() / np.abs(outs[1]).max())
        if not error <= LARGEST_ERROR:
            raise SystemExit(f"{name}, {tokens} tokens: AMX and AVX-512 differ by {error:.0e}")
        with Sample() as sample:
            tiles, avx512 = in_turn(works, options.rounds, options.seconds)
        rate = product_operations(matrices, tokens) / statistics.median(tiles) / 1e9
        report.shares(
            f"{name}, {tokens} tokens, {rate:.0f} Gop/s, error {error:.0e}",
            [slow / fast for fast, slow in zip(tiles, avx512, strict=True)],
            target=TARGETS.get((name, tokens), ""), format=name, tokens=tokens, others=str(sample),
        )  # fmt: skip


def attention(report: Report, options: argparse.Namespace, positions: int, dtype: KvDtype) -> None:
    kind = _native.KvShape.keys_values(KV_HEADS, HEAD_DIM)
    blocks = positions // BLOCK
    cache, random = _native.KvCache([kind], blocks, BLOCK, dtype), np.random.default_rng(0)
    sides = [_native.Runtime(options.threads, None, name) for name in ("amx", "avx512")]
    keys, values = random.standard_normal((2, positions, KV_HEADS, HEAD_DIM), np.float32)
    _native.kv_write(sides[0], cache, 0, keys, values, np.arange(positions))
    table = np.arange(blocks, dtype=np.int32)[None]
    for tokens, target in ((CHUNK, ">= 4" if dtype == "f16" else ""), (1, "")):
        q = random.standard_normal((tokens, HEADS, HEAD_DIM), np.float32)
        order = np.arange(positions - tokens, positions, dtype=np.int32)
        sequence = np.zeros(tokens, np.int32)
        outs = [np.empty((tokens, HEADS * HEAD_DIM), np.float32) for _ in sides]

        def attend(side: int) -> None:
            _native.attention(sides[side], cache, 0, q, table, sequence, order, SCALE, 0, outs[side])  # noqa: B023

        with Sample() as sample:
            tiles, avx512 = in_turn([lambda: attend(0), lambda: attend(1)], options.rounds, options.seconds)
        error = float(np.abs(outs[0] - outs[1]).max() / np.abs(outs[1]).max())
        report.shares(
            f"attention, {positions} positions, {tokens} tokens, {dtype}, error {error:.0e}",
            [slow / fast for fast, slow in zip(tiles, avx512, strict=True)],
            target=target, positions=positions, tokens=tokens, format=dtype, others=str(sample),
        )  # fmt: skip


def latent(report: Report, options: argparse.Namespace, heads: int, positions: int, dtype: KvDtype) -> None:
    sides = [_native.Runtime(options.threads, None, name) for name in ("amx", "avx512")]
    held = LatentSequence(sides[0], heads, positions, dtype)
    chunk = np.random.default_rng(5).standard_normal((CHUNK, heads, NOPE + ROPE), np.float32)
    last_bits = []
    for tokens in (CHUNK, 1):
        outs = [np.empty((tokens, heads * VALUE), np.float32) for _ in sides]

        def attend(side: int) -> None:
            held.runtime = sides[side]
            held.run(chunk[-tokens:], outs[side])  # noqa: B023

        attend(0)
        attend(1)
        last_bits.append(outs[0][-1].copy())
        if not np.array_equal(last_bits[0], last_bits[-1]):
            raise SystemExit(f"{heads} heads: a token alone and in a chunk have other bits")
        error = float(np.abs(outs[0] - outs[1]).max() / np.abs(outs[1]).max())
        if not error < 1e-3:
            raise SystemExit(f"{heads} heads: latent attention on tiles is off by {error:.0e}")
        with Sample() as sample:
            tiles, avx512 = in_turn([lambda: attend(0), lambda: attend(1)], options.rounds, options.seconds)
        report.shares(
            f"latent attention, {heads} heads, {positions} positions, {tokens} tokens, {dtype}, error {error:.0e}",
            [slow / fast for fast, slow in zip(tiles, avx512, strict=True)],
            heads=heads, positions=positions, tokens=tokens, format=dtype, others=str(sample),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 16, 24, 32, 64, 128])
    parser.add_argument("--positions", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a side in a round")
    options = parser.parse_args()
    if not _native.amx_formats():
        raise SystemExit(f"AMX is {_native.amx_state()} here: there is nothing to measure")
    report = Report("amx")
    report.correct("quantised products on tiles have the bits of AVX-512, checked before each is timed")
    report.opening()
    report.line(
        "unit", f"speed on tiles over AVX-512, {options.threads} threads, median of {options.rounds} rounds"
    )
    products(report, options)
    float_products(report, options)
    for positions in options.positions:
        for dtype in get_args(KvDtype):
            attention(report, options, positions, dtype)
            for heads in LATENT_HEADS:
                latent(report, options, heads, positions, dtype)


if __name__ == "__main__":
    main()
