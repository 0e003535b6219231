"""Does `--memory` hold? Runs a model of more than four times the budget in a memory cgroup limited to the budget.

    python benchmarks/memory.py [--model-gib 2.8] [--memory 640MiB] [--short]

The checkpoint is made first. Its tokens are computed once with everything resident and no limit. Then the same prompt
runs in the cgroup, with swap forbidden and the files' page cache dropped. The kernel's own peak includes anonymous
memory, page cache and page tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from argosy import Engine, SamplingParams
from argosy.config import format_bytes, parse_size
from argosy.model.families import open_model
from cgroup import CappedRun, NoMemoryCap, run_capped
from common import Report, Sample, drop_page_cache, print_parts, print_plan, run_inside
from make_checkpoint import make_model, raw_config

SMALLEST_RATIO = 4  # model over budget


def inside(model: Path, memory: str, prompt_tokens: int, new_tokens: int, threads: int) -> None:
    """Run one prompt in this process, and print its cost as JSON."""
    with Engine.open(model, memory=memory, threads=threads, context=prompt_tokens + new_tokens) as engine:
        prompt = np.random.default_rng(7).integers(0, engine.config.vocab_size, prompt_tokens).tolist()
        # Not greedy: a random model soon repeats itself, and then needs only the same few experts.
        params = SamplingParams(max_tokens=new_tokens, temperature=1, seed=1, ignore_eos=True)
        after_prefill = None
        for event in engine.stream(prompt, params):
            if after_prefill is None:
                after_prefill = engine.ledger
            result = event.result
        assert result is not None
        assert after_prefill is not None
        print(
            json.dumps(
                {
                    "tokens": result.token_ids,
                    "ledger": result.ledger.as_dict(),
                    "prefill_bytes": after_prefill.bytes_read,
                    "prefill_hits": [after_prefill.hits, after_prefill.lookups],
                    "plan": engine.plan.lines(),
                    "budget_bytes": engine.plan.budget_bytes,
                }
            )
        )


def run(
    model: Path, memory: int, prompt_tokens: int, new_tokens: int, threads: int, *, cap: bool
) -> tuple[dict[str, Any], CappedRun | None]:
    arguments = ["--inside", model, "--memory", memory, "--prompt", prompt_tokens]
    command = run_inside("memory.py", [*arguments, "--new", new_tokens, "--threads", threads])
    if not cap:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the run without a limit failed ({done.returncode}):\n{done.stderr[-2000:]}")
        return json.loads(done.stdout), None
    drop_page_cache(model)
    capped = run_capped(command, limit_bytes=memory, timeout_s=1800)
    if capped.returncode:
        raise SystemExit(
            f"the run in {format_bytes(memory)} ended with {capped.returncode}, "
            f"{capped.num_oom_kills} killed for memory:\n{capped.stderr[-2000:]}"
        )
    return json.loads(capped.stdout), capped


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-gib", type=float, default=2.8, help="size of the bf16 checkpoint")
    parser.add_argument("--memory", default="640MiB")
    parser.add_argument("--format", choices=["bf16", "pack-bf16", "q8", "q4"], default="bf16")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="keep the checkpoint here for the next run")
    parser.add_argument("--short", action="store_true", help="a 0.6 GiB model in 144 MiB")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, options.memory, options.prompt, options.new, options.threads)
        return 0
    if options.short:
        options.model_gib, options.memory = 0.6, "144MiB"
    memory = parse_size(options.memory)
    config = geometry(options.model_gib)
    with tempfile.TemporaryDirectory() as scratch:
        name = f"memory-{options.model_gib:g}-{options.format}"
        model = make_model((options.models or Path(scratch)) / name, config, format=options.format)
        return measure(options, model, memory)


def geometry(model_gib: float) -> dict[str, Any]:
    """Layers of 32 experts, enough of them for the requested size."""
    hidden, width, experts = (1024, 768, 32) if model_gib >= 1 else (512, 384, 64)
    layer_bytes = 2 * 3 * hidden * width * experts
    layers = max(2, round(model_gib * 2**30 / layer_bytes))
    return raw_config(
        hidden=hidden, width=width, experts=experts, layers=layers, heads=hidden // 128, vocab=4096
    )


def measure(options: argparse.Namespace, model: Path, memory: int) -> int:
    files = open_model(model)
    model_bytes = files.dense_bytes + files.expert_bytes
    report = Report("memory", state="page cache of the model dropped, expert cache cold, swap forbidden")
    arguments = (options.prompt, options.new, options.threads)
    free, _ = run(model, 4 * model_bytes + (1 << 30), *arguments, cap=False)
    try:
        with Sample() as sample:
            found, capped = run(model, memory, *arguments, cap=True)
    except NoMemoryCap as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0
    assert capped is not None
    equal = sum(a == b for a, b in zip(found["tokens"], free["tokens"], strict=True))
    report.correct(f"{equal}/{options.new} tokens equal to a run with every expert resident")
    report.opening()
    report.line(
        "model", f"{format_bytes(model_bytes)} {options.format}, {model_bytes / memory:.1f} times the budget"
    )
    print_plan(report, found["plan"], memory)
    ledger = found["ledger"]
    first, wall = ledger["time_to_first_token_s"], ledger["wall_s"]
    decode_bytes = ledger["bytes_read"] - found["prefill_bytes"]
    decode_hits = ledger["hits"] - found["prefill_hits"][0]
    decode_lookups = ledger["lookups"] - found["prefill_hits"][1]
    sample.values = {
        "peak": capped.peak_bytes / 2**20,
        "anonymous": capped.peak_anonymous_bytes / 2**20,
        "prefill": options.prompt / first,
        "decode": (options.new - 1) / (wall - first),
        "prefill_hit": found["prefill_hits"][0] / max(1, found["prefill_hits"][1]),
        "decode_hit": decode_hits / max(1, decode_lookups),
        "prefill_gb": found["prefill_bytes"] / 1e9,
        "decode_mb": decode_bytes / 1e6 / max(1, options.new - 1),
        "rate": ledger["bytes_read"] / 1e9 / wall,
    }
    facts = {"model_bytes": model_bytes, "memory": memory, "format": options.format}
    report.figure("peak, page cache included", "MiB", [sample], "peak", **facts)
    report.figure("peak of anonymous memory (sampled)", "MiB", [sample], "anonymous", **facts)
    report.figure("prefill", "tok/s", [sample], "prefill", **facts)
    report.figure("decode", "tok/s", [sample], "decode", **facts)
    report.figure("hit rate, prefill from cold", "", [sample], "prefill_hit", **facts)
    report.figure("hit rate, decode", "", [sample], "decode_hit", **facts)
    report.figure("read while prefilling", "GB", [sample], "prefill_gb", **facts)
    report.figure("read while decoding", "MB/token", [sample], "decode_mb", **facts)
    report.figure("read per second of wall time", "GB/s", [sample], "rate", **facts)
    report.ratio("peak / budget", capped.peak_bytes, memory, target="<= 1.00")
    print_parts(ledger["parts"], wall)
    report.line(
        "kernel",
        f"cgroup {capped.hierarchy}: {capped.num_oom_kills} kills, {capped.peak_swap_bytes} bytes of swap, "
        f"limit met {capped.num_limit_hits} times (page cache given back)",
    )
    report.neighbours([sample])
    is_good = (
        equal == options.new
        and capped.peak_bytes <= memory
        and not capped.num_oom_kills
        and not capped.peak_swap_bytes
        and model_bytes >= SMALLEST_RATIO * memory
    )
    report.line("verdict", "holds" if is_good else "DOES NOT HOLD")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
