"""How fast does a token come from two workers, beside llama.cpp and its RPC backend?

    benchmarks/install_tools_peer.sh               # once: build/peer-tools/bin
    python benchmarks/cluster_peer.py [--model FILE.gguf] [--peer DIR] [--tokens 32] [--repeats 3] [--short]

Both run the same GGUF file, every weight in memory, and decode one sequence. Alone, each has two threads. With workers,
three processes with a thread each talk over TCP on loopback. llama.cpp divides layers among its workers and sends them
their weights at every start; they work one after another. Argosy divides experts; its coordinator keeps the dense
weights, and its workers read their experts from their own files. So the table also says how long each takes from its
start to the first token. The answer of Argosy's group is first compared with that of one machine.

With fewer cores than processes, a token also waits for cores: say how many there were.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from argosy import Engine, SamplingParams
from argosy.cluster.group import Group
from common import REPOSITORY, Report, alternate
from make_checkpoint import named_model

NUM_WORKERS = 2
PROMPT = list(range(100, 108))
CONTEXT = 512


@contextmanager
def argosy_workers(model: Path) -> Iterator[list[str]]:
    """The addresses of workers with all experts in memory."""
    processes: list[subprocess.Popen[str]] = []
    addresses: list[str] = []
    command = [sys.executable, "-m", "argosy", "worker", str(model), "--memory", "8GiB", "--threads", "1"]
    command += ["--disk-rate", "1GB", "--bind", "127.0.0.1:0"]
    try:
        for _ in range(NUM_WORKERS):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            processes.append(process)
            assert process.stdout is not None
            addresses.append(process.stdout.readline().split()[2].rstrip(":,"))
        yield addresses
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_argosy(
    model: Path, num_tokens: int, *, has_workers: bool
) -> tuple[dict[str, float], tuple[int, ...]]:
    """Figures and tokens of one answer; with workers, the coordinator runs no experts."""
    began = time.perf_counter()
    if not has_workers:
        with Engine.open(model, memory="8GiB", threads=2, context=CONTEXT) as engine:
            return answer(engine, num_tokens, began)
    with (
        argosy_workers(model) as addresses,
        Group(addresses, replicas=1, local=False) as group,
        Engine.open(model, memory="8GiB", threads=1, context=CONTEXT, experts=group) as engine,
    ):
        return answer(engine, num_tokens, began)


def answer(engine: Engine, num_tokens: int, began: float) -> tuple[dict[str, float], tuple[int, ...]]:
    times, tokens = [], []
    for event in engine.stream(PROMPT, SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)):
        times.append(time.perf_counter())
        tokens.append(event.token_id)
    return {"tok/s": (num_tokens - 1) / (times[-1] - times[0]), "start_s": times[0] - began}, tuple(tokens)


@contextmanager
def rpc_workers(bin: Path) -> Iterator[list[str]]:
    """The addresses of llama.cpp's RPC servers."""
    processes: list[subprocess.Popen[bytes]] = []
    addresses = []
    try:
        for _ in range(NUM_WORKERS):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            command = [str(bin / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            addresses.append(f"127.0.0.1:{port}")
        for address in addresses:
            wait_for(address)
        yield addresses
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(200):
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"an RPC server of llama.cpp does not listen at {address}")


def run_peer(bin: Path, model: Path, num_tokens: int, *, has_workers: bool) -> dict[str, float]:
    began = time.perf_counter()
    command = [
        str(bin / "llama-bench"),
        "-m",
        str(model),
        "-p",
        "0",
        "-n",
        str(num_tokens),
        "-r",
        "1",
        "-o",
        "json",
    ]
    if not has_workers:
        found = bench([*command, "-t", "2", "-ngl", "0"])
    else:
        with rpc_workers(bin) as addresses:
            found = bench([*command, "-t", "1", "-ngl", "99", "--rpc", ",".join(addresses)])
    # Everything but the tokens: starting, loading, sending weights, and one token to warm up.
    start_s = time.perf_counter() - began - num_tokens / found
    return {"tok/s": found, "start_s": start_s}


def bench(command: list[str]) -> float:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"llama-bench failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout)[0]["avg_ts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a GGUF file; default: the small model, written if missing"
    )
    parser.add_argument("--peer", type=Path, default=REPOSITORY / "build" / "peer-tools" / "bin")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="few tokens, once")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.tokens, arguments.repeats = 8, 1
    models = Path(os.environ.get("ARGOSY_BENCH_MODELS", REPOSITORY / "build" / "models"))
    model, num_tokens = arguments.model or named_model(models, "small", "Q4_0"), arguments.tokens
    report = Report(
        "cluster_peer", state=f"{model.name}; workers are processes on this machine, over loopback"
    )
    _, alone = run_argosy(model, num_tokens, has_workers=False)
    _, together = run_argosy(model, num_tokens, has_workers=True)
    if alone != together:
        raise SystemExit("the answer of a group differs from that of one machine")
    report.correct(f"{num_tokens}/{num_tokens} tokens of Argosy's group equal to those of one machine")
    report.opening()
    variants = {
        "Argosy, alone": lambda: run_argosy(model, num_tokens, has_workers=False)[0],
        "Argosy, 2 workers": lambda: run_argosy(model, num_tokens, has_workers=True)[0],
    }
    if (arguments.peer / "llama-bench").exists():
        variants |= {
            "llama.cpp, alone": lambda: run_peer(arguments.peer, model, num_tokens, has_workers=False),
            "llama.cpp, 2 RPC workers": lambda: run_peer(arguments.peer, model, num_tokens, has_workers=True),
        }
    else:
        print(
            "llama.cpp's RPC backend is not there: Argosy alone (benchmarks/install_tools_peer.sh)",
            file=sys.stderr,
        )
    samples = alternate(variants, arguments.repeats)
    speeds = {name: report.figure(name, "tok/s", of_one, "tok/s") for name, of_one in samples.items()}
    for name, of_one in samples.items():
        report.figure(f"{name}: start to first token", "s", of_one, "start_s")
    for engine, workers in (("Argosy", "2 workers"), ("llama.cpp", "2 RPC workers")):
        if f"{engine}, alone" in speeds:
            with_workers, without = speeds[f"{engine}, {workers}"], speeds[f"{engine}, alone"]
            report.ratio(f"{engine}: with workers over alone", with_workers, without)
    if "llama.cpp, alone" in speeds:
        peer = speeds["llama.cpp, 2 RPC workers"]
        report.ratio("Argosy's group over llama.cpp's", speeds["Argosy, 2 workers"], peer)
    report.neighbours([sample for of_one in samples.values() for sample in of_one])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
