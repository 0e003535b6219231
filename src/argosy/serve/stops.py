"""Stop a model, a key or a person at once, and let them go on: GET and POST /v1/engine/stops.

Requests are refused, and answers that run end with an error before their next token. Nothing is deleted.

Elsewhere: what is stopped is kept by `guard/stops.py`.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from argosy.errors import UsageError
from argosy.guard.stops import LONGEST_NAME, Kind, Stops
from argosy.serve.fields import Closed, Flag, Strict
from argosy.serve.gate import Caller
from argosy.serve.models import models_of


class StopBody(Strict):
    """Stop a model by its id, a key by its id, or a person as clients name them; or let them go on."""

    kind: Kind
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, examples=["demo"])]
    is_stopped: Flag = True

    @property
    def needs_model(self) -> bool:
        return False


class Stopped(Closed):
    """All that is stopped; `is_saved`: also for the next process."""

    model: list[str]
    key: list[str]
    user: list[str]
    is_saved: bool


def _stops_of(request: Request) -> Stops:
    stops: Stops = request.app.state.guarding.stops
    return stops


def _listed(stops: Stops) -> Stopped:
    names = stops.listed()
    return {
        "model": names["model"], "key": names["key"], "user": names["user"], "is_saved": stops.path is not None,
    }  # fmt: skip


async def stops(request: Request) -> Stopped:
    """List what is stopped."""
    return _listed(_stops_of(request))


async def stop(body: StopBody, request: Request) -> Stopped:
    """Stop something at once, or let it go on."""
    caller: Caller = request.state.caller
    name = body.name
    if body.kind == "model":
        (found,) = models_of(request).facts(name)
        name = found.facts.id
    if body.kind == "key" and body.is_stopped and name == caller.key_id:
        raise UsageError("this request's own key cannot be stopped with it", param="name")
    kept = _stops_of(request)
    await asyncio.to_thread(partial(kept.set, body.kind, name, is_stopped=body.is_stopped))
    return _listed(kept)
