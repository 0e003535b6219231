"""Divide the experts of a model into 64 shards by number, and the shards into shares for files and workers.

Share K of N contains the shards K, K + N, K + 2 N ...; `argosy pack --shards N` writes a file for each share, and
`argosy worker --share K/N` runs one. Bit i of a mask stands for shard i.

Elsewhere: `cluster/placement.py` decides which hosts own the experts of a shard.
"""

from __future__ import annotations

NUM_SHARDS = 64
ALL_SHARDS = (1 << NUM_SHARDS) - 1
COPY_FILE = "argosy-copy.json"  # in a worker's copy of a model, which contains only some shards
LAYER_STRIDE = 29  # odd: an expert's number selects another shard in every layer


def shard_of(layer: int, expert: int) -> int:
    """Return the shard of an expert. All shards get the same number of a layer's experts, give or take one."""
    return (expert + LAYER_STRIDE * layer) % NUM_SHARDS


def shards_of_share(part: int, num_shares: int) -> int:
    """Return the mask of share `part`, from 1 to `num_shares`."""
    return sum(1 << shard for shard in range(part - 1, NUM_SHARDS, num_shares))
