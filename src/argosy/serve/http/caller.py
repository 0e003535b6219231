"""The client of a request, and the hooks that a server runs around the request.

    gate: Hook.arrive -> key, scope -> Hook.admit -> type, size -> Watch.begin -> route -> Watch.after
    route: named, asked, answered_by, count, token, ended, sent, found  ->  every Watch of the request

A hook is one job that a server does around every request: limits, metrics, the audit, a policy. Hooks know nothing
of each other, and each keeps its state for a request in its own `Watch`. A hook or watch that raises ArgosyError in
`arrive`, `admit`, `begin` or `named` refuses the request. A fault in `count`, `token` or `ended` ends the answers
with an error; one in `after` is logged.

Elsewhere: `gate.py` calls the hooks; a hook that sees texts is a `Check` (`serve/answer/check.py`).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from argosy.engine.sequence import Result
from argosy.guard.keys import Scope as KeyScope
from argosy.guard.limits import Limits
from argosy.serve.http.access import RouteRule
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import Held
from argosy.serve.http.running import Run


class Watch:
    """A hook's state for one request; this base class keeps nothing.

    Any thread may call `count`, `token`, `ended` and `found`, even after the request has ended.
    """

    def begin(self) -> None:
        """The request has passed every check of the gate, and its route runs next."""

    def asked(self, data: bytes) -> None:
        """A part of the body has arrived."""

    def named(self, person: str) -> None:
        """The client names the person behind the request."""

    def answered_by(self, model: str, digests: Mapping[str, str]) -> None:
        """The model with this id answers; `digests` are the SHA-256 of the files that determine its answers, by
        name.
        """

    def count(self, *, prompt: int, new: int) -> None:
        """The request has used more tokens."""

    def queued(self, num_answers: int, *, is_chat: bool) -> None:
        """`num_answers` more answers are queued."""

    def token(self, answer: int) -> None:
        """The answer with this number has a new token."""
        self.count(prompt=0, new=1)

    def ended(self, answer: int, result: Result) -> None:
        """The answer with this number has ended."""

    def found(self, verdict: str) -> None:
        """A check has reached a verdict: a word or two, never quoting the text."""

    def sent(self, data: bytes) -> None:
        """A part of the response's body is sent."""

    def after(self, status: int, seconds: float) -> None:
        """The response was sent, or its client has left."""


class Hook:
    """One job that a server does around every request; this base class does nothing."""

    def arrive(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        """A request for a route arrives; nothing is known about its client yet."""
        return None

    def admit(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        """The request's key is valid and has the scope that the route needs."""
        return None


@dataclass(slots=True, eq=False)
class Caller(Run):
    """The client of a request.

    began: when the request arrived, by the monotonic clock.
    ending: closed when the request has ended.
    watches: the hooks' state for the request.
    """

    request_id: str = field(default_factory=lambda: "req_" + secrets.token_hex(12))
    began: float = field(default_factory=time.monotonic)
    held: Held = field(default_factory=Held)
    ending: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    watches: list[Watch] = field(default_factory=list)

    @property
    def key_id(self) -> str:
        return "none" if self.key is None else self.key.id

    def require(self, scope: KeyScope, what: str = "") -> None:
        """Require a key with `scope`, or with `admin`, which includes every scope.

        Args:
            what: the field that needs the scope, if not the whole route.

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

    def asked(self, data: bytes) -> None:
        """Tell the watches about a part of the body."""
        for watch in self.watches:
            watch.asked(data)

    def answered_by(self, model: str, digests: Mapping[str, str] | None = None) -> None:
        """Tell the watches which model answers the request (`Watch.answered_by`)."""
        for watch in self.watches:
            watch.answered_by(model, digests or {})

    def count(self, *, prompt: int = 0, new: int = 0) -> None:
        """Count more tokens. Any thread may call this, even after the request has ended."""
        for watch in self.watches:
            watch.count(prompt=prompt, new=new)

    def found(self, verdict: str) -> None:
        """Tell the watches about a check's verdict. Any thread may call this."""
        for watch in self.watches:
            watch.found(verdict)


class Tally(Watch):
    """The model that answers a request and the tokens so far, which count even if the client leaves early.

    model: empty until a model answers.
    """

    def __init__(self) -> None:
        self.model = ""
        self.num_prompt_tokens = self.num_new_tokens = 0

    def answered_by(self, model: str, digests: Mapping[str, str]) -> None:
        self.model = model

    def count(self, *, prompt: int, new: int) -> None:
        self.num_prompt_tokens += prompt
        self.num_new_tokens += new


class Limited(Watch):
    """Applies a key's limits to one of its requests."""

    def __init__(self, limits: Limits, caller: Caller, rule: RouteRule) -> None:
        self._limits, self._caller, self._rule = limits, caller, rule

    def begin(self) -> None:
        key = self._caller.key
        if self._rule.is_counted and key is not None:
            self._limits.begin(key)
            self._caller.ending.callback(self._limits.end, key)

    def count(self, *, prompt: int, new: int) -> None:
        if self._caller.key is not None:
            self._limits.count(self._caller.key, prompt + new)
