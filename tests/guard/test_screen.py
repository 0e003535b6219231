"""A policy checks an answer at every cut: nothing passes before its checks, and no flagged passage passes in part."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.guard.pii.finder import Finder
from argosy.guard.policy import ContentPolicy, HttpCheck, ListCheck
from argosy.guard.screen import RequestScreen
from argosy.guard.verdict import Blocked
from argosy.guard.view import Shown
from argosy.guard.word_list import WordList

FINDER = Finder()
MOON = ListCheck(name="moon", words=WordList("blue moon", "words.txt", category="moons"))
ASKED = HttpCheck(name="asked", url="http://127.0.0.1:9/")
PASSAGE = "the rotten fish pie"


def screen_of(**settings: Any) -> tuple[RequestScreen, list[tuple[str, str, int]]]:
    noted: list[tuple[str, str, int]] = []
    policy = ContentPolicy(name="a", finder=FINDER, **settings)
    return RequestScreen(policy, lambda *found: noted.append(found)), noted


def sent_of(screen: RequestScreen, pieces: list[str]) -> tuple[str, str, list[str]]:
    """Return the sent text, why it was blocked, and the questions; a passage is what the asked check flags."""
    answer, questions, sent = screen.answer(), list[str](), ""
    stretch = answer.text()
    for at, piece in enumerate([*pieces, ""]):
        stretch.push(piece, is_end=at == len(pieces))
        if question := stretch.question:
            questions.append(question)
            if PASSAGE in question:
                answer.block("asked")
            else:
                stretch.answered()
        sent += stretch.take()
    return sent, answer.blocked_by, questions


WORDS = st.sampled_from(
    ("the", "rotten", "fish", "pie", PASSAGE, "blue", "moon", "joe@example.com", "x", "🙂", "<b>")
)
PIECES = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        pieces.append(text[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    return pieces


@settings(max_examples=120, deadline=None)
@given(st.lists(WORDS, max_size=40), PIECES)
def test_no_flagged_passage_is_sent_in_part_and_the_rest_is_sent_whole(
    words: list[str], sizes: list[int]
) -> None:
    text = " ".join(words)
    screen, _ = screen_of(output=(ASKED,), chunk_characters=50, overlap_characters=len(PASSAGE))
    sent, blocked_by, questions = sent_of(screen, cut(text, sizes))
    assert text.startswith(sent)
    if PASSAGE in text:
        assert blocked_by == "asked"
        assert len(sent) <= text.index(PASSAGE)
    else:
        assert (sent, blocked_by) == (text, "")
    assert len(questions) <= len(text) // 50 + 2
    assert max(map(len, questions), default=0) <= 50 + 50 + len(PASSAGE) + max(sizes)


@settings(max_examples=120, deadline=None)
@given(st.lists(WORDS, max_size=25), PIECES)
def test_lists_and_values_hold_at_every_cut(words: list[str], sizes: list[int]) -> None:
    text = " ".join(words)
    screen, noted = screen_of(pii_output="redact", output=(MOON,))
    sent, blocked_by, _ = sent_of(screen, cut(text, sizes))
    assert "joe@" not in sent
    expected = text.replace("joe@example.com", "<EMAIL_1>")
    assert expected.startswith(sent)
    if MOON.words.judge(expected).is_flagged:
        assert blocked_by == "moon"
        assert ("output", "moon", 1) in noted
        rest = expected[len(sent) :]
        assert MOON.words.judge(rest).is_flagged  # all of the phrase
    else:
        assert (sent, blocked_by) == (expected, "")


def test_a_conversation_is_redacted_everywhere_and_pictures_stay() -> None:
    screen, noted = screen_of(pii_input="redact")
    picture = {"type": "image", "image": object()}
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": '{"to": "joe@example.com", "n": 1}'},
    }
    messages = [
        {"role": "system", "content": "For joe@example.com"},
        {"role": "user", "content": [{"type": "text", "text": "I am ann@example.org"}, picture]},
        {"role": "assistant", "content": "", "reasoning_content": "joe@example.com?", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sent to ann@example.org"},
    ]
    shown, texts = screen.check(Shown(messages=messages))
    made = shown.messages
    assert made[0]["content"] == "For <EMAIL_1>"
    assert made[1]["content"] == [{"type": "text", "text": "I am <EMAIL_2>"}, picture]
    assert made[2]["reasoning_content"] == "<EMAIL_1>?"
    assert made[2]["tool_calls"][0]["function"]["arguments"] == '{"to": "<EMAIL_1>", "n": 1}'
    assert made[3]["content"] == "sent to <EMAIL_2>"
    assert messages[0]["content"] == "For joe@example.com"  # the client's own text is unchanged
    assert not any("@" in text for text in texts)
    assert noted == [("input", "pii:email", 5)]
    screen.check(Shown(messages=messages), counts=False)
    assert len(noted) == 1


def test_descriptions_and_schemas_of_tools_are_redacted_and_names_stay() -> None:
    screen, _ = screen_of(pii_input="redact")
    to = {"type": "string", "enum": ["joe@example.com"], "description": "such as ann@example.org"}
    schema = {"type": "object", "properties": {"name": to, "to": to}, "required": ["to"]}
    function = {"name": "send", "description": "Mail to joe@example.com", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    shown, _ = screen.check(Shown(messages=[{"role": "user", "content": "I am x@example.net"}], tools=tools))
    (message,), (tool,) = shown.messages, shown.tools
    made = tool["function"]
    assert (made["name"], made["description"]) == ("send", "Mail to <EMAIL_1>")
    for name in ("name", "to"):
        assert made["parameters"]["properties"][name]["enum"] == ["<EMAIL_1>"]
    assert made["parameters"]["required"] == ["to"]
    assert message["content"] == "I am <EMAIL_3>"
    assert screen.answer().call("send", '{"to": "<EMAIL_1>"}')[0] == '{"to": "joe@example.com"}'


def test_a_mode_that_only_detects_counts_and_changes_nothing() -> None:
    screen, noted = screen_of(pii_input="detect", pii_output="detect")
    assert screen.check(Shown(texts=["joe@example.com"]))[0].texts == ["joe@example.com"]
    assert sent_of(screen, ["to joe@exam", "ple.com and"])[:2] == ("to joe@example.com and", "")
    assert noted == [("input", "pii:email", 1), ("output", "pii:email", 1)]


def test_a_blocked_request_says_why_and_quotes_nothing() -> None:
    for settings_, text, reason in (
        ({"pii_input": "block"}, "joe@example.com", "personal data"), ({"input": (MOON,)}, "a Blue Moon", "moon"),
    ):  # fmt: skip
        screen, noted = screen_of(**settings_)
        with pytest.raises(Blocked) as raised:
            screen.check(Shown(texts=[text]))
        assert str(raised.value) == f"the request is not allowed by the policy of this server ({reason})"
        assert len(noted) == 1


def test_values_come_back_into_arguments_as_json() -> None:
    screen, _ = screen_of(pii_input="redact")
    screen.check(Shown(texts=["-----BEGIN PRIVATE KEY-----\nMIIabc\n-----END PRIVATE KEY-----"]))
    arguments, _ = screen.answer().call("f", '{"key": "<SECRET_1>"}')
    assert arguments == '{"key": "-----BEGIN PRIVATE KEY-----\\nMIIabc\\n-----END PRIVATE KEY-----"}'


@pytest.mark.parametrize(
    "arguments",
    [
        '{"q": "a blue\\nmoon"}', '{"q": "blue\\tmoon"}', '{"q": "b\\u006cue moon"}', '{"blue\\u0020moon": 1}',
        '{"q": ["a blue", "moon"]}', '{"q": "x", "q": "blue\\nmoon"}',
        '{"q": "blue\\u0020moon', '{"q": "blue moo\\u006e\\u00',
        '{"q": {"r": [{"s": "blue\\u000amoon"}]}}',
    ],
)  # fmt: skip
def test_a_list_reads_the_arguments_of_a_call_as_its_client_does(arguments: str) -> None:
    screen, noted = screen_of(output=(MOON,))
    answer = screen.answer()
    answer.call("f", arguments)
    assert answer.blocked_by == "moon"
    assert noted == [("output", "moon", 1)]
    answer = screen.answer()
    answer.call("blue_moon", "{}")
    assert answer.blocked_by == "moon"


def test_checks_that_ask_get_arguments_without_escapes() -> None:
    screen, _ = screen_of(output=(ASKED,))
    assert screen.answer().call("f", '{"q": "a\\u0062c\\n"}')[1] == "f\nq\nabc\n"


def test_personal_data_in_a_call_that_was_cut_off_is_found_behind_escapes() -> None:
    screen, noted = screen_of(pii_output="redact")
    arguments, _ = screen.answer().call("f", '{"to": "joe\\u0040example.com", "and": "ann@example.org and')
    assert arguments == '{"to": "<EMAIL_1>", "and": "<EMAIL_2> and'
    assert noted == [("output", "pii:email", 2)]
