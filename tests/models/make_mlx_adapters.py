"""Write LoRA adapters of tiny models with mlx-lm, and its logits with them (needs `mlx[cpu]` and `mlx-lm`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.models.make_mlx import load, logits
from tests.models.safetensors_file import Array

GAIN = 0.7  # the size of a pair's product next to that of its input


def write_adapter(
    base: Path,
    adapter: Path,
    prompt: list[int],
    *,
    seed: int,
    rank: int = 4,
    scale: float = 2.0,
    keys: list[str] | None = None,
    num_layers: int = 2,
    kind: str = "lora",
) -> Array:
    """Write `adapter` as mlx-lm's training does, with random values; return the logits of `prompt` with it.

    Args:
        keys: names of modules; None: every linear one of a layer.
        num_layers: how many of the last layers have pairs.
        kind: "lora" or "dora".
    """
    mx.set_default_device(mx.cpu)
    network, _ = load(base)
    network.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    linear_to_lora_layers(network, num_layers, dict(parameters), use_dora=kind == "dora")
    rng = np.random.default_rng(seed)
    values = {
        name: random_values(rng, name, np.array(one.astype(mx.float32)), GAIN / (scale * rank**0.5))
        for name, one in tree_flatten(network.trainable_parameters())
    }
    network.update(tree_unflatten([(name, mx.array(one)) for name, one in values.items()]))
    adapter.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"), dict(tree_flatten(network.trainable_parameters()))
    )
    settings: dict[str, Any] = {
        "adapter_path": "adapters", "batch_size": 4, "fine_tune_type": kind, "lora_parameters": parameters,
        "model": "model", "num_layers": num_layers, "train": True,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings, indent=4))
    return logits(network, prompt)


def random_values(rng: np.random.Generator, name: str, initial: Array, of_b: float) -> Array:
    noise = rng.standard_normal(initial.shape, np.float32)
    if name.endswith(".m"):  # a magnitude: the length of a row
        return (initial * (1 + 0.3 * noise)).astype(np.float32)
    if name.endswith("lora_b"):
        return (of_b * noise).astype(np.float32)
    # [columns, rank], of experts [experts, rank, columns], of the table [tokens, rank]
    columns = 1 if "embed_tokens" in name else initial.shape[0 if initial.ndim == 2 else 2]
    return (columns**-0.5 * noise).astype(np.float32)
