from __future__ import annotations

import numpy as np
import pytest

from argosy.engine.media.video_layout import Group, Sound, told_by_angles, told_by_text
from argosy.media.videos import Texts


def angles_of(times: list[float], size: int = 2) -> np.ndarray:
    """[3, positions]: groups of `size` positions in a row."""
    time = np.repeat(np.array(times, np.float32), size)
    place = np.tile(np.arange(size, dtype=np.float32), len(times))
    return np.stack([time, np.zeros_like(place), place])


def test_texts_stand_around_their_groups() -> None:
    parts = told_by_text([Texts("0 s", "."), Texts("1 s", "")])
    assert parts == ["0 s", Group(0), ".", "1 s", Group(1)]


@pytest.mark.parametrize(
    ("times", "num_sound", "order"),
    [
        ([0, 13, 26], 0, "vvv"),
        ([0, 13, 26], 3, "v3vv"),
        ([0, 13, 26], 13, "v13vv"),
        ([0, 13, 26], 14, "v13v1v"),
        ([0, 13, 26], 40, "v13v13v14"),
        ([0, 8.125], 20, "v9v11"),
    ],
)
def test_a_group_stands_before_all_sound_that_is_not_earlier(
    times: list[float], num_sound: int, order: str
) -> None:
    parts = told_by_angles(angles_of(times), max(times) + 1, len(times), num_sound)
    found = "".join("v" if isinstance(part, Group) else str(part.stop - part.start) for part in parts)  # type: ignore[union-attr]
    assert found == order
    heard = [part for part in parts if isinstance(part, Sound)]
    assert [at for part in heard for at in range(part.start, part.stop)] == list(range(num_sound))


@pytest.mark.parametrize("num_sound", [0, 3, 20, 50])
def test_each_part_has_the_positions_that_it_has_in_the_whole(num_sound: int) -> None:
    """Added up as `Spans` does, the angles are those of the video and the sound, each from the first position."""
    whole = angles_of([0, 8.125, 16.25])
    at, groups, heard = 100.0, [], []
    for part in told_by_angles(whole, 17.25, 3, num_sound):
        assert not isinstance(part, str)
        assert part.angles is not None
        assert part.num_angles is not None
        (groups if isinstance(part, Group) else heard).append(at + part.angles)
        at += part.num_angles
    np.testing.assert_array_equal(np.concatenate(groups, axis=1), 100 + whole.astype(np.float64))
    if num_sound:
        np.testing.assert_array_equal(np.concatenate(heard, axis=1)[0], 100 + np.arange(num_sound))
    assert at == 100 + (num_sound if num_sound > 17 else 17.25)
