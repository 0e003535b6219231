"""Strangers keep nobody out of a worker, and a thread that cannot start ends one connection only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from argosy.cluster import door

KNOWN = b"k"


@contextmanager
def admitting(address: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A door that knows whoever sends a byte, and answers it."""

    def meet(connection: socket.socket, address: str, is_known: Callable[[], None]) -> None:
        with connection:
            if connection.recv(1):
                is_known()
                connection.sendall(KNOWN)
                connection.recv(1)

    with ExitStack() as stack:
        listener = socket.socket()
        listener.bind((address, 0))
        listener.listen(door.MOST_STRANGERS)
        is_over = threading.Event()
        thread = threading.Thread(target=door.admit, args=(listener, meet, is_over))
        thread.start()
        stack.callback(thread.join)
        stack.callback(is_over.set)
        yield listener


def connect(stack: ExitStack, listener: socket.socket, source: str = "127.0.0.1") -> socket.socket:
    address = ("127.0.0.1", listener.getsockname()[1])
    connection = socket.create_connection(address, timeout=20, source_address=(source, 0))
    return stack.enter_context(connection)


def is_met(connection: socket.socket) -> bool:
    connection.sendall(b"x")
    return connection.recv(1) == KNOWN


def test_silent_strangers_leave_the_oldest_first_and_keep_nobody_out() -> None:
    with ExitStack() as stack, admitting("0.0.0.0") as listener:
        early = connect(stack, listener, "127.0.0.2")
        known = connect(stack, listener)
        assert is_met(known)
        silent = [connect(stack, listener) for _ in range(door.MOST_STRANGERS + 2)]
        assert is_met(connect(stack, listener))
        assert is_met(early)  # from another address, which has fewer
        assert silent[0].recv(1) == b""
        assert is_met(silent[-1])
        known.settimeout(0.05)
        with pytest.raises(TimeoutError):  # it is no stranger, and goes on
            known.recv(1)


def test_a_thread_that_cannot_start_ends_one_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_AGAIN_S", 0.05)
    with ExitStack() as stack, admitting() as listener:
        assert is_met(connect(stack, listener))  # the door's own thread has started
        with monkeypatch.context() as patched:

            def refuse(_: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patched.setattr(threading.Thread, "start", refuse)
            assert connect(stack, listener).recv(1) == b""
        assert is_met(connect(stack, listener))
