"""The table of routes, and the application built from it. Nothing outside the table is served.

Elsewhere: the checks that every request passes first are `gate.py`; each dialect has its own file.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.guard.keys import KeyRing
from argosy.guard.keys import Scope as KeyScope
from argosy.guard.limits import Limits
from argosy.media.parts import Hearing, Kind
from argosy.observe.live import LiveCache
from argosy.prompt.prompt import ToolCalling
from argosy.serve import anthropic_messages, openai_audio, openai_chat, openai_completions, openai_responses
from argosy.serve.body import answering
from argosy.serve.core import Service
from argosy.serve.fields import MAX_TOKENS, Closed, Flag, Messages, Strict, Text, TokenId, Tools, few
from argosy.serve.form import answering_form
from argosy.serve.gate import (
    AnthropicError,
    Caller,
    Gate,
    GoneAway,
    OpenAIError,
    Policy,
    Refused,
    dialect_of,
    error_body,
    error_headers,
)  # fmt: skip
from argosy.serve.openapi import Route, document
from argosy.serve.rules import exactly_one
from argosy.serve.state import Compare, EngineState, Metrics, state_of
from argosy.serve.streams import EventStream, sse

_STATE_S = 0.5
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}


class TokenizeBody(Strict):
    """The text, as `content` (llama.cpp's name) or as `prompt` (vLLM's name)."""

    RULES = (exactly_one("content", "prompt"),)

    content: Text | None = None
    prompt: Text | None = None
    add_special: Flag = False
    add_special_tokens: Flag = False
    model: str | None = Field(None, max_length=256)

    @property
    def text(self) -> str:
        given = [text for text in (self.content, self.prompt) if text is not None]
        if len(given) != 1:
            raise UsageError(
                f"expected either content or prompt, found {len(given)} of them", param="content"
            )
        return given[0]


class DetokenizeBody(Strict):
    tokens: Annotated[list[TokenId], few(MAX_TOKENS)]
    model: str | None = Field(None, max_length=256)


class TemplateBody(Strict):
    messages: Annotated[list[openai_chat.Turn], Messages] = Field(examples=openai_chat.EXAMPLES)
    tools: Annotated[list[openai_chat.OfferedTool], Tools] | None = None


class Health(Closed):
    status: Literal["ok"]


class Ready(Closed):
    status: Literal["ready"]


class Modalities(Closed):
    input_modalities: list[str]
    output_modalities: list[str]


class Capabilities(Closed):
    """How tools and sounds reach the model.

    tools: `native` by its chat template, `generic` by a generic prompt, `none` not at all.
    sound: `native` if the model hears, `transcript` if it reads what a transcriber heard, `none` if it takes no sound.
    """

    tools: ToolCalling
    sound: Hearing


class Model(Closed):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int
    architecture: Modalities
    supported_parameters: list[str]
    capabilities: Capabilities


class Models(Closed):
    object: Literal["list"]
    data: list[Model]


class Tokenized(Closed):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Closed):
    content: str
    prompt: str


class TokenizerInfo(Closed):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Rendered(Closed):
    prompt: str


async def health(request: Request) -> Health:
    """Check that the process works: 503 if the engine has failed for good and the server must be restarted."""
    _require_engine(request.app.state.service)
    return {"status": "ok"}


async def openapi(request: Request) -> Response:
    """This document."""
    return Response(await asyncio.to_thread(_document), media_type="application/json")


async def ready(request: Request) -> Ready:
    """Check that the server accepts requests."""
    service: Service = request.app.state.service
    if service.is_draining:
        raise Overloaded("the server is stopping", retry_after_s=30)
    _require_engine(service)
    return {"status": "ready"}


def _require_engine(service: Service) -> None:
    if service.loop.snapshot().has_failed:
        raise Overloaded("the engine has failed", retry_after_s=30, hint="restart the server")


# The names that OpenRouter's clients look for; tools and reasoning effort are added if the model supports them.
_PARAMETERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs", "response_format", "structured_outputs",
)  # fmt: skip
_TOOL_PARAMETERS = ("tools", "tool_choice", "parallel_tool_calls")
_MODALITIES: Mapping[Kind, str] = {"picture": "image", "sound": "audio", "video": "video"}


def _model(service: Service) -> Model:
    """Describe the model. The first call renders its chat template, so run it in a thread."""
    model, tools = service.model, service.prompts.tool_calling
    more = [*(() if tools == "none" else _TOOL_PARAMETERS)]
    more += ["reasoning_effort"] if service.has_efforts else []
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": "argosy",
        "context_length": model.context_tokens, "max_model_len": model.context_tokens,
        "architecture": {
            "input_modalities": ["text", *(_MODALITIES[kind] for kind in model.media_kinds)],
            "output_modalities": ["text"],
        },
        "supported_parameters": [*_PARAMETERS, *more], "capabilities": {"tools": tools, "sound": model.hears},
    }  # fmt: skip


_EARS_PARAMETERS = (
    "language",
    "prompt",
    "response_format",
    "stream",
    "temperature",
    "timestamp_granularities[]",
)


def _ears(service: Service) -> Model:
    """Describe the model that transcribes."""
    assert service.ears is not None
    context_tokens = service.ears.files.config.text_positions
    return {
        "id": service.ears_id, "object": "model", "created": service.model.created, "owned_by": "argosy",
        "context_length": context_tokens, "max_model_len": context_tokens,
        "architecture": {"input_modalities": ["audio"], "output_modalities": ["text"]},
        "supported_parameters": list(_EARS_PARAMETERS), "capabilities": {"tools": "none", "sound": "native"},
    }  # fmt: skip


async def models(request: Request) -> Models:
    """List the served model, and the one that transcribes if there is one."""
    service: Service = request.app.state.service
    found = [await asyncio.to_thread(_model, service)]
    return {"object": "list", "data": found if service.ears is None else [*found, _ears(service)]}


async def model(request: Request) -> Model:
    """Describe the model with this id."""
    service: Service = request.app.state.service
    name = request.path_params["id"]
    if service.ears is not None and name == service.ears_id:
        return _ears(service)
    service.require_model(name)
    return await asyncio.to_thread(_model, service)


async def tokenize(body: TokenizeBody, request: Request) -> Tokenized:
    """Tokenize a text. Nothing in the text becomes a control token."""
    service: Service = request.app.state.service
    has_prefix = body.add_special or body.add_special_tokens
    caller: Caller = request.state.caller
    tokens = await service.run(caller, service.prompts.tokenize, body.text, add_prefix=has_prefix)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.context_tokens}


async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
    """Turn token ids into text."""
    service: Service = request.app.state.service
    text = await service.run(request.state.caller, service.prompts.detokenize, body.tokens)
    return {"content": text, "prompt": text}


async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Show special tokens and chat template, for clients that leave tokenizing to the server."""
    service: Service = request.app.state.service
    if service.tokenizer is None:
        raise Refused(404, "this model has no tokenizer")
    special = service.tokenizer.special_tokens
    return {
        "bos_token": special.get("bos_token"), "eos_token": special.get("eos_token"),
        "pad_token": special.get("pad_token"), "chat_template": service.tokenizer.chat_template,
    }  # fmt: skip


async def apply_template(body: TemplateBody, request: Request) -> Rendered:
    """Render a conversation with the model's chat template."""
    service: Service = request.app.state.service
    caller: Caller = request.state.caller

    def apply() -> str:
        intake = service.intake(caller)
        said = openai_chat.sent(body.messages, intake)
        caller.files.require_all()
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
        return service.prompts.apply_template(
            said, tools=tools, replace_damaged=intake.replaced.replace_damaged
        )

    return {"prompt": await service.run_reading(caller, apply)}


def _state(request: Request) -> EngineState:
    state, key = request.app.state, request.state.caller.key
    return state_of(
        state.service.loop.snapshot(), state.service.model, block_tokens=state.block_tokens,
        max_sequences=state.max_sequences, with_heat=key is not None and "admin" in key.scopes,
        recent=None if state.recent_cache is None else state.recent_cache(),
    )  # fmt: skip


async def engine_state(request: Request) -> EngineState:
    """Show the state of the engine."""
    return _state(request)


async def engine_events(request: Request) -> Response:
    """Stream the state of the engine, twice a second."""

    async def states() -> AsyncIterator[bytes]:
        while not request.app.state.service.is_draining:
            yield sse(_state(request))
            await asyncio.sleep(_STATE_S)

    return EventStream(states(), request.state.caller)


async def metrics(request: Request) -> Response:
    """Show metrics for Prometheus."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    data = generate_latest(request.app.state.metrics.registry)
    return Response(data, headers={"content-type": CONTENT_TYPE_LATEST})


async def page(request: Request) -> Response:
    """Show the chat page."""
    return _file(request, "index.html")


async def favicon(request: Request) -> Response:
    """Show the page's icon, at the path where browsers look for it by default."""
    return _file(request, "icon.svg")


async def page_file(request: Request) -> Response:
    """Send a file of the chat page, from a fixed table."""
    return _file(request, request.path_params["name"])


def _file(request: Request, name: str) -> Response:
    found = request.app.state.page.get(name)
    if found is None:
        raise Refused(404, "there is no such file")
    return Response(found[0], media_type=found[1])


def _read_page() -> dict[str, tuple[bytes, str]]:
    folder = files("argosy.serve").joinpath("page")
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        kind = _PAGE_TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            found[entry.name] = (entry.read_bytes(), kind)
    return found


def _get(path: str, handler: Callable[..., Any], scope: KeyScope | None, **described: Any) -> Route:
    return Route(policy=Policy(method="GET", path=path, scope=scope), handler=handler, **described)


def _post(
    path: str, handler: Callable[..., Any], answer: Any, *, takes_media: bool = False, **described: Any
) -> Route:
    policy = Policy(method="POST", path=path, scope="infer", is_counted=True, takes_media=takes_media)
    return Route(policy=policy, handler=handler, answer=answer, **described)


def _form(path: str, handler: Callable[..., Any], **described: Any) -> Route:
    policy = Policy(
        method="POST", path=path, scope="infer", is_counted=True, takes_form=True,
        max_body_bytes=openai_audio.MOST_BODY_BYTES,
    )  # fmt: skip
    return Route(
        policy=policy, handler=handler, answer=openai_audio.Answer, media=("text/plain",), **described
    )


_FILES = tuple(_PAGE_TYPES.values())
ROUTES = (
    _get("/health", health, None, answer=Health),
    _get("/ready", ready, None, answer=Ready),
    _get("/openapi.json", openapi, None, answer=dict[str, Any]),
    _get("/", page, None, media=_FILES[:1]),
    _get("/favicon.ico", favicon, None, media=(_PAGE_TYPES["svg"],)),
    _get("/page/{name}", page_file, None, media=_FILES),
    _get("/v1/models", models, "infer", answer=Models),
    _get("/v1/models/{id}", model, "infer", answer=Model),
    _get("/metrics", metrics, "metrics", media=("text/plain",)),
    _get("/v1/engine/state", engine_state, "metrics", answer=EngineState),
    _get("/v1/engine/events", engine_events, "metrics", events=EngineState),
    _post("/tokenize", tokenize, Tokenized),
    _post("/detokenize", detokenize, Detokenized),
    _get("/tokenizer_info", tokenizer_info, "infer", answer=TokenizerInfo, refusals=("404",)),
    _post("/apply-template", apply_template, Rendered, takes_media=True),
    _post(
        "/v1/chat/completions", openai_chat.chat_completions, openai_chat.ChatCompletion,
        takes_media=True, events=openai_chat.ChatChunk | OpenAIError, has_done=True,
    ),
    _post(
        "/v1/completions", openai_completions.completions, openai_completions.Completion,
        events=openai_completions.Completion | OpenAIError, has_done=True,
    ),
    _post(
        "/v1/responses", openai_responses.responses, openai_responses.Answer, takes_media=True,
        events=openai_responses.Event, refusals=("404",),
    ),
    _post(
        "/v1/responses/input_tokens", openai_responses.input_tokens, openai_responses.InputTokens,
        takes_media=True, refusals=("404",),
    ),
    _post(
        "/v1/messages", anthropic_messages.messages, anthropic_messages.Message, takes_media=True,
        events=anthropic_messages.Event | AnthropicError,
    ),
    _form("/v1/audio/transcriptions", openai_audio.transcriptions, events=openai_audio.Event | OpenAIError),
    _form("/v1/audio/translations", openai_audio.translations),
    _post(
        "/v1/messages/count_tokens", anthropic_messages.count_tokens, anthropic_messages.Counted, takes_media=True,
    ),
)  # fmt: skip


@functools.cache
def _document() -> str:
    """Build the document on first use: it takes a tenth of a second, which would delay the start."""
    return json.dumps(document(ROUTES, version("argosy")))


def make_app(
    service: Service,
    ring: KeyRing,
    *,
    block_tokens: int,
    max_sequences: int,
    hosts: Collection[str] = (),
    limits: Limits | None = None,
    recent_cache: LiveCache | None = None,
    compare: Compare | None = None,
) -> Gate:
    """Build the whole server as an ASGI application.

    Args:
        recent_cache: tells the hit rate of the last minutes; None: nothing is recorded, or every expert is resident.
        compare: puts predictions beside recent decode steps; None: nothing is predicted.
    """
    app = Starlette()
    app.state.service, app.state.page = service, _read_page()
    app.state.block_tokens, app.state.max_sequences = block_tokens, max_sequences
    app.state.recent_cache = recent_cache
    app.state.metrics = Metrics(service.loop.snapshot, compare)
    for route in ROUTES:
        answer = answering_form if route.policy.takes_form else answering
        endpoint = answer(route.handler, route.body)
        app.add_route(route.policy.path, endpoint, methods=[route.policy.method])
    for kind in (ArgosyError, HTTPException, GoneAway, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Gate(
        app, [route.policy for route in ROUTES], ring, limits or Limits(), hosts=hosts,
        takes_media=bool(service.model.media_kinds), observe=app.state.metrics.observe,
    )  # fmt: skip


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, GoneAway):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, "the request cannot be read")
    status, body = error_body(error, dialect_of(request.scope["path"]), request.state.caller.request_id)
    return JSONResponse(body, status, headers=error_headers(error, status))
