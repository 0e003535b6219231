"""A pack that is killed, runs out of disk or is disturbed resumes, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint import pack as pack_module
from argosy.checkpoint.pack import PackReport, open_pack, pack, verify_pack
from argosy.errors import CheckpointError, DiskFull, UsageError
from argosy.model.families import open_model
from tests.checkpoint.killed_packs import killed_at_a_write, slow_pack
from tests.helpers.forks import FORKS
from tests.models.hub_quantised import write_fp8_model, write_int4_model
from tests.models.tiny import qwen2_moe, qwen3_moe, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "source", qwen2_moe(num_hidden_layers=2, num_experts=4), seed=5)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def pack_to(source: Path, destination: Path, **options: Any) -> PackReport:
    return pack(open_model(source), destination, format="q4", **options)


def run_killed(source: Path, destination: Path, at_write: int) -> int | None:
    process = FORKS.Process(target=killed_at_a_write, args=(source, destination, at_write))
    process.start()
    process.join(60)
    return process.exitcode


def test_a_pack_killed_again_and_again_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pack_to(source, tmp_path / "undisturbed")
    destination = tmp_path / "packed"
    kills = 0
    # 11 is odd and small, so that kills hit data, padding, the journal and the manifest.
    while (code := run_killed(source, destination, 11)) == -signal.SIGKILL:
        kills += 1
        assert not destination.exists()
        with pytest.raises(CheckpointError, match="is an unfinished pack"):
            open_pack(tmp_path / "packed.partial")
        assert kills < 40

    assert code == 0
    assert kills >= 5
    assert contents(destination) == contents(tmp_path / "undisturbed")
    assert not (tmp_path / "packed.partial").exists()


# The first four writes are the journal's header, a tensor, its padding, and its line in the journal.
@pytest.mark.parametrize("at_write", [1, 2, 3, 4, 5, -1, -2, -3, -4, -5, -6])
def test_a_pack_killed_at_its_first_or_last_writes_resumes(
    source: Path, tmp_path: Path, at_write: int
) -> None:
    writes = count_writes(lambda: pack_to(source, tmp_path / "undisturbed"))
    destination = tmp_path / "packed"

    assert (
        run_killed(source, destination, at_write if at_write > 0 else writes + 1 + at_write)
        == -signal.SIGKILL
    )
    assert not destination.exists()
    report = pack_to(source, destination)

    assert report.restarted_because is None
    assert (report.resumed_bytes > 0) == (at_write not in (1, 2, 3, 4))
    assert contents(destination) == contents(tmp_path / "undisturbed")


def count_writes(action: Callable[[], object]) -> int:
    count = 0
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        return real(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        action()
    return count


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95])
def test_a_pack_killed_at_any_time_resumes(source: Path, tmp_path: Path, share: float) -> None:
    pack_to(source, tmp_path / "undisturbed")
    destination = tmp_path / "packed"
    writes = count_writes(lambda: pack_to(source, tmp_path / "counted"))
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=slow_pack, args=(source, destination, there))
    process.start()
    there.close()
    here.recv()
    time.sleep(0.004 * writes * share)
    process.kill()
    process.join()
    here.close()

    if not destination.exists():  # a slow machine may have let it finish
        pack_to(source, destination)
    assert contents(destination) == contents(tmp_path / "undisturbed")
    verify_pack(destination)


def interrupted(source: Path, destination: Path, at_write: int = 40) -> Path:
    assert run_killed(source, destination, at_write) == -signal.SIGKILL
    return destination.with_name(destination.name + ".partial")


def test_data_damaged_in_between_is_written_again(source: Path, tmp_path: Path) -> None:
    pack_to(source, tmp_path / "undisturbed")
    partial = interrupted(source, tmp_path / "packed", 80)
    content = bytearray((partial / "dense.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (partial / "dense.bin").write_bytes(content)

    report = pack_to(source, tmp_path / "packed")

    assert 0 < report.resumed_bytes < len(content)
    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("journal", [b"", b"nonsense\n", b"{}\n0 1\n", b"\xff\xfe", b"[]\n"])
def test_a_damaged_journal_restarts_the_pack(source: Path, tmp_path: Path, journal: bytes) -> None:
    pack_to(source, tmp_path / "undisturbed")
    partial = interrupted(source, tmp_path / "packed")
    (partial / "journal").write_bytes(journal)

    report = pack_to(source, tmp_path / "packed")

    assert report.resumed_bytes == 0
    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")


def test_a_changed_source_restarts_the_pack_and_is_reported(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "packed")
    write_model(source, qwen2_moe(num_hidden_layers=2, num_experts=4), seed=6)
    said: list[str] = []

    report = pack_to(source, tmp_path / "packed", progress=lambda what, share: said.append(what))

    because = f"{source} changed since the unfinished pack was started"
    assert report.restarted_because == because
    assert f"starting over: {because}" in said
    assert report.resumed_bytes == 0
    pack_to(source, tmp_path / "undisturbed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")


def test_another_format_restarts_the_pack_and_is_reported(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "packed")

    report = pack(open_model(source), tmp_path / "packed", format="q8")

    assert report.restarted_because == "the unfinished pack is q4, but q8 was requested"
    assert open_model(tmp_path / "packed").expert_format == "q8"


def test_a_source_that_changes_while_it_is_packed_is_refused(source: Path, tmp_path: Path) -> None:
    def touch(what: str, share: float) -> None:
        if share > 0.5:
            os.utime(source / "model.safetensors", ns=(1, int(share * 1e9)))

    with pytest.raises(CheckpointError, match=f"{source} changed while it was being packed"):
        pack_to(source, tmp_path / "packed", progress=touch)
    assert not (tmp_path / "packed").exists()

    assert "changed since" in (pack_to(source, tmp_path / "packed").restarted_because or "")


def test_two_processes_cannot_write_one_pack(source: Path, tmp_path: Path) -> None:
    (tmp_path / "packed.partial").mkdir()
    with (tmp_path / "packed.partial" / "journal").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"another process is writing .*packed.partial"):
            pack_to(source, tmp_path / "packed")
    pack_to(source, tmp_path / "packed")


def test_an_interrupted_pack_is_resumed_by_a_later_run(source: Path, tmp_path: Path) -> None:
    def interrupt(what: str, share: float) -> None:
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_to(source, tmp_path / "packed", progress=interrupt)
    assert not (tmp_path / "packed").exists()

    assert pack_to(source, tmp_path / "packed").resumed_bytes > 0


# Disk full


def test_too_little_disk_space_is_reported_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with pytest.raises(DiskFull) as caught:
        pack_to(source, tmp_path / "packed")

    assert caught.value.facts["free_bytes"] == 1000
    needed = caught.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    assert 50_000 < needed < 10_000_000
    assert "more, but its file system has 1000 B free\nhint: make room and run the same command again" in str(
        caught.value
    )
    assert caught.value.exit_code == 5
    assert "--format" not in str(caught.value)  # no format is small enough
    assert (tmp_path / "packed.partial" / "experts.bin").stat().st_size == 0


def test_formats_for_which_there_is_room_are_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, sizes = shutil.disk_usage(tmp_path), {}
    for format in ("q4", "q8", "bf16"):
        pack(open_model(source), tmp_path / format, format=format)
        sizes[format] = sum(path.stat().st_size for path in (tmp_path / format).glob("*.bin"))
    assert sizes["q4"] < sizes["q8"] < sizes["bf16"]
    for free, named in ((sizes["q8"], ["q8", "q4"]), (sizes["q8"] - 1, ["q4"])):
        monkeypatch.setattr(
            pack_module.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free)
        )
        with pytest.raises(DiskFull) as caught:
            pack(open_model(source), tmp_path / "too large", format="bf16")
        assert re.findall(r"`--format (\w+)`, which takes", str(caught.value)) == named


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_reported_and_the_pack_resumes_later(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, left = os.pwrite, 60

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data[:3000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DiskFull) as caught:
        pack_to(source, tmp_path / "packed")
    assert caught.value.facts["needed_bytes"] > 0  # type: ignore[operator]
    monkeypatch.undo()

    assert pack_to(source, tmp_path / "packed").resumed_bytes > 0
    pack_to(source, tmp_path / "undisturbed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")


def test_a_divided_pack_resumes_and_one_that_is_divided_otherwise_starts_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, 106

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DiskFull):
        pack_to(source, tmp_path / "packed", num_shares=3)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "packed.partial", tmp_path / "other.partial")

    report = pack_to(source, tmp_path / "packed", num_shares=3)
    assert report.resumed_bytes > (tmp_path / "packed" / "dense.bin").stat().st_size  # experts, too
    pack_to(source, tmp_path / "undisturbed", num_shares=3)
    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")

    report = pack_to(source, tmp_path / "other", num_shares=2)
    assert report.restarted_because == "the unfinished pack has 3 shards, but 2 were requested"
    assert not (tmp_path / "other" / "experts-3-of-3.bin").exists()


CHANGING_CALLS = ("mkdir", "open", "ftruncate", "pwrite", "fsync", "rename", "unlink")


def failing_at(number: int, code: int, patch: pytest.MonkeyPatch, under: Path) -> list[str]:
    """Make the `number`th call that changes a file fail, once; the list collects the names of all such calls."""
    calls: list[str] = []

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            path = arguments[0]  # below an open directory it is relative
            is_ours = isinstance(path, int) or not os.path.isabs(path) or str(path).startswith(str(under))
            if is_ours:
                calls.append(name)
                if len(calls) == number:
                    raise OSError(code, os.strerror(code))
            return real(*arguments, **more)

        return call

    for name in CHANGING_CALLS:
        patch.setattr(os, name, failing(name))
    return calls


@pytest.mark.parametrize(
    ("code", "num_between"),
    [
        (errno.ENOSPC, 12),
        pytest.param(errno.ENOSPC, 60, marks=pytest.mark.full),
        pytest.param(errno.EDQUOT, 60, marks=pytest.mark.full),
    ],
)
def test_a_full_disk_at_any_call_is_reported_with_the_bytes_needed(
    source: Path, tmp_path: Path, code: int, num_between: int
) -> None:
    pack_to(source, tmp_path / "undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        calls = failing_at(0, code, patch, tmp_path / "counted")
        pack_to(source, tmp_path / "counted")
    assert set(calls) == set(CHANGING_CALLS)
    # After the rename the pack is complete, and later failures do not matter.
    renamed = max(at for at, name in enumerate(calls) if name == "rename") + 1
    step, ends = max(1, len(calls) // num_between), num_between // 5
    for number in sorted({*range(1, ends), *range(1, renamed, step), *range(renamed - ends, len(calls) + 1)}):
        destination = tmp_path / f"packed{number}"
        with pytest.MonkeyPatch.context() as patch:
            failing_at(number, code, patch, destination)
            if number > renamed:
                pack_to(source, destination)
            else:
                with pytest.raises(DiskFull) as caught:
                    pack_to(source, destination)
                needed = caught.value.facts["needed_bytes"]
                assert isinstance(needed, int)
                assert needed > 0
        if number <= renamed:
            assert pack_to(source, destination).restarted_because is None
        found = contents(destination)
        found.pop("journal", None)  # a leftover journal is never read
        assert found == contents(tmp_path / "undisturbed")
        shutil.rmtree(destination)


@pytest.mark.parametrize("journal", [None, b"", b"dear diary\n", b'{"version": 4}\n'])
def test_a_directory_of_someone_else_is_refused_and_stays(
    source: Path, tmp_path: Path, journal: bytes | None
) -> None:
    partial = tmp_path / "packed.partial"
    partial.mkdir()
    (partial / "notes.txt").write_bytes(b"keep")
    (partial / "dense.bin").write_bytes(b"keep")
    if journal is not None:
        (partial / "journal").write_bytes(journal)
    before = contents(partial)
    with pytest.raises(
        UsageError, match=r"packed.partial is not an unfinished pack: it holds (notes.txt|dense.bin)"
    ):
        pack_to(source, tmp_path / "packed")
    assert contents(partial) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_a_failing_drive_is_told_wherever_it_fails(
    source: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a written file to check it is not the only call that nothing else turns into a sentence."""
    real, num_left = np.memmap, 0

    def fail(*arguments: Any, **more: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise OSError(code, os.strerror(code), str(arguments[0]))
        return real(*arguments, **more)

    files = open_model(source)
    monkeypatch.setattr(np, "memmap", fail)
    for number in (0, 3):
        num_left = number
        with pytest.raises(
            UsageError, match=f"packed.partial/dense.bin cannot be written: {os.strerror(code)}"
        ):
            pack(files, tmp_path / "packed", format="q4")


def test_links_that_someone_planted_are_refused_or_replaced(source: Path, tmp_path: Path) -> None:
    pack_to(source, tmp_path / "undisturbed")
    (tmp_path / "victims").mkdir()
    victim = tmp_path / "victims" / "file"
    victim.write_bytes(b"keep")
    partial = tmp_path / "packed.partial"
    partial.symlink_to(victim.parent)
    with pytest.raises(UsageError, match="it is a symbolic link"):
        pack_to(source, tmp_path / "packed")
    partial.unlink()
    interrupted(source, tmp_path / "packed").rename(tmp_path / "interrupted")
    for name in (".config.json.new", "argosy.json", "dense.bin", "journal"):
        shutil.copytree(tmp_path / "interrupted", partial)
        (partial / name).unlink(missing_ok=True)
        (partial / name).symlink_to(victim)
        if name == "argosy.json":  # it is replaced
            pack_to(source, tmp_path / "packed")
            assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")
            shutil.rmtree(tmp_path / "packed")
        else:
            with pytest.raises(UsageError, match=f"{name} cannot be written: it is a symbolic link"):
                pack_to(source, tmp_path / "packed")
            shutil.rmtree(partial)
        assert victim.read_bytes() == b"keep"


def test_small_files_of_a_changed_source_do_not_stay_in_the_pack(source: Path, tmp_path: Path) -> None:
    pack_to(source, tmp_path / "undisturbed")
    writes = count_writes(lambda: pack_to(source, tmp_path / "counted"))
    (source / "merges.txt").write_text("of a tokenizer that goes")
    partial = interrupted(source, tmp_path / "packed", writes + 1)  # at the manifest
    assert (partial / "merges.txt").exists()
    (source / "merges.txt").unlink()

    assert pack_to(source, tmp_path / "packed").restarted_because is not None

    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")


def test_a_file_size_limit_is_reported_as_a_full_disk(source: Path, tmp_path: Path) -> None:
    script = (
        "import resource, sys; from argosy.checkpoint.pack import pack; from argosy.errors import DiskFull\n"
    )
    script += "from argosy.model.families import open_model; files = open_model(sys.argv[1])\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\n"
    script += "try:\n    pack(files, sys.argv[2], format='q4')\n"
    script += "except DiskFull as error:\n    print(error.exit_code, error)"
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "packed")]

    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    assert found.startswith(f"5 {tmp_path / 'packed.partial'} needs ")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert pack_to(source, tmp_path / "packed").resumed_bytes > 0


def test_a_full_file_system_is_reported(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here: no permission")
    try:
        with pytest.raises(DiskFull) as caught:
            pack_to(source, disk / "packed")
        assert caught.value.facts["free_bytes"] < 65_537  # type: ignore[operator]

        # The check finds enough space, and the writes fail.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack_module._Writer, "_require_room", lambda self: None)
            with pytest.raises(DiskFull):
                pack_to(source, disk / "packed")
        with pytest.raises(CheckpointError, match="unfinished"):
            open_pack(disk / "packed.partial")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_journal_records_the_source_and_the_format(source: Path, tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path / "packed")

    header = json.loads((partial / "journal").read_text().split("\n")[0])

    assert header["format"] == "q4"
    assert {name for name, _, _ in header["source"]} == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("format", ["source", "q4"])
@pytest.mark.parametrize("write", [write_fp8_model, write_int4_model])
def test_a_pack_of_codes_and_scales_resumes_where_it_stopped(
    write: Callable[..., Path], format: str, tmp_path: Path
) -> None:
    config = qwen3_moe(hidden_size=160, moe_intermediate_size=96, num_experts=4, num_hidden_layers=2)
    write(tmp_path / "source", config, seed=5, num_shards=2)
    stop_after(0.6, tmp_path, format)
    report = pack(open_model(tmp_path / "source"), tmp_path / "packed", format=format)
    assert report.restarted_because is None
    assert report.resumed_bytes > 0
    pack(open_model(tmp_path / "source"), tmp_path / "undisturbed", format=format)
    assert contents(tmp_path / "packed") == contents(tmp_path / "undisturbed")
    verify_pack(tmp_path / "packed")


def test_scales_that_change_in_between_are_noticed(tmp_path: Path) -> None:
    config = qwen3_moe(hidden_size=160, moe_intermediate_size=96, num_experts=4, num_hidden_layers=2)
    write_fp8_model(tmp_path / "source", config, seed=5, num_shards=2)
    stop_after(0.6, tmp_path, "source")
    shard = tmp_path / "source" / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    report = pack(open_model(tmp_path / "source"), tmp_path / "packed", format="source")
    assert report.restarted_because is not None
    assert "changed since the unfinished pack was started" in report.restarted_because


class Stopped(Exception):
    """Raised out of a pack, as a user's ^C would be."""


def stop_after(share: float, directory: Path, format: str) -> None:
    def progress(what: str, done: float) -> None:
        if done >= share:
            raise Stopped

    with pytest.raises(Stopped):
        pack(open_model(directory / "source"), directory / "packed", format=format, progress=progress)
