"""Fetch pictures, sounds and videos by address, only from hosts that the operator allows, and only over https.

    https://HOST/PATH  ->  MediaHosts.fetch  ->  one form of address  ->  an allowed host  ->  its addresses, all public
                                             ->  a connection to one of them  ->  200, within size and time

Without `--media-host` nothing here opens a connection, because a client could otherwise make the server send
requests into its own network. An address must match one pattern as a whole and is never parsed again; the host that
is contacted comes from the operator's list. Its name is resolved once, and the connection goes to the very address
that was checked. Redirects are not followed, proxies from the environment not used, and compressed answers not
read.

Elsewhere: `media_parts.py` requests files; `service.py` fetches them before a request is read again.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from argosy.errors import UsageError
from argosy.media.parts import PROMPT_LIMITS, MediaLimits
from argosy.serve.http.held import Files, PoolShare
from argosy.serve.http.timed_connection import TimedConnection
from argosy.serve.http.work import WorkQueue

FETCH_S = 20.0  # for one file, not counting the name lookup, which takes as long as the system allows
MOST_FILES = 16  # per request
_NUM_AT_ONCE = 4
_MOST_WAITING = 64  # per key
_MOST_TRIED = 4  # addresses of a host
_PORT = 443
_READ_BYTES = 1 << 16
_LONGEST_ADDRESS = 4096

_CHARACTER = r"[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2}"
_ADDRESS = re.compile(
    rf"https://(?P<host>[A-Za-z0-9.-]{{1,253}})(?P<path>/(?:{_CHARACTER})*)?(?P<query>\?(?:{_CHARACTER}|\?)*)?"
)
# The last label begins with a letter, so no spelling of an IP address passes for a name.
_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]")


class Network(Protocol):
    """The network operations that fetching needs; tests substitute their own."""

    def resolve(self, host: str) -> Sequence[str]:
        """All addresses of a host. Raises OSError."""

    def connect(self, host: str, address: str, timeout_s: float) -> socket.socket:
        """Connect to `address` and verify that it is `host`. Raises OSError."""


class HttpsNetwork:
    """The real network."""

    def __init__(self) -> None:
        self._context = ssl.create_default_context()

    def resolve(self, host: str) -> Sequence[str]:
        found = socket.getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def connect(self, host: str, address: str, timeout_s: float) -> socket.socket:
        deadline = time.monotonic() + timeout_s
        plain = socket.create_connection((address, _PORT), timeout=timeout_s)
        try:
            plain.settimeout(max(0.01, deadline - time.monotonic()))
            return self._context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise


class _Fault(Exception):
    """Why a file cannot be fetched; `str()` is worded to follow a colon."""


class _Target(NamedTuple):
    host: str
    path: str


class MediaHosts:
    """Fetches files for all requests, a few at a time.

    Args:
        names: the allowed hosts.

    Raises:
        UsageError: a name is not a host name.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        network: Callable[[], Network] = HttpsNetwork,
        limits: MediaLimits = PROMPT_LIMITS,
        fetch_s: float = FETCH_S,
    ) -> None:
        for name in names:
            if len(name) > 253 or not _NAME.fullmatch(name.lower()):
                raise UsageError(
                    f"--media-host must be a host name, found {name!r:.80}",
                    hint="give the name alone, such as images.example.org: no scheme, port, path, wildcard or address",
                )
        self.names = frozenset(name.lower() for name in names)
        self._network = network()
        self._limits, self._fetch_s = limits, fetch_s
        self._work = WorkQueue(num_threads=_NUM_AT_ONCE, max_waiting=_MOST_WAITING)

    @property
    def has_stopped(self) -> bool:
        """Whether files wait for a thread in vain."""
        return self._work.has_stopped

    async def fetch(self, files: Files, share: PoolShare, tenant: str) -> None:
        """Fetch the wanted files of a request. If one fails, the reason is stored in its place.

        Raises:
            UsageError: the request names too many files.
            Overloaded: there is no memory for them now.   TooMany: too many files of this tenant are waiting.
        """
        wanted = list(files.wanted)
        if len(files.found) + len(wanted) > MOST_FILES:
            raise UsageError(
                f"a request may name at most {MOST_FILES} files at other hosts",
                hint="send the data of the others",
            )
        fetched = await asyncio.gather(
            *(self._work.run(tenant, self._content, address, share) for address in wanted),
            return_exceptions=True,
        )
        for address, content in zip(wanted, fetched, strict=True):
            if isinstance(content, BaseException):
                raise content
            files.found[address] = content
            del files.wanted[address]

    def _content(self, address: str, share: PoolShare) -> bytes | str:
        try:
            target = self._target(address)
        except _Fault as fault:
            return str(fault)
        try:
            return self._fetched(target, share)
        except _Fault as fault:
            return f"{target.host}: {fault}"
        except TimeoutError:
            return f"{target.host}: it took more than {self._fetch_s:g} seconds"
        except ssl.SSLError:
            return f"{target.host}: its certificate or its TLS is not accepted"
        except (OSError, http.client.HTTPException):
            return f"{target.host}: the connection failed"

    def _target(self, address: str) -> _Target:
        found = None if len(address) > _LONGEST_ADDRESS else _ADDRESS.fullmatch(address)
        if found is None:
            raise _Fault("an address must have the form https://HOST/PATH, without user, port or fragment")
        if (host := found["host"].lower()) not in self.names:
            raise _Fault("its host is none of those that this server may fetch from")
        return _Target(host, (found["path"] or "/") + (found["query"] or ""))

    def _fetched(self, target: _Target, share: PoolShare) -> bytes:
        addresses = self._addresses(target.host)
        deadline = time.monotonic() + self._fetch_s
        connected = self._connected(target.host, addresses, deadline)
        try:
            # The port is the scheme's default, so the header omits it.
            connection = http.client.HTTPConnection(target.host)
            connection.sock = TimedConnection(connected, deadline)
            connection.auto_open = 0
            connection.request(
                "GET", target.path,
                headers={"Accept": "image/*, audio/*, video/*", "Accept-Encoding": "identity", "Connection": "close"},
            )  # fmt: skip
            with connection.getresponse() as response:
                return self._body(response, share)
        finally:
            connected.close()

    def _addresses(self, host: str) -> Sequence[str]:
        try:
            addresses = self._network.resolve(host)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise _Fault("it has no address")
        if not all(map(is_public, addresses)):
            raise _Fault("it has an address that is not public")
        return addresses[:_MOST_TRIED]

    def _connected(self, host: str, addresses: Sequence[str], deadline: float) -> socket.socket:
        last: OSError | None = None
        for address in addresses:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                return self._network.connect(host, address, left)
            except OSError as error:
                last = error
        assert last is not None
        raise last

    def _body(self, response: http.client.HTTPResponse, share: PoolShare) -> bytes:
        most = self._limits.file_bytes
        if response.status != 200:
            raise _Fault(f"it answered with status {response.status}")
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise _Fault("its answer is compressed")
        if response.length is not None and response.length > most:
            raise _Fault(f"the file has more than {most:,} bytes")
        content = io.BytesIO()
        while piece := response.read1(_READ_BYTES):
            if content.tell() + len(piece) > most:
                raise _Fault(f"the file has more than {most:,} bytes")
            share.hold(len(piece) + len(piece) // 8)  # a buffer that grows has some room to spare
            content.write(piece)
        if response.length:  # shorter than the announced length
            raise _Fault("its answer is incomplete")
        return content.getvalue()


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, however it is interpreted."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    is_special = (
        not found.is_global or found.is_private or found.is_loopback or found.is_link_local or found.is_multicast
        or found.is_reserved or found.is_unspecified
    )  # fmt: skip
    if isinstance(found, ipaddress.IPv6Address):
        is_special |= found not in _GIVEN_OUT or any(found in block for block in _SPECIAL)
    return not is_special


_GIVEN_OUT = ipaddress.ip_network("2000::/3")
# 6to4 and Teredo carry an IPv4 address of anyone's choice; the last block is for documentation.
_SPECIAL = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32", "3fff::/20")))
