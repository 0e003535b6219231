"""DeepSeek-OCR: both forms of its config mean the same, and what Argosy does not compute is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import FAMILIES, open_model
from tests.families.published_ocr import DEEPSEEK_OCR, DEEPSEEK_OCR_2
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import LARGEST_DIFFERENCE, difference
from tests.models.tiny import RawConfig, prompt_ids
from tests.models.tiny_ocr import as_transformers, deepseek_ocr2, deepseek_vl_v2


def parse(raw: RawConfig) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def test_the_released_configs_are_read() -> None:
    config = parse(DEEPSEEK_OCR)
    assert parse(DEEPSEEK_OCR_2) == config
    assert config.moe_layers == tuple(range(1, 12))
    attention, router = config.attention, config.router
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (10, 10, 128)
    assert attention.rope is not None
    assert (attention.rope.theta, attention.rope.rotary_dim, attention.rope.is_interleaved) == (
        1e4,
        128,
        False,
    )
    assert (router.score, router.renormalize, router.scale, router.num_groups) == ("softmax", False, 1.0, 1)
    assert (config.shared_width, config.eos_ids, config.bos_id) == (1792, (1,), 0)


def test_both_forms_mean_the_same() -> None:
    ours, theirs = deepseek_vl_v2(first_k_dense_replace=2), parse(deepseek_vl_v2(first_k_dense_replace=2))
    assert parse(as_transformers(ours)).layers == theirs.layers
    assert parse(as_transformers(ours)).router == theirs.router
    alone = {key: value for key, value in ours.items() if key not in ours["language_config"]}
    assert parse(alone | {"architectures": None}) == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mla": True}, "use_mla True|use_mla true"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 10}, "head_dim"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"sliding_window_size": 128}, "sliding_window_size"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"lm_head": False}, "lm_head"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_other_mathematics_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse(deepseek_vl_v2(**changes))


def test_a_hub_config_without_use_mla_has_latent_attention() -> None:
    raw = deepseek_vl_v2()
    del raw["use_mla"], raw["language_config"]["use_mla"]
    with pytest.raises(UnsupportedModel, match="use_mla"):
        parse(raw)
    with pytest.raises(UnsupportedModel, match="use_mla"):
        parse(deepseek_ocr2(use_mla=True))


def test_keys_that_contradict_those_they_repeat_are_refused() -> None:
    with pytest.raises(CheckpointError, match="gives hidden_size as 32, and its language_config as 24"):
        parse(deepseek_vl_v2() | {"hidden_size": 32})
    with pytest.raises(CheckpointError, match="language_config must be an object"):
        parse(deepseek_vl_v2() | {"language_config": 3})


def test_a_gguf_file_answers_as_its_weights(tmp_path: Path) -> None:
    config = deepseek_ocr2(n_group=None, topk_group=None, routed_scaling_factor=1.5)
    path = tmp_path / "model.gguf"
    directory = write_gguf_model(path, config, one_type("F32"), seed=1)
    prompt = prompt_ids(config, 1)
    logits = []
    for place in (directory, path):
        with Engine.open(place, memory="4GiB", kv_dtype="f32", threads=1) as engine:
            logits.append(engine.logits(prompt))
    assert difference(logits[1], logits[0]) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.dimension_count", 4), ("attention.sliding_window", 128), ("expert_gating_func", 2)],
)
def test_a_gguf_file_with_other_mathematics_is_refused(key: str, value: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, deepseek_ocr2(), one_type("F32"), seed=1, metadata={f"deepseek2-ocr.{key}": value})
    with pytest.raises(UnsupportedModel, match=key):
        open_model(path)
