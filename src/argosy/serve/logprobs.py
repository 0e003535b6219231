"""How OpenAI's dialects spell tokens and their log-probabilities.

    token id  ->  Speller  ->  token: text for people      bytes: what the token adds to the text that was sampled

The bytes are those of the vocabulary, so the bytes of all tokens, one after the other, are the text, also where a token
holds a part of a character. Such a part is spelled `\\xf0\\x9f`. A special token that the text leaves out adds no
bytes, and is spelled as the vocabulary spells it.

Elsewhere: bytes of tokens are `prompt/tokenizer.py`; log-probabilities are `engine/sampler.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.serve.fields import closed

if TYPE_CHECKING:
    from argosy.prompt.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no number for the logarithm of nothing


@closed
class Token(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@closed
class ScoredToken(Token):
    """A token, its log-probability and the best ones, as Chat Completions and Responses have them."""

    top_logprobs: list[Token]


class Speller:
    """Spells the tokens of one answer.

    Args:
        tokenizer: None where the model has none: tokens are spelled by their ids then.
        keep_special: the text shows special tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, keep_special: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if tokenizer is None or keep_special else tokenizer.hidden_ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text."""
        return b"" if token_id in self._hidden else self._written(token_id)

    def text_of(self, token_id: int) -> str:
        """A token for people to read; bytes that are no whole character as Chat Completions spells them."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._written(token_id).decode("utf-8", "backslashreplace")

    def marked_text_of(self, token_id: int) -> str:
        """Spell it for Completions, which has no field for bytes: `bytes:\\xf0\\x9f`."""
        text = self.text_of(token_id)
        is_whole = "\\x" not in text or self._written(token_id) == text.encode()
        return text if is_whole else f"bytes:{text}"

    def scored(self, found: TokenLogprob, num_best: int) -> ScoredToken:
        """A token with its log-probability and those of the `num_best` best ones."""
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
        except UsageError:  # it depends on the token's neighbours, so take what the token writes alone
            return self._tokenizer.decode([token_id], keep_special=True).encode()


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LEAST_LOGPROB)
