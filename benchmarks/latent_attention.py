"""How fast does a token attend over latent vectors, compared with a float32 product of the same size?

    python benchmarks/latent_attention.py --heads 64 --context 512 4096

Multi-head latent attention is bound by multiply-adds: all heads share a vector of kv_rank + rope_dim elements. The
limit is the rate of a plain float32 product of many tokens on the same threads, measured before each figure. Figures
are the best of many short samples: a neighbour can only slow one down.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from argosy import _native
from common import Report
from kernels import best_rate
from tests.native import _native_testing

NOPE, ROPE, RANK, VALUE, BLOCK = 128, 64, 512, 128, 16
SCALE = 0.1


def matrix(rows: int, cols: int, seed: int) -> tuple[_native.Matrix, np.ndarray]:
    weights = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32) / np.float32(
        cols**0.5
    )
    data = np.empty(_native.matrix_bytes("bf16", rows, cols), np.uint8)
    _native.quantize("bf16", weights, data)
    held = _native.dequantize("bf16", data, rows, cols)
    return _native.Matrix(data, 0, "bf16", rows, cols), held


class Sequence:
    """The vectors of `context` positions, and attention of tokens over them."""

    def __init__(
        self, runtime: _native.Runtime, heads: int, context: int, dtype: str, index_dim: int = 0
    ) -> None:
        self.runtime, self.heads, self.context = runtime, heads, context
        blocks = -(-context // BLOCK)
        shape = _native.KvShape.latent(RANK + ROPE, index_dim)
        self.kv = _native.KvCache([shape], blocks, BLOCK, dtype)  # type: ignore[arg-type]
        self.vectors = np.random.default_rng(0).standard_normal((context, RANK + ROPE), dtype=np.float32)
        if dtype != "f32":
            # Whole numbers to 127, the largest of them in every 32, are what both other formats keep.
            self.vectors = np.rint(16 * self.vectors).clip(-127, 127)
            self.vectors[:, ::32] = 127
            self.vectors /= 64
        _native_testing.latent_write(runtime, self.kv, 0, self.vectors, np.arange(context))
        self.table = np.arange(blocks, dtype=np.int32)[None]
        self.key_up, self.key_weights = matrix(heads * RANK, NOPE, 1)
        self.value_up, self.value_weights = matrix(heads * VALUE, RANK, 2)

    def attend(self, tokens: int) -> np.ndarray:
        """Attention of the last `tokens` positions."""
        q = np.random.default_rng(3).standard_normal(
            (self.context, self.heads, NOPE + ROPE), dtype=np.float32
        )
        out = np.empty((tokens, self.heads * VALUE), np.float32)
        self.run(q[-tokens:], out)
        return out

    def run(self, q: np.ndarray, out: np.ndarray) -> None:
        position = np.arange(self.context - len(q), self.context, dtype=np.int32)
        zeros = np.zeros(len(q), np.int32)
        _native_testing.latent_attention(
            self.runtime, self.kv, 0, q, self.key_up, self.value_up, self.table, zeros, position, SCALE, out
        )

    def require_right(self) -> None:
        """Check the last token against the plain formula, and for the same bits alone and in a chunk."""
        q = np.random.default_rng(3).standard_normal(
            (self.context, self.heads, NOPE + ROPE), dtype=np.float32
        )
        query = q[-1].astype(np.float64)
        latents, shared = self.vectors[:, :RANK].astype(np.float64), self.vectors[:, RANK:].astype(np.float64)
        expected = []
        for head in range(self.heads):
            keys = latents @ self.key_weights.reshape(self.heads, RANK, NOPE)[head]
            values = latents @ self.value_weights.reshape(self.heads, VALUE, RANK)[head].T
            scores = SCALE * (keys @ query[head, :NOPE] + shared @ query[head, NOPE:])
            weights = np.exp(scores - scores.max())
            expected.append(weights @ values / weights.sum())
        alone, together = self.attend(1)[0], self.attend(9)[-1]
        if not np.allclose(alone, np.concatenate(expected), atol=1e-4):
            raise SystemExit(f"context {self.context}: absorbed attention is not plain attention")
        if not np.array_equal(alone, together):
            raise SystemExit(f"context {self.context}: a token's result depends on the others in the call")

    def rate(self, tokens: int, seconds: float) -> float:
        """Operations per second of attention alone, two per multiply-add; the kv_up products add only time."""
        q = np.random.default_rng(4).standard_normal((tokens, self.heads, NOPE + ROPE), dtype=np.float32)
        out = np.empty((tokens, self.heads * VALUE), np.float32)
        seen = float(np.arange(self.context - tokens + 1, self.context + 1).sum())

        def work() -> float:
            self.run(q, out)
            return 2 * self.heads * (RANK + ROPE + RANK) * seen

        return best_rate(work, seconds)


def product(runtime: _native.Runtime) -> Callable[[], float]:
    weights, x = np.ones((RANK, RANK + ROPE), np.float32), np.ones((96, RANK + ROPE), np.float32)
    view = _native.Matrix(weights.view(np.uint8).reshape(-1), 0, "f32", *weights.shape)
    out = np.empty((len(x), RANK), np.float32)

    def work() -> float:
        _native.matmul(runtime, [view], x, [out])
        return 2 * len(x) * weights.size

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--context", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv", choices=("f32", "f16", "q8"), default="f16")
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    options = parser.parse_args()

    report = Report("latent_attention")
    runtime = _native.Runtime(options.threads)
    sequences = [Sequence(runtime, options.heads, context, options.kv) for context in options.context]
    for sequence in sequences:
        sequence.require_right()
    report.correct(
        "absorbed equals plain in float64 within 1e-4; a token has the same bits alone and in a chunk"
    )
    report.opening()
    shape = f"{options.heads} heads, {RANK} + {ROPE}, KV {options.kv}, {options.threads} threads"
    report.line("shape", f"{shape}; best of {options.seconds} s a figure")
    wall, of_product = 0.0, product(runtime)
    for sequence in sequences:
        cells = []
        for tokens in options.tokens:
            wall = max(wall, best_rate(of_product, options.seconds / 2))
            rate = sequence.rate(tokens, options.seconds)
            cells.append(f"{tokens} tokens {rate / 1e9:>6.1f} GFLOP/s ({rate / wall:.2f})")
            facts = {"context": sequence.context, "tokens": tokens, "shape": shape}
            report.record("attention", "GFLOP/s", [rate / 1e9], [], wall=wall / 1e9, **facts)
        report.line(f"at {sequence.context}", "   ".join(cells))
    report.line("wall", f"float32 product {wall / 1e9:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
