"""LoRA adapters that peft wrote: the same logits as transformers with peft, for every kind of matrix.

The tests need torch, transformers and peft (`make test-oracle`). The reference is float32 arithmetic.
`test_expert_adapters.py` has routed experts.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from argosy import SamplingParams
from tests.helpers.adapters import open_adapted
from tests.models.make_adapters import ATTENTION, NOT_ROUTED, AdapterCase, adapted, make, make_unfused, save
from tests.models.make_models import load
from tests.models.safetensors_file import read_safetensors, write_safetensors
from tests.models.tiny import RawConfig, glm4_moe, gpt_oss, qwen3_moe
from tests.models.tiny_latent import deepseek_v3
from tests.oracle.adapter_cases import (
    FAMILIES,
    LARGEST_ERROR,
    LATENT,
    SEED,
    SWIGLU,
    case,
    family_of,
    greedy_of,
    largest_error,
)

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

CASES = [
    *(
        case(
            f"{name}-modules",
            base,
            alpha_pattern={"o_proj": 3, r"layers\.1\..*\.down_proj": 20},
            rank_pattern={r"layers\.[02]\..*\.o_proj": 3, "o_proj": 5, "q_proj": 17},
            stored="BF16",
            target_modules=[*modules, "embed_tokens", "lm_head"],
            target_parameters=[parameters[0]],
            use_rslora=True,
        )
        for name, (base, modules, parameters) in FAMILIES.items()
    ),
    case("rank 1", qwen3_moe(), r=1, target_modules=list(ATTENTION)),
    case("rank 64", deepseek_v3(), r=64, target_modules=[*LATENT, *SWIGLU]),
    case("half", gpt_oss(), stored="F16", target_modules=list(ATTENTION)),
    case("router alone", qwen3_moe(), target_parameters=["gate.weight"]),
    case("some layers", qwen3_moe(), target_modules=["q_proj"], layers_to_transform=[1]),
    case("tables", glm4_moe(), target_modules=["embed_tokens", "lm_head"]),
    case("a tied table", qwen3_moe(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"]),
    case("whole tables", qwen3_moe(), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    case("a whole head", deepseek_v3(), target_modules=["kv_b_proj"], modules_to_save=["lm_head"]),
    case("whole routers", qwen3_moe(), target_modules=["o_proj"], modules_to_save=["gate"]),
    case(
        "invoked", qwen3_moe(), alora_invocation_tokens=[7, 8, 9], target_modules=list(ATTENTION)
    ),
    *(
        case(
            f"{name}-dora",
            base,
            alpha_pattern={"o_proj": 3},
            rank_pattern={"o_proj": 5},
            target_modules=[*modules, "embed_tokens", "lm_head"],
            use_dora=True,
        )
        for name, (base, modules, _) in FAMILIES.items()
    ),
    case(
        "dora in 16 bits", gpt_oss(), r=1, stored="BF16", target_modules=list(ATTENTION), use_dora=True, use_rslora=True
    ),
    case(
        "dora of a tied table", qwen3_moe(tie_word_embeddings=True), target_modules=["embed_tokens"], use_dora=True
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_logits_are_those_of_peft(one: AdapterCase, tmp_path: Path) -> None:
    made = make(one, tmp_path, first_seed=SEED)
    assert largest_error(made) <= LARGEST_ERROR


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe"])
def test_logits_are_those_of_peft_where_experts_are_streamed(name: str, tmp_path: Path) -> None:
    base, modules, _ = FAMILIES[name]
    made = make(case(name, base, target_modules=list(modules)), tmp_path, first_seed=SEED + 1)
    assert largest_error(made, expert_slots=5, chunk_tokens=5) <= LARGEST_ERROR


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_of_a_batch_is_that_of_its_own_adapter(seed: int, tmp_path: Path) -> None:
    base, modules, parameters = FAMILIES["qwen3_moe"]
    cases = [
        case("attention", base, r=3, target_modules=list(modules)),
        case("values", base, r=8, target_modules=["v_proj"]),
        case("all", base, r=5, target_modules=[*modules, "lm_head"], target_parameters=[parameters[0]]),
        case("dora", base, r=4, target_modules=[*modules, "embed_tokens", "lm_head"], use_dora=True),
    ]
    first = make(cases[0], tmp_path, first_seed=SEED + 100 * seed)
    prompts = [first.prompt, first.prompt[3:], first.prompt[:20], first.prompt[1:], first.prompt]
    adapters: dict[str, Path] = {}
    expected = {}
    for at, one in enumerate(cases):
        model = adapted(one, first.base, SEED + at)
        adapters[one.name] = tmp_path / f"adapter{at}"
        save(model, adapters[one.name], None)
        expected[one.name] = greedy_of(model, prompts[at])
    expected["base"] = greedy_of(load(first.base), prompts[-1])

    with open_adapted(first.base, adapters, expert_slots=6) as engine:
        found = engine.generate_batch(
            prompts,
            SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
            adapter=[*adapters, None],
        )
    assert [one.token_ids for one in found] == list(expected.values())


@pytest.mark.parametrize("base", [qwen3_moe(), glm4_moe(), deepseek_v3()], ids=family_of)
def test_pairs_of_transformers_4_are_those_of_the_merged_weights(base: RawConfig, tmp_path: Path) -> None:
    made = make_unfused(base, tmp_path, first_seed=SEED, targets=NOT_ROUTED)
    assert largest_error(made) <= LARGEST_ERROR


@pytest.mark.parametrize(
    "prefix", ["base_model.model.model.language_model.", "base_model.model.language_model.model."]
)
def test_adapters_of_a_whole_multimodal_model_are_those_of_its_text(prefix: str, tmp_path: Path) -> None:
    base, modules, _ = FAMILIES["qwen3_5_moe"]
    made = make(case("text", base, target_modules=list(modules)), tmp_path, first_seed=SEED)
    path = made.adapter / "adapter_model.safetensors"
    renamed = {
        name.replace("base_model.model.model.", prefix): t for name, t in read_safetensors(path).items()
    }
    write_safetensors(path, {name: ("F32", values) for name, values in renamed.items()})
    assert largest_error(made) <= LARGEST_ERROR


@pytest.mark.parametrize(
    ("factor", "is_dora"), [(0.0, False), (0.5, False), (-1.0, False), (0.5, True), (-2.0, True)]
)
def test_a_factor_multiplies_every_pair(factor: float, is_dora: bool, tmp_path: Path) -> None:
    base, modules, parameters = FAMILIES["glm4_moe"]
    more = {"use_dora": True} if is_dora else {"target_parameters": [parameters[0]]}
    one = case("all", base, target_modules=[*modules, "embed_tokens"], **more)
    made = make(one, tmp_path, first_seed=SEED)
    model = adapted(one, made.base, 0)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= factor
    save(model, made.adapter, None)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([made.prompt])).logits[0].numpy()
    with open_adapted(made.base, {"own": (made.adapter, factor)}) as engine:
        assert abs(engine.logits(made.prompt, adapter="own") - expected).max() <= LARGEST_ERROR
