"""Take the sockets that systemd passes, and notify it when the server is ready and when it stops.

    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES  ->  passed_sockets  ->  the server listens on them
    the server is ready, or stops           ->  Notifier.tell   ->  NOTIFY_SOCKET

The protocols are sd_listen_fds(3) and sd_notify(3). Child processes do not inherit the variables.

Elsewhere: `listen.py` creates the server's own sockets.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat

from argosy.errors import UsageError
from argosy.serve.http.listen import LONGEST_PATH, Listener

log = logging.getLogger("argosy.serve")

_FIRST = 3  # descriptor of the first socket
_MOST_SOCKETS = 64
_TELL_S = 1.0


def passed_sockets() -> list[Listener]:
    """The sockets that systemd passed to this process, if any, those reachable from other machines first.

    They are already listening: the kernel queues clients while models are loaded.

    Raises:
        UsageError: one is not a listening TCP or named stream socket, or their number is wrong.
    """
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):  # they are meant for a parent of this process
        return []
    if not (count.isascii() and count.isdigit() and len(count) <= 4 and int(count) <= _MOST_SOCKETS):
        raise UsageError(f"LISTEN_FDS must be a number up to {_MOST_SOCKETS}, found '{count[:20]}'")
    named = dict(enumerate(names.split(":"), _FIRST)) if names else {}
    found = [_take(number, named.get(number, "")) for number in range(_FIRST, _FIRST + int(count))]
    return sorted(found, key=_is_local)


def _take(number: int, name: str) -> Listener:
    """Take the socket of a descriptor."""
    shown = f"descriptor {number} of LISTEN_FDS" + (f" ({name[:80]})" if name.isprintable() and name else "")
    hint = "a .socket unit passes what `argosy serve` takes with ListenStream=PORT or ListenStream=/PATH"
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError as error:
        raise UsageError(f"{shown} cannot be used: {error.strerror}", hint=hint) from None
    if not is_socket:
        raise UsageError(f"{shown} is not a socket", hint=hint)
    os.set_inheritable(number, False)
    listener = Listener(fileno=number)
    if (fault := _fault_of(listener)) is not None:
        listener.close()
        raise UsageError(f"{shown} {fault}", hint=hint)
    return listener


def _fault_of(listener: Listener) -> str | None:
    """Why a server cannot use a socket, or None if it can."""
    kind, family = listener.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE), listener.family
    if family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or kind != socket.SOCK_STREAM:
        return "is neither TCP nor a stream socket with a file"
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen, as with Accept=yes"
    if family == socket.AF_UNIX and not str(listener.getsockname()).startswith("/"):
        return "has no file, so every user of the machine could use it"
    return None


def _is_local(listener: Listener) -> tuple[bool, bool]:
    """Sorts sockets: addresses for other machines, addresses of this one, files."""
    if listener.family == socket.AF_UNIX:
        return True, True
    return False, ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def shown(listener: Listener) -> str:
    """A socket for display: `127.0.0.1:8080`, `unix:/run/argosy.sock`."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if listener.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


class Notifier:
    """Notifies systemd about this process if it wants that. The constructor hides NOTIFY_SOCKET from children."""

    def __init__(self) -> None:
        self._address = os.fsencode(os.environ.pop("NOTIFY_SOCKET", ""))

    def tell(self, text: str) -> None:
        """Send `READY=1` or `STOPPING=1`. A failure is logged and the server continues."""
        # not requested, or requested from outside this virtual machine
        if self._address[:1] not in (b"/", b"@"):
            return
        address = b"\0" + self._address[1:] if self._address.startswith(b"@") else self._address
        try:
            if len(address) > LONGEST_PATH:
                raise OSError(0, "its name is too long")
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
                notified.settimeout(_TELL_S)
                notified.sendto(text.encode(), address)
        except OSError as error:
            log.error(
                "could not notify systemd of %s, because NOTIFY_SOCKET cannot be used: %s",
                text,
                error.strerror or error,
            )
