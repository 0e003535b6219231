"""The adapters that tests make fit their models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argosy.adapters.files import PairFormat
from argosy.adapters.targets import target_shapes
from argosy.model.families import open_model
from tests.adapters.random_adapter import delta, expert_deltas, random_adapter
from tests.models.tiny import qwen3_moe, write_model
from tests.models.tiny_latent import deepseek_v3


@pytest.mark.parametrize("make", [qwen3_moe, deepseek_v3])
@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_a_random_adapter_fits_its_model(tmp_path: Path, make: type, format: PairFormat) -> None:
    write_model(tmp_path, make(), seed=0)
    config = open_model(tmp_path).own_config
    files = random_adapter(config, seed=1, rank=2, format=format)

    shapes = target_shapes(config)
    assert set(files.dense) | {"embed"} == set(shapes)
    for name, pairs in files.dense.items():
        assert delta(pairs, shapes[name][0]).shape == shapes[name]
    gate, _, down = expert_deltas(files, config.moe_layers[0], 1)
    assert gate is not None
    assert down is not None
    assert gate.shape == down.T.shape == (config.expert_width_in(config.moe_layers[0]), config.hidden_size)
    assert np.abs(gate).max() > 0.1


def test_a_random_adapter_has_only_its_targets(tmp_path: Path) -> None:
    write_model(tmp_path, qwen3_moe(), seed=0)
    config = open_model(tmp_path).own_config
    files = random_adapter(config, seed=1, targets={"q", "router"}, replaced={"layers.1.router", "head"})

    assert {name.rpartition(".")[2] for name in files.dense} == {"q", "router"}
    assert "layers.1.router" not in files.dense
    assert set(files.replaced) == {"layers.1.router", "head"}
    assert (files.experts, files.embedding) == ({}, None)
