"""The server that `argosy up` runs for this user: its directory, its socket file and its process.

    argosy serve --listen unix:STATE/server.sock  ─ noting ─>  STATE/server.json: process, address  ─>  running

Only this user can access the directory, so a server on the socket file is always this user's. A port may belong to
anyone, so our own commands prefer the file. A process is identified by its id and start time, so a later process
with the same id is never mistaken for it.

Elsewhere: the commands are `cli/commands/background.py`; requests are `remote.py`.
"""

from __future__ import annotations

import json
import os
import time
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
_ACCEPTS = 1 << 16  # the flag of a listening socket in /proc/net/unix


class Process(NamedTuple):
    """A running server.

    started: in clock ticks since boot, which distinguishes processes with the same id.
    since: when it began to serve, in seconds since 1970.
    address: the address for clients.
    is_ending: `argosy stop` has told it to end.
    """

    pid: int
    started: int
    since: float
    address: str
    is_ending: bool = False


def open_state() -> Directory:
    """Open the server's directory, creating it if it is missing.

    Raises:
        UsageError: it cannot be created, or other users can access it.
    """
    return open_private(state_directory(), option="XDG_STATE_HOME/argosy", holds="the server's socket")


def socket_path() -> Path:
    return state_directory() / _SOCKET


def socket_url() -> str:
    return f"unix:{socket_path()}"


@contextmanager
def noting(path: Path | None, address: str, *, stays: bool = False) -> Iterator[None]:
    """Record this process, until the context ends, as the server on the socket file `path`, if that is the user's
    own.

    Args:
        stays: the socket keeps listening without this process, so the address stays recorded.
    """
    if path is None or path != socket_path():
        yield
        return
    with open_state() as state:
        started = _started(os.getpid())
        assert started is not None
        _note(state, Process(os.getpid(), started, time.time(), address))
        try:
            yield
        finally:
            if not stays:
                with suppress(OSError):
                    state.remove(_FACTS)


def note_end(state: Directory, process: Process) -> None:
    """Record that a process has been told to end, because another signal would cut off its answers.

    If the record cannot be written, as on a full drive, the process still ends.
    """
    with suppress(OSError):
        _note(state, process._replace(is_ending=True))


def _note(state: Directory, process: Process) -> None:
    state.put(_FACTS, json.dumps(process._asdict()).encode())


def running() -> Process | None:
    """The process of the user's own server, which may still be loading models, or None.

    Raises:
        UsageError: the directory is open to others.
    """
    if not state_directory().is_dir():
        return None
    with open_state() as state:
        try:
            facts = parse_json(state.read(_FACTS, _MOST_BYTES))
        except (OSError, JsonError):  # there is no record, or the disk was full
            return None
    process = _process(facts)
    # Another process may have the id of a killed server.
    return process if process is not None and is_running(process) else None


def _process(facts: object) -> Process | None:
    """The recorded process, or None if the file is damaged."""
    if not isinstance(facts, dict):
        return None
    kinds = {"pid": int, "started": int, "since": float, "address": str, "is_ending": bool}
    if any(type(facts.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return Process(**{name: facts[name] for name in kinds})


def found() -> Process | None:
    """`running` or `awaited`; also None if the server's directory cannot be used or trusted."""
    with suppress(UsageError, OSError):
        return running() or awaited()
    return None


def awaited() -> Process | None:
    """The server that systemd starts on first use, with pid 0; None if systemd does not listen for it."""
    if not socket_path().exists() or not _is_listening(socket_path()):
        return None
    with open_state() as state, suppress(OSError, JsonError):
        if (process := _process(parse_json(state.read(_FACTS, _MOST_BYTES)))) is not None:
            return process._replace(pid=0, started=0, is_ending=False)
    return None


def note_awaited(state: Directory, address: str) -> None:
    """Record that systemd listens, and where."""
    _note(state, Process(0, 0, time.time(), address))


def _is_listening(path: Path) -> bool:
    """Whether anything listens on a socket file, without connecting, which would start the server."""
    with suppress(OSError), open("/proc/net/unix", "rb") as sockets:
        for line in sockets:
            _, _, _, flags, _, _, _, *name = line.rstrip(b"\n").split(None, 7)
            if name == [os.fsencode(path)] and int(flags, 16) & _ACCEPTS:
                return True
    return False


def is_running(process: Process) -> bool:
    return _started(process.pid) == process.started


def is_starting(process: Process) -> bool:
    """Whether a process is starting and does not listen on the socket file yet."""
    return is_running(process) and not process.is_ending and not _is_listening(socket_path())


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot, or None if there is no such process.

    A killed process is a zombie as soon as its first thread has ended, while others still hold its sockets.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the program's name in parentheses, which may itself contain spaces and
            # parentheses.
            state, *facts = file.read(_MOST_BYTES).rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    num_threads = int(facts[16])
    return None if state == b"Z" and num_threads <= 1 else int(facts[18])
