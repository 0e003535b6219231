"""The packed demo model is named by a digest of the experts, made once, and resumed by the next call if interrupted."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from argosy.checkpoint import manifest
from argosy.checkpoint import pack as pack_module
from argosy.checkpoint.manifest import open_pack
from argosy.checkpoint.upcycle import new_directory
from argosy.demo import build, locate
from argosy.demo.package import GENERATION
from argosy.errors import CheckpointError, UsageError
from argosy.model.encoders.reading import find_encoders
from argosy.model.families import open_model
from argosy.user_directories import cache_directory
from tests.models.tiny import qwen2_moe, write_model


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "experts.gguf"
    path.write_bytes(b"first")
    monkeypatch.setattr(locate, "find_experts", lambda: path)
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "cache"))
    return path


def name_of(content: bytes) -> str:
    return blake3(str(GENERATION).encode() + content).hexdigest()[:12]


def test_a_known_file_is_not_hashed_again(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate._version() == name_of(b"first")

    def refuse(path: Path) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(locate, "_digest", refuse)
    assert locate._version() == name_of(b"first")


def test_a_changed_file_gives_another_name(experts: Path) -> None:
    locate._version()
    before = experts.stat()
    experts.write_bytes(b"other")  # the same size
    os.utime(experts, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert locate._version() == name_of(b"other")


@pytest.mark.parametrize("note", ["", "one line", "a\nb\nc\n", "{key}\n../../etc\n", "{key}\n\xff"])
def test_an_invalid_version_file_is_written_again(experts: Path, note: str) -> None:
    locate._version()
    known = cache_directory() / "demo.version"
    key = known.read_text().splitlines()[0]
    known.write_bytes(note.replace("{key}", key).encode("latin-1"))
    assert locate._version() == name_of(b"first")
    assert known.read_text() == f"{key}\n{name_of(b'first')}\n"


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_version_file_is_replaced_if_it_is_no_file_and_its_target_stays(
    experts: Path, tmp_path: Path, kind: str
) -> None:
    known, victim = cache_directory() / "demo.version", tmp_path / "victim"
    known.parent.mkdir()
    victim.write_bytes(b"keep")
    known.symlink_to(victim) if kind == "link" else os.mkfifo(known)
    assert locate._version() == name_of(b"first")
    assert known.is_file()
    assert not known.is_symlink()
    assert victim.read_bytes() == b"keep"


def test_an_unwritable_cache_is_no_error(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "file" / "cache"))
    assert locate._version() == name_of(b"first")


def test_a_pack_of_another_format_version_is_not_used(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def is_there(path: Path) -> object:
        asked.append(path)
        return object()

    monkeypatch.setattr(manifest, "open_pack", is_there)
    first = locate.locate()
    monkeypatch.setattr(manifest, "PACK_VERSION", manifest.PACK_VERSION + 1)
    assert locate.locate() != first
    assert len(set(asked)) == 2


# Making the pack


@pytest.fixture
def builds(experts: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths where the merged model was built, with a tiny model in its place."""
    built: list[Path] = []

    def build_demo(destination: Path, **_: object) -> None:
        with new_directory(destination) as directory:
            write_model(directory, qwen2_moe(num_hidden_layers=2, num_experts=4), seed=5)
        built.append(destination)

    monkeypatch.setattr(build, "build_demo", build_demo)
    return built


def test_a_damaged_pack_says_how_to_build_it_again(builds: list[Path]) -> None:
    packed = locate.locate()
    os.truncate(packed / "experts.bin", 100)
    with pytest.raises(CheckpointError, match=r"experts\.bin has 100 bytes") as refusal:
        locate.locate()
    assert refusal.value.hint == f"remove {packed}: the same command builds the demo again"


class Killed(BaseException):
    """Stands in for a kill: nothing in a pack catches it."""


def names(cache: Path) -> set[str]:
    """The names of models, complete or not, without the lock and the version file."""
    return {path.name for path in cache.iterdir() if "demo-" in path.name}


@pytest.mark.parametrize("at", ["__enter__", "_copy", "finish"])
def test_an_interrupted_pack_is_finished_by_the_next_call(at: str, builds: list[Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def end(*_: Any) -> None:
            raise Killed

        patch.setattr(pack_module._Writer, at, end)
        with pytest.raises(Killed):
            locate.locate()

    packed = locate.locate()

    assert open_pack(packed) is not None
    assert len(builds) == 1  # the merged model is reused
    assert names(cache_directory()) == {packed.name}


def test_a_damaged_merged_model_is_built_again(builds: list[Path]) -> None:
    packed = locate.locate()
    merged = builds[0]
    for path in packed.iterdir():
        path.unlink()
    packed.rmdir()
    write_model(merged, qwen2_moe(num_hidden_layers=2, num_experts=4), seed=5)
    (merged / "model.safetensors").write_bytes(b"")

    assert open_pack(locate.locate()) is not None
    assert builds == [merged, merged]


def test_leftovers_of_a_finished_pack_are_removed(builds: list[Path]) -> None:
    packed = locate.locate()
    builds[0].mkdir()
    assert locate.locate() == packed
    assert names(cache_directory()) == {packed.name}


def test_leftovers_of_any_version_are_removed_unless_in_use(builds: list[Path]) -> None:
    cache = cache_directory()
    for name in (
        ".demo-0123456789ab-1.abcdefgh.partial",
        ".demo-0123456789ab-1.ijklmnop.partial",
        "demo-0123456789ab-1",
        "demo-0123456789ab-1-q8.partial",
    ):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_bytes(b"")
    (cache / "demo-0123456789ab-1-q8").mkdir()
    held = os.open(cache / ".demo-0123456789ab-1.ijklmnop.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        packed = locate.locate()
    finally:
        os.close(held)
    assert names(cache) == {".demo-0123456789ab-1.ijklmnop.partial", "demo-0123456789ab-1-q8", packed.name}


def test_directories_of_the_user_stay_whatever_they_are_called(builds: list[Path]) -> None:
    cache = cache_directory()
    theirs = (
        "demo-videos",
        "demo-0123456789ab",
        "demo-0123456789ab-1-old",
        "demo-1",
        ".demo-reel.partial",
        ".demo-0123456789ab-1.partial",
    )
    for name in theirs:
        (cache / name).mkdir(parents=True)
        (cache / name / "holiday.mp4").write_bytes(b"keep")
    packed = locate.locate()
    assert names(cache) == {*theirs, packed.name}
    assert all((cache / name / "holiday.mp4").read_bytes() == b"keep" for name in theirs)


def test_a_read_only_cache_serves_its_pack(builds: list[Path]) -> None:
    packed = locate.locate()
    builds[0].mkdir()
    (packed.parent / "demo.lock").mkdir()  # a directory, so that not even root can lock it
    assert locate.locate() == packed


@pytest.mark.parametrize("cache", ["/proc/argosy", "file/cache", "dangling"])
def test_a_cache_directory_that_cannot_be_used_is_named(
    builds: list[Path], tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("/proc/argosy")
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / cache))
    with pytest.raises(UsageError, match=f"the cache cannot be used: .*{cache}: ") as refusal:
        locate.locate()
    assert "ARGOSY_CACHE names another directory" in str(refusal.value)
    assert builds == []


def test_a_link_in_the_place_of_the_lock_or_the_model_is_refused(builds: list[Path], tmp_path: Path) -> None:
    cache, victim = cache_directory(), tmp_path / "victim"
    cache.mkdir()
    victim.mkdir()
    (victim / "file").write_bytes(b"keep")
    for name, target in (("demo.lock", victim / "file"), (locate.locate().name.removesuffix("-q8"), victim)):
        shutil.rmtree(cache)
        cache.mkdir()
        (cache / name).symlink_to(target)
        with pytest.raises(UsageError, match=f"the cache cannot be used: .*{name}: it is a symbolic link"):
            locate.locate()
        assert (victim / "file").read_bytes() == b"keep"


def test_the_pack_keeps_what_the_model_hears_and_sees_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing = Path(__file__).parents[1] / "models" / "reference_seeing" / "qwen3_vl_moe"
    monkeypatch.setattr(
        build, "build_demo", lambda destination, progress: shutil.copytree(seeing, destination)
    )
    locate._make(tmp_path / "demo-x", tmp_path / "demo-x-q8", None)
    assert {"picture"} == set(find_encoders(open_model(tmp_path / "demo-x-q8")))
