"""The geometry of a config.json alone gives the sizes that released models have."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from argosy.budget.footprint import ModelFootprint
from argosy.config import Budget, EngineConfig
from argosy.errors import UnsupportedModel
from argosy.forecast.assumed import active_parameters, assume_pack
from argosy.model.families import FAMILIES
from tests.families.published import PUBLISHED


class Sizes(NamedTuple):
    """Billions of parameters, active ones, MB of an expert in q4, GB of all routed experts, GB of those of a token.

    Active parameters leave out the table of embeddings, of which a token reads one row.
    """

    total: float
    active: float
    expert_mb: float
    routed_gb: float
    token_gb: float


# Counted by building each model from its config.json with transformers 5.24, without towers for pictures and sound, and
# rounded as printed here. Kimi-K2's 31.7 is our count; its card says 32.
SIZES = {
    "Mixtral-8x7B": Sizes(46.7, 12.7, 99.1, 25.4, 6.34),
    "OLMoE-1B-7B": Sizes(6.9, 1.2, 3.5, 3.6, 0.45),
    "gpt-oss-20b": Sizes(20.9, 3.6, 14.0, 10.8, 1.34),
    "gpt-oss-120b": Sizes(116.8, 5.1, 14.0, 64.5, 2.02),
    "Qwen3-30B-A3B": Sizes(30.5, 3.0, 2.65, 16.3, 1.02),
    "Qwen3-235B-A22B": Sizes(235.1, 21.6, 10.6, 127.7, 7.98),
    "Qwen3-Next-80B-A3B": Sizes(79.7, 3.6, 1.77, 43.5, 0.85),
    "Qwen3.6-35B-A3B": Sizes(34.7, 2.9, 1.77, 18.1, 0.57),
    "Qwen3.5-122B-A10B": Sizes(122.1, 9.0, 5.3, 65.2, 2.04),
    "Qwen3.5-397B-A17B": Sizes(396.3, 16.3, 7.1, 217.4, 4.25),
    "GLM-4.5-Air": Sizes(106.9, 12.8, 9.7, 56.1, 3.50),
    "GLM-4.6": Sizes(352.8, 32.9, 13.3, 189.0, 9.45),
    "GLM-4.7-Flash": Sizes(29.9, 3.6, 5.3, 15.6, 0.98),
    "DeepSeek-V3": Sizes(671.0, 36.6, 24.8, 368.0, 11.5),
    "Kimi-K2": Sizes(1025.7, 31.7, 24.8, 571.0, 11.9),
    "MiniMax-M2": Sizes(228.7, 10.4, 8.0, 126.4, 3.95),
    "Gemma-4-26B-A4B": Sizes(25.2, 3.8, 3.35, 12.8, 0.80),
}


def rounding(printed: float) -> float:
    """Half a unit of the last digit of a number as it is printed."""
    return 0.5 * 10.0 ** -len(str(printed).partition(".")[2].rstrip("0") or "0") if printed < 1000 else 0.5


@pytest.mark.parametrize("name", SIZES)
def test_a_pack_of_a_released_model_has_its_published_sizes(name: str) -> None:
    raw = next(model.config for model in PUBLISHED if model.name == name)
    config = FAMILIES[raw["model_type"]].parse_config(raw)
    files, expected = assume_pack(config, "q4", Path("config.json")), SIZES[name]
    record = files.experts[config.moe_layers[0], 0]
    routed = record.nbytes * config.experts_per_token * len(config.moe_layers)

    everything, active = active_parameters(config)
    found = Sizes(everything / 1e9, active / 1e9, record.nbytes / 1e6, files.expert_bytes / 1e9, routed / 1e9)
    for value, printed in zip(found, expected, strict=True):
        assert value == pytest.approx(printed, abs=0.01 * printed + rounding(printed))


def test_a_pack_of_a_format_is_planned_like_a_real_one() -> None:
    raw = next(model.config for model in PUBLISHED if model.name == "DeepSeek-V3")
    config = FAMILIES[raw["model_type"]].parse_config(raw)
    engine = EngineConfig(budget=Budget(ram_bytes=1 << 40), threads=2)
    q4, q8, bf16 = (
        ModelFootprint(assume_pack(config, format, Path("config.json")), engine)
        for format in ("q4", "q8", "bf16")
    )
    assert q4.slot_bytes < q8.slot_bytes < bf16.slot_bytes
    assert q4.dense_bytes == q8.dense_bytes < bf16.dense_bytes  # only routed experts become q4
    assert q4.num_experts == 58 * 256
    assert q4.resident_bytes == pytest.approx(368e9, rel=0.01)


def test_a_config_with_more_experts_than_any_model_is_refused_before_they_are_listed() -> None:
    raw = next(model.config for model in PUBLISHED if model.name == "Qwen3-30B-A3B")
    config = FAMILIES["qwen3_moe"].parse_config(raw | {"num_experts": 65_536, "num_hidden_layers": 4096})
    with pytest.raises(UnsupportedModel, match="268435456 experts together"):
        assume_pack(config, "q4", Path("config.json"))
