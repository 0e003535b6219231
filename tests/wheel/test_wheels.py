"""The wheels of `make wheel` in bare environments: no compiler, no checkout, and no program but theirs on the PATH.

Dependencies come from PyPI as wheels. The demo model is built in the user's cache, unless it is there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

DIST = Path(__file__).parents[2] / "dist"


def only(pattern: str) -> Path:
    (found,) = DIST.glob(pattern)
    return found


def run(environment: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment, with nothing else on the PATH."""
    variables = {"PATH": str(environment / "bin"), "HOME": str(environment), **more}
    return subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=environment, env=variables, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with Argosy alone."""
    place = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    done = run(place, "pip", "install", "--quiet", "--only-binary=:all:", str(only("argosy-*.whl")))
    assert done.returncode == 0, done.stderr
    assert run(place, "python", "-c", "import shutil; print(shutil.which('cc'))").stdout == "None\n"
    return place


def test_the_wheel_is_small_and_its_tag_names_a_glibc() -> None:
    wheel = only("argosy-*.whl")
    assert re.fullmatch(r"argosy-[\d.]+-cp3\d+-cp3\d+-manylinux_2_\d+_x86_64\.whl", wheel.name)
    assert wheel.stat().st_size <= 10_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sum(name.startswith("argosy/_native.") and name.endswith(".so") for name in names) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"argosy"}


def test_the_sdist_is_small_and_has_what_builds_the_package() -> None:
    sdist = only("argosy-*.tar.gz")
    assert sdist.stat().st_size <= 3_000_000
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "native/bind/module.cpp",
        "src/argosy/serve/page/index.html",
    ):
        assert needed in names
    assert not {name.split("/")[0] for name in names} & {"tests", "packages", "benchmarks", "docs"}


def test_the_demos_wheel_has_its_experts_card_and_licence() -> None:
    wheel = only("argosy_demo-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in ("argosy_demo/experts.gguf", "argosy_demo/MODEL_CARD.md"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_without_the_experts_the_demo_says_what_to_install(environment: Path) -> None:
    done = run(environment, "argosy", "run", "What is the capital of France?")
    assert done.returncode == 2
    assert f"pip install {only('argosy_demo-*.whl')}" in done.stderr
    assert done.stdout == ""
    assert run(environment, "argosy", "--version").stdout.startswith("argosy ")


def test_with_the_experts_the_demo_answers(environment: Path) -> None:
    done = run(
        environment, "pip", "install", "--quiet", "--only-binary=:all:", str(only("argosy_demo-*.whl"))
    )
    assert done.returncode == 0, done.stderr
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    cache = os.environ.get("ARGOSY_CACHE") or f"{home}/argosy"
    done = run(environment, "argosy", "run", "What is the capital of France?", ARGOSY_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
