"""Models of other programs are found in place, and nothing hostile is followed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint.sampling import declared_sampling
from argosy.config import SamplingDefaults
from argosy.library.places import Found, choose_tower, find_models, hub_cache
from argosy.model.encoders.reading import EncoderFiles, find_encoders
from argosy.open.models import locate_model, open_files
from tests.library.caches import (
    GGUF,
    PARAMS,
    REVISION,
    TINY,
    TOWER,
    WEIGHTS,
    add_to_hub,
    add_to_lm_studio,
    add_to_ollama,
    names,
    write_manifest,
)


def notes_of(found: Found) -> str:
    return "\n".join(found.notes)


def test_models_of_three_programs_are_found_in_place(home: Path, hub: Path, ollama: Path) -> None:
    add_to_hub(hub, "Qwen/Qwen3-30B-A3B", TINY)
    add_to_lm_studio(home, "lmstudio-community/Qwen3-VL-GGUF", GGUF / "model.gguf")
    add_to_ollama(ollama, "qwen3-vl:30b", {WEIGHTS: GGUF / "model.gguf"})
    add_to_ollama(ollama, "model:q4", {WEIGHTS: GGUF / "model.gguf"}, host="hf.co", owner="someone")
    found = find_models()
    assert {model.name: model.place for model in found.models} == {
        "Qwen/Qwen3-30B-A3B": "hub",
        "lmstudio-community/Qwen3-VL-GGUF:model": "LM Studio",
        "qwen3-vl:30b": "Ollama",
        "hf.co/someone/model:q4": "Ollama",
    }
    assert found.notes == []
    for model in found.models:
        files = open_files(locate_model(model.name))
        assert files.path == model.path
        assert model.nbytes == sum(path.stat().st_size for path in model.files) > 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d", "HOME": "/h"}, "/d/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_the_hubs_cache_is_where_its_own_client_has_it(variables: dict[str, str], expected: str) -> None:
    assert hub_cache(variables) == Path(expected)


def test_ollamas_tower_and_one_above_its_quantisations_are_found(
    hub: Path, ollama: Path, tmp_path: Path
) -> None:
    add_to_ollama(ollama, "seeing:30b", {WEIGHTS: GGUF / "model.gguf", TOWER: GGUF / "mmproj-model.gguf"})
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "m-Q4_K_M.gguf").write_bytes((GGUF / "model.gguf").read_bytes())
    (tmp_path / "above").mkdir()
    for format in ("F32", "F16"):
        (tmp_path / "above" / f"mmproj-{format}.gguf").write_bytes((GGUF / "mmproj-model.gguf").read_bytes())
    add_to_hub(hub, "someone/seeing-GGUF", tmp_path / "quantised", folder="Q4_K_M")
    add_to_hub(hub, "someone/seeing-GGUF", tmp_path / "above")
    for name in ("seeing:30b", "someone/seeing-GGUF:Q4_K_M"):
        encoders = find_encoders(open_files(locate_model(name)))
        assert isinstance(encoders["picture"], EncoderFiles)
    by_name = {model.name: model for model in find_models().models}
    assert by_name["someone/seeing-GGUF:Q4_K_M"].tower.name == "mmproj-F16.gguf"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("params", "temperature", "note"),
    [
        ('{"temperature": 0.6, "repeat_penalty": 1, "stop": ["<|im_end|>"]}', 0.6, ""),
        ('{"temperature": 0.6, "temperature": 0.7}', 0.8, "gives the key 'temperature' twice"),
        ('{"x": "' + "a" * (1 << 20) + '"}', 0.8, "at most 1048576 are read"),
        ("[0.6]", 0.8, "a list, expected an object"),
    ],
)
def test_ollamas_parameters_of_a_model_are_its_defaults(
    ollama: Path, tmp_path: Path, params: str, temperature: float, note: str
) -> None:
    (tmp_path / "params").write_text(params)
    add_to_ollama(ollama, "model:30b", {WEIGHTS: GGUF / "model.gguf", PARAMS: tmp_path / "params"})
    found = declared_sampling(open_files(locate_model("model:30b")))
    assert found.temperature == temperature
    assert note in "".join(found.notes)
    assert bool(found.notes) == bool(note)


def test_parameters_that_several_models_of_ollama_do_not_share_are_not_guessed(
    ollama: Path, tmp_path: Path
) -> None:
    for name, value in (("cool:1b", 0.1), ("warm:1b", 1.5)):
        (tmp_path / "params").write_text(json.dumps({"temperature": value}))
        add_to_ollama(ollama, name, {WEIGHTS: GGUF / "model.gguf", PARAMS: tmp_path / "params"})
    found = declared_sampling(open_files(locate_model("cool:1b")))
    assert found.temperature == SamplingDefaults().temperature
    assert "their parameters differ" in found.notes[0]


def test_a_link_in_place_of_parameters_is_not_followed(ollama: Path, tmp_path: Path) -> None:
    (tmp_path / "params").write_text('{"temperature": 0.1}')
    add_to_ollama(ollama, "model:30b", {WEIGHTS: GGUF / "model.gguf", PARAMS: tmp_path / "params"})
    (blob,) = [one for one in (ollama / "blobs").iterdir() if one.stat().st_size < 100]
    blob.unlink()
    blob.symlink_to(tmp_path / "params")
    found = declared_sampling(open_files(locate_model("model:30b")))
    assert found.temperature == SamplingDefaults().temperature
    assert "leads outside" in found.notes[0]


def test_the_tower_that_is_exact_and_small_is_chosen() -> None:
    assert choose_tower(["mmproj-F32.gguf", "mmproj-bf16.gguf", "x/model.gguf"]) == "mmproj-bf16.gguf"
    assert choose_tower(["mmproj-F32.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"]) == "mmproj-F16.gguf"
    assert choose_tower(["model.gguf"]) is None


def test_main_is_the_revision_or_else_the_newest(hub: Path) -> None:
    old = add_to_hub(hub, "a/b", TINY, revision="1" * 40)
    new = add_to_hub(hub, "a/b", TINY, revision="2" * 40, is_main=False)
    assert locate_model("a/b") == old
    os.utime(old, (1, 1))
    (hub / "models--a--b" / "refs" / "main").write_text("../../../../etc")
    assert locate_model("a/b") == new
    (hub / "models--a--b" / "refs" / "main").unlink()
    assert locate_model("a/b") == new


def test_parts_of_a_split_model_are_one_and_quantisations_are_several(hub: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name in (
        "m-Q8_0-00001-of-00002.gguf",
        "m-Q8_0-00002-of-00002.gguf",
        "m-UD-Q4_K_XL.gguf",
        "plain.gguf",
    ):
        (files / name).write_bytes(b"GGUF")
    add_to_hub(hub, "a/b", files)
    assert names() == ["a/b:plain", "a/b:Q8_0", "a/b:UD-Q4_K_XL"]
    assert [len(model.files) for model in find_models().models] == [1, 2, 1]
    next((hub / "models--a--b" / "snapshots" / REVISION).glob("*00001*")).unlink()
    assert {model.name: model.num_missing for model in find_models().models}["a/b:Q8_0"] == 1


def test_a_blob_that_repositories_share_is_used(hub: Path) -> None:
    """Current clients of the hub keep large files of all repositories together."""
    snapshot = add_to_hub(hub, "a/b", TINY)
    blob = (snapshot / "model.safetensors").resolve()
    shared = hub / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert find_models().models[0].files[0].read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_links_that_lead_out_of_a_place_are_never_followed(home: Path, hub: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    shutil.copytree(TINY, secret)
    snapshot = add_to_hub(hub, "a/b", TINY)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(secret / "model.safetensors")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/none")
    (hub / "models--a--whole").symlink_to(secret)
    (hub / "models--a--snapshots" / "snapshots").mkdir(parents=True)
    (hub / "models--a--snapshots" / "snapshots" / ("c" * 40)).symlink_to(secret)
    folder = add_to_lm_studio(home, "a/b", GGUF / "model.gguf")
    (folder / "other.gguf").symlink_to("/etc/passwd")
    (folder.parent / "linked").symlink_to(secret)
    found = find_models()
    assert [model.name for model in found.models] == ["a/b:model"]
    for name in ("model.safetensors", "config.json", "other.gguf", "models--a--whole"):
        assert name in notes_of(found)


def test_a_directory_that_cannot_be_read_is_a_note(
    hub: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_hub(hub, "a/b", TINY)
    scan = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name in ("snapshots", "manifests"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_models()
    assert found.models == []
    assert notes_of(found).count("cannot be read: Permission denied") == 2


def test_a_directory_whose_names_alone_can_be_read_is_a_note(
    home: Path, hub: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mode is 0444: it can be listed, and nothing in it can be looked at."""
    shut = (
        add_to_hub(hub, "a/b", TINY),
        add_to_lm_studio(home, "a/b", GGUF / "model.gguf").parent,
        write_manifest(ollama, "model:1b", {"layers": []}).parent,
    )
    real = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and any(os.fspath(path).startswith(f"{one}/") for one in shut):
            raise PermissionError(13, "Permission denied", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    found = find_models()
    assert found.models == []
    assert found.notes == [f"{one} cannot be read: Permission denied" for one in shut]


def test_a_link_that_no_path_can_resolve_is_a_note(home: Path, hub: Path) -> None:
    for folder in (add_to_hub(hub, "a/b", TINY), add_to_lm_studio(home, "a/b", GGUF / "model.gguf")):
        (folder / "odd").symlink_to("x" * 300)  # no name is as long as that
    found = find_models()
    assert len(found.models) == 2
    assert notes_of(found).count("odd is skipped") == 2


LAYER = {"mediaType": WEIGHTS, "digest": "sha256:" + "0" * 64, "size": 4}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("not json", "is not JSON"),
        ("[]", "expected an object"),
        ({}, "layers are missing"),
        ({"layers": [LAYER] * 101}, "more than 100"),
        ({"layers": [7]}, "has a layer with digest"),
        ({"layers": [LAYER | {"digest": "sha256:../../../../../etc/passwd"}]}, "has a layer with digest"),
        ({"layers": [LAYER | {"digest": "/etc/passwd"}]}, "has a layer with digest"),
        ({"layers": [LAYER | {"digest": None}]}, "has a layer with digest"),
        ({"layers": [LAYER | {"size": "4"}]}, "has a layer with digest"),
        ({"layers": [LAYER]}, "is missing"),
        ({"layers": [LAYER | {"digest": "sha256:" + "1" * 64}]}, "leads outside"),
        ({"layers": [LAYER | {"digest": "sha256:" + "2" * 64, "size": 5}]}, "is 4 bytes long, and it says 5"),
        ({"layers": [LAYER | {"digest": "sha256:" + "2" * 64}] * 2}, "2 weight files"),
        (f'{{"layers": [], "x": "{"x" * (1 << 20)}"}}', "at most 1048576 are read"),
    ],
)
def test_a_manifest_that_lies_is_skipped_with_a_note(ollama: Path, content: object, problem: str) -> None:
    (ollama / "blobs").mkdir(parents=True)
    (ollama / "blobs" / f"sha256-{'1' * 64}").symlink_to("/etc/passwd")
    (ollama / "blobs" / f"sha256-{'2' * 64}").write_bytes(b"GGUF")
    write_manifest(ollama, "bad:1b", content)
    add_to_ollama(ollama, "good:1b", {WEIGHTS: GGUF / "model.gguf"})
    found = find_models()
    assert [model.name for model in found.models] == ["good:1b"]
    assert len(found.notes) == 1
    assert problem in found.notes[0]


def test_a_manifest_that_is_a_link_or_a_pipe_is_passed_over(ollama: Path) -> None:
    folder = write_manifest(ollama, "model:1b", {"layers": []}).parent
    (folder / "linked").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    found = find_models()
    assert found.models == []
    assert notes_of(found).count("is not a regular file") == 2


def add_named_folder(home: Path, folder: object, *, at: str = ".lmstudio") -> None:
    settings = home / at / "settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"language": "en", "downloadsFolder": folder}))


def test_lm_studios_models_are_also_where_its_settings_say(home: Path, tmp_path: Path) -> None:
    add_to_lm_studio(home, "a/default-GGUF", GGUF / "model.gguf")
    elsewhere = tmp_path / "drive" / "models"
    for name in ("b/moved-GGUF", "a/default-GGUF"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "model.gguf").write_bytes((GGUF / "model.gguf").read_bytes())
    add_named_folder(home, str(elsewhere))
    found = find_models()
    assert found.notes == []
    places = {model.name: model.root for model in reversed(found.models)}
    assert places["b/moved-GGUF:model"] == elsewhere
    assert places["a/default-GGUF:model"] == elsewhere  # the folder that LM Studio uses wins

    # A home elsewhere is found by its pointer, with settings of its own.
    (home / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'other'}\n")
    add_named_folder(tmp_path, str(tmp_path / "third"), at="other")
    (tmp_path / "third/c/pointed").mkdir(parents=True)
    (tmp_path / "third/c/pointed/model.gguf").write_bytes((GGUF / "model.gguf").read_bytes())
    assert "c/pointed:model" in names()


@pytest.mark.parametrize("folder", [7, "models", "", "/a\0b", ["/x"]])
def test_settings_of_lm_studio_that_name_no_folder_are_a_note(home: Path, folder: object) -> None:
    add_to_lm_studio(home, "a/default-GGUF", GGUF / "model.gguf")
    add_named_folder(home, folder)
    found = find_models()
    assert [model.name for model in found.models] == ["a/default-GGUF:model"]
    (note,) = found.notes
    assert "which is not an absolute path" in note


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', " " * ((4 << 20) + 1)])
def test_settings_of_lm_studio_that_cannot_be_read_are_a_note(home: Path, text: str) -> None:
    add_to_lm_studio(home, "a/default-GGUF", GGUF / "model.gguf")
    add_named_folder(home, None)
    assert find_models().notes == []
    (home / ".lmstudio/settings.json").write_text(text)
    found = find_models()
    assert len(found.models) == 1
    assert [note.partition(" is skipped")[0] for note in found.notes] == [
        str(home / ".lmstudio/settings.json")
    ]


@pytest.mark.parametrize("pointer", [b"", b"relative", b"/a\0b", b"/" + b"x" * 5000, b"\xff"])
def test_a_pointer_to_no_home_of_lm_studio_is_passed_over(home: Path, pointer: bytes) -> None:
    (home / ".lmstudio-home-pointer").write_bytes(pointer)
    assert find_models().models == []
