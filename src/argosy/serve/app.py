"""The table of routes, and the application built from it. Nothing outside the table is served.

Elsewhere: the checks that every request passes first are `http/gate.py`; each dialect has its own file.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import SamplingParams
from argosy.engine.loop import SILENT_S
from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.guard.keys import KeyRing, is_key_id
from argosy.guard.keys import Scope as KeyScope
from argosy.guard.limits import Limits
from argosy.media.parts import Hearing, Kind
from argosy.prompt.prompt import ToolCalling
from argosy.prompt.thinking import ThinkingSwitch
from argosy.serve.admin import memory, stops
from argosy.serve.admin.cluster import WorkerList, Workers, add_worker, drain_worker, list_workers
from argosy.serve.admin.openapi import Route, document
from argosy.serve.admin.state import EngineState, MemoryState, Metrics, state_of
from argosy.serve.admin.transparency import Practice, Transparency, transparency
from argosy.serve.answer.core import ChatRequest, Service, service_of
from argosy.serve.answer.fields import (
    MAX_TOKENS,
    Closed,
    Effort,
    Flag,
    Messages,
    Strict,
    Text,
    TokenId,
    Tools,
    few,
)
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.rules import exactly_one
from argosy.serve.answer.running import GoneAway, Running
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
    openai_moderations,
    openai_responses,
    rerank,
)
from argosy.serve.guards.audited import Auditor
from argosy.serve.guards.check_by_model import ModelJudge
from argosy.serve.guards.screening import Guarding
from argosy.serve.http.body import answering
from argosy.serve.http.form import answering_form
from argosy.serve.http.gate import (
    AnthropicError,
    Caller,
    Gate,
    OllamaError,
    OpenAIError,
    Policy,
    Refused,
    Screens,
    dialect_of,
    error_body,
    error_headers,
)  # fmt: skip
from argosy.serve.http.origins import Origins
from argosy.serve.http.streams import JSON_LINES, EventStream, sse
from argosy.serve.models.models import Listing, Models, State, models_of, use_model

_STATE_S = 0.5
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}


class TokenizeBody(Strict):
    """A text, as `content` (llama.cpp's name) or as `prompt` (vLLM's name), or a conversation, as vLLM has it."""

    RULES = (exactly_one("content", "prompt", "messages"),)

    content: Text | None = Field(None, examples=["Hello"])
    prompt: Text | None = None
    add_special: Flag = False
    add_special_tokens: Flag = False
    messages: Annotated[list[openai_chat.Turn], Messages] | None = None
    tools: Annotated[list[openai_chat.OfferedTool], Tools] | None = None
    add_generation_prompt: Flag = True
    enable_thinking: Flag | None = None
    reasoning_effort: Effort | None = None
    model: str | None = Field(None, max_length=256)

    @property
    def text(self) -> str | None:
        """None: it is a conversation."""
        given = [one for one in (self.content, self.prompt, self.messages) if one is not None]
        if len(given) != 1:
            raise UsageError(
                f"expected one of content, prompt and messages, found {len(given)} of them", param="content"
            )
        return self.prompt if self.content is None else self.content

    def request(self, intake: Intake) -> ChatRequest:
        """The conversation."""
        return ChatRequest(
            messages=openai_chat.sent(self.messages or (), intake), replaced=intake.replaced, params=SamplingParams(),
            tools=[tool.model_dump(exclude_unset=True) for tool in self.tools or ()], thinks=self.enable_thinking,
            effort=self.reasoning_effort,
        )  # fmt: skip


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
    """How tools and sounds reach the model, and what a request may choose.

    tools: `native` by its chat template, `generic` by a generic prompt, `none` not at all.
    thinking: `on-off` (enable_thinking), `efforts` (reasoning_effort), `both` or `none`; null: the model's template was
        not read yet.
    sound: `native` if the model hears, `transcript` if it reads what a transcriber heard, `none` if it takes no sound.
    """

    tools: ToolCalling
    thinking: ThinkingSwitch | None
    sound: Hearing


class DefaultParameters(Closed):
    """How tokens are chosen where a request does not say."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


class Model(Closed):
    """A model of the server.

    state: `ready` in memory, `loading`, `unloaded` until a request needs it, `failed` if it could not be opened.
    default_parameters: of models that answer; the one that transcribes has none.
    parent: of a preset, the id of its model.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int
    architecture: Modalities
    supported_parameters: list[str]
    capabilities: Capabilities
    state: State
    default_parameters: NotRequired[DefaultParameters]
    parent: NotRequired[str]


class ModelList(Closed):
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
    """Check that the process works: 503 if the engine has failed for good and the server must be restarted.

    It answers from the event loop alone, and waits for nothing.
    """
    _require_engines(models_of(request))
    return {"status": "ok"}


async def openapi(request: Request) -> Response:
    """This document."""
    text = await asyncio.to_thread(_document, request.app.state.base_path)
    return Response(text, media_type="application/json")


async def ready(request: Request) -> Ready:
    """Check that the server accepts requests: every engine and every queue in front of them has moved lately."""
    models = models_of(request)
    if models.is_draining:
        raise Overloaded("the server is stopping", retry_after_s=30)
    _require_engines(models)
    for service in models.services():
        if (silent_s := service.loop.snapshot().silent_s) > SILENT_S:
            raise Overloaded(
                f"the engine of {service.model.id} has shown no sign of life for {silent_s:.0f} s",
                retry_after_s=30,
                hint="restart the server if this lasts",
            )
    served = (models.work, request.app.state.guarding, *models.services())
    if any(one.has_stopped for one in served):
        raise Overloaded(
            "requests wait for a thread that does not come",
            retry_after_s=30,
            hint="restart the server if this lasts",
        )
    return {"status": "ready"}


def _require_engines(models: Models) -> None:
    if any(service.loop.snapshot().has_failed for service in models.services()):
        raise Overloaded("the engine has failed", retry_after_s=30, hint="restart the server")


# The names that OpenRouter's clients look for; tools and reasoning effort are added if the model supports them.
_PARAMETERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs", "response_format", "structured_outputs",
)  # fmt: skip
_TOOL_PARAMETERS = ("tools", "tool_choice", "parallel_tool_calls")
_MODALITIES: Mapping[Kind, str] = {"picture": "image", "sound": "audio", "video": "video"}


def _model(listing: Listing) -> Model:
    model, tools = listing.facts, listing.abilities.tools
    more = [*(() if tools == "none" else _TOOL_PARAMETERS)]
    thinking = listing.abilities.thinking
    more += [] if thinking in (None, "none") else ["reasoning_effort"]
    described: Model = {
        "id": model.id, "object": "model", "created": model.created, "owned_by": "argosy",
        "context_length": model.context_tokens, "max_model_len": model.context_tokens,
        "architecture": {
            "input_modalities": ["text", *(_MODALITIES[kind] for kind in model.media_kinds)],
            "output_modalities": ["text"],
        },
        "supported_parameters": [*_PARAMETERS, *more],
        "capabilities": {"tools": tools, "thinking": thinking, "sound": model.hears},
        "state": listing.state, "default_parameters": cast(DefaultParameters, model.sampling.as_dict()),
    }  # fmt: skip
    if model.preset is not None:
        described["parent"] = model.preset.model
    return described


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
        "supported_parameters": list(_EARS_PARAMETERS),
        "capabilities": {"tools": "none", "thinking": "none", "sound": "native"},
        "state": "ready",
    }  # fmt: skip


async def models(request: Request) -> ModelList:
    """List the models of the server and their presets, and the one that transcribes if there is one."""
    found = models_of(request)
    await found.look()
    data = [_model(listing) for listing in await asyncio.to_thread(found.listed)]
    if (hearing := found.hearing()) is not None:
        data.append(_ears(hearing))
    return {"object": "list", "data": data}


async def model(request: Request) -> Model:
    """Describe the model with this id."""
    found = models_of(request)
    name = request.path_params["id"]
    hearing = found.hearing()
    if hearing is not None and name == hearing.ears_id:
        return _ears(hearing)
    await found.look(name)
    (listing,) = await asyncio.to_thread(found.listed, name)
    return _model(listing)


async def tokenize(body: TokenizeBody, request: Request) -> Tokenized:
    """Tokenize a text, in which nothing becomes a control token, or a conversation."""
    service = service_of(request)
    has_prefix = body.add_special or body.add_special_tokens
    caller: Caller = request.state.caller
    if (text := body.text) is None:
        found, _ = await service.tokenize(
            lambda: body.request(service.intake(caller)), caller, opens_answer=body.add_generation_prompt
        )
        tokens = list(found)
    else:
        tokens = await service.run(caller, service.prompts.tokenize, text, add_prefix=has_prefix)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.context_tokens}


async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
    """Turn token ids into text."""
    service = service_of(request)
    text = await service.run(request.state.caller, service.prompts.detokenize, body.tokens)
    return {"content": text, "prompt": text}


async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Show special tokens and chat template, for clients that leave tokenizing to the server."""
    service = await use_model(request)
    if service.tokenizer is None:
        raise Refused(404, "this model has no tokenizer")
    special = service.tokenizer.special_tokens
    return {
        "bos_token": special.get("bos_token"), "eos_token": special.get("eos_token"),
        "pad_token": special.get("pad_token"), "chat_template": service.tokenizer.chat_template,
    }  # fmt: skip


async def apply_template(body: TemplateBody, request: Request) -> Rendered:
    """Render a conversation with the model's chat template."""
    service = service_of(request)
    caller: Caller = request.state.caller

    def apply() -> str:
        intake = service.intake(caller)
        said = openai_chat.sent(body.messages, intake)
        if (preset := service.model.preset) is not None:
            said = [dict(one) for one in preset.with_messages(said)]
        caller.files.require_all()
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
        return service.prompts.apply_template(
            said, tools=tools, replace_damaged=intake.replaced.replace_damaged, check=caller.go_on
        )

    return {"prompt": await service.run_reading(caller, apply)}


def _state(request: Request) -> EngineState:
    state, key = request.app.state, request.state.caller.key
    audit = state.practice.audit
    return state_of(
        state.models, block_tokens=state.block_tokens, max_sequences=state.max_sequences,
        with_heat=key is not None and "admin" in key.scopes, workers=state.workers,
        keeps_contents=audit is not None and audit.with_content,
    )  # fmt: skip


async def engine_state(request: Request) -> EngineState:
    """Show the state of the engine."""
    return _state(request)


async def engine_events(request: Request) -> Response:
    """Stream the state of the engine, twice a second."""

    async def states() -> AsyncIterator[bytes]:
        while not models_of(request).is_draining:
            yield sse(_state(request))
            await asyncio.sleep(_STATE_S)

    return EventStream(states(), request.state.caller)


class Erasure(Closed):
    """The data that were erased for a key.

    key: its id.
    responses: stored responses and their items.
    answers: answers that were kept for replay.
    audit_contents: contents of requests in the audit; null: the server has no audit.
    """

    object: Literal["erasure"]
    key: str
    responses: int
    answers: int
    audit_contents: int | None


async def erase_data(request: Request) -> Erasure:
    """Erase what is kept of a key, by its id or name: stored responses, answers, prefixes, and contents of the audit.

    Its running requests end. The key itself and its counts stay; revoking it removes them, too.
    """
    state, given = request.app.state, request.path_params["key"]
    key_id = state.ring.id_of(given)
    if key_id is None and is_key_id(given):  # it was revoked, and the audit may still have contents of it
        key_id = given
    if key_id is None:  # what is not a key's id does not get into the audit
        raise Refused(404, "there is no key with this id or name", hint="name a revoked key by its id")
    found = models_of(request)
    auditor: Auditor | None = state.auditor

    def erase() -> tuple[int, int, int | None]:
        return *found.erase(key_id), None if auditor is None else auditor.erase(key_id)

    responses, answers, contents = await state.running.erase(key_id, erase)
    return {
        "object": "erasure", "key": key_id, "responses": responses, "answers": answers, "audit_contents": contents,
    }  # fmt: skip


async def metrics(request: Request) -> Response:
    """Show metrics for Prometheus."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    data = generate_latest(request.app.state.metrics.registry)
    return Response(data, headers={"content-type": CONTENT_TYPE_LATEST})


async def page(request: Request) -> Response:
    """Show the chat page."""
    return _file(request, "index.html")


async def docs(request: Request) -> Response:
    """Show a reader of /openapi.json."""
    return _file(request, "docs.html")


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


def _get(
    path: str, handler: Callable[..., Any], scope: KeyScope | None, *, ends_in_name: bool = False, **described: Any
) -> Route:  # fmt: skip
    policy = Policy(method="GET", path=path, scope=scope, screens="nothing", ends_in_name=ends_in_name)
    return Route(policy=policy, handler=handler, **described)


def _post(
    path: str, handler: Callable[..., Any], answer: Any, *, screens: Screens | None = None,
    takes_media: bool = False, **described: Any,
) -> Route:  # fmt: skip
    policy = Policy(
        method="POST", path=path, scope="infer", screens=screens, is_counted=True, takes_media=takes_media
    )
    return Route(policy=policy, handler=handler, answer=answer, **described)


def _admin(path: str, handler: Callable[..., Any], answer: Any, **described: Any) -> Route:
    return Route(
        policy=Policy(method="POST", path=path, scope="admin", screens="nothing"), handler=handler, answer=answer,
        **described,
    )  # fmt: skip


def _form(path: str, handler: Callable[..., Any], **described: Any) -> Route:
    policy = Policy(
        method="POST", path=path, scope="infer", screens="texts", is_counted=True, takes_form=True,
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
    _get("/docs", docs, None, media=_FILES[:1]),
    _get("/favicon.ico", favicon, None, media=(_PAGE_TYPES["svg"],)),
    _get("/page/{name}", page_file, None, media=_FILES),
    _get("/v1/models", models, "infer", answer=ModelList),
    _get("/v1/models/{id}", model, "infer", answer=Model, ends_in_name=True),
    _get("/metrics", metrics, "metrics", media=("text/plain",)),
    _get("/v1/engine/state", engine_state, "metrics", answer=EngineState),
    _get("/v1/engine/events", engine_events, "metrics", events=EngineState),
    _get("/v1/cluster", list_workers, "metrics", answer=WorkerList),
    _admin("/v1/cluster/add", add_worker, WorkerList, refusals=("409",)),
    _admin("/v1/cluster/drain", drain_worker, WorkerList, refusals=("409",)),
    Route(
        policy=Policy(method="DELETE", path="/v1/engine/data/{key}", scope="admin", screens="nothing"),
        handler=erase_data, answer=Erasure, refusals=("404",),
    ),
    _get("/v1/engine/transparency", transparency, "infer", answer=Transparency),
    _get("/v1/engine/stops", stops.stops, "admin", answer=stops.Stopped),
    _admin("/v1/engine/memory", memory.resize, MemoryState, refusals=("409",)),
    _admin("/v1/engine/stops", stops.stop, stops.Stopped, refusals=("404",)),
    _post("/tokenize", tokenize, Tokenized, screens="nothing", takes_media=True),
    _post("/detokenize", detokenize, Detokenized, screens="nothing"),
    _get("/tokenizer_info", tokenizer_info, "infer", answer=TokenizerInfo, refusals=("404",)),
    _post("/apply-template", apply_template, Rendered, screens="nothing", takes_media=True),
    _post(
        "/v1/chat/completions", openai_chat.chat_completions, openai_chat.ChatCompletion, screens="answers",
        takes_media=True, events=openai_chat.ChatChunk | OpenAIError, has_done=True,
    ),
    _post(
        "/v1/completions", openai_completions.completions, openai_completions.Completion, screens="answers",
        events=openai_completions.Completion | OpenAIError, has_done=True,
    ),
    _post("/v1/embeddings", openai_embeddings.embeddings, openai_embeddings.Embeddings, screens="texts"),
    _post("/v1/rerank", rerank.rerank, rerank.Reranked, screens="texts", refusals=("404",)),
    _post("/rerank", rerank.rerank, rerank.Reranked, screens="texts", refusals=("404",)),
    _post(
        "/v1/moderations", openai_moderations.moderations, openai_moderations.Moderated, screens="texts",
        refusals=("404",),
    ),
    _post(
        "/v1/responses", openai_responses.responses, openai_responses.Answer, screens="answers", takes_media=True,
        events=openai_responses.Event, refusals=("404",),
    ),
    _post(
        "/v1/responses/input_tokens", openai_responses.input_tokens, openai_responses.InputTokens,
        screens="nothing", takes_media=True, refusals=("404",),
    ),
    _get(
        "/v1/responses/{id}", openai_responses.stored_response, "infer", answer=openai_responses.Answer,
        query={"stream": {"enum": ["false"]}},
    ),
    Route(
        policy=Policy(method="DELETE", path="/v1/responses/{id}", scope="infer", screens="nothing"),
        handler=openai_responses.delete_response, answer=openai_responses.Deleted,
    ),
    _get(
        "/v1/responses/{id}/input_items", openai_responses.input_items, "infer", answer=openai_responses.InputItems,
        query=openai_responses.INPUT_ITEMS_QUERY,
    ),
    _post(
        "/v1/messages", anthropic_messages.messages, anthropic_messages.Message, screens="answers", takes_media=True,
        events=anthropic_messages.Event | AnthropicError,
    ),
    _form("/v1/audio/transcriptions", openai_audio.transcriptions, events=openai_audio.Event | OpenAIError),
    _form("/v1/audio/translations", openai_audio.translations),
    _post(
        "/v1/messages/count_tokens", anthropic_messages.count_tokens, anthropic_messages.Counted, screens="nothing",
        takes_media=True,
    ),
    _post(
        "/api/chat", ollama.chat, ollama.ChatLine, screens="answers", takes_media=True,
        events=ollama.ChatLine | OllamaError, encoding=JSON_LINES,
    ),
    _post(
        "/api/generate", ollama.generate, ollama.GenerateLine, screens="answers", takes_media=True,
        events=ollama.GenerateLine | OllamaError, encoding=JSON_LINES,
    ),
    _post("/api/embed", ollama.embed, ollama.OllamaEmbeddings, screens="texts"),
    _post("/api/embeddings", ollama.old_embed, ollama.OldEmbedding, screens="texts"),
    _post("/api/show", ollama_models.show, ollama_models.Shown, screens="nothing"),
    _get("/api/tags", ollama_models.tags, "infer", answer=ollama_models.OllamaModels),
    _get("/api/ps", ollama_models.ps, "infer", answer=ollama_models.LoadedModels),
    _get("/api/version", ollama_models.api_version, None, answer=ollama_models.ApiVersion),
    _post(
        "/infill", llama_infill.infill, llama_infill.Filled, screens="answers",
        events=llama_infill.InfillPiece | llama_infill.Filled | OpenAIError,
    ),
    _get(
        "/props", llama_server.props, "infer", answer=llama_server.Props, query=llama_server.MODEL_QUERY,
        refusals=("404",),
    ),
    _get(
        "/slots", llama_server.slots, "metrics", answer=list[llama_server.Slot], query=llama_server.MODEL_QUERY,
        refusals=("404",),
    ),
)  # fmt: skip


@functools.cache
def _document(base_path: str) -> str:
    """Build the document on first use: it takes a tenth of a second, which would delay the start."""
    return json.dumps(document(ROUTES, version("argosy"), base_path=base_path))


def make_app(
    served: Models | Service,
    ring: KeyRing,
    *,
    block_tokens: int,
    max_sequences: int,
    hosts: Collection[str] = (),
    origins: Origins | None = None,
    limits: Limits | None = None,
    base_path: str = "",
    workers: Workers | None = None,
    auditor: Auditor | None = None,
    co2_grams_per_kwh: float | None = None,
    guarding: Guarding | None = None,
    practice: Practice | None = None,
    memory_watch: memory.MemoryWatch | None = None,
) -> Gate:
    """Build the whole server as an ASGI application.

    Args:
        served: the models, or the service of the only one.
        base_path: the beginning of all paths, or nothing.
        workers: run experts for the model; None: it runs alone.
        auditor: records requests; None: nobody does.
        co2_grams_per_kwh: emissions of the electricity here; None: unknown.
        guarding: policies, and what is stopped; None: there are none.
        practice: how the server treats texts, for `/v1/engine/transparency`; None: it keeps nothing.
        memory_watch: keeps the budget within limits; None: only who asks for another budget changes it.

    Raises:
        UsageError: a policy asks a model that the server does not have.
    """
    models = served if isinstance(served, Models) else Models.of(served)
    guarding = Guarding() if guarding is None else guarding
    guarding.require_models(models.names)
    running = Running(guarding)
    guarding.ask_model = ModelJudge(models, running)
    app = Starlette()
    app.state.guarding, app.state.practice = guarding, Practice() if practice is None else practice
    app.state.models, app.state.page = models, _read_page()
    app.state.block_tokens, app.state.max_sequences = block_tokens, max_sequences
    app.state.base_path = base_path
    app.state.metrics = Metrics(models, workers, co2_grams_per_kwh=co2_grams_per_kwh)
    app.state.memory_watch = memory.MemoryWatch(models) if memory_watch is None else memory_watch
    app.state.workers, app.state.ring, app.state.auditor = workers, ring, auditor
    app.state.running = running
    app.state.metrics.registry.register(guarding)
    for route in ROUTES:
        answer = answering_form if route.policy.takes_form else answering
        endpoint = answer(route.handler, route.body)
        path = route.policy.path
        if route.policy.ends_in_name:
            path = path.removesuffix("}") + ":path}"
        app.add_route(path, endpoint, methods=[route.policy.method])
    for kind in (ArgosyError, HTTPException, GoneAway, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Gate(
        app, [route.policy for route in ROUTES], ring, limits or Limits(), hosts=hosts,
        origins=origins, hints=ollama.HINTS,
        takes_media=models.takes_media, observe=app.state.metrics.observe,
        metrics=app.state.metrics.answers, base_path=base_path, auditor=auditor, guarding=guarding,
        running=running,
    )  # fmt: skip


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, GoneAway):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, "the request cannot be read")
    status, body = error_body(error, dialect_of(request.scope["path"]), request.state.caller.request_id)
    return JSONResponse(body, status, headers=error_headers(error, status))
