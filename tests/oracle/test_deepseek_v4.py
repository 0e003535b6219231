"""DeepSeek-V4's numpy model against transformers, with and without its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.numpy_deepseek_v4 import DeepseekV4
from tests.models.tiny_deepseek_v4 import deepseek_v4, write_deepseek_v4

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 150),
        ({"num_hidden_layers": 2, "compress_ratios": [0, 0], "num_hash_layers": 2}, 23),
        ({"num_hidden_layers": 3, "compress_ratios": [128, 4, 4], "num_hash_layers": 0, "hc_mult": 3, "index_topk": 500,
          "swiglu_limit": 0.5, "routed_scaling_factor": 2.5, "hc_sinkhorn_iters": 3}, 280),
    ],
    ids=["all kinds", "windows", "pools"],
)  # fmt: skip
def test_the_numpy_model_is_transformers(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    config = deepseek_v4(**changes)
    for seed in range(20):
        tensors = write_deepseek_v4(tmp_path, config, seed)
        tokens = np.random.default_rng(seed).integers(2, config["vocab_size"], length).tolist()
        ours = DeepseekV4(config, {name: one.astype(np.float64) for name, one in tensors.items()})
        expected = ours.logits(tokens)
        if ours.margin > 1e-5:  # else float32 may choose otherwise
            break
    else:
        pytest.fail("no seed has clear choices")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())
