"""The prompt that an engine continues.

Elsewhere: `builder.py` turns every kind of request into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from argosy.prompt.media_span import MediaSpan

ToolCalling = Literal["native", "generic", "none"]
"""How a model is told about tools: by its own chat template, by a generic prompt, or not at all."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Identifies an answer when its conversation continues.

    Attributes:
        num_characters: length of the rendered conversation up to the start of the answer.
        text, ids: digests of its text and its ids up to there.
        conversation: digest of the messages, without a continued one.
        continued: the existing text of the assistant's turn.
    """

    num_characters: int
    text: bytes
    ids: bytes
    conversation: bytes
    continued: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input that a model continues.

    A prompt is text, or segments of text and media (`Prompt.of`). `token_ids` is None only before a tokenizer has
    seen the text; `text` is for people to read. The answer to a conversation starts a new text. Any other answer
    continues the prompt's text, as does one whose prompt ends inside an assistant's turn (`is_continued`).
    """

    token_ids: tuple[int, ...] | None
    text: str = ""
    is_continued: bool = False
    trace: Trace | None = field(default=None, repr=False, compare=False)
    is_conversation: bool = field(default=False, repr=False, compare=False)
    spans: tuple[tuple[int, MediaSpan], ...] = ()  # (start, span), in order; placeholders in `token_ids`
    num_answered: int = 0  # tokens at its end that are the beginning of the answer

    @classmethod
    def of(cls, *segments: Sequence[int] | MediaSpan) -> Self:
        """Make a prompt from segments: token ids of text, with media between them."""
        token_ids: list[int] = []
        spans = []
        for segment in segments:
            if isinstance(segment, MediaSpan):
                spans.append((len(token_ids), segment))
                token_ids += segment.token_ids
            else:
                token_ids += segment
        return cls(tuple(token_ids), spans=tuple(spans))

    def answered_by(self, token_ids: Sequence[int]) -> Self:
        """This prompt followed by the first tokens of its answer; the rest of the answer comes as if it had not
        been cut.
        """
        assert self.token_ids is not None
        num_answered = self.num_answered + len(token_ids)
        return replace(self, token_ids=(*self.token_ids, *token_ids), num_answered=num_answered)

    @property
    def unanswered(self) -> Self:
        """This prompt without the first tokens of its answer."""
        if not self.num_answered or self.token_ids is None:
            return self
        return replace(self, token_ids=self.token_ids[: -self.num_answered], num_answered=0)

    @classmethod
    def raw(cls, text: str) -> Self:
        """Text to continue verbatim: no chat template, and a BOS token if the tokenizer adds one."""
        return cls(None, text)
