"""A server's content policies, its stops, and the users that it counts.

    gate: the key's policy  ->  `Screening`  ─ before the prompt is made, and during the answers ─>  engine, dialect

Elsewhere: `screening.py` applies a policy to one request; checks run in `checks.py`; what a policy does to a text
is in the room `guard`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, Metric

from argosy.errors import ArgosyError, UsageError
from argosy.guard.keys import Key
from argosy.guard.policy import ContentPolicy, HttpCheck, ModelCheck, Policies, read_policies
from argosy.guard.screen import RequestScreen, Side
from argosy.guard.stops import Stops, stopped
from argosy.guard.users import UserBlocked, Users
from argosy.serve.governance import no_policies
from argosy.serve.guards.checks import Checks
from argosy.serve.guards.screening import Screening
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller, Hook, Watch
from argosy.serve.http.incoming import CHOSEN_POLICY

log = logging.getLogger("argosy.serve")


class InForce(NamedTuple):
    """A policy, and the digest of its file."""

    policy: ContentPolicy
    digest: str


class Guarding(Hook):
    """Applies a server's policies to its requests, and keeps its stops.

    Args:
        path: the policy file; the file of stops is next to it. None: nothing is checked, and stops end with the
            process.

    Raises:
        UsageError: a file cannot be read or is invalid.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._policies: Policies | None = None if path is None else _read(path)
        self.stops = Stops(None if path is None else path.with_name(path.name + ".stops"))
        self.users = Users()
        self.changed: Callable[[], None] = lambda: None  # called after the files have been read again
        self._models: Sequence[str] = ()
        self.checks = Checks()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Side, str]] = Counter()

    @property
    def digest(self) -> str | None:
        """The digest of the policies in force, or None."""
        return None if self._policies is None else self._policies.digest

    def require_models(self, names: Sequence[str]) -> None:
        """Check that the server has the models that checks ask, now and whenever the policies are read again.

        Raises:
            UsageError: a model is missing.
        """
        self._models = names
        if self._policies is not None:
            _require_models(self._policies, names)

    def reload(self) -> None:
        """Read the files again; running requests keep their policy. On UsageError nothing changes."""
        if self._path is None:
            return
        policies = _read(self._path)
        _require_models(policies, self._models)
        self.stops.reload()
        self._policies = policies
        self.checks.forget()
        self.changed()

    def why_not(
        self, key: Key | None, models: Collection[str], persons: Collection[str]
    ) -> ArgosyError | None:
        """Why a stop or a block keeps a request from running, or None if it may run.

        Args:
            models: the id of its model, and the preset's name if it uses one.
            persons: all names that its client gives for a person.
        """
        if key is not None and self.stops.has("key", key.id, key.name):
            return stopped("key")
        if self.stops.has("model", *models):
            return stopped("model")
        blocked = () if self._policies is None else self._policies.blocked_users
        if self.stops.has("user", *persons) or any(person in blocked for person in persons):
            return UserBlocked(
                "the operator of this server does not accept requests of this user", code="user_blocked"
            )
        return None

    def in_force(self, key: Key | None) -> InForce | None:
        """The default policy of a key, or None if nothing is checked for it."""
        policies = self._policies
        policy = None if policies is None else policies.of(key)
        return None if policies is None or policy is None else InForce(policy, policies.digest)

    def admit(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        """Screen a request if a model gets its texts."""
        if rule.screens not in ("answers", "texts"):
            return None
        return self.screening(caller.key, headers.get(CHOSEN_POLICY), caller.found)

    def screening(
        self, key: Key | None, chosen: str | None, found: Callable[[str], None]
    ) -> Screening | None:
        """The screening of a request, or None if nothing is checked.

        Args:
            chosen: the policy that the request names.
            found: called with the policy, its digest and the findings, for the record of the request.

        Raises:
            UsageError: the key may not choose that policy.
        """
        policies = self._policies
        if policies is None:
            if chosen is not None:
                raise no_policies()
            return None
        policy = policies.of(key, chosen)
        if policy is None:
            return None
        found(f"policy {policy.name}")
        found(f"policy_sha256 {policies.digest}")

        def note(side: Side, what: str, number: int) -> None:
            self.note(side, what, number)
            found(f"{side} {what}")

        screen = RequestScreen(policy, note)
        return Screening(screen, key, digest=policies.digest, checks=self.checks, users=self.users, note=note)

    def note(self, side: Side, what: str, number: int) -> None:
        """Count a finding. Any thread may call this."""
        with self._lock:
            self._counts[side, what] += number

    def collect(self) -> Iterator[Metric]:
        """Report to Prometheus how often each entity, list and check was found, by side."""
        metric = CounterMetricFamily("argosy_guard_found", "What checks found", labels=["side", "found"])
        with self._lock:
            counts = dict(self._counts)
        for (side, what), number in counts.items():
            metric.add_metric([side, what], number)
        yield metric

    @property
    def has_stopped(self) -> bool:
        """Whether checks wait for a thread that does not come."""
        return self.checks.has_stopped


def _read(path: Path) -> Policies:
    policies = read_policies(path)
    for check in policies.checks:
        if isinstance(check, HttpCheck) and check.key_env is not None and not os.environ.get(check.key_env):
            raise UsageError(f"{path}: checks.{check.name}.key-env: the variable {check.key_env} is not set")
    return policies


def _require_models(policies: Policies, names: Sequence[str]) -> None:
    for check in policies.checks:
        if isinstance(check, ModelCheck) and check.model not in names:
            raise UsageError(
                f"the policy's check {check.name} asks the model {check.model}, "
                f"and this server has: {', '.join(names)}",
                hint="serve it alongside the others: `argosy serve MODEL GUARD --policy FILE`",
            )
