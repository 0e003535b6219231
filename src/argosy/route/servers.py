"""The servers behind a router: which are up, how much work each has, and which one gets the next request.

    GET /ready, every second  ->  up, draining or down  ─┐
    tokens of requests that are not answered yet         ├─>  Fleet.choose  ->  a server
    prompt prefixes that a server has computed           ─┘

The next request goes to the server with the fewest tokens left to compute before it ends: those that the server
still owes, plus the part of the prompt that it has not computed before. A request's tokens are estimated from the
size of its body and its limit; the usage that answers report corrects the estimate.

A server that refuses a connection is down at once; a silent one is down after `Health.failures` checks. Every
request that waits for it is then told. A server that answers "not ready" gets no new requests and finishes those it
has; a request that hears nothing for `NOT_READY_S` of that time is told that the server is down.

Elsewhere: connections are `upstream.py`; what a request does when its server dies is `app.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from argosy.errors import Overloaded
from argosy.route.prefixes import Mark, Prefixes
from argosy.route.upstream import Address, Reply, ServerGone, is_ready

log = logging.getLogger("argosy.serve")

State = Literal["up", "draining", "down"]
RETRY_S = 2
NOT_READY_S = 60.0
_LEARN = 0.05  # weight of the latest answer in the running estimates
_LOOK_S = 0.05  # how often a request without a server looks for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How servers are checked.

    failures: consecutive silent checks after which a server is down.
    """

    period_s: float = 1.0
    timeout_s: float = 3.0
    failures: int = 3


@dataclass(slots=True, eq=False)
class Server:
    """One server.

    Attributes:
        owed_tokens: an estimate for its unanswered requests.
        replies: connections on which it owes an answer. They are closed when the server goes down, which wakes
            their readers.
        used: for each key with a daily limit, the tokens that the server has counted, and until when they count.
    """

    number: int
    address: Address
    state: State = "down"
    owed_tokens: float = 0.0
    num_requests: int = 0
    num_failures: int = 0
    silent_checks: int = 0
    not_ready_at: float | None = None  # monotonic seconds of the first check that said "not ready"
    fault: str = ""  # why it is down
    last_chosen: int = 0
    replies: set[Reply] = field(default_factory=set)
    used: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Load:
    """The work that a server owes for one request. Each token that arrives reduces it."""

    server: Server
    prompt_tokens: float
    new_tokens: float
    num_said: int = 0

    def say(self) -> None:
        """Count one more token of the answer."""
        if self.num_said == 0:
            self._lower(self.prompt_tokens)
            self.prompt_tokens = 0.0
        self.num_said += 1
        if self.new_tokens > 1.0:  # an answer longer than expected still owes one token
            self._lower(1.0)
            self.new_tokens -= 1.0

    def _lower(self, num_tokens: float) -> None:
        self.server.owed_tokens -= num_tokens


class Estimate:
    """Estimates the tokens of requests before they are answered."""

    def __init__(self) -> None:
        self.bytes_per_token = 4.0
        self.new_tokens = 256.0  # for an answer whose limit is higher or unknown

    def tokens(self, num_bytes: int, limit: int | None) -> tuple[float, float]:
        """Estimated tokens of a prompt in a body of `num_bytes`, and of its answer."""
        new = self.new_tokens if limit is None else min(self.new_tokens, float(limit))
        return num_bytes / self.bytes_per_token, max(1.0, new)

    def learn(self, num_bytes: int, prompt_tokens: int | None, new_tokens: int | None) -> None:
        """Adjust the estimates by the usage that an answer reports."""
        if prompt_tokens and num_bytes:
            self.bytes_per_token += _LEARN * (min(64.0, num_bytes / prompt_tokens) - self.bytes_per_token)
        if new_tokens:
            self.new_tokens += _LEARN * (min(1e6, new_tokens) - self.new_tokens)


class Fleet:
    """All servers of a router. Everything here runs on the event loop.

    Args:
        addresses: the servers' addresses.

    Attributes:
        is_draining: the router is stopping.
    """

    def __init__(self, addresses: Sequence[Address], health: Health | None = None) -> None:
        self.servers = [Server(number, address) for number, address in enumerate(addresses)]
        self.prefixes = Prefixes()
        self.estimate = Estimate()
        self.is_draining = False
        self._health = health or Health()
        self._checks: list[asyncio.Task[None]] = []
        self._num_chosen = 0

    async def preload(self, names: Sequence[str] = ()) -> None:
        """Check every server once, then keep checking. The router has no models, so `names` is unused."""
        await asyncio.gather(*(self.check(server) for server in self.servers))
        self._checks = [asyncio.create_task(self._watch(server)) for server in self.servers]

    def drop_expired(self) -> None:
        """Do nothing: a router keeps nothing for clients."""

    async def stop(self) -> None:
        """End running requests with an error: nothing can continue them once the router stops."""
        self.is_draining = True
        for server in self.servers:
            _break_off(server)

    async def close(self) -> None:
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)

    async def _watch(self, server: Server) -> None:
        while True:
            await asyncio.sleep(self._health.period_s)
            await self.check(server)

    async def check(self, server: Server) -> State:
        """Check the state of a server."""
        try:
            ready = await is_ready(server.address, timeout_s=self._health.timeout_s)
        except ServerGone as error:
            server.silent_checks += 1
            if not error.facts.get("is_silent") or server.silent_checks >= self._health.failures:
                self.lose(server, error.message)
        else:
            server.silent_checks, server.fault = 0, ""
            self._become(server, "up" if ready else "draining")
            self._end_silent_replies(server)
        return server.state

    def lose(self, server: Server, reason: str) -> None:
        """Mark a server as down, and tell every request that waits for it."""
        server.num_failures += server.state != "down"
        if server.state != "down" or server.fault != reason:
            log.warning("%s is down: %s", server.address, reason)
        server.state, server.fault = "down", reason
        _break_off(server)
        self.prefixes.forget(server.number)

    @staticmethod
    def _end_silent_replies(server: Server) -> None:
        """End the silent answers of a server that is not ready."""
        now = time.monotonic()
        if server.state == "up":
            server.not_ready_at = None
            return
        server.not_ready_at = since = now if server.not_ready_at is None else server.not_ready_at
        for reply in list(server.replies):
            if now - max(since, reply.heard_at) > NOT_READY_S:
                reply.close()

    def _become(self, server: Server, state: State) -> None:
        if server.state != state:
            log.info("%s is %s", server.address, state)
        server.state = state

    def choose(self, marks: Sequence[Mark], num_bytes: int, *, without: Collection[Server] = ()) -> Server:
        """Choose the server for a request.

        Args:
            num_bytes: the size of its body.
            without: servers that have failed this request.

        Raises:
            Overloaded: no server is up.
        """
        up = [server for server in self.servers if server.state == "up" and server not in without]
        if self.is_draining:
            raise Overloaded("the router is stopping", retry_after_s=30)
        if not up:
            num_up = sum(server.state == "up" for server in self.servers)
            raise Overloaded(
                f"no server can take the request now: {num_up} of {len(self.servers)} are up",
                retry_after_s=RETRY_S,
            )
        known = self.prefixes.known(marks)
        prompt_tokens, _ = self.estimate.tokens(num_bytes, None)
        prompt_chars = marks[-1].num_chars if marks else 0

        def cost(server: Server) -> tuple[float, int]:
            share = known.get(server.number, 0) / prompt_chars if prompt_chars else 0.0
            return server.owed_tokens + prompt_tokens * (1.0 - share), server.last_chosen

        chosen = min(up, key=cost)
        self._num_chosen += 1
        chosen.last_chosen = self._num_chosen
        if marks:
            self.prefixes.note(marks, chosen.number)
        return chosen

    async def wait_for_one(self, without: Collection[Server], patience_s: float) -> None:
        """Wait, up to `patience_s`, until a server not in `without` is up."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until and not self.is_draining:
            if any(server.state == "up" and server not in without for server in self.servers):
                return
            await asyncio.sleep(_LOOK_S)

    @contextmanager
    def owing(self, server: Server, num_bytes: int, limit: int | None) -> Iterator[Load]:
        """Count a request as owed by `server` until the context ends."""
        load = Load(server, *self.estimate.tokens(num_bytes, limit))
        server.owed_tokens += load.prompt_tokens + load.new_tokens
        server.num_requests += 1
        try:
            yield load
        finally:
            server.owed_tokens -= load.prompt_tokens + load.new_tokens


def _break_off(server: Server) -> None:
    for reply in list(server.replies):
        reply.close()
