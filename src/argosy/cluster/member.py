"""A member of a group: a worker's address, its offer, its connection and its status.

Elsewhere: `group.py` connects to members; `owners.py` gives them experts.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from argosy import _native
from argosy._native import Owner
from argosy.cluster.hello import Offer
from argosy.errors import UsageError
from argosy.experts.workers import WorkerStanding, WorkerStatus
from argosy.strict_json import JsonError, parse_json

LOOK_S = 0.25  # how often the connections are checked
MOST_PAUSE_S = 5.0  # between two attempts to connect


@dataclass(slots=True, eq=False)
class Member:
    """A worker, known by its address, and its state."""

    name: str
    address: tuple[str, int]
    owner: Owner
    offer: Offer | None = None
    why: str = "not connected yet"
    refusal: bool = False  # it refused: it owns nothing and is rarely tried again
    drained: bool = False
    away_since: float = 0.0
    tried_at: float = 0.0
    is_trying: bool = False  # a thread is connecting to it
    pause_s: float = LOOK_S
    num_connections: int = 0
    num_owned: int = 0
    # Totals of ended connections: bytes sent, bytes received, bytes of late answers.
    ended_bytes: list[int] = field(default_factory=lambda: [0, 0, 0])
    copy_offer: Offer | None = None  # its last offer while it had no files
    copied_shards: int = 0  # mask of the shards assigned to it for copying
    copied_bytes: int = 0
    copy_connection: socket.socket | None = None  # while it copies

    @property
    def state(self) -> WorkerStanding:
        if self.drained:
            return "draining"
        if self.owner.is_set_aside:
            return "set aside"
        if self.refusal:
            return "refused"
        if self.copy_connection is not None:
            return "copying"
        if self.owner.peer is None:
            return "away"
        return "slow" if self.owner.is_slow else "ready"

    def status(self, exchange: _native.Exchange | None) -> WorkerStatus:
        """The facts shown to people and in metrics."""
        owner, offer = self.owner, self.offer
        out, received, late = self.ended_bytes
        p50 = p99 = 0.0
        told: Mapping[str, Any] = {}
        if owner.peer is not None and exchange is not None:
            stats = exchange.stats(owner.peer)
            out, received, late = out + stats.bytes_out, received + stats.bytes_in, late + stats.num_late
            p50, p99 = stats.few_rows.p50_us, stats.few_rows.p99_us
            told = _numbers(exchange.status(owner.peer))
        lookups = told.get("lookups", 0)
        return {
            "host": self.name, "state": self.state, "why": "" if self.state == "ready" else self.why,
            "experts_owned": self.num_owned, "slots": offer.num_slots if offer else 0,
            "resident": told.get("resident", 0), "hit_rate": told.get("hits", 0) / lookups if lookups else None,
            "bytes_read": told.get("bytes_read", 0), "peak_bytes": told.get("peak_bytes", 0),
            "budget_bytes": told.get("budget_bytes", 0),
            "disk_bytes_per_s": offer.disk_bytes_per_s if offer else 0.0, "p50_us": p50, "p99_us": p99,
            "bytes_out": out, "bytes_in": received, "experts_run": owner.num_run,
            "experts_rerouted": owner.num_rerouted, "late_answers": late, "verified": owner.num_verified,
            "mismatches": owner.num_mismatches, "connections": self.num_connections,
        }  # fmt: skip

    def end_copy(self) -> None:
        """Shut down the connection of a copy; the copying thread closes it."""
        connection = self.copy_connection  # the copying thread may set it to None at any time
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def parse_host(text: str, *, lowest_port: int = 1) -> tuple[str, int]:
    """Parse `HOST:PORT` or `[IPV6]:PORT`.

    Raises:
        UsageError: the text is neither.
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5
    if not host or not is_port or not lowest_port <= int(port) < 65536:
        raise UsageError(f"'{text}' is not the address of a worker", hint="write HOST:PORT, as 10.0.0.2:7070")
    return host, int(port)


def format_host(host: str, port: int) -> str:
    """The text that `parse_host` reads as this address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _numbers(data: bytes) -> dict[str, int]:
    """The numbers that a worker reports about itself; empty if it reports none."""
    with suppress(JsonError):
        told = parse_json(data)
        if isinstance(told, dict):
            return {key: value for key, value in told.items() if type(value) is int and value >= 0}
    return {}
