"""DeepSeek-V4.1's numpy model against mlx-lm's class, which has no n-gram tables.

mlx-lm rounds keys and values as the makers' kernels do, where their dimensions are multiples of 16: not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.numpy_deepseek_v41 import DeepseekV41
from tests.models.tiny_deepseek_v41 import random_tensors, text_config

mx = pytest.importorskip("mlx.core")
deepseek_v41 = pytest.importorskip("mlx_lm.models.deepseek_v41")

WITHOUT_TABLES: dict[str, Any] = {"engram_layer_ids": []}


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 41),
        ({"compress_ratios": [0] * 6, "kv_source_layer_ids": [], "index_source_layer_ids": []}, 23),
        ({"candidate_source_layer_id": -1, "index_topk": 3, "sliding_window": 3}, 30),
        ({"compress_ratios": [0, 4, 4, 4, 1, 1], "kv_source_layer_ids": [1, 4], "candidate_source_layer_id": 4,
          "index_source_layer_ids": [1, 3, 4, 5], "norm_topk_prob": False, "swiglu_limit": 0.5, "hc_mult": 3}, 50),
    ],
    ids=["sources", "windows", "no candidates", "ratio 4"],
)  # fmt: skip
def test_the_numpy_model_is_mlx_lms(changes: dict[str, Any], length: int) -> None:
    config = text_config(**WITHOUT_TABLES | changes)
    for seed in range(20):
        tensors = random_tensors(config, {}, seed)
        tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], length).tolist()
        ours = DeepseekV41(config, {name: one.astype(np.float64) for name, one in tensors.items()})
        expected = ours.logits(tokens)
        if ours.margin > 1e-5:  # else float32 may choose otherwise
            break
    else:
        pytest.fail("no seed has clear choices")
    model = deepseek_v41.Model(deepseek_v41.ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize({name: mx.array(one) for name, one in tensors.items()}).items()))
    found = np.array(model(mx.array([tokens])))[0]
    np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())
