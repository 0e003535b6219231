"""`rm` deletes a model's own files, names whose they are, and leaves what others use."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy.cli.main import main
from argosy.errors import UsageError
from argosy.library import kept
from argosy.library.names import add_alias
from argosy.library.places import find_models
from argosy.library.pull import fetch, look_up
from argosy.library.remove import plan_removal, remove
from tests.helpers.hub_server import REPOSITORY, Served, directory_files, served
from tests.library.caches import (
    GGUF,
    TINY,
    TOWER,
    WEIGHTS,
    add_to_hub,
    add_to_lm_studio,
    add_to_ollama,
    names,
    write_manifest,
)


def files_below(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def facts_of(path: Path) -> tuple[int, int, int, int]:
    """What a change of a file would change; reading it changes none of these."""
    found = path.lstat()
    return found.st_mtime_ns, found.st_ino, found.st_mode, found.st_size


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(directory_files(TINY)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_what_argosy_pulled_is_removed_at_once_and_wholly(
    server: Served, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(look_up(REPOSITORY))
    add_alias("small", REPOSITORY)
    kept.note_use(REPOSITORY)
    add_to_hub(hub, "a/b", TINY)
    before = look_up(REPOSITORY).nbytes
    assert plan_removal(REPOSITORY).nbytes >= before
    assert main(["rm", REPOSITORY]) == 0
    assert capsys.readouterr().out.startswith(f"removes  {REPOSITORY}: ")
    assert names() == ["a/b"]
    assert [path.name for path in hub.iterdir() if "owner" in path.name] == []
    assert (kept.read().pulled, kept.read().used, kept.read().aliases) == ({}, {}, {})


def test_an_unfinished_pull_is_removed(server: Served, hub: Path) -> None:
    download = look_up(REPOSITORY)
    weights, config = download.blobs
    # One file is here already: whether it would arrive before the refusal of the other is left to the threads.
    config.path.parent.mkdir(parents=True)
    shutil.copyfile(TINY / config.name, config.path)
    server.lies["model.safetensors"] = {"status": "404"}
    with pytest.raises(Exception, match="404"):
        fetch(download)
    weights.partial.write_bytes(bytes(100))
    assert names() == []
    removal = plan_removal(REPOSITORY)
    assert removal.whose is None
    assert removal.nbytes == 100 + config.nbytes
    remove(removal)
    assert files_below(hub / "models--owner--model") == set()


def test_a_removal_that_was_killed_is_finished_by_the_next_one(server: Served, hub: Path) -> None:
    fetch(look_up(REPOSITORY))
    removal = plan_removal(REPOSITORY)
    killed = replace(removal, files=tuple(path for path in removal.files if path.name == "model.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "changing", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove(killed)
    assert names() == []
    assert files_below(hub) != set()
    assert main(["rm", REPOSITORY]) == 0
    assert [path for path in hub.rglob("*") if "owner" in path.name] == []
    assert kept.read().pulled == {}


def test_files_of_another_program_are_named_with_their_owner_and_need_consent(
    home: Path, hub: Path, ollama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_to_hub(hub, "a/b", TINY)
    add_to_lm_studio(home, "c/d", GGUF / "model.gguf")
    add_to_ollama(ollama, "e:1b", {WEIGHTS: GGUF / "model.gguf"})
    before = files_below(home / "hf") | files_below(home / ".lmstudio") | files_below(ollama)
    for name, whose in (("a/b", "the hub's cache"), ("c/d:model", "LM Studio's"), ("e:1b", "Ollama's")):
        assert main(["rm", name]) == 2
        said = capsys.readouterr()
        assert whose in said.out
        assert str(plan_removal(name).files[0]) in said.out
        assert "cannot ask for confirmation: stdin is not a terminal" in said.err
        assert f"`--yes` removes {name}" in said.err
    assert files_below(home / "hf") | files_below(home / ".lmstudio") | files_below(ollama) == before
    for name in ("a/b", "c/d:model", "e:1b"):
        assert main(["rm", name, "--yes"]) == 0
    assert names() == []
    assert files_below(home / "hf") | files_below(home / ".lmstudio") | files_below(ollama) == set()


def test_blobs_that_two_snapshots_share_stay(hub: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(TINY, changed)
    (changed / "config.json").write_text((TINY / "config.json").read_text() + " ")
    old = add_to_hub(hub, "a/b", TINY, revision="1" * 40)
    new = add_to_hub(hub, "a/b", changed, revision="2" * 40)
    removal = plan_removal("a/b")
    shared = (new / "model.safetensors").resolve()
    own = (new / "config.json").resolve()
    assert own in removal.files
    assert shared not in removal.files
    assert removal.num_shared >= 1
    main = hub / "models--a--b/refs/main"
    assert main in removal.files  # nothing would be where it points
    assert removal.nbytes == own.stat().st_size + main.stat().st_size
    remove(removal)
    assert shared.exists()
    assert not own.exists()
    assert not new.exists()
    assert [model.path for model in find_models().models] == [old]


def test_one_of_several_quantisations_goes_alone(hub: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number, name in enumerate(("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf")):
        (files / name).write_bytes(b"GGUF" + bytes(number))
    snapshot = add_to_hub(hub, "a/b", files)
    remove(plan_removal("a/b:Q4_K_M"))
    assert files_below(snapshot) == {"m-Q8_0.gguf", "mmproj-F16.gguf"}
    assert len(list((hub / "models--a--b" / "blobs").iterdir())) == 2
    remove(plan_removal("a/b:Q8_0"))
    assert files_below(hub) == set()


def test_an_unfinished_quantisation_of_the_same_repository_stays(hub: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    add_to_hub(hub, "a/b", files)
    partial = hub / "models--a--b" / "blobs" / f"{'d' * 64}.incomplete"
    partial.write_bytes(b"half")
    with kept.changing() as known:
        known.pulled["a/b:Q8_0"] = kept.Pulled("a/b", "b" * 40, 8, ("d" * 64,))
    remove(plan_removal("a/b:Q4_K_M"))
    assert partial.read_bytes() == b"half"


def test_a_blob_in_the_store_of_all_repositories_loses_its_link_alone(hub: Path) -> None:
    snapshot = add_to_hub(hub, "a/b", TINY)
    blob = (snapshot / "model.safetensors").resolve()
    shared = hub / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    remove(plan_removal("a/b"))
    assert files_below(hub) == {f"blobs/ab/{shared.name}"}


def test_layers_that_two_models_of_ollama_share_stay(ollama: Path) -> None:
    add_to_ollama(ollama, "a:1b", {WEIGHTS: GGUF / "model.gguf", TOWER: GGUF / "mmproj-model.gguf"})
    add_to_ollama(ollama, "b:1b", {WEIGHTS: GGUF / "model.gguf"})
    removal = plan_removal("a:1b")
    assert len(removal.files) == 2  # the manifest and the tower
    assert removal.num_shared == 1
    remove(removal)
    assert names() == ["b:1b"]
    write_manifest(ollama, "c:1b", "damaged")
    with pytest.raises(UsageError, match="cannot determine which files") as refusal:
        plan_removal("b:1b")
    assert "`ollama rm b:1b`" in str(refusal.value)


def test_a_model_that_is_being_fetched_is_not_removed(server: Served, hub: Path) -> None:
    fetch(look_up(REPOSITORY))
    lock = next((hub / ".locks" / "models--owner--model").iterdir())
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being fetched now"):
            plan_removal(REPOSITORY)
    plan_removal(REPOSITORY)


def test_only_a_whole_name_is_removed(hub: Path, tmp_path: Path) -> None:
    add_to_hub(hub, "owner/long-name", TINY)
    add_alias("short", "owner/long-name")
    for name in ("long", "short", str(tmp_path), "nothing"):
        with pytest.raises(UsageError, match="no model is named"):
            plan_removal(name)
    assert plan_removal("long-name").name == "owner/long-name"


def test_a_hostile_link_in_a_snapshot_deletes_nothing_elsewhere(hub: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    snapshot = add_to_hub(hub, "a/b", TINY)
    (snapshot / "tokenizer.json").symlink_to(precious)
    (snapshot / "folder").symlink_to(tmp_path)
    (hub / "models--a--b" / "blobs" / "linked").symlink_to(precious)
    remove(plan_removal("a/b"))
    assert precious.read_text() == "keep"
    assert files_below(hub) == set()


@pytest.mark.parametrize(
    "place", [".locks/models--a--b", ".locks", "models--a--b/refs", "models--a--b/blobs", "models--a--b"]
)
def test_a_link_where_a_directory_belongs_is_refused_and_nothing_goes(
    hub: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the directory behind the link has the same names as ours."""
    add_to_hub(hub, "a/b", TINY)
    (hub / ".locks" / "models--a--b").mkdir(parents=True)
    (hub / ".locks" / "models--a--b" / "x.lock").touch()
    documents = tmp_path / "documents"
    shutil.move(hub / place, documents)
    (documents / "novel.txt").write_text("chapter one")
    (documents / "drafts").mkdir()
    (documents / "drafts" / "old.txt").write_text("chapter zero")
    (hub / place).symlink_to(documents)
    before = {name: facts_of(documents / name) for name in files_below(documents)}
    here = files_below(hub)
    assert main(["rm", "a/b", "--yes"]) == 2
    said = capsys.readouterr().err
    assert "is a symbolic link, and none is followed" in said or "no model is named" in said
    assert {name: facts_of(documents / name) for name in files_below(documents)} == before
    assert files_below(hub) == here


def test_a_link_that_is_planted_after_the_question_is_not_followed(hub: Path, tmp_path: Path) -> None:
    add_to_hub(hub, "a/b", TINY)
    removal = plan_removal("a/b")
    documents = tmp_path / "documents"
    shutil.move(hub / "models--a--b" / "refs", documents)
    (hub / "models--a--b" / "refs").symlink_to(documents)
    with pytest.raises(UsageError, match=r"refs cannot be deleted: it is a symbolic link"):
        remove(removal)
    assert files_below(documents) == {"main"}


def test_a_lock_of_another_user_is_told_with_its_name(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_hub(hub, "a/b", TINY)
    lock = hub / ".locks" / "models--a--b" / "x.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    real = os.open

    def refuse(path: Any, *more: Any, **named: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match=r"x\.lock cannot be read: Permission denied"):
        plan_removal("a/b")
