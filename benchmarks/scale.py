"""Does a token take longer because more experts exist, or because more of them are needed?

    python benchmarks/scale.py [--sizes 1,8,64,512,2800] [--memory 6GiB] [--experts-gib 8] [--new 48] [--short]

Models of 1 B to 2.8 T parameters that differ in one number: the experts of a layer. Equal are the layers (one dense,
eight with experts), hidden size, heads, vocabulary, the experts of a token (2) and their width, so a token needs the
weights of 16 experts; the memory; and the statistics of the routing (`random_weights.py`, fitted to recorded traces).
Only the router grows with the experts; the weights that every token needs include it. In the smallest model every
expert is resident. A larger one finds fewer of its experts in the same memory, so it reads more: a token should take no
longer than its reads, or than arithmetic that waits for none, by the smallest model and this size's router. A further
row compares tokens that read equally many experts.

Experts exist as in `giants.py`: many logical ones share the bytes of a record, but a miss always reads a whole record
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from argosy.checkpoint.geometry import count_parameters, expert_shapes
from argosy.config import MIB, ModelConfig, format_bytes, parse_size
from cgroup import NoMemoryCap, run_capped
from common import Report, Sample, drop_page_cache, look_at_drive, probe_new_memory, run_inside
from engines import MODELS
from giants import EXPERTS_FILE, GIANTS, Giant
from random_weights import num_continued
from trillion import PROMPT_TOKENS, SLOWER, WAITING, Tokens, inside

SIZES_B = "1,8,64,512,2800"  # parameters, in billions
TIMEOUT_S = 1800
REFERENCE_B = 64.0
MODEL = GIANTS["kimi_k2"]


def over_alike(larger: Tokens, smaller: Tokens) -> list[float]:
    """The quotients of median seconds, for each number of experts that tokens of both sizes read."""
    ours, theirs = larger.by_reads(), smaller.by_reads()
    common = sorted(ours.keys() & theirs.keys())
    return [statistics.median(ours[reads]) / statistics.median(theirs[reads]) for reads in common]


def config_of(size_b: float, *, short: bool) -> ModelConfig:
    """The model with about that many billions of parameters."""
    sizes = {
        "num_hidden_layers": 9,
        "hidden_size": 512 if short else 2048,
        "moe_intermediate_size": 256 if short else 8192,
        "intermediate_size": 512 if short else 8192,
        "num_experts_per_tok": 2,
        "n_routed_experts": 2,
    }
    config = MODEL.config(short=True, **sizes)
    others = count_parameters(config)[0]
    for_expert = sum(math.prod(shape) for shape in expert_shapes(config, config.moe_layers[0]))
    for_expert = (for_expert + config.hidden_size) * len(config.moe_layers)  # and its row of the router
    more = round((size_b * 1e9 - others) / for_expert)
    return MODEL.config(short=True, **sizes | {"n_routed_experts": 2 + max(0, more)})


def model_of(options: argparse.Namespace, size_b: float) -> Giant:
    config, directory = config_of(size_b, short=options.short), options.directory / f"{size_b:g}b"
    giant = Giant(directory, MODEL, config, 1)
    num_experts = len(config.moe_layers) * config.num_experts
    num_records = min(num_experts, int(options.experts_gib * 2**30) // giant.record_bytes)
    return replace(giant, num_records=num_records)


def run(model: Giant, options: argparse.Namespace, size_b: float) -> tuple[Sample, Tokens]:
    """Make the model, run it in its cgroup, and check its answers."""
    model.make()
    for path in model.directory.iterdir():
        drop_page_cache(path)
    looks, new_memory = look_at_drive(model.directory / EXPERTS_FILE), probe_new_memory()
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
    looks += look_at_drive(model.directory / EXPERTS_FILE)
    plan = {name: nbytes for name, nbytes, _ in found["plan"]}
    tokens = Tokens(found["tokens"], model.record_bytes, statistics.median(looks))
    sample.values = {
        "token": statistics.median(token["seconds"] for token in tokens.each),
        "waiting": tokens.seconds_in(WAITING),
        "router": tokens.seconds_in("router"),
        "computing": tokens.computing_s,
        "read": statistics.fmean(token["bytes_read"] for token in tokens.each) / 1e9,
        "open": found["open_s"],
        "first": found["first_s"],
        "first read": found["first_bytes"] / 1e9,
        "records": plan.get("expert records", 0) / MIB,
        "dense": plan["dense weights"] / 1e9,
        "hit": sum(token["hits"] for token in tokens.each)
        / max(1, sum(token["lookups"] for token in tokens.each)),
        "drive": tokens.drive,
        "new memory": new_memory,
        "peak": done.peak_bytes / options.memory,
    }
    return sample, tokens


LINES = (
    ("seconds a token", "s", "token"),
    ("of them, waiting for reads", "s", "waiting"),
    ("of them, computing", "s", "computing"),
    ("of these, the router", "s", "router"),
    ("read from the drive a token", "GB", "read"),
    ("hit rate", "", "hit"),
    ("weights that every token needs", "GB", "dense"),
    ("records of experts", "MiB", "records"),
    ("time to open", "s", "open"),
    (f"first token of {PROMPT_TOKENS}, no expert in memory", "s", "first"),
    ("its reads", "GB", "first read"),
    ("drive", "GB/s", "drive"),
    ("memory used for the first time", "s/GiB", "new memory"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=None, help=f"billions of parameters: {SIZES_B}")
    parser.add_argument("--directory", type=Path, default=MODELS / "scale")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--experts-gib", type=float, default=None)
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="experts of 0.2 MiB, models of 0.02 to 1 B")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.prompt = PROMPT_TOKENS
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
    found: dict[float, Tokens] = {}
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
            sample, tokens = run(model, options, size_b)
        except NoMemoryCap as reason:
            print(f"skipped: {reason}", file=sys.stderr)
            return 0
        finally:
            shutil.rmtree(model.directory, ignore_errors=True)
        facts = {"parameters": everything, "experts": num_experts, "memory": options.memory}
        for label, unit, key in LINES:
            report.figure(f"{size_b:g} B: {label}", unit, [sample], key, **facts)
        found[size_b] = tokens
        resident = found[sizes[0]]  # every expert is in memory, unless only larger sizes are run
        compute_s = resident.computing_s - resident.seconds_in("router") + tokens.seconds_in("router")
        label = f"{size_b:g} B: seconds a token over max(compute, reads)"
        report.ratio(label, tokens.over_limits(compute_s), 1.0, target=f"<= {SLOWER:g}", **facts)
        read_s = sample.values["first read"] / tokens.drive
        report.ratio(f"{size_b:g} B: first token over its reads", sample.values["first"], read_s, **facts)
        report.ratio(f"{size_b:g} B: peak over budget", sample.values["peak"], 1.0, target="<= 1.0", **facts)
        report.neighbours([sample])
    report.correct("every token of every size continues its document")
    if REFERENCE_B in found and max(sizes) > REFERENCE_B:
        alike = over_alike(found[max(sizes)], found[REFERENCE_B])
        label = f"{max(sizes):g} B over {REFERENCE_B:g} B: seconds of tokens with equal reads"
        report.shares(label, alike or [math.nan])
    return 0


if __name__ == "__main__":
    sys.exit(main())
