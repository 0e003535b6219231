"""Write log lines without blocking, and describe unexpected exceptions.

    event loop, engine's thread  ->  LogWriter.emit  ->  a bounded queue  ->  its own thread  ->  stderr

Logging never waits for the reader of the log. If stderr is a slow or unread pipe, or a file on a full drive, lines
are dropped, and the next line that gets through is followed by their number. A log file may have a size limit, at
which its older half is dropped.

A line is text for people or a JSON object for programs. The object's members are the record's `facts`, or if it has
none, a `message` with the text.

Elsewhere: the log line of each request is `gate.py`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import stat
import threading
import traceback
from datetime import UTC, datetime
from typing import Literal

from argosy.errors import is_disk_full

MOST_LINES = 4096  # lines waiting to be written; a few hundred bytes each
_CLOSE_S = 1.0  # time for the waiting lines at the end


LogFormat = Literal["text", "json"]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", None) or {"event": "message", "message": record.getMessage()}
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": at, "level": record.levelname.lower(), **facts})


class LogWriter(logging.Handler):
    """Writes log records to `descriptor` until closed.

    Args:
        most_bytes: the limit on the size of the file, which must be open for reading and appending; None: no limit.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        log_format: LogFormat = "text",
        most_lines: int = MOST_LINES,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.setFormatter(
            _JsonLines() if log_format == "json" else logging.Formatter("%(asctime)s %(message)s")
        )
        self._descriptor, self._most_bytes = descriptor, most_bytes
        self._lines: queue.Queue[str | None] = queue.Queue(most_lines)
        self._is_closed = False
        self._num_dropped = 0  # guarded by the handler's lock, like `emit`
        # A daemon, so that it does not keep the process alive if it hangs in a write that nobody reads.
        self._thread = threading.Thread(target=self._run, name="argosy-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Write the waiting lines, taking at most a second."""
        super().close()
        if self._is_closed:  # `logging` calls this again when the process ends
            return
        self._is_closed = True
        try:
            self._lines.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        line: str | None = ""
        while line is not None:
            line = self._lines.get()
            said = [] if line is None else [line]
            if num_dropped := self._take_dropped():
                said.append(self.format(_dropped(num_dropped)))
            try:
                self._write("".join(f"{one}\n" for one in said).encode("utf-8", "replace"))
                self._shorten()
            except OSError as error:
                if not is_disk_full(error):  # the reader is gone
                    return
                self._drop(len(said))

    def _drop(self, num_lines: int) -> None:
        self.acquire()
        self._num_dropped += num_lines
        self.release()

    def _shorten(self) -> None:
        """Drop the older half of an oversized log. Other writers append, so nothing is overwritten."""
        if self._most_bytes is None:
            return
        facts = os.fstat(self._descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size <= self._most_bytes:
            return
        half = self._most_bytes // 2
        newest = os.pread(self._descriptor, half, facts.st_size - half).partition(b"\n")[2]
        os.ftruncate(self._descriptor, 0)
        self._write(newest)

    def _take_dropped(self) -> int:
        self.acquire()
        try:
            num_dropped, self._num_dropped = self._num_dropped, 0
        finally:
            self.release()
        return num_dropped

    def _write(self, data: bytes) -> None:
        """Write directly to the descriptor, because a stream's lock, held in a hanging write, would block the exit."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # another process that shares the descriptor made it non-blocking
                ready = select.poll()
                ready.register(self._descriptor, select.POLLOUT)
                ready.poll()


def _dropped(num_lines: int) -> logging.LogRecord:
    text = f"{num_lines} log lines were dropped: they were not read fast enough"
    return logging.makeLogRecord({"msg": text, "levelname": "WARNING", "levelno": logging.WARNING})


def where_it_failed(error: BaseException) -> str:
    """The types of `error` and its causes, and their tracebacks.

    Messages are left out, because Python's and libraries' messages quote their input.
    """
    parts: list[str] = []
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        frames = "".join(traceback.format_tb(found.__traceback__))
        parts.append(f"{type(found).__name__}\n{frames}".rstrip())
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\nbecause of ".join(parts)
