"""Does a server stay within a budget that changes while it answers, without a failed request or another text?

    python benchmarks/moving_budget.py [--model mid] [--budgets 4GiB,2GiB,6GiB] [--changes 50] [--clients 3] [--short]

The server has one model. Clients send requests all the time, and `argosy memory` asks for one budget after another.
Two seconds after each change, the memory of the server's cgroup is compared with the budget, until the next change.
Its page cache counts. The texts are compared with those of the model alone in a process of its own.

Targets: no failed request, equal texts, and never more memory than the budget two seconds after it was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from argosy.config import format_bytes, parse_size
from cgroup import Counts, NoMemoryCap, capped
from common import Report, Sample, drop_page_cache, file_bytes, tidy_up_when_terminated
from engines import MODELS
from load import nearest_rank
from make_checkpoint import named_model
from several_models import CONTEXT, NEW_TOKENS, NUM_PROMPTS, alone, answered, prompts, wait_until_ready

ALLOWED_S = 2.0
REST_S = 2.0  # a budget stays so long after it had time


class Watched:
    """The most memory that the server had, over the budget of that moment."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._limits: list[tuple[float, int]] = []  # since when a budget counts
        self._is_over = threading.Event()
        self.worst, self.num_looks, self.num_beyond = 0.0, 0, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, budget: int) -> None:
        """From two seconds on, memory is compared with this budget; until then, with the larger one."""
        self._limits.append((time.monotonic() + ALLOWED_S, budget))

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.02):
            held, now = self._counts.held_bytes, time.monotonic()
            counted = [budget for since, budget in self._limits if since <= now]
            if not counted:
                continue
            coming = [budget for since, budget in self._limits if since > now]
            share = held / max(counted[-1], *coming, 0)
            self.worst, self.num_looks = max(self.worst, share), self.num_looks + 1
            self.num_beyond += share > 1


async def under_load(
    port: int, name: str, said: list[str], watched: Watched, options: argparse.Namespace
) -> tuple[int, list[float], list[float]]:
    """Requests and changes at once; the number of answers, their seconds, and those of the changes."""
    waiting, is_over = itertools.count(), False
    seconds: list[float] = []
    changes: list[float] = []

    async def client() -> None:
        while not is_over:
            number = next(waiting) % NUM_PROMPTS
            text, sent, _, end = await answered(port, name, prompts()[number], NEW_TOKENS)
            if text != said[number]:
                raise SystemExit(f"the server answered {text!r}, and the model alone {said[number]!r}")
            seconds.append(end - sent)

    def change(budget: int) -> float:
        body = json.dumps({"memory": budget}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/engine/memory", body, {"content-type": "application/json"}
        )
        begun = time.monotonic()
        watched.ask(budget)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        if found["budget_bytes"] != budget:
            raise SystemExit(f"asked for {budget} bytes, and the server has {found['budget_bytes']}")
        return time.monotonic() - begun

    async def move() -> None:
        nonlocal is_over
        for budget in itertools.islice(
            itertools.cycle(options.sizes[1:] + options.sizes[:1]), options.changes
        ):
            changes.append(await asyncio.to_thread(change, budget))
            await asyncio.sleep(ALLOWED_S + REST_S)
        is_over = True

    await asyncio.gather(move(), *(client() for _ in range(options.clients)))
    return len(seconds), seconds, changes


def measure(report: Report, model: Path, options: argparse.Namespace) -> int:
    options.sizes = [parse_size(size) for size in options.budgets.split(",")]
    said = alone(model, max(options.sizes))
    drop_page_cache(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "argosy", "serve", str(model), "--memory", f"{options.sizes[0]}B", "--port", str(port),
        "--context", str(CONTEXT),
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as log,
        capped(command, limit_bytes=2 * max(options.sizes), stdout=log, stderr=log) as (process, counts),
    ):
        wait_until_ready(port, process, log)
        watched = Watched(counts)
        try:
            with Sample() as sample:
                num, seconds, changes = asyncio.run(
                    under_load(port, model.name.removesuffix(".gguf"), said, watched, options)
                )
        finally:
            with contextlib.suppress(subprocess.SubprocessError):
                watched.stop()
        kills = counts.num_oom_kills
    report.correct(f"{num} of {num} answers equal to those of the model alone, none failed")
    report.opening()
    report.line("model", f"{model.name}: {format_bytes(file_bytes(model))}")
    report.line("budgets", f"{options.budgets}, {len(changes)} changes, {options.clients} clients")
    p50, p99 = (nearest_rank(seconds, share) for share in (0.5, 0.99))
    report.line("answers", f"p50 {p50:.2f} s, p99 {p99:.2f} s")
    sample.values = {"change": nearest_rank(changes, 0.5), "slowest": max(changes)}
    report.figure("a change, median", "s", [sample], "change")
    report.figure("a change, slowest", "s", [sample], "slowest")
    report.shares("memory over the budget, 2 s after a change", [watched.worst], target="<= 1")
    report.line("looks", f"{watched.num_beyond} of {watched.num_looks} beyond the budget, {kills} kills")
    report.neighbours([sample])
    return 0 if watched.worst <= 1 and not kills else 1


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mid")
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--budgets", default="4GiB,2GiB,6GiB")
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--models", type=Path, default=MODELS, help="where model files are kept")
    parser.add_argument("--short", action="store_true", help="the tiny model, few changes")
    options = parser.parse_args()
    if options.short:
        options.model, options.budgets, options.changes = "tiny", "390MiB,370MiB,410MiB", 4
    model = named_model(options.models, options.model, options.format)
    report = Report("moving_budget", state="loopback; one server; page cache of the model dropped before")
    try:
        return measure(report, model, options)
    except NoMemoryCap as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main())
