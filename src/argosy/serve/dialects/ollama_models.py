"""Ollama's API about models: GET /api/tags and /api/ps, POST /api/show, GET /api/version. None loads a model.

Elsewhere: answers are `ollama.py`; the facts come from `serve/models/models.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, NotRequired

from starlette.requests import Request

from argosy.errors import UsageError
from argosy.library import modelfile
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.dialects.ollama_bodies import ShowBody
from argosy.serve.http.closed import Closed
from argosy.serve.http.route import get_route, post_route
from argosy.serve.models.entry import Standing
from argosy.serve.models.models import LATEST, models_of

API_VERSION = "0.30.0"  # the Ollama version that these routes follow; clients check whether it is new enough
_FOREVER = "9999-12-31T23:59:59Z"


def tagged(model_id: str) -> str:
    """The name of a model as lists show it: always with a tag."""
    return model_id if ":" in model_id else model_id + LATEST


class Details(Closed):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Closed):
    """A model. Its digest tells models of other names and sizes apart; no weights are read for it."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class OllamaModels(Closed):
    models: list[OllamaModel]


class LoadedModel(Closed):
    """A loaded model, and when it is unloaded if no request uses it; nothing is on a GPU.

    size: the memory that it has of a budget that models share, or of a server's only model the size of its weights. A
        preset shares its model's, and has none of its own.
    """

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class LoadedModels(Closed):
    models: list[LoadedModel]


class Example(Closed):
    role: str
    content: str


class Shown(Closed):
    """A model. `template` is its chat template, in Jinja. A preset may have a system message and examples."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str
    system: NotRequired[str]
    messages: NotRequired[list[Example]]


class ApiVersion(Closed):
    version: str


async def tags(request: Request) -> OllamaModels:
    """List the models, as Ollama does."""
    models = models_of(request)
    await models.look()
    return {"models": [_listed(listing.facts) for listing in await asyncio.to_thread(models.listed)]}


def _listed(model: ModelFacts) -> OllamaModel:
    return {
        "name": tagged(model.id), "model": tagged(model.id), "modified_at": _modified_at(model),
        "size": model.weight_bytes, "digest": _digest(model), "details": _details(model),
    }  # fmt: skip


async def ps(request: Request) -> LoadedModels:
    """List the loaded models, as Ollama does."""
    models = models_of(request)
    presets = await asyncio.to_thread(models.presets)
    standings = [standing for standing in models.facts() if standing.state == "ready"]
    standings += [
        replace(standing, facts=standing.facts.under(preset))
        for preset in presets
        for standing in standings
        if standing.facts.id == preset.model
    ]
    return {"models": [_in_memory(standing) for standing in standings]}


def _in_memory(standing: Standing) -> LoadedModel:
    model, expires_at = standing.facts, _FOREVER
    if standing.unloads_in_s is not None:
        expires_at = time_text(datetime.now(UTC) + timedelta(seconds=standing.unloads_in_s))
    return {
        "name": tagged(model.id), "model": tagged(model.id),
        "size": 0 if model.preset is not None else standing.memory_bytes or model.weight_bytes,
        "digest": _digest(model), "details": _details(model), "expires_at": expires_at, "size_vram": 0,
        "context_length": model.context_tokens,
    }  # fmt: skip


async def show(body: ShowBody, request: Request) -> Shown:
    """Describe a model, as Ollama does."""
    if body.model is None:
        raise UsageError("model: expected a name, found nothing", param="model")
    models = models_of(request)
    await models.look(body.model)
    (listing,) = await asyncio.to_thread(models.listed, body.model)
    return _shown(listing)


def _shown(listing: Standing) -> Shown:
    model, abilities = listing.facts, listing.abilities
    can = {
        "completion": True, "tools": abilities.tools != "none", "insert": abilities.can_infill,
        "thinking": abilities.thinking not in (None, "none"),
        "vision": "picture" in model.media_kinds, "audio": "sound" in model.media_kinds,
    }  # fmt: skip
    shown: Shown = {
        "modelfile": "", "parameters": _parameters(model),
        "template": abilities.chat_template or "",
        "details": _details(model), "model_info": _model_info(model),
        "capabilities": [name for name, has in can.items() if has],
        "modified_at": _modified_at(model),
    }  # fmt: skip
    if (preset := model.preset) is not None:
        shown["modelfile"] = modelfile.written(preset, tagged(preset.model))
        if preset.system is not None:
            shown["system"] = preset.system
        if preset.messages:
            shown["messages"] = [{"role": one["role"], "content": one["content"]} for one in preset.messages]
    return shown


def _parameters(model: ModelFacts) -> str:
    """The defaults for an answer, as lines of a Modelfile."""
    defaults: dict[str, Any] = model.sampling.as_dict()
    defaults["repeat_penalty"] = defaults.pop("repetition_penalty")
    lines = [*{"num_ctx": model.context_tokens, **defaults}.items()]
    if model.preset is not None:
        lines += [one for one in modelfile.parameters_of(model.preset) if one[0] not in dict(lines)]
    return "\n".join(f"{name:<30} {value}" for name, value in lines)


async def api_version(request: Request) -> ApiVersion:
    """The version of Ollama whose API these routes are like; the server's own is in /openapi.json."""
    return {"version": API_VERSION}


def time_text(at: datetime) -> str:
    """A time in Ollama's notation."""
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _modified_at(model: ModelFacts) -> str:
    return time_text(datetime.fromtimestamp(model.created, UTC))


def _model_info(model: ModelFacts) -> dict[str, Any]:
    """The facts that clients read, under the names of GGUF metadata."""
    family = model.family
    return {
        "general.architecture": family, "general.parameter_count": model.num_parameters,
        f"{family}.context_length": model.context_tokens, f"{family}.block_count": model.num_layers,
        f"{family}.expert_count": model.num_experts, f"{family}.expert_used_count": model.experts_per_token,
        f"{family}.vocab_size": model.vocab_size,
    }  # fmt: skip


def _details(model: ModelFacts) -> Details:
    parent = model.parent if model.preset is None else model.preset.model
    return {
        "parent_model": tagged(parent) if parent else "",
        "format": "", "family": model.family, "families": [model.family],
        "parameter_size": _count(model.num_parameters), "quantization_level": "",
    }  # fmt: skip


def _digest(model: ModelFacts) -> str:
    facts = f"{model.id}\n{model.family}\n{model.num_parameters}\n{model.weight_bytes}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _count(number: int) -> str:
    """A number of parameters in Ollama's notation."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


ROUTES = (
    post_route("/api/show", show, Shown, screens="nothing"),
    get_route("/api/tags", tags, "infer", answer=OllamaModels),
    get_route("/api/ps", ps, "infer", answer=LoadedModels),
    get_route("/api/version", api_version, None, answer=ApiVersion),
)  # fmt: skip
