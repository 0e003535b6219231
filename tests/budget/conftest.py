"""The models whose idle memory is lent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.seeing import with_towers, write
from tests.models.tiny import qwen3_moe, write_model
from tests.models.tiny_wrappers import qwen3_vl_moe

CONTEXT = 65536


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 96 experts of 0.75 MiB each, and a context of 48 MiB."""
    directory = tmp_path_factory.mktemp("idle") / "model"
    raw = qwen3_moe(
        num_experts=32, moe_intermediate_size=4096, max_position_embeddings=CONTEXT, head_dim=16,
    )  # fmt: skip
    write_model(directory, raw, seed=5)
    return directory


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 48 experts of 1.5 MiB each, and a tower for pictures."""
    directory = tmp_path_factory.mktemp("lending") / "model"
    raw = with_towers("qwen3_vl_moe", qwen3_vl_moe(num_experts=16, moe_intermediate_size=8192))
    write(directory, "qwen3_vl_moe", raw, seed=11)
    return directory
