"""Write tiny checkpoints as mlx-lm does, and the logits of MLX for them (needs `mlx[cpu]` and `mlx-lm`, no torch).

    python -m tests.models.make_mlx                  # rewrite the committed checkpoints
    python -m tests.models.make_mlx --out DIR NAME   # only these, elsewhere

A checkpoint as on the hub is loaded, quantised and saved by mlx-lm. The logits are those of the stored weights in
float32: scales and biases are widened first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from tests.models.mlx_models import DIRECTORY, MODELS, MlxModel
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.safetensors_file import Array, write_safetensors
from tests.models.tiny import RawConfig, prompt_ids, text_of, write_model

NUM_TOKENS = 24


def load(directory: Path) -> tuple[Any, RawConfig]:
    """Load the model in a directory with mlx-lm; return it with its config, in which quantisation is in MLX's words."""
    raw = json.loads((directory / "config.json").read_text())
    # mlx-lm gives the text part of Gemma-4 the wrapper's number of tokens, or that of the released models.
    changes = {"vocab_size": text_of(raw)["vocab_size"]} if raw["model_type"] == "gemma4" else {}
    network, config = load_model(directory, model_config=changes)
    if raw["model_type"] == "bailing_moe_linear":
        # mlx-lm gives layer 0 the slopes of layer 1; the makers' code does not.
        first = network.layers[0].attention
        first._slope = first._slope * ((1 + 1 / (raw["num_hidden_layers"] - 1) + 1e-5) / (1 + 1e-5))
    return network, {key: value for key, value in config.items() if key not in changes}


def write(model: MlxModel, directory: Path, source: Path | None = None) -> Path:
    """Write `model` as mlx-lm does, with `ref.safetensors` beside it; `source` is a checkpoint as on the hub."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = Path(scratch) / "hub"
            if model.has_mxfp4_experts:
                write_mxfp4_model(source, model.config, seed=model.seed)
            else:
                dtype = "F16" if model.config.get("torch_dtype") == "float16" else "BF16"
                write_model(source, model.config, seed=model.seed, dtype=dtype)
        network, config = load(source)
        if model.bits is not None:
            network, config = quantize_model(
                network, config, model.group, model.bits, model.mode, quant_predicate=_predicate(model)
            )
        save_model(directory, network)
    save_config(config, directory / "config.json")
    token_ids = prompt_ids(model.config, model.seed, NUM_TOKENS)
    write_safetensors(
        directory / "ref.safetensors",
        {
            "input_ids": ("I64", np.array(token_ids)),
            "logits": ("F32", logits(load(directory)[0], token_ids)),
        },
    )
    return directory


def logits(network: Any, token_ids: list[int]) -> Array:
    """Return float32 [tokens, vocab]."""
    network.update(
        tree_map(
            lambda one: one.astype(mx.float32) if mx.issubdtype(one.dtype, mx.floating) else one,
            network.parameters(),
        )
    )
    return np.array(network(mx.array([token_ids]))[0])


def _predicate(model: MlxModel) -> Any:
    def settings(path: str, module: Any) -> Any:
        for end, given in model.modules.items():
            if path.endswith(end):
                return given
        return True

    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; none: all of them")
    parser.add_argument("--out", type=Path, default=DIRECTORY)
    arguments = parser.parse_args()
    for model in MODELS:
        if not arguments.names or model.name in arguments.names:
            directory = write(model, arguments.out / model.name)
            print(
                f"{model.name:24} {sum(file.stat().st_size for file in directory.iterdir()) / 1000:7.0f} kB"
            )


if __name__ == "__main__":
    main()
