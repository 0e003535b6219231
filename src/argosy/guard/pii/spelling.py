"""A text as detectors read it: one byte per character, spelling tricks undone, each byte mapped to its place.

    "ｊｏｅ＠ｅｘａｍｐｌｅ．com"  ->  b"joe@example.com"; byte 3 is character 3 of the original

Full-width and mathematical letters, digits of other scripts, letters of other scripts that look Latin, and exotic
dashes, dots and spaces become ASCII. Invisible characters are dropped. Every other character beyond Latin-1 becomes
one byte that no pattern matches. So every span of bytes maps to a span of the original.

Elsewhere: patterns are `entities.py`.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

_OTHER = 0x01
# Controls other than white space, Unicode's Default_Ignorable_Code_Point, and format characters (category Cf).
_UNSEEN = (
    "\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160"
    "\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Marks on a letter: accents, vowel points of Hebrew and Arabic, the line that stretches Arabic words, and the
# voicing marks of kana.
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640"
    "\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u08d3-\u08e1\u08e3-\u08ff"
    "\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u3099\u309a\ufe20-\ufe2f\uff9e\uff9f"
)
_UNSEENS = re.compile(f"[{_UNSEEN}]+")
_MARKED = re.compile(f"[{_MARKS}]+")
_HIDDEN = re.compile(f"[{_UNSEEN}{_MARKS}]+")
# Marks on one letter: more than any language uses. Normalizing takes time quadratic in their number.
_MOST_MARKS = 8
_MOST_HIDDEN = 64  # in a row
# Cyrillic and Greek letters that look Latin, from the confusables of Unicode Technical Standard 39; Latin letters
# without a dot or a serif; small capitals.
_LOOK_ALIKES = dict(
    zip(
        "аеорсухіјѕԁһԛԝкмтАВЕКМНОРСТУХІЈЅοαρνιυκΑΒΕΖΗΙΚΜΝΟΡΤΥΧıɑɡᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ",
        "aeopcyxijsdhqwkmtABEKMHOPCTYXIJSoapviukABEZHIKMNOPTYXiagabcdefghijklmnoprstuvwyz",
        strict=True,
    )
)
# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana and Han.
_UNSPACED = (
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_WORD_OF_ASCII = re.compile("[A-Za-z0-9]+")
# Where the alphabets of enclosed letters begin: Python treats them as symbols, and NFKC leaves some unchanged.
_ENCLOSED = dict.fromkeys((0x249C, 0x24D0), ascii_lowercase) | dict.fromkeys(
    (0x24B6, 0x1F110, 0x1F130, 0x1F150, 0x1F170), ascii_uppercase
)
_SIGNS = dict.fromkeys("‐‑‒–—―−⁃﹣－", "-") | dict.fromkeys("․·•∙⋅。｡", ".") | dict.fromkeys("⁄∕", "/")
_LINE_ENDS = dict.fromkeys("\r\x85\u2028\u2029", "\n")
# Blocks with a compatible form in ASCII, or with decimal digits.
_BLOCKS = (
    range(0x80, 0x3400), range(0xA600, 0xAC00), range(0xF900, 0x12000), range(0x16A00, 0x16C00),
    range(0x1D400, 0x1D800), range(0x1E000, 0x1EA00), range(0x1F100, 0x1F200), range(0x1FBF0, 0x1FBFA),
)  # fmt: skip


class _Table(dict[int, int]):
    """A table for `str.translate`. It caches no unknown character, because callers choose those."""

    def __missing__(self, code: int) -> int:
        return _OTHER


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
    for code, plain in (_look_alikes() | str.maketrans(_SIGNS | _LINE_ENDS)).items():
        table[code] = ord(plain)
    return table


def latin_of(text: str) -> str:
    """`text` with letters that look Latin replaced by Latin ones, character by character; others stay."""
    return text if _looks_latin().search(text) is None else text.translate(_look_alikes())


@functools.cache
def _looks_latin() -> re.Pattern[str]:
    return re.compile(f"[{''.join(map(chr, _look_alikes()))}]")


@functools.cache
def _look_alikes() -> dict[int, str]:
    found: dict[int, str] = str.maketrans(_LOOK_ALIKES)
    for first, letters in _ENCLOSED.items():
        found |= {first + at: letter for at, letter in enumerate(letters)}
    return found


def without_unseen(text: str) -> str:
    """`text` without invisible characters, and with at most a few marks per letter."""
    return _MARKED.sub(lambda marks: marks[0][:_MOST_MARKS], _UNSEENS.sub("", text))


def without_marks(text: str) -> str:
    """`text` without invisible characters and without combining marks."""
    return _HIDDEN.sub("", text)


def with_short_runs(text: str) -> str:
    """`text` with long runs of invisible characters and marks cut short; ordinary text has none."""
    return _HIDDEN.sub(lambda hidden: hidden[0][:_MOST_HIDDEN], text)


def words_in(text: str) -> Iterator[re.Match[str]]:
    """The words of a text that `without_marks` returned; in scripts without spaces, each letter is a word."""
    return (_WORD_OF_ASCII if text.isascii() else _word()).finditer(text)


@functools.cache
def _word() -> re.Pattern[str]:
    # Vowel signs of Indic scripts, which distinguish words and which `[^\W_]` does not match.
    signs = "".join(
        chr(code) for code in range(0x900, 0x12000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
    )
    spaced = rf"[^\W_{_UNSPACED}]+"
    word = f"{spaced}(?:[{signs}]+(?:{spaced})?)*|(?![_\\W])[{_UNSPACED}][{signs}]*"
    return re.compile(word)


def seen_part(text: str) -> tuple[str, Sequence[int] | None]:
    """`text` as `without_marks` returns it, and each character's index in `text`, or None if nothing was removed."""
    if _HIDDEN.search(text) is None:
        return text, None
    places, kept, after = array("I"), [], 0
    for hidden in _HIDDEN.finditer(text):
        places.extend(range(after, hidden.start()))
        kept.append(text[after : hidden.start()])
        after = hidden.end()
    places.extend(range(after, len(text)))
    return "".join((*kept, text[after:])), places


@dataclass(frozen=True, slots=True)
class Plain:
    """A text in plain spelling.

    data: Latin-1.
    places: for each byte, the index of its character in the text; None if the indices are equal.
    """

    data: bytes
    places: Sequence[int] | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span of text for a non-empty span of bytes."""
        return (start, end) if self.places is None else (self.places[start], self.places[end - 1] + 1)

    def place(self, at: int) -> int:
        """The place in the text where the bytes before `at` end."""
        if self.places is None or at == 0:
            return at
        return self.places[at - 1] + 1


def plain(text: str) -> Plain:
    """Undo spelling tricks."""
    seen, places = seen_part(text)
    if seen.isascii():
        return Plain(seen.encode().replace(b"\r", b"\n"), places)
    return Plain(seen.translate(_table()).encode("latin-1"), places)
