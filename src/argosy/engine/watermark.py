"""Mark sampled text so that the holder of the key can recognise it: tournament sampling (SynthID-Text, Nature 634,
2024).

    key  ─>  Watermark  ─ one for each answer ─>  MarkedAnswer  ─ probabilities, reweighed ─>  sampler

The key and the last WATERMARK_CONTEXT tokens of an answer give every token of the vocabulary WATERMARK_DEPTH bits.
Each round of the tournament shifts probability towards tokens whose bit is 1 (`native/ops/watermark.h`), so marked
text contains more such tokens than chance would give. Averaged over keys, a token keeps its probability.

A context is used once in an answer, where it first occurs: marking it again would make repetitions more likely. An
answer remembers its last _MOST_CONTEXTS contexts. The sampler decides which draws are marked; nothing here depends on
the batch, the budget or the number of threads.

Elsewhere: `sampler.py` draws; `guard/watermark.py` computes a text's score and p-value; `cli/commands/watermark.py` is
`argosy watermark`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from argosy import _native
from argosy.config import WATERMARK_CONTEXT, WATERMARK_DEPTH
from argosy.errors import UsageError
from argosy.private_files import make_secret, read_secret

KEY_BYTES = 32
_MOST_CONTEXTS = 1024  # as in the reference implementation: 8 KiB per answer
# A choice between one token and a few percent of others reveals nothing of the key, and drawing directly is faster.
_MOST_CERTAIN = 0.95

Words = npt.NDArray[np.uint64]
Ngrams = npt.NDArray[np.uint32]
Probabilities = npt.NDArray[np.float64]


def make_key(path: Path) -> None:
    """Make a key in a new file of mode 0600.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    try:
        make_secret(path, KEY_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


class Watermark:
    """The watermark of one key. Any thread may use it.

    Args:
        key: KEY_BYTES secret bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.blake2b(key, digest_size=16, person=b"argosy watermark").digest()

    @classmethod
    def read(cls, path: Path) -> Watermark:
        """Read the key in a file from `make_key`.

        Raises:
            UsageError: the file cannot be read, other users can read it, or it does not hold such a key.
        """
        try:
            key = read_secret(path, KEY_BYTES, lost_with_it="marks in texts made with it", may_make=False)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read: {error.strerror}", hint=f"`argosy watermark key {path}` makes a key"
            ) from None
        return cls(key)

    def words(self, ngrams: Ngrams) -> Words:
        """Return keyed bits: uint64 [n] from uint32 [n, size], bit i for round i of the tournament."""
        words = np.empty(len(ngrams), np.uint64)
        _native.ngram_words(self._key, ngrams, words)
        return words

    def begin(self) -> MarkedAnswer:
        """Begin an answer."""
        return MarkedAnswer(self)


class MarkedAnswer:
    """One answer: its last tokens and its past contexts.

    Attributes:
        num_marked: tokens that were drawn from reweighed probabilities.
    """

    def __init__(self, watermark: Watermark) -> None:
        self.num_marked = 0
        self._watermark = watermark
        self._tokens = np.zeros((1, WATERMARK_CONTEXT), np.uint32)
        self._num_tokens = 0
        self._seen = np.empty(_MOST_CONTEXTS, np.uint64)
        self._num_seen = 0
        self._is_new = False  # the context of the next token has not occurred before

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer."""
        self._tokens[0, :-1] = self._tokens[0, 1:]
        self._tokens[0, -1] = token_id
        self._num_tokens += 1
        self._is_new = self._num_tokens >= WATERMARK_CONTEXT and self._note_context()

    def _note_context(self) -> bool:
        context = self._watermark.words(self._tokens)[0]
        if (self._seen[: self._num_seen] == context).any():
            return False
        self._seen[self._num_seen % _MOST_CONTEXTS] = context
        self._num_seen += 1
        return True

    def reweigh(self, ids: npt.NDArray[np.int64], probabilities: Probabilities) -> Probabilities | None:
        """Return the probabilities of the next token after the tournament, or None if it is not marked.

        Args:
            ids: int64 [n], the candidate tokens, likeliest first.
            probabilities: float64 [n], which sum to 1.
        """
        if not self._is_new or probabilities[0] > _MOST_CERTAIN:
            return None
        ngrams = np.empty((ids.size, WATERMARK_CONTEXT + 1), np.uint32)
        ngrams[:, :-1] = self._tokens
        ngrams[:, -1] = ids
        reweighed = probabilities.copy()
        _native.tournament(self._watermark.words(ngrams), reweighed, depth=WATERMARK_DEPTH)
        self.num_marked += 1
        return reweighed
