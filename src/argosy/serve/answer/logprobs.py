"""Tokens and their log-probabilities in the shape of OpenAI's dialects.

    token id  ->  Speller  ->  token: text for people      bytes: the token's part of the sampled text

The bytes come from the vocabulary, so the bytes of all tokens joined are the text, even if a token holds part of a
character. Such a part is spelled `\\xf0\\x9f`. A special token that the text leaves out adds no bytes, and is spelled
as in the vocabulary.

Elsewhere: `prompt/tokenizer.py` gives the bytes of tokens; log-probabilities are `engine/sampler.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.serve.http.closed import Closed

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # for log(0), because JSON has no infinity


class Token(Closed):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(Token):
    """A token, its log-probability and the most likely tokens, as in Chat Completions and Responses."""

    top_logprobs: list[Token]


class Speller:
    """Spells the tokens of one answer.

    Args:
        tokenizer: None if the model has none; tokens are then spelled by their ids.
        keep_special: whether the text includes special tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, keep_special: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if tokenizer is None or keep_special else tokenizer.hidden_ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text."""
        return b"" if token_id in self._hidden else self._written(token_id)

    def text_of(self, token_id: int) -> str:
        """A token as text; incomplete characters are spelled as in Chat Completions."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._written(token_id).decode("utf-8", "backslashreplace")

    def marked_text_of(self, token_id: int) -> str:
        """A token as text for Completions, which has no field for bytes: `bytes:\\xf0\\x9f`."""
        text = self.text_of(token_id)
        is_whole = "\\x" not in text or self._written(token_id) == text.encode()
        return text if is_whole else f"bytes:{text}"

    def scored(self, found: TokenLogprob, num_best: int) -> ScoredToken:
        """A token with its log-probability and those of the `num_best` most likely tokens."""
        best = [self._token(token_id, logprob) for token_id, logprob in found.top[:num_best]]
        return {**self._token(found.token_id, found.logprob), "top_logprobs": best}

    def _token(self, token_id: int, logprob: float) -> Token:
        return {
            "token": self.text_of(token_id), "logprob": finite(logprob), "bytes": list(self.bytes_of(token_id)),
        }  # fmt: skip

    def _written(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b""
        try:
            return self._tokenizer.token_bytes(token_id)
        except UsageError:  # the bytes depend on neighbouring tokens, so decode the token alone
            return self._tokenizer.decode([token_id], keep_special=True).encode()


def finite(logprob: float) -> float:
    """A log-probability that JSON can represent."""
    return max(logprob, LEAST_LOGPROB)
