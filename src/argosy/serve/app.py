"""The table of routes and the application built from it. Nothing outside the table is served.

Elsewhere: `http/gate.py` has the checks that every request passes first; each dialect has its own file.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
from collections.abc import Callable, Sequence
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
from argosy.serve.admin import memory
from argosy.serve.admin.cluster import WorkerList, Workers, add_worker, drain_worker, list_workers
from argosy.serve.admin.engine import engine_events, engine_state, metrics
from argosy.serve.admin.erasure import Erasure, erase_data
from argosy.serve.admin.health import Health, Ready, health, ready
from argosy.serve.admin.openapi import document
from argosy.serve.admin.state import EngineState, MemoryState, Metrics
from argosy.serve.answer.service import Service
from argosy.serve.dialects import (
    anthropic_messages,
    llama_infill,
    llama_server,
    ollama,
    ollama_models,
    openai_audio,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    rerank,
)
from argosy.serve.dialects.body import answering
from argosy.serve.dialects.form import answering_form
from argosy.serve.dialects.openai_models import Model, ModelList, model, models
from argosy.serve.dialects.tokens import (
    Detokenized,
    Rendered,
    Tokenized,
    TokenizerInfo,
    apply_template,
    detokenize,
    tokenize,
    tokenizer_info,
)
from argosy.serve.governance import Governance
from argosy.serve.http.access import RouteRule, dialect_of
from argosy.serve.http.failures import (
    AnthropicError,
    OllamaError,
    OpenAIError,
    Refused,
    error_body,
    error_headers,
)
from argosy.serve.http.gate import Gate
from argosy.serve.http.origins import Site
from argosy.serve.http.page import PAGE_TYPES, docs, favicon, page, page_file, read_page
from argosy.serve.http.route import Route, admin_route, get_route, post_route
from argosy.serve.http.running import GoneAway, Running
from argosy.serve.http.streams import JSON_LINES
from argosy.serve.models.models import Models


async def openapi(request: Request) -> Response:
    """This document."""
    text = await asyncio.to_thread(_document, request.app.state.base_path)
    return Response(text, media_type="application/json")


def _form(path: str, handler: Callable[..., Any], **described: Any) -> Route:
    rule = RouteRule(
        method="POST", path=path, scope="infer", screens="texts", is_counted=True, takes_form=True,
        max_body_bytes=openai_audio.MOST_BODY_BYTES,
    )  # fmt: skip
    return Route(rule=rule, handler=handler, answer=openai_audio.Answer, media=("text/plain",), **described)


def new_governance() -> Governance:
    """The default governance of a server."""
    return Governance() if GUARDS is None else GUARDS.Governing()


def _governed(path: str) -> Sequence[Route]:
    return () if GUARDS is None else GUARDS.ROUTES[path]


# The folder `guards/` may be missing; only this place looks for it.
GUARDS: Any = (
    importlib.import_module("argosy.serve.guards.governing") if find_spec("argosy.serve.guards") else None
)
_FILES = tuple(PAGE_TYPES.values())
ROUTES = (
    get_route("/health", health, None, answer=Health),
    get_route("/ready", ready, None, answer=Ready),
    get_route("/openapi.json", openapi, None, answer=dict[str, Any]),
    get_route("/", page, None, media=_FILES[:1]),
    get_route("/docs", docs, None, media=_FILES[:1]),
    get_route("/favicon.ico", favicon, None, media=(PAGE_TYPES["svg"],)),
    get_route("/page/{name}", page_file, None, media=_FILES),
    get_route("/v1/models", models, "infer", answer=ModelList),
    get_route("/v1/models/{id}", model, "infer", answer=Model, ends_in_name=True),
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
    post_route("/tokenize", tokenize, Tokenized, screens="nothing", takes_media=True),
    post_route("/detokenize", detokenize, Detokenized, screens="nothing"),
    get_route("/tokenizer_info", tokenizer_info, "infer", answer=TokenizerInfo, refusals=("404",)),
    post_route("/apply-template", apply_template, Rendered, screens="nothing", takes_media=True),
    post_route(
        "/v1/chat/completions", openai_chat.chat_completions, openai_chat.ChatCompletion, screens="answers",
        takes_media=True, events=openai_chat.ChatChunk | OpenAIError, has_done=True,
    ),
    post_route(
        "/v1/completions", openai_completions.completions, openai_completions.Completion, screens="answers",
        events=openai_completions.Completion | OpenAIError, has_done=True,
    ),
    post_route("/v1/embeddings", openai_embeddings.embeddings, openai_embeddings.Embeddings, screens="texts"),
    post_route("/v1/rerank", rerank.rerank, rerank.Reranked, screens="texts", refusals=("404",)),
    post_route("/rerank", rerank.rerank, rerank.Reranked, screens="texts", refusals=("404",)),
    *_governed("/v1/moderations"),
    post_route(
        "/v1/responses", openai_responses.responses, openai_responses.Answer, screens="answers", takes_media=True,
        events=openai_responses.Event, refusals=("404",),
    ),
    post_route(
        "/v1/responses/input_tokens", openai_responses.input_tokens, openai_responses.InputTokens,
        screens="nothing", takes_media=True, refusals=("404",),
    ),
    get_route(
        "/v1/responses/{id}", openai_responses.stored_response, "infer", answer=openai_responses.Answer,
        query={"stream": {"enum": ["false"]}},
    ),
    Route(
        rule=RouteRule(method="DELETE", path="/v1/responses/{id}", scope="infer", screens="nothing"),
        handler=openai_responses.delete_response, answer=openai_responses.Deleted,
    ),
    get_route(
        "/v1/responses/{id}/input_items", openai_responses.input_items, "infer", answer=openai_responses.InputItems,
        query=openai_responses.INPUT_ITEMS_QUERY,
    ),
    post_route(
        "/v1/messages", anthropic_messages.messages, anthropic_messages.Message, screens="answers", takes_media=True,
        events=anthropic_messages.Event | AnthropicError,
    ),
    _form("/v1/audio/transcriptions", openai_audio.transcriptions, events=openai_audio.Event | OpenAIError),
    _form("/v1/audio/translations", openai_audio.translations),
    post_route(
        "/v1/messages/count_tokens", anthropic_messages.count_tokens, anthropic_messages.Counted, screens="nothing",
        takes_media=True,
    ),
    post_route(
        "/api/chat", ollama.chat, ollama.ChatLine, screens="answers", takes_media=True,
        events=ollama.ChatLine | OllamaError, encoding=JSON_LINES,
    ),
    post_route(
        "/api/generate", ollama.generate, ollama.GenerateLine, screens="answers", takes_media=True,
        events=ollama.GenerateLine | OllamaError, encoding=JSON_LINES,
    ),
    post_route("/api/embed", ollama.embed, ollama.OllamaEmbeddings, screens="texts"),
    post_route("/api/embeddings", ollama.old_embed, ollama.OldEmbedding, screens="texts"),
    post_route("/api/show", ollama_models.show, ollama_models.Shown, screens="nothing"),
    get_route("/api/tags", ollama_models.tags, "infer", answer=ollama_models.OllamaModels),
    get_route("/api/ps", ollama_models.ps, "infer", answer=ollama_models.LoadedModels),
    get_route("/api/version", ollama_models.api_version, None, answer=ollama_models.ApiVersion),
    post_route(
        "/infill", llama_infill.infill, llama_infill.Filled, screens="answers",
        events=llama_infill.InfillPiece | llama_infill.Filled | OpenAIError,
    ),
    get_route(
        "/props", llama_server.props, "infer", answer=llama_server.Props, query=llama_server.MODEL_QUERY,
        refusals=("404",),
    ),
    get_route(
        "/slots", llama_server.slots, "metrics", answer=list[llama_server.Slot], query=llama_server.MODEL_QUERY,
        refusals=("404",),
    ),
)  # fmt: skip


@functools.cache
def _document(base_path: str) -> str:
    """Build the document on first use, because it takes a tenth of a second, which would delay the start."""
    return json.dumps(document(ROUTES, version("argosy"), base_path=base_path))


def make_app(
    served: Models | Service,
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
        served: the models, or the service of the only one.
        governance: policies, the audit, and what users are told; None: no policies, and nothing is recorded.
        workers: machines that run experts for the model; None: it runs alone.
        co2_grams_per_kwh: emissions of the electricity used; None: unknown.
        memory_watch: keeps the budget within limits; None: it changes only on request.

    Raises:
        UsageError: a policy asks a model that the server does not have.
    """
    models = served if isinstance(served, Models) else Models.of(served)
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
        answer = answering_form if route.rule.takes_form else answering
        endpoint = answer(route.handler, route.body)
        path = route.rule.path
        if route.rule.ends_in_name:
            path = path.removesuffix("}") + ":path}"
        app.add_route(path, endpoint, methods=[route.rule.method])
    for kind in (ArgosyError, HTTPException, GoneAway, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Gate(
        app, [route.rule for route in ROUTES], ring, limits or Limits(), site=site, hints=ollama.HINTS,
        takes_media=models.takes_media, observe=app.state.metrics.observe, running=running,
        hooks=[*governance.hooks, app.state.metrics.answers],
    )  # fmt: skip


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, GoneAway):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, "the request cannot be read")
    status, body = error_body(error, dialect_of(request.scope["path"]), request.state.caller.request_id)
    return JSONResponse(body, status, headers=error_headers(error, status))
