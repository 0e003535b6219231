"""The audit of requests: an envelope each and, only if the operator wants it, the texts.

    gate: a request begins -> Heard, as bytes go by      a request has ended -> Auditor.note -> Audit.record

The envelope has no field for content. Contents are what was on the wire, whatever the dialect, up to MOST_SAID_BYTES
each way; their memory is a line of the plan, and where it has no room, the envelope says that the content is missing.

Elsewhere: the audit's queue, thread and files are the room `guard`.
"""

from __future__ import annotations

import json
import time

from argosy.config import MIB
from argosy.errors import Overloaded
from argosy.guard.audit import Audit, Content
from argosy.serve.http.access import Policy
from argosy.serve.http.caller import Caller
from argosy.serve.http.held import Pool, Share
from argosy.serve.http.incoming import Heard

MOST_SAID_BYTES = 1 << 20
AUDIT_BYTES = 16 * MIB  # contents of requests until an audit that keeps them has written them
_MOST_TEXT = 128  # characters of a text in an envelope
_MOST_TEXTS = 32


class SaidOfRequest:
    """The bytes of one request and its answer, as far as they have room."""

    def __init__(self, share: Share) -> None:
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
            # A buffer that grows is copied, and so is the whole of it at the end.
            self._share.hold(2 * len(taken))
        except Overloaded:
            self._is_cut = True
        else:
            into += taken

    def content(self) -> Content:
        """A line of JSON with the sizes, then both bodies."""
        sizes = {
            "asked_bytes": len(self._asked),
            "answered_bytes": len(self._answered),
            "is_cut": self._is_cut,
        }
        return Content((json.dumps(sizes).encode(), b"\n", self._asked, self._answered), self._share.release)


class Auditor:
    """Reports requests from a server's gate to the audit.

    Args:
        policy: SHA-256 of the policies that hold for all requests.
    """

    def __init__(self, audit: Audit, *, policy: str) -> None:
        self._audit, self._policy = audit, policy
        self._erased_at: dict[str, float] = {}  # key -> by the monotonic clock
        self._pool = Pool(AUDIT_BYTES)

    def require_room(self) -> None:
        """Refuse a request that could not be recorded, whoever asks. Raises what `Audit.require_room` raises."""
        self._audit.require_room()

    def listen(self) -> Heard | None:
        """Create the recorder of a request's bytes; None if contents are not kept."""
        return SaidOfRequest(self._pool.share()) if self._audit.settings.with_content else None

    def note(
        self, caller: Caller, policy: Policy, *, status: int, seconds: float, heard: Heard | None
    ) -> None:
        """Record a request that has ended; one without a valid key is only counted."""
        if caller.key is None:
            self._audit.count_refused(status)
            return
        facts = {
            "key": caller.key_id,
            "request_id": caller.request_id,
            "trace_id": caller.trace_id,
            "method": policy.method,
            "route": policy.path,
            "status": status,
            "seconds": round(seconds, 3),
            "model": caller.model[:_MOST_TEXT] or None,
            **caller.digests,
            "policy": self._policy,
            "prompt_tokens": caller.num_prompt_tokens,
            "new_tokens": caller.num_new_tokens,
            "marked_tokens": caller.num_marked_tokens,
            "finish": [reason[:_MOST_TEXT] for reason in caller.finishes[:_MOST_TEXTS]],
            "verdicts": [verdict[:_MOST_TEXT] for verdict in caller.verdicts[:_MOST_TEXTS]],
        }
        content = None if heard is None else heard.content()
        if content is not None and caller.began <= self._erased_at.get(caller.key_id, 0.0):
            content.release()  # erased before it was written
            content = None
        self._audit.record(facts, content)

    def erase(self, key_id: str) -> int:
        """Erase the contents of a key, including those of its requests that have not ended.

        Blocks. Raises what `Audit.erase` raises.
        """
        self._erased_at[key_id] = time.monotonic()
        return self._audit.erase(key_id)
