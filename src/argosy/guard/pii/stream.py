"""Find values in a text that is still being written, holding back only what could still become a value.

    pieces  ->  held text  ─ no value can begin before and end behind this place ─>  Passed: text, or a value

Only the end of a text is held back: its last word, and any words before it that could belong to the same value.
Ordinary prose therefore lags by a word, and a row of digit groups by at most twice SPACED_BYTES. The parts that
pass, joined, are the text, and its values are those that `Finder.find` finds in the whole text.

Elsewhere: a placeholder that is being written is held by `placeholders.Restorer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from argosy.guard.pii.entities import PRIVATE_KEY_BEGINS, PRIVATE_KEY_ENDS, SECRET_NAMES, SPACED_BYTES, Entity
from argosy.guard.pii.finder import Finder
from argosy.guard.pii.spelling import plain, with_short_runs

MOST_HELD = 8192  # characters: a longer word is passed on except where it is a value
_READ_AT_ONCE = 1 << 16
# A stream may exceed MOST_HELD by this factor, so that a search passes on more than one letter.
_WORTH_IT = 1.25
_REST_OF_WORD, _REST_OF_KEY = re.compile(r"(?=\s)"), re.compile(r"-----END [A-Z0-9 ]{0,40}-----")
_MARK = 64  # longer than the line that ends a private key
_WORD = re.compile(rb"[^ \t\n]+")
# A group of digits, or the separator between two groups.
_OF_NUMBER = re.compile(rb"[^0-9]*[0-9].*|[()./\-+_]+|[A-Z]{1,4}", re.DOTALL)
_AT_OR_DOT = rb"(?i:at|arroba|arobase|klammeraffe|dot|punkt|point|punto|@|\.|%40|&#0?64;)"
_COULD_JOIN = frozenset(
    word[:length].encode()
    for word in (
        "at",
        "arroba",
        "arobase",
        "klammeraffe",
        "dot",
        "punkt",
        "point",
        "punto",
        "%40",
        "&#64;",
        "&#064;",
    )
    for length in range(1, len(word) + 1)
)
_JOINS = re.compile(rb"[(\[{<]?" + _AT_OR_DOT + rb"[)\]}>]?|[(\[{<]|[)\]}>]|[:=]")
# At the end of a word, or at its beginning.
_JOINS_NEXT = re.compile(rb"(?:@|%40|&#0?64;|[:=][\"']?|[(\[{<]" + _AT_OR_DOT + rb"?[)\]}>]?|[)\]}>])$")
_JOINS_LAST = re.compile(rb"(?:@|%40|&#0?64;|[:=]|[(\[{<]|" + _AT_OR_DOT + rb"?[)\]}>])")
_NAMES_SECRET = re.compile(rb"(?i:" + SECRET_NAMES.encode() + rb")[\"']?$")


class Passed(NamedTuple):
    """A part of the text; `entity` is None if it is not a value."""

    text: str
    entity: Entity | None


def parts_of(text: str, finder: Finder) -> Iterator[Passed]:
    """Split a whole text into parts. A long text is read in pieces, because a search takes many times the memory of
    a piece.
    """
    stream = FindingStream(finder)
    text = with_short_runs(text)  # otherwise a long run inside a value would exceed what a stream holds back
    last = max(0, len(text) - 1) // _READ_AT_ONCE * _READ_AT_ONCE
    for start in range(0, last, _READ_AT_ONCE):
        yield from stream.push(text[start : start + _READ_AT_ONCE])
    yield from stream.finish(text[last:])


class FindingStream:
    """One text, piece by piece."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._held = ""
        self._rest_of: Entity | None = None  # a value longer than MOST_HELD that may go on
        self._is_key = False  # whether that value is a private key

    def push(self, text: str) -> list[Passed]:
        """Take the next piece; return the parts that are decided."""
        self._held += text
        return self._pass(is_end=False)

    def finish(self, text: str = "") -> list[Passed]:
        """Take the last piece, and return the rest; another text may follow."""
        self._held += text
        return self._pass(is_end=True)

    def _pass(self, *, is_end: bool) -> list[Passed]:
        passed = self._pass_rest(is_end)
        if not self._held or self._rest_of is not None:
            return passed
        given = plain(self._held)
        until = len(self._held) if is_end else given.place(open_from(given.data))
        if (
            not is_end
            and SPACED_BYTES < len(self._held) < _WORTH_IT * MOST_HELD
            and until < len(self._held) / 2
        ):
            return passed  # searching the whole again for each digit would take far longer than generating it
        found = self._finder.find_plain(given)
        for value in found:
            if value.start < until < value.end:
                until = value.start
        if not is_end and len(self._held) - until > MOST_HELD:
            until = len(self._held) - MOST_HELD
            for value in found:
                if value.start < until < value.end:
                    until = value.end
                    self._rest_of = value.entity if until == len(self._held) else None
                    self._is_key = self._held.startswith(PRIVATE_KEY_BEGINS.decode(), value.start)
        at = 0
        for value in found:
            if value.end <= until:
                passed += _text(self._held[at : value.start])
                passed.append(Passed(self._held[value.start : value.end], value.entity))
                at = value.end
        passed += _text(self._held[at:until])
        self._held = self._held[until:]
        return passed

    def _pass_rest(self, is_end: bool) -> list[Passed]:
        """Pass more of a value too long to hold back: a word, or a private key up to its end."""
        if self._rest_of is None or not self._held:
            return []
        entity, end = self._rest_of, _REST_OF_KEY if self._is_key else _REST_OF_WORD
        found = end.search(self._held)
        until = (
            found.end()
            if found is not None
            else len(self._held) - (0 if is_end or not self._is_key else _MARK)
        )
        if found is not None or is_end:
            self._rest_of = None
        passed, self._held = self._held[: max(0, until)], self._held[max(0, until) :]
        return [Passed(passed, entity)] if passed else []


def _text(text: str) -> Iterator[Passed]:
    if text:
        yield Passed(text, None)


def open_from(data: bytes) -> int:
    """The place where the first incomplete value of an unfinished text could begin."""
    line = data.rfind(b"\n") + 1
    words = list(_WORD.finditer(data, max(line, len(data) - 2 * SPACED_BYTES)))
    start = len(data)
    if words:
        if words[0].start() > line and len(words) == 1:  # a long word that began earlier
            return _word_start(data, words[0].start())
        start, last = words[-1].start(), words[-1][0]
        if words[-1].end() == len(data) and last.lower() in _COULD_JOIN:
            last = b"@"  # a word for @ may be unfinished
        for word in reversed(words[:-1]):
            if len(data) - start > SPACED_BYTES or not _may_join(word[0], last):
                break
            start, last = word.start(), word[0]
    key = data.rfind(PRIVATE_KEY_BEGINS)
    if key >= 0:
        end = data.find(PRIVATE_KEY_ENDS, key)
        if end < 0 or data.find(b"-----", end + len(PRIVATE_KEY_ENDS)) < 0:
            start = min(start, key)
    return _word_start(data, start)


def _word_start(data: bytes, at: int) -> int:
    return max(data.rfind(white, 0, at) for white in (b" ", b"\t", b"\n")) + 1 if at < len(data) else at


def _may_join(word: bytes, following: bytes) -> bool:
    """Whether a value may contain these two words with a space between them."""
    if _OF_NUMBER.fullmatch(word) and _OF_NUMBER.fullmatch(following):
        return True
    return bool(
        _JOINS.fullmatch(word) or _JOINS.fullmatch(following) or _JOINS_NEXT.search(word)
        or _JOINS_LAST.match(following) or _NAMES_SECRET.search(word)
    )  # fmt: skip
