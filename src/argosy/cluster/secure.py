"""TLS between machines: a thread copies bytes between a TLS connection and a plain socket pair.

    native frames  ──  socket pair  ──  thread  ──  TLS  ──  the other machine

Native code sees an ordinary descriptor either way. The copying adds some tens of microseconds to each layer's
exchange, so plain connections within a trusted network are the default.

Elsewhere: `hello.py` also runs over TLS: the certificate proves which machine answers, the key who may ask.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from argosy.cluster.hello import HELLO_S
from argosy.errors import UsageError

_CHUNK_BYTES = 64 << 10
_MOST_BUFFERED = 256 << 10  # bytes waiting to be sent in one direction
LAST_S = 1.0  # time to deliver buffered bytes after one side ends
BUFFER_BYTES = 2 * (_MOST_BUFFERED + _CHUNK_BYTES)  # per connection


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The worker's side: its certificate and the certificate's key.

    Raises:
        UsageError: they cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _refuse_pipes(certificate, key)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{certificate} and {key} cannot be used for TLS: {_reason(error)}") from None
    return context


def client_context(authorities: Path) -> ssl.SSLContext:
    """The coordinator's side: the certificates that it trusts.

    Raises:
        UsageError: the file cannot be read, or has no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _refuse_pipes(authorities)
    try:
        context.load_verify_locations(authorities)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{authorities} has no certificates for TLS: {_reason(error)}") from None
    return context


def _refuse_pipes(*paths: Path) -> None:
    """OpenSSL opens a file by its name, and would wait forever for a pipe's writer."""
    for path in paths:
        if path.is_fifo():
            raise UsageError(f"{path} cannot be used for TLS: it is a pipe")


def _reason(error: OSError) -> str:
    return error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error.strerror or error)


def wrap(connection: socket.socket, context: ssl.SSLContext, *, name: str | None) -> ssl.SSLSocket:
    """Perform the TLS handshake. `name` is the worker's, which its certificate must match; None on the worker's
    side.

    Raises:
        OSError: the other side does not speak TLS, has a wrong certificate, or is too slow; the connection is closed.
    """
    connection.settimeout(HELLO_S)
    try:
        return context.wrap_socket(connection, server_side=name is None, server_hostname=name)
    except BaseException:
        connection.close()
        raise


def plain_end(connection: socket.socket) -> socket.socket:
    """A socket with the plain bytes of a connection: itself, or one end of a pair whose other end a thread serves."""
    if not isinstance(connection, ssl.SSLSocket):
        connection.settimeout(None)
        return connection
    near, far = socket.socketpair()
    threading.Thread(target=_carry, args=(connection, far), name="argosy-tls", daemon=True).start()
    return near


def _carry(secure: ssl.SSLSocket, plain: socket.socket) -> None:
    """Carry bytes both ways until either side ends. One thread does both, because an SSL object is not thread-safe."""
    with secure, plain, suppress(OSError):
        secure.setblocking(False)
        plain.setblocking(False)
        to_plain, to_secure = bytearray(), bytearray()
        has_hung_up = False  # native code has closed its end; some of its bytes may still be unread
        # TLS may need to read before it can write, and the other way round.
        read_wants_write = write_wants_read = False
        while True:
            secure_events = plain_events = 0
            if len(to_plain) < _MOST_BUFFERED or write_wants_read:
                secure_events |= select.POLLIN
            if (to_secure and not write_wants_read) or read_wants_write:
                secure_events |= select.POLLOUT
            if len(to_secure) < _MOST_BUFFERED:
                plain_events |= select.POLLIN
            if to_plain:
                plain_events |= select.POLLOUT
            poll = select.poll()
            # poll reports a closed connection every time, even if neither reading nor writing is wanted.
            if secure_events:
                poll.register(secure, secure_events)
            if plain_events or not has_hung_up:
                poll.register(plain, plain_events)
            # Decrypted bytes wait in the SSL object, where poll does not see them.
            is_ready = secure.pending() > 0 and len(to_plain) < _MOST_BUFFERED
            found = poll.poll(0 if is_ready else 1000 * LAST_S if has_hung_up else None)
            if has_hung_up and not (found or is_ready):
                break  # the other machine accepts nothing
            if any(end == plain.fileno() and event & select.POLLHUP for end, event in found):
                has_hung_up = True
            if has_hung_up:
                to_plain.clear()  # nobody reads it
            if len(to_plain) < _MOST_BUFFERED:
                read_wants_write = False
                try:
                    part = secure.recv(_CHUNK_BYTES)
                    if not part:
                        break
                    to_plain += part
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLWantWriteError:
                    read_wants_write = True
            if len(to_secure) < _MOST_BUFFERED:
                with suppress(BlockingIOError):
                    part = plain.recv(_CHUNK_BYTES)
                    if not part:
                        break
                    to_secure += part
            if to_plain:
                with suppress(BlockingIOError):
                    del to_plain[: plain.send(to_plain)]
            if to_secure:
                write_wants_read = False
                try:
                    del to_secure[: secure.send(to_secure)]
                except ssl.SSLWantWriteError:
                    pass
                except ssl.SSLWantReadError:
                    write_wants_read = True
        # Deliver data sent before the other side ended.
        for end, rest in ((plain, to_plain), (secure, to_secure)):
            end.settimeout(LAST_S)
            with suppress(OSError):
                end.sendall(rest)
