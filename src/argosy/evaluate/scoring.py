"""Let one model and then another read the same tokens, and keep what the comparison needs.

    texts  ─ tokenizer ─>  Tokens  ─ reference ─>  Scores, logits of the passages in a file
                                   ─ candidate ─>  Scores, and how far its distributions diverge from the file's

Sentences and questions need only the log-probabilities of their own tokens and run in batches: a step reads each
expert once for the whole batch. Passages need whole distributions and run one at a time. The tokens exist before an
engine is opened, so its memory plan counts them. Of each result only sums are kept.

Elsewhere: `drift.py` turns two `Scores` into numbers with intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.config import ModelConfig, SamplingParams
from argosy.engine.engine import Engine
from argosy.errors import ArgosyError, UsageError
from argosy.evaluate.material import Material
from argosy.evaluate.questions import Question
from argosy.evaluate.row_file import RowFile
from argosy.prompt.tokenizer import Tokenizer

Progress = Callable[[str, float], None]
Floats = NDArray[np.float64]
Ids = NDArray[np.int32]

_AT_ONCE = 32  # sequences per step: 32 sentences of 16 tokens fill the chunk of a model in memory
_SUBMITTED = 4 * _AT_ONCE  # texts whose results are in memory at once
_CONTEXT_TOKENS = 2048  # for that many sentences together


@dataclass(frozen=True, slots=True)
class Tokens:
    """The texts as token ids: int32 arrays.

    passages: one per language, no longer than the context.
    sentences: in the order of `Material.texts`.
    answers: the user's questions, each followed by each of its answers in turn.
    """

    passages: list[Ids]
    sentences: list[Ids]
    answers: list[Ids]

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in (*self.passages, *self.sentences, *self.answers))

    @property
    def num_rows(self) -> int:
        """The number of compared positions: all but the last of each passage."""
        return sum(len(ids) - 1 for ids in self.passages)

    def equals(self, other: Tokens) -> bool:
        pairs = (
            (self.passages, other.passages),
            (self.sentences, other.sentences),
            (self.answers, other.answers),
        )
        return all(
            len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs)) for mine, theirs in pairs
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """One model's losses and log-probabilities on the texts, in nats.

    passages: for each language, the loss of each token but the first, float64 [tokens - 1].
    sentences, num_tokens: the log-probability of each sentence, and the number of tokens summed.
    answers: the log-probability of each question with each answer, float64 [questions * answers].
    divergences, agrees: for a candidate, the KL divergence from the reference at each position, and whether both
        have the same likeliest token; empty for a reference.
    """

    passages: list[Floats]
    sentences: Floats
    num_tokens: NDArray[np.int64]
    answers: Floats
    divergences: list[Floats]
    agrees: list[NDArray[np.bool_]]


def tokens_of(
    material: Material, questions: Sequence[Question], tokenizer: Tokenizer, *, context_tokens: int
) -> Tokens:
    """Encode the texts, each with the tokenizer's leading special tokens.

    Args:
        context_tokens: the model's context, to which passages are cut.

    Raises:
        UsageError: a sentence or a question does not fit the context.
    """
    room = context_tokens - 1

    def encode(text: str, *, cuts: bool = False) -> Ids:
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
        if len(ids) > room and not cuts:
            raise UsageError(
                f"a text to score has {len(ids)} tokens, and the model's context holds {context_tokens}",
                needed=len(ids) + 1,
                available=context_tokens,
            )
        return np.array(ids[:room], np.int32)

    return Tokens(
        [encode(text, cuts=True) for text in material.passages],
        [encode(text) for text in material.texts()],
        [encode(text) for question in questions for text in question.texts()],
    )


def engine_options(tokens: Tokens, model: ModelConfig) -> dict[str, Any]:
    """The options for `Engine.open` that `score` needs.

    Keys and values are float32, because the default depends on the model's size and a pack is smaller than its
    checkpoint.
    """
    return {
        "kv_dtype": "f32",
        "context": min(model.context_tokens, max(_CONTEXT_TOKENS, tokens.longest + 1)),
        "max_sequences": _AT_ONCE,
        "prefix_reuse": False,
        "media": False,
    }


def score(
    engine: Engine,
    tokens: Tokens,
    rows: RowFile,
    *,
    is_reference: bool,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Read all texts.

    Args:
        adapter: the one of the engine's that reads; None: none does.
        rows: the reference writes its logits there and the candidate reads them.

    Raises:
        ArgosyError: the model computes non-finite logits.   DiskFull: there is no room for the logits.
    """
    what = "reading the reference" if is_reference else "reading the candidate"
    total = sum(map(len, (*tokens.passages, *tokens.sentences, *tokens.answers)))
    done = 0

    def note(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(what, done / total)

    passages: list[Floats] = []
    divergences: list[Floats] = []
    agrees: list[NDArray[np.bool_]] = []
    for ids in tokens.passages:
        reader = _Passage(ids, rows, is_reference=is_reference)
        engine.read_logits(ids.tolist(), reader.take, adapter=adapter)
        passages.append(reader.losses)
        if not is_reference:
            divergences.append(reader.divergences)
            agrees.append(reader.agrees)
        note(len(ids))
    sentences = _log_probabilities(engine, tokens.sentences, adapter, note)
    answers = _log_probabilities(engine, tokens.answers, adapter, note)
    num_tokens = np.array([len(ids) - 1 for ids in tokens.sentences], np.int64)
    return Scores(passages, sentences, num_tokens, answers, divergences, agrees)


class _Passage:
    """Takes the logits of a passage, a few rows at a time."""

    def __init__(self, ids: Ids, rows: RowFile, *, is_reference: bool) -> None:
        self._ids, self._rows, self._is_reference = ids, rows, is_reference
        self.losses = np.zeros(len(ids) - 1)
        self.divergences = np.zeros(len(ids) - 1)
        self.agrees = np.zeros(len(ids) - 1, np.bool_)

    def take(self, first: int, logits: NDArray[np.float32]) -> None:
        logits = logits[: len(self._ids) - 1 - first]  # nothing follows the last token
        if not len(logits):
            return
        if self._is_reference:
            self._rows.append(logits)
            references = None
        else:
            references = self._rows.take(len(logits))
        # Row by row: float64 copies of one row are small compared with the rows that the memory plan allows for.
        for number, row in enumerate(logits):
            at = first + number
            own = _log_softmax(row)
            self.losses[at] = -own[self._ids[at + 1]]
            if references is not None:
                reference = _log_softmax(references[number])
                # Rounding may leave a zero divergence slightly below zero.
                self.divergences[at] = max(0.0, float(np.exp(reference) @ (reference - own)))
                self.agrees[at] = references[number].argmax() == row.argmax()


def _log_softmax(row: NDArray[np.float32]) -> Floats:
    if not np.isfinite(row).all():
        raise ArgosyError("the model computes logits that are not finite numbers: its weights are damaged")
    values = row.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    return values


def _log_probabilities(
    engine: Engine, texts: Sequence[Ids], adapter: str | None, note: Callable[[int], None]
) -> Floats:
    """The log-probability of each text after its first token."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    found = np.zeros(len(texts))
    for start in range(0, len(texts), _SUBMITTED):
        part = [ids.tolist() for ids in texts[start : start + _SUBMITTED]]
        for number, result in enumerate(engine.generate_batch(part, params, adapter=adapter), start):
            found[number] = sum(one.logprob for one in result.prompt_logprobs or () if one is not None)
        note(sum(map(len, part)))
    return found
