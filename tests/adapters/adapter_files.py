"""Write small adapters as PEFT and llama.cpp do, without torch.

write_peft(directory, {"model.layers.0.self_attn.q_proj": pair(...)}, r=4)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from argosy.adapters.files import AdapterFiles
from argosy.adapters.targets import target_shapes
from argosy.config import ModelConfig
from tests.adapters.random_adapter import Doubles, delta
from tests.models.safetensors_file import Array, write_safetensors

PREFIX = "base_model.model."


def values(*shape: int, seed: int) -> Array:
    """Random values that bfloat16 and float16 hold exactly."""
    rng = np.random.default_rng([seed, *shape])
    return rng.integers(-64, 65, shape).astype(np.float32) / 64


def pair(rows: int, columns: int, *, rank: int = 4, seed: int = 0) -> tuple[Array, Array]:
    """A [rank, columns] and B [rows, rank]."""
    return values(rank, columns, seed=seed), values(rows, rank, seed=seed + 1)


def peft_tensors(
    pairs: Mapping[str, tuple[Array, Array]], dtype: str = "F32"
) -> dict[str, tuple[str, Array]]:
    """PEFT's tensors of the pairs of modules."""
    return {
        f"{PREFIX}{module}.lora_{letter}.weight": (dtype, array)
        for module, both in pairs.items()
        for letter, array in zip("AB", both, strict=True)
    }


def write_peft(
    directory: Path,
    pairs: Mapping[str, tuple[Array, Array]],
    *,
    dtype: str = "F32",
    tensors: Mapping[str, tuple[str, Array]] | None = None,
    **changes: Any,
) -> Path:
    """Write a directory; `tensors` are further ones by their whole names, `changes` keys of the config."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "peft_version": "0.21.2",
        **changes,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    all_tensors = peft_tensors(pairs, dtype) | dict(tensors or {})
    write_safetensors(directory / "adapter_model.safetensors", all_tensors)
    return directory


def write_gguf_adapter(
    path: Path,
    pairs: Mapping[str, tuple[Array, Array]],
    *,
    architecture: str,
    block_type: str = "F32",
    alpha: float | str | bool | None = 8.0,
    tokens: Sequence[int] | None = None,
) -> Path:
    """Write a file as llama.cpp's converter does; pairs by the names of the base's tensors."""
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        add = {float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[type(alpha)]
        add("adapter.lora.alpha", alpha)  # type: ignore[operator]
    if tokens is not None:
        writer.add_array("adapter.alora.invocation_tokens", list(tokens))
    kind = GGMLQuantizationType[block_type]
    for name, both in pairs.items():
        for letter, array in zip("ab", both, strict=True):
            values = quantize(np.ascontiguousarray(array), kind)
            writer.add_tensor(f"{name}.lora_{letter}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def product(both: tuple[Array, Array], scale: float) -> Doubles:
    """What a merge adds: scale * B A."""
    down, up = (np.asarray(one, np.float64) for one in both)
    return scale * up @ down


def dense_delta(adapter: AdapterFiles, config: ModelConfig, name: str) -> Doubles:
    return delta(adapter.dense[name], target_shapes(config)[name][0])
