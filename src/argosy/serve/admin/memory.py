"""Change the memory budget of a running server: on POST /v1/engine/memory, and when limits of its cgroup change.

    the requested budget, the limit of the machine or a cgroup  ->  the smaller one  ->  `Models.resize`

Limits are checked twice a second. cgroup v2's `memory.high` leaves time for that, because the kernel slows a
process that exceeds it. `memory.max` does not, so request the smaller budget before you lower that limit. Once a
minute the C library returns free memory to the system: requests of many sizes fragment its heap, which would
otherwise grow for hours.

Elsewhere: `serve/models/models.py` and `engine/engine.py` move the memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from argosy.budget.requirements import machine_bytes
from argosy.config import format_bytes, parse_size
from argosy.errors import ArgosyError, DoesNotFit, Overloaded
from argosy.serve.admin.state import MemoryState, memory_of
from argosy.serve.answer.fields import WHOLE, Strict
from argosy.serve.http.failures import Refused
from argosy.serve.http.log import where_it_failed
from argosy.serve.http.work import give_memory_back
from argosy.serve.models.models import Models, models_of

log = logging.getLogger("argosy.serve")

LOOK_S = 0.5
_LOOKS_A_MINUTE = round(60 / LOOK_S)
# What `parse_size` accepts, above zero: a percentage, bytes, or a number with a larger unit.
_SIZE = (
    "^((100|[1-9][0-9]?)%|[1-9][0-9]{0,17} ?[bB]|"
    r"([1-9][0-9]{0,8}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9]) ?[kKmMgGtT]([iI]?[bB])?)$"
)


class MemoryBody(Strict):
    """A budget as `--memory` has it: 8GiB, 8GB, 75% of the machine or its cgroup, or a number of bytes."""

    memory: (
        Annotated[str, Field(pattern=_SIZE)] | Annotated[int, Field(gt=0, lt=1 << 60, strict=True), WHOLE]
    ) = Field(examples=["8GiB"])

    @property
    def needs_model(self) -> bool:
        return False


class MemoryWatch:
    """Keeps the budget of a server within what the machine and its cgroups allow.

    Attributes:
        asked_bytes: the budget requested last.

    Args:
        limit: the memory that this process may use.
    """

    def __init__(self, models: Models, *, limit: Callable[[], int] = machine_bytes) -> None:
        self.asked_bytes = models.budget_bytes
        self._models, self._limit = models, limit
        self._refused_bytes: int | None = None  # already logged
        self._changing = asyncio.Lock()

    async def ask(self, budget_bytes: int) -> None:
        """Use this budget from now on. Raises what `Models.resize` raises."""
        async with self._changing:
            await self._models.resize(budget_bytes)
            self.asked_bytes = budget_bytes
        log.info("memory: the budget is %s", format_bytes(budget_bytes))

    async def look(self) -> None:
        """Follow a limit that was lowered or raised again. One that does not fit yet is retried at every check."""
        async with self._changing:
            allowed = min(self.asked_bytes, await asyncio.to_thread(self._limit))
            was_refused, self._refused_bytes = self._refused_bytes, None
            if allowed == self._models.budget_bytes:
                return
            try:
                await self._models.resize(allowed)
            except Overloaded:
                return
            except ArgosyError as error:
                self._refused_bytes = allowed
                if allowed != was_refused:
                    log.error("memory: the limit is lower now, and the budget stays until it fits: %s", error)
                return
        log.info("memory: the budget is %s, because of a limit that changed", format_bytes(allowed))

    async def run(self) -> None:
        """Keep checking until cancelled. A failure that repeats is logged once."""
        logged: str | None = None
        for num_looks in itertools.count(1):
            await asyncio.sleep(LOOK_S)
            try:
                if num_looks % _LOOKS_A_MINUTE == 0:
                    await asyncio.to_thread(give_memory_back)
                await self.look()
            except Exception as error:  # keep checking after any failure
                if isinstance(error, OSError) and error.errno is not None:
                    failure = f"the limits of the machine cannot be read ({os.strerror(error.errno)}); the budget stays"
                else:
                    failure = where_it_failed(error)
                if failure != logged:
                    log.error("memory: %s", failure)
                logged = failure
            else:
                logged = None


async def resize(body: MemoryBody, request: Request) -> MemoryState:
    """Change the memory budget while requests go on: experts leave first, then KV blocks that no answer needs."""
    watch: MemoryWatch = request.app.state.memory_watch
    total_bytes = await asyncio.to_thread(machine_bytes)
    try:
        await watch.ask(parse_size(body.memory, total_bytes=total_bytes))
    except DoesNotFit as error:
        raise Refused(409, error.message, hint=error.hint, param="memory") from None
    return memory_of(models_of(request))
