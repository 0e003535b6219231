"""Lists of disallowed words and phrases, in plain text or as hashes.

    FILE: one phrase a line, or `sha256:HEX NUM_WORDS`  ->  WordList  ->  judge a text, or a stream of it

Phrases are compared word by word after normalization: invisible characters removed, NFKC, lower case, and letters
that look Latin replaced by Latin ones. In scripts without spaces between words, each letter counts as a word. A
hash is the SHA-256 of a normalized phrase, its words joined by single spaces, so a list can be shared without its
words. Whatever separates words is ignored. Capitals may look Latin where small letters do not, so a text is also
compared in a second normalization, which replaces look-alikes before it folds the case.

A stream lags by the length of the longest phrase, in words, so no part of a phrase is sent.

Elsewhere: which list a policy uses is `policy.py`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from argosy.errors import UsageError
from argosy.guard.pii.spelling import latin_of, seen_part, without_marks, without_unseen, words_in
from argosy.guard.verdict import Verdict

MOST_WORDS = 64  # per phrase
# A stream holds back at most this many characters. A phrase with more than that between its words is sent in part.
MOST_HELD = 8192
MOST_PHRASES = 200_000
_HASHED = re.compile(r"sha256:([0-9a-f]{64})(?: ([0-9]{1,2}))?")
_READ_AT_ONCE = 1 << 14  # characters of a whole text: its words take many times the memory of the text
_LONGEST_WORD = 64  # characters that are compared; no word of a phrase is longer
_LONGEST_LETTER = 9  # with its marks
_MOST_COMPARED = _LONGEST_WORD * _LONGEST_LETTER


class _Word(NamedTuple):
    """A word of a text, which is `given[start:end]`.

    text: normalized like the phrases of lists.   latin: in the second normalization.
    """

    text: str
    latin: str
    start: int
    end: int


def _words(given: str) -> list[_Word]:
    seen, places = seen_part(given)
    found = []
    for match in words_in(seen if seen.isascii() else latin_of(seen)):
        start, end = match.span()
        word = seen[start:end]
        if places is not None:  # marks on its last letter belong to the word
            start, end = places[start], places[end] if end < len(places) else len(given)
            word = given[start:end]
        found.append(_Word(*_compared(word, match[0]), start, end))
    return found


def _compared(word: str, letters: str) -> tuple[str, str]:
    """Both normalizations of a word.

    Args:
        letters: the word without invisible characters and marks, with look-alikes replaced by Latin letters.
    """
    letters = letters[:_LONGEST_WORD]
    latin = letters.lower()
    if word.isascii():
        return latin, latin
    if not latin.isascii() and (compatible := _compatible(letters)) != letters:
        latin = latin_of(compatible).casefold()
    # `ö` has two spellings. NFKC makes one character of a letter and its mark where Unicode has one.
    if len(word) > len(letters):
        word = without_marks(_compatible(without_unseen(word)[:_MOST_COMPARED]))
    folded = _compatible(word[:_LONGEST_WORD]).casefold()
    text = latin_of(folded.replace("i\u0307", "i"))  # the small letter of the Turkish `İ`
    return text, latin if latin.isascii() else text


def _beginning(word: str) -> str:
    """The compared beginning of a word, and one letter more if there is one."""
    word = without_unseen(word)[:_MOST_COMPARED]
    seen, places = seen_part(word)
    most = _LONGEST_WORD + 1
    return word if len(seen) <= most else word[: most if places is None else places[most]]


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def digest_of(phrase: str) -> str:
    """The line of a list that stands for a phrase."""
    words = [word.text for word in _words(phrase)]
    return f"sha256:{_digest(words)} {len(words)}"


def _digest(words: list[str]) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


class WordList:
    """A list; any thread may use it.

    Args:
        text: the content of its file.
        name: the file's name, for errors.
        category: the category that a phrase of the list stands for.

    Raises:
        UsageError: a line has no word or too many, or the list has too many lines.
    """

    def __init__(self, text: str, name: str, *, category: str) -> None:
        self._category = category
        self._phrases: set[tuple[str, ...]] = set()
        self._hashes: set[str] = set()
        self._lengths: set[int] = set()  # lengths of the plain phrases, in words
        self._hashed_lengths: set[int] = set()
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            if len(self._phrases) + len(self._hashes) >= MOST_PHRASES:
                raise UsageError(f"{name} has more than {MOST_PHRASES} phrases, which is the limit")
            try:
                self._add(stripped)
            except ValueError as error:
                raise UsageError(f"{name}, line {number}: {error}") from None
        self.most_words = max((*self._lengths, *self._hashed_lengths), default=1)

    def _add(self, line: str) -> None:
        if line.startswith("sha256:"):
            found = _HASHED.fullmatch(line)
            if found is None:
                raise ValueError("a hash has the form `sha256:HEX NUM_WORDS`, HEX 64 digits in lower case")
            length = int(found[2] or 1)
            self._hashes.add(found[1])
            lengths = self._hashed_lengths
        else:
            words = tuple(word.text for word in _words(line))
            length = len(words)
            self._phrases.add(words)
            lengths = self._lengths
        if not 1 <= length <= MOST_WORDS:
            raise ValueError(f"a phrase has 1 to {MOST_WORDS} words, found {length}")
        lengths.add(length)

    def judge(self, text: str) -> Verdict:
        """Judge a whole text: does it contain a phrase of the list?"""
        stream = self.stream()
        for start in range(0, len(text), _READ_AT_ONCE):
            stream.push(text[start : start + _READ_AT_ONCE])
        stream.finish()
        return Verdict(True, {self._category: 1.0}) if stream.is_flagged else Verdict()

    def _has_phrase(self, words: list[_Word], num_new: int) -> bool:
        """Whether a phrase ends with one of the last `num_new` words."""
        texts, latin = [word.text for word in words], [word.latin for word in words]
        return self._has(texts, num_new) or (latin != texts and self._has(latin, num_new))

    def _has(self, texts: list[str], num_new: int) -> bool:
        return any(
            tuple(part) in self._phrases
            for length in self._lengths
            for part in _windows(texts, length, num_new)
        ) or any(
            _digest(part) in self._hashes
            for length in self._hashed_lengths
            for part in _windows(texts, length, num_new)
        )

    def stream(self) -> ListStream:
        """Start judging a text that arrives in pieces."""
        return ListStream(self)


def _windows(words: list[str], length: int, num_new: int) -> Iterator[list[str]]:
    """Each run of `length` words that ends in one of the last `num_new`."""
    first = max(0, len(words) - num_new - length + 1)
    return (words[at : at + length] for at in range(first, len(words) - length + 1))


class ListStream:
    """One text, piece by piece. Each character is read once; a word that continues in the next piece is read twice.

    is_flagged: a phrase was found; nothing more is sent.
    """

    def __init__(self, words: WordList) -> None:
        self._list = words
        self._held = ""
        # where in `_held` the last words begin, up to the length of the longest phrase
        self._starts: list[int] = []
        self._recent: list[_Word] = []  # those words
        self._open = ""  # the compared part of the last word, if that may go on
        self.is_flagged = False

    def push(self, text: str) -> str:
        """Take the next piece; return the text that is not part of a phrase."""
        return self._pass(text, is_end=False)

    def finish(self) -> str:
        """Return the rest; another text may follow."""
        return self._pass("", is_end=True)

    def _pass(self, text: str, *, is_end: bool) -> str:
        if self.is_flagged:
            return ""
        given, offset, goes_on = self._open + text, len(self._held) - len(self._open), bool(self._open)
        words = _words(given)
        self._held += text
        self._starts += [offset + word.start for word in words[goes_on:]]
        self._open = ""
        if words and words[-1].end == len(given) and not is_end:
            self._open = _beginning(given[words.pop().start :])
        self._recent += words
        if self._list._has_phrase(self._recent, len(words)):
            self.is_flagged, self._held = True, ""
            return ""
        del self._recent[: -self._list.most_words], self._starts[: -self._list.most_words]
        until = self._starts[0] if self._starts and not is_end else len(self._held)
        until = max(0, until, len(self._held) - MOST_HELD)
        passed, self._held = self._held[:until], self._held[until:]
        self._starts = [] if is_end else [start - until for start in self._starts]
        if is_end:
            self._recent = []
        return passed
