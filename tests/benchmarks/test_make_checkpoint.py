"""The models that benchmarks run on give the answers they are made for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from argosy import Engine, SamplingParams
from argosy.config import ModelConfig
from gguf_blocks import BLOCK_TYPES, RANDOM_TYPES, random_blocks, scale_blocks, to_blocks
from make_checkpoint import block_type_of, make_model, parse_config, raw_config, vocabulary
from random_weights import RandomWeights, document
from routing import overlap

SIZES = {
    "hidden": 512, "layers": 2, "experts": 8, "experts_per_token": 2, "width": 256, "heads": 4, "vocab": 1280,
    "context": 512,
}  # fmt: skip
RAW = raw_config(**SIZES)
SIMILAR = ("Q4_0", "Q3_K_M", "IQ4_XS", "Q5_1")  # to Q4_K_M; what differs is how a block holds its values
# The root mean square of the rounding error for normally distributed values: half a step, and room for a poor scale.
LARGEST_ROUNDING = {
    **{"F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.021, "Q5_0": 0.045, "Q5_1": 0.041, "Q5_K": 0.041},
    **{"MXFP4": 0.12, "Q3_K": 0.16, "Q2_K": 0.34},
}


def require_continued(model: Path) -> None:
    text = document(0, 40)
    with Engine.open(model, memory="2GiB", context=64) as engine:
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        assert engine.generate(text[:16], params).token_ids == text[16:]


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_blocks_hold_the_quantised_values(block_type: str):
    values = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    values[0] = 0
    blocks = to_blocks(block_type, values)
    raw = blocks.view(np.float16) if block_type == "F16" else blocks
    found = dequantize(raw, gguf.GGMLQuantizationType[block_type]).reshape(values.shape)
    assert np.sqrt(np.mean((found - values) ** 2)) <= LARGEST_ROUNDING.get(block_type, 0.09)
    assert not found[0].any()


@pytest.mark.parametrize("block_type", ["Q8_0", "Q4_1", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_scaled_blocks_hold_scaled_values(block_type: str):
    kind = gguf.GGMLQuantizationType[block_type]
    values = np.random.default_rng(2).standard_normal((4, 256)).astype(np.float32)
    blocks = to_blocks(block_type, values)
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    scaled = scale_blocks(block_type, blocks.reshape(-1, nbytes), 0.25).reshape(blocks.shape)
    # The scales are float16, and some of them are subnormal.
    np.testing.assert_allclose(dequantize(scaled, kind), dequantize(blocks, kind) / 4, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block_type", RANDOM_TYPES)
def test_random_blocks_have_mean_0_and_the_deviation(block_type: str):
    blocks = random_blocks(block_type, 4096, 0.02, np.random.default_rng(3))
    values = dequantize(blocks, gguf.GGMLQuantizationType[block_type])
    assert values.std() == pytest.approx(0.02, rel=0.03)
    assert abs(values.mean()) < 0.02 / 50


@pytest.mark.parametrize(
    "format",
    ["Q4_K_M", "BF16", "MXFP4_MOE", *(pytest.param(each, marks=pytest.mark.full) for each in SIMILAR)],
)
def test_an_answer_continues_the_document(tmp_path: Path, format: str):
    require_continued(make_model(tmp_path / "model.gguf", RAW, format=format, routing="recorded"))


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("glm4_moe", "bf16"),
        ("deepseek_v3", "bf16"),
        pytest.param("deepseek_v3", "Q4_0", marks=pytest.mark.full),
    ],
)
def test_a_shared_expert_does_not_drown_the_document(tmp_path: Path, family: str, format: str):
    raw = raw_config(family, **SIZES | {"layers": 8})
    name = "model" if format == "bf16" else "model.gguf"
    require_continued(make_model(tmp_path / name, raw, format=format, routing="recorded"))


def test_recorded_routing_reuses_experts_and_uniform_routing_does_not():
    config, text = parse_config(RAW), np.array(document(1, 256))
    recorded = overlap(RandomWeights(config, routing="recorded").chosen(text), 1)
    uniform = overlap(RandomWeights(config, routing="uniform").chosen(text), 1)
    assert abs(uniform - 2 / 8) < 0.05  # chance
    assert recorded > uniform + 0.1


def test_block_types_are_those_of_llama_quantize():
    config = parse_config(raw_config(layers=16, heads=8, kv_heads=2))
    eight = parse_config(raw_config(layers=16, heads=8, kv_heads=4, experts=8))

    def types(format: str, last: str, cols: int = 768, config: ModelConfig = config) -> list[str]:
        return [block_type_of(format, f"layers.{layer}.{last}", layer, cols, config) for layer in range(16)]

    down = types("Q4_K_M", "down")
    assert [i for i, kind in enumerate(down) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert types("Q4_K_M", "down", 384)[1:3] == ["Q8_0", "Q5_0"]
    assert types("Q3_K_M", "down")[:2] == ["Q5_K", "Q4_K"]
    assert types("Q3_K_M", "v")[1:3] == ["Q5_K", "Q4_K"]
    assert types("IQ4_XS", "shared_down", 384)[1:3] == ["Q5_1", "IQ4_NL"]
    assert {*types("Q2_K", "o"), *types("Q2_K", "down")} == {"Q3_K"}
    assert {*types("Q2_K", "v"), *types("Q2_K", "q", 384)} == {"Q4_K", "Q4_0"}
    assert {*types("Q2_K", "v", config=eight), *types("Q2_K", "o", config=eight)} == {"Q8_0", "Q5_K"}
    assert {*types("MXFP4_MOE", "down"), *types("Q8_0", "router")} == {"Q8_0", "F32"}
    assert types("IQ2_XXS", "down")[1:3] == ["Q2_K", "IQ2_XXS"]
    assert types("IQ2_M", "down")[1:3] == ["IQ3_S", "IQ2_S"]
    assert types("IQ1_M", "down", 640)[1:3] == ["Q4_0", "IQ4_NL"]
    assert {*types("IQ1_S", "o"), *types("IQ1_S", "v"), *types("IQ1_S", "q")} == {"IQ2_XXS", "Q4_K", "IQ1_S"}
    assert {*types("IQ3_XXS", "o"), *types("IQ3_XXS", "k"), *types("IQ3_XXS", "down")} == {
        "IQ3_S",
        "IQ2_S",
        "IQ3_XXS",
    }
    assert {*types("IQ3_S", "v"), *types("IQ3_S", "o")} == {"Q4_K", "IQ3_S"}
    assert block_type_of("IQ2_XXS", "head", 0, 1024, config) == "Q5_K"
    assert block_type_of("MXFP4_MOE", "expert.down", 0, 768, config) == "MXFP4"
    assert block_type_of("Q4_0", "head", 0, 1024, config) == "Q6_K"
    assert block_type_of("Q2_K", "embed", 0, 1024, config) == "Q2_K"


def test_the_tokens_of_the_vocabulary_are_distinct():
    tokens, merges = vocabulary(32_000)
    assert len(tokens) == len(set(tokens)) == 32_000
    assert len(merges) == 32_000 - 258
