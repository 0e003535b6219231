"""Key files with several writers, a killed writer or corrupt contents; and keys in headers."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from tests.abuse.kills import add_and_revoke
from tests.helpers.command import run_argosy
from tests.helpers.forks import ForkedArgosy, call_at_once
from tests.serve.conftest import only, start

NUM_WRITERS = 12
DIGEST = "0" * 63 + "1"


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def test_concurrent_adds_are_all_kept(file: KeyFile) -> None:
    assert (
        call_at_once(KeyFile.add, [(file, str(number)) for number in range(NUM_WRITERS)]) == [0] * NUM_WRITERS
    )
    assert sorted(key.name for key in file.read()) == sorted(map(str, range(NUM_WRITERS)))


def test_concurrent_adds_and_revocations_lose_no_key_and_restore_none(file: KeyFile) -> None:
    assert call_at_once(add_and_revoke, [(file, number) for number in range(3)]) == [0] * 3
    expected = {f"{number} stays {at}" for number in range(3) for at in range(15)}
    assert {key.name for key in file.read()} == expected


def test_concurrent_commands_lose_no_key(file: KeyFile) -> None:
    file.add("old")
    processes = [
        ForkedArgosy[bytes](["keys", *more, "--keys", file.path], stdout=subprocess.DEVNULL)
        for more in (["add", "a"], ["revoke", "old"], ["add", "b"], ["add", "c"])
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert {key.name for key in file.read()} == {"a", "b", "c"}
    listed = run_argosy("keys", "list", "--keys", file.path, is_fork=False)
    assert set(re.findall(r"^key-\w+ +(\w) ", listed.stdout, re.MULTILINE)) == {"a", "b", "c"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_writer_killed_halfway_leaves_the_old_keys_no_lock_and_no_file(file: KeyFile, call: str) -> None:
    file.add("old")
    before = file.path.read_bytes()
    stop = "lambda *_, **__: (print('stopped', flush=True), time.sleep(60))"
    name = "os.fsync" if call == "fsync" else "os.replace"
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom argosy.guard.keys import KeyFile\n"
        f"{name} = {stop}\nKeyFile(Path(sys.argv[1])).add('new')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"stopped\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert file.path.read_bytes() == before
    file.add("next")
    assert {key.name for key in file.read()} == {"old", "next"}
    assert {path.name for path in file.path.parent.iterdir()} == {"keys.json"}


def test_a_symlink_to_a_key_file_is_kept_and_so_is_the_mode_of_the_file(file: KeyFile) -> None:
    file.add("first")
    file.path.chmod(0o400)  # the server only reads it
    link = KeyFile(file.path.with_name("link.json"))
    link.path.symlink_to(file.path)
    link.add("second")
    assert link.path.is_symlink()
    assert {key.name for key in file.read()} == {"first", "second"}
    assert file.path.stat().st_mode & 0o777 == 0o400


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[2J", "a" * 65, " a", "\u202eb"])
def test_an_unprintable_name_is_refused(file: KeyFile, name: str) -> None:
    with pytest.raises(UsageError, match="a key name must be 1 to 64 printable characters"):
        file.add(name)
    assert not file.path.exists()


# ── corrupt contents ────────────────────────────────────────────────────────────────────────────────────────────────


def key(**fields: Any) -> dict[str, Any]:
    return {"id": "key-1", "name": "one", "sha256": DIGEST} | fields


SPOILT: dict[str, tuple[Any, str]] = {
    "a number for sha256": ([key(sha256=7)], "key 1: sha256 must be 64 hexadecimal digits"),
    "a list for sha256": ([key(sha256=[DIGEST])], "key 1: sha256 must be 64 hexadecimal digits"),
    "a sha256 outside ASCII": ([key(sha256="é" * 64)], "key 1: sha256 must be 64 hexadecimal digits"),
    "no sha256": ([key(), {"id": "key-2", "name": "two"}], "key 2: it has no sha256"),
    "a list for id": ([key(id=["a"])], "key 1: id must be printable text, found a list"),
    "null for id": ([key(id=None)], "key 1: id must be printable text, found null"),
    "an id of two lines": ([key(id="a\nb")], "key 1: id must be printable text, found text"),
    "an object for name": ([key(name={})], "key 1: name must be text, found an object"),
    "text for scopes": ([key(scopes="infer")], "key 1: scopes must be a list, found text"),
    "a scope that is none": ([key(scopes=[["infer"]])], "key 1: unknown scope"),
    "true for a limit": ([key(tokens_per_day=True)], "key 1: tokens_per_day must be a whole number"),
    "half a limit": ([key(requests_per_minute=0.5)], "key 1: requests_per_minute must be a whole number"),
    "a limit without end": ([key(requests_per_minute=10**300)], "key 1: requests_per_minute must be"),
    "a field nobody knows": ([key(owner="x")], "key 1: unknown field 'owner'"),
    "two keys of one id": ([key(), key(name="b", sha256="2" * 64)], "key 2: it has the same id as key 1"),
    "two keys of one secret": ([key(), key(id="b", name="b")], "key 2: it has the same sha256 as key 1"),
    "no object": ([key(), "key"], "key 2: expected an object, found text"),
    "an object for keys": ({}, "keys must be a list, found an object"),
}


def write(file: KeyFile, text: str) -> None:
    """As a whole, because a server that looks in between may not see the same moment's second change."""
    made = file.path.with_suffix(".new")
    made.write_text(text)
    made.chmod(0o600)
    made.replace(file.path)


@pytest.mark.parametrize("name", SPOILT)
def test_a_corrupt_file_is_refused_with_the_number_of_the_key_and_its_fault(file: KeyFile, name: str) -> None:
    keys, fault = SPOILT[name]
    write(file, json.dumps({"version": 1, "keys": keys}))
    with pytest.raises(UsageError) as refused:
        KeyRing(file)
    assert fault in str(refused.value)
    assert DIGEST not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"version": 1,\n "keys": [\n  {"id" "a"}\n ]}', "line 3: Expecting ':' delimiter"),
        ('{"version": 1, "keys": [], "keys": []}', "an object has the same field twice"),
        ('{"version": true, "keys": []}', "version must be 1"),
        ("[" * 100_000, "it is nested deeper than 64 levels"),
        ('{"version": 1, "keys": [' + "9" * 400 + "]}", "it holds a number that is too large"),
        ('{"version": 1, "keys": [' + " " * (1 << 20) + "]}", "it is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_not_a_key_file_is_refused_with_its_fault(
    file: KeyFile, text: str, fault: str
) -> None:
    write(file, text)
    with pytest.raises(UsageError) as refused:
        file.read()
    assert fault in str(refused.value)


# ── keys as headers, against a server ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def keyed(
    service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, KeyFile, str, str]]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    secrets = [file.add(name)[1] for name in ("one", "two")]
    for url in start(make_app(only(service), KeyRing(file), block_tokens=16, max_sequences=8)):
        yield url, file, secrets[0], secrets[1]


def status(url: str, *headers: tuple[str, str]) -> int:
    return httpx.get(f"{url}/v1/models", headers=list(headers)).status_code


def test_one_key_in_two_headers_is_accepted_and_two_keys_are_refused(
    keyed: tuple[str, KeyFile, str, str],
) -> None:
    url, _, one, two = keyed
    bearer, header = ("Authorization", f"Bearer {one}"), ("x-api-key", one)
    assert [status(url, bearer), status(url, header), status(url, bearer, header)] == [200] * 3
    assert status(url, ("x-api-key", "wrong"), header) == 400
    assert status(url, header, ("x-api-key", two)) == 400
    assert status(url, bearer, bearer) == 400
    assert status(url, bearer, ("x-api-key", two)) == 401
    assert status(url, ("Authorization", "Basic b25lOnR3bw=="), header) == 200  # Basic is meant for a proxy
    answer = httpx.get(f"{url}/v1/models", headers=[bearer, ("x-api-key", two)])
    assert answer.json()["error"]["message"] == (
        "the authorization and x-api-key headers hold different keys\nhint: send only one"
    )
    assert one not in answer.text


@pytest.mark.parametrize(
    "secret", ["", " ", "é", "\x00", "a" * 20_000, "Bearer", "ak-" + "A" * 43, DIGEST], ids=ascii
)
def test_no_invalid_key_is_accepted_or_causes_a_server_error(
    keyed: tuple[str, KeyFile, str, str], secret: str
) -> None:
    host, _, port = keyed[0].removeprefix("http://").partition(":")
    for name in ("x-api-key: ", "authorization: Bearer "):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{name}{secret}\r\n\r\n"
            connection.sendall(head.encode("utf-8"))
            answer = connection.makefile("rb").read()
        assert answer.split()[1] in (b"401", b"400"), answer


def test_a_client_with_a_wrong_key_is_told_not_to_retry(keyed: tuple[str, KeyFile, str, str]) -> None:
    url, _, one, _ = keyed
    wrong = httpx.post(f"{url}/v1/messages", json={}, headers={"x-api-key": "wrong"})
    forbidden = httpx.get(f"{url}/metrics", headers={"x-api-key": one})
    assert (wrong.status_code, wrong.headers["x-should-retry"]) == (401, "false")
    assert (forbidden.status_code, forbidden.headers["x-should-retry"]) == (403, "false")
    fine = httpx.get(f"{url}/v1/models", headers={"x-api-key": one})
    assert "x-should-retry" not in fine.headers


@pytest.mark.parametrize("name", ["a number for sha256", "a sha256 outside ASCII", "a list for id"])
def test_a_key_file_corrupted_while_serving_admits_nobody_and_breaks_no_request(
    keyed: tuple[str, KeyFile, str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.guard.keys._LOOK_AGAIN_S", 0.01)
    url, file, one, _ = keyed
    good = file.path.read_text()
    seen = set()

    def becomes(wanted: int) -> bool:
        seen.add(found := status(url, ("x-api-key", one)))
        return found == wanted

    try:
        write(file, json.dumps({"version": 1, "keys": SPOILT[name][0]}))
        wait_for(lambda: becomes(401))
    finally:
        write(file, good)
    wait_for(lambda: becomes(200))
    assert seen == {200, 401}


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)
