"""A GGUF file answers like its dequantised weights, and the same at every budget, in place and packed.

The comparison with the dequantised weights takes routing out: every expert is chosen. Quantised matrices take 8-bit
activations, and a rounded score that flips one routing decision would hide the cost of rounding itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.gguf import read_gguf
from argosy.checkpoint.manifest import verify_pack
from argosy.checkpoint.pack import pack
from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from argosy.model.families import open_model
from tests.helpers.examples import few_of
from tests.models import gguf_models
from tests.models.gguf_models import (
    BLOCK_TYPES,
    TYPES,
    TypeOf,
    mixed,
    mixed_of_ik,
    mixed_small,
    mixed_smallest,
    one_type,
    write_gguf_model,
)
from tests.models.numpy_model import NumpyModel
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
from tests.models.tiny_gqa import mimo_v2_flash
from tests.models.tiny_kda import bailing_hybrid, kimi_linear
from tests.models.tiny_latent import deepseek_v3
from tests.models.tiny_llama4 import OF_GGUF, llama4_text
from tests.models.tiny_minimax import minimax
from tests.models.tiny_minimax_m3 import minimax_m3
from tests.models.tiny_recurrent import lfm2_moe

# The mean KL in nats that 8-bit activations may cost; measured: 0.0003. A wrong scale, row or column costs above 1.
LARGEST_DIVERGENCE = 0.002

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
}


def config_of(family: str, *, num_experts: int, experts_per_token: int) -> RawConfig:
    sizes = SIZES | {"num_experts_per_tok": experts_per_token}
    match family:
        case "mixtral":
            return mixtral(**sizes, num_local_experts=num_experts, intermediate_size=256)
        case "qwen2_moe":
            shared = {"shared_expert_intermediate_size": 512, "intermediate_size": 512}
            return qwen2_moe(**sizes, **shared, num_experts=num_experts, moe_intermediate_size=256)
        case "glm4_moe":
            widths = {"moe_intermediate_size": 256, "intermediate_size": 512}
            return glm4_moe(**sizes, **widths, n_routed_experts=num_experts, use_qk_norm=True)
        case "olmoe":
            return olmoe(**sizes, num_experts=num_experts, intermediate_size=256)
        case "minimax_m2":
            return minimax_m2(**sizes, rotary_dim=32, num_local_experts=num_experts, intermediate_size=256)
        case "minimax_m3_vl":
            widths = {f"{part}intermediate_size": 256 for part in ("", "dense_", "shared_")}
            turning = {"rotary_dim": 32, "partial_rotary_factor": 0.5, "sparse_layers": [0, 1]}
            index = {"sparse_index_dim": 32, "sparse_topk_blocks": 64}  # all: rounding would choose others
            return minimax_m3(**sizes, **widths, **turning, index=index, num_local_experts=num_experts)
        case "llama4_text":
            widths = {"intermediate_size": 256, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2}
            # Its tokens have one expert each, so that all of them are chosen only if there is one.
            sizes["num_experts_per_tok"] = 1
            return llama4_text(
                **sizes, **widths, **OF_GGUF, num_local_experts=num_experts // experts_per_token
            )
        case "minimax":
            kinds = {"layer_types": ["full_attention", "linear_attention"]}
            return minimax(
                **sizes, **kinds, rotary_dim=32, num_local_experts=num_experts, intermediate_size=256
            )
        case "mimo_v2_flash":
            widths = {"moe_intermediate_size": 256, "intermediate_size": 256, "v_head_dim": 64}
            layers = {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [1, 1]}
            heads = SIZES["num_attention_heads"]
            return mimo_v2_flash(
                **sizes | {"head_dim": 72, "num_key_value_heads": heads // 4},
                **widths,
                **layers,
                n_routed_experts=num_experts,
            )
        case "gpt_oss":
            return gpt_oss(**sizes, num_local_experts=num_experts, intermediate_size=256)
        case "lfm2_moe":
            del sizes["head_dim"]
            kinds = {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0}
            return lfm2_moe(**sizes, **kinds, num_experts=num_experts, moe_intermediate_size=256)
        case "kimi_linear":
            layers = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 256, "num_heads": 2}
            return kimi_linear(
                **LATENT | AROUND_DELTA | {"q_lora_rank": None},
                linear_attn_config=layers | {"short_conv_kernel_size": 4},
                num_experts=num_experts,
                num_experts_per_token=experts_per_token,
            )
        case "bailing_hybrid":
            return bailing_hybrid(
                **LATENT | AROUND_DELTA,
                expert_swiglu_limit_list=[0.0, 0.5],
                share_expert_swiglu_limit_list=[0.25, 0.0],
                head_dim=256,
                moe_shared_expert_intermediate_size=256,
                n_group=1,
                num_experts=num_experts,
                num_experts_per_tok=experts_per_token,
                rotary_dim=LATENT["qk_rope_head_dim"],
                topk_group=1,
            )
        case "deepseek_v3":
            return latent(num_experts, experts_per_token)
        case _:
            return qwen3_moe(**sizes, num_experts=num_experts, moe_intermediate_size=256)


LATENT: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
}
AROUND_DELTA = {
    "first_k_dense_replace": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "v_head_dim": 128,
}


def latent(num_experts: int, experts_per_token: int, **changes: Any) -> RawConfig:
    """Configure a DeepSeek-V3 whose matrix rows are whole blocks of every type, except the key halves."""
    return deepseek_v3(
        **LATENT,
        n_group=1,
        topk_group=1,
        n_routed_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        **changes,
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v3",
        "glm4_moe",
        "olmoe",
        "minimax_m2",
        "minimax_m3_vl",
        "llama4_text",
        "minimax",
        "mimo_v2_flash",
        "lfm2_moe",
        "kimi_linear",
        "bailing_hybrid",
    ],
)
@pytest.mark.parametrize(
    "type_of",
    [*map(one_type, TYPES), mixed, mixed_smallest, mixed_of_ik],
    ids=[*TYPES, "mixed", "mixed_smallest", "mixed_of_ik"],
)
def test_logits_match_those_of_the_dequantised_weights(family: str, type_of: TypeOf, tmp_path: Path) -> None:
    config = config_of(family, num_experts=3, experts_per_token=3)
    path = tmp_path / "model.gguf"
    reference = NumpyModel(write_gguf_model(path, config, type_of, seed=5))
    prompt = prompt_ids(config, 5)
    with Engine.open(path, memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)

    expected = reference.logits(prompt)
    if type_of("blk.0.attn_q.weight") in ("F32", "F16", "BF16"):
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    else:
        assert mean_divergence(expected, logits) <= LARGEST_DIVERGENCE


@pytest.mark.parametrize("width", few_of([640, 1408, 2880], (640,)))
def test_widths_that_are_no_whole_blocks_of_a_type_have_another_there(width: int, tmp_path: Path) -> None:
    """llama.cpp's quantiser stores `down` of such models in blocks of 32 columns, next to the types of the others."""

    def type_of(name: str) -> str:
        if "ffn_down_exps" in name:
            return "IQ4_NL" if name.startswith("blk.0.") else "Q5_0"
        return mixed_smallest(name)

    config = config_of("qwen3_moe", num_experts=3, experts_per_token=3) | {"moe_intermediate_size": width}
    path = tmp_path / "model.gguf"
    reference = NumpyModel(write_gguf_model(path, config, type_of, seed=5))
    prompt = prompt_ids(config, 5)
    with Engine.open(path, memory="4GiB", threads=1) as engine:
        assert mean_divergence(reference.logits(prompt), engine.logits(prompt)) <= LARGEST_DIVERGENCE


# Pruning (REAP) leaves numbers of experts that are no power of two and no multiple of 8.
@pytest.mark.covering(1)
@pytest.mark.parametrize("num_experts", [7, 12, 100])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_any_number_of_experts_runs_from_gguf_and_safetensors(
    family: str, num_experts: int, tmp_path: Path
) -> None:
    narrow = {"hidden_size": 64, "moe_intermediate_size": 32}
    config = config_of(family, num_experts=num_experts, experts_per_token=3) | narrow
    path = tmp_path / "model.gguf"
    safetensors = write_gguf_model(path, config, one_type("F32"), seed=5)
    prompt = prompt_ids(config, 5)
    expected = NumpyModel(safetensors).logits(prompt)
    for model in (path, safetensors):
        for expert_slots in (None, 5):
            with Engine.open(model, memory="4GiB", threads=1, expert_slots=expert_slots) as engine:
                assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q5_0", "Q4_K"])
def test_keys_and_values_in_one_tensor_match_the_logits_of_the_dequantised_weights(
    type_name: str, tmp_path: Path
) -> None:
    """Files with latent attention from before April 2025 store them so; reading splits the tensor in two."""
    config, path = latent(num_experts=3, experts_per_token=3), tmp_path / "model.gguf"
    reference = NumpyModel(write_gguf_model(path, config, one_type(type_name), seed=5, split_kv=False))
    prompt = prompt_ids(config, 5)
    with Engine.open(path, memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)

    expected = reference.logits(prompt)
    if type_name == "F32":
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    assert mean_divergence(expected, logits) <= LARGEST_DIVERGENCE


def test_experts_in_separate_tensors_read_like_stacked_ones(tmp_path: Path) -> None:
    config = config_of("mixtral", num_experts=4, experts_per_token=2)
    logits = []
    for is_split in (False, True):
        path = tmp_path / f"{is_split}.gguf"
        write_gguf_model(path, config, one_type("Q4_0"), seed=2, split_experts=is_split)
        with Engine.open(path, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(config, 2)))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("family", "type_name"),
    [("mixtral", "F16"), ("qwen3_moe", "Q4_K"), ("glm4_moe", "IQ2_KS"), ("deepseek_v3", "NVFP4")],
)
def test_gate_and_up_in_one_tensor_read_like_separate_ones(
    family: str, type_name: str, tmp_path: Path
) -> None:
    config = config_of(family, num_experts=4, experts_per_token=2)
    logits = []
    for is_joined in (False, True):
        path = tmp_path / f"{is_joined}.gguf"
        write_gguf_model(path, config, one_type(type_name), seed=2, has_joined_experts=is_joined)
        assert ("blk.1.ffn_gate_up_exps.weight" in read_gguf(path).tensors) == is_joined
        with Engine.open(path, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(config, 2)))
    np.testing.assert_array_equal(*logits)


def test_a_router_with_a_bias_and_no_named_scoring_has_sigmoid_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("deepseek_v3", num_experts=8, experts_per_token=2)
    plain = gguf_models.add_latent_metadata

    def without_name(writer: GGUFWriter, config: RawConfig, *, split_kv: bool) -> None:
        plain(writer, config, split_kv=split_kv)
        del writer.kv_data[0]["deepseek2.expert_gating_func"]

    logits = []
    for name, add_metadata in (("named", plain), ("unnamed", without_name)):
        monkeypatch.setattr(gguf_models, "add_latent_metadata", add_metadata)
        path = tmp_path / f"{name}.gguf"
        write_gguf_model(path, config, one_type("Q8_0"), seed=5)
        with Engine.open(path, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(config, 5)))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("has_bare_first_part", [False, True])
def test_a_model_in_parts_answers_like_the_same_model_in_one_file(
    has_bare_first_part: bool, tmp_path: Path
) -> None:
    config = config_of("qwen3_moe", num_experts=4, experts_per_token=2)
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config, mixed, seed=3)
    (tmp_path / "parts").mkdir()
    in_parts = tmp_path / "parts" / "model.gguf"
    write_gguf_model(
        in_parts, config, mixed, seed=3, tensors_per_part=5, has_bare_first_part=has_bare_first_part
    )
    assert not in_parts.exists()
    first = min(in_parts.parent.glob("*.gguf"))
    packed = tmp_path / "packed"
    pack(open_model(first), packed, format="source")
    logits = []
    for model in (path, first, first.parent, packed):
        with Engine.open(model, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(config, 2)))
    assert all(np.array_equal(logits[0], each) for each in logits[1:])


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "olmoe", "minimax_m2", "deepseek_v3"]


@pytest.fixture(scope="module", params=few_of(FAMILIES, ("qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3")))
def in_place_and_packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RawConfig, Path, Path]:
    family, folder = request.param, tmp_path_factory.mktemp("gguf")
    config = config_of(family, num_experts=8, experts_per_token=2)
    path, packed = folder / "model.gguf", folder / "packed"
    kinds = {
        "qwen3_moe": mixed_small, "mixtral": mixed_smallest, "glm4_moe": mixed_smallest, "gpt_oss": mixed_of_ik
    }  # fmt: skip
    write_gguf_model(path, config, kinds.get(family, mixed), seed=4)
    pack(open_model(path), packed, format="source")
    return config, path, packed


@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
def test_greedy_answers_are_equal_at_every_budget_in_place_and_packed(
    in_place_and_packed: tuple[RawConfig, Path, Path], instruction_set: str, request: pytest.FixtureRequest
) -> None:
    """Budgets take turns in place and packed, so that the instruction sets of a family try them both ways."""
    config, *places = in_place_and_packed
    turn = FAMILIES.index(request.node.callspec.params["in_place_and_packed"])
    turn += _native.instruction_sets().index(instruction_set)
    require_equal_answers(places, turn, prompt_ids(config, 4, 19), instruction_set, most_slots=24)


def require_equal_answers(
    places: Sequence[Path], turn: int, prompt: list[int], instruction_set: str, *, most_slots: int
) -> None:
    """Compare logits, greedy tokens and log-probabilities at four budgets, which take turns in the places."""
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)
    answers = []
    for number, (expert_slots, threads, chunk_tokens) in enumerate(
        ((None, 1, 256), (most_slots, 2, 5), (5, 1, 256), (2, 2, 1))
    ):
        with Engine.open(
            places[(turn + number) % 2], memory="4GiB", threads=threads, chunk_tokens=chunk_tokens,
            expert_slots=expert_slots, instruction_set=instruction_set,
        ) as engine:  # fmt: skip
            result = engine.generate(prompt, greedy)
            answers.append((engine.logits(prompt).tobytes(), result.token_ids, result.logprobs))
    assert answers == [answers[0]] * len(answers)


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_a_pack_holds_the_weights_of_its_gguf_bit_for_bit(type_name: str, tmp_path: Path) -> None:
    config = config_of("mixtral", num_experts=2, experts_per_token=1)
    path, packed = tmp_path / "model.gguf", tmp_path / "packed"
    reference = NumpyModel(write_gguf_model(path, config, one_type(type_name), seed=6))
    pack(open_model(path), packed, format="source")
    verify_pack(packed)
    files = open_model(packed)
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        record = files.experts[1, 1]
        matrix = getattr(record, part)
        stored = np.fromfile(packed / "experts.bin", np.uint8)
        start = record.pieces[0].offset + matrix.offset
        nbytes = _native.matrix_bytes(matrix.format, matrix.rows, matrix.cols)
        found = _native.dequantize(matrix.format, stored[start : start + nbytes], matrix.rows, matrix.cols)
        expected = reference.tensors[f"model.layers.1.block_sparse_moe.experts.1.{name}.weight"]
        np.testing.assert_array_equal(found, expected)
    ref = files.dense["layers.0.q"]  # its rows are reordered
    stored = np.fromfile(ref.path, np.uint8)[ref.offset : ref.offset + ref.nbytes]
    np.testing.assert_array_equal(
        _native.dequantize(ref.format, stored, ref.rows, ref.cols),
        reference.tensors["model.layers.0.self_attn.q_proj.weight"],
    )


def test_matrices_in_nvfp4_may_have_factors(tmp_path: Path) -> None:
    config = config_of("qwen2_moe", num_experts=3, experts_per_token=3)
    path, packed = tmp_path / "model.gguf", tmp_path / "packed"
    reference = NumpyModel(write_gguf_model(path, config, one_type("NVFP4"), seed=6, has_factors=True))
    pack(open_model(path), packed, format="source")
    prompt = prompt_ids(config, 5)
    expected = reference.logits(prompt)
    answers = []
    for place in (path, packed):
        with Engine.open(place, memory="4GiB", threads=2, expert_slots=3) as engine:
            answers.append(engine.logits(prompt))
    assert mean_divergence(expected, answers[0]) <= LARGEST_DIVERGENCE
    np.testing.assert_array_equal(answers[0], answers[1])
    record = open_model(packed).experts[1, 2]
    start, nbytes = record.pieces[0].offset + record.down.offset, _native.matrix_bytes("nvfp4", 256, 256)
    stored = np.fromfile(packed / "experts.bin", np.uint8)[start : start + nbytes]
    np.testing.assert_array_equal(
        _native.dequantize("nvfp4", stored, 256, 256),
        reference.tensors["model.layers.1.mlp.experts.2.down_proj.weight"],
    )


@pytest.mark.parametrize("name", ["blk.0.attn_q.scale", "blk.1.ffn_up_exps.scale"])
def test_a_factor_that_is_no_number_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = config_of("qwen2_moe", num_experts=2, experts_per_token=2)
    write_gguf_model(path, config, one_type("NVFP4"), seed=6, has_factors=True)
    with open(path, "r+b") as file:
        file.seek(read_gguf(path).tensors[name].offset)
        file.write(np.float32(np.nan).tobytes())
    with (
        pytest.raises(CheckpointError, match="hold a code or scale that is not a finite number"),
        Engine.open(path, memory="4GiB", threads=1) as engine,
    ):
        engine.logits(prompt_ids(config, 5))


def test_a_factor_that_reordered_rows_would_need_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = config_of("mixtral", num_experts=2, experts_per_token=1)
    write_gguf_model(path, config, one_type("NVFP4"), seed=6, has_factors=True)
    with pytest.raises(
        UnsupportedModel, match=r"blk.0.attn_q.weight is NVFP4 with a factor in blk.0.attn_q.scale"
    ):
        open_model(path)


def test_a_quantised_gguf_is_never_quantised_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, config_of("qwen3_moe", num_experts=2, experts_per_token=1), mixed, seed=1)
    with pytest.raises(UsageError, match=r"is already q4_k\+q5_0\+q6_k, which is not quantised again"):
        pack(open_model(path), tmp_path / "packed", format="q8")
    write_gguf_model(
        tmp_path / "f16.gguf",
        config_of("qwen3_moe", num_experts=2, experts_per_token=1),
        one_type("F16"),
        seed=1,
    )
    pack(open_model(tmp_path / "f16.gguf"), tmp_path / "packed", format="q8")
    assert open_model(tmp_path / "packed").expert_format == "q8"
