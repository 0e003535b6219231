"""How much can the server serve to many clients at once, compared with llama.cpp's own server on the same file?

    benchmarks/install_tools_peer.sh               # once: build/peer-tools/bin/llama-server
    python benchmarks/load.py [--geometries mid] [--formats Q4_0] [--clients 1,8,16] [--shares 100,25] [--short]

Each client sends `--requests` requests, each as soon as the previous answer is complete: a few words of a document,
greedy, `--new` tokens, streamed. Every text is checked against the rest of its document. A share of 100 is a model in
memory. Any other share is a memory cgroup of that percentage of the file for either server, with the file's pages
dropped first.

    llama-server        llama.cpp compiled for this processor, with continuous batching: a slot for each client, flash
                        attention, no cache of old prompts. Under a limit: with one thread and with two, passive
                        waiting, not repacked (the second copy would not fit)
    llama.cpp batching  no server: its C functions with all sequences in one batch, all starting at the same moment.
                        This is the most that a batching server could reach

First tokens are timed from the first byte of the request sent to the first byte of text received. The client stores
what it receives with timestamps and parses it after the clock has stopped, because it shares the cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h11

from argosy.config import format_bytes
from cgroup import NoMemoryCap, capped
from common import (
    REPOSITORY,
    CannotSet,
    Report,
    Sample,
    alternate,
    drop_page_cache,
    file_bytes,
    read_ahead,
    tidy_up_when_terminated,
)
from engines import ARGOSY, LLAMA_CPP, PASSIVE, Case, Job, engines, median, parse_cases, run
from make_checkpoint import vocabulary
from random_weights import DOCUMENT_TOKENS, document

PEER, BATCHING = "llama-server", "llama.cpp batching"
PEER_SERVER = REPOSITORY / "build" / "peer-tools" / "bin" / "llama-server"
PEER_SLOT_TOKENS = 512  # context of one of its slots
PROMPT_WORDS = 8
# The spaces in a prompt are not part of its document, and the margin of the next token is smaller for them: llama.cpp
# was seen to miss one token in 1100, Argosy one in 8000, and then they continue from a different one.
FEWEST_RIGHT = 0.9
READ_AHEAD_KIB = 128
TARGETS = {1: ">= 1.7", 8: ">= 3", 16: ">= 4"}  # by the number of clients, in memory and not
ROWS = {True: 16, False: 17}
_START_S = 120.0
_DOCUMENTS = range(2, 14)  # documents of three-letter words, many of which are one token


# ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Question:
    """A text, and the answer of a model that continues its documents."""

    text: str
    answer: str


class Questions:
    """Any number of questions, no two alike.

    A text is words separated by spaces, because adjacent letters would form other tokens; only the last word decides
    what follows. Both tokenizers read a word as one token if its first two letters do not come after its last two: the
    pair that is merged first is then the first one, as in the merge that made the word.
    """

    def __init__(self, num_new: int) -> None:
        self._num_new = num_new
        self._tokens, _ = vocabulary(32_000)
        self._every = self._of_documents()

    def take(self, count: int) -> list[Question]:
        return [next(self._every) for _ in range(count)]

    def _of_documents(self) -> Iterator[Question]:
        """Adjacent questions are from different documents, like those of different users."""
        places = [self._places(document(number)) for number in _DOCUMENTS]
        for begin in range(max(map(len, places)) - PROMPT_WORDS):
            for number, usable in zip(_DOCUMENTS, places, strict=True):
                of_prompt = usable[begin : begin + PROMPT_WORDS]
                if len(of_prompt) == PROMPT_WORDS:
                    words = [self._tokens[document(number)[at]] for at in of_prompt]
                    rest = document(number)[of_prompt[-1] + 1 :][: self._num_new]
                    yield Question(" ".join(words), "".join(self._tokens[token] for token in rest))

    def _places(self, tokens: Sequence[int]) -> list[int]:
        """Positions of words that are one token and have an answer's length of the document after them."""
        words = [self._tokens[token] for token in tokens[: DOCUMENT_TOKENS - self._num_new]]
        return [at for at, word in enumerate(words) if is_one_token(word)]


def is_one_token(word: str) -> bool:
    """Whether a three-letter word is merged into the token of that name."""
    return word[:2] <= word[1:]


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Reply:
    """The bytes that answered a request, each part with its arrival time."""

    connection: h11.Connection
    sent_at: float
    parts: list[tuple[float, bytes]]

    def texts(self) -> list[tuple[float, str]]:
        """(time, text) pairs of the answer.

        Raises:
            SystemExit: it is not an answer.
        """
        found: list[tuple[float, str]] = []
        waiting = b""
        for at, part in self.parts:
            self.connection.receive_data(part)
            while (event := self.connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response) and event.status_code != 200:
                    raise SystemExit(f"the server answers {event.status_code}: {part[-300:]!r}")
                if isinstance(event, h11.Data):
                    waiting += bytes(event.data)
                if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    break
            *whole, waiting = waiting.replace(b"\r\n", b"\n").split(b"\n\n")
            found += [(at, text) for event in whole if (text := _text_of(event))]
        return found


def _text_of(event: bytes) -> str:
    if not event.startswith(b"data: {"):
        return ""  # a comment, or the end
    choices = json.loads(event[len(b"data: ") :])["choices"]
    return str(choices[0]["text"]) if choices else ""


async def ask(port: int, body: Mapping[str, object]) -> Reply:
    """Send one request on its own connection."""
    data = json.dumps(body).encode()
    connection = h11.Connection(h11.CLIENT)
    headers = {
        "host": f"127.0.0.1:{port}",
        "content-type": "application/json",
        "content-length": str(len(data)),
        "connection": "close",
    }
    head = connection.send(
        h11.Request(method="POST", target="/v1/completions", headers=list(headers.items()))
    )
    sent = (head or b"") + (connection.send(h11.Data(data=data)) or b"")
    connection.send(h11.EndOfMessage())
    reply = Reply(connection, time.perf_counter(), [])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        while part := await reader.read(1 << 16):
            reply.parts.append((time.perf_counter(), part))
    finally:
        writer.close()
        await writer.wait_closed()
    return reply


@dataclass(frozen=True)
class Load:
    """Results of the clients: seconds to each first token, tokens over the total time, and texts with expected ones."""

    first_s: Sequence[float]
    tok_per_s: float
    num_right: int


async def put_load(
    port: int,
    bodies: Callable[[str], Mapping[str, object]],
    asked: Sequence[Sequence[Question]],
    num_new: int,
) -> Load:
    """Let each client ask its questions one after another, all clients at once."""
    replies: list[tuple[Question, Reply]] = []

    async def client(questions: Sequence[Question]) -> None:
        for question in questions:
            replies.append((question, await ask(port, bodies(question.text))))  # noqa: PERF401  one after the other

    began = time.perf_counter()
    await asyncio.gather(*(client(questions) for questions in asked))
    seconds = time.perf_counter() - began
    first, num_right = [], 0
    for question, reply in replies:
        texts = reply.texts()
        said = "".join(text for _, text in texts)
        num_right += said == question.answer
        if said != question.answer:
            print(
                f"  '{question.text}' was answered '{said}' and not '{question.answer}'",
                file=sys.stderr,
            )
        first.append(texts[0][0] - reply.sent_at)
    return Load(first, len(replies) * num_new / seconds, num_right)


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as `share` of the values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# ── servers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a server."""

    engine: str
    threads: int
    limit_bytes: int | None  # memory limit; None: the model is in memory

    def command(self, model: Path, port: int, *, context: int, clients: int) -> list[str]:
        if self.engine == ARGOSY:
            memory = self.limit_bytes or 2 * file_bytes(model) + (2 << 30)
            return [
                sys.executable, "-m", "argosy", "serve", str(model), "--port", str(port), "--memory", f"{memory}B",
                "--threads", str(self.threads), "--context", str(context * clients),
            ]  # fmt: skip
        return [
            str(PEER_SERVER), "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--parallel", str(clients), "--ctx-size", str(PEER_SLOT_TOKENS * clients), "--batch-size", "512",
            "--flash-attn", "on", "--cache-ram", "0", "--threads", str(self.threads),
            "--threads-batch", str(self.threads), *([] if self.limit_bytes is None else ["--no-repack"]),
        ]  # fmt: skip

    def body(self, num_new: int) -> Callable[[str], Mapping[str, object]]:
        """Returns the function that makes a request body from a text."""
        fixed = {"max_tokens": num_new, "temperature": 0, "stream": True}
        return lambda text: {"prompt": text, **fixed}


@contextlib.contextmanager
def running(way: Way, model: Path, *, context: int, clients: int) -> Iterator[int]:
    """Run a server until it answers; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = way.command(model, port, context=context, clients=clients)
    environment = dict(os.environ)
    if way.engine == PEER and way.limit_bytes is not None:
        environment |= PASSIVE
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as stack:
        stack.enter_context(_process(way, command, environment, log))
        _wait_until_ready(port, log, way.engine)
        yield port


@contextlib.contextmanager
def _process(way: Way, command: list[str], environment: dict[str, str], log: IO[bytes]) -> Iterator[None]:
    if way.limit_bytes is not None:
        with capped(command, limit_bytes=way.limit_bytes, stdout=log, stderr=log, env=environment):
            yield
        return
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(port: int, log: IO[bytes], engine: str) -> None:
    ends_at = time.monotonic() + _START_S
    while time.monotonic() < ends_at:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"{engine} does not answer: {log.read()[-600:].decode(errors='replace')}")


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Measured:
    """One model at one share of memory."""

    def __init__(self, case: Case, share: int, options: argparse.Namespace) -> None:
        self.case, self.share, self.options = case, share, options
        self.is_resident = share == 100
        self.limit_bytes = None if self.is_resident else file_bytes(case.model) * share // 100
        self.num_new = options.new if self.is_resident else options.new_streamed
        self.num_requests = options.requests if self.is_resident else 1
        self.clients = [int(count) for count in options.clients.split(",")]
        self.num_warming = min(8, max(self.clients)) if self.is_resident else 1
        self.texts: dict[str, list[int]] = {}  # for each server: right texts, and all
        self._questions = Questions(self.num_new)

    @property
    def name(self) -> str:
        where = "resident" if self.is_resident else f"{self.share} %"
        return f"{self.case.geometry} {self.case.format} {where}"

    def ways(self) -> dict[str, Callable[[], dict[str, float]]]:
        ours = Way(engine=ARGOSY, threads=self.case.threads, limit_bytes=self.limit_bytes)
        found: dict[str, Callable[[], dict[str, float]]] = {ARGOSY: lambda: self.serve(ours)}
        if PEER_SERVER.exists():
            for threads in {self.case.threads} if self.is_resident else (1, 2):
                way = Way(engine=PEER, threads=threads, limit_bytes=self.limit_bytes)
                found[f"{PEER} {threads}T"] = lambda way=way: self.serve(way)  # type: ignore[misc]
        else:
            print(f"{PEER} is not compiled (benchmarks/install_tools_peer.sh)", file=sys.stderr)
        return found | ({BATCHING: self.batch} if LLAMA_CPP in engines() else {})

    def serve(self, way: Way) -> dict[str, float]:
        values: dict[str, float] = {}
        context, most = 8 * PROMPT_WORDS + self.num_new, max(self.clients)
        with self._dropped(), running(way, self.case.model, context=context, clients=most) as port:
            bodies = way.body(self.num_new)
            for number, clients in enumerate([self.num_warming, *self.clients]):
                num_requests = 1 if number == 0 else self.num_requests
                asked = [self._questions.take(num_requests) for _ in range(clients)]
                load = asyncio.run(put_load(port, bodies, asked, self.num_new))
                self._count(way, load.num_right, clients * num_requests)
                if number:
                    values[f"{clients} tok/s"] = load.tok_per_s
                    values[f"{clients} p50"] = 1e3 * nearest_rank(load.first_s, 0.5)
                    values[f"{clients} p99"] = 1e3 * nearest_rank(load.first_s, 0.99)
        return values

    def _count(self, way: Way, num_right: int, num_texts: int) -> None:
        counted = self.texts.setdefault(f"{way.engine} {way.threads}T", [0, 0])
        counted[0] += num_right
        counted[1] += num_texts

    def correct(self) -> str:
        """Report how many texts are the rest of their documents.

        Raises:
            SystemExit: a server has more wrong ones than the spaces between words, which no document has, can explain.
        """
        said = ", ".join(f"{name}: {right} of {asked}" for name, (right, asked) in self.texts.items())
        if any(right < FEWEST_RIGHT * asked for right, asked in self.texts.values()):
            raise SystemExit(f"too few texts continue their documents: {said}")
        return f"{said} texts continue their documents"

    def batch(self) -> dict[str, float]:
        """Run llama.cpp with all sequences in one batch."""
        most = max(self.clients)
        prompts = [document(1 + number, 2 * PROMPT_WORDS) for number in range(most)]
        job = Job(
            model=self.case.model, prompts=prompts, num_new=self.num_new, threads=self.case.threads,
            together=[self.num_warming, *self.clients], repack=self.is_resident,
        )  # fmt: skip
        with self._dropped():
            done = run(
                LLAMA_CPP, job, limit_bytes=self.limit_bytes, environment={} if self.is_resident else PASSIVE
            )
        values: dict[str, float] = {}
        for event in [event for event in done.require().events if event["event"] == "together"][1:]:
            clients = len(event["ids"])
            for prompt, ids in zip(prompts, event["ids"], strict=False):
                if ids != [prompt[-1] + 1 + at for at in range(self.num_new)]:
                    raise SystemExit(f"{BATCHING}: an answer does not continue its document")
            values[f"{clients} tok/s"] = clients * self.num_new / event["seconds"]
            values[f"{clients} p50"] = 1e3 * nearest_rank(event["first_s"], 0.5)
            values[f"{clients} p99"] = 1e3 * nearest_rank(event["first_s"], 0.99)
        return values

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        if self.is_resident:
            yield
            return
        drop_page_cache(self.case.model)
        with read_ahead(self.case.model, READ_AHEAD_KIB):
            yield


def measure(report: Report, measured: Measured) -> None:
    samples = alternate(measured.ways(), measured.options.repeats)
    report.correct(measured.correct())
    facts = measured.case.facts | {
        "share": measured.share, "limit_bytes": measured.limit_bytes, "new_tokens": measured.num_new,
        "requests": measured.num_requests, "prompt_tokens": 2 * PROMPT_WORDS - 1,
    }  # fmt: skip
    for clients in measured.clients:
        for way, found in samples.items():
            label = f"{measured.name}, {clients} clients: {way}"
            report.figure(label, "tok/s", found, f"{clients} tok/s", clients=clients, **facts)
            report.figure(
                f"{label}, first token p50", "ms", found, f"{clients} p50", clients=clients, **facts
            )
            report.figure(
                f"{label}, first token p99", "ms", found, f"{clients} p99", clients=clients, **facts
            )
        for peer in (PEER, BATCHING):
            if any(way.startswith(peer) for way in samples):
                compare(report, measured, samples, peer, clients, facts)
    report.neighbours([sample for found in samples.values() for sample in found])


def compare(
    report: Report,
    measured: Measured,
    samples: dict[str, list[Sample]],
    peer: str,
    clients: int,
    facts: dict[str, Any],
) -> None:
    """Quotients of medians; if the peer ran with several thread counts, its best counts."""

    def best(key: str, choose: Callable[[Sequence[float]], float], of: str) -> float:
        return choose(
            [
                median([sample.values[f"{clients} {key}"] for sample in found])
                for way, found in samples.items()
                if way.startswith(of)
            ]
        )

    name, row = f"{measured.name}, {clients} clients", ROWS[measured.is_resident]
    report.ratio(
        f"{name}: over {peer}",
        best("tok/s", max, ARGOSY),
        best("tok/s", max, peer),
        target=TARGETS.get(clients, "") if peer == PEER else "",
        row=row,
        **facts,
    )
    for point in ("p50", "p99"):
        report.ratio(
            f"{name}: first token {point}, {peer}'s over ours",
            best(point, min, peer), best(point, max, ARGOSY), row=row, **facts,
        )  # fmt: skip


def main() -> int:
    tidy_up_when_terminated()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", default="1,8,16")
    parser.add_argument("--shares", default="100,25", help="of the file in memory, in percent")
    parser.add_argument("--requests", type=int, default=3, help="of each client; one where it does not fit")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--new-streamed", type=int, default=16, help="the same where the model does not fit")
    options, cases = parse_cases(parser, geometries="mid", formats="Q4_0", threads="2", repeats=2)
    if options.short:
        options.clients, options.shares, options.requests, options.new = "1,8", "100", 1, 8
    report = Report(
        "load", state="loopback; a fresh server for each sample, warmed by 8 answers, in a limit by 1"
    )
    for number, case in enumerate(cases):
        if number == 0:
            report.opening()
        report.line("model", f"{case.name}: {format_bytes(file_bytes(case.model))}")
        for share in map(int, options.shares.split(",")):
            try:
                measure(report, Measured(case, share, options))
            except (NoMemoryCap, CannotSet) as reason:
                print(f"skipped: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
