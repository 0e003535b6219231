"""How fast is each kind of layer, compared with llama.cpp, and which share of a token's time does it take?

    python benchmarks/blocks.py [--blocks "short convolution,..."] [--format Q8_0] [--threads 1,2] [--short]

Each block is a family whose layers have it, as a GGUF of 0.2 to 0.4 B random weights with published head sizes. Both
engines get the same tokens, also while they decode, because the likeliest token of random weights is chance. Before
timing, their logits are compared. A block's share is that of a layer's mixer, norms and dense
products in Argosy's ledger (`attention_and_dense`), the rest is experts, router and head.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import Report, alternate
from engines import ARGOSY, LLAMA_CPP, MODELS, Job, engines, logits, run
from tests.models.gguf_mamba import write_mamba_gguf
from tests.models.gguf_models import one_type, write_gguf_model
from tests.models.references import mean_divergence
from tests.models.tiny import RawConfig, qwen3_moe
from tests.models.tiny_gqa import mimo_v2_flash
from tests.models.tiny_kda import kimi_linear
from tests.models.tiny_latent import deepseek_v32
from tests.models.tiny_llama4 import OF_GGUF, llama4_text
from tests.models.tiny_mamba import granitemoehybrid
from tests.models.tiny_minimax import minimax
from tests.models.tiny_recurrent import lfm2_moe

PROMPTS = 3  # the first of them warms up
CHECKED_TOKENS = 48
LARGEST_DIVERGENCE = 1e-4  # nats; keys and values of 16 bits cost 1e-6, a wrong formula more than 1e-3

_SIZES: dict[str, Any] = {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 8,
    "intermediate_size": 2048, "moe_intermediate_size": 384, "num_experts_per_tok": 4, "vocab_size": 4096,
    "max_position_embeddings": 8192,
}  # fmt: skip
_SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A family with a kind of layer.

    `sizes` are its own, beside those that all have; `prompt_tokens` is how many tokens come before the decoded ones.
    """

    make: Callable[..., RawConfig]
    sizes: dict[str, Any]
    prompt_tokens: int = 512
    write: Callable[..., Path] = write_gguf_model


def kimi(**sizes: Any) -> RawConfig:
    """Kimi-Linear, both kinds of whose layers have the same number of heads, as a GGUF gives only one."""
    linear = {
        "full_attn_layers": [4, 8],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7],
        "num_heads": sizes["num_attention_heads"],
        "short_conv_kernel_size": 4,
    }
    return kimi_linear(**sizes, linear_attn_config=linear)


_LATENT = {
    "kv_lora_rank": 512, "q_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_key_value_heads": 16, "n_routed_experts": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
BLOCKS = {
    "attention (reference)": Block(make=qwen3_moe, sizes={"head_dim": 128, "num_experts": 32}),
    "narrow values and sinks": Block(
        make=mimo_v2_flash,
        sizes={
            "head_dim": 192,
            "v_head_dim": 128,
            "n_routed_experts": 32,
            "sliding_window_size": 128,
            "hybrid_layer_pattern": [0, 1, 1, 1] * 2,
            "moe_layer_freq": [1] * 8,
        },
    ),
    "short convolution": Block(
        make=lfm2_moe,
        sizes={"num_experts": 32, "layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    ),
    "Mamba-2": Block(
        make=granitemoehybrid,
        sizes={
            "intermediate_size": 384,
            "layer_types": ["mamba", "mamba", "attention", "mamba"] * 2,
            "mamba_d_head": "auto",
            "mamba_d_state": 128,
            "mamba_n_heads": 32,
            "num_local_experts": 32,
            "shared_intermediate_size": 512,
        },
        write=write_mamba_gguf,
    ),
    "Kimi Delta Attention": Block(
        make=kimi,
        sizes={
            "kv_lora_rank": 512,
            "model_max_length": 8192,
            "num_experts": 32,
            "num_experts_per_token": 4,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    "lightning attention": Block(
        make=minimax,
        sizes={
            "head_dim": 128,
            "intermediate_size": 384,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
            "num_local_experts": 32,
        },
    ),
    "chunked attention": Block(
        make=llama4_text,
        sizes=OF_GGUF | {"head_dim": 128, "num_experts_per_tok": 1, "num_local_experts": 32},
    ),
    "indexed latent attention": Block(
        make=deepseek_v32,
        sizes=_LATENT
        | {"index_head_dim": 128, "index_n_heads": 16, "index_topk": 2048, "num_hidden_layers": 2},
        prompt_tokens=2304,  # llama.cpp reads 4,096 in minutes, and these with eight layers
    ),
}


def model_of(folder: Path, name: str, type_name: str, kind: str, **changes: Any) -> Path:
    """A GGUF of the block, which is made if it is missing; `changes` are those of its sizes."""
    path = folder / f"{kind}-{name.replace(' ', '-')}-{type_name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = BLOCKS[name].make(**_SIZES | BLOCKS[name].sizes | changes)
        part = path.with_suffix(".part")
        shutil.rmtree(BLOCKS[name].write(part, config, one_type(type_name), seed=7))
        part.rename(path)
    return path


def agreement(folder: Path, name: str) -> str:
    """Compare the logits of both engines for a small model in F32, all of whose experts are chosen.

    Otherwise, a choice that rounding changes would hide a wrong formula.

    Raises:
        SystemExit: they compute something else.
    """
    key = next(
        key for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in BLOCKS[name].sizes
    )
    model = model_of(folder, name, "F32", "block-checked", **_SMALL, **{key: 4})
    job = Job(model=model, prompts=[tokens(CHECKED_TOKENS, 1)], num_new=0, warm_up=0)
    found = mean_divergence(logits(LLAMA_CPP, job), logits(ARGOSY, job))
    if not found < LARGEST_DIVERGENCE:
        raise SystemExit(f"{name}: the engines' logits differ by {found:.2g} nats")
    return f"{name}: logits of both engines within {found:.1g} nats"


def tokens(count: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, _SIZES["vocab_size"], count).tolist()
    return found


def sample(engine: str, job: Job) -> Callable[[], dict[str, float]]:
    def one() -> dict[str, float]:
        done = run(engine, job).require()
        figures = {"prefill": done.prefill_tok_per_s, "decode": done.decode_tok_per_s}
        if engine == ARGOSY:
            figures["share"] = done.part_s("attention_and_dense") * done.decode_tok_per_s
        return figures

    return one


def measure(report: Report, name: str, options: argparse.Namespace, threads: int) -> None:
    sizes, length, kind = (
        (_SMALL, 32, "block-short") if options.short else ({}, BLOCKS[name].prompt_tokens, "block")
    )
    model = model_of(options.models, name, options.format, kind, **sizes)
    job = Job(
        model=model,
        prompts=[tokens(length, 10 + number) for number in range(PROMPTS)],
        given=[tokens(options.new, 20 + number) for number in range(PROMPTS)],
        num_new=options.new,
        threads=threads,
    )
    both = engines()
    report.correct(agreement(options.models, name) if LLAMA_CPP in both else "not compared")
    samples = alternate({engine: sample(engine, job) for engine in both}, options.repeats)
    facts = {"block": name, "format": options.format, "threads": threads}
    for what, target in (("decode", ">= 1.2"), ("prefill", ">= 2")):
        medians = [
            report.figure(f"{name}, {threads}T: {engine} {what}", "tok/s", samples[engine], what, **facts)
            for engine in both
        ]
        if len(medians) == 2:
            report.ratio(f"{name}, {threads}T: {what} over {LLAMA_CPP}", *medians, target=target, **facts)
    report.shares(
        f"{name}, {threads}T: share of mixers and dense",
        [one.values["share"] for one in samples[ARGOSY]],
        **facts,
    )
    report.neighbours([one for found in samples.values() for one in found])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="some of: " + "; ".join(BLOCKS))
    parser.add_argument("--format", default="Q8_0")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--new", type=int, default=64, help="decoded tokens")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="small models, once")
    options = parser.parse_args()
    if options.short:
        options.repeats, options.new = 1, 8
    report = Report("blocks", state="weights in memory, KV cache empty, warmed by one prompt")
    report.opening()
    for name in options.blocks.split(","):
        for threads in map(int, options.threads.split(",")):
            measure(report, name, options, threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
