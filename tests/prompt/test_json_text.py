"""The values of a JSON text are counted before any is built, and the count is never lower than what a parser builds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.errors import UsageError
from argosy.prompt import json_text
from argosy.prompt.json_text import MAX_PARTS, count_values, read_json
from argosy.prompt.messages import check_messages

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text('a"\\,[]{}:\n')),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text('a"\\,['), inner)),
)


def parts_of(value: Any) -> int:
    """The number of objects, lists, keys and strings."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(parts_of, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(parts_of, value))
    return int(isinstance(value, str))


def items_of(value: Any) -> int:
    if isinstance(value, dict):
        return max(0, len(value) - 1) + sum(map(items_of, value.values()))
    if isinstance(value, list):
        return max(0, len(value) - 1) + sum(map(items_of, value))
    return 0


@contextmanager
def counted_at_once(num_bytes: int) -> Iterator[None]:
    """Make the counter work on chunks of `num_bytes`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_COUNTED_AT_ONCE", num_bytes)
        yield


@given(value=values, at_once=st.integers(1, 9) | st.just(1 << 18))
def test_values_are_counted_exactly(value: Any, at_once: int) -> None:
    for ensure_ascii in (True, False):
        with counted_at_once(at_once):
            counts = count_values(json.dumps(value, ensure_ascii=ensure_ascii).encode())
        assert counts == (parts_of(value), items_of(value))


@given(
    value=values, cut=st.integers(0, 200), tail=st.binary(max_size=20),
    at_once=st.integers(1, 9) | st.just(1 << 18),
)  # fmt: skip
def test_the_count_of_a_damaged_text_is_at_least_the_number_of_objects_built(
    value: Any, cut: int, tail: bytes, at_once: int
) -> None:
    data = json.dumps(value).encode()[:cut] + tail
    made = []

    def count(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made.append(1)
        return dict(pairs)

    try:
        json.loads(data.decode(errors="replace"), object_pairs_hook=count)
    except ValueError:
        with counted_at_once(at_once):
            assert count_values(data).num_parts >= len(made)


@pytest.mark.parametrize("item", ["{}", "[]", '""', '{"a":1}', "[[]]"])
def test_a_text_of_too_many_values_is_refused_before_any_is_built(
    item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is parsed")

    monkeypatch.setattr(json_text.json, "loads", refuse)
    with pytest.raises(ValueError, match="more than 131072 objects, lists and strings"):
        read_json("[" + ",".join([item] * (MAX_PARTS + 1)) + "]")


def test_json_inside_a_string_is_one_value() -> None:
    text = json.dumps({"content": '{"a": [1, 2, "\\"", {}]},' * 100_000})
    assert read_json(text) == json.loads(text)


def test_the_arguments_of_all_calls_share_one_bound() -> None:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a":[' + "[]," * 60_000 + "1]}"},
    }
    turns = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": ""},
    ]
    with pytest.raises(UsageError, match="message 2: tool call arguments have more than 131072 values"):
        check_messages(turns * 3)
    with pytest.raises(UsageError, match="message 0: tool call arguments"):
        check_messages([{"role": "assistant", "tool_calls": [call] * 100}])
