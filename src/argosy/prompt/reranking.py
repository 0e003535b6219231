"""Prompts that ask a model whether a document answers a query: its answer is one of two words.

    query, document  ─ a form by name ─>  token ids that end where the model says yes or no

A reranker is an ordinary model trained with one of these prompts. Its files do not say which; the operator does.

Elsewhere: `serve/dialects/rerank.py` compares the probabilities of the two words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from argosy.errors import UsageError
from argosy.prompt.tokenizer import Segment, Tokenizer

_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class RerankForm:
    """The texts before, between and after query and document, and the two words, each a single token."""

    before: str
    between: str
    after: str
    yes: str
    no: str


# Qwen3-Reranker's model card, with its default instruction.
RERANK_FORMS: Mapping[str, RerankForm] = {
    "qwen3": RerankForm(
        before="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {_INSTRUCTION}\n<Query>: ",
        between="\n<Document>: ",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        yes="yes",
        no="no",
    ),
}


class Reranking:
    """The prompts of one model.

    Attributes:
        context_tokens: the size of the context; set it when that changes.

    Raises:
        UsageError: the form's words are not tokens of the vocabulary, or there is no tokenizer.
    """

    def __init__(self, form: RerankForm, tokenizer: Tokenizer | None, *, context_tokens: int) -> None:
        if tokenizer is None:
            raise UsageError("a reranker needs a tokenizer, and this checkpoint has no tokenizer.json")
        self._form, self._tokenizer = form, tokenizer
        self.context_tokens = context_tokens
        yes, no = tokenizer.encode(form.yes), tokenizer.encode(form.no)
        if len(yes) != 1 or len(no) != 1:
            raise UsageError(
                f"this model's vocabulary has no tokens '{form.yes}' and '{form.no}', so it cannot rerank"
            )
        self.yes_id, self.no_id = yes[0], no[0]

    def prompt(self, query: str, document: str) -> list[int]:
        """The ids of the prompt; only the form's own text produces control tokens.

        Raises:
            PromptTooLong: they do not fit the context.
        """
        form = self._form
        segments: list[Segment] = [
            (False, form.before), (True, query), (False, form.between), (True, document), (False, form.after),
        ]  # fmt: skip
        return self._tokenizer.encode_segments(segments, max_tokens=self.context_tokens - 1)
