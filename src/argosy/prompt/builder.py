"""Turn every kind of request into a prompt.

    str, messages, token ids, Prompt  ->  PromptBuilder.build     ->  Prompt with token ids
    tokens of the answer              ->  PromptBuilder.parser    ->  events
    the answer                        ->  PromptBuilder.remember  ->  the same tokens, when the conversation continues

Elsewhere: `messages.py` checks messages and `chat.py` renders them; `tokenizer.py` converts between text and ids;
`formats/` defines how each model writes thoughts and calls.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex, cast

from argosy.config import Grammar
from argosy.errors import PromptTooLong, UsageError
from argosy.media.parts import PROMPT_LIMITS, Part, RequestMedia
from argosy.prompt.media_span import MediaReader
from argosy.prompt.near_limit import NearLimit
from argosy.prompt.prompt import Prompt, ToolCalling

if TYPE_CHECKING:
    from argosy.prompt.chat import ChatTemplate, Variables, Worker
    from argosy.prompt.conversation_media import ConversationMedia, ReplaceDamaged
    from argosy.prompt.formats import Answer, Event, Format, Parser
    from argosy.prompt.infill import Infill, Snippet
    from argosy.prompt.messages import Message, Turn
    from argosy.prompt.replay import Replay, ReplayMemory
    from argosy.prompt.tokenizer import Segment, Tokenizer
    from argosy.prompt.tools import Tool


_MAX_COUNTED = 1 << 17


class Filling(NamedTuple):
    """A fill-in prompt, the tokens that end the answer, and how many of the first snippets did not fit."""

    prompt: Prompt
    end_ids: Sequence[int]
    num_left_out: int


class PromptBuilder:
    """Turns any kind of request into a `Prompt` with token ids; each engine has one."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        worker: Worker | None = None,
        format_name: str | None = None,
        memory: ReplayMemory | None = None,
        context_tokens: int | None = None,
        media: MediaReader | None = None,
    ) -> None:
        """Create a builder.

        Args:
            tokenizer: the model's; None: only token ids are accepted.
            vocab_size: ids range from 0 to vocab_size - 1.
            worker: the process that renders chat templates, if already started.
            format_name: how the model writes thoughts and calls; None: detect it.
            memory: keeps answers so that they get the same tokens again; None: keep none.
            context_tokens: a prompt and one answer token have to fit; None: no limit.
            media: reads pictures, sounds and videos; None: the model takes text only.

        Raises:
            UsageError: there is no format with that name.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._memory, self._under = memory, ""
        self._media = media
        self._max_tokens = None if context_tokens is None else context_tokens - 1
        self._template: ChatTemplate | None = None
        if tokenizer is not None and tokenizer.chat_template is not None:
            from argosy.prompt.chat import ChatTemplate

            self._template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, worker=worker)
        self._named_format: Format | None = None
        if format_name is not None:
            from argosy.prompt.formats import named_format

            self._named_format = named_format(format_name, self._needed("a format name"))

    def remembering(self, memory: ReplayMemory | None = None, *, under: str = "") -> PromptBuilder:
        """A copy of this builder that keeps answers in `memory`, or where this one does; both share the rendering
        process. Answers under different names, those of adapters, are kept apart.
        """
        other = copy.copy(self)
        other._memory, other._under = memory or self._memory, under
        other.__dict__.pop("_replay", None)
        return other

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    def build(
        self,
        request: str | Sequence[int] | Sequence[Message] | Sequence[Part] | Prompt,
        *,
        tools: Sequence[Tool | Mapping[str, object]] = (),
        variables: Variables | None = None,
        tenant: str | None = None,
        add_generation_prompt: bool = True,
        continues: bool = True,
        is_counted: bool = False,
        replace_damaged: ReplaceDamaged | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> Prompt:
        """Build the token ids of `request`.

        Args:
            request: a string is one user message if the model has a chat template, otherwise text to continue. A
                list of parts (Text, Image, Audio, Video) is one user message. Token ids and a `Prompt` are used
                unchanged. A list of messages is a conversation; if the last message is the assistant's, the answer
                continues it.
            tools: tools that the model may call; like the arguments below, only for messages.
            variables: variables that the chat template reads, such as `enable_thinking`.
            tenant: owner of the conversation; answers remembered for it keep their tokens.
            add_generation_prompt: open the assistant's turn for an answer.
            continues: the answer continues a final assistant message; otherwise it is a new turn.
            is_counted: the tokens are only counted, so they may exceed the context.
            replace_damaged: returns the text that replaces an undecodable picture or sound, or None to refuse it;
                without this function it is refused.
            check: called between two pieces of work on media; an exception from it ends the work.

        Raises:
            PromptTooLong: it has more tokens than the context holds.
            UsageError: the request is empty, is none of these types, or contains an id outside the vocabulary; it
                is text for a model without a tokenizer, or messages for a model without a template; the model does
                not take its pictures or sounds, or preparing them takes too long; tools cannot be passed to the
                model; or the template refuses the conversation.
            BadMedia: a picture or sound is damaged or too large.
        """
        max_tokens = self._max_counted if is_counted else self._max_tokens
        with self._counting() if is_counted else nullcontext():
            if isinstance(request, str):
                if self._template is None:
                    return self._checked(self._raw(request, max_tokens))
                request = [{"role": "user", "content": request}]
            if isinstance(request, Prompt):
                self._refuse_chat_options(tools, variables)
                return self._checked(
                    request if request.token_ids is not None else self._raw(request.text, max_tokens)
                )
            items: list[object] = list(request)
            # There may be a million token ids, so no function is called per id.
            kinds = set(map(type, items))
            if kinds and all(issubclass(kind, Part) for kind in kinds):
                items, kinds = [{"role": "user", "content": items}], {dict}
            if kinds and all(issubclass(kind, Mapping) for kind in kinds):
                messages = cast("list[Message]", items)
                from argosy.prompt.conversation_media import ConversationMedia

                media = ConversationMedia(
                    self._media,
                    RequestMedia(PROMPT_LIMITS, most_tokens=max_tokens, check=check),
                    tenant=tenant or "",
                    replace_damaged=replace_damaged,
                )
                prompt = self._conversation(
                    messages, tools, variables, tenant, add_generation_prompt, continues, max_tokens, media
                )
                return self._checked(prompt)
            if not all(issubclass(kind, SupportsIndex) and kind is not bool for kind in kinds):
                raise UsageError(
                    "a prompt is text, or a list of token ids, of messages, or of parts of one message; "
                    "found a mixture"
                )
            self._refuse_chat_options(tools, variables)
            return self._checked(Prompt(tuple(map(operator.index, cast("list[SupportsIndex]", items)))))

    def whole_text(self, text: str | Sequence[int]) -> Prompt:
        """The ids of a text, with the tokens that the tokenizer adds to a whole text; token ids are returned
        unchanged.

        The text may fill the context, because nothing follows it.

        Raises:
            PromptTooLong: it has more tokens than the context holds.
            UsageError: it is empty or has an id outside the vocabulary, or the model has no tokenizer.
        """
        if not isinstance(text, str):
            return self._checked(Prompt(tuple(text)))
        if not text:
            raise UsageError("a text needs at least one character, and this one is empty")
        tokenizer = self._needed("text")
        added, room = self._added_tokens(tokenizer), self._context_tokens
        try:
            ids = tokenizer.encode(text, max_tokens=None if room is None else max(0, room - added))
        except PromptTooLong as error:
            assert room is not None
            needed = error.facts["needed"]
            assert isinstance(needed, int)
            num_tokens, is_all = needed - 1 + added, not error.facts.get("is_at_least")
            raise PromptTooLong.of(num_tokens, room, for_answer=0, is_all=is_all) from None
        return self._checked(Prompt((*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids), text))

    def start_of_text(self, text: str) -> list[int]:
        """The ids of the longest beginning of a text that fits the context, with the tokens added to a whole text.

        Raises:
            PromptTooLong: the context has no room for any of the text.   UsageError: as `whole_text`.
        """
        tokenizer, room = self._needed("text"), self._context_tokens
        if room is None:
            return list(self.whole_text(text).token_ids or ())
        added = self._added_tokens(tokenizer)
        if room <= added:
            raise PromptTooLong.of(added + 1, room, for_answer=0, is_all=False)
        return [*tokenizer.prefix_ids, *tokenizer.encode_start(text, room - added), *tokenizer.suffix_ids]

    def with_transcripts(
        self, messages: Sequence[Message], *, tenant: str | None, check: Callable[[], object] = lambda: None
    ) -> list[Message]:
        """A conversation with sounds replaced by transcripts (`conversation_media.py`); `check` is that of `build`."""
        from argosy.prompt.conversation_media import with_transcripts

        return with_transcripts(self._media, messages, tenant or "", RequestMedia(PROMPT_LIMITS, check=check))

    @property
    def near(self) -> NearLimit:
        """The limit that rejects texts far too long for one prompt."""
        return NearLimit(self._tokenizer, self._context_tokens)

    @staticmethod
    def _added_tokens(tokenizer: Tokenizer) -> int:
        """The tokens that are added to a whole text."""
        return len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)

    @property
    def _context_tokens(self) -> int | None:
        return None if self._max_tokens is None else self._max_tokens + 1

    def infill(
        self, before: str, after: str, *, snippets: Sequence[Snippet] = (), reserved_tokens: int = 0
    ) -> Filling:
        """The prompt that makes the model write the text between two texts.

        Args:
            snippets: parts of other files for the model to read first; those that do not fit are left out.
            reserved_tokens: room that the snippets leave for the answer.

        Raises:
            PromptTooLong: the prompt has more tokens than the context holds.
            UsageError: the model was not trained to fill in, or has no tokenizer.
        """
        infill = self._infill
        if infill is None:
            raise UsageError(
                "this model cannot fill in a text: its vocabulary has no tokens for that",
                hint="use a model that was trained to fill in, such as Qwen3-Coder",
            )
        ids, num_left_out = infill.encode_among(
            snippets, before, after, max_tokens=self._max_tokens, reserved_tokens=reserved_tokens
        )
        return Filling(Prompt(tuple(ids), before), infill.end_ids, num_left_out)

    @property
    def can_infill(self) -> bool:
        """Whether the model was trained to write the text between two texts."""
        return self._tokenizer is not None and self._infill is not None

    @functools.cached_property
    def _infill(self) -> Infill | None:
        from argosy.prompt.infill import Infill

        return Infill.of(self._needed("text"))

    @property
    def takes_messages(self) -> bool:
        """Whether the model has a chat template. A string is then a message; otherwise it is text to continue."""
        return self._template is not None

    def count_tokens(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, object]] = (),
        variables: Variables | None = None,
        tenant: str | None = None,
    ) -> int:
        """Count the tokens of a conversation's prompt. Raises what `build` raises, or UsageError for too many."""
        prompt = self.build(messages, tools=tools, variables=variables, tenant=tenant, is_counted=True)
        return len(prompt.token_ids or ())

    @property
    def _max_counted(self) -> int | None:
        """The most tokens counted in a text: more than fit the context, to report by how much it is too long."""
        return None if self._max_tokens is None else max(self._max_tokens, _MAX_COUNTED)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except PromptTooLong:
            raise UsageError(
                f"the text has more than {self._max_counted} tokens, and counting stops there"
            ) from None

    def apply_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, object]] = (),
        variables: Variables | None = None,
        add_generation_prompt: bool = True,
        replace_damaged: ReplaceDamaged | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> str:
        """Render a conversation with the chat template, control tokens spelled out. Raises what `build` raises."""
        return self.build(
            messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt, is_counted=True,
            replace_damaged=replace_damaged, check=check,
        ).text  # fmt: skip

    def tokenize(self, text: str, *, add_prefix: bool = False) -> list[int]:
        """The ids of a caller's text, without control tokens; `add_prefix` adds BOS if the model expects it.

        Raises:
            UsageError: the model has no tokenizer, or the text has too many tokens to count.
        """
        with self._counting():
            return self._encode(text, add_prefix, self._max_counted)

    def _encode(self, text: str, add_prefix: bool, max_tokens: int | None) -> list[int]:
        tokenizer = self._needed("text")
        prefix = tokenizer.prefix_ids if add_prefix else ()
        return [*prefix, *tokenizer.encode(text, max_tokens=max_tokens)]

    def detokenize(self, token_ids: Sequence[int], *, keep_special: bool = True) -> str:
        """The text of `token_ids`, with special tokens spelled out or omitted.

        Raises:
            UsageError: an id is outside the vocabulary, or the model has no tokenizer.
        """
        tokenizer = self._needed("token ids to decode")
        self._check_ids(token_ids)
        return tokenizer.decode(token_ids, keep_special=keep_special)

    @functools.cached_property
    def tool_calling(self) -> ToolCalling:
        """How the model is told about tools: by its own template, by a generic prompt, or not at all."""
        from argosy.prompt.formats.block_format import BlockFormat
        from argosy.prompt.formats.plain import Plain

        if self._template is None:
            return "none"
        shape = self._template.shape
        if not isinstance(self.format, Plain) and shape.takes_tools and shape.takes_calls:
            return "native"
        return "generic" if isinstance(self.format, BlockFormat) else "none"

    def _format_for(self, tools: Sequence[Tool]) -> Format:
        """The format of an answer that may call `tools`."""
        return self._generic_format if tools and self.tool_calling == "generic" else self.format

    @functools.cached_property
    def _generic_format(self) -> Format:
        from argosy.prompt.formats import named_format

        return named_format("hermes", self._needed("messages"))

    @functools.cached_property
    def format(self) -> Format:
        """The model's own format for thoughts and calls."""
        if self._named_format is not None:
            return self._named_format
        from argosy.prompt.formats import find_format

        tokenizer = self._needed("messages")
        return find_format(tokenizer, tokenizer.chat_template or "")

    @property
    def variables(self) -> frozenset[str]:
        """Names of the chat template variables that a caller may set."""
        return frozenset() if self._template is None else self._template.shape.variables

    def parser(self, prompt: Prompt, tools: Sequence[Tool | Mapping[str, object]] = ()) -> Parser:
        """A parser for the answer to `prompt`, which was built with the same `tools`."""
        from argosy.prompt.tools import check_tools

        checked = check_tools(tools)
        return self._format_for(checked).parser(checked, prompt.unanswered)

    def begun(self, prompt: Prompt, parser: Parser, *, keep_special: bool = False) -> list[Event]:
        """The events of an answer whose first tokens end the prompt; `parser` is then ready for the rest."""
        ids = (prompt.token_ids or ())[-prompt.num_answered :] if prompt.num_answered else ()
        stream = self._needed("text").stream(keep_special=keep_special, is_start=prompt.is_conversation)
        return [event for token_id in ids for event in parser.push(token_id, stream.push(token_id))]

    def grammar(
        self,
        prompt: Prompt,
        tools: Sequence[Tool | Mapping[str, object]] = (),
        *,
        must_call: bool = False,
        parallel: bool = True,
        form: Grammar | None = None,
    ) -> Grammar | None:
        """The grammar that the answer to `prompt` must follow, if any.

        If a call is optional, the answer is unconstrained up to a call's mark. From there it follows the tool's schema
        as far as that can be enforced. If a call is required, a tool is strict, or `form` is given, a schema that
        cannot be enforced is an error.

        Args:
            prompt: built with at least these tools.
            tools: the tools that may be called.
            must_call: one of them must be called.
            parallel: more than one call may be made.
            form: the grammar for an answer without calls; it has no trigger.

        Raises:
            UsageError: there is no tool to call, the model cannot call tools, or the prompt ends in a turn to continue,
                where a form or a call would have to be the whole turn.
        """
        from argosy.prompt.tools import check_tools

        checked = check_tools(tools)
        form_of_answer = self._format_for(checked)
        if must_call or form is not None:
            if prompt.is_continued:
                raise UsageError(
                    "the answer continues the assistant's last message, "
                    "so it cannot have a required form or be a tool call",
                    hint="leave out that message, or the form and the choice of tools",
                )
            text = form_of_answer.grammar(checked, parallel, prompt, form=None if must_call else form)
            return Grammar(kind="lark", text=text)
        if not checked:
            return None
        text, trigger = form_of_answer.lazy_grammar(checked, parallel, prompt)
        return Grammar(
            kind="lark", text=text, trigger=trigger, is_lenient=not any(t.is_strict for t in checked)
        )

    def remember(
        self,
        tenant: str,
        prompt: Prompt,
        token_ids: Sequence[int],
        answer: Answer,
        tools: Sequence[Tool | Mapping[str, object]] = (),
    ) -> bool:
        """Keep an answer's tokens in case its conversation continues; see `Replay.remember`."""
        from argosy.prompt.tools import check_tools

        if self._replay is None:
            return False
        return self._replay.remember(tenant, prompt.unanswered, token_ids, answer, check_tools(tools))

    def forget(self, tenant: str) -> int:
        """Forget the answers kept for `tenant`; return how many there were."""
        return 0 if self._memory is None else self._memory.forget(tenant)

    @functools.cached_property
    def _replay(self) -> Replay | None:
        if self._memory is None:
            return None
        from argosy.prompt.replay import Replay

        return Replay(self._memory, self._needed("messages"), self._format_for, self._under)

    def _raw(self, text: str, max_tokens: int | None) -> Prompt:
        return Prompt(tuple(self._encode(text, True, max_tokens)), text)

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool | Mapping[str, object]],
        variables: Variables | None,
        tenant: str | None,
        add_generation_prompt: bool,
        continues: bool,
        max_tokens: int | None,
        media: ConversationMedia,
    ) -> Prompt:
        from argosy.prompt.chat import require_renderable
        from argosy.prompt.messages import check_messages
        from argosy.prompt.tokenizer import text_of
        from argosy.prompt.tools import check_tools

        tokenizer = self._needed("messages")
        if self._template is None:
            raise UsageError(
                "this model has no chat template, so it cannot take a list of messages",
                hint="give it text to continue: Prompt.raw(text), or `argosy run --raw`",
            )
        turns = check_messages(
            messages,
            add_generation_prompt=add_generation_prompt and continues,
            join_texts=self._template.join_texts,
        )
        require_renderable(turns)
        turns = tuple(map(media.read, self._template.in_order(turns)))
        checked = check_tools(tools)
        replay = self._replay if tenant is not None else None
        is_continued = add_generation_prompt and continues and turns[-1].role == "assistant"
        opens_turn = add_generation_prompt and not is_continued
        if replay is None or tenant is None:
            segments = self._segments(turns, checked, {}, variables, opens_turn, is_continued)
            ids = tokenizer.encode_segments(segments, max_tokens=max_tokens)
            prompt = Prompt(tuple(ids), text_of(segments), is_continued, is_conversation=not is_continued)
            return media.fill(prompt, max_tokens)

        from argosy.prompt.replay import trace_of

        said, remembered, own_ids = replay.recall(tenant, turns)
        places = set(media.placeholders)
        remembered = [one for one in remembered if places.isdisjoint(one.token_ids)]
        segments = self._segments(said, checked, own_ids, variables, opens_turn, is_continued)
        ids = replay.encode(segments, remembered, checked, is_continued=is_continued, max_tokens=max_tokens)
        trace = trace_of(turns, segments, ids, is_continued=is_continued)
        prompt = Prompt(tuple(ids), text_of(segments), is_continued, trace, is_conversation=not is_continued)
        return media.fill(prompt, max_tokens)

    def _segments(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Tool],
        own_ids: Mapping[str, str],
        variables: Variables | None,
        opens_turn: bool,
        is_continued: bool,
    ) -> list[Segment]:
        assert self._template is not None
        has_calls = bool(tools) or any(turn.calls or turn.role == "tool" for turn in turns)
        segments = self._template.segments(
            self._with_own_ids(turns, own_ids),
            tools,
            is_generic=has_calls and self.tool_calling == "generic",
            add_generation_prompt=opens_turn,
            variables=variables,
        )
        from argosy.prompt.chat import up_to_end_of

        return up_to_end_of(turns[-1].content, segments) if is_continued else segments

    def _with_own_ids(self, turns: Sequence[Turn], own_ids: Mapping[str, str]) -> Sequence[Turn]:
        """`turns` with the call ids, in calls and results, that the model's template expects."""
        if not any(turn.calls or turn.answers for turn in turns):
            return turns
        number = 0
        known: dict[str, str] = {}
        made = []
        for turn in turns:
            calls = []
            for call in turn.calls:
                known[call.id] = own_ids.get(call.id) or self.format.own_id(call, number)
                number += 1
                calls.append(replace(call, id=known[call.id]))
            answers = None if turn.answers is None else known[turn.answers]
            made.append(replace(turn, calls=tuple(calls), answers=answers))
        return made

    @staticmethod
    def _refuse_chat_options(tools: Iterable[object], variables: Variables | None) -> None:
        if tools or variables:
            what = "tools" if tools else "chat template variables"
            raise UsageError(
                f"a prompt of text or token ids cannot have {what}: no chat template is applied to it"
            )

    def _needed(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"this model has no tokenizer.json, so it cannot take {what}",
                hint="copy the tokenizer files of the original model into its directory, or pass token ids from Python",
            )
        return self._tokenizer

    def _checked(self, prompt: Prompt) -> Prompt:
        if not prompt.token_ids:
            raise UsageError("a prompt needs at least one token, and this one is empty")
        self._check_ids(prompt.token_ids)
        return prompt

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self._vocab_size:
                raise UsageError(f"token id {token_id} is not in the vocabulary, 0 to {self._vocab_size - 1}")
