"""Carry bytes of a model's files from a coordinator to a worker, over the connection that introduced them.

    worker:       ask (number, offset, file, bytes), proof        ──>
    coordinator:                                                  <──  answer (status, bytes), BLAKE3, the bytes

Heads have a fixed size. An answer contains exactly the requested bytes, or a reason for refusing them. Proofs and
digests are BLAKE3 under the key of this connection (`hello.accept_copy`), and a digest also covers the ask. Altered
bytes, an answer to a different ask and a replayed answer are therefore all detected, with or without TLS.

Elsewhere: `copy_source.py` answers; `copied.py` asks and writes the files.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
from typing import NamedTuple

from blake3 import blake3

from argosy.checkpoint.untrusted_file import quote
from argosy.errors import PeerNotUsable

PIECE_BYTES = 1 << 20  # most bytes in an answer
THE_LIST = 0xFFFFFFFF  # stands for the list of files instead of a file
LIST_BYTES = 1 << 20  # most bytes of the list
SILENCE_S = 30.0  # time limit for an answer and for the next ask
_ASK = struct.Struct("<QQII")  # number, offset, file, bytes
_ANSWER = struct.Struct("<II")  # status, bytes
_DIGEST_BYTES = 32
_DONE, _FAILED = 0, 1
_LONGEST_REASON = 300  # bytes


class Ask(NamedTuple):
    """A range that a worker requests. `head`: the bytes of the ask itself."""

    file: int
    offset: int
    nbytes: int
    head: bytes


class CopyLink:
    """The worker's end.

    Every method raises `PeerNotUsable` if the coordinator is gone, too slow, or sends a wrong answer.
    """

    def __init__(self, connection: socket.socket, key: bytes) -> None:
        self._connection, self._key = connection, key
        self._number = 0

    def fetch_list(self) -> bytes:
        """Fetch the list of files, as `copy_source.CopySource.listing` writes it."""
        return self._fetch(THE_LIST, 0, LIST_BYTES, is_whole=False)

    def fetch(self, file: int, offset: int, nbytes: int) -> bytes:
        """Fetch `nbytes`, at most PIECE_BYTES, of a file named by its place in the list."""
        return self._fetch(file, offset, nbytes, is_whole=True)

    def _fetch(self, file: int, offset: int, nbytes: int, *, is_whole: bool) -> bytes:
        head = _ASK.pack(self._number, offset, file, nbytes)
        self._number += 1
        until = time.monotonic() + SILENCE_S
        _send(self._connection, head + _digest(self._key, head), until)
        answer = _receive(self._connection, _ANSWER.size + _DIGEST_BYTES, until)
        status, size = _ANSWER.unpack_from(answer)
        if status not in (_DONE, _FAILED) or size > (nbytes if status == _DONE else _LONGEST_REASON):
            raise PeerNotUsable(f"it answers with {size} bytes where {nbytes} were asked for")
        data = _receive(self._connection, size, until)
        expected = _digest(self._key, head, answer[: _ANSWER.size], data)
        if not hmac.compare_digest(answer[_ANSWER.size :], expected):
            raise PeerNotUsable("the bytes received do not match their BLAKE3")
        if status == _FAILED:
            raise PeerNotUsable(f"it cannot read its files: {quote(bytes(data).decode('utf-8', 'replace'))}")
        if is_whole and size != nbytes:
            raise PeerNotUsable(f"it answers with {size} bytes where {nbytes} were asked for")
        return data


class CopyEnd:
    """The coordinator's end; raises what `CopyLink` raises."""

    def __init__(self, connection: socket.socket, key: bytes) -> None:
        self._connection, self._key = connection, key
        self._number = 0

    def next_ask(self) -> Ask | None:
        """Wait for the worker's next ask; None if it has ended the connection."""
        until = time.monotonic() + SILENCE_S
        data = _receive(self._connection, _ASK.size + _DIGEST_BYTES, until, may_end=True)
        if not data:
            return None
        head = data[: _ASK.size]
        number, offset, file, nbytes = _ASK.unpack(head)
        if not hmac.compare_digest(data[_ASK.size :], _digest(self._key, head)) or number != self._number:
            raise PeerNotUsable("it requests files without the key")
        self._number += 1
        return Ask(file, offset, nbytes, head)

    def answer(self, ask: Ask, data: bytes) -> None:
        self._answer(ask, _DONE, data)

    def refuse(self, ask: Ask, why: str) -> None:
        self._answer(ask, _FAILED, why.encode()[:_LONGEST_REASON])

    def _answer(self, ask: Ask, status: int, data: bytes) -> None:
        head = _ANSWER.pack(status, len(data))
        until = time.monotonic() + SILENCE_S
        _send(self._connection, head + _digest(self._key, ask.head, head, data), until)
        _send(self._connection, data, until)


def _digest(key: bytes, *parts: bytes) -> bytes:
    hasher = blake3(key=key)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def _send(connection: socket.socket, data: bytes, until: float) -> None:
    try:
        connection.settimeout(max(0.001, until - time.monotonic()))
        connection.sendall(data)
    except OSError as error:
        raise _lost(error) from None


def _receive(connection: socket.socket, nbytes: int, until: float, *, may_end: bool = False) -> bytes:
    """Receive exactly `nbytes` before `until`; empty if the connection ends first and `may_end` allows it."""
    received = bytearray(nbytes)
    at = 0
    with memoryview(received) as room:
        while at < nbytes:
            left = until - time.monotonic()
            if left <= 0:
                raise PeerNotUsable(f"no complete message for {SILENCE_S:.0f} s")
            try:
                connection.settimeout(left)
                got = connection.recv_into(room[at:])
            except TimeoutError:
                continue
            except OSError as error:
                raise _lost(error) from None
            if not got:
                if may_end and not at:
                    return b""
                raise PeerNotUsable("the connection was closed while copying files")
            at += got
    return bytes(received)


def _lost(error: OSError) -> PeerNotUsable:
    return PeerNotUsable(
        f"the connection failed while copying files: {error.strerror or type(error).__name__}"
    )
