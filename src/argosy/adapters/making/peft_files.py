"""Write trained pairs as a PEFT directory: adapter_config.json and adapter_model.safetensors.

Attention has a tensor A [rank, in] and B [out, rank] for each matrix. Experts have those of `target_parameters` (PEFT
0.17 and later): A [experts * rank, in] with the expert slowest, and B [out, rank * experts] with the expert fastest.
gate_up_proj was wrapped first, so it is below `base_layer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.safetensors_write import TensorToWrite, encode, write_safetensors
from argosy.checkpoint.upcycle import new_directory
from argosy.directory import Directory
from argosy.errors import ArgosyError, UsageError

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers"
_EXPERTS = {"gate_up": "mlp.experts.base_layer", "down": "mlp.experts"}


@dataclass(frozen=True, slots=True)
class Pair:
    """down: A, float32 [rank, in].   up: B, float32 [out, rank]. Of experts, both have a first dimension for them."""

    down: NDArray[np.float32]
    up: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trained:
    """Pairs of each layer by name: q, k, v, o, gate_up, down."""

    rank: int
    alpha: float
    layers: Sequence[Mapping[str, Pair]]

    @property
    def num_values(self) -> int:
        return sum(pair.down.size + pair.up.size for pairs in self.layers for pair in pairs.values())

    def is_finite(self) -> bool:
        """Whether every value is a finite number."""
        return all(
            bool(np.isfinite(values).all())
            for pairs in self.layers
            for pair in pairs.values()
            for values in (pair.down, pair.up)
        )


def require_place(directory: Path, *, replaces: bool) -> None:
    """Check that an adapter can be written to `directory`, before hours of training.

    Raises:
        UsageError: something is there, and is not an adapter that may be replaced.
    """
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not (directory / CONFIG_FILE).is_file():
        raise UsageError(
            f"{directory} already exists and is not an adapter, so it is not replaced",
            hint="`-o` names a new directory",
        )
    if not replaces:
        raise UsageError(
            f"{directory} already exists and is not overwritten",
            hint="`--force` replaces it, or `-o` names another directory",
        )


def write_peft(directory: Path, trained: Trained, *, base: str, replaces: bool = False) -> int:
    """Write the directory, which gets its name when it is complete; return its bytes.

    Args:
        base: the name of the base model, for `base_model_name_or_path`.
        replaces: an adapter that has this name is replaced.

    Raises:
        UsageError: as `require_place`.   ArgosyError: a value is not a finite number.
    """
    if not trained.is_finite():
        raise ArgosyError("the trained adapter has values that are not finite numbers, so it was not written")
    require_place(directory, replaces=replaces)
    directory = Path(os.path.abspath(directory))
    is_there = os.path.lexists(directory)
    made = directory.with_name(f"{directory.name}.new") if is_there else directory
    with new_directory(made) as scratch:
        text = json.dumps(_config(trained, base), indent=2) + "\n"
        (scratch / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_safetensors(scratch / TENSORS_FILE, _tensors(trained), {"format": "pt"})
        nbytes = sum(path.stat().st_size for path in scratch.iterdir())
    if is_there:
        with Directory(directory.parent) as parent:
            parent.remove_tree(directory.name)
            parent.move(made.name, directory.name)
    return nbytes


def _config(trained: Trained, base: str) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": trained.rank,
        "lora_alpha": trained.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": [f"{name}_proj" for name in "qkvo"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }


def _tensors(trained: Trained) -> Iterator[TensorToWrite]:
    def tensor(name: str, values: NDArray[np.float32]) -> TensorToWrite:
        return f"{_PREFIX}.{name}.weight", "F32", values.shape, lambda: encode(values, "F32")

    for layer, pairs in enumerate(trained.layers):
        for name in "qkvo":
            yield tensor(f"{layer}.self_attn.{name}_proj.lora_A", pairs[name].down)
            yield tensor(f"{layer}.self_attn.{name}_proj.lora_B", pairs[name].up)
        for name, place in _EXPERTS.items():
            down, up = pairs[name].down, pairs[name].up
            yield tensor(f"{layer}.{place}.lora_A", down.reshape(-1, down.shape[2]))
            yield tensor(f"{layer}.{place}.lora_B", up.transpose(1, 2, 0).reshape(up.shape[1], -1))
