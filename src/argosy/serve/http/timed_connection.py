"""A connection to another server with a single deadline for all reads and writes.

    socket, deadline  ->  TimedConnection  ->  the `sock` of an `http.client.HTTPConnection`

A socket's timeout starts again with each byte, so a server that sends a byte per second could hold a thread
forever.

Elsewhere: `serve/answer/media_hosts.py` fetches files, and `serve/guards/check_over_http.py` has texts checked.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from typing import Any


class TimedConnection:
    """A socket for `http.client` whose reads and writes all end at the deadline."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._connected, self._deadline = connected, deadline

    def sendall(self, data: Any) -> None:
        self._limit()
        self._connected.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_TimedReader(self._connected, self._limit))

    def close(self) -> None:
        """Do nothing, because `http.client` calls this before it reads an answer without a length."""

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connected.settimeout(left)


class _TimedReader(io.RawIOBase):
    def __init__(self, connected: socket.socket, limit: Callable[[], None]) -> None:
        self._connected, self._limit = connected, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._limit()
        return self._connected.recv_into(buffer)
