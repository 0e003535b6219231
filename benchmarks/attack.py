"""Does the budget hold while clients attack, and do others get their first token as soon as before?

    python benchmarks/attack.py [--model demo] [--memory 700MiB] [--seconds 600] [--attackers 16] [--short]

A server runs in a memory cgroup of 1.05 times its budget, with a key for its honest clients and several for attackers.
Attackers send requests that are expensive for their size: bodies with millions of values, prompts far beyond the
context, texts in place of token ids, schemas with many leaves, patterns that are hard to compile. Each attacker sends
its next request when the last one is answered. Two honest clients ask short questions all the time. Quiet and attacked
stretches alternate.

Real attackers have their own machines; here they share the server's cores. So all of them run in one process at the
lowest priority: they slow the server down as little as possible, and only the server is measured.

The kernel counts the peak (the group's anonymous memory, page cache and page tables) and its kills. An attack must be
answered with a refusal, or with an answer if the request is valid. A 5xx other than 503, or a connection that ends
without an answer, is a failure. Time to first token starts with the first byte sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from argosy.config import format_bytes, parse_size
from cgroup import Counts, capped
from common import Report, Sample, tidy_up_when_terminated
from load import nearest_rank
from tests.abuse.hostile_bodies import ATTACKS

CAP = 1.05  # times the budget: the cgroup's limit
HONEST_CLIENTS, ATTACK_KEYS = 2, 4
NUM_NEW = 8
_START_S = 300.0
_ANSWER_S = 120.0  # a slower answer counts as none
_LOWEST_PRIORITY = 19


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Attack:
    """A request that is expensive for its size."""

    name: str
    path: str
    body: bytes


def attacks() -> list[Attack]:
    """The hostile bodies from the tests, and requests that cost time rather than memory."""
    found = [Attack(name, path, body()) for name, (path, body, _, _) in ATTACKS.items()]
    text = {"model": "demo", "messages": [{"role": "user", "content": "words " * 350_000}], "max_tokens": 1}
    pattern = "(" * 200 + "a{1,200}" + "){1,200}" * 200
    asks = {**text, "messages": [{"role": "user", "content": "hi"}], "structured_outputs": {"regex": pattern}}
    return [
        *found,
        Attack("2 MB to count", "/v1/messages/count_tokens", json.dumps(text).encode()),
        Attack("nested repetitions", "/v1/chat/completions", json.dumps(asks).encode()),
        Attack("a million levels", "/v1/chat/completions", b'{"messages":' + b"[" * 1_000_000),
    ]


# ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _request(port: int, path: str, key: str, body: bytes) -> list[bytes]:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return [head.encode(), body]


async def _status(port: int, attack: Attack, key: str) -> str:
    """The status of the answer to an attack, or what happened instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        # A refusal may come, and the connection close, before the whole body is sent.
        with contextlib.suppress(ConnectionError):
            writer.writelines(_request(port, attack.path, key, attack.body))
            await writer.drain()
        head = await reader.readuntil(b"\r\n")
        while await reader.read(1 << 16):
            pass
        return head.split()[1].decode()
    except (ConnectionError, asyncio.IncompleteReadError):
        return "no answer"
    finally:
        writer.close()


async def _first_token_s(port: int, key: str, text: str) -> float:
    """Seconds to the first text of an answer, which is read to its end.

    Raises:
        SystemExit: the request got no answer.
    """
    body = json.dumps({"prompt": text, "max_tokens": NUM_NEW, "temperature": 0, "stream": True}).encode()
    began, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.writelines(_request(port, "/v1/completions", key, body))
        received = b""
        while part := await reader.read(1 << 16):
            received += part
            if not first and b"data: {" in received:
                first = time.perf_counter()
    finally:
        writer.close()
    if not received.startswith(b"HTTP/1.1 200") or b"[DONE]" not in received:
        raise SystemExit(f"an honest client was answered {received[:300]!r}")
    return first - began


@dataclass
class Stretch:
    """Results of a stretch: seconds to first tokens, and for each attack the count of each status."""

    first_s: list[float] = field(default_factory=list)
    statuses: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, other: Stretch) -> None:
        self.first_s += other.first_s
        for name, statuses in other.statuses.items():
            self.statuses.setdefault(name, Counter()).update(statuses)


async def _ask(port: int, key: str, ends_at: float) -> Stretch:
    found = Stretch()

    async def ask(client: int) -> None:
        number = 0
        while time.monotonic() < ends_at:
            number += 1
            text = f"Question {number} of client {client}: what is the capital of France?"
            found.first_s.append(await asyncio.wait_for(_first_token_s(port, key, text), _ANSWER_S))

    await asyncio.gather(*map(ask, range(HONEST_CLIENTS)))
    return found


async def _attack(port: int, keys: Sequence[str], num_attackers: int, ends_at: float) -> Stretch:
    found, every = Stretch(), attacks()

    async def attack(client: int) -> None:
        key, at = keys[client % len(keys)], client
        while time.monotonic() < ends_at:
            one = every[at % len(every)]
            at += 1
            try:
                status = await asyncio.wait_for(_status(port, one, key), _ANSWER_S)
            except TimeoutError:
                status = "no answer"
            found.statuses.setdefault(one.name, Counter())[status] += 1

    await asyncio.gather(*map(attack, range(num_attackers)))
    return found


def _attack_alone(port: int, keys: Sequence[str], num_attackers: int, ends_at: float) -> Stretch:
    """Attack from this process, which does nothing else."""
    return asyncio.run(_attack(port, keys, num_attackers, ends_at))


def stretch(
    port: int, keys: Sequence[str], attackers: ProcessPoolExecutor | None, num_attackers: int, seconds: float
) -> Stretch:
    """Run honest clients for `seconds`, and attackers if there are any; `keys` has the honest key first."""
    ends_at = time.monotonic() + seconds  # one clock for all processes
    attack = attackers and attackers.submit(_attack_alone, port, keys[1:], num_attackers, ends_at)
    found = asyncio.run(_ask(port, keys[0], ends_at))
    if attack is not None:
        found.add(attack.result())  # type: ignore[union-attr]
    return found


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def server(model: str, budget_bytes: int, folder: Path) -> Iterator[tuple[int, list[str], Counts]]:
    """Run a server in its cgroup; yields its port, its keys (the honest one first) and the kernel's counts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = [_add_key(folder, name) for name in ("honest", *(f"attacker-{n}" for n in range(ATTACK_KEYS)))]
    command = [
        sys.executable, "-m", "argosy", "serve", model, "--port", str(port), "--memory", f"{budget_bytes}B",
        "--keys", str(folder / "keys.json"),
    ]  # fmt: skip
    with (
        (folder / "server.log").open("wb") as log,
        capped(command, limit_bytes=int(CAP * budget_bytes), stderr=log) as (process, counts),
    ):
        ends_at = time.monotonic() + _START_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > ends_at:
                raise SystemExit((folder / "server.log").read_text()[-2000:])
            time.sleep(0.1)
        yield port, keys, counts


def _add_key(folder: Path, name: str) -> str:
    command = [sys.executable, "-m", "argosy", "keys", "add", name, "--keys", str(folder / "keys.json")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(word for word in made.split() if word.startswith("ak-"))


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory", default="700MiB", help="the server's budget")
    parser.add_argument("--seconds", type=float, default=600, help="of attack, in all")
    parser.add_argument("--attackers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="stretches of attack, each after a quiet one")
    parser.add_argument("--short", action="store_true", help="one stretch of 20 s")
    options = parser.parse_args()
    if options.short:
        options.seconds, options.repeats = 20.0, 1
    budget_bytes, each_s = parse_size(options.memory), options.seconds / options.repeats
    report = Report("attack", state=f"loopback, one server, cgroup of {CAP} times its budget")
    quiet, attacked = Stretch(), Stretch()
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), os.nice, (_LOWEST_PRIORITY,)
        ) as attackers,
        server(options.model, budget_bytes, Path(folder)) as (port, keys, counts),
    ):
        stretch(port, keys, None, 0, 5.0)  # warm-up
        attackers.submit(attacks).result()
        for _ in range(options.repeats):
            for into, by, seconds in ((quiet, None, max(15.0, each_s / 4)), (attacked, attackers, each_s)):
                with Sample() as sample:
                    into.add(stretch(port, keys, by, options.attackers, seconds))
                samples.append(sample)
        peak_bytes, kills, is_ready = counts.peak_bytes, counts.num_oom_kills, _is_ready(port)
    failures = sum(
        count
        for statuses in attacked.statuses.values()
        for status, count in statuses.items()
        if not status.isdecimal() or (int(status) >= 500 and status != "503")
    )
    report.correct(
        f"{len(quiet.first_s) + len(attacked.first_s)} honest answers are whole; "
        f"{failures} attacks got neither an answer nor a refusal"
    )
    report.opening()
    for name, statuses in attacked.statuses.items():
        report.line("  attack", f"{name:<28}" + ", ".join(f"{s}: {n}" for s, n in sorted(statuses.items())))
    report.line("memory", f"peak {format_bytes(peak_bytes)} of {format_bytes(budget_bytes)}, {kills} kills")
    ratio = report.ratio("peak over budget", peak_bytes, budget_bytes, target="<= 1.0")
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        before, during = (nearest_rank(found.first_s, share) for found in (quiet, attacked))
        report.line("first token", f"{name}: quiet {1000 * before:.0f} ms, attacked {1000 * during:.0f} ms")
        slower = report.ratio(
            f"first token {name}, attacked over quiet", during, before, target="<= 2" if name == "p99" else ""
        )
    report.neighbours(samples)
    is_good = ratio <= 1 and not kills and is_ready and not failures and slower <= 2
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
