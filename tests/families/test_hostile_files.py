"""Hostile files neither forge lines of an error, nor take hours or all memory to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint import geometry
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.families import open_model
from argosy.model.reading import schemes
from argosy.model.reading.quantization import read_quantization
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.tiny import qwen3_moe, write_model

FORGED = "\x1b[2J\nhint: run this\u202e" + "a" * 9999
LINEAR = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": LINEAR}}
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", FORGED: 1},
        PACKED | {"config_groups": {FORGED: 1}},
        PACKED | {"config_groups": {"g": LINEAR | {FORGED: 1}}},
        PACKED | {"config_groups": {"g": LINEAR | {"weights": {FORGED: 1}}}},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {".*\n" + FORGED[6:800]: 1}},
        {"quant_method": "auto-round", "extra_config": {FORGED: 1}},
        MIXED | {"quantized_layers": {FORGED: {}}},
        {"bits": 4, "group_size": 64, FORGED: 1},
    ],
)
def test_a_key_of_the_file_cannot_write_lines_of_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_quantization({"quantization_config": settings})
    assert len(str(caught.value)) < 1000
    message, hint = str(caught.value).splitlines()
    assert (message + hint).isprintable()
    assert hint.startswith("hint: get ")


def test_a_fault_of_an_expression_is_printable() -> None:
    with pytest.raises(CheckpointError, match="bad character range") as caught:
        read_quantization({"quantization_config": PACKED | {"ignore": ["re:[z-\x1b]"]}})
    assert str(caught.value).isprintable()


def test_expressions_that_take_long_to_compare_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_MOST_MATCHING_S", 0.05)
    found = read_quantization({"quantization_config": PACKED | {"ignore": ["re:" + "(.|.)" * 8 + ".*.*.*!"]}})
    assert found is not None

    def all_schemes() -> None:
        for expert in range(1000):  # each takes about 10 ms
            found.scheme_of(f"model.layers.0.mlp.experts.{expert}.gate_proj")

    with pytest.raises(CheckpointError, match=r"regular expressions that take more than 0.05 s to compare"):
        all_schemes()


@pytest.mark.parametrize("is_gguf", [True, False])
def test_more_experts_than_memory_could_list_are_refused(
    is_gguf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = qwen3_moe(num_hidden_layers=2, num_experts=4, hidden_size=32, moe_intermediate_size=32)
    if is_gguf:
        write_gguf_model(tmp_path / "model.gguf", config, one_type("Q8_0"), seed=1)
    path = tmp_path / "model.gguf" if is_gguf else write_model(tmp_path / "model", config, seed=1)
    assert len(open_model(path).experts) == 8
    monkeypatch.setattr(geometry, "_MOST_EXPERTS", 7)
    with pytest.raises(UnsupportedModel, match="its layers have 8 experts together; at most 7 are supported"):
        open_model(path)
