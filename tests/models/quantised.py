"""Tiny models in the mixtures of types that people download, quantised by llama.cpp, with llama.cpp's logits.

    python -m tests.models.quantised [NAME...]        # rewrite the committed files; needs llama.cpp (`make peer`)

    reference_quantised/<name>.gguf             a model
    reference_quantised/<name>.safetensors      its prompt, and llama.cpp's logits from the file and from its weights in
                                                float32, where nothing is left to round

The quantiser wants the importance of every column, which decides what codes it chooses, and not what they mean: here
these are log-normal numbers. Every expert is chosen, as a rounded score that changed a choice would hide what rounding
costs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

from argosy.checkpoint.gguf import read_gguf
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.tiny import RawConfig, glm4_moe, gpt_oss, prompt_ids, qwen3_moe
from tests.models.tiny_latent import deepseek_v3
from tests.native.gguf_blocks import WITHOUT_PACKAGE

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(__file__).parent / "reference_quantised"
PEER = Path(os.environ.get("ARGOSY_PEER_PYTHON") or ROOT / "build" / "peer-venv" / "bin" / "python")
SEED = 7

# llama.cpp's mixtures below four bits.
MIXTURES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("Q2_K_S", "Q2_K", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"),
)
_HEADS: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2,
    "num_experts_per_tok": 2, "vocab_size": 96,
}  # fmt: skip


def config_of(family: str, width: int = 256, **changes: Any) -> RawConfig:
    """A model whose experts have rows of `width`; each token takes both."""
    sizes = _HEADS | changes
    match family:
        case "glm4_moe":
            widths = {"moe_intermediate_size": width, "intermediate_size": width}
            return glm4_moe(**sizes, **widths, n_routed_experts=2, num_nextn_predict_layers=0)
        case "gpt_oss":
            yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
            return gpt_oss(
                **sizes,
                num_local_experts=2,
                intermediate_size=width,
                max_position_embeddings=131_072,
                rope_scaling=yarn,
            )
        case "deepseek_v3":
            latent = {"q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
            own = {
                key: value for key, value in sizes.items() if key not in ("head_dim", "num_key_value_heads")
            }
            widths = {"moe_intermediate_size": width, "intermediate_size": 256, "v_head_dim": 64}
            groups = {"n_group": 1, "topk_group": 1}
            return deepseek_v3(**own, **latent, **widths, **groups, n_routed_experts=2)
    return qwen3_moe(**sizes, num_experts=2, moe_intermediate_size=width)


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised: llama.cpp's mixture, and types of their own for tensors that a pattern matches."""

    config: RawConfig
    mixture: str
    overrides: Mapping[str, str] = field(default_factory=dict)


# The types of Unsloth's "UD-Q2_K_XL" files, in which no layer is like another.
_UD_TYPES = {
    "token_embd": "IQ3_S", "^output.weight": "Q6_K",
    "blk.0.attn_q": "Q5_K", "blk.0.attn_k": "Q8_0", "blk.0.attn_v": "IQ4_NL", "blk.0.attn_output": "Q4_K",
    "blk.0.ffn_gate_exps": "IQ2_XXS", "blk.0.ffn_up_exps": "IQ2_XS", "blk.0.ffn_down_exps": "IQ3_XXS",
    "blk.1.attn_q": "IQ4_XS", "blk.1.attn_k": "Q3_K", "blk.1.attn_v": "Q2_K", "blk.1.attn_output": "IQ3_S",
    "blk.1.ffn_gate_exps": "IQ1_S", "blk.1.ffn_up_exps": "IQ1_M", "blk.1.ffn_down_exps": "IQ2_S",
}  # fmt: skip
# Those of ternary and binary models, and the four bits of GPUs, which no mixture has together.
_FEW_BITS = {
    "token_embd": "TQ1_0", "^output.weight": "Q2_0",
    "attn_q": "NVFP4", "attn_k": "MXFP4", "attn_v": "Q4_1", "attn_output": "TQ2_0",
    "ffn_gate_exps": "Q1_0", "ffn_up_exps": "TQ1_0", "ffn_down_exps": "Q2_0",
}  # fmt: skip
RECIPES = {
    "ud": Recipe(config_of("qwen3_moe"), "Q2_K", _UD_TYPES),
    "few_bits": Recipe(config_of("qwen3_moe", num_hidden_layers=1), "Q2_0", _FEW_BITS),
}


def quantise(recipe: Recipe, path: Path) -> Path:
    """Quantise random weights into `path`; return a file with the same weights in float32."""
    source, exact = path.with_suffix(".f32.gguf"), path.with_suffix(".exact.gguf")
    write_gguf_model(source, recipe.config, one_type("F32"), seed=SEED)
    importance = path.with_suffix(".npz")
    rng = np.random.default_rng([SEED, 5])
    columns = {}
    for tensor in GGUFReader(source).tensors:
        if len(tensor.shape) > 1:  # the quantiser names the number of columns first
            num_stacked = int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            columns[tensor.name] = rng.lognormal(size=int(tensor.shape[0]) * num_stacked).astype(np.float32)
    np.savez(importance, **columns)
    overrides = {name: number_of(kind) for name, kind in recipe.overrides.items()}
    _ask("quantise", source=str(source), target=str(path), file_type=f"LLAMA_FTYPE_MOSTLY_{recipe.mixture}",
         overrides=overrides, importance=str(importance), may_requantise=False)  # fmt: skip
    _ask("quantise", source=str(path), target=str(exact), file_type="LLAMA_FTYPE_ALL_F32",
         overrides={}, importance="", may_requantise=True)  # fmt: skip
    return exact


def number_of(kind: str) -> int:
    """The number of a type in files."""
    return WITHOUT_PACKAGE[kind] if kind in WITHOUT_PACKAGE else int(GGMLQuantizationType[kind])


def peer_logits(path: Path, token_ids: list[int]) -> Array:
    """The logits of llama.cpp, float32 [tokens, vocab]."""
    out = path.with_suffix(".npy")
    _ask("logits", model=str(path), token_ids=token_ids, out=str(out))
    return np.asarray(np.load(out))


def _ask(command: str, **job: Any) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        script = Path(__file__).with_name("peer_side.py")
        done = subprocess.run(
            [PEER, script, command, file.name], capture_output=True, text=True, check=False, timeout=600
        )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")


def types_of(path: Path) -> set[str]:
    """The types of a file's tensors."""
    return {ref.dtype for ref in read_gguf(path).tensors.values()}


@dataclass(frozen=True)
class Quantised:
    """A committed model with the logits of its prompt: llama.cpp's, and llama.cpp's from the weights in float32."""

    name: str

    @property
    def path(self) -> Path:
        return DIRECTORY / f"{self.name}.gguf"

    def read(self) -> tuple[list[int], Array, Array]:
        tensors = read_safetensors(self.path.with_suffix(".safetensors"))
        return [int(i) for i in tensors["input_ids"]], tensors["logits"], tensors["exact"]


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name, recipe in RECIPES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.gguf"
            exact = quantise(recipe, path)
            prompt = prompt_ids(recipe.config, SEED)
            tensors = {
                "input_ids": ("I64", np.array(prompt)),
                "logits": ("F32", peer_logits(path, prompt)),
                "exact": ("F32", peer_logits(exact, prompt)),
            }
            write_safetensors(DIRECTORY / f"{name}.safetensors", tensors)
            (DIRECTORY / path.name).write_bytes(path.read_bytes())
        path = DIRECTORY / path.name
        print(f"{name}: {path.stat().st_size} bytes, {', '.join(sorted(types_of(path)))}")


if __name__ == "__main__":
    main()
