"""OpenAI's Responses: POST /v1/responses and /v1/responses/input_tokens.

A client sends the whole conversation, or refers to items that the server still has, by `item_reference` and
`previous_response_id` (`kept_items.py`). Responses cannot be fetched or deleted by id.
A stream numbers its events. Each piece of an answer is an output item that is added, filled by deltas, and done. The
last event is `response.completed`, `response.incomplete` or `response.failed`. Tools that OpenAI would run itself are
left out and named in `x-ignored-params`.

Elsewhere: the path of a request is `respond.py`; answers are `core.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Discriminator, Field, Tag, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from argosy.config import Grammar, SamplingParams
from argosy.errors import PromptTooLong, UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.core import ChatRequest, Ended, Read, Said, Service, Step
from argosy.serve.fields import (
    MAX_ITEMS,
    Closed,
    Effort,
    Flag,
    ForOpenAI,
    FreeForm,
    FreeObject,
    Lenient,
    Many,
    Messages,
    NoEffect,
    NoFlag,
    NumBest,
    ObjectSchema,
    PromptTokens,
    Sampling,
    Short,
    Strict,
    Text,
    Thinking,
    ThoughtTokens,
    TokenLimit,
    ToolName,
    Tools,
    few,
    limit_of,
    schema_form,
    strays,
)  # fmt: skip
from argosy.serve.gate import Caller, error_body
from argosy.serve.kept_items import KeptItems
from argosy.serve.logprobs import ScoredToken, Speller
from argosy.serve.media_parts import (
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
    media_in,
)  # fmt: skip
from argosy.serve.replaced import Replaced, UnreadPart, last_asked
from argosy.serve.respond import Exchange, respond
from argosy.serve.streams import sse
from argosy.serve.tool_use import ToolChoice, ToolMode

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


def _kind(item: object) -> str | None:
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
    Discriminator(_kind),
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
    Discriminator(lambda tool: "function" if _kind(tool) == "function" else "hosted"),
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
    format: Annotated[FreeForm | FlatSchemaForm, Field(discriminator="type")] | None = None
    verbosity: str | None = Field(None, max_length=64)


class ReasoningOptions(Strict):
    effort: Effort | None = None
    summary: str | None = Field(None, max_length=64)
    generate_summary: str | None = Field(None, max_length=64)


class ResponsesBody(Thinking, ForOpenAI, Sampling):
    input: Text | Annotated[list[Item], Messages] = Field(examples=["Hello"])
    previous_response_id: Short | None = None
    store: Flag | None = Field(
        None, description="Unless false, items are kept so that later requests can refer to them."
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
            Refused: an item is no longer kept.
        """
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += _messages(self._conversation(kept, tenant), intake)
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

    def _conversation(self, kept: KeptItems, tenant: str) -> list[KnownItem]:
        earlier = self.previous_response_id
        before = [] if earlier is None else _ITEMS.validate_python(kept.conversation(tenant, earlier))
        found: list[KnownItem] = []
        for item in (*before, *self.items):
            if isinstance(item, NamedItem):
                named = _ITEMS.validate_python([kept.item(tenant, item.id)])
                found += [one for one in named if not isinstance(one, NamedItem)]
            else:
                found.append(item)
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
    """Convert items to messages: consecutive thoughts, text and calls of the assistant become one message.

    Notes replace parts that the model cannot read; in the user's newest turn such parts are refused.
    """
    if isinstance(items[-1], MessageItem) and items[-1].role == "assistant":
        raise UsageError("the last item is from the assistant, so there is nothing to answer", param="input")
    asked_now = last_asked(item.role if isinstance(item, MessageItem) else "" for item in items)
    made: list[dict[str, Any]] = []
    for at, item in enumerate(items):
        if isinstance(item, ResultItem):
            content = _content(item.output, intake, f"input.{at}.output")
            made.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            content = _content(item.content, intake, f"input.{at}.content", is_new=at == asked_now)
            made.append({"role": item.role, "content": content})
        else:
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": ""})
            _add(made[-1], item, intake.replaced)
    return made


def _add(message: dict[str, Any], item: MessageItem | CallItem | ThoughtItem, replaced: Replaced) -> None:
    match item:
        case MessageItem():
            message["content"] += _text(item.content, replaced)
        case ThoughtItem():
            thought = _text(item.content or item.summary or "", replaced)
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)


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
    """What the assistant said or thought; a prompt has no pictures there."""
    if isinstance(parts, str):
        return parts
    return "".join(
        part.text if isinstance(part, Part) else replaced.note(part.type, "input", is_new=False)
        for part in parts
    )


class OutputText(Closed):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ScoredToken]


class ReasoningText(Closed):
    type: Literal["reasoning_text"]
    text: str


Progress = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class SaidMessage(Closed):
    id: str
    status: Progress
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]


class SaidThought(Closed):
    id: str
    status: Progress
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]


class SaidCall(Closed):
    id: str
    status: Progress
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


SaidItem = SaidMessage | SaidThought | SaidCall


class ResponseUsage(Closed):
    input_tokens: int
    input_tokens_details: PromptTokens
    output_tokens: int
    output_tokens_details: ThoughtTokens
    total_tokens: int


FailureCode = Literal["server_error", "context_length_exceeded"]


class Failure(Closed):
    code: FailureCode
    message: str


class Incomplete(Closed):
    reason: Literal["max_output_tokens"]


class Answer(Closed):
    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: Failure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    model: str
    output: list[SaidItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    top_p: float
    tool_choice: Any
    tools: list[Any]
    max_output_tokens: int | None
    metadata: dict[str, Any]
    usage: ResponseUsage | None
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: Literal["disabled"]
    top_logprobs: int
    background: Literal[False]


class MediaTokens(Closed):
    image_tokens: NotRequired[int]
    audio_tokens: NotRequired[int]


class InputTokens(Closed):
    """Tokens of a conversation. Those of its pictures and sounds are told too, which OpenAI does not do."""

    object: Literal["response.input_tokens"]
    input_tokens: int
    input_tokens_details: MediaTokens


class Numbered(Closed):
    sequence_number: int


class ResponseEvent(Numbered):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]  # fmt: skip
    response: Answer


class ItemEvent(Numbered):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: SaidItem


class Place(Closed):
    """The place of an event in a response."""

    output_index: int
    item_id: str


class Placed(Numbered, Place):
    pass


class PartEvent(Placed):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText | ReasoningText


class TextDeltaEvent(Placed):
    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    content_index: int
    delta: str
    logprobs: NotRequired[list[ScoredToken]]


class TextDoneEvent(Placed):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    content_index: int
    text: str
    logprobs: NotRequired[list[ScoredToken]]


class ArgumentsDeltaEvent(Placed):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(Placed):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


Event = (
    ResponseEvent | ItemEvent | PartEvent | TextDeltaEvent | TextDoneEvent | ArgumentsDeltaEvent | ArgumentsDoneEvent
)  # fmt: skip


async def input_tokens(body: ResponsesBody, request: Request) -> InputTokens:
    """Count the tokens of a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    num_tokens, of_media = await service.count_tokens(_reading(body, service, caller), caller)
    return {
        "object": "response.input_tokens",
        "input_tokens": num_tokens,
        "input_tokens_details": cast(MediaTokens, of_media),
    }


def _reading(body: ResponsesBody, service: Service, caller: Caller) -> Callable[[], ChatRequest]:
    if service.model.media_kinds and (
        body.previous_response_id is not None or any(isinstance(item, NamedItem) for item in body.items)
    ):
        caller.takes_long = True  # earlier items may have pictures
    if (earlier := body.previous_response_id) is not None and "video" in service.model.media_kinds:
        caller.takes_video |= service.kept.has_video(caller.tenant, earlier)
    return lambda: body.request(service.kept, caller.tenant, service.intake(caller))


async def responses(body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation."""
    return await respond(ResponsesExchange, body, request)


class ResponsesExchange(Exchange[ResponsesBody, Event]):
    names_events = True
    streams_overflow = True  # Codex shortens a conversation that is too long only if a stream says so

    def __init__(self, body: ResponsesBody, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._is_kept = body.store is not False and service.kept.can_keep
        self._has_input = True  # the body still has all of its data
        self._speller = Speller(service.tokenizer, keep_special=body.skip_special_tokens is False)
        self._id = "resp_" + secrets.token_hex(16)
        self._created = int(time.time())
        self._number = 0
        self._items: list[SaidItem] = []
        self._is_open = False
        self._logprobs: list[ScoredToken] = []  # of tokens whose text is not sent yet
        self._usage: ResponseUsage | None = None  # set at the end
        self._status: Literal["completed", "incomplete"] = "completed"

    def reads(self) -> list[Read]:
        return [_reading(self.body, self.service, self.caller)]

    def begin(self) -> list[Event]:
        kinds, response = ("response.created", "response.in_progress"), self._response("in_progress")
        return [self._event(kind, response=response) for kind in kinds]

    def take(self, step: Step) -> list[Event]:
        match step:
            case Said():
                if step.logprob is not None:
                    self._logprobs.append(self._speller.scored(step.logprob, self.body.top_logprobs or 0))
                return [event for said in step.events for event in self._say(said)]
            case Ended():
                self._status = "incomplete" if step.finish == "length" else "completed"
        return []

    async def end(self) -> list[Event]:
        status, answers = self._status, self.answers
        shut = self._close(status)
        self._usage = {
            "input_tokens": answers.num_prompt_tokens,
            "input_tokens_details": answers.prompt_tokens(),
            "output_tokens": answers.num_new_tokens,
            "output_tokens_details": {"reasoning_tokens": answers.num_reasoning_tokens},
            "total_tokens": answers.num_prompt_tokens + answers.num_new_tokens,
        }
        await self._keep()
        return [*shut, self._event(f"response.{status}", response=self._response(status))]

    def fold(self, event: Event) -> None:
        self._last = event

    def whole(self) -> Answer:
        return cast(ResponseEvent, self._last)["response"]  # the last event has all items

    def failed(self, error: Exception) -> bytes:
        _, body = error_body(error, "openai", self.caller.request_id)
        response = self._response("failed")
        code: FailureCode = "context_length_exceeded" if isinstance(error, PromptTooLong) else "server_error"
        response["error"] = {"code": code, "message": body["error"]["message"]}
        return sse(self._event("response.failed", response=response), "response.failed")

    def drop_media(self) -> None:
        """Forget the data of pictures and sounds, unless it will be kept with the other items."""
        data = [part.data() for part in media_in(self.body)]
        num_bytes = sum(one.num_characters for one in data if isinstance(one, Data))
        if not self._is_kept or num_bytes > self.service.kept.max_bytes:
            self._has_input &= not num_bytes
            super().drop_media()

    async def _keep(self) -> None:
        """Keep the items before the end is sent, so the next request finds them; in a thread, as this takes long."""
        body, kept = self.body, self.service.kept

        def keep() -> None:
            asked = None
            if self._has_input:
                asked = [item.model_dump(exclude_unset=True, mode="json") for item in body.items]
            has_video = any(part.KIND == "video" for part in media_in(body))
            kept.keep(
                self.caller.tenant, self._id, body.previous_response_id, asked, self._items, has_video=has_video
            )  # fmt: skip

        if self._is_kept:
            await asyncio.to_thread(keep)

    def _say(self, said: SaidEvent) -> list[Event]:
        match said:
            case TextDelta():
                return self._more("message", said.text)
            case ReasoningDelta():
                return [] if self.body.include_reasoning is False else self._more("reasoning", said.text)
            case ToolCallBegin():
                self._logprobs = []
                shut = self._close()
                call: SaidCall = {
                    "id": _item_id("fc_"), "status": "in_progress", "type": "function_call", "call_id": said.id,
                    "name": said.name, "arguments": "",
                }  # fmt: skip
                return [*shut, self._begin(call)]
            case ToolCallArguments():
                item = self._items[-1]
                assert item["type"] == "function_call"
                item["arguments"] += said.json_fragment
                delta = said.json_fragment
                return [self._event("response.function_call_arguments.delta", **self._at(), delta=delta)]
            case ToolCallEnd():
                return self._close()

    def _more(self, kind: Literal["message", "reasoning"], text: str) -> list[Event]:
        goes_on = self._is_open and self._items[-1]["type"] == kind
        begun = [] if goes_on else self._begin_text(kind)
        item, logprobs = self._items[-1], self._logprobs
        self._logprobs = []
        assert item["type"] != "function_call"
        item["content"][0]["text"] += text
        delta = {"content_index": 0, "delta": text, **self._at()}
        if item["type"] == "reasoning":
            return [*begun, self._event("response.reasoning_text.delta", **delta)]
        item["content"][0]["logprobs"] += logprobs
        return [*begun, self._event("response.output_text.delta", **delta, logprobs=logprobs)]

    def _begin_text(self, kind: Literal["message", "reasoning"]) -> list[Event]:
        """Begin an item with its only part, both empty."""
        events = self._close()
        part: OutputText | ReasoningText
        if kind == "message":
            message: SaidMessage = {
                "id": _item_id("msg_"), "status": "in_progress", "type": "message", "role": "assistant", "content": [],
            }  # fmt: skip
            events.append(self._begin(message))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            message["content"].append(part)
        else:
            thought: SaidThought = {
                "id": _item_id("rs_"), "status": "in_progress", "type": "reasoning", "summary": [], "content": [],
            }  # fmt: skip
            events.append(self._begin(thought))
            part = {"type": "reasoning_text", "text": ""}
            thought["content"].append(part)
        added = self._event("response.content_part.added", **self._at(), content_index=0, part=deepcopy(part))
        return [*events, added]

    def _begin(self, item: SaidItem) -> Event:
        self._is_open = True
        self._items.append(item)
        # A copy, because the item grows.
        added_at = len(self._items) - 1
        return self._event("response.output_item.added", output_index=added_at, item=deepcopy(item))

    def _close(self, status: Literal["completed", "incomplete"] = "completed") -> list[Event]:
        """End the open item; it is incomplete if the answer was cut off in it."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        at, events = self._at(), list[Event]()
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **at, **said))
        else:
            part = item["content"][0]
            done = {"content_index": 0, "text": part["text"], **at}
            if part["type"] == "output_text":
                done["logprobs"] = part["logprobs"]
            events.append(self._event(f"response.{part['type']}.done", **done))
            events.append(self._event("response.content_part.done", **at, content_index=0, part=part))
        done_at = len(self._items) - 1
        return [*events, self._event("response.output_item.done", output_index=done_at, item=item)]

    def _event(self, kind: str, **fields: Any) -> Event:
        """The next event; tests hold every kind of event against `Event`."""
        self._number += 1
        return cast(Event, {"type": kind, "sequence_number": self._number - 1, **fields})

    def _at(self) -> Place:
        return {"output_index": len(self._items) - 1, "item_id": self._items[-1]["id"]}

    def _response(self, status: Status) -> Answer:
        body = self.body
        choice = body.tool_choice
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "model": self.service.model.id,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": self._is_kept, "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "tool_choice": choice or "auto" if isinstance(choice, str | None) else choice.model_dump(),
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
            "max_output_tokens": limit_of(body.max_output_tokens), "metadata": {}, "usage": self._usage,
            "text": _echoed(body.text) or {"format": {"type": "text"}}, "reasoning": _echoed(body.reasoning),
            "truncation": "disabled", "top_logprobs": body.top_logprobs or 0, "background": False,
        }  # fmt: skip


def _echoed(given: TextOptions | ReasoningOptions | None) -> dict[str, Any]:
    """The options as the client sent them."""
    return {} if given is None else given.model_dump(exclude_unset=True, by_alias=True)


def _item_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
