"""What does a LoRA adapter on every attention and expert matrix cost, alone and for eight clients with eight adapters?

    python benchmarks/adapters.py [--geometries mid] [--formats Q4_0] [--rank 16] [--repeats 3] [--short]

Each sample is a fresh process, A B A B: the base model by itself, one adapter, eight adapters. A process decodes a
document per client greedily, and times the steps in which every client decodes. First everything is in memory, then
the budget is a quarter of the model's file. Adapters have random values in bfloat16, written as peft writes fused
experts, and are removed at the end. An adapter's experts are read with those of the base if they do not fit.

    memory      bytes that the plan counts for adapters, and the peak above that of the base
    MB/token    what a token reads from the drive

Targets: with an adapter at least 0.85 of the base's tokens per second; eight clients with one each at least 0.7 of
eight clients of the base. Answers of one adapter are equal in all processes, alone and beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from argosy import Engine, SamplingParams
from argosy.checkpoint.geometry import expert_shapes
from argosy.checkpoint.safetensors_write import TensorToWrite, to_bfloat16_bits, write_safetensors
from argosy.config import AttentionConfig, ModelConfig, format_bytes
from argosy.model.families import open_model
from child import peak_bytes
from common import Report, Sample, alternate, drop_page_cache, file_bytes, run_inside, tidy_up_when_terminated
from engines import Case, decode_all, parse_cases
from random_weights import document

CLIENTS = 8
PROMPT_TOKENS = 16
WARM_UP_TOKENS = 8
ALONE, TOGETHER = ">= 0.85", ">= 0.7"
SHARE = 25  # percent of the model's file
FEWEST_BYTES = 160 << 20  # for the short form
ROOM_BYTES = 2 << 30  # beside weights and adapters, where everything is in memory
BASE, ONE, EIGHT = "base", "one adapter", "eight adapters"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit, and its name in the table."""

    name: str
    nbytes: int


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new", type=int, default=48, help="tokens of each answer")
    options, cases = parse_cases(parser, geometries="mid", formats="Q4_0", threads="2", repeats=3)
    tidy_up_when_terminated()
    for case in cases:
        measure(case, options)
    return 0


def measure(case: Case, options: argparse.Namespace) -> None:
    report = Report("adapters", state="fresh process each, page cache dropped before it")
    with written_adapters(case, options.rank) as places:
        adapter_bytes = file_bytes(places[0])
        size = file_bytes(case.model)
        budgets = (
            Budget(name="in memory", nbytes=size + CLIENTS * adapter_bytes + ROOM_BYTES),
            Budget(name=f"{SHARE} %", nbytes=max(size * SHARE // 100, FEWEST_BYTES)),
        )
        answers: dict[str, list[Any]] = {}
        samples = {
            budget.name: alternate(variants(case, places, budget, options, answers), options.repeats)
            for budget in budgets
        }
    check(report, answers)
    report.opening()
    report.line(
        "adapter", f"{format_bytes(adapter_bytes)}, rank {options.rank}, {case.geometry} {case.format}"
    )
    for budget in budgets:
        tell(report, budget, samples[budget.name])


def variants(
    case: Case,
    places: Sequence[Path],
    budget: Budget,
    options: argparse.Namespace,
    answers: dict[str, list[Any]],
) -> dict[str, Callable[[], dict[str, float]]]:
    """Every sample of a budget: what runs, and its figures."""

    def one(
        name: str, adapters: Sequence[Path], client_counts: Sequence[int]
    ) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            drop_page_cache(case.model)
            for place in adapters[:1]:  # the others are the same file
                drop_page_cache(place)
            job = {
                "model": str(case.model), "memory": budget.nbytes, "threads": case.threads,
                "new": 8 if options.short else options.new, "adapters": [str(place) for place in adapters],
                "clients": list(client_counts),
            }  # fmt: skip
            done = subprocess.run(
                run_inside("adapters.py", ["--child", json.dumps(job)]),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{name}, {budget.name}: {done.stderr[-2000:]}")
            told = json.loads(done.stdout)
            for count, texts in zip(client_counts, told["answers"], strict=True):
                answers.setdefault(f"{name}, {count}", []).append(texts)
            answers.setdefault(name, []).append([told["probe"]])
            return dict(told["figures"])

        return run

    return {
        BASE: one(BASE, (), (1, CLIENTS)),
        ONE: one(ONE, places[:1], (1,)),
        EIGHT: one(EIGHT, places, (CLIENTS,)),
    }


def check(report: Report, answers: dict[str, list[Any]]) -> None:
    """Require equal answers of every process, and of an adapter alone and beside others."""
    for name, found in answers.items():
        if any(one != found[0] for one in found):
            raise SystemExit(f"{name}: answers differ between processes or budgets")
    first = answers[f"{ONE}, 1"][0][0]
    if answers[f"{EIGHT}, {CLIENTS}"][0][0] != first or answers[ONE] != answers[EIGHT]:
        raise SystemExit("an adapter answers otherwise beside seven others")
    if answers[ONE][0] == answers[BASE][0]:
        raise SystemExit("the adapter changes nothing")
    report.correct(f"{len(first)} tokens equal alone, beside seven other adapters, and at both budgets")


def tell(report: Report, budget: Budget, samples: dict[str, list[Sample]]) -> None:
    base, one, eight = samples[BASE], samples[ONE], samples[EIGHT]
    rows = (
        ("base, 1 client", base, 1),
        (f"base, {CLIENTS} clients", base, CLIENTS),
        (ONE, one, 1),
        (EIGHT, eight, CLIENTS),
    )
    speeds = {}
    for label, found, clients in rows:
        key = f"tok/s {clients}"
        speeds[label] = report.figure(f"{budget.name}: {label}", "tok/s", found, key)
        report.figure(f"{budget.name}: {label}", "MB/token read", found, f"MB/token {clients}")
    report.ratio(
        f"{budget.name}: one adapter over the base", speeds[ONE], speeds["base, 1 client"], target=ALONE
    )
    report.ratio(
        f"{budget.name}: eight over the base",
        speeds[EIGHT],
        speeds[f"base, {CLIENTS} clients"],
        target=TOGETHER,
    )
    for label, found in ((ONE, one), (EIGHT, eight)):
        report.figure(f"{budget.name}: {label}", "MB of adapters in the plan", found, "adapter MB")
        report.figure(f"{budget.name}: {label}", "MB of peak memory", found, "peak MB")
    report.neighbours([*base, *one, *eight])


def child(job: dict[str, Any]) -> None:
    """Open the model with its adapters, decode, and print figures and answers."""
    names = [f"a{number}" for number in range(len(job["adapters"]))]
    with Engine.open(
        job["model"],
        memory=job["memory"],
        threads=job["threads"],
        context=512,
        max_sequences=CLIENTS,
        prefix_reuse=False,
        loras=dict(zip(names, job["adapters"], strict=True)),
    ) as engine:
        figures, answers = {}, []
        probe = engine.generate(
            document(1, PROMPT_TOKENS),
            SamplingParams(max_tokens=4, ignore_eos=True, temperature=0, logprobs=1),
            adapter=names[0] if names else None,
        )
        for clients in job["clients"]:
            chosen: list[str | None] = [*names[:clients]] or [None] * clients
            decode(engine, chosen, WARM_UP_TOKENS, first_document=20)
            read = engine.ledger.bytes_read
            seconds, tokens, texts = decode(engine, chosen, job["new"], first_document=1)
            figures[f"tok/s {clients}"] = tokens / seconds
            figures[f"MB/token {clients}"] = (
                (engine.ledger.bytes_read - read) / 1e6 / (len(texts) * job["new"])
            )
            answers.append(texts)
        planned = sum(nbytes for name, nbytes, _ in engine.plan.lines() if "adapter" in name)
        figures |= {"adapter MB": planned / 1e6, "peak MB": peak_bytes() / 1e6}
    logprobs = [one.logprob for one in probe.logprobs or ()]
    print(json.dumps({"figures": figures, "answers": answers, "probe": logprobs}))


def decode(
    engine: Engine, adapters: Sequence[str | None], num_new: int, *, first_document: int
) -> tuple[float, int, list[list[int]]]:
    """Seconds of the steps in which every client decodes, their tokens, and the answers."""
    params = SamplingParams(max_tokens=num_new, ignore_eos=True, temperature=0)
    sequences = [
        engine.submit(document(first_document + number, PROMPT_TOKENS), params, adapter=adapter)
        for number, adapter in enumerate(adapters)
    ]
    seconds, made = decode_all(engine, sequences)
    return seconds, made, [list(sequence.new_ids) for sequence in sequences]


@contextmanager
def written_adapters(case: Case, rank: int) -> Iterator[list[Path]]:
    """Directories of adapters beside the model, of one file and eight scales; removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="adapters-", dir=case.model.parent))
    try:
        weights = root / "adapter_model.safetensors"
        config = open_model(case.model).own_config
        write_safetensors(weights, adapter_tensors(config, rank))
        places = [root / str(number) for number in range(CLIENTS)]
        for number, place in enumerate(places):
            place.mkdir()
            os.link(weights, place / weights.name)
            settings = {
                "bias": "none", "init_lora_weights": True, "lora_alpha": rank * (1 + number / CLIENTS),
                "peft_type": "LORA", "peft_version": "0.21.2", "r": rank,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            }  # fmt: skip
            (place / "adapter_config.json").write_text(json.dumps(settings))
        yield places
    finally:
        shutil.rmtree(root, ignore_errors=True)


def adapter_tensors(config: ModelConfig, rank: int) -> Iterator[TensorToWrite]:
    """Pairs of all attention matrices and experts, whose products are a tenth of their inputs."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def tensor(name: str, rows: int, columns: int, size: float) -> TensorToWrite:
        def values() -> bytes:
            count, start = rows * columns, hash_of(name) % (len(noise) // 2)
            return to_bfloat16_bits(size * np.resize(noise[start:], count)).tobytes()

        return f"base_model.model.model.layers.{name}.weight", "BF16", (rows, columns), values

    def pair(name: str, rows: int, columns: int, experts: int = 1) -> Iterator[TensorToWrite]:
        yield tensor(f"{name}.lora_A", experts * rank, columns, columns**-0.5)
        yield tensor(f"{name}.lora_B", rows, experts * rank, 0.1 * rank**-0.5)

    for layer, described in enumerate(config.layers):
        mixer = described.mixer
        assert isinstance(mixer, AttentionConfig)
        q_rows, kv_rows = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            yield from pair(f"{layer}.self_attn.{name}_proj", rows, config.hidden_size)
        yield from pair(f"{layer}.self_attn.o_proj", config.hidden_size, q_rows)
        if described.is_moe:
            (width, hidden), _, _ = expert_shapes(config, layer)
            experts = f"{layer}.mlp.experts"
            yield from pair(f"{experts}.base_layer", 2 * width, hidden, config.num_experts)
            yield from pair(experts, hidden, width, config.num_experts)


def hash_of(name: str) -> int:
    """The same in every process."""
    return sum(ord(letter) * 31**at for at, letter in enumerate(name))


if __name__ == "__main__":
    sys.exit(main())
