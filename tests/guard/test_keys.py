"""Keys: shown once, kept as digests in a file of their owner's, and gone within a second of being revoked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.guard.keys import LOCAL, KeyFile, KeyRing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_secret_is_told_once_and_its_file_is_the_owners_alone(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, secret = file.add("laptop", requests_per_minute=60)
    assert secret not in file.path.read_text()
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.read() == [key]
    assert key.requests_per_minute == 60


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.add("laptop")
    file.path.chmod(0o640)
    with pytest.raises(UsageError, match="other users can access"):
        file.read()


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
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="is not a keys file of version 1"):
        KeyFile(path).read()


@pytest.mark.parametrize(
    ("limits", "fault"),
    [({"scopes": ("root",)}, "unknown scope 'root'"), ({"tokens_per_day": 0}, "tokens_per_day must be")],
)
def test_a_key_that_cannot_be_meant_is_not_made(
    tmp_path: Path, limits: dict[str, object], fault: str
) -> None:
    file = KeyFile(tmp_path / "keys.json")
    with pytest.raises(UsageError, match=fault):
        file.add("laptop", **limits)
    assert not file.path.exists()


def test_two_keys_of_one_name_are_refused_and_revoking_frees_the_name(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    first, _ = file.add("laptop")
    with pytest.raises(UsageError, match="already exists"):
        file.add("laptop")
    assert file.revoke(first.id) == first
    file.add("laptop")
    with pytest.raises(UsageError, match="no key 'desk'"):
        file.revoke("desk")


def test_a_ring_finds_whose_secret_it_is_and_nobody_for_another(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    keys = [file.add(name) for name in ("a", "b", "c")]
    ring = KeyRing(file)
    for key, secret in keys:
        assert ring.find(secret) == key
        assert ring.find(secret + "x") is None
        assert ring.find(key.sha256) is None
    assert ring.find(None) is None
    assert ring.find("\udc80") is None


def test_without_a_file_everybody_is_local() -> None:
    assert KeyRing(None).find(None) is LOCAL


def test_a_revoked_key_ends_within_a_second_and_a_spoilt_file_lets_nobody_in(tmp_path: Path) -> None:
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
