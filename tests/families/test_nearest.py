"""An unknown family is refused with the known one whose configs read most like it, and with what differs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from argosy.errors import UnsupportedModel
from argosy.model.families import read_config
from tests.families import published_dense
from tests.families.hub_configs import DEEPSEEK_V3, KIMI_VL, RawConfig
from tests.families.published import PUBLISHED, minimax_m2


def hint_of(directory: Path, raw: RawConfig) -> str | None:
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        UnsupportedModel, match="asks for model_type 'unheard'; supported: qwen3, "
    ) as refused:
        read_config(directory)
    return refused.value.hint


def test_a_family_under_another_name_is_told_apart_by_no_key(tmp_path: Path) -> None:
    hint = hint_of(tmp_path, DEEPSEEK_V3 | {"model_type": "unheard"})
    assert hint is not None
    assert hint.startswith("it reads like deepseek_v3 in every key; if it is one under another name, write")


def test_keys_that_the_nearest_does_not_know_are_named(tmp_path: Path) -> None:
    raw = DEEPSEEK_V3 | {"model_type": "unheard", "memory_topk": 2048, "memory_heads": 64}
    assert hint_of(tmp_path, raw) == (
        "it reads most like deepseek_v3, which does not know memory_topk, memory_heads with the values given there"
    )
    raw = minimax_m2() | {"model_type": "unheard", "hidden_act": "gelu"}
    assert hint_of(tmp_path, raw) == (
        "it reads most like minimax_m2, which does not know hidden_act with the values given there"
    )


def test_a_model_without_experts_has_a_nearest_too(tmp_path: Path) -> None:
    raw = published_dense.qwen3() | {"model_type": "unheard", "memory_topk": 2048}
    assert hint_of(tmp_path, raw) == (
        "it reads most like qwen3, which does not know memory_topk with the values given there"
    )


def test_the_text_part_of_a_wrapper_is_compared(tmp_path: Path) -> None:
    hint = hint_of(tmp_path, KIMI_VL | {"model_type": "unheard"})
    assert hint is not None
    assert hint.startswith("its text_config reads like deepseek_v3 in every key")


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"num_experts": 8, "hidden_size": 64},
        {f"key_{number}": number for number in range(30)} | {"num_experts": 8},
        {f"key_{number}": number for number in range(5000)} | {"num_experts": 8},
        {"text_config": []},
    ],
)
def test_what_does_not_read_like_a_known_model_has_no_hint(tmp_path: Path, raw: RawConfig) -> None:
    assert hint_of(tmp_path, raw | {"model_type": "unheard"}) is None


def test_every_released_config_has_a_nearest_family_soon(tmp_path: Path) -> None:
    start = time.process_time()
    for model in PUBLISHED:
        if len(model.config) > 10 and not model.config.keys() & {"text_config", "thinker_config"}:
            assert hint_of(tmp_path, model.config | {"model_type": "unheard"}), model.name
    assert time.process_time() - start < 10
