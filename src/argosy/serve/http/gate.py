"""Checks that every request passes before its route runs, and the response to every failure.

    connection -> host, origin -> route, or 404 -> key, scope, limits -> content type -> size, time of the body -> route
                          └── a preflight of an allowed origin is answered here

Every route is in the table with its policy; anything else is 404. The path is the one that the client sent
(`scope["path"]`), without the base path. HEAD is answered like GET, without the body. The log has the request's id, the
method, the route's template, the status, times, token counts, the model and the key's id, and no content. An unexpected
exception becomes "internal error"; the log says where it was raised (`log.py`), and both have the id. A trace id that
the client sends in `traceparent` goes into the JSON log and the audit, and nothing else of that header does.

Elsewhere: the table is `app.py`; the audit is `serve/guards/audited.py`; allowed origins are `origins.py`; keys and
limits are the room `guard`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NotRequired, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argosy.budget.memory_plan import BODY_BYTES, MEDIA_BODIES_BYTES, MEDIA_BODY_BYTES
from argosy.errors import ArgosyError, Overloaded, PromptTooLong, refused_by_system
from argosy.guard.audit import Content
from argosy.guard.keys import Key, KeyRing
from argosy.guard.keys import Scope as KeyScope
from argosy.guard.limits import Limits
from argosy.guard.strangers import Stranger, Strangers
from argosy.serve.admin.answer_metrics import AnswerMetrics
from argosy.serve.answer.fields import Closed
from argosy.serve.answer.media_hosts import Files
from argosy.serve.answer.running import GoneAway, Run, Running
from argosy.serve.guards.screening import Guarding, Screening
from argosy.serve.http.held import Pool, Share
from argosy.serve.http.log import where_it_failed
from argosy.serve.http.origins import Headers, Origins, granted

log = logging.getLogger("argosy.serve")

MAX_BODY_BYTES = 8 << 20
FORM_TYPE = "multipart/form-data"
NO_ROOM = "argosy.no_room"  # in a request's state: its connection exceeds the limit
BODY_STALL_S = 15.0  # longest wait between two parts of a body
BODY_S = 60.0
# For the rest of the body of a refused request.
_DISCARD_S = 5.0
_MOST_DISCARDED_BYTES = 2 * MEDIA_BODY_BYTES
_NAME = r"[A-Za-z0-9._-]{1,253}"  # a host's name; also an IPv4 address
_AUTHORITY = re.compile(rf"(?P<name>{_NAME}|\[(?P<v6>[0-9A-Fa-f:.]{{2,45}})\])(?::[0-9]{{0,5}})?")
CHOSEN_POLICY = "x-argosy-policy"  # the header with which a request names its policy
GENERATED = (b"x-ai-generated", b"1")  # header of answers that a model wrote
# Headers of answers to a key with tokens per day: the limit, what is left of it, and when the day ends; OpenAI's names.
TOKENS_LEFT = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
_ONCE = (
    CHOSEN_POLICY,
    "host",
    "content-length",
    "authorization",
    "x-api-key",
    "origin",
    "content-type",
    "transfer-encoding",
)
_TRACE = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
Dialect = Literal["openai", "anthropic", "ollama"]
Screens = Literal["answers", "texts", "nothing"]

SECURITY_HEADERS = (
    # data: for previews of attached pictures and sounds, which cannot run anything.
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; media-src 'self' data:; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Access to a route: the scope that it needs, None for everyone, and the largest body that it takes.

    screens: what the key's content policy is applied to: texts that a model gets, or its answers as well. Every route
        says so; None fails a test.
    """

    method: str
    path: str
    scope: KeyScope | None
    screens: Screens | None = None
    is_counted: bool = False  # the key's limits apply
    takes_media: bool = False  # a body may be as large as pictures and sounds need, if the model takes them
    takes_form: bool = False  # the body is a form with a file, not JSON
    max_body_bytes: int = MAX_BODY_BYTES
    ends_in_name: bool = (
        False  # the path ends with its one parameter, which may contain slashes: `OWNER/NAME`
    )


def dialect_of(path: str) -> Dialect:
    """The dialect of errors at `path`."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


@dataclass(slots=True, eq=False)
class Caller(Run):
    """The client of a request and the tokens it used so far, even if the client leaves before the end.

    began: when the request arrived, by the monotonic clock.
    model: the id of the model that answers; empty until one does.
    digests: SHA-256 of what decides its answers, by name, for the audit.
    trace_id: the client's trace, 32 hexadecimal digits (W3C Trace Context).
    finishes: why each answer ended.
    is_recorded: the audit will have a line of the request.
    verdicts: the guards' decisions, a word or two each, and never a word of the text.
    screening: by the policy of the key; None: nothing is checked.
    """

    limits: Limits | None = None
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_marked_tokens: int = 0  # chosen with the watermark
    request_id: str = field(default_factory=lambda: "req_" + secrets.token_hex(12))
    share: Share = field(default_factory=lambda: Pool().share())  # its part of the memory for request bodies
    takes_long: bool = False  # the body is long, or has pictures or sounds to decode
    takes_video: bool = False  # it has a video to decode
    files: Files = field(default_factory=Files)  # at other hosts, named in the body
    # Closed when the request has ended.
    ending: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    metrics: AnswerMetrics | None = None
    began: float = field(default_factory=time.monotonic)
    model: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    trace_id: str | None = None
    finishes: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    is_recorded: bool = False
    screening: Screening | None = None

    def require(self, scope: KeyScope, what: str = "") -> None:
        """Require a key with `scope`, or with `admin`, which includes every scope.

        Args:
            what: the field that needs the scope, if the whole route does not.

        Raises:
            Refused: the caller has no key with that scope.
        """
        scopes = () if self.key is None else self.key.scopes
        if scope not in scopes and "admin" not in scopes:
            needed = f", which {what} needs" if what else ""
            hint = (
                f"`argosy keys add NAME --scope infer --scope {scope}` makes a key that has it"
                if what
                else None
            )
            raise Refused(403, f"the key lacks scope '{scope}'{needed}", hint=hint, param=what or None)

    def answered_by(self, model: str, digests: Mapping[str, str] | None = None) -> None:
        """Note the id of the model that answers the request, and the SHA-256 of what decides its answers."""
        if self.metrics is not None and not self.model:
            self.metrics.count_request(model, self.key_id)
        self.model, self.digests = model, digests or {}

    @property
    def key_id(self) -> str:
        return "none" if self.key is None else self.key.id

    def count(self, *, prompt: int = 0, new: int = 0) -> None:
        """Count more tokens. Any thread may call this, even after the request has ended."""
        self.num_prompt_tokens += prompt
        self.num_new_tokens += new
        if self.limits is not None and self.key is not None:
            self.limits.count(self.key, prompt + new)
        if self.metrics is not None:
            self.metrics.count_tokens(self.model, self.key_id, prompt=prompt, new=new)


class Refused(ArgosyError):
    """A request is refused."""

    def __init__(self, status: int, message: str, *, hint: str | None = None, **facts: object) -> None:
        super().__init__(message, hint=hint, **facts)
        self.http_status = status


class BadFrame(Refused):
    """The end of a request is unknown, so nothing more is read from its connection."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("overloaded_error", "overloaded_error"),
}


class OpenAIFacts(Closed):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Closed):
    """An error."""

    error: OpenAIFacts


class AnthropicFacts(Closed):
    type: str
    message: str


class AnthropicError(Closed):
    """An error."""

    type: Literal["error"]
    error: AnthropicFacts
    request_id: NotRequired[str]


class OllamaError(Closed):
    """An error."""

    error: str


def error_body(
    error: BaseException, dialect: Dialect, request_id: str
) -> tuple[int, OpenAIError | AnthropicError | OllamaError]:
    """Status and body of a failure in the dialect's shape and words; our own faults have the id that is in the log."""
    error = refused_by_system(error) or error
    status = error.http_status if isinstance(error, ArgosyError) else 500
    message, is_ours = str(error), status >= 500 and status != 503
    if isinstance(error, PromptTooLong):
        message = _overflow(error, dialect)
    if is_ours:  # the full message, which may contain paths, is not sent
        known = f"{type(error).__name__}: the answer could not be finished"
        message = f"{known if isinstance(error, ArgosyError) else 'internal error'} (request {request_id})"
    if dialect == "ollama":
        return status, {"error": message}
    unnamed = "invalid_request_error" if status < 500 else "api_error"
    kind, anthropic = _TYPES.get(status, (unnamed.replace("api_error", "server_error"), unnamed))
    if dialect == "anthropic":
        body: AnthropicError = {"type": "error", "error": {"type": anthropic, "message": message}}
        return status, {**body, "request_id": request_id} if is_ours else body
    param, code = (_text_fact(error, name) for name in ("param", "code"))
    if isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _text_fact(error: BaseException, name: str) -> str | None:
    found = error.facts.get(name) if isinstance(error, ArgosyError) else None
    return found if isinstance(found, str) else None


def _overflow(error: PromptTooLong, dialect: Dialect) -> str:
    """Word the error so that clients know that they must shorten the conversation, and find the numbers.

    Claude Code looks for "prompt is too long: N tokens > M maximum", LiteLLM for "This model's maximum context length".
    """
    needed, available = error.facts.get("needed"), error.facts.get("available")
    new = error.facts.get("for_answer", 1)
    if not (isinstance(needed, int) and isinstance(available, int) and isinstance(new, int)):
        return str(error)
    prompt, least = needed - new, "at least " if error.facts.get("is_at_least") else ""
    if dialect != "anthropic":
        said = (
            f"This model's maximum context length is {available} tokens. However, you requested {least}{needed} tokens"
            f" ({prompt} in the messages, {new} in the completion)."
            " Please reduce the length of the messages or completion."
        )
    elif prompt < available:
        said = (
            f"input length and `min_tokens` exceed context limit: {prompt} + {new} > {available}, "
            "decrease input length or `min_tokens` and try again"
        )
    else:
        said = f"prompt is too long: {prompt} tokens > {available - 1} maximum"
    return f"{said}\nhint: {error.hint}" if error.hint else said


def error_headers(error: BaseException, status: int) -> dict[str, str]:
    """Headers of the response to a failure."""
    headers = {}
    error = refused_by_system(error) or error
    retry = getattr(error, "retry_after_s", None)
    if retry is not None:
        headers["retry-after"] = str(int(retry))
    for status_with, name in ((405, "allow"), (308, "location")):
        if status == status_with and isinstance(error, ArgosyError):
            headers[name] = str(error.facts[name])
    if status in (401, 403):  # some clients would retry for minutes, and the key would still be refused
        headers["x-should-retry"] = "false"
    if status in (408, 413, 503) or isinstance(error, BadFrame | Stranger):
        headers["connection"] = "close"
    return headers


def report(error: BaseException, caller: Caller) -> None:
    """Log an unexpected exception."""
    if not isinstance(error, ArgosyError):
        where = where_it_failed(error)
        facts = {"event": "internal_error", "request_id": caller.request_id, "where": where}
        log.error("%s internal error: %s", caller.request_id, where, extra={"facts": facts})


class Heard(Protocol):
    """Takes what a request says and is answered."""

    def ask(self, data: bytes) -> None: ...

    def answer(self, data: bytes) -> None: ...

    def content(self) -> Content: ...


class Auditing(Protocol):
    """The part of `Auditor` that the gate uses."""

    def require_room(self) -> None: ...

    def listen(self) -> Heard | None: ...

    def note(
        self, caller: Caller, policy: Policy, *, status: int, seconds: float, heard: Heard | None
    ) -> None: ...


@dataclass(slots=True)
class _Count:
    status: int = 0
    has_begun: bool = False
    first_s: float | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


class _Pace:
    """Lets one request begin in each turn of the event loop, first come first served.

    Each takes about a millisecond of the loop until it waits for something. A burst that all began in one turn would
    hold every other connection, and /health, for a second.
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
            if not turn.done():  # its client may have left
                self._begin()
                turn.set_result(None)


class Gate:
    """An ASGI application in front of `app`.

    Args:
        hosts: host names that the server answers to, besides addresses and `localhost`.
        origins: origins whose pages may use the server.
        hints: for a path that is not in the table, what to do instead, by the beginning of the path.
        takes_media: the model takes pictures or sounds.
        observe: is called with (route, status, seconds) for every request.
        metrics: takes the times and tokens of answers; None: nobody asks for them.
        base_path: the beginning of all paths, or nothing.
        auditor: records the requests that do work or change something; None: nobody does.
        guarding: policies, and what is stopped; None: another server behind this one has them.
        running: the requests that run; None: it is the gate's own.
    """

    def __init__(
        self,
        app: ASGIApp,
        policies: Sequence[Policy],
        ring: KeyRing,
        limits: Limits,
        *,
        hosts: Collection[str] = (),
        origins: Origins | None = None,
        hints: Mapping[str, str] | None = None,
        takes_media: bool = False,
        observe: Callable[[str, int, float], None] = lambda route, status, seconds: None,
        metrics: AnswerMetrics | None = None,
        base_path: str = "",
        auditor: Auditing | None = None,
        guarding: Guarding | None = None,
        running: Running | None = None,
    ) -> None:
        self._app = app
        self._auditor = auditor
        self._guarding = guarding
        self.running = Running() if running is None else running
        self._table = [(policy, _pattern(policy)) for policy in policies]
        self._ring = ring
        self._limits = limits
        self._hosts = {"localhost", *(name.lower() for name in hosts)}
        self._origins = Origins() if origins is None else origins
        self._hints = {} if hints is None else hints
        self._observe, self._metrics = observe, metrics
        self._base_path = base_path
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
        began, count = time.monotonic(), _Count()
        if scope["method"] == "POST":
            await self._pace.begin()
        policy: Policy | None = None
        is_within = scope["path"].startswith(f"{self._base_path}/")
        if is_within:
            scope = {**scope, "path": scope["path"][len(self._base_path) :]}
        caller = Caller(
            limits=self._limits, share=self.bodies.share(), metrics=self._metrics, began=began, running=self.running
        )  # fmt: skip
        dialect = dialect_of(scope["path"])
        named = (b"request-id" if dialect == "anthropic" else b"x-request-id", caller.request_id.encode())

        body = _Body(receive, caller.share.hold)
        for_pages: Headers = []

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                count.status = message["status"]
                own = {name for name, _ in message.get("headers", ())}
                told = [*SECURITY_HEADERS, named, *for_pages]
                if policy is not None and policy.screens == "answers" and message["status"] == 200:
                    told.append(GENERATED)
                told += self._tokens_left(caller.key)
                extra = [pair for pair in told if pair[0] not in own]
                # The others that close the connection: 408 has waited long enough, and BadFrame has no known end.
                if message["status"] >= 400 and (b"connection" not in own or message["status"] in (413, 503)):
                    is_read = await body.discard()
                    if not is_read and b"connection" not in own:
                        extra.append((b"connection", b"close"))
                await send({**message, "headers": [*message.get("headers", ()), *extra]})
                count.has_begun = True  # not before: the request may end while the rest of its body is read
                if scope["method"] == "HEAD":  # complete, even where GET would stream
                    await send({"type": "http.response.body"})
            elif scope["method"] != "HEAD":
                if body.heard is not None:
                    body.heard.answer(message.get("body", b""))
                await send(message)

        try:
            if NO_ROOM in scope.get("state", ()):
                raise Overloaded("the server has reached its limit on connections", retry_after_s=1)
            headers = _headers(scope)
            body.is_awaited = "expect" in headers
            caller.trace_id = _trace_id(headers)
            self._check_host(headers)
            if not is_within:
                raise self._elsewhere(scope)
            for_pages += self._origins.headers(headers)
            asked = self._origins.asked_method(scope["method"], headers)
            policy = self._route(asked or scope["method"], scope["path"])
            if asked is not None:  # without a key: browsers send none with a preflight
                await send_on(
                    {"type": "http.response.start", "status": 204, "headers": granted(asked, headers)}
                )
                await send_on({"type": "http.response.body"})
            else:
                await self._pass_on(policy, headers, caller, body, scope, send_on)
        except GoneAway:
            count.status = count.status or 499
        except Exception as error:
            report(error, caller)
            if not count.has_begun:
                await send_error(error, dialect, send_on, caller.request_id)
        seconds = time.monotonic() - began
        route = policy.path if policy is not None else "none"
        self._observe(route, count.status, seconds)
        facts = {
            "event": "request", "request_id": caller.request_id,
            "method": scope["method"] if policy is not None else "-", "route": route, "status": count.status,
            "seconds": round(seconds, 3),
            "prompt_tokens": caller.num_prompt_tokens, "new_tokens": caller.num_new_tokens,
            "model": caller.model or None, "key": None if caller.key is None else caller.key.id,
            **({} if caller.trace_id is None else {"trace_id": caller.trace_id}),
        }  # fmt: skip
        if self._auditor is not None and policy is not None and caller.is_recorded:
            self._auditor.note(caller, policy, status=count.status, seconds=seconds, heard=body.heard)
        log.info(
            "%(request_id)s %(method)s %(route)s %(status)d %(seconds).3f s,"
            " %(prompt_tokens)d prompt, %(new_tokens)d new",
            facts, extra={"facts": facts},
        )  # fmt: skip

    def _tokens_left(self, key: Key | None) -> Headers:
        """Headers about the tokens per day of a key."""
        if key is None or key.tokens_per_day is None:
            return []
        used, left_s = self._limits.used_today(key)
        values = key.tokens_per_day, max(0, key.tokens_per_day - used), left_s
        limit, left, reset = (b"%d" % value for value in values)
        return list(zip(TOKENS_LEFT, (limit, left, reset + b"s"), strict=True))

    async def _pass_on(
        self, policy: Policy, headers: dict[str, str], caller: Caller, body: _Body, scope: Scope, send: Send
    ) -> None:
        """Let the route answer, if the request passes the checks of its policy.

        Raises:
            Refused: it does not.
        """
        if self._auditor is not None and _is_recorded(policy):
            # First, and without a line: refusals of all kinds must not take the room of requests that are running.
            self._auditor.require_room()
            caller.is_recorded = True
        self._check_origin(scope, headers)
        caller.key = self._admit(policy, headers, scope.get("client"))
        if policy.scope is not None:
            caller.require(policy.scope)
            caller.go_on()
        if self._guarding is not None and policy.screens in ("answers", "texts"):
            chosen = headers.get(CHOSEN_POLICY)
            caller.screening = self._guarding.screening(caller.key, chosen, caller.verdicts)
        if scope["method"] == "POST":
            _require_type(policy, headers)
        body.max_bytes = policy.max_body_bytes
        if policy.takes_media and self._takes_media:
            body.max_bytes = MEDIA_BODY_BYTES
        body.require_allowed(int(headers.get("content-length", "0") or 0))
        scope.setdefault("state", {}).update(caller=caller, policy=policy)
        if self._auditor is not None and policy.is_counted:
            body.heard = self._auditor.listen()
        if policy.is_counted and caller.key is not None:
            self._limits.begin(caller.key)
        try:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            # What an operator's command has begun is finished.
            can_end = policy.scope not in (None, "admin")
            with self.running.entered(caller) if can_end else contextlib.nullcontext():
                body.when_whole = partial(caller.watch, body.receive)
                if scope["method"] != "POST":  # nobody reads its body
                    body.when_whole()
                await self._app({**scope, "method": method}, body.receive, send)
        finally:
            caller.ending.close()
            caller.share.close()
            if policy.is_counted and caller.key is not None:
                self._limits.end(caller.key)

    def _elsewhere(self, scope: Scope) -> Refused:
        """The answer to a path outside the base path; a browser is led from the base path to the page."""
        if scope["path"] == self._base_path and scope["method"] in ("GET", "HEAD"):
            return Refused(308, "the page is at this path with a slash", location=f"{self._base_path}/")
        return Refused(
            404, "there is no such path", hint=f"all paths of this server begin with {self._base_path}/"
        )

    def _route(self, method: str, path: str) -> Policy:
        found = [policy for policy, pattern in self._table if pattern.fullmatch(path)]
        found = [policy for policy in found if policy.path == path] or found  # a name in the table is no id
        for policy in found:
            if policy.method == method or (policy.method, method) == ("GET", "HEAD"):
                return policy
        if not found:
            hint = self._hints.get("/".join(path.split("/", 3)[:3]), "/openapi.json lists all paths")
            raise Refused(404, "there is no such path", hint=hint)
        methods = {policy.method for policy in found}
        known = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        raise Refused(405, f"this path accepts {known}", allow=known)

    def _admit(self, policy: Policy, headers: dict[str, str], client: tuple[str, int] | None) -> Key | None:
        if policy.scope is None:
            return None
        key = self._ring.find(_secret(headers) if self._ring.is_needed else None)
        if key is None:
            self._strangers.count("" if client is None else client[0])
            raise Refused(
                401,
                "a valid API key is required",
                hint="send `Authorization: Bearer KEY`; `argosy keys add` makes a key",
            )
        return key

    def _check_host(self, headers: dict[str, str]) -> None:
        """Refuse unknown host names: another site could point its name at this server (DNS rebinding)."""
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
        # A proxy that is not believed, or does not say, may speak TLS to a client of a plain connection.
        schemes = ("https",) if scope["scheme"] == "https" else ("http", "https")
        own = [f"{scheme}://{headers['host'].lower()}" for scheme in schemes]
        if (
            headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
            or headers.get("origin", own[0]).lower() not in own
        ):
            raise Refused(403, "requests from pages of other sites are refused")


def _is_recorded(policy: Policy) -> bool:
    """Whether the audit has a line for each request of a route: those that do work or change something."""
    return policy.scope is not None and policy.method != "GET"


def _trace_id(headers: Mapping[str, str]) -> str | None:
    """The client's trace id, if the request is part of a trace."""
    found = _TRACE.fullmatch(headers.get("traceparent", ""))
    return None if found is None else found["trace_id"]


def _require_type(policy: Policy, headers: dict[str, str]) -> None:
    """Refuse a body of another content type.

    Pages of other sites may send a form's type unasked, so it must not pass as JSON. Ollama's clients send it as well:
    on Ollama's paths any type will do, unless a browser sends it. With every POST, browsers give their origin or
    `Sec-Fetch-Site`.
    """
    found = headers.get("content-type", "").partition(";")[0].strip().lower()
    if policy.takes_form and found != FORM_TYPE:
        raise Refused(
            415, f"the content type must be {FORM_TYPE}", hint="with curl: -F file=@talk.mp3 -F model=NAME"
        )
    is_browser = "origin" in headers or "sec-fetch-site" in headers
    takes_any = dialect_of(policy.path) == "ollama" and not is_browser
    if not policy.takes_form and found != "application/json" and not takes_any:
        raise Refused(
            415,
            "the content type must be application/json",
            hint="with curl: -H 'content-type: application/json'",
        )


async def send_error(error: BaseException, dialect: Dialect, send: Send, request_id: str) -> None:
    status, body = error_body(error, dialect, request_id)
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    headers += [(name.encode(), value.encode()) for name, value in error_headers(error, status).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in _ONCE:
            raise BadFrame(f"the {key} header appears twice")
        found[key] = value.decode("latin-1")
    if not found.get("content-length", "0").isdecimal():
        raise BadFrame("content-length is not a number")
    # If a proxy in front of this server obeys one of them and this server the other, a body can smuggle a request.
    if "transfer-encoding" in found and ("content-length" in found or scope.get("http_version") == "1.0"):
        raise BadFrame("transfer-encoding is not allowed with content-length or in HTTP/1.0")
    return found


def _secret(headers: dict[str, str]) -> str | None:
    """The key from either header; if both headers hold a key, it must be the same."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = headers.get("x-api-key")
    if scheme.lower() != "bearer":  # for example, a user name and password for a proxy
        return given
    if given is not None and given.strip() != bearer.strip():
        raise Refused(
            401, "the authorization and x-api-key headers hold different keys", hint="send only one"
        )
    return bearer.strip()


class _Body:
    """The body of a request as it arrives: bounded in size and time, and charged to the memory for all bodies.

    is_whole: all of the body has been read.
    is_awaited: the client sends the body only after a 100 Continue.
    max_bytes: the largest body that is read.
    heard: takes the body, too; None: nobody else does.
    when_whole: is called when all of the body has been read.
    """

    def __init__(self, receive: Receive, hold: Callable[[int], None]) -> None:
        """`hold` is called with the memory of each part, and raises if there is no room for it."""
        self._receive, self._hold = receive, hold
        self.heard: Heard | None = None
        self.when_whole: Callable[[], None] = lambda: None
        self._size, self._began = 0, time.monotonic()
        self.is_whole = False
        self.is_awaited = False
        self.max_bytes = MAX_BODY_BYTES

    async def receive(self) -> Message:
        """Receive the next part of the body; after the last part, only the end of the connection.

        Raises:
            Refused: the body is too large or too slow.
            GoneAway: the client has disconnected.
        """
        if self.is_whole:
            return await self._receive()
        left = min(BODY_STALL_S, BODY_S - (time.monotonic() - self._began))
        try:
            async with asyncio.timeout(max(0.01, left)):
                message = await self._next()
        except TimeoutError:
            raise Refused(408, "the body took too long to arrive") from None
        if message["type"] == "http.disconnect":
            raise GoneAway
        num_bytes = len(message.get("body", b""))
        self._size += num_bytes
        self.require_allowed(self._size)
        self._hold(num_bytes + num_bytes // 8)  # a buffer that grows has some room to spare
        if self.heard is not None:
            self.heard.ask(message.get("body", b""))
        return message

    def require_allowed(self, num_bytes: int) -> None:
        """Refuse a body of this size if it is too large.

        Raises:
            Refused: it is.
        """
        if num_bytes > self.max_bytes:
            raise Refused(413, f"the body is larger than {self.max_bytes} bytes")

    async def discard(self) -> bool:
        """Read the rest of the body, within bounds; return whether all of it was read.

        A client that has sent all of its body can read the response. A client that is still sending when the connection
        closes gets a reset, and may drop the response unread.
        """
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while not self.is_whole and not self.is_awaited and size <= _MOST_DISCARDED_BYTES:
                    size += len((await self._next()).get("body", b""))
        return self.is_whole

    async def _next(self) -> Message:
        message = await self._receive()
        self.is_whole = not message.get("more_body", False)
        if self.is_whole:
            self.when_whole()
        return message


def _pattern(policy: Policy) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", policy.path)
    given = "[^/](?s:.{0,255})" if policy.ends_in_name else "[^/]{1,256}"
    return re.compile(given.join(map(re.escape, parts)))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
