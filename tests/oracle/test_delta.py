"""Gated delta nets against transformers, beyond the checks that `test_oracle.py` makes for every configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.config import DeltaConfig
from argosy.model.families import open_model
from argosy.model.rope import inverse_frequency
from tests.models import tiny_delta
from tests.models.configurations import CONFIGURATIONS, Configuration
from tests.models.make_models import answer, load
from tests.models.random_models import write_decided_model
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.tiny import RawConfig, prompt_ids, text_of, write_model
from tests.models.tiny_delta import qwen3_5_moe, qwen3_5_moe_text, qwen3_next

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

DELTA = tuple(c for c in CONFIGURATIONS if c.config["model_type"] in tiny_delta.FAMILIES)


@pytest.mark.parametrize("configuration", DELTA, ids=lambda configuration: configuration.name)
def test_a_config_means_what_transformers_reads_from_it(configuration: Configuration, tmp_path: Path) -> None:
    write_model(tmp_path, configuration.config, seed=1)
    ours = open_model(tmp_path).config
    model = load(tmp_path)
    theirs, layers = model.config.get_text_config(), model.model.layers

    assert ours.num_layers == len(layers)
    kinds = ["delta" if hasattr(layer, "linear_attn") else "attention" for layer in layers]
    assert [
        "delta" if isinstance(layer.mixer, DeltaConfig) else "attention" for layer in ours.layers
    ] == kinds
    assert [layer.is_moe for layer in ours.layers] == [hasattr(layer.mlp, "experts") for layer in layers]
    net, delta = layers[kinds.index("delta")].linear_attn, ours.delta
    assert delta is not None
    assert (delta.num_key_heads, delta.num_value_heads) == (net.num_k_heads, net.num_v_heads)
    assert (delta.key_dim, delta.value_dim) == (net.head_k_dim, net.head_v_dim)
    assert (delta.conv_width, delta.conv_channels) == (net.conv_kernel_size, net.conv_dim)
    assert ours.norm_eps == net.norm.variance_epsilon == layers[0].input_layernorm.eps
    attention = layers[kinds.index("attention")].self_attn
    assert ours.attention.head_dim == attention.head_dim
    assert ours.attention.has_qkv_bias == (attention.q_proj.bias is not None)
    assert ours.attention.has_o_bias == (attention.o_proj.bias is not None)
    assert (ours.vocab_size, ours.hidden_size) == tuple(model.model.embed_tokens.weight.shape)
    assert ours.is_embedding_tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    router = layers[ours.moe_layers[0]].mlp.gate
    assert (ours.num_experts, ours.experts_per_token) == (router.num_experts, router.top_k)
    assert ours.router.renormalize == getattr(router, "norm_topk_prob", True)
    assert ours.context_tokens == theirs.max_position_embeddings
    assert list(ours.eos_ids) == [theirs.eos_token_id]
    rotary = model.model.rotary_emb
    np.testing.assert_allclose(inverse_frequency(ours.attention.rope), rotary.inv_freq.numpy(), rtol=1e-6)


# For each key, the sizes that its absence implies; everything else stays small.
ABSENT: dict[str, RawConfig] = {
    "full_attention_interval": {"full_attention_interval": 4, "num_hidden_layers": 4},
    "linear_conv_kernel_dim": {},
    "linear_num_key_heads": {"linear_num_key_heads": 16, "linear_num_value_heads": 16},
    "linear_num_value_heads": {"linear_num_value_heads": 32},
    "linear_key_head_dim": {"linear_key_head_dim": 128},
    "linear_value_head_dim": {"linear_value_head_dim": 128},
    "head_dim": {"head_dim": 256},
    "partial_rotary_factor": {},
    "rope_theta": {},
    "rope_parameters": {},
    "rms_norm_eps": {},
    "norm_topk_prob": {},
}


CASES = [
    pytest.param(make, missing, id=f"{make.__name__}-{missing}")
    for make in (qwen3_next, qwen3_5_moe_text, qwen3_5_moe)
    for missing in ABSENT
    if missing in text_of(make())
]


@pytest.mark.parametrize(("make", "missing"), CASES)
def test_an_absent_key_has_the_default_of_transformers(make: Any, missing: str, tmp_path: Path) -> None:
    config = make(**ABSENT[missing])
    write_model(tmp_path, config, seed=2)
    del text_of(config)[missing]
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = prompt_ids(config, 2, 12)
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(tmp_path, memory="4GiB", kv_dtype="f32", threads=1) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    "config",
    [
        qwen3_next(
            max_position_embeddings=1024,
            hidden_size=68,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=2,
            num_experts=16,
            num_experts_per_tok=4,
        ),
        qwen3_5_moe(max_position_embeddings=1024, hidden_size=68, linear_num_value_heads=8, head_dim=64),
    ],
    ids=["qwen3_next", "qwen3_5_moe"],
)
def test_a_long_prompt_equals_the_chunked_form_of_transformers(config: RawConfig, tmp_path: Path) -> None:
    """transformers updates the state in chunks of 64 tokens, by another formula; Argosy goes token by token."""
    for seed in range(20_000, 20_100):
        write_model(tmp_path, config, seed=seed)
        prompt = prompt_ids(config, seed, 400)
        reference = answer(load(tmp_path), prompt, num_tokens=8)
        if reference.router_margin > 1e-4:
            break
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    with Engine.open(
        tmp_path, memory="4GiB", kv_dtype="f32", threads=2, expert_slots=8, chunk_tokens=150
    ) as engine:
        assert difference(engine.logits(prompt), reference.logits) <= LARGEST_DIFFERENCE
        assert engine.generate(prompt, greedy).token_ids == reference.greedy


def random_config(seed: int) -> RawConfig:
    """A random combination of flags and sizes; sizes are small and awkward on purpose."""
    rng = np.random.default_rng([seed, 4])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    key_heads, num_experts, kv_heads = pick(1, 2, 3), pick(2, 5, 9), pick(1, 2)
    num_layers = pick(2, 3, 5)
    make = pick(qwen3_next, qwen3_5_moe_text, qwen3_5_moe)
    config: RawConfig = make(
        hidden_size=pick(12, 20, 36),
        num_hidden_layers=num_layers,
        layer_types=["full_attention", *(pick("linear_attention", "full_attention") for _ in range(num_layers - 2)),
                     "linear_attention"],
        num_attention_heads=kv_heads * pick(1, 3),
        num_key_value_heads=kv_heads,
        head_dim=pick(8, 24, 40),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * pick(1, 2, 4),
        linear_key_head_dim=pick(1, 7, 16, 33),
        linear_value_head_dim=pick(2, 8, 17, 64, 70),
        linear_conv_kernel_dim=pick(1, 2, 4, 6),
        num_experts=num_experts,
        num_experts_per_tok=int(rng.integers(1, num_experts + 1)),
        moe_intermediate_size=pick(1, 7, 32),
        shared_expert_intermediate_size=pick(1, 16, 33),
        vocab_size=pick(60, 130),
        attention_bias=pick(True, False),
        tie_word_embeddings=pick(True, False),
        rms_norm_eps=pick(1e-5, 1e-6),
    )  # fmt: skip
    if make is qwen3_next:
        config |= {
            "mlp_only_layers": [0],
            "partial_rotary_factor": pick(0.25, 0.5, 1.0),
            "norm_topk_prob": pick(True, False),
        }
    return config


@pytest.mark.parametrize("seed", range(12))
def test_random_configurations_equal_transformers(seed: int, tmp_path: Path) -> None:
    prompt = write_decided_model(
        tmp_path, Configuration(name="random", config=random_config(seed)), num_tokens=70
    )
    with torch.no_grad():
        expected = load(tmp_path)(input_ids=torch.tensor([prompt])).logits[0].numpy()
    with Engine.open(
        tmp_path, memory="4GiB", threads=1 + seed % 2, chunk_tokens=(7, 64, 256)[seed % 3]
    ) as engine:
        assert difference(engine.logits(prompt), expected) <= LARGEST_DIFFERENCE


def test_a_pack_answers_like_its_source(tmp_path: Path) -> None:
    """The bounds are those of the other families. Every expert is chosen, so that no rounded score changes a choice.

    Delta net heads are 64 wide: with ten dimensions, many sums would be close to zero, and the norm would amplify
    their rounding errors.
    """
    config = qwen3_next(
        hidden_size=128,
        moe_intermediate_size=96,
        num_experts=6,
        num_experts_per_tok=6,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    write_model(tmp_path / "source", config, seed=20_000)
    prompt = prompt_ids(config, 20_000)
    with torch.no_grad():
        expected = load(tmp_path / "source")(input_ids=torch.tensor([prompt])).logits[0].numpy()
    logits = {}
    for format in ("bf16", "q8", "q4"):
        pack(open_model(tmp_path / "source"), tmp_path / format, format=format)
        with Engine.open(tmp_path / format, memory="4GiB", kv_dtype="f32", threads=1) as engine:
            logits[format] = engine.logits(prompt)
    assert difference(logits["bf16"], expected) <= LARGEST_DIFFERENCE
    assert mean_divergence(expected, logits["q8"]) < 0.002
    assert mean_divergence(expected, logits["q4"]) < 0.04
