"""How fast does a token attend over the KV cache, and many tokens of a prompt? Two builds, A B A B.

    python benchmarks/attention.py [--other PYTHON] [--threads 1] [--positions 2048] [--repeats 5]

Heads that have their own keys wait for memory, heads that share keys for multiply-adds. Layers take turns, so that no
cache holds their keys. `--other` names the interpreter of another checkout, whose build is measured in turn with this
one; where the two do not compute the same bits, it says so. A sample is a fresh process, and its figure the best of
many calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from argosy import _native
from argosy.config import KvDtype

BLOCK, LEAST_BYTES = 16, 64 << 20
SCALE = 0.1


class Shape(NamedTuple):
    """Attention heads, heads with keys, their size, tokens at once, and the format of the cache."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    dtype: KvDtype

    def __str__(self) -> str:
        return (
            f"{self.tokens:>2} tokens, {self.heads} heads on {self.kv_heads} of {self.head_dim}, {self.dtype}"
        )


SHAPES = (
    Shape(32, 4, 128, 1, "f32"),
    Shape(32, 4, 128, 1, "f16"),
    Shape(32, 4, 128, 1, "q8"),
    Shape(16, 1, 128, 1, "f16"),
    Shape(64, 8, 64, 1, "f32"),
    Shape(16, 16, 128, 1, "f32"),
    Shape(32, 4, 128, 64, "f32"),
)


def measure(shape: Shape, threads: int, positions: int, seconds: float) -> dict[str, float | str]:
    """GB/s of keys and values, and GFLOP/s, two a multiply-add; with a digest of what was computed."""
    kind = _native.KvShape.keys_values(shape.kv_heads, shape.head_dim)
    layer_bytes = _native.kv_cache_bytes([kind], positions // BLOCK, BLOCK, shape.dtype)
    num_layers = -(-LEAST_BYTES // layer_bytes)
    cache = _native.KvCache([kind] * num_layers, positions // BLOCK, BLOCK, shape.dtype)
    runtime, random = _native.Runtime(threads), np.random.default_rng(0)
    slots = random.permutation(positions // BLOCK)[:, None] * BLOCK + np.arange(
        BLOCK
    )  # as blocks of a server lie
    for layer in range(num_layers):
        keys, values = random.standard_normal((2, positions, shape.kv_heads, shape.head_dim), np.float32)
        _native.kv_write(runtime, cache, layer, keys, values, slots.reshape(-1))
    query = random.standard_normal((shape.tokens, shape.heads, shape.head_dim), np.float32)
    out = np.empty((shape.tokens, shape.heads * shape.head_dim), np.float32)
    table = (slots[:, 0] // BLOCK).astype(np.int32)[None]
    sequence = np.zeros(shape.tokens, np.int32)
    order = np.arange(positions - shape.tokens, positions, dtype=np.int32)

    def attend(layer: int) -> float:
        begin = time.perf_counter()
        _native.attention(runtime, cache, layer, query, table, sequence, order, SCALE, 0, out)
        return time.perf_counter() - begin

    digest = hashlib.sha256()
    for layer in range(num_layers):
        attend(layer)
        digest.update(out.tobytes())
    best, end, layer = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        best = min(best, attend(layer))
        layer = (layer + 1) % num_layers
    operations = 4 * shape.heads * shape.head_dim * (int(order.sum()) + shape.tokens)
    return {
        "GB/s": layer_bytes / best / 1e9,
        "GFLOP/s": operations / best / 1e9,
        "digest": digest.hexdigest()[:16],
    }


def sample(command: list[str], digests: set[str]) -> Mapping[str, float]:
    """The figures of a process; adds the digest of its results to `digests`."""
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    digests.add(found.pop("digest"))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", help="the interpreter of another build")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a sample")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        shape = SHAPES[options.child]
        print(json.dumps(measure(shape, options.threads, options.positions, options.seconds)))
        return

    from common import Report, alternate

    builds = {"this build": sys.executable} | ({"the other": options.other} if options.other else {})
    report = Report("attention")
    rows, others = [], []
    for number, shape in enumerate(SHAPES):
        digests: set[str] = set()
        command = ["-P", __file__, "--child", str(number), "--threads", str(options.threads)]
        command += ["--positions", str(options.positions), "--seconds", str(options.seconds)]
        runs = {name: partial(sample, [python, *command], digests) for name, python in builds.items()}
        rows.append((shape, alternate(runs, options.repeats)))
        if len(digests) > 1:
            others.append(str(shape))
    same = f"other bits: {'; '.join(others)}" if others else "every sample computed the same bits"
    report.correct(same if len(builds) > 1 else "one build alone")
    report.opening()
    for shape, samples in rows:
        unit = "GFLOP/s" if shape.tokens > 1 else "GB/s"
        facts = {"threads": options.threads, "positions": options.positions}
        medians = [
            report.figure(f"{shape}, {name}", unit, of_build, unit, **facts)
            for name, of_build in samples.items()
        ]
        if len(medians) > 1:
            report.ratio(f"{shape}, this over the other", *medians, **facts)


if __name__ == "__main__":
    main()
