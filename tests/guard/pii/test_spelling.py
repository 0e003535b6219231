"""What a reader does not see hides nothing from patterns, and no text leaves anything behind."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from argosy.guard.pii import spelling
from argosy.guard.pii.finder import Finder
from argosy.guard.pii.spelling import plain
from argosy.guard.pii.stream import parts_of

# Default_Ignorable_Code_Point in DerivedCoreProperties.txt of Unicode 16, which Python does not have.
IGNORABLE = (
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip


def test_every_ignorable_character_format_and_control_is_left_out() -> None:
    unseen = {code for first, last in IGNORABLE for code in range(first, last + 1)}
    unseen |= {code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Cf"}
    unseen |= {code for code in range(0xA0) if unicodedata.category(chr(code)) == "Cc"} - set(
        b"\t\n\v\f\r\x85"
    )
    for code in sorted(unseen):
        read = plain(f"a{chr(code)}b")
        assert read.data == b"ab", f"U+{code:04X}"
        assert read.span(0, 2) == (0, 3)


def test_white_space_is_seen() -> None:
    assert plain("a\tb\nc\r\vd\fe \x85").data == b"a\tb\nc\n\vd\fe \n"


@pytest.mark.parametrize("letters", ["ⓙⓞⓔ", "🄹🄾🄴", "🅙🅞🅔", "🅹🅾🅴", "⒥⒪⒠"])
def test_enclosed_letters_are_letters(letters: str) -> None:
    assert plain(letters).data.lower() == b"joe"


def test_no_text_adds_to_what_is_kept() -> None:
    plain("é")
    before = len(spelling._table())
    plain("".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000))
    assert len(spelling._table()) == before


def test_a_value_is_found_behind_long_runs_of_unseen_characters_wherever_a_text_is_cut() -> None:
    finder = Finder(["email"])
    for before in (0, (1 << 16) - 12_000):
        text = "x" * before + " joe" + "\u200b" * 20_000 + "@example.com"
        assert [part.entity for part in parts_of(text, finder) if part.entity] == ["email"], before
