"""A reverse proxy for several servers of the same models: one address, and an answer that outlives its server.

    client  ->  Gate: host, origin, key, limits, size  ->  Router  ->  Fleet.choose  ->  a server  ->  its events
                                                             └── the server dies: another one repeats the answer, and
                                                                 the client gets the part it lacks

Paths, limits and errors are a server's own: the router uses the server's table of routes and its gate. It passes
the client's key on and never logs it. It passes a stream on as it arrives, and a whole answer once it is complete,
so until then another server can take over. A request's memory (its body, twice while it is sent, and its whole
answer) is charged to the memory for bodies.

A request that concerns every server, such as a stop, goes to all of them. A key's tokens per day are the sum over
all servers. If a server dies and no other can repeat the answer, the request ends with a clear error: it refers to
kept responses, or the repetition says something else. Any server may answer a request that only reads.

Elsewhere: servers are `servers.py`; requests to all of them `everywhere.py`; repeating an answer `events.py`;
reading a body `asked.py`; starting `run.py`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection
from contextlib import ExitStack, aclosing, suppress
from typing import Any
from urllib.parse import quote

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from argosy.errors import ArgosyError, Overloaded
from argosy.guard.keys import KeyRing
from argosy.guard.limits import Limits
from argosy.route.asked import Asked, read_asked
from argosy.route.events import (
    BadStream,
    Event,
    NotTheSame,
    Splitter,
    Transcript,
    is_failure,
    parse_event,
)  # fmt: skip
from argosy.route.everywhere import EVERYWHERE, ask_everywhere, used_everywhere
from argosy.route.metrics import RouteMetrics
from argosy.route.servers import Fleet, Load, Server
from argosy.route.upstream import RawHeaders, Reply, ServerGone
from argosy.serve.answer.work import Work
from argosy.serve.app import ROUTES
from argosy.serve.http.access import Dialect, RouteRule, dialect_of
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused, error_body
from argosy.serve.http.gate import TOKENS_LEFT, Gate
from argosy.serve.http.held import Pool, PoolShare
from argosy.serve.http.origins import Site
from argosy.serve.http.streams import JSON_LINES, SSE, Encoding, EventStream, answer_whole, error_event, sse
from argosy.strict_json import JsonError, parse_json

log = logging.getLogger("argosy.serve")

BODIES_BYTES = 256 << 20  # for all requests; the longest body is 48 MiB and takes three times its size
# servers that one request may fail on, so that a request that kills servers cannot take them all
MOST_TRIES = 3
PATIENCE_S = 15.0  # how long an answer that has begun waits for a server
MOST_OWNERS = 1 << 16  # kept responses and items whose server is remembered
_READ_AT_ONCE_BYTES = 32 << 10
_USAGE_BYTES = 256 << 10  # a longer whole answer is not read for its usage
# Request headers that concern this connection or that the gate has checked. To a server the client is not a
# browser.
_NOT_SENT = {
    b"host", b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"te", b"trailer", b"upgrade",
    b"expect", b"accept-encoding", b"origin", b"referer", b"proxy-authorization", b"proxy-connection", b"forwarded",
}  # fmt: skip
_SECRETS = (b"authorization", b"x-api-key")
_NOT_SENT_BEGINNINGS = (b"sec-", b"x-forwarded-", b"access-control-")
_NOT_RETURNED = {
    *TOKENS_LEFT,  # of one server
    b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"trailer", b"upgrade", b"server", b"date",
    b"x-accel-buffering",
}  # fmt: skip


class Broken(ArgosyError):
    """The server of an answer died, and no other server can continue it."""

    http_status = 503


class Router:
    """The ASGI application behind the gate.

    Attributes:
        pool: the gate's memory for request bodies and answers.
    """

    pool: Pool

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self.fleet = fleet
        self._limits = limits
        self.metrics = RouteMetrics(fleet)
        self._work = Work()
        self._owners: OrderedDict[str, tuple[int, str]] = OrderedDict()  # client's id -> server, its id there

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = self._own(scope["path"]) or await self._respond(request)
        await response(scope, receive, send)

    def _own(self, path: str) -> Response | None:
        """The answer to a request about the router itself."""
        num_up = sum(server.state == "up" for server in self.fleet.servers)
        match path:
            case "/health":
                return JSONResponse({"status": "ok"})
            case "/ready" | "/healthz":
                if self.fleet.is_draining:
                    raise Overloaded("the router is stopping", retry_after_s=30)
                if num_up == 0:
                    raise Overloaded("no server is up", retry_after_s=1)
                return JSONResponse({"status": "ready"})
            case "/metrics":
                data = generate_latest(self.metrics.registry)
                return Response(data, headers={"content-type": CONTENT_TYPE_LATEST})
        return None

    async def _respond(self, request: Request) -> Response:
        caller: Caller = request.state.caller
        rule: RouteRule = request.state.rule
        if rule.path.startswith("/v1/cluster"):
            raise Refused(
                409, "workers belong to one server, and the router does not choose it",
                hint="send this to the server itself",
            )  # fmt: skip
        if rule.is_counted and caller.key is not None and caller.key.tokens_per_day is not None:
            secret = [(name, value) for name, value in request.headers.raw if name in _SECRETS]
            if (used := await used_everywhere(self.fleet, caller.key.id, secret)) is not None:
                self._limits.take_used(caller.key, *used)
        asked = await self._read(request, caller)
        if rule.scope == "admin" or asked.loads_only:
            share = self.pool.share()
            caller.ending.callback(share.close)
            together = EVERYWHERE[rule.path] if rule.scope == "admin" else None
            return await ask_everywhere(self.fleet, asked, together, share.hold)
        exchange = _Exchange(self, asked, caller, dialect_of(asked.route))
        try:
            await exchange.begin()
            if exchange.encoding is None and not exchange.is_awaited:
                return await exchange.answer()
        except BaseException:
            exchange.close()
            raise
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in _returned(exchange.reply.headers)
            if name != b"content-type"
        }
        if exchange.encoding is None:
            return await answer_whole(
                exchange.answer(), caller, exchange.close, dialect=dialect_of(asked.route), headers=headers
            )
        return EventStream(
            exchange.events(), caller, exchange.close, encoding=exchange.encoding, failed=exchange.failed,
            headers=headers, idle=exchange.idle,
        )  # fmt: skip

    async def _read(self, request: Request, caller: Caller) -> Asked:
        """Read the request; its body stays in memory until it ends."""
        route: str = request.scope["path"]
        path = quote(route, safe="/~:@!$&'()*+,;=-._")
        query = request.scope["query_string"].decode("latin-1")
        asked = Asked(
            route=route, method=request.method, path=f"{path}?{query}" if query else path,
            headers=_sent(request.headers.raw),
        )  # fmt: skip
        if request.method != "POST":
            parts = route.split("/")
            if parts[1:3] == ["v1", "responses"] and len(parts) > 3:
                asked.references = (parts[3],)
            return asked
        asked.body = await request.body()
        kept = self.pool.share()
        caller.ending.callback(kept.close)
        kept.hold(2 * len(asked.body))  # the connection to a server copies it
        if not request.headers.get("content-type", "").startswith("multipart/"):
            tenant = (request.headers.get("authorization") or request.headers.get("x-api-key") or "").encode()
            args = asked, caller.held.share, kept.hold, self.fleet.prefixes, tenant
            if len(asked.body) < _READ_AT_ONCE_BYTES:
                read_asked(*args)
            else:
                caller.held.takes_long = True
                await self._work.run(caller, read_asked, *args)
        caller.held.share.release()
        return asked

    def owner(self, asked: Asked) -> tuple[Server | None, dict[str, str]]:
        """The server that keeps what a request refers to, if known, and the ids that this server uses for it."""
        server, renamed = None, {}
        for name in asked.references:
            if name in self._owners:
                number, own = self._owners[name]
                self._owners.move_to_end(name)
                server = self.fleet.servers[number]
                if own != name:
                    renamed[name] = own
        return server, renamed

    def note_owner(self, names: Collection[str], server: Server, renamed: dict[str, str]) -> None:
        for name in names:
            self._owners[name] = (server.number, renamed.get(name, name))
            self._owners.move_to_end(name)
        while len(self._owners) > MOST_OWNERS:
            self._owners.popitem(last=False)


class _Exchange:
    """One request and its answer, from one server or from several in turn.

    Attributes:
        reply: the answer of the server that answers now.
        encoding: how it writes events; None if the answer is whole.
        idle: the bytes that a silent stream sends to stay alive.
    """

    reply: Reply
    idle: bytes = b""

    def __init__(self, router: Router, asked: Asked, caller: Caller, dialect: Dialect) -> None:
        self._router, self._fleet, self._asked, self._caller, self._dialect = (
            router, router.fleet, asked, caller, dialect,
        )  # fmt: skip
        self._share: PoolShare = router.pool.share()
        self._serving = ExitStack()  # the connection to the server, and its owed tokens
        self._server: Server | None = None
        self._failed: set[Server] = set()
        self._num_tries = 0
        self._prompt_tokens: int | None = None
        self._new_tokens: int | None = None
        self._load: Load | None = None
        self.encoding: Encoding | None = None
        self._transcript: Transcript | None = None
        self._renamed: dict[str, str] = {}

    def close(self) -> None:
        """End the exchange at any point."""
        self._serving.close()
        self._share.close()

    async def begin(self) -> None:
        """Find a server that answers, and wait for the head of its answer.

        Raises:
            Overloaded: no server can take the request.
            Broken: the only server that may answer has died.
        """
        while True:
            server = self._choose()
            try:
                await self._ask(server)
            except ServerGone as error:
                await self._leave(server, error)
                continue
            is_elsewhere = self.reply.status in (400, 404) and self._asks_around
            if (is_elsewhere or self.reply.status == 503) and self._has_another(server):
                self._serving.close()
                self._failed.add(server)
                continue
            return

    @property
    def _asks_around(self) -> bool:
        """Whether any server may keep what the request refers to, because the router started after it was kept."""
        return bool(self._asked.references) and self._router.owner(self._asked)[0] is None

    def _has_another(self, server: Server) -> bool:
        if self._num_tries >= MOST_TRIES or (self._asked.references and not self._asks_around):
            return False
        without = {*self._failed, server}
        return any(one.state == "up" and one not in without for one in self._fleet.servers)

    def _choose(self) -> Server:
        owner, self._renamed = self._router.owner(self._asked)
        if owner is None:
            return self._fleet.choose(self._asked.marks, len(self._asked.body), without=self._failed)
        if owner.state == "down" or owner in self._failed:
            raise Broken(
                "the server that keeps what this request refers to is down",
                hint="send the items themselves instead of their ids",
            )
        return owner

    async def _ask(self, server: Server) -> None:
        asked, body, path = self._asked, self._asked.body, self._asked.path
        for name, own in self._renamed.items():
            body = body.replace(f'"{name}"'.encode(), f'"{own}"'.encode())
            path = path.replace(f"/{name}", f"/{own}")
        self._server = server
        self._load = self._serving.enter_context(self._fleet.owing(server, len(body), asked.limit))
        try:
            self.reply = reply = await Reply.connect(server.address)
            self._serving.callback(reply.close)
            server.replies.add(reply)
            self._serving.callback(server.replies.discard, reply)
            if server.state == "down":
                raise ServerGone(f"{server.address} is down", server=str(server.address))
            await reply.ask(asked.method, path, asked.headers, body, streams=asked.streams)
        except BaseException:
            self._serving.close()
            raise
        kind = reply.header(b"content-type").partition(b";")[0].strip().decode("latin-1")
        streams = {one.media_type: one for one in (SSE, JSON_LINES)}
        self.encoding = streams.get(kind) if reply.status == 200 else None
        self.idle = b": keep-alive\n\n" if self.encoding is SSE else b""
        # The server has begun a whole answer, which may take long.
        self.is_awaited = self.reply.status == 200 and kind == "application/json"

    async def _leave(self, server: Server, error: ArgosyError) -> None:
        """Record that `server` has failed this request.

        Raises:
            Broken: no other server may answer it.
        """
        self._serving.close()
        self._num_tries += 1
        self._failed.add(server)
        log.warning("%s %s", self._caller.request_id, error.message)
        await self._fleet.check(server)
        if not self._asked.is_repeatable or self._num_tries >= MOST_TRIES:
            self._router.metrics.replayed("failed")
            message = f"the request failed {self._num_tries} times"
            if not self._asked.is_repeatable:
                message = "the server failed, and only that server keeps what this request refers to"
            raise Broken(message, hint="send the request again") from None

    async def answer(self) -> Response:
        """The complete answer. Raises what `begin` raises."""
        try:
            body = await self._whole()
            return _response(self.reply, body)
        finally:
            self.close()

    async def _whole(self) -> bytes:
        while True:
            server = self._server
            assert server is not None
            body = bytearray()
            try:
                async with aclosing(self.reply.parts()) as parts:
                    async for part in parts:
                        self._share.hold(2 * len(part))  # it is copied once
                        body += part
                # The server sent the status 200 before it knew how the answer would end.
                has_failed = body.startswith(b"\n") and is_failure(parse_event(bytes(body)))
                if has_failed and await self._fleet.check(server) != "up":
                    raise ServerGone(f"{server.address} is stopping", server=str(server.address))
                self._count_whole(body)
                return self._returned_ids(bytes(body))
            except (ServerGone, BadStream) as error:
                self._share.release()
                await self._leave(server, error)
                await self.begin()
                self._router.metrics.replayed("repeated")
                if self.encoding is not None:
                    raise Broken("the server failed, and another one answered in another form") from None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of the answer, each exactly once, even if its server dies.

        Raises:
            ArgosyError: no server can continue it.
        """
        assert self.encoding is not None
        encoding = self.encoding
        transcript = self._transcript = Transcript(encoding)
        while True:
            server = self._server
            assert server is not None
            try:
                async with aclosing(self._events_of(server, encoding, transcript)) as events:
                    async for event in events:
                        yield event
                self._count(
                    self._prompt_tokens, self._new_tokens or (self._load.num_said if self._load else 0)
                )
                return
            except NotTheSame:
                self._router.metrics.replayed("failed")
                raise
            except (ServerGone, BadStream) as error:
                if transcript.is_whole:
                    return
                await self._leave(server, error)
            if self._asked.method != "POST":
                raise Broken("the server failed", hint="send the request again")
            if not self._has_another(server):  # the failed ones may be back up
                self._failed.clear()
            await self._fleet.wait_for_one(self._failed, PATIENCE_S)
            await self.begin()
            if self.encoding is not encoding:
                self._router.metrics.replayed("failed")
                raise Broken(
                    f"the server failed, and another one answered with status {self.reply.status}",
                    hint="send the request again",
                )
            transcript.begin_replay()
            self._router.metrics.replayed("continued")

    async def _events_of(
        self, server: Server, encoding: Encoding, transcript: Transcript
    ) -> AsyncGenerator[bytes, None]:
        """Yield one server's part of the answer.

        Raises:
            ServerGone, BadStream: the server cannot finish it.
            NotTheSame: the client already has the beginning of a different answer.
        """
        splitter = Splitter(encoding, self._share.hold)
        async with aclosing(self.reply.parts()) as parts:
            async for part in parts:
                for raw in splitter.feed(part):
                    event = parse_event(raw)
                    if is_failure(event) and await self._fleet.check(server) != "up":
                        raise ServerGone(f"{server.address} is stopping", server=str(server.address))
                    made = transcript.take(raw, event)
                    self._note(event, server, transcript)  # after `take`, ids are those that the client knows
                    if made is not None:
                        yield self._returned_ids(made)
        splitter.end()
        if transcript.is_catching_up:
            raise NotTheSame("the server failed, and another server gives a shorter answer to this request")

    def _note(self, event: Event, server: Server, transcript: Transcript) -> None:
        """Note what an event says about the answer's cost and the items that the server keeps."""
        data = event.data
        if not isinstance(data, dict):
            return
        if self._load is not None:
            self._load.say()
        prompt, new = _usage(data)
        self._prompt_tokens, self._new_tokens = prompt or self._prompt_tokens, new or self._new_tokens
        response = data.get("response")
        if self._asked.route == "/v1/responses" and isinstance(response, dict):
            self._router.note_owner(_kept_in(response), server, transcript.renamed)

    def _count_whole(self, body: bytearray) -> None:
        if len(body) > _USAGE_BYTES or self.reply.status != 200:
            return
        with suppress(JsonError):
            data = parse_json(bytes(body))
            if isinstance(data, dict):
                self._count(*_usage(data))
                if self._asked.route == "/v1/responses" and self._server is not None:
                    self._router.note_owner(_kept_in(data), self._server, {})

    def _count(self, prompt: int | None, new: int | None) -> None:
        self._caller.count(prompt=prompt or 0, new=new or 0)
        self._fleet.estimate.learn(len(self._asked.body), prompt, new)

    def _returned_ids(self, data: bytes) -> bytes:
        """Replace ids of kept responses by those that the client knows."""
        for name, own in self._renamed.items():
            data = data.replace(own.encode(), name.encode())
        return data

    def failed(self, error: Exception) -> bytes:
        """The last event of a stream that no server can finish."""
        if self.encoding is JSON_LINES or self._asked.route != "/v1/responses":
            return error_event(error, self._dialect, self._caller)
        _, body = error_body(error, "openai", self._caller.request_id)
        message = body["error"]["message"]  # type: ignore[index]
        return sse({"type": "error", "code": "server_error", "message": message, "param": None}, "error")


# Anthropic's names for prompt tokens that `input_tokens` excludes
_CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")


def _usage(data: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer, if an event or a whole answer reports them."""
    for holder in (data, data.get("response"), data.get("message")):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            prompt = [
                _number(usage, "prompt_tokens", "input_tokens"),
                *(_number(usage, name) for name in _CACHED),
            ]
            return sum(filter(None, prompt)) or None, _number(usage, "completion_tokens", "output_tokens")
    return _number(data, "prompt_eval_count"), _number(data, "eval_count")


def _number(holder: dict[str, Any], *names: str) -> int | None:
    return next((holder[name] for name in names if type(holder.get(name)) is int and holder[name] > 0), None)


def _kept_in(response: dict[str, Any]) -> list[str]:
    """The ids of a response and of its items."""
    output = response.get("output")
    items = [response, *(output if isinstance(output, list) else [])]
    found = [item.get("id") for item in items if isinstance(item, dict)]
    return [one for one in found if isinstance(one, str)]


def _sent(headers: RawHeaders) -> RawHeaders:
    """The request headers to pass to a server."""
    kept = [
        (name, value) for name, value in headers
        if name not in _NOT_SENT and not name.startswith(_NOT_SENT_BEGINNINGS)
    ]  # fmt: skip
    return [*kept, (b"accept-encoding", b"identity")]


def _returned(headers: RawHeaders) -> RawHeaders:
    """The answer headers to pass to the client."""
    return [
        (name, value) for name, value in headers
        if name not in _NOT_RETURNED and not name.startswith(b"access-control-")
    ]  # fmt: skip


def _response(reply: Reply, body: bytes) -> Response:
    response = Response(body, reply.status)
    response.raw_headers = [*_returned(reply.headers), (b"content-length", b"%d" % len(body))]
    return response


def make_router(
    fleet: Fleet,
    ring: KeyRing,
    *,
    site: Site | None = None,
    limits: Limits | None = None,
) -> Gate:
    """Build the router as an ASGI application.

    Args:
        ring: the keys that the router accepts; without a file it checks none and passes on what it gets.
    """
    limits = limits or Limits()
    router = Router(fleet, limits)
    gate = Gate(
        router, [*(route.rule for route in ROUTES), RouteRule(method="GET", path="/healthz", scope=None)], ring,
        limits, site=site, takes_media=True, observe=router.metrics.observe,
    )  # fmt: skip
    router.pool = gate.bodies
    router.pool.max_bytes = BODIES_BYTES
    return gate
