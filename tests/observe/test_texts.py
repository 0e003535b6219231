"""Texts come with their domains; sizes are bounded, and every other form is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from argosy.errors import UsageError
from argosy.observe import texts
from argosy.observe.texts import read_texts


def line(domain: object, text: object) -> str:
    return json.dumps({"domain": domain, "text": text}) + "\n"


def test_a_file_is_a_domain_and_labelled_lines_have_theirs(tmp_path: Path) -> None:
    (tmp_path / "maths.txt").write_text("1 + 1 = 2")
    (tmp_path / "more.jsonl").write_text(
        line("code", "x = 1") + "\n" + line("maths", "2") + line("code", "y")
    )
    assert read_texts([tmp_path / "maths.txt", tmp_path / "more.jsonl"], most_bytes=100) == {
        "maths": ["1 + 1 = 2", "2"],
        "code": ["x = 1", "y"],
    }


def test_only_the_beginning_of_a_file_is_read_and_no_character_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("é" * 1000, encoding="utf-8")
    assert read_texts([path], most_bytes=101) == {"long": ["é" * 50]}
    os.truncate(path, 1 << 40)  # a terabyte, as the file system says
    assert read_texts([path], most_bytes=100) == {"long": ["é" * 50]}


def test_no_more_is_kept_of_a_domain_than_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(line("a", "x" * 40) for _ in range(100)))
    assert read_texts([tmp_path / "a.jsonl"], most_bytes=100) == {"a": ["x" * 40] * 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"domain": "a"}', "line 1: it is not an object with `domain` and `text`"),
        ('{"domain": "a", "text": "b", "more": 1}', "and nothing else"),
        ('{"domain": "a", "domain": "b", "text": "c"}', "duplicate key"),
        (line("a", "b") + "[]", "line 2: it is not an object"),
        (line("", "b"), "no `domain` of 1 to 64 printable"),
        (line("a\n", "b"), "no `domain` of 1 to 64 printable"),
        (line("a" * 65, "b"), "no `domain` of 1 to 64 printable"),
        (line(None, "b"), "no `domain`"),
        (line("a", None), "a `text` that is not text"),
        (line("a", ["b"]), "a `text` that is not text"),
        ("{", "line 1: it is not JSON"),
        ("[" * 100_000, "nested deeper"),
        (line("a", ""), "the domain 'a' has no text"),
        ("".join(line(str(i), "x") for i in range(65)), "more than 64 domains"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_texts([path], most_bytes=1000)


def test_files_that_cannot_be_domains_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "one" / "a.txt"):
        path.write_text("x")
    with pytest.raises(UsageError, match="two files are named 'a'"):
        read_texts([tmp_path / "a.txt", tmp_path / "one" / "a.txt"], most_bytes=10)
    with pytest.raises(UsageError, match="cannot be read"):
        read_texts([tmp_path / "absent.txt"], most_bytes=10)
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff\xfecd")
    with pytest.raises(UsageError, match="not UTF-8 text: byte 2"):
        read_texts([tmp_path / "bytes.txt"], most_bytes=10)
    monkeypatch.setattr(texts, "MOST_LINE_BYTES", 50)
    (tmp_path / "line.jsonl").write_text(line("a", "x" * 50))
    with pytest.raises(UsageError, match="at most 50 are read"):
        read_texts([tmp_path / "line.jsonl"], most_bytes=10)
    monkeypatch.setattr(texts, "MOST_JSONL_BYTES", 60)
    with pytest.raises(UsageError, match="has more than"):
        read_texts([tmp_path / "line.jsonl"], most_bytes=10)
