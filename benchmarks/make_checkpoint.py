"""How big a checkpoint do you need? Write one of any geometry with random weights, shard by shard.

    python benchmarks/make_checkpoint.py /tmp/model --family qwen3_moe --layers 20 --experts 32 --width 768
    python benchmarks/make_checkpoint.py /tmp/model-q4 --format q4 ...       # packed, the shards removed

The files are what the hub has for the family: config.json, bf16 safetensors with an index, no tokenizer. Values come
from a few megabytes of normal numbers, scaled by 1 / sqrt(columns) and read from a new place for every tensor, so a
gigabyte takes seconds and a tensor's memory. Routing is close to uniform, which is the worst case for a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.checkpoint.pack import pack
from argosy.checkpoint.safetensors_write import TensorToWrite, to_bfloat16_bits, write_safetensors
from argosy.config import format_bytes
from argosy.model.families import FAMILIES, open_model

RawConfig = dict[str, Any]

# Odd, so that tensors of a power of two in size do not all start at the same place.
_BLOCK_VALUES = (4 << 20) + 1


def raw_config(
    family: str = "qwen3_moe",
    *,
    hidden: int = 1024,
    layers: int = 20,
    experts: int = 32,
    experts_per_token: int = 4,
    width: int = 768,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    vocab: int = 8192,
    context: int = 4096,
    shared_width: int = 512,
) -> RawConfig:
    """A config.json of the family, as the hub spells it. `shared_width` is used by qwen2_moe alone."""
    config: RawConfig = {
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "max_position_embeddings": context,
        "num_attention_heads": heads,
        "num_experts_per_tok": experts_per_token,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }
    if family == "mixtral":
        return config | {
            "architectures": ["MixtralForCausalLM"],
            "head_dim": head_dim,
            "intermediate_size": width,
            "num_local_experts": experts,
            "sliding_window": None,
        }
    config |= {
        "decoder_sparse_step": 1,
        "intermediate_size": width,
        "mlp_only_layers": [],
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": experts,
    }
    if family == "qwen3_moe":
        return config | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "head_dim": head_dim,
        }
    if family == "qwen2_moe":
        if hidden != heads * head_dim:
            raise ValueError(
                f"qwen2_moe has hidden = heads * head_dim, found {hidden} and {heads} * {head_dim}"
            )
        return config | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "shared_expert_intermediate_size": shared_width,
        }
    raise ValueError(f"unknown family '{family}'; known: {', '.join(FAMILIES)}")


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], *, seed: int = 0, shard_bytes: int = 1 << 30
) -> int:
    """Write config.json, the shards and their index into a new directory; returns the bytes of all tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[list[TensorToWrite]] = [[]]
    total = filled = 0
    for tensor in _tensors(config, seed):
        nbytes = 2 * math.prod(tensor[2])
        if filled and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
        total += nbytes
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / name, tensors, {"format": "pt"})
        weight_map |= {tensor[0]: name for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def _tensors(raw: Mapping[str, Any], seed: int) -> Iterator[TensorToWrite]:
    """Every tensor of the checkpoint in the order of its layers, an expert's three side by side."""
    family = FAMILIES[raw["model_type"]]
    config, layout = family.parse_config(raw), family.LAYOUTS[0]
    values = _Values(seed)
    written = set()
    for canonical, shape in dense_shapes(config):
        name = layout.dense_name(canonical)
        yield name, "BF16", shape, values.reader(canonical, shape)
        layer = int(canonical.split(".")[1]) if canonical.startswith("layers.") else None
        if layer in config.moe_layers and layer not in written and canonical.endswith(".router"):
            written.add(layer)
            for expert in range(config.num_experts):
                names = layout.names_of_expert(layer, expert)
                for name, expert_shape in zip(names, expert_shapes(config), strict=True):
                    yield name, "BF16", expert_shape, values.reader("expert", expert_shape)


class _Values:
    """Random values of every tensor, out of one block of normal numbers."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._normal = self._random.standard_normal(_BLOCK_VALUES, np.float32)
        self._blocks: dict[float, memoryview] = {}  # standard deviation -> bf16 bytes

    def reader(self, canonical: str, shape: tuple[int, ...]) -> Callable[[], bytes]:
        start = int(self._random.integers(_BLOCK_VALUES))
        count = math.prod(shape)
        last = canonical.rsplit(".", 1)[-1]
        if last.endswith("norm"):
            return lambda: np.full(count, 0x3F80, "<u2").tobytes()  # one
        if last.endswith("bias"):
            return lambda: bytes(2 * count)
        deviation = 1.0 if last == "embed" else shape[-1] ** -0.5
        return lambda: self._read(deviation, start, count)

    def _read(self, deviation: float, start: int, count: int) -> bytes:
        if deviation not in self._blocks:
            self._blocks[deviation] = memoryview(to_bfloat16_bits(self._normal * deviation)).cast("B")
        block, parts = self._blocks[deviation], []
        while count:
            taken = min(count, _BLOCK_VALUES - start)
            parts.append(block[2 * start : 2 * (start + taken)])
            count -= taken
            start = 0
        return b"".join(parts)


def make_model(directory: Path, config: Mapping[str, Any], *, format: str = "bf16", seed: int = 0) -> Path:
    """A checkpoint in place for bf16, a pack for `pack-bf16`, q8 and q4; what is there already is used again."""
    wanted = {"config": dict(config), "format": format, "seed": seed}
    note = directory.with_name(directory.name + ".made.json")
    if note.exists() and directory.exists() and json.loads(note.read_text()) == wanted:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    if format == "bf16":
        write_checkpoint(directory, config, seed=seed)
    else:
        source = directory.with_name(directory.name + ".source")
        shutil.rmtree(source, ignore_errors=True)
        try:
            write_checkpoint(source, config, seed=seed)
            pack(open_model(source), directory, format=format.removeprefix("pack-"))
        finally:
            shutil.rmtree(source, ignore_errors=True)
    note.write_text(json.dumps(wanted))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3_moe")
    parser.add_argument("--format", choices=["bf16", "pack-bf16", "q8", "q4"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    defaults = raw_config.__kwdefaults__ or {}
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args())
    geometry = {name: options[name] for name in defaults}
    started = time.perf_counter()
    directory = make_model(
        options["directory"],
        raw_config(options["family"], **geometry),
        format=options["format"],
        seed=options["seed"],
    )
    seconds = time.perf_counter() - started
    files = open_model(directory)
    total = files.dense_bytes + files.expert_bytes
    print(f"{directory}: {format_bytes(total)} in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)")
    print(
        f"  dense weights {format_bytes(files.dense_bytes)}   routed experts {format_bytes(files.expert_bytes)}"
    )


if __name__ == "__main__":
    main()
