"""The config.json of a released model gives its published parameter count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argosy.checkpoint.geometry import count_parameters
from argosy.cli.main import main
from argosy.model.families import FAMILIES
from tests.families.published import PUBLISHED, Published

LARGEST_ERROR = 0.005


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.name)
def test_a_released_config_gives_the_published_parameter_count(model: Published) -> None:
    config = FAMILIES[model.config["model_type"]].parse_config(model.config)
    everything, _ = count_parameters(config)
    assert everything == pytest.approx(model.billions * 1e9, rel=LARGEST_ERROR)


def test_show_prints_the_parameter_count_without_any_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in PUBLISHED:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(model.config))
        assert main(["show", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["num_parameters"] == pytest.approx(model.billions * 1e9, rel=LARGEST_ERROR)
        assert facts["kv_bytes_per_token"]["f16"] > 0


def test_kimi_k2_needs_70_kilobytes_of_kv_cache_per_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kimi = next(model for model in PUBLISHED if model.name == "Kimi-K2")
    (tmp_path / "config.json").write_text(json.dumps(kimi.config))
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes_per_token"]["f16"] == 61 * (512 + 64) * 2  # 70,272
