"""Measure the reliability figures at their full size, which is too large for a test.

    python tests/abuse/figures.py               all, at their named sizes; exits with 1 if one does not hold
    python tests/abuse/figures.py R4 R10        these two
    python tests/abuse/figures.py R13=20        twenty runs, reported as "holds at 20 of 200"

Every figure is counted, not sampled from a log: each request, run or mutation that breaks the promise is a violation,
and is printed. Seconds are wall time on this machine, so they are an upper bound if it is busy.

Elsewhere: `test_figures.py` runs a small form of each figure; `kills.py` kills the writers of files;
`benchmarks/attack.py` measures the memory budget under attack.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import math
import mmap
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.manifest import DENSE_FILE, EXPERTS_FILE, MANIFEST_FILE
from argosy.checkpoint.pack import pack
from argosy.errors import ArgosyError, CheckpointError, CorruptRecord, ReadFailed
from argosy.experts.files import Key
from argosy.guard.chain import verify
from argosy.guard.keys import SCOPES, KeyFile, KeyRing
from argosy.model.families import open_model
from argosy.serve.app import ROUTES, make_app
from tests.cli.tiny_chat_model import write_chat_model
from tests.helpers.forks import ForkedArgosy
from tests.models.tiny import prompt_ids, qwen3_moe, write_model
from tests.native import _native_testing
from tests.serve import test_disconnects as disconnects
from tests.serve.conftest import only, serving, start
from tests.serve.dialects import DIALECTS, PATHS, greedy

_MOST_SHOWN = 5  # violations printed for a figure


@dataclass
class Finding:
    """The result of one figure.

    Attributes:
        size: number of cases done.
        whole: number of cases of the full figure, if only the measurement knows it.
        violations: one sentence each.
        late: missed time limits; kept apart, because a busy machine misses them too.
    """

    size: int = 0
    whole: int = 0
    violations: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def require_within(self, seconds: float, limit_s: float, what: str) -> None:
        if not seconds <= limit_s:
            self.late.append(f"{what} {seconds:.2f} s, allowed {limit_s:g} s")

    def require(self, condition: object, sentence: str) -> None:
        if not condition:
            self.violations.append(sentence)


@dataclass(frozen=True)
class Figure:
    """A figure; `measure` takes a directory to work in and the number of cases."""

    what: str
    named_size: int
    measure: Callable[[Path, int], Finding]

    def line(self, number: str, finding: Finding) -> str:
        """One line: the number of cases, the facts, whether the figure holds and at which size."""
        whole = finding.whole or self.named_size
        if finding.violations or finding.late:
            verdict = f"open: {len(finding.violations)} violations, {len(finding.late)} too slow"
        elif finding.size < whole:
            verdict = f"holds at {finding.size:,} of {whole:,}"
        else:
            verdict = "holds"
        facts = "; ".join(finding.facts)
        return f"{number:<4} {finding.size:,} {self.what}: {facts}  {verdict}"


FIGURES: dict[str, Figure] = {}


def figure(
    number: str, named_size: int, what: str
) -> Callable[[Callable[[Path, int], Finding]], Callable[[Path, int], Finding]]:
    def register(measure: Callable[[Path, int], Finding]) -> Callable[[Path, int], Finding]:
        FIGURES[number] = Figure(what, named_size, measure)
        return measure

    return register


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {word}" for word, count in counts.most_common())


# ── R4: a damaged store ─────────────────────────────────────────────────────────────────────────────────────────────

_TINY = qwen3_moe(num_hidden_layers=2, num_experts=6, max_position_embeddings=256)
_PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)


@dataclass
class Run:
    """One answer, and the experts that each of its steps used; step i produces token i."""

    token_ids: list[int]
    error: ArgosyError | None
    uses: list[set[Key]]


def run_once(directory: Path, prompt: list[int]) -> Run:
    """Answer `prompt` once.

    Raises:
        ArgosyError: the model cannot be opened.
    """
    uses: list[set[Key]] = [set()]

    def note(layer: int, ids: Any) -> None:
        uses[-1].update((layer, int(expert)) for expert in ids.flat)

    with Engine.open(
        directory, memory="2GiB", threads=1, expert_slots=3, readers=1, observe_routes=note
    ) as engine:
        sequence = engine.submit(prompt, _PARAMS)
        while sequence.result is None:
            engine.step()
            uses.append(set())
        return Run(list(sequence.result.token_ids), sequence.result.error, uses)


class Damage:
    """One seeded mutation of a pack's files."""

    KINDS = (
        "bit flip",
        "4 KiB of zeros",
        "cut off",
        "two records swapped",
        "stale manifest",
        "stale records",
    )

    def __init__(self, whole: dict[str, bytes], stale: dict[str, bytes], pieces: dict[Key, range]) -> None:
        self._whole, self._stale, self._pieces = whole, stale, pieces

    def apply(self, directory: Path, seed: int) -> tuple[str, set[Key]]:
        """Write the damaged files; return the kind of damage, and the experts whose bytes it may have changed."""
        rng = random.Random(seed)
        kind = self.KINDS[seed % len(self.KINDS)]
        for name in (EXPERTS_FILE, MANIFEST_FILE):
            (directory / name).write_bytes(self._whole[name])
        if kind == "stale manifest":
            return kind, self._stale_manifest(directory, rng)
        experts = bytearray(self._whole[EXPERTS_FILE])
        key, other = rng.sample(sorted(self._pieces), 2)
        piece, second = self._pieces[key], self._pieces[other]
        if kind == "bit flip":
            experts[rng.choice(piece)] ^= 1 << rng.randrange(8)
        elif kind == "4 KiB of zeros":
            start = rng.choice(piece) // 4096 * 4096
            experts[start : start + 4096] = bytes(min(4096, len(experts) - start))
        elif kind == "cut off":
            del experts[rng.randrange(len(experts)) :]
        elif kind == "two records swapped":
            first = experts[piece.start : piece.stop]
            experts[piece.start : piece.stop] = experts[second.start : second.stop]
            experts[second.start : second.stop] = first
        else:
            experts[piece.start : piece.stop] = self._stale[EXPERTS_FILE][piece.start : piece.stop]
        (directory / EXPERTS_FILE).write_bytes(experts)
        return kind, self._changed(experts)

    def _changed(self, experts: bytearray) -> set[Key]:
        whole = self._whole[EXPERTS_FILE]
        return {
            key
            for key, piece in self._pieces.items()
            if experts[piece.start : piece.stop] != whole[piece.start : piece.stop]
        }

    def _stale_manifest(self, directory: Path, rng: random.Random) -> set[Key]:
        """Write the manifest of another pack of the same shape, or put one of its checksums into this pack's."""
        manifest = json.loads(self._whole[MANIFEST_FILE])
        stale = json.loads(self._stale[MANIFEST_FILE])
        places = [
            (own, number, value)
            for own, other in pairs_of_lists(manifest, stale)
            for number, (mine, value) in enumerate(zip(own, other, strict=True))
            if isinstance(value, int) and value != mine
        ]
        if rng.random() < 0.1:
            (directory / MANIFEST_FILE).write_bytes(self._stale[MANIFEST_FILE])
        else:
            own, number, value = rng.choice(places)
            own[number] = value
            (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
        return set(self._pieces)


def pairs_of_lists(one: Any, other: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the lists of equal length at the same place of two documents."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() & other.keys():
            yield from pairs_of_lists(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        yield one, other
        for left, right in zip(one, other, strict=True):
            yield from pairs_of_lists(left, right)


@figure("R4", 2000, "mutations of a pack's expert store")
def damaged_store(scratch: Path, size: int) -> Finding:
    packs = []
    for seed in (4, 5):
        source = open_model(write_model(scratch / f"source{seed}", _TINY, seed=seed))
        pack(source, scratch / f"pack{seed}", format="bf16")
        packs.append({path.name: path.read_bytes() for path in (scratch / f"pack{seed}").iterdir()})
    directory = scratch / "pack4"
    records = open_model(directory).experts
    pieces = {
        key: range(one.pieces[0].offset, one.pieces[0].offset + one.pieces[0].nbytes)
        for key, one in records.items()
    }
    prompt = prompt_ids(_TINY, 1, 19)
    golden = run_once(directory, prompt)
    damage = Damage(packs[0], packs[1], pieces)
    finding, counts = Finding(), Counter[str]()
    for seed in range(size):
        kind, changed = damage.apply(directory, seed)
        first_use = next((at for at, used in enumerate(golden.uses) if used & changed), None)
        outcome, fault = judge(directory, prompt, golden, changed, first_use)
        counts[outcome] += 1
        finding.require(fault is None, f"seed {seed}, {kind}: {fault}")
        finding.size += 1
    finding.facts.append(counted(counts))
    return finding


def judge(
    directory: Path, prompt: list[int], golden: Run, changed: set[Key], first_use: int | None
) -> tuple[str, str | None]:
    """Run a damaged pack; return the outcome, and its fault if there is one."""
    try:
        run = run_once(directory, prompt)
    except CheckpointError as error:
        names_file = any(name in str(error) for name in (EXPERTS_FILE, DENSE_FILE, MANIFEST_FILE))
        return "refused at the start, file named", None if names_file else f"names no file: {error}"
    if run.error is None:
        is_same = run.token_ids == golden.token_ids
        if first_use is not None:
            return "unnoticed", "damage that was read is not reported"
        return "not read, tokens unchanged", None if is_same else "the output changed in silence"
    facts = run.error.facts
    named = (facts.get("layer"), facts.get("expert"))
    if not isinstance(run.error, CorruptRecord | ReadFailed) or named not in changed:
        return "wrongly named", f"{run.error}"
    if EXPERTS_FILE not in str(run.error):
        return "wrongly named", f"names no file: {run.error}"
    if run.token_ids != golden.token_ids[: len(run.token_ids)]:
        return "changed", "the output changed before the error"
    if first_use is None or len(run.token_ids) > first_use:
        return "too late", f"{len(run.token_ids)} tokens left, and step {first_use} used what is damaged"
    return "reported with file, layer and expert before a token that depends on it", None


# ── R5: reads that fail ─────────────────────────────────────────────────────────────────────────────────────────────

_LONG = SamplingParams(max_tokens=64, ignore_eos=True)
_ERROR_S = 2.0
# A failed read is tried once more: a single fault has no effect, and repeated faults end the answers that need it.
_FAULTS = (("eio", 1), ("eio", 8), ("truncated", 8), ("eintr", 1), ("short", 1))


@contextmanager
def reading_from(faults: _native_testing.FaultyFileSystem) -> Iterator[None]:
    """While this is entered, engines are opened on a file system with faults."""
    plain = _native.Store
    _native.Store = lambda readers, **rest: plain(readers, faults, **rest)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        _native.Store = plain  # type: ignore[misc]


@figure("R5", 0, "runs of 64 tokens, a fault at every Nth read")
def failing_reads(scratch: Path, size: int) -> Finding:
    """Inject each fault at about `size` evenly spaced reads, or at every read if `size` is 0."""
    source = open_model(write_model(scratch / "source", _TINY, seed=4))
    pack(source, scratch / "pack", format="bf16")
    prompts = [prompt_ids(_TINY, 1, 9), prompt_ids(_TINY, 2, 3)]

    def opened() -> Engine:
        return Engine.open(scratch / "pack", memory="2GiB", threads=1, expert_slots=4, readers=1)

    def tokens(engine: Engine) -> list[list[int]]:
        return [list(result.token_ids) for result in engine.generate_batch(prompts, _LONG)]

    whole = _native_testing.FaultyFileSystem(1 << 40, "eio")
    with reading_from(whole), opened() as engine:
        first = whole.num_reads
        expected = tokens(engine)
    num_reads = whole.num_reads - first
    finding, counts, slowest_s = Finding(), Counter[str](), 0.0
    finding.whole = len(_FAULTS) * num_reads
    step = max(1, num_reads // size) if size else 1
    for kind, num_faults in _FAULTS:
        for nth in range(1, num_reads + 1, step):
            faults = _native_testing.FaultyFileSystem(first + nth, kind, num_faults=num_faults)  # type: ignore[arg-type]
            at = f"{kind} x {num_faults} at read {nth} of {num_reads}"
            with reading_from(faults), opened() as engine:
                sequences = [engine.submit(prompt, _LONG) for prompt in prompts]
                while any(one.result is None for one in sequences):
                    began = time.monotonic()
                    engine.step()
                    slowest_s = max(slowest_s, time.monotonic() - began)
                for one, wanted in zip(sequences, expected, strict=True):
                    assert one.result is not None
                    found, error = list(one.result.token_ids), one.result.error
                    if error is None:
                        counts["answers the same"] += 1
                        finding.require(found == wanted, f"{at}: another answer")
                    else:
                        counts["answers ended by ReadFailed"] += 1
                        finding.require(isinstance(error, ReadFailed), f"{at}: {error}")
                        finding.require(num_faults > 1, f"{at}: not tried again")
                        finding.require(found == wanted[: len(found)], f"{at}: other tokens before the error")
                finding.require(engine.facts().kv_blocks_held == 0, f"{at}: blocks are held")
                while faults.num_reads < first + nth + num_faults:  # until the faults are used up
                    try:
                        tokens(engine)
                    except ReadFailed:
                        continue
                if num_faults > 1:
                    finding.require(tokens(engine) == expected, f"{at}: another answer afterwards")
            finding.size += 1
    finding.require_within(slowest_s, _ERROR_S, "a step took")
    which = "every one" if step == 1 else f"every {step}th"
    finding.facts += [
        f"{which} of {num_reads} reads, {len(_FAULTS)} faults",
        counted(counts),
        f"longest step {slowest_s:.2f} s",
    ]
    return finding


# ── R10: clients that vanish ────────────────────────────────────────────────────────────────────────────────────────


@figure("R10", 1000, "disconnects, streaming and not")
def vanished_clients(scratch: Path, size: int) -> Finding:
    """Run `tests/serve/test_disconnects.py` with more disconnects."""
    file = KeyFile(scratch / "keys.json")
    pairs = [(key.id, secret) for key, secret in (file.add(str(n)) for n in range(disconnects.NUM_CLIENTS))]
    model = write_chat_model(scratch / "model", context_tokens=disconnects.CONTEXT_TOKENS)
    finding, said = Finding(size=size), io.StringIO()
    with Engine.open(
        model, memory="1GiB", threads=1, expert_slots=4, chunk_tokens=32, max_sequences=4, grammars=True,
        kv_dir=scratch / "kv",
    ) as engine:  # fmt: skip
        server = disconnects.Server(engine, file)
        try:
            with redirect_stdout(said):
                disconnects.test_clients_that_vanish_leave_nothing_behind(server, (file, pairs), size)
        except AssertionError as error:
            finding.violations.append((str(error) or "not all was released, or not in time").splitlines()[0])
        finally:
            server.close()
    finding.facts.append(said.getvalue().strip() or "not measured to the end")
    return finding


# ── a server in its own process ─────────────────────────────────────────────────────────────────────────────────────

_START_S, _END_S = 120.0, 60.0
_GOES_ON = {"logit_bias": {"2": -100, "0": -100}}  # forbids the tokens that end an answer
TERMINAL = {
    "chat": re.compile(r'"finish_reason":"(stop|length)".*data: \[DONE\]\n\n$', re.DOTALL),
    "completions": re.compile(r'"finish_reason":"(stop|length)".*data: \[DONE\]\n\n$', re.DOTALL),
    "responses": re.compile(r"event: response\.(completed|incomplete)\n[^\n]*\n\n$"),
    "messages": re.compile(r"event: message_stop\n[^\n]*\n\n$"),
}
ENDED_BY_ERROR = re.compile(r'"error"')


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def served(
    model: Path, scratch: Path, *options: object, is_fork: bool = True, **environment: str
) -> Iterator[Served]:
    """Run `argosy serve`, with its output in a file. It is ready on entry, and killed on exit if it still runs.

    Args:
        is_fork: it starts sooner, and has neither the network of this thread nor what the loader reads at a start.
    """
    command = [str(word) for word in ("serve", model, "--memory", "1GiB", "--port", 0, *options)]
    log = scratch / "log"
    with log.open("wb") as sink:
        if is_fork:
            start: type[subprocess.Popen[bytes]] = ForkedArgosy
        else:
            start, command = subprocess.Popen, [sys.executable, "-m", "argosy", *command]
        process = start(command, stdout=sink, stderr=sink, env=os.environ | environment, cwd=scratch)
    try:
        until = time.monotonic() + _START_S
        while not (found := re.search(r"^serving .* at (http://\S+)\n", log.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not start: {log.read_text()}")
            time.sleep(0.02)
        yield Served(found[1], process, log)
    finally:
        process.kill()
        process.wait()


def body_of(dialect: str, said: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return greedy(dialect, said, max_tokens) | (_GOES_ON if "/completions" in PATHS[dialect] else {}) | more


def stream_to_its_end(url: str, dialect: str, max_tokens: int, begun: threading.Event) -> str:
    """Return all text of a streamed answer; set `begun` at its first bytes.

    Raises:
        httpx.TransportError: the connection ends before the answer.
    """
    body = body_of(dialect, f"{dialect} asks for a long answer", max_tokens, stream=True)
    found = []
    with httpx.stream("POST", url + PATHS[dialect], json=body, timeout=_END_S) as answer:
        for text in answer.iter_text():
            found.append(text)
            begun.set()
    return "".join(found)


# ── R13: shutdown by signal ─────────────────────────────────────────────────────────────────────────────────────────

_REFUSED_S, _SECOND_S = 0.1, 1.0


def last_accepted(url: str, process: subprocess.Popen[bytes]) -> float:
    """Seconds from now to the start of the last request that is still accepted."""
    began, last = time.monotonic(), 0.0
    while process.poll() is None and time.monotonic() - began < _END_S:
        asked = time.monotonic() - began
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).status_code != 200:
                break
            last = asked
        except httpx.TransportError:
            break
    return last


@figure("R13", 200, "runs told to end by SIGTERM under load, every second one told twice")
def told_to_end(scratch: Path, size: int) -> Finding:
    model = write_chat_model(scratch / "model", context_tokens=16_384)
    finding, ends, ends_of_twice = Finding(), Counter[str](), Counter[str]()
    accepted_s, second_s = [], []
    for number in range(size):
        is_twice = number % 2 == 1
        at = f"run {number}"
        begun = [threading.Event() for _ in DIALECTS]
        with served(model, scratch) as server, ThreadPoolExecutor(len(DIALECTS)) as pool:
            num_tokens = 16_000 if is_twice else 400
            streams: dict[str, Future[str]] = {
                dialect: pool.submit(stream_to_its_end, server.url, dialect, num_tokens, event)
                for dialect, event in zip(DIALECTS, begun, strict=True)
            }
            for event in begun:
                event.wait(_END_S)
            server.process.send_signal(signal.SIGTERM)
            accepted_s.append(last_accepted(server.url, server.process))
            if is_twice:
                told = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
            try:
                code: object = server.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                code = "none"
            if is_twice:
                second_s.append(time.monotonic() - told)
            finding.require(code == 0, f"{at}: exit code {code}")
            for dialect, stream in streams.items():
                end = how_it_ended(dialect, stream)
                (ends_of_twice if is_twice else ends)[end] += 1
                finding.require(is_twice or end == "whole", f"{at}: {dialect}: {end}")
            finding.require("Traceback" not in server.log.read_text(), f"{at}: a traceback is logged")
        finding.size += 1
    finding.require_within(max(accepted_s), _REFUSED_S, "a request was let in after the signal by")
    if second_s:
        finding.require_within(max(second_s), _SECOND_S, "it ended after the second signal by")
        slowest = (
            f"{np.median(second_s):.2f} s after the second signal (median), {max(second_s):.2f} s at most"
        )
        finding.facts.append(f"told twice: {slowest}, streams: {counted(ends_of_twice)}")
    finding.facts += [f"nobody let in after {1e3 * max(accepted_s):.0f} ms", f"streams: {counted(ends)}"]
    return finding


def how_it_ended(dialect: str, stream: Future[str]) -> str:
    try:
        text = stream.result(_END_S)
    except httpx.TransportError as error:
        return f"cut off ({type(error).__name__})"
    if TERMINAL[dialect].search(text):
        return "whole"
    return "error event" if ENDED_BY_ERROR.search(text) else f"no terminal event: {text[-200:]!r}"


# ── R14: killed while answering ─────────────────────────────────────────────────────────────────────────────────────


@figure("R14", 100, "kills with SIGKILL under load, each followed by a damaged file of kv_dir and a restart")
def killed_while_it_answers(scratch: Path, size: int) -> Finding:
    model = write_chat_model(scratch / "model", context_tokens=1024)
    rng, finding = random.Random(0), Finding()
    asks = [
        ("/v1/completions", body_of("completions", f"{n} " + "asks. " * 40, 16, logprobs=2)) for n in range(6)
    ]
    expected: list[Any] = []
    num_files, num_cached = 0, 0
    for number in range(size + 1):
        with served(model, scratch, "--kv-dir", scratch / "kv", "--max-sequences", 4) as server:
            finding.require(httpx.get(f"{server.url}/ready").status_code == 200, f"kill {number}: not ready")
            answers = [httpx.post(server.url + path, json=body, timeout=_END_S).json() for path, body in asks]
            found = [answer["choices"] for answer in answers]
            expected = expected or found
            finding.require(found == expected, f"kill {number}: another answer after the restart")
            if number:
                num_cached += sum(
                    one["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for one in answers
                )
            if number == size:
                break
            load = [threading.Thread(target=ask_until_it_dies, args=(server.url, n)) for n in range(3)]
            for one in load:
                one.start()
            time.sleep(rng.uniform(0, 0.8))
            server.process.kill()
            for one in load:
                one.join()
        finding.size += 1
        files = sorted((scratch / "kv").rglob("*.kv"))
        num_files = max(num_files, len(files))
        for path in rng.sample(files, min(len(files), 2)):
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
    finding.require(num_cached, "no prompt was found in a file")
    finding.facts.append(
        f"up to {num_files} files, {num_cached} of {len(asks) * size} prompts found in them, answers the same"
    )
    return finding


def ask_until_it_dies(url: str, number: int) -> None:
    rng = random.Random(number)
    with httpx.Client(base_url=url, timeout=_END_S) as client:
        while True:
            dialect = rng.choice(DIALECTS)
            try:
                client.post(
                    PATHS[dialect], json=body_of(dialect, f"{rng.random()} " * 20, rng.randrange(16, 100))
                )
            except httpx.TransportError:
                return


# ── R24: prompts stay private ───────────────────────────────────────────────────────────────────────────────────────


def request_with(rng: random.Random, canary: str, secret: str) -> dict[str, Any]:
    """A request with the canary somewhere: in a field where text belongs, or where it does not."""
    dialect = rng.choice(DIALECTS)
    headers = {"Authorization": f"Bearer {secret}"}
    body = body_of(dialect, f"say {canary}", 16)
    ask: dict[str, Any] = {"method": "POST", "url": PATHS[dialect], "json": body, "headers": headers}
    tool = {"type": "function", "function": {"name": canary, "parameters": {"type": "object"}}}
    chat = {"url": PATHS["chat"]}
    more: list[dict[str, Any]] = [
        {"json": body | {canary: 1}},
        {"json": body | {"model": canary}},
        {"json": body | {"temperature": canary}},
        {"json": body | {"stream": True}},
        {"json": body | {"user": canary}},
        {
            "json": None,
            "content": f'{{"x": "{canary}',
            "headers": headers | {"Content-Type": "application/json"},
        },
        {"json": None, "content": canary, "headers": headers | {"Content-Type": "text/plain"}},
        {"url": f"/{canary}"},
        {"url": f"/v1/models/{canary}", "method": "GET", "json": None},
        {"url": f"{PATHS[dialect]}?key={canary}"},
        {"headers": {"Authorization": f"Bearer {canary}"}},
        {"headers": headers | {"User-Agent": canary, "x-request-id": canary, "Referer": canary}},
        {"headers": headers | {"Host": f"{canary}.example"}},
        {"headers": headers | {"Origin": f"http://{canary}.example"}},
        {"url": "/tokenize", "json": {"content": canary}},
        {"url": "/apply-template", "json": {"messages": [{"role": "user", "content": canary}]}},
        chat | {"json": body_of("chat", canary, 16, tools=[tool])},
        chat | {"json": body_of("chat", canary, 16, stop=[canary])},
        chat | {"json": body_of("chat", canary, 16, response_format={"type": canary})},
        chat | {"json": body_of("chat", canary, 16, structured_outputs={"regex": f"({canary}"})},
        chat | {"json": body_of("chat", canary * 600, 16)},
    ]
    return ask | (rng.choice(more) if rng.random() < 0.7 else {})


@figure(
    "R24",
    1000,
    "requests with canaries, clients that leave and an abort while the last are answered, with an audit",
)
def canaries(scratch: Path, size: int) -> Finding:
    model = write_chat_model(scratch / "model", context_tokens=512)
    home = scratch / "home"
    home.mkdir()
    keys = KeyFile(home / "keys.json")
    _, secret = keys.add("one", scopes=("infer", "metrics", "admin", "grammar"))
    places = {name: str(home) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "ARGOSY_CACHE")}
    rng, statuses, finding = random.Random(0), Counter[str](), Finding()
    seen = [f"canary{rng.getrandbits(64):016x}" for _ in range(size)]
    texts: dict[str, str] = {}
    audit = home / "audit"
    with served(model, scratch, "--keys", keys.path, "--audit", audit, **places) as server:
        with httpx.Client(base_url=server.url, timeout=_END_S) as client:

            def send(canary: str) -> None:
                if random.Random(canary).random() < 0.1:
                    leave_in_a_stream(client, canary, secret)
                    statuses["left"] += 1
                    return
                answer = client.request(**request_with(random.Random(canary), canary, secret))
                statuses[str(answer.status_code)] += 1
                finding.require(
                    answer.status_code < 500, f"{canary}: {answer.status_code} {answer.text[:200]}"
                )

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(send, seen))
            for path in ("/metrics", "/v1/engine/state"):
                got = client.get(path, headers={"Authorization": f"Bearer {secret}"})
                finding.require(got.status_code == 200, f"{path}: {got.status_code}")
                texts[path] = got.text
        abort_while_answering(server, seen[-1], secret)
        texts["log"] = server.log.read_text(errors="replace")
    for file in home.rglob("*"):
        if file.is_file():
            texts[f"file {file.relative_to(home)}"] = file.read_bytes().decode("latin-1")
    for where, text in texts.items():
        found = sum(canary in text for canary in seen)
        finding.require(not found, f"{where} has {found} canaries")
        finding.require(secret not in text, f"{where} has the key")
    finding.require("POST" in texts["log"], "nothing is logged at all")
    report = verify(audit, (audit / "key").read_bytes())
    finding.require(report.is_valid, f"the audit after the abort: {report.faults}")
    num_lines = report.kinds["request"]
    finding.require(num_lines > size // 2, f"the audit has {num_lines} requests of {size}")
    finding.size = size
    finding.facts += [f"answers: {counted(statuses)}", f"0 of them in {len(texts)} places looked at"]
    return finding


def leave_in_a_stream(client: httpx.Client, canary: str, secret: str) -> None:
    body = body_of("chat", canary, 400, stream=True)
    with client.stream(
        "POST", PATHS["chat"], json=body, headers={"Authorization": f"Bearer {secret}"}
    ) as answer:
        next(answer.iter_lines())


def abort_while_answering(server: Served, canary: str, secret: str) -> None:
    body = body_of("chat", canary, 400, stream=True)
    headers = {"Authorization": f"Bearer {secret}"}
    try:
        with httpx.stream(
            "POST", server.url + PATHS["chat"], json=body, headers=headers, timeout=_END_S
        ) as answer:
            for _ in answer.iter_text():
                server.process.send_signal(signal.SIGABRT)
    except httpx.TransportError:
        pass
    server.process.wait(_END_S)


# ── R2: numbers in requests ─────────────────────────────────────────────────────────────────────────────────────────

_EDGES = (
    "-9223372036854775808", "-2147483648", "-1", "0", "1", "2147483648", "9007199254740993", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1e308", "NaN", "true", '"1"',
)  # fmt: skip
_HERE = "\ue000the number\ue000"


class Numbers:
    """For every number in the document's request bodies, a body with a marker in its place."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._schemas = document["components"]["schemas"]

    def bodies(self) -> dict[tuple[str, str], Any]:
        """The bodies, keyed by the path of the route and the path of the field."""
        found: dict[tuple[str, str], Any] = {}
        for path, methods in self._document["paths"].items():
            for operation in methods.values():
                # A form's fields are text.
                if "application/json" in operation.get("requestBody", {}).get("content", {}):
                    schema = operation["requestBody"]["content"]["application/json"]["schema"]
                    for where, body in self._marked(schema, "", ()):
                        found.setdefault((path, where), {**DIALECT_BODIES.get(path, {}), **body})
        return found

    def _marked(self, schema: Any, where: str, refs: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not isinstance(schema, dict):
            return
        if (name := schema.get("$ref", "").rpartition("/")[2]) and name not in refs:
            yield from self._marked(self._schemas[name], where, (*refs, name))
        for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            yield from self._marked(branch, where, refs)
        if schema.get("type") in ("integer", "number"):
            yield where, _HERE
        for key, part in schema.get("properties", {}).items():
            for inner, value in self._marked(part, f"{where}.{key}".lstrip("."), refs):
                yield inner, {**self._sample(schema), key: value}
        for inner, value in self._marked(schema.get("items"), f"{where}[]", refs):
            yield inner, [value]
        for inner, value in self._marked(schema.get("additionalProperties"), f"{where}.*", refs):
            yield inner, {"1": value}

    def _sample(self, schema: dict[str, Any]) -> Any:
        """A small value that the schema allows."""
        if "$ref" in schema:
            return self._sample(self._schemas[schema["$ref"].rpartition("/")[2]])
        if "const" in schema or "default" in schema:
            return schema.get("const", schema.get("default"))
        for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            return self._sample(branch)
        if "enum" in schema:
            return schema["enum"][0]
        kind = schema.get("type")
        if kind == "object":
            parts = schema.get("properties", {})
            return {key: self._sample(parts.get(key, {})) for key in schema.get("required", ())}
        if kind == "array":
            return [self._sample(schema.get("items", {}))] * schema.get("minItems", 0)
        return {"string": "x", "boolean": False, "integer": 1, "number": 1, "null": None}.get(str(kind), "x")


DIALECT_BODIES = {PATHS[dialect]: greedy(dialect, "Hi", 16) for dialect in DIALECTS} | {
    "/api/chat": {"messages": [{"role": "user", "content": "Hi"}], "options": {"num_predict": 16}},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 16}},
}


@contextmanager
def in_this_process(model: Path, keys: KeyFile | None = None) -> Iterator[str]:
    """Run a server in a thread of this process."""
    with (
        Engine.open(model, memory="1GiB", threads=1, grammars=True, max_waiting=64) as engine,
        serving(engine) as service,
    ):
        running = start(make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=8))
        yield next(running)
        next(running, None)


@figure("R2", 0, "numbers of requests, each at its edges")
def numbers_at_their_edges(scratch: Path, size: int) -> Finding:
    """Try at most `size` cases; 0: every number of every body in the document, at every edge."""
    finding, statuses = Finding(), Counter[str]()
    with (
        in_this_process(write_chat_model(scratch / "model")) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        bodies = Numbers(client.get("/openapi.json").json()).bodies()
        cases = [(path, where, body, edge) for (path, where), body in bodies.items() for edge in _EDGES]
        finding.whole = len(cases)
        for path, where, body, edge in random.Random(0).sample(cases, min(size or len(cases), len(cases))):
            content = json.dumps(body, ensure_ascii=False).replace(f'"{_HERE}"', edge)
            assert edge in content, "the number is not there"
            answer = client.post(path, content=content.encode(), headers={"Content-Type": "application/json"})
            statuses[str(answer.status_code)] += 1
            finding.require(
                answer.status_code < 500, f"{path} {where}={edge}: {answer.status_code} {answer.text}"
            )
            finding.size += 1
    finding.facts.append(f"{len(bodies)} fields x {len(_EDGES)} edges; answers: {counted(statuses)}")
    return finding


# ── R21: expensive grammars and schemas ─────────────────────────────────────────────────────────────────────────────

_CPU_S, _FORM_BYTES = 0.25, 64 << 20


def bombs(rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield structured-output constraints, without end, that are short and expensive to compile."""

    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        return schema

    while True:
        many, some, few = rng.randrange(200, 1000), rng.randrange(10, 60), rng.randrange(2, 12)
        yield "regex: deep", {"regex": "(" * some * 8 + "a" + ")" * some * 8}
        yield "regex: goes back", {"regex": f"(a{'+' * 1})+b" * some}
        yield "regex: repeats", {"regex": f"((a{{{many}}}){{{many}}}){{{many}}}"}
        yield "regex: automaton", {"regex": f"(.*a.{{{some}}}){{{some}}}"}
        yield "regex: letters", {"regex": rf"(?i)[a-z\p{{L}}]{{0,{some}}}" * few}
        yield "regex: alternatives", {"regex": "|".join(f"a{rng.randrange(10**5)}b" for _ in range(100))}
        yield "json: nested", {"json": nested(rng.randrange(20, 60))}
        yield "json: deep", {"json": json.dumps(nested(200)).replace("array", "array", 1)}
        yield "json: branches", {"json": {"anyOf": [{"const": str(at)} for at in range(many * 10)]}}
        yield "json: names", {"json": {"type": "object", "properties": {f"p{at}": {} for at in range(many)}}}
        yield (
            "json: pattern",
            {"json": {"type": "string", "pattern": f"((a{{1,{many}}}){{1,{many}}}){{1,{many}}}"}},
        )
        yield "json: length", {"json": {"type": "string", "minLength": many * 10**6}}
        yield "json: numbers", {"json": {"type": "integer", "minimum": -(10**many), "maximum": 10**many}}
        yield "choice: many", {"choice": [f"{at:05}" * few for at in range(min(many, 500))]}
        yield (
            "grammar: doubled",
            {
                "grammar": "start: A0\n"
                + "".join(f"A{at}: A{at + 1} A{at + 1}\n" for at in range(some))
                + f'A{some}: "x"'
            },
        )
        yield "grammar: ambiguous", {"grammar": 'start: start start | "a" |' + ' | "a" "a"' * few}
        yield "grammar: repeats", {"grammar": f'start: a{{{many * 10**6}}}\na: "x"'}
        yield "grammar: many rules", {
            "grammar": "start: " + " | ".join(f"a{at}" for at in range(many)) + "\n"
            + "".join(f"a{at}: /[a-{'abcdefgh'[at % 8]}]+{at}/\n" for at in range(many))
        }  # fmt: skip


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its children so far, read once it has become idle."""
    last = -1.0
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        now = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        if now - last < 0.015:
            return now
        last = now
        time.sleep(0.1)


def memory_of(pid: int, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


@figure("R21", 200, "forms of answers that are hard to follow")
def hard_forms(scratch: Path, size: int) -> Finding:
    finding, statuses = Finding(), Counter[str]()
    costs: list[tuple[float, int, str]] = []
    body = {"prompt": "Hi", "max_tokens": 8, "temperature": 1, "seed": 1}
    with (
        served(write_chat_model(scratch / "model"), scratch) as server,
        httpx.Client(base_url=server.url, timeout=_END_S) as client,
    ):
        pid = server.process.pid
        plain = body | {"structured_outputs": {"regex": "[a-c]{4}"}}
        client.post("/v1/completions", json=plain)
        for name, form in bombs(random.Random(0)):
            if finding.size == size:
                break
            before = cpu_seconds(pid)
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
            held = memory_of(pid, "VmRSS")
            answer = client.post("/v1/completions", json=body | {"structured_outputs": form})
            costs.append((cpu_seconds(pid) - before, memory_of(pid, "VmHWM") - held, name))
            statuses[str(answer.status_code)] += 1
            finding.require(
                answer.status_code in (200, 400, 503), f"{name}: {answer.status_code} {answer.text[:200]}"
            )
            finding.size += 1
        finding.require(
            client.post("/v1/completions", json=plain).status_code == 200, "no plain form afterwards"
        )
    late = [cost for cost in costs if cost[0] > _CPU_S]
    large = [cost for cost in costs if cost[1] > _FORM_BYTES]
    finding.violations += [
        f"{name}: {seconds:.2f} s of CPU" for seconds, _, name in sorted(late, reverse=True)
    ]
    finding.violations += [f"{name}: {size >> 20} MiB" for _, size, name in large]
    seconds = sorted(cost[0] for cost in costs)
    finding.facts += [
        f"answers: {counted(statuses)}",
        f"CPU {seconds[len(seconds) // 2]:.2f} s (median), {seconds[-1]:.2f} s at most, {len(late)} over {_CPU_S} s",
        f"{max(cost[1] for cost in costs) >> 20} MiB at most",
    ]
    return finding


# ── R8: what the system refuses ─────────────────────────────────────────────────────────────────────────────────────

_OUT_OF_MEMORY = re.compile(r"^(memory allocation of \d+ bytes failed|OpenBLAS error: .*)$", re.MULTILINE)
_CRASHED = re.compile(r'^Current thread .*\n  File "(.*)", line (\d+)', re.MULTILINE)
_PIDS = Path("/sys/fs/cgroup/pids")
_LIMITS: dict[str, Sequence[int]] = {
    "files": (4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32),
    "threads": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16),
    "MiB of addresses": (100, 125, 150, 160, 170, 180, 190, 200, 250, 300, 500, 800, 1200, 1600),
}


class Allocations:
    """A file through which `failing_malloc.c` learns which allocation fails."""

    def __init__(self, scratch: Path) -> None:
        library, told = scratch / "failing_malloc.so", scratch / "told"
        source = Path(__file__).with_name("failing_malloc.c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        told.write_bytes(bytes(mmap.PAGESIZE))
        with told.open("r+b") as file:
            self._told = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.environment = {"LD_PRELOAD": str(library), "ARGOSY_FAIL_AT": str(told)}
        self.environment |= {"RUST_BACKTRACE": "0", "PYTHONFAULTHANDLER": "1"}

    def fail(self, nth: int) -> None:
        """Fail the nth allocation from now on; 0: none."""
        self._told[:8] = nth.to_bytes(8, "little", signed=True)

    @property
    def has_failed(self) -> bool:
        return int.from_bytes(self._told[:8], "little", signed=True) <= 0


@dataclass
class Limit:
    """One limit of the system, for commands that start under it and for a server that meets it while it runs."""

    kind: str
    group: Path

    @property
    def is_possible(self) -> bool:
        return self.kind != "threads" or os.access(_PIDS / "cgroup.procs", os.W_OK)

    def enter(self, value: int) -> Callable[[], None]:
        """Return what a new process calls to have the limit."""
        if self.kind == "threads":
            self.group.mkdir(exist_ok=True)
            (self.group / "pids.max").write_text(str(value))
            return lambda: (self.group / "cgroup.procs").write_text("0") and None
        resource_id, unit = (
            (resource.RLIMIT_NOFILE, 1) if self.kind == "files" else (resource.RLIMIT_AS, 1 << 20)
        )
        return lambda: resource.setrlimit(resource_id, (value * unit, value * unit))

    def impose(self, pid: int, spare: int) -> Callable[[], None]:
        """Leave a running process `spare` more than it has; return what lifts the limit."""
        if self.kind == "threads":
            self.group.mkdir(exist_ok=True)
            (self.group / "cgroup.procs").write_text(str(pid))
            (self.group / "pids.max").write_text(str(len(os.listdir(f"/proc/{pid}/task")) + spare))
            return lambda: (self.group / "pids.max").write_text("max") and None
        if self.kind == "files":
            resource_id, value = (
                resource.RLIMIT_NOFILE,
                max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1 + spare,
            )
        else:
            resource_id, value = resource.RLIMIT_AS, memory_of(pid, "VmSize") + (spare << 20)
        before = resource.prlimit(pid, resource_id, (value, resource.getrlimit(resource_id)[1]))
        return lambda: resource.prlimit(pid, resource_id, before) and None


@figure(
    "R8",
    1000,
    "allocations that fail in a server; commands and servers short of threads, files and addresses",
)
def refused_by_the_system(scratch: Path, size: int) -> Finding:
    """A server outlives each failure and answers as before; a command ends with a sentence.

    Rust aborts the process when an allocation of its own fails, and numpy 2.4 crashes where argsort finds no memory.
    Both are counted as ends by a library, and the server is started anew.
    """
    finding, model = Finding(), write_chat_model(scratch / "model")
    limits = [Limit(kind, _PIDS / f"argosy-{os.getpid()}") for kind in _LIMITS]
    try:
        for limit in limits:
            if limit.is_possible:
                start_short_of(
                    finding, scratch, model, limit, _LIMITS[limit.kind][:: 1 if size >= 200 else 6]
                )
                run_short_of(finding, scratch, model, limit)
            else:
                finding.facts.append(f"{limit.kind}: no cgroup can be made here")
    finally:
        with suppress(OSError):
            limits[0].group.rmdir()
    fail_allocations(finding, scratch, model, size)
    return finding


def start_short_of(finding: Finding, scratch: Path, model: Path, limit: Limit, values: Sequence[int]) -> None:
    command = [
        sys.executable,
        "-m",
        "argosy",
        "run",
        "-m",
        model,
        "--memory",
        "1GiB",
        "--max-tokens",
        "4",
        "Hi",
    ]
    outcomes: Counter[str] = Counter()
    for value in values:
        at = f"run with {value} {limit.kind}"
        try:
            done = subprocess.run(
                [str(word) for word in command], preexec_fn=limit.enter(value), capture_output=True, text=True,
                errors="replace", timeout=_END_S, stdin=subprocess.DEVNULL, cwd=scratch, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            finding.require(False, f"{at}: no end")
            continue
        outcomes["answered" if done.returncode == 0 else "refused"] += 1
        says = done.stderr.strip().splitlines() or [""]
        is_clear = any(line.startswith("error: ") for line in says) and "unexpected" not in done.stderr
        is_clear |= _OUT_OF_MEMORY.search(done.stderr) is not None
        finding.require(
            done.returncode == 0 or (is_clear and "Traceback" not in done.stderr and done.returncode != 130),
            f"{at}: exit code {done.returncode}, {says[-1]}",
        )
    finding.facts.append(f"run short of {limit.kind}: {counted(outcomes)}")


def asks_of_all_dialects() -> list[tuple[str, dict[str, Any]]]:
    return [(PATHS[dialect], body_of(dialect, "say something", 8)) for dialect in DIALECTS]


def said_in(answer: httpx.Response) -> Any:
    """What the model said, without ids and times."""
    body = answer.json()
    return answer.status_code, body.get("choices") or body.get("content") or [
        item.get("content") for item in body.get("output", ())
    ]  # fmt: skip


def run_short_of(finding: Finding, scratch: Path, model: Path, limit: Limit) -> None:
    """Send a burst to a server that has little left of something, lift the limit, and ask again."""
    statuses, asks = Counter[str](), asks_of_all_dialects()

    def ask(url: str, number: int) -> None:
        path, body = asks[number % len(asks)]
        outcome = outcome_of(url + path, body)
        statuses[outcome] += 1
        finding.require(
            outcome != "no answer" and "plain" not in outcome, f"short of {limit.kind}: {path}: {outcome}"
        )

    # A connection takes a file, so without one nobody is let in.
    for spare in (4, 8, 16) if limit.kind == "files" else (0, 1, 8):
        at = f"a server with {spare} spare {limit.kind}"
        with served(model, scratch) as server:
            lift = limit.impose(server.process.pid, spare)
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(ask, [server.url] * 32, range(32)))
            lift()
            found = [outcome_of(server.url + path, body) for path, body in asks]
            finding.require(
                set(found) == {"200 application/json"}, f"{at}: {found} after the limit was lifted"
            )
            ready = outcome_of(f"{server.url}/ready")
            finding.require(ready.startswith("200"), f"{at}: /ready {ready} afterwards")
            finding.require(server.process.poll() is None, f"{at}: it ended")
    finding.facts.append(f"served short of {limit.kind}: {counted(statuses)}")


def fail_allocations(finding: Finding, scratch: Path, model: Path, size: int) -> None:
    allocations, outcomes = Allocations(scratch), Counter[str]()
    asks, nth = asks_of_all_dialects(), dict.fromkeys(DIALECTS, 0)
    expected: list[Any] = []
    while finding.size < size:
        with served(model, scratch, is_fork=False, **allocations.environment) as server:
            allocations.fail(0)
            answers = [httpx.post(server.url + path, json=body, timeout=_END_S) for path, body in asks]
            expected = expected or [said_in(one) for one in answers]
            while finding.size < size:
                which = finding.size % len(DIALECTS)
                path, body = asks[which]
                nth[DIALECTS[which]] += 1
                at = f"{path}, allocation {nth[DIALECTS[which]]}"
                finding.size += 1
                allocations.fail(nth[DIALECTS[which]])
                outcome = outcome_of(server.url + path, body)
                if not allocations.has_failed:
                    nth[DIALECTS[which]] = 0
                    outcome = "not reached"
                allocations.fail(0)
                outcomes[outcome] += 1
                finding.require(outcome != "no answer" and "text/plain" not in outcome, f"{at}: {outcome}")
                try:
                    again = said_in(httpx.post(server.url + path, json=body, timeout=_END_S))
                    ready = httpx.get(f"{server.url}/ready", timeout=_END_S).status_code
                except httpx.TransportError as error:
                    server.process.wait(_END_S)
                    is_library = _OUT_OF_MEMORY.search(server.log.read_text(errors="replace"))
                    finding.require(
                        is_library, f"{at}: then {type(error).__name__}, {server.process.returncode}"
                    )
                    outcomes["then a library aborted"] += 1
                    break
                finding.require(again == expected[which], f"{at}: then {again}")
                finding.require(ready == 200, f"{at}: then /ready {ready}")
    finding.facts.append(f"allocations: {counted(outcomes)}")


def ended_by_a_library(log: str) -> bool:
    if _OUT_OF_MEMORY.search(log):
        return True
    found = _CRASHED.search(log)
    return found is not None and "np." in Path(found[1]).read_text().splitlines()[int(found[2]) - 1]


def outcome_of(url: str, body: dict[str, Any] | None = None) -> str:
    try:
        answer = httpx.request("POST" if body else "GET", url, json=body, timeout=_END_S)
    except httpx.TimeoutException:
        return "no answer"
    except httpx.TransportError:
        return "connection closed"
    return f"{answer.status_code} {answer.headers.get('content-type', '').partition(';')[0]}"


# ── R22: access control ─────────────────────────────────────────────────────────────────────────────────────────────

_ELSEWHERE: tuple[dict[str, str], ...] = (
    {}, {"Host": "evil.example"}, {"Host": "localhost.evil.example"}, {"Host": r"evil.example\@localhost"},
    {"Host": ""}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
)  # fmt: skip


@figure("R22", 0, "requests: every route x key x host x page")
def who_gets_in(scratch: Path, size: int) -> Finding:
    """Try at most `size` cases; 0: all."""
    keys = KeyFile(scratch / "keys.json")
    secrets: dict[str, dict[str, str]] = {"none": {}, "bad": {"Authorization": "Bearer bad"}}
    secrets["a password"] = {"Authorization": "Basic YTpi"}
    for scope in SCOPES:
        secrets[scope] = {"Authorization": f"Bearer {keys.add(scope, scopes=(scope,))[1]}"}
    secrets["revoked"] = {"x-api-key": keys.add("revoked", scopes=SCOPES)[1]}
    keys.revoke("revoked")
    cases = [(route, who, elsewhere) for route in ROUTES for who in secrets for elsewhere in _ELSEWHERE]
    finding, statuses = Finding(whole=len(cases)), Counter[str]()
    with (
        in_this_process(write_chat_model(scratch / "model"), keys) as url,
        httpx.Client(base_url=url, timeout=_END_S) as client,
    ):
        for route, who, elsewhere in random.Random(0).sample(cases, min(size or len(cases), len(cases))):
            rule = route.rule
            is_post = rule.method == "POST"
            body = DIALECT_BODIES.get(rule.path, {"content": "a"}) if is_post else None
            path = re.sub(r"\{[^}]*\}", "tiny", rule.path)
            with client.stream(rule.method, path, json=body, headers=secrets[who] | elsewhere) as answer:
                status = answer.status_code
            statuses[f"{status // 100}xx"] += 1
            is_page = bool(elsewhere.keys() - {"Host"}) and is_post
            may = rule.scope is None or who in (rule.scope, "admin")
            at = f"{rule.method} {path}, key {who}, {elsewhere}: {status}"
            finding.require(status < 500, at)
            if not may or "Host" in elsewhere or is_page:
                finding.require(status >= 400, at)
            else:
                finding.require(status not in (401, 403), at)
            finding.size += 1
    finding.facts.append(f"{len(ROUTES)} routes, {len(secrets)} keys; answers: {counted(statuses)}")
    return finding


# ── R23: what one key can learn about another's prompts ─────────────────────────────────────────────────────────────

_MOST_AUC = 0.55


def auc(hits: list[float], misses: list[float]) -> float:
    """How well a threshold on a number separates hits from misses: 0.5 not at all, 1 perfectly."""
    order = np.argsort(np.argsort([*hits, *misses], kind="stable"))
    values, inverse = np.unique([*hits, *misses], return_inverse=True)
    sums = np.bincount(inverse, weights=order, minlength=len(values)) / np.bincount(inverse)
    ranks = sums[inverse][: len(hits)]  # ties share their rank
    found = (ranks.sum() - len(hits) * (len(hits) - 1) / 2) / (len(hits) * len(misses))
    return float(max(found, 1 - found))


@dataclass
class Probes:
    """The times that an asker saw for prompts that another key had sent before (True) and had not (False)."""

    cached: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def by_count(self) -> float:
        return auc(self.cached[True], self.cached[False])

    def by_time(self) -> float:
        return auc(self.seconds[True], self.seconds[False])


def probe(directory: Path, config: Any, size: int, *, asker: str, num_tokens: int, **options: Any) -> Probes:
    """Send a prompt as `victim`, then the same or another as `asker`; record `cached_tokens` and the time of each."""
    rng, found = random.Random(0), Probes()
    one_token = SamplingParams(max_tokens=1, ignore_eos=True)
    with Engine.open(directory, memory="2GiB", threads=1, readers=1, **options) as engine:

        def ask(prompt: list[int], tenant: str) -> Any:
            sequence = engine.submit(prompt, one_token, tenant=tenant)
            while sequence.result is None:
                engine.step()
            assert sequence.result.error is None
            return sequence.result.ledger

        for number in range(size):
            is_hit = rng.random() < 0.5 if number > 1 else bool(number)
            prompt, other = (prompt_ids(config, 2 * number + at, num_tokens) for at in (10, 11))
            ask(prompt if is_hit else other, "victim")
            ledger = ask(prompt, asker)
            found.cached[is_hit].append(ledger.cached_tokens)
            found.seconds[is_hit].append(ledger.time_to_first_token_s)
    return found


@figure("R23", 2000, "probes of another key's prompts")
def probed_caches(scratch: Path, size: int) -> Finding:
    config = qwen3_moe(num_hidden_layers=2, num_experts=48, max_position_embeddings=256)
    pack(open_model(write_model(scratch / "source", config, seed=4)), scratch / "pack", format="bf16")
    finding = Finding(size=size)
    across = probe(scratch / "pack", config, size, asker="other", num_tokens=200)
    own = probe(scratch / "pack", config, max(20, size // 10), asker="victim", num_tokens=200)
    experts = probe(scratch / "pack", config, size, asker="other", num_tokens=4, expert_slots=24)
    finding.require(across.by_count() <= _MOST_AUC, f"cached_tokens tell: AUC {across.by_count():.3f}")
    if across.by_time() > _MOST_AUC:
        finding.late.append(f"the first token's time tells: AUC {across.by_time():.3f}")
    finding.require(own.by_count() > 0.99, "a key does not find its own prompts, so the probe sees nothing")
    finding.facts += [
        f"prefix cache: AUC {across.by_count():.3f} by cached_tokens, {across.by_time():.3f} by time"
        f" (a key's own prompts: {own.by_count():.3f} and {own.by_time():.3f})",
        f"expert cache, no claim: {experts.by_time():.3f} by time",
    ]
    return finding


# ── R11: a thousand connections ─────────────────────────────────────────────────────────────────────────────────────

_CONNECTION_BYTES, _HEALTH_S = 100 << 10, 0.05


def head_of(method: str, path: str, num_bytes: int = 0) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


def connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=_END_S)


def one_answer(connection: socket.socket) -> tuple[int, str]:
    """Status and head of an answer with a content length; status 0 if the connection ended first."""
    found = b""
    while not (match := re.search(rb"content-length: (\d+)(?s:.*?)\r\n\r\n", found)) or len(
        found
    ) < match.end() + int(match[1]):
        part = connection.recv(1 << 16)
        if not part:
            return 0, ""
        found += part
    return int(found[9:12]), found.partition(b"\r\n\r\n")[0].decode("latin-1")


@figure("R11", 1000, "connections at once")
def many_connections(scratch: Path, size: int) -> Finding:
    """They connect, and then all ask a question at once. Others ask for /health over new connections meanwhile."""
    finding, statuses = Finding(size=size), Counter[str]()
    model = write_chat_model(scratch / "model")
    with served(model, scratch, "--max-connections", size + 8) as server, ExitStack() as stack:
        httpx.get(f"{server.url}/health")
        before = memory_of(server.process.pid, "VmRSS")
        with health_times(server.url, finding) as while_connecting:
            connections = [stack.enter_context(connected(server.url)) for _ in range(size)]
            time.sleep(min(0.5, 0.2 + size / 1000))
        for connection in connections:
            connection.sendall(head_of("GET", "/health"))
        finding.require(
            all(one_answer(one)[0] == 200 for one in connections), "/health is not 200 on every one"
        )
        each = (memory_of(server.process.pid, "VmRSS") - before) / size
        content = json.dumps(body_of("chat", "Hi", 8)).encode()
        with health_times(server.url, finding) as beside_questions:
            for connection in connections:
                connection.sendall(head_of("POST", PATHS["chat"], len(content)) + content)
            for connection in connections:
                status, head = one_answer(connection)
                statuses[str(status)] += 1
                finding.require(
                    status == 200 or (status in (429, 503) and "retry-after" in head.lower()), f"{status}"
                )
        finding.require_within(max(while_connecting), _HEALTH_S, "/health, while they connected, took")
        finding.require_within(
            float(np.percentile(beside_questions, 99)), _HEALTH_S, "/health, beside their questions, took"
        )
        finding.require(each <= _CONNECTION_BYTES, f"{each / 1024:.0f} KiB each")
    finding.facts += [
        f"{each / 1024:.0f} KiB each", f"a question on all of them: {counted(statuses)}",
        f"/health {1e3 * max(while_connecting):.0f} ms at most while they connect",
        f"beside their questions {1e3 * np.median(beside_questions):.0f} ms, and 99 of 100 times within"
        f" {1e3 * np.percentile(beside_questions, 99):.0f} ms",
    ]  # fmt: skip
    return finding


# In a process of its own: the one that asks a thousand questions would delay its clock.
_ASK_FOR_HEALTH = """
import select, socket, sys, time
address, head, limit_s = (sys.argv[1], int(sys.argv[2])), sys.argv[3].encode(), float(sys.argv[4])
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    began, answer = time.monotonic(), b""
    with socket.create_connection(address, timeout=limit_s) as connection:
        connection.sendall(head)
        while part := connection.recv(1 << 16):
            answer += part
    print(answer[9:12].decode(), time.monotonic() - began, flush=True)
"""


@contextmanager
def health_times(url: str, finding: Finding) -> Iterator[list[float]]:
    """Ask for /health every 20 ms, over new connections; the list gets the seconds of each answer at the end."""
    times: list[float] = []
    host, _, port = url.removeprefix("http://").rpartition(":")
    head = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    command = [sys.executable, "-c", _ASK_FOR_HEALTH, host, port, head, str(_END_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "ready\n"
        yield times
        told, _ = asking.communicate(timeout=_END_S)
    for line in told.splitlines():
        status, seconds = line.split()
        finding.require(status == "200", "/health is not 200")
        times.append(float(seconds))
    finding.require(asking.returncode == 0 and bool(times), "/health was not answered")


# ── R12: slow clients ───────────────────────────────────────────────────────────────────────────────────────────────

_HEAD_S, _BODY_S, _LATE_S = 15.0, 60.0, 5.0


@figure("R12", 500, "clients that send a byte a second")
def slow_clients(scratch: Path, size: int) -> Finding:
    """Half of them send a slow head, half a slow body. Slow readers are in `tests/serve/test_slow_clients.py`."""
    finding = Finding(size=size)
    taken: dict[str, list[float]] = {"heads": [], "bodies": []}
    statuses: Counter[str] = Counter()

    def first_token_s(url: str) -> float:
        began = time.monotonic()
        body = body_of("chat", "Hi", 2, stream=True)
        with httpx.stream("POST", url + PATHS["chat"], json=body, timeout=_END_S) as answer:
            finding.require(answer.status_code == 200, f"another client has {answer.status_code}")
            for _ in answer.iter_text():
                return time.monotonic() - began
        return math.inf

    with served(write_chat_model(scratch / "model"), scratch) as server, ExitStack() as stack:
        alone = [first_token_s(server.url) for _ in range(20)]
        live: dict[socket.socket, tuple[str, float]] = {}
        for number in range(size):
            connection = stack.enter_context(connected(server.url))
            connection.sendall(
                b"GET /health HTTP/1.1\r\nX: " if number % 2 else head_of("POST", PATHS["chat"], 9999)
            )
            live[connection] = ("heads" if number % 2 else "bodies", time.monotonic())
        beside = []
        while live and time.monotonic() - min(began for _, began in live.values()) < _BODY_S + 4 * _LATE_S:
            tick = time.monotonic()
            for connection, (kind, began) in list(live.items()):
                if said := answer_so_far(connection):
                    taken[kind].append(time.monotonic() - began)
                    statuses[f"{kind} {said}"] += 1
                    del live[connection]
            beside.append(first_token_s(server.url))
            time.sleep(max(0.0, tick + 1 - time.monotonic()))
    finding.require(not live, f"{len(live)} were never cut off")
    for kind, seconds in (("heads", _HEAD_S), ("bodies", _BODY_S)):
        latest = max(taken[kind], default=math.inf)
        finding.require_within(latest, seconds + _LATE_S, f"{kind} were cut off after")
        finding.facts.append(
            f"{kind} cut off after {min(taken[kind], default=math.inf):.1f} to {latest:.1f} s"
        )
    finding.require_within(
        float(np.median(beside)), 1.1 * float(np.median(alone)), "another's first token took"
    )
    finding.facts += [
        counted(statuses),
        f"another's first token {1e3 * np.median(alone):.0f} ms alone, {1e3 * np.median(beside):.0f} ms beside them",
    ]
    return finding


def answer_so_far(connection: socket.socket) -> str:
    """Return the status the server has sent, or "closed" if it hung up; otherwise send one more byte and return ""."""
    connection.settimeout(0)
    try:
        part = connection.recv(1 << 12)
        return part[9:12].decode() if part else "closed"
    except BlockingIOError:
        pass
    except ConnectionError:
        return "closed"
    try:
        connection.sendall(b"x")
    except ConnectionError:
        return "closed"
    return ""


# ── R17: a long run ─────────────────────────────────────────────────────────────────────────────────────────────────

_GROWTH_MIB = 0.5  # of the last sixth over the one before
_REQUESTS_S = 1800.0  # the full figure lasts this long at least


@figure("R17", 100_000, "mixed requests")
def for_some_time(scratch: Path, size: int) -> Finding:
    """Memory levels off once all that is kept of answers is full; threads and files do not grow in number."""
    finding, counts = Finding(), Counter[str]()
    samples: list[tuple[float, int, int, int]] = []
    least_s = _REQUESTS_S * size / FIGURES["R17"].named_size

    def ask(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=_END_S) as client:
            while counts.total() < size or time.monotonic() - began < least_s:
                dialect = rng.choice(DIALECTS)
                said = f"{rng.random()} " * rng.randrange(1, 12)
                body = body_of(dialect, said, rng.randrange(4, 20), stream=rng.random() < 0.5)
                body |= {"unknown": 1} if rng.random() < 0.1 else {}
                if dialect == "responses":  # long ones, so that all room for kept responses is soon used
                    body["metadata"] = {f"key {at}": 512 * "x" for at in range(16)}
                try:
                    timeout = 0.05 if rng.random() < 0.1 else _END_S
                    status = client.post(PATHS[dialect], json=body, timeout=timeout).status_code
                    counts[str(status)] += 1
                    finding.require(status in (200, 400, 503), f"{status}")
                except httpx.TimeoutException:
                    counts["left"] += 1

    with served(write_chat_model(scratch / "model"), scratch) as server, ThreadPoolExecutor(4) as pool:
        began, pid = time.monotonic(), server.process.pid
        asking = [pool.submit(ask, number) for number in range(4)]
        while not all(one.done() for one in asking):
            num_files = len(os.listdir(f"/proc/{pid}/fd"))
            num_threads = len(os.listdir(f"/proc/{pid}/task"))
            samples.append((counts.total(), memory_of(pid, "VmRSS"), num_files, num_threads))
            time.sleep(min(0.5, least_s / 20))
        for one in asking:
            one.result()
        time.sleep(1)
        files_at_rest = len(os.listdir(f"/proc/{pid}/fd"))
        threads_at_rest = len(os.listdir(f"/proc/{pid}/task"))
        finding.require("Traceback" not in server.log.read_text(), "a traceback is logged")
    finding.size = counts.total()
    sixths = np.array_split(np.array(samples, float), 6)
    memory = [float(np.median(sixth[:, 1])) / 2**20 for sixth in sixths]
    warm = np.concatenate(sixths[2:])
    finding.require(
        files_at_rest <= warm[:, 2].min(), f"{files_at_rest} files at rest, {warm[:, 2].min()} before"
    )
    finding.require(
        threads_at_rest <= warm[:, 3].max(), f"{threads_at_rest} threads at rest, {warm[:, 3].max()} before"
    )
    if size >= FIGURES["R17"].named_size and memory[5] - memory[4] > _GROWTH_MIB:
        finding.violations.append(f"memory still grows: {memory[4]:.1f}, then {memory[5]:.1f} MiB")
    finding.facts += [
        f"{counted(counts)}, in {time.monotonic() - began:.0f} s",
        "memory of each sixth " + " ".join(f"{one:.1f}" for one in memory) + " MiB",
        f"{int(warm[:, 3].min())} to {int(warm[:, 3].max())} threads",
    ]
    return finding


# ── R19: addresses in requests ──────────────────────────────────────────────────────────────────────────────────────

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of <sched.h>
_SCHEMES = ("http:", "https:", "HTTP:", "ftp:", "gopher:", "ws:", "file:", "data:", "", "blob:http:")
_HOSTS = (
    "127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}", "[::ffff:127.0.0.1]:{port}", "0.0.0.0:{port}",
    "127.1:{port}", "2130706433:{port}", "0x7f000001:{port}", "0177.0.0.1:{port}", "user@127.0.0.1:{port}",
    "192.0.2.7", "169.254.169.254", "metadata.google.internal", "example.org", "xn--e1afmkfd.example",
    "example.org#@127.0.0.1:{port}", r"example.org\@127.0.0.1:{port}",
)  # fmt: skip


def carriers(address: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a request for every place that could hold an address."""

    def turn(part: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": part if isinstance(part, str) else [part]}]}

    schema = {"$ref": address}
    yield "chat", turn({"type": "image_url", "image_url": {"url": address}})
    yield "chat", turn({"type": "input_audio", "input_audio": {"data": address, "format": "wav"}})
    yield "chat", turn({"type": "video_url", "video_url": {"url": address}})
    yield "chat", turn(f"see {address} and ![x]({address})")
    yield "chat", {"model": address}
    yield "chat", {"chat_template": address}
    yield "chat", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    yield "chat", {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
    yield (
        "responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": address}]}]},
    )
    yield "responses", {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": address}]}]}
    yield "responses", {"tools": [{"type": "mcp", "server_label": "x", "server_url": address}]}
    yield "messages", turn({"type": "image", "source": {"type": "url", "url": address}})
    yield "messages", turn({"type": "document", "source": {"type": "url", "url": address}})
    yield "messages", {"mcp_servers": [{"type": "url", "name": "x", "url": address}]}


def packets_sent(device: str) -> int:
    """Packets that left through `device` of this thread's network namespace."""
    found = re.search(rf"{device}:(.*)", Path("/proc/thread-self/net/dev").read_text())
    assert found
    return int(found[1].split()[9])


def datagrams_sent() -> int:
    names, values = re.findall(r"^Udp: (.*)$", Path("/proc/thread-self/net/snmp").read_text(), re.MULTILINE)
    return int(dict(zip(names.split(), values.split(), strict=True))["OutDatagrams"])


@figure("R19", 150, "addresses, each in every place of a request")
def addresses(scratch: Path, size: int) -> Finding:
    """Measure in a network namespace whose only way out is one device that counts packets, with one local listener."""

    def measured() -> Finding:
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
            raise PermissionError("a network of its own needs root")
        for command in (
            "link set lo up",
            "link add sentinel type veth peer name far",
            "link set sentinel addrgenmode none",
            "link set far addrgenmode none",
            "addr add 10.9.9.1/24 dev sentinel",
            "link set far up",
            "link set sentinel up",
            "route add default dev sentinel",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        return follow_no_address(scratch, size)

    with ThreadPoolExecutor(1) as pool:  # a thread may have its own network namespace; its children share it
        return pool.submit(measured).result()


def follow_no_address(scratch: Path, size: int) -> Finding:
    finding, statuses = Finding(), Counter[str]()
    model = write_chat_model(scratch / "model")
    with served(model, scratch, is_fork=False) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        time.sleep(3)  # the kernel itself sends packets on a new device
        before = packets_sent("sentinel"), datagrams_sent()
        found = [f"{scheme}//{host.format(port=port)}/x" for host in _HOSTS for scheme in _SCHEMES]
        with httpx.Client(base_url=server.url, timeout=_END_S) as client:
            for address in random.Random(0).sample(found, min(size, len(found))):
                for dialect, more in carriers(address):
                    answer = client.post(PATHS[dialect], json=body_of(dialect, "Hi", 16) | more)
                    statuses[str(answer.status_code)] += 1
                    finding.require(answer.status_code < 500, f"{address}: {answer.status_code}")
                finding.size += 1
        time.sleep(1)
        num_packets = packets_sent("sentinel") - before[0]
        num_datagrams = datagrams_sent() - before[1]
        finding.require(num_packets == 0, f"{num_packets} packets left the machine")
        finding.require(num_datagrams == 0, f"{num_datagrams} datagrams were sent")
        try:
            listener.accept()
            finding.violations.append("a connection was made to this machine")
        except BlockingIOError:
            pass
        with socket.socket(type=socket.SOCK_DGRAM) as probe:  # prove that an outgoing packet is counted
            probe.sendto(b"x", ("192.0.2.7", 9))
        finding.require(packets_sent("sentinel") > before[0] + num_packets, "the device counts nothing")
    finding.facts += [
        f"{num_packets} packets out, {num_datagrams} datagrams, 0 connections", f"answers: {counted(statuses)}"
    ]  # fmt: skip
    return finding


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(number: str, size: int | None = None) -> tuple[Finding, str]:
    """Measure one figure at `size`, or at its named size; return the finding and its line."""
    one = FIGURES[number]
    with tempfile.TemporaryDirectory(prefix=f"argosy-{number}-") as scratch:
        finding = one.measure(Path(scratch), one.named_size if size is None else size)
    return finding, one.line(number, finding)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE[=SIZE]", help=f"of {', '.join(FIGURES)}; default: all"
    )
    num_violations = 0
    for asked in parser.parse_args().figures or FIGURES:
        number, _, size = asked.partition("=")
        began = time.monotonic()
        finding, line = measure(number, int(size) if size else None)
        print(f"{line}  ({time.monotonic() - began:.0f} s)")
        for sentence in (*finding.violations[:_MOST_SHOWN], *finding.late[:_MOST_SHOWN]):
            print(f"  {sentence}")
        sys.stdout.flush()
        num_violations += len(finding.violations) + len(finding.late)
    return 1 if num_violations else 0


if __name__ == "__main__":
    sys.exit(main())
