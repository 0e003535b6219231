"""Kimi-K3: the meaning of the config, refusals, and logits against float64, from safetensors and from GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.checkpoint.files import ExpertMatrix
from argosy.checkpoint.geometry import count_parameters
from argosy.config import ActivationConfig, BankResidual, KimiDeltaConfig, ModelConfig
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES, open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.families.published_recurrent import KIMI_K3
from tests.models.gguf_k3 import write_k3_gguf
from tests.models.hub_schemes import KINDS, fp4, write_kind
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import read_safetensors
from tests.models.tiny import RawConfig, prompt_ids, random_tensors, write_model
from tests.models.tiny_k3 import PEER_BLOCKS, PEER_LOGITS, PEER_SEED, NumpyK3, kimi_k3, kimi_k3_for_peer


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["kimi_k3"].parse_config(raw)


def test_the_released_model_is_read() -> None:
    config = parse(KIMI_K3)
    total, active = count_parameters(config)
    assert (round(total / 1e12, 1), round(active / 1e9)) == (2.8, 105)
    assert len(config.recurrent_layers) == 69
    assert config.residual == BankResidual(block=12, num_blocks=8)
    assert config.activation == ActivationConfig(kind="situ", limit=25.0, alpha=4.0)
    assert config.layers[0].mixer == KimiDeltaConfig(
        num_heads=96, head_dim=128, conv_width=4, decay_rank=128, floor=-5.0
    )
    assert config.latent is not None
    assert (config.latent.gate_rows, config.latent.rope) == (96 * 128, None)
    assert (config.expert_latent, config.has_latent_norm, config.shared_width) == (3584, True, 6144)
    assert config.eos_ids == (163_586,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "silu"}, "asks for hidden_act 'silu'; supported: situ"),
        ({"mla_use_nope": False}, "asks for mla_use_nope false; supported: true"),
        ({"moe_router_activation_func": "softmax"}, "asks for moe_router_activation_func 'softmax'"),
        (
            {"num_hidden_layers": 93, "linear_attn_config": KIMI_K3["text_config"]["linear_attn_config"]},
            "at most 15 blocks of layers",
        ),
        (
            {
                "linear_attn_config": KIMI_K3["text_config"]["linear_attn_config"]
                | {"use_full_rank_gate": False}
            },
            "asks for use_full_rank_gate false",
        ),
        ({"indexer": 1}, "but kimi_k3 does not know this key"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgosyError) as caught:
        parse(kimi_k3(**changes))
    assert sentence in str(caught.value)


def test_situ_has_no_default_limits() -> None:
    raw = kimi_k3()
    del raw["text_config"]["activation_situ_beta"]
    with pytest.raises(ArgosyError, match="no activation_situ_beta"):
        parse(raw)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "BF16"),
        ({"attn_res_block_size": 3, "activation_situ_beta": 0.5, "activation_situ_linear_beta": 0.7,
          "routed_scaling_factor": 1.7, "first_k_dense_replace": 2, "rms_norm_eps": 1e-3}, "F32"),
        ({"routed_expert_hidden_size": None, "mla_use_output_gate": False, "attn_res_block_size": None}, "F32"),
        ({"latent_moe_use_norm": False, "num_shared_experts": 1, "attn_res_block_size": 1}, "F32"),
    ],
)  # fmt: skip
def test_logits_are_those_of_float64(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    config = kimi_k3(**changes)
    write_model(tmp_path, config, seed=8, dtype=dtype)
    prompt = prompt_ids(config, 8)
    model = NumpyK3(config, random_tensors(config, 8, dtype))
    expected = model.logits(prompt)
    assert model.router_margin > 1e-4
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("block", PEER_BLOCKS)
def test_logits_are_llama_cpp_s(block: int, tmp_path: Path) -> None:
    config, expected = kimi_k3_for_peer(block), read_safetensors(PEER_LOGITS)[f"block_{block}"]
    write_model(tmp_path, config, seed=PEER_SEED, dtype="F32")
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        logits = engine.logits(prompt_ids(config, PEER_SEED))
    assert mean_divergence(expected, logits) <= 1e-6  # llama.cpp keeps keys and values in 16 bits


def test_experts_in_mxfp4_have_the_logits_of_their_values(tmp_path: Path) -> None:
    """As the released files have them: compressed-tensors' codes and scales, everything else in bf16."""
    config = kimi_k3(  # every expert is chosen, so that rounded activations flip no choice
        routed_expert_hidden_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_token=4
    )
    codes = fp4(32, "U8", "weight_packed")
    kind = replace(KINDS["ct mxfp4"], quantise={f".w{matrix}.": codes for matrix in (1, 2, 3)})
    plain, prompt, found = write_kind(tmp_path / "coded", config, kind, seed=2), prompt_ids(config, 2), []
    assert {matrix.format for matrix in expert_matrices(tmp_path / "coded")} == {"mxfp4"}
    for path in (plain, tmp_path / "coded"):
        with Engine.open(path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
            found.append(engine.logits(prompt))
    assert mean_divergence(*found) <= LARGEST_DIVERGENCE


def expert_matrices(path: Path) -> list[ExpertMatrix]:
    return [
        one for record in open_model(path).experts.values() for one in (record.gate, record.up, record.down)
    ]


def test_a_gguf_file_has_the_same_logits(tmp_path: Path) -> None:
    config = kimi_k3(attn_res_block_size=3)
    tensors = random_tensors(config, 5, "F32")
    write_k3_gguf(tmp_path / "k3.gguf", config, tensors)
    prompt = prompt_ids(config, 5)
    model = NumpyK3(config, tensors)
    expected = model.logits(prompt)
    assert model.router_margin > 1e-4
    with Engine.open(tmp_path / "k3.gguf", memory="4GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE
