"""Windows of pictures equal those of Step-3.7's processor in transformers (`make_references.py windows`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from argosy.errors import ArgosyError, UsageError
from argosy.media.pictures import read_picture_processor
from argosy.media.windows import StepFit, WindowProcessor
from tests.media.samples import WINDOW_SETTINGS, WINDOWED_SIZES, WINDOWS, pattern, summary

KEPT = np.load(WINDOWS)
RELEASED = StepFit(728, 504, 3024)


def processor_of(most_tokens: int | None = None, **changes: Any) -> WindowProcessor:
    found = read_picture_processor(WINDOW_SETTINGS | changes, most_tokens=most_tokens)
    assert isinstance(found, WindowProcessor)
    return found


@pytest.mark.parametrize("size", WINDOWED_SIZES, ids="{0[0]}x{0[1]}".format)
def test_a_picture_gives_the_windows_of_the_reference_processor(size: tuple[int, int]) -> None:
    processor = processor_of()
    num_patches, *values = KEPT["{}x{}".format(*size)]
    patches, grid = processor.prepare(pattern(*size))
    plan = processor.fit.plan(*size)
    height, width = 12, 12 + 8 * plan.columns
    if plan.rows > 1:
        height, width = 12 + 8 * plan.rows, max(12, 8 * plan.columns)
    assert grid == processor.grid(*size) == (1, height, width)
    assert len(patches) == num_patches == 144 + 64 * plan.rows * plan.columns
    if size != (31, 900):  # shrunk before it becomes a square
        assert abs(summary(patches) - values).max() < 1e-6
    assert processor.num_tokens(*size) == 11 + 6 * plan.rows * plan.columns + max(0, plan.rows - 1)


def test_the_windows_of_many_sizes_are_those_of_the_reference() -> None:
    for height, width, *expected in KEPT["chosen"].tolist():
        plan = RELEASED.plan(height, width)
        found = [*plan.whole, *plan.cut, plan.side, plan.rows, plan.columns, bool(plan.square)]
        # A square that is scaled to the limit may lose a pixel; here it has that size.
        start = 2 if plan.square == RELEASED.longest else 0
        assert found[start:] == expected[start:], (height, width)


def test_a_narrow_picture_becomes_a_square_that_is_no_longer_than_others() -> None:
    assert processor_of().fit.plan(1, 60_000).square == 672
    canvas = processor_of().resize(np.full((1, 60_000, 3), 255, np.uint8))
    assert canvas.shape == (168 + 6 * 112, 6 * 112, 3)
    assert canvas[0].any()
    assert not canvas[3:112].any()


@pytest.mark.parametrize("size", [(3000, 3000), (32, 3000), (3000, 40), (33, 60_000), (1, 1), (700, 1500)])
@pytest.mark.parametrize("most_tokens", [171, 254, 400, 1024, 4096])
def test_a_cap_on_tokens_is_kept(size: tuple[int, int], most_tokens: int) -> None:
    found = read_picture_processor({"image_processor_type": "Step3p7ImageProcessor"}, most_tokens=most_tokens)
    assert found.num_tokens(*size) <= most_tokens
    assert found._num_tokens(*found.largest_grid()[1:]) <= most_tokens
    canvas = found.fit.size(*size)
    assert 3 * canvas.height * canvas.width <= 1 << 26  # as much as may wait


def test_a_cap_lowers_the_windows_and_no_more_than_it_must() -> None:
    def tokens(most: int) -> int:
        return processor_of(most).num_tokens(400, 400)

    assert tokens(96) == tokens(75) == 11 + 6 * 9 + 2
    assert tokens(45) == 11 + 6 * 4 + 1
    assert tokens(16) == 11
    with pytest.raises(UsageError, match="must be at least 171 for this model, found 170"):
        read_picture_processor({"image_processor_type": "Step3p7ImageProcessor"}, most_tokens=170)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample": 3}, "resample 3"),
        ({"do_resize": False}, "do_resize false"),
        ({"patch_size": 100}, "tiles have 100 pixels on a side; supported: a multiple of 56"),
        ({"size": {"height": 170, "width": 170}}, "tiles have 170 pixels on a side"),
        ({"size": {"height": 168, "width": 112}}, "width 112"),
        ({"size": {"height": 224, "width": 224}}, "windows have 112 pixels on a side, and the view 224"),
        ({"do_pad": True}, "do_pad true"),
        ({"windows": 3}, "sets 'windows' to 3"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgosyError, match=words):
        processor_of(**changes)
