"""Routes for the engine's state, once or as a stream, and for Prometheus metrics.

Elsewhere: `state.py` makes both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from argosy.serve.admin.state import EngineState, state_of
from argosy.serve.http.streams import EventStream, sse
from argosy.serve.models.models import models_of

_STATE_S = 0.5


def _state(request: Request) -> EngineState:
    state, key = request.app.state, request.state.caller.key
    return state_of(
        state.models, block_tokens=state.block_tokens, max_sequences=state.max_sequences,
        with_heat=key is not None and "admin" in key.scopes, workers=state.workers,
        keeps_contents=state.governance.keeps_contents,
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


async def metrics(request: Request) -> Response:
    """Show metrics for Prometheus."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    data = generate_latest(request.app.state.metrics.registry)
    return Response(data, headers={"content-type": CONTENT_TYPE_LATEST})
