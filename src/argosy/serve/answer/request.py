"""Requests in terms common to all dialects; a dialect only renames fields.

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
    """A text or token ids to continue.

    suffix: the text after the gap that the model fills; `prompt`, then a text, is what precedes it. None: no gap.
    snippets: parts of other files for the model to read before it fills the gap; None: a model that cannot fill
        gaps continues the prompt if the suffix is empty.
    reserved_tokens: room that snippets must leave for the answer.
    num_left_out: how many of the first snippets have already been left out.
    ignored: names of given fields without effect.
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
    """A conversation to answer.

    form: the form of an answer without tool calls; None allows any.
    effort: the reasoning effort, if the model's template supports it.
    effort_field: the name of the field that sets the effort.
    thinks: whether the model thinks at all; None leaves that to `effort`.
    thinks_fields: the names of the fields that switch thinking.
    continues: whether the answer continues a final assistant message; otherwise it is a new turn.
    begun_ids: the first tokens of the answer; the rest comes as if it had not been cut.
    replaced: notes that replace unreadable blocks in the messages.
    ignored: names of given fields that have no effect with any model.
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
    """The tokens of pictures and of sounds in prompts, by OpenAI's names; kinds without tokens are left out."""
    counts: Counter[MediaTokens] = Counter()
    for prompt in prompts:
        for _, span in prompt.spans:
            counts[_MEDIA_TOKENS[span.kind]] += span.num_positions
    return dict(counts)
