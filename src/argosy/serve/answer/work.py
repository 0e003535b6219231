"""The threads for the work before the engine: bodies are read, prompts rendered, pictures decoded, sounds transcribed.

Elsewhere: one queue of threads is `serve/http/work.py`; steps run in the engine's own thread.
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
    """All models of a server share these threads, because the memory plan counts one long text at a time."""

    def __init__(self) -> None:
        self._small = WorkQueue()
        self._large = WorkQueue(num_threads=1, is_large=True)
        self._video = WorkQueue(num_threads=1, is_large=True)  # pictures do not wait for a film
        self.ears = WorkQueue(num_threads=1, job_s=LARGE_JOB_S)  # the transcriber takes one sound at a time

    @property
    def has_stopped(self) -> bool:
        """Whether work waits for a thread that does not come."""
        return any(queue.has_stopped for queue in (self._small, self._large, self._video, self.ears))

    async def run(self, caller: Caller, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run the work before the engine in a thread. Raises what `call` raises.

        Raises:
            TooMany: too much work of this caller is already waiting.
        """
        queue = self._large if caller.held.takes_long else self._small
        if caller.held.takes_video:
            queue = self._video
        return await queue.run(caller.tenant, caller.work, partial(call, *args, **named))
