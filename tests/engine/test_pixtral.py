"""Pictures of Mistral-Small-4 and Large-3: Mistral's own files, tokens between rows, and pictures of hostile sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.engine.media.prompt_media import PromptMedia, open_media
from argosy.errors import UnsupportedModel
from argosy.media.parts import Image, RequestMedia
from argosy.media.patches import PictureProcessor
from argosy.media.pictures import PixtralFit
from argosy.prompt.media_span import MediaSpan
from tests.engine.test_seeing import opened
from tests.models.renamed import write_mistral4
from tests.models.seeing import IMAGE_TOKENS, REFERENCE, WRITTEN

HUB = REFERENCE / "mistral3"
BREAK, END = WRITTEN["mistral3"].values()


def test_mistrals_own_files_say_how_a_picture_is_prepared(tmp_path: Path) -> None:
    with opened(write_mistral4(tmp_path)) as engine:
        assert isinstance(engine.media, PromptMedia)
        processor = engine.media._processors["picture"]
        assert isinstance(processor, PictureProcessor)
        assert processor.fit == PixtralFit(8, 1540, IMAGE_TOKENS)
        assert (processor.patch_size, processor.merge_size) == (4, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_id", ""),
        ("add_pre_mm_projector_layer_norm", False),
        ("num_channels", 4),
        ("use_rope", False),
        ("hidden_act", "relu"),
    ],
)
def test_another_tower_in_mistrals_own_files_is_refused_and_text_runs(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = write_mistral4(tmp_path) / "params.json"
    raw = json.loads(path.read_text())
    raw["vision_encoder"][key] = value
    path.write_text(json.dumps(raw))
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ()
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(UnsupportedModel, match=rf"(asks for|sets) {key}"):
            engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((1, 1), 1, 1), ((1, 5000), 1, 5), ((5000, 1), 5, 1), ((3000, 4000), 4, 5), ((40, 40), 5, 5)],
)
def test_a_span_has_a_token_after_each_row(size: tuple[int, int], rows: int, columns: int) -> None:
    with opened(HUB) as engine:
        assert isinstance(engine.media, PromptMedia)
        (span,) = engine.media.segments(
            engine.media.read(Image(np.zeros((*size, 3), np.uint8))), "", RequestMedia()
        )
        assert isinstance(span, MediaSpan)
        row = [10] * columns
        assert span.token_ids == [*[*row, BREAK] * (rows - 1), *row, END]


def test_a_tokenizer_without_the_tokens_between_rows_is_named() -> None:
    class Tokenizer:
        def control_id(self, text: str) -> int | None:
            return None if text == "[IMG_END]" else 3

    with opened(HUB) as engine:
        media: Any = engine.media
        processors = {"picture": media._processors["picture"]}
        made = open_media(
            media._encoders,
            processors,
            media._decoder,
            None,
            Tokenizer(),
            lambda clear: media.memory,
            None,  # type: ignore[arg-type]
        )
        assert made.kinds == ()
        with pytest.raises(
            UnsupportedModel, match=r"a picture is written with the token \[IMG_END\], and the model's"
        ):
            made.read(Image(np.zeros((8, 8, 3), np.uint8)))
