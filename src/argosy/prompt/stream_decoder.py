"""Turns token ids into text one at a time, in whole characters, exactly as the decoder in a model's files does.

Elsewhere: `tokenizer.py` makes a `StreamDecoder`.
"""

from __future__ import annotations

import codecs
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import tokenizers

from argosy.checkpoint.vocabulary.byte_level import spelling_of_bytes
from argosy.errors import UsageError


class StreamDecoder:
    """Turns ids into text as they arrive; an incomplete character waits for its remaining bytes.

    The cost of a token does not depend on how many came before it. Bytes that are not UTF-8 become U+FFFD as soon as
    that is certain.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        added: Mapping[int, str],
        hidden: frozenset[int],
        *,
        is_start: bool = True,
    ) -> None:
        self._core = core
        self._added = added
        self._hidden = hidden
        self._pieces = pieces_of(core, is_start=is_start)

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` makes certain: usually the token's own, sometimes none or more."""
        if token_id in self._hidden:
            return ""
        if token_id in self._added:
            return self._pieces.literal(self._added[token_id])
        token = self._core.id_to_token(token_id)
        return "" if token is None else self._pieces.token(token_id, token)

    def finish(self) -> str:
        """Return the waiting text, once no more ids come: U+FFFD for an incomplete character."""
        return self._pieces.finish()


class Pieces(ABC):
    """Tracks the text that each token adds; one subclass per kind of decoder."""

    def __init__(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @abstractmethod
    def token(self, token_id: int, token: str) -> str: ...

    @abstractmethod
    def bytes_of(self, token: str) -> bytes:
        """The bytes of a token that is not an added token."""

    def literal(self, text: str) -> str:
        """The text of an added token, which is written literally."""
        return self._bytes.decode(text.encode())

    def finish(self) -> str:
        return self._bytes.decode(b"", final=True)


class _BytePieces(Pieces):
    """Byte-level vocabularies: each character of a token stands for one byte (GPT-2's table)."""

    def token(self, token_id: int, token: str) -> str:
        return self._bytes.decode(self.bytes_of(token))

    def bytes_of(self, token: str) -> bytes:
        try:
            return bytes(map(_byte_table().__getitem__, token))
        except KeyError:
            return token.encode()


class _SentencePieces(Pieces):
    """SentencePiece vocabularies: U+2581 is a space, `<0x0A>` a byte, and one leading space is not part of the text."""

    def __init__(self, *, has_bytes: bool, space: str, strips_start: bool) -> None:
        super().__init__()
        self._has_bytes = has_bytes
        self._space = space
        self._strips = strips_start

    def token(self, token_id: int, token: str) -> str:
        return self._start(self._bytes.decode(self.bytes_of(token)))

    def bytes_of(self, token: str) -> bytes:
        if self._has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(self._space, " ").encode()

    def literal(self, text: str) -> str:
        return self._start(super().literal(text))

    def _start(self, text: str) -> str:
        if not text or not self._strips:
            return text
        self._strips = False
        return text.removeprefix(" ")


class _WindowPieces(Pieces):
    """Any other decoder: decode the last few tokens with and without the new one, and return the difference."""

    _LONGEST = 8  # no character has more bytes, so there is no point in waiting longer

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._core = core
        self._shown: list[int] = []  # the last tokens whose text was returned
        self._waiting: list[int] = []

    def token(self, token_id: int, token: str) -> str:
        self._waiting.append(token_id)
        before = self._core.decode(self._shown, skip_special_tokens=False)
        text = self._core.decode(self._shown + self._waiting, skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._waiting) < self._LONGEST:
            return ""
        self._shown, self._waiting = (self._shown + self._waiting)[-self._LONGEST :], []
        return text[len(before) :]

    def bytes_of(self, token: str) -> bytes:
        raise UsageError(
            "this model's tokenizer decodes a token depending on its neighbours, so it cannot follow a grammar"
        )

    def literal(self, text: str) -> str:
        return self.finish() + text

    def finish(self) -> str:
        if not self._waiting:
            return ""
        before = self._core.decode(self._shown, skip_special_tokens=False)
        text = self._core.decode(self._shown + self._waiting, skip_special_tokens=False)
        self._waiting = []
        return text[len(before) :]


def pieces_of(core: tokenizers.Tokenizer, *, is_start: bool = True) -> Pieces:
    """The `Pieces` for the decoder named in tokenizer.json; `is_start`: at the start of a text."""
    if core.decoder is None:
        return _WindowPieces(core)
    state = json.loads(core.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _BytePieces()
    if kinds == ["Metaspace"]:
        strips = is_start and steps[0].get("prepend_scheme") != "never"
        return _SentencePieces(has_bytes=False, space=steps[0]["replacement"], strips_start=strips)
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and kinds[:1] == ["Replace"]:
        replace, rest = steps[0], steps[1:]
        strips = [step for step in rest if step["type"] == "Strip"]
        plain = replace["pattern"].get("String") is not None and replace["content"] == " "
        if plain and kinds.count("Replace") == 1 and all(_strips_one_space(step) for step in strips):
            return _SentencePieces(
                has_bytes="ByteFallback" in kinds,
                space=replace["pattern"]["String"],
                strips_start=is_start and bool(strips),
            )
    return _WindowPieces(core)


def _strips_one_space(step: Mapping[str, Any]) -> bool:
    return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


@functools.cache
def _byte_table() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(spelling_of_bytes())}
