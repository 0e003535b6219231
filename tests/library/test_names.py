"""A name finds one model, or says which match, what is near and how to get it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from argosy.errors import ArgosyError, CheckpointError, UsageError
from argosy.library import kept
from argosy.library.names import add_alias, is_name, look_up, name_of, remove_alias
from argosy.open.models import locate_model, open_files
from tests.library.caches import GGUF, TINY, WEIGHTS, add_to_hub, add_to_lm_studio, add_to_ollama


@pytest.fixture
def library(hub: Path, ollama: Path, tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    for name in ("Qwen3-Coder-Q4_K_M.gguf", "Qwen3-Coder-Q8_0.gguf"):
        (files / name).write_bytes((GGUF / "model.gguf").read_bytes())
    add_to_hub(hub, "unsloth/Qwen3-Coder-GGUF", files)
    add_to_hub(hub, "Qwen/Qwen3-30B-A3B", TINY)
    add_to_hub(hub, "Qwen/Qwen3-30B-A3B-Instruct", TINY)
    add_to_ollama(ollama, "qwen3:30b", {WEIGHTS: GGUF / "model.gguf"})
    return hub


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("Qwen/Qwen3-30B-A3B", "models--Qwen--Qwen3-30B-A3B/"),
        ("qwen/qwen3-30b-a3b", "models--Qwen--Qwen3-30B-A3B/"),
        ("Qwen3-30B-A3B", "models--Qwen--Qwen3-30B-A3B/"),  # its whole short name, and a part of the other's
        ("instruct", "models--Qwen--Qwen3-30B-A3B-Instruct/"),
        ("unsloth/Qwen3-Coder-GGUF:Q8_0", "Qwen3-Coder-Q8_0.gguf"),
        ("unsloth/Qwen3-Coder-GGUF:q4", "Qwen3-Coder-Q4_K_M.gguf"),
        ("Qwen3-Coder-GGUF:Q8_0", "Qwen3-Coder-Q8_0.gguf"),
        ("coder:q8", "Qwen3-Coder-Q8_0.gguf"),
        ("unsloth/Qwen3-Coder-GGUF:Qwen3-Coder-Q8_0.gguf", "Qwen3-Coder-Q8_0.gguf"),
        ("unsloth/Qwen3-Coder-GGUF:Q8_0/Qwen3-Coder-Q8_0.gguf", "Qwen3-Coder-Q8_0.gguf"),
        ("unsloth/Qwen3-Coder-GGUF:coder-q4", "Qwen3-Coder-Q4_K_M.gguf"),
        ("qwen3:30b", "sha256-"),
    ],
)
def test_a_name_a_short_one_or_a_part_finds_a_model(library: Path, text: str, file: str) -> None:
    assert file in f"{locate_model(text)}/"


def test_only_a_whole_name_or_a_path_of_a_model_is_a_name(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_alias("fast", "qwen3:30b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").touch()
    gguf = str(tmp_path / "files" / "Qwen3-Coder-Q8_0.gguf")
    for text in ("demo", "fast", "qwen3:30b", "Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", gguf, str(TINY)):
        assert is_name(text), text
    for text in ("", "coder", "a3b", "Why", "notes", "readme.txt", "and/or", "Qwen/Qwen3", "x" * 5000, "\0"):
        assert not is_name(text), text
    kept.path().write_bytes(b"{")
    assert not is_name("qwen3:30b")


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("coder", ["unsloth/Qwen3-Coder-GGUF:Q4_K_M", "unsloth/Qwen3-Coder-GGUF:Q8_0"]),
        ("unsloth/Qwen3-Coder-GGUF", ["unsloth/Qwen3-Coder-GGUF:Q4_K_M", "unsloth/Qwen3-Coder-GGUF:Q8_0"]),
        ("a3b", ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct"]),
    ],
)
def test_a_name_of_several_models_is_refused_with_all_of_them(
    library: Path, text: str, matches: list[str]
) -> None:
    with pytest.raises(UsageError, match=f"matches 2 models: {', '.join(matches)}"):
        locate_model(text)


def test_a_whole_hub_name_is_never_a_part_of_a_longer_one(library: Path) -> None:
    with pytest.raises(CheckpointError, match="no model here is named 'Qwen/Qwen3-30B'") as refusal:
        locate_model("Qwen/Qwen3-30B")
    assert "`argosy pull Qwen/Qwen3-30B` fetches it" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Qwen3-30B-A3BB", "near: Qwen/Qwen3-30B-A3B"),
        ("kimi", "`argosy list` shows the models"),
        ("unsloth/Kimi-K2-GGUF:Q4_K_M", "`argosy pull unsloth/Kimi-K2-GGUF:Q4_K_M` fetches it"),
        ("./nowhere", "nowhere does not exist"),
        ("/nowhere/model", "/nowhere/model does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("model.gguf", "model.gguf does not exist"),
    ],
)
def test_a_name_that_is_nowhere_says_what_is_near_and_how_to_get_it(
    library: Path, text: str, said: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        open_files(locate_model(text))
    assert said in str(refusal.value)
    assert ("pull" in str(refusal.value)) == ("does not exist" not in said)


def test_a_path_wins_over_a_name_and_a_path_object_is_never_a_name(library: Path, tmp_path: Path) -> None:
    (tmp_path / "Qwen" / "Qwen3-30B-A3B").mkdir(parents=True)
    assert locate_model("Qwen/Qwen3-30B-A3B") == Path("Qwen/Qwen3-30B-A3B")
    assert locate_model(Path("instruct")) == Path("instruct")


def test_the_same_name_at_two_places_is_the_hubs(home: Path, hub: Path) -> None:
    add_to_lm_studio(home, "Qwen/Qwen3-30B-A3B", TINY)
    assert ".lmstudio" in str(locate_model("Qwen3-30B-A3B"))
    add_to_hub(hub, "Qwen/Qwen3-30B-A3B", TINY)
    assert ".lmstudio" not in str(locate_model("Qwen3-30B-A3B"))


def test_a_model_with_missing_parts_is_not_run(library: Path) -> None:
    folder = next((library / "models--Qwen--Qwen3-30B-A3B" / "snapshots").iterdir())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="1 of its files are missing") as refusal:
        locate_model("Qwen/Qwen3-30B-A3B")
    assert "`argosy pull Qwen/Qwen3-30B-A3B`" in str(refusal.value)


def test_an_alias_stands_for_a_model_or_a_path_until_it_is_forgotten(library: Path, tmp_path: Path) -> None:
    assert add_alias("fast", "coder:q8") == "unsloth/Qwen3-Coder-GGUF:Q8_0"
    assert locate_model("fast").name == "Qwen3-Coder-Q8_0.gguf"
    assert add_alias("pack", "files") == str(tmp_path / "files")
    assert locate_model("pack") == tmp_path / "files"
    assert add_alias("second", "pack") == str(tmp_path / "files")
    assert remove_alias("fast") == "unsloth/Qwen3-Coder-GGUF:Q8_0"
    with pytest.raises(CheckpointError, match="no model here is named 'fast'"):
        locate_model("fast")


def test_an_alias_may_stand_for_the_demo(library: Path) -> None:
    assert add_alias("fast", "demo") == "demo"
    assert look_up("fast") == ("fast", Path("demo"), "demo")
    assert name_of("fast") == name_of("demo") == "demo"


@pytest.mark.parametrize("alias", ["demo", "a/b", "", ".x", "x y", "x" * 65, "a:b", "é"])
def test_an_alias_is_a_short_plain_word(library: Path, alias: str) -> None:
    with pytest.raises(UsageError, match="cannot be an alias"):
        add_alias(alias, "instruct")


def test_an_alias_of_nothing_is_refused_and_one_that_dangles_says_so(library: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model here is named"):
        add_alias("x", "nowhere")
    with pytest.raises(UsageError, match="is not an alias"):
        remove_alias("x")
    add_alias("x", str(tmp_path / "files"))
    add_alias("y", "instruct")
    (tmp_path / "files").rename(tmp_path / "moved")
    (library / "models--Qwen--Qwen3-30B-A3B-Instruct").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"the alias 'x' stands for .*, which does not exist"):
        locate_model("x")
    with pytest.raises(CheckpointError, match=r"the alias 'y' stands for .*, which is not here"):
        locate_model("y")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "aliases": [], "used": {}, "pulled": {}}',
        b'{"version": 1, "aliases": {"a": 1}, "used": {}, "pulled": {}}',
        b'{"version": 1, "aliases": {}, "used": {"a": "b"}, "pulled": {}}',
        b'{"version": 1, "aliases": {}, "used": {}, "pulled": {"a": {}}}',
        b'{"version": 1, "aliases": {}, "used": {}, "pulled": {"a": {"repository": "a/b", "revision": "'
        + b"a" * 40
        + b'", "nbytes": 1, "blobs": ["../../x"]}}}',
    ],
)
def test_a_damaged_file_of_aliases_is_named_and_paths_need_it_not(library: Path, content: bytes) -> None:
    kept.path().parent.mkdir(parents=True)
    kept.path().write_bytes(content)
    with pytest.raises(UsageError, match=r"library\.json"):
        locate_model("instruct")
    assert locate_model("files") == Path("files")


def test_a_link_or_a_pipe_in_the_place_of_the_aliases_is_refused_at_once(
    library: Path, tmp_path: Path
) -> None:
    kept.path().parent.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    kept.path().symlink_to(victim)
    with pytest.raises(UsageError, match=r"library\.json cannot be read: it is a symbolic link"):
        kept.read()
    with (
        pytest.raises(UsageError, match=r"library\.json cannot be read: it is a symbolic link"),
        kept.changing(),
    ):
        pass
    assert victim.read_bytes() == b"keep"
    kept.path().unlink()
    os.mkfifo(kept.path())
    with pytest.raises(UsageError, match=r"library\.json cannot be read: it is not a regular file"):
        kept.read()


def test_a_name_that_is_not_utf8_is_not_kept_and_the_others_stay(library: Path, tmp_path: Path) -> None:
    add_alias("fast", "coder:q8")
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    with pytest.raises(UsageError, match=r"library\.json cannot keep a name that is not UTF-8 text"):
        add_alias("odd", str(odd))
    kept.note_use(f"a/b:{odd.name}")
    assert kept.read().aliases == {"fast": "unsloth/Qwen3-Coder-GGUF:Q8_0"}
    assert locate_model("fast").name == "Qwen3-Coder-Q8_0.gguf"


def test_what_is_kept_is_the_owners_alone(library: Path) -> None:
    kept.note_use("a/b")
    assert kept.path().stat().st_mode & 0o777 == 0o600
    assert kept.path().parent.stat().st_mode & 0o777 == 0o700
    assert list(kept.read().used) == ["a/b"]


def test_every_error_of_a_name_is_a_sentence(library: Path) -> None:
    for text in ("\x1b[31m", "a\nb", "x" * 5000, "a/b:" + "c" * 200, "💥"):
        with pytest.raises(ArgosyError) as refusal:
            locate_model(text)
        assert refusal.value.message.isprintable()
        assert len(refusal.value.message) < 300
