"""Keys: shown once, kept as digests in a file that only its owner can read, and invalid within a second if revoked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.guard.keys import LOCAL, KeyFile, KeyRing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_secret_is_not_stored_and_only_the_owner_can_read_the_key_file(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, secret = file.add("laptop", requests_per_minute=60)
    assert secret not in file.path.read_text()
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.read() == [key]
    assert key.requests_per_minute == 60


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.add("laptop")
    file.path.chmod(0o640)
    with pytest.raises(UsageError, match="other users can access"):
        file.read()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    os.mkfifo(path, 0o600)
    with pytest.raises(UsageError, match=r"keys\.json cannot be read: it is not a regular file"):
        KeyFile(path).read()


def test_only_a_missing_file_is_said_to_need_a_first_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes one"):
        KeyFile(tmp_path / "keys.json").read()
    with pytest.raises(UsageError, match="Is a directory") as raised:
        KeyFile(tmp_path).add("laptop")
    assert raised.value.hint is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2, "keys": []}',
        '{"version": 1, "keys": [{"id": "a"}]}',
        '{"version": 1, "keys": [{"id": "a", "name": "b", "sha256": "c", "owner": "d"}]}',
    ],
)
def test_a_file_that_is_not_a_key_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="is not a keys file of version 1"):
        KeyFile(path).read()


@pytest.mark.parametrize(
    ("limits", "fault"),
    [({"scopes": ("root",)}, "unknown scope 'root'"), ({"tokens_per_day": 0}, "tokens_per_day must be")],
)
def test_an_invalid_key_is_not_created(tmp_path: Path, limits: dict[str, object], fault: str) -> None:
    file = KeyFile(tmp_path / "keys.json")
    with pytest.raises(UsageError, match=fault):
        file.add("laptop", **limits)
    assert not file.path.exists()


def test_a_duplicate_name_is_refused_until_its_key_is_revoked(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    first, _ = file.add("laptop")
    with pytest.raises(UsageError, match="already exists"):
        file.add("laptop")
    assert file.revoke(first.id) == first
    file.add("laptop")
    with pytest.raises(UsageError, match="no key 'desk'"):
        file.revoke("desk")


def test_a_key_ring_finds_the_key_of_a_secret_and_none_for_another_text(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    keys = [file.add(name) for name in ("a", "b", "c")]
    ring = KeyRing(file)
    for key, secret in keys:
        assert ring.find(secret) == key
        assert ring.find(secret + "x") is None
        assert ring.find(key.sha256) is None
    assert ring.find(None) is None
    assert ring.find("\udc80") is None


def test_without_a_key_file_every_caller_is_local() -> None:
    assert KeyRing(None).find(None) is LOCAL


def test_a_revoked_key_is_invalid_within_a_second_and_a_corrupt_file_admits_nobody(tmp_path: Path) -> None:
    file, clock = KeyFile(tmp_path / "keys.json"), Clock()
    _, secret = file.add("laptop")
    other, other_secret = file.add("desk")
    ring = KeyRing(file, clock)
    file.revoke("laptop")
    clock.now += 1.0
    assert ring.find(secret) is None
    assert ring.find(other_secret) == other
    content = json.loads(file.path.read_text())
    file.path.write_text(json.dumps(content | {"version": 9}))
    clock.now += 1.0
    assert ring.find(other_secret) is None
