"""Streams are the whole text in parts, values never leave in part, and placeholders come back whole."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from argosy.guard.pii import finder
from argosy.guard.pii.finder import Finder, Found
from argosy.guard.pii.placeholders import Placeholders, Restorer
from argosy.guard.pii.spelling import Plain
from argosy.guard.pii.stream import MOST_HELD, FindingStream, parts_of

FINDER = Finder()
VALUES = (
    "joe@example.com", "joe (at) example (dot) com", "joe at example dot com", "+49 30 901820", "4111 1111 1111 1111",
    "DE89 3704 0044 0532 0130 00", "12345678Z", "8.8.4.4", "2001:4860:4860::8888", "00:1A:2B:3C:4D:5E",
    "https://bob:hunter22@example.com", "sk-abcdefghijklmnop1234567890", "password = hunter2xyz",
    "1 85 05 78 006 084 91",
    "j\u200boe@exam\u0336ple.com", "４１１１ １１１１ １１１１ １１１１", "joe @ example.com", "030 901820",
    "-----BEGIN PRIVATE KEY-----\nMIIabc\nxyz=\n-----END PRIVATE KEY-----",
)  # fmt: skip
WORDS = (
    "the", "at", "dot", "a", "Größe", "12", "3.5", "COM", "meet", "me", "on", "2024-11-27", "x=1", "(see", "it)", "—",
    "naïve", "漢字", "e.g.", "Note:", "password", "<EMAIL_9>", "AB", "@", ".", "A" * 40,
)  # fmt: skip
TEXTS = st.lists(
    st.tuples(st.sampled_from(VALUES + WORDS), st.sampled_from((" ", "  ", "\n", ", ", ". ", "\t"))),
    max_size=14,
).map(lambda parts: "".join(word + space for word, space in parts))


def in_pieces(text: str, sizes: list[int]) -> list[str]:
    pieces, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(text[at : at + size])
        at, turn = at + size, turn + 1
    return pieces


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_stream_passes_the_text_and_finds_what_is_found_in_the_whole(text: str, sizes: list[int]) -> None:
    stream = FindingStream(FINDER)
    passed = [part for piece in in_pieces(text, sizes) for part in stream.push(piece)] + stream.finish()
    assert "".join(part.text for part in passed) == text
    found = [(text[one.start : one.end], one.entity) for one in FINDER.find(text)]
    assert [(part.text, part.entity) for part in passed if part.entity is not None] == found


@pytest.mark.parametrize("value", VALUES)
def test_no_part_of_a_value_leaves_before_it_is_known(value: str) -> None:
    text = f"it is {value} indeed. And so on."
    (found,) = FINDER.find(text)
    for cut in range(1, len(text)):
        stream = FindingStream(FINDER)
        first = "".join(part.text for part in stream.push(text[:cut]) if part.entity is None)
        assert len(first) <= found.start or cut > found.end


def test_prose_is_held_back_by_about_a_word_and_nothing_for_long() -> None:
    stream, num_passed, most = FindingStream(FINDER), 0, 0
    prose = "The model says plain things, in plain words, for a while and then it stops. " * 8
    for num_sent, character in enumerate(prose, 1):
        num_passed += sum(len(part.text) for part in stream.push(character))
        most = max(most, num_sent - num_passed)
    assert most <= 24
    for filler in ("7 ", "x", "-----BEGIN PRIVATE KEY-----\nabc"):
        stream = FindingStream(FINDER)
        held = 0
        for _ in range(8):
            piece = filler * (4096 // len(filler))
            held += len(piece) - sum(len(part.text) for part in stream.push(piece))
            assert held <= MOST_HELD


def test_a_long_text_is_read_in_pieces_with_the_same_result() -> None:
    text = ("And joe@example.com wrote to +49 30 901820 again. " * 3000)[:140_000]
    assert "".join(part.text for part in parts_of(text, FINDER)) == text
    assert sum(part.entity is not None for part in parts_of(text, FINDER)) == len(FINDER.find(text))


def test_a_value_has_one_placeholder_in_a_conversation_however_it_is_spelled() -> None:
    values = Placeholders(FINDER)
    first = values.redact("joe@example.com, 4111 1111 1111 1111")
    assert first == "<EMAIL_1>, <CARD_1>"
    assert (
        values.redact("JOE@example.com or a@example.org, 4111-1111-1111-1111")
        == "<EMAIL_1> or <EMAIL_2>, <CARD_1>"
    )
    assert values.restore("to <EMAIL_2>, <EMAIL_1> <EMAIL_3> <CARD_1>") == (
        "to a@example.org, joe@example.com <EMAIL_3> 4111 1111 1111 1111"
    )


def test_a_longer_conversation_has_the_same_placeholders() -> None:
    turns = ["I am a@example.com", "Hello <EMAIL_1>", "and b@example.com, +49 30 901820"]
    short, long = Placeholders(FINDER), Placeholders(FINDER)
    assert [short.redact(turn) for turn in turns[:2]] == [long.redact(turn) for turn in turns][:2]


def test_a_placeholder_that_a_caller_wrote_stands_for_nothing() -> None:
    values = Placeholders(FINDER)
    values.reserve(["<EMAIL_1> is literal"])
    assert values.redact("<EMAIL_1> is literal, a@example.com") == "<EMAIL_1> is literal, <EMAIL_2>"
    assert values.restore("<EMAIL_1> <EMAIL_2>") == "<EMAIL_1> a@example.com"


@settings(max_examples=120, deadline=None)
@given(TEXTS)
def test_what_is_redacted_is_restored_exactly(text: str) -> None:
    values = Placeholders(FINDER)
    values.reserve([text])
    redacted = values.redact(text)
    spelled = {}
    for one in FINDER.find(text):  # a value that is spelled in two ways comes back in the first one
        name = values.name(one.entity, text[one.start : one.end])
        spelled.setdefault(name, text[one.start : one.end])
    if all(spelled[values.name(one.entity, text[one.start : one.end])] == text[one.start : one.end]
           for one in FINDER.find(text)):  # fmt: skip
        assert values.restore(redacted) == text


ANSWER = "Sent to <EMAIL_1> and <PHONE_1>; a < b, <b>, <EMAIL_77>, <EMAIL_ <EMAIL_1"


def test_placeholders_are_restored_wherever_a_stream_is_cut() -> None:
    values = Placeholders(FINDER)
    values.redact("joe@example.com +49 30 901820")
    whole = "Sent to joe@example.com and +49 30 901820; a < b, <b>, <EMAIL_77>, <EMAIL_ <EMAIL_1"
    for first in range(len(ANSWER) + 1):
        for second in range(first, len(ANSWER) + 1):
            restorer = Restorer(values)
            pieces = (ANSWER[:first], ANSWER[first:second], ANSWER[second:])
            made = "".join(map(restorer.push, pieces)) + restorer.finish()
            assert made == whole, (first, second)


def test_only_a_placeholder_that_is_being_written_is_held_back() -> None:
    restorer = Restorer(Placeholders(FINDER))
    assert restorer.push("a <b") == "a <b"
    assert restorer.push(" x <EMAIL_") == " x "
    assert restorer.push("not one") == "<EMAIL_not one"


def test_a_whole_text_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    find = Finder.find_plain

    def finding(self: Finder, given: Plain) -> list[Found]:
        searched.append(len(given.data))
        return find(self, given)

    monkeypatch.setattr(Finder, "find_plain", finding)
    assert [part.text for part in parts_of("call 4111 1111 1111 1111", FINDER)] == [
        "call ",
        "4111 1111 1111 1111",
    ]
    assert searched == [24]


@settings(max_examples=500, deadline=None)
@given(st.text("0129abfFxyzkey:.@+-/=?&() \n", max_size=finder.SHORTEST - 1))
@example("1::2")
def test_no_value_is_shorter_than_the_shortest(text: str) -> None:
    with mock.patch.object(finder, "SHORTEST", 0):
        assert not FINDER.find(text)
