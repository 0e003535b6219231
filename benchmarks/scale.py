"""Does a token take longer because more experts exist, or because more of them are needed?

    python benchmarks/scale.py [--sizes 1,8,64,512,2800] [--memory 6GiB] [--experts-gib 8] [--new 16] [--short]

Models of 1 B to 2.8 T parameters that differ in one number: the experts of a layer. Equal are the layers (one dense,
eight with experts), hidden size, heads, vocabulary, the experts of a token (2) and their width, so a token needs the
weights of 16 experts; the memory; and the statistics of the routing (`random_weights.py`, fitted to recorded traces).
Only the router grows with the experts; the weights that every token needs include it. In the smallest model every
expert is resident.

Experts exist as in `trillion.py`: many logical ones share the bytes of a record, but a miss always reads a whole record
from the drive, past the page cache. A size takes `--experts-gib` and its dense weights on the drive, and is removed
before the next is written; a size can be run alone. A document's continuation is the one right answer. Each size runs
as a fresh process in a memory cgroup limited to the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from argosy.checkpoint.geometry import count_parameters, expert_shapes, packed_config
from argosy.config import MIB, ModelConfig, format_bytes, parse_size
from argosy.model.families import FAMILIES
from cgroup import NoMemoryCap, run_capped
from common import Report, Sample, drop_page_cache, look_at_drive, run_inside
from engines import MODELS
from random_weights import num_continued
from trillion import EXPERTS_FILE, PROMPT_TOKENS, Trillion, inside, raw_config

SIZES_B = "1,8,64,512,2800"  # parameters, in billions
TIMEOUT_S = 1800
# Seconds a token over those of the model of 64 B, for as many bytes read: what exists must not be felt.
REFERENCE_B, SLOWER = 64.0, 1.25


def config_of(size_b: float, *, short: bool) -> ModelConfig:
    """The model with about that many billions of parameters."""
    raw = raw_config(short=True) | {
        "num_hidden_layers": 9,
        "hidden_size": 512 if short else 2048,
        "moe_intermediate_size": 256 if short else 8192,
        "intermediate_size": 512 if short else 8192,
        "num_experts_per_tok": 2,
        "n_routed_experts": 2,
    }
    config = packed_config(FAMILIES[raw["model_type"]].parse_config(raw))
    others = count_parameters(config)[0]
    for_expert = sum(math.prod(shape) for shape in expert_shapes(config, config.moe_layers[0]))
    for_expert = (for_expert + config.hidden_size) * len(config.moe_layers)  # and its row of the router
    more = round((size_b * 1e9 - others) / for_expert)
    raw["n_routed_experts"] = 2 + max(0, more)
    return packed_config(FAMILIES[raw["model_type"]].parse_config(raw))


def model_of(options: argparse.Namespace, size_b: float) -> Trillion:
    config, directory = config_of(size_b, short=options.short), options.directory / f"{size_b:g}b"
    record_bytes = Trillion(directory, config, 1).record_bytes
    num_experts = len(config.moe_layers) * config.num_experts
    return Trillion(directory, config, min(num_experts, int(options.experts_gib * 2**30) // record_bytes))


def run(model: Trillion, options: argparse.Namespace, size_b: float) -> Sample:
    """Make the model, run it in its cgroup, and check its answers."""
    model.make()
    for path in model.directory.iterdir():
        drop_page_cache(path)
    looks = look_at_drive(model.directory / EXPERTS_FILE)
    command = ["--inside", f"{size_b:g}", "--directory", options.directory, "--memory", f"{options.memory}B"]
    command += ["--new", options.new, "--threads", options.threads, "--experts-gib", options.experts_gib]
    with Sample() as sample:
        done = run_capped(
            run_inside("scale.py", [*command, *(["--short"] if options.short else [])]),
            limit_bytes=options.memory,
            timeout_s=TIMEOUT_S,
        )
    if done.returncode:
        raise SystemExit(f"{size_b:g} B ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    for number, answer in enumerate(found["answers"]):
        right = num_continued(number, PROMPT_TOKENS, answer, vocab=model.config.vocab_size)
        if right != len(answer):
            raise SystemExit(f"{size_b:g} B: {right} of {len(answer)} tokens continue document {number}")
    tokens, plan = found["tokens"], {name: nbytes for name, nbytes, _ in found["plan"]}
    looks += look_at_drive(model.directory / EXPERTS_FILE)
    sample.values = {
        "token": statistics.median(token["seconds"] for token in tokens),
        "read": statistics.fmean(token["bytes_read"] for token in tokens) / 1e9,
        "open": found["open_s"],
        "first": found["first_s"],
        "records": plan.get("expert records", 0) / MIB,
        "dense": plan["dense weights"] / 1e9,
        "hit": sum(token["hits"] for token in tokens) / max(1, sum(token["lookups"] for token in tokens)),
        "drive": statistics.median(looks),
        "peak": done.peak_bytes / options.memory,
    }
    return sample


LINES = (
    ("seconds a token", "s", "token"),
    ("read from the drive a token", "GB", "read"),
    ("hit rate", "", "hit"),
    ("weights that every token needs", "GB", "dense"),
    ("records of experts", "MiB", "records"),
    ("time to open", "s", "open"),
    ("first token after that", "s", "first"),
    ("drive", "GB/s", "drive"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=None, help=f"billions of parameters: {SIZES_B}")
    parser.add_argument("--directory", type=Path, default=MODELS / "scale")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--experts-gib", type=float, default=None)
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="experts of 0.2 MiB, models of 0.02 to 1 B")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.memory = parse_size(options.memory or ("170MiB" if options.short else "6GiB"))
    options.experts_gib = options.experts_gib or (0.06 if options.short else 8.0)
    if options.inside:
        inside(model_of(options, options.inside), options)
        return 0
    sizes = [
        float(size) for size in (options.sizes or ("0.05,0.2,1" if options.short else SIZES_B)).split(",")
    ]
    report = Report("scale", state="page cache dropped; experts cached by one answer")
    report.opening()
    seconds: dict[float, float] = {}
    for size_b in sizes:
        model = model_of(options, size_b)
        everything, active = count_parameters(model.config)
        num_experts = len(model.config.moe_layers) * model.config.num_experts
        report.line(
            "model",
            f"{everything / 1e9:.3g} B parameters, {active / 1e9:.3g} B for a token; {num_experts:,} experts of "
            f"{format_bytes(model.record_bytes)}, of which {model.num_records:,} records exist",
        )
        try:
            sample = run(model, options, size_b)
        except NoMemoryCap as reason:
            print(f"skipped: {reason}", file=sys.stderr)
            return 0
        finally:
            shutil.rmtree(model.directory, ignore_errors=True)
        facts = {"parameters": everything, "experts": num_experts, "memory": options.memory}
        for label, unit, key in LINES:
            report.figure(f"{size_b:g} B: {label}", unit, [sample], key, **facts)
        report.ratio(f"{size_b:g} B: peak over budget", sample.values["peak"], 1.0, target="<= 1.0", **facts)
        seconds[size_b] = sample.values["token"]
        report.neighbours([sample])
    report.correct("every token of every size continues its document")
    if REFERENCE_B in seconds and max(sizes) > REFERENCE_B:
        report.ratio(
            f"{max(sizes):g} B over {REFERENCE_B:g} B: seconds a token",
            seconds[max(sizes)],
            seconds[REFERENCE_B],
            target=f"<= {SLOWER:g}",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
