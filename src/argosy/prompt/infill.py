"""Fill in the middle: prompts that make the model write the text between two texts.

    text before, text after  ─ the model's own form, by its control tokens ─>  token ids, and the tokens that end it
    snippets of other files  ─ before them, if they fit ─────────────────┘

The forms are those that the models were trained with, as documented by their makers. Only the form's own tokens are
control tokens; all texts are encoded as a caller's text.

Elsewhere: `builder.py` chooses a model's form; `serve/dialects/openai_completions.py` takes a `suffix`,
`serve/dialects/llama_infill.py` also snippets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from argosy.errors import PromptTooLong
from argosy.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class InfillForm:
    """One way of writing a prompt to fill in.

    Attributes:
        parts: control tokens, and "before" and "after" for the two texts, in order.
        ends: further control tokens that end what the model writes, if the vocabulary has them.
        repository, file: control tokens before the names of a repository and of each of its files, for models
            trained on several files at a time; empty if there are none.
    """

    parts: Sequence[str]
    ends: Sequence[str] = ()
    repository: str = ""
    file: str = ""

    @property
    def tokens(self) -> list[str]:
        """The control tokens of the form."""
        return [part for part in self.parts if part not in ("before", "after")]


# A model's form is the first one whose tokens are all in its vocabulary.
FORMS = (
    # Qwen2.5-Coder's README, "Fill in the middle"; Qwen3-Coder's is the same.
    InfillForm(
        ("<|fim_prefix|>", "before", "<|fim_suffix|>", "after", "<|fim_middle|>"),
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>"),
        repository="<|repo_name|>",
        file="<|file_sep|>",
    ),
    # DeepSeek-Coder-V2's README, "Code Insertion".
    InfillForm(("<｜fim▁begin｜>", "before", "<｜fim▁hole｜>", "after", "<｜fim▁end｜>")),
    # mistral-common's `encode_fim`, for Codestral. The text after the gap comes first.
    InfillForm(("[SUFFIX]", "after", "[PREFIX]", "before"), ("[MIDDLE]",)),
    # GLM-4.5, as llama.cpp and Zed write it.
    InfillForm(
        ("<|code_prefix|>", "before", "<|code_suffix|>", "after", "<|code_middle|>"),
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
    # StarCoder's paper (arXiv:2305.06161); MiniMax-M2's vocabulary has the same tokens.
    InfillForm(
        ("<fim_prefix>", "before", "<fim_suffix>", "after", "<fim_middle>"),
        ("<fim_pad>", "<filename>", "<reponame>", "<file_sep>", "<repo_name>", "<|endoftext|>"),
    ),
)


# Default names, and the mark between snippets for models without tokens for it, both from llama-server.
_REPOSITORY, _FILE, _SNIPPET_FILE = "myproject", "filename", "tmp"
_SNIPPET_MARK = "\n\n--- snippet ---\n\n"


class Snippet(NamedTuple):
    """A part of another file. `file` is its name, or None if unknown."""

    text: str
    file: str | None = None


class Infill:
    """The form of one model."""

    def __init__(self, tokenizer: Tokenizer, form: InfillForm) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self.end_ids = _known(tokenizer, (*form.tokens, *form.ends))
        """Tokens that end what the model writes, in addition to those that end any answer."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Infill | None:
        """The form that a model was trained with, judged by its control tokens; None if there is none."""
        for form in FORMS:
            if len(_known(tokenizer, form.tokens)) == len(form.tokens):
                return cls(tokenizer, form)
        return None

    def encode(self, before: str, after: str, *, max_tokens: int | None = None) -> list[int]:
        """The ids of a prompt with the texts before and after the gap.

        Raises: what `Tokenizer.encode` raises.
        """
        tokenizer, parts = self._tokenizer, self._form.parts
        is_after_first = parts.index("after") < parts.index("before")
        ids = list(tokenizer.prefix_ids)
        for part in parts:
            if part == "before":
                ids += tokenizer.encode(before, max_tokens=max_tokens)
            elif part == "after" and is_after_first:
                # mistral-common puts a space only before the second text.
                ids += tokenizer.encode_later(after, max_tokens=max_tokens)
            elif part == "after":
                ids += tokenizer.encode(after, max_tokens=max_tokens)
            else:
                ids += _known(tokenizer, [part])
        if max_tokens is not None and len(ids) > max_tokens:
            raise PromptTooLong.of(len(ids), max_tokens + 1)
        return ids

    def encode_among(
        self,
        snippets: Sequence[Snippet],
        before: str,
        after: str,
        *,
        max_tokens: int | None = None,
        reserved_tokens: int = 0,
    ) -> tuple[list[int], int]:
        """The ids of `encode`, preceded by the snippets that fit, and the number of snippets left out.

        The last snippets are nearest to the gap, so the first are left out first. The form is Qwen2.5-Coder's for a
        repository ("Repository Level Code Completion"); for other models the snippets precede the prompt as text,
        as llama-server writes them.

        Args:
            max_tokens: the limit of the prompt; None: no limit.
            reserved_tokens: room for the answer that snippets must leave free.

        Raises: what `encode` raises.
        """
        tokenizer = self._tokenizer
        ids = self.encode(before, after, max_tokens=max_tokens)
        repository, mark = (_known(tokenizer, [token]) for token in (self._form.repository, self._form.file))
        is_repository = bool(repository and mark)
        start, end, before_each = list[int](), list[int](), list[int]()
        if is_repository:
            start = [*repository, *tokenizer.encode(f"{_REPOSITORY}\n")]
            end = [*mark, *tokenizer.encode(f"{_FILE}\n")]
            before_each = mark
        room = (sys.maxsize if max_tokens is None else max_tokens - reserved_tokens) - len(ids)
        room -= len(start) + len(end)
        found: list[list[int]] = []
        for snippet in reversed(snippets):
            head = f"{snippet.file or _SNIPPET_FILE}\n" if is_repository else _SNIPPET_MARK
            try:
                text = tokenizer.encode(head + snippet.text, max_tokens=max(0, room - len(before_each)))
            except PromptTooLong:
                break
            found.append([*before_each, *text])
            room -= len(found[-1])
        if not found:
            return ids, len(snippets)
        at = len(tokenizer.prefix_ids)
        among = [*ids[:at], *start, *(one for part in reversed(found) for one in part), *end, *ids[at:]]
        return among, len(snippets) - len(found)


def _known(tokenizer: Tokenizer, tokens: Iterable[str]) -> list[int]:
    return [found for token in tokens if (found := tokenizer.control_id(token)) is not None]
