"""GGUF files with gated delta nets match their dequantised weights, and answer the same at every budget and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.errors import CheckpointError
from argosy.model.families import open_model
from tests.models import gguf_delta
from tests.models.gguf_delta import write_delta_gguf
from tests.models.gguf_models import TypeOf, mixed, one_type
from tests.models.numpy_model import NumpyModel, softmax
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import write_checkpoint
from tests.models.tiny import prompt_ids, random_tensors
from tests.models.tiny_delta import RawConfig, qwen3_5_moe_text, qwen3_next
from tests.models.tiny_qwen4 import qwen4_exp_text

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
}
CONFIGS = {"qwen3next": qwen3_next(**SIZES), "qwen35moe": qwen3_5_moe_text(**SIZES)}
QWEN4 = qwen4_exp_text(
    **SIZES,
    hc_lowrank=32,
    heads_per_ngram=4,
    indexer_head_dim=64,
    ple_embed_dim=256,
    max_position_embeddings=512,
)
TYPES = {"F32": one_type("F32"), "BF16": one_type("BF16"), "Q8_0": one_type("Q8_0"), "mixed": mixed}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.mark.covering(1)
@each_config
@pytest.mark.parametrize("type_name", TYPES)
def test_logits_match_those_of_the_dequantised_weights(
    config: RawConfig, type_name: str, tmp_path: Path
) -> None:
    # Every expert is chosen: a rounded score that flips one decision would hide the cost of rounding itself.
    require_dequantised(config | {"num_experts_per_tok": 4}, TYPES[type_name], type_name, tmp_path)


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_0"])
def test_tables_and_streams_match_those_of_the_dequantised_weights(type_name: str, tmp_path: Path) -> None:
    def type_of(name: str) -> str:
        return type_name if "per_layer" in name or type_name == "F32" else "Q8_0"

    require_dequantised(QWEN4 | {"num_experts_per_tok": 4}, type_of, type_name, tmp_path)
    with Engine.open(tmp_path / "model.gguf", memory="4GiB", threads=1) as engine:
        assert engine.generate([7, 8, 9], SamplingParams(max_tokens=2)).ledger.rows == 4 * 8


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table_primes", [4001] * 8, r"per_layer_token_embd\.weight has \d+ rows, expected 32008"),
        (
            "table_primes",
            [0] * 8,
            r"ple\.head_vocab_sizes is an array of 8, expected 8 whole numbers",
        ),
        (
            "table_multipliers",
            [3, 5],
            r"ple\.layer_multipliers is an array of 2, expected 3 whole numbers",
        ),
    ],
)
def test_constants_that_contradict_a_table_are_refused(
    name: str, value: list[int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_delta, name, lambda config, table: value)
    write_delta_gguf(tmp_path / "model.gguf", QWEN4, one_type("F32"), seed=2)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "model.gguf")


def require_dequantised(config: RawConfig, type_of: TypeOf, type_name: str, tmp_path: Path) -> None:
    directory = write_delta_gguf(tmp_path / "model.gguf", config, type_of, seed=7)
    prompt = prompt_ids(config, 7, 30)
    expected = NumpyModel(directory).logits(prompt)
    with Engine.open(tmp_path / "model.gguf", memory="4GiB", threads=1) as engine:
        logits = engine.logits(prompt)
    if type_name in ("F32", "BF16"):
        assert difference(logits, expected) <= LARGEST_DIFFERENCE
    p, q = softmax(expected), softmax(logits.astype(np.float64))
    assert float((p * np.log(p / q)).sum(axis=1).mean()) <= 0.002


def test_files_with_q_k_v_and_z_in_one_matrix_are_read(tmp_path: Path) -> None:
    logits = []
    for has_ssm_in in (False, True):
        path = tmp_path / f"{has_ssm_in}.gguf"
        write_delta_gguf(path, CONFIGS["qwen3next"], one_type("Q8_0"), seed=2, has_ssm_in=has_ssm_in)
        with Engine.open(path, memory="4GiB", threads=1) as engine:
            assert engine.config.delta is not None
            assert engine.config.delta.has_joined_qkvz == has_ssm_in
            logits.append(engine.logits(prompt_ids(CONFIGS["qwen3next"], 2)))
    np.testing.assert_array_equal(*logits)


def test_decays_that_would_make_the_state_grow_or_become_nan_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gguf_delta.stored_vector
    monkeypatch.setattr(
        gguf_delta, "stored_vector", lambda name, x: np.exp(x) if name.endswith("ssm_a") else plain(name, x)
    )
    write_delta_gguf(tmp_path / "model.gguf", CONFIGS["qwen3next"], one_type("F32"), seed=2)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.delta_rate gives head 0 a decay of e\^\(\d.*expected a rate"
    ):
        Engine.open(tmp_path / "model.gguf", memory="4GiB")

    config = qwen3_next()
    tensors = random_tensors(config, 3, "F32")
    tensors["model.layers.0.linear_attn.A_log"][1] = 100.0  # e^100 overflows float32
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    write_checkpoint(tmp_path, {name: ("F32", tensor) for name, tensor in tensors.items()})
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.delta_rate gives head 1 a decay of e\^\(-inf \* softplus\)"
    ):
        Engine.open(tmp_path, memory="4GiB")


@pytest.mark.parametrize(
    "config",
    [pytest.param(CONFIGS["qwen3next"], marks=pytest.mark.full), CONFIGS["qwen35moe"]],
    ids=CONFIGS,
)
def test_answers_are_equal_at_every_budget_in_place_and_packed(config: RawConfig, tmp_path: Path) -> None:
    path, packed = tmp_path / "model.gguf", tmp_path / "packed"
    write_delta_gguf(path, config, mixed, seed=4)
    pack(open_model(path), packed, format="source")
    prompt = prompt_ids(config, 4, 19)
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)
    answers = []
    for model in (path, packed):
        for expert_slots, threads, chunk_tokens in ((None, 1, 256), (5, 2, 5), (2, 2, 1)):
            with Engine.open(
                model,
                memory="4GiB",
                threads=threads,
                chunk_tokens=chunk_tokens,
                expert_slots=expert_slots,
            ) as engine:
                result = engine.generate(prompt, greedy)
                answers.append((engine.logits(prompt).tobytes(), result.token_ids, result.logprobs))
    assert answers == [answers[0]] * len(answers)
