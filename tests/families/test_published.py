"""The config.json of a released model gives its published parameter count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint.geometry import count_parameters
from argosy.cli.main import main
from argosy.errors import ArgosyError
from argosy.model.families import FAMILIES
from argosy.model.reading.config_reader import HARMLESS
from tests.families.hub_configs import RawConfig
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


# Whole configs of giants, and their keys that may have any value: another part's, or no layer's.
GIANTS = {
    "DeepSeek-V4-Flash": {"num_nextn_predict_layers"},
    "Kimi-K3": {
        "media_placeholder_token_id",  # the tokenizer's
        "text_config.eos_token_id",  # the wrapper says these two
        "text_config.tie_word_embeddings",
    },
}


@pytest.mark.parametrize("name", GIANTS)
def test_every_key_of_a_giant_changes_it_or_is_refused(name: str) -> None:
    released = next(model.config for model in PUBLISHED if model.name == name)
    parse = FAMILIES[released["model_type"]].parse_config
    before, unnoticed = parse(released), set()
    for path, value in entries(released):
        for other in others_like(value):
            changed = within = deepcopy(released)
            for key in path[:-1]:
                within = within[key]
            within[path[-1]] = other
            try:
                is_noticed = parse(changed) != before
            except ArgosyError:
                is_noticed = True
            if not is_noticed and path[-1] not in HARMLESS:
                unnoticed.add(".".join(path))
    assert unnoticed == GIANTS[name]


def entries(raw: RawConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every entry that is not an object."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from entries(value, (*path, key))
        else:
            yield (*path, key), value


def others_like(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, list):
        return [value[:-2], [*value, 4]]
    return [value + 1, 2 * value + 3] if isinstance(value, int | float) else ["softplus", 7]
