"""Measure matrix products and attention, each alongside a probe of int8 arithmetic at the same moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import cycle
from typing import NamedTuple, get_args

import numpy as np

from argosy import _native
from argosy.config import MEASURED_FORMATS, MIB, Format, KvDtype
from argosy.machine.rates import (
    NUM_TOKENS,
)

_ARENA_BYTES = 192 << 20  # larger than most last-level caches
_TILE_BYTES = 4 << 20  # random bytes, repeated
_COLD_BYTES = 12 << 20  # bytes read per sample
ROWS, COLS, _MANY_TOKENS = 768, 2048, 64
MOST_WAITING = 8  # tokens; beyond this, arithmetic takes far longer than reading weights
_NUM_CACHED = 2  # matrices, 12 MB in float32, which last-level caches hold
_ENCODER_ROWS = 512  # patches per product, as in vision towers
KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)
_KEYS_BYTES = 64 << 20  # keys and values: more than most last-level caches hold
_POSITIONS, _BLOCK, _HEAD_DIM = 1024, 16, 128
_SAMPLE_S = 0.005  # per call and round
_PROBE_S = 0.05  # how long the rate of arithmetic is assumed constant


class _Timed(NamedTuple):
    """A call to time, and the bytes that it reads or the operations that it performs.

    is_arithmetic: bound by arithmetic rather than memory.
    """

    name: str
    call: Callable[[], object]
    work: float
    is_arithmetic: bool = True


class Kernels:
    """Times products and attention in rounds; rates are medians.

    A forecast covers minutes in which others also use the machine, so the fastest call would promise too much.
    """

    def __init__(self, runtime: _native.Runtime, cores: int) -> None:
        self._memory, self._cores = ExitStack(), cores
        self._probes: list[float] = []  # seconds per byte of memory, by round
        self._calls = [
            *_products(runtime, self._memory), _encoder_product(runtime, self._memory), *_attention(runtime)
        ]  # fmt: skip
        self._medians: dict[str, list[float]] = {one.name: [] for one in self._calls}
        # Operations per second of the int8 probe next to each call that is bound by arithmetic.
        self._int8: dict[str, list[float]] = {one.name: [] for one in self._calls if one.is_arithmetic}

    def measure(self) -> None:
        """Do a round."""
        self._probes.append(1.0 / _native.memory_probe(self._cores, max(256, 8 * self._cores) * MIB))
        int8, probed_at = 0.0, -_PROBE_S
        for one in self._calls:
            if one.is_arithmetic:
                if time.perf_counter() - probed_at > _PROBE_S:
                    int8, probed_at = _native.int8_probe(self._cores), time.perf_counter()
                self._int8[one.name].append(int8)
            self._medians[one.name].append(_median_s(one.call))

    @property
    def int8_operations(self) -> float:
        """The mean over all rounds, because on some virtual machines arithmetic changes its rate every few seconds."""
        return statistics.harmonic_mean([rate for rounds in self._int8.values() for rate in rounds])

    @property
    def rates(self) -> dict[str, float]:
        """Work per second of each arithmetic-bound call, at the probes' mean rate."""
        shares = {
            one.name: statistics.median(
                one.work / took / probed
                for took, probed in zip(self._medians[one.name], self._int8[one.name], strict=True)
            )
            for one in self._calls
            if one.is_arithmetic
        }
        int8_operations = self.int8_operations
        return {name: share * int8_operations for name, share in shares.items()}

    @property
    def memory_bytes_per_s(self) -> float:
        """The mean over all rounds, because on some virtual machines memory changes its rate every few seconds."""
        return len(self._probes) / sum(self._probes)

    def share_of_memory(self, name: str) -> float:
        """A call's bytes per second divided by memory's in the same round."""
        work = self._work(name)
        return statistics.median(
            work / took * probed for took, probed in zip(self._medians[name], self._probes, strict=True)
        )

    def wait(self, format: Format, tokens: int) -> float:
        """`Rates.waits` for a format and a number of tokens, relative to memory in the same round."""
        cold, cached = f"cold {format} {tokens}", f"{format} {tokens}"
        size = _native.matrix_bytes(format, ROWS, COLS)
        matrices = self._work(cold) / self._work(cached) * _NUM_CACHED
        shares = [
            (took / matrices - took_cached / _NUM_CACHED) / (size * probed)
            for took, took_cached, probed in zip(
                self._medians[cold], self._medians[cached], self._probes, strict=True
            )
        ]
        return max(1e-9, statistics.median(shares))

    def _work(self, name: str) -> float:
        return next(one.work for one in self._calls if one.name == name)

    @property
    def varied(self) -> float:
        """The factor between the fastest and the slowest round, as a median over all calls."""
        return statistics.median(max(rounds) / min(rounds) for rounds in self._medians.values())

    def close(self) -> None:
        self._calls.clear()  # they refer to memory that is about to be freed
        self._memory.close()


def _median_s(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + _SAMPLE_S
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _products(runtime: _native.Runtime, memory: ExitStack) -> Iterator[_Timed]:
    """Products of each format and each of NUM_TOKENS, with weights in a CPU cache and with weights in none."""
    arena = memory.enter_context(closing(_native.Arena(_ARENA_BYTES)))
    bits = np.random.default_rng(0).integers(0, 256, _TILE_BYTES, dtype=np.uint8)
    # These bytes are finite, normal numbers in every format.
    arena.array().reshape(-1, _TILE_BYTES)[:] = np.bitwise_or(np.bitwise_and(bits, 0x3B), 0x20)

    def timed(
        format: Format, num_tokens: int, count: int, *, all_of: int | None = None
    ) -> Callable[[], object]:
        """Time products with the next `count` matrices out of `all_of`, or out of all."""
        size = _native.matrix_bytes(format, ROWS, COLS)
        number = all_of or _ARENA_BYTES // size
        matrices = [_native.Matrix(arena, i * size, format, ROWS, COLS) for i in range(number)]
        x = np.ones((num_tokens, COLS), np.float32)
        outs = [np.empty((num_tokens, ROWS), np.float32) for _ in range(count)]
        starts = cycle(range(0, number - count + 1, count))
        return lambda: _native.matmul(runtime, matrices[(at := next(starts)) : at + count], x, outs)

    for format in MEASURED_FORMATS:
        size = _native.matrix_bytes(format, ROWS, COLS)
        cold = max(1, _COLD_BYTES // size)
        for tokens in NUM_TOKENS:
            work = 2.0 * tokens * ROWS * COLS
            call = timed(format, tokens, _NUM_CACHED, all_of=_NUM_CACHED)
            yield _Timed(f"{format} {tokens}", call, _NUM_CACHED * work)
            if tokens <= MOST_WAITING:
                call = timed(format, tokens, cold)
                yield _Timed(f"cold {format} {tokens}", call, cold * work, is_arithmetic=False)


def _encoder_product(runtime: _native.Runtime, memory: ExitStack) -> _Timed:
    """`linear` with bfloat16 weights, the main operation of vision towers."""
    arena = memory.enter_context(closing(_native.Arena(_native.matrix_bytes("bf16", ROWS, COLS))))
    arena.array()[:] = 0x3B
    matrix = _native.Matrix(arena, 0, "bf16", ROWS, COLS)
    x, out = np.ones((_ENCODER_ROWS, COLS), np.float32), np.empty((_ENCODER_ROWS, ROWS), np.float32)
    return _Timed(
        "encoder", lambda: _native.linear(runtime, matrix, x, out), 2.0 * _ENCODER_ROWS * ROWS * COLS
    )


def _attention(runtime: _native.Runtime) -> Iterator[_Timed]:
    """Attention in each format of the KV cache, for one token and for many.

    One token is bound by memory if each head has its own keys, and by arithmetic if heads share them.
    """

    def timed(name: str, dtype: KvDtype, num_heads: int, kv_heads: int, num_tokens: int) -> _Timed:
        shape = _native.KvShape.keys_values(kv_heads, _HEAD_DIM)
        num_blocks = _POSITIONS // _BLOCK
        nbytes = _native.kv_cache_bytes([shape], num_blocks, _BLOCK, dtype)
        num_layers = -(-_KEYS_BYTES // nbytes)
        cache = _native.KvCache([shape] * num_layers, num_blocks, _BLOCK, dtype)
        keys = np.full((_POSITIONS, kv_heads, _HEAD_DIM), 0.1, np.float32)
        for layer in range(num_layers):
            _native.kv_write(runtime, cache, layer, keys, keys, np.arange(_POSITIONS))
        query = np.ones((num_tokens, num_heads, _HEAD_DIM), np.float32)
        out = np.empty((num_tokens, num_heads * _HEAD_DIM), np.float32)
        table = np.arange(num_blocks, dtype=np.int32)[None]
        sequence = np.zeros(num_tokens, np.int32)
        order = np.arange(_POSITIONS - num_tokens, _POSITIONS, dtype=np.int32)
        layers = cycle(range(num_layers))

        def call() -> None:
            _native.attention(runtime, cache, next(layers), query, table, sequence, order, 0.1, 0, out)

        is_arithmetic = kv_heads < num_heads
        operations = 4 * num_heads * _HEAD_DIM * (int(order.sum()) + num_tokens)
        return _Timed(f"{name} {dtype}", call, operations if is_arithmetic else nbytes, is_arithmetic)

    for dtype in KV_DTYPES:
        yield timed("keys and values", dtype, 16, 16, 1)
        yield timed("attention", dtype, 32, 4, 1)
        yield timed("prompt attention", dtype, 32, 4, _MANY_TOKENS)
