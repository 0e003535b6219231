"""`argosy audit` and `argosy data`: what they print, what they refuse, what they erase."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from argosy.cli.commands import data
from argosy.cli.main import main
from argosy.cli.shared import output
from argosy.guard.audit import Audit, AuditSettings, Content
from argosy.guard.keys import KeyFile

CONTENT = b'{"asked_bytes": 5, "answered_bytes": 6, "is_cut": false}\nhelloanswer'


@contextmanager
def auditing(directory: Path, **settings: Any) -> Iterator[Audit]:
    audit = Audit(AuditSettings(directory=directory, with_content=True, **settings), facts={"version": "1"})
    try:
        yield audit
    finally:
        audit.close()


def facts(number: int, key: str) -> dict[str, object]:
    return {
        "key": key, "request_id": f"req_{number:024x}", "route": "/v1/messages", "status": 200, "prompt_tokens": 5,
        "new_tokens": number, "finish": ["stop"],
    }  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with auditing(tmp_path / "audit") as audit:
        for number, key in enumerate(("key-a", "key-b", "key-a")):
            audit.record(facts(number, key), Content([CONTENT], lambda: None))
    return tmp_path / "audit"


def test_a_valid_audit_is_said_to_be_valid_with_its_anchor(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "verify", str(directory)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("valid    no line was changed, and none is missing\n")
    assert "lines    6 in 1 file (1 anchor, 3 request, 1 start, 1 stop)" in out
    assert "content  3 kept, 0 erased" in out
    anchor = re.search(r"anchor   (\S+)", out)
    assert anchor is not None
    assert main(["audit", "verify", str(directory), "--anchor", anchor[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["is_valid"], found["anchor"], found["contents"]) == (True, anchor[1], 3)


def test_a_changed_audit_is_said_to_be_invalid_with_its_place(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / "audit-000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"new_tokens":1', b'"new_tokens":9'))
    assert main(["audit", "verify", str(directory)]) == 4
    said = capsys.readouterr()
    assert said.out.startswith("INVALID\n  audit-000001.jsonl line ")
    assert "its HMAC is wrong" in said.out
    assert "error: the audit is not valid" in said.err
    for command in ("show", "export"):
        assert main(["audit", command, str(directory)]) == 4


@pytest.mark.parametrize("anchor", ["", "7", "7:x", "x" * 1000, "-1:" + "0" * 64])
def test_a_text_that_is_no_anchor_is_refused(
    directory: Path, anchor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "verify", str(directory), f"--anchor={anchor}"]) == 2
    assert "an anchor is SEQ:SHA256" in capsys.readouterr().err


def test_the_key_is_needed_and_none_is_made(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = directory / "key"
    key.rename(directory.parent / "my.key")
    assert main(["audit", "verify", str(directory)]) == 2
    assert "--audit-key-file names the key" in capsys.readouterr().err
    assert not key.exists()
    assert (
        main(["audit", "verify", str(directory), "--audit-key-file", str(directory.parent / "my.key")]) == 0
    )
    assert main(["audit", "verify", str(directory), "--no-key"]) == 0
    assert "the HMACs were not checked" in capsys.readouterr().out


def test_show_lists_requests_and_content_of_one(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "show", str(directory), "--key", "key-a"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["TIME", "KIND", "KEY", "ROUTE", "STATUS", "TOKENS", "FINISH"]
    assert [row.split()[1:] for row in rows] == [
        ["request", "key-a", "/v1/messages", "200", f"5+{number}", "stop"] for number in (0, 2)
    ]
    request = str(facts(1, "")["request_id"])
    assert main(["audit", "show", str(directory), "--request", request, "--content"]) == 0
    out = capsys.readouterr().out
    assert f'"request_id": "{request}"' in out
    assert "── asked\nhello\n── answered\nanswer\n" in out


def test_export_prints_json_lines_with_content_if_asked(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "export", str(directory)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == [
        "start",
        "anchor",
        "request",
        "request",
        "request",
        "stop",
    ] or len(lines) == 6
    assert not any("said" in line for line in lines)
    assert main(["audit", "export", str(directory), "--key", "key-b", "--content"]) == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["said"] == {"asked": "hello", "answered": "answer"}


def test_data_of_a_stopped_server_is_erased_by_the_name_of_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key, _ = keys.add("laptop")
    directory = tmp_path / "audit"
    with auditing(directory) as audit:
        audit.record(facts(1, key.id), Content([CONTENT], lambda: None))
        audit.record(facts(2, "other"), Content([CONTENT], lambda: None))
    command = ["data", "erase", "--key", "laptop", "--keys", str(keys.path), "--audit", str(directory)]
    assert main(command) == 0
    assert f"audit contents    1 erased in {directory}" in capsys.readouterr().out
    assert main(["audit", "verify", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "content  1 kept, 1 erased" in out
    assert "1 erased" in out
    with auditing(directory):
        assert main(command) == 2
    assert "data erase --url URL" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "show", "export"])
def test_an_audit_that_does_not_exist_is_said_to_be_absent(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", command, str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} does not exist\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "nothing says where the data is"),
        (["--url", "http://127.0.0.1:1", "--audit", "x"], "--url erases everything"),
        (["--audit", "x"], "there is no key 'laptop', and it is not a key's id"),
        (["--key", "local", "--audit", "no-such-directory"], "no-such-directory does not exist"),
        (["--key", "key-0123abcd", "--kv-dir", "no-such-directory"], "no-such-directory cannot be read"),
        (["--audit", ".", "--keys", "no-such-file"], "no-such-file cannot be read"),
    ],
)
def test_an_erasure_without_a_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["data", "erase", "--key", "laptop", *options]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "show"])
def test_the_progress_of_reading_an_audit_ends_with_its_last_line(
    directory: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    @contextmanager
    def progress_bar() -> Iterator[Any]:
        yield lambda what, share: told.append(share)

    monkeypatch.setattr(output, "progress_bar", progress_bar)
    assert main(["audit", command, str(directory)]) == 0
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_list_of_stores_has_sizes_of_what_is_here(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "list", "--audit", str(directory), "--json"]) == 0
    stores = {store["name"]: store for store in json.loads(capsys.readouterr().out)}
    assert stores["audit contents"]["bytes"] > 3 * len(CONTENT)
    assert stores["audit"]["bytes"] > stores["audit contents"]["bytes"]
    assert stores["prefix files"]["bytes"] is None
    measured = directory / "cache"
    measured.mkdir()
    for name, size in (("rates-1.json", 3), ("rates-2.json", 4), ("drive-1.json", 5), ("demo", 100)):
        (measured / name).write_bytes(bytes(size))
    assert [data._size(measured / name) for name in ("rates-*.json", "drive-*.json", "none-*.json")] == [
        7,
        5,
        0,
    ]
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^audit contents \(off by default\) +--audit, in content/ +30 days", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--audit-content"], "--audit-content needs --audit DIR"),
        (["--audit-full", "degrade"], "--audit-full needs --audit DIR"),
        (["--audit", "x", "--audit-content-keep", "1d"], "--audit-content-keep needs --audit-content"),
        (["--audit", "x", "--audit-keep", "soon"], "'soon' is not a time above zero"),
        (["--kv-keep", "1d"], "--kv-keep needs --kv-dir DIR"),
        (["--store-keep", "1h", "--no-store"], "--store-keep and --no-store exclude each other"),
    ],
)
def test_options_that_need_each_other_are_checked(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "no-model", "--check", *options]) == 2
    assert told in capsys.readouterr().err
