"""What does a token of latent attention cost that sees only the positions its indexer chose? Beside one that sees all.

    python benchmarks/sparse_attention.py --context 4096 32768 --layers 61

One layer of DeepSeek-V3.2: 128 heads, an indexer of 64 heads, 2,048 of the positions chosen. Projections, which are
the same either way, are left out. GLM-5 has `--heads 64 --index-heads 32`. Figures are medians, the two ways in turn.

    python benchmarks/sparse_attention.py --blocks 4 --heads 24 --index-heads 8 --layers 12

The same of Qwen3.8: grouped-query attention with 2 KV heads of 256 dimensions, and an indexer of blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from argosy import _native
from common import Report, alternate
from latent_attention import BLOCK, NOPE, ROPE, SCALE, VALUE, Sequence
from tests.native import _native_testing

INDEX_DIM = 128


class Indexed(Sequence):
    """A sequence with random index keys, and the two ways of attending over it."""

    def __init__(
        self, runtime: _native.Runtime, heads: int, index_heads: int, context: int, dtype: str, count: int
    ) -> None:
        super().__init__(runtime, heads, context, dtype, INDEX_DIM)
        self.count = count
        random = np.random.default_rng(5)
        # Whole numbers to 127, the largest of them in every 32, are what every format keeps.
        self.keys = random.integers(-127, 128, (context, INDEX_DIM)).astype(np.float32)
        self.keys[:, ::32] = 127
        _native_testing.index_write(runtime, self.kv, 0, self.keys, np.arange(context))
        most = 32
        self.index_q = random.standard_normal((most, index_heads, INDEX_DIM), dtype=np.float32)
        self.weights = random.standard_normal((most, index_heads), dtype=np.float32)

    def choose(self, order: np.ndarray, chosen: np.ndarray) -> None:
        _native_testing.choose_positions(
            self.runtime,
            self.kv,
            0,
            self.index_q[: len(order)],
            self.weights[: len(order)],
            self.table,
            np.zeros(len(order), np.int32),
            order,
            chosen,
        )

    def require_right(self) -> None:
        """Check that no position left out scores better than a chosen one, in float64 but for rounding."""
        chosen = np.empty((1, self.count), np.int32)
        self.choose(np.array([self.context - 1], np.int32), chosen)
        products = self.keys.astype(np.float64) @ self.index_q[0].T.astype(np.float64)
        scores = np.maximum(products, 0) @ self.weights[0]
        rest = np.delete(scores, chosen[0])
        if rest.max() > scores[chosen[0]].min() + 1e-4 * np.abs(scores).max():
            raise SystemExit(f"context {self.context}: a better position was left out")

    def ways(self, tokens: int) -> dict[str, Callable[[], dict[str, float]]]:
        """Each way's milliseconds a token: of everything, and of choosing alone."""
        random = np.random.default_rng(6)
        q = random.standard_normal((tokens, self.heads, NOPE + ROPE), dtype=np.float32)
        out = np.empty((tokens, self.heads * VALUE), np.float32)
        chosen = np.empty((tokens, self.count), np.int32)
        order = np.arange(self.context - tokens, self.context, dtype=np.int32)
        sequence = np.zeros(tokens, np.int32)

        def attend(positions: np.ndarray | None) -> None:
            _native_testing.latent_attention(
                self.runtime, self.kv, 0, q, self.key_up, self.value_up, self.table, sequence, order, SCALE, out,
                None, positions,
            )  # fmt: skip

        def sample(is_sparse: bool) -> dict[str, float]:
            begin = time.perf_counter()
            if is_sparse:
                self.choose(order, chosen)
            middle = time.perf_counter()
            attend(chosen if is_sparse else None)
            end = time.perf_counter()
            return {"ms": 1e3 * (end - begin) / tokens, "choosing ms": 1e3 * (middle - begin) / tokens}

        return {"all positions": partial(sample, False), "chosen positions": partial(sample, True)}


class Blocks(Indexed):
    """The same with keys and values, which two KV heads see in blocks."""

    KV_HEADS, HEAD_DIM = 2, 256

    def __init__(
        self,
        runtime: _native.Runtime,
        heads: int,
        index_heads: int,
        context: int,
        dtype: str,
        count: int,
        size: int,
    ) -> None:
        super().__init__(runtime, heads, index_heads, context // size, dtype, count // size)
        self.context, self.size = context, size
        shape = _native.KvShape.keys_values(self.KV_HEADS, self.HEAD_DIM)
        self.layer = _native.KvCache([shape], -(-context // BLOCK), BLOCK, dtype)  # type: ignore[arg-type]
        random = np.random.default_rng(7)
        for slots in np.array_split(np.arange(context), -(-context // 1024)):
            keys, values = random.standard_normal((2, len(slots), self.KV_HEADS, self.HEAD_DIM), np.float32)
            _native.kv_write(runtime, self.layer, 0, keys, values, slots)

    def require_right(self) -> None:
        context, self.context = self.context, self.context // self.size  # of keys
        super().require_right()
        self.context = context

    def ways(self, tokens: int) -> dict[str, Callable[[], dict[str, float]]]:
        q = np.random.default_rng(6).standard_normal((tokens, self.heads, self.HEAD_DIM), np.float32)
        out = np.empty((tokens, self.heads * self.HEAD_DIM), np.float32)
        chosen = np.empty((tokens, self.count), np.int32)
        order = np.arange(self.context - tokens, self.context, dtype=np.int32)
        table, sequence = (
            np.arange(-(-self.context // BLOCK), dtype=np.int32)[None],
            np.zeros(tokens, np.int32),
        )

        def sample(is_sparse: bool) -> dict[str, float]:
            begin = middle = time.perf_counter()
            if is_sparse:
                self.choose((order + 1) // self.size - 1, chosen)
                middle = time.perf_counter()
                _native_testing.joint_attention(
                    self.runtime,
                    self.layer,
                    0,
                    q,
                    table,
                    sequence,
                    order,
                    chosen,
                    self.size,
                    SCALE,
                    None,
                    out,
                )
            else:
                _native.attention(self.runtime, self.layer, 0, q, table, sequence, order, SCALE, 0, out)
            end = time.perf_counter()
            return {"ms": 1e3 * (end - begin) / tokens, "choosing ms": 1e3 * (middle - begin) / tokens}

        return {"all positions": partial(sample, False), "chosen positions": partial(sample, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--index-heads", type=int, default=64)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=0, help="positions of a block; 0: latent attention")
    parser.add_argument("--layers", type=int, default=61, help="for tokens per second")
    parser.add_argument("--context", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv", choices=("f32", "f16", "q8"), default="f16")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    report = Report("sparse_attention")
    runtime = _native.Runtime(options.threads)
    kind = partial(Blocks, size=options.blocks) if options.blocks else Indexed
    sequences = [
        kind(runtime, options.heads, options.index_heads, context, options.kv, options.count)
        for context in options.context
    ]
    for sequence in sequences:
        sequence.require_right()
    report.correct("the chosen positions have the best scores in float64")
    report.opening()
    shape = f"{options.heads} heads, {options.index_heads} of the indexer, {options.count} chosen, KV {options.kv}"
    report.line("shape", f"{shape}, {options.threads} threads")
    for sequence in sequences:
        for tokens in options.tokens:
            facts = {
                "context": sequence.context,
                "tokens": tokens,
                "shape": shape,
                "threads": options.threads,
            }
            samples = alternate(sequence.ways(tokens), options.repeats)
            name = f"{tokens} tokens at {sequence.context}"
            medians = [
                report.figure(f"{name}, {way}", "ms", of_way, "ms", **facts)
                for way, of_way in samples.items()
            ]
            report.ratio(f"{name}, all over chosen", *medians, **facts)
            if tokens == 1:
                rates = (1e3 / (options.layers * median) for median in medians)
                report.line("tokens/s", " and ".join(f"{rate:.2f}" for rate in rates))


if __name__ == "__main__":
    main()
