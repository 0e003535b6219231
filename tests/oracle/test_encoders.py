"""Towers against transformers, with sizes, values and grids of other seeds than the committed references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from argosy import _native
from argosy.model.encoders import gemma_vision, glm_vision, omni_audio, qwen_vision
from argosy.model.reading.config_reader import ConfigReader
from tests.model.encoders.open_tower import PARTS, dense_weights, finish
from tests.models.make_encoders import make
from tests.models.references import difference
from tests.models.safetensors_file import read_safetensors
from tests.models.tiny_encoders import CONFIGS, random_sizes

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

LARGEST_DIFFERENCE = 2e-5

CASES = [(name, seed) for name in PARTS for seed in range(1, 7)]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_rows_and_angles_equal_those_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    part, sizes = PARTS[name], random_sizes(seed)
    expected = make(tmp_path, part, sizes, seed)
    config = part.read(CONFIGS[part.family](sizes))
    weights = dense_weights(
        part.tensors(config), part.prefix, read_safetensors(tmp_path / "model.safetensors")
    )
    tower = part.tower(config, weights, _native.Runtime(1), is_exact=True)
    for case, shape in enumerate(part.shapes(config)):
        rows = finish(part.encode(tower, expected[f"{case}.input"], shape))
        assert difference(rows.embeddings, expected[f"{case}.embeddings"]) <= LARGEST_DIFFERENCE
        for layer, addition in rows.additions.items():
            assert difference(addition, expected[f"{case}.additions.{layer}"]) <= LARGEST_DIFFERENCE
        if part.angles is not None:
            angles, num_angles = part.angles(config, shape)
            assert (angles == expected[f"{case}.angles"]).all()
            assert num_angles == expected[f"{case}.num_angles"][0]


READERS: dict[str, tuple[str, Callable[[ConfigReader], Any]]] = {
    "qwen3_vl_moe": ("vision_config", qwen_vision.read_config),
    "qwen3_5_moe": ("vision_config", lambda reader: qwen_vision.read_config(reader, has_deepstack=False)),
    "qwen3_omni_moe_thinker": ("vision_config", qwen_vision.read_config),
    "qwen3_omni_moe_audio": ("audio_config", omni_audio.read_config),
    "glm4v_moe": ("vision_config", glm_vision.read_config),
    "gemma4": ("vision_config", lambda reader: gemma_vision.read_config(reader, hidden_size=16)),
}


@pytest.mark.parametrize("family", READERS)
def test_absent_keys_have_the_defaults_of_transformers(family: str) -> None:
    key, read = READERS[family]
    whole = transformers.CONFIG_MAPPING[family.replace("moe_audio", "moe_thinker")]
    written = whole.sub_configs[key]().to_dict()
    assert read(ConfigReader(written, family)) == read(ConfigReader({}, family))
