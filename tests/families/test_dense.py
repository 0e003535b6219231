"""Qwen3, Llama, Mistral and Gemma 3: the meaning of their configs and GGUF files, defaults, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine
from argosy.checkpoint.gguf import GgufArray, GgufFile, read_gguf
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.engine.test_gguf import LARGEST_DIVERGENCE, mean_divergence
from tests.families import published_dense as published
from tests.helpers.mixers import attentions, windows
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.safetensors_file import read_checkpoint, write_checkpoint
from tests.models.tiny import RawConfig, prompt_ids, write_model
from tests.models.tiny_dense import gemma3, gemma3_text, granite, llama, mistral, qwen2, qwen3
from tests.models.tiny_ministral import ministral3

Make = Callable[..., RawConfig]


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


@pytest.mark.parametrize(
    "make", [qwen3, qwen2, granite, llama, mistral, gemma3_text, gemma3], ids=lambda make: make.__name__
)
def test_no_layer_has_experts(make: Make) -> None:
    config = parse(make())
    assert (config.moe_layers, config.num_experts, config.experts_per_token, config.dense_width) == (
        (),
        0,
        0,
        18,
    )


def test_qwen3_has_windows_from_a_layer_on_or_where_layer_types_says() -> None:
    used = {"use_sliding_window": True, "sliding_window": 7}
    assert windows(parse(qwen3(sliding_window=7))) == [0, 0, 0]
    assert windows(parse(qwen3(**used, max_window_layers=2))) == [0, 0, 7]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(parse(qwen3(**used, layer_types=kinds))) == [7, 0, 7]
    assert parse(qwen3()).attention.qk_norm == "head"


def test_mistral_s_window_is_4096_unless_it_is_null() -> None:
    absent = {key: value for key, value in mistral().items() if key != "sliding_window"}
    assert (windows(parse(absent)), windows(parse(mistral()))) == ([4096] * 3, [0] * 3)


def test_gemma3_s_layers_differ_in_window_and_rotary_embedding() -> None:
    config = parse(published.GEMMA_3_4B)
    assert windows(config)[:7] == [1024] * 5 + [0, 1024]
    local, whole = attentions(config)[0], attentions(config)[5]
    assert (local.rope and local.rope.theta, whole.rope and whole.rope.theta) == (1e4, 1e6)
    assert (local.rope and local.rope.kind, whole.rope and whole.rope.kind) == ("default", "linear")
    assert (whole.num_heads, whole.num_kv_heads, whole.head_dim, whole.scale) == (8, 4, 256, 1 / 16)
    assert (config.eos_ids, config.bos_id, config.is_embedding_tied) == ((1, 106), 2, True)
    assert attentions(parse(published.GEMMA_3_27B))[0].scale == 168**-0.5


def test_both_spellings_of_gemma3_s_rotary_embeddings_mean_the_same() -> None:
    old = gemma3_text(rope_scaling={"factor": 8.0, "rope_type": "linear"})
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    }
    assert parse(new) == parse(old)


@pytest.mark.parametrize(
    ("make", "changes", "sentence"),
    [
        (qwen3, {"num_experts": 8}, "sets num_experts to 8, but qwen3 does not know this key"),
        (qwen3, {"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        (qwen3, {"layer_types": ["sliding_attention"] * 3}, "because the other keys turn windows off"),
        (qwen3, {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected one for each of 3"),
        (qwen3, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type longrope; supported: "),
        (qwen2, {"layer_types": ["sliding_attention"] * 3}, "because the other keys turn windows off"),
        (qwen2, {"attention_bias": True}, "sets attention_bias to true, but qwen2 does not know this key"),
        (granite, {"mlp_bias": True}, "mlp_bias true; supported: false"),
        (
            granite,
            {"num_local_experts": 4},
            "sets num_local_experts to 4, but granite does not know this key",
        ),
        (granite, {"logits_scaling": 0}, "logits_scaling is 0"),
        (llama, {"mlp_bias": True}, "mlp_bias true; supported: false"),
        (llama, {"num_key_value_heads": 4}, "num_attention_heads is 6, expected a multiple"),
        (llama, {"pretraining_tp": 2}, "pretraining_tp 2; supported: 1"),
        (
            mistral,
            {"layer_types": ["sliding_attention"] * 3},
            "sliding_attention'; supported: full_attention",
        ),
        (mistral, {"attention_bias": True}, "attention_bias true; supported: false"),
        (gemma3_text, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0; supported: null"),
        (
            gemma3_text,
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention true; supported: false",
        ),
        (
            gemma3_text,
            {"hidden_activation": "silu"},
            "hidden_activation 'silu'; supported: gelu_pytorch_tanh",
        ),
        (gemma3_text, {"sliding_window": None}, "sliding_window is null"),
        (gemma3_text, {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type yarn; supported: "),
        (gemma3, {"query_pre_attn_scalar": 0}, "text_config: query_pre_attn_scalar is 0"),
    ],
)
def test_what_a_config_may_not_ask_for(make: Make, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel)) as refused:
        parse(make(**changes))
    assert sentence in str(refused.value)


def test_an_absent_key_has_the_default_of_the_config_class() -> None:
    config = parse({"model_type": "qwen3"})
    assert (config.hidden_size, config.num_layers, config.dense_width, config.vocab_size) == (
        4096,
        32,
        22_016,
        151_936,
    )
    config = parse({"model_type": "qwen2"})
    assert (config.hidden_size, config.dense_width, config.vocab_size) == (4096, 22_016, 151_936)
    config = parse({"model_type": "granite"})
    assert (config.dense_width, config.context_tokens, config.attention.scale) == (11_008, 2048, 1.0)
    config = parse({"model_type": "llama"})
    assert (config.dense_width, config.context_tokens, config.attention.num_kv_heads) == (11_008, 2048, 32)
    config = parse({"model_type": "mistral"})
    assert (config.dense_width, config.context_tokens, config.attention.num_kv_heads) == (14_336, 131_072, 8)
    config = parse({"model_type": "gemma3_text"})
    assert (config.hidden_size, config.num_layers, config.dense_width, config.vocab_size) == (
        2304,
        26,
        9216,
        262_208,
    )
    assert (config.attention.num_heads, config.attention.num_kv_heads, config.attention.head_dim) == (
        8,
        4,
        256,
    )


def test_gemma3_s_tensors_are_found_under_both_names_of_transformers(tmp_path: Path) -> None:
    old = write_model(tmp_path / "old", gemma3(), seed=3)
    new = write_model(tmp_path / "new", gemma3(), seed=3)
    tensors = {
        name.replace("language_model.model.", "model.language_model."): values
        for name, values in read_checkpoint(old).items()
    }
    (new / "model.safetensors").unlink()
    write_checkpoint(new, {name: ("BF16", values) for name, values in tensors.items()})
    logits = []
    for place in (old, new):
        with Engine.open(place, memory="2GiB", threads=1) as engine:
            logits.append(engine.logits(prompt_ids(gemma3(), 5)))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_that_only_embeds_has_other_names_and_no_head(is_tied: bool, tmp_path: Path) -> None:
    config = qwen3(tie_word_embeddings=is_tied)
    whole = write_model(tmp_path / "whole", config, seed=3)
    base = write_model(tmp_path / "base", config, seed=3)
    tensors = {name.removeprefix("model."): values for name, values in read_checkpoint(whole).items()}
    tensors.pop("lm_head.weight", None)
    (base / "model.safetensors").unlink()
    write_checkpoint(base, {name: ("BF16", values) for name, values in tensors.items()})
    assert open_model(base).config.is_embedding_tied
    found = []
    for place in (whole, base):
        with Engine.open(place, memory="2GiB", threads=1) as engine:
            found.append(engine.embed([prompt_ids(config, 5)]))
    np.testing.assert_array_equal(*found)
    # A model with the usual names needs its head.
    tensors = {f"model.{name}": values for name, values in tensors.items()}
    write_checkpoint(base, {name: ("BF16", values) for name, values in tensors.items()})
    if not is_tied:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
            open_model(base)


# llama.cpp knows the layers that see all, and the factor of scores, by rules; its files do not have them.
GEMMA: dict[str, Any] = {"num_hidden_layers": 6, "sliding_window_pattern": 6, "query_pre_attn_scalar": 12}
IN_GGUF = {
    "qwen3": qwen3(),
    "qwen2": qwen2(),
    "granite": granite(),
    "llama": llama(rope_scaling=None),
    "mistral": mistral(sliding_window=7),
    "ministral3": ministral3(sliding_window=9),
    "gemma3_text": gemma3_text(**GEMMA, final_logit_softcapping=9.0, tie_word_embeddings=False),
    "gemma3": gemma3(**GEMMA),
}


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_means_the_same_as_config_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, IN_GGUF[name], one_type("F32"), seed=3)
    found, expected = open_model(path).config, parse(IN_GGUF[name])
    assert found == replace(expected, family=found.family, norm_offset=0.0)
    file = read_gguf(path)
    metadata = dict(file.metadata) | {f"{file.text('general.architecture')}.odd": 3}
    with pytest.raises(UnsupportedModel, match="odd"):
        FAMILIES[name].open_gguf(replace(file, metadata=metadata))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", IN_GGUF)
@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_a_gguf_answers_as_its_dequantised_weights(name: str, type_name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_attention_heads": 4}
    if name.startswith("gemma3"):
        sizes["query_pre_attn_scalar"] = 64
    config: RawConfig = IN_GGUF[name]
    config = config | (sizes if name != "gemma3" else {"text_config": config["text_config"] | sizes})
    path = tmp_path / "model.gguf"
    directory = write_gguf_model(path, config, one_type(type_name), seed=3)
    prompt = prompt_ids(config, 5)
    logits = []
    for place in (directory, path):
        with Engine.open(place, memory="4GiB", threads=1) as engine:
            logits.append(engine.logits(prompt))
    if type_name == "F32":
        assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE
    assert mean_divergence(logits[0], logits[1]) <= LARGEST_DIVERGENCE


def reranker(path: Path, labels: list[str], *, tied: bool) -> GgufFile:
    """A GGUF of a reranker whose tokens have numbers as names; its classifier is rows 3 and 4 of its head."""

    def texts(key: str, values: list[str]) -> GgufArray:
        raw = b"".join(len(value).to_bytes(8, "little") + value.encode() for value in values)
        return GgufArray(path, key, 8, len(values), raw)

    config = qwen3(tie_word_embeddings=tied)
    write_gguf_model(path, config, one_type("F32"), seed=3)
    file = read_gguf(path)
    tensors = dict(file.tensors)
    head = tensors["token_embd.weight"] if tied else tensors.pop("output.weight")
    tensors["cls.output.weight"] = replace(head.rows(3, 2), name="cls.output.weight")
    names = {
        "qwen3.classifier.output_labels": labels,
        "tokenizer.ggml.tokens": [str(number) for number in range(config["vocab_size"])],
    }
    metadata = {**file.metadata, **{key: texts(key, values) for key, values in names.items()}}
    return replace(file, tensors=tensors, metadata=metadata)


def test_a_converted_reranker_whose_head_is_its_embedding_is_whole(tmp_path: Path) -> None:
    file = reranker(tmp_path / "model.gguf", ["3", "4"], tied=True)
    files = FAMILIES["qwen3"].open_gguf(file)
    assert files.config.is_embedding_tied
    assert files.dense.keys() == open_model(file.path).dense.keys()


@pytest.mark.parametrize(
    ("labels", "tied"),
    [(["3", "4"], False), (["4", "3"], True), (["3", "yes"], True), (["3"], True), (["3", "4", "5"], True)],
)
def test_a_converted_reranker_without_the_whole_head_is_refused(
    labels: list[str], tied: bool, tmp_path: Path
) -> None:
    file = reranker(tmp_path / "model.gguf", labels, tied=tied)
    with pytest.raises(
        UnsupportedModel, match=r"only the rows of its head that score documents, in cls\.output"
    ):
        FAMILIES["qwen3"].open_gguf(file)
