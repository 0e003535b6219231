"""How long does an answer pause when workers freeze, or a link carries nothing any more?

    python benchmarks/cluster_freeze.py             # 50 times each: one, two and all workers freeze; a link is cut
    python benchmarks/cluster_freeze.py --short     # twice each

Three workers are processes of this machine, and so are their links: each forwards one port. SIGSTOP in the middle of an
answer freezes a worker, or cuts a link: both still accept what comes, and answer nothing. The coordinator runs experts,
too, from its own files. Each answer is compared with that of one machine. The table shows the longest time between two
tokens of each kind of failure, beside that of the same answer without one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from argosy import Engine, SamplingParams
from argosy.checkpoint.pack import pack
from argosy.cluster.group import Group
from argosy.model.families import open_model
from common import machine_line

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.cluster.rigs import CONFIG, DRIVE, PROMPT, open_engine, wait_until, worker_process
from tests.helpers.forks import FORKS
from tests.models.tiny import write_model

NUM_WORKERS = 3
AT_TOKEN = 3
NUM_TOKENS = 250  # an answer goes on until silent workers are given up
MOST_GAP_S = 3.0
KINDS = ("one frozen", "two frozen", "all frozen", "link cut")


@contextmanager
def link_to(port: int) -> Iterator[tuple[int, int]]:
    """The id of a process that forwards connections to a port of this machine, and its own port."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=run_link, args=(port, theirs))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid, ours.recv()
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()


def run_link(port: int, told: Connection) -> None:
    asyncio.run(forward(port, told))


async def forward(port: int, told: Connection) -> None:
    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while part := await reader.read(1 << 16):
                writer.write(part)
                await writer.drain()
        writer.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, to_them = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, to_them), carry(theirs, writer))

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    told.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class Rig:
    """A coordinator and three workers behind links; the processes of each kind of failure by its name."""

    def __init__(self, model: Path, stack: ExitStack) -> None:
        workers = [
            stack.enter_context(worker_process(model, "--expert-slots", "8")) for _ in range(NUM_WORKERS)
        ]
        links = [stack.enter_context(link_to(worker.port)) for worker in workers]
        pids = [worker.process.pid for worker in workers]
        self.group = stack.enter_context(
            Group([f"127.0.0.1:{port}" for _, port in links], disk_bytes_per_s=DRIVE)
        )
        self.engine = stack.enter_context(open_engine(model, self.group, expert_slots=8))
        self.victims: dict[str, Callable[[int], Sequence[int]]] = {
            "one frozen": lambda number: [pids[number % NUM_WORKERS]],
            "two frozen": lambda number: [pids[number % NUM_WORKERS], pids[(number + 1) % NUM_WORKERS]],
            "all frozen": lambda number: pids,
            "link cut": lambda number: [links[number % NUM_WORKERS][0]],
        }

    def until_ready(self) -> None:
        wait_until(lambda: all(one["state"] == "ready" for one in self.group.status()), 60)

    def round(self, kind: str, number: int, num_tokens: int) -> tuple[list[int], float, float]:
        """The tokens of an answer in whose middle the failure happens, and the longest gaps before and after it."""
        victims = self.victims[kind](number)
        self.until_ready()

        def freeze() -> None:
            for pid in victims:
                os.kill(pid, signal.SIGSTOP)

        try:
            return answer(self.engine, num_tokens, freeze)
        finally:
            for pid in victims:
                os.kill(pid, signal.SIGCONT)


def answer(
    engine: Engine, num_tokens: int, happens: Callable[[], None] = lambda: None
) -> tuple[list[int], float, float]:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    token_ids: list[int] = []
    longest = [0.0, 0.0]
    at = time.monotonic()
    for event in engine.stream(PROMPT, params):
        now = time.monotonic()
        if token_ids:  # the prompt is no gap
            is_after = len(token_ids) >= AT_TOKEN
            longest[is_after] = max(longest[is_after], now - at)
        token_ids.append(event.token_id)
        if len(token_ids) == AT_TOKEN:
            happens()
        at = time.monotonic()
    return token_ids, longest[0], longest[1]


def trial(
    directory: Path, times: int, kinds: Sequence[str] = KINDS, *, num_tokens: int = NUM_TOKENS
) -> dict[str, list[tuple[float, float, bool]]]:
    """The longest gaps before and after each failure, and whether its answer has the tokens of one machine."""
    pack(open_model(write_model(directory / "bf16", CONFIG, seed=3)), directory / "q8", format="q8")
    model = directory / "q8"
    with open_engine(model) as alone:
        expected, *_ = answer(alone, num_tokens)
    found: dict[str, list[tuple[float, float, bool]]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        rig = Rig(model, stack)
        for _ in range(8):  # so that the times of workers are known
            answer(rig.engine, 10)
        for number in range(times):
            for kind in kinds:
                token_ids, before, after = rig.round(kind, number, num_tokens)
                found[kind].append((before, after, token_ids == expected))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--short", action="store_const", const=2, dest="times")
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as directory:
        found = trial(Path(directory), options.times, options.kinds.split(","))
    print(f"{'failure':<12}{'times':>7}{'longest':>10}{'median':>9}{'before it':>11}{'same text':>11}")
    is_met = True
    for kind, rounds in found.items():
        before = max(one for one, _, _ in rounds)
        after = [one for _, one, _ in rounds]
        num_same = sum(is_same for _, _, is_same in rounds)
        is_met &= max(after) <= MOST_GAP_S and num_same == len(rounds)
        print(
            f"{kind:<12}{len(rounds):>7}{max(after):>8.2f} s{statistics.median(after):>7.2f} s{before:>9.2f} s"
            f"{num_same:>7} of {len(rounds)}"
        )
    print(f"longest gap, and the same text   target <= {MOST_GAP_S:g} s: {'met' if is_met else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
