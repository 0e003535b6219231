"""OpenAI's Chat Completions: POST /v1/chat/completions.

A stream sends the role once, and the id and name of a tool call before its arguments. A call keeps its index, and with
`include_usage` the last chunk has no choices. `x-ignored-params` names accepted fields that have no effect.

Elsewhere: answers are `core.py`; sending them is `streams.py`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import Grammar, SamplingParams
from argosy.engine.sequence import TokenLogprob
from argosy.errors import UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from argosy.serve.core import Answers, ChatRequest, Ended, Finish, Progress, Said, Service
from argosy.serve.fields import (
    WHOLE,
    Closed,
    Effort,
    Flag,
    FreeForm,
    FreeObject,
    Many,
    Messages,
    MostEntries,
    NoEffect,
    Noted,
    NumBest,
    NumTokens,
    ObjectSchema,
    OpenAISampling,
    ReadOfPrompt,
    Setting,
    Short,
    Strict,
    TemplateVariable,
    Text,
    Thinking,
    ThoughtTokens,
    Timings,
    TokenLimit,
    ToolName,
    Tools,
    Usage,
    few,
    ignored_header,
    limit_of,
    schema_form,
)  # fmt: skip
from argosy.serve.gate import Caller
from argosy.serve.logprobs import ScoredToken, Speller
from argosy.serve.replaced import Replaced, UnreadPart, last_asked
from argosy.serve.rules import absent, any_of, at_most_one, given
from argosy.serve.streams import DONE, EventStream, sse, until_gone
from argosy.serve.structured_outputs import Formed
from argosy.serve.tool_use import ToolChoice, ToolMode


class TextPart(Noted):
    type: Literal["text"]
    text: Text


Content = Text | Many[TextPart]


class MediaPart(UnreadPart):
    type: Literal["image_url", "input_audio", "file", "video_url", "audio_url"]


# May hold parts that the model cannot read: see `replaced.py`.
MixedContent = Text | Many[Annotated[TextPart | MediaPart, Field(discriminator="type")]]


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


def sent(turns: Sequence[AnyTurn], replaced: Replaced | None = None) -> list[dict[str, Any]]:
    """Convert turns to messages. A `function_call` becomes a tool call with an id, and its result gets that id.

    With `replaced`, notes replace parts that the model cannot read; in the user's newest turn such parts are refused.
    """
    made = []
    last = "call_of_no_function"
    asked_now = last_asked(turn.role for turn in turns)
    for at, turn in enumerate(turns):
        message = turn.sent()
        if replaced is not None and isinstance(turn, AskingTurn | ToolTurn):
            message["content"] = _noted(turn.content, replaced, f"messages.{at}.content", at == asked_now)
        if isinstance(turn, FunctionTurn):
            message = {"role": "tool", "tool_call_id": last, "content": message["content"]}
        elif (function := message.pop("function_call", None)) is not None:
            last = f"call_of_function_{at}"
            called = {"id": last, "type": "function", "function": function}
            message["tool_calls"] = [*message.get("tool_calls", ()), called]
        made.append(message)
    return made


def _noted(content: MixedContent, replaced: Replaced, where: str, is_new: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": replaced.note(part.type, f"{where}.{at}", is_new=is_new)}
        if isinstance(part, MediaPart)
        else part.model_dump(exclude_unset=True)
        for at, part in enumerate(content)
    ]


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
        at_most_one("tool_choice", "function_call"),
        any_of(absent("top_logprobs"), given(logprobs={"const": True})),
    )

    messages: Annotated[list[Turn], Messages] = Field(examples=EXAMPLES)
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: Flag | None = None
    top_logprobs: NumBest | None = None
    tools: Annotated[list[OfferedTool], Tools] | None = None
    tool_choice: ToolMode | Annotated[ChosenTool | AllowedTools, Field(discriminator="type")] | None = None
    parallel_tool_calls: Flag | None = None
    functions: Annotated[list[OfferedFunction], Tools] | None = None
    function_call: Literal["auto", "none"] | NamedFunction | None = None
    response_format: Annotated[FreeForm | JsonSchemaForm, Field(discriminator="type")] | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: Effort | None = None
    modalities: Annotated[list[Literal["text"]], few(1)] | None = None
    # As in llama.cpp, the answer always continues a last message from the assistant; these two fields change nothing.
    continue_final_message: Flag | None = None
    add_generation_prompt: Flag | None = None
    chat_template_kwargs: Annotated[dict[TemplateVariable, Setting], MostEntries(16)] | None = None

    def request(self, caller: Caller) -> ChatRequest:
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
        replaced = Replaced()
        return ChatRequest(
            messages=sent(self.messages, replaced),
            replaced=replaced,
            params=params,
            tools=self._offered(),
            tool_choice=choice,
            parallel=self.parallel_tool_calls is not False and not self.calls_functions,
            form=self.form(own, caller),
            effort=self.reasoning_effort or (self.reasoning.effort if self.reasoning else None),
            thinks=self.thinks if self.thinks is not None or not self.reasoning else self.reasoning.enabled,
            variables=dict[str, Any]((self.chat_template_kwargs or {}).items()),
            num_answers=self.n or 1,
        )

    def switches(self) -> list[str]:
        has_more = self.reasoning is not None and self.reasoning.enabled is not None
        return super().switches() + ["reasoning.enabled"] * has_more

    def _check_last(self) -> None:
        """Check the fields that make a claim about the last message."""
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
                    f"the request has both {new} and its older form {old}",
                    hint=f"leave out {old}",
                    param=old,
                )
        tools = self.tools or ()
        if self.functions is not None:
            tools = [OfferedTool(type="function", function=function) for function in self.functions]
        return [tool.model_dump(exclude_unset=True) for tool in tools]


class Function(Closed):
    name: str
    arguments: str


class Call(Closed):
    id: str
    type: Literal["function"]
    function: Function


class Scores(Closed):
    content: list[ScoredToken]
    refusal: None


class ChatMessage(Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]
    function_call: NotRequired[Function]


ChatFinish = Finish | Literal["function_call"]


class Choice(Closed):
    index: int
    message: ChatMessage
    finish_reason: ChatFinish
    logprobs: Scores | None


class ChatUsage(Usage):
    completion_tokens_details: ThoughtTokens
    timings: NotRequired[Timings]


class ChatCompletion(Closed):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    timings: NotRequired[Timings]


class FunctionDelta(Closed):
    name: NotRequired[str]
    arguments: str


class CallDelta(Closed):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(Closed):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]
    function_call: NotRequired[FunctionDelta]


class ChoiceDelta(Closed):
    index: int
    delta: Delta
    finish_reason: ChatFinish | None
    logprobs: NotRequired[Scores]


class ChatChunk(Closed):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChoiceDelta]
    usage: NotRequired[ChatUsage]
    timings: NotRequired[Timings]
    prompt_progress: NotRequired[ReadOfPrompt]


async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller
    wanted, answers = await service.open(
        lambda: replace(body.request(caller), ignored=body.ignored()), caller
    )
    ignored = [*wanted.ignored]
    if service.ignored_effort(wanted):
        ignored.append("reasoning.effort" if body.reasoning_effort is None else "reasoning_effort")
    if service.ignored_switch(wanted):
        ignored += body.switches()
    headers = ignored_header(ignored) | wanted.replaced.header()
    dialect = _Chat(service, body, answers)
    if body.stream:
        return EventStream(dialect.stream(), caller, answers.cancel, headers=headers)
    return JSONResponse(await until_gone(request, dialect.whole(), answers.cancel), headers=headers)


class _Chat:
    def __init__(self, service: Service, body: ChatBody, answers: Answers) -> None:
        self._service, self._body, self._answers = service, body, answers
        self._id = "chatcmpl-" + secrets.token_hex(12)
        self._created = int(time.time())
        keeps_special = body.skip_special_tokens is False
        self._speller = Speller(service.tokenizer, keep_special=keeps_special)

    async def whole(self) -> ChatCompletion:
        logprobs: dict[int, list[ScoredToken]] = {}
        finish: dict[int, ChatFinish] = {}
        async with self._answers as answers:
            async for step in answers.steps():
                match step:
                    case Said(logprob=TokenLogprob() as found):
                        logprobs.setdefault(step.answer, []).append(self._logprob(found))
                    case Ended():
                        finish[step.answer] = self._finish(step)
        choices: list[Choice] = []
        for number in range(len(finish)):
            said = self._answers.said(number)
            message: ChatMessage = {"role": "assistant", "content": said.text or None, "refusal": None}
            if not said.calls:
                message["content"] = said.text
            if said.reasoning and not self._body.hides_thoughts:
                message["reasoning_content"] = said.reasoning
            if said.calls and self._body.calls_functions:
                message["function_call"] = {
                    "name": said.calls[0].name, "arguments": said.calls[0].arguments,
                }  # fmt: skip
            elif said.calls:
                message["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in said.calls
                ]
            choice: Choice = {
                "index": number, "message": message, "finish_reason": finish[number], "logprobs": None,
            }  # fmt: skip
            if self._body.logprobs:
                choice["logprobs"] = {"content": logprobs.get(number, []), "refusal": None}
            choices.append(choice)
        usage, timings = self._last()
        whole: ChatCompletion = {
            "id": self._id, "object": "chat.completion", "created": self._created, "model": self._service.model.id,
            "choices": choices, "usage": usage,
        }  # fmt: skip
        return whole if timings is None else {**whole, "timings": timings}

    async def stream(self) -> AsyncIterator[bytes]:
        async with self._answers as answers:
            for number in range(self._body.n or 1):
                yield self._said(number, {"role": "assistant", "content": ""})
            async for step in answers.steps():
                match step:
                    case Progress() if self._body.return_progress:
                        yield sse({**self._chunk([]), "prompt_progress": step.as_dict()})
                    case Said():
                        deltas = [delta for event in step.events if (delta := self._delta(event))]
                        if step.logprob is not None and not deltas:
                            deltas = [{}]
                        for at, delta in enumerate(deltas):
                            yield self._said(step.answer, delta, logprob=step.logprob if at == 0 else None)
                    case Ended():
                        yield self._said(step.answer, {}, finish=self._finish(step))
            last, (usage, timings) = self._chunk([]), self._last()
            if self._body.stream_options and self._body.stream_options.include_usage:
                last["usage"] = usage
            if timings is not None:
                last["timings"] = timings
            if "usage" in last or "timings" in last:
                yield sse(last)
            yield sse(DONE)

    def _said(
        self,
        number: int,
        delta: Delta,
        *,
        finish: ChatFinish | None = None,
        logprob: TokenLogprob | None = None,
    ) -> bytes:
        choice: ChoiceDelta = {"index": number, "delta": delta, "finish_reason": finish}
        if logprob is not None:
            choice["logprobs"] = {"content": [self._logprob(logprob)], "refusal": None}
        chunk = self._chunk([choice])
        if self._body.tells_usage_always:
            chunk["usage"] = self._usage()
        return sse(chunk)

    def _finish(self, step: Ended) -> ChatFinish:
        return "function_call" if step.finish == "tool_calls" and self._body.calls_functions else step.finish

    def _chunk(self, choices: list[ChoiceDelta]) -> ChatChunk:
        return {
            "id": self._id, "object": "chat.completion.chunk", "created": self._created,
            "model": self._service.model.id, "choices": choices,
        }  # fmt: skip

    def _last(self) -> tuple[ChatUsage, Timings | None]:
        """The usage and, if requested, the ledger, both known at the end."""
        usage, first = self._usage(), self._answers.results[0]
        if not self._body.timings or first is None:
            return usage, None
        timings = cast(Timings, first.ledger.as_dict())
        return {**usage, "timings": timings}, timings

    def _usage(self) -> ChatUsage:
        """The usage so far."""
        prompt, new = self._answers.num_prompt_tokens, self._answers.num_new_tokens
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self._answers.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self._answers.num_reasoning_tokens},
        }  # fmt: skip

    def _logprob(self, found: TokenLogprob) -> ScoredToken:
        return self._speller.scored(found, self._body.top_logprobs or 0)

    def _delta(self, event: SaidEvent) -> Delta | None:
        match event:
            case TextDelta():
                return {"content": event.text}
            case ReasoningDelta() if not self._body.hides_thoughts:
                return {"reasoning_content": event.text}
            case ToolCallBegin():
                function: FunctionDelta = {"name": event.name, "arguments": ""}
                if self._body.calls_functions:
                    return {"function_call": function}
                call: CallDelta = {
                    "index": event.index,
                    "id": event.id,
                    "type": "function",
                    "function": function,
                }
                return {"tool_calls": [call]}
            case ToolCallArguments():
                more: FunctionDelta = {"arguments": event.json_fragment}
                if self._body.calls_functions:
                    return {"function_call": more}
                return {"tool_calls": [{"index": event.index, "function": more}]}
        return None
