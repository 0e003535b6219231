"""Adapters of a model: POST /v1/load_lora_adapter and /v1/unload_lora_adapter as in vLLM, for administrators, and
llama-server's GET /lora-adapters.

An adapter is loaded from below the directory of `--lora-dir` and from nowhere else. Requests go on meanwhile. It leaves
when it is unloaded, or with its model; those of `--lora` come back with it.

Elsewhere: `adapters/registry.py` keeps them; requests name them as MODEL:ADAPTER (`serve/models/models.py`).
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from weakref import WeakSet

from pydantic import Field
from starlette.requests import Request

from argosy.config.engine import ExpertColumns
from argosy.engine.loop import EngineLoop
from argosy.errors import CheckpointError, DoesNotFit, UnsupportedModel, UsageError
from argosy.serve.answer.fields import Flag, NoEffect, Strict, TokenId
from argosy.serve.answer.service import Service, service_of
from argosy.serve.dialects.llama_server import MODEL_QUERY
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused
from argosy.serve.http.route import admin_route, get_route
from argosy.serve.models.models import models_of

if TYPE_CHECKING:
    from argosy.adapters.registry import AdapterFacts

log = logging.getLogger("argosy.serve")

Name = Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")]

_loading: WeakSet[EngineLoop] = (
    WeakSet()
)  # one at a time: a drive that does not answer blocks only one thread


class LoadBody(Strict):
    """lora_path: below the server's directory for adapters.   scale: multiplies the adapter's own.
    columns: `expert_slowest` reads fused experts that Unsloth wrote before 2026-09-17.
    load_inplace: replace the adapter of this name; its requests end with it.
    """

    lora_name: Name = Field(examples=["support"])
    lora_path: str = Field(min_length=1, max_length=1024, examples=["support-v2"])
    scale: Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False, strict=True)] = 1.0
    columns: ExpertColumns = "expert_fastest"
    load_inplace: Flag = False
    is_3d_lora_weight: NoEffect[Flag] = None  # the shapes of the tensors tell
    model: str | None = Field(None, max_length=256)


class UnloadBody(Strict):
    lora_name: Name = Field(examples=["support"])
    lora_int_id: NoEffect[TokenId] = None
    model: str | None = Field(None, max_length=256)


class Adapter(Closed):
    """An adapter. Its id is the name that requests use; the server shows no paths. `notes` say what may surprise."""

    id: str
    object: Literal["adapter"]
    parent: str
    rank: int
    scale: float
    memory_bytes: int
    num_requests: int
    notes: list[str]


class SlotAdapter(Closed):
    """An adapter as llama-server lists it. `path` is its name."""

    id: int
    path: str
    scale: float


async def load(body: LoadBody, request: Request) -> Adapter:
    """Load an adapter while requests go on. The client may disconnect; the change still completes."""
    service = service_of(request)
    if (root := service.lora_dir) is None:
        raise Refused(
            409,
            "this server loads no adapters on request",
            hint="start it with `--lora-dir DIR`",
            param="lora_path",
        )
    if (name := f"{_base(service)}:{body.lora_name}") in models_of(request).names:
        raise Refused(
            400, f"a model of this server is named {name}", hint="choose another name", param="lora_name"
        )
    if service.loop in _loading:
        raise Refused(409, "another adapter is being loaded", hint="try again when it is there")

    async def change() -> AdapterFacts:
        _loading.add(service.loop)
        try:
            return await asyncio.to_thread(_read, service, body, root)
        finally:
            _loading.discard(service.loop)

    made = await asyncio.shield(asyncio.create_task(change()))
    log.info("adapters: %s has %s now", _base(service), made.name)
    return _adapter(made, service)


def _read(service: Service, body: LoadBody, root: Path) -> AdapterFacts:
    from argosy.adapters.allowed import find_below  # an installation may be without

    try:
        path = find_below(root, body.lora_path)
    except UsageError as error:
        raise Refused(404, error.message, param="lora_path") from None
    except CheckpointError as error:
        raise Refused(400, error.message, param="lora_path") from None
    try:
        return service.loop.engine.load_adapter(
            body.lora_name, path, body.scale, body.columns, replaces=body.load_inplace
        )
    except DoesNotFit as error:
        raise Refused(409, error.message, hint=error.hint) from None
    except (CheckpointError, UnsupportedModel) as error:
        said = error.message.replace(f"{root.resolve()}/", "")
        raise Refused(400, said, hint=error.hint, param="lora_path") from None


async def unload(body: UnloadBody, request: Request) -> Adapter:
    """Unload an adapter: requests that have begun end with it, and no new one may name it."""
    service = service_of(request)
    found = {one.name: one for one in service.loop.engine.adapters}.get(body.lora_name)
    try:
        await asyncio.to_thread(partial(service.loop.engine.drop_adapter, body.lora_name))
    except UsageError as error:
        raise Refused(404, error.message, param="lora_name") from None
    if found is None:  # it was loaded and dropped meanwhile
        raise Refused(404, f"unknown adapter {body.lora_name}", param="lora_name")
    log.info("adapters: %s is without %s now", _base(service), found.name)
    return _adapter(found, service)


def _base(service: Service) -> str:
    return service.model.parent or service.model.id


def _adapter(one: AdapterFacts, service: Service) -> Adapter:
    parent = _base(service)
    return {
        "id": f"{parent}:{one.name}", "object": "adapter", "parent": parent, "rank": one.rank, "scale": one.factor,
        "memory_bytes": one.nbytes, "num_requests": one.num_requests, "notes": [*one.notes],
    }  # fmt: skip


async def listed(request: Request) -> list[SlotAdapter]:
    """List the adapters of a model in memory, as llama-server does."""
    models = models_of(request)
    service = models.standing(*await models.named(request.query_params.get("model") or None)).service
    found = () if service is None else service.loop.engine.adapters
    return [{"id": at, "path": one.name, "scale": one.factor} for at, one in enumerate(found)]


ROUTES = (
    admin_route("/v1/load_lora_adapter", load, Adapter, refusals=("404", "409")),
    admin_route("/v1/unload_lora_adapter", unload, Adapter, refusals=("404",)),
    get_route("/lora-adapters", listed, "infer", answer=list[SlotAdapter], query=MODEL_QUERY, refusals=("404",)),
)  # fmt: skip
