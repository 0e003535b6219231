"""Run checks for all requests, outside the event loop and the engine's thread.

A conversation is sent again with every turn, so a check that asks a model or another server is asked only about the
new part. Keyed digests of conversations that passed are kept: a text has passed only in its place, nowhere else. A
failed check leaves nothing behind.

Elsewhere: `screening.py` applies a policy to a request; `check_over_http.py` and `check_by_model.py` do the asking.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from argosy.errors import ArgosyError
from argosy.guard.guard_models import Question
from argosy.guard.keys import Key
from argosy.guard.policy import HttpCheck, ModelCheck
from argosy.guard.verdict import CheckFailed, Verdict
from argosy.serve.guards import check_over_http
from argosy.serve.http.work import WorkQueue

log = logging.getLogger("argosy.serve")

_MOST_PASSED = 8192  # conversations that have passed a check
_ASKED_AT_ONCE = 8
_MOST_WAITING = 4096  # texts of one key; each of its answers waits for at most one
_SAID_EVERY_S = 60.0  # how often to log that a check fails

T = TypeVar("T")
CountTokens = Callable[[str, int, int], None]
"""Counts tokens: (model, tokens of the question, tokens of its answer)."""
AskModel = Callable[[ModelCheck, Question, Key | None, CountTokens | None], Awaitable[Verdict]]
"""Asks a model on behalf of a key. Raises CheckFailed or ArgosyError."""


class Checks:
    """The threads of checks, and the conversations that have passed.

    ask_model: set by the server whose models are asked; None if there are none.
    """

    def __init__(self) -> None:
        self.ask_model: AskModel | None = None
        self._computing = WorkQueue(max_waiting=_MOST_WAITING)
        self._asking = WorkQueue(num_threads=_ASKED_AT_ONCE, max_waiting=_MOST_WAITING)
        self._passed: OrderedDict[bytes, None] = OrderedDict()
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._said_at: dict[str, float] = {}

    @property
    def has_stopped(self) -> bool:
        """Whether checks wait for a thread in vain."""
        return self._computing.has_stopped or self._asking.has_stopped

    async def compute(self, tenant: str, call: Callable[[], T]) -> T:
        """Run a check that only computes."""
        return await self._computing.run(tenant, call)

    async def verdict(
        self,
        check: HttpCheck | ModelCheck,
        question: Question,
        key: Key | None,
        count: CountTokens | None = None,
    ) -> Verdict:
        """Ask about a text. Raises CheckFailed."""
        tenant = "" if key is None else key.id
        try:
            async with asyncio.timeout(check.timeout_s):
                if isinstance(check, HttpCheck):
                    return await self._asking.run(tenant, check_over_http.judge, check, question.text)
                if self.ask_model is None:
                    raise CheckFailed("there is no such model")
                return await self.ask_model(check, question, key, count)
        except TimeoutError:
            raise self._failed(check.name, f"there was no answer within {check.timeout_s:g} s") from None
        except (CheckFailed, ArgosyError) as error:
            why = str(error) if isinstance(error, CheckFailed) else type(error).__name__
            raise self._failed(check.name, why) from None

    def num_passed(self, names: Sequence[bytes]) -> int:
        """How many of a conversation's first texts have passed, given the names of its prefixes (`names`)."""
        with self._lock:
            return next((at for at in range(len(names), 0, -1) if names[at - 1] in self._passed), 0)

    def passed(self, name: bytes) -> None:
        """Remember that a conversation has passed a check."""
        with self._lock:
            self._passed[name] = None
            self._passed.move_to_end(name)
            while len(self._passed) > _MOST_PASSED:
                self._passed.popitem(last=False)

    def names(self, check: HttpCheck | ModelCheck, digest: str, texts: Sequence[str]) -> list[bytes]:
        """The names of a conversation's prefixes, for a check under the policies with this digest."""
        found, before = [], f"{digest}\0{check.name}".encode()
        for text in texts:
            said = hashlib.blake2b(before, key=self._secret, digest_size=32)
            said.update(text.encode("utf-8", "surrogatepass"))
            before = said.digest()
            found.append(before)
        return found

    def _failed(self, name: str, why: str) -> CheckFailed:
        now = time.monotonic()
        if now - self._said_at.get(name, -_SAID_EVERY_S) >= _SAID_EVERY_S:
            self._said_at[name] = now
            log.error("policy: the check %s failed: %s", name, why)
        return CheckFailed(why)

    def forget(self) -> None:
        """Forget what has passed, because the checks have changed."""
        with self._lock:
            self._passed.clear()
