"""The checks that every request must pass before its route runs.

    connection -> host, origin -> route, or 404 -> key, scope, limits -> content type -> size, time of the body -> route
                          └── a preflight of an allowed origin is answered here

Every route is in the table with its rule; anything else is 404. The path is the one that the client sent
(`scope["path"]`), without the base path. HEAD is answered like GET, without the body. The log records the request's
id, method, route template, status, times, token counts, model and key id, but no content. An unexpected exception
becomes "internal error"; the log says where it was raised (`log.py`), and both contain the id. Of a client's
`traceparent` header, only the trace id goes into the JSON log and the audit.

Elsewhere: the table is `app.py`; the request's headers and body are `incoming.py`; the response to a failure is
`failures.py`; the audit is `serve/guards/audited.py`; allowed origins are `origins.py`; keys and limits are the room
`guard`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argosy.errors import Overloaded
from argosy.guard.keys import Key, KeyRing
from argosy.guard.limits import Limits
from argosy.guard.strangers import Strangers
from argosy.serve.http.access import FORM_TYPE, RouteRule, dialect_of
from argosy.serve.http.caller import Caller, Hook, Limited, Tally
from argosy.serve.http.failures import Refused, report, send_error
from argosy.serve.http.held import BODY_BYTES, MEDIA_BODIES_BYTES, MEDIA_BODY_BYTES, Held, Pool
from argosy.serve.http.incoming import IncomingBody, read_headers, secret_of, trace_of
from argosy.serve.http.origins import Headers, Site, granted
from argosy.serve.http.running import GoneAway, Running

log = logging.getLogger("argosy.serve")

NO_ROOM = "argosy.no_room"  # in a request's state: its connection exceeds the limit
_NAME = r"[A-Za-z0-9._-]{1,253}"  # a host name or an IPv4 address
_AUTHORITY = re.compile(rf"(?P<name>{_NAME}|\[(?P<v6>[0-9A-Fa-f:.]{{2,45}})\])(?::[0-9]{{0,5}})?")
GENERATED = (b"x-ai-generated", b"1")  # header of answers written by a model
# Headers of answers to a key with tokens per day, under OpenAI's names: the limit, the remainder, and when the day
# ends.
TOKENS_LEFT = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
SECURITY_HEADERS = (
    # `data:` is for previews of attached pictures and sounds, which cannot run code.
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; media-src 'self' data:; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class _Pace:
    """Lets one request begin per turn of the event loop, first come, first served.

    Each occupies the loop for about a millisecond before it first waits. If a burst began all in one turn, it would
    block every other connection, and /health, for a second.
    """

    def __init__(self) -> None:
        self._has_begun = False  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def begin(self) -> None:
        if self._has_begun:
            self._waiting.append(turn := asyncio.get_running_loop().create_future())
            await turn
        else:
            self._begin()

    def _begin(self) -> None:
        self._has_begun = True
        asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._has_begun = False
        while self._waiting and not self._has_begun:
            turn = self._waiting.popleft()
            if not turn.done():  # the client may have left
                self._begin()
                turn.set_result(None)


class _Response:
    """Sends the response to a request, adding the headers common to all responses.

    rule: None until the route is known.
    headers: additional ones.
    status: 0 until the response begins.
    has_begun: its head has been sent.
    """

    def __init__(
        self, send: Send, scope: Scope, caller: Caller, body: IncomingBody,
        tokens_left: Callable[[Key | None], Headers],
    ) -> None:  # fmt: skip
        self._send, self._caller, self._body, self._tokens_left = send, caller, body, tokens_left
        self._is_head = scope["method"] == "HEAD"
        name = b"request-id" if dialect_of(scope["path"]) == "anthropic" else b"x-request-id"
        self.headers: Headers = [*SECURITY_HEADERS, (name, caller.request_id.encode())]
        self.rule: RouteRule | None = None
        self.status, self.has_begun = 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif not self._is_head:
            for watch in self._caller.watches:
                watch.sent(message.get("body", b""))
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        status = self.status = message["status"]
        own = {name for name, _ in message.get("headers", ())}
        told = list(self.headers)
        if self.rule is not None and self.rule.screens == "answers" and status == 200:
            told.append(GENERATED)
        told += self._tokens_left(self._caller.key)
        extra = [pair for pair in told if pair[0] not in own]
        # The others close the connection: 408 has waited long enough, and BadFrame has no known end.
        if status >= 400 and (b"connection" not in own or status in (413, 503)):
            is_read = await self._body.discard()
            if not is_read and b"connection" not in own:
                extra.append((b"connection", b"close"))
        await self._send({**message, "headers": [*message.get("headers", ()), *extra]})
        self.has_begun = True  # not earlier: the request may end while the rest of its body is read
        if self._is_head:  # the response is complete, even where GET would stream
            await self._send({"type": "http.response.body"})


class Gate:
    """An ASGI application in front of `app`.

    Args:
        hints: advice for unknown paths, by the beginning of the path.
        takes_media: the model takes pictures or sounds.
        observe: called with (route, status, seconds) for every request.
        hooks: run around every request, in this order.
        running: the running requests; None: the gate creates its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Sequence[RouteRule],
        ring: KeyRing,
        limits: Limits,
        *,
        site: Site | None = None,
        hints: Mapping[str, str] | None = None,
        takes_media: bool = False,
        observe: Callable[[str, int, float], None] = lambda route, status, seconds: None,
        hooks: Sequence[Hook] = (),
        running: Running | None = None,
    ) -> None:
        self._app = app
        self._hooks = hooks
        self.running = Running() if running is None else running
        self._table = [(rule, _pattern(rule)) for rule in rules]
        self._ring = ring
        self._limits = limits
        site = Site() if site is None else site
        self._hosts = {"localhost", *(name.lower() for name in site.hosts)}
        self._origins, self._base_path = site.origins, site.base_path
        self._hints = {} if hints is None else hints
        self._observe = observe
        self._strangers = Strangers()
        self._pace = _Pace()
        self._takes_media = takes_media
        self.bodies = Pool(BODY_BYTES + (MEDIA_BODIES_BYTES if takes_media else 0))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        began, tally = time.monotonic(), Tally()
        if scope["method"] == "POST":
            await self._pace.begin()
        is_within = scope["path"].startswith(f"{self._base_path}/")
        if is_within:
            scope = {**scope, "path": scope["path"][len(self._base_path) :]}
        held = Held(share=self.bodies.share())
        caller = Caller(began=began, held=held, watches=[tally], running=self.running)
        dialect = dialect_of(scope["path"])
        body = IncomingBody(receive, held.share.hold)
        response = _Response(send, scope, caller, body, self._tokens_left)
        rule: RouteRule | None = None
        trace_id: str | None = None
        try:
            if NO_ROOM in scope.get("state", ()):
                raise Overloaded("the server has reached its limit on connections", retry_after_s=1)
            headers = read_headers(scope)
            body.is_awaited = "expect" in headers
            trace_id = trace_of(headers)
            self._check_host(headers)
            if not is_within:
                raise self._elsewhere(scope)
            response.headers += self._origins.headers(headers)
            asked = self._origins.asked_method(scope["method"], headers)
            rule = response.rule = self._route(asked or scope["method"], scope["path"])
            if asked is not None:  # no key is required, because browsers send none with a preflight
                await response.send(
                    {"type": "http.response.start", "status": 204, "headers": granted(asked, headers)}
                )
                await response.send({"type": "http.response.body"})
            else:
                await self._pass_on(rule, headers, caller, body, scope, response.send)
        except GoneAway:
            response.status = response.status or 499
        except Exception as error:
            report(error, caller.request_id)
            if not response.has_begun:
                await send_error(error, dialect, response.send, caller.request_id)
        seconds = time.monotonic() - began
        route = rule.path if rule is not None else "none"
        self._observe(route, response.status, seconds)
        for watch in caller.watches:
            try:
                watch.after(response.status, seconds)
            except Exception as error:  # the other watches are still told
                report(error, caller.request_id)
        facts = {
            "event": "request", "request_id": caller.request_id,
            "method": scope["method"] if rule is not None else "-", "route": route, "status": response.status,
            "seconds": round(seconds, 3),
            "prompt_tokens": tally.num_prompt_tokens, "new_tokens": tally.num_new_tokens,
            "model": tally.model or None, "key": None if caller.key is None else caller.key.id,
            **({} if trace_id is None else {"trace_id": trace_id}),
        }  # fmt: skip
        log.info(
            "%(request_id)s %(method)s %(route)s %(status)d %(seconds).3f s,"
            " %(prompt_tokens)d prompt, %(new_tokens)d new",
            facts, extra={"facts": facts},
        )  # fmt: skip

    def _tokens_left(self, key: Key | None) -> Headers:
        """The headers about a key's daily tokens."""
        if key is None or key.tokens_per_day is None:
            return []
        used, left_s = self._limits.used_today(key)
        values = key.tokens_per_day, max(0, key.tokens_per_day - used), left_s
        limit, left, reset = (b"%d" % value for value in values)
        return list(zip(TOKENS_LEFT, (limit, left, reset + b"s"), strict=True))

    async def _pass_on(
        self,
        rule: RouteRule,
        headers: dict[str, str],
        caller: Caller,
        body: IncomingBody,
        scope: Scope,
        send: Send,
    ) -> None:
        """Let the route answer if the request passes the checks of its rule.

        Raises:
            Refused: it does not pass.
        """
        caller.watches += filter(None, (hook.arrive(caller, rule, headers) for hook in self._hooks))
        caller.watches.append(Limited(self._limits, caller, rule))
        self._check_origin(scope, headers)
        caller.key = self._admit(rule, headers, scope.get("client"))
        if rule.scope is not None:
            caller.require(rule.scope)
            caller.go_on()
        caller.watches += filter(None, (hook.admit(caller, rule, headers) for hook in self._hooks))
        if scope["method"] == "POST":
            _require_type(rule, headers)
        body.max_bytes = rule.max_body_bytes
        if rule.takes_media and self._takes_media:
            body.max_bytes = MEDIA_BODY_BYTES
        body.require_allowed(int(headers.get("content-length", "0") or 0))
        scope.setdefault("state", {}).update(caller=caller, rule=rule)
        body.asked = caller.asked
        try:
            for watch in caller.watches:
                watch.begin()
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            # An operator's command, once begun, is finished.
            can_end = rule.scope not in (None, "admin")
            with self.running.entered(caller) if can_end else contextlib.nullcontext():
                body.when_whole = partial(caller.watch, body.receive)
                if scope["method"] != "POST":  # the body is not read
                    body.when_whole()
                await self._app({**scope, "method": method}, body.receive, send)
        finally:
            caller.ending.close()
            caller.held.share.close()

    def _elsewhere(self, scope: Scope) -> Refused:
        """The answer to a path outside the base path. A browser is redirected from the base path to the page."""
        if scope["path"] == self._base_path and scope["method"] in ("GET", "HEAD"):
            return Refused(308, "the page is at this path with a slash", location=f"{self._base_path}/")
        return Refused(
            404, "there is no such path", hint=f"all paths of this server begin with {self._base_path}/"
        )

    def _route(self, method: str, path: str) -> RouteRule:
        found = [rule for rule, pattern in self._table if pattern.fullmatch(path)]
        # a name in the table is not an id
        found = [rule for rule in found if rule.path == path] or found
        for rule in found:
            if rule.method == method or (rule.method, method) == ("GET", "HEAD"):
                return rule
        if not found:
            hint = self._hints.get("/".join(path.split("/", 3)[:3]), "/openapi.json lists all paths")
            raise Refused(404, "there is no such path", hint=hint)
        methods = {rule.method for rule in found}
        known = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        raise Refused(405, f"this path accepts {known}", allow=known)

    def _admit(self, rule: RouteRule, headers: dict[str, str], client: tuple[str, int] | None) -> Key | None:
        if rule.scope is None:
            return None
        key = self._ring.find(secret_of(headers) if self._ring.is_needed else None)
        if key is None:
            self._strangers.count("" if client is None else client[0])
            raise Refused(
                401,
                "a valid API key is required",
                hint="send `Authorization: Bearer KEY`; `argosy keys add` makes a key",
            )
        return key

    def _check_host(self, headers: dict[str, str]) -> None:
        """Refuse unknown host names, because another site could point its name at this server (DNS rebinding)."""
        found = _AUTHORITY.fullmatch(headers.get("host", ""))
        if found is None:
            raise Refused(400, "the host header must be a name or an address, with or without a port")
        if found["name"].lower() not in self._hosts and not _is_address(found["v6"] or found["name"]):
            raise Refused(
                403, "the server does not answer to this host name", hint="start it with --allow-host NAME"
            )

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        if scope["method"] in ("GET", "HEAD") or self._origins.allow(headers):
            return
        # Behind an untrusted or silent proxy, the client of a plain connection may speak TLS.
        schemes = ("https",) if scope["scheme"] == "https" else ("http", "https")
        own = [f"{scheme}://{headers['host'].lower()}" for scheme in schemes]
        if (
            headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
            or headers.get("origin", own[0]).lower() not in own
        ):
            raise Refused(403, "requests from pages of other sites are refused")


def _require_type(rule: RouteRule, headers: dict[str, str]) -> None:
    """Refuse a body of another content type.

    Pages of other sites may send a form's content type without a preflight, so it must not pass for JSON. Ollama's
    clients also send it, so on Ollama's paths any type is accepted, unless a browser sends it: with every POST,
    browsers give their origin or `Sec-Fetch-Site`.
    """
    found = headers.get("content-type", "").partition(";")[0].strip().lower()
    if rule.takes_form and found != FORM_TYPE:
        raise Refused(
            415, f"the content type must be {FORM_TYPE}", hint="with curl: -F file=@talk.mp3 -F model=NAME"
        )
    is_browser = "origin" in headers or "sec-fetch-site" in headers
    takes_any = dialect_of(rule.path) == "ollama" and not is_browser
    if not rule.takes_form and found != "application/json" and not takes_any:
        raise Refused(
            415,
            "the content type must be application/json",
            hint="with curl: -H 'content-type: application/json'",
        )


def _pattern(rule: RouteRule) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", rule.path)
    given = "[^/](?s:.{0,255})" if rule.ends_in_name else "[^/]{1,256}"
    return re.compile(given.join(map(re.escape, parts)))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
