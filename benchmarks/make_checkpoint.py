"""Do you need a checkpoint of a certain size? Write one of any geometry with random weights, tensor by tensor.

    python benchmarks/make_checkpoint.py /tmp/mid-Q4_0.gguf --geometry mid --format Q4_0 --routing recorded
    python benchmarks/make_checkpoint.py /tmp/model --geometry small                 # bf16 safetensors
    python benchmarks/make_checkpoint.py /tmp/model-q4 --format q4 --layers 20 ...   # packed, shards removed

    small            1.3 B parameters: hidden 1024, 16 layers, 8 of 64 experts of width 384
    mid             10.1 B: hidden 2048, 16 layers, 8 of 128 experts of width 768
    large           15.1 B: mid with 24 layers, 8 GiB in Q4_0
    mixtral-like     3.1 B: hidden 2048, 8 layers, 2 of 8 experts of width 7168
    tiny             0.1 B, for the short form of a benchmark
    long             0.4 B: hidden 1024, 8 layers, 4 of 32 experts of width 384, 32 heads on 4, a context of 40,960
    long-latent      0.4 B, the same with 16 heads of latent attention (MLA), as wide as those of DeepSeek-V3
    drafting         1.7 B, of which a token uses 0.4 B in the proportions of GLM-4.5-Air: slightly more in attention, a
                     shared expert and the head than in its 8 of 64 experts; with a layer for multi-token prediction
    drafting-tiny    0.1 B, for the short form
    omni             1.9 B: hidden 1024, 12 layers, 4 of 64 experts of width 768; and the vision tower (0.5 B) and
                     audio tower (0.6 B) of Qwen3-Omni as they are

A safetensors checkpoint has the files that the hub has for the family: config.json, bf16 shards with an index, no
tokenizer. A GGUF is laid out as llama.cpp converts it, with its choice of type for each tensor and its own BPE
vocabulary. Values come from a few megabytes of normal numbers, quantized once and read from a new offset for every
tensor, so a gigabyte takes seconds and no more memory than one tensor. `random_weights.py` explains the values;
`routing.py` measures the routing.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.geometry import dense_shapes, draft_shapes, expert_shapes, packed_config
from argosy.checkpoint.pack import pack
from argosy.checkpoint.safetensors_write import TensorToWrite, encode, to_bfloat16_bits, write_safetensors
from argosy.config import LatentConfig, ModelConfig, format_bytes
from argosy.model.encoders.table import ENCODERS
from argosy.model.families import FAMILIES, open_model
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_layout import dense_name
from random_weights import ROUTINGS, WEIGHTS_VERSION, Exact, Normal, RandomWeights, Recipe, Routing

RawConfig = dict[str, Any]
Bytes = NDArray[np.uint8]

_TINY = {
    "hidden": 512,
    "layers": 8,
    "experts": 32,
    "experts_per_token": 4,
    "width": 256,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 32_000,
}
_SMALL = {
    "hidden": 1024,
    "layers": 16,
    "experts": 64,
    "experts_per_token": 8,
    "width": 384,
    "heads": 8,
    "kv_heads": 2,
    "vocab": 32_000,
}
_LONG = {
    "hidden": 1024,
    "layers": 8,
    "experts": 32,
    "experts_per_token": 4,
    "width": 384,
    "heads": 32,
    "kv_heads": 4,
    "vocab": 32_000,
    "context": 40_960,
}
_MID = {
    "hidden": 2048,
    "layers": 16,
    "experts": 128,
    "experts_per_token": 8,
    "width": 768,
    "heads": 32,
    "kv_heads": 4,
    "vocab": 32_000,
}
GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "drafting": {**_SMALL, "family": "glm4_moe", "layers": 24, "width": 288, "heads": 24},
    "drafting-tiny": {**_TINY, "family": "glm4_moe"},
    "omni": {
        "family": "qwen3_omni_moe",
        "hidden": 1024,
        "layers": 12,
        "experts": 64,
        "experts_per_token": 4,
        "width": 768,
        "heads": 8,
        "kv_heads": 2,
        "vocab": 32_000,
        "context": 16_384,
    },
    "tiny": _TINY,
    "small": _SMALL,
    "mid": _MID,
    "long": _LONG,
    "long-latent": {**_LONG, "family": "deepseek_v3", "heads": 16},
    "large": {**_MID, "layers": 24},
    "mixtral-like": {
        "family": "mixtral",
        "hidden": 2048,
        "layers": 8,
        "experts": 8,
        "experts_per_token": 2,
        "width": 7168,
        "heads": 32,
        "kv_heads": 4,
        "vocab": 32_000,
    },
}
# Odd, so that tensors with a power-of-two size do not all start at the same place.
_POOL_VALUES = (4 << 20) + 256


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
    """A config.json of the family, spelled as on the hub. Only qwen2_moe uses `shared_width`."""
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
    if family in ("glm4_moe", "deepseek_v3"):  # GLM-4.5 names what its experts are as DeepSeek-V3 does
        config |= {
            "attention_bias": False,
            "first_k_dense_replace": 0,
            "intermediate_size": width,
            "moe_intermediate_size": width,
            "n_group": 1,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
        }
    if family == "glm4_moe":
        return config | {
            "architectures": ["Glm4MoeForCausalLM"],
            "head_dim": head_dim,
            "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
        }
    if family == "deepseek_v3":
        return config | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "kv_lora_rank": 512,
            "moe_layer_freq": 1,
            "num_key_value_heads": heads,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": hidden // 2,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": 64,
            "rope_scaling": None,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "v_head_dim": head_dim,
        }
    config |= {
        "decoder_sparse_step": 1,
        "intermediate_size": width,
        "mlp_only_layers": [],
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": experts,
    }
    if family == "qwen3_omni_moe":
        return _with_towers(config | {"attention_bias": False, "head_dim": head_dim})
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


def _with_towers(text: RawConfig) -> RawConfig:
    """Qwen3-Omni around a text model, with towers of the real sizes, whose rows fit the text model."""
    del text["decoder_sparse_step"], text["mlp_only_layers"]
    hidden, end = text["hidden_size"], text["vocab_size"]
    pairs = text["head_dim"] // 2
    sections = [pairs - 2 * (pairs * 5 // 16), pairs * 5 // 16, pairs * 5 // 16]
    text |= {
        "model_type": "qwen3_omni_moe_text",
        "rope_scaling": {
            "interleaved": True,
            "mrope_section": sections,
            "rope_type": "default",
            "type": "default",
        },
    }
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": {
            "audio_config": {"output_dim": hidden},
            "audio_token_id": end - 1,
            "image_token_id": end - 2,
            "text_config": text,
            "video_token_id": end - 3,
            "vision_config": {"out_hidden_size": hidden},
        },
    }


PROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    "temporal_patch_size": 2,
}
"""`preprocessor_config.json` of a family with towers."""


def _towers(raw: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the towers."""
    family = raw["model_type"]
    for encoder in ENCODERS.get(family, ()):
        around = raw
        for key in encoder.path[:-1]:
            around = around[key]
        if encoder.path[-1] not in around:  # some families have checkpoints without towers
            continue
        own = ConfigReader(dict(around[encoder.path[-1]]), family)
        config = encoder.read(own, ConfigReader(dict(around), family), parse_config(raw))
        for tensor in encoder.tensors(config).values():
            yield encoder.prefix + tensor.name, tensor.shape


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    return FAMILIES[raw["model_type"]].parse_config(raw)


def _normal_numbers(seed: int) -> tuple[NDArray[np.float32], np.random.Generator]:
    """The numbers of a pool, which those of one seed share, and what draws further ones."""
    values, state = _pool(seed)
    random = np.random.default_rng()
    random.bit_generator.state = state
    return values, random


@functools.lru_cache(maxsize=1)
def _pool(seed: int) -> tuple[NDArray[np.float32], Mapping[str, Any]]:
    random = np.random.default_rng([seed, 7])
    values = random.standard_normal(_POOL_VALUES, np.float32)
    return values, random.bit_generator.state


class Pool:
    """Bytes of normal numbers in one block type, for any size and deviation."""

    def __init__(self, block_type: str, seed: int) -> None:
        self._block_type = block_type
        self._normal, self._random = _normal_numbers(seed)
        self._blocks: dict[float, Bytes] = {}  # deviation -> [blocks, block bytes]

    def _scaled(self, deviation: float) -> Bytes:
        if deviation not in self._blocks:
            if self._block_type == "BF16":
                blocks = to_bfloat16_bits(self._normal * deviation).view(np.uint8).reshape(-1, 2)
            elif self._block_type == "F32":
                blocks = (self._normal * deviation).view(np.uint8).reshape(-1, 4)
            elif self._block_type == "F16":
                blocks = (self._normal * deviation).astype(np.float16).view(np.uint8).reshape(-1, 2)
            else:
                from gguf_blocks import RANDOM_TYPES, block_shape, random_blocks, scale_blocks, to_blocks

                values, nbytes = block_shape(self._block_type)
                normal = self._normal.reshape(-1, values)
                if self._block_type in RANDOM_TYPES:
                    blocks = random_blocks(self._block_type, len(normal), deviation, self._random)
                elif self._block_type == "MXFP4":  # scales are powers of two
                    blocks = to_blocks("MXFP4", normal * np.float32(deviation)).reshape(-1, nbytes)
                else:
                    whole = to_blocks(self._block_type, normal).reshape(-1, nbytes)
                    blocks = scale_blocks(self._block_type, whole, deviation)
            self._blocks[deviation] = blocks
        return self._blocks[deviation]

    def fill(self, out: Bytes, deviation: float) -> None:
        """Fill a flat array from a new offset in the pool, wrapping around."""
        source = self._scaled(deviation)
        start = int(self._random.integers(len(source))) * source.shape[1]
        flat, at = source.reshape(-1), 0
        while at < len(out):
            part = flat[start : start + len(out) - at]
            out[at : at + len(part)] = part
            at += len(part)
            start = 0


def tensor_bytes(pool: Pool, recipe: Normal, row_bytes: int, *, copies: int = 1) -> Bytes:
    """`copies` independent tensors of one recipe, one after another."""
    rows = math.prod(recipe.shape[:-1])
    out = np.zeros((copies, rows, row_bytes), np.uint8)
    for one in out:
        pool.fill(one[recipe.silent_rows :].reshape(-1), recipe.deviation)
    return out.reshape(-1)


# ── safetensors ─────────────────────────────────────────────────────────────────────────────────────────────────────


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    *,
    routing: Routing = "plain",
    seed: int = 0,
    shard_bytes: int = 1 << 30,
) -> int:
    """Write config.json, the shards and their index into a new directory; returns the total bytes of tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if config["model_type"] in ENCODERS:
        (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    shards: list[list[TensorToWrite]] = [[]]
    total = filled = 0
    for tensor in _tensors(config, routing, seed):
        nbytes = 2 * math.prod(tensor[2])
        if filled and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
        total += nbytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / name, tensors, {"format": "pt"})
        weight_map |= {tensor[0]: name for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def _tensors(raw: Mapping[str, Any], routing: Routing, seed: int) -> Iterator[TensorToWrite]:
    """Every tensor of the checkpoint in layer order, an expert's three side by side."""
    config, layout = parse_config(raw), FAMILIES[raw["model_type"]].LAYOUTS[0]
    shapes = list(dense_shapes(config))
    if config.num_mtp_layers:
        config = replace(config, layers=(*config.layers, config.layers[-1]))
        shapes += draft_shapes(config)
    weights, pool = RandomWeights(config, routing=routing, seed=seed), Pool("BF16", seed)

    def reader(recipe: Recipe) -> Callable[[], Any]:
        if isinstance(recipe, Exact):
            return lambda: encode(recipe.read(), "BF16")
        return lambda: tensor_bytes(pool, recipe, 2 * recipe.shape[-1])

    for canonical, shape in shapes:
        yield layout.dense_name(canonical), "BF16", shape, reader(weights[canonical])
        if canonical.endswith(".router"):
            layer = int(canonical.split(".")[1])
            for expert in range(config.num_experts):
                names = layout.names_of_expert(layer, expert)
                for name, matrix in zip(names, ("gate", "up", "down"), strict=True):
                    recipe = weights[f"expert.{matrix}"]
                    yield name, "BF16", recipe.shape, reader(recipe)
    for name, shape in _towers(raw):
        flat = Normal((1, math.prod(shape)), 0.02)
        yield name, "BF16", shape, reader(flat)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────

GGUF_FORMATS = (
    *("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4_MOE", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_S"),
)
# The type of most matrices, if a format is not named after it.
_MOSTLY = {"Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "IQ2_M": "IQ2_S"}
# Replaces a type of 256 values where a row is not a multiple of 256.
_SMALLER_BLOCKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}


def block_type_of(format: str, name: str, layer: int, cols: int, config: ModelConfig) -> str:
    """The type that llama-quantize gives a matrix (llama.cpp, src/llama-quant.cpp), by canonical name.

    The head keeps 6 bits in formats below 8. Mixtures give `v`, `down` and `o` more bits than the rest, and keep `k`
    and `v` of models with eight experts at 8 bits. `Q5_K` is llama-quantize's Q5_K_S. Embeddings of IQ2_M to IQ3_S have
    Q3_K in place of IQ3_S, to which nothing here quantises.
    """
    last = name.rpartition(".")[2].removeprefix("shared_")
    if last in ("router", "score"):
        return "F32"
    if format in ("F16", "BF16", "Q8_0"):
        return format
    if format == "MXFP4_MOE":
        return "MXFP4" if name.startswith("expert.") else "Q8_0"
    chosen = _more_bits(format, last, layer, config) or _MOSTLY.get(format, format)
    return _SMALLER_BLOCKS.get(chosen, chosen) if cols % 256 else chosen


def _more_bits(format: str, last: str, layer: int, config: ModelConfig) -> str | None:
    """The type of a matrix that the format treats differently from most, or None."""
    eighth = config.num_layers // 8
    is_first = layer < eighth
    is_chosen = is_first or layer >= 7 * config.num_layers // 8 or (layer - eighth) % 3 == 2
    shares_keys = config.latent is None and config.attention.num_heads >= 4 * config.attention.num_kv_heads
    if format in _BELOW_FOUR_BITS:
        return _of_i_quants(format, last, is_first, shares_keys, config)
    if last == "head":
        return "Q6_K"
    if config.num_experts == 8 and last in ("k", "v"):
        return "Q8_0"
    if config.num_experts == 8 and last == "o" and format in (*_MOSTLY, "Q2_K", "IQ4_NL", "IQ4_XS"):
        return "Q5_K"
    match format, last:
        case "Q2_K", "v":
            return "Q4_K" if shares_keys else "Q3_K"
        case "Q2_K", "down" | "o":
            return "Q3_K"
        case "Q3_K_M", "v":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_M", "down":
            return "Q5_K" if layer < config.num_layers // 16 else "Q4_K"
        case "Q3_K_M", "o":
            return "Q4_K"
        case "Q4_K_M", "v" | "down":
            return "Q6_K" if is_chosen else None
        case "IQ4_NL" | "IQ4_XS", "v":
            return "Q5_K" if shares_keys else None
        case "IQ4_NL" | "IQ4_XS", "down":
            return "Q5_K" if is_first else None
    return None


_BELOW_FOUR_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_S")


def _of_i_quants(
    format: str, last: str, is_first: bool, shares_keys: bool, config: ModelConfig
) -> str | None:
    """The same for mixtures of the i-quants with an importance matrix."""
    is_small = format[2] in "12" and format != "IQ2_M"
    match last:
        case "head":
            return "Q6_K" if format == "IQ3_S" else "Q5_K"
        case "embed":
            return "Q2_K" if is_small else "Q3_K"
        case "v" if format[2] in "12":
            return "Q4_K" if shares_keys or config.num_experts >= 4 else "Q2_K" if is_small else "IQ3_S"
        case "v" if shares_keys:
            return "Q4_K"
        case "q" | "k" if format == "IQ3_XXS":
            return "IQ2_S"
        case "down" if is_first and format[2] in "12":
            return "Q2_K" if is_small else "IQ3_S"
        case "o":
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S"}.get(format)
    return None


def write_gguf(
    path: Path, raw: Mapping[str, Any], *, format: str, routing: Routing = "plain", seed: int = 0
) -> int:
    """Write one GGUF file with the architecture's metadata and a BPE vocabulary; returns the total bytes of tensors."""
    import gguf

    from gguf_blocks import row_bytes, to_blocks

    config = packed_config(parse_config(raw))
    weights = RandomWeights(config, routing=routing, seed=seed)
    pools: dict[str, Pool] = {}
    writer = gguf.GGUFWriter(path, _architecture(raw))
    _write_metadata(writer, raw, config)
    planned: list[tuple[str, Recipe, int]] = []  # block type, recipe, copies

    def plan(canonical: str, name: str, layer: int, copies: int = 0, heads: int = 1) -> None:
        recipe = weights[canonical]
        cols = recipe.shape[-1]
        block_type = "F32"
        if len(recipe.shape) > 1:
            block_type = block_type_of(format, canonical, layer, cols, config)
        shape = [*recipe.shape[:-1], row_bytes(block_type, cols)]
        if copies:
            shape.insert(0, copies)
        if heads > 1:
            shape = [heads, shape[0] // heads, shape[1]]
        kind = gguf.GGMLQuantizationType[block_type]
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
        planned.append((block_type, recipe, max(1, copies)))

    for canonical, _ in dense_shapes(config):
        last = canonical.rpartition(".")[2]
        layer = int(canonical.split(".")[1]) if canonical.startswith("layers.") else 0
        heads = config.latent.num_heads if config.latent and last in ("k_up", "v_up") else 1
        plan(canonical, dense_name(canonical), layer, heads=heads)
        if last == "router":
            for matrix in ("gate", "up", "down"):
                name = f"blk.{layer}.ffn_{matrix}_exps.weight"
                plan(f"expert.{matrix}", name, layer, copies=config.num_experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = 0
    for block_type, recipe, copies in planned:
        cols = recipe.shape[-1]
        if isinstance(recipe, Exact):
            values = recipe.read().reshape(-1, cols)
            parts = [
                to_blocks(block_type, values[begin : begin + 4096]) for begin in range(0, len(values), 4096)
            ]
            data = np.concatenate(parts).reshape(-1)
        else:
            pool = pools.setdefault(block_type, Pool(block_type, seed))
            data = tensor_bytes(pool, recipe, row_bytes(block_type, cols), copies=copies)
        writer.write_tensor_data(data)
        total += data.nbytes
    writer.close()
    return total


def _architecture(raw: Mapping[str, Any]) -> str:
    family = str(raw["model_type"])
    return {"mixtral": "llama", "deepseek_v3": "deepseek2"}.get(family) or family.replace("_", "")


def _write_metadata(writer: Any, raw: Mapping[str, Any], config: ModelConfig) -> None:
    import gguf

    writer.add_name("random weights")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count((config.latent or config.attention).num_heads)
    if config.latent is None:
        attention = config.attention
        writer.add_head_count_kv(attention.num_kv_heads)
        writer.add_key_length(attention.head_dim)
        writer.add_value_length(attention.head_dim)
        writer.add_rope_dimension_count(attention.head_dim)
    else:
        _write_latent_metadata(writer, config.latent)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_feed_forward_length(config.expert_width)
    if raw["model_type"] != "mixtral":
        writer.add_expert_feed_forward_length(config.expert_width)
    if config.latent is not None:
        writer.add_expert_shared_count(config.shared_width // config.expert_width)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(1.0)
        writer.add_leading_dense_block_count(0)
    elif config.shared_width:
        writer.add_expert_shared_feed_forward_length(config.shared_width)
    tokens, merges = vocabulary(config.vocab_size)
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)


def _write_latent_metadata(writer: Any, latent: LatentConfig) -> None:
    """One shared head of keys as wide as the cache, and the heads that a query has."""
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(latent.query_rank)
    writer.add_kv_lora_rank(latent.kv_rank)
    writer.add_key_length(latent.kv_rank + latent.rope_dim)
    writer.add_value_length(latent.kv_rank)
    writer.add_key_length_mla(latent.nope_dim + latent.rope_dim)
    writer.add_value_length_mla(latent.value_dim)
    writer.add_rope_dimension_count(latent.rope_dim)


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """A byte-level BPE of `size` tokens, and its merges: bytes, then words of lower-case letters, then two controls.

    Raises:
        ValueError: fewer than 258 tokens, or more than four-letter words can name.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(unprintable))]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges: list[str] = []
    words = letters
    num_words = size - len(tokens) - 2
    while len(merges) < num_words:
        merges += [f"{word} {letter}" for word in words for letter in letters]
        words = [word + letter for word in words for letter in letters]
        if len(words[0]) > 4:
            raise ValueError(f"a vocabulary of {size} tokens: at most 475,000 words can be named")
    if num_words < 0:
        raise ValueError(f"a vocabulary of {size} tokens: 256 bytes and two controls are the least")
    merges = merges[:num_words]
    return tokens + [merge.replace(" ", "") for merge in merges] + ["<s>", "</s>"], merges


# ── making each model once ──────────────────────────────────────────────────────────────────────────────────────────


def make_model(
    path: Path,
    config: Mapping[str, Any],
    *,
    format: str = "bf16",
    routing: Routing = "plain",
    seed: int = 0,
) -> Path:
    """Make a model at `path`, unless it exists.

    `bf16` is a safetensors checkpoint, `pack-bf16`, `q8` and `q4` are packs, and `GGUF_FORMATS` are single files.
    """
    wanted = {
        "config": dict(config),
        "format": format,
        "routing": routing,
        "seed": seed,
        "weights": WEIGHTS_VERSION,
    }
    note = path.with_name(path.name + ".made.json")
    if note.exists() and path.exists() and json.loads(note.read_text()) == wanted:
        return path
    note.unlink(missing_ok=True)
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format in GGUF_FORMATS:
        write_gguf(path, config, format=format, routing=routing, seed=seed)
    elif format == "bf16":
        write_checkpoint(path, config, routing=routing, seed=seed)
    else:
        source = path.with_name(path.name + ".source")
        shutil.rmtree(source, ignore_errors=True)
        try:
            write_checkpoint(source, config, routing=routing, seed=seed)
            pack(open_model(source), path, format=format.removeprefix("pack-"))
        finally:
            shutil.rmtree(source, ignore_errors=True)
    note.write_text(json.dumps(wanted))
    return path


def named_model(
    models: Path, geometry: str, format: str, *, routing: Routing = "recorded", family: str | None = None
) -> Path:
    """A model such as `models/mid-Q4_0.gguf`, written if missing. Routing other than `recorded` is in the name."""
    kind = "" if routing == "recorded" else f"-{routing}"
    suffix = ".gguf" if format in GGUF_FORMATS else ""
    settings = dict(GEOMETRIES[geometry])
    if family:
        settings["family"] = family
    name = f"{geometry}{f'-{family}' if family else ''}-{format}{kind}{suffix}"
    return make_model(models / name, raw_config(**settings), format=format, routing=routing)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="a directory, or a file for GGUF")
    parser.add_argument(
        "--geometry", choices=list(GEOMETRIES), help="sizes by name; others change single ones"
    )
    parser.add_argument("--family", choices=list(FAMILIES))
    parser.add_argument("--format", choices=["bf16", "pack-bf16", "q8", "q4", *GGUF_FORMATS], default="bf16")
    parser.add_argument("--routing", choices=ROUTINGS, default="plain")
    parser.add_argument("--seed", type=int, default=0)
    defaults = raw_config.__kwdefaults__ or {}
    for name in defaults:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = vars(parser.parse_args())
    settings = dict(GEOMETRIES.get(options["geometry"], {}))
    settings |= {name: options[name] for name in ("family", *defaults) if options[name] is not None}
    raw = raw_config(**settings)
    started = time.perf_counter()
    path = make_model(
        options["path"], raw, format=options["format"], routing=options["routing"], seed=options["seed"]
    )
    seconds = time.perf_counter() - started
    files = path.rglob("*") if path.is_dir() else [path]
    total = sum(file.stat().st_size for file in files if file.is_file())
    config = parse_config(raw)
    num_experts = len(config.moe_layers) * config.num_experts
    parameters = num_experts * sum(math.prod(shape) for shape in expert_shapes(config, config.moe_layers[0]))
    parameters += sum(math.prod(shape) for _, shape in dense_shapes(config))
    print(
        f"{path}: {parameters / 1e9:.2f} B parameters, {format_bytes(total)} in {seconds:.1f} s"
        f" ({total / seconds / 1e9:.2f} GB/s)"
    )
    if options["routing"] != "plain":
        from routing import print_locality

        print_locality(RandomWeights(config, routing=options["routing"], seed=options["seed"]))


if __name__ == "__main__":
    main()
