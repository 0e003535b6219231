"""Predict, on paper, one answer from a group of machines that share the experts.

    Work, Rates of one machine, N, network  ->  predict_group  ->  GroupForecast: tok/s, speed-up, share of the network

One machine has the dense weights, attention and router; all have experts, each expert on two of them. In every
layer the rows go to the machines that own the chosen experts, and the sums come back. The slower of memory and
drive decides a machine's time, and the slowest machine the layer's time. With about one miss per layer, one drive
works while the others wait, so the mean load would be too optimistic: layers are drawn at random instead, with a
fixed seed.

    network of a layer = 2 latency + (other machines asked + experts chosen there) * 4 bytes * hidden / bandwidth

A row goes once to each machine asked, and an output comes back for each expert, so the sums equal those of one
machine. Both are float32.

Elsewhere: `speed.py` predicts a single machine; the room `cluster` runs groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from argosy.errors import UsageError
from argosy.experts.hit_rate import WorkingSet
from argosy.forecast.speed import Range
from argosy.machine.rates import Rates
from argosy.model.work import Work

MOST_MACHINES = 64
# One-way latency including the network stack, for bandwidths (bytes per second) from this one upwards.
_LATENCIES_S = ((100e9 / 8, 20e-6), (25e9 / 8, 30e-6), (0.0, 50e-6))
_NUM_LAYERS_DRAWN = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The network between two machines of a group."""

    bytes_per_s: float

    @property
    def latency_s(self) -> float:
        return next(latency_s for least, latency_s in _LATENCIES_S if self.bytes_per_s >= least)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupForecast:
    """The predicted decode of one sequence by `num_machines`."""

    num_machines: int
    hit_rate: float
    tokens_per_s: Range
    speed_up: float  # relative to one machine
    network_share: float  # as a fraction of a step's time


def parse_network(text: str) -> Network:
    """Parse a speed such as `25GbE`, in gigabits per second.

    Raises:
        UsageError: it is malformed, or not a plausible network speed.
    """
    found = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*(?:GbE|Gbit/s)?", text, re.IGNORECASE)
    gigabits = float(found[1]) if found else 0.0
    if not 0.1 <= gigabits <= 1600:
        raise UsageError(
            f"--network takes gigabits per second, found '{text[:40]}'", hint="for example 25GbE"
        )
    return Network(bytes_per_s=gigabits * 1e9 / 8)


def parse_count(text: str) -> tuple[int, str]:
    """Parse `4*NAME` into 4 and NAME; a name alone is one machine.

    Raises:
        UsageError: the count is zero or too high.
    """
    count, star, name = text.partition("*")
    if not star:
        return 1, text
    if not re.fullmatch(r"\d{1,3}", count) or not 1 <= int(count) <= MOST_MACHINES or not name:
        raise UsageError(f"--machine takes N*NAME with N from 1 to {MOST_MACHINES}, found '{text[:60]}'")
    return int(count), name


def predict_group(
    work: Work, rates: Rates, working_set: WorkingSet, *, num_machines: int, num_slots: int, hidden_size: int,
    network: Network, context: int, hit_rate: float | None = None,
) -> GroupForecast:  # fmt: skip
    """Predict decode of one sequence with `context` positions.

    Args:
        num_slots: experts in memory on all machines together.
        hit_rate: a known one; None: the working set predicts it.
    """
    predicted = working_set.hit_rate(num_slots) if hit_rate is None else hit_rate
    points = 0.0 if hit_rate is not None else working_set.error

    def step(machines: int, factor: float, added: float) -> tuple[float, float]:
        hits = min(1.0, max(0.0, predicted + added))
        return _step_s(work, rates.scaled(factor), machines, hits, hidden_size, network, context)

    slow, _ = step(num_machines, 1 / rates.spread, -points)
    likely, network_s = step(num_machines, 1.0, 0.0)
    fast, _ = step(num_machines, rates.spread, points)
    alone_hits = working_set.hit_rate(num_slots / num_machines) if hit_rate is None else hit_rate
    alone, _ = _step_s(work, rates, 1, alone_hits, hidden_size, network, context)
    return GroupForecast(
        num_machines=num_machines,
        hit_rate=predicted,
        tokens_per_s=Range(1 / slow, 1 / likely, 1 / fast),
        speed_up=alone / likely,
        network_share=network_s / likely,
    )


def _step_s(
    work: Work, rates: Rates, machines: int, hit_rate: float, hidden_size: int, network: Network, context: int
) -> tuple[float, float]:
    """Return the seconds of a step, and the network's part of them."""
    chosen = round(work.experts_per_token)
    dense_s = sum(
        rates.product_s(format, nbytes, parameters, 1)
        for part in (work.dense, work.head)
        for format, (nbytes, parameters) in part.items()
    )
    attention_s = rates.attention_s(work.kv_dtype, *work.keys_values(context))
    one_s = sum(
        rates.product_s(format, nbytes, parameters, 1) for format, (nbytes, parameters) in work.expert.items()
    )
    record_s = work.record_bytes / rates.drive_rate(work.piece_bytes)
    experts_s = _slowest_machine_s(machines, chosen, hit_rate, one_s, record_s)
    asked = (machines - 1) * (1.0 - (1.0 - 1.0 / machines) ** chosen)  # other machines than the first
    outputs = chosen * (1.0 - 1.0 / machines)
    network_s = 0.0
    if machines > 1:
        network_s = 2 * network.latency_s + (asked + outputs) * 4.0 * hidden_size / network.bytes_per_s
    layers = work.num_moe_layers
    overhead_s = work.num_layers * rates.layer_s + rates.step_s
    missed = chosen * (1.0 - hit_rate) / machines  # per layer; each machine handles its own misses
    overhead_s += layers * (
        rates.streamed_layer_s + rates.misses_overhead_s(chosen / machines, missed, work.record_bytes)
    )
    return dense_s + attention_s + overhead_s + layers * (experts_s + network_s), layers * network_s


def _slowest_machine_s(machines: int, chosen: int, hit_rate: float, one_s: float, record_s: float) -> float:
    """The slowest machine's time for its experts, averaged over random layers."""
    random = np.random.default_rng(0)
    memory_s = np.zeros((_NUM_LAYERS_DRAWN, machines))
    drive_s = np.zeros((_NUM_LAYERS_DRAWN, machines))
    rows = np.arange(_NUM_LAYERS_DRAWN)
    for _ in range(chosen):
        first = random.integers(0, machines, _NUM_LAYERS_DRAWN)
        second = (
            (first + random.integers(1, machines, _NUM_LAYERS_DRAWN)) % machines if machines > 1 else first
        )
        load = np.maximum(memory_s, drive_s)
        owner = np.where(load[rows, second] < load[rows, first], second, first)
        memory_s[rows, owner] += one_s
        drive_s[rows, owner] += np.where(random.random(_NUM_LAYERS_DRAWN) >= hit_rate, record_s, 0.0)
    return float(np.maximum(memory_s, drive_s).max(axis=1).mean())
