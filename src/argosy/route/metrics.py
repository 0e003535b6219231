"""Prometheus metrics of a router: its requests, its servers, and answers that outlived a server.

Elsewhere: those of servers are `serve/admin/state.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from argosy.route.servers import Fleet
from argosy.serve.admin.state import RequestMetrics

Outcome = Literal["continued", "repeated", "failed"]


class RouteMetrics:
    """Metrics in a registry of their own; a server's label is its address."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.registry = CollectorRegistry()
        self.observe = RequestMetrics(self.registry).observe
        self._replays = Counter(
            "argosy_route_replays",
            "Requests whose server failed: streams continued, whole answers repeated, and those that failed",
            ["outcome"], registry=self.registry,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def replayed(self, outcome: Outcome) -> None:
        self._replays.labels(outcome).inc()

    def collect(self) -> Iterator[Metric]:
        servers = self._fleet.servers
        for family, name, what, values in (
            (GaugeMetricFamily, "up", "1: takes requests", [float(one.state == "up") for one in servers]),
            (GaugeMetricFamily, "owed_tokens", "Tokens of unanswered requests, estimated",
             [one.owed_tokens for one in servers]),
            (GaugeMetricFamily, "running", "Unanswered requests", [len(one.replies) for one in servers]),
            (CounterMetricFamily, "requests", "Requests sent", [one.num_requests for one in servers]),
            (CounterMetricFamily, "failures", "Times it went down", [one.num_failures for one in servers]),
        ):  # fmt: skip
            metric = family(f"argosy_route_server_{name}", what, labels=["server"])
            for server, value in zip(servers, values, strict=True):
                metric.add_metric([str(server.address)], value)
            yield metric
        marks = GaugeMetricFamily("argosy_route_prefixes", "Beginnings of prompts whose server is known")
        marks.add_metric([], len(self._fleet.prefixes))
        yield marks
