"""A wheel holds everything an installation needs, not only modules.

It is built without the native module, which takes a compiler and minutes; this checkout's module is linked in.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import httpx
import pytest

from argosy import _native
from tests.cli.tiny_chat_model import write_chat_model

REPOSITORY = Path(__file__).parents[1]
SOURCES = REPOSITORY / "src" / "argosy"
# Removes the import finder that leads an editable installation back to the checkout.
FROM_WHEEL = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, sys.argv.pop(1))
import argosy
assert argosy.__file__.startswith(sys.path[0]), argosy.__file__
from argosy.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with what an installed wheel puts into site-packages."""
    place = tmp_path_factory.mktemp("wheel")
    settings = {"wheel.cmake": "false", "wheel.py-api": "py3", "build-dir": str(place / "build")}
    build = f"from scikit_build_core.build import build_wheel; build_wheel({str(place)!r}, {settings!r})"
    made = subprocess.run(
        [sys.executable, "-c", build], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    (place / "site" / "argosy" / Path(_native.__file__).name).symlink_to(_native.__file__)
    return place / "site"


def test_a_wheel_has_every_file_of_the_package(installed: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."],
        cwd=SOURCES, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = listed.stdout.split()
    for needed in ("serve/page/index.html", "_native.pyi", "py.typed"):
        assert needed in names
    assert not list(installed.rglob("_native_testing*"))
    for name in names:
        assert (installed / "argosy" / name).read_bytes() == (SOURCES / name).read_bytes(), name


def test_a_server_from_a_wheel_shows_its_page(installed: Path, tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-c", FROM_WHEEL, str(installed), "serve", str(model), "--memory", "1GiB", "--port", str(port),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.TransportError:
                assert server.poll() is None, server.communicate()[1]
                assert time.monotonic() < until
                time.sleep(0.05)
        assert page.content == (SOURCES / "serve" / "page" / "index.html").read_bytes()
        for name in ("app.js", "style.css", "icon.svg"):
            assert httpx.get(f"http://127.0.0.1:{port}/page/{name}").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.communicate()
