"""Write the names and axes that mlx-vlm gives to the tensors of the committed towers (needs `mlx-vlm`).

    python -m tests.models.make_mlx_towers     # rewrite mlx_towers.json: {tower: {name on the hub: [name, shape]}}

mlx-vlm's `sanitize` of the model and of the tower are applied, as its loader applies them.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from tests.models.mlx_models import MLX_TOWERS

REFERENCE = Path(__file__).parent / "reference_encoders"

TOWERS = (
    "gemma4", "glm4v_moe", "kimi_k25", "mistral3", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_omni_moe_audio",
    "qwen3_vl_moe",
)  # fmt: skip


def as_mlx_vlm(tower: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return the tensors of a tower as mlx-vlm names and turns them."""
    raw = json.loads((REFERENCE / tower / "config.json").read_text())
    family = importlib.import_module(f"mlx_vlm.models.{raw['model_type']}")
    config = _namespace({"tie_word_embeddings": False, "num_hidden_layers": 0, "num_experts": 0} | raw)
    config.text_config = _namespace({"tie_word_embeddings": False, "num_hidden_layers": 0, "num_experts": 0})
    config.vision_config = _namespace(
        {"in_channels": 3, "use_clipped_linears": False} | raw.get("vision_config", {})
    )
    if raw["model_type"] == "qwen3_omni_moe":
        weights = family.qwen3_omni_moe.Thinker.sanitize(SimpleNamespace(), weights)
    else:
        weights = family.Model.sanitize(SimpleNamespace(config=config, audio_tower=None), weights)
    if tower == "qwen3_omni_moe_audio":
        audio = raw["thinker_config"]["audio_config"]
        convolutions = {
            f"conv2d{i}": SimpleNamespace(weight=mx.zeros((audio["downsample_hidden_size"], 3, 3, inputs)))
            for i, inputs in (
                (1, 1),
                (2, audio["downsample_hidden_size"]),
                (3, audio["downsample_hidden_size"]),
            )
        }
        return dict(family.AudioModel.sanitize(SimpleNamespace(**convolutions), weights))
    sanitize = getattr(family.VisionModel, "sanitize", None)
    if sanitize is None:
        return weights
    return dict(sanitize(weights) if tower == "gemma4" else sanitize(SimpleNamespace(), weights))


def _namespace(values: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**values)


def main() -> None:
    mx.set_default_device(mx.cpu)
    found: dict[str, dict[str, Any]] = {}
    for tower in TOWERS:
        weights = mx.load(str(REFERENCE / tower / "model.safetensors"))
        # Each tensor is recognised by a number in its first element.
        marked = {}
        for number, (name, value) in enumerate(weights.items()):
            flat = mx.concatenate([mx.array([float(number)]), mx.zeros(value.size - 1)])
            marked[name] = flat.reshape(value.shape)
        names = list(weights)
        found[tower] = {
            names[int(value.flatten()[0].item())]: [name, list(value.shape)]
            for name, value in as_mlx_vlm(tower, marked).items()
        }
        assert found[tower].keys() == weights.keys(), tower
    MLX_TOWERS.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
