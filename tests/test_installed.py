"""Hints for what is missing: their commands fit the installation, and name no package that anybody could register."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from argosy import installed
from argosy.demo import wheel as demo_wheel

REPOSITORY = Path(__file__).parents[1]
# A name of ours as an index would be asked for it; a file (argosy-*.whl, ./argosy...) is no name.
OF_AN_INDEX = re.compile(
    r"\b(?:pip|pipx|uv|uv tool) (?:install|add|download|run)\b[^\n`]{0,80}?"
    r"[ '\"]argosy(?:-demo)?(?:\[[a-z,]+\])?(?![\w*./\[-])"
)


class Distribution:
    """An installation with a given direct_url.json."""

    def __init__(self, origin: object) -> None:
        self._text = origin if isinstance(origin, str) or origin is None else json.dumps(origin)

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._text


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment with pip that is on the PATH."""
    (tmp_path / "bin").mkdir()
    pip = tmp_path / "bin" / "pip"
    pip.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(installed, "find_spec", lambda name: object())
    return tmp_path


def test_no_hint_and_no_guide_asks_an_index_for_a_name_that_is_not_registered() -> None:
    places = [
        REPOSITORY / "README.md",
        *(
            path
            for folder in ("src", "docs", "examples", "deploy", "packages", "recipes")
            for path in (REPOSITORY / folder).rglob("*")
            if path.suffix in (".py", ".md", ".toml", ".yaml", ".js", ".html", "") and path.is_file()
        ),
    ]
    found = [
        f"{path.relative_to(REPOSITORY)}: {hit[0]}"
        for path in places
        for hit in OF_AN_INDEX.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_of_an_index"),
    [
        ("pip install argosy-demo", True),
        ("`pip install 'argosy[cluster]'`", True),
        ("uv tool install argosy", True),
        ("pip install --upgrade argosy, then", True),
        ("pip install ./argosy-*.whl", False),
        ("pip install argosy-*.whl", False),
        ("pip install argosy_demo-*.whl", False),
        ("pip install . ./packages/argosy-demo", False),
        ("pipx inject argosy cryptography", False),
    ],
)
def test_the_search_for_such_names_finds_them(line: str, is_of_an_index: bool) -> None:
    assert (OF_AN_INDEX.search(line) is not None) == is_of_an_index


def test_an_extra_is_named_by_its_packages(environment: Path) -> None:
    command = installed.command_for_extra("guard")
    assert re.fullmatch(r"pip install 'google-re2[^' ]+' 'phonenumbers[^' ]+'", command)
    for extra in ("cluster", "audit", "prices"):
        assert installed.command_for_extra(extra).startswith("pip install '")


@pytest.mark.parametrize(
    ("file", "begin"),
    [
        ("pipx_metadata.json", "pipx inject argosy ray"),
        ("uv-receipt.toml", "uv pip install --python {}/bin/python ray"),
    ],
)
def test_the_tool_that_made_the_environment_adds_to_it(environment: Path, file: str, begin: str) -> None:
    (environment / file).touch()
    assert installed.command_for("ray") == begin.format(environment)


def test_pip_is_named_by_its_python_unless_it_is_the_one_on_the_path(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert installed.command_for("ray") == f"{environment}/bin/python -m pip install ray"
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    assert installed.command_for("ray") == f"uv pip install --python {environment}/bin/python ray"


def test_the_experts_come_from_the_checkout_or_from_the_wheel_beside_the_code(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(origin: object) -> str:
        monkeypatch.setattr(installed.metadata, "distribution", lambda name: Distribution(origin))
        return installed.command_for_experts()

    checkout = environment / "my checkout"
    (checkout / "packages" / "argosy-demo").mkdir(parents=True)
    url = checkout.as_uri()
    assert (
        of({"url": url, "dir_info": {"editable": True}}) == f"pip install '{checkout}/packages/argosy-demo'"
    )
    wheel = {"url": (environment / "argosy-0.1.0-cp311.whl").as_uri(), "archive_info": {}}
    assert of(wheel) == "pip install argosy_demo-*.whl"
    (environment / "argosy_demo-1.0.0-py3-none-any.whl").touch()
    assert of(wheel) == f"pip install {environment}/argosy_demo-1.0.0-py3-none-any.whl"
    for nothing in (None, "{", "[]", {"url": 3}, {"url": "https://host/argosy.whl"}):
        assert of(nothing) == "pip install argosy_demo-*.whl"


def test_without_pip_the_copy_that_python_has_for_new_environments_downloads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundled = pytest.importorskip("ensurepip")
    if not list(Path(bundled.__file__).parent.glob("_bundled/pip-*.whl")):
        pytest.skip("this Python has no copy of pip")
    found = demo_wheel.find_spec
    monkeypatch.setattr(demo_wheel, "find_spec", lambda name: None if name == "pip" else found(name))
    command = demo_wheel._pip()
    assert command[-1].endswith(".whl/pip")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("pip ")
