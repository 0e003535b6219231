"""Accept connections, and meet each in a thread of its own; few of them may be strangers at a time.

Elsewhere: `worker.py` runs experts for coordinators; `copied.py` copies files from one.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger("argosy.cluster")

MOST_STRANGERS = 8  # connections that are being introduced
TICK_S = 0.5  # between two looks at `is_over`

Meet = Callable[[socket.socket, str, Callable[[], None]], None]


def admit(listener: socket.socket, meet: Meet, is_over: threading.Event) -> None:
    """Accept connections of a listening socket until `is_over`; the socket is closed then.

    Args:
        meet: called in a thread with the connection, which it closes, the address, and a function to call once
            the other side is known.
    """
    strangers = threading.BoundedSemaphore(MOST_STRANGERS)

    def meet_one(connection: socket.socket, address: str) -> None:
        is_stranger = [True]

        def is_known() -> None:
            if is_stranger:
                is_stranger.clear()
                strangers.release()

        try:
            meet(connection, address, is_known)
        finally:
            is_known()

    listener.settimeout(TICK_S)
    with listener:
        while not is_over.is_set():
            try:
                connection, (address, *_) = listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # too many open files, or the connection is gone already
                log.warning("worker: a connection could not be accepted: %s", error.strerror)
                time.sleep(TICK_S)
                continue
            if not strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(
                target=meet_one, args=(connection, str(address)), name="argosy-link", daemon=True
            ).start()
