"""JSON that two readers might read differently is refused, whoever sent it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from argosy.checkpoint.untrusted_file import read_object
from argosy.errors import CheckpointError, UsageError
from argosy.guard.keys import KeyFile
from argosy.prompt.json_text import read_json
from argosy.strict_json import JsonError, parse_json

REFUSED = {
    "nothing": ("", "it is not JSON: Expecting value at character 0"),
    "a byte order mark": ("\ufeff{}", "it is not JSON: Unexpected UTF-8 BOM"),
    "two values": ("{} {}", "it is not JSON: Extra data at character 3"),
    "a key given twice": ('{"a": {"b": 1, "c": 2, "b": 3}}', "it has a duplicate key"),
    "no number": ('{"a": NaN}', "it holds NaN, which is not JSON"),
    "infinity": ('{"a": -Infinity}', "it holds -Infinity, which is not JSON"),
    "a number beyond all floats": ('{"a": 1e999}', "it holds a number that is too large"),
    "a whole number beyond all floats": (f'{{"a": {1 << 1024}}}', "it holds a number that is too large"),
    "a whole number that would round to infinity": (
        f"[-{(1 << 1024) - (1 << 970)}]",
        "it holds a number that is too large",
    ),
    "more digits than Python reads": ('{"a": ' + "9" * 5000 + "}", "it holds a number that is too large"),
    "half a character": ('{"a": "\\ud800"}', "it holds half a character"),
    "half a character in a key": ('{"\\udfff": 1}', "it holds half a character"),
    "deep lists": ('{"a": ' + "[" * 64 + "0" + "]" * 64 + "}", "it is nested deeper than 64 levels"),
    "endless lists": ("[" * 100_000, "it is nested deeper than 64 levels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_json_is_refused_with_the_reason(name: str) -> None:
    text, reason = REFUSED[name]
    for data in (text, text.encode()):
        with pytest.raises(JsonError) as refused:
            parse_json(data)
        assert str(refused.value).startswith(reason)
        assert refused.value.key == ("b" if name == "a key given twice" else None)


def test_a_duplicate_key_is_found_in_time_that_grows_with_the_text() -> None:
    def seconds(num_keys: int) -> float:
        text = "{" + ",".join(f'"{at:06}":0' for at in range(num_keys)) + ',"000000":0}'
        began = time.process_time()
        with pytest.raises(JsonError, match="duplicate key"):
            parse_json(text)
        return time.process_time() - began

    # Every pair of 16 times the keys would be 256 times the work; other processes disturb the best of five little.
    short, long = (min(seconds(num_keys) for _ in range(5)) for num_keys in (1000, 16_000))
    assert long < 64 * short


@pytest.mark.parametrize("name", REFUSED)
def test_files_keys_and_requests_are_read_by_the_same_rules(name: str, tmp_path: Path) -> None:
    text, _ = REFUSED[name]
    path = tmp_path / "file.json"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"^file\.json (is|holds|gives)"):
        read_object(path)
    with pytest.raises(UsageError, match="is not a keys file"):
        KeyFile(path).read()
    with pytest.raises(ValueError, match=r"^it "):
        read_json(text)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_bytes_must_be_utf_8(encoding: str) -> None:
    with pytest.raises(JsonError, match="it is not UTF-8 text: byte"):
        parse_json('{"a": "ä"}'.encode(encoding))


@pytest.mark.parametrize(
    "value", [None, 0.5, "a\ud7ff\U0001f600", [[{"": -1.7e308}], 10**308, {"a": True}], json.loads("[" * 65 + "]" * 65)]
)  # fmt: skip
def test_all_other_json_is_read_as_written(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_a_duplicate_key_is_named_for_a_file_and_not_for_a_request(tmp_path: Path) -> None:
    text = '{"secret\\n": 1, "secret\\n": 2}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^config\.json gives the key 'secret\\n' twice$"):
        read_object(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"^it has a duplicate key$"):
        read_json(text)
