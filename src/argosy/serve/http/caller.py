"""The client of a request, while the request runs."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from argosy.guard.keys import Scope as KeyScope
from argosy.guard.limits import Limits
from argosy.serve.admin.answer_metrics import AnswerMetrics
from argosy.serve.answer.running import Run
from argosy.serve.guards.screening import Screening
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import Files, Pool, Share


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
