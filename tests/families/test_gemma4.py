"""Gemma-4 with experts: the meaning of the config, the defaults of absent keys, ignored tensors, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.budget.footprint import kv_bytes
from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.config import KV_BLOCK_TOKENS, ActivationConfig, ModelConfig, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from argosy.model.rope import inverse_frequency
from tests.engine.test_gguf import LARGEST_DIVERGENCE
from tests.families.published import GEMMA_4_26B
from tests.helpers.examples import few_of
from tests.helpers.mixers import attentions, windows
from tests.models.gguf_gemma import write_gemma_gguf
from tests.models.gguf_models import one_type
from tests.models.references import LARGEST_DIFFERENCE, difference, mean_divergence
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, random_tensors, write_model
from tests.models.tiny_gemma import gemma4

SLIDING, FULL = "sliding_attention", "full_attention"


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES["gemma4"].parse_config(raw)


def test_the_hub_s_config_is_read() -> None:
    config = parse(GEMMA_4_26B)

    assert (config.num_layers, len(config.moe_layers)) == (30, 30)
    layers = attentions(config)
    full = [i for i, layer in enumerate(layers) if not layer.sliding_window]
    assert full == [5, 11, 17, 23, 29]
    assert set(windows(config)) == {0, 1024}
    assert {(layers[i].num_kv_heads, layers[i].head_dim) for i in full} == {(2, 512)}
    assert (layers[0].num_kv_heads, layers[0].head_dim, layers[0].num_heads) == (8, 256, 16)
    assert [i for i, layer in enumerate(layers) if layer.keys_are_values] == full
    assert [i for i, layer in enumerate(layers) if layer.is_causal] == full
    assert config.router == RouterConfig(renormalize=True, has_norm=True, has_expert_scale=True)
    assert config.activation == ActivationConfig(kind="gelu_tanh")
    assert (config.shared_width, config.expert_width) == (2112, 704)
    assert (config.num_experts, config.experts_per_token) == (128, 8)
    assert (config.attention.scale, config.logit_cap, config.norm_offset) == (1.0, 30.0, 0.0)
    assert config.embedding_scale == pytest.approx(2816**0.5)
    assert config.is_embedding_tied
    assert (config.eos_ids, config.bos_id) == ((1, 106), 2)


def test_each_kind_of_layer_has_its_rotary_embedding() -> None:
    config = parse(GEMMA_4_26B)
    sliding, full = config.ropes

    assert (attentions(config)[0].rope, attentions(config)[5].rope) == (sliding, full)
    np.testing.assert_allclose(inverse_frequency(sliding), 1e4 ** (-np.arange(128) / 128))
    frequency = inverse_frequency(full)  # a quarter of the pairs turns, at the frequencies of the whole head
    np.testing.assert_allclose(frequency[:64], 1e6 ** (-np.arange(64) / 256))
    assert len(frequency) == 256
    assert not frequency[64:].any()


def test_layers_keep_keys_and_values_of_their_own_sizes() -> None:
    config = parse(GEMMA_4_26B)
    per_token = kv_bytes(config, KV_BLOCK_TOKENS, "f16") // KV_BLOCK_TOKENS
    assert per_token == 2 * 2 * (25 * 8 * 256 + 5 * 2 * 512)


def test_both_spellings_of_the_heads_mean_the_same() -> None:
    text = GEMMA_4_26B["text_config"]
    kept = {k: v for k, v in text.items() if k not in ("global_head_dim", "num_global_key_value_heads")}
    own = {str(layer): {"head_dim": 512, "num_key_value_heads": 2} for layer in (5, 11, 17, 23, 29)}
    assert parse(GEMMA_4_26B | {"text_config": kept | {"per_layer_config": own}}) == parse(GEMMA_4_26B)


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    needed = {
        "enable_moe_block": True, "hidden_size_per_layer_input": 0, "moe_intermediate_size": 8, "num_experts": 4,
        "top_k_experts": 2,
    }  # fmt: skip
    config = parse({"model_type": "gemma4", "text_config": needed})

    assert (config.vocab_size, config.hidden_size, config.num_layers) == (262_144, 2304, 30)
    first, full = attentions(config)[0], attentions(config)[5]
    assert (first.num_heads, first.num_kv_heads, first.head_dim, full.head_dim) == (8, 4, 256, 512)
    assert (full.num_kv_heads, full.keys_are_values) == (4, False)
    assert windows(config)[3:7] == [512, 512, 0, 512]
    assert all(layer.is_causal for layer in attentions(config))
    assert (config.context_tokens, config.norm_eps, config.shared_width) == (131_072, 1e-6, 9216)
    assert (config.logit_cap, config.is_embedding_tied) == (0.0, True)
    assert [(rope.theta, rope.turning_pairs) for rope in config.ropes] == [(1e4, None), (1e6, 64)]
    assert (config.eos_ids, config.bos_id) == ((1,), 2)
    for key in ("moe_intermediate_size", "num_experts", "top_k_experts"):
        with pytest.raises(CheckpointError, match=rf"text_config: {key} is null; expected a whole number"):
            parse({"model_type": "gemma4", "text_config": {k: v for k, v in needed.items() if k != key}})


def test_the_last_layer_is_full_whatever_the_config_says() -> None:
    config = parse(gemma4(layer_types=[SLIDING] * 3))
    assert windows(config) == [8, 8, 0]
    assert [layer.head_dim for layer in attentions(config)] == [12, 12, 20]


def ropes(**changes: Any) -> dict[str, Any]:
    full = {"rope_type": "proportional", "rope_theta": 1e6}
    return {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: full} | changes


REFUSED: list[tuple[RawConfig, str]] = [
    (gemma4(enable_moe_block=False), "text_config asks for enable_moe_block false; supported: true"),
    (gemma4(hidden_size_per_layer_input=256), "asks for hidden_size_per_layer_input 256; supported: 0"),
    (gemma4(num_kv_shared_layers=2), "text_config asks for num_kv_shared_layers 2; supported: 0"),
    (gemma4(attention_bias=True), "text_config asks for attention_bias true; supported: false"),
    (gemma4(use_bidirectional_attention="all"),
     "text_config asks for use_bidirectional_attention 'all'; supported: vision"),
    (gemma4(hidden_activation="silu"), "asks for hidden_activation 'silu'; supported: gelu_pytorch_tanh"),
    (gemma4(layer_types=["chunked_attention"] * 3),
     "asks for layer_types 'chunked_attention'; supported: sliding_attention, full_attention"),
    (gemma4(layer_types=[FULL]), "layer_types has 1 entries, expected one for each of 3 layers"),
    (gemma4(attn_logit_softcapping=50.0), "text_config sets attn_logit_softcapping to 50.0, but gemma4 does not know"),
    (gemma4(model_type="gemma3_text"), "asks for model_type 'gemma3_text'; supported: gemma4_text"),
    (gemma4() | {"hearing_aid": 1}, "config.json sets hearing_aid to 1, but gemma4 does not know this key"),
    (gemma4(num_global_key_value_heads=3),
     "gives layers with full_attention 3 key heads, expected a divisor of num_attention_heads, which is 4"),
    (gemma4(per_layer_config={"2": {"head_dim": 20}}),
     "gives the heads of layers twice, in per_layer_config and in global_head_dim"),
    (gemma4(rope_parameters=ropes(**{FULL: None})), "rope_parameters.full_attention is None, expected an object"),
    (gemma4(rope_parameters=ropes(chunked_attention={})), "rope_parameters sets chunked_attention; supported: "),
    (gemma4(rope_parameters=ropes(**{FULL: {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}})),
     "rope_parameters.full_attention asks for rope_type yarn; supported: default, linear, proportional"),
    (gemma4(rope_parameters=ropes(**{FULL: {"rope_type": "proportional", "rope_theta": 1e6, "beta_fast": 4.0}})),
     "rope_parameters.full_attention sets beta_fast to 4.0, but kind 'proportional' does not know this key"),
    (gemma4(rope_parameters=ropes(**{FULL: {"rope_type": "proportional"}})),
     "rope_parameters.full_attention does not give rope_theta"),
    (gemma4(rope_parameters=ropes(**{SLIDING: {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})),
     "rope_parameters.sliding_attention asks for partial_rotary_factor 0.5; supported: 1.0 for kind 'default'"),
    (gemma4(rope_parameters=ropes(**{FULL: {"rope_type": "proportional", "rope_theta": 1e6,
                                            "partial_rotary_factor": 0.05}})),
     "gives partial_rotary_factor 0.05 of 20 dimensions, expected at least one pair and at most all of them"),
    (gemma4(rope_parameters=ropes(**{FULL: {"rope_type": "proportional", "rope_theta": 1e6,
                                            "partial_rotary_factor": 1.5}})),
     "gives partial_rotary_factor 1.5 of 20 dimensions"),
    (gemma4(head_dim=13), "gives heads of 13 dimensions, but rotary embedding needs an even number"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_unsupported_features_are_refused_by_name(config: RawConfig, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(config)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"0": {"head_dim": 16}}, "asks for per_layer_config {'0': {'head_dim': 16}}; supported: the same heads"),
        ({"2": {"sliding_window": 4}}, "per_layer_config.2 sets sliding_window to 4, but gemma4 does not know"),
        ({"3": {}}, "per_layer_config is '3', text; expected a number from 0 to 2 as a key"),
        ({"9" * 5000: {}}, "expected a number from 0 to 2 as a key"),
        ({"1": 4}, "expected an object under each number"),
    ],
)  # fmt: skip
def test_overrides_of_layers_are_read_strictly(given: dict[str, Any], sentence: str) -> None:
    raw = gemma4(per_layer_config=given)
    for key in ("global_head_dim", "num_global_key_value_heads"):
        del raw["text_config"][key]
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    assert sentence in str(caught.value)


def test_another_family_refuses_a_proportional_rotary_embedding() -> None:
    raw = {"model_type": "qwen3_moe", "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}
    with pytest.raises(
        UnsupportedModel, match=r"proportional; supported: default, linear, dynamic, yarn, llama3$"
    ):
        FAMILIES["qwen3_moe"].parse_config(raw)


def test_every_tensor_of_the_text_part_is_located(tmp_path: Path) -> None:
    files = open_model(write_model(tmp_path, gemma4(), seed=3))
    tensors = read_checkpoint(tmp_path)
    experts = {name for name in tensors if ".experts." in name}
    assert {ref.name for ref in files.dense.values()} | experts == {
        name for name in tensors if name.startswith("model.language_model.")
    }
    names = {name: ref.name.removeprefix("model.language_model.") for name, ref in files.dense.items()}
    assert names["layers.0.attn_post_norm"] == "layers.0.post_attention_layernorm.weight"
    assert names["layers.0.mlp_norm"] == "layers.0.pre_feedforward_layernorm.weight"
    assert names["layers.0.expert_norm"] == "layers.0.pre_feedforward_layernorm_2.weight"
    assert names["layers.0.shared_post_norm"] == "layers.0.post_feedforward_layernorm_1.weight"
    assert names["layers.0.layer_scale"] == "layers.0.layer_scalar"
    assert ("layers.0.v" in names, "layers.2.v" in names) == (True, False)
    nbytes = sum(2 * t.size for name, t in tensors.items() if name.startswith("model.language_model."))
    assert files.dense_bytes + files.expert_bytes == nbytes


def test_only_the_towers_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(gemma4(), 3, "BF16")

    def open_with(name: str) -> None:
        write_model(tmp_path, gemma4(), seed=3)
        changed = tensors | {name: np.ones((4, 4), np.float32)}
        write_checkpoint(tmp_path, {key: ("BF16", tensor) for key, tensor in changed.items()})
        open_model(tmp_path)

    for name in (
        "model.audio_tower.proj.weight",
        "model.embed_audio.weight",
        "model.vision_tower.layers.0.weight",
    ):
        open_with(name)
    for name in ("model.language_model.layers.2.self_attn.v_proj.weight", "model.towers.weight"):
        with pytest.raises(CheckpointError, match=rf"{name} \[4, 4\]: a gemma4 model with this config"):
            open_with(name)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# Rows are whole blocks of every type.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "global_head_dim": 64,
}


@pytest.mark.parametrize(
    "type_name", few_of(("F32", "F16", "Q8_0", "Q4_K", "NVFP4", "IQ2_KS"), ("F32", "Q4_K", "NVFP4"))
)
def test_a_gguf_answers_as_its_dequantised_weights(type_name: str, tmp_path: Path) -> None:
    # Every expert is chosen, as a rounded score that changed a choice would hide what rounding costs.
    config = gemma4(**SIZES, num_experts=4, top_k_experts=4)
    path = tmp_path / "model.gguf"
    directory = write_gemma_gguf(path, config, one_type(type_name), seed=3)
    apart = tmp_path / "apart.gguf"
    write_gemma_gguf(apart, config, one_type(type_name), seed=3, are_experts_apart=True)
    prompt = prompt_ids(config, 5)
    logits = []
    for place in (directory, path, apart):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    if type_name == "F32":
        assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert mean_divergence(logits[0], logits[1]) <= LARGEST_DIVERGENCE
    np.testing.assert_array_equal(logits[1], logits[2])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("gemma") / "model.gguf"
    write_gemma_gguf(path, gemma4(), one_type("F32"), seed=3)
    return read_gguf(path)


def test_a_gguf_means_the_same_as_config_json(gguf: GgufFile) -> None:
    config = FAMILIES["gemma4"].open_gguf(gguf).config
    assert config == replace(parse(gemma4()), eos_ids=(1,), bos_id=None)
    assert len(set(map(id, config.layers))) == 2  # equal layers share one object


def test_experts_whose_factors_are_folded_into_their_matrices_have_no_others(gguf: GgufFile) -> None:
    tensors = {name: ref for name, ref in gguf.tensors.items() if not name.endswith("ffn_down_exps.scale")}
    assert not FAMILIES["gemma4"].open_gguf(replace(gguf, tensors=tensors)).config.router.has_expert_scale
    tensors["blk.1.ffn_down_exps.scale"] = gguf.tensors["blk.1.ffn_down_exps.scale"]
    with pytest.raises(
        CheckpointError, match=r"blk\.1\.ffn_down_exps\.scale \[6\]: a gemma4 model with these"
    ):
        FAMILIES["gemma4"].open_gguf(replace(gguf, tensors=tensors))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("attention.shared_kv_layers", 2, "attention.shared_kv_layers 2; supported: 0"),
        ("embedding_length_per_layer_input", 256, "embedding_length_per_layer_input 256; supported: 0"),
        ("attention.value_length", 24, "attention.value_length 24; supported: 20"),
        ("attention.value_length_swa", 24, "attention.value_length_swa 24; supported: 12"),
        ("rope.dimension_count", 10, "rope.dimension_count 10; supported: 20"),
        ("rope.dimension_count_swa", 6, "rope.dimension_count_swa 6; supported: 12"),
        ("attention.head_count_kv", 3, "head_count_kv 3; supported: divisors of 4, the number of heads"),
        (
            "attention.sliding_window_pattern",
            None,
            "sliding_window_pattern is 'None', expected a flag for each layer",
        ),
        ("rope.scaling.factor", 2.0, "rope.scaling.factor"),
        ("expert_count", None, "is a Gemma-4 without experts; supported: those with experts"),
    ],
)
def test_a_gguf_with_other_mathematics_is_refused(
    key: str, value: object, error: str, gguf: GgufFile
) -> None:
    metadata: dict[str, Any] = dict(gguf.metadata) | {f"gemma4.{key}": value}
    if value is None:
        del metadata[f"gemma4.{key}"]
    with pytest.raises(CheckpointError, match=error):
        FAMILIES["gemma4"].open_gguf(replace(gguf, metadata=metadata))


def test_a_gguf_without_frequencies_or_with_others_is_refused(gguf: GgufFile, tmp_path: Path) -> None:
    without = {name: ref for name, ref in gguf.tensors.items() if name != "rope_freqs.weight"}
    with pytest.raises(CheckpointError, match=r"has no tensor rope_freqs\.weight"):
        FAMILIES["gemma4"].open_gguf(replace(gguf, tensors=without))
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf.path.read_bytes())
    with open(path, "r+b") as file:
        file.seek(gguf.tensors["rope_freqs.weight"].offset)
        file.write(np.float32(2.0).tobytes())
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight divides frequencies by other numbers"):
        open_model(path)
