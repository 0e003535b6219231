"""The format of an audit chain: how a line is sealed and read back, and how a whole directory is verified.

    {"seq":7,"time":"...","kind":"request", ... ,"prev":"<SHA-256 of line 6>","mac":"<HMAC-SHA-256 of all before>"}

    <dir>/audit-000001.jsonl ...   the lines; the chain goes on from file to file
    <dir>/head                     the last line that is on the drive: its number, SHA-256 and HMAC
    <dir>/key                      the key of the HMACs, unless another file is named

Changing, dropping, inserting or reordering lines without the key breaks a `prev` or a `mac`. Removing the end of
the chain contradicts `head`. Restoring an older directory, `head` included, contradicts an anchor: a line number
and SHA-256 kept elsewhere, for example in the server's log.

Elsewhere: `audit.py` writes the lines; `sealed.py` keeps what a request said, and a line contains only its hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from argosy.directory import Directory
from argosy.errors import ArgosyError, UsageError
from argosy.strict_json import JsonError, parse_json

KEY_BYTES = 32
MAX_LINE_BYTES = 64 << 10
HEAD, KEY = "head", "key"  # names of files
_FILE = re.compile(r"audit-([0-9]{6,12})\.jsonl")
_LINE = re.compile(rb'(\{"seq":.*),"mac":"([0-9a-f]{64})"\}')
_BEGINNING = b'{"seq":'
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_FAULTS = 20
_MAX_HEAD_BYTES = 512


class ChainBroken(ArgosyError):
    """A chain has been altered, or part of it is missing."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Head:
    """A line of the chain, identified by its number and SHA-256. Line 0 stands for the empty chain."""

    seq: int = 0
    sha256: str = "0" * 64

    def __str__(self) -> str:
        return f"{self.seq}:{self.sha256}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Parse `SEQ:SHA256`.

        Raises:
            UsageError: the text is something else.
        """
        seq, _, sha256 = text.strip().partition(":")
        if not re.fullmatch(r"[0-9]{1,15}", seq) or not _SHA256.fullmatch(sha256):
            raise UsageError(
                f"an anchor is SEQ:SHA256, found {text[:100]!a}",
                hint="the server's log has one an hour, after 'audit anchor'",
            )
        return cls(int(seq), sha256)


# ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def seal(
    key: bytes, head: Head, kind: str, facts: Mapping[str, object], written_at: float
) -> tuple[bytes, Head]:
    """Write the line after `head`.

    Args:
        facts: JSON values; the names seq, time, kind, prev and mac are reserved.
        written_at: seconds since 1970.

    Returns:
        The line with its newline, and the new head.

    Raises:
        ValueError: the line would be longer than MAX_LINE_BYTES.
    """
    body = {"seq": head.seq + 1, "time": time_text(written_at), "kind": kind, **facts, "prev": head.sha256}
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()[:-1]
    line = text + b',"mac":"' + _mac(key, text).encode() + b'"}'
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"an audit line would have {len(line)} bytes; the most is {MAX_LINE_BYTES}")
    return line + b"\n", Head(head.seq + 1, hashlib.sha256(line).hexdigest())


@dataclass(frozen=True, slots=True)
class Line:
    """A line whose HMAC is valid, or was not checked for lack of a key."""

    head: Head
    prev: str
    kind: str
    facts: Mapping[str, Any]  # all of it

    def time(self, name: str = "time") -> float:
        """When the line was written, or another of its times, in seconds since 1970.

        Raises:
            ValueError: the line has no such time.
        """
        try:
            return datetime.fromisoformat(self.facts[name]).timestamp()
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"its {name} is not a time") from None


def open_line(line: bytes, key: bytes | None) -> Line:
    """Parse a line, given without its newline. Without a key, its HMAC is not checked.

    Raises:
        ValueError: it is not a line that `seal` wrote with this key; the message says why.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError("it is not a line of an audit chain")
    text, mac = found[1], found[2].decode()
    if key is not None and not hmac.compare_digest(_mac(key, text), mac):
        raise ValueError("its HMAC is wrong: the line was changed, or written with another key")
    try:
        facts = parse_json(line)
    except JsonError as error:
        raise ValueError(str(error)) from None
    assert isinstance(facts, dict)  # it begins with {
    seq, prev, kind = facts.get("seq"), facts.get("prev"), facts.get("kind")
    if type(seq) is not int or not isinstance(prev, str) or not isinstance(kind, str):
        raise ValueError("it lacks seq, prev or kind")
    return Line(Head(seq, hashlib.sha256(line).hexdigest()), prev, kind, facts)


def time_text(seconds: float) -> str:
    """A time in seconds since 1970, in the notation of the lines."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _mac(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def seal_head(key: bytes, head: Head) -> bytes:
    """The content of the file `head`; its length depends only on the number of digits."""
    text = f"{head}\n".encode()
    return text + _mac(key, b"head " + text).encode() + b"\n"


def read_head(directory: Path, key: bytes | None) -> Head:
    """The stored head.

    Raises:
        UsageError: it is missing, damaged, or was written with another key.
    """
    path = directory / HEAD
    try:
        with Directory(directory) as opened:
            data = opened.read(HEAD, _MAX_HEAD_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    text, newline, rest = data.partition(b"\n")
    try:
        head = Head.parse(text.decode("ascii", "replace"))
    except UsageError:
        raise UsageError(f"{path} is damaged") from None
    if key is not None and seal_head(key, head) != text + newline + rest:
        raise UsageError(f"{path} was changed, or written with another key")
    return head


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_name(number: int) -> str:
    return f"audit-{number:06}.jsonl"


def chain_files(directory: Path) -> list[tuple[int, Path]]:
    """The files of a chain, oldest first, with their numbers.

    Raises:
        UsageError: the directory cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            found = [
                (int(match[1]), Path(entry.path))
                for entry in entries
                if (match := _FILE.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False)
            ]
    except OSError as error:
        raise UsageError(f"{directory} cannot be read: {error.strerror}") from None
    return sorted(found)


@dataclass(frozen=True, slots=True)
class End:
    """The end of a file: its last whole line, and what follows it.

    line: None if the file contains no whole line.
    whole_bytes: the size of the file up to and including its last newline.
    """

    line: bytes | None
    whole_bytes: int
    cut: bytes


def read_end(path: Path) -> End:
    """Read the end of a file, at most the two longest lines of it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(0, size - 2 * MAX_LINE_BYTES)
        file.seek(begin)
        data = file.read(size - begin)
    whole, newline, cut = data.rpartition(b"\n")
    if not newline:
        return End(None, 0, cut)
    return End(whole.rpartition(b"\n")[2], size - len(cut), cut)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their newlines. One that is too long comes in parts, none of which is valid."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            yield line


# ── verification ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class ChainReport:
    """The findings of `verify`.

    Attributes:
        faults: at most 20, a sentence each; empty if the chain is valid.
        num_faults: the total number of faults.
        notes: changes that the writer recorded or a crash caused.
        kinds: number of lines by their kind.
        num_lost: requests that the writer says it could not record.
        num_refused: requests without a valid key.
        num_unkept: contents that the writer says it could not keep.
    """

    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    notes: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    num_files: int = 0
    first: Line | None = None
    last: Line | None = None
    num_lost: int = 0
    num_refused: int = 0
    num_unkept: int = 0
    num_objects: int = 0  # contents found
    num_erased: int = 0  # contents that are gone, with a line that explains it
    num_missing: int = 0  # contents that are gone without explanation

    @property
    def is_valid(self) -> bool:
        return not self.num_faults

    def add_fault(self, text: str) -> None:
        self.num_faults += 1
        if self.num_faults <= _MOST_FAULTS:
            self.faults.append(text)


# (key id, request id, SHA-256) -> whether the content matches; None: it is gone.
CheckObject = Callable[[str, str, str], "bool | None"]


def verify(
    directory: Path,
    key: bytes | None,
    *,
    anchors: Sequence[Head] = (),
    check_object: CheckObject | None = None,
    see: Callable[[Line], None] = lambda line: None,
) -> ChainReport:
    """Read a whole chain and check it. A server may be writing to it.

    Args:
        key: None: only the hashes are checked, and anyone who can write the files can recompute those.
        anchors: heads that were kept elsewhere.
        check_object: tells whether a request's content matches its hash.
        see: called with every valid line, in order.

    Raises:
        UsageError: the directory cannot be read.
    """
    report = ChainReport()
    stored: Head | None = None
    try:
        stored = read_head(directory, key)  # read first, so that lines written meanwhile come after it
    except UsageError as error:
        report.add_fault(error.message)
    reader = _Reader(directory, key, report, [*anchors, *([] if stored is None else [stored])])
    contents = None if check_object is None else _Contents(check_object, report)
    for line in reader.lines():
        see(line)
        if contents is not None:
            contents.take(line)
    if contents is not None:
        contents.end()
    reader.check_ends(stored, anchors)
    if key is None:
        report.notes.append("the HMACs were not checked, because no key was given")
    elif report.num_faults and not report.kinds:
        report.notes.append("no line is valid: is this the right key?")
    return report


class _Contents:
    """Checks the contents that lines name: each is there, has expired, or was erased with its key."""

    def __init__(self, check_object: CheckObject, report: ChainReport) -> None:
        self._check_object, self._report = check_object, report
        self._keep_s: float | None = None  # the shortest retention that a writer declared; None: none did
        self._missing: dict[str, list[float]] = {}  # key -> times of lines whose contents are gone

    def take(self, line: Line) -> None:
        """Take the next line."""
        content, report = line.facts.get("content"), self._report
        if line.kind == "erased":
            report.num_erased += len(self._missing.pop(str(line.facts.get("key")), ()))
        keep_s = line.facts.get("content_keep_s")
        if line.kind == "start" and isinstance(keep_s, int | float):
            self._keep_s = keep_s if self._keep_s is None else min(keep_s, self._keep_s)
        if not isinstance(content, dict):
            return
        names = line.facts.get("key"), line.facts.get("request_id"), content.get("sha256")
        if not all(isinstance(name, str) for name in names):
            report.add_fault(f"line {line.head.seq}: it does not name its content")
            return
        is_same = self._check_object(*names)  # type: ignore[arg-type]
        if is_same is None:
            self._miss(line, str(names[0]))
            return
        report.num_objects += 1
        if not is_same:
            report.add_fault(f"the content of {names[1]} was changed")

    def _miss(self, line: Line, key_id: str) -> None:
        try:
            written_at = line.time()
        except ValueError as error:
            self._report.add_fault(f"line {line.head.seq}: {error}")
            return
        # A writer that declared no retention gets the benefit of the doubt.
        if self._keep_s is None or written_at + self._keep_s <= time.time():
            self._report.num_erased += 1
        else:
            self._missing.setdefault(key_id, []).append(written_at)

    def end(self) -> None:
        """Count the contents whose absence no line explains."""
        assert self._keep_s is not None or not self._missing
        for written_at in (one for found in self._missing.values() for one in found):
            has_expired = self._keep_s is not None and written_at + self._keep_s <= time.time()
            self._report.num_erased += has_expired
            self._report.num_missing += not has_expired
        if self._report.num_missing:
            self._report.notes.append(
                f"{self._report.num_missing} contents are missing: they have not expired, and no line says that they "
                "were erased"
            )


class _Reader:
    """Reads the files of a chain from the first line to the last one."""

    def __init__(
        self, directory: Path, key: bytes | None, report: ChainReport, wanted: Sequence[Head]
    ) -> None:
        self._directory, self._key, self._report = directory, key, report
        self._wanted = {head.seq: "" for head in wanted}  # filled in with their SHA-256 as lines are read
        self._expired: dict[
            tuple[object, object], Line
        ] = {}  # keyed by (seq, SHA-256) of a removed file's last line
        self._head: Head | None = None
        self._begins_after = Head()
        self._cut = b""

    def lines(self) -> Iterator[Line]:
        files = chain_files(self._directory)
        self._report.num_files = len(files)
        for at, (_, path) in enumerate(files):
            for number, line in enumerate(_lines(path), 1):
                where = f"{path.name} line {number}"
                if not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES and at == len(files) - 1:
                    self._cut = line
                elif (found := self._take(line.removesuffix(b"\n"), where)) is not None:
                    yield found

    def _take(self, line: bytes, where: str) -> Line | None:
        report, before = self._report, self._head
        try:
            found = open_line(line, self._key)
        except ValueError as error:
            report.add_fault(f"{where}: {error}")
            # Continue after it, so that one altered line is not reported many times.
            self._head = None if before is None else Head(before.seq + 1, hashlib.sha256(line).hexdigest())
            return None
        if report.first is None:
            report.first, self._begins_after = found, Head(found.head.seq - 1, found.prev)
        elif before is not None and (found.head.seq, found.prev) != (before.seq + 1, before.sha256):
            report.add_fault(f"{where}: line {found.head.seq} of the chain does not follow line {before.seq}")
        self._head = found.head
        report.last = found
        report.kinds[found.kind] += 1
        if found.head.seq in self._wanted:
            self._wanted[found.head.seq] = found.head.sha256
        if found.kind == "expired":
            self._take_expired(found)
        if isinstance(lost := found.facts.get("lost"), int):
            report.num_lost += lost
        if found.kind == "refused" and isinstance(refused := found.facts.get("requests"), int):
            report.num_refused += refused
        report.num_unkept += "content_fault" in found.facts
        if isinstance(cut := found.facts.get("cut_bytes"), int) and cut:
            report.notes.append(
                f"line {found.head.seq}: the process before ended within a line, which is lost"
            )
        return found

    def _take_expired(self, line: Line) -> None:
        """Note the last line of a removed file, and check that it had expired."""
        self._expired[line.facts.get("last_seq"), line.facts.get("last_sha256")] = line
        if "last_time" not in line.facts:  # an older writer removed files by their file-system time
            return
        try:
            is_old = line.time("last_time") <= line.time("before")
        except ValueError as error:
            self._report.add_fault(f"line {line.head.seq}: {error}")
            return
        if not is_old:
            name, last_time, before = (line.facts.get(name) for name in ("file", "last_time", "before"))
            self._report.add_fault(
                f"line {line.head.seq}: {name} was removed too early: its last line is of {last_time},"
                f" and only lines before {before} had expired"
            )

    def check_ends(self, stored: Head | None, anchors: Sequence[Head]) -> None:
        """Check both ends of the chain, which the lines alone cannot prove."""
        report, last = self._report, Head() if self._report.last is None else self._report.last.head
        begin = self._begins_after
        expired = self._expired.get((begin.seq, begin.sha256))
        if begin.seq and expired is not None:
            written = expired.facts.get("last_time", "a time that no line proves")
            report.notes.append(
                f"lines 1 to {begin.seq} have expired; the last of them was written at {written}"
            )
        elif begin.seq:
            report.add_fault(f"lines 1 to {begin.seq} are missing, and no line says that they expired")
        elif begin.sha256 != Head().sha256:
            report.add_fault("line 1 does not begin a chain")
        for head, what in (
            *((head, "the anchor") for head in anchors),
            *(((stored, HEAD),) if stored else ()),
        ):
            if head.seq > last.seq:
                lost = head.seq - last.seq
                report.add_fault(
                    f"{what} says that line {head.seq} was written, and the last {lost} of them are missing"
                )
            elif head.seq < begin.seq:
                report.notes.append(f"{what} names line {head.seq}, which has expired")
            elif (begin.sha256 if head.seq == begin.seq else self._wanted[head.seq]) != head.sha256:
                report.add_fault(f"{what} and line {head.seq} do not agree")
        if self._cut:
            self._check_cut(last)

    def _check_cut(self, last: Head) -> None:
        """Check what follows the last line: a crash can leave only the beginning of a line, a clean stop nothing."""
        begin = _BEGINNING + f"{last.seq + 1},".encode()
        is_stopped = self._report.last is not None and self._report.last.kind == "stop"
        length = min(len(begin), len(self._cut))
        if is_stopped or self._cut[:length] != begin[:length]:
            self._report.add_fault(f"{len(self._cut)} bytes after line {last.seq} are not part of the chain")
        else:
            self._report.notes.append(
                f"the line after {last.seq} is cut: it is being written, or a crash cut it"
            )
