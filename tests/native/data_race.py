"""Two threads write to one array at once. ThreadSanitizer must find it, or its silence elsewhere means nothing.

python -m tests.native.data_race --module _native.so
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import numpy as np

from tests.native.other_build import open_module


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--module", type=Path, required=True, help="a build of argosy._native under ThreadSanitizer"
    )
    native = open_module(parser.parse_args().module)
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


if __name__ == "__main__":
    main()
