"""LoRA adapters of routed experts that peft wrote, fused or one by one: the same logits as transformers with peft.

The tests need torch, transformers and peft (`make test-oracle`). The reference is float32 arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from argosy import SamplingParams
from tests.helpers.adapters import open_adapted
from tests.models.make_adapters import ATTENTION, EXPERTS, AdapterCase, adapted, make, make_unfused, save
from tests.models.make_models import load
from tests.models.safetensors_file import read_safetensors, write_safetensors
from tests.models.tiny import RawConfig, glm4_moe, gpt_oss, mixtral, olmoe, qwen3_moe
from tests.models.tiny_latent import deepseek_v3
from tests.oracle.adapter_cases import (
    FAMILIES,
    LARGEST_ERROR,
    SEED,
    case,
    family_of,
    greedy_of,
    largest_error,
)

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

CASES = [
    *(
        case(f"{name}-parameters", base, target_parameters=list(parameters))
        for name, (base, _, parameters) in FAMILIES.items()
    ),
    *(
        case(
            f"{name}-everything",
            base,
            alpha_pattern={"o_proj": 3, r"layers\.1\..*\.down_proj": 20, "gate_up_proj": 4},
            rank_pattern={r"layers\.[02]\..*\.o_proj": 3, "o_proj": 5, "experts.down_proj": 2, "q_proj": 17},
            stored="BF16",
            target_modules=[*modules, "embed_tokens", "lm_head"],
            target_parameters=list(parameters),
            use_rslora=True,
        )
        for name, (base, modules, parameters) in FAMILIES.items()
    ),
    case("rank 1", qwen3_moe(), r=1, target_modules=list(ATTENTION), target_parameters=list(EXPERTS)),
    case("rank 64", qwen3_moe(), r=64, target_modules=list(ATTENTION), target_parameters=list(EXPERTS)),
    case("half", gpt_oss(), stored="F16", target_modules=list(ATTENTION), target_parameters=list(EXPERTS)),
    case("down alone", qwen3_moe(), target_parameters=["experts.down_proj"]),
    case("gate and up alone", gpt_oss(), target_parameters=["experts.gate_up_proj"]),
]


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_logits_are_those_of_peft(one: AdapterCase, tmp_path: Path) -> None:
    made = make(one, tmp_path, first_seed=SEED)
    assert largest_error(made) <= LARGEST_ERROR


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe"])
def test_logits_are_those_of_peft_where_experts_are_streamed(name: str, tmp_path: Path) -> None:
    base, modules, parameters = FAMILIES[name]
    one = case(name, base, target_modules=list(modules), target_parameters=list(parameters))
    made = make(one, tmp_path, first_seed=SEED + 1)
    assert largest_error(made, expert_slots=5, chunk_tokens=5) <= LARGEST_ERROR


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_of_a_batch_is_that_of_its_own_adapter(seed: int, tmp_path: Path) -> None:
    base, modules, parameters = FAMILIES["qwen3_moe"]
    cases = [
        case("experts", base, target_parameters=list(EXPERTS)),
        case("attention", base, r=3, target_modules=list(modules)),
        case("all", base, r=5, target_modules=list(modules), target_parameters=list(parameters)),
    ]
    first = make(cases[0], tmp_path, first_seed=SEED + 100 * seed)
    prompts = [first.prompt, first.prompt[3:], first.prompt[:20], first.prompt]
    adapters: dict[str, Path] = {}
    expected = {}
    for at, one in enumerate(cases):
        model = adapted(one, first.base, SEED + at)
        adapters[one.name] = tmp_path / f"adapter{at}"
        save(model, adapters[one.name], None)
        expected[one.name] = greedy_of(model, prompts[at])
    expected["base"] = greedy_of(load(first.base), prompts[3])

    with open_adapted(first.base, adapters, expert_slots=6) as engine:
        found = engine.generate_batch(
            prompts,
            SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
            adapter=[*adapters, None],
        )
    assert [one.token_ids for one in found] == list(expected.values())


UNFUSED = (qwen3_moe(), mixtral(), olmoe(), glm4_moe(), deepseek_v3())


@pytest.mark.parametrize("base", UNFUSED, ids=family_of)
def test_pairs_of_single_experts_are_those_of_the_merged_weights(base: RawConfig, tmp_path: Path) -> None:
    made = make_unfused(base, tmp_path, first_seed=SEED)
    assert largest_error(made) <= LARGEST_ERROR


@pytest.mark.parametrize("base", UNFUSED[:2], ids=family_of)
def test_peft_means_the_merged_weights_by_pairs_of_single_experts(base: RawConfig, tmp_path: Path) -> None:
    """It fuses them. In families with shared experts, it drops the pairs of these."""
    made = make_unfused(base, tmp_path, first_seed=SEED, targets="self_attn|mlp|block_sparse_moe")
    model = peft.PeftModel.from_pretrained(load(made.base), made.adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([made.prompt])).logits[0].numpy()
    assert abs(logits - made.answer.logits).max() <= LARGEST_ERROR


# Sizes at which only the version tells, and others.
@pytest.mark.parametrize("width", [24, 32, 16])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0"])
def test_older_pefts_applied_the_first_matrix_to_rows(version: str, width: int, tmp_path: Path) -> None:
    base = qwen3_moe(hidden_size=32, moe_intermediate_size=width)
    made = make(case("experts", base, target_parameters=list(EXPERTS)), tmp_path, first_seed=SEED)
    turn_roles(made.adapter, version, num_experts=6)
    assert largest_error(made) <= LARGEST_ERROR


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0"])
def test_square_matrices_of_gpt_oss_are_read_by_version(version: str, tmp_path: Path) -> None:
    base = gpt_oss(hidden_size=28, intermediate_size=28)
    made = make(case("experts", base, target_parameters=list(EXPERTS)), tmp_path, first_seed=SEED)
    if version == "0.19.0":  # the only version with exchanged roles there
        turn_roles(made.adapter, version, num_experts=5)
    else:
        set_config(made.adapter, peft_version=version)
    assert largest_error(made) <= LARGEST_ERROR


def turn_roles(adapter: Path, version: str, *, num_experts: int) -> None:
    """Store pairs of experts as `einsum("o r e, e r i -> e i o", B, A)` reads them: A has the columns of B."""
    path = adapter / "adapter_model.safetensors"
    tensors = read_safetensors(path)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        b_name = name.replace("lora_A", "lora_B")
        a = tensors[name].reshape(num_experts, -1, tensors[name].shape[1])
        b = tensors[b_name].reshape(len(tensors[b_name]), -1, num_experts)
        tensors[name] = np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(-1, len(b))
        tensors[b_name] = np.ascontiguousarray(a.transpose(2, 1, 0)).reshape(a.shape[2], -1)
    write_safetensors(path, {name: ("F32", values) for name, values in tensors.items()})
    set_config(adapter, peft_version=version)


def set_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
