"""`argosy doctor` on this machine, and its advice for others."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest

from argosy import _native
from argosy.cli.commands import doctor as command
from argosy.cli.main import main
from argosy.cli.shared import output
from argosy.config import GIB, MIB, AskAhead, Tuning
from argosy.errors import DiskFull, UsageError
from argosy.machine import resources, tuning
from tests.helpers.tunings import keep, use_cache


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the drive was measured to do, once."""
    return command.measure_drive(tmp_path_factory.mktemp("drive"), 64 * MIB)


def test_doctor_prints_facts_and_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--path", str(tmp_path), "--size", "64MiB"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar without a terminal
    for start in (
        "cores",
        "  threads           ",
        "  products          ",
        "memory",
        "  default budget",
        "drive",
        "  random reads      measured",
        "advice",
    ):
        assert any(line.startswith(start) for line in printed.out.splitlines()), start
    assert list(tmp_path.iterdir()) == []


def test_json_holds_the_same_facts(
    drive: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure_drive", lambda *_: drive)
    assert main(["doctor", "--path", str(tmp_path), "--size", "64MiB", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] == resources.usable_cores()
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


def test_choices_are_shown_with_what_they_won(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def doctor(*options: str) -> dict[str, Any]:
        monkeypatch.setattr(command, "measure_drive", lambda *_: {"measured": [], "why_not_measured": "no"})
        assert main(["doctor", "--path", str(tmp_path), "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        lines[:] = command._choice_lines(found["choices"], has_amx=False, is_whole=True)
        return found["choices"]

    lines: list[str] = []
    monkeypatch.setenv("ARGOSY_THREADS", "2")
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("ARGOSY_TUNE", "off")
    assert doctor()["is_used"] is False
    assert lines[1] == "  products          not tuned: ARGOSY_TUNE is off"
    monkeypatch.delenv("ARGOSY_TUNE")
    assert doctor()["formats"] == {}
    assert "nothing was measured yet" in lines[1]

    measured = doctor("--tune")
    assert list(measured["formats"]) == list(tuning.FORMATS)
    assert measured["why_not_kept"] is None
    assert doctor() == measured  # it is kept

    instruction_set = _native.instruction_sets()[-1]
    keep({name: Tuning("two_levels", "off", 9, 0) for name in tuning.FORMATS}, 2, instruction_set)
    monkeypatch.setenv("ARGOSY_ASK_AHEAD", "off")
    assert doctor()["formats"]["q4"] == {
        "ask_ahead": "two_levels", "few_ask_ahead": "off", "two_panels_from": 9, "amx_from": 0, "bytes_per_s": 1e9,
        "gain": 1.5, "few_tokens_gain": 1.0, "amx_gain": 1.0,
    }  # fmt: skip
    row = next(line for line in lines if line.startswith("    q4 "))
    columns = ["q4", "two_levels", "1.0", "+50", "%", "off,", "from", "9", "tokens", "+0", "%"]
    assert row.split() == columns
    assert lines[-1] == "    ARGOSY_ASK_AHEAD=off is used for every format"

    choices = doctor()
    choices["formats"]["q4"] |= {"amx_from": 24, "amx_gain": 1.3}
    choices["formats"]["q8"] |= {"amx_gain": 0.0}
    with_amx = {
        line.split()[0]: line.split() for line in command._choice_lines(choices, has_amx=True, is_whole=True)
    }
    assert with_amx["q4"] == [*columns, "from", "24", "+30", "%"]
    assert with_amx["q8"][-4:] == ["off:", "wrong", "-100", "%"]
    assert with_amx["q4_k"][-3:] == ["off", "+0", "%"]

    choices["formats"]["iq2_kl"] |= {"bytes_per_s": 0.0}
    assert "    iq2_kl  not measured" in command._choice_lines(choices, has_amx=True, is_whole=True)


def test_the_report_fits_a_screen_unless_products_are_asked_for(
    drive: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure_drive", lambda *_: drive)
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("ARGOSY_THREADS", "2")
    keep(
        {name: Tuning("two_levels", "off", 9, 0) for name in tuning.FORMATS},
        2,
        _native.instruction_sets()[-1],
    )
    monkeypatch.setattr(output, "terminal_width", lambda: 80)
    arguments = ["doctor", "--path", str(tmp_path), "--size", "64MiB"]
    assert main(arguments) == 0
    short = capsys.readouterr().out.splitlines()
    assert "  products          tuned by a measurement; --products shows it" in short
    assert len(short) <= 24
    assert all(len(line) <= 80 for line in short if str(tmp_path) not in line)
    assert main([*arguments, "--products"]) == 0
    assert sum(line.startswith("    q") for line in capsys.readouterr().out.splitlines()) >= 10


@pytest.mark.parametrize("state", command._AMX_STATES)
def test_one_line_says_whether_amx_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    nothing = {"measured": [], "why_not_measured": "no", "why_not_direct": None}
    monkeypatch.setattr(command, "measure_drive", lambda *_: nothing)
    monkeypatch.setattr(_native, "amx_state", lambda: state)
    assert main(["doctor", "--path", str(tmp_path)]) == 0
    assert f"  AMX               {command._AMX_STATES[state]}\n" in capsys.readouterr().out
    monkeypatch.setenv("ARGOSY_INSTRUCTION_SET", "plain")
    assert main(["doctor", "--path", str(tmp_path)]) == 0
    assert f"  AMX               {command._AMX_STATES['unused']}\n" in capsys.readouterr().out


def test_a_pipe_is_no_directory_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert main(["doctor", "--path", str(tmp_path / "pipe")]) == 2
    assert "pipe cannot be written to, and measuring the drive needs a file there" in capsys.readouterr().err


def test_a_wrong_ask_ahead_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGOSY_ASK_AHEAD", "three_levels")
    assert main(["doctor", "--path", str(tmp_path)]) == 2
    known = " or ".join(get_args(AskAhead))
    assert f"must be {known}, found 'three_levels'" in capsys.readouterr().err


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(what: str, share: float) -> None:
        if what == "measuring reads":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.measure_drive(tmp_path, 64 * MIB, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_nearly_full_drive_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_disk_bytes", lambda path: 300 * MIB)
    found = command.measure_drive(tmp_path, GIB)
    assert found["file_bytes"] == 0
    assert found["measured"] == []
    assert "64.0 MiB" in found["why_not_measured"]


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [(errno.ENOSPC, DiskFull, 5), (errno.EFBIG, DiskFull, 5), (errno.EACCES, UsageError, 2)],
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
        "ready: reading 1 GB of experts takes 0.33 s, so a token that misses 1 GB takes that much longer;"
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
