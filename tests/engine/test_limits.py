"""Limits of the activations of some layers: routed experts, the shared expert, the dense network, each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import Array
from tests.models.tiny import prompt_ids, write_model
from tests.models.tiny_kda import bailing_hybrid

LIMITS = {  # layer 0 is dense
    "routed": {"expert_swiglu_limit_list": [0.0, 0.0, None, 0.05]},
    "shared": {"share_expert_swiglu_limit_list": [0, 0.04, 0, 0.06]},
    "dense": {"share_expert_swiglu_limit_list": [0.03, 0, 0, 0]},
    "all": {
        "expert_swiglu_limit_list": [0.01, 0.05, 0.03, 0.0, 0.5],  # that of a drafting layer is last
        "share_expert_swiglu_limit_list": [0.03, 0, 0.06, 0.02, 0.5],
        "num_nextn_predict_layers": 1,
    },
}


def logits_of(
    model: Path, ids: list[int], *, chunk_tokens: int = 256, expert_slots: int | None = None
) -> Array:
    with Engine.open(
        model, memory="4GiB", kv_dtype="f32", threads=2, chunk_tokens=chunk_tokens, expert_slots=expert_slots
    ) as engine:
        return engine.logits(ids)


@pytest.mark.parametrize("name", LIMITS)
def test_limits_apply_in_their_layers_and_networks(name: str, tmp_path: Path) -> None:
    config = bailing_hybrid(**LIMITS[name])
    ids = prompt_ids(config, 3)
    model = write_model(tmp_path / "limited", config, seed=3, dtype="F32")
    expected, found = NumpyModel(model).logits(ids), logits_of(model, ids)
    assert difference(found, expected) <= LARGEST_DIFFERENCE
    without = NumpyModel(write_model(tmp_path / "plain", bailing_hybrid(), seed=3, dtype="F32")).logits(ids)
    assert difference(without, expected) > 30 * LARGEST_DIFFERENCE

    assert np.array_equal(logits_of(model, ids, chunk_tokens=3, expert_slots=2), found)
    pack(open_model(model), tmp_path / "packed", format="source")
    assert np.array_equal(logits_of(tmp_path / "packed", ids), found)
