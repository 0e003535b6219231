"""Lists of phrases: found however they are spelled, kept as hashes, and never sent in part."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from argosy.errors import UsageError
from argosy.guard import word_list
from argosy.guard.word_list import WordList, digest_of

PHRASES = "# a comment\nblue moon\n\nRotten Fish pie\nBÖSE\n坏话\n"


def the_list(text: str = PHRASES) -> WordList:
    return WordList(text, "words.txt", category="test")


@pytest.mark.parametrize(
    "text",
    [
        "once in a Blue Moon.", "BLUE-MOON", "blue\n moon", "ｂｌｕｅ ｍｏｏｎ", "b\u200blue mo\u0336on", "bluе moоn",
        "a rotten, fish; pie", "so böse!", "blue...........moon", "bo\u0308se", "BO\u200d\u0308SE",
        "b\u0336ose\u0301e\u0300 böse",
        "ВLUЕ ΜΟΟΝ", "ⓑⓛⓤⓔ 🅼🅾🅾🅽", "b\u20e3lue mo\ufff9on", "b\x01lue moon",
    ],
)  # fmt: skip
def test_a_phrase_is_found_however_it_is_spelled(text: str) -> None:
    verdict = the_list().judge(text)
    assert verdict.is_flagged
    assert verdict.categories == ["test"]


@pytest.mark.parametrize("between", [".", " ", "\n", "\u200b ", "_"])
def test_no_gap_between_its_words_hides_a_phrase(between: str) -> None:
    assert the_list().judge(f"a blue{between * 20_000}moon").is_flagged
    stream = the_list().stream()
    for piece in ("a blue", *[between * 1000] * 20, "moon"):
        stream.push(piece)
    stream.finish()
    assert stream.is_flagged


@pytest.mark.parametrize(
    ("phrase", "text", "other"),
    [
        ("काम", "यह मेरा काम है", "वह कोमा में है"), ("தமிழ்", "தமிழ் மொழி", "தமழ மொழி"),
        ("坏话", "他说这是坏话的", "他说这是坏的话"), ("ばか", "それはは\u3099かだ", "それはかばだ"),
        ("ﾊﾞｶ", "それはバカだ", "ハカ"),
        ("ผู้ใหญ่", "เขาเป็นผู้ใหญ่ที่ดี", "เขาเป็นผูใหญที่ดี"),
        ("محمد", "مُحَمَّد", "م ح م د"), ("محمد", "محـــمد", "محمود"), ("שלום", "שָׁלוֹם", "שלם"),
        ("İstanbul", "istanbul'da", "stanbul"), ("ışık", "IŞIK", "aşık"), ("blue", "ʙʟᴜᴇ", "ʙʟᴇᴜ"),
        ("fish", "fısh", "fıs"),
    ],
)  # fmt: skip
def test_a_word_is_found_in_its_own_script_and_no_other_word_is(phrase: str, text: str, other: str) -> None:
    for listed in (the_list(phrase), the_list(digest_of(phrase))):
        assert listed.judge(text).is_flagged
        assert not listed.judge(other).is_flagged


@pytest.mark.parametrize("hidden", ["\u200b", "\u00ad", "\ufff9", "\u0336", "\U000e0041"])
def test_no_number_of_unseen_characters_hides_a_word(hidden: str) -> None:
    for number in (1, 63, 64, 70, 20_000):
        for text in (
            f"bl{hidden * number}ue moon",
            f"blue{hidden * number} moon",
            f"blue {hidden * number}moon",
        ):
            assert the_list().judge(text).is_flagged, number


def test_capitals_that_look_latin_do_not_hide_words_in_their_own_script() -> None:
    assert the_list("водка").judge("ВОДКА").is_flagged
    assert the_list("вор").judge("ВОР").is_flagged
    assert the_list("νόμος").judge("ΝΌΜΟΣ").is_flagged
    assert the_list(digest_of("bomb")).judge("ВОМВ").is_flagged


@pytest.mark.parametrize("hidden", ["\u200b", "\u0300\u0316", "a\u200b", "a\u0300"])
def test_unseen_characters_take_no_more_time_than_words(hidden: str) -> None:
    def cpu_s(text: str) -> float:
        began = time.process_time()
        the_list().judge(text)
        return time.process_time() - began

    ordinary = min(cpu_s("a b " * 2000) for _ in range(3))
    assert min(cpu_s(hidden * (8000 // len(hidden))) for _ in range(2)) < 20 * ordinary


def test_no_word_of_a_text_is_kept() -> None:
    assert not [name for name, value in vars(word_list).items() if hasattr(value, "cache_info")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blue",
        "blue moonlight",
        "moon blue",
        "rotten fish",
        "boese",
        "# a comment",
        "bose",
    ],
)
def test_other_words_are_not_found(text: str) -> None:
    assert not the_list().judge(text).is_flagged


def test_a_hashed_list_finds_the_same_phrases() -> None:
    hashed = the_list("\n".join(digest_of(phrase) for phrase in ("blue moon", "böse")))
    assert digest_of("Blue  Moon!") == digest_of("blue moon")
    assert hashed.judge("a BLUE moon").is_flagged
    assert hashed.judge("Böse").is_flagged
    assert not hashed.judge("a blue mood").is_flagged


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("sha256:12", "a hash has the form"), ("!!!", "a phrase has 1 to 64 words, found 0"),
        (" ".join("a" * 65), "found 65"), ("sha256:" + "a" * 64 + " 99", "found 99"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_phrase_is_refused_with_its_number(line: str, fault: str) -> None:
    with pytest.raises(UsageError, match=f"words.txt, line 2: .*{fault}"):
        the_list(f"ok\n{line}\n")


WORDS = st.sampled_from(
    (
        "blue",
        "moon",
        "Rotten",
        "fish",
        "pie",
        "böse",
        "moonlight",
        "x",
        "a",
        "—",
        "🙂",
        "bo\u0308se",
        "b\u200blue",
        "这坏",
        "话",
        "x" * 70,
    )
)


@settings(max_examples=120, deadline=None)
@given(st.lists(WORDS, max_size=12), st.lists(st.integers(1, 6), min_size=1, max_size=4))
@example(["blue", "—", "moon"], [1])
def test_a_stream_is_flagged_as_the_whole_is_and_sends_no_part_of_a_phrase(
    words: list[str], sizes: list[int]
) -> None:
    text, words_list = " ".join(words), the_list()
    stream, sent, at, turn = words_list.stream(), "", 0, 0
    while at < len(text):
        sent += stream.push(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    sent += stream.finish()
    assert text.startswith(sent)
    assert stream.is_flagged == words_list.judge(text).is_flagged
    if not stream.is_flagged:
        assert sent == text
    else:
        assert words_list.judge(text[len(sent) :]).is_flagged  # all of the phrase
