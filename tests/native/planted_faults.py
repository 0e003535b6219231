"""Faults that a sanitizer must find in the native module; otherwise its silence elsewhere means nothing.

python -m tests.native.planted_faults {race,overflow} --module _native.so
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tests.native.odd_arguments import Case
from tests.native.other_build import open_module


def race(native: Any) -> None:
    """Write to one array from two threads."""
    x, weight, out = np.ones((64, 256), np.float32), np.ones(256, np.float32), np.zeros((64, 256), np.float32)

    def write() -> None:
        runtime = native.Runtime(1)
        for _ in range(50):
            native.rms_norm(runtime, x, weight, 1e-5, out)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def overflow(native: Any) -> None:
    """Move a token id beyond the vocabulary after its step has begun and before the step runs."""
    case = Case(native, native.Runtime(1), "")
    stack, step = case.stack(), case.step()
    stack.begin(*step)
    step[0][:] = case.VOCABULARY + 9  # token_ids; the matrix is padded to 32 rows
    stack.advance()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fault", choices=["race", "overflow"])
    parser.add_argument(
        "--module", type=Path, required=True, help="a build of argosy._native under a sanitizer"
    )
    options = parser.parse_args()
    {"race": race, "overflow": overflow}[options.fault](open_module(options.module))


if __name__ == "__main__":
    main()
