"""Print the greedy tokens of many models, to compare two versions of Argosy on one machine.

    python -m tests.models.greedy_tokens > after.jsonl        # two minutes on two cores
    python -m tests.models.greedy_tokens --list               # the models
    python -m tests.models.greedy_tokens --only mixtral       # models whose names contain this

Run it in a checkout of each version: if every answer is equal, the files are equal byte for byte. Each line is one
model with one instruction set, budget, chunk size, number of threads and batch. It holds the new tokens of each prompt,
keyed by the prompt's length, and a SHA-256 of the prompt's logits. The models are committed references of every family,
tiny models in the formats that the references lack, and the demo model if it has been built on this machine.

The script uses only what every version has (an engine's options, `generate_batch`, `logits`), so it may be copied into
an older checkout. It compares nothing itself: `tests/engine/test_identity.py` compares settings within one version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.manifest import PACK_VERSION, open_pack
from argosy.checkpoint.pack import pack
from argosy.model.families import open_model
from argosy.user_directories import cache_directory
from tests.models import gguf_models, references
from tests.models.gguf_delta import write_delta_gguf
from tests.models.hub_quantised import write_fp8_model, write_int4_model
from tests.models.mxfp4_models import write_mxfp4_model
from tests.models.runnable import runnable
from tests.models.tiny import gpt_oss, mixtral, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_latent import deepseek_v3, kimi_k2

# In versions before `Engine.open`, the class itself took these options.
open_engine: Any = getattr(Engine, "open", Engine)

NUM_NEW = 24
# Longer than two KV blocks and the sliding windows; part of a block; one token more than a block; one token.
PROMPT_LENGTHS = (40, 3, 17, 1)
# Chunk size and threads: whole prompts with one thread, small chunks with two.
CHUNKS = ((64, 1), (7, 2))
BUDGETS = ("resident", "smallest cache")
SEED = 5

# One or two checkpoints of every family, with different flags.
REFERENCES = (
    "deepseek_v2_groups",
    "deepseek_v2_respelt_f16_sharded",
    "deepseek_v3_multi_token_prediction",
    "deepseek_v3_respelt_tied_f32",
    "gemma4_own_values_default_pattern_f16_sharded",
    "gemma4_plain",
    "glm4_moe_groups_tied",
    "glm4_moe_lite_halves_yarn_tied",
    "glm4_moe_yarn_f32",
    "glm4v_moe_groups_scaled_tied_sharded",
    "gpt_oss_plain",
    "gpt_oss_windows_sharded",
    "kimi_k25_wrapper",
    "kimi_k2_many_experts",
    "minimax_m2_yarn_f32",
    "mixtral_head_dim_tied_sharded",
    "mixtral_window_top1",
    "olmoe_bias_tied_sharded",
    "qwen2_moe_layer_types_yarn",
    "qwen3_5_moe_tied_f32_sharded",
    "qwen3_moe_bias_llama3",
    "qwen3_next_bias_yarn_f32",
    "qwen3_omni_moe_plain",
    "qwen3_vl_moe_plain",
)
# Rows of these sizes are whole blocks in every quantised type.
BLOCKS: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LATENT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
}
DELTA: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}


@dataclass(frozen=True)
class Model:
    """A model's name, and a function that makes or finds it and returns its path.

    A large model runs with fewer settings and without the plain kernels, which would take minutes.
    """

    name: str
    make: Callable[[Path], Path]
    is_large: bool = False


def gguf(scratch: Path, config: Any, type_of: gguf_models.TypeOf) -> Path:
    path = scratch / "model.gguf"
    gguf_models.write_gguf_model(path, config, type_of, seed=SEED)
    return path


def delta_gguf(scratch: Path) -> Path:
    path = scratch / "model.gguf"
    write_delta_gguf(path, qwen3_next(**DELTA), gguf_models.one_type("Q8_0"), seed=SEED)
    return path


def hub(scratch: Path, write: Callable[..., Any], config: Any) -> Path:
    write(scratch / "hub", config, seed=SEED)
    return runnable(scratch / "hub", scratch)


def packed(scratch: Path, config: Any, format: str) -> Path:
    pack(open_model(write_model(scratch / "source", config, seed=SEED)), scratch / "pack", format=format)
    return scratch / "pack"


GENERATED = (
    Model("gguf_deepseek_v3_q4_0", lambda at: gguf(at, deepseek_v3(**LATENT), gguf_models.one_type("Q4_0"))),
    Model("gguf_mixtral_iq4_nl", lambda at: gguf(
        at, mixtral(**BLOCKS, intermediate_size=256), gguf_models.one_type("IQ4_NL"))),
    Model("gguf_qwen3_moe_mixed", lambda at: gguf(
        at, qwen3_moe(**BLOCKS, moe_intermediate_size=256), gguf_models.mixed)),
    Model("gguf_qwen3_moe_mixed_small", lambda at: gguf(
        at, qwen3_moe(**BLOCKS, moe_intermediate_size=256), gguf_models.mixed_small)),
    Model("gguf_qwen3_next_q8_0", delta_gguf),
    Model("hub_fp8_qwen3_moe", lambda at: hub(
        at, write_fp8_model, qwen3_moe(hidden_size=140, moe_intermediate_size=136))),
    Model("hub_int4_kimi_k2", lambda at: hub(
        at, write_int4_model, kimi_k2(hidden_size=96, moe_intermediate_size=64))),
    Model("hub_mxfp4_gpt_oss", lambda at: hub(
        at, write_mxfp4_model, gpt_oss(hidden_size=96, intermediate_size=64))),
    Model("pack_q4_mixtral", lambda at: packed(at, mixtral(hidden_size=80, intermediate_size=72), "q4")),
    Model("pack_q8_qwen3_moe", lambda at: packed(at, qwen3_moe(num_experts=16, num_experts_per_tok=4), "q8")),
)  # fmt: skip


def models() -> list[Model]:
    committed = {reference.name: reference.directory for reference in references.REFERENCES}
    found = [Model(name, lambda at, source=committed[name]: runnable(source, at)) for name in REFERENCES]
    packs = sorted(cache_directory().glob(f"demo-*-{PACK_VERSION}-*"))
    demos = [path for path in packs if open_pack(path) is not None]
    found += [Model("demo", lambda at, path=path: path, is_large=True) for path in demos[-1:]]
    return sorted([*found, *GENERATED], key=lambda model: model.name)


def settings(model: Model) -> Iterator[tuple[str, str, int, int]]:
    """Yield the instruction set, budget, chunk size and threads of each engine."""
    instruction_sets = _native.instruction_sets()  # the plain one first
    for instruction_set in sorted(instruction_sets[1:] if model.is_large else instruction_sets):
        for b, budget in enumerate(BUDGETS):
            for c, (chunk_tokens, threads) in enumerate(CHUNKS):
                if b == c or not model.is_large:
                    yield instruction_set, budget, chunk_tokens, threads


def answers(model: Model, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of one model."""
    config = open_model(path).config
    prompts = [
        np.random.default_rng([SEED, length]).integers(3, config.vocab_size, length).tolist()
        for length in PROMPT_LENGTHS
    ]
    greedy = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
    for instruction_set, budget, chunk_tokens, threads in settings(model):
        num_slots = config.experts_per_token if budget == "smallest cache" else None
        with open_engine(
            path,
            memory="6GiB",
            context=128,
            threads=threads,
            chunk_tokens=chunk_tokens,
            expert_slots=num_slots,
            instruction_set=instruction_set,
            prefix_reuse=False,
        ) as engine:
            plan = engine.plan.as_dict()
            if (plan["expert_slots"] >= plan["experts"]) != (budget == "resident"):
                raise SystemExit(f"{model.name}: {plan['expert_slots']} expert slots are not '{budget}'")
            logits = [hashlib.sha256(engine.logits(prompt).tobytes()) for prompt in prompts]
            alone = [engine.generate_batch([prompt], greedy)[0] for prompt in prompts]
            together = engine.generate_batch(prompts, greedy)
        for batch, results in ((1, alone), (len(prompts), together)):
            yield {
                "model": model.name,
                "instruction_set": instruction_set,
                "budget": budget,
                "chunk_tokens": chunk_tokens,
                "threads": threads,
                "batch": batch,
                "tokens": {len(p): r.token_ids for p, r in zip(prompts, results, strict=True)},
                "logits_sha256": {len(p): h.hexdigest() for p, h in zip(prompts, logits, strict=True)},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="models whose names contain TEXT")
    parser.add_argument("--list", action="store_true", help="print the names of the models and stop")
    arguments = parser.parse_args()
    chosen = [model for model in models() if arguments.only in model.name]
    if not chosen:
        parser.error(f"no model's name contains {arguments.only!r}")
    if not arguments.only and not any(model.name == "demo" for model in chosen):
        print("without the demo model", file=sys.stderr)
    for model in chosen:
        if arguments.list:
            print(model.name)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            for line in answers(model, model.make(Path(scratch))):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
