"""The threads for work before the engine: reading bodies, rendering prompts, decoding pictures, transcribing.

Elsewhere: a single queue of threads is `serve/http/work.py`; steps run in the engine's own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from argosy.serve.http.caller import Caller
from argosy.serve.http.work import LARGE_JOB_S, WorkQueue

P = ParamSpec("P")
T = TypeVar("T")


class Work:
    """The threads shared by all models of a server, because the memory plan counts one long text at a time."""

    def __init__(self) -> None:
        self._small = WorkQueue()
        self._large = WorkQueue(num_threads=1, is_large=True)
        self._video = WorkQueue(num_threads=1, is_large=True)  # pictures do not wait for a film
        self.ears = WorkQueue(num_threads=1, job_s=LARGE_JOB_S)  # the transcriber takes one sound at a time

    @property
    def has_stopped(self) -> bool:
        """Whether work waits for a thread in vain."""
        return any(queue.has_stopped for queue in (self._small, self._large, self._video, self.ears))

    async def run(self, caller: Caller, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run work that precedes the engine in a thread. Raises what `call` raises.

        Raises:
            TooMany: too much work of this caller is already waiting.
        """
        queue = self._large if caller.held.takes_long else self._small
        if caller.held.takes_video:
            queue = self._video
        return await queue.run(caller.tenant, caller.work, partial(call, *args, **named))
