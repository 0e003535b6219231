"""The server that `argosy up` runs for this user: its directory, its socket file, and which process it is.

    argosy serve --listen unix:STATE/server.sock  ─ noting ─>  STATE/server.json: process, address  ─>  running

Only this user can access the directory, so a server on the socket file is always this user's. A port may belong to
anybody, so our own commands prefer the file. A process is known by its id and the time at which it started, so a later
process with the same id is never taken for it.

Elsewhere: commands are `background.py`; requests are `remote.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.private_files import open_private
from argosy.strict_json import JsonError, parse_json
from argosy.user_directories import state_directory

LOG = "server.log"
LOCK = "up.lock"  # held by `argosy up` and `argosy stop`
_SOCKET = "server.sock"
_FACTS = "server.json"
_MOST_BYTES = 4096


class Process(NamedTuple):
    """A server that runs.

    started: clock ticks from the start of the machine, which tell processes with the same id apart.
    since: when it began to serve, in seconds since 1970.
    address: what clients are given.
    """

    pid: int
    started: int
    since: float
    address: str


def open_state() -> Directory:
    """The directory for the server; created if it is missing.

    Raises:
        UsageError: it cannot be created, or other users can access it.
    """
    return open_private(state_directory(), option="XDG_STATE_HOME/argosy", holds="the server's socket")


def socket_path() -> Path:
    return state_directory() / _SOCKET


def socket_url() -> str:
    return f"unix:{socket_path()}"


@contextmanager
def noting(path: Path | None, address: str) -> Iterator[None]:
    """Note this process as the server of the socket file `path`, if that is the user's own; until the context ends."""
    if path is None or path != socket_path():
        yield
        return
    with open_state() as state:
        facts = {"pid": os.getpid(), "started": _started(os.getpid()), "address": address}
        state.put(_FACTS, json.dumps(facts).encode())
        try:
            yield
        finally:
            with suppress(OSError):
                state.remove(_FACTS)


def running() -> Process | None:
    """The process of the user's own server, which may still be loading models; None: there is none.

    Raises:
        UsageError: the directory is open to others.
    """
    if not state_directory().is_dir():
        return None
    with open_state() as state:
        try:
            facts = parse_json(state.read(_FACTS, _MOST_BYTES))
            noted = state.stat(_FACTS)
        except (OSError, JsonError):  # none was noted, or the disk was full
            return None
    pid, started, address = (
        facts.get(key) if isinstance(facts, dict) else None for key in ("pid", "started", "address")
    )
    if type(pid) is not int or type(started) is not int or not isinstance(address, str) or noted is None:
        return None
    if _started(pid) != started:
        return None  # it was killed
    return Process(pid, started, noted.st_mtime, address)


def found() -> Process | None:
    """`running`, for commands that do without a server: None also if its directory cannot be used or trusted."""
    with suppress(UsageError, OSError):
        return running()
    return None


def is_running(process: Process) -> bool:
    return _started(process.pid) == process.started


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks from the start of the machine; None: there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of its program comes second, in parentheses, and may contain any of them.
            state, *facts = file.read(_MOST_BYTES).rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state == b"Z" else int(facts[18])
