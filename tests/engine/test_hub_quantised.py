"""FP8 and INT4 checkpoints from the hub answer like their dequantised weights, and the same at every budget and packed.

FP8 weights take float32 activations, so logits match those of the dequantised weights up to the rounding of sums.
INT4 takes 8-bit activations; there every expert is chosen, because a rounded score that flips one routing decision
would hide the cost of rounding itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.helpers.examples import few_of
from tests.models.hub_quantised import write_fp8_model, write_int4_model
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import read_checkpoint
from tests.models.tiny import RawConfig, minimax_m2, prompt_ids, qwen3_moe
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_latent import deepseek_v3, kimi_k2, kimi_k25

INSTRUCTION_SETS = _native.instruction_sets()

# No size is a multiple of 128: 200 columns, 300 rows, 136 rows of an expert.
QWEN3 = qwen3_moe(
    hidden_size=200,
    head_dim=50,
    num_attention_heads=6,
    moe_intermediate_size=136,
    num_experts=7,
    num_experts_per_tok=3,
)
# kv_a_proj_with_mqa has 576 rows, as in DeepSeek-V3: four and a half blocks.
DEEPSEEK = deepseek_v3(
    hidden_size=160, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=2, moe_intermediate_size=72,
    qk_nope_head_dim=24, v_head_dim=40, q_lora_rank=130, intermediate_size=150,
)  # fmt: skip
# Heads and the rank end at block boundaries, so the split halves stay FP8.
DEEPSEEK_IN_BLOCKS = deepseek_v3(
    kv_lora_rank=128, qk_rope_head_dim=16, num_hidden_layers=2, qk_nope_head_dim=128, v_head_dim=128,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip
MINIMAX = minimax_m2(hidden_size=136, intermediate_size=140)
# Delta nets: in_proj_qkvz has 240 rows; b and a stay floating-point.
QWEN3_NEXT = qwen3_next(
    hidden_size=140, linear_key_head_dim=24, linear_value_head_dim=18, moe_intermediate_size=132
)
FP8_MODELS = {
    "qwen3_moe": QWEN3,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_in_blocks": DEEPSEEK_IN_BLOCKS,
    "minimax_m2": MINIMAX,
    "qwen3_next": QWEN3_NEXT,
}


@pytest.mark.covering(1)  # how a model's weights are found does not depend on how they are multiplied
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("model", FP8_MODELS)
def test_logits_and_answers_of_fp8_match_those_of_the_dequantised_weights(
    model: str, instruction_set: str, tmp_path: Path
) -> None:
    config = FP8_MODELS[model]
    scale_dtype, num_shards = ("BF16", 3) if model == "qwen3_moe" else ("F32", 1)
    plain = write_fp8_model(
        tmp_path / "model", config, seed=3, scale_dtype=scale_dtype, num_shards=num_shards
    )
    prompt = prompt_ids(config, 3)
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    found = []
    for directory in (tmp_path / "model", plain):
        with Engine.open(directory, memory="4GiB", threads=2, instruction_set=instruction_set) as engine:
            found.append((engine.logits(prompt), engine.generate(prompt, greedy).token_ids))
    reference = NumpyModel(plain)
    assert difference(found[0][0], reference.logits(prompt)) <= LARGEST_DIFFERENCE
    assert difference(found[0][0], found[1][0]) <= LARGEST_DIFFERENCE
    assert found[0][1] == found[1][1]


@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("model", ["qwen3_moe", "kimi_k25"])
def test_logits_of_int4_match_those_of_the_dequantised_weights(
    model: str, instruction_set: str, tmp_path: Path
) -> None:
    plain = write_int4_model(tmp_path / "model", int4_config(model, chosen=3), seed=5, num_shards=2)
    config = int4_config(model, chosen=3)
    prompt = prompt_ids(config, 5)
    with Engine.open(tmp_path / "model", memory="4GiB", threads=2, instruction_set=instruction_set) as engine:
        logits = engine.logits(prompt)
    assert mean_divergence(NumpyModel(plain).logits(prompt), logits) <= LARGEST_DIVERGENCE


def int4_config(model: str, *, chosen: int, experts: int = 3) -> RawConfig:
    if model == "qwen3_moe":
        return qwen3_moe(
            hidden_size=96, moe_intermediate_size=160, num_experts=experts, num_experts_per_tok=chosen
        )
    sizes = {"hidden_size": 96, "moe_intermediate_size": 64, "n_routed_experts": experts}
    groups = {"num_experts_per_tok": chosen, "n_group": 1, "topk_group": 1}
    return (kimi_k25 if model == "kimi_k25" else kimi_k2)(**sizes, **groups)


@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    "stored",
    few_of(
        ["fp8 qwen3_moe", "fp8 deepseek_v3", "fp8 deepseek_v3_in_blocks", "int4 kimi_k2"],
        ["fp8 deepseek_v3_in_blocks", "int4 kimi_k2"],
    ),
)
def test_answers_are_equal_at_every_budget_in_place_and_packed(
    stored: str, instruction_set: str, tmp_path: Path
) -> None:
    kind, _, model = stored.partition(" ")
    if kind == "fp8":
        config = FP8_MODELS[model]
        write_fp8_model(tmp_path / "model", config, seed=4)
    else:
        config = int4_config(model, chosen=3, experts=9)
        write_int4_model(tmp_path / "model", config, seed=4)
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    verify_pack(tmp_path / "packed")
    prompt = prompt_ids(config, 4, 23)
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)
    answers = []
    for directory in (tmp_path / "model", tmp_path / "packed"):
        for expert_slots, threads, chunk_tokens in ((None, 1, 256), (14, 2, 5), (5, 1, 256), (3, 2, 1)):
            with Engine.open(
                directory, memory="4GiB", threads=threads, chunk_tokens=chunk_tokens, expert_slots=expert_slots,
                instruction_set=instruction_set,
            ) as engine:  # fmt: skip
                together = engine.generate_batch([prompt, prompt[:9]], [greedy, greedy])
                result = engine.generate(prompt, greedy)
                assert together[0].token_ids == result.token_ids
                answers.append((engine.logits(prompt).tobytes(), result.token_ids, result.logprobs))
    assert answers == [answers[0]] * len(answers)


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
def test_a_pack_holds_every_fp8_weight_bit_for_bit(scale_dtype: str, tmp_path: Path) -> None:
    exact = read_checkpoint(
        write_fp8_model(tmp_path / "model", QWEN3, seed=6, scale_dtype=scale_dtype, num_shards=2)
    )
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    for name, (format, found) in packed_weights(tmp_path / "packed").items():
        if name in exact:
            assert format == ("f8" if name.endswith("_proj.weight") else "bf16"), name
            np.testing.assert_array_equal(found, exact[name].reshape(found.shape))


def test_a_pack_holds_every_int4_weight_bit_for_bit(tmp_path: Path) -> None:
    config = int4_config("kimi_k2", chosen=2, experts=4)
    exact = read_checkpoint(write_int4_model(tmp_path / "model", config, seed=6, num_shards=3))
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format="source")
    packed = packed_weights(tmp_path / "packed")
    experts = [name for name in exact if ".experts." in name]
    assert experts
    for name in experts:
        assert packed[name][0] == "int4"
        np.testing.assert_array_equal(packed[name][1], exact[name])


def packed_weights(directory: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return (format, values) of a pack's experts and attention, under their names on the hub."""
    files = open_model(directory)
    found = {}
    dense = np.fromfile(directory / "dense.bin", np.uint8)
    names = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "router": "mlp.gate"}
    for canonical, ref in files.dense.items():
        parts = canonical.split(".")
        if parts[-1] in names:
            raw = dense[ref.offset : ref.offset + ref.nbytes]
            values = _native.dequantize(ref.format, raw, ref.rows, ref.cols)
            found[f"model.layers.{parts[1]}.{names[parts[-1]]}.weight"] = ref.format, values
    stored = np.fromfile(directory / "experts.bin", np.uint8)
    for (layer, expert), record in files.experts.items():
        for name in ("gate", "up", "down"):
            matrix = getattr(record, name)
            start = record.pieces[0].offset + matrix.offset
            nbytes = _native.matrix_bytes(matrix.format, matrix.rows, matrix.cols)
            raw = stored[start : start + nbytes]
            values = _native.dequantize(matrix.format, raw, matrix.rows, matrix.cols)
            found[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = matrix.format, values
    return found


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("format", ["bf16", "q8", "q4"])
def test_packing_to_other_formats_starts_from_the_exact_weights(
    kind: str, format: str, tmp_path: Path
) -> None:
    if kind == "fp8":
        plain = write_fp8_model(tmp_path / "model", QWEN3, seed=7)
    else:
        plain = write_int4_model(tmp_path / "model", int4_config("kimi_k2", chosen=2), seed=7)
    pack(open_model(tmp_path / "model"), tmp_path / "packed", format=format)
    pack(open_model(plain), tmp_path / "expected", format=format)
    for name in ("dense.bin", "experts.bin"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
