"""Embeddings of fresh checkpoints against transformers: hidden states after the last norm, mean and last token."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from argosy import Engine
from argosy.config import Pooling
from tests.models.make_embeddings import embeddings
from tests.models.make_models import load
from tests.models.references import EMBEDDED, EMBEDDINGS, REFERENCES, Reference, difference
from tests.models.runnable import runnable
from tests.models.safetensors_file import read_safetensors
from tests.models.tiny import RawConfig, glm4_moe, mixtral, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_dense import gemma3_text, qwen3
from tests.models.tiny_gemma import gemma4
from tests.models.tiny_latent import deepseek_v3

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

LARGEST_DIFFERENCE = 3e-4
CONFIGS: dict[str, RawConfig] = {
    "mixtral": mixtral(hidden_size=48),
    "qwen3_moe": qwen3_moe(hidden_size=52, num_experts=10),
    "glm4_moe": glm4_moe(num_hidden_layers=2),
    "deepseek_v3": deepseek_v3(),
    "gemma4": gemma4(),
    "qwen3_next": qwen3_next(),
    "qwen3": qwen3(hidden_size=36, head_dim=14),
    "gemma3_text": gemma3_text(head_dim=10, num_key_value_heads=3),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [1, 29])
def test_embeddings_equal_those_of_transformers(family: str, length: int, tmp_path: Path) -> None:
    config = CONFIGS[family]
    directory = write_model(tmp_path / "model", config, seed=41)
    token_ids = prompt_ids(config, 42, length)
    expected = embeddings(load(directory), token_ids)
    with Engine.open(
        runnable(directory, tmp_path), memory="2GiB", threads=2, context=64, chunk_tokens=8
    ) as engine:
        for pooling in get_args(Pooling):
            (found,) = engine.embed([token_ids], pooling=pooling)
            assert difference(found, expected[pooling]) < LARGEST_DIFFERENCE


@pytest.mark.parametrize("reference", [r for r in REFERENCES if r.name in EMBEDDED], ids=lambda r: r.name)
def test_the_committed_embeddings_are_those_of_transformers(reference: Reference) -> None:
    committed = read_safetensors(EMBEDDINGS)
    for pooling, vector in embeddings(load(reference.directory), reference.input_ids).items():
        np.testing.assert_allclose(committed[f"{reference.name}.{pooling}"], vector, atol=1e-6)
