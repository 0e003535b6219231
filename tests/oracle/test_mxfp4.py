"""MXFP4 checkpoints of gpt-oss against transformers, which reads and dequantises them itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.models.make_models import load
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.tiny import gpt_oss, prompt_ids

pytestmark = pytest.mark.filterwarnings("default")

SIZES = {"hidden_size": 256, "head_dim": 32, "num_key_value_heads": 2, "num_attention_heads": 8}
# Every expert is chosen, as a rounded router score that changed a choice would hide what rounding itself costs.
CONFIGS = {
    "windows": gpt_oss(**SIZES, intermediate_size=224, num_local_experts=4, num_experts_per_tok=4),
    "no window": gpt_oss(
        **SIZES,
        intermediate_size=96,
        num_local_experts=3,
        num_experts_per_tok=3,
        layer_types=["full_attention"] * 3,
        swiglu_limit=0.7,
    ),
    "no yarn": gpt_oss(
        **SIZES,
        intermediate_size=128,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=5,
        rope_scaling={"rope_type": "default"},
        initial_context_length=128,
    ),
    "one expert": gpt_oss(
        **SIZES, intermediate_size=64, num_local_experts=1, num_experts_per_tok=1, attention_bias=False
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_on_the_same_files(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    plain = write_mxfp4_model(tmp_path / "model", config, seed=40_000)
    prompt = prompt_ids(config, 40_000, 48)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    with torch.no_grad():
        expected = model.float().eval()(input_ids=torch.tensor([prompt])).logits[0].numpy()
        dequantised = load(plain)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(tmp_path / "model", memory="8GiB", kv_dtype="f32", threads=2) as engine:
        logits = engine.logits(prompt)
        result = engine.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        again = engine.logits(prompt + result.token_ids)

    # A bf16 pack is exact, and its activations are float32.
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="bf16")
    with Engine.open(tmp_path / "packed", memory="8GiB", kv_dtype="f32", threads=2) as engine:
        exact = engine.logits(prompt)

    assert difference(dequantised, expected) <= 1e-5  # both readers see the same weights
    assert difference(exact, expected) <= LARGEST_DIFFERENCE
    assert mean_divergence(expected, logits) <= 0.002
    assert result.token_ids == again[len(prompt) - 1 : -1].argmax(axis=1).tolist()
