"""Reject texts that are far too long for one prompt before doing anything slow with them.

The limit is generous because a prompt may be shorter than its texts: a template leaves some out, and placeholders
are shorter than values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from argosy.errors import PromptTooLong

if TYPE_CHECKING:
    from argosy.prompt.infill import Snippet
    from argosy.prompt.tokenizer import Tokenizer

_NEAR = 4  # times the context


class NearLimit:
    """At most four times the tokens that the context holds; no limit without a tokenizer or a context."""

    def __init__(self, tokenizer: Tokenizer | None, context_tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self._most = None if context_tokens is None else _NEAR * context_tokens

    def require(self, texts: Sequence[str]) -> None:
        """Check that texts together are not far too long.

        Raises:
            PromptTooLong: they have more than four times the tokens that the context holds.
            UsageError: a text cannot be encoded.
        """
        left = self._most
        if left is None or self._tokenizer is None or sum(map(len, texts)) <= left:
            return
        most = left
        for text in texts:
            try:
                left -= len(self._tokenizer.encode(text, max_tokens=left))
            except PromptTooLong:
                raise PromptTooLong.of(most + 1, most // _NEAR, is_all=False) from None

    def start(self, text: str) -> str:
        """The longest beginning of a text that `require` allows. Raises UsageError if the text cannot be encoded."""
        if self._most is None or self._tokenizer is None or len(text) <= self._most:
            return text
        return self._tokenizer.decode(self._tokenizer.encode_start(text, self._most))

    def snippets(self, snippets: Sequence[Snippet]) -> Sequence[Snippet]:
        """The last snippets that `require` allows together. Raises UsageError if one cannot be encoded."""
        left = self._most
        if left is None or self._tokenizer is None or sum(len(one.text) for one in snippets) <= left:
            return snippets
        for at in range(len(snippets) - 1, -1, -1):
            try:
                left -= len(self._tokenizer.encode(snippets[at].text, max_tokens=left))
            except PromptTooLong:
                return snippets[at + 1 :]
        return snippets
