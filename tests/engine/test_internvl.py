"""InternVL3.5 as OpenGVLab publishes it: other names, a config that says how pictures are cut, and tiles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.media.parts import Image, RequestMedia
from argosy.media.patches import PictureProcessor
from argosy.media.tiles import InternVLFit
from argosy.model.families import FAMILIES, open_model
from argosy.prompt.media_span import MediaSpan
from tests.engine.test_seeing import opened
from tests.families.published import PUBLISHED, qwen3_moe
from tests.models.renamed import write_internvl_chat
from tests.models.seeing import REFERENCE, WRITTEN

HUB = REFERENCE / "internvl"
IMG, IMG_END = WRITTEN["internvl"].values()


@pytest.mark.parametrize(
    ("changes", "fit"),
    [
        ({}, InternVLFit(24, 1, 4, True)),
        ({"use_thumbnail": False, "min_dynamic_patch": 2}, InternVLFit(24, 2, 4, False)),
        ({"dynamic_image_size": False}, InternVLFit(24, 1, 1, True)),
    ],
)
def test_opengvlabs_config_says_how_a_picture_is_cut(
    changes: dict[str, Any], fit: InternVLFit, tmp_path: Path
) -> None:
    with opened(write_internvl_chat(tmp_path, **changes)) as engine:
        assert isinstance(engine.media, PromptMedia)
        processor = engine.media._processors["picture"]
        assert isinstance(processor, PictureProcessor)
        assert processor.fit == fit
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose(processor.levels[:, 255], (1 - mean) / std, rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("select_layer", -4),
        ("ps_version", "v1"),
        ("pad2square", True),
        ("use_backbone_lora", 8),
        ("force_image_size", 448),
        ("downsample_ratio", 0.3),
        ("min_dynamic_patch", 5),
    ],
)
def test_another_tower_in_opengvlabs_config_is_refused_and_text_runs(
    key: str, value: Any, tmp_path: Path
) -> None:
    with opened(write_internvl_chat(tmp_path, **{key: value})) as engine:
        assert engine.media.kinds == ()
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(UnsupportedModel, match=f"asks for {key}"):
            engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))


def test_a_tokenizer_without_the_placeholder_is_named(tmp_path: Path) -> None:
    path = write_internvl_chat(tmp_path) / "tokenizer_config.json"
    for added in ({"50": {"content": "<other>"}, "x": 3}, None):
        path.write_text(json.dumps({"added_tokens_decoder": added}))
        with opened(tmp_path) as engine:
            assert isinstance(engine.media, PromptMedia)
            with pytest.raises(CheckpointError, match="has no token <IMG_CONTEXT> in added_tokens_decoder"):
                engine.media.read(Image(np.zeros((8, 8, 3), np.uint8)))


RELEASED = {
    one.config["model_type"]: one.config for one in PUBLISHED if one.name.startswith("InternVL3.5-30B")
}


@pytest.mark.parametrize("family", RELEASED)
def test_the_released_text_is_qwen3_30b(family: str) -> None:
    config = FAMILIES[family].parse_config(RELEASED[family])
    assert replace(config, family="qwen3_moe") == FAMILIES["qwen3_moe"].parse_config(qwen3_moe())
    with pytest.raises(UnsupportedModel, match="sets text_scale"):
        FAMILIES[family].parse_config({"text_scale": 2.0} | RELEASED[family])


def test_a_dense_text_model_in_the_same_wrapper_is_refused(tmp_path: Path) -> None:
    write_internvl_chat(tmp_path, llm_config={"model_type": "qwen2"})
    with pytest.raises(
        UnsupportedModel, match="text_config asks for model_type 'qwen2'; supported: qwen3_moe"
    ):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("size", "tiles"), [((1, 1), 1), ((1, 5000), 5), ((5000, 1), 5), ((3000, 4000), 5), ((24, 24), 1)]
)
def test_a_span_has_the_positions_of_all_tiles_between_two_tokens(size: tuple[int, int], tiles: int) -> None:
    with opened(HUB) as engine:
        assert isinstance(engine.media, PromptMedia)
        picture = engine.media.read(Image(np.zeros((*size, 3), np.uint8)))
        (span,) = engine.media.segments(picture, "", RequestMedia())
        assert isinstance(span, MediaSpan)
        assert span.token_ids == [IMG, *[50] * 9 * tiles, IMG_END]
