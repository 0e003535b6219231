"""The status of a worker that runs experts for an engine: one type for the group, the server and its metrics."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

WorkerStanding = Literal["ready", "slow", "copying", "away", "refused", "set aside", "draining"]


class WorkerStatus(TypedDict):
    """A worker's status. Counters start when the group is opened; those of reads and hits start with the worker.

    Rates are bytes per second; p50 and p99 are microseconds of an exchange of few rows.
    """

    host: str
    state: WorkerStanding
    why: str
    experts_owned: int
    slots: int
    resident: int
    hit_rate: float | None
    bytes_read: int
    peak_bytes: int
    budget_bytes: int
    disk_bytes_per_s: float
    p50_us: float
    p99_us: float
    bytes_out: int
    bytes_in: int
    experts_run: int
    experts_rerouted: int
    late_answers: int
    verified: int
    mismatches: int
    connections: int
