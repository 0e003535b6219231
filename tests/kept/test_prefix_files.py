"""Prompts in files are private, bounded, whole or absent, and never trusted without proof."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argosy.config import KvDir
from argosy.directory import Directory
from argosy.errors import UsageError
from argosy.kept import prefix_files
from argosy.kept.kv_cache import BlockContent
from argosy.kept.prefix_files import PrefixFiles, erase_files, forget_files

BLOCK_BYTES, STATE_BYTES = 3000, 5000
IDENTITY = bytes(range(32))


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def content(number: int, tenant: str = "") -> BlockContent:
    return BlockContent(bytes([number]) * 32, bytes([number + 1]) * 32, bytes([number + 2]) * 64, tenant)


def open_files(
    directory: Path, *, clock: Any = time.time, identity: bytes = IDENTITY, **bounds: Any
) -> PrefixFiles:
    return PrefixFiles(
        KvDir(path=directory, **bounds),
        identity=identity,
        block_bytes=BLOCK_BYTES,
        state_bytes=STATE_BYTES,
        clock=clock,
    )


def write(files: PrefixFiles, *contents: BlockContent, kind: Any = "kv") -> None:
    for one in contents:
        value = one.key[0]

        def fill(to: Any, value: int = value) -> None:
            to[:] = value

        until = time.monotonic() + 10
        while not files.offer(kind, one, fill):
            assert time.monotonic() < until
            time.sleep(0.001)
    settle(files)


def settle(files: PrefixFiles) -> None:
    """Wait until no write is pending."""
    buffers = [files._writable.get(timeout=10) for _ in range(2)]
    for buffer in buffers:
        files._writable.put(buffer)


def read(files: PrefixFiles, one: BlockContent, kind: Any = "kv") -> Any:
    (payload,) = files.read(kind, [one])
    return payload


def is_whole(files: PrefixFiles, one: BlockContent, kind: Any = "kv") -> bool:
    payload = read(files, one, kind)
    return payload is not None and bool((payload == one.key[0]).all())


@pytest.fixture
def files(tmp_path: Path) -> Iterator[PrefixFiles]:
    files = open_files(tmp_path / "kv")
    yield files
    files.close()


def test_written_blocks_are_read_by_the_next_process(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    write(files, content(1), content(2), content(1))
    write(files, content(1), kind="state")
    num_bytes, secret = files.num_bytes, files.secret
    files.close()
    files.close()
    files = open_files(tmp_path)
    assert (files.num_bytes, files.secret) == (num_bytes, secret)
    assert is_whole(files, content(1))
    assert is_whole(files, content(2))
    assert is_whole(files, content(1), "state")
    assert not files.has("state", content(2))
    files.close()


def test_blocks_are_read_in_order_and_each_stays_valid_while_in_use(files: PrefixFiles) -> None:
    contents = [content(number) for number in range(9)]
    write(files, *contents[:4], *contents[5:])
    found = []
    for payload in files.read("kv", contents):
        before = None if payload is None else payload.copy()
        time.sleep(0.003)
        assert before is None or (before == payload).all()
        found.append(None if before is None else set(before.tolist()))
    assert found == [{0}, {1}, {2}, {3}, None, {5}, {6}, {7}, {8}]
    reading = files.read("kv", contents)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert is_whole(files, content(8))


def test_four_blocks_are_read_at_once_and_large_states_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wide_open(state_bytes: int) -> PrefixFiles:
        return PrefixFiles(
            KvDir(path=tmp_path), identity=IDENTITY, block_bytes=BLOCK_BYTES, state_bytes=state_bytes
        )

    files = wide_open(state_bytes=100_000)
    contents = [content(number) for number in range(8)]
    write(files, *contents)
    write(files, *contents[:3], kind="state")
    assert len(files._reading) == 106_496  # room for one state or for many blocks
    together, read_one = threading.Barrier(4), prefix_files._read_into

    def read_with_others(root: Directory, path: Path, size: int, buffer: Any) -> bool:
        if path.suffix == ".kv":
            together.wait(timeout=10)  # breaks unless three others read at the same time
        return read_one(root, path, size, buffer)

    monkeypatch.setattr(prefix_files, "_read_into", read_with_others)
    assert [int(payload[0]) for payload in files.read("kv", contents)] == list(range(8))
    assert [int(payload[-1]) for payload in files.read("state", contents[:3])] == [0, 1, 2]
    files.close()


def facts_of(path: Path) -> tuple[int, int, int, int]:
    """What a change of a file would change; reading it changes none of these."""
    found = path.lstat()
    return found.st_mtime_ns, found.st_ino, found.st_mode, found.st_size


def place_of(files: PrefixFiles, content: BlockContent) -> Path:
    return files._root.path / files._path("kv", content)


def test_directories_and_files_are_private_and_names_reveal_nothing(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        files = open_files(tmp_path / "a" / "kv")
        write(files, content(1, "somebody"))
        files.close()
    finally:
        os.umask(previous)
    root = tmp_path / "a" / "kv"
    found = {path.relative_to(root): stat.S_IMODE(path.lstat().st_mode) for path in root.rglob("*")}
    directory = next(path for path in found if (root / path).is_dir())
    assert found == {
        Path("lock"): 0o600,
        Path("secret"): 0o600,
        directory: 0o700,
        directory / f"{'01' * 32}.kv": 0o600,
    }
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert "somebody" not in str(found)


def test_a_directory_that_is_in_use_or_open_to_other_users_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(UsageError, match="other users can access it"):
        open_files(tmp_path / "open")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        open_files(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(UsageError, match="link would hold prompts, and it is a symbolic link") as refusal:
        open_files(tmp_path / "link")
    assert refusal.value.hint == f"name the directory itself: {tmp_path / 'open'}"
    files = open_files(tmp_path / "kv")
    with pytest.raises(UsageError, match="in use by another process"):
        open_files(tmp_path / "kv")
    files.close()
    (tmp_path / "kv" / "secret").write_bytes(b"short")
    with pytest.raises(UsageError, match="holds 5 bytes, expected 32"):
        open_files(tmp_path / "kv")
    (tmp_path / "kv" / "secret").chmod(0o644)
    with pytest.raises(UsageError, match="can be read by others"):
        open_files(tmp_path / "kv")
    (tmp_path / "kv" / "secret").unlink()
    (tmp_path / "kv" / "secret").mkdir()
    with pytest.raises(UsageError, match="kv/secret cannot be used for --kv-dir: it is not a regular file"):
        open_files(tmp_path / "kv")


def test_a_file_moved_from_elsewhere_is_not_trusted(tmp_path: Path) -> None:
    """The file was written for another tenant, model, parent, tokens or kind; its bytes are intact."""
    files = open_files(tmp_path)
    asked = [
        content(1, "other"),
        content(1)._replace(parent=bytes(32)),
        content(1)._replace(tokens=bytes(64)),
        content(1)._replace(key=bytes(32)),
    ]
    for one in asked:
        write(files, content(1))
        written = place_of(files, content(1)).read_bytes()
        path = place_of(files, one)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.write_bytes(written)
        assert read(files, one) is None
        assert not path.exists()
    write(files, content(1))
    files.close()
    files = open_files(tmp_path, identity=bytes(32))
    assert files.has("kv", content(1))
    assert read(files, content(1)) is None
    assert not files.has("kv", content(1))
    files.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_file_with_any_byte_changed_is_not_trusted(files: PrefixFiles, at: int, change: int) -> None:
    write(files, content(1))
    path = place_of(files, content(1))
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= change
    path.write_bytes(data)
    assert read(files, content(1)) is None
    assert not path.exists()


@pytest.mark.parametrize("length", [0, 1, 40, 4095, 4096, 4096 + BLOCK_BYTES, 4096 + BLOCK_BYTES + 31])
def test_a_truncated_or_overlong_file_is_not_trusted(files: PrefixFiles, length: int) -> None:
    for data_of in (lambda data: data[:length], lambda data: data + bytes(length + 1)):
        write(files, content(1))
        path = place_of(files, content(1))
        path.write_bytes(data_of(path.read_bytes()))
        assert read(files, content(1)) is None


def test_a_link_is_not_followed(files: PrefixFiles, tmp_path: Path) -> None:
    write(files, content(1))
    path = place_of(files, content(1))
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert read(files, content(1)) is None
    assert elsewhere.exists()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES])
def test_a_file_that_temporarily_cannot_be_read_is_kept(
    files: PrefixFiles, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files, content(1))

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(prefix_files, "_read_into", refuse)
        assert read(files, content(1)) is None
    assert is_whole(files, content(1))


def test_a_drive_that_does_not_answer_has_no_files_until_it_does(
    files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [content(number) for number in range(8)]
    write(files, *contents)
    read_one, answers = prefix_files._read_into, threading.Event()

    def hang(root: Directory, path: Path, size: int, buffer: Any) -> bool:
        answers.wait()
        return read_one(root, path, size, buffer)

    monkeypatch.setattr(prefix_files, "DRIVE_S", 0.01)
    monkeypatch.setattr(prefix_files, "_read_into", hang)
    assert list(files.read("kv", contents)) == [None] * 8
    assert files._patience_s == 0  # nothing waits a second time
    assert list(files.read("kv", contents[4:])) == [None] * 4
    monkeypatch.setattr(prefix_files, "DRIVE_S", 30.0)  # a busy machine may take longer than before
    answers.set()
    wait([future for _, _, future in files._under_way])
    assert [int(payload[0]) for payload in files.read("kv", contents)] == list(range(8))


def test_a_file_that_is_gone_is_forgotten(files: PrefixFiles) -> None:
    write(files, content(1))
    (path,) = files._root.path.glob("*/*.kv")
    path.unlink()
    assert read(files, content(1)) is None
    assert not files.has("kv", content(1))
    assert files.num_bytes == 0


def test_a_secret_that_could_not_be_fully_written_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        os.ftruncate(descriptor, 16)  # as a power cut may leave it
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UsageError, match="Input/output error"):
            open_files(tmp_path / "kv")
    files = open_files(tmp_path / "kv")
    write(files, content(1))
    assert is_whole(files, content(1))
    files.close()
    assert sorted(path.name for path in (tmp_path / "kv").iterdir() if path.is_file()) == ["lock", "secret"]


def test_files_that_are_too_old_are_removed(tmp_path: Path) -> None:
    clock = Clock()
    files = open_files(tmp_path, clock=clock, ttl_s=100)
    write(files, content(1))
    clock.ahead = 99
    assert is_whole(files, content(1))
    clock.ahead = 101
    assert read(files, content(1)) is None
    write(files, content(2))
    files.close()
    clock.ahead = 300
    files = open_files(tmp_path, clock=clock, ttl_s=100)
    assert not files.has("kv", content(2))
    assert list(tmp_path.rglob("*.kv")) == []
    files.close()


def test_a_clock_that_is_set_back_costs_no_file(tmp_path: Path) -> None:
    clock = Clock()
    files = open_files(tmp_path, clock=clock)
    write(files, content(1))
    clock.ahead = -3600.0
    assert read(files, content(1)) is None
    clock.ahead = 0.0
    assert is_whole(files, content(1))
    files.close()


def test_the_least_recently_used_files_are_removed_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    one = 4096 + BLOCK_BYTES + 32
    files = open_files(tmp_path, max_bytes=3 * one)
    write(files, content(1), content(2), content(3))
    assert is_whole(files, content(1))
    write(files, content(4))
    assert [files.has("kv", content(i)) for i in (1, 2, 3, 4)] == [True, False, True, True]
    assert files.num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) == 3 * one
    files.close()
    files = open_files(tmp_path, max_bytes=one)
    assert files.num_bytes == one
    files.close()


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    write(files, content(1))
    directory = place_of(files, content(1)).parent
    files.close()
    (directory / "0123456789abcdef.writing").write_bytes(b"half")
    (directory / "notes.txt").write_bytes(b"what is this")
    files = open_files(tmp_path)
    assert [path.name for path in directory.iterdir()] == [f"{'01' * 32}.kv"]
    files.close()


def test_a_drive_that_refuses_writes_costs_only_the_reuse(
    files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("argosy.kept.prefix_files.os.fdatasync", full)
        write(files, content(1))
    assert not files.has("kv", content(1))
    assert list(files._root.path.rglob("*.writing")) == []
    asked = []
    # It pauses for a minute, and reports that there is nothing to do.
    assert files.offer("kv", content(2), asked.append)
    assert asked == []
    files._rests_until = 0.0
    write(files, content(2))
    assert is_whole(files, content(2))


def test_one_tenant_can_be_forgotten_while_others_stay(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    write(files, content(1, "a"), content(2, "a"), content(3, "b"))
    files.offer("kv", content(4, "a"), lambda to: None)
    files.forget("a")
    assert not files.has("kv", content(1, "a"))
    files.close()  # pending writes have finished
    assert [files.has("kv", content(i, t)) for i, t in ((1, "a"), (2, "a"), (4, "a"), (3, "b"))] == [
        False, False, False, True,
    ]  # fmt: skip
    assert len(list(tmp_path.rglob("*.kv"))) == 1
    assert files.num_bytes == files.file_bytes("kv")


def test_tenants_that_are_no_longer_known_are_forgotten(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    write(files, content(1, "a"), content(2, "b"), content(3, "c"))
    files.close()
    files = open_files(tmp_path)
    files.forget_others(["", "b"])
    files.close()
    assert [path.stem for path in tmp_path.rglob("*.kv")] == ["02" * 32]


WRITE_FOR_EVER = """
import sys, numpy as np
from pathlib import Path
from argosy.config import KvDir
from argosy.kept.kv_cache import BlockContent
from argosy.kept.prefix_files import PrefixFiles
files = PrefixFiles(KvDir(path=Path(sys.argv[1])), identity=bytes(range(32)), block_bytes=400_000)
print("ready", flush=True)
number = 0
while True:
    key = number.to_bytes(32, "little")
    if files.offer("kv", BlockContent(key, key, key, ""), lambda to: to.__setitem__(slice(None), number % 251)):
        number += 1
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.08])
def test_after_a_kill_no_file_is_partial(tmp_path: Path, delay_s: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    files = PrefixFiles(KvDir(path=tmp_path), identity=IDENTITY, block_bytes=400_000)
    names = [path.stem for path in tmp_path.rglob("*.kv")]
    assert list(tmp_path.rglob("*.writing")) == []
    for name in names:
        key = bytes.fromhex(name)
        payload = read(files, BlockContent(key, key, key, ""))
        assert payload is not None
        assert (payload == int.from_bytes(key, "little") % 251).all()
    files.close()


def test_a_directory_is_held_where_only_files_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS."""
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, how)

    def without_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    files = open_files(tmp_path / "kv")
    with pytest.raises(UsageError, match="in use by another process"):
        open_files(tmp_path / "kv")
    files.close()
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(UsageError, match="kv cannot be locked: No locks available"):
        open_files(tmp_path / "kv")


def test_links_to_directories_elsewhere_lose_no_files_there(tmp_path: Path) -> None:
    files = open_files(tmp_path / "kv")
    write(files, content(1, tenant="a"))
    directory = place_of(files, content(1, tenant="a")).parent
    files.close()
    victim = tmp_path / "victim"
    directory.rename(victim)
    (victim / "notes").write_bytes(b"keep")
    directory.symlink_to(victim)
    before = {path.name: facts_of(path) for path in victim.iterdir()}
    files = open_files(tmp_path / "kv")
    assert files.offer("kv", content(2, tenant="a"), lambda room: room.fill(2))
    files.forget("a")
    files.close()
    forget_files(tmp_path / "kv", "a")
    with pytest.raises(UsageError, match="it is a symbolic link"):
        erase_files(tmp_path / "kv", "a")
    assert {path.name: facts_of(path) for path in victim.iterdir()} == before


def test_files_of_a_tenant_are_erased_and_counted_in_the_directories_of_several_models(
    tmp_path: Path,
) -> None:
    for name in ("one", "other"):
        files = open_files(tmp_path / name)
        write(files, content(1, tenant="a"), content(2, tenant="b"))
        files.close()
    assert erase_files(tmp_path, "a") == 2
    assert erase_files(tmp_path, "a") == 0
    assert erase_files(tmp_path / "one", "b") == 1
    files = open_files(tmp_path / "other")
    with pytest.raises(UsageError, match="other is in use by another process"):
        erase_files(tmp_path, "b")
    assert is_whole(files, content(2, tenant="b"))
    files.close()


def test_a_tenant_is_forgotten_while_no_engine_uses_the_directory(tmp_path: Path) -> None:
    forget_files(tmp_path, "a")  # nothing is there yet
    files = open_files(tmp_path)
    write(files, content(1, tenant="a"), content(2, tenant="b"))
    files.close()
    forget_files(tmp_path, "a")
    files = open_files(tmp_path)
    assert not files.has("kv", content(1, tenant="a"))
    assert is_whole(files, content(2, tenant="b"))
    files.close()
