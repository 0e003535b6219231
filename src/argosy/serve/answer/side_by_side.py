"""Run the many small parts of one request in the engine, a few at a time: texts to embed, documents to rank.

    part 0, 1, 2 ...  ─ AT_ONCE of them, submitted in a worker thread ─ the engine's thread ─>  take(number, Result)

The parts run alongside other clients' answers, under the same admission. If one fails or the client disconnects,
the rest end before the next step.

Elsewhere: answers that a client reads as they are generated are `answers.py` and `respond.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from argosy.engine.loop import AnswerEnd, AnswerToken, Event
from argosy.engine.sequence import Result
from argosy.errors import ArgosyError, Overloaded, UsageError
from argosy.serve.answer.service import Service
from argosy.serve.http.caller import Caller

AT_ONCE = 8  # parts of a request that wait or run at once; the others are not read yet
_LONG = 32 << 10  # characters or ids; longer parts run one at a time in a separate thread

Deliver = Callable[[Event], None]


async def run_parts(
    service: Service,
    caller: Caller,
    num_parts: int,
    longest: int,
    submit: Callable[[int, Deliver], Any],
    take: Callable[[int, Result], None],
    *,
    param: Callable[[int], str],
) -> None:
    """Submit every part and pass each result on.

    Args:
        longest: characters or token ids of the longest part. A long body of short parts does not count as long
            work.
        submit: queues the part with this index in the engine; a worker thread calls it.
        take: receives a result in the event loop.
        param: the place of a part in the body, for errors.

    Raises:
        ArgosyError: what `submit` raised, or what ended a part. While other parts of the request run, a part
            without room waits; `Overloaded` is raised only when none is left.
    """
    caller.answered_by(service.model.id, service.digests)
    caller.held.takes_long = longest > _LONG
    waiting = deque(range(num_parts))
    num_runners = min(AT_ONCE, num_parts)

    async def take_turns() -> None:
        nonlocal num_runners
        try:
            while waiting:
                number = waiting.popleft()
                try:
                    take(number, await _Part(service, caller, partial(submit, number)).result())
                except UsageError as error:
                    error.facts.setdefault("param", param(number))
                    raise
                except Overloaded:
                    if num_runners == 1:
                        raise
                    waiting.appendleft(number)  # another runner takes it when its own part has ended
                    return
        finally:
            num_runners -= 1

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_runners):
                group.create_task(take_turns())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


class _Part:
    """A part on its way through the engine."""

    def __init__(self, service: Service, caller: Caller, submit: Callable[[Deliver], Any]) -> None:
        self._service, self._caller, self._submit = service, caller, submit
        self._events = asyncio.get_running_loop()
        self._end: asyncio.Future[Result] = self._events.create_future()
        self._request: Any = None
        self._is_left = False

    async def result(self) -> Result:
        """Submit the part and wait for its result. If the waiting is cancelled, so is the part."""
        try:
            await self._service.work.run(self._caller, self._begin)
            result = (await self._end).require()
        finally:
            self._is_left = True
            # the future is cancelled with the waiting task
            has_ended = self._end.done() and not self._end.cancelled()
            if self._request is not None and not has_ended:
                self._service.loop.cancel(self._request)
        if result.finish_reason == "cancelled":
            raise ArgosyError("the answer was cancelled")
        return result

    def _begin(self) -> None:
        """Queue the part, in a worker thread."""
        self._request = self._submit(self._deliver)
        self._caller.count(prompt=len(self._request.prompt_ids))
        if self._is_left:
            self._service.loop.cancel(self._request)

    def _deliver(self, event: Event) -> None:
        """Take an event, in the engine's thread."""
        try:
            if isinstance(event, AnswerToken):
                self._caller.count(new=1)
        except Exception as error:
            self._events.call_soon_threadsafe(self._fail, error)
            raise  # the loop reports it and ends the part
        if isinstance(event, AnswerEnd):
            self._events.call_soon_threadsafe(self._settle, event.result)

    def _settle(self, result: Result) -> None:
        if not self._end.done():
            self._end.set_result(result)

    def _fail(self, error: Exception) -> None:
        if not self._end.done():
            self._end.set_exception(error)
