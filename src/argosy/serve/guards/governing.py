"""The whole of `guards/` in a server: policies, stops, the audit, and what users are told about them.

Elsewhere: `serve/governance.py` is the interface that a server uses.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from argosy.errors import ArgosyError, UsageError
from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.chain import Head
from argosy.guard.keys import Key
from argosy.serve.governance import Governance
from argosy.serve.guards import stops, transparency
from argosy.serve.guards.audited import Auditor
from argosy.serve.guards.check_by_model import ModelJudge
from argosy.serve.guards.guarding import Guarding
from argosy.serve.guards.moderations import Moderated, moderations
from argosy.serve.guards.transparency import Practice
from argosy.serve.http.route import Route, admin_route, get_route, post_route
from argosy.serve.http.running import Running
from argosy.serve.models.models import Models

log = logging.getLogger("argosy.serve")

ROUTES: Mapping[str, tuple[Route, ...]] = {
    "/v1/engine/transparency": (
        get_route(
            "/v1/engine/transparency", transparency.transparency, "infer", answer=transparency.Transparency
        ),
    ),
    "/v1/engine/stops": (
        get_route("/v1/engine/stops", stops.stops, "admin", answer=stops.Stopped),
        admin_route("/v1/engine/stops", stops.stop, stops.Stopped, refusals=("404",)),
    ),
    "/v1/moderations": (
        post_route("/v1/moderations", moderations, Moderated, screens="texts", refusals=("404",)),
    ),
}


class Governing(Governance):
    """The checks, stops and records of a server.

    Args:
        guarding: policies and stops; None: there are no policies, and stops end with the process.
        auditor: records requests; None: they are not recorded.
        practice: how the server treats texts, for `/v1/engine/transparency`; None: it keeps nothing.
    """

    def __init__(
        self, *, guarding: Guarding | None = None, auditor: Auditor | None = None, practice: Practice | None = None
    ) -> None:  # fmt: skip
        self.guarding = Guarding() if guarding is None else guarding
        self.practice = Practice() if practice is None else practice
        self._auditor = auditor
        self.hooks = (self.guarding,) if auditor is None else (auditor, self.guarding)
        self.keeps_contents = self.practice.audit is not None and self.practice.audit.with_content

    @property
    def has_stopped(self) -> bool:  # type: ignore[override]
        return self.guarding.has_stopped

    def why_not(self, key: Key | None, uses: Collection[str], persons: Collection[str]) -> ArgosyError | None:
        return self.guarding.why_not(key, uses, persons)

    def join(self, models: Models, running: Running, registry: CollectorRegistry) -> None:
        self.guarding.require_models(models.names)
        self.guarding.changed = running.look_soon
        self.guarding.checks.ask_model = ModelJudge(models, running)
        registry.register(self.guarding)

    def reload(self) -> None:
        try:
            self.guarding.reload()
        except UsageError as error:
            log.error("policy: the policies in use stay: %s", error)
        else:
            log.info("policy: the policies were read again, sha256 %s", self.guarding.digest)

    def erase(self, key_id: str) -> int | None:
        return None if self._auditor is None else self._auditor.erase(key_id)


@contextmanager
def governing(guarding: Guarding | None, practice: Practice, *, policy_sha256: str) -> Iterator[Governing]:
    """Open the audit of `practice`, if there is one, and govern a server until it ends.

    Args:
        policy_sha256: digest of the settings that govern requests and what is kept of them.
    """
    if practice.audit is None:
        yield Governing(guarding=guarding, practice=practice)
        return
    audit = _open_audit(practice.audit, policy_sha256)
    try:
        auditor = Auditor(audit, policy=policy_sha256)
        yield Governing(guarding=guarding, auditor=auditor, practice=practice)
    finally:
        audit.close()


def _open_audit(settings: AuditSettings, policy: str) -> Audit:
    def announce(head: Head) -> None:
        log.info("audit anchor %s", head, extra={"facts": {"event": "audit_anchor", "anchor": str(head)}})

    facts = {"version": version("argosy"), "policy": policy}
    return Audit(settings, facts=facts, report=lambda text: log.error("%s", text), announce=announce)
