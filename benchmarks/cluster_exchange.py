"""How long does a layer take to go to workers and back, beside plain sockets of Python and calls of Ray actors?

    python benchmarks/cluster_exchange.py [--workers 1 2 4] [--rows 1 8] [--hidden 3584] [--repeats 5] [--short]

Workers are processes on this machine, over TCP on loopback. An exchange sends `--rows` rows of `--hidden` float32 to
each worker and waits until as many outputs of each are in place: 14 KB each way with one row of 3584. The experts are
as narrow as they can be, and the same experts run here are a line of their own, so that what is left is the way there
and back. A token of Kimi-K2's geometry is 60 layers of 7168 with 8 experts in a native stack with a narrow mixer: with
the experts in a table here, with workers and no Python, and with workers and Python at each layer, as it is for a layer
in which something goes wrong. Outputs and logits are first compared with those of a table here, bit by bit.

With fewer cores than processes, an exchange also waits for cores: say how many there were.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from argosy import _native
from argosy.cluster.runner import ClusterRunner
from argosy.experts.resident import ResidentRunner
from common import Report, alternate, run_inside

EXPERTS_PER_TOKEN = 8
WIDTH = 32  # the narrowest
KIMI_HIDDEN, KIMI_LAYERS = 7168, 60
VOCABULARY = 64
LONG_US = 60_000_000


def limits(hidden: int) -> dict[str, Any]:
    return {
        "hidden": hidden,
        "num_experts": [EXPERTS_PER_TOKEN] * KIMI_LAYERS,
        "most_rows": 64,
        "most_assignments": 64 * EXPERTS_PER_TOKEN,
    }


class Experts:
    """Eight narrow experts, the same in every layer and in every process."""

    def __init__(self, hidden: int) -> None:
        rng = np.random.default_rng(1)
        shapes = [(WIDTH, hidden), (WIDTH, hidden), (hidden, WIDTH)]
        sizes = [_native.matrix_bytes("q4", *shape) for shape in shapes]
        self.hidden = hidden
        self.arena = _native.Arena(EXPERTS_PER_TOKEN * sum(sizes))
        memory, at = self.arena.array(), 0
        for _ in range(EXPERTS_PER_TOKEN):
            for size, shape in zip(sizes, shapes, strict=True):
                _native.quantize("q4", rng.standard_normal(shape, np.float32), memory[at : at + size])
                at += size
        self.runtime = _native.Runtime(1)
        self.table = _native.ExpertTable(self.arena, hidden=hidden, activation=("silu", 0.0, 0.0))
        starts = np.tile(np.cumsum([0, *sizes[:-1]], dtype=np.int64), (EXPERTS_PER_TOKEN, 1))
        for layer in range(KIMI_LAYERS):
            self.table.add_layer(layer, formats=("q4", "q4", "q4"), width=WIDTH, starts=starts)
            self.table.place([((layer, e), e * sum(sizes)) for e in range(EXPERTS_PER_TOKEN)])


class Step:
    """Rows of a layer that all chose the same experts."""

    def __init__(self, experts: Experts, num_rows: int, k: int) -> None:
        choices = np.tile(np.arange(k, dtype=np.int32), (num_rows, 1))
        self.experts, self.k = experts, k
        self.dispatch = _native.Dispatch(choices, np.ones(num_rows, np.bool_), EXPERTS_PER_TOKEN)
        self.rows = np.random.default_rng(2).standard_normal((num_rows, experts.hidden), np.float32)
        self.out = np.empty((num_rows * k, experts.hidden), np.float32)

    def run_here(self) -> None:
        table, runtime = self.experts.table, self.experts.runtime
        table.run(runtime, 0, self.dispatch.experts, self.dispatch, self.rows, self.out)


def serve(kind: str, port: int, hidden: int, num_bytes: int) -> None:
    """A worker process: of the data plane, or one that echoes bytes in plain Python."""
    connection = socket.create_connection(("127.0.0.1", port))
    if kind == "native":
        experts = Experts(hidden)
        link = _native.WorkerLink(connection.detach(), **limits(hidden))
        link.serve_resident(experts.runtime, experts.table)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(num_bytes))
    while receive_all(connection, memory):
        connection.sendall(memory)


def receive_all(connection: socket.socket, memory: memoryview) -> bool:
    at = 0
    while at < len(memory):
        received = connection.recv_into(memory[at:])
        if received == 0:
            return False
        at += received
    return True


@contextmanager
def workers(kind: str, count: int, *, hidden: int, num_bytes: int = 0) -> Iterator[list[socket.socket]]:
    """Connections to so many worker processes."""
    processes: list[subprocess.Popen[bytes]] = []
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = ["--serve", kind, "--port", server.getsockname()[1], "--hidden", hidden]
        arguments += ["--num-bytes", num_bytes]
        try:
            for _ in range(count):
                processes.append(subprocess.Popen(run_inside("cluster_exchange.py", arguments)))
                connection, _ = server.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections.append(connection)
            yield connections
        finally:
            for connection in connections:
                connection.close()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
                process.wait()


def seconds_of(body: Callable[[], None]) -> float:
    began = time.perf_counter()
    body()
    return time.perf_counter() - began


def timed(body: Callable[[], None], rounds: int) -> dict[str, float]:
    """Microseconds of one round: the median and the 99th percentile."""
    times = np.array([seconds_of(body) for _ in range(rounds)])
    return {"p50": 1e6 * float(np.median(times)), "p99": 1e6 * float(np.quantile(times, 0.99))}


def exchanging(exchange: _native.Exchange, peers: Sequence[int], step: Step) -> Callable[[], None]:
    """One exchange of a step, whose experts are dealt out to the peers."""
    shares = {peer: step.dispatch.experts[i :: len(peers)] for i, peer in enumerate(peers)}

    def once() -> None:
        ticket = exchange.send(0, step.dispatch, step.rows, step.out, shares)
        left = step.k
        while left > 0:
            for event in exchange.receive(ticket, LONG_US):
                if event.failure is not None:
                    raise SystemExit(f"a worker failed: {event.message}")
                left -= len(event.experts)
        exchange.forget(ticket)

    return once


class Group:
    """An exchange with worker processes."""

    def __init__(self, stack: ExitStack, count: int, hidden: int) -> None:
        self.exchange = _native.Exchange(**limits(hidden))
        connections = stack.enter_context(workers("native", count, hidden=hidden))
        self.peers = [self.exchange.add(connection.detach()) for connection in connections]
        stack.callback(self.exchange.close)


def check(arguments: argparse.Namespace) -> int:
    """Compare the outputs of each number of workers with those of a table here; returns how many rows."""
    checked = 0
    for hidden in (arguments.hidden, KIMI_HIDDEN):
        experts = Experts(hidden)
        for count in arguments.workers:
            with ExitStack() as stack:
                group = Group(stack, count, hidden)
                for num_rows in arguments.rows:
                    step = Step(experts, num_rows, EXPERTS_PER_TOKEN)
                    step.run_here()
                    expected = step.out.copy()
                    step.out[:] = 0
                    exchanging(group.exchange, group.peers, step)()
                    if not np.array_equal(step.out.view(np.int32), expected.view(np.int32)):
                        raise SystemExit("the workers' outputs differ from those of the table here")
                    checked += len(expected)
    return checked


def plain_sockets(connections: Sequence[socket.socket], num_bytes: int) -> Callable[[], None]:
    out, back = bytes(num_bytes), memoryview(bytearray(num_bytes))

    def once() -> None:
        for connection in connections:
            connection.sendall(out)
        for connection in connections:
            if not receive_all(connection, back):
                raise SystemExit("a worker of the plain sockets has ended")

    return once


def ray_calls(stack: ExitStack, count: int, num_rows: int, hidden: int) -> Callable[[], None] | None:
    """One call of each of so many Ray actors that give rows back; None without Ray."""
    try:
        import ray
    except ImportError:
        return None
    ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, configure_logging=False)
    stack.callback(ray.shutdown)

    @ray.remote(num_cpus=1)
    class Worker:
        def answer(self, rows: Any) -> Any:
            return rows + 1

    actors = [Worker.remote() for _ in range(count)]
    rows = np.zeros((num_rows, hidden), np.float32)
    return lambda: ray.get([actor.answer.remote(rows) for actor in actors])


def measure_exchanges(report: Report, arguments: argparse.Namespace) -> None:
    hidden, experts = arguments.hidden, Experts(arguments.hidden)
    for num_rows in arguments.rows:
        num_bytes = 4 * hidden * num_rows
        for count in arguments.workers:
            with ExitStack() as stack:
                step = Step(experts, num_rows, count)  # one expert for each worker
                variants: dict[str, Callable[[], None]] = {"the experts, here": step.run_here}
                group = Group(stack, count, hidden)
                variants["exchange"] = exchanging(group.exchange, group.peers, step)
                plain = stack.enter_context(workers("plain", count, hidden=hidden, num_bytes=num_bytes))
                variants["plain sockets of Python"] = plain_sockets(plain, num_bytes)
                if (calls := ray_calls(stack, count, num_rows, hidden)) is not None:
                    variants["calls of Ray actors"] = calls
                for once in variants.values():
                    timed(once, 20)
                samples = alternate(
                    {
                        name: lambda once=once: timed(once, arguments.rounds)
                        for name, once in variants.items()
                    },
                    arguments.repeats,
                    log=False,
                )
                for name, of_variant in samples.items():
                    facts = {"workers": count, "bytes": num_bytes, "rows": num_rows}
                    label = f"{count} workers, {num_bytes / 1000:.0f} kB, {name}"
                    is_judged = name == "exchange" and (count, num_rows) == (2, 1)
                    p50 = report.figure(f"{label}, p50", "us", of_variant, "p50", **facts)
                    report.figure(f"{label}, p99", "us", of_variant, "p99", **facts)
                    if is_judged and not arguments.short:
                        report.ratio(f"{label}, p50 over 80 us", p50, 80, target="<= 1", **facts)


class Token:
    """A token of Kimi-K2's geometry: a stack of 60 layers that share their weights. `run` gives its logits."""

    def __init__(self, experts: Experts, group: Group) -> None:
        rng = np.random.default_rng(3)

        def matrix(rows: int, cols: int, format: Any = "q4") -> _native.Matrix:
            data = np.zeros(_native.matrix_bytes(format, rows, cols), np.uint8)
            _native.quantize(format, rng.standard_normal((rows, cols), np.float32) / cols**0.5, data)
            return _native.Matrix(data, 0, format, rows, cols)

        hidden, runtime = experts.hidden, experts.runtime
        ones = np.ones(hidden, np.float32)
        mixer = _native.grouped_query_attention(
            matrix(64, hidden), matrix(32, hidden), matrix(32, hidden), matrix(hidden, 64),
            num_heads=2, window=0, scale=0.18,
        )  # fmt: skip
        routing = _native.Routing(EXPERTS_PER_TOKEN, score="softmax", renormalize=True)
        ffn = _native.routed_ffn(matrix(EXPERTS_PER_TOKEN, hidden, "f32"), routing, width=WIDTH)
        self.experts = experts
        self.stack = _native.Stack(
            runtime,
            _native.KvCache([_native.KvShape.keys_values(1, 32)] * KIMI_LAYERS, 1, 16, "f32"),
            embedding=matrix(VOCABULARY, hidden),
            head=matrix(VOCABULARY, hidden),
            final_norm=ones,
            norm_eps=1e-5,
            rotaries=[_native.Rotary(np.ones(8), 1.0)],
            activation=("silu", 0.0, 0.0),
            layers=[_native.Layer(ones, mixer, ones, ffn)] * KIMI_LAYERS,
            max_tokens=1,
        )
        self.layout = self.owners(group.peers)
        local = ResidentRunner(
            runtime, experts.arena, experts.table, num_experts=EXPERTS_PER_TOKEN, bytes_read=0
        )
        self.runner = ClusterRunner(self, group.exchange, local, here=None)
        self.logits = np.empty((1, VOCABULARY), np.float32)
        self.num_taken_over = 0  # layers at which `run_there` stopped: an answer took 50 ms and more

    @staticmethod
    def owners(peers: Sequence[int]) -> _native.Owners:
        hosts = [_native.Owner(f"worker {peer}") for peer in peers]
        for host, peer in zip(hosts, peers, strict=True):
            host.peer, host.is_resident = peer, True
            host.set_rates(1 << 20, 0)
        table = np.arange(EXPERTS_PER_TOKEN, dtype=np.int16) % len(peers)
        return _native.Owners(hosts, np.tile(table[:, None], (KIMI_LAYERS, 1, 1)))

    def lost(self, owner: _native.Owner, why: str) -> None:
        raise SystemExit(f"{owner.name} failed: {why}")

    set_aside = lost

    def begin(self, experts: _native.ExpertTable | _native.LayerExperts | None) -> None:
        zeros = np.zeros(1, np.int32)
        self.stack.use_experts(experts)
        self.stack.begin(
            zeros, zeros, np.zeros(1, np.int64), np.ones(1, np.bool_), np.zeros((1, 1), np.int32), zeros,
            np.zeros(1, np.int64), self.logits,
        )  # fmt: skip

    def run_here(self) -> None:
        self.begin(self.experts.table)
        self.stack.advance()

    def run_there(self) -> None:
        self.begin(self.runner.elsewhere)
        self.num_taken_over += self._finish()

    def run_with_python(self) -> None:
        self.begin(None)
        self._finish()

    def _finish(self) -> int:
        """Run the layers at which the stack stops; returns how many."""
        num_layers = 0
        while (demand := self.stack.advance()) is not None:
            layer, dispatch = demand
            num_layers += 1
            with self.runner.run(layer, dispatch, self.stack.rows(), self.stack.expert_out()) as groups:
                for experts in groups:
                    self.stack.finish_experts(experts)
        return num_layers


def measure_tokens(report: Report, arguments: argparse.Namespace) -> None:
    """Tokens of 60 layers with 8 experts each, without the time of the same experts in one process.

    Where other processes run, a token is rarely undisturbed; the lowest of a stretch says what it takes then.
    """
    experts = Experts(KIMI_HIDDEN)
    for count in arguments.workers:
        with ExitStack() as stack:
            token = Token(experts, Group(stack, count, KIMI_HIDDEN))
            variants = {
                "the experts, here": token.run_here,
                "workers": token.run_there,
                "workers, and Python at each layer": token.run_with_python,
            }
            logits = []
            for once in variants.values():
                token.logits[:] = np.nan
                once()
                logits.append(token.logits.copy())
            if not all(np.array_equal(one.view(np.int32), logits[0].view(np.int32)) for one in logits):
                raise SystemExit("the logits of a token with workers differ from those with a table here")
            report.line("correct", f"the logits of a token with {count} workers equal those of a table here")

            def stretch(once: Callable[[], None]) -> dict[str, float]:
                times = [1e3 * seconds_of(once) for _ in range(arguments.tokens)]
                return {"ms": float(np.median(times)), "lowest_ms": min(times)}

            samples = alternate(
                {name: lambda once=once: stretch(once) for name, once in variants.items()},
                arguments.repeats,
                log=False,
            )
            facts = {"workers": count, "hidden": KIMI_HIDDEN, "layers": KIMI_LAYERS}
            for name, of_variant in samples.items():
                report.figure(f"token, {count} workers: {name}"[:46], "ms", of_variant, "ms", **facts)
                report.figure("  the lowest", "ms", of_variant, "lowest_ms", **facts)
            here = samples["the experts, here"]
            for name in list(variants)[1:]:
                for key, label in (("ms", "over the experts here"), ("lowest_ms", "  lowest over lowest")):
                    overheads = [
                        there.values[key] - alone.values[key]
                        for there, alone in zip(samples[name], here, strict=True)
                    ]
                    is_judged = name == "workers" and count == 2 and key == "ms" and not arguments.short
                    target = "<= 6" if is_judged else ""
                    report.shares(f"  {name.removeprefix('workers, and ')}: {label}, ms"[:46], overheads,
                                  target=target, **facts)  # fmt: skip
            report.line(
                "layers", f"Python took over {token.num_taken_over}: their answers took 50 ms and more"
            )
            report.neighbours([sample for of_variant in samples.values() for sample in of_variant])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--rounds", type=int, default=400, help="exchanges of one timed stretch")
    parser.add_argument("--tokens", type=int, default=10, help="tokens of one timed stretch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="two workers, few rounds, once")
    parser.add_argument("--serve", choices=["native", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--num-bytes", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.port, arguments.hidden, arguments.num_bytes)
        return 0
    if arguments.short:
        arguments.workers, arguments.rows, arguments.repeats = [2], [1], 1
        arguments.rounds, arguments.tokens = 100, 2
    report = Report("cluster_exchange", state="workers are processes on this machine, over TCP on loopback")
    report.correct(f"{check(arguments)} outputs equal to those of a table here, bit by bit")
    report.opening()
    measure_exchanges(report, arguments)
    measure_tokens(report, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
