"""A stop is obeyed at once, and by the next process; users of a key are limited one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.guard import stops as stops_module
from argosy.guard.limits import TooMany
from argosy.guard.stops import Stops
from argosy.guard.users import Users


def test_a_stop_is_kept_for_the_next_process_and_can_be_ended(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml.stops"
    stops = Stops(path)
    assert not stops.has("model", "m")
    stops.set("model", "m", is_stopped=True)
    stops.set("user", "ü", is_stopped=True)
    for one in (stops, Stops(path)):
        assert one.has("model", "m")
        assert one.has("user", "somebody", "ü")
        assert not one.has("key", "m")
    assert path.stat().st_mode & 0o777 == 0o600
    stops.set("model", "m", is_stopped=False)
    assert not Stops(path).has("model", "m")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"version": 2, "model": [], "key": [], "user": []}', b"\xff",
        b'{"version": 1, "model": [1], "key": [], "user": []}', b'{"version": 1, "model": "m", "key": [], "user": []}',
        b'{"version": 1, "model": [], "key": [], "user": [], "more": []}',
        json.dumps({"version": 1, "model": ["x" * 600], "key": [], "user": []}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_and_stops_in_force_stay(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "stops"
    stops = Stops(path)
    stops.set("key", "k", is_stopped=True)
    path.write_bytes(data)
    with pytest.raises(UsageError, match="is not a file of stops"):
        stops.reload()
    assert stops.has("key", "k")


def test_the_number_of_stops_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops_module, "MOST_STOPPED", 2)
    stops = Stops()
    stops.set("user", "a", is_stopped=True)
    stops.set("user", "b", is_stopped=True)
    with pytest.raises(UsageError, match="at most 2"):
        stops.set("user", "c", is_stopped=True)


def test_each_user_of_a_key_has_a_limit_of_their_own() -> None:
    now = [0.0]
    users = Users(lambda: now[0])
    for _ in range(2):
        users.admit("key-1", "anna", 2)
    with pytest.raises(TooMany, match="2 requests per minute") as raised:
        users.admit("key-1", "anna", 2)
    assert raised.value.retry_after_s == 30
    users.admit("key-1", "ben", 2)
    users.admit("key-2", "anna", 2)
    now[0] += 30
    users.admit("key-1", "anna", 2)
    users.admit("key-1", "ben", None)
    assert "anna" not in repr(users._buckets._left)
