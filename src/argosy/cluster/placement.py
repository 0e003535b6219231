"""Decide which hosts own an expert: pure functions of the hosts' caches, drives and shards.

    hosts (cache, drive, shards)  ->  weights  ->  owners of every expert

An expert's number determines its shard (`checkpoint/shards.py`), and a host has the files of some shards, usually
all. Among the hosts with its files, weighted rendezvous hashing gives an expert R owners: when a host joins or
leaves, only its own experts move, so the other hosts' caches stay useful. A host without files is assigned shards
in the same way.

A host's weight is its share of all expert bytes at which every host needs the same time. A host reads what it owns
but cannot keep in memory. With cache c, drive rate d and E bytes of experts in all, a share s takes time (s - c/E)
/ d. These times are equal for all hosts if s = c/E + d (1 - C/E) / D, where C and D are the sums over the hosts.

Elsewhere: native code chooses the owner that runs an expert, layer by layer (`native/cluster/owners.h`); a host's
resources come from `hello.Offer`.
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

    cache_bytes: memory for experts.   disk_bytes_per_s: 0 if unknown, then taken as the others' mean.
    shards: bit i is set if it has the files of shard i.
    """

    name: str
    cache_bytes: int
    disk_bytes_per_s: float
    shards: int = ALL_SHARDS


def weights(hosts: Sequence[Host], expert_bytes: int) -> list[float]:
    """The share of experts of which each host should be the first owner; the shares add up to 1.

    Args:
        expert_bytes: the size of all routed experts.
    """
    known = [host.disk_bytes_per_s for host in hosts if host.disk_bytes_per_s > 0]
    usual = sum(known) / len(known) if known else 1.0
    drives = [host.disk_bytes_per_s or usual for host in hosts]
    kept = [min(1.0, host.cache_bytes / max(1, expert_bytes)) for host in hosts]
    read = max(0.0, 1.0 - sum(kept))  # the share that no host can cache
    shares = [
        max(_SMALLEST_WEIGHT, keeps + read * drive / sum(drives))
        for keeps, drive in zip(kept, drives, strict=True)
    ]
    return [share / sum(shares) for share in shares]


def place(
    hosts: Sequence[Host], layers: Sequence[int], *, num_experts: int, expert_bytes: int, replicas: int
) -> dict[int, NDArray[np.int32]]:
    """The owners of every expert, first owner first.

    Returns:
        For each layer, [experts, replicas]: indices into `hosts`; -1 where fewer hosts have the expert's files.
    """
    shares = weights(hosts, expert_bytes)
    owners: dict[int, NDArray[np.int32]] = {}
    experts = np.arange(num_experts, dtype=np.uint64)
    for layer in layers:
        shards = (experts + np.uint64(LAYER_STRIDE * layer)) % np.uint64(NUM_SHARDS)
        owners[layer] = _owners(hosts, shares, experts + np.uint64(layer << 20), shards, replicas)
    return owners


def allot(hosts: Sequence[Host], *, expert_bytes: int, replicas: int) -> list[int]:
    """Choose `replicas` hosts for each shard as for an expert; return the mask of each host's shards.

    `Host.shards` limits the choice to shards that a host has or may get.
    """
    shards = np.arange(NUM_SHARDS, dtype=np.uint64)
    numbers = shards + np.uint64(1 << 40)  # distinct from every expert's number
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
    """The best hosts for each number, [numbers, replicas], among those that have its shard; -1 if there are fewer."""
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
