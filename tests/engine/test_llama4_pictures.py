"""Pictures of Llama-4: the tokens around and between tiles, and names in GGUF files of two times."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.checkpoint.gguf import read_gguf
from argosy.engine.media.prompt_media import PromptMedia, open_media
from argosy.media.parts import Image, RequestMedia
from argosy.media.tiles import TileProcessor
from argosy.model.encoders.mmproj import TowerInFile, read_towers
from argosy.model.families import open_model
from argosy.prompt.media_span import MediaSpan
from tests.engine.test_seeing import opened
from tests.models.seeing import REFERENCE, WRITTEN

HUB = REFERENCE / "llama4"
PATCH = 51
START, END, BETWEEN, AFTER_ROW, WHOLE = WRITTEN["llama4"].values()
TILE = [PATCH] * 4  # 16 x 16 pixels, patches of 4 x 4, cells of 2 x 2


@pytest.mark.parametrize(
    ("size", "ids"),
    [
        ((9, 16), [START, WHOLE, *TILE, END]),
        ((16, 32), [START, *TILE, BETWEEN, *TILE, AFTER_ROW, WHOLE, *TILE, END]),
        ((32, 16), [START, *TILE, AFTER_ROW, *TILE, AFTER_ROW, WHOLE, *TILE, END]),
        ((32, 32), [START, *[*TILE, BETWEEN, *TILE, AFTER_ROW] * 2, WHOLE, *TILE, END]),
    ],
    ids=str,
)
def test_tokens_separate_tiles_as_the_reference_processor_writes_them(
    size: tuple[int, int], ids: list[int]
) -> None:
    with opened(HUB) as engine:
        assert isinstance(engine.media, PromptMedia)
        content = engine.media.read(Image(np.zeros((*size, 3), np.uint8)))
        assert engine.media.placeholder(content) == WHOLE  # which the chat template writes
        (span,) = engine.media.segments(content, "", RequestMedia())
        assert isinstance(span, MediaSpan)
        assert span.token_ids == ids


def test_the_sizes_of_patches_and_cells_are_the_tower_s(tmp_path: Path) -> None:
    """The released models' settings do not give them."""
    directory = tmp_path / "model"
    shutil.copytree(HUB, directory)
    path = directory / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    del raw["patch_size"], raw["merge_size"]
    path.write_text(json.dumps(raw))
    with opened(directory) as engine:
        assert isinstance(engine.media, PromptMedia)
        processor = engine.media._processors["picture"]
        assert isinstance(processor, TileProcessor)
        assert (processor.patch_size, processor.merge_size, processor.fit.side) == (4, 2, 16)


@pytest.mark.parametrize("missing", WRITTEN["llama4"])
def test_a_tokenizer_without_a_token_between_tiles_is_named(missing: str) -> None:
    class Tokenizer:
        def control_id(self, text: str) -> int | None:
            return None if text == missing else 3

    with opened(HUB) as engine:
        media: Any = engine.media
        processors = {"picture": media._processors["picture"]}
        made = open_media(
            media._encoders,
            processors,
            media._decoder,
            None,
            Tokenizer(),  # type: ignore[arg-type]
            lambda clear: media.memory,
            None,
        )
        assert made.kinds == ()
        assert f"the token {missing}, and" in str(made.faults["picture"])


def test_older_files_name_the_norm_before_the_network_differently() -> None:
    """Those of 2025, when the converter did not know Gemma-4's norm, whose name it writes now."""
    model = open_model(HUB / "gguf" / "model.gguf").config
    file = read_gguf(HUB / "gguf" / "mmproj-model.gguf")
    older = replace(
        file, tensors={name.replace("attn_post_norm", "ln2"): ref for name, ref in file.tensors.items()}
    )
    for one, part in ((file, "attn_post_norm"), (older, "ln2")):
        tower = read_towers(one, model)["picture"]
        assert isinstance(tower, TowerInFile)
        assert tower.names["layers.1.mlp_norm_bias"] == f"v.blk.1.{part}.bias"
        assert set(tower.names.values()) == one.tensors.keys()
