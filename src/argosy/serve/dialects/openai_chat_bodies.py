"""The bodies of OpenAI's Chat Completions, and the conversation that the model gets from one.

Elsewhere: answers are `openai_chat.py`; fields common to several dialects are `serve/answer/fields.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from argosy.config import Grammar, SamplingParams
from argosy.errors import UsageError
from argosy.serve.answer.fields import (
    MAX_TOKENS,
    WHOLE,
    Effort,
    Flag,
    FreeObject,
    Lenient,
    Many,
    Messages,
    MostEntries,
    NoEffect,
    Noted,
    NumBest,
    NumTokens,
    ObjectForm,
    ObjectSchema,
    One,
    Setting,
    Short,
    Strict,
    TemplateVariable,
    Text,
    TextForm,
    TokenId,
    TokenLimit,
    ToolName,
    Tools,
    few,
    limit_of,
    schema_form,
)
from argosy.serve.answer.media_parts import (
    URL_REMEDY,
    VIDEO_URL_REMEDY,
    AskedDetail,
    Data,
    Elsewhere,
    Intake,
    MediaPart,
    Piece,
    SoundPart,
    content_of,
    data_of_url,
)  # fmt: skip
from argosy.serve.answer.replaced import UnreadPart, last_asked
from argosy.serve.answer.request import ChatRequest
from argosy.serve.answer.rules import absent, any_of, at_most_one, given
from argosy.serve.answer.sampling_fields import OpenAISampling, Thinking
from argosy.serve.answer.structured_outputs import Formed
from argosy.serve.answer.tool_use import ToolChoice, ToolMode
from argosy.serve.http.caller import Caller


class TextPart(Noted):
    type: Literal["text"]
    text: Text


Content = Text | Many[TextPart]


class PictureAddress(Lenient):
    url: str
    detail: AskedDetail | None = None


class PicturePart(MediaPart):
    KIND = "picture"
    REMEDY = URL_REMEDY

    type: Literal["image_url"]
    image_url: PictureAddress

    def data(self) -> Data | Elsewhere:
        return data_of_url(self.image_url.url)

    def drop(self) -> int:
        dropped, self.image_url.url = self.image_url.url, ""
        return len(dropped)

    @property
    def detail_asked(self) -> AskedDetail | None:
        return self.image_url.detail


class VideoAddress(Lenient):
    url: str


class VideoPart(MediaPart):
    """As vLLM's server has it."""

    KIND = "video"
    REMEDY = VIDEO_URL_REMEDY

    type: Literal["video_url"]
    video_url: VideoAddress

    def data(self) -> Data | Elsewhere:
        return data_of_url(self.video_url.url)

    def drop(self) -> int:
        dropped, self.video_url.url = self.video_url.url, ""
        return len(dropped)


class OtherPart(UnreadPart):
    type: Literal["file", "audio_url"]


# May contain parts that the model cannot read; see `answer/replaced.py`.
MixedContent = (
    Text
    | Many[Annotated[TextPart | PicturePart | SoundPart | VideoPart | OtherPart, Field(discriminator="type")]]
)


class CalledFunction(Noted):
    name: Short
    arguments: Text | FreeObject  # JSON, as text or as an object
    parsed_arguments: Any = None  # a copy that OpenAI's client adds


CallIndex = Annotated[int, Field(ge=0, lt=4096, strict=True), WHOLE]


class CalledTool(Noted):
    id: Short
    type: Literal["function"] = "function"
    index: CallIndex | None = None
    function: CalledFunction


class ChatTurn(Noted):
    id: NoEffect[Short] = None

    def sent(self) -> dict[str, Any]:
        """The turn as the client sent it, without fields that have no effect."""
        return self.model_dump(exclude_unset=True)


class AskingTurn(ChatTurn):
    role: Literal["system", "developer", "user"]
    content: MixedContent
    name: Short | None = None


class AnsweringTurn(ChatTurn):
    RULES = (
        any_of(
            given("content"), given("function_call"), given(tool_calls={"type": "array", "minItems": 1}),
        ),
    )  # fmt: skip

    role: Literal["assistant"]
    content: Content | None = None
    name: Short | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    reasoning_details: NoEffect[Many[Any]] = None
    tool_calls: Many[CalledTool] | None = None
    function_call: CalledFunction | None = None
    parsed: Any = None  # a copy that OpenAI's client adds
    annotations: Annotated[list[Any], few(0)] | None = None


class ToolTurn(ChatTurn):
    role: Literal["tool"]
    content: MixedContent
    name: Short | None = None
    tool_call_id: Short


class FunctionTurn(ChatTurn):
    """The result of the last `function_call`, the older form of a tool call."""

    role: Literal["function"]
    content: Content
    name: Short


AnyTurn = AskingTurn | AnsweringTurn | ToolTurn | FunctionTurn
Turn = Annotated[AnyTurn, Field(discriminator="role")]


def sent(turns: Sequence[AnyTurn], intake: Intake) -> list[dict[str, Any]]:
    """Convert turns to messages. A `function_call` becomes a tool call with an id, and its result gets that id.

    Notes replace parts that the model cannot read, except in the user's newest turn, where they are refused.
    """
    made = []
    last = "call_of_no_function"
    asked_now = last_asked(turn.role for turn in turns)
    for at, turn in enumerate(turns):
        message = turn.sent()
        if isinstance(turn, AskingTurn | ToolTurn):
            message["content"] = _mixed(turn.content, intake, f"messages.{at}.content", at == asked_now)
        if isinstance(turn, FunctionTurn):
            message = {"role": "tool", "tool_call_id": last, "content": message["content"]}
        elif (function := message.pop("function_call", None)) is not None:
            last = f"call_of_function_{at}"
            called = {"id": last, "type": "function", "function": function}
            message["tool_calls"] = [*message.get("tool_calls", ()), called]
        made.append(message)
    return made


def _mixed(content: MixedContent, intake: Intake, where: str, is_new: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    pieces: list[Piece] = []
    for at, part in enumerate(content):
        match part:
            case TextPart():
                pieces.append(part.text)
            case MediaPart():
                pieces.append(intake.piece(part, f"{where}.{at}", is_new=is_new))
            case OtherPart():
                pieces.append(intake.replaced.note(part.type, f"{where}.{at}", is_new=is_new))
    return content_of(pieces, between="\n")


class OfferedFunction(Noted):
    name: ToolName
    description: Text | None = None
    parameters: ObjectSchema | None = None
    strict: Flag | None = None


class OfferedTool(Noted):
    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(Strict):
    name: ToolName

    def asked(self) -> ToolChoice:
        return ToolChoice("required", (self.name,))


class ChosenTool(Strict):
    type: Literal["function"]
    function: NamedFunction

    def asked(self) -> ToolChoice:
        return self.function.asked()


class ChosenTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Tools]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: ChosenTools

    def asked(self) -> ToolChoice:
        allowed = self.allowed_tools
        return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))


class SchemaForm(Strict):
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: FreeObject = Field(alias="schema")
    strict: Flag | None = None


class JsonSchemaForm(Strict):
    type: Literal["json_schema"]
    json_schema: SchemaForm

    def asked(self) -> Grammar:
        return schema_form(self.json_schema.schema_)


class Reasoning(Strict):
    """Reasoning options in OpenRouter's spelling."""

    effort: Effort | None = None
    enabled: Flag | None = None
    exclude: Flag | None = None
    max_tokens: NoEffect[NumTokens] = None
    summary: NoEffect[Short] = None


EXAMPLES = [[{"role": "user", "content": "Hello"}]]


class ChatBody(Formed, Thinking, OpenAISampling):
    RULES = (
        any_of(absent("response_format"), absent(*Formed.model_fields)),
        at_most_one("tools", "functions"),
        any_of(absent("top_logprobs"), given(logprobs={"const": True})),
    )

    messages: Annotated[list[Turn], Messages] = Field(examples=EXAMPLES)
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: Flag | None = None
    top_logprobs: NumBest | None = None
    best_of: NoEffect[One] = None
    tools: Annotated[list[OfferedTool], Tools] | None = None
    tool_choice: ToolMode | Annotated[ChosenTool | AllowedTools, Field(discriminator="type")] | None = None
    parallel_tool_calls: Flag | None = None
    functions: Annotated[list[OfferedFunction], Tools] | None = None
    function_call: Literal["auto", "none"] | NamedFunction | None = None
    response_format: Annotated[TextForm | ObjectForm | JsonSchemaForm, Field(discriminator="type")] | None = (
        None
    )
    reasoning: Reasoning | None = None
    reasoning_effort: Effort | None = None
    modalities: Annotated[list[Literal["text"]], few(1)] | None = None
    # As in llama.cpp, the answer always continues a final assistant message; these two fields change nothing.
    continue_final_message: Flag | None = None
    add_generation_prompt: Flag | None = None
    chat_template_kwargs: Annotated[dict[TemplateVariable, Setting], MostEntries(16)] | None = None
    continue_token_ids: Annotated[list[TokenId], few(MAX_TOKENS, at_least=1)] | None = Field(
        None,
        description="Tokens that the answer begins with, as `return_token_ids` gave them: the answer then has them, "
        "and goes on as if it had not been cut.",
    )

    def request(self, caller: Caller, intake: Intake) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs to be true", param="top_logprobs")
        params = SamplingParams(
            max_tokens=limit_of(self.max_completion_tokens or self.max_tokens),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling(self.stops),
        )
        choice = ToolChoice.of(self.tool_choice or self.function_call)
        if choice.mode == "required" and (form := self.form_name()) is not None:
            raise UsageError(
                f"the answer cannot be a tool call and have a form: leave out {form}, or set tool_choice to auto",
                param=form,
            )
        self._check_last()
        own = None if self.response_format is None else self.response_format.asked()
        return ChatRequest(
            messages=sent(self.messages, intake),
            replaced=intake.replaced,
            params=params,
            tools=self._offered(),
            tool_choice=choice,
            parallel=self.parallel_tool_calls is not False and not self.calls_functions,
            form=self.form(own, caller),
            effort=self.reasoning_effort or (self.reasoning.effort if self.reasoning else None),
            effort_field="reasoning.effort" if self.reasoning_effort is None else "reasoning_effort",
            thinks=self.thinks if self.thinks is not None or not self.reasoning else self.reasoning.enabled,
            thinks_fields=self.switches(),
            variables=dict[str, Any]((self.chat_template_kwargs or {}).items()),
            num_answers=self.n or 1,
            begun_ids=self.continue_token_ids or (),
            ignored=self.ignored(),
        )

    def switches(self) -> list[str]:
        has_more = self.reasoning is not None and self.reasoning.enabled is not None
        return super().switches() + ["reasoning.enabled"] * has_more

    def _check_last(self) -> None:
        """Check the fields that make assertions about the last message."""
        continues = self.messages[-1].role == "assistant"
        whose = "from the assistant, and the answer continues it" if continues else "not from the assistant"
        if self.continue_final_message not in (None, continues):
            raise UsageError(
                f"continue_final_message: the last message is {whose}", param="continue_final_message"
            )
        if self.add_generation_prompt is False and not continues:
            raise UsageError(
                f"add_generation_prompt: the last message is {whose}", param="add_generation_prompt"
            )
        if self.continue_token_ids:
            if continues:
                raise UsageError(
                    f"continue_token_ids: the last message is {whose}, so there are two beginnings",
                    hint="leave out that message, or the tokens", param="continue_token_ids",
                )  # fmt: skip
            asks_for_form = self.response_format is not None or self.form_name() is not None
            if self.tools is not None or self.functions is not None or asks_for_form:
                raise UsageError(
                    "continue_token_ids: an answer that goes on from tokens has neither tools nor a form",
                    hint="leave out one of them", param="continue_token_ids",
                )  # fmt: skip

    @property
    def calls_functions(self) -> bool:
        """Whether calls use the older form: one function call, without an id."""
        return self.functions is not None

    @property
    def hides_thoughts(self) -> bool:
        return self.include_reasoning is False or bool(self.reasoning and self.reasoning.exclude)

    def _offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        for new, old in (("tools", "functions"), ("tool_choice", "function_call")):
            if getattr(self, new) is not None and getattr(self, old) is not None:
                raise UsageError(
                    f"the request has both {new} and its older version {old}",
                    hint=f"leave out {old}",
                    param=old,
                )
        tools = self.tools or ()
        if self.functions is not None:
            tools = [OfferedTool(type="function", function=function) for function in self.functions]
        return [tool.model_dump(exclude_unset=True) for tool in tools]
