"""The servers behind a router: which of them answer, how much each has to do, and which one is next.

    GET /ready, every second  ->  up, draining or down  ─┐
    tokens of requests that are not answered yet         ├─>  Fleet.choose  ->  a server
    beginnings of prompts that a server has computed     ─┘

The next request goes where the fewest tokens stand between it and its end: those that the server still owes, and those
of the prompt that it has not computed before. A request's tokens are guessed from the bytes of its body and its limit;
what answers report corrects the guess.

A server that refuses a connection is down at once, one that is silent after `Health.failures` checks; then every
request that waits for it is told. One that answers "not ready" gets no new requests and finishes those it has; a
request to which it sends nothing for `NOT_READY_S` of that time is told that it is down.

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
_LEARN = 0.05  # weight of the latest answer in what is learnt from all
_LOOK_S = 0.05  # how often a request without a server looks for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How servers are checked.

    failures: silent checks in a row after which a server is down.
    """

    period_s: float = 1.0
    timeout_s: float = 3.0
    failures: int = 3


@dataclass(slots=True, eq=False)
class Server:
    """One server.

    Attributes:
        owed_tokens: estimate for its unanswered requests.
        replies: connections on which it owes an answer. They are closed when the server goes down, and those who read
            from them notice.
        used: by key with tokens per day, the tokens that the server has counted, and until when they count.
    """

    number: int
    address: Address
    state: State = "down"
    owed_tokens: float = 0.0
    num_requests: int = 0
    num_failures: int = 0
    silent_checks: int = 0
    not_ready_at: float | None = None  # monotonic seconds of the first check since that said so
    fault: str = ""  # why it is down
    last_chosen: int = 0
    replies: set[Reply] = field(default_factory=set)
    used: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Load:
    """The work that a server owes for one request. Each token that comes lowers it."""

    server: Server
    prompt_tokens: float
    new_tokens: float
    num_said: int = 0

    def say(self) -> None:
        """Note one more token of the answer."""
        if self.num_said == 0:
            self._lower(self.prompt_tokens)
            self.prompt_tokens = 0.0
        self.num_said += 1
        if self.new_tokens > 1.0:  # an answer that is longer than expected owes one more
            self._lower(1.0)
            self.new_tokens -= 1.0

    def _lower(self, num_tokens: float) -> None:
        self.server.owed_tokens -= num_tokens


class Estimate:
    """Tokens of requests, guessed before they are answered."""

    def __init__(self) -> None:
        self.bytes_per_token = 4.0
        self.new_tokens = 256.0  # for an answer whose limit is higher, or unknown

    def tokens(self, num_bytes: int, limit: int | None) -> tuple[float, float]:
        """Tokens of a prompt whose body has `num_bytes`, and of its answer."""
        new = self.new_tokens if limit is None else min(self.new_tokens, float(limit))
        return num_bytes / self.bytes_per_token, max(1.0, new)

    def learn(self, num_bytes: int, prompt_tokens: int | None, new_tokens: int | None) -> None:
        """Learn from the usage that an answer reports."""
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
        """Check every server once, and keep checking. `names` would be those of models."""
        await asyncio.gather(*(self.check(server) for server in self.servers))
        self._checks = [asyncio.create_task(self._watch(server)) for server in self.servers]

    def drop_expired(self) -> None:
        """Nothing: a router keeps nothing for clients."""

    async def stop(self) -> None:
        """End running requests with an error: nobody can continue them, because the router takes no more."""
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
        """Look how a server is now."""
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
        """Note that a server is down, and tell all that wait for it."""
        server.num_failures += server.state != "down"
        if server.state != "down" or server.fault != reason:
            log.warning("%s is down: %s", server.address, reason)
        server.state, server.fault = "down", reason
        _break_off(server)
        self.prefixes.forget(server.number)

    @staticmethod
    def _end_silent_replies(server: Server) -> None:
        """End what a server owes that is not ready, and sends nothing."""
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
        """The server that a request goes to.

        Args:
            num_bytes: size of its body.
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
        """Wait until a server besides `without` is up, but not for long."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until and not self.is_draining:
            if any(server.state == "up" and server not in without for server in self.servers):
                return
            await asyncio.sleep(_LOOK_S)

    @contextmanager
    def owing(self, server: Server, num_bytes: int, limit: int | None) -> Iterator[Load]:
        """Count a request among those that `server` has not answered."""
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
