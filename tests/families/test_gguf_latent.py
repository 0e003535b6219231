"""The meaning of metadata and tensors in a GGUF of architecture `deepseek2`, in its old and its new form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from argosy.checkpoint.files import ModelFiles
from argosy.cli.main import main
from argosy.config import LatentConfig, QueryScale, RouterConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from tests.models import gguf_models
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.tiny import RawConfig
from tests.models.tiny_latent import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k2,
    kimi_k25,
    mistral4,
    yarn_of_all_dimensions,
)

MODELS: dict[str, RawConfig] = {
    "DeepSeek-V2-Lite": deepseek_v2(rope_scaling=yarn_of_all_dimensions(40.0, 16, mscale=0.707)),
    "DeepSeek-V2": deepseek_v2(q_lora_rank=22, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "DeepSeek-V3": deepseek_v3(),
    "Kimi-K2": kimi_k2(),
    "Kimi-K2.5": kimi_k25(),
    "DeepSeek-V3.2": deepseek_v32(),
    "GLM-5.2": glm_moe_dsa(bos_token_id=1, eos_token_id=2, indexer_types=["full", "full", "shared"]),
    "Mistral-Small-4": mistral4(),
    "GLM-4.7-Flash": glm4_moe_lite(bos_token_id=1, eos_token_id=2, tie_word_embeddings=True),
}

Write = Callable[..., ModelFiles]
plain_metadata = gguf_models.add_latent_metadata


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a model, with metadata added or removed by the test, and open it."""

    def write(
        config: RawConfig,
        *,
        extra: Callable[[GGUFWriter], object] = lambda writer: None,
        without: tuple[str, ...] = (),
        tensors: dict[str, np.ndarray[Any, Any]] | None = None,
        split_kv: bool = True,
    ) -> ModelFiles:
        def add_metadata(writer: GGUFWriter, config: RawConfig, *, split_kv: bool) -> None:
            plain_metadata(writer, config, split_kv=split_kv)
            for key in without:
                del writer.kv_data[0][f"{writer.arch}.{key}"]
            extra(writer)
            for key, values in (tensors or {}).items():
                writer.add_tensor(key, values)

        monkeypatch.setattr(gguf_models, "add_latent_metadata", add_metadata)
        path = tmp_path / "model.gguf"
        write_gguf_model(path, config, one_type("F32"), seed=1, split_kv=split_kv)
        return open_model(path)

    return write


def changed(name: str, value: object) -> Callable[[GGUFWriter], None]:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0][f"deepseek2.{name}"].value = value

    return change


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("split_kv", [True, False])
def test_metadata_means_the_same_as_config_json(
    name: str, split_kv: bool, write: Write, tmp_path: Path
) -> None:
    found = write(MODELS[name], split_kv=split_kv).config
    expected = open_model(tmp_path / "model.gguf.f32").config
    assert found.latent is not None
    assert found.latent.is_up_split == split_kv
    # A file does not say which model with a sigmoid router it holds.
    families = {
        "DeepSeek-V2-Lite": "deepseek_v2",
        "DeepSeek-V2": "deepseek_v2",
        "Mistral-Small-4": "mistral4",
        "DeepSeek-V3.2": "deepseek_v32",
        "GLM-5.2": "glm_moe_dsa",
    }
    assert found.family == families.get(name, "deepseek_v3")
    assert replace(found.with_mixers(LatentConfig, is_up_split=False), family=expected.family) == expected


@pytest.mark.parametrize("make", [deepseek_v32, glm_moe_dsa])
def test_a_file_without_indexers_says_up_to_where_it_is_exact(
    make: Callable[..., RawConfig],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = gguf_models.is_in_gguf
    monkeypatch.setattr(
        gguf_models, "is_in_gguf", lambda name, config: ".indexer." not in name and plain(name, config)
    )
    files = write(make(index_topk=9))
    config = files.config
    assert config.exact_tokens == 9
    assert main(["show", str(files.path)]) == 0
    assert "indexers      missing: approximate beyond 9 tokens" in capsys.readouterr().out
    assert {layer.mixer.num_chosen for layer in config.layers if isinstance(layer.mixer, LatentConfig)} == {0}


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"index_topk_freq": 1}, ["own"] * 4),
        ({"indexer_types": ["full", "shared", "shared", "full"]}, ["own", "shared", "shared", "own"]),
        (
            {"max_position_embeddings": 1 << 20},
            ["own", "own", "own", "shared"],
        ),  # as in GLM-5.2's config.json
    ],
)
def test_layers_have_their_own_indexer_where_the_file_or_the_length_of_its_context_says(
    changes: RawConfig, kinds: list[str], write: Write
) -> None:
    config = write(glm_moe_dsa(num_hidden_layers=4, **changes)).config
    assert config.exact_tokens is None
    mixers = (layer.mixer for layer in config.layers)
    assert [mixer.index and mixer.index.kind for mixer in mixers if isinstance(mixer, LatentConfig)] == kinds


def test_mistral_small_4_has_growing_queries_without_the_keys(write: Write) -> None:
    keys = ("attention.temperature_scale", "attention.temperature_length")
    latent = write(mistral4(), without=keys).config.latent
    assert latent is not None
    assert latent.query_scale == QueryScale(beta=0.1, period=8)


def test_a_file_whose_queries_grow_is_mistrals(write: Write) -> None:
    config = write(
        deepseek_v2(norm_topk_prob=True, rope_scaling=yarn_of_all_dimensions(40.0, 16)),
        extra=lambda writer: writer.add_float32("deepseek2.attention.temperature_scale", 0.5),
    ).config
    assert config.latent is not None
    assert config.latent.query_scale == QueryScale(beta=0.5, period=16)
    assert (config.family, config.router.group_score, config.latent.scale) == ("mistral4", "top2", 0.0)


def test_key_and_value_halves_are_read_from_their_own_tensors(write: Write) -> None:
    files = write(deepseek_v3())
    keys, values = files.dense["layers.1.k_up"], files.dense["layers.1.v_up"]
    assert (keys.name, keys.rows, keys.cols) == ("blk.1.attn_k_b.weight", 4 * 20, 10)
    assert (values.name, values.rows, values.cols) == ("blk.1.attn_v_b.weight", 4 * 12, 20)
    assert files.dense["layers.1.choice_bias"].name == "blk.1.exp_probs_b.bias"
    assert files.dense["layers.0.down"].name == "blk.0.ffn_down.weight"


def test_without_a_named_router_and_a_choice_bias_the_router_is_softmax(
    write: Write,
) -> None:
    old = ("expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_weights_norm")
    config = write(deepseek_v2(routed_scaling_factor=16.0), without=old).config
    assert config.router == RouterConfig(score="softmax", group_score="max", renormalize=False, scale=16.0)


def test_duplicate_keys_and_values_of_ik_llama_cpp_are_ignored(write: Write) -> None:
    config = deepseek_v3()
    copies = {
        f"blk.{layer}.attn_{name}.weight": np.ones(shape, np.float32)
        for layer in range(3)
        for name, shape in {"k_b": (4 * 10, 20), "v_b": (4 * 12, 20)}.items()
    }
    files = write(config, split_kv=False, tensors=copies)
    assert files.dense["layers.1.kv_up"].name == "blk.1.attn_kv_b.weight"
    assert not {ref.name for ref in files.dense.values()} & copies.keys()


def test_without_a_named_router_a_choice_bias_means_sigmoid_scores(write: Write, tmp_path: Path) -> None:
    # A converted GLM-4.7-Flash lacks the key: converters take it from scoring_func, and its config.json has none.
    found = write(MODELS["GLM-4.7-Flash"], without=("expert_gating_func",)).config.router
    assert found == open_model(tmp_path / "model.gguf.f32").config.router
    assert (found.score, found.has_choice_bias) == ("sigmoid", True)


def test_multi_token_prediction_layers_are_counted_and_ignored(write: Write) -> None:
    def one_layer_more(writer: GGUFWriter) -> None:
        changed("block_count", 4)(writer)
        writer.add_nextn_predict_layers(1)

    odd = {
        "blk.3.nextn.eh_proj.weight": np.ones((4, 8), np.float32),
        "blk.3.attn_norm.weight": np.ones(32, np.float32),
    }
    files = write(deepseek_v3(), extra=one_layer_more, tensors=odd)
    assert (files.config.num_layers, files.config.num_mtp_layers) == (3, 1)


def test_a_layer_beyond_the_last_is_refused(write: Write) -> None:
    with pytest.raises(
        CheckpointError, match=r"blk\.3\.attn_norm\.weight \[32\]: a deepseek_v3 model with these"
    ):
        write(deepseek_v3(), tensors={"blk.3.attn_norm.weight": np.ones(32, np.float32)})


def test_unsupported_mathematics_is_refused_by_name(write: Write) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"expert_gating_func 3; supported: 1 \(softmax\), 2 \(sigmoid\)"
    ):
        write(deepseek_v3(), extra=changed("expert_gating_func", 3))


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (lambda w: w.add_uint32("deepseek2.attention.indexer.top_k", 4), r"sets deepseek2\.attention\.indexer\.top_k"),
        (changed("attention.head_count_kv", 2), r"deepseek2\.attention\.head_count_kv is 2, expected 1"),
        (changed("attention.key_length", 20), r"deepseek2\.attention\.key_length is 20, expected 26"),
        (changed("rope.dimension_count", 16), r"deepseek2\.attention\.key_length is 26, expected 36"),
        (changed("leading_dense_block_count", 3), r"is 3 of 3 layers, which leaves none with routed experts"),
        (changed("expert_group_count", 3), r"8 experts in 3 groups, 2 of them kept; expected groups of equal size"),
        (changed("attention.value_length_mla", 10), r"attn_v_b\.weight is \[4, 12, 20\], expected \[4, 10, 20\]"),
        (lambda w: w.add_nextn_predict_layers(3), r"nextn_predict_layers is 3 of 3 layers"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(
    extra: Callable[[GGUFWriter], object], sentence: str, write: Write
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        write(deepseek_v3(), extra=extra)
