"""Pictures of Mistral-Small-4 and Large-3: Mistral's own files, tokens between rows, and pictures of hostile sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.engine.media.prompt_media import PromptMedia, open_media
from argosy.errors import UnsupportedModel
from argosy.media.parts import Image, RequestMedia
from argosy.media.patches import PictureProcessor
from argosy.media.pictures import PixtralFit
from argosy.model.encoders.pixtral_vision import _HUB, _OWN
from argosy.prompt.media_span import MediaSpan
from tests.engine.test_mmproj import LARGEST_DIFFERENCE, log_probabilities
from tests.engine.test_seeing import opened
from tests.families.test_mistral_layouts import in_own_names, params_of
from tests.models.references import difference
from tests.models.safetensors_file import read_safetensors, write_safetensors
from tests.models.seeing import REFERENCE, WRITTEN

HUB = REFERENCE / "mistral3"
BREAK, END = WRITTEN["mistral3"].values()


def write_own_files(directory: Path) -> Path:
    """The reference in Mistral's layout: its names, and the pairs of queries and keys of the tower adjacent."""
    raw = json.loads((HUB / "config.json").read_text())
    vision = raw["vision_config"]
    num_heads = vision["num_attention_heads"]
    text, tower = {}, {}
    for name, value in read_safetensors(HUB / "model.safetensors").items():
        if "language_model" in name or name.startswith("lm_head"):
            text[
                name.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
            ] = value
            continue
        own_name = name
        for key, theirs in _HUB.items():
            own_name = own_name.replace(theirs, _OWN[key])
        is_rotated = re.search(r"attention\.[qk]_proj", name)
        halves = value.reshape(num_heads, 2, -1, *value.shape[1:]) if is_rotated else value
        tower[own_name] = halves.swapaxes(1, 2).reshape(value.shape) if is_rotated else value
    tensors = in_own_names(text) | tower
    write_safetensors(
        directory / "consolidated.safetensors", {name: ("BF16", value) for name, value in tensors.items()}
    )
    kept = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_channels",
            "num_hidden_layers", "patch_size")  # fmt: skip
    own = {key: vision[key] for key in kept} | {
        "adapter_bias": False, "add_pre_mm_projector_layer_norm": True, "image_break_token_id": BREAK,
        "image_end_token_id": END, "image_token_id": raw["image_token_index"], "max_image_size": 1540,
        "mm_projector_id": "patch_merge", "rope_theta": 10_000.0, "spatial_merge_size": raw["spatial_merge_size"],
    }  # fmt: skip
    params = params_of(raw["text_config"]) | {"vision_encoder": own}
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def test_mistrals_own_files_see_as_those_of_the_hub(tmp_path: Path) -> None:
    reference = read_safetensors(HUB / "ref.safetensors")
    # The reference's processor replaces the implied one of Mistral's files.
    expected, answer = log_probabilities(HUB, "mistral3", reference)
    found, found_answer = log_probabilities(write_own_files(tmp_path), "mistral3", reference)
    assert found.keys() == expected.keys()
    values = np.array([[found[one], expected[one]] for one in found])
    assert difference(values[:, 0], values[:, 1]) <= LARGEST_DIFFERENCE
    assert found_answer == answer


def test_mistrals_own_files_say_how_a_picture_is_prepared(tmp_path: Path) -> None:
    with opened(write_own_files(tmp_path)) as engine:
        assert isinstance(engine.media, PromptMedia)
        processor = engine.media._processors["picture"]
        assert isinstance(processor, PictureProcessor)
        assert processor.fit == PixtralFit(8, 1540, 96)
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
    path = write_own_files(tmp_path) / "params.json"
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
