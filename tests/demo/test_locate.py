"""The name of the packed demo model: a digest that is taken once, and again when the experts change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from argosy.checkpoint import manifest
from argosy.demo import locate


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "experts.gguf"
    path.write_bytes(b"first")
    monkeypatch.setattr(locate, "EXPERTS_FILE", path)
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    return path


def name_of(content: bytes) -> str:
    return blake3(content).hexdigest()[:12]


def test_a_known_file_is_not_hashed_again(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate._version() == name_of(b"first")

    def refuse() -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(locate, "_digest", refuse)
    assert locate._version() == name_of(b"first")


def test_a_changed_file_has_another_name(experts: Path) -> None:
    locate._version()
    before = experts.stat()
    experts.write_bytes(b"other")  # of the same size
    os.utime(experts, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert locate._version() == name_of(b"other")


@pytest.mark.parametrize("note", ["", "one line", "a\nb\nc\n", "{key}\n../../etc\n", "{key}\n\xff"])
def test_a_note_that_cannot_be_meant_is_written_again(experts: Path, note: str) -> None:
    locate._version()
    known = locate.cache_directory() / "demo.version"
    key = known.read_text().splitlines()[0]
    known.write_bytes(note.replace("{key}", key).encode("latin-1"))
    assert locate._version() == name_of(b"first")
    assert known.read_text() == f"{key}\n{name_of(b'first')}\n"


def test_a_cache_that_cannot_be_written_is_no_error(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "file" / "cache"))
    assert locate._version() == name_of(b"first")


def test_a_pack_of_another_version_of_the_format_is_not_taken(
    experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def is_there(path: Path) -> object:
        asked.append(path)
        return object()

    monkeypatch.setattr(manifest, "open_pack", is_there)
    first = locate.locate()
    monkeypatch.setattr(manifest, "PACK_VERSION", manifest.PACK_VERSION + 1)
    assert locate.locate() != first
    assert len(set(asked)) == 2
