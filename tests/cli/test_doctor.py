"""`argosy doctor` on this machine, and its advice for others."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest

from argosy.cli import doctor as command
from argosy.cli.main import main
from argosy.config import GIB, MIB, AskAhead
from argosy.errors import DiskFull, UsageError
from argosy.plan import machine


def test_doctor_prints_facts_and_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--path", str(tmp_path), "--size", "64MiB"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar without a terminal
    for start in (
        "cores",
        "  prefetch          ",
        "memory",
        "  default budget",
        "drive",
        "  random reads      measured",
        "advice",
    ):
        assert any(line.startswith(start) for line in printed.out.splitlines()), start
    assert list(tmp_path.iterdir()) == []


def test_json_holds_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--path", str(tmp_path), "--size", "64MiB", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] == machine.usable_cores()
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert facts["drive"]["file_bytes"] == 64 * MIB
    buffered = [cell for cell in facts["drive"]["measured"] if not cell["is_direct"]]
    assert {(cell["record_bytes"], cell["num_readers"]) for cell in buffered} == {
        (record_bytes, num_readers)
        for record_bytes in (256 << 10, 1 << 20, 4 << 20)
        for num_readers in (1, 4)
    }
    assert all(cell["bytes_per_s"] > 0 for cell in facts["drive"]["measured"])
    assert facts["advice"]


def test_the_environment_overrides_ask_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def doctor() -> int:
        return main(["doctor", "--path", str(tmp_path), "--size", "64MiB", "--json"])

    assert doctor() == 0
    assert json.loads(capsys.readouterr().out)["ask_ahead"] in get_args(AskAhead)
    for name in get_args(AskAhead):
        monkeypatch.setenv("ARGOSY_ASK_AHEAD", name)
        assert doctor() == 0
        assert json.loads(capsys.readouterr().out)["ask_ahead"] == name
    monkeypatch.setenv("ARGOSY_ASK_AHEAD", "three_levels")
    assert doctor() == 2
    assert "must be off or one_level or two_levels, found 'three_levels'" in capsys.readouterr().err


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(what: str, share: float) -> None:
        if what == "measuring reads":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.measure_drive(tmp_path, 64 * MIB, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_nearly_full_drive_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: 300 * MIB)
    found = command.measure_drive(tmp_path, GIB)
    assert found["file_bytes"] == 0
    assert found["measured"] == []
    assert "64.0 MiB" in found["why_not_measured"]


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"), [(errno.ENOSPC, DiskFull, 5), (errno.EACCES, UsageError, 2)]
)
def test_a_directory_without_room_or_permission_for_a_file_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[DiskFull], exit_code: int
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(kind, match="file") as caught:
        command.measure_drive(tmp_path, 64 * MIB)
    assert caught.value.exit_code == exit_code
    assert caught.value.hint is not None


def test_a_wrong_size_or_path_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--path", str(tmp_path), "--size", "much"]) == 2
    assert "'much' is not a size" in capsys.readouterr().err
    assert main(["doctor", "--path", str(tmp_path / "nothing")]) == 2


def facts_of(**changes: Any) -> dict[str, Any]:
    """A healthy machine: 60 GiB free, a drive of 3 GB/s."""
    cell = {"record_bytes": MIB, "num_readers": 4, "bytes_per_s": 3e9, "is_direct": True}
    drive = {
        "path": "/data",
        "file_system": "ext4",
        "measured": [cell, {**cell, "is_direct": False, "bytes_per_s": 1.5e9}],
        "why_not_measured": None,
        "why_not_direct": None,
    }
    memory = {
        "free_bytes": 60 * GIB,
        "default_budget_bytes": 57 * GIB,
        "swap_bytes": 0,
        "limited_by": "machine",
    }
    return {"drive": drive | changes.get("drive", {}), "memory": memory | changes.get("memory", {})}


def test_advice_names_what_matters_most() -> None:
    assert command.advice(facts_of()).startswith(
        "ready: every GB of experts that is not in memory costs 0.33 s"
    )
    slow = [{**facts_of()["drive"]["measured"][0], "bytes_per_s": 0.15e9}]
    assert "reads 0.15 GB/s: prefer models that fit in 57.0 GiB" in command.advice(
        facts_of(drive={"measured": slow})
    )
    only_buffered = facts_of()["drive"]["measured"][1:]
    refused = {
        "measured": only_buffered,
        "why_not_direct": "the file system refuses O_DIRECT: Invalid argument",
    }
    assert command.advice(facts_of(drive=refused)).endswith("refuses O_DIRECT: Invalid argument")
    assert "swap" in command.advice(facts_of(memory={"swap_bytes": GIB}))
    assert "cgroup v2 /app" in command.advice(
        facts_of(memory={"free_bytes": MIB, "limited_by": "cgroup v2 /app"})
    )
    assert "not a drive" in command.advice(facts_of(drive={"file_system": "tmpfs"}))
    assert "free some space at /data" in command.advice(facts_of(drive={"why_not_measured": "too little"}))
