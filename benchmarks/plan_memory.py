"""Does a process take as much memory as `argosy plan` says, and never more?

    python benchmarks/plan_memory.py [--short] [--cells bf16]

A cell is a family, a format, a budget (percent of the way from the smallest budget to all experts in memory), a
context, its KV format and a number of sequences at once. For each, `argosy plan --json` predicts in a process of its
own. Then another one opens the model with that budget and fills what was planned: prompts of all sequences together
fill the context, chunk by chunk, and their answers fill the expert cache. Its peak is the kernel's `VmHWM` and its page
tables; libraries that it maps count. Where a memory cgroup can be made, it runs in one that is limited to the budget,
without swap, so that a plan that is too small would end the process.

Targets: the peak is at most the plan, and at least 97 % of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from argosy import Engine, SamplingParams
from argosy.checkpoint.files import ModelFiles
from argosy.config import EngineConfig
from argosy.machine import resources
from argosy.observe.recorder import Recorder
from cgroup import NoMemoryCap, run_capped
from common import Report, drop_page_cache
from engines import MODELS
from make_checkpoint import GEOMETRIES, named_model

TARGET = 0.03
_ANSWER_TOKENS = 24


class Cell(NamedTuple):
    geometry: str
    family: str
    format: str
    percent: int
    context: int
    streams: int = 1
    kv: str = "f32"

    def __str__(self) -> str:
        kv = "" if self.kv == "f32" else f" {self.kv}"
        return (
            f"{self.geometry} {self.family} {self.format} {self.percent} %, context {self.context}{kv}, "
            f"{self.streams} at once"
        )


CELLS = (
    Cell("small", "qwen3_moe", "Q4_0", 0, 1024),
    Cell("small", "qwen3_moe", "Q4_0", 25, 1024),
    Cell("small", "qwen3_moe", "Q4_0", 25, 2048, 4),
    Cell("small", "qwen3_moe", "Q4_0", 50, 2048, 8, "f16"),
    Cell("small", "qwen3_moe", "Q4_0", 100, 1024),
    Cell("small", "qwen3_moe", "Q4_0", 100, 4096, 8),
    Cell("small", "qwen3_moe", "Q8_0", 12, 1024),
    Cell("small", "qwen3_moe", "Q8_0", 50, 1024, 4),
    Cell("small", "qwen3_moe", "Q8_0", 100, 2048),
    Cell("small", "qwen3_moe", "bf16", 25, 1024),
    Cell("small", "qwen3_moe", "bf16", 50, 1024, 4),
    Cell("small", "qwen3_moe", "q4", 25, 1024, 1, "f16"),
    Cell("small", "qwen3_moe", "q4", 100, 2048, 4),
    Cell("small", "qwen3_moe", "q8", 37, 1024, 8),
    Cell("small", "qwen2_moe", "Q4_0", 25, 1024),
    Cell("small", "qwen2_moe", "q8", 100, 1024, 4),
    Cell("tiny", "qwen3_moe", "Q4_0", 100, 2048),
    Cell("tiny", "qwen2_moe", "bf16", 50, 2048, 4),
    Cell("mixtral-like", "mixtral", "Q4_0", 25, 1024),
    Cell("mixtral-like", "mixtral", "q4", 50, 1024, 4),
)
SHORT = (Cell("tiny", "qwen3_moe", "Q4_0", 50, 1024), Cell("tiny", "qwen3_moe", "Q4_0", 100, 2048, 4))


def run_cell(job: dict[str, Any]) -> dict[str, Any]:
    """Fill everything that is planned, and measure."""

    def recorder(files: ModelFiles, config: EngineConfig) -> Recorder:
        return Recorder(files.config, config)

    streams = job["streams"]
    random = np.random.default_rng(5)
    with Engine.open(
        job["model"], memory=job["budget_bytes"], context=job["context"], kv_dtype=job["kv"], recorder=recorder,
        max_sequences=max(8, streams), prefix_reuse=False, media=False,
    ) as engine:  # fmt: skip
        length = job["context"] // streams - _ANSWER_TOKENS
        params = SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=1, seed=1, ignore_eos=True)
        prompts = random.integers(0, engine.config.vocab_size, (streams, length)).tolist()
        engine.generate_batch(prompts, params)
        planned, resident = engine.plan, engine.facts().num_resident
    peak = resources.peak_bytes()
    assert peak is not None
    return {
        "peak_bytes": peak + resources.process_footprint().page_table_bytes,
        "planned_bytes": planned.total_bytes,
        "parts": planned.as_dict(),
        "filled": resident / max(1, min(planned.slots.num_experts, planned.slots.own)),
    }


def planned(cell: Cell, model: Path, memory: int) -> dict[str, Any]:
    """Return what `argosy plan` says."""
    command = [
        sys.executable,
        "-m",
        "argosy",
        "plan",
        str(model),
        "--memory",
        str(memory),
        "--kv",
        cell.kv,
        "--json",
    ]
    command += ["--context", str(cell.context), "--streams", str(cell.streams), "--no-media"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def measure(cell: Cell, model: Path, budget_bytes: int, limit_bytes: int) -> tuple[dict[str, Any], bool]:
    """Measure a process; also return whether a cgroup limited it to the plan."""
    job = {
        "model": str(model), "budget_bytes": budget_bytes, "context": cell.context, "streams": cell.streams,
        "kv": cell.kv,
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    try:
        capped = run_capped(command, limit_bytes=limit_bytes, timeout_s=900)
    except NoMemoryCap:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{cell}: {done.stderr[-2000:]}") from None
        return json.loads(done.stdout.splitlines()[-1]), False
    if capped.returncode:
        raise SystemExit(f"{cell}: killed {capped.num_oom_kills} times\n{capped.stderr[-2000:]}")
    return json.loads(capped.stdout.splitlines()[-1]), True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="two cells of a tiny model")
    parser.add_argument("--cells", metavar="TEXT", help="only cells whose name has it, such as bf16")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_cell(json.loads(options.child))))
        return 0
    cells: Sequence[Cell] = SHORT if options.short else CELLS
    cells = [cell for cell in cells if options.cells is None or options.cells in str(cell)]
    report = Report(
        "plan_memory", state="each cell in two fresh processes, the context and the expert cache filled"
    )
    report.opening()
    print(f"{'':<62}{'budget':>9}{'predicted':>11}{'peak':>8}{'share':>8}  MiB")
    shares = []
    for cell in cells:
        usual = GEOMETRIES[cell.geometry].get("family", "qwen3_moe")
        family = None if cell.family == usual else cell.family
        model = named_model(options.models, cell.geometry, cell.format, family=family)
        ends = planned(cell, model, 1)
        span = ends["resident_bytes"] - ends["smallest_bytes"]
        budget_bytes = ends["smallest_bytes"] + span * cell.percent // 100 + (4 << 20)
        predicted = planned(cell, model, budget_bytes)["plan"]["total_bytes"]
        drop_page_cache(model)
        found, is_limited = measure(cell, model, budget_bytes, budget_bytes)
        share = found["peak_bytes"] / predicted
        shares.append(share)
        sizes = "".join(
            f"{size / 2**20:>{width}.0f}"
            for size, width in ((budget_bytes, 9), (predicted, 11), (found["peak_bytes"], 8))
        )
        limited = "" if is_limited else "  (not limited)"
        print(f"{cell!s:<62}{sizes}{share:>8.3f}  experts filled {found['filled']:.2f}{limited}", flush=True)
        report.record(str(cell), "peak over prediction", [share], [], predicted=predicted, **found)
    report.ratio("largest peak over its prediction", max(shares), 1.0, target="<= 1")
    report.ratio("smallest peak over its prediction", min(shares), 1.0, target=f">= {1 - TARGET}")
    return int(max(shares) > 1.0)


if __name__ == "__main__":
    sys.exit(main())
