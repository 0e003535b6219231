"""llama-server's GET /props and /slots, with the fields that clients read.

Both describe the model that `?model=` names, as with llama-server's router, otherwise the first. No model is loaded
for that.

Elsewhere: llama-server's /tokenize, /detokenize and /apply-template are `app.py`; `/v1/engine/state` says more.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from starlette.requests import Request

from argosy.config import SamplingDefaults
from argosy.serve.http.closed import Closed
from argosy.serve.http.route import get_route
from argosy.serve.models.models import models_of

MODEL_QUERY = {"model": {"type": "string", "maxLength": 256}}


class GenerationParameters(Closed):
    """The defaults for an answer; -1: to the end of the context."""

    n_predict: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float


class SlotSettings(Closed):
    n_ctx: int
    params: GenerationParameters


class TakenMedia(Closed):
    vision: bool
    audio: bool


class Props(Closed):
    """The server and its model. `model_path` is the model's name: the server shows no paths."""

    default_generation_settings: SlotSettings
    total_slots: int
    model_alias: str
    model_path: str
    modalities: TakenMedia
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str


class Slot(Closed):
    """Room for one answer; sequences have no fixed slot, so running ones come first."""

    id: int
    is_processing: bool
    n_ctx: int


async def props(request: Request) -> Props:
    """Describe the server and its model, as llama-server does."""
    models, name = models_of(request), await _named(request)
    (listing,) = await asyncio.to_thread(models.listed, name)
    model, template, special = (
        listing.facts,
        listing.abilities.chat_template,
        listing.abilities.special_tokens,
    )
    return {
        "default_generation_settings": {"n_ctx": model.context_tokens, "params": _parameters(model.sampling)},
        "total_slots": request.app.state.max_sequences,
        "model_alias": model.id,
        "model_path": model.id,
        "modalities": {"vision": "picture" in model.media_kinds, "audio": "sound" in model.media_kinds},
        "chat_template": template or "",
        "bos_token": special.get("bos_token") or "",
        "eos_token": special.get("eos_token") or "",
        "build_info": f"argosy-{version('argosy')}",
    }


def _parameters(defaults: SamplingDefaults) -> GenerationParameters:
    return {
        "n_predict": -1, "temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p,
        "min_p": defaults.min_p, "repeat_penalty": defaults.repetition_penalty,
        "presence_penalty": defaults.presence_penalty, "frequency_penalty": defaults.frequency_penalty,
    }  # fmt: skip


async def slots(request: Request) -> list[Slot]:
    """Show how many answers are generated, as llama-server does."""
    models = models_of(request)
    standing = models.standing(*await models.named(request.query_params.get("model") or None))
    service = standing.service
    num_running = 0 if service is None else service.loop.snapshot().engine.num_running
    return [
        {"id": at, "is_processing": at < num_running, "n_ctx": standing.facts.context_tokens}
        for at in range(request.app.state.max_sequences)
    ]


async def _named(request: Request) -> str:
    """The id of the model that a request names. Raises what `Models.named` and `id_of` raise."""
    models = models_of(request)
    name, preset = await models.named(request.query_params.get("model") or None)
    return models.id_of(name) if preset is None else preset.name


ROUTES = (
    get_route("/props", props, "infer", answer=Props, query=MODEL_QUERY, refusals=("404",)),
    get_route("/slots", slots, "metrics", answer=list[Slot], query=MODEL_QUERY, refusals=("404",)),
)  # fmt: skip
