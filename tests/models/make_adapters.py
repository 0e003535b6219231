"""Write LoRA adapters of tiny models with peft, and the logits of transformers with them (needs torch and peft).

    python -m tests.models.make_adapters        # rewrite the committed ones: `reference_adapters/`

A case is a base model and the arguments of a `LoraConfig`. peft writes B as zeros, which would hide every mistake, so
all values of an adapter are random, of a size that changes each product by about as much as it is. Seeds with a near
tie are skipped, as in `make_models.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, transformers_weight_conversion

from tests.models.make_models import FEWEST_DISTINCT_TOKENS, Answer, answer, load, routing_margin
from tests.models.references import ADAPTERS, DIRECTORY
from tests.models.safetensors_file import (
    Array,
    decode,
    encode,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)
from tests.models.tiny import RawConfig, prompt_ids, write_model

SCALE = 0.5  # alpha over rank of adapters as transformers 4 wrote them
GAIN = 0.7  # the size of a pair's product next to that of its input
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NOT_ROUTED = r"^(?!.*(\.experts\.|\.gate\.)).*$"  # names of tensors of all but routed experts and routers
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCase:
    """A base model and an adapter of it.

    lora: arguments of peft's LoraConfig.
    stored: the format of the values in the adapter's file; None: as peft writes them, in float32.
    """

    name: str
    base: RawConfig
    lora: Mapping[str, Any]
    stored: str | None = None
    gain: float = GAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Directories of a base model and an adapter, a prompt, and what transformers answers with the adapter."""

    base: Path
    adapter: Path
    prompt: list[int]
    answer: Answer


def adapted(case: AdapterCase, base: Path, seed: int) -> peft.PeftModel:
    """Load the base and put random pairs on it."""
    model = load(base)
    with unconverted():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**case.lora))
    randomise(wrapped, seed, case.gain, case.stored)
    return wrapped.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int, gain: float, stored: str | None) -> None:
    """Give every value of the adapter `default` a random value, exact in the format of its file."""
    generator = torch.Generator().manual_seed(seed)

    def fill(values: torch.Tensor, size: float) -> None:
        noise = size * torch.randn(values.shape, generator=generator)
        values.copy_(rounded(noise, stored))

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for values in module.modules_to_save["default"].parameters():
                fill(values, float(values.std()))
        if not isinstance(module, LoraLayer):
            continue
        rank, scale = module.r["default"], module.scaling["default"]
        of_b = gain / (scale * rank**0.5)
        if "default" in module.lora_embedding_A:
            fill(module.lora_embedding_A["default"], 1.0)
            fill(module.lora_embedding_B["default"], of_b)
        else:
            fill(module.lora_A["default"].weight, module.in_features**-0.5)
            fill(module.lora_B["default"].weight, of_b)
        if "default" in module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector["default"].weight
            factors = 1 + 0.3 * torch.randn(magnitude.shape, generator=generator)
            magnitude.copy_(rounded(magnitude * factors, stored))


def rounded(values: torch.Tensor, stored: str | None) -> torch.Tensor:
    if stored is None:
        return values
    return values.to({"BF16": torch.bfloat16, "F16": torch.float16}[stored]).float()


def save(model: peft.PeftModel, directory: Path, stored: str | None) -> None:
    """Write the adapter as peft does, with values in the format `stored`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, that it adds the tables of the base
        model.save_pretrained(directory)
    (directory / "README.md").unlink()
    if stored is not None:
        path = directory / "adapter_model.safetensors"
        write_safetensors(path, {name: (stored, values) for name, values in read_safetensors(path).items()})


def make(
    case: AdapterCase, directory: Path, *, first_seed: int, num_tokens: int = 16, base: Path | None = None
) -> Made:
    """Write an adapter into `directory`, from the first seed that decides every choice clearly.

    base: an existing checkpoint of `case.base`; None: one is written, too.
    """
    adapter = directory / "adapter"
    for seed in range(first_seed, first_seed + 1000):
        model_path = base or write_model(directory / "base", case.base, seed=seed, dtype="F32")
        prompt = prompt_ids(case.base, seed)
        invocation = case.lora.get("alora_invocation_tokens", [])
        for at in (5, 19) if invocation else ():  # the last one counts
            prompt[at : at + len(invocation)] = invocation
        model = adapted(case, model_path, seed)
        reference = full_pass(model, prompt) if invocation else answer(model, prompt, num_tokens)
        if reference.is_decided:
            save(model, adapter, case.stored)
            return Made(base=model_path, adapter=adapter, prompt=prompt, answer=reference)
    raise AssertionError(f"{case.name}: 1000 seeds, each with a near tie")


@torch.no_grad()
def full_pass(model: peft.PeftModel, prompt: list[int]) -> Answer:
    """The logits alone: with a cache, peft would look for the invocation in the last token only."""
    margins: list[float] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(
                lambda m, inputs, out: margins.append(routing_margin(m, inputs, out[0]))
            )
    logits = model(input_ids=torch.tensor([prompt])).logits[0].float().numpy()
    return Answer(
        logits=logits,
        greedy=list(range(FEWEST_DISTINCT_TOKENS)),
        router_margin=min(margins, default=1.0),
        greedy_margin=1.0,
    )


@contextmanager
def unconverted() -> Iterator[None]:
    """Let `gate_proj` and the like name dense matrices alone.

    peft turns them into parameters of fused experts, and then no shared or dense matrix is a target: adapters made with
    transformers 4 have pairs for these.
    """
    name = "convert_peft_config_for_transformers"
    with mock.patch.object(transformers_weight_conversion, name, return_value=None):
        yield


def make_unfused(
    base_config: RawConfig,
    directory: Path,
    *,
    first_seed: int,
    rank: int = 4,
    stored: str = "F32",
    targets: str = "",
    base: Path | None = None,
) -> Made:
    """Do as `make` with an adapter as transformers 4 wrote it: a pair for each matrix of the hub's checkpoint whose
    name `targets` finds, routed experts one by one. The reference is transformers on the merged weights.
    """
    adapter, merged = directory / "adapter", directory / "merged"
    adapter.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + 1000):
        model_path = base or write_model(directory / "base", base_config, seed=seed, dtype="F32")
        tensors = read_checkpoint(model_path)
        pairs = random_pairs(tensors, seed, rank, stored, targets)
        merge(tensors, pairs)
        merged.mkdir(exist_ok=True)
        (merged / "config.json").write_bytes((model_path / "config.json").read_bytes())
        write_safetensors(merged / "model.safetensors", {name: ("F32", one) for name, one in tensors.items()})
        prompt = prompt_ids(base_config, seed)
        reference = answer(load(merged), prompt)
        if reference.is_decided:
            break
    else:
        raise AssertionError("1000 seeds, each with a near tie")
    write_safetensors(
        adapter / "adapter_model.safetensors", {name: (stored, one) for name, one in pairs.items()}
    )
    modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in pairs})
    settings = {
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "lora_alpha": rank * SCALE, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": rank,
        "target_modules": modules, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Made(base=model_path, adapter=adapter, prompt=prompt, answer=reference)


def random_pairs(
    tensors: Mapping[str, Array], seed: int, rank: int, stored: str, targets: str
) -> dict[str, Array]:
    rng, pairs = np.random.default_rng([seed, 7]), {}
    for name, weight in tensors.items():
        if weight.ndim != 2 or "norm" in name or not re.search(targets, name):
            continue
        is_table = "embed_tokens" in name  # whose pair is that of its transpose
        rows, columns = weight.shape[::-1] if is_table else weight.shape
        a = (1 if is_table else columns**-0.5) * rng.standard_normal((rank, columns), np.float32)
        b = GAIN / (SCALE * rank**0.5) * rng.standard_normal((rows, rank), np.float32)
        ends = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        for end, values in zip(ends, (a, b), strict=True):
            exact = decode(stored, encode(stored, values)).reshape(values.shape)
            pairs[f"base_model.model.{name.removesuffix('.weight')}.{end}"] = exact
    return pairs


def merge(tensors: dict[str, Array], pairs: Mapping[str, Array]) -> None:
    for a_name in [name for name in pairs if "_A" in name]:
        stem = a_name.partition(".lora_")[0].removeprefix("base_model.model.") + ".weight"
        product = SCALE * pairs[a_name.replace("_A", "_B")].astype(np.float64) @ pairs[a_name]
        tensors[stem] = (tensors[stem] + (product.T if "embedding" in a_name else product)).astype(np.float32)


def write_references() -> None:
    """Rewrite the committed adapters, of bases with committed references."""
    modules, parameters = list(ATTENTION), list(EXPERTS)
    fused = AdapterCase(
        name="qwen3_moe_plain",
        base=json.loads((DIRECTORY / "qwen3_moe_plain" / "config.json").read_text()),
        lora={
            "r": 4, "lora_alpha": 8, "rank_pattern": {"experts.down_proj": 3},
            "target_modules": modules, "target_parameters": ["gate.weight", *parameters],
        },
        stored="BF16",
    )  # fmt: skip
    transposed = AdapterCase(
        name="gpt_oss_plain",
        base=json.loads((DIRECTORY / "gpt_oss_plain" / "config.json").read_text()),
        lora={
            "r": 2, "lora_alpha": 3, "target_modules": modules, "target_parameters": ["router.weight", *parameters],
            "use_rslora": True,
        },
        stored="F16",
    )  # fmt: skip
    for case in (fused, transposed):
        place = ADAPTERS / case.name
        keep(make(case, place, first_seed=1, base=DIRECTORY / case.name), place)
    # Every expert; and everything that is not routed.
    for name, targets in (("deepseek_v3_plain", ""), ("glm4_moe_plain", NOT_ROUTED)):
        base, place = DIRECTORY / name, ADAPTERS / name
        config = json.loads((base / "config.json").read_text())
        keep(
            make_unfused(config, place, first_seed=1, rank=2, stored="BF16", base=base, targets=targets),
            place,
        )


def keep(made: Made, place: Path) -> None:
    """Move the adapter into `place`, and write the answer beside it."""
    for path in made.adapter.iterdir():
        path.rename(place / path.name)
    shutil.rmtree(made.adapter)
    shutil.rmtree(place / "merged", ignore_errors=True)
    settings = json.loads((place / "adapter_config.json").read_text())
    if settings.get("base_model_name_or_path"):
        settings["base_model_name_or_path"] = made.base.name
    for key in ("target_modules", "target_parameters"):  # sets, in any order
        settings[key] = sorted(settings.get(key) or [])
    (place / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (place / "adapter_model.safetensors").chmod(0o644)
    write_safetensors(
        place / "ref.safetensors",
        {
            "input_ids": ("I64", np.array(made.prompt)),
            "greedy": ("I64", np.array(made.answer.greedy)),
            "logits": ("F32", made.answer.logits),
        },
    )
    facts = {"base": made.base.name, "peft": peft.__version__, "transformers": transformers.__version__}
    (place / "reference.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    write_references()
