"""The request bodies of OpenAI's Responses API.

    body  ->  items, including those that the server kept  ->  messages  ->  ChatRequest

Tools that OpenAI would run itself are left out and named in `x-ignored-params`.

Elsewhere: answers are `openai_responses.py`; items of earlier responses are `serve/answer/kept_items.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from argosy.config import Grammar, SamplingParams
from argosy.errors import UsageError
from argosy.serve.answer.fields import (
    MAX_ITEMS,
    Effort,
    Flag,
    FreeObject,
    Lenient,
    Many,
    Messages,
    NoEffect,
    NoFlag,
    NumBest,
    ObjectForm,
    ObjectSchema,
    Short,
    Strict,
    Text,
    TextForm,
    TokenLimit,
    ToolName,
    Tools,
    few,
    limit_of,
    schema_form,
    strays,
)
from argosy.serve.answer.kept_items import KeptItems
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
)
from argosy.serve.answer.replaced import Replaced, UnreadPart, last_asked
from argosy.serve.answer.request import ChatRequest
from argosy.serve.answer.sampling_fields import ForOpenAI, Sampling, Thinking
from argosy.serve.answer.tool_use import ToolChoice, ToolMode
from argosy.serve.dialects.body import charge_more
from argosy.serve.http.access import MAX_BODY_BYTES
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import PoolShare

_LOGPROBS = "message.output_text.logprobs"  # in `include`


class Part(Lenient):
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]
    text: Text


class PictureInput(MediaPart):
    KIND = "picture"
    REMEDY = URL_REMEDY

    type: Literal["input_image"]
    image_url: str | None = None
    file_id: Short | None = None
    detail: AskedDetail | None = None

    def data(self) -> Data | Elsewhere:
        if self.image_url is None:
            return Elsewhere("no image_url" if self.file_id is None else "a file id")
        return data_of_url(self.image_url)

    def drop(self) -> int:
        dropped, self.image_url = self.image_url or "", None
        return len(dropped)

    @property
    def detail_asked(self) -> AskedDetail | None:
        return self.detail


class VideoInput(MediaPart):
    """As the Open Responses specification has it; OpenAI's own models take none."""

    KIND = "video"
    REMEDY = VIDEO_URL_REMEDY

    type: Literal["input_video"]
    video_url: str

    def data(self) -> Data | Elsewhere:
        return data_of_url(self.video_url)

    def drop(self) -> int:
        dropped, self.video_url = self.video_url, ""
        return len(dropped)


class OtherInput(UnreadPart):
    type: Literal["input_file", "computer_screenshot"]


Parts = (
    Text
    | Many[Annotated[Part | PictureInput | SoundPart | VideoInput | OtherInput, Field(discriminator="type")]]
)


class GivenItem(Lenient):
    """Part of a conversation. The id and status of an item from an earlier answer have no effect."""

    id: str | None = None
    status: str | None = None


class MessageItem(GivenItem):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts


class CallItem(GivenItem):
    type: Literal["function_call"]
    call_id: Short
    name: Short
    arguments: Text


class ResultItem(GivenItem):
    type: Literal["function_call_output"]
    call_id: Short
    output: Parts


class ThoughtItem(GivenItem):
    type: Literal["reasoning"]
    content: Parts | None = None
    summary: Many[Part] | None = None


class NamedItem(Strict):
    """A reference to an item of an earlier response, which the server may still have."""

    type: Literal["item_reference"] = "item_reference"
    id: Short


def kind_of(item: object) -> str | None:
    """The type of an input item; None if it is neither an object nor an item."""
    if isinstance(item, dict):
        is_name = {name for name, value in item.items() if value is not None} - {"type"} == {"id"}
        return str(item.get("type") or ("item_reference" if is_name else "message"))
    return getattr(item, "type", None)


KnownItem = MessageItem | CallItem | ResultItem | ThoughtItem
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")]
    | Annotated[NamedItem, Tag("item_reference")],
    Discriminator(kind_of),
]
_ITEMS: TypeAdapter[list[KnownItem | NamedItem]] = TypeAdapter(list[Item])


class FunctionTool(Lenient):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: ObjectSchema | None = None
    strict: Flag | None = None


class HostedTool(Lenient):
    """A tool that OpenAI would run; it is left out here."""

    type: Annotated[
        str, Field(pattern=r"^[a-z0-9_]{1,64}$", json_schema_extra={"not": {"const": "function"}})
    ]


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[HostedTool, Tag("hosted")],
    Discriminator(lambda tool: "function" if kind_of(tool) == "function" else "hosted"),
]


class ChosenFunction(Strict):
    type: Literal["function"]
    name: ToolName

    def asked(self) -> ToolChoice:
        return ToolChoice("required", (self.name,))


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Tools]

    def asked(self) -> ToolChoice:
        return ToolChoice(self.mode, tuple(tool.name for tool in self.tools))


class FlatSchemaForm(Strict):
    type: Literal["json_schema"]
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: FreeObject = Field(alias="schema")
    strict: Flag | None = None

    def asked(self) -> Grammar:
        return schema_form(self.schema_)


class TextOptions(Strict):
    format: Annotated[TextForm | ObjectForm | FlatSchemaForm, Field(discriminator="type")] | None = None
    verbosity: str | None = Field(None, max_length=64)


class ReasoningOptions(Strict):
    effort: Effort | None = None
    summary: str | None = Field(None, max_length=64)
    generate_summary: str | None = Field(None, max_length=64)


class ResponsesBody(Thinking, ForOpenAI, Sampling):
    input: Text | Annotated[list[Item], Messages] = Field(examples=["Hello"])
    previous_response_id: Short | None = None
    store: Flag | None = Field(
        None,
        description="Unless false, the response is kept in memory, so that later requests can refer to it.",
    )
    instructions: Text | None = None
    max_output_tokens: TokenLimit | None = None
    top_logprobs: NumBest | None = None
    tools: Annotated[list[AnyTool], Tools] | None = None
    tool_choice: (
        ToolMode | Annotated[ChosenFunction | AllowedFunctions, Field(discriminator="type")] | None
    ) = None
    parallel_tool_calls: Flag | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Short], few(32)] | None = None
    truncation: NoEffect[Literal["disabled"]] = None
    background: NoFlag | None = None
    stream_options: NoEffect[FreeObject] = None

    @property
    def items(self) -> Sequence[KnownItem | NamedItem]:
        """The items that the client sent."""
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def request(self, kept: KeptItems, tenant: str, intake: Intake) -> ChatRequest:
        """The whole conversation, with earlier items from `kept`.

        Raises:
            Refused: an item is no longer kept, or the referenced items exceed the limit of a body.
            Overloaded: other requests leave too little memory for earlier items.
        """
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += _messages(self._conversation(kept, tenant, intake.share), intake)
        form = None if self.text is None else self.text.format
        return ChatRequest(
            messages=messages,
            params=SamplingParams(
                max_tokens=limit_of(self.max_output_tokens),
                logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
                **self.sampling(),
            ),
            tools=[_tool(tool) for tool in self.tools or () if isinstance(tool, FunctionTool)],
            tool_choice=ToolChoice.of(self.tool_choice),
            parallel=self.parallel_tool_calls is not False,
            form=None if form is None else form.asked(),
            effort=None if self.reasoning is None else self.reasoning.effort,
            effort_field="reasoning.effort",
            thinks=self.thinks,
            thinks_fields=self.switches(),
            replaced=intake.replaced,
            ignored=[*self.ignored(), *(["store"] if self.store and not kept.can_keep else ())],
        )

    def _conversation(self, kept: KeptItems, tenant: str, share: PoolShare) -> list[KnownItem]:
        charge = partial(charge_more, share=share)
        earlier = self.previous_response_id
        before = (
            []
            if earlier is None
            else _ITEMS.validate_python(kept.conversation(tenant, earlier, charge=charge))
        )
        named: dict[str, tuple[KnownItem, int]] = {}  # an item named by several references is read once
        num_bytes = 0
        found: list[KnownItem] = []
        for item in (*before, *self.items):
            if not isinstance(item, NamedItem):
                found.append(item)
                continue
            if item.id in named:
                share.hold(named[item.id][1])
            else:
                held_before = share.num_bytes
                (read,) = _ITEMS.validate_python([kept.item(tenant, item.id, charge=charge)])
                assert not isinstance(read, NamedItem)  # the server wrote it
                named[item.id] = read, share.num_bytes - held_before
            num_bytes += named[item.id][1]
            if num_bytes > MAX_BODY_BYTES:
                raise Refused(
                    413,
                    f"the items to which this request refers take more than {MAX_BODY_BYTES} bytes",
                    hint="refer to fewer items, and to each only once",
                    param="input",
                )
            found.append(named[item.id][0])
        if len(found) > MAX_ITEMS:
            raise UsageError(
                f"the conversation has {len(found)} items; the maximum is {MAX_ITEMS}", param="input"
            )
        return found

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or _LOGPROBS in (self.include or ())

    def ignored(self) -> list[str]:
        names = super().ignored()
        names += sorted({f"include.{name}"[:64] for name in self.include or () if name != _LOGPROBS})
        for where, options in (("text", self.text), ("reasoning", self.reasoning)):
            names += [
                f"{where}.{name}" for name in ("verbosity", "summary", "generate_summary")
                if getattr(options, name, None) is not None
            ]  # fmt: skip
        names += sorted({f"tools.{tool.type}" for tool in self.tools or () if isinstance(tool, HostedTool)})
        names += strays("tools", (tool for tool in self.tools or () if isinstance(tool, FunctionTool)))
        return names + strays("input", self.items)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": tool.model_dump(include=set(known), exclude_unset=True)}


def _messages(items: Sequence[KnownItem], intake: Intake) -> list[dict[str, Any]]:
    """Convert items to messages: the assistant's consecutive thoughts, text and calls become one message.

    Notes replace parts that the model cannot read; in the user's newest turn such parts are refused.
    """
    if isinstance(items[-1], MessageItem) and items[-1].role == "assistant":
        raise UsageError("the last item is from the assistant, so there is nothing to answer", param="input")
    asked_now = last_asked(item.role if isinstance(item, MessageItem) else "" for item in items)
    made: list[dict[str, Any]] = []
    said: list[MessageItem | CallItem | ThoughtItem] = []
    for at, item in enumerate(items):
        if isinstance(item, ResultItem):
            content = _content(item.output, intake, f"input.{at}.output")
            message = {"role": "tool", "tool_call_id": item.call_id, "content": content}
        elif isinstance(item, MessageItem) and item.role != "assistant":
            content = _content(item.content, intake, f"input.{at}.content", is_new=at == asked_now)
            message = {"role": item.role, "content": content}
        else:
            said.append(item)
            continue
        made += [*_said(said, intake.replaced), message]
        said = []
    return [*made, *_said(said, intake.replaced)]


def _said(items: Sequence[MessageItem | CallItem | ThoughtItem], replaced: Replaced) -> list[dict[str, Any]]:
    """Combine consecutive items into an assistant message; none for no items."""
    if not items:
        return []
    texts = [_text(item.content, replaced) for item in items if isinstance(item, MessageItem)]
    thoughts = [
        _text(item.content or item.summary or "", replaced) for item in items if isinstance(item, ThoughtItem)
    ]
    calls = [
        {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        for item in items
        if isinstance(item, CallItem)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _content(parts: Parts, intake: Intake, where: str, *, is_new: bool = False) -> str | list[dict[str, Any]]:
    if isinstance(parts, str):
        return parts
    pieces: list[Piece] = []
    for at, part in enumerate(parts):
        match part:
            case Part():
                pieces.append(part.text)
            case MediaPart():
                pieces.append(intake.piece(part, f"{where}.{at}", is_new=is_new))
            case OtherInput():
                pieces.append(intake.replaced.note(part.type, f"{where}.{at}", is_new=is_new))
    return content_of(pieces, between="")


def _text(parts: Parts | Sequence[Part], replaced: Replaced) -> str:
    """The assistant's words or thoughts, where a prompt has no pictures."""
    if isinstance(parts, str):
        return parts
    return "".join(
        part.text if isinstance(part, Part) else replaced.note(part.type, "input", is_new=False)
        for part in parts
    )
