"""Pictures of Step-3.7 through a whole engine: windows, the tokens around them, and files that disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import CheckpointError
from argosy.media.parts import Image, RequestMedia
from argosy.media.patches import PictureProcessor
from argosy.prompt.media_span import MediaSpan
from tests.engine.test_seeing import opened
from tests.models.seeing import REFERENCE, WRITTEN

HUB = REFERENCE / "step3p7"
START, END, WINDOW, WINDOW_END, AFTER_ROW = WRITTEN["step3p7"].values()
VIEW = [START, *[50] * 9, END]


def copied(tmp_path: Path) -> Path:
    shutil.copytree(HUB, tmp_path / "model", ignore=shutil.ignore_patterns("gguf"))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((1, 1), 0, 0),
        ((24, 24), 0, 0),
        ((20, 10), 2, 1),
        ((1, 16_000), 3, 3),
        ((10_000, 1), 3, 3),
        ((32, 16_000), 0, 0),  # as many windows as it is long are more than the cap
        ((4000, 5000), 2, 3),
    ],
)
def test_a_span_has_windows_row_by_row_and_then_the_view(
    size: tuple[int, int], rows: int, columns: int
) -> None:
    with opened(HUB, image_tokens=96) as engine:
        assert isinstance(engine.media, PromptMedia)
        picture = engine.media.read(Image(np.zeros((*size, 3), np.uint8)))
        (span,) = engine.media.segments(picture, "", RequestMedia())
        assert isinstance(span, MediaSpan)
        row = [WINDOW, *[50] * 4, WINDOW_END] * columns
        assert span.token_ids == [*([*row, AFTER_ROW] * rows)[:-1], *VIEW]


def test_a_checkpoint_without_settings_of_a_processor_has_those_of_the_tower(tmp_path: Path) -> None:
    directory = copied(tmp_path)
    (directory / "preprocessor_config.json").unlink()
    with opened(directory) as engine:
        assert isinstance(engine.media, PromptMedia)
        processor = engine.media._processors["picture"]
        assert isinstance(processor, PictureProcessor)
        assert "side=24, window=16, longest=3024" in str(processor.fit)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 24}, "has size of windows 24, and the encoder of pictures takes 16"),
        ({"size": {"height": 16, "width": 16}}, "has size 16, and the encoder of pictures takes 24"),
        ({"vision_patch_size": 1}, "has patch_size 1, and the encoder of pictures takes 2"),
    ],
)
def test_a_processor_of_another_tower_is_refused_and_text_runs(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = copied(tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with opened(path.parent) as engine:
        assert engine.media.kinds == ()
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(CheckpointError, match=words):
            engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))
