"""Decide which expert to evict; `native/ops/cache_policy.h` says how.

A policy is plain bookkeeping without reads, so it can be replayed on a recorded trace: `benchmarks/replay.py` measures
policies on recorded routing, and `docs/experiments.md` lists the results. `cached_experts.h` uses a policy for leases.
"""

from __future__ import annotations

from argosy import _native

CachePolicy = _native.CachePolicy
BONUS_TURNS = _native.BONUS_TURNS
HALF_LIFE_TURNS = _native.HALF_LIFE_TURNS
