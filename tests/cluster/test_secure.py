"""A thread carries bytes between TLS and native code, and rests while there is nothing to carry."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from argosy.cluster import secure
from tests.cluster.rigs import wait_until
from tests.serve.test_listen import make_certificate, needs_openssl


def introduced(tmp_path: Path) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection that speaks TLS: a coordinator's and a worker's."""
    certificate, key = make_certificate(tmp_path, "worker", "-nodes")
    ours, theirs = socket.socketpair()
    ends: list[socket.socket] = []
    worker = threading.Thread(
        target=lambda: ends.append(secure.wrap(theirs, secure.server_context(certificate, key), name=None))
    )
    worker.start()
    wrapped = secure.wrap(ours, secure.client_context(certificate), name="localhost")
    worker.join(20)
    return wrapped, ends[0]


def carrier() -> threading.Thread:
    (found,) = (thread for thread in threading.enumerate() if thread.name == "argosy-tls")
    return found


def fill(near: socket.socket) -> None:
    """Send until nobody has taken anything for a moment."""
    near.setblocking(False)
    taken_at = time.monotonic()
    while time.monotonic() - taken_at < 0.2:
        try:
            near.send(bytes(65536))
            taken_at = time.monotonic()
        except BlockingIOError:
            time.sleep(0.005)


@needs_openssl
def test_a_carrier_whose_peer_takes_nothing_rests_and_ends_soon_after_native_code_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[object] = []

    class Poll:
        def __init__(self) -> None:
            self._poll = select.poll()

        def register(self, end: socket.socket, events: int) -> None:
            self._poll.register(end, events)

        def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
            polls.append(timeout)
            time.sleep(0.001)  # so that a thread that spins leaves time for the test
            return self._poll.poll(timeout)

    monkeypatch.setattr(secure, "LAST_S", 0.1)
    monkeypatch.setattr(secure, "select", SimpleNamespace(**{**vars(select), "poll": Poll}))
    ours, theirs = introduced(tmp_path)
    with theirs:
        near = secure.plain_end(ours)
        thread = carrier()
        fill(near)
        num_before = len(polls)
        near.shutdown(socket.SHUT_RDWR)
        near.close()
        thread.join(10)
        assert not thread.is_alive()
        assert len(polls) - num_before < 10


@needs_openssl
def test_what_native_code_sent_before_it_left_is_delivered(tmp_path: Path) -> None:
    ours, theirs = introduced(tmp_path)
    with theirs:
        near = secure.plain_end(ours)
        fill(near)
        near.settimeout(10)
        received = bytearray()
        rest = bytes(range(256)) * 256

        def read() -> None:
            with suppress(ssl.SSLError):  # native code does not say goodbye
                while part := theirs.recv(65536):
                    received.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        near.sendall(rest)
        near.close()
        reader.join(20)
        assert received.endswith(rest)
    wait_until(lambda: all(thread.name != "argosy-tls" for thread in threading.enumerate()))
