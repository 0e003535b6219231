"""Record who used a server for what kind of work, and how it ended, in a tamper-evident chain of lines.

    event loop  ->  Audit.record  ->  a bounded queue  ->  one thread  ->  ChainWriter, SealedContents

A line is the envelope of a request: its time, key, route, model, template, policies and token counts, and how it
ended. It quotes nothing that anyone said. Contents are kept only if the operator turns that on, each in its own
file, which can be erased (`sealed.py`).

A request without a valid key gets no line, because anyone who can reach the server could then fill the drive.
Instead, at most one line a minute counts the refusals by status.

A kill loses the line being written and the queue, which is empty unless the drive is slower than the requests. When
the drive is full, the operator's setting decides: `stop` refuses new requests until lines can be written again, and
lines of running requests wait in the queue; `degrade` drops lines, and the next line written says how many. Every
dropped line is counted.

Elsewhere: the format and its verification are `chain.py`; the server's part is `serve/guards/audited.py`.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.guard.chain import Head
from argosy.guard.chain_writer import ChainWriter
from argosy.guard.sealed import SealedContents, require_cryptography

WhenFull = Literal["stop", "degrade"]
DAY_S = 86_400.0
MOST_WAITING = 2048  # lines in the queue, of about a kilobyte each
# With `stop`, refuse new requests while more lines wait, so that running requests get theirs.
_STOP_AT = MOST_WAITING * 3 // 4
_SYNC_S = 1.0  # time between two syncs: a power cut loses at most this much
_LOOK_S = 30.0  # when idle, how often to check for a due anchor and for expired files
_RETRY_S = 1.0
_CLOSE_S = 10.0
_ERASE_S = 60.0
ANCHOR_S = 3600.0
_EXPIRE_S = 600.0
_REFUSED_S = 60.0  # interval between lines about requests without a valid key


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """Where and how to keep an audit.

    key_file: None: a file in the directory. Anyone who can read the key can forge a chain.
    keep_s: how long to keep lines, which are removed file by file. None: forever.
    with_content: also keep what is said.
    content_keep_s: how long to keep contents.
    max_file_bytes, max_file_s: limits of one file of lines.
    """

    directory: Path
    key_file: Path | None = None
    when_full: WhenFull = "stop"
    keep_s: float | None = 365 * DAY_S
    with_content: bool = False
    content_keep_s: float = 30 * DAY_S
    max_file_bytes: int = 64 << 20
    max_file_s: float = DAY_S


def check_audit(settings: AuditSettings) -> None:
    """Check before the server starts that the audit can be written, and create the key of a new one.

    Raises:
        UsageError: what `ChainWriter` raises; or contents are wanted and cannot be encrypted.
    """
    if settings.with_content:
        require_cryptography()
    _open_chain(settings, time.time).close()


def _open_chain(settings: AuditSettings, clock: Callable[[], float]) -> ChainWriter:
    return ChainWriter(
        settings.directory, settings.key_file, max_file_bytes=settings.max_file_bytes,
        max_file_s=settings.max_file_s, clock=clock,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Content:
    """The texts of a request and its answer, as bytes on the wire.

    parts: joined in the audit's thread.
    release: returns their memory; called exactly once.
    """

    parts: Sequence[bytes | bytearray]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: str
    facts: Mapping[str, object]
    content: Content | None = None


@dataclass(slots=True)
class _Erasure:
    key_id: str
    is_done: threading.Event
    num_objects: int = 0
    error: Exception | None = None


class Audit:
    """The audit of a running server; close it at the end.

    Args:
        facts: go into the first line, because they hold for all requests.
        report: called with a sentence when writing fails, and again when it recovers.
        announce: called from time to time with the last line, to be kept elsewhere as an anchor.
        clock: seconds since 1970.

    Raises:
        UsageError: what `ChainWriter` raises; or contents are wanted and cannot be encrypted.
    """

    def __init__(
        self,
        settings: AuditSettings,
        *,
        facts: Mapping[str, object],
        report: Callable[[str], None] = lambda text: None,
        announce: Callable[[Head], None] = lambda head: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if settings.with_content:
            require_cryptography()
        self.settings = settings
        self._report, self._announce, self._clock = report, announce, clock
        self._chain = _open_chain(settings, clock)
        self._contents = SealedContents(settings.directory, self._chain.key)
        self._items: queue.Queue[_Entry | _Erasure | None] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._num_lost = 0  # since the last gap line; guarded by the lock
        # Refused requests by status, since the last line about them; guarded by the lock.
        self._refused: Counter[str] = Counter()
        self._has_lost_content = False
        self._fault: str | None = None  # why the last write failed
        self._is_closing = threading.Event()
        self._looked_at = float("-inf")  # so that the first line is synced and anchored at once
        self._anchor_due = self._expire_due = self._refused_due = clock()
        cut = {"cut_bytes": self._chain.cut_bytes} if self._chain.cut_bytes else {}
        is_kept = settings.with_content and math.isfinite(settings.content_keep_s)
        kept = {"content_keep_s": settings.content_keep_s} if is_kept else {}
        self._items.put(_Entry("start", {**facts, "when_full": settings.when_full, **kept, **cut}))
        self._thread = threading.Thread(target=self._run, name="argosy-audit", daemon=True)
        self._thread.start()

    # ── any thread ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def head(self) -> Head:
        """The last line that was written."""
        return self._chain.head

    def require_room(self) -> None:
        """Refuse a request that could not be recorded, if the operator chose `stop`.

        Raises:
            Overloaded: lines cannot be written, or are written too slowly.
        """
        if self.settings.when_full != "stop" or (self._fault is None and self._items.qsize() < _STOP_AT):
            return
        raise Overloaded(
            "the audit cannot be written, and this server refuses what it cannot record",
            retry_after_s=int(_RETRY_S) + 1,
            hint="its log says why; `--audit-full degrade` goes on without records",
        )

    def record(self, facts: Mapping[str, object], content: Content | None = None) -> None:
        """Record a request. Never waits."""
        try:
            self._items.put_nowait(_Entry("request", facts, content))
        except queue.Full:
            self._lose(content)

    def count_refused(self, status: int) -> None:
        """Count a request without a valid key. Never waits."""
        with self._lock:
            self._refused[str(status)] += 1

    def erase(self, key_id: str) -> int:
        """Erase the contents of a key, record it, wait until that is done, and return how many there were.

        Raises:
            ArgosyError: they could not be erased.
        """
        erasure = _Erasure(key_id, threading.Event())
        try:
            self._items.put(erasure, timeout=_ERASE_S)
        except queue.Full:
            raise ArgosyError("the audit is too busy to erase anything now") from None
        if not erasure.is_done.wait(_ERASE_S):
            raise ArgosyError("the audit cannot be written, so nothing was erased from it yet")
        if erasure.error is not None:
            raise ArgosyError("contents of the audit could not be erased") from erasure.error
        return erasure.num_objects

    def close(self) -> None:
        """Write the queued lines and a final one, and close the files. Closing twice is harmless."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        try:
            self._items.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _lose(self, content: Content | None) -> None:
        with self._lock:
            self._num_lost += 1
        if content is not None:
            content.release()

    # ── the thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._items.get(timeout=self._wait_s())
                if item is None:
                    break
                if isinstance(item, _Erasure):
                    self._erase(item)
                else:
                    self._take(item)
            self._keep_house()
        self._finish()

    def _wait_s(self) -> float:
        if self._chain.is_synced and not self._num_lost and not self._refused and self._fault is None:
            return _LOOK_S
        return max(0.0, min(_SYNC_S, self._looked_at + _SYNC_S - time.monotonic()))

    def _take(self, entry: _Entry) -> None:
        """Write a line; on failure, retry or count it as lost, as the operator chose."""
        try:
            while not self._try(entry):
                if self.settings.when_full == "degrade" or self._is_closing.wait(_RETRY_S):
                    self._lose(entry.content)
                    return
        except Exception as error:  # only this line is bad; go on with the next
            self._report(f"audit: a line is lost: {type(error).__name__}")
            self._lose(entry.content)
            return
        if entry.content is not None:
            entry.content.release()

    def _try(self, entry: _Entry) -> bool:
        facts = entry.facts
        try:
            self._write_gap()
            if entry.content is not None:
                facts = {**facts, **self._put(facts, entry.content)}
            self._chain.append(entry.kind, facts)
        except OSError as error:
            self._fail(error)
            return False
        self._recover()
        return True

    def _put(self, facts: Mapping[str, object], content: Content) -> dict[str, object]:
        """Store a content and return the facts about it for its line."""
        data = b"".join(content.parts)
        try:
            sha256 = self._contents.put(str(facts["key"]), str(facts["request_id"]), data)
        except UsageError as error:  # the tenant's key is damaged; the line itself is still worth writing
            if not self._has_lost_content:
                self._has_lost_content = True
                self._report(
                    f"audit: contents of {facts['key']} cannot be kept, and their lines say so: {error}"
                )
            return {"content_fault": error.message}
        return {"content": {"sha256": sha256, "bytes": len(data)}}

    def _write_refused(self) -> None:
        with self._lock:
            refused, self._refused = self._refused, Counter()
        if not refused:
            return
        try:
            self._chain.append("refused", {"requests": refused.total(), "by_status": refused})
        except BaseException:
            with self._lock:
                self._refused += refused
            raise

    def _write_gap(self) -> None:
        with self._lock:
            num_lost = self._num_lost
        if num_lost:
            self._chain.append("gap", {"lost": num_lost})
            with self._lock:
                self._num_lost -= num_lost

    def _fail(self, error: OSError) -> None:
        if self._fault is None:
            outcome = "new requests are refused" if self.settings.when_full == "stop" else "lines are dropped"
            self._report(f"audit: lines cannot be written, so {outcome}: {error.strerror}")
        self._fault = error.strerror or type(error).__name__

    def _recover(self) -> None:
        if self._fault is not None:
            self._fault = None
            self._report("audit: lines can be written again")

    def _erase(self, erasure: _Erasure) -> None:
        try:
            erasure.num_objects = self._contents.erase(erasure.key_id)
        except Exception as error:  # passed to the waiting caller
            erasure.error = error
        else:
            self._take(_Entry("erased", {"key": erasure.key_id, "objects": erasure.num_objects}))
        erasure.is_done.set()

    def _keep_house(self) -> None:
        """Sync the lines, publish a due anchor, and remove what has expired."""
        if time.monotonic() - self._looked_at < _SYNC_S:
            return
        self._looked_at, now = time.monotonic(), self._clock()
        try:
            self._write_gap()
            if now >= self._refused_due:
                self._write_refused()
                self._refused_due = now + _REFUSED_S
            # Writing a line also tests the drive: while every request is refused, nothing else would.
            is_due = now >= self._anchor_due or self._fault is not None
            if is_due:
                self._chain.append("anchor", {})
            self._chain.sync()
        except OSError as error:
            self._fail(error)
            return
        self._recover()
        if is_due:
            self._anchor_due = now + ANCHOR_S
            self._announce(self._chain.head)
        if now >= self._expire_due:
            self._expire_due = now + _EXPIRE_S
            self._expire(now)

    def _expire(self, now: float) -> None:
        try:
            self._contents.sweep(now - self.settings.content_keep_s)
            if self.settings.keep_s is not None:
                self._chain.expire(now - self.settings.keep_s)
        except (OSError, ValueError) as error:
            self._report(f"audit: what has expired cannot be removed: {error}")

    def _finish(self) -> None:
        """Write a final line, which proves that nothing was cut off after it."""
        with contextlib.suppress(OSError):
            self._write_refused()
        self._take(_Entry("stop", {}))
        try:
            self._chain.sync()
        except OSError as error:
            self._fail(error)
        self._announce(self._chain.head)
        self._chain.close()
