"""Small JSON files are read so strictly that no two parsers can disagree about them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from argosy.checkpoint.untrusted_file import quote, read_at, read_object
from argosy.errors import CheckpointError


def test_an_object_is_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null, true, "\\u00e9"]}')

    assert read_object(path) == {"a": [1, 2.5, None, True, "é"]}


@pytest.mark.parametrize(
    ("text", "found"),
    [("[]", "a list"), ("null", "null"), ("1", "a whole number"), ("true", "true or false")],
)
def test_a_top_level_value_that_is_no_object_is_refused_by_type(
    tmp_path: Path, text: str, found: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)

    with pytest.raises(CheckpointError, match=f"config.json is {found}, expected an object"):
        read_object(path)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(100_000_001)

    with pytest.raises(CheckpointError, match="is 100000001 bytes long; at most 100000000 are read"):
        read_object(path)


def test_bytes_are_read_in_order_though_each_call_returns_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(100)))
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, nbytes, at: read(descriptor, min(nbytes, 7), at))
    with path.open("rb") as file:
        assert read_at(file.fileno(), 40, 30, path) == bytes(range(30, 70))
        with pytest.raises(CheckpointError, match="ends at byte 100; expected 40 bytes at 80"):
            read_at(file.fileno(), 40, 80, path)


def test_a_quote_is_short_and_printable() -> None:
    assert quote("plain é") == "plain é"
    assert quote("a\nb\x1b\ud800") == "a\\nb\\x1b\\ud800"
    assert len(quote("x" * 10_000)) < 200
    assert quote([1, None]) == "[1, None]"
