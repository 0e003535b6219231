"""A worker without files copies what it owns: the same tokens, whatever ends it, and only into its directory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from argosy import _native
from argosy.checkpoint.pack import pack
from argosy.checkpoint.shards import ALL_SHARDS, COPY_FILE, shard_of, shards_of_share
from argosy.cluster import copied as copied_module
from argosy.cluster import copy_link, hello, identity, secure
from argosy.cluster import copying as copying_module
from argosy.cluster.copied import Copy, CopyingWorker
from argosy.cluster.copy_link import THE_LIST, CopyEnd, CopyLink
from argosy.cluster.copy_source import CopySource, Pace, serve_copy
from argosy.cluster.copying import Copying
from argosy.cluster.group import Group
from argosy.cluster.hello import Offer
from argosy.cluster.identity import fingerprint
from argosy.cluster.member import Member
from argosy.cluster.owners import shards_to_copy
from argosy.cluster.worker import bind
from argosy.cluster.worker_plan import WorkerSettings, instruction_set_of
from argosy.errors import (
    ArgosyError,
    CheckpointError,
    DiskFull,
    DoesNotFit,
    PeerNotUsable,
    UsageError,
)
from argosy.model.families import open_model
from tests.cluster.rigs import (
    BLOCKS,
    CONFIG,
    GIB,
    GPT_OSS,
    GREEDY,
    PROMPT,
    is_listening,
    open_engine,
    status_of,
    visible,
    wait_until,
    worker_process,
    worker_thread,
)
from tests.models.gguf_models import mixed, write_gguf_model
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.tiny import write_model
from tests.serve.test_listen import make_certificate, needs_openssl

KEY = b"a key of the tests, thirty-two bytes"
LINK_KEY = bytes(range(32))
FORMS = ["safetensors in two files", "a pack", "a divided pack", "gguf", "mxfp4 with biases"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("copies")
    whole = write_model(root / "bf16", CONFIG, seed=3, num_shards=2)
    pack(open_model(whole), root / "q8", format="q8")
    pack(open_model(root / "q8"), root / "divided", format="source", num_shares=4)
    write_gguf_model(root / "model.gguf", BLOCKS, seed=3, type_of=mixed)
    write_mxfp4_model(root / "mxfp4", GPT_OSS, seed=3)
    return dict(
        zip(FORMS, (whole, root / "q8", root / "divided", root / "model.gguf", root / "mxfp4"), strict=True)
    )


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint of these small models would otherwise cover every byte, and a copy have them all."""
    monkeypatch.setattr(identity, "_SAMPLES", 4)


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["safetensors in two files"]


def settings(**more: Any) -> WorkerSettings:
    return WorkerSettings(**({"budget_bytes": 8 * GIB, "threads": 1, "readers": 1, "key": KEY} | more))


@contextmanager
def coordinator(model: Path, shards: int, wrap: Callable[[Any], Any] = lambda end: end) -> Iterator[CopyLink]:
    """The other end of a link, which serves a model's files."""
    ours, theirs = socket.socketpair()
    pace = Pace(1e12, lambda: False)

    def serve() -> None:
        with theirs, suppress(PeerNotUsable, ConnectionAbortedError):
            source = CopySource(open_model(model))
            end = wrap(CopyEnd(theirs, LINK_KEY))
            serve_copy(end, source, shards, pace=pace, sent=lambda nbytes: None, stop=threading.Event())

    thread = threading.Thread(target=serve)
    thread.start()
    with ours:
        try:
            yield CopyLink(ours, LINK_KEY)
        finally:
            ours.close()
            thread.join()


def fill(model: Path, directory: Path, shards: int, wrap: Callable[[Any], Any] = lambda end: end) -> Path:
    """Copy some shards; return what to open."""
    copy = Copy(directory)
    try:
        with coordinator(model, shards, wrap) as link:
            copy.fill(
                link, fingerprint(open_model(model)), lambda files, shards: None, lambda what, share: None
            )
        assert copy.is_whole
        return copy.path
    finally:
        copy.close()


def assert_is_copied(model: Path, copy: Path, shards: int) -> None:
    """The experts of these shards have their bytes, and no other expert takes room."""
    ours, theirs = open_model(model), open_model(copy, shards=shards, is_copy=True)
    assert fingerprint(ours) == fingerprint(theirs)
    sampled = [(path, offset) for path, offset, _ in identity.samples(ours)]
    for key, record in ours.experts.items():
        for piece, there in zip(record.pieces, theirs.experts[key].pieces, strict=True):
            expected = piece.path.read_bytes()[piece.offset : piece.offset + piece.nbytes]
            found = there.path.read_bytes()[there.offset : there.offset + there.nbytes]
            if shards >> shard_of(*key) & 1:
                assert found == expected
            elif not any(
                path == piece.path and 0 <= at - piece.offset < piece.nbytes for path, at in sampled
            ):
                assert found.count(0) == len(found)


# ── the same model ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_some_shards_runs_like_the_model(
    form: str, models: dict[str, Path], tmp_path: Path
) -> None:
    shards = shards_of_share(1, 2)
    path = fill(models[form], tmp_path / "copy", shards)
    assert_is_copied(models[form], path, shards)
    with (
        worker_thread(path, shards=shards) as (one, _),
        worker_thread(models[form], shards=ALL_SHARDS ^ shards) as (other, _),
        Group([one, other], local=False) as group,
        open_engine(models[form], group) as engine,
        open_engine(models[form]) as alone,
    ):
        found = engine.generate(PROMPT[:9], GREEDY)
        assert visible(found) == visible(alone.generate(PROMPT[:9], GREEDY))
        assert all(one["experts_run"] > 0 for one in group.status())


def test_workers_of_a_group_copy_what_they_own_while_the_engine_answers(model: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        copies = [Copy(tmp_path / f"copy{number}") for number in range(2)]
        listeners = [bind("127.0.0.1", 0, has_key=True) for _ in copies]
        hosts = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        threads = []
        for copy, listener in zip(copies, listeners, strict=True):
            worker = CopyingWorker(copy, settings())
            stack.callback(copy.close)
            stack.callback(worker.drain)
            threads.append(threading.Thread(target=worker.serve, args=(listener,)))
            threads[-1].start()
        group = stack.enter_context(Group(hosts, key=KEY, disk_bytes_per_s=1e9, replicas=1))
        engine = stack.enter_context(open_engine(model, group, expert_slots=8))
        expected = visible(engine.generate(PROMPT[:9], GREEDY))  # this machine runs everything meanwhile
        for thread in threads:
            thread.join(30)
        assert all(copy.is_whole for copy in copies)
        one, other = (copy.shards for copy in copies)
        assert one & other == 0  # an expert has one owner: one of them, or this machine
        assert 0 not in (one, other)
        assert one | other != ALL_SHARDS
        for copy in copies:
            assert_is_copied(model, copy.path, copy.shards)
        assert sum(status["bytes_out"] for status in group.status()) > 0
        for copy, host in zip(copies, hosts, strict=True):
            stack.enter_context(
                worker_thread(copy.path, key=KEY, shards=copy.shards, port=int(host.rpartition(":")[2]))
            )
        wait_until(lambda: all(status_of(group, host)["state"] == "ready" for host in hosts))
        assert visible(engine.generate(PROMPT[:9], GREEDY)) == expected
        assert all(status["experts_run"] > 0 for status in group.status())


@needs_openssl
def test_a_worker_copies_over_tls(model: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "worker", "-nodes")
    listener = bind("127.0.0.1", 0, has_key=True)
    host = f"localhost:{listener.getsockname()[1]}"
    with ExitStack() as stack:
        copy = Copy(tmp_path / "copy")
        stack.callback(copy.close)
        worker = CopyingWorker(copy, settings(tls=secure.server_context(certificate, key)))
        thread = threading.Thread(target=worker.serve, args=(listener,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(worker.drain)
        tls = secure.client_context(certificate)
        group = stack.enter_context(Group([host], key=KEY, tls=tls, disk_bytes_per_s=1e9))
        stack.enter_context(open_engine(model, group, expert_slots=8))
        thread.join(30)
        assert copy.is_whole
    assert_is_copied(model, tmp_path / "copy", ALL_SHARDS)


def test_a_whole_copy_needs_no_coordinator_and_further_shares_are_added(model: Path, tmp_path: Path) -> None:
    first, both = shards_of_share(1, 4), shards_of_share(1, 4) | shards_of_share(2, 4)
    fill(model, tmp_path / "copy", first)
    copy = Copy(tmp_path / "copy")
    assert copy.is_whole
    assert copy.shards == first
    copy.close()
    more = Copy(tmp_path / "copy", shards=both)
    assert not more.is_whole
    asked: list[int] = []

    def note(end: CopyEnd) -> CopyEnd:
        answer = end.answer
        end.answer = lambda ask, data: (asked.append(ask.nbytes * (ask.file != THE_LIST)), answer(ask, data))[
            1
        ]  # type: ignore[method-assign]
        return end

    with coordinator(model, both, note) as link:
        more.fill(link, fingerprint(open_model(model)), lambda files, shards: None, lambda what, share: None)
    more.close()
    assert_is_copied(model, tmp_path / "copy", both)
    files = open_model(model)
    of_second = sum(
        record.nbytes for key, record in files.experts.items() if shards_of_share(2, 4) >> shard_of(*key) & 1
    )
    assert sum(asked) == of_second


def test_a_copy_is_opened_as_a_model_by_nobody_but_its_worker(
    model: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    for name, source in (("one", model), ("other", models["gguf"])):
        path = fill(source, tmp_path / name, 1)
        for opened in {path, tmp_path / name}:
            with pytest.raises(CheckpointError, match="is a worker's copy"):
                open_engine(opened)
            with pytest.raises(CheckpointError, match="is a worker's copy"):
                open_model(opened, shards=1)


# ── any end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up."""


def test_a_copy_that_is_killed_at_any_call_goes_on_and_ends_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied_module, "_SAVE_BYTES", 20_000)
    directory, kills, shards = tmp_path / "copy", 0, shards_of_share(1, 8)
    calls = [0]

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] % 19 == 0:
                if call is os.pwrite:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                raise Killed
            return call(*arguments, **named)

        return run

    with monkeypatch.context() as patched:
        for name in ("pwrite", "ftruncate", "fdatasync", "replace", "fsync"):
            patched.setattr(copied_module.os, name, killing(getattr(os, name)))
        while True:
            try:
                path = fill(model, directory, shards)
            except Killed:
                kills += 1
                assert kills < 200
                continue
            break
    assert kills > 5
    assert_is_copied(model, path, shards)


def test_bytes_are_on_the_drive_before_it_is_noted_that_they_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a copy would have zeros after a power cut, and nobody would know."""
    monkeypatch.setattr(copied_module, "_SAVE_BYTES", 20_000)
    unsafe: set[int] = set()
    notes: list[set[int]] = []

    def noting(name: str, note: Callable[[Any], None]) -> None:
        call = getattr(os, name)

        def run(first: Any, *rest: Any, **named: Any) -> Any:
            note(first)
            return call(first, *rest, **named)

        monkeypatch.setattr(copied_module.os, name, run)

    noting("pwrite", unsafe.add)
    noting("fdatasync", unsafe.discard)
    noting("replace", lambda path: notes.append(set(unsafe)))
    fill(model, tmp_path / "copy", shards_of_share(1, 8))
    assert len(notes) > 5
    assert not any(notes)


def test_a_worker_process_is_killed_while_it_copies_and_serves_in_the_end(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying_module, "MOST_PAUSE_S", 0.25)  # before it is called again
    model, key = models["a pack"], tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    with bind("127.0.0.1", 0, has_key=True) as free:
        port = free.getsockname()[1]
    options = ["--copy", "--key-file", str(key), "--share", "1/2"]
    with (
        worker_process(tmp_path / "copy", *options, port=port, is_awaited=False) as worker,
        Group([worker.address], key=KEY, disk_bytes_per_s=1e9) as group,
    ):
        group._copying._pace = Pace(1e5, lambda: True)
        wait_until(lambda: is_listening(worker.address))
        with open_engine(model, group, expert_slots=8) as engine:
            expected = visible(engine.generate(PROMPT[:9], GREEDY))
            wait_until((tmp_path / "copy" / COPY_FILE).exists)
            worker.end()
            assert not copied_module._State.read(tmp_path / "copy" / COPY_FILE).is_whole
            group._copying._pace = Pace(1e9, lambda: True)
            worker.start(port)
            wait_until(lambda: status_of(group, worker.address)["state"] == "ready")
            assert visible(engine.generate(PROMPT[:9], GREEDY)) == expected
            assert status_of(group, worker.address)["experts_run"] > 0
    assert_is_copied(model, tmp_path / "copy", shards_of_share(1, 2))


# ── what may come ───────────────────────────────────────────────────────────────────────────────────────────────────


class Lying:
    """An end that answers something else than it was asked."""

    def __init__(self, end: CopyEnd, change: Callable[[int, bytes], bytes]) -> None:
        self._end, self._change, self._count = end, change, 0
        self.next_ask, self.refuse = end.next_ask, end.refuse

    def answer(self, ask: Any, data: bytes) -> None:
        self._count += 1
        self._end.answer(ask, self._change(self._count, data))


def with_list(**changes: Any) -> Callable[[Any], Any]:
    def change(count: int, data: bytes) -> bytes:
        return json.dumps(json.loads(data) | changes).encode() if count == 1 else data

    return lambda end: Lying(end, change)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": []}, "does not list 1 to 4096 files"),
        ({"files": [["a", 1, 0]] * 5000}, "does not list 1 to 4096 files"),
        ({"files": None}, "does not list 1 to 4096 files"),
        ({"files": [["../escape", 1, 1]]}, "cannot name a file"),
        ({"files": [["/etc/passwd", 1, 1]]}, "cannot name a file"),
        ({"files": [["..", 1, 1]]}, "cannot name a file"),
        ({"files": [[".hidden", 1, 1]]}, "cannot name a file"),
        ({"files": [["", 1, 1]]}, "cannot name a file"),
        ({"files": [["a\u0000b", 1, 1]]}, "cannot name a file"),
        ({"files": [[COPY_FILE, 1, 1]]}, "cannot name a file"),
        ({"files": [["x" * 300, 1, 1]]}, "cannot name a file"),
        ({"files": [["a", 1, 1], ["a", 1, 1]]}, "a name twice"),
        ({"files": [["a", 1]]}, "not a name and two sizes"),
        ({"files": [["a", 1, 2]]}, "an impossible size"),
        ({"files": [["a", -1, 0]]}, "an impossible size"),
        ({"files": [["a", 1e300, 0]]}, "an impossible size"),
        ({"files": [["a", 2**60, 0]]}, "an impossible size"),
        ({"files": [["a", 2**40, 2**40]]}, "headers of more than"),
        ({"opens": "../model.gguf"}, "opens a file that it does not list"),
        ({"opens": 3}, "opens a file that it does not list"),
        ({"shards": 0}, "which shards"),
        ({"shards": 1 << 64}, "which shards"),
        ({"shards": "all"}, "which shards"),
    ],
)
def test_a_list_that_no_model_has_is_refused_before_anything_is_written(
    changes: dict[str, Any], says: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        fill(model, tmp_path / "copy", 1, with_list(**changes))
    assert list((tmp_path / "copy").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_headers_that_lie_are_found_before_weights_are_copied(model: Path, tmp_path: Path) -> None:
    def garble(count: int, data: bytes) -> bytes:
        return data if count == 1 else bytes(len(data))

    with pytest.raises(CheckpointError):
        fill(model, tmp_path / "copy", 1, lambda end: Lying(end, garble))


@pytest.mark.parametrize("what", ["shorter", "longer", "nothing"])
def test_an_answer_of_another_size_ends_the_connection(what: str, model: Path, tmp_path: Path) -> None:
    def resize(count: int, data: bytes) -> bytes:
        if count < 3:
            return data
        return {"shorter": data[:-1], "longer": data + b"x", "nothing": b""}[what]

    with pytest.raises(PeerNotUsable, match="were asked for"):
        fill(model, tmp_path / "copy", 1, lambda end: Lying(end, resize))
    assert_is_copied(model, fill(model, tmp_path / "copy", 1), 1)


class Tampering:
    """Somebody between the two, who changes an answer but has no key."""

    def __init__(self, end: CopyEnd, how: str) -> None:
        self._end, self._how, self._count = end, how, 0
        self.next_ask, self.refuse = end.next_ask, end.refuse

    def answer(self, ask: Any, data: bytes) -> None:
        self._count += 1
        if self._count < 12:
            self._end.answer(ask, data)
            return
        head = copy_link._ANSWER.pack(0, len(data))
        digest = copy_link._digest(LINK_KEY, ask.head, head, data)
        if self._how == "a flipped bit":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif self._how == "an answer to another question":
            digest = copy_link._digest(LINK_KEY, ask.head[::-1], head, data)
        elif self._how == "another key":
            digest = copy_link._digest(bytes(32), ask.head, head, data)
        self._end._connection.sendall(head + digest + data)


@pytest.mark.parametrize("how", ["a flipped bit", "an answer to another question", "another key"])
def test_bytes_that_do_not_match_their_blake3_are_not_written(how: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerNotUsable, match="do not match their BLAKE3"):
        fill(model, tmp_path / "copy", 1, lambda end: Tampering(end, how))
    assert_is_copied(model, fill(model, tmp_path / "copy", 1), 1)


def test_another_key_reads_nothing(model: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=_ask, args=(ours,))
        sender.start()
        with pytest.raises(PeerNotUsable, match="without the key"):
            CopyEnd(theirs, LINK_KEY).next_ask()
        theirs.close()
        sender.join()


def _ask(connection: socket.socket) -> None:
    with suppress(PeerNotUsable):
        CopyLink(connection, bytes(32)).fetch(0, 0, 8)


@pytest.mark.parametrize(
    ("file", "offset", "nbytes"),
    [(0, 0, 0), (0, 0, (1 << 20) + 1), (99, 0, 8), (0, 1 << 62, 8), (0, 2**64 - 1, 8)],
)
def test_a_coordinator_gives_only_bytes_of_listed_files(
    file: int, offset: int, nbytes: int, model: Path
) -> None:
    with coordinator(model, 1) as link, pytest.raises(PeerNotUsable, match="cannot read its files"):
        link.fetch(file, offset, nbytes)


def test_other_weights_than_the_introduction_said_are_refused(model: Path, tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy")
    with coordinator(model, 1) as link, pytest.raises(CheckpointError, match="is not the model"):
        copy.fill(link, bytes(32), lambda files, shards: None, lambda what, share: None)
    copy.close()


def test_a_copy_of_another_model_is_not_touched(model: Path, models: dict[str, Path], tmp_path: Path) -> None:
    fill(model, tmp_path / "copy", 1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    with pytest.raises(UsageError, match="holds a copy of another model"):
        fill(models["a pack"], tmp_path / "copy", 1)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()} == before


# ── room ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_room_on_the_drive_is_checked_before_weights_are_copied(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied_module, "free_disk_bytes", lambda path: (64 << 20) + 200_000)
    with pytest.raises(DiskFull, match=r"needs .* more, and its file system has 64.2 MiB free") as full:
        fill(model, tmp_path / "copy", ALL_SHARDS)
    assert "--share" in str(full.value)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "copy").iterdir()) < 400_000


def test_a_drive_that_is_full_after_all_keeps_what_came(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.pwrite, [0]

    def full(descriptor: int, data: Any, offset: int) -> int:
        count[0] += 1
        if count[0] > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(copied_module.os, "pwrite", full)
        with pytest.raises(DiskFull):
            fill(model, tmp_path / "copy", 1)
    assert_is_copied(model, fill(model, tmp_path / "copy", 1), 1)


def test_a_budget_that_is_too_small_is_refused_before_weights_are_copied(model: Path, tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy")
    worker = CopyingWorker(copy, settings(budget_bytes=5 << 20))
    with coordinator(model, 1) as link, pytest.raises(DoesNotFit, match="this worker needs"):
        copy.fill(link, fingerprint(open_model(model)), worker._check, lambda what, share: None)
    copy.close()


# ── directories and keys ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_directory_with_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and not a copy"):
        Copy(tmp_path)
    with pytest.raises(UsageError, match="cannot hold a copy"):
        Copy(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="cannot hold a copy"):
        Copy(tmp_path / "no" / "parent")


@pytest.mark.parametrize("place", [".lock", "config.json", COPY_FILE])
def test_links_in_a_copy_lead_nowhere(model: Path, tmp_path: Path, place: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    fill(model, tmp_path / "copy", 1)
    planted = tmp_path / "copy" / place
    assert place == ".lock" or planted.exists()
    with suppress(FileNotFoundError):
        shutil.copy(planted, victim)
    planted.unlink(missing_ok=True)
    planted.symlink_to(victim)
    before = victim.read_bytes(), victim.stat()
    with suppress(UsageError):
        copy = Copy(tmp_path / "copy", shards=3)
        with coordinator(model, 3) as link, suppress(UsageError):
            copy.fill(
                link, fingerprint(open_model(model)), lambda files, shards: None, lambda what, share: None
            )
        copy.close()
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == (before[0], before[1].st_mtime_ns)


def test_one_worker_at_a_time_copies_to_a_directory(tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy")
    with pytest.raises(UsageError, match="another worker is copying"):
        Copy(tmp_path / "copy")
    copy.close()
    Copy(tmp_path / "copy").close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another version"])
def test_a_damaged_note_of_a_copy_is_refused(damage: str, model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path / "copy", 1)
    path = tmp_path / "copy" / COPY_FILE
    data = path.read_bytes()
    changed = {
        "cut": data[:-9], "flipped": data.replace(b'"shards": 1', b'"shards": 3'), "empty": b"",
        "of another version": data.replace(b'"argosy_copy": 1', b'"argosy_copy": 9'),
    }  # fmt: skip
    path.write_bytes(changed[damage])
    with pytest.raises(CheckpointError):
        Copy(tmp_path / "copy")


def test_copying_needs_a_key(tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy")
    with pytest.raises(UsageError, match="could fill the drive"):
        CopyingWorker(copy, settings(key=b""))
    copy.close()


def test_a_coordinator_without_a_key_gives_no_files(model: Path) -> None:
    """Whoever listens at the address of a worker could have them."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    found: list[Any] = []

    def pretend() -> None:
        with listener, listener.accept()[0] as connection, suppress(PeerNotUsable):
            facts = hello.Facts(
                version=version("argosy"), kernel=instruction_set_of(settings()),
                sources=bytes.fromhex(_native.sources_hash()), model=hello.NO_MODEL, most_rows=0, most_assignments=0,
                hidden=0, num_layers=0, num_experts=0,
            )  # fmt: skip
            offer = hello.Offer(
                num_slots=0,
                cache_bytes=GIB,
                disk_bytes_per_s=0.0,
                share_bytes=GIB,
                shards=0,
                is_resident=False,
            )
            _, key = hello.accept_copy(connection, b"", facts, offer)
            found.append(CopyLink(connection, key).fetch_list())

    thread = threading.Thread(target=pretend)
    thread.start()
    with Group([address]) as group, pytest.raises(PeerNotUsable, match="requests the model's files"):
        open_engine(model, group)
    thread.join()
    assert found == []


def test_a_stranger_and_another_build_copy_nothing(tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy")
    worker = CopyingWorker(copy, settings())
    listener = bind("127.0.0.1", 0, has_key=True)
    address = listener.getsockname()
    thread = threading.Thread(target=worker.serve, args=(listener,))
    thread.start()
    facts = hello.Facts(
        version=worker._facts.version, kernel=worker._facts.kernel, sources=worker._facts.sources,
        model=bytes(range(32)), most_rows=1, most_assignments=1, hidden=1, num_layers=1, num_experts=1,
    )  # fmt: skip
    try:
        wait_until(lambda: _refusal(address, b"another key, thirty-two bytes ..", facts) == "key")
        assert _refusal(address, KEY, replace(facts, sources=bytes(32))) == "sources"
    finally:
        worker.drain()
        thread.join()
        copy.close()
    assert list((tmp_path / "copy").iterdir()) == []


def _refusal(address: tuple[str, int], key: bytes, facts: hello.Facts) -> str:
    try:
        with socket.create_connection(address, timeout=5) as connection:
            hello.connect(connection, key, facts, host="w:1")
    except ArgosyError as error:
        return str(error.facts.get("reason"))
    except OSError:
        return "not listening yet"
    return "none"


# ── beside answers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_may_end_by_itself_while_it_is_ended() -> None:
    here, there = socket.socketpair()

    class Ending(Member):
        """Its thread forgets the connection once somebody has looked at it."""

        found: socket.socket | None = here

        @property
        def copy_connection(self) -> socket.socket | None:  # type: ignore[override]
            found, self.found = self.found, None
            return found

        @copy_connection.setter
        def copy_connection(self, connection: socket.socket | None) -> None: ...

    with here, there:
        Ending("worker", ("127.0.0.1", 1), _native.Owner("worker")).end_copy()
        assert there.recv(1) == b""


def test_a_worker_that_is_drained_before_its_copy_begins_copies_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    member = Member("worker", ("127.0.0.1", 1), _native.Owner("worker"))
    files = open_model(model)
    copying = Copying(
        Pace(1e9, lambda: False),
        threading.RLock(),
        threading.Event(),
        lambda one: shards_to_copy(one, [member], None, files, replicas=1),
    )
    copying.open(files)
    offer = Offer(
        num_slots=0, cache_bytes=GIB, disk_bytes_per_s=1e9, share_bytes=0, shards=0, is_resident=False
    )
    here, there = socket.socketpair()
    with here, there:
        copying.begin(member, here, offer, b"")
        member.drained = True  # as by `Group.drain`
        copying.all_met()
        wait_until(lambda: member.copy_connection is None)
        assert there.recv(1) == b""
    assert not failures


def test_copies_keep_to_their_rate_while_somebody_waits_and_are_free_otherwise() -> None:
    now, busy = [100.0], [True]
    pace = Pace(1e6, lambda: busy[0], clock=lambda: now[0])
    assert pace.pause_s(500_000) == 0.0
    assert pace.pause_s(500_000) == pytest.approx(0.5)  # of the first, whoever asks
    assert pace.pause_s(1) == pytest.approx(1.0)
    now[0] += 10.0
    assert pace.pause_s(1_000_000) == 0.0
    busy[0] = False
    assert pace.pause_s(1 << 20) == 0.0
    busy[0] = True
    assert pace.pause_s(1 << 20) == 0.0  # what was copied freely is not held against it
