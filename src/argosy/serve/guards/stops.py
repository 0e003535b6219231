"""Stop a model, a key or a person at once, and lift a stop: GET and POST /v1/engine/stops.

New requests are refused, and running ones end with an error before their next token or event. Nothing is deleted.

Elsewhere: `guard/stops.py` keeps the stops; `serve/http/running.py` ends requests.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from argosy.errors import UsageError
from argosy.guard.keys import Key, KeyRing
from argosy.guard.stops import LONGEST_NAME, Kind, Stops
from argosy.serve.answer.fields import Flag, Strict
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused
from argosy.serve.http.running import Running
from argosy.serve.models.models import models_of


class StopBody(Strict):
    """Stop a model or preset, a key by its id or name, or a person as clients name them; or lift the stop."""

    kind: Kind
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, examples=["demo"])]
    is_stopped: Flag = True

    @property
    def needs_model(self) -> bool:
        return False


class Stopped(Closed):
    """Everything that is stopped; `is_saved`: also for the next process."""

    model: list[str]
    key: list[str]
    user: list[str]
    is_saved: bool


def _stops_of(request: Request) -> Stops:
    stops: Stops = request.app.state.governance.guarding.stops
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
    """Stop something at once, or lift a stop."""
    kept, names = _stops_of(request), {body.name}
    if body.kind == "model":
        names = {await _model_id(body, kept, request)}
    elif body.kind == "key" and body.is_stopped:
        names = {_id_of_other_key(body.name, request)}
    elif body.kind == "key":
        ring: KeyRing = request.app.state.ring
        names.add(ring.id_of(body.name) or body.name)
    await asyncio.to_thread(partial(kept.set, body.kind, *names, is_stopped=body.is_stopped))
    running: Running = request.app.state.running
    running.look()
    return _listed(kept)


async def _model_id(body: StopBody, kept: Stops, request: Request) -> str:
    """The id of a model, or the name of a preset: stopping a preset leaves its model and other presets running."""
    models = models_of(request)
    hearing = models.hearing()
    if hearing is not None and body.name == hearing.ears_id:
        return body.name
    if not body.is_stopped and kept.has("model", body.name):  # the model may be gone
        return body.name
    name, preset = await models.named(body.name)
    return models.id_of(name) if preset is None else preset.name


def _id_of_other_key(name: str, request: Request) -> str:
    """The id of a key other than the request's own, which could not lift its own stop."""
    own: Key = request.state.caller.key
    ring: KeyRing = request.app.state.ring
    found = ring.id_of(name)
    if own.id in (found, name):
        raise UsageError("this request's own key cannot be stopped with it", param="name")
    if found is None:
        raise Refused(404, "there is no key with this id or name", param="name")
    return found
