"""Decide which hosts own an expert. Pure functions of what is known of the hosts.

    hosts (cache, drive, shards)  ->  weights  ->  owners of every expert

Experts belong to shards by their number (`checkpoint/shards.py`), and a host has the files of some, usually of all.
Among the hosts with its files, an expert has R owners by weighted rendezvous hashing: a host that comes or goes moves
only the experts that it gets or had. So the caches of the others stay useful. A host without files gets shards in the
same way.

A weight is the share of all expert bytes at which every host needs the same time. A host reads what it owns and does
not keep. With a cache of c, a drive of d and experts of E bytes, a share s of them takes a time of (s - c/E) / d; these
are equal for all hosts if s = c/E + d (1 - C/E) / D, where C and D are sums over the hosts.

Elsewhere: which owner runs an expert now is decided in native code, layer by layer (`native/cluster/owners.h`); what
hosts bring is `hello.Offer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.shards import ALL_SHARDS, LAYER_STRIDE, NUM_SHARDS

_SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that runs experts.

    cache_bytes: memory for experts.   disk_bytes_per_s: 0: unknown, taken as the others' mean.
    shards: bit i is set if it has the files of shard i.
    """

    name: str
    cache_bytes: int
    disk_bytes_per_s: float
    shards: int = ALL_SHARDS


def weights(hosts: Sequence[Host], expert_bytes: int) -> list[float]:
    """The share of experts that each host should own first; they add up to 1.

    Args:
        expert_bytes: size of all routed experts.
    """
    known = [host.disk_bytes_per_s for host in hosts if host.disk_bytes_per_s > 0]
    usual = sum(known) / len(known) if known else 1.0
    drives = [host.disk_bytes_per_s or usual for host in hosts]
    kept = [min(1.0, host.cache_bytes / max(1, expert_bytes)) for host in hosts]
    read = max(0.0, 1.0 - sum(kept))  # the share that no host can keep
    shares = [
        max(_SMALLEST_WEIGHT, keeps + read * drive / sum(drives))
        for keeps, drive in zip(kept, drives, strict=True)
    ]
    return [share / sum(shares) for share in shares]


def place(
    hosts: Sequence[Host], layers: Sequence[int], *, num_experts: int, expert_bytes: int, replicas: int
) -> dict[int, NDArray[np.int32]]:
    """The owners of every expert, the first one before the second.

    Returns:
        By layer, [experts, replicas]: indices of `hosts`; -1 where fewer hosts have the expert's files.
    """
    shares = weights(hosts, expert_bytes)
    owners: dict[int, NDArray[np.int32]] = {}
    experts = np.arange(num_experts, dtype=np.uint64)
    for layer in layers:
        shards = (experts + np.uint64(LAYER_STRIDE * layer)) % np.uint64(NUM_SHARDS)
        owners[layer] = _owners(hosts, shares, experts + np.uint64(layer << 20), shards, replicas)
    return owners


def allot(hosts: Sequence[Host], *, expert_bytes: int, replicas: int) -> list[int]:
    """Choose `replicas` hosts for each shard, in the same way as for an expert; return the mask of each host's shards.

    `Host.shards` limits the choice to shards that a host has or may get.
    """
    shards = np.arange(NUM_SHARDS, dtype=np.uint64)
    numbers = shards + np.uint64(1 << 40)  # no expert's
    table = _owners(hosts, weights(hosts, expert_bytes), numbers, shards, replicas)
    return [
        sum(1 << shard for shard, row in enumerate(table.tolist()) if index in row)
        for index in range(len(hosts))
    ]


def _owners(
    hosts: Sequence[Host],
    shares: Sequence[float],
    numbers: NDArray[np.uint64],
    shards: NDArray[np.uint64],
    replicas: int,
) -> NDArray[np.int32]:
    """The best hosts for each of `numbers`, [numbers, replicas], among those with its shard; -1 if there are fewer."""
    seeds = np.array([_seed(host.name) for host in hosts], np.uint64)
    # Weighted rendezvous hashing: the highest -weight / ln(u) wins, for u in (0, 1) from a hash of host and number.
    draws = _mix(numbers[:, None] * np.uint64(0x9E3779B97F4A7C15) ^ seeds[None, :])  # [numbers, hosts]
    scores = -np.array(shares) / np.log((draws.astype(np.float64) + 0.5) / 2.0**64)
    masks = np.array([host.shards for host in hosts], np.uint64)
    has_files = (masks[None, :] >> shards[:, None]) & np.uint64(1)
    scores[has_files == 0] = -1.0
    order = np.argsort(-scores, axis=1, kind="stable")[:, :replicas].astype(np.int32)
    order[np.take_along_axis(scores, order.astype(np.int64), axis=1) < 0] = -1
    if order.shape[1] < replicas:
        order = np.pad(order, ((0, 0), (0, replicas - order.shape[1])), constant_values=-1)
    return order


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input changes every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
