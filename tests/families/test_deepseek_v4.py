"""DeepSeek-V4: the meaning of the config, refusals, logits against float64, and equal bits in every setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.config import CompressedConfig, ModelConfig, SinkhornResidual
from argosy.errors import ArgosyError, CheckpointError
from argosy.model.families import FAMILIES, open_model
from argosy.model.families.latent.deepseek_v4 import parse_config
from tests.models.gguf_deepseek_v4 import write_gguf
from tests.models.numpy_deepseek_v4 import DeepseekV4
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import read_header
from tests.models.tiny import prompt_ids, random_tensors, write_model
from tests.models.tiny_deepseek_v4 import deepseek_v4

WINDOWS: dict[str, Any] = {"compress_ratios": [0] * 4}


def parse(**changes: Any) -> ModelConfig:
    return FAMILIES["deepseek_v4"].parse_config(deepseek_v4(**{"num_hash_layers": 2} | changes))


def test_the_config_is_read() -> None:
    config = parse()
    assert [layer.has_token_experts for layer in config.layers] == [True, True, False, False]
    assert config.residual == SinkhornResidual(num_streams=4, iterations=20, eps=1e-6)
    assert config.router.score == "sqrt_softplus"
    assert config.router.scale == 1.5
    assert (config.activation.kind, config.activation.limit) == ("silu_limited", 10.0)
    window, compressed = config.ropes
    assert (window.theta, window.rotary_dim, window.is_interleaved) == (10_000.0, 8, True)
    assert (compressed.theta, compressed.kind, compressed.attention_factor) == (160_000.0, "yarn", 1.0)
    chosen = {"pool_": (4, 20, True), "index_pool_": (4, 12, True)}
    found = [layer.mixer.pools for layer in config.layers if isinstance(layer.mixer, CompressedConfig)]
    assert found == [{}, chosen, {"pool_": (128, 20, False)}, chosen]


def test_transformers_spelling_means_the_same() -> None:
    main = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.4}
    yarn = {"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}
    compress = main | yarn | {"rope_theta": 160_000.0, "original_max_position_embeddings": 64}
    csa = "compressed_sparse_attention"
    spelled = deepseek_v4(
        layer_types=["sliding_attention", csa, "heavily_compressed_attention", csa],
        mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        partial_rotary_factor=0.4,
        rope_parameters={"main": main, "compress": compress},
    )
    for key in ("compress_ratios", "num_hash_layers", "rope_scaling", "qk_rope_head_dim"):
        del spelled[key]
    assert parse_config(spelled) == parse()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"index_head_dim": 6}, "index_head_dim is 6, less than the 8 dimensions that rotate"),
        ({"compress_ratios": [0, 0, 0, 8]}, "supported: 0, 4, 128, not 8"),
        ({"compress_ratios": [0] * 3}, "compress_ratios has 3 entries, expected one for each of 4 layers"),
        ({"compress_rate_csa": 8}, "asks for compress_rate_csa 8; supported: 4 or null"),
        ({"scoring_func": "sigmoid"}, "asks for scoring_func 'sigmoid'; supported: sqrtsoftplus"),
        ({"norm_topk_prob": False}, "asks for norm_topk_prob false; supported: true"),
        ({"n_group": 8}, "asks for n_group 8"),
        ({"num_key_value_heads": 2}, "asks for num_key_value_heads 2; supported: 1"),
        ({"o_groups": 3}, "gives o_groups as 3, expected a divisor of the 4 heads"),
        ({"partial_rotary_factor": 0.8}, "qk_rope_head_dim as 8 and partial_rotary_factor as 0.8"),
        ({"mlp_layer_types": ["moe", "dense", "moe", "moe"]}, "mlp_layer_types 'dense'"),
        ({"compress_rope_theta": 1}, "the base of yarn's frequencies is 1.0, expected more than 1"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0"),
        ({"hc_mult": 1}, "hc_mult is 1,"),
        ({"hc_mult": 17}, "hc_mult is 17,"),
        ({"indexer_types": []}, "sets indexer_types"),
    ],
)  # fmt: skip
def test_other_configs_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(**changes)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 150),
        (
            {
                "compress_ratios": [128, 4, 4, 0],
                "num_hash_layers": 0,
                "index_topk": 500,
                "hc_sinkhorn_iters": 3,
            },
            280,
        ),
        (
            {
                **WINDOWS,
                "hc_mult": 3,
                "num_hash_layers": 0,
                "sliding_window": 17,
                "swiglu_limit": 0.4,
                "o_groups": 1,
            },
            70,
        ),
    ],
    ids=["every kind", "all entries", "windows"],
)
def test_logits_are_those_of_float64(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    config = deepseek_v4(**changes)
    for seed in range(9):
        tensors, tokens = random_tensors(config, seed, "F32"), prompt_ids(config, seed, length)
        model = DeepseekV4(config, {name: one.astype(np.float64) for name, one in tensors.items()})
        expected = model.logits(tokens)
        if model.margin > 1e-5:  # else float32 may choose otherwise
            break
    else:
        pytest.fail("no seed has clear choices")
    write_model(tmp_path, config, seed=seed, dtype="F32")
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(tokens), expected) <= LARGEST_DIFFERENCE


def test_expert_ids_outside_the_layer_are_named(tmp_path: Path) -> None:
    config = deepseek_v4()
    write_model(tmp_path, config, seed=5, dtype="F32")
    content = (tmp_path / "model.safetensors").read_bytes()
    header, begin = read_header(tmp_path / "model.safetensors")
    first = begin + header["layers.0.ffn.gate.tid2eid"]["data_offsets"][0]
    damaged = content[: first + 24] + (8).to_bytes(8, "little") + content[first + 32 :]
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(
        CheckpointError, match="tid2eid holds 8 at position 3 of 198; expected numbers from 0 to 7"
    ):
        Engine.open(tmp_path, memory="4GiB")


def test_no_budget_chunk_thread_prefix_or_pack_changes_a_bit(tmp_path: Path) -> None:
    config = deepseek_v4()
    write_model(tmp_path, config, seed=5, dtype="F32")
    tokens = np.random.default_rng(6).integers(3, config["vocab_size"], 150).tolist()
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3)
    packed = tmp_path / "packed"
    pack(open_model(tmp_path), packed, format="source")
    found = []
    for path, settings in (
        (tmp_path, {"threads": 1}),
        (tmp_path, {"threads": 3, "chunk_tokens": 7, "expert_slots": 2}),
        (tmp_path, {"threads": 2, "chunk_tokens": 16, "prefix_reuse": False}),
        (packed, {"threads": 2}),
    ):
        with Engine.open(path, memory="4GiB", **settings) as engine:
            for _ in range(2):  # the second prompt may begin with a prefix
                answer = engine.generate(tokens, greedy)
                found.append((list(answer.token_ids), answer.logprobs))
    assert all(one == found[0] for one in found)


def test_a_gguf_file_means_the_same(tmp_path: Path) -> None:
    config = deepseek_v4()
    write_model(tmp_path, config, seed=5, dtype="F32")
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config, 5, "F32"))
    own = open_model(tmp_path).config
    other = open_model(tmp_path / "model.gguf").config
    assert replace(other, eos_ids=own.eos_ids, bos_id=own.bos_id) == own
    tokens = np.random.default_rng(5).integers(3, config["vocab_size"], 40).tolist()
    found = []
    for path in (tmp_path, tmp_path / "model.gguf"):
        with Engine.open(path, memory="4GiB", threads=1) as engine:
            found.append(engine.logits(tokens))
    assert np.array_equal(*found)
