"""The audit of requests: an envelope for each and, only if the operator wants it, the texts.

    a request arrives -> AuditedRequest, SaidOfRequest as bytes go by      it has ended -> Auditor.record -> Audit

The envelope has no field for content. Contents are the bytes on the wire, in any dialect, up to MOST_SAID_BYTES
each way. Their memory is a line of the plan; if there is no room, the envelope says that the content is missing.

Elsewhere: the audit's queue, thread and files are in the room `guard`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from argosy.engine.sequence import Result
from argosy.errors import Overloaded
from argosy.guard.audit import Audit, Content
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller, Hook, Tally, Watch
from argosy.serve.http.held import AUDIT_BYTES, Pool, PoolShare
from argosy.serve.http.incoming import trace_of

MOST_SAID_BYTES = 1 << 20
_MOST_TEXT = 128  # characters of a text in an envelope
_MOST_TEXTS = 32


class SaidOfRequest:
    """The bytes of one request and its answer, within a limit."""

    def __init__(self, share: PoolShare) -> None:
        self._share = share
        self._asked, self._answered = bytearray(), bytearray()
        self._is_cut = False

    def ask(self, data: bytes) -> None:
        """Take a part of the request's body."""
        self._take(self._asked, data)

    def answer(self, data: bytes) -> None:
        """Take a part of the answer's body."""
        self._take(self._answered, data)

    def _take(self, into: bytearray, data: bytes) -> None:
        room = MOST_SAID_BYTES - len(into)
        if len(data) > room:
            self._is_cut = True
        taken = data[:room]
        if not taken:
            return
        try:
            # A growing buffer is copied, as is the whole at the end.
            self._share.hold(2 * len(taken))
        except Overloaded:
            self._is_cut = True
        else:
            into += taken

    def content(self) -> Content:
        """A line of JSON with the sizes, followed by both bodies."""
        sizes = {
            "asked_bytes": len(self._asked),
            "answered_bytes": len(self._answered),
            "is_cut": self._is_cut,
        }
        return Content((json.dumps(sizes).encode(), b"\n", self._asked, self._answered), self._share.release)


class Auditor(Hook):
    """Reports requests to the audit.

    Args:
        policy: SHA-256 of the settings in force for all requests.
    """

    def __init__(self, audit: Audit, *, policy: str) -> None:
        self._audit, self.policy = audit, policy
        self._erased_at: dict[str, float] = {}  # key -> time by the monotonic clock
        self._pool = Pool(AUDIT_BYTES)

    def arrive(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        """Watch a request if it does work or changes something.

        A request that could not be recorded is refused without a line, because refusals must not take the room of
        running requests. Raises what `Audit.require_room` raises.
        """
        if not rule.is_recorded:
            return None
        self._audit.require_room()
        return AuditedRequest(self, caller, rule, trace_of(headers))

    def listen(self) -> SaidOfRequest | None:
        """Create the recorder of a request's bytes; None if contents are not kept."""
        return SaidOfRequest(self._pool.share()) if self._audit.settings.with_content else None

    def record(
        self, caller: Caller, status: int, facts: Mapping[str, object], content: Content | None
    ) -> None:
        """Record an ended request; one without a valid key is only counted."""
        if caller.key is None:
            self._audit.count_refused(status)
            return
        if content is not None and caller.began <= self._erased_at.get(caller.key_id, 0.0):
            content.release()  # erased before it was written
            content = None
        self._audit.record(facts, content)

    def erase(self, key_id: str) -> int:
        """Erase a key's contents, including those of its running requests.

        Blocks. Raises what `Audit.erase` raises.
        """
        self._erased_at[key_id] = time.monotonic()
        return self._audit.erase(key_id)


class AuditedRequest(Tally):
    """The audit's record of one request."""

    def __init__(self, auditor: Auditor, caller: Caller, rule: RouteRule, trace_id: str | None) -> None:
        super().__init__()
        self._auditor, self._caller, self._rule, self._trace_id = auditor, caller, rule, trace_id
        self._digests: Mapping[str, str] = {}
        self._num_marked_tokens = 0
        self._finishes: list[str] = []
        self._verdicts: dict[str, None] = {}
        self._said: SaidOfRequest | None = None

    def begin(self) -> None:
        if self._rule.is_counted:
            self._said = self._auditor.listen()

    def asked(self, data: bytes) -> None:
        if self._said is not None:
            self._said.ask(data)

    def sent(self, data: bytes) -> None:
        if self._said is not None:
            self._said.answer(data)

    def answered_by(self, model: str, digests: Mapping[str, str]) -> None:
        super().answered_by(model, digests)
        self._digests = digests

    def ended(self, answer: int, result: Result) -> None:
        self._finishes.append(result.finish_reason)
        self._num_marked_tokens += result.num_marked

    def found(self, verdict: str) -> None:
        self._verdicts[verdict] = None

    def after(self, status: int, seconds: float) -> None:
        caller = self._caller
        facts = {
            "key": caller.key_id,
            "request_id": caller.request_id,
            "trace_id": self._trace_id,
            "method": self._rule.method,
            "route": self._rule.path,
            "status": status,
            "seconds": round(seconds, 3),
            "model": self.model[:_MOST_TEXT] or None,
            **self._digests,
            "policy": self._auditor.policy,
            "prompt_tokens": self.num_prompt_tokens,
            "new_tokens": self.num_new_tokens,
            "marked_tokens": self._num_marked_tokens,
            "finish": [reason[:_MOST_TEXT] for reason in self._finishes[:_MOST_TEXTS]],
            "verdicts": [verdict[:_MOST_TEXT] for verdict in list(self._verdicts)[:_MOST_TEXTS]],
        }
        self._auditor.record(caller, status, facts, None if self._said is None else self._said.content())
