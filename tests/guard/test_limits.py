"""Limits of a key: requests per minute, concurrent requests, tokens per day."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.guard.keys import LOCAL, Key
from argosy.guard.limits import Limits, TooMany, Use, UseFile


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(**limits: int) -> Key:
    return replace(LOCAL, id="k", **limits)  # type: ignore[arg-type]


def refused_for(limits: Limits, one: Key) -> int:
    with pytest.raises(TooMany) as caught:
        limits.begin(one)
    return caught.value.retry_after_s


def test_the_requests_of_a_minute_may_come_at_once_and_are_then_refilled_over_time(clock: Clock) -> None:
    limits, one = Limits(clock), key(requests_per_minute=3)
    for _ in range(3):
        limits.begin(one)
        limits.end(one)
    assert refused_for(limits, one) == 20
    clock.now += 19.9
    assert refused_for(limits, one) == 1
    clock.now += 0.2
    limits.begin(one)


def test_concurrent_requests_are_limited(clock: Clock) -> None:
    limits, one = Limits(clock), key(concurrent_requests=2)
    limits.begin(one)
    limits.begin(one)
    refused_for(limits, one)
    limits.count(one, 5)
    limits.end(one)
    limits.begin(one)


def test_the_answer_that_uses_up_the_days_tokens_may_finish(clock: Clock) -> None:
    limits, one = Limits(clock), key(tokens_per_day=100)
    limits.begin(one)
    limits.count(one, 99)
    limits.end(one)
    limits.begin(one)
    limits.count(one, 50)
    limits.end(one)
    clock.now += 3600
    assert refused_for(limits, one) == 86_400 - 3600
    clock.now += 86_400 - 3600
    limits.begin(one)


def test_a_refused_request_costs_nothing_and_keys_have_separate_limits(clock: Clock) -> None:
    limits, one = Limits(clock), key(concurrent_requests=1, requests_per_minute=2)
    limits.begin(one)
    for _ in range(5):
        refused_for(limits, one)
    limits.end(one)
    limits.begin(one)  # the second request of the minute
    limits.begin(replace(one, id="other"))


def test_a_key_without_limits_is_never_refused(clock: Clock) -> None:
    limits, one = Limits(clock), key()
    for _ in range(1000):
        limits.begin(one)
        limits.count(one, 10**6)
        limits.end(one)


def test_setting_the_clock_back_restores_no_tokens_and_locks_no_key_out_for_more_than_a_day(
    clock: Clock,
) -> None:
    limits, one = Limits(clock), key(tokens_per_day=10)
    limits.begin(one)
    limits.count(one, 6)
    clock.now -= 1e6
    limits.count(one, 4)
    limits.end(one)
    assert refused_for(limits, one) == 86_400
    clock.now += 86_400
    limits.begin(one)


def test_setting_the_clock_back_restores_no_requests_and_refuses_none_for_more_than_a_minute(
    clock: Clock,
) -> None:
    limits, one = Limits(clock), key(requests_per_minute=1)
    limits.begin(one)
    clock.now -= 1e6
    refused_for(limits, one)
    clock.now += 60
    limits.begin(one)


# ── usage that outlives the process ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json.use"


def reopened(limits: Limits, path: Path, clock: Clock, *known: str) -> Limits:
    limits.close()
    return Limits(clock, file=UseFile(path), known=known)


def test_a_restart_keeps_token_counts_and_forgets_running_requests(clock: Clock, path: Path) -> None:
    one = key(tokens_per_day=100, requests_per_minute=2, concurrent_requests=1)
    limits = Limits(clock, file=UseFile(path))
    limits.begin(one)
    limits.count(one, 60)  # the process is killed in the middle of the answer
    limits = reopened(limits, path, clock, "k")
    limits.begin(one)
    limits.count(one, 40)
    limits = reopened(limits, path, clock, "k")
    clock.now += 3600
    assert refused_for(limits, one) == 86_400 - 3600
    limits.close()


def test_a_restart_does_not_refill_the_requests_of_a_minute(clock: Clock, path: Path) -> None:
    one = key(requests_per_minute=1)
    limits = Limits(clock, file=UseFile(path))
    limits.begin(one)
    limits = reopened(limits, path, clock, "k")
    clock.now += 30
    assert refused_for(limits, one) == 30
    limits.close()


def test_usage_of_a_removed_key_is_forgotten_now_and_after_a_restart(clock: Clock, path: Path) -> None:
    gone, also_gone, stays = (replace(LOCAL, id=name) for name in "abc")
    limits = Limits(clock, file=UseFile(path))
    for one in (gone, also_gone, stays):
        limits.begin(one)
        limits.count(one, 5)
    limits.save()
    limits.forget("a")
    limits.count(gone, 5)  # the last tokens of a request that was still running
    limits.end(gone)
    limits = reopened(limits, path, clock, "a", "c")
    assert limits._uses.keys() == {"c"}
    limits.close()
    file = UseFile(path)
    assert file.read().keys() == {"c"}
    file.close()


def test_only_the_owner_and_one_server_at_a_time_can_use_a_usage_file(path: Path) -> None:
    file = UseFile(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="in use by another server"):
        UseFile(path)
    file.close()
    UseFile(path).close()


def test_a_full_drive_is_named_as_the_reason(path: Path) -> None:
    with closing(UseFile(path)) as file:
        file._database.execute("PRAGMA max_page_count = 3")  # what is beyond is as on a full drive
        with pytest.raises(sqlite3.OperationalError, match="full"):
            file.write({f"key-{number:08x}": Use(1.0, 2.0) for number in range(2000)}, set())


def test_a_file_that_is_not_a_usage_file_is_refused_with_a_hint(path: Path) -> None:
    path.write_text("half a page of something else" * 100)
    with pytest.raises(UsageError, match=r"(?s)not a usage file of version 1.*remove it"):
        UseFile(path)


def test_what_others_have_counted_replaces_the_tokens_of_the_day(clock: Clock) -> None:
    limits, one = Limits(clock), key(tokens_per_day=100)
    assert limits.used_today(one) == (0, 0)
    limits.begin(one)
    limits.count(one, 30)
    clock.now += 100
    assert limits.used_today(one) == (30, 86_300)
    limits.take_used(one, 70, 500)
    assert limits.used_today(one) == (70, 500)
    limits.count(one, 5)
    assert limits.used_today(one) == (75, 500)
    with pytest.raises(TooMany) as caught:
        limits.take_used(one, 100, 400)
    assert caught.value.retry_after_s == 400
    clock.now += 401
    assert limits.used_today(one) == (0, 0)
    limits.forget(one.id)
    assert limits.used_today(one) == (0, 0)
