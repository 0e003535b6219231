"""A file that is read once may be a pipe, as in `--policy <(make-policy)`; one that nothing writes to is refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from argosy.cli.commands.preset import preset
from argosy.cli.commands.serve import serve
from argosy.cli.shared import config_file, settings, texts
from argosy.cluster import hello, secure
from argosy.directory import read_named
from argosy.errors import UsageError
from argosy.forecast import planning
from argosy.guard.policy import read_policies
from argosy.observe.texts import read_texts

READERS: dict[str, Callable[[Path], object]] = {
    "--config": lambda path: config_file.read_config(path, click.Context(serve)),
    "--key-file": settings.api_key,
    "@FILE": lambda path: texts.text_or_file(f"@{path}"),
    "--modelfile": lambda path: preset.main(["p", "--modelfile", str(path)], standalone_mode=False),
    "a worker's --key-file": hello.read_key,
    "--tls-cert": lambda path: secure.server_context(path, path),
    "--cluster-ca": secure.client_context,
    "--working-set": planning.read_working_set,
    "--policy": read_policies,
    "routes": lambda path: read_texts([path], most_bytes=100),
}


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_that_nothing_writes_to_is_not_waited_for(reader: str, pipe: Path) -> None:
    with pytest.raises(UsageError, match="it is a pipe"):
        READERS[reader](pipe)


def test_a_pipe_whose_writer_is_slow_is_read_to_its_end_or_the_limit(pipe: Path) -> None:
    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            for part in (b"one ", b"two"):
                time.sleep(0.05)
                file.write(part)

    for most_bytes, read in ((100, b"one two"), (6, b"one tw")):
        keeper = os.open(pipe, os.O_RDWR)  # the reader must not come before the writer
        writer = threading.Thread(target=write)
        writer.start()
        closer = threading.Timer(0.3, os.close, [keeper])
        closer.start()
        assert read_named(pipe, most_bytes) == read
        writer.join()
        closer.join()


def test_a_key_is_not_read_from_a_file_without_an_end() -> None:
    with pytest.raises(UsageError, match=r"^/dev/zero has more than 16384 bytes, so it is not a key$"):
        settings.api_key(Path("/dev/zero"))
