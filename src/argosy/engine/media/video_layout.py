"""The order of a video's parts in a prompt: groups of frames, the texts with their times, and pieces of its sound.

    texts of groups               ->  "<0.2 seconds>" group "<1.2 seconds>" group ...
    rotary positions that tell time  ->  group group ..., or with sound: sound group sound group ...

Elsewhere: `media/videos.py` makes the texts; `prompt_media.py` turns groups and pieces of sound into spans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.media.videos import Texts

Angles = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Group:
    """A group of frames. angles: None: the group is placed like a picture."""

    number: int
    angles: Angles | None = None
    num_angles: float | None = None


@dataclass(frozen=True, slots=True)
class Sound:
    """Some positions of the sound."""

    start: int
    stop: int
    angles: Angles
    num_angles: float


Part = str | Group | Sound


def told_by_text(texts: Sequence[Texts]) -> list[Part]:
    """Return the groups, each between its texts."""
    parts: list[Part] = []
    for number, (before, after) in enumerate(texts):
        parts += [before, Group(number), after]
    return [part for part in parts if part]


def told_by_angles(angles: Angles, num_angles: float, num_groups: int, num_sound: int = 0) -> list[Part]:
    """Return groups with the sound between them: a group comes before all sound that is not earlier.

    Args:
        angles: [axes, positions] of all groups, relative to the video's first; the first axis is time, which is the
            same within a group, and grows.
        num_angles: from the video's first position to the text after it, if it ends with a group.
        num_sound: positions of the sound; each takes one unit of time.
    """
    size = angles.shape[1] // num_groups
    # Where each part begins, and its content: a group's number, or positions of the sound.
    order: list[tuple[float, int | range]] = []
    heard = 0
    for number in range(num_groups):
        begin = float(angles[0, number * size])
        stop = min(num_sound, math.ceil(begin))
        if stop > heard:
            order.append((float(heard), range(heard, stop)))
            heard = stop
        order.append((begin, number))
    if heard < num_sound:
        order.append((float(heard), range(heard, num_sound)))
        num_angles = float(num_sound)
    parts: list[Part] = []
    for (begin, part), (end, _) in zip(order, [*order[1:], (num_angles, 0)], strict=True):
        if isinstance(part, int):
            # In float64, so that adding the span's position loses no precision.
            own = angles[:, part * size : (part + 1) * size].astype(np.float64) - begin
            parts.append(Group(part, own, end - begin))
        else:
            own = np.arange(part.start, part.stop, dtype=np.float64)[None] - begin
            parts.append(Sound(part.start, part.stop, own, end - begin))
    return parts
