"""Watch the keys of a running server: save their usage, and end revoked keys.

    every half second:  KeyRing.look, Limits.save
    a revoked key  ->  its requests end  ->  counts, answers, KV blocks and files of its tenant are deleted

The deletion is repeated until it succeeds and no thread works for the key any more.

Elsewhere: `serve/http/running.py` ends requests; keys and limits are in the room `guard`; a tenant's blocks and
files are `engine/prefix.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from argosy.errors import UsageError
from argosy.guard.keys import KeyRing
from argosy.guard.limits import Limits
from argosy.serve.http.log import where_it_failed
from argosy.serve.http.running import Running

log = logging.getLogger("argosy.serve")

LOOK_S = 0.5


class KeyWatch:
    """Runs a thread while its context is entered.

    Args:
        running: the requests to end when their key is revoked.
        delete: deletes the data of a revoked key, given its id.
    """

    def __init__(
        self,
        ring: KeyRing,
        limits: Limits,
        running: Running,
        delete: Callable[[str], None] = lambda key_id: None,
    ) -> None:
        self._ring = ring
        self._limits = limits
        self._running = running
        self._delete = delete
        self._leaving: dict[str, str | None] = {}  # revoked keys -> why their data could not be deleted
        self._is_over = threading.Event()
        self._can_save = True
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._run, name="argosy-keys", daemon=True)

    def __enter__(self) -> KeyWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_S):
            try:
                self._turn()
            except Exception as error:  # keep watching after any failure
                log.error("keys: %s", where_it_failed(error))

    def _turn(self) -> None:
        for key_id in self._ring.look():
            self._running.revoke(key_id)
            self._leaving[key_id] = None
            log.info("keys: %s is revoked", key_id)
        for key_id in tuple(self._leaving):
            self._end(key_id)
        if self._ring.fault not in (None, self._fault):
            log.error("keys: every key is refused until this is fixed: %s", self._ring.fault)
        self._fault = self._ring.fault
        try:
            self._limits.save()
        except UsageError as error:
            if self._can_save:
                log.error("keys: %s", error)
            self._can_save = False
        else:
            self._can_save = True

    def _end(self, key_id: str) -> None:
        is_last = not self._running.is_at_work(key_id)
        try:
            self._delete(key_id)
            self._limits.forget(key_id)
        except Exception as error:  # go on with the next key, and retry this one in the next round
            if (fault := where_it_failed(error)) != self._leaving[key_id]:
                log.error("keys: data of %s could not be deleted yet: %s", key_id, fault)
            self._leaving[key_id] = fault
        else:
            if is_last:
                del self._leaving[key_id]
