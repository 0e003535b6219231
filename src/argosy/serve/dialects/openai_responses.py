"""OpenAI's Responses API: POST /v1/responses and /v1/responses/input_tokens, GET and DELETE of stored responses.

A client sends the whole conversation, or refers to items that the server still has, by `item_reference` and
`previous_response_id` (`serve/answer/kept_items.py`). A kept response can be fetched and deleted by its id. A
stream numbers its events. Each piece of an answer is an output item, which is added, filled by deltas, and then
done. The last event is `response.completed`, `response.incomplete` or `response.failed`.

Elsewhere: request bodies are `openai_responses_bodies.py`; the path of a request is `serve/answer/respond.py`;
answers are `serve/answer/answers.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Literal, NotRequired, cast

from starlette.requests import Request
from starlette.responses import Response

from argosy.errors import PromptTooLong, UsageError
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.serve.answer.answers import Ended, Said, Step
from argosy.serve.answer.fields import limit_of
from argosy.serve.answer.logprobs import ScoredToken, Speller
from argosy.serve.answer.media_parts import Data, media_in
from argosy.serve.answer.opening import Opening
from argosy.serve.answer.request import ChatRequest, Read
from argosy.serve.answer.respond import Exchange, respond
from argosy.serve.answer.service import Service, service_of
from argosy.serve.answer.usage import PromptTokens, ThoughtTokens
from argosy.serve.dialects.openai_responses_bodies import (
    NamedItem,
    ReasoningOptions,
    ResponsesBody,
    TextOptions,
)
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import OpenAIError, Refused, error_body
from argosy.serve.http.route import Route, get_route, post_route
from argosy.serve.http.streams import sse
from argosy.serve.models.models import models_of

_MOST_LISTED = 100  # input items per list


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
    reason: Literal["max_output_tokens", "content_filter"]


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
    service = service_of(request)
    caller: Caller = request.state.caller
    tokens, of_media = await Opening(service, caller).tokens(_reading(body, service, caller))
    return {
        "object": "response.input_tokens",
        "input_tokens": len(tokens),
        "input_tokens_details": cast(MediaTokens, of_media),
    }


def _reading(body: ResponsesBody, service: Service, caller: Caller) -> Callable[[], ChatRequest]:
    if service.model.media_kinds and (
        body.previous_response_id is not None or any(isinstance(item, NamedItem) for item in body.items)
    ):
        caller.held.takes_long = True  # earlier items may contain pictures
    if (earlier := body.previous_response_id) is not None and "video" in service.model.media_kinds:
        caller.held.takes_video |= service.kept.has_video(caller.tenant, earlier)
    return lambda: body.request(service.kept, caller.tenant, service.intake(caller))


async def responses(body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation."""
    return await respond(ResponsesExchange, body, request)


class Deleted(Closed):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(Closed):
    """Input items of a response, newest first unless `order=asc`."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def stored_response(request: Request) -> Answer:
    """Show a response that is still kept."""
    if request.query_params.get("stream", "false") != "false":
        raise UsageError(
            "a response that is kept cannot be streamed", hint="leave out stream", param="stream"
        )
    kept, caller = models_of(request).kept, request.state.caller
    found = await asyncio.to_thread(kept.response, caller.tenant, request.path_params["id"])
    return cast(Answer, found)


async def delete_response(request: Request) -> Deleted:
    """Delete a response that is still kept."""
    response_id = request.path_params["id"]
    models_of(request).kept.delete(request.state.caller.tenant, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


INPUT_ITEMS_QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": _MOST_LISTED, "default": 20},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "after": {"type": "string"},
}


async def input_items(request: Request) -> InputItems:
    """List the input items of a response that is still kept."""
    query, caller = request.query_params, request.state.caller
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= _MOST_LISTED):
        raise UsageError(f"limit must be a number from 1 to {_MOST_LISTED}", param="limit")
    if order not in ("asc", "desc"):
        raise UsageError("order must be asc or desc", param="order")
    found = await asyncio.to_thread(models_of(request).kept.asked, caller.tenant, request.path_params["id"])
    if order == "desc":
        found.reverse()
    ids = [item["id"] for item in found]
    if after is not None and after not in ids:
        raise Refused(404, f"Item with id '{after[:64]}' not found.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    end = start + int(limit)
    return {
        "object": "list", "data": [_shown(item) for item in found[start:end]],
        "first_id": ids[start] if start < len(ids) else None,
        "last_id": ids[start:end][-1] if start < len(ids) else None,
        "has_more": end < len(ids),
    }  # fmt: skip


def _shown(item: Mapping[str, Any]) -> dict[str, Any]:
    """An input item as OpenAI shows it: a message has parts, even if it was sent as plain text."""
    shown = {"status": "completed", **item}
    if shown["type"] == "message" and isinstance(shown["content"], str):
        kind = "output_text" if shown["role"] == "assistant" else "input_text"
        shown["content"] = [{"type": kind, "text": shown["content"]}]
    return shown


class ResponsesExchange(Exchange[ResponsesBody, Event]):
    names_events = True
    streams_overflow = True  # Codex shortens an overlong conversation only if a stream says so

    def __init__(self, body: ResponsesBody, service: Service, caller: Caller) -> None:
        super().__init__(body, service, caller)
        self._is_kept = body.store is not False and service.kept.can_keep
        self._has_input = True  # the body still holds all of its data
        self._speller = Speller(service.tokenizer, keep_special=body.skip_special_tokens is False)
        self._id = "resp_" + secrets.token_hex(16)
        self._created = int(time.time())
        self._number = 0
        self._items: list[SaidItem] = []
        self._is_open = False
        self._logprobs: list[ScoredToken] = []  # tokens whose text has not been sent yet
        self._usage: ResponseUsage | None = None  # set at the end
        self._status: Literal["completed", "incomplete"] = "completed"
        self._is_filtered = False  # the policy ended the answer

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
                self._status = "incomplete" if step.finish in ("length", "content_filter") else "completed"
                self._is_filtered = step.finish == "content_filter"
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
        response = self._response(status)
        await self._keep(response)
        return [*shut, self._event(f"response.{status}", response=response)]

    def fold(self, event: Event) -> None:
        self._last = event

    def whole(self) -> Answer:
        return cast(ResponseEvent, self._last)["response"]  # the last event contains all items

    def failed(self, error: Exception) -> bytes:
        _, body = error_body(error, "openai", self.caller.request_id)
        response = self._response("failed")
        code: FailureCode = "context_length_exceeded" if isinstance(error, PromptTooLong) else "server_error"
        response["error"] = {"code": code, "message": cast(OpenAIError, body)["error"]["message"]}
        return sse(self._event("response.failed", response=response), "response.failed")

    def drop_media(self) -> None:
        """Drop the data of pictures and sounds, unless it will be kept with the other items."""
        data = [part.data() for part in media_in(self.body)]
        num_bytes = sum(one.num_characters for one in data if isinstance(one, Data))
        if not self._is_kept or num_bytes > self.service.kept.max_bytes:
            self._has_input &= not num_bytes
            super().drop_media()

    async def _keep(self, response: Answer) -> None:
        """Keep the response before its end is sent, so that the next request finds it; in a thread, because this
        takes long.
        """
        body, kept = self.body, self.service.kept

        def keep() -> None:
            asked = None
            if self._has_input:
                asked = [
                    {"type": item.type, **item.model_dump(exclude_unset=True, mode="json")}
                    for item in body.items
                ]  # with the type even where the client omitted it
            has_video = any(part.KIND == "video" for part in media_in(body))
            kept.keep(
                self.caller.tenant, self._id, body.previous_response_id, asked, self._items, answer=response,
                has_video=has_video,
            )  # fmt: skip

        if self._is_kept:
            await asyncio.to_thread(self.caller.work, keep)

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
        """Begin an item with a single part, both empty."""
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
        """End the open item, which is incomplete if the answer was cut off in it."""
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
        """The next event; tests check every kind of event against `Event`."""
        self._number += 1
        return cast(Event, {"type": kind, "sequence_number": self._number - 1, **fields})

    def _at(self) -> Place:
        return {"output_index": len(self._items) - 1, "item_id": self._items[-1]["id"]}

    def _response(self, status: Status) -> Answer:
        body = self.body
        choice, defaults = body.tool_choice, self.service.model.sampling
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {
                "reason": "content_filter" if self._is_filtered else "max_output_tokens",
            } if status == "incomplete" else None,
            "instructions": body.instructions, "model": self.service.model.id,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": self._is_kept,
            "temperature": defaults.temperature if body.temperature is None else body.temperature,
            "top_p": defaults.top_p if body.top_p is None else body.top_p,
            "tool_choice": choice or "auto" if isinstance(choice, str | None) else choice.model_dump(),
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
            "max_output_tokens": limit_of(body.max_output_tokens), "metadata": {}, "usage": self._usage,
            "text": _echoed(body.text) or {"format": {"type": "text"}}, "reasoning": _echoed(body.reasoning),
            "truncation": "disabled", "top_logprobs": body.top_logprobs or 0, "background": False,
        }  # fmt: skip


def _echoed(given: TextOptions | ReasoningOptions | None) -> dict[str, Any]:
    """Echo the options as the client sent them."""
    return {} if given is None else given.model_dump(exclude_unset=True, by_alias=True)


def _item_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


ROUTES = (
    post_route(
        "/v1/responses", responses, Answer, screens="answers", takes_media=True, events=Event, refusals=("404",),
    ),
    post_route(
        "/v1/responses/input_tokens", input_tokens, InputTokens,
        screens="nothing", takes_media=True, refusals=("404",),
    ),
    get_route(
        "/v1/responses/{id}", stored_response, "infer", answer=Answer, query={"stream": {"enum": ["false"]}},
    ),
    Route(
        rule=RouteRule(method="DELETE", path="/v1/responses/{id}", scope="infer", screens="nothing"),
        handler=delete_response, answer=Deleted,
    ),
    get_route("/v1/responses/{id}/input_items", input_items, "infer", answer=InputItems, query=INPUT_ITEMS_QUERY),
)  # fmt: skip
