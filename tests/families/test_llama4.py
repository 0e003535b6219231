"""Llama-4: the meaning of the config, files with an expert's own tensors, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.config import AttentionConfig, KvDir, ModelConfig, QueryScale
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from argosy.model.rope import inverse_frequency
from tests.families.published import MAVERICK
from tests.families.published import llama4 as published
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.numpy_model import NumpyModel
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.runnable import runnable
from tests.models.safetensors_file import write_checkpoint
from tests.models.tiny import prompt_ids, random_tensors, write_model
from tests.models.tiny_llama4 import GUARD, OF_GGUF, apart, llama4, llama4_text


def parse(raw: dict[str, Any]) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def attentions(config: ModelConfig) -> list[AttentionConfig]:
    mixers = [layer.mixer for layer in config.layers]
    assert all(isinstance(mixer, AttentionConfig) for mixer in mixers)
    return mixers  # type: ignore[return-value]


def test_scout_has_three_layers_with_chunks_to_one_that_sees_all() -> None:
    config = parse(published())
    chunked, full = attentions(config)[2:4]
    assert (chunked.sliding_window, chunked.is_chunked, chunked.query_scale) == (8192, True, None)
    assert (chunked.qk_norm, chunked.is_norm_last) == ("unweighted", True)
    assert chunked.rope is not None
    assert (chunked.rope.kind, chunked.rope.is_interleaved, chunked.rope.rotary_dim) == ("llama3", True, 128)
    assert (full.sliding_window, full.is_chunked, full.rope, full.qk_norm) == (0, False, None, "none")
    assert full.query_scale == QueryScale(beta=0.1, period=8192, offset=1)
    assert attentions(config) == [chunked, chunked, chunked, full] * 12
    assert config.moe_layers == tuple(range(48))
    assert (config.router.weighs_input, config.shared_width, config.eos_ids) == (
        True, 8192, (200_001, 200_007, 200_008),
    )  # fmt: skip


def test_maverick_has_experts_in_every_second_layer_and_no_norm() -> None:
    config = parse(published(**MAVERICK))
    assert {attention.qk_norm for attention in attentions(config)} == {"none"}
    assert config.moe_layers == tuple(range(1, 48, 2))
    assert (config.dense_width, config.expert_width) == (16_384, 8192)


def test_llama_guard_has_no_experts() -> None:
    config = parse(published(**GUARD, intermediate_size_mlp=8192))
    assert (config.moe_layers, config.num_experts, config.shared_width, config.dense_width) == (
        (),
        0,
        0,
        8192,
    )
    assert attentions(config) == attentions(parse(published()))


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    config = parse({"model_type": "llama4_text"})
    scout = parse(published(max_position_embeddings=131_072, rope_scaling=None))
    assert config.layers == scout.layers
    assert (config.num_layers, config.num_experts, config.context_tokens) == (48, 16, 131_072)


def test_equal_factors_of_frequencies_are_a_step() -> None:
    """Scout's: pairs that turn less than once within 8192 positions are 16 times slower, the others as fast."""
    rope = parse(published()).ropes[0]
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 1.0)
    plain = 500_000.0 ** -(np.arange(0, 128, 2) / 128)
    expected = np.where(8192 * plain < 2 * np.pi, plain / 16, plain)
    assert set((plain / expected).round(6)) == {1.0, 16.0}
    np.testing.assert_allclose(inverse_frequency(rope), expected, rtol=1e-12)


def test_lists_choose_layers_one_by_one() -> None:
    config = parse(
        llama4_text(
            layer_types=["full_attention", "chunked_attention", "chunked_attention", "full_attention"],
            moe_layers=[0, 3],
            no_rope_layers=[1, 0, 1, 0],
        )
    )
    assert [attention.sliding_window for attention in attentions(config)] == [0, 7, 7, 0]
    assert [attention.rope is None for attention in attentions(config)] == [False, True, False, True]
    assert config.moe_layers == (0, 3)


def test_without_a_chunk_size_every_layer_sees_all_positions() -> None:
    config = parse(llama4_text(attention_chunk_size=None, no_rope_layer_interval=2))
    assert [attention.sliding_window for attention in attentions(config)] == [0, 0, 0, 0]
    assert [attention.rope is None for attention in attentions(config)] == [False, True, False, True]


def test_the_first_release_of_transformers_wrote_4_for_true() -> None:
    assert parse(llama4_text(attn_temperature_tuning=4)) == parse(llama4_text())
    untuned = parse(llama4_text(attn_temperature_tuning=False))
    assert {attention.query_scale for attention in attentions(untuned)} == {None}


@pytest.mark.parametrize("changes", [{}, {"num_local_experts": 128, "use_qk_norm": False}])
def test_a_gguf_file_has_the_same_layers(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = llama4_text(**OF_GGUF, **changes, rope_scaling=None)
    write_gguf_model(path, config, one_type("F32"), seed=3)
    found, expected = open_model(path).config, parse(config)
    assert found == replace(expected, eos_ids=found.eos_ids, layers=found.layers)
    ropes = [replace(a.rope, original_context=0) if a.rope else None for a in attentions(expected)]
    assert [replace(a.rope, original_context=0) if a.rope else None for a in attentions(found)] == ropes
    for one, other in zip(attentions(found), attentions(expected), strict=True):
        assert replace(one, rope=None) == replace(other, rope=None)


def test_a_gguf_file_divides_frequencies_instead_of_scaling_them(tmp_path: Path) -> None:
    path, config = tmp_path / "model.gguf", llama4_text(**OF_GGUF)
    write_gguf_model(path, config, one_type("F32"), seed=3)
    found, expected = (one.ropes[0] for one in (open_model(path).config, parse(config)))
    np.testing.assert_allclose(inverse_frequency(found), inverse_frequency(expected), rtol=1e-7)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama4.attention.sliding_window": 0}, "attention.sliding_window 0; supported: 8192"),
        ({"llama4.attention.sliding_window_pattern": 2}, "sliding_window_pattern 2; supported: 4"),
        ({"llama4.expert_gating_func": 1}, "expert_gating_func 1; supported: 0 or 2"),
    ],
)
def test_what_a_gguf_file_says_otherwise_is_refused(
    metadata: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, llama4_text(**OF_GGUF), one_type("F32"), seed=3, metadata=metadata)
    with pytest.raises(ArgosyError, match=message):
        open_model(path)


def test_experts_with_tensors_of_their_own_run_in_place(tmp_path: Path) -> None:
    """As in files of llm-compressor."""
    config, packed = llama4(), tmp_path / "transposed"
    write_model(packed, config, seed=3)
    directory = tmp_path / "apart"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = apart(random_tensors(config, 3, "BF16"))
    write_checkpoint(directory, {name: ("BF16", values) for name, values in tensors.items()})
    assert open_model(packed).has_strided_experts
    assert not open_model(directory).has_strided_experts
    prompt = prompt_ids(config, 3)
    logits = []
    for place in (directory, runnable(packed, tmp_path)):
        with Engine.open(place, memory="1GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    np.testing.assert_array_equal(*logits)
    assert difference(logits[0], NumpyModel(packed).logits(prompt)) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_layers_with_chunks_keep_what_a_chunk_sees(speculate: str, tmp_path: Path) -> None:
    """The plan counts window blocks for three of four layers; the answer is that of an engine that keeps all keys."""
    config = llama4_text(attention_chunk_size=32, max_position_embeddings=2048)
    write_model(tmp_path / "model", config, seed=3)
    directory = runnable(tmp_path / "model", tmp_path)
    prompt = 6 * prompt_ids(config, 3, 101)  # repeats itself, so that a lookup proposes tokens
    greedy = SamplingParams(max_tokens=70, ignore_eos=True, temperature=0)
    settings: dict[str, Any] = {"memory": "1GiB", "threads": 1, "max_sequences": 1, "chunk_tokens": 50}
    with Engine.open(directory, **settings, kv_dir=KvDir(path=tmp_path / "kept")) as engine:
        assert engine.plan.windows is None
        expected, all_bytes = engine.generate(prompt, greedy).token_ids, engine.plan.kv_bytes
    with Engine.open(directory, **settings, speculate=speculate) as engine:
        assert engine.plan.windows is not None
        assert engine.plan.windows.window == 32
        assert engine.plan.kv_bytes < all_bytes / 2
        assert engine.generate(prompt, greedy).token_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 2}, "num_experts_per_tok 2; supported: 1, the expert"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step 0; supported: 1 to 4"),
        ({"interleave_moe_layer_step": 5}, "interleave_moe_layer_step 5; supported: 1 to 4"),
        ({"moe_layers": [4]}, "moe_layers"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        ({"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers"),
        (
            {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 4},
            "attention_chunk_size is null",
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types 'sliding_attention'"),
        ({"attn_temperature_tuning": 3}, "attn_temperature_tuning is 3"),
        ({"attn_scale": -1}, "attn_scale"),
        ({"floor_scale": 0}, "floor_scale"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"mlp_bias": True}, "mlp_bias true"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgosyError, match=message):
        parse(llama4_text(**changes))
