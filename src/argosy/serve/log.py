"""Lines of the log on their way out, and what they say of a failure that nobody foresaw.

    event loop, engine's thread  ->  LogWriter.emit  ->  a bounded queue  ->  a thread of its own  ->  stderr

Whoever logs never waits for who reads: where stderr is a pipe that is read slowly, or by nobody, lines are dropped, and
behind the next that gets through stands how many.

Elsewhere: what is logged of each request is `gate.py`.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import traceback

MOST_LINES = 4096  # that wait to be written; some hundred bytes each
_CLOSE_S = 1.0  # for what waits when all is over


class LogWriter(logging.Handler):
    """Writes what is logged to `descriptor`, until it is closed."""

    def __init__(self, descriptor: int, *, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(most_lines)
        self._is_closed = False
        self._num_dropped = 0  # guarded by the handler's lock, as `emit` is
        # A daemon, which ends with the process: it may hang in a write that nobody takes.
        self._thread = threading.Thread(target=self._run, name="argosy-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Write what waits, if that can be done in a second."""
        super().close()
        if self._is_closed:  # again, by `logging` itself at the end of the process
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
                said.append(
                    f"{num_dropped} lines of the log were dropped: they came faster than they were read"
                )
            try:
                self._write("".join(f"{one}\n" for one in said).encode("utf-8", "replace"))
            except OSError:  # whoever read it is gone
                return

    def _take_dropped(self) -> int:
        self.acquire()
        try:
            num_dropped, self._num_dropped = self._num_dropped, 0
        finally:
            self.release()
        return num_dropped

    def _write(self, data: bytes) -> None:
        """Straight to the descriptor: the lock of a stream, held in a write that hangs, keeps a process from ending."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # whoever shares it made it so
                ready = select.poll()
                ready.register(self._descriptor, select.POLLOUT)
                ready.poll()


def where_it_failed(error: BaseException) -> str:
    """The types of `error` and of what led to it, and the lines of code they came through.

    Messages stay out: those of Python and of libraries quote what they choked on.
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
