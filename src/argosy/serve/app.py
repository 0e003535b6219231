"""The table of routes, and the application made of it. What is not in the table is not served.

Elsewhere: what every request passes first is `gate.py`; each dialect has a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import ArgosyError, Overloaded
from argosy.guard.keys import KeyRing
from argosy.guard.limits import Limits
from argosy.serve import anthropic_messages, openai_chat, openai_completions, openai_responses
from argosy.serve.body import StrictRoute, refusal
from argosy.serve.core import Service
from argosy.serve.fields import Flag, Strict, TokenId
from argosy.serve.gate import Gate, GoneAway, Policy, Refused, error_body, error_headers
from argosy.serve.state import Metrics, state_of
from argosy.serve.streams import EventStream, sse

_STATE_S = 0.5
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Route:
    policy: Policy
    handler: Callable[..., Any]


class TokenizeBody(Strict):
    content: Annotated[str, Field(max_length=4 << 20)]
    add_special: Flag = False


class DetokenizeBody(Strict):
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]


class TemplateBody(Strict):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    tools: Annotated[list[dict[str, Any]], Field(max_length=512)] | None = None


async def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


async def ready(request: Request) -> dict[str, str]:
    """It takes requests."""
    if request.app.state.service.is_draining:
        raise Overloaded("the server is stopping", retry_after_s=30)
    return {"status": "ready"}


def _model(service: Service) -> dict[str, Any]:
    model = service.model
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": "argosy",
        "context_length": model.context_tokens, "max_model_len": model.context_tokens,
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    }  # fmt: skip


async def models(request: Request) -> dict[str, Any]:
    """The model that is served."""
    return {"object": "list", "data": [_model(request.app.state.service)]}


async def model(request: Request) -> dict[str, Any]:
    """One model by its id."""
    if request.path_params["id"] != request.app.state.service.model.id:
        raise Refused(404, "there is no such model here")
    return _model(request.app.state.service)


async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """Token ids of a text; none of them is a control token."""
    prompts = request.app.state.service.prompts
    return {"tokens": await asyncio.to_thread(prompts.tokenize, body.content, add_prefix=body.add_special)}


async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
    """Text of token ids."""
    return {"content": await asyncio.to_thread(request.app.state.service.prompts.detokenize, body.tokens)}


async def apply_template(body: TemplateBody, request: Request) -> dict[str, Any]:
    """A conversation as the model's chat template writes it."""
    prompts = request.app.state.service.prompts
    return {"prompt": await asyncio.to_thread(prompts.apply_template, body.messages, tools=body.tools or ())}


def _state(request: Request) -> dict[str, Any]:
    state, key = request.app.state, request.state.caller.key
    return state_of(
        state.service.loop.snapshot(), state.service.model, block_tokens=state.block_tokens,
        max_sequences=state.max_sequences, with_heat=key is not None and "admin" in key.scopes,
    )  # fmt: skip


async def engine_state(request: Request) -> dict[str, Any]:
    """What the engine does."""
    return _state(request)


async def engine_events(request: Request) -> Response:
    """The same, twice a second."""

    async def states() -> AsyncIterator[bytes]:
        while not request.app.state.service.is_draining:
            yield sse(_state(request))
            await asyncio.sleep(_STATE_S)

    return EventStream(states())


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    data = generate_latest(request.app.state.metrics.registry)
    return Response(data, headers={"content-type": CONTENT_TYPE_LATEST})


async def page(request: Request) -> Response:
    """The page, and its files from a fixed table."""
    found = request.app.state.page.get(request.path_params.get("name", "index.html"))
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


def _get(path: str, handler: Callable[..., Any], scope: Any) -> Route:
    return Route(Policy(method="GET", path=path, scope=scope), handler)


def _post(
    path: str, handler: Callable[..., Any], *, is_counted: bool = True, dialect: Any = "openai"
) -> Route:
    return Route(
        Policy(method="POST", path=path, scope="infer", is_counted=is_counted, dialect=dialect), handler
    )


ROUTES = (
    _get("/health", health, None),
    _get("/ready", ready, None),
    _get("/", page, None),
    _get("/page/{name}", page, None),
    _get("/v1/models", models, "infer"),
    _get("/v1/models/{id}", model, "infer"),
    _get("/metrics", metrics, "metrics"),
    _get("/v1/engine/state", engine_state, "metrics"),
    _get("/v1/engine/events", engine_events, "metrics"),
    _post("/tokenize", tokenize),
    _post("/detokenize", detokenize),
    _post("/apply-template", apply_template),
    _post("/v1/chat/completions", openai_chat.chat_completions),
    _post("/v1/completions", openai_completions.completions),
    _post("/v1/responses", openai_responses.responses),
    _post("/v1/messages", anthropic_messages.messages),
    _post("/v1/messages/count_tokens", anthropic_messages.count_tokens),
)


def make_app(
    service: Service,
    ring: KeyRing,
    *,
    block_tokens: int,
    max_sequences: int,
    hosts: Collection[str] = (),
    limits: Limits | None = None,
) -> Gate:
    """The whole server, as an ASGI application."""
    app = FastAPI(title="Argosy", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.page = service, _read_page()
    app.state.block_tokens, app.state.max_sequences = block_tokens, max_sequences
    app.state.metrics = Metrics(service.loop.snapshot)
    app.router.route_class = StrictRoute
    for route in ROUTES:
        app.add_api_route(
            route.policy.path, route.handler, methods=[route.policy.method], response_model=None
        )
    for kind in (ArgosyError, RequestValidationError, HTTPException, GoneAway):
        app.add_exception_handler(kind, _answer_error)
    return Gate(
        app, [route.policy for route in ROUTES], ring, limits or Limits(), hosts=hosts,
        observe=app.state.metrics.observe,
    )  # fmt: skip


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, GoneAway):
        return Response(status_code=499)
    if isinstance(error, RequestValidationError):
        field = request.scope["route"].body_field
        error = refusal(error.errors(), error.body, field and field.field_info.annotation)
    elif isinstance(error, HTTPException):
        cause = error.__cause__  # what reading the body raised
        if isinstance(cause, GoneAway):
            return Response(status_code=499)
        error = (
            cause
            if isinstance(cause, ArgosyError)
            else Refused(error.status_code, "the request cannot be read")
        )
    is_messages = request.scope["path"].startswith("/v1/messages")
    status, body = error_body(error, "anthropic" if is_messages else "openai")
    return JSONResponse(body, status, headers=error_headers(error, status))


__all__ = ["ROUTES", "Route", "make_app"]
