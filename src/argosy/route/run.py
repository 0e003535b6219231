"""Start and stop a router, as `serve/run.py` does for a server.

Elsewhere: the application is `app.py`; options are `cli/commands/route.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.route.app import make_router
from argosy.route.servers import Fleet, Health
from argosy.route.upstream import Address
from argosy.serve.admin.key_watch import KeyWatch
from argosy.serve.http.listen import Front, Listener
from argosy.serve.http.log import LogFormat
from argosy.serve.http.origins import Origins, Site
from argosy.serve.http.server import MAX_CONNECTIONS, Endpoint, make_room_for_files, run_app
from argosy.serve.run import logging_to_stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Settings of a router.

    addresses: the servers' addresses.
    host: the host to print in the address of the router.
    keys: the file with the API keys of clients; None: the router checks none, but its servers may.
    """

    addresses: Sequence[Address]
    host: str
    keys: Path | None = None
    hosts: Collection[str] = ()
    origins: Origins | None = None
    drain_s: float = 30.0
    max_connections: int = MAX_CONNECTIONS
    front: Front = field(default_factory=Front)
    log_format: LogFormat = "text"
    health: Health = field(default_factory=Health)


def route(sockets: Sequence[Listener], settings: RouterSettings) -> None:
    """Pass requests to the servers until a signal.

    Args:
        sockets: from `bind` or `bind_file`.

    Raises:
        UsageError: another process has started to listen there meanwhile.
    """
    make_room_for_files(2 * settings.max_connections)  # each request also needs a connection to a server
    ring = KeyRing(None if settings.keys is None else KeyFile(settings.keys))
    # The servers count and keep tokens, and `everywhere.py` queries them; only requests are counted here.
    limits = Limits(known=ring.ids)
    fleet = Fleet(settings.addresses, settings.health)
    app = make_router(
        fleet, ring, limits=limits,
        site=Site(
            hosts=settings.hosts, origins=settings.origins or Origins(), base_path=settings.front.base_path
        ),
    )  # fmt: skip

    def started(address: str) -> None:
        # A single write, because another thread writes log lines.
        sys.stderr.write(f"routing {address} to {', '.join(map(str, settings.addresses))}\n")

    with logging_to_stderr(settings.log_format), KeyWatch(ring, limits, app.running):
        endpoint = Endpoint(
            sockets=sockets, host=settings.host, front=settings.front, drain_s=settings.drain_s,
            max_connections=settings.max_connections,
        )  # fmt: skip
        run_app(app, fleet, endpoint, started)
