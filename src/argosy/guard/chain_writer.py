"""Append to an audit chain on a drive that may be full, in a process that may be killed.

    append  ->  a whole line in the newest file, or the file as it was
    sync    ->  it is on the drive, and then `head` names it

If a kill cuts a line short, the next process replaces it and says so in its first line. `head` names only lines
that are on the drive, so after a kill or a power cut it never names a missing line. If it does, somebody removed
the line, and the chain is not continued.

Elsewhere: the format and its verification are `chain.py`; `audit.py` decides what to write when.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from argosy.errors import UsageError
from argosy.guard.chain import (
    HEAD,
    KEY,
    KEY_BYTES,
    MAX_LINE_BYTES,
    Head,
    chain_files,
    file_name,
    open_line,
    read_end,
    read_head,
    seal,
    seal_head,
    time_text,
)
from argosy.private_files import hold, open_private, read_secret


class ChainWriter:
    """The chain in a directory. One process at a time writes to it.

    Args:
        key_file: the key of the HMACs; None: a file in the directory. A new chain gets a new key.
        max_file_bytes, max_file_s: before a file exceeds either limit, the chain continues in a new one.
        clock: seconds since 1970.

    Attributes:
        head: the last line.
        cut_bytes: the size of a line that an earlier process left cut; the first append replaces it.
        is_synced: all lines are on the drive.

    Raises:
        UsageError: the directory or the key cannot be used, another process writes there, or the chain is damaged.
    """

    def __init__(
        self,
        directory: Path,
        key_file: Path | None,
        *,
        max_file_bytes: int,
        max_file_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._directory, self._clock = directory, clock
        self._max_file_bytes, self._max_file_s = max_file_bytes, max_file_s
        self.cut_bytes = 0
        self._ends_cut = False
        self.is_synced = True
        with contextlib.ExitStack() as opened:
            self._root = opened.enter_context(open_private(directory, option="--audit", holds="the audit"))
            opened.callback(os.close, hold(self._root, option="--audit"))
            try:
                self.key = self._find_key(key_file or directory / KEY)
                self.head = self._find_end()
                self._head_file = self._root.open(HEAD, os.O_WRONLY)
                opened.callback(os.close, self._head_file)
                self._open_file()
            except OSError as error:
                raise UsageError(
                    f"{error.filename or directory} cannot be used for the audit: {error.strerror}"
                ) from None
            self._closing = opened.pop_all()

    def _find_key(self, path: Path) -> bytes:
        is_new = not chain_files(self._directory) and not (self._directory / HEAD).exists()
        if not is_new and not path.exists():
            raise UsageError(
                f"{self._directory} has an audit, and its key {path} is missing",
                hint="--audit-key-file names it; or begin a new audit in another directory",
            )
        key = read_secret(path, KEY_BYTES, lost_with_it="the audit and contents made with it")
        if is_new:
            self._root.put(HEAD, seal_head(key, Head()))
        return key

    def _find_end(self) -> Head:
        """Find the last line of the chain: the one that `head` names, or a later one."""
        try:
            stored = read_head(self._directory, self.key)
            found = Head()
            for _, path in reversed(chain_files(self._directory)):
                if (line := read_end(path).line) is not None:
                    found = open_line(line, self.key).head
                    break
            if found.seq < stored.seq or (found.seq == stored.seq and found != stored):
                raise ValueError(f"{HEAD} names line {stored.seq}, and the last line is {found.seq}")
        except (ValueError, UsageError) as error:
            raise UsageError(
                f"the audit in {self._directory} is damaged: {error}",
                hint=f"`argosy audit verify {self._directory}` says more; keep it, and begin a new one elsewhere",
            ) from None
        return found

    def _open_file(self) -> None:
        """Open the newest file after its last whole line, or the first one."""
        files = chain_files(self._directory)
        if not files:
            self._number, self._file = 0, -1
            self._next_file()
            return
        self._number, path = files[-1]
        end = read_end(path)
        self._file = self._root.open(path.name, os.O_WRONLY)
        self._size, self.cut_bytes, self._ends_cut = end.whole_bytes, len(end.cut), bool(end.cut)
        self._begun_at = _first_time(path) or self._clock()

    def append(self, kind: str, facts: Mapping[str, object]) -> Head:
        """Write a line after the last one; returns the new head.

        Raises:
            OSError: it cannot be written; the chain is as it was.
            ValueError: it is too long.
        """
        if self._ends_cut:
            os.ftruncate(self._file, self._size)
            self._ends_cut = False
        now = self._clock()
        line, head = seal(self.key, self.head, kind, facts, now)
        is_old = now - self._begun_at >= self._max_file_s
        if self._size and (is_old or self._size + len(line) > self._max_file_bytes):
            self.sync()
            self._next_file()
        num_written = 0
        try:
            while num_written < len(line):
                num_written += os.pwrite(self._file, line[num_written:], self._size + num_written)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self.head = head
        self.is_synced = False
        return head

    def sync(self) -> None:
        """Wait until all lines are on the drive, then point `head` at the last one.

        Raises:
            OSError: the drive or its file system refuses.
        """
        if self.is_synced:
            return
        os.fdatasync(self._file)
        # In place and in one call, because a reader, or a kill, must find either the old one or the new one.
        os.pwrite(self._head_file, seal_head(self.key, self.head), 0)
        self.is_synced = True

    def expire(self, before: float) -> int:
        """Remove the oldest files whose last lines were written before this time; return how many.

        The time is that of the line, which its HMAC protects; a file's own time can be altered. Before a file is
        removed, a line names it and gives the reason, so the chain can be verified without it.

        Raises:
            OSError: a line cannot be written, or a file not removed.
            ValueError: the expired file is damaged, so it stays.
        """
        num_removed = 0
        for number, path in chain_files(self._directory):
            if number == self._number:
                break
            line = read_end(path).line
            if line is None:
                raise ValueError(f"{path.name} has no whole line")
            last = open_line(line, self.key)
            if last.time() >= before:
                break
            self.append(
                "expired",
                {
                    "file": path.name, "last_seq": last.head.seq, "last_sha256": last.head.sha256,
                    "last_time": last.facts["time"], "before": time_text(before),
                },
            )  # fmt: skip
            self.sync()
            self._root.remove(path.name)
            num_removed += 1
        return num_removed

    def close(self) -> None:
        """Close the files. Closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._closing.close()

    def _next_file(self) -> None:
        name = file_name(self._number + 1)
        file = self._root.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            self._root.sync()
        except BaseException:  # the next append creates it again
            os.close(file)
            self._root.remove(name)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._number = file, self._number + 1
        self._size, self._begun_at = 0, self._clock()


def _first_time(path: Path) -> float | None:
    """When the first line of a file was written; None if it has none."""
    with path.open("rb") as file:
        line = file.readline(MAX_LINE_BYTES + 1)
    try:
        return open_line(line.removesuffix(b"\n"), None).time()
    except ValueError:
        return None
