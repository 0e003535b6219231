"""Accept connections and handle each in a thread of its own, with few strangers at a time.

When there is one too many, the oldest stranger from the address with the most is disconnected, so silent strangers
cannot keep anyone out.

Elsewhere: `worker.py` runs experts for coordinators; `copied.py` copies files from a coordinator.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

log = logging.getLogger("argosy.cluster")

MOST_STRANGERS = 8  # connections still in their introduction
_AGAIN_S = 0.5  # before the next attempt where the system has no room for a connection

Meet = Callable[[socket.socket, str, Callable[[], None]], None]


class _Strangers:
    """Connections still in their introduction, oldest first, each identified by a duplicate descriptor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: dict[socket.socket, str] = {}

    def add(self, connection: socket.socket, address: str) -> socket.socket:
        """Add a connection; end another one if there are too many."""
        own = connection.dup()  # TLS takes over the first descriptor
        with self._lock:
            self._addresses[own] = address
            if len(self._addresses) > MOST_STRANGERS:
                counts = Counter(self._addresses.values())
                most = max(counts.values())
                oldest = next(one for one, name in self._addresses.items() if counts[name] == most)
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # this ends its thread
                self._remove(oldest)
        return own

    def remove(self, own: socket.socket) -> None:
        """Remove a connection. Removing it twice is harmless."""
        with self._lock:
            self._remove(own)

    def _remove(self, own: socket.socket) -> None:
        if self._addresses.pop(own, None) is not None:
            own.close()


def admit(listener: socket.socket, meet: Meet, is_over: threading.Event) -> None:
    """Accept connections on a listening socket until `is_over`, then close the socket.

    Args:
        meet: called in a thread with the connection, which it must close, the address, and a function to call once
            the other side has introduced itself.
    """
    strangers = _Strangers()

    def meet_one(connection: socket.socket, address: str, stranger: socket.socket) -> None:
        try:
            meet(connection, address, lambda: strangers.remove(stranger))
        finally:
            strangers.remove(stranger)

    def shut() -> None:
        is_over.wait()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # this ends `accept`

    threading.Thread(target=shut, name="argosy-door", daemon=True).start()
    with listener:
        while not is_over.is_set():
            try:
                connection, (address, *_) = listener.accept()
            except OSError as error:  # too many open files, or the connection is already gone
                if not is_over.is_set():
                    log.warning("worker: a connection could not be accepted: %s", error.strerror)
                    is_over.wait(_AGAIN_S)
                continue
            try:  # counted here, because threads may start in another order than the connections
                stranger = strangers.add(connection, str(address))
            except OSError as error:  # too many open files
                connection.close()
                log.warning("worker: a connection could not be met: %s", error.strerror)
                continue
            try:
                threading.Thread(
                    target=meet_one,
                    args=(connection, str(address), stranger),
                    name="argosy-link",
                    daemon=True,
                ).start()
            except RuntimeError as error:  # the system cannot start another thread
                strangers.remove(stranger)
                connection.close()
                log.warning("worker: a connection could not be met: %s", error)
                is_over.wait(_AGAIN_S)
