"""The eye that the recipe trains is the vision tower of Qwen3-VL, in `transformers` and in Argosy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from argosy import _native  # noqa: E402
from argosy.model.encoders import qwen_vision  # noqa: E402
from argosy.model.reading.config_reader import ConfigReader  # noqa: E402
from tests.model.encoders.open_tower import dense_weights, finish  # noqa: E402
from tests.models.references import difference  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

OUT_SIZE = 40
LARGEST_DIFFERENCE = 2e-5


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "recipes" / "demo_model")])


@pytest.fixture
def recipe(recipes: None) -> Any:
    import tower

    return tower


def random_tower(recipe: Any) -> Any:
    """Its values are those of bfloat16, in which Argosy keeps its matrices."""
    torch.manual_seed(3)
    tower = recipe.Tower(OUT_SIZE).eval()
    with torch.no_grad():
        for value in tower.parameters():
            value.copy_((value + 0.05 * torch.randn_like(value)).bfloat16())
    return tower


def test_the_tower_of_the_recipe_equals_that_of_transformers_and_of_argosy(recipe: Any) -> None:
    tower = random_tower(recipe)
    pixels = torch.randint(0, 256, (2, recipe.SIDE, recipe.SIDE, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = tower(pixels)[0].numpy()
    config = recipe.vision_config(OUT_SIZE)
    theirs = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel(
        transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(**config)
    ).eval()
    state = tower.whole_state()
    theirs.load_state_dict(state)
    own = qwen_vision.read_config(ConfigReader(config, "qwen3_vl"))
    weights = {f"visual.{name}": value.numpy() for name, value in state.items()}
    argosy = qwen_vision.QwenVisionTower(
        own, dense_weights(qwen_vision.tensors(own), "visual.", weights), _native.Runtime(1), is_exact=True
    )
    grid = (1, recipe.GRID, recipe.GRID)
    for picture, rows in zip(pixels, expected, strict=True):
        values = recipe.patches(picture[None])[0].view(-1, 3, 1, recipe.PATCH**2)
        frames = values.expand(-1, -1, 2, -1).flatten(1).contiguous()
        with torch.no_grad():
            found = theirs(frames, grid_thw=torch.tensor([grid])).pooler_output
        assert difference(found.numpy(), rows) <= LARGEST_DIFFERENCE
        ours = finish(argosy.encode(frames.numpy(), grid))
        assert difference(ours.embeddings, rows) <= LARGEST_DIFFERENCE


def test_every_cell_of_a_bar_names_its_label_and_empty_ground_the_number_of_bars(recipes: None) -> None:
    import pictures
    import train_eyes

    label, rank = "tea", "largest"
    words = {"word": label, "rank": rank}
    bar = pictures.Mark((50, 60, 70, 172), {"kind": "bar"} | words)  # column 2, rows 2 to 6 and a sliver of 7
    text = pictures.Mark(
        (36, 175, 84, 189), {"kind": "word"} | words, label, (53, 66, 80)
    )  # row 7, columns 1 to 3
    picture = pictures.Picture(np.zeros((192, 192, 3), np.uint8), [bar, text], [], total="three")
    found = train_eyes.cell_targets(picture).reshape(8, 8, -1)

    def words_of(row: int, column: int) -> dict[str, str]:
        numbers = zip(pictures.PROPERTIES.items(), found[row, column], strict=True)
        return {name: known[at] for (name, known), at in numbers if at != train_eyes.NOWHERE}

    assert all(words_of(row, 2) == {"kind": "bar"} | words for row in range(2, 7))
    assert all(words_of(7, column) == {"kind": "word"} | words for column in (1, 2, 3))
    assert words_of(0, 0) == {"kind": "nothing", "total": "three"}
