"""A text as detectors read it: one byte a character, tricks of spelling undone, each byte with its place in the text.

    "ｊｏｅ＠ｅｘａｍｐｌｅ．com"  ->  b"joe@example.com"; byte 3 is character 3 of the original

Full-width and mathematical letters, digits of other scripts, letters of other scripts that look Latin, and exotic
dashes, dots and spaces become ASCII. Characters that nobody sees are left out. Every other character beyond Latin-1
becomes one byte that no pattern matches. So a span of the bytes is a span of the original, whatever was undone.

Elsewhere: patterns are `entities.py`.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

_OTHER = 0x01
# Soft hyphen, combining marks, joiners, directions, variation selectors, fillers and tags.
UNSEEN = (
    "\u00ad\u0300-\u036f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff"
)
_UNSEEN = re.compile(f"[{UNSEEN}]+")
# Cyrillic and Greek letters that look Latin, from the confusables of Unicode Technical Standard 39.
_LOOK_ALIKES = dict(
    zip(
        "аеорсухіјѕԁһԛԝкмтАВЕКМНОРСТУХІЈЅοαρνιυκΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
        "aeopcyxijsdhqwkmtABEKMHOPCTYXIJSoapviukABEZHIKMNOPTYX",
        strict=True,
    )
)
_MARKS = dict.fromkeys("‐‑‒–—―−⁃﹣－", "-") | dict.fromkeys("․·•∙⋅。｡", ".") | dict.fromkeys("⁄∕", "/")
_LINE_ENDS = dict.fromkeys("\r\x85\u2028\u2029", "\n")
# Blocks with a compatible form in ASCII, or with decimal digits.
_BLOCKS = (
    range(0x80, 0x3400), range(0xA600, 0xAC00), range(0xF900, 0x12000), range(0x16A00, 0x16C00),
    range(0x1D400, 0x1D800), range(0x1E000, 0x1EA00), range(0x1F100, 0x1F200), range(0x1FBF0, 0x1FBFA),
)  # fmt: skip


class _Table(dict[int, int]):
    """For `str.translate`; a character that it does not know is read once, and then remembered."""

    def __missing__(self, code: int) -> int:
        self[code] = found = code if code <= 0xFF else _OTHER
        return found


@functools.cache
def _table() -> _Table:
    table = _Table({code: code for code in range(0x100)})
    for block in _BLOCKS:
        for code in block:
            plain = unicodedata.normalize("NFKC", chr(code))
            digit = unicodedata.decimal(chr(code), None)
            if digit is not None:
                table[code] = ord("0") + digit
            elif len(plain) == 1 and plain.isascii():
                table[code] = ord(plain)
    for seen, plain in (_LOOK_ALIKES | _MARKS | _LINE_ENDS).items():
        table[ord(seen)] = ord(plain)
    return table


def latin_of(text: str) -> str:
    """`text` with letters that look Latin replaced by Latin ones, character by character; others stay."""
    return text.translate(_look_alikes())


@functools.cache
def _look_alikes() -> dict[int, str]:
    return {ord(seen): plain for seen, plain in _LOOK_ALIKES.items()}


@dataclass(frozen=True, slots=True)
class Plain:
    """A text in plain spelling.

    data: Latin-1.
    places: for each byte, the index of its character in the text; None: they are the same.
    """

    data: bytes
    places: Sequence[int] | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span of the text for a span of the bytes, which is not empty."""
        return (start, end) if self.places is None else (self.places[start], self.places[end - 1] + 1)

    def place(self, at: int) -> int:
        """The place in the text where the bytes before `at` end."""
        if self.places is None or at == 0:
            return at
        return self.places[at - 1] + 1


def plain(text: str) -> Plain:
    """Undo tricks of spelling."""
    if text.isascii():
        return Plain(text.encode().replace(b"\r", b"\n"))
    places: array[int] | None = None
    if _UNSEEN.search(text):
        places, kept, after = array("I"), [], 0
        for unseen in _UNSEEN.finditer(text):
            places.extend(range(after, unseen.start()))
            kept.append(text[after : unseen.start()])
            after = unseen.end()
        places.extend(range(after, len(text)))
        text = "".join((*kept, text[after:]))
    return Plain(text.translate(_table()).encode("latin-1"), places)
