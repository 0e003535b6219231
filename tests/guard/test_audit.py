"""An audit cannot be changed unnoticed, loses nothing that it does not count, and survives kills and full drives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from argosy.errors import Overloaded, UsageError
from argosy.guard import audit as audit_module
from argosy.guard import chain_writer
from argosy.guard.audit import MOST_WAITING, Audit, AuditSettings, Content, check_audit
from argosy.guard.chain import KEY_BYTES, MAX_LINE_BYTES, ChainReport, Head, chain_files, read_head, verify
from argosy.guard.chain_writer import ChainWriter
from argosy.guard.sealed import SealedContents

DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def facts(number: int, key: str = "key-a") -> dict[str, object]:
    return {
        "key": key,
        "request_id": f"req_{number:024x}",
        "route": "/v1/chat/completions",
        "new_tokens": number,
    }


@contextlib.contextmanager
def auditing(directory: Path, **settings: object) -> Iterator[Audit]:
    clock = settings.pop("clock", time.time)
    reports, heads = settings.pop("reports", []), settings.pop("heads", [])
    audit = Audit(
        AuditSettings(directory=directory, **settings),  # type: ignore[arg-type]
        facts={"version": "1"}, report=reports.append, announce=heads.append, clock=clock,  # type: ignore[arg-type,attr-defined]
    )  # fmt: skip
    try:
        yield audit
    finally:
        audit.close()


def facts_of(path: Path) -> tuple[int, int, int, int]:
    """What a change of a file would change; reading it changes none of these."""
    found = path.lstat()
    return found.st_mtime_ns, found.st_ino, found.st_mode, found.st_size


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def key_of(directory: Path) -> bytes:
    return (directory / "key").read_bytes()


def check(directory: Path, *anchors: Head) -> ChainReport:
    key = key_of(directory)
    return verify(directory, key, anchors=anchors, check_object=SealedContents(directory, key).is_same)


def make_chain(directory: Path, clock: Clock) -> ChainWriter:
    return ChainWriter(directory, None, max_file_bytes=1000, max_file_s=1e9, clock=clock)


def fill(chain: ChainWriter, clock: Clock, count: int) -> None:
    """Append lines, a day apart."""
    for number in range(count):
        chain.append("request", facts(number))
        clock.now += DAY_S
    chain.sync()


def write(directory: Path, count: int, **settings: object) -> Head:
    """Write so many requests, and close; returns the head."""
    with auditing(directory, **settings) as audit:
        for number in range(count):
            audit.record(facts(number))
    return audit.head


def test_lines_have_the_facts_in_order_and_are_valid(tmp_path: Path) -> None:
    heads: list[Head] = []
    head = write(tmp_path / "audit", 3, heads=heads)
    report = check(tmp_path / "audit", head)
    assert report.is_valid, report.faults
    assert dict(report.kinds) == {"start": 1, "anchor": 1, "request": 3, "stop": 1}
    lines = [
        json.loads(line)
        for _, path in chain_files(tmp_path / "audit")
        for line in path.read_text().splitlines()
    ]
    assert [line["new_tokens"] for line in lines if line["kind"] == "request"] == [0, 1, 2]
    assert heads[-1] == head == read_head(tmp_path / "audit", key_of(tmp_path / "audit"))


def test_only_its_owner_can_read_an_audit(tmp_path: Path) -> None:
    write(tmp_path / "audit", 1)
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "audit").iterdir()} == {0o600}
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(UsageError, match="other users can access it"):
        check_audit(AuditSettings(directory=tmp_path / "open"))


def test_the_chain_goes_on_over_files_and_processes(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    for _ in range(3):
        head = write(directory, 20, max_file_bytes=2000)
    assert len(chain_files(directory)) > 5
    report = check(directory, head)
    assert report.is_valid, report.faults
    assert report.kinds["request"] == 60


def test_a_file_ends_with_its_day(tmp_path: Path) -> None:
    directory, clock = tmp_path / "audit", Clock()
    write(directory, 1, clock=clock)
    clock.now += DAY_S + 1
    write(directory, 1, clock=clock)
    assert len(chain_files(directory)) == 2
    assert check(directory).is_valid


def test_two_servers_cannot_write_the_same_audit(tmp_path: Path) -> None:
    with auditing(tmp_path / "audit"), pytest.raises(UsageError, match="in use by another process"):
        check_audit(AuditSettings(directory=tmp_path / "audit"))


def test_an_audit_without_its_key_or_head_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path / "audit", 1)
    for name, message in (("key", "its key .* is missing"), ("head", "head cannot be read")):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "audit", copy)
        (copy / name).unlink()
        with pytest.raises(UsageError, match=message):
            check_audit(AuditSettings(directory=copy))


def test_the_next_file_is_made_again_if_the_drive_refused_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    chain = make_chain(tmp_path / "audit", clock)
    fill(chain, clock, 2)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    open_before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            fill(chain, clock, 9)
    assert len(os.listdir("/proc/self/fd")) == open_before
    fill(chain, clock, 9)
    chain.close()
    assert len(chain_files(tmp_path / "audit")) > 2
    assert check(tmp_path / "audit").is_valid


def test_a_pipe_in_the_place_of_the_head_is_a_fault_and_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "audit", 1)
    (tmp_path / "audit" / "head").unlink()
    os.mkfifo(tmp_path / "audit" / "head")
    assert check(tmp_path / "audit").faults == [
        f"{tmp_path / 'audit' / 'head'} cannot be read: it is not a regular file"
    ]


def test_a_key_may_lie_elsewhere_and_another_key_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "audit", 1, key_file=tmp_path / "my.key")
    assert not (tmp_path / "audit" / "key").exists()
    key = (tmp_path / "my.key").read_bytes()
    assert len(key) == KEY_BYTES
    assert verify(tmp_path / "audit", key).is_valid
    other = verify(tmp_path / "audit", bytes(32))
    assert not other.is_valid
    assert "is this the right key?" in other.notes[-1]
    (tmp_path / "other.key").write_bytes(bytes(32))
    (tmp_path / "other.key").chmod(0o600)
    with pytest.raises(UsageError, match="damaged"):
        check_audit(AuditSettings(directory=tmp_path / "audit", key_file=tmp_path / "other.key"))


# ── tampering ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Tampering:
    """Changes of a directory, each by somebody who can write the files and does not have the key."""

    def __init__(self, directory: Path, random: random.Random) -> None:
        self.directory, self._random = directory, random
        self._files = [path for _, path in chain_files(directory)]

    def _lines(self, path: Path) -> list[bytes]:
        return path.read_bytes().splitlines(keepends=True)

    def _some_file(self) -> tuple[Path, list[bytes]]:
        path = self._random.choice(self._files)
        return path, self._lines(path)

    def edit_a_byte(self) -> None:
        path = self._random.choice(self._files)
        data = bytearray(path.read_bytes())
        data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        path.write_bytes(data)

    def edit_a_fact(self) -> None:
        path, lines = self._some_file()
        at = self._random.randrange(len(lines))
        facts = json.loads(lines[at])
        facts["kind" if "key" not in facts else "key"] = "other"
        lines[at] = json.dumps(facts, separators=(",", ":")).encode() + b"\n"
        path.write_bytes(b"".join(lines))

    def drop_lines(self) -> None:
        path, lines = self._some_file()
        at = self._random.randrange(len(lines))
        del lines[at : at + self._random.randint(1, 3)]
        path.write_bytes(b"".join(lines))

    def swap_lines(self) -> None:
        path, lines = self._some_file()
        while len(lines) < 2:
            path, lines = self._some_file()
        one, other = self._random.sample(range(len(lines)), 2)
        lines[one], lines[other] = lines[other], lines[one]
        path.write_bytes(b"".join(lines))

    def repeat_a_line(self) -> None:
        path, lines = self._some_file()
        lines.insert(self._random.randint(0, len(lines)), self._random.choice(lines))
        path.write_bytes(b"".join(lines))

    def insert_a_line(self) -> None:
        path, lines = self._some_file()
        at = self._random.randint(0, len(lines))
        near = json.loads(lines[min(at, len(lines) - 1)])
        near["seq"] += self._random.choice([0, 1])
        near["mac"] = f"{self._random.getrandbits(256):064x}"
        lines.insert(at, json.dumps(near, separators=(",", ":")).encode() + b"\n")
        path.write_bytes(b"".join(lines))

    def cut_within_a_line(self) -> None:
        path = self._random.choice(self._files)
        size = path.stat().st_size
        os.truncate(path, self._random.randint(1, size - 1))

    def cut_the_last_line(self) -> None:
        path = self._files[-1]
        last = self._lines(path)[-1]
        os.truncate(path, path.stat().st_size - self._random.randint(1, len(last)))

    def cut_the_tail(self) -> None:
        """Remove whole lines, and files, from the end."""
        keep = self._random.randrange(len(self._files))
        for path in self._files[keep + 1 :]:
            path.unlink()
        path = self._files[keep]
        lines = self._lines(path)
        path.write_bytes(b"".join(lines[: self._random.randrange(len(lines))]))

    def remove_the_beginning(self) -> None:
        for path in self._files[: self._random.randint(1, len(self._files) - 1)]:
            path.unlink()

    def remove_a_file(self) -> None:
        self._random.choice(self._files).unlink()

    def swap_files(self) -> None:
        one, other = self._random.sample(self._files, 2)
        beside = self.directory / "beside"
        one.rename(beside)
        other.rename(one)
        beside.rename(other)

    def append_bytes(self) -> None:
        with self._files[-1].open("ab") as file:
            file.write(self._random.choice([b"\n", b"{}", b'{"seq":', b"x" * (MAX_LINE_BYTES + 9)]))

    def change_the_head(self) -> None:
        path = self.directory / "head"
        data = bytearray(path.read_bytes())
        data[self._random.randrange(len(data))] ^= 1
        path.write_bytes(data)

    def remove_the_head(self) -> None:
        (self.directory / "head").unlink()


KINDS = sorted(name for name in vars(Tampering) if not name.startswith("_"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of some files, closed in an orderly way."""
    directory = tmp_path_factory.mktemp("sound") / "audit"
    for _ in range(2):
        write(directory, 12, max_file_bytes=1500)
    assert check(directory).is_valid
    return directory


@pytest.mark.parametrize("num_tamperings", [120, pytest.param(1000, marks=pytest.mark.full)])
def test_tamperings_are_all_detected(num_tamperings: int, sound: Path, tmp_path: Path) -> None:
    key = key_of(sound)
    missed = []
    for number in range(num_tamperings):
        copy = tmp_path / str(number)
        shutil.copytree(sound, copy)
        kind = KINDS[number % len(KINDS)]
        getattr(Tampering(copy, random.Random(number)), kind)()
        if verify(copy, key).is_valid:
            missed.append((kind, number))
        shutil.rmtree(copy)
    assert missed == []
    assert len(KINDS) == 15


def test_an_older_copy_of_everything_contradicts_an_anchor(sound: Path, tmp_path: Path) -> None:
    copy = tmp_path / "audit"
    shutil.copytree(sound, copy)
    anchor = write(copy, 3)
    assert check(copy, anchor).is_valid
    key = key_of(sound)
    assert verify(sound, key).is_valid  # by itself, the older copy is
    (fault,) = verify(sound, key, anchors=[anchor]).faults
    assert fault.startswith(f"the anchor says that line {anchor.seq} was written")
    (fault,) = verify(sound, key, anchors=[Head(5, "f" * 64)]).faults
    assert fault == "the anchor and line 5 do not agree"


def test_a_chain_that_lost_its_end_is_not_continued(sound: Path, tmp_path: Path) -> None:
    copy = tmp_path / "audit"
    shutil.copytree(sound, copy)
    Tampering(copy, random.Random(1)).cut_the_last_line()
    with pytest.raises(UsageError, match="damaged: head names line"):
        check_audit(AuditSettings(directory=copy))


def test_lines_of_another_audit_with_the_same_key_do_not_fit(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, 5, key_file=tmp_path / "key")
    key = (tmp_path / "key").read_bytes()
    one, other = (tmp_path / name / "audit-000001.jsonl" for name in ("one", "other"))
    lines = one.read_bytes().splitlines(keepends=True)
    lines[3] = other.read_bytes().splitlines(keepends=True)[3]
    one.write_bytes(b"".join(lines))
    assert not verify(tmp_path / "one", key).is_valid


# ── contents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_contents_are_encrypted_and_erasing_them_leaves_the_chain_valid(tmp_path: Path) -> None:
    directory, released = tmp_path / "audit", []
    with auditing(directory, with_content=True) as audit:
        for number, key in enumerate(("key-a", "key-a", "key-b")):
            said = Content([f"secret {number}".encode()], lambda number=number: released.append(number))  # type: ignore[misc]
            audit.record(facts(number, key), said)
        wait_for(lambda: len(released) == 3)
        contents = SealedContents(directory, key_of(directory))
        assert contents.get("key-a", facts(1)["request_id"]) == b"secret 1"  # type: ignore[arg-type]
        assert audit.erase("key-a") == 2
        assert audit.erase("key-a") == 0
    assert contents.get("key-a", facts(1)["request_id"]) is None  # type: ignore[arg-type]
    assert contents.get("key-b", facts(2)["request_id"]) == b"secret 2"  # type: ignore[arg-type]
    report = check(directory, audit.head)
    assert report.is_valid, report.faults
    assert (report.num_objects, report.num_erased, report.kinds["erased"]) == (1, 2, 2)
    everything = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    assert b"secret" not in everything


def test_erasing_only_the_key_of_a_tenant_makes_its_contents_unreadable(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    with auditing(directory, with_content=True) as audit:
        audit.record(facts(1), Content([b"secret"], lambda: None))
    (wrapped,) = (directory / "content").glob("*/key")
    wrapped.unlink()
    contents = SealedContents(directory, key_of(directory))
    assert contents.get("key-a", facts(1)["request_id"]) is None  # type: ignore[arg-type]
    report = check(directory)
    assert report.is_valid
    assert (report.num_erased, report.num_missing) == (0, 1)


def test_a_content_that_is_not_there_is_missing_unless_it_has_expired_or_its_key_was_erased(
    tmp_path: Path,
) -> None:
    directory, clock, settings = (
        tmp_path / "audit",
        Clock(),
        {"with_content": True, "content_keep_s": 10 * DAY_S},
    )
    clock.now = time.time() - 11 * DAY_S
    with auditing(directory, clock=clock, **settings) as audit:
        audit.record(facts(1), Content([b"secret"], lambda: None))
    clock.now = time.time() - 1 * DAY_S
    with auditing(directory, clock=clock, **settings) as audit:
        for number, key in ((2, "key-a"), (3, "key-a"), (4, "key-b")):
            audit.record(facts(number, key), Content([b"secret"], lambda: None))
        wait_for(lambda: len(list((directory / "content").glob("*/req_*"))) == 4)
        for number in (1, 2, 4):
            (path,) = (directory / "content").glob(f"*/{facts(number)['request_id']}")
            path.unlink()
        report = check(directory)
        assert (report.num_objects, report.num_erased, report.num_missing) == (1, 1, 2)
        assert "2 contents are missing: they have not expired" in report.notes[-1]
        audit.erase("key-a")
    report = check(directory)
    assert report.is_valid
    assert (report.num_objects, report.num_erased, report.num_missing) == (0, 3, 1)


def test_a_changed_content_is_detected(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    with auditing(directory, with_content=True) as audit:
        audit.record(facts(1), Content([b"secret"], lambda: None))
    (path,) = (directory / "content").glob("*/req_*")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert check(directory).faults == [f"the content of {facts(1)['request_id']} was changed"]
    with pytest.raises(UsageError, match="was changed"):
        SealedContents(directory, key_of(directory)).get("key-a", facts(1)["request_id"])  # type: ignore[arg-type]


def test_what_a_kill_left_of_a_content_goes_with_the_next_sweep(tmp_path: Path) -> None:
    with auditing(tmp_path / "audit", with_content=True) as audit:
        audit.record(facts(1), Content([b"secret"], lambda: None))
    (kept,) = (tmp_path / "audit" / "content").glob("*/req_*")
    for name in (f".{kept.name}.new", ".key.new"):
        kept.with_name(name).write_bytes(b"half of it")
    SealedContents(tmp_path / "audit", key_of(tmp_path / "audit")).sweep(0.0)
    assert sorted(path.name for path in kept.parent.iterdir()) == ["key", kept.name]


def test_requests_are_recorded_though_the_key_of_their_contents_is_damaged(tmp_path: Path) -> None:
    directory, said = tmp_path / "audit", list[str]()
    with auditing(directory, with_content=True, reports=said) as audit:
        audit.record(facts(1), Content([b"secret"], lambda: None))
        audit.record(facts(1, "key-b"), Content([b"secret"], lambda: None))
        wait_for(lambda: len(list((directory / "content").glob("*/req_*"))) == 2)
        path = tmp_path / "audit" / audit._contents._directory("key-a") / "key"
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
        released: list[int] = []
        for number in range(2, 5):
            audit.record(facts(number), Content([b"secret"], lambda number=number: released.append(number)))  # type: ignore[misc]
    report = check(directory)
    assert report.is_valid, report.faults
    assert (report.kinds["request"], report.num_lost, report.num_unkept) == (5, 0, 3)
    assert released == [2, 3, 4]
    (line,) = said
    assert "contents of key-a cannot be kept" in line
    assert "a key of contents of the audit was changed" in line


def test_what_has_expired_is_removed_and_the_rest_stays_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "audit"
    monkeypatch.setattr(audit_module, "_SYNC_S", 0.0)
    clock = Clock()
    clock.now = time.time()
    with auditing(directory, with_content=True, max_file_bytes=1500, clock=clock) as audit:
        for number in range(12):
            audit.record(facts(number), Content([b"secret"], lambda: None))
    files = chain_files(directory)
    clock.now += 40 * DAY_S
    with auditing(directory, keep_s=35 * DAY_S, content_keep_s=30 * DAY_S, clock=clock):
        wait_for(lambda: len(chain_files(directory)) == 1)
    report = check(directory)
    assert report.is_valid, report.faults
    assert report.kinds["expired"] == len(files)
    assert any("have expired; the last of them was written at 20" in note for note in report.notes)
    assert list((directory / "content").glob("*/req_*")) == []
    chain_files(directory)[0][1].unlink()
    assert not check(directory).is_valid


@pytest.mark.parametrize("touched", [0.0, 1e10])
def test_the_time_of_a_line_decides_when_its_file_expires_not_the_time_of_the_file(
    tmp_path: Path, touched: float
) -> None:
    clock = Clock()
    with contextlib.closing(make_chain(tmp_path / "audit", clock)) as chain:
        fill(chain, clock, 12)
        files = chain_files(tmp_path / "audit")
        for _, path in files:
            os.utime(path, (touched, touched))
        assert chain.expire(Clock().now) == 0
        assert chain.expire(clock.now) >= len(files) - 1
        assert verify(tmp_path / "audit", chain.key).is_valid


def test_verify_finds_a_file_that_was_removed_before_its_lines_were_old(tmp_path: Path) -> None:
    clock = Clock()
    with contextlib.closing(make_chain(tmp_path / "audit", clock)) as chain:
        fill(chain, clock, 3)
        times = {"last_time": "2027-01-15T08:00:00+00:00", "before": "2026-01-15T08:00:00+00:00"}
        chain.append("expired", {"file": "audit-000001.jsonl", "last_seq": 1, "last_sha256": "0", **times})
        chain.append(
            "expired", {"file": "audit-000001.jsonl", "last_seq": 1, "last_sha256": "0", "last_time": 7}
        )
        chain.sync()
        faults = verify(tmp_path / "audit", chain.key).faults
    assert ["removed too early" in fault for fault in faults] == [True, False]
    assert "its last_time is not a time" in faults[1]


# ── full drives, slow drives ────────────────────────────────────────────────────────────────────────────────────────


class Drive:
    """Lets writes fail while it is full: half of a line is written first, as a drive may do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self._pwrite = os.pwrite
        monkeypatch.setattr(chain_writer.os, "pwrite", self.pwrite)

    def pwrite(self, file: int, data: bytes, at: int) -> int:
        if self.is_full:
            if len(data) > 100:
                return self._pwrite(file, data[: len(data) // 2], at) if len(data) > 300 else self._fail()
            self._fail()
        return self._pwrite(file, data, at)

    def _fail(self) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Drive:
    monkeypatch.setattr(audit_module, "_RETRY_S", 0.01)
    monkeypatch.setattr(audit_module, "_SYNC_S", 0.01)
    return Drive(monkeypatch)


def test_a_full_drive_stops_new_requests_until_lines_can_be_written(tmp_path: Path, drive: Drive) -> None:
    reports: list[str] = []
    with auditing(tmp_path / "audit", when_full="stop", reports=reports) as audit:
        audit.record(facts(0))
        audit.require_room()
        wait_for(lambda: audit.head.seq >= 2)
        drive.is_full = True
        audit.record(facts(1))
        wait_for(lambda: bool(reports))
        with pytest.raises(Overloaded, match="the audit cannot be written"):
            audit.require_room()
        audit.record(facts(2))  # it was running already
        drive.is_full = False
        wait_for(lambda: len(reports) == 2)
        audit.require_room()
    assert reports == [
        "audit: lines cannot be written, so new requests are refused: No space left on device",
        "audit: lines can be written again",
    ]
    report = check(tmp_path / "audit", audit.head)
    assert report.is_valid, report.faults
    assert (report.kinds["request"], report.num_lost) == (3, 0)


def test_a_full_drive_found_by_an_anchor_does_not_stop_requests_for_ever(
    tmp_path: Path, drive: Drive
) -> None:
    clock = Clock()
    with auditing(tmp_path / "audit", when_full="stop", clock=clock) as audit:
        wait_for(lambda: audit.head.seq == 2)
        drive.is_full = True
        clock.now += audit_module.ANCHOR_S + 1
        audit._items.put(audit_module._Entry("note", {}))  # wakes the thread
        wait_for(lambda: audit._fault is not None)
        drive.is_full = False
        wait_for(lambda: audit._fault is None)
        audit.require_room()
    assert check(tmp_path / "audit").is_valid


def test_a_full_drive_lets_requests_go_on_uncounted_lines_are_counted(tmp_path: Path, drive: Drive) -> None:
    with auditing(tmp_path / "audit", when_full="degrade") as audit:
        wait_for(lambda: audit.head.seq == 2)
        drive.is_full = True
        for number in range(7):
            audit.record(facts(number))
            audit.require_room()
        wait_for(lambda: audit._num_lost == 7)
        drive.is_full = False
        audit.record(facts(7))
        wait_for(lambda: not audit._num_lost)
    report = check(tmp_path / "audit", audit.head)
    assert report.is_valid, report.faults
    assert (report.num_lost, report.kinds["request"], report.kinds["gap"]) == (7, 1, 1)


def test_a_drive_that_hangs_costs_lines_that_are_counted_and_never_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    released: list[int] = []
    with auditing(tmp_path / "audit", when_full="stop") as audit:
        wait_for(lambda: audit.head.seq == 2)
        append = audit._chain.append
        monkeypatch.setattr(audit._chain, "append", lambda *a: (goes_on.wait(20), append(*a))[1])
        for number in range(MOST_WAITING + 10):
            audit.record(
                facts(number), Content([b""], lambda: released.append(1)) if number > MOST_WAITING else None
            )
        with pytest.raises(Overloaded):
            audit.require_room()
        assert len(released) >= 8
        goes_on.set()
    report = check(tmp_path / "audit", audit.head)
    assert report.is_valid, report.faults
    assert report.kinds["request"] + report.num_lost == MOST_WAITING + 10
    assert report.num_lost >= 8


def test_a_line_that_cannot_be_made_is_lost_alone(tmp_path: Path) -> None:
    reports: list[str] = []
    with auditing(tmp_path / "audit", reports=reports) as audit:
        audit.record({"text": "x" * MAX_LINE_BYTES})
        audit.record(facts(1))
    assert reports == ["audit: a line is lost: ValueError"]
    report = check(tmp_path / "audit", audit.head)
    assert report.is_valid, report.faults
    assert (report.num_lost, report.kinds["request"]) == (1, 1)


# ── kills ───────────────────────────────────────────────────────────────────────────────────────────────────────────

POINTS = 50

# One process that forks a writer for each point, because an interpreter takes longer to start than a writer to end.
_WRITERS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from argosy.guard.chain_writer import ChainWriter

pwrite = os.pwrite

def write(directory, point):
    left = 1 + 2 * point

    def counted(file, data, at):
        # Each write of a line or of the head is a point; the process is killed with a part of it done. The head is
        # smaller than a page, of which the kernel writes all or nothing, whatever signal is pending.
        nonlocal left
        left -= 1
        if left < 0:
            part = point % 4 if data.startswith(b"{") else 4 * (point % 2)
            pwrite(file, data[: len(data) * part // 4], at)
            os.kill(os.getpid(), 9)
        return pwrite(file, data, at)

    os.pwrite = counted
    chain = ChainWriter(directory, None, max_file_bytes=4000, max_file_s=1e9, clock=lambda: 1.8e9)
    with open(f"{directory}.told", "wb", buffering=0) as told:
        for number in range(1000):
            chain.append("request", {"number": number})
            told.write(b"%d\\n" % number)
            if number % 5 == 0:
                chain.sync()

for point in range(int(sys.argv[3])):
    child = os.fork()
    if not child:
        write(Path(sys.argv[2]) / str(point), point)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == 9, (point, status)
"""


def test_a_kill_at_fifty_points_loses_at_most_the_last_line(tmp_path: Path) -> None:
    source = Path(audit_module.__file__).parents[2]
    subprocess.run([sys.executable, "-c", _WRITERS, source, tmp_path, str(POINTS)], check=True, timeout=60)
    num_cut = 0
    for point in range(POINTS):
        directory = tmp_path / str(point)
        told = [int(line) for line in (tmp_path / f"{point}.told").read_text().split()]
        found: list[int] = []
        before = verify(
            directory, key_of(directory), see=lambda line, found=found: found.append(line.facts["number"])  # type: ignore[misc]
        )  # fmt: skip
        assert before.is_valid, (point, before.faults)
        assert found in (told, [*told, len(told)]), point
        write(directory, 1)
        after = check(directory)
        assert after.is_valid, (point, after.faults)
        num_cut += any("ended within a line" in note for note in after.notes)
        assert after.kinds["request"] == len(found) + 1
    assert num_cut >= 10


@pytest.mark.parametrize(
    "place", ["content", "content/TENANT", "content/TENANT/key", "content/.erasing-x", "head"]
)
def test_links_in_an_audit_lead_nowhere(tmp_path: Path, place: str) -> None:
    """Whoever plants one can stop the audit of contents, and cannot have files elsewhere written or removed."""
    directory, victim = tmp_path / "audit", tmp_path / "victim"
    with auditing(directory, with_content=True) as audit:
        audit.record(facts(1), Content([b"secret"], lambda: None))
        wait_for(lambda: len(list((directory / "content").glob("*/req_*"))) == 1)
    contents = SealedContents(directory, key_of(directory))
    planted = directory / place.replace("TENANT", contents._directory("key-a").name)
    if planted.exists():
        planted.rename(victim)
    else:
        victim.mkdir()
        (victim / "key").write_bytes(b"keep")
    planted.symlink_to(victim)
    before = {path: facts_of(path) for path in (victim, *victim.rglob("*"))}
    for act in (
        lambda: contents.put("key-a", "req_" + "0" * 24, b"new"),
        lambda: contents.sweep(time.time() + 100),
        lambda: contents.erase("key-a"),
        lambda: auditing(directory).__enter__(),
    ):
        with contextlib.suppress(OSError, UsageError):
            act()
    assert {path: facts_of(path) for path in before} == before
    assert len(list(victim.rglob("*"))) == len(before) - 1
