"""The interface for policies, stops and the audit. Without the folder `guards/` a server has none of them.

    make_app  ->  Governance.join; its hooks  ->  gate        admin routes  ->  has_stopped, keeps_contents, erase

Elsewhere: the implementation is `guards/governing.py`, which `app.py` looks for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prometheus_client import CollectorRegistry

from argosy.errors import ArgosyError, UsageError
from argosy.guard.keys import Key
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller, Hook, Watch
from argosy.serve.http.incoming import CHOSEN_POLICY
from argosy.serve.http.running import Running
from argosy.serve.models.models import Models


class NoPolicies(Hook):
    """Refuses a request that names a policy on a server without any."""

    def admit(self, caller: Caller, rule: RouteRule, headers: Mapping[str, str]) -> Watch | None:
        if rule.screens in ("answers", "texts") and CHOSEN_POLICY in headers:
            raise no_policies()
        return None


def no_policies() -> UsageError:
    """Return the refusal of a request that names a policy."""
    return UsageError(f"{CHOSEN_POLICY}: this server has no policies", param=CHOSEN_POLICY)


class Governance:
    """Governance that checks, stops and records nothing.

    hooks: run around every request.
    has_stopped: whether requests wait for a thread in vain.
    keeps_contents: whether it keeps what requests say.
    """

    hooks: Sequence[Hook] = (NoPolicies(),)
    has_stopped: bool = False
    keeps_contents: bool = False

    def why_not(self, key: Key | None, uses: Collection[str], persons: Collection[str]) -> ArgosyError | None:
        """Why a request may not run now, given its key and the `uses` and `persons` of its `Run`, or None if it may."""
        return None

    def join(self, models: Models, running: Running, registry: CollectorRegistry) -> None:
        """Join a server with these models, running requests and metrics.

        Raises:
            UsageError: it needs a model that the server does not have.
        """

    def reload(self) -> None:
        """Read its files again."""

    def erase(self, key_id: str) -> int | None:
        """Erase what it keeps for a key; return the number of contents, or None if it never keeps any. Blocks."""
        return None
