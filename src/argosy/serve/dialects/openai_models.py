"""The models of the server: GET /v1/models and /v1/models/ID, in OpenAI's dialect with OpenRouter's fields.

Elsewhere: `serve/models/models.py` has the facts about models that are not in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal, NotRequired, cast

from starlette.requests import Request

from argosy.media.parts import Hearing, Kind
from argosy.prompt.prompt import ToolCalling
from argosy.prompt.thinking import ThinkingSwitch
from argosy.serve.answer.service import Service
from argosy.serve.http.closed import Closed
from argosy.serve.http.route import get_route
from argosy.serve.models.entry import Standing, State
from argosy.serve.models.models import models_of


class Modalities(Closed):
    input_modalities: list[str]
    output_modalities: list[str]


class Capabilities(Closed):
    """How tools and sounds reach the model, and what a request may choose.

    tools: `native` by its chat template, `generic` by a generic prompt, `none` not at all.
    thinking: `on-off` (enable_thinking), `efforts` (reasoning_effort), `both` or `none`; null if the model's
        template has not been read yet.
    sound: `native` if the model hears, `transcript` if it reads what a transcriber heard, `none` if it takes no sound.
    """

    tools: ToolCalling
    thinking: ThinkingSwitch | None
    sound: Hearing


class DefaultParameters(Closed):
    """How tokens are chosen unless a request says otherwise."""

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
    default_parameters: for models that answer; the one that transcribes has none.
    parent: for a model with an adapter and for a preset, the id of the model.
    root: the same for a model with an adapter.
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
    root: NotRequired[str]


class ModelList(Closed):
    object: Literal["list"]
    data: list[Model]


# The names for which OpenRouter's clients look; tools and reasoning effort are added if the model supports them.
_PARAMETERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs", "response_format", "structured_outputs",
)  # fmt: skip
_TOOL_PARAMETERS = ("tools", "tool_choice", "parallel_tool_calls")
_MODALITIES: Mapping[Kind, str] = {"picture": "image", "sound": "audio", "video": "video"}


def _model(listing: Standing) -> Model:
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
    if model.parent:
        described["parent"] = model.parent
    if model.parent and model.preset is None:
        described["root"] = model.parent
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


ROUTES = (
    get_route("/v1/models", models, "infer", answer=ModelList),
    get_route("/v1/models/{id}", model, "infer", answer=Model, ends_in_name=True),
)  # fmt: skip
