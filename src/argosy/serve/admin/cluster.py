"""The workers that run experts for this server: show them, add one, take one out.

    argosy cluster, or a program with an admin key  ->  /v1/cluster ...  ->  Workers

Elsewhere: the group is `cluster/group.py`, which `cli/commands/serve.py` gives to the server as `Workers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, cast, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import Field
from starlette.requests import Request

from argosy.errors import UsageError
from argosy.experts.workers import WorkerStanding, WorkerStatus
from argosy.serve.answer.fields import Strict
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused


class WorkerState(WorkerStatus, Closed):
    """A worker. Counters are since the server started; those of reads and hits since the worker did."""


class WorkerList(Closed):
    workers: list[WorkerState]


class WorkerBody(Strict):
    host: str = Field(max_length=256, examples=["10.0.0.2:7070"])

    @property
    def needs_model(self) -> bool:
        return False


class Workers(Protocol):
    """The methods of a group that a server needs."""

    def status(self) -> Sequence[WorkerStatus]: ...

    def add(self, host: str) -> None:
        """Add a worker; raises `UsageError` for an invalid address, and `PeerNotUsable`."""
        ...

    def drain(self, host: str) -> None:
        """Take a worker out; raises `UsageError` if there is no such worker."""
        ...


async def list_workers(request: Request) -> WorkerList:
    """Show the workers that run experts for this server; none if it runs alone."""
    found: Workers | None = request.app.state.workers
    return {"workers": [] if found is None else cast("list[WorkerState]", list(found.status()))}


async def add_worker(body: WorkerBody, request: Request) -> WorkerList:
    """Add a worker, or add one again that was drained or set aside."""
    return await _change(request, "add", body.host)


async def drain_worker(body: WorkerBody, request: Request) -> WorkerList:
    """Take a worker out; its experts go to other owners, and no request fails."""
    return await _change(request, "drain", body.host)


async def _change(request: Request, what: Literal["add", "drain"], host: str) -> WorkerList:
    found: Workers | None = request.app.state.workers
    if found is None:
        raise Refused(409, "this server runs without workers", hint="start it with --cluster HOST:PORT,...")
    try:  # in a thread, because connecting takes seconds if nothing answers
        await asyncio.to_thread(found.add if what == "add" else found.drain, host)
    except UsageError as error:
        raise Refused(409, error.message, hint=error.hint) from None
    return await list_workers(request)


def worker_metrics(found: Workers) -> Iterator[Metric]:
    """Metrics of each worker; the label is its address."""
    states = GaugeMetricFamily("argosy_worker_state", "1 for the state of a worker", labels=["host", "state"])
    families = [
        (kind(f"argosy_worker_{name}", what, labels=["host"]), key)
        for kind, name, what, key in (
            (GaugeMetricFamily, "experts_owned", "Experts that a worker owns", "experts_owned"),
            (GaugeMetricFamily, "experts_resident", "Experts in a worker's memory", "resident"),
            (GaugeMetricFamily, "peak_bytes", "Peak memory of a worker", "peak_bytes"),
            (GaugeMetricFamily, "exchange_p50_us", "Median time of an exchange in microseconds", "p50_us"),
            (GaugeMetricFamily, "exchange_p99_us", "99th percentile of the same", "p99_us"),
            (CounterMetricFamily, "read_bytes", "Bytes that a worker read from its drive", "bytes_read"),
            (CounterMetricFamily, "sent_bytes", "Bytes sent to a worker", "bytes_out"),
            (CounterMetricFamily, "received_bytes", "Bytes received from a worker", "bytes_in"),
            (CounterMetricFamily, "experts_run", "Experts that a worker ran", "experts_run"),
            (CounterMetricFamily, "experts_rerouted", "Experts given to others", "experts_rerouted"),
            (CounterMetricFamily, "late_answers", "Answers that came too late to be used", "late_answers"),
            (CounterMetricFamily, "mismatches", "Answers with other bits than those of others", "mismatches"),
            (CounterMetricFamily, "connections", "Times that a worker was connected to", "connections"),
        )
    ]
    for worker in found.status():
        for state in get_args(WorkerStanding):
            states.add_metric([worker["host"], state], float(worker["state"] == state))
        for family, key in families:
            family.add_metric([worker["host"]], worker[key])  # type: ignore[literal-required]
    yield states
    yield from (family for family, _ in families)
