"""Angles of the rotary position embedding."""

from __future__ import annotations

import numpy as np
import pytest

from argosy import _native


@pytest.mark.parametrize("threads", [1, 2])
def test_angles_are_computed_in_double_and_rounded_once(threads: int) -> None:
    inverse_frequency = 1e6 ** -(np.arange(64) / 64)
    positions = np.array([0, 1, 2, 77, 32_768, 131_071], np.int32).repeat(200)
    cosine, sine = np.full((2, len(positions), 64), np.nan, np.float32)
    _native.Rotary(inverse_frequency, 1.25).angles(_native.Runtime(threads), positions, cosine, sine)

    angle = positions[:, None] * inverse_frequency
    # One float32 step of tolerance: two accurate doubles may round to different floats.
    np.testing.assert_array_max_ulp(cosine, (1.25 * np.cos(angle)).astype(np.float32), maxulp=1)
    np.testing.assert_array_max_ulp(sine, (1.25 * np.sin(angle)).astype(np.float32), maxulp=1)


def test_angles_refuse_arrays_that_do_not_fit() -> None:
    rotary = _native.Rotary(np.ones(4), 1.0)
    with pytest.raises(ValueError, match=r"cosine has shape \[2, 3\], expected \[2, 4\]"):
        rotary.angles(
            _native.Runtime(1),
            np.zeros(2, np.int32),
            np.zeros((2, 3), np.float32),
            np.zeros((2, 4), np.float32),
        )


def test_each_axis_rotates_its_own_pairs() -> None:
    axes = (1, 1, 2, 0)
    frequency = np.array([1.0, 0.5, 0.25, 0.125])
    rotary = _native.Rotary(frequency, 1.0, False, axes)
    angles = np.arange(15, dtype=np.float32).reshape(3, 5)
    cosine, sine = np.empty((2, 5, 4), np.float32)
    rotary.angles(_native.Runtime(1), angles, cosine, sine)
    turned = angles.astype(np.float64)[list(axes)].T * frequency
    np.testing.assert_array_equal(cosine, np.cos(turned).astype(np.float32))
    np.testing.assert_array_equal(sine, np.sin(turned).astype(np.float32))
    with pytest.raises(ValueError, match="axes of positions is 2, expected 3 to 8"):
        rotary.angles(_native.Runtime(1), angles[:2].copy(), cosine, sine)
    with pytest.raises(ValueError, match="number of axes is 3, expected 4"):
        _native.Rotary(frequency, 1.0, False, axes[:3])
    with pytest.raises(ValueError, match=r"axes\[0\] is 8, expected 0 to 7"):
        _native.Rotary(frequency, 1.0, False, (8, 0, 0, 0))
