"""The table of routes and the application built from it. Nothing outside the table is served.

Elsewhere: `http/gate.py` has the checks that every request passes first; each dialect has its own file.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import ArgosyError
from argosy.guard.keys import KeyRing
from argosy.guard.limits import Limits
from argosy.installed import members
from argosy.serve.admin import memory
from argosy.serve.admin.cluster import WorkerList, Workers, add_worker, drain_worker, list_workers
from argosy.serve.admin.engine import engine_events, engine_state, metrics
from argosy.serve.admin.erasure import Erasure, erase_data
from argosy.serve.admin.health import Health, Ready, health, ready
from argosy.serve.admin.openapi import document
from argosy.serve.admin.state import EngineState, MemoryState, Metrics
from argosy.serve.dialects.body import answering
from argosy.serve.governance import Governance
from argosy.serve.http.access import RouteRule, dialect_of
from argosy.serve.http.failures import (
    Refused,
    error_body,
    error_headers,
)
from argosy.serve.http.gate import Gate
from argosy.serve.http.origins import Site
from argosy.serve.http.page import PAGE_TYPES, docs, favicon, page, page_file, read_page
from argosy.serve.http.route import Route, admin_route, get_route
from argosy.serve.http.running import GoneAway, Running
from argosy.serve.models.models import Models


async def openapi(request: Request) -> Response:
    """This document."""
    text = await asyncio.to_thread(_document, request.app.state.base_path)
    return Response(text, media_type="application/json")


def _of(*dialects: str) -> Iterator[Route]:
    """The routes of these dialects."""
    for dialect in members("argosy.serve.dialects", dialects):
        yield from dialect.ROUTES


def new_governance() -> Governance:
    """The default governance of a server."""
    return Governance() if GUARDS is None else GUARDS.Governing()


def _governed(path: str) -> Sequence[Route]:
    return () if GUARDS is None else GUARDS.ROUTES[path]


# The folder `guards/` may be missing; only this place looks for it.
GUARDS: Any = (
    importlib.import_module("argosy.serve.guards.governing") if find_spec("argosy.serve.guards") else None
)
# For a path that is not in the table, what to do instead.
_HINTS: Mapping[str, str] = {
    path: hint
    for ollama in members("argosy.serve.dialects", ("ollama",))
    for path, hint in ollama.HINTS.items()
}
_FILES = tuple(PAGE_TYPES.values())
ROUTES = (
    get_route("/health", health, None, answer=Health),
    get_route("/ready", ready, None, answer=Ready),
    get_route("/openapi.json", openapi, None, answer=dict[str, Any]),
    get_route("/", page, None, media=_FILES[:1]),
    get_route("/docs", docs, None, media=_FILES[:1]),
    get_route("/favicon.ico", favicon, None, media=(PAGE_TYPES["svg"],)),
    get_route("/page/{name}", page_file, None, media=_FILES),
    *_of("openai_models"),
    get_route("/metrics", metrics, "metrics", media=("text/plain",)),
    get_route("/v1/engine/state", engine_state, "metrics", answer=EngineState),
    get_route("/v1/engine/events", engine_events, "metrics", events=EngineState),
    get_route("/v1/cluster", list_workers, "metrics", answer=WorkerList),
    admin_route("/v1/cluster/add", add_worker, WorkerList, refusals=("409",)),
    admin_route("/v1/cluster/drain", drain_worker, WorkerList, refusals=("409",)),
    Route(
        rule=RouteRule(method="DELETE", path="/v1/engine/data/{key}", scope="admin", screens="nothing"),
        handler=erase_data, answer=Erasure, refusals=("404",),
    ),
    *_governed("/v1/engine/transparency"),
    *_governed("/v1/engine/stops")[:1],
    admin_route("/v1/engine/memory", memory.resize, MemoryState, refusals=("409",)),
    *_governed("/v1/engine/stops")[1:],
    *_of("tokens", "openai_chat", "openai_completions", "openai_embeddings", "rerank"),
    *_governed("/v1/moderations"),
    *_of("openai_responses", "anthropic_messages", "openai_audio"),
    *_of("ollama", "ollama_models", "llama_infill", "llama_server", "lora_adapters"),
)  # fmt: skip


@functools.cache
def _document(base_path: str) -> str:
    """Build the document on first use, because it takes a tenth of a second, which would delay the start."""
    return json.dumps(document(ROUTES, version("argosy"), base_path=base_path))


def make_app(
    models: Models,
    ring: KeyRing,
    *,
    block_tokens: int,
    max_sequences: int,
    site: Site | None = None,
    limits: Limits | None = None,
    governance: Governance | None = None,
    workers: Workers | None = None,
    co2_grams_per_kwh: float | None = None,
    memory_watch: memory.MemoryWatch | None = None,
) -> Gate:
    """Build the whole server as an ASGI application.

    Args:
        governance: policies, the audit, and what users are told; None: no policies, and nothing is recorded.
        workers: machines that run experts for the model; None: it runs alone.
        co2_grams_per_kwh: emissions of the electricity used; None: unknown.
        memory_watch: keeps the budget within limits; None: it changes only on request.

    Raises:
        UsageError: a policy asks a model that the server does not have.
    """
    site = Site() if site is None else site
    governance = new_governance() if governance is None else governance
    running = Running(governance.why_not)
    app = Starlette()
    app.state.governance = governance
    app.state.models, app.state.page = models, read_page()
    app.state.block_tokens, app.state.max_sequences = block_tokens, max_sequences
    app.state.base_path = site.base_path
    app.state.metrics = Metrics(models, workers, co2_grams_per_kwh=co2_grams_per_kwh)
    app.state.memory_watch = memory.MemoryWatch(models) if memory_watch is None else memory_watch
    app.state.workers, app.state.ring = workers, ring
    app.state.running = running
    governance.join(models, running, app.state.metrics.registry)
    for route in ROUTES:
        endpoint = _endpoint(route)
        path = route.rule.path
        if route.rule.ends_in_name:
            path = path.removesuffix("}") + ":path}"
        app.add_route(path, endpoint, methods=[route.rule.method])
    for kind in (ArgosyError, HTTPException, GoneAway, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Gate(
        app, [route.rule for route in ROUTES], ring, limits or Limits(), site=site, hints=_HINTS,
        takes_media=models.takes_media, observe=app.state.metrics.observe, running=running,
        hooks=[*governance.hooks, app.state.metrics.answers],
    )  # fmt: skip


def _endpoint(route: Route) -> Callable[[Request], Awaitable[Response]]:
    if not route.rule.takes_form:
        return answering(route.handler, route.body)
    from argosy.serve.dialects.form import answering_form  # without forms, a server needs no parser of them

    return answering_form(route.handler, route.body)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, GoneAway):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, "the request cannot be read")
    status, body = error_body(error, dialect_of(request.scope["path"]), request.state.caller.request_id)
    return JSONResponse(body, status, headers=error_headers(error, status))
