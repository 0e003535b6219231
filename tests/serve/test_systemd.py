"""Sockets that systemd passes are used instead of others, and it is told when the server is ready and when it stops."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from argosy.cli.main import main
from argosy.errors import UsageError
from argosy.serve.http import systemd
from argosy.serve.http.systemd import Notifier, passed_sockets
from tests.helpers.forks import call_in_fork

WAIT_S = 120
# What systemd does: the sockets become descriptors from 3 on, and the variables have the id of the new process.
PASSING = """
import os, sys
count = int(sys.argv[1])
for number in range(count):
    os.dup2(int(sys.argv[2 + number]), 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=":".join(["web"] * count))
os.execv(sys.executable, [sys.executable, "-m", "argosy", "serve", *sys.argv[2 + count:]])
"""


@contextmanager
def passing(
    sockets: list[socket.socket], *options: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A server with these sockets; they are far from the descriptors that they become."""
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 100) for one in sockets]
    process = subprocess.Popen(
        [sys.executable, "-c", PASSING, str(len(high)), *map(str, high), *options], pass_fds=high, text=True,
        stderr=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip
    for number in high:
        os.close(number)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """A TCP socket and one with a file, which listen."""
    with socket.socket(socket.AF_UNIX) as file, socket.socket() as port:
        file.bind(str(tmp_path / "s"))
        port.bind(("127.0.0.1", 0))
        for one in (file, port):
            one.listen()
        yield [file, port]


def test_a_client_that_came_first_is_answered_on_either_socket_and_systemd_is_told(
    sockets: list[socket.socket], tmp_path: Path
) -> None:
    file, port = sockets
    first = socket.create_connection(port.getsockname(), timeout=WAIT_S)  # before there is a server
    first.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, first:
        notified.bind(str(tmp_path / "n"))
        notified.settimeout(WAIT_S)
        options = ["--library", "--memory", "1GiB", "--port", str(port.getsockname()[1])]
        with passing(sockets, *options, NOTIFY_SOCKET=str(tmp_path / "n")) as process:
            assert notified.recv(100) == b"READY=1"
            assert b" 200 " in first.recv(100)
            own = httpx.HTTPTransport(uds=file.getsockname())
            with httpx.Client(transport=own, timeout=WAIT_S) as client:
                assert client.get("http://localhost/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert notified.recv(100) == b"STOPPING=1"
            _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    # The port comes first, whatever the order, and the file stays systemd's.
    assert f"serving the library at http://127.0.0.1:{port.getsockname()[1]}\n" in said
    assert Path(file.getsockname()).is_socket()


def refused(sockets: list[socket.socket], *options: str) -> str:
    """What `argosy serve` says that finds these sockets and is refused; in a fork, so that it leaves nothing open."""
    code, said = call_in_fork(serve_with, sockets, ["serve", "--library", *options])
    assert code == 2
    return str(said)


def serve_with(sockets: list[socket.socket], arguments: list[str]) -> int:
    systemd._FIRST = 200  # far from the descriptors of this process
    for number, one in enumerate(sockets, systemd._FIRST):
        os.dup2(one.fileno(), number)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets))}
    return main(arguments)


@pytest.mark.parametrize(
    "options",
    [["--port", "1"], ["--host", "::1"], ["--listen", "unix:/x"], ["--socket-mode", "0123"]],
    ids=lambda options: options[0],
)
def test_options_that_contradict_the_sockets_are_told(
    sockets: list[socket.socket], options: list[str]
) -> None:
    file, port = sockets
    shown = f"127.0.0.1:{port.getsockname()[1]}, unix:{file.getsockname()}"
    said = refused(sockets, *options)
    assert f"{' '.join(options)} contradicts the sockets that systemd passed: {shown}\n" in said


def test_a_socket_that_other_machines_reach_needs_keys_whatever_else_is_passed(
    sockets: list[socket.socket],
) -> None:
    with socket.socket() as outside:
        outside.bind(("0.0.0.0", 0))
        outside.listen()
        said = refused([*sockets, outside])
    assert "listening on 0.0.0.0 admits other machines, but there are no keys" in said


def take(monkeypatch: pytest.MonkeyPatch, descriptor: int, **variables: str) -> list[systemd.Listener]:
    monkeypatch.setattr(systemd, "_FIRST", descriptor)
    for name, value in {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    try:
        return passed_sockets()
    finally:
        assert not [name for name in os.environ if name.startswith("LISTEN_")]  # children get none of it


def test_what_is_no_listening_stream_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def made(family: int, kind: int, address: object = None, *, listens: bool = False) -> int:
        one = socket.socket(family, kind)
        if address is not None:
            one.bind(address)
        if listens:
            one.listen()
        return one.detach()

    ours, theirs = socket.socketpair()
    with ours, theirs, open(tmp_path / "f", "w") as file:
        for descriptor, told in (
            (made(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)), "is neither TCP nor a stream socket"),
            (
                made(socket.AF_UNIX, socket.SOCK_SEQPACKET, str(tmp_path / "q")),
                "is neither TCP nor a stream socket",
            ),
            (made(socket.AF_NETLINK, socket.SOCK_RAW), "is neither TCP nor a stream socket"),
            (made(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)), "does not listen"),
            (os.dup(ours.fileno()), "does not listen"),
            (
                made(socket.AF_UNIX, socket.SOCK_STREAM, "\0argosy" + os.urandom(8).hex(), listens=True),
                "has no file",
            ),
            (file.fileno(), "is not a socket"),
        ):
            with pytest.raises(UsageError, match=rf"descriptor {descriptor} of LISTEN_FDS \(web\) {told}"):
                take(monkeypatch, descriptor, LISTEN_FDNAMES="web")
    with pytest.raises(UsageError, match="cannot be used: Bad file descriptor"):
        take(monkeypatch, 900)


@pytest.mark.parametrize("count", ["", "-1", "65", "1e1", "²", "9" * 5000, " 1"])
def test_a_wrong_number_of_sockets_is_refused(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"LISTEN_FDS must be a number up to 64, found '.{0,20}'"):
        take(monkeypatch, 3, LISTEN_FDS=count)


@pytest.mark.parametrize("pid", ["", "1", "x", "9" * 5000])
def test_sockets_for_another_process_are_not_taken(pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert take(monkeypatch, 3, LISTEN_PID=pid) == []


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told_by_a_file_or_an_abstract_name(
    is_abstract: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = f"argosy-{os.urandom(8).hex()}" if is_abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind("\0" + name if is_abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if is_abstract else name)
        notifier = Notifier()
        assert "NOTIFY_SOCKET" not in os.environ
        notifier.tell("READY=1")
        assert select.select([notified], [], [], WAIT_S)[0]
        assert notified.recv(100) == b"READY=1"


@pytest.mark.parametrize("name", ["/" + "x" * 200, "/nobody/here", "@nobody-here"])
def test_a_name_that_nobody_reads_is_logged_and_ends_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    Notifier().tell("READY=1")
    assert re.fullmatch(
        r"could not notify systemd of READY=1, because NOTIFY_SOCKET cannot be used: .+", caplog.messages[-1]
    )
