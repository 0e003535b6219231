"""Files of `argosy chat`: they come back as they were, and what is damaged or not ours is refused."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pictures

from argosy.cli.commands import chat_files
from argosy.cli.commands.chat_files import LineHistory, load, save
from argosy.errors import UsageError
from argosy.media.parts import PROMPT_LIMITS, Image

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi \N{SNOWMAN}\x1b[2J"},
    {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."},
]


# Lines


def test_lines_come_back_in_order_and_repeats_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lines"
    history = LineHistory(path)
    for line in ("one", "two\nlines\r\x85\u2028", "two\nlines\r\x85\u2028", "", "one"):
        history.add(line)
    assert LineHistory(path).lines == ["one", "two\nlines\r\x85\u2028", "one"]


def test_a_history_is_private_even_if_it_was_not(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('"one"\n')
    path.chmod(0o644)
    LineHistory(path).add("two")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "lines").read_text() == '"one"\n"two"\n'


def test_two_chats_keep_the_lines_of_both(tmp_path: Path) -> None:
    one, other = LineHistory(tmp_path / "lines"), LineHistory(tmp_path / "lines")
    one.add("first")
    other.add("second")
    one.add("third")
    assert LineHistory(tmp_path / "lines").lines == ["first", "second", "third"]


def test_a_history_keeps_the_newest_lines_within_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_files, "_MOST_LINES", 3)
    history = LineHistory(tmp_path / "lines")
    for number in range(5):
        history.add(f"line {number}")
    assert LineHistory(history.path).lines == ["line 2", "line 3", "line 4"]
    monkeypatch.setattr(chat_files, "_MOST_LINES", 10)
    monkeypatch.setattr(chat_files, "_HISTORY_BYTES", 30)
    history.add("line 5")
    assert LineHistory(history.path).lines == ["line 3", "line 4", "line 5"]
    monkeypatch.setattr(chat_files, "_LINE_BYTES", 10)
    history.add("a line that is too long")
    assert LineHistory(history.path).lines == ["line 3", "line 4", "line 5"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'"one"\n"tw', "is not a chat history: line 2: it is not JSON"),
        (b"ls -la\n", "line 1: it is not JSON"),
        (b'{"a": 1}\n', "line 1 is a dict, expected text"),
        (b'"\\ud800"\n', "holds half a character"),
        (b"\xff\xfe\n", "is not UTF-8"),
        (b'"x"\n' * 300_000, "is too long: a history may have at most 1,048,576 bytes"),
    ],
)
def test_a_damaged_history_is_refused_and_left_as_it_is(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=why):
        LineHistory(path)
    assert path.read_bytes() == content


def test_a_history_is_a_regular_file_that_can_be_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, why in (
        ("", "cannot be read: Is a directory"),
        ("pipe", "is not a regular file"),
        ("lines/below/a/file", "cannot be (read|written): Not a directory"),
    ):
        (tmp_path / "lines").write_text("")
        with pytest.raises(UsageError, match=why):
            LineHistory(tmp_path / name)


# Conversations


def test_a_conversation_comes_back_as_it_was_saved_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save(path, TALK)
    assert load(path) == TALK
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_bytes()) == TALK  # any program can read it
    assert "\x1b" not in path.read_text()
    save(path, TALK[:2])
    assert load(path) == TALK[:2]


def test_pictures_are_saved_with_the_conversation(tmp_path: Path) -> None:
    file = io.BytesIO()
    Pictures.new("RGB", (3, 2), "red").save(file, "PNG")
    picture = Image(file.getvalue()).read(PROMPT_LIMITS)
    talk = [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}]
    save(tmp_path / "talk.json", talk)
    (message,) = load(tmp_path / "talk.json")
    loaded, text = message["content"]
    assert (loaded.kind, loaded.data, loaded.digest) == ("picture", file.getvalue(), picture.digest)
    assert text == {"type": "text", "text": "What?"}


def test_a_file_that_is_no_conversation_is_not_overwritten(tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("# Mine\n")
    with pytest.raises(UsageError, match="is left unchanged, because it is not a saved conversation"):
        save(notes, TALK)
    assert notes.read_text() == "# Mine\n"
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        save(tmp_path / "nowhere" / "talk.json", TALK)
    with pytest.raises(UsageError, match="the path is invalid"):
        save(tmp_path / "a\0b", TALK)


def test_a_conversation_that_could_not_be_loaded_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_files, "_CONVERSATION_BYTES", 200)
    with pytest.raises(UsageError, match=r"takes \d+ bytes, and a saved one may have 200"):
        save(tmp_path / "talk.json", TALK)
    assert not (tmp_path / "talk.json").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is not JSON"),
        (json.dumps(TALK).encode()[:-9], "it is not JSON"),
        (b"{}", "expected a list of messages"),
        (b"[1]", "expected a list of messages"),
        (b"[]", "needs at least one message"),
        (b'[{"role": "user", "role": "system", "content": "x"}]', "duplicate key"),
        (b'[{"role": "user", "content": NaN}]', "NaN"),
        (b'[{"role": "user", "content": 3}]', "content is a int, expected text"),
        (b'[{"role": "pirate", "content": "x"}]', "unknown role 'pirate'"),
        (b'[{"role": "user", "content": "x", "tool": 1}]', "unknown key 'tool'"),
        (b'[{"role": "user"}]', "no 'content'"),
        (b'[{"role": "user", "content": [{"type": "image", "data": "%%%"}]}]', "must have its file in base64"),
        (b'[{"role": "user", "content": [{"type": "image", "data": ""}]}]', "the picture is empty"),
        (b'[{"role": "user", "content": [{"type": "image", "data": 3}]}]', "must have its file in base64"),
        (b'[{"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}]', "must have its file"),
        (b'[{"role": "user", "content": [{"type": "spell"}]}]', "is of type 'spell'"),
        (b"[" * 100_000, "it"),
        (b"[" + b"[]," * 200_000 + b"[]]", "more than 131072"),
        (b'"' + b"x" * (3 << 20) + b'"', "a saved conversation may have at most 2,097,152 bytes"),
    ],
)  # fmt: skip
def test_a_hostile_conversation_is_refused_by_name(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=why) as caught:
        load(path)
    assert str(path) in str(caught.value) or "picture" in str(caught.value)
