"""Models that also see or hear, against transformers: the defaults of absent keys in their text part.

`test_oracle.py` checks logits and greedy tokens of all configurations. There the whole model runs, with positions on
three axes; the configurations of each family split the pairs of a head into different sections.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from argosy import Engine
from tests.models.make_models import load
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, prompt_ids, text_of, write_model
from tests.models.tiny_wrappers import glm4v_moe, qwen3_omni_moe, qwen3_vl_moe

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]


# The numbers of heads and of dense layers are the defaults of num_key_value_heads and first_k_dense_replace.
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 16, "head_dim": 4}
CONFIGS: dict[str, RawConfig] = {
    "qwen3_vl_moe": qwen3_vl_moe(**SIZES, num_key_value_heads=16),
    "qwen3_omni_moe": qwen3_omni_moe(**SIZES, num_key_value_heads=4),
    "glm4v_moe": glm4v_moe(
        **SIZES, num_key_value_heads=8, rope_scaling={"mrope_section": [0, 1, 0], "rope_type": "default"}
    ),
}
QWEN_KEYS = (
    "head_dim", "rope_theta", "rope_scaling", "num_key_value_heads", "norm_topk_prob", "rms_norm_eps",
    "attention_bias", "mlp_only_layers", "decoder_sparse_step", "hidden_act",
)  # fmt: skip
GLM_KEYS = (
    "head_dim", "rope_theta", "partial_rotary_factor", "num_key_value_heads", "norm_topk_prob", "rms_norm_eps",
    "attention_bias", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor", "n_shared_experts",
    "use_qk_norm", "tie_word_embeddings",
)  # fmt: skip
CASES = [(family, key) for family in ("qwen3_vl_moe", "qwen3_omni_moe") for key in QWEN_KEYS]
CASES += [("glm4v_moe", key) for key in GLM_KEYS]


@pytest.mark.parametrize(("family", "missing"), CASES)
def test_an_absent_key_has_the_default_of_transformers(family: str, missing: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    write_model(tmp_path, config, seed=2)
    text = {key: value for key, value in text_of(config).items() if key != missing}
    changed = json.loads(json.dumps(config))
    (changed["thinker_config"] if family == "qwen3_omni_moe" else changed)["text_config"] = text
    (tmp_path / "config.json").write_text(json.dumps(changed))
    prompt = prompt_ids(config, 2, 8)
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(runnable(tmp_path, tmp_path), memory="8GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE
