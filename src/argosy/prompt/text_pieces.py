"""Finds where a long text can be cut without changing its ids, and a lower bound on a text's tokens.

    text  ->  Cutter.pieces     ->  (start, piece) in order, each at most MAX_PIECE_CHARACTERS long
    text  ->  LongestToken      ->  bytes of the text / bytes of the longest token: a lower bound on its tokens

A tokenizer that splits text into words never extends a word from a letter or digit into other characters (except in
contractions), and it finds the words after that place without looking back. A tokenizer that merges a whole text
(SentencePiece) ends every token before a space. A tokenizer's parts show which kind it is, if either. In addition,
the text around every cut must give the same ids whole and cut.

Elsewhere: `tokenizer.py` encodes the pieces.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import tokenizers
from tokenizers import models

from argosy.checkpoint.vocabulary.byte_level import spelling_of_bytes
from argosy.errors import UsageError

PIECE_CHARACTERS = 1 << 14  # longer texts are cut
MAX_PIECE_CHARACTERS = 1 << 16  # `tokenizers` takes up to 40 MB for a piece of this length
_AROUND = 256  # characters on each side of a candidate cut that are compared
_TRIES = 64
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's spelling of a space
_BEHIND_WORD = re.compile(r"[^\W_](?=[^\w'\u2019])")
_BEHIND_LETTER = re.compile(r"[^\W\d_](?=[^\w'\u2019])")
_BEFORE_SPACE = re.compile(r"[^\W_](?= \w)")
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]?|\\\\")  # an unclosed one takes the rest
_LOOKS_BACK = re.compile(r"\(\?<|\\[AbBG1-9]|\^")
# A pattern that groups digits, as in Trinity and Command-A-plus: it reads a run of digits and where that run ends.
_OF_DIGITS = re.compile(
    r"(?:\\(?:d|p\{Nd\}|[AbGz])|\(\?:\\P\{Nd\}\|\$\)|\(\?[:=>]|[()|*+]|\{\d+(?:,\d*)?\})+"
)

Encode = Callable[[str], list[int]]


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        self._core = core

    def pieces(self, text: str, encode: Encode) -> Iterator[tuple[int, str]]:
        """Yield the pieces of `text` with their start positions; a space between two pieces may be in neither.

        Args:
            encode: returns the ids of a text on its own, as for the pieces.

        Raises:
            UsageError: a piece would be longer than MAX_PIECE_CHARACTERS, because there is no place to cut.
        """
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            cut = self._find_cut(text, start, encode)
            if cut is None:
                if len(text) - start <= MAX_PIECE_CHARACTERS:
                    break
                raise UsageError(
                    f"the text has a run of {MAX_PIECE_CHARACTERS} or more characters in which this model's"
                    " tokenizer is not certain to begin a new token",
                    hint="break the text up with spaces or newlines",
                )
            yield start, text[start:cut]
            start = cut + len(self._separator or "")
        yield start, text[start:]

    def _find_cut(self, text: str, start: int, encode: Encode) -> int | None:
        """Find a place to cut after the next PIECE_CHARACTERS, or None."""
        separator = self._separator
        if separator is None:
            return None
        end = min(len(text), start + MAX_PIECE_CHARACTERS)
        found = self._places.finditer(text, start + PIECE_CHARACTERS - 1, end - 1)
        for place in islice(found, _TRIES):
            cut = place.end()
            before, behind = text[max(start, cut - _AROUND) : cut], text[cut : cut + _AROUND]
            if unicodedata.category(behind[0]).startswith("M"):  # a combining mark on the letter before it
                continue
            if encode(before + behind) == encode(before) + encode(behind[len(separator) :]):
                return cut
        return None

    @functools.cached_property
    def _places(self) -> re.Pattern[str]:
        if self._separator == " " or self._merges_whole_texts:
            return _BEFORE_SPACE
        return _BEHIND_LETTER if any(map(_looks_back, self._patterns)) else _BEHIND_WORD

    @functools.cached_property
    def _patterns(self) -> tuple[str, ...]:
        return tuple(_patterns(_state(self._core.pre_tokenizer)))

    @functools.cached_property
    def _separator(self) -> str | None:
        """The text that a cut removes: nothing, or the space that a tokenizer adds before a text. None: no cut is
        safe.
        """
        core = self._core
        if self._merges_whole_texts and not _ends_tokens_before_spaces(core):
            return None
        if any(_looks_back(one) and not _OF_DIGITS.fullmatch(one) for one in self._patterns):
            return None
        if any(len(str(token.content)) > _AROUND for token in core.get_added_tokens_decoder().values()):
            return None
        for separator in ("", " "):
            whole, parts = ("a b", ("a", " b"[len(separator) :]))
            if _ids(core, whole) == [token_id for part in parts for token_id in _ids(core, part)]:
                return separator
        return None

    @functools.cached_property
    def _merges_whole_texts(self) -> bool:
        """Whether the text is not split into words before merging."""
        state = _state(self._core.pre_tokenizer)
        return not state or (state["type"] == "Metaspace" and not state.get("split", True))


@dataclass(frozen=True, slots=True)
class LongestToken:
    """The maximum bytes of text that one token can stand for."""

    num_bytes: int
    composes: bool  # the text is first composed (NFC), which may make it shorter

    def holds_for(self, text: str) -> bool:
        return not self.composes or unicodedata.is_normalized("NFC", text)

    @classmethod
    def of(cls, core: tokenizers.Tokenizer) -> LongestToken | None:
        """Find it; None if a token may stand for any number of bytes, as with unknown words or dropped white space."""
        model = core.model
        added = core.get_added_tokens_decoder()
        if not isinstance(model, models.BPE) or any(token.lstrip or token.rstrip for token in added.values()):
            return None
        normalizer = _steps(_state(core.normalizer), "normalizers")
        splitter = _steps(_state(core.pre_tokenizer), "pretokenizers")
        if not all(map(_keeps_length, normalizer)) or not all(map(_keeps_all, splitter)):
            return None
        is_by_bytes = any(step["type"] == "ByteLevel" for step in splitter)
        if is_by_bytes:
            bytes_spelled = spelling_of_bytes()
        elif model.byte_fallback:
            bytes_spelled = tuple(f"<0x{byte:02X}>" for byte in range(256))
        else:
            return None
        if any(model.token_to_id(spelled) is None for spelled in bytes_spelled):
            return None  # a byte without a token is dropped, or joins its neighbours in one unknown token
        longest = max(len(token) if is_by_bytes else len(token.encode()) for token in _tokens(core))
        contents = (len(str(token.content).encode()) for token in added.values())
        composes = any(step["type"] == "NFC" for step in normalizer)
        return cls(max(longest, *contents, 1), composes)


def _keeps_length(step: dict[str, Any]) -> bool:
    """Whether a normalizer never makes the text shorter (NFC may; `holds_for` checks that per text)."""
    match step:
        case {"type": "NFC" | "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": " "}, "content": content}:
            return bool(content == _SPACE)
    return False


def _keeps_all(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer drops nothing."""
    match step:
        case {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
    return False


def _ends_tokens_before_spaces(core: tokenizers.Tokenizer) -> bool:
    """Whether no token has a space after another character, so that none extends across a space."""
    model = core.model
    if isinstance(model, models.BPE):
        if (
            model.ignore_merges
            or model.dropout
            or model.continuing_subword_prefix
            or model.end_of_word_suffix
        ):
            return False
    elif not isinstance(model, models.Unigram):
        return False
    if model.token_to_id(_SPACE) is None:
        return False
    crosses = re.compile(rf"[^{_SPACE}]{_SPACE}")
    return not any(crosses.search(token) for token in _tokens(core))


def _tokens(core: tokenizers.Tokenizer) -> Iterator[str]:
    """Yield the tokens one at a time, because all of them as Python objects would take tens of megabytes."""
    num_left, token_id = core.get_vocab_size(), 0
    while num_left:
        token = core.id_to_token(token_id)
        token_id += 1
        if token is not None:
            num_left -= 1
            yield token


def _state(part: Any) -> dict[str, Any]:
    """The tokenizer.json entry of a normalizer or pre-tokenizer; empty if there is none."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _steps(state: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if not state:
        return []
    if state["type"] != "Sequence":
        return [state]
    return [step for inner in state[name] for step in _steps(inner, name)]


def _patterns(state: dict[str, Any]) -> Iterator[str]:
    for step in _steps(state, "pretokenizers"):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            yield step["pattern"]["Regex"]


def _looks_back(pattern: str) -> bool:
    """Whether a match may depend on the text before it."""
    return _LOOKS_BACK.search(_CLASS.sub("", pattern)) is not None


def _ids(core: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = core.encode(text, add_special_tokens=False).ids
    return ids
