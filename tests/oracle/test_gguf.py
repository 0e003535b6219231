"""GGUF files against transformers in float32 on dequantised weights.

The `gguf` package dequantises; the types that it cannot read are decoded by `tests/native/gguf_blocks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from argosy import Engine, SamplingParams
from tests.models.gguf_models import BLOCK_TYPES, TypeOf, mixed, one_type, write_gguf_model
from tests.models.make_models import load
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.tiny import (
    RawConfig,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    prompt_ids,
    qwen2_moe,
    qwen3_moe,
)

pytestmark = pytest.mark.filterwarnings("default")

# Mean KL in nats; 8-bit activations cost about 0.0003.
LARGEST_DIVERGENCE = 0.002

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 4,
}
# Every expert is chosen, as a rounded router score that changed a choice would hide what rounding itself costs.
CONFIGS = [
    mixtral(**SIZES, intermediate_size=512, num_local_experts=4),
    qwen2_moe(**SIZES, moe_intermediate_size=256, shared_expert_intermediate_size=768, num_experts=4),
    qwen3_moe(**SIZES, moe_intermediate_size=256, num_experts=4),
    # llama.cpp's conversion has no key for yarn bounds that are not whole numbers.
    gpt_oss(**SIZES, intermediate_size=256, num_local_experts=4),
    glm4_moe(**SIZES, moe_intermediate_size=256, intermediate_size=512, n_routed_experts=4, use_qk_norm=True),
    olmoe(
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        intermediate_size=256,
        num_experts=4,
    ),
    minimax_m2(**SIZES, intermediate_size=256, rotary_dim=32, num_local_experts=4),
]
KINDS = {"F32": one_type("F32"), "Q8_0": one_type("Q8_0"), "Q4_0": one_type("Q4_0"), "mixed": mixed}
# Every family in some types, and every other type in one family.
CASES = {
    **{f"{config['model_type']}-{kind}": (config, KINDS[kind]) for config in CONFIGS for kind in KINDS},
    **{f"qwen3_moe-{kind}": (CONFIGS[2], one_type(kind)) for kind in BLOCK_TYPES if kind not in KINDS},
}


@pytest.mark.parametrize(("config", "type_of"), CASES.values(), ids=CASES)
def test_logits_equal_transformers_on_the_dequantised_weights(
    config: RawConfig, type_of: TypeOf, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    directory = write_gguf_model(path, config, type_of, seed=30_000)
    prompt = prompt_ids(config, 30_000, 64)
    with torch.no_grad():
        expected = load(directory)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(path, memory="8GiB", kv_dtype="f32", threads=2) as engine:
        logits = engine.logits(prompt)
        result = engine.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        again = engine.logits(prompt + result.token_ids)

    if type_of is KINDS["F32"]:
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    assert mean_divergence(expected, logits) <= LARGEST_DIVERGENCE
    assert result.token_ids == again[len(prompt) - 1 : -1].argmax(axis=1).tolist()
