"""Divide the experts of a model: 64 shards by number, and shares of them for files and for workers.

A share K of N has the shards K, K + N, K + 2 N ...; `argosy pack --shards N` writes a file for each, and `argosy worker
--share K/N` runs one. Masks have bit i set for shard i.

Elsewhere: which hosts own the experts of a shard is `cluster/placement.py`.
"""

from __future__ import annotations

NUM_SHARDS = 64
ALL_SHARDS = (1 << NUM_SHARDS) - 1
COPY_FILE = "argosy-copy.json"  # in a worker's copy of a model, which has only some shards
LAYER_STRIDE = 29  # odd: an expert's number selects another shard in every layer


def shard_of(layer: int, expert: int) -> int:
    """The shard of an expert. Each shard has equally many experts of a layer, or one more."""
    return (expert + LAYER_STRIDE * layer) % NUM_SHARDS


def shards_of_share(part: int, num_shares: int) -> int:
    """The mask of share `part`, from 1 to `num_shares`."""
    return sum(1 << shard for shard in range(part - 1, NUM_SHARDS, num_shares))
