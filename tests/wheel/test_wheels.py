"""The wheels of `make wheel` in bare environments: no compiler, no checkout, and no program but theirs on the PATH.

Dependencies come from PyPI as wheels. The demo model is built in the user's cache, unless it is there. The last test
needs root: it runs the wheel in a root directory with nothing but Python and its libraries, not even a shell.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.cli.tiny_chat_model import write_chat_model

# Settings of this machine for the index of packages, and for the way to it.
INDEX = ("PIP_", "UV_", "SSL_CERT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
DIST = Path(__file__).parents[2] / "dist"
# dist/ may also have the wheel of other versions of Python.
CODE = "argosy-*-cp311-cp311-*.whl" if sys.version_info < (3, 12) else "argosy-*-cp312-abi3-*.whl"


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
    done = run(place, "pip", "install", "--quiet", "--only-binary=:all:", str(only(CODE)))
    assert done.returncode == 0, done.stderr
    assert run(place, "python", "-c", "import shutil; print(shutil.which('cc'))").stdout == "None\n"
    return place


def test_the_wheel_is_small_and_its_tag_names_a_glibc() -> None:
    wheel = only(CODE)
    machine = platform.machine()
    assert re.fullmatch(rf"argosy-[\d.]+-(cp311-cp311|cp312-abi3)-manylinux_2_\d+_{machine}\.whl", wheel.name)
    assert wheel.stat().st_size <= 10_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sum(name.startswith("argosy/_native.") and name.endswith(".so") for name in names) == 1
    assert not any("_native_testing" in name for name in names)
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
    assert not any("_native_testing" in name for name in names)
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


@pytest.mark.parametrize(
    ("tool", "command", "adds"),
    [
        ("uv", ["tool", "install", "--python", sys.executable], "uv pip install --python "),
        ("pipx", ["install", "--python", sys.executable], "pipx inject argosy "),
    ],
)
def test_a_tool_installs_the_wheel_and_the_hint_adds_the_experts(
    tmp_path: Path, tool: str, command: list[str], adds: str
) -> None:
    program = Path(sys.executable).with_name(tool)
    if not program.exists():
        pytest.skip(f"`make test-wheel` installs {tool}")
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / tool).symlink_to(program)
    variables = {name: value for name, value in os.environ.items() if name.upper().startswith(INDEX)}
    variables |= {
        "PATH": str(bin_directory), "HOME": str(tmp_path), "UV_TOOL_DIR": str(tmp_path / "tools"),
        "UV_TOOL_BIN_DIR": str(bin_directory), "PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(bin_directory),
    }  # fmt: skip

    def run_there(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bin_directory / words[0], *words[1:]],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip

    done = run_there(tool, *command, str(only(CODE)))
    assert done.returncode == 0, done.stderr
    model = write_chat_model(tmp_path / "model")
    done = run_there("argosy", "run", "-m", str(model), "--memory", "1GiB", "-n", "2", "Hi")
    assert done.returncode == 0, done.stderr
    hint = run_there("argosy", "run", "Hi").stderr.partition("hint: `")[2].partition("`")[0]
    assert hint.startswith(adds)
    done = run_there(*hint.split())
    assert done.returncode == 0, done.stderr
    assert run_there("argosy", "show", "demo", "--help").returncode == 0


# In a mount namespace of its own, so that nothing stays mounted: /proc, the devices, and then only the root directory.
_ENTER = (
    'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" /usr/bin/env -i "$@"'
)


def test_the_wheel_runs_in_a_root_with_nothing_but_python(environment: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs root and a mount namespace")
    root = tmp_path / "root"
    for name in ("proc", "dev", "tmp", "usr/bin"):
        (root / name).mkdir(parents=True)
    base = Path(sys.base_prefix)
    ignored = shutil.ignore_patterns("test", "site-packages", "idlelib", "tkinter", "__pycache__", "config-*")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(base / "lib" / version, root / base.relative_to("/") / "lib" / version, ignore=ignored)
    shutil.copytree(environment, root / environment.relative_to("/"), symlinks=True)
    interpreter = Path(os.path.realpath(sys.executable))
    for path in (interpreter, Path("/usr/bin/env")):
        (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to("/"))
    link = environment / "bin" / "python"
    while link.is_symlink() and link != interpreter:  # those between the environment and the interpreter
        target = Path(os.path.normpath(link.parent / os.readlink(link)))
        if not (root / target.relative_to("/")).exists():
            (root / target.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            (root / target.relative_to("/")).symlink_to(os.path.realpath(target))
        link = target
    needed = [interpreter, Path("/usr/bin/env"), *(root / base.relative_to("/")).rglob("*.so")]
    needed += (root / environment.relative_to("/")).rglob("*.so*")
    listed = subprocess.run(["ldd", *map(str, needed)], capture_output=True, text=True, check=False)
    for library in set(re.findall(r"(?:=> |^\s)(/\S+) \(0x", listed.stdout, re.MULTILINE)):
        if not library.startswith(str(root)):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    write_chat_model(root / "model")
    assert not [name for name in ("sh", "bash", "cc", "gcc", "ld") if list(root.glob(f"**/bin/{name}"))]

    enter = ["unshare", "--mount", "sh", "-c", _ENTER, str(root), "HOME=/tmp", "PATH=/usr/bin"]
    command = [
        str(environment / "bin" / "argosy"),
        "run",
        "-m",
        "/model",
        "--memory",
        "1GiB",
        "-n",
        "2",
        "Hi",
    ]
    done = subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 new" in done.stderr
