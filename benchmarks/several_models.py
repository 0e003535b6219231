"""Do three models on one server stay within the budget, say what each says alone, and not slow one another's load?

    python benchmarks/several_models.py [--requests 500] [--loads 40] [--clients 4] [--short]

The server runs in a memory cgroup of its budget, without swap: a plan that is too small would end it. The budget has
room for the process, all floors, and half of the experts of the two largest models.

mixed        clients send requests to two of the models for a while, then to another pair. With `--idle-unload 2s` the
             one that is left out is unloaded, and loaded again when its turn comes. Every answer is compared with that
             of the model alone in a process of its own, token by token.
first token  one model answers prompts one after another, one token each. Between two of them another model is loaded,
             again and again, for a request of its own, and then gets the same request while it is in memory. Compared
             are the first tokens that came during a load, those that came during a request to the other model in
             memory, and those that came without: the other model is in memory and idle, or is not there. A load ends
             with the prompt of its request, which uses the same cores as the busy model's, loaded or not, so the
             difference of the first two is what loading itself adds. While the other model is there, the busy one has
             fewer experts in memory, whether it is being loaded or idle. Other processes may use the machine, so first
             tokens that came while they used more than a core are left out of a second comparison.

Targets: no kill, peak at most the budget, all answers equal, p99 of the first token during a load at most 1.2 times
that during a request to the other model in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from argosy import Engine, SamplingParams
from argosy.config import format_bytes
from cgroup import NoMemoryCap, capped
from common import Report, Sample, file_bytes, tidy_up_when_terminated
from engines import MODELS
from load import ask, nearest_rank
from make_checkpoint import named_model
from random_weights import DOCUMENT_TOKENS, document

SHAPES = (("small", "Q4_0"), ("small", "Q8_0"), ("tiny", "Q4_0"))
SHORT = (("tiny", "Q4_0"), ("tiny", "Q8_0"), ("tiny", "Q4_1"))
CONTEXT, NEW_TOKENS, IDLE_UNLOAD_S = 1024, 8, 2
NUM_PROMPTS = 40  # per model
NUM_ANSWERS = 5  # of the other model after each load
TARGET = "<= 1.2"
QUIET_CORES = 1.0
_START_S = 300.0


def prompts() -> list[list[int]]:
    dice = random.Random(1)
    return [
        document(2 + number % 12, DOCUMENT_TOKENS)[at : at + dice.randint(8, 64)]
        for number, at in enumerate(dice.sample(range(DOCUMENT_TOKENS - 80), NUM_PROMPTS))
    ]


def child(job: dict[str, Any]) -> None:
    """Print what one model says when it runs alone."""
    with Engine.open(job["model"], memory=job["memory"], context=CONTEXT) as engine:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        answers = [engine.generate(prompt, params).text for prompt in prompts()]
    print(json.dumps(answers))


def alone(model: Path, memory: int) -> list[str]:
    command = [sys.executable, __file__, "--child", json.dumps({"model": str(model), "memory": memory})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{model.name} alone: {done.stderr[-2000:]}")
    answers: list[str] = json.loads(done.stdout)
    return answers


def budget_of(models: Sequence[Path]) -> int:
    """Process, all floors, and half of the experts of the two largest."""
    code = (
        "import sys, json\n"
        "from argosy.open.models import configure, open_files\n"
        "from argosy.engine.shared import make_ready\n"
        "from argosy.config import MIB, Claim\n"
        "from argosy.serve.claims import server_claims\n"
        "from pathlib import Path\n"
        f"options = dict(memory='75%', context={CONTEXT}, grammars=True, max_sequences=16)\n"
        "options['claims'] = (Claim('replay_bytes', 12 * MIB),)\n"
        "files = [(Path(path).name, open_files(Path(path))) for path in sys.argv[1:]]\n"
        "wanted = [(name, one, configure(one.path, one, **options)) for name, one in files]\n"
        "claims = (*server_claims(keeps_content=False), Claim('replay_bytes', 4 * MIB))\n"
        "ready, process = make_ready(wanted, claims=claims, recorder=None)\n"
        "print(json.dumps([process, [one.floor_bytes for one in ready],"
        " [one.plan.slots.num_experts * one.plan.slots.slot_bytes for one in ready]]))\n"
    )
    command = [sys.executable, "-c", code, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    process, floors, experts = json.loads(done.stdout)
    margin = 32 << 20  # for counts of routing, and a process that starts with more
    return int(process + sum(floors) + sum(sorted(experts)[-2:]) // 2 + margin) >> 20 << 20


async def answered(
    port: int, model: str, prompt: Sequence[int], num_new: int
) -> tuple[str, float, float, float]:
    """The text of an answer; when the request was sent, and when its first token and its end came."""
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": num_new, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    reply = await ask(port, body)
    texts = reply.texts()
    if not texts:
        raise SystemExit(f"{model} did not answer: {b''.join(part for _, part in reply.parts)[-600:]!r}")
    return "".join(text for _, text in texts), reply.sent_at, texts[0][0], texts[-1][0]


async def mixed(
    port: int, names: Sequence[str], said: dict[str, list[str]], options: argparse.Namespace
) -> tuple[int, list[float]]:
    """Send all requests; the number of answers that differ, and the seconds of the first tokens."""
    dice, asked, firsts, num_wrong = random.Random(2), prompts(), [], 0
    plan: list[str] = []
    while len(plan) < options.requests:
        pair = dice.sample(names, 2)
        plan += [dice.choice(pair) for _ in range(dice.randint(20, 50))]
    plan = plan[: options.requests]
    waiting = iter(plan)

    async def client() -> None:
        nonlocal num_wrong
        for model in waiting:
            number = dice.randrange(NUM_PROMPTS)
            text, sent, first, _ = await answered(port, model, asked[number], NEW_TOKENS)
            firsts.append(first - sent)
            if text != said[model][number]:
                num_wrong += 1
                print(f"  {model} answered {text!r}, and alone {said[model][number]!r}", file=sys.stderr)
            await asyncio.sleep(dice.uniform(0.0, 0.1))

    await asyncio.gather(*(client() for _ in range(options.clients)))
    return num_wrong, firsts


class First(NamedTuple):
    """A first token: when it was asked for, when it came, and the cores that other processes used meanwhile."""

    sent: float
    came: float
    other_cores: float

    def is_within(self, spans: Sequence[tuple[float, float]]) -> bool:
        return any(begin < self.came and self.sent < end for begin, end in spans)


def others_s(server: int) -> float:
    """CPU seconds of all processes but this one and the server."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
    own = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    ticks = user + nice + system + sum(interrupts) - int(own[11]) - int(own[12])
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


async def beside_loads(
    port: int, server: int, busy: str, other: str, num_loads: int
) -> tuple[dict[str, list[First]], float]:
    """First tokens of `busy` while `other` is not in memory, is there and idle or answers, or is loaded; and seconds of
    a load."""
    dice, asked = random.Random(3), prompts()
    firsts: list[First] = []
    loads: list[tuple[float, float]] = []
    answers: list[tuple[float, float]] = []  # of the other model, already in memory
    is_over = False

    async def one_after_another() -> None:
        number = 0
        while not is_over:
            number += 1
            before = others_s(server)
            _, sent, first, _ = await answered(port, busy, asked[number % NUM_PROMPTS], 1)
            firsts.append(First(sent, first, (others_s(server) - before) / (first - sent)))
            await asyncio.sleep(dice.uniform(0.0, 0.02))

    async def load_again_and_again() -> None:
        nonlocal is_over
        for _ in range(num_loads):
            await asyncio.sleep(IDLE_UNLOAD_S + 1.5)
            _, sent, _, end = await answered(port, other, asked[0][:8], 1)
            loads.append((sent, end))
            for _ in range(NUM_ANSWERS):
                await asyncio.sleep(0.1)
                _, sent, _, end = await answered(port, other, asked[0][:8], 1)
                answers.append((sent, end))
        is_over = True

    await asyncio.gather(one_after_another(), load_again_and_again())
    idle = [(end, end + IDLE_UNLOAD_S) for _, end in loads + answers]
    groups: dict[str, list[First]] = {
        "alone": [], "beside an idle one": [], "beside an answer": [], "during a load": []
    }  # fmt: skip
    for one in firsts:
        if one.is_within(loads):
            groups["during a load"].append(one)
        elif one.is_within(answers):
            groups["beside an answer"].append(one)
        elif one.is_within(idle):
            groups["beside an idle one"].append(one)
        else:
            groups["alone"].append(one)
    return groups, statistics.mean(end - begin for begin, end in loads)


def tell_first_tokens(report: Report, groups: dict[str, list[First]], most_cores: float | None) -> None:
    """Print first tokens of each group, and how much later they come during a load."""
    quiet = "" if most_cores is None else f", others on {most_cores:g} core at most"
    seconds: dict[str, list[float]] = {}
    for name, firsts in groups.items():
        seconds[name] = [
            one.came - one.sent for one in firsts if most_cores is None or one.other_cores <= most_cores
        ]
        if seconds[name]:
            p50, p90, p99 = (1e3 * nearest_rank(seconds[name], share) for share in (0.5, 0.9, 0.99))
            report.line("first token", f"{name}: {len(seconds[name])}, p50 {p50:.0f} ms, p90 {p90:.0f} ms, "
                        f"p99 {p99:.0f} ms{quiet}")  # fmt: skip
    others = {
        "beside an answer": seconds["beside an answer"],
        "without": seconds["alone"] + seconds["beside an idle one"],
    }
    for name, values in others.items():
        for share in (0.5, 0.9, 0.99):
            during, under = (
                nearest_rank(found, share) if found else math.nan
                for found in (seconds["during a load"], values)
            )
            is_target = share == 0.99 and name == "beside an answer"
            report.ratio(f"first token p{100 * share:.0f} during a load, over {name}{quiet}", during, under,
                         target=TARGET if is_target else "")  # fmt: skip


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    ends_at = time.monotonic() + _START_S
    while time.monotonic() < ends_at and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the server does not answer: {log.read()[-1500:].decode(errors='replace')}")


def measure(report: Report, models: Sequence[Path], options: argparse.Namespace) -> None:
    names = [model.name.removesuffix(".gguf") for model in models]
    budget = budget_of(models)
    for model, name in zip(models, names, strict=True):
        report.line("model", f"{name}: {format_bytes(file_bytes(model))}")
    report.line("budget", format_bytes(budget))
    said = {name: alone(model, 2 * budget) for name, model in zip(names, models, strict=True)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "argosy", "serve", *map(str, models), "--memory", f"{budget}B", "--port", str(port),
        "--context", str(CONTEXT), "--idle-unload", f"{IDLE_UNLOAD_S}s",
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as log,
        capped(command, limit_bytes=budget, stdout=log, stderr=log) as (process, counts),
    ):
        wait_until_ready(port, process, log)
        try:
            with Sample() as sample:
                num_wrong, firsts = asyncio.run(mixed(port, names, said, options))
        except SystemExit as error:
            raise SystemExit(f"{error}\n{_log(log)[-2000:]}") from None
        seen = _log(log)
        loads, unloads = seen.count(" is loaded"), seen.count(" is unloaded")
        if num_wrong:
            raise SystemExit(f"{num_wrong} of {len(firsts)} answers differ from those of the model alone")
        report.correct(
            f"{len(firsts)} of {len(firsts)} answers equal to those of each model alone, "
            f"with {loads} loads and {unloads} unloads"
        )
        sample.values = {"requests/s": len(firsts) / sample.seconds}
        report.figure("mixed requests", "1/s", [sample], "requests/s", models=names, budget_bytes=budget)
        report.line("first token", f"p50 {1e3 * nearest_rank(firsts, 0.5):.0f} ms, p99 of all, loads included, "
                    f"{1e3 * nearest_rank(firsts, 0.99):.0f} ms")  # fmt: skip
        try:
            with Sample() as beside:
                groups, load_s = asyncio.run(
                    beside_loads(port, process.pid, names[0], names[1], options.loads)
                )
        except SystemExit as error:
            raise SystemExit(f"{error}\n{counts.num_oom_kills} kills\n{_log(log)[-2000:]}") from None
        report.line("loads", f"of {names[1]}, with its first token: {load_s:.1f} s, mean of {options.loads}")
        for most_cores in (None, QUIET_CORES):
            tell_first_tokens(report, groups, most_cores)
        report.ratio("peak over budget", counts.peak_bytes, budget, target="<= 1")
        report.line("cgroup", f"{counts.num_oom_kills} kills, {counts.num_limit_hits} times at the limit, "
                    f"{format_bytes(counts.peak_swap_bytes)} swapped")  # fmt: skip
        report.neighbours([sample, beside])
        if process.poll() is not None or counts.num_oom_kills:
            raise SystemExit("the server was killed")


def _log(log: IO[bytes]) -> str:
    log.seek(0)
    return re.sub(r"[^\n -~]", "?", log.read().decode(errors="replace"))


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--loads", type=int, default=40)
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--short", action="store_true", help="tiny models, few requests")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return 0
    if options.short:
        options.requests, options.loads = 60, 4
    models = [named_model(options.models, *shape) for shape in (SHORT if options.short else SHAPES)]
    report = Report("several_models", state="loopback; one server for all rounds")
    report.opening()
    try:
        measure(report, models, options)
    except NoMemoryCap as reason:
        print(f"skipped: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
