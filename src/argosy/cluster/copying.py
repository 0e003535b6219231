"""Send files from this machine to workers that have none, each in a thread, at a pace that barely slows answers.

Elsewhere: `copy_source.py` sends the bytes; `owners.py` chooses the shards; `group.py` connects to workers.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.shards import NUM_SHARDS
from argosy.cluster.copy_link import CopyEnd
from argosy.cluster.copy_source import CopySource, Pace, serve_copy
from argosy.cluster.hello import Offer
from argosy.cluster.member import LOOK_S, MOST_PAUSE_S, Member
from argosy.config import format_bytes
from argosy.errors import ArgosyError

log = logging.getLogger("argosy.cluster")

MOST_COPIES = 2  # at once; further workers wait


class Copying:
    """The copies of a group.

    Args:
        changes: guards members.
        stop: set when the group is closed.
        shards_of: the mask of the shards that a worker is to copy.
    """

    def __init__(
        self, pace: Pace, changes: threading.RLock, stop: threading.Event, shards_of: Callable[[Member], int]
    ) -> None:
        self._pace, self._changes, self._stop, self._shards_of = pace, changes, stop, shards_of
        self._places = threading.Semaphore(MOST_COPIES)
        self._model: ModelFiles | None = None
        self._source: CopySource | None = None
        # True once every worker has been contacted: the shards are divided among those present.
        self._all_met = threading.Event()

    def open(self, model: ModelFiles) -> None:
        self._model = model

    def all_met(self) -> None:
        """Every worker has been contacted once, so copies may begin."""
        self._all_met.set()

    def begin(self, member: Member, connection: socket.socket, offer: Offer, key: bytes) -> None:
        """Start a thread that lets a worker copy files and then closes the connection."""
        with self._changes:
            if self._stop.is_set() or member.copy_connection is not None:
                connection.close()
                return
            member.copy_offer, member.copy_connection = offer, connection
            member.refusal, member.why = False, "it waits for its files"
        threading.Thread(
            target=self._copy, args=(member, connection, key), name="argosy-copy", daemon=True
        ).start()

    def _copy(self, member: Member, connection: socket.socket, key: bytes) -> None:
        pause_s = LOOK_S
        try:
            while not self._all_met.wait(LOOK_S):
                if self._stop.is_set():
                    return
            if not self._places.acquire(blocking=False):
                member.why = f"it waits until {MOST_COPIES} others have copied their files"
                pause_s = MOST_PAUSE_S
                return
            try:
                self._serve(member, CopyEnd(connection, key))
            finally:
                self._places.release()
        except (ArgosyError, OSError) as error:
            member.why = error.message if isinstance(error, ArgosyError) else str(error.strerror or error)
            if not self._stop.is_set() and not member.drained:
                log.warning("cluster: %s: %s", member.name, member.why)
            pause_s = MOST_PAUSE_S
        finally:
            connection.close()
            member.pause_s, member.tried_at = pause_s, time.monotonic()
            member.copy_connection = None

    def _serve(self, member: Member, end: CopyEnd) -> None:
        with self._changes:
            if member.drained:
                return
            if self._source is None:
                assert self._model is not None
                self._source = CopySource(self._model)
            shards = member.copied_shards = self._shards_of(member)
        log.info("cluster: %s is copying %d of %d shards", member.name, shards.bit_count(), NUM_SHARDS)

        def sent(nbytes: int) -> None:
            member.copied_bytes += nbytes
            member.ended_bytes[0] += nbytes
            member.why = f"{format_bytes(member.copied_bytes)} of its files copied"

        serve_copy(end, self._source, shards, pace=self._pace, sent=sent, stop=self._stop)
