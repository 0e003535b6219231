"""Report whether the process works, and whether it accepts requests: GET /health and /ready."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request

from argosy.engine.loop import SILENT_S
from argosy.errors import Overloaded
from argosy.serve.http.closed import Closed
from argosy.serve.models.models import Models, models_of


class Health(Closed):
    status: Literal["ok"]


class Ready(Closed):
    status: Literal["ready"]


async def health(request: Request) -> Health:
    """Check that the process works: 503 if the engine has failed for good and the server must be restarted.

    It answers from the event loop alone, and waits for nothing.
    """
    _require_engines(models_of(request))
    return {"status": "ok"}


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
    served = (models.work, request.app.state.governance, *models.services())
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
