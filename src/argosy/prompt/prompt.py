"""The prompt as the engine takes it, and how every way to ask becomes one.

    str, messages, token ids, Prompt  ->  PromptBuilder  ->  Prompt with token ids

Elsewhere: chat templates are `chat.py`; text and ids are `tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, SupportsIndex

from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.prompt.chat import ChatTemplate, Worker
    from argosy.prompt.tokenizer import Tokenizer

Message = Mapping[str, str]
"""One turn: {"role": "system" | "user" | "assistant" | "tool" | "developer", "content": text}."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given to continue.

    `token_ids` is None only before a tokenizer has seen the text; `text` is for people to read.
    """

    token_ids: tuple[int, ...] | None
    text: str = ""

    @classmethod
    def raw(cls, text: str) -> Self:
        """Text to be continued as it is: no chat template, a BOS token where the tokenizer asks for one."""
        return cls(None, text)


class PromptBuilder:
    """Makes a `Prompt` with token ids of whatever a caller gives; one for each engine."""

    def __init__(self, tokenizer: Tokenizer | None, *, vocab_size: int, worker: Worker | None = None) -> None:
        """`worker`: the process that renders chat templates, if it was started before."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._template: ChatTemplate | None = None
        if tokenizer is not None and tokenizer.chat_template is not None:
            from argosy.prompt.chat import ChatTemplate

            self._template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, worker=worker)

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    def build(self, request: str | Sequence[int] | Sequence[Message] | Prompt) -> Prompt:
        """Token ids of `request`.

        Args:
            request: a string is one user message if the model has a chat template, and text to continue if it
                has none; token ids and `Prompt` are taken as they are; a list of messages is a conversation.

        Raises:
            UsageError: empty, not one of these, an id outside the vocabulary, text for a model without a
                tokenizer, messages for a model without a template, or a conversation the template refuses.
        """
        if isinstance(request, str):
            if self._template is None:
                return self._checked(self._raw(request))
            return self.build([{"role": "user", "content": request}])
        if isinstance(request, Prompt):
            return self._checked(request if request.token_ids is not None else self._raw(request.text))
        items: list[object] = list(request)
        messages = [item for item in items if isinstance(item, Mapping)]
        if items and len(messages) == len(items):
            return self._checked(self._conversation(messages))
        ids = [
            item.__index__()
            for item in items
            if isinstance(item, SupportsIndex) and not isinstance(item, bool)
        ]
        if len(ids) < len(items):
            raise UsageError("a prompt is text, a list of token ids, or a list of messages; found a mixture")
        return self._checked(Prompt(tuple(ids)))

    def _raw(self, text: str) -> Prompt:
        tokenizer = self._needed("text")
        return Prompt((*tokenizer.prefix_ids, *tokenizer.encode(text)), text)

    def _conversation(self, messages: Sequence[Message]) -> Prompt:
        from argosy.prompt.chat import render

        tokenizer = self._needed("messages")
        if self._template is None:
            raise UsageError(
                "this model has no chat template, so it cannot take a list of messages",
                hint="give it text to continue: Prompt.raw(text), or `argosy run --raw`",
            )
        return render(messages, tokenizer, self._template)

    def _needed(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"this model has no tokenizer.json, so it cannot take {what}",
                hint="give it a list of token ids",
            )
        return self._tokenizer

    def _checked(self, prompt: Prompt) -> Prompt:
        if not prompt.token_ids:
            raise UsageError("a prompt needs at least one token, and this one is empty")
        for token_id in (min(prompt.token_ids), max(prompt.token_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise UsageError(f"token id {token_id} is not in the vocabulary, 0 to {self._vocab_size - 1}")
        return prompt
