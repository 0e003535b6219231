"""The core runs without its optional rooms, and with one family, one dialect and four commands.

Optional rooms are other machines, studies, governance, and the making of mixtures; the core reaches them only by name,
when a command or an option asks for them. Families, towers, formats, dialects and commands are registries, which take
the members that they find. Here both are deleted from a copy; what they are, `.ci/map.py` lists.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

import argosy
from argosy.cli.main import main
from tests.cli.tiny_chat_model import write_chat_model

SOURCE = Path(argosy.__file__).parent
MAP = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "map.py"))
# An editable installation finds `argosy` by an own finder, before any path.
SITE = """import sys
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in type(one).__module__]
"""
IMPORT_ALL = """
import importlib, pathlib, sys
core = pathlib.Path(sys.argv[1])
names = [".".join(path.relative_to(core).with_suffix("").parts) for path in sorted(core.rglob("argosy/**/*.py"))]
modules = [importlib.import_module(name.removesuffix(".__init__")) for name in names if not name.endswith("__main__")]
assert all(pathlib.Path(one.__file__).is_relative_to(core) for one in modules)
print(len(modules))
"""
WAIT_S = 120


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without its optional rooms."""
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(SOURCE, root / "argosy", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (root / "sitecustomize.py").write_text(SITE)
    native = Path(sys.modules["argosy._native"].__file__ or "")
    (root / "argosy" / native.name).symlink_to(native)
    delete(MAP["optional"](root / "argosy"))
    for path in root.rglob("argosy/**/*.py"):  # what is compiled already stays so
        compiled = Path(importlib.util.cache_from_source(str(SOURCE / path.relative_to(root / "argosy"))))
        if compiled.is_file():
            (path.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, path.parent / "__pycache__")
    return root


@pytest.fixture(scope="module")
def core(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without the members of registries, too, except one family, one dialect, and run, serve, plan and show."""
    root = tmp_path_factory.mktemp("core")
    shutil.copytree(house, root, symlinks=True, dirs_exist_ok=True)
    delete(MAP["plug_ins"](root / "argosy"))
    return root


def delete(modules: Iterable[Path]) -> None:
    """Delete modules, and the folders that have none left."""
    for path in modules:
        path.unlink()
        if not any(path.parent.rglob("*.py")):
            shutil.rmtree(path.parent)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "model")


def environment(core: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(core), "PYTHONPYCACHEPREFIX": "", "PYTHONDONTWRITEBYTECODE": ""}


def python(core: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(core),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(("copy", "fewest"), [("house", 350), ("core", 250)])
def test_every_module_that_is_left_can_be_imported(
    copy: str, fewest: int, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(copy)
    done = python(root, "-c", IMPORT_ALL, str(root))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > fewest


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["run", "--model"], ["--threads", "1", "-n", "12", "--temperature", "0", "Hello"]),
        (["show"], ["--json"]),
        (["plan"], ["--machine", "aws:i7i.8xlarge"]),
    ],
)
def test_the_core_answers_as_the_whole_does(
    command: list[str], options: list[str], core: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [*command, str(model), "--memory", "1GiB", *options]
    assert main(ask) == 0
    whole = capsys.readouterr().out
    alone = python(core, "-m", "argosy", *ask)
    assert alone.returncode == 0, alone.stderr
    assert without_plan(alone.stdout) == without_plan(whole)
    assert whole.strip()


def without_plan(told: str) -> str:
    """Without the memory plan, which counts what the process uses already."""
    return re.sub(r'"plan": .*', "", told)


@pytest.fixture
def server(core: Path, model: Path) -> Iterator[str]:
    command = ["-m", "argosy", "serve", str(model), "--memory", "1GiB", "--threads", "1", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, *command], env=environment(core), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found.group()
                break
        else:
            pytest.fail("".join(told))
        process.terminate()
        process.stderr.read()
    assert process.returncode == 0


def test_the_core_serves(server: str) -> None:
    chat = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    answer = httpx.post(f"{server}/v1/chat/completions", json=chat, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
    assert httpx.get(f"{server}/v1/engine/state", timeout=WAIT_S).status_code == 200
    for path in ("/v1/engine/stops", "/v1/engine/transparency"):  # of governance
        assert httpx.get(server + path, timeout=WAIT_S).status_code == 404
    strict = {"x-argosy-policy": "strict"}  # nothing would check the request, and its client must know
    refused = httpx.post(f"{server}/v1/chat/completions", json=chat, headers=strict, timeout=WAIT_S)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-argosy-policy")


def test_help_lists_only_what_is_there(core: Path) -> None:
    told = python(core, "-m", "argosy", "--help").stdout
    listed = set(re.findall(r"^  ([a-z]+) {2,}\S", told, re.MULTILINE))
    assert listed == {"plan", "run", "serve", "show", "completion", "help"}
    assert "Several machines" not in told


@pytest.mark.parametrize(
    ("ask", "missing"),
    [
        (["worker", "MODEL"], "argosy.cli.commands.worker"),
        (["run", "--model", "MODEL", "--cluster", "127.0.0.1:1", "Hello"], "argosy.cluster"),
        (["serve", "MODEL", "--policy", "policy.toml"], "argosy.serve.guards"),
        (["serve", "MODEL", "--audit", "audit"], "argosy.guard.audit"),
    ],
)
def test_what_is_missing_is_named(core: Path, model: Path, ask: list[str], missing: str) -> None:
    done = python(core, "-m", "argosy", *(str(model) if one == "MODEL" else one for one in ask))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this installation is without `{missing}`\nhint: ")
