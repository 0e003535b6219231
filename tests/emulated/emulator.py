"""Fetch and make what an emulated machine needs, once: Debian's kernel, and Bochs with our patch.

`bochs.patch` says what it corrects. Debian's own build of Bochs is also slow, since it includes a debugger.

Elsewhere: `run.py` boots a machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import NoReturn

CACHE = Path(__file__).parents[2] / "build" / "emulated"
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/vgabios/vgabios.bin")
BOOT_LOADER = (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))
EMULATOR_FAILED = 125  # an exit status that tests do not have

# Debian's package of each file or command.
_PACKAGES: dict[str | Path, str] = {
    BIOS: "bochsbios",
    VGA_BIOS: "vgabios",
    BOOT_LOADER[0]: "isolinux",
    BOOT_LOADER[1]: "syslinux-common",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "g++": "g++",
    "make": "make",
    "patch": "patch",
    "xorriso": "xorriso",
}
_PATCH = Path(__file__).with_name("bochs.patch")
_VERSION = "3.0"  # of Bochs: the patch is for this one
_OPTIONS = (
    "--enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx --enable-pci "
    "--enable-all-optimizations --with-nogui --disable-docbook CXXFLAGS=-O2"
)


def check_packages() -> None:
    """Exit with the command that installs the packages that are missing, if any are."""
    if shutil.which("apt-get") is None:
        fail("the emulated machine is made of Debian's packages, and there is no apt-get")
    missing = [
        package for needed, package in _PACKAGES.items() if not Path(shutil.which(needed) or needed).exists()
    ]
    if missing:
        fail(f"packages are missing; install them with: apt-get install {' '.join(missing)}")


def find_kernel() -> Path:
    """Return Debian's current kernel for clouds, which has few drivers and boots fast."""
    kernel = CACHE / "vmlinuz"
    if not kernel.exists():
        package = re.search(r"linux-image-\d\S+", run(["apt-cache", "depends", "linux-image-cloud-amd64"]))
        if package is None:
            fail("apt knows no linux-image-cloud-amd64; run: apt-get update")
        say(f"downloading {package[0]} (35 MB, once)")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            run(["apt-get", "download", package[0]], cwd=folder)
            run(["dpkg-deb", "--extract", next(Path(folder).glob("*.deb")), folder])
            next(Path(folder).glob("boot/vmlinuz-*")).rename(kernel)
    return kernel


def find_bochs() -> Path:
    """Return Bochs, compiled once for each state of the patch."""
    state = hashlib.sha256(_PATCH.read_bytes() + _OPTIONS.encode()).hexdigest()
    bochs = CACHE / f"bochs-{state[:8]}"
    if not bochs.exists():
        say(
            f"downloading the source of Bochs {_VERSION} (4 MB, once) and compiling it: two minutes on two cores"
        )
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            with tarfile.open(_download_source(Path(folder))) as archive:
                archive.extractall(folder, filter="data")
            source = Path(folder) / f"bochs-{_VERSION}"
            run(["patch", "-p1", "-i", _PATCH], cwd=source)
            run(["./configure", *_OPTIONS.split()], cwd=source)
            run(["make", f"-j{os.cpu_count()}"], cwd=source)
            (source / "bochs").rename(bochs)
    return bochs


def _download_source(folder: Path) -> Path:
    """Download the source of Bochs from where this machine gets its packages, though apt may not list sources there."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    line = "deb-src [signed-by=$(SIGNED_BY)] $(REPO_URI) $(RELEASE) main"
    lines = run(["apt-get", "indextargets", "--format", line, "Created-By: Packages", "Component: main"])
    sources = folder / "sources.list"
    sources.write_text("".join(sorted(set(lines.replace("[signed-by=] ", "").splitlines(keepends=True)))))
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
    }
    apt = ["apt-get", *(f"--option={name}={value}" for name, value in settings.items())]
    run([*apt, "update"])
    listed = run([*apt, "source", "--print-uris", "bochs"])
    found = re.search(r"'(\S+)' bochs_([\d.]+)\S*\.orig\.tar\.xz \d+ SHA256:(\w+)", listed)
    if found is None or found[2] != _VERSION:
        offer = f"Bochs {found[2]}" if found else "no Bochs"
        fail(f"apt offers {offer}, and {_PATCH.name} is for Bochs {_VERSION} of Debian 13")
    with urllib.request.urlopen(found[1]) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != found[3]:
        fail(f"{found[1]} does not have the SHA-256 that Debian signed")
    archive = folder / "bochs.tar.xz"
    archive.write_bytes(content)
    return archive


def run(command: list[str | Path], cwd: str | Path | None = None) -> str:
    """Return what a command prints. If it fails, show the end of its output and exit."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def say(message: str) -> None:
    print(f"== {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    say(message)
    sys.exit(EMULATOR_FAILED)
