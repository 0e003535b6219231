"""An adapter as mlx-lm writes it means what the same adapter of PEFT means; what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.adapters.reading import open_adapter
from argosy.errors import ArgosyError
from argosy.model.families import open_model
from tests.helpers.adapters import open_adapted
from tests.models.references import ADAPTERS, DIRECTORY, Reference
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors

NAME = "glm4_moe_plain"
SETTINGS: dict[str, Any] = {
    "fine_tune_type": "lora", "lora_parameters": {"dropout": 0.0, "rank": 2, "scale": 0.5}, "num_layers": 3,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"


def write(
    place: Path, change: Callable[[dict[str, Array]], Any] = lambda tensors: None, **settings: Any
) -> Path:
    """Write the committed adapter as mlx-lm would, after a change."""
    place.mkdir()
    tensors = {}
    for name, values in read_safetensors(ADAPTERS / NAME / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"{module}.lora_{'a' if 'A' in part else 'b'}"] = np.ascontiguousarray(values.T)
    change(tensors)
    write_safetensors(
        place / "adapters.safetensors", {name: ("BF16", values) for name, values in tensors.items()}
    )
    (place / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return place


def test_logits_are_those_of_the_same_adapter_of_peft(tmp_path: Path) -> None:
    adapters = {"peft": ADAPTERS / NAME, "mlx": write(tmp_path / "mlx")}
    prompt = Reference(ADAPTERS / NAME).input_ids
    with open_adapted(DIRECTORY / NAME, adapters) as engine:
        found = [engine.logits(prompt, adapter=name) for name in adapters]
        assert [one.kind for one in engine.adapters] == ["peft", "mlx"]
    np.testing.assert_array_equal(found[0], found[1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"fine_tune_type": "dora"}, r"\.m is missing"),
    "dora as older versions spell it": ({"use_dora": True}, r"\.m is missing"),
    "full weights": ({"fine_tune_type": "full"}, "full"),
    "another rank": ({"lora_parameters": {"rank": 4, "scale": 0.5}}, "4|needs"),
    "no rank": ({"lora_parameters": {"rank": 0, "scale": 0.5}}, "rank is 0"),
    "no scale": ({"lora_parameters": {"rank": 2, "alpha": 16}}, "scale is None"),
    "a scale in words": ({"lora_parameters": {"rank": 2, "scale": "1"}}, "scale is 1"),
    "no parameters": ({"lora_parameters": None}, "lora_parameters"),
    "a partner that is missing": ({"change": lambda all: all.pop(f"{Q}.lora_b")}, "lora_b is missing"),
    "a magnitude": ({"change": lambda all: all.update({f"{Q}.m": np.ones(48)})}, "DoRA"),
    "NaN": ({"change": lambda all: all[f"{Q}.lora_a"].fill(np.nan)}, "NaN"),
    "an unknown module": (
        {
            "change": lambda all: all.update(
                {"model.layers.0.z.lora_a": np.ones((36, 2)), "model.layers.0.z.lora_b": np.ones((2, 36))}
            )
        },
        "layers.0.z",
    ),
    "columns of another base": (
        {"change": lambda all: all.update({f"{Q}.lora_a": np.ones((40, 2))})}, "40, 2.*36, 2"
    ),
    "another tensor": ({"change": lambda all: all.update({"model.norm.weight": np.ones(36)})}, "not used"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, sentence = REFUSED[name]
    place = write(tmp_path / "mlx", **changes)
    with pytest.raises(ArgosyError, match=sentence):
        open_adapter(place, open_model(DIRECTORY / NAME))
