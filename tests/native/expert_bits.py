"""Prints a digest of what experts compute, for every format and instruction set: do two builds give the same bits?

    python -m tests.native.expert_bits [--module build/clang/_native.so]

Weights and rows come from a fixed seed. Run it with the modules of two builds, such as one of GCC and one of Clang, and
compare the lines; machines of a group may then have either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from blake3 import blake3

from tests.native.other_build import open_module

HIDDEN, WIDTH, NUM_EXPERTS, LAYER = 512, 256, 8, 0
ROWS = (1, 2, 7, 40)
ACTIVATIONS = (("silu", 0.0, 0.0), ("clamped", 7.0, 1.702), ("gelu_tanh", 0.0, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--module", type=Path, help="another build of argosy._native")
    native = open_module(parser.parse_args().module)
    from argosy.config import MEASURED_FORMATS

    for instruction_set in native.instruction_sets():
        for format in MEASURED_FORMATS:
            digest = blake3()
            for activation in ACTIVATIONS:
                for outputs in outputs_of(native, format, instruction_set, activation):
                    digest.update(outputs.tobytes())
            print(f"{instruction_set:<8}{format:<8}{digest.hexdigest()[:32]}")


def outputs_of(native, format, instruction_set, activation):  # type: ignore[no-untyped-def]
    """Outputs [assignments, hidden] for each number of rows."""
    rng = np.random.default_rng(5)
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    sizes = [native.matrix_bytes(format, *shape) for shape in shapes]
    arena = native.Arena(NUM_EXPERTS * sum(sizes))
    memory, at = arena.array(), 0
    for _ in range(NUM_EXPERTS):
        for size, shape in zip(sizes, shapes, strict=True):
            if format in ("f32", "f16", "bf16", "q8", "q4"):
                native.quantize(format, rng.standard_normal(shape, np.float32), memory[at : at + size])
            else:  # only read from files: codes and scales of small numbers
                memory[at : at + size] = rng.integers(0, 0x40, size, np.uint8)
            at += size
    table = native.ExpertTable(arena, hidden=HIDDEN, activation=activation)
    starts = np.tile(np.cumsum([0, *sizes[:-1]], dtype=np.int64), (NUM_EXPERTS, 1))
    table.add_layer(LAYER, formats=(format,) * 3, width=WIDTH, starts=starts)
    of_one = arena.nbytes // NUM_EXPERTS
    table.place([((LAYER, expert), expert * of_one) for expert in range(NUM_EXPERTS)])
    runtime = native.Runtime(1, None, instruction_set)
    for num_rows in ROWS:
        choices = np.stack([rng.permutation(NUM_EXPERTS)[:2] for _ in range(num_rows)]).astype(np.int32)
        dispatch = native.Dispatch(choices, np.ones(num_rows, np.bool_), NUM_EXPERTS)
        rows = rng.standard_normal((num_rows, HIDDEN), np.float32)
        out = np.empty((2 * num_rows, HIDDEN), np.float32)
        table.run(runtime, LAYER, dispatch.experts, dispatch, rows, out)
        assert np.isfinite(out).all(), "not a number: its bits would say nothing"
        yield out


if __name__ == "__main__":
    main()
