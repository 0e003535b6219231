"""The model whose idle memory is lent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny import qwen3_moe, write_model

CONTEXT = 65536


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 96 experts of 0.75 MiB each, and a context of 48 MiB."""
    directory = tmp_path_factory.mktemp("idle") / "model"
    raw = qwen3_moe(
        num_experts=32, moe_intermediate_size=4096, max_position_embeddings=CONTEXT, head_dim=16,
    )  # fmt: skip
    write_model(directory, raw, seed=5)
    return directory
