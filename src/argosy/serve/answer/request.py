"""Requests in a form common to all dialects; a dialect only renames fields.

dialect  ->  ChatRequest or TextRequest  ->  `service.py`: a prompt, and what is sampled after it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from argosy.config import Grammar, SamplingParams
from argosy.media.parts import Kind
from argosy.prompt.infill import Snippet
from argosy.prompt.prompt import Prompt
from argosy.serve.answer.replaced import Replaced
from argosy.serve.answer.tool_use import ToolChoice

MediaTokens = Literal["image_tokens", "audio_tokens"]
_MEDIA_TOKENS: Mapping[Kind, MediaTokens] = {
    "picture": "image_tokens",
    "video": "image_tokens",
    "sound": "audio_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A text, or token ids, to be continued.

    suffix: the text after the gap that the model fills after `prompt`, which is a text; None: there is no gap.
    snippets: parts of other files, for the model to read before it fills the gap; None: if it cannot fill gaps, it
        continues a prompt whose suffix is empty.
    reserved_tokens: room that snippets leave for the answer.
    num_left_out: how many of the first snippets were left out already.
    ignored: names of fields that were given and have no effect.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    suffix: str | None = None
    snippets: Sequence[Snippet] | None = None
    reserved_tokens: int = 0
    num_left_out: int = 0
    num_answers: int = 1
    ignored: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered.

    form: form of an answer without tool calls; None allows any form.
    effort: reasoning effort, if the model's template supports it.
    effort_field: name of the field that asks for the effort.
    thinks: whether the model thinks at all; None leaves that to `effort`.
    thinks_fields: names of the fields that switch thinking.
    continues: whether the answer continues a last message of the assistant; otherwise it is a turn of its own.
    begun_ids: tokens that the answer begins with; the rest comes as if it had not been cut.
    replaced: notes in the messages that replace blocks that the model cannot read.
    ignored: names of fields that were given and have no effect, whatever the model.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    form: Grammar | None = None
    effort: str | None = None
    effort_field: str = "reasoning_effort"
    thinks: bool | None = None
    thinks_fields: Sequence[str] = ()
    continues: bool = True
    begun_ids: Sequence[int] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_answers: int = 1
    replaced: Replaced = field(default_factory=Replaced)
    ignored: Sequence[str] = ()


ModelRequest = ChatRequest | TextRequest
Read = Callable[[], ModelRequest]


def media_tokens(prompts: Iterable[Prompt]) -> dict[MediaTokens, int]:
    """Tokens of pictures and of sounds in prompts, by OpenAI's name for them; nothing for kinds that none has."""
    counts: Counter[MediaTokens] = Counter()
    for prompt in prompts:
        for _, span in prompt.spans:
            counts[_MEDIA_TOKENS[span.kind]] += span.num_positions
    return dict(counts)
