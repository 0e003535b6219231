"""Encodes inputs with Argosy's towers, in a process of its own (`encoders.py` starts it)."""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np

from argosy import _native
from argosy.checkpoint.files import MatrixRef
from argosy.checkpoint.safetensors import open_tensors
from argosy.model.encoders.table import Tower
from argosy.model.reading.accounts import FLOAT_FORMATS, TensorAccounts
from argosy.model.weights import load_dense
from argosy.prompt.media_span import SpanRows
from towers import INPUTS, encoder_of, make


def open_tower(name: str, runtime: _native.Runtime) -> Tower:
    directory = make(name)
    encoder, config = encoder_of(name)
    accounts = TensorAccounts(directory, open_tensors(directory), FLOAT_FORMATS)
    refs = {}
    for canonical, tensor in encoder.tensors(config).items():
        ref, format = accounts.take(tensor.name, tensor.shape)
        refs[canonical] = MatrixRef(
            ref.name, ref.path, ref.offset, ref.nbytes, format, tensor.rows, tensor.cols, taps=tensor.taps
        )
    store = _native.Store(2)
    weights = load_dense(store, refs, open_file=functools.cache(store.open))
    return encoder.open(config, weights, runtime)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", type=int, required=True, help="its place in INPUTS")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--out", type=Path, help="where to save the embeddings")
    options = parser.parse_args()
    wanted = INPUTS[options.input]
    tower = open_tower(wanted.tower, _native.Runtime(options.threads))
    values, grid = wanted.values()
    shape = (grid,) if grid else ()

    def encode() -> tuple[SpanRows, float]:
        """The rows, and the longest time between two yields."""
        steps, longest = tower.encode(values, *shape), 0.0
        while True:
            begin = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                return end.value, longest
            longest = max(longest, time.perf_counter() - begin)

    rows, _ = encode()
    seconds, longest = [], []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        _, most = encode()
        seconds.append(time.perf_counter() - begin)
        longest.append(most)
    if options.out:
        np.save(options.out, rows.embeddings)
    print(json.dumps({"seconds": seconds, "longest": longest, "positions": len(rows.embeddings)}))


if __name__ == "__main__":
    main()
