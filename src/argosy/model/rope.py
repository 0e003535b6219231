"""Rotary position embedding: how far dimensions rotate per position (RoFormer, arXiv:2104.09864).

Checkpoints may use these kinds of frequency scaling: linear (arXiv:2306.15595), yarn (arXiv:2309.00071), llama3 (its
config's own formula) and proportional (linear, but only the first pairs of a head turn at all). The dynamic kind
changes nothing within the trained context. Beyond it, the angles of earlier tokens would depend on the length of the
sequence so far, so different chunk sizes would give different tokens: a dynamic model's context ends there (see its
family file).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.config import RopeConfig


def rotary(config: RopeConfig) -> _native.Rotary:
    """Describe the rotary embedding that the native stack applies to queries and keys."""
    return _native.Rotary(inverse_frequency(config), angle_scale(config), config.is_interleaved, config.axes)


def angle_scale(config: RopeConfig) -> float:
    """Return the factor of cosines and sines: yarn's attention factor, 1 for the other kinds."""
    return _attention_factor(config) if config.kind == "yarn" else 1.0


def inverse_frequency(config: RopeConfig) -> NDArray[np.float64]:
    """float64 [rotary_dim / 2]: the rotation of each pair of dimensions per position, in radians."""
    dim = config.rotary_dim
    plain: NDArray[np.float64] = config.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.frequency_factors:
        plain = plain / np.array(config.frequency_factors)
    match config.kind:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / config.factor
        case "proportional":
            turns = np.arange(dim // 2) < (dim // 2 if config.turning_pairs is None else config.turning_pairs)
            return np.where(turns, plain / config.factor, 0.0)
        case "yarn":
            return _yarn(config, plain)
        case "llama3":
            return _llama3(config, plain)


def _yarn(config: RopeConfig, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fast dimensions keep their frequency, slow ones are interpolated, with a ramp in between."""
    dim = config.rotary_dim

    def dimension_of(rotations: float) -> float:
        turns = config.original_context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated: NDArray[np.float64] = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


def _attention_factor(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def _llama3(config: RopeConfig, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    turns = config.original_context * plain / (2 * math.pi)  # full turns within the trained context
    # Llama-4 has equal factors: a step.
    span = max(config.high_freq_factor - config.low_freq_factor, 1e-9)
    keep: NDArray[np.float64] = np.clip((turns - config.low_freq_factor) / span, 0, 1)
    return plain / config.factor * (1 - keep) + plain * keep
