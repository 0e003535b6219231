"""What does a group of workers gain when drives are the limit, and what does a failure cost?

    python benchmarks/cluster.py --short            # two minutes: up to 2 workers, 6 failures
    python benchmarks/cluster.py                    # 1, 2 and 4 workers, 1 and 4 streams, 50 failures

Workers are processes of this machine. Each reads at most `--rate` bytes per second through a token bucket, so that
drives are the limit although the workers share one. They share the cores, too: this shows how reads scale, and says
nothing about arithmetic. Every answer is compared with that of one machine first.

Beside each measurement stands a simulation (`cluster_simulation.py`): the same owners, the same cache with its policy
and its look-ahead, and the same token bucket on a virtual clock, for the choices that a run really made. A layer's
arithmetic and its exchange are measured with the same workers when every expert is in memory.

Failures happen in the middle of a token, one after another in one run: `kill -9`, SIGSTOP, and a link that is taken
down. For that, each worker has a network namespace of its own, if this user may make one. Every process has a memory
cgroup of its own whose limit is its budget, if one can be made. The coordinator is compared with an engine that runs
alone with as many expert slots.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.cluster.group import Group
from argosy.config import MIB, format_bytes
from argosy.machine.resources import peak_bytes
from argosy.model.families import open_model
from cgroup import capped, run_capped, why_no_cap
from cluster_simulation import Layer, Recording, simulate
from common import Sample, machine_line, run_inside

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models.tiny import prompt_ids, qwen3_moe, write_model

# 8 layers of 32 experts; an expert has 1.6 MB as bf16, so that its read takes many times its arithmetic.
CONFIG = qwen3_moe(
    hidden_size=512, moe_intermediate_size=512, num_hidden_layers=8, num_experts=32, num_experts_per_tok=4,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
)  # fmt: skip
NUM_EXPERTS = 8 * 32
PROMPT = prompt_ids(CONFIG, 5, 16)
WARM_TOKENS = 16
EXPERT_BYTES = 3 * 512 * 512 * 2
WORKER_BYTES = 128 * MIB  # a worker's budget besides its slots
COORDINATOR_BYTES = 256 * MIB
WITHIN = 0.10  # a measured gain and a simulated one agree
MOST_COORDINATOR_BYTES = 64 * MIB  # beyond an engine that runs alone
STALL_TARGETS_S = {"kill -9": 0.5, "SIGSTOP": 1.0, "link down": 1.0}


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────


class Link:
    """A network namespace and the pair of interfaces that leads into it; removed in the end."""

    def __init__(self, number: int) -> None:
        self.namespace, self._outside = f"argosy{os.getpid()}w{number}", f"ag{os.getpid() % 10**6}w{number}"
        inside, prefix = f"{self._outside}i", f"10.213.{number}"
        self.host = f"{prefix}.2"
        try:
            _ip("netns", "add", self.namespace)
            _ip("link", "add", self._outside, "type", "veth", "peer", "name", inside, "netns", self.namespace)
            _ip("addr", "add", f"{prefix}.1/24", "dev", self._outside)
            _ip("link", "set", self._outside, "up")
            for arguments in (
                ("addr", "add", f"{self.host}/24", "dev", inside),
                ("link", "set", inside, "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", self.namespace, *arguments)
        except BaseException:
            self.remove()
            raise

    @property
    def command(self) -> list[str]:
        """The words before a command that runs it inside."""
        return ["ip", "netns", "exec", self.namespace]

    def set(self, state: str) -> None:
        _ip("link", "set", self._outside, state)

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True, text=True)


def why_no_links() -> str | None:
    """None where `Link` works, otherwise the reason."""
    try:
        Link(250).remove()
    except FileNotFoundError:
        return "there is no `ip`"
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip()
    return None


class Process:
    """`argosy worker`, with a drive of its own speed, in a cgroup of its own if `is_capped`."""

    def __init__(
        self, model: Path, *, slots: int, rate: int, is_capped: bool = False, link: Link | None = None
    ) -> None:
        self.link, self._is_capped = link, is_capped
        self.budget_bytes = WORKER_BYTES + slots * EXPERT_BYTES
        self._command = [
            *([] if link is None else link.command),
            sys.executable, "-m", "argosy", "worker", str(model), "--memory", f"{self.budget_bytes}B",
            "--threads", "1", "--disk-rate", f"{rate}B", "--disk-limit", f"{rate}B",
            *(["--expert-slots", str(slots)] if slots < NUM_EXPERTS else []),
        ]  # fmt: skip
        self.peak_anonymous_bytes = self.num_oom_kills = 0
        self.start("127.0.0.1:0" if link is None else f"{link.host}:7070")

    def start(self, address: str) -> None:
        command = [*self._command, "--bind", address]
        env = {**os.environ, "ARGOSY_ASK_AHEAD": "off"}
        with ExitStack() as stack:
            said = stack.enter_context(tempfile.TemporaryFile())
            if self._is_capped:
                context = capped(
                    command, limit_bytes=self.budget_bytes, stdout=subprocess.PIPE, stderr=said, env=env
                )
                self.process, self._counts = stack.enter_context(context)
            else:
                self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=env)
                stack.callback(self.process.wait)
                stack.callback(self.process.kill)
            stdout: IO[bytes] | None = self.process.stdout
            assert stdout is not None
            ready = stdout.readline().decode()
            if not ready.startswith("ready at"):
                said.seek(0)
                raise SystemExit(f"a worker did not start: {ready}{said.read().decode()}")
            self.address = ready.split()[2].rstrip(":,")
            self._stack = stack.pop_all()

    def restart(self) -> None:
        self.end()
        self.start(self.address)

    def end(self) -> None:
        if self._is_capped:
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, self._counts.peak_anonymous_bytes)
            self.num_oom_kills += self._counts.num_oom_kills
        self._stack.close()

    @property
    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])


@contextmanager
def workers(
    model: Path, count: int, *, slots: int, rate: int, is_capped: bool = False, has_links: bool = False
) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        found = []
        for number in range(count):
            link = None
            if has_links:
                link = Link(number)
                stack.callback(link.remove)
            found.append(Process(model, slots=slots, rate=rate, is_capped=is_capped, link=link))
            stack.callback(found[-1].end)
        yield found


def open_engine(model: Path, group: Group | Recording | None, **options: Any) -> Engine:
    settings: dict[str, Any] = {
        "memory": "4GiB", "threads": 1, "ask_ahead": "off", "prefix_reuse": False, "chunk_tokens": 16,
    }  # fmt: skip
    return Engine.open(model, experts=group, **(settings | options))


def params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)


# ── scaling ─────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(engine: Engine, streams: int, num_tokens: int) -> list[tuple[int, ...]]:
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(streams)]
    return [
        tuple(result.token_ids) for result in engine.generate_batch(prompts, [params(num_tokens)] * streams)
    ]


def measure(
    model: Path, count: int, streams: int, *, slots: int, rate: int, replicas: int, num_tokens: int,
    expected: Sequence[tuple[int, ...]],
) -> tuple[float, list[str], str]:  # fmt: skip
    """Seconds of the answers, the workers' addresses, and their peaks of memory."""
    with (
        workers(model, count, slots=slots, rate=rate) as running,
        Group([one.address for one in running], replicas=replicas, local=False) as group,
        open_engine(model, group, max_sequences=streams) as engine,
    ):
        answer(engine, streams, WARM_TOKENS)
        began = time.perf_counter()
        found = answer(engine, streams, num_tokens)
        took = time.perf_counter() - began
        assert found == list(expected), "the text of a group differs from that of one machine"
        peaks = ", ".join(format_bytes(one.peak_bytes) for one in running)
        return took, [one.address for one in running], peaks


def record(model: Path, streams: int, num_tokens: int) -> tuple[list[tuple[int, ...]], list[Layer], int]:
    """The answers of one machine, all layers that it ran as `measure` does, and the first layer that is measured."""
    recording = Recording()
    with open_engine(model, recording, max_sequences=streams) as engine:
        answer(engine, streams, WARM_TOKENS)
        first = len(recording.layers)
        found = answer(engine, streams, num_tokens)
    return found, recording.layers, first


def measure_scaling(model: Path, args: argparse.Namespace, rows: list[tuple[object, ...]]) -> None:
    files = open_model(model)
    num_agreeing = num_rows = 0
    for streams in args.streams:
        expected, layers, first = record(model, streams, args.tokens)
        common = {"num_tokens": args.tokens, "expected": expected}
        base: dict[str, float] = {}
        for count in args.workers:
            everything, _, _ = measure(
                model, count, streams, slots=NUM_EXPERTS, rate=args.rate * 100, replicas=1, **common
            )
            layer_s = everything / (len(layers) - first)
            for replicas in (1, 2):
                if replicas > count:
                    continue
                options = {"slots": args.slots, "rate": args.rate, "replicas": replicas}
                with Sample() as sample:
                    took, names, peaks = measure(model, count, streams, **options, **common)
                simulated = simulate(files, layers, first=first, names=names, layer_s=layer_s, **options)
                base.setdefault("measured", took)
                base.setdefault("simulated", simulated)
                gain, told = base["measured"] / took, base["simulated"] / simulated
                num_rows += 1
                agrees = abs(gain / told - 1) <= WITHIN
                num_agreeing += agrees
                tokens = streams * args.tokens
                print(
                    f"{streams} streams  {count} workers, R = {replicas}: {tokens / took:6.1f} tok/s, {gain:.2f} x;  "
                    f"simulated {tokens / simulated:6.1f} tok/s, {told:.2f} x;  measured gain / simulated "
                    f"{gain / told:.2f}{'' if agrees else ' (not within 10 %)'};  without reads "
                    f"{tokens / everything:.1f} tok/s;  peaks {peaks};  {sample}"
                )
                rows.append(
                    ("scaling", streams, count, replicas, tokens / took, gain, tokens / simulated, told)
                )
    print(f"gains within 10 % of the simulation: {num_agreeing} of {num_rows} rows")


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────


def alone(model: Path, num_tokens: int) -> None:
    """Inner part: one engine that has as many expert slots as a coordinator, and its peak of memory."""
    with open_engine(
        model, None, memory=COORDINATOR_BYTES, expert_slots=CONFIG["num_experts_per_tok"]
    ) as engine:
        found = engine.generate(PROMPT, params(num_tokens))
    print(json.dumps({"tokens": list(found.token_ids), "peak_bytes": peak_bytes()}))


def coordinate(model: Path, args: argparse.Namespace, *, is_capped: bool, has_links: bool) -> None:
    """Inner part: a coordinator whose workers fail, one after another, in the middle of answers.

    Prints the longest pause between two tokens of each answer during which a worker fails, by kind of failure.
    """
    kinds = ["kill -9", "SIGSTOP", *(["link down"] if has_links else [])]
    pauses: dict[str, list[float]] = {kind: [] for kind in kinds}
    with (
        workers(
            model, 2, slots=128, rate=10 * args.rate, is_capped=is_capped, has_links=has_links
        ) as running,
        Group([one.address for one in running], local=False) as group,
        open_engine(model, group, memory=COORDINATOR_BYTES) as engine,
    ):
        expected = tuple(engine.generate(PROMPT, params(args.tokens)).token_ids)
        for number in range(args.kills):
            kind, victim = kinds[number % len(kinds)], running[number // len(kinds) % 2]
            times, tokens = [], []
            at_token = args.tokens // 2
            for event in engine.stream(PROMPT, params(args.tokens)):
                times.append(time.perf_counter())
                tokens.append(event.token_id)
                if len(times) == at_token:
                    # In the middle of a token, not between two.
                    threading.Timer(0.004, break_down, (kind, victim)).start()
            assert tuple(tokens) == expected, "the text changed"
            pauses[kind].append(float(max(np.diff(times[at_token - 1 :]))))
            repair(kind, victim)
            while any(one["state"] != "ready" for one in group.status()):
                time.sleep(0.05)
            engine.generate(PROMPT, params(args.tokens))  # the returned worker has read its experts again
        planned = engine.plan.claimed["group_bytes"]
    found = {
        "pauses": pauses, "tokens": list(expected), "peak_bytes": peak_bytes(), "planned_bytes": planned,
        "workers": [[one.budget_bytes, one.peak_anonymous_bytes, one.num_oom_kills] for one in running],
    }  # fmt: skip
    print(json.dumps(found))


def break_down(kind: str, victim: Process) -> None:
    if kind == "link down":
        assert victim.link is not None
        victim.link.set("down")
    else:
        victim.process.send_signal(signal.SIGKILL if kind == "kill -9" else signal.SIGSTOP)


def repair(kind: str, victim: Process) -> None:
    if kind == "link down":
        assert victim.link is not None
        victim.link.set("up")
    elif kind == "kill -9":
        victim.restart()
    else:
        victim.process.send_signal(signal.SIGCONT)


def run_part(
    part: str, model: Path, args: argparse.Namespace, *, is_capped: bool
) -> tuple[dict[str, Any], str]:
    """Run an inner part in a process of its own; what it found, and what the kernel counted of its cgroup."""
    command = run_inside(
        "cluster.py",
        [
            "--part",
            part,
            "--model",
            model,
            "--tokens",
            args.tokens,
            "--kills",
            args.kills,
            "--rate",
            args.rate,
        ],
    )
    timeout_s = 120 + 20 * args.kills
    if is_capped:
        run = run_capped(command, limit_bytes=COORDINATOR_BYTES, timeout_s=timeout_s)
        code, out, err = run.returncode, run.stdout, run.stderr
        counted = (
            f"cgroup of {format_bytes(run.limit_bytes)}: at most {format_bytes(run.peak_anonymous_bytes)} anonymous, "
            f"{run.num_oom_kills} kills"
        )
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
        counted = "no cgroup"
    if code != 0:
        raise SystemExit(f"{part} ended with {code}\n{err[-4000:]}")
    return json.loads(out.splitlines()[-1]), counted


def measure_failures(model: Path, args: argparse.Namespace, rows: list[tuple[object, ...]]) -> None:
    if no_cap := why_no_cap():
        print(f"cgroups    none: {no_cap}")
    if no_links := why_no_links():
        print(f"links      not taken down, since there are no network namespaces here: {no_links}")
    by_itself, counted_alone = run_part("alone", model, args, is_capped=no_cap is None)
    found, counted = run_part("coordinate", model, args, is_capped=no_cap is None)
    assert found["tokens"] == by_itself["tokens"], "the text of a group differs from that of one machine"
    everything = []
    for kind, pauses in found["pauses"].items():
        everything += pauses
        print_pauses(kind, pauses, rows, target_s=STALL_TARGETS_S[kind])
    print_pauses("all", everything, rows)
    peak, peak_alone = found["peak_bytes"], by_itself["peak_bytes"]
    said = "met" if peak - peak_alone <= MOST_COORDINATOR_BYTES else "missed"
    print(
        f"coordinator: peak {format_bytes(peak)}, an engine alone {format_bytes(peak_alone)}: "
        f"{(peak - peak_alone) / MIB:+.1f} MiB, planned {format_bytes(found['planned_bytes'])}   "
        f"target <= 64 MiB: {said}"
    )
    print(f"coordinator: {counted};  alone: {counted_alone}")
    for number, (budget, anonymous, kills) in enumerate(found["workers"]):
        if no_cap is None:
            print(
                f"worker {number}: cgroup of {format_bytes(budget)}: at most {format_bytes(anonymous)} anonymous, "
                f"{kills} kills for memory"
            )
    rows.append(("memory", peak, peak_alone, found["planned_bytes"]))


def print_pauses(
    kind: str, pauses: list[float], rows: list[tuple[object, ...]], *, target_s: float | None = None
) -> None:
    pauses = sorted(pauses)
    p99 = pauses[min(len(pauses) - 1, round(0.99 * (len(pauses) - 1)))]
    judged = (
        ""
        if target_s is None
        else f"   target p99 <= {1e3 * target_s:.0f}: {'met' if p99 <= target_s else 'missed'}"
    )
    print(
        f"{kind:<10} {len(pauses)} times, no failed request, the same text; longest pause "
        f"p50 {1e3 * statistics.median(pauses):.0f} ms, p99 {1e3 * p99:.0f} ms, max {1e3 * pauses[-1]:.0f} ms{judged}"
    )
    rows.append((kind, len(pauses), statistics.median(pauses), p99, pauses[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="none: no scaling")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--slots", type=int, default=32, help="expert cache of each worker; there are 256 experts"
    )
    parser.add_argument("--rate", type=int, default=100 * MIB, help="bytes per second of each drive")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--kills", type=int, default=50, help="failures, of all kinds in turn; 0: none")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--part", choices=["alone", "coordinate"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "alone":
        alone(args.model, args.tokens)
        return
    if args.part == "coordinate":
        coordinate(args.model, args, is_capped=why_no_cap() is None, has_links=why_no_links() is None)
        return
    if args.short:
        args.workers, args.streams, args.kills, args.tokens = [1, 2], [1], 6, 24
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "pack"
        pack(open_model(write_model(Path(folder) / "model", CONFIG, seed=3)), model, format="source")
        files = open_model(model)
        print(f"machine    {machine_line()}")
        print(
            f"model      {len(files.experts)} experts of {format_bytes(files.expert_bytes / len(files.experts))}; "
            f"{args.slots} slots and {args.rate / 1e6:.0f} MB/s for each worker"
        )
        if args.workers:
            measure_scaling(model, args, rows)
        if args.kills:
            measure_failures(model, args, rows)
    if args.csv is not None:
        with args.csv.open("w", newline="") as out:
            csv.writer(out).writerows(rows)


if __name__ == "__main__":
    main()
