"""What tests of adapters share: families and what adapters of each target, and how far logits may be from peft's."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.adapters import open_adapted
from tests.models.make_adapters import ATTENTION, EXPERTS, AdapterCase, Made
from tests.models.tiny import RawConfig, glm4_moe, gpt_oss, mixtral, olmoe, qwen3_moe
from tests.models.tiny_delta import qwen3_5_moe_text
from tests.models.tiny_latent import deepseek_v3, glm4_moe_lite

LARGEST_ERROR = 3e-4  # of a logit; the largest are about 5
SEED = 40_000

SWIGLU = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
# Modules and parameters that adapters of each family target.
FAMILIES: dict[str, tuple[RawConfig, tuple[str, ...], tuple[str, ...]]] = {
    "qwen3_moe": (qwen3_moe(), ATTENTION, ("gate.weight", *EXPERTS)),
    "gpt_oss": (gpt_oss(), ATTENTION, ("router.weight", *EXPERTS)),
    "glm4_moe": (glm4_moe(), (*ATTENTION, *SWIGLU), ("gate.weight", *EXPERTS)),
    "glm4_moe_lite": (glm4_moe_lite(), (*LATENT, *SWIGLU), ("gate.weight", *EXPERTS)),
    "deepseek_v3": (deepseek_v3(), (*LATENT, *SWIGLU), ("gate.weight", *EXPERTS)),
    "qwen3_5_moe": (
        qwen3_5_moe_text(),
        (*ATTENTION, *DELTA, *SWIGLU, "shared_expert_gate"),
        ("gate.weight", *EXPERTS),
    ),
    "mixtral": (mixtral(), ATTENTION, ("gate.weight", *EXPERTS)),
    "olmoe": (olmoe(clip_qkv=3.0), ATTENTION, ("gate.weight", *EXPERTS)),
}


def case(name: str, base: RawConfig, *, stored: str | None = None, **lora: Any) -> AdapterCase:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": [], "task_type": "CAUSAL_LM"} | lora
    return AdapterCase(name=name, base=base, lora=settings, stored=stored)


def largest_error(made: Made, **options: Any) -> float:
    with open_adapted(made.base, {"own": made.adapter}, **options) as engine:
        return float(abs(engine.logits(made.prompt, adapter="own") - made.answer.logits).max())


@torch.no_grad()
def greedy_of(model: torch.nn.Module, prompt: list[int], num_tokens: int = 12) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def family_of(base: RawConfig) -> str:
    return str(base["model_type"])
