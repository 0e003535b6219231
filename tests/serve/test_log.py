"""Log lines reach their reader, and the server never waits for a reader that does not read."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import threading
import time
from pathlib import Path

import pytest

from argosy.serve.http.log import LogWriter


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("argosy.serve", logging.INFO, "", 0, text, None, None)


def read_all(descriptor: int) -> str:
    with os.fdopen(descriptor) as file:
        return file.read()


def test_lines_are_written_in_order_including_those_queued_at_the_end() -> None:
    reader, writer = os.pipe()
    log = LogWriter(writer)
    for number in range(100):
        log.handle(record(f"line {number}"))
    log.close()
    os.close(writer)
    assert re.findall(r"line (\d+)", read_all(reader)) == [str(number) for number in range(100)]


def test_a_log_in_a_file_keeps_its_newest_lines_whole_within_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    log = LogWriter(descriptor, most_bytes=4000)
    for number in range(1000):
        log.handle(record(f"line {number}"))
    log.close()
    os.close(descriptor)
    assert path.stat().st_size < 4100
    lines = path.read_text().splitlines()
    numbers = [int(re.fullmatch(r"[-0-9:, ]+ line (\d+)", line)[1]) for line in lines]  # type: ignore[index]
    assert numbers == list(range(1000 - len(lines), 1000))


def test_a_log_on_a_full_drive_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    tried, write = [threading.Event(), threading.Event()], os.write

    def full(to: int, data: bytes) -> int:
        if to == descriptor and not tried[1].is_set():
            (tried[1] if b"two" in data else tried[0]).set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(to, data)

    monkeypatch.setattr("argosy.serve.http.log.os.write", full)
    log = LogWriter(descriptor)
    log.handle(record("one"))
    assert tried[0].wait(10)
    log.handle(record("two"))
    assert tried[1].wait(10)
    log.handle(record("three"))
    log.close()
    os.close(descriptor)
    text = path.read_text()
    assert "three" in text
    assert "2 log lines were dropped" in text
    assert "one" not in text


def test_logging_never_waits_for_an_unread_pipe_and_dropped_lines_are_counted() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    log = LogWriter(writer, most_lines=8)
    began = time.monotonic()
    for number in range(100):
        log.handle(record(f"line {number}"))
    assert time.monotonic() - began < 5

    found: list[str] = []
    reading = threading.Thread(target=lambda: found.append(read_all(reader)))
    reading.start()
    log.close()
    os.close(writer)
    reading.join(10)
    numbers = re.findall(r"line (\d+)", found[0])
    dropped = [int(count) for count in re.findall(r"(\d+) log lines were dropped", found[0])]
    assert len(numbers) + sum(dropped) == 100
    assert sum(dropped) >= 90
    assert [int(number) for number in numbers] == sorted({int(number) for number in numbers})


def test_logging_to_a_closed_pipe_raises_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = LogWriter(writer, most_lines=2)
    for number in range(100):
        log.handle(record(f"line {number}"))
    log.close()
    os.close(writer)


def test_json_lines_hold_the_facts_of_a_record_or_its_text() -> None:
    reader, writer = os.pipe()
    log = LogWriter(writer, log_format="json")
    with_facts = record("%(route)s in text")
    with_facts.args = {"route": "/x"}
    with_facts.facts = {"event": "request", "route": "/x", "where": "line 1\nline 2"}
    log.handle(with_facts)
    log.handle(record('a "quoted" text\nof two lines'))
    log.close()
    os.close(writer)
    lines = [json.loads(line) for line in read_all(reader).splitlines()]
    times = [line.pop("time") for line in lines]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00", at) for at in times)
    assert lines == [
        {"level": "info", "event": "request", "route": "/x", "where": "line 1\nline 2"},
        {"level": "info", "event": "message", "message": 'a "quoted" text\nof two lines'},
    ]
