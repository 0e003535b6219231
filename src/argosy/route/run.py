"""Start and stop a router, as `serve/run.py` does for a server.

Elsewhere: the application is `app.py`; options are `cli/commands/route.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.route.app import make_router
from argosy.route.servers import Fleet, Health
from argosy.route.upstream import Address
from argosy.serve.admin.key_watch import KeyWatch
from argosy.serve.http.listen import Listener
from argosy.serve.http.server import Endpoint, make_room_for_files, run_app
from argosy.serve.run import logging_to_stderr


def route(
    addresses: Sequence[Address],
    sockets: Sequence[Listener],
    endpoint: Endpoint,
    health: Health | None = None,
) -> None:
    """Pass requests to the servers at these addresses until a signal.

    Args:
        sockets: from `bind` or `bind_file`.
        endpoint: without keys, the router checks none, but its servers may.

    Raises:
        UsageError: another process has started to listen there meanwhile.
    """
    make_room_for_files(2 * endpoint.max_connections)  # each request also needs a connection to a server
    ring = KeyRing(None if endpoint.keys is None else KeyFile(endpoint.keys))
    # The servers count and keep tokens, and `everywhere.py` queries them; only requests are counted here.
    limits = Limits(known=ring.ids)
    fleet = Fleet(addresses, health or Health())
    app = make_router(fleet, ring, limits=limits, site=endpoint.site)

    def started(address: str) -> None:
        # A single write, because another thread writes log lines.
        sys.stderr.write(f"routing {address} to {', '.join(map(str, addresses))}\n")

    with logging_to_stderr(endpoint.log_format, endpoint.log_bytes), KeyWatch(ring, limits, app.running):
        run_app(app, fleet, sockets, endpoint, started)
