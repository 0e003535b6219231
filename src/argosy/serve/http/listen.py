"""Where a server listens: TCP addresses, a socket file, TLS; and which proxies it trusts.

    options  ->  Front  ->  bind, bind_file, Certificate  ->  server.py

Elsewhere: the options are `cli/commands/listening.py`.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import ssl
import stat
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from argosy.directory import Directory
from argosy.errors import UsageError

BASE_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
SOCKET_CLIENT = "unix"  # the address given to every client of a socket file
_BACKLOG = 1024  # connections that the kernel queues for the server
LONGEST_PATH = 107  # bytes, the limit on Linux
_MOST_FILE_BYTES = 1 << 20  # certificates with their chain


class Listener(socket.socket):
    """A socket from which asyncio accepts connections one at a time.

    asyncio accepts up to a backlog of connections in a row. At the limit on open files, it would fail, report and
    schedule a retry for each of them.
    """

    _most_open: int | None = None

    def listen(self, backlog: int = 1, /) -> None:
        super().listen(_BACKLOG)

    def limit(self, most_open: int) -> None:
        """Close new connections while `most_open` are open.

        With TLS a connection reaches the protocol, which counts connections, only after its handshake.
        """
        self._most_open = most_open
        self._accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        if self._most_open is not None:
            # Count one by one only near the limit, because each connection would cost more than the previous one.
            if len(self._accepted) >= self._most_open <= sum(one.fileno() >= 0 for one in self._accepted):
                connection.close()
                raise ConnectionAbortedError  # asyncio waits for the next connection
            self._accepted.add(connection)
        return connection, address


@contextmanager
def bind_file(path: Path, mode: int) -> Iterator[list[Listener]]:
    """Bind a socket to the file `path` without listening yet; remove the file at the end.

    A lock file next to it excludes other servers, even those that have not begun to listen. A socket that nobody
    answers was left by a killed server, and is replaced.

    Raises:
        UsageError: another server listens there, the file is not a socket, or it cannot be created.
    """
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(
            f"--listen unix:{path} is too long: a socket's path may have {LONGEST_PATH} bytes",
            hint="use a shorter path, such as /run/argosy.sock",
        )
    with ExitStack() as held:
        try:
            parent = held.enter_context(Directory(path.parent))
            held.enter_context(parent.locked(f".{path.name}.lock", wait_s=0.0))
        except TimeoutError:
            raise _in_use(path) from None
        except OSError as error:
            raise UsageError(f"no socket can be made in {path.parent}: {error.strerror}") from None
        _remove_stale(parent, path)
        listener = held.enter_context(Listener(socket.AF_UNIX, socket.SOCK_STREAM))
        # The file gets its mode on creation, because a link could take its place before a chmod.
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(os.fsencode(path))
        except OSError as error:
            raise UsageError(f"{path} cannot be made: {error.strerror}") from None
        finally:
            os.umask(before)
        made = parent.stat(path.name)
        try:
            yield [listener]
        finally:
            with suppress(OSError):
                found = parent.stat(path.name)
                if made is not None and found is not None and os.path.samestat(made, found):
                    parent.remove(path.name)


def _remove_stale(parent: Directory, path: Path) -> None:
    found = parent.stat(path.name)
    if found is None:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(
            f"{path} exists and is not a socket", hint="move it away, or choose another path for --listen"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            try:
                probe.connect(os.fsencode(path))
            except ConnectionRefusedError:
                parent.remove(path.name)
                return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ETIMEDOUT):  # a full queue means that it is in use
                raise UsageError(f"{path} cannot be replaced: {error.strerror}") from None
    raise _in_use(path)


def _in_use(path: Path) -> UsageError:
    return UsageError(
        f"another server listens on {path}, or is about to", hint="stop it, or choose another path"
    )


class Certificate:
    """A certificate and its key, for connections with TLS 1.2 or later.

    Args:
        certificate, key: PEM files; the certificate may be followed by its chain.

    Raises:
        UsageError: a file cannot be read, they do not belong together, or other users can access the key.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate, self._key = certificate, key
        self.context = self._read()

    def reload(self) -> None:
        """Read both files again, for new connections.

        Raises:
            UsageError: the files cannot be used; the current certificate stays in use.
        """
        self._read()  # checks the files without changing anything
        self._load(self.context)

    def _read(self) -> ssl.SSLContext:
        for path in (self._certificate, self._key):
            try:
                facts = path.stat()
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {error.strerror}") from None
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_FILE_BYTES:
                raise UsageError(f"{path} is not a PEM file of at most {_MOST_FILE_BYTES} bytes")
            if path == self._key and facts.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise UsageError(
                    f"other users can access the key {path}: its mode is {stat.S_IMODE(facts.st_mode):04o}",
                    hint=f"`chmod 600 {path}`, or 640 if its group is that of the server",
                )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        def refuse() -> NoReturn:  # otherwise OpenSSL would prompt on the terminal
            raise UsageError(
                f"the key {self._key} is encrypted, and the server cannot ask for its password",
                hint="`openssl pkey -in KEY -out PLAIN_KEY` writes it without one; protect that file by its mode",
            )

        try:
            context.load_cert_chain(self._certificate, self._key, password=refuse)
        except ssl.SSLError as error:
            reason = (error.reason or "unknown").replace("_", " ").lower()
            raise UsageError(
                f"{self._certificate} and {self._key} are not a certificate and its key: {reason}",
                hint="both are PEM files; the certificate comes first in its file, then its chain",
            ) from None
        except OSError as error:
            raise UsageError(f"the certificate or its key cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """How requests reach the server.

    certificate: for TLS; None: plain HTTP.
    proxies: networks trusted to report a client's address and scheme (X-Forwarded-For, X-Forwarded-Proto), and
        `unix` for the clients of a socket file.
    base_path: the prefix of all paths, such as `/argosy`, or empty.

    Raises:
        UsageError: a network or the path is invalid.
    """

    certificate: Certificate | None = None
    proxies: tuple[str, ...] = ()
    base_path: str = ""

    def __post_init__(self) -> None:
        for network in self.proxies:
            _require_network(network)
        if self.base_path and not BASE_PATH.fullmatch(self.base_path):
            raise UsageError(
                f"--base-path must begin with / and end without one, found '{self.base_path}'",
                hint="for example --base-path /argosy",
            )

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def _require_network(text: str) -> None:
    if text == SOCKET_CLIENT:
        return
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise UsageError(
            f"--forwarded-from takes an address, a network or `{SOCKET_CLIENT}`, found '{text}'",
            hint="for example --forwarded-from 127.0.0.1 or 10.0.0.0/24",
        ) from None
    if not network.prefixlen:
        raise UsageError(
            f"--forwarded-from {text} would trust every client", hint="name the proxy's own address"
        )


def address_of(listener: Listener, host: str, front: Front) -> str:
    """The address of a server, for display."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}{front.base_path}"
    shown = f"[{host}]" if ":" in host else host
    return f"{front.scheme}://{shown}:{listener.getsockname()[1]}{front.base_path}"


@contextmanager
def bind(host: str, port: int) -> Iterator[list[Listener]]:
    """Bind sockets to all addresses of `host` without listening yet.

    They are bound before the model is loaded, so that a port in use is reported at once, and listen only
    afterwards. Until then connections are refused, so that no client waits for minutes, or for an answer that never
    comes.

    Raises:
        UsageError: the address is in use, or does not belong to this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(
            f"--host {host} is not an address: {error.strerror}",
            hint="use --host 127.0.0.1, or 0.0.0.0 for all addresses",
        ) from None
    with ExitStack() as stack:
        sockets: list[Listener] = []
        fault: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                one = stack.enter_context(Listener(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:]))
            except OSError as error:  # `localhost` resolves to an IPv6 address even if IPv6 is disabled
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise cannot_listen(error, host, port) from None
                fault = error
            else:
                sockets.append(one)
        if not sockets:
            assert fault is not None
            raise cannot_listen(fault, host, port) from None
        yield sockets


def cannot_listen(error: OSError, host: str, port: int) -> UsageError:
    match error.errno:
        case errno.EADDRINUSE:
            told, hint = (
                f"port {port} of {host} is in use",
                f"use --port {port % 65535 + 1}, or --port 0 for any free port",
            )
        case errno.EACCES:
            told, hint = f"this user may not listen on port {port}", "use --port 8080, or another above 1023"
        case _:
            told = f"{host} is not an address of this machine: {error.strerror}"
            hint = "use --host 127.0.0.1"
    return UsageError(told, hint=hint)
