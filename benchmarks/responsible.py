"""What does an audit cost: in tokens per second, in time to the first token, in processor time of the server?

    python benchmarks/responsible.py [--model demo] [--memory 1GiB] [--clients 4] [--tokens 128] [--repeats 5] [--short]

Two servers of the same model: one plain, one with `--audit`; with `--content`, also with `--audit-content`. They are
loaded in turns, A B A B, and never at the same time. Each client sends its requests one after another, streamed and
greedy. The figures are median ratios of neighbouring rounds, so a machine that becomes slower changes them little.
Processor time is the whole server's, as the kernel counts it: other programs slow it down, and add less to that.

Rounds of a busy machine differ by more than an audit costs. So the processor time of one record is measured alone, too,
and its share in the processor time of a request is what the target is for.

The answers of both must be equal, and the audit must be valid and have every request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.chain import verify
from argosy.guard.keys import KeyRing
from argosy.serve.guards.audited import Auditor
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller
from common import Report, tidy_up_when_terminated

TARGET = 0.01
_REQUESTS = 2  # per client and round
_START_S = 300.0


@dataclass(frozen=True)
class Answer:
    text: str
    first_token_s: float


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    pid: int

    def processor_s(self) -> float:
        """Seconds of processors that it has taken, with its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def served(model: str, memory: str, *options: str) -> Iterator[Served]:
    """Run a server; yield it once it listens."""
    command = [
        sys.executable,
        "-m",
        "argosy",
        "serve",
        model,
        "--memory",
        memory,
        "--port",
        "0",
        "--no-media",
    ]
    process = subprocess.Popen(
        [*command, "--log-format", "json", *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = ""
        while not address:
            line = process.stderr.readline()
            if not line:
                raise SystemExit("the server ended before it listened")
            if line.startswith("{"):
                address = json.loads(line).get("address", "")
        # Its log is not read any more: lines that do not fit the pipe are dropped.
        yield Served(address, process.pid)
    finally:
        process.terminate()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ask(url: str, number: int, num_new: int) -> Answer:
    body = {
        "prompt": f"Question {number}: say something about ships.", "max_tokens": num_new, "stream": True,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, first_s, text = time.perf_counter(), 0.0, ""
    with urllib.request.urlopen(request, timeout=_START_S) as response:
        for line in response:
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter() - began
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return Answer(text, first_s)


def record_s(content: bool, num_new: int) -> float:
    """Processor seconds of all threads for one record, of a request with so many events."""
    rule = RouteRule(method="POST", path="/v1/completions", scope="infer", screens="answers", is_counted=True)
    key = KeyRing(None).find(None)
    digests = {"model_sha256": "a" * 64, "template_sha256": "b" * 64}
    num_records = 200 if content else 2000
    with tempfile.TemporaryDirectory(prefix="argosy-responsible-") as scratch:
        audit = Audit(AuditSettings(directory=Path(scratch) / "audit", with_content=content), facts={})
        auditor = Auditor(audit, policy="c" * 64)
        began = time.process_time()
        for number in range(num_records):
            caller = Caller(key=key)
            watch = auditor.arrive(caller, rule, {})
            assert watch is not None
            watch.answered_by("demo", digests)
            watch.begin()
            watch.asked(b"a" * 1000)
            for _ in range(num_new):
                watch.token(0)
                watch.sent(b"b" * 200)  # about the size of an event
            watch.found("policy a")
            watch.after(200, 1.0)
            if number % 50 == 0:
                time.sleep(0.02)  # the queue has a bound
        audit.close()
        return (time.process_time() - began) / num_records


def load(server: Served, *, clients: int, num_new: int) -> tuple[float, float, list[Answer]]:
    """Tokens per second of all clients together, processor seconds of the server for each token, and the answers."""

    def client(number: int) -> list[Answer]:
        return [ask(server.url, number * _REQUESTS + at, num_new) for at in range(_REQUESTS)]

    began, before_s = time.perf_counter(), server.processor_s()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    num_tokens = len(answers) * num_new
    took_s = time.perf_counter() - began
    return num_tokens / took_s, (server.processor_s() - before_s) / num_tokens, answers


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--content", action="store_true", help="also keep what is said")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    num_new, repeats = (32, 2) if options.short else (options.tokens, options.repeats)
    report = Report("responsible", state=f"{options.model} in {options.memory}, {options.clients} clients")
    tidy_up_when_terminated()
    with tempfile.TemporaryDirectory(prefix="argosy-responsible-") as scratch:
        audit = Path(scratch) / "audit"
        with_audit = ["--audit", str(audit), *(["--audit-content"] if options.content else [])]
        rates: dict[str, list[float]] = {"plain": [], "audit": []}
        processor_s: dict[str, list[float]] = {"plain": [], "audit": []}
        firsts: dict[str, list[float]] = {"plain": [], "audit": []}
        num_equal = num_answers = 0
        with (
            served(options.model, options.memory) as plain,
            served(options.model, options.memory, *with_audit) as audited,
        ):
            servers = {"plain": plain, "audit": audited}
            for server in servers.values():
                load(server, clients=options.clients, num_new=num_new)  # warm
            for _ in range(repeats):
                found: dict[str, list[Answer]] = {}
                for name, server in servers.items():
                    rate, token_s, found[name] = load(server, clients=options.clients, num_new=num_new)
                    rates[name].append(rate)
                    processor_s[name].append(token_s)
                    firsts[name].append(statistics.median(answer.first_token_s for answer in found[name]))
                num_answers += len(found["plain"])
                num_equal += sum(
                    one.text == other.text for one, other in zip(found["plain"], found["audit"], strict=True)
                )
        verified = verify(audit, (audit / "key").read_bytes())
    num_recorded, num_sent = verified.kinds["request"], (repeats + 1) * options.clients * _REQUESTS
    report.correct(
        f"{num_equal}/{num_answers} answers equal those without an audit; {num_recorded}/{num_sent} requests in it, "
        f"{'valid' if verified.is_valid else 'NOT VALID'}"
    )
    report.opening()
    ratios = [after / before for before, after in zip(rates["plain"], rates["audit"], strict=True)]
    first_ratios = [after / before for before, after in zip(firsts["plain"], firsts["audit"], strict=True)]
    processor_ratios = [
        after / before for before, after in zip(processor_s["plain"], processor_s["audit"], strict=True)
    ]
    for name, measured in rates.items():
        median_ms, token_ms = (1e3 * statistics.median(each[name]) for each in (firsts, processor_s))
        print(
            f"{name:<8}{statistics.median(measured):8.1f} tok/s   first token {median_ms:6.0f} ms   "
            f"{token_ms:.3f} ms of processors for each token"
        )
    for name, found_ratios in (
        ("rate", ratios), ("first token", first_ratios), ("processor", processor_ratios)
    ):  # fmt: skip
        low, high = min(found_ratios), max(found_ratios)
        print(f"{name:<12} {statistics.median(found_ratios):.3f} of that without ({low:.3f} to {high:.3f})")
    report.record(f"{options.model} rate with an audit over without", "ratio", ratios, [])
    report.record(f"{options.model} first token with an audit over without", "ratio", first_ratios, [])
    report.record(f"{options.model} processor time with an audit over without", "ratio", processor_ratios, [])
    share = record_s(options.content, num_new) / (num_new * statistics.median(processor_s["plain"]))
    print(f"a record     {share:.2%} of the processor time of a request with {num_new} new tokens")
    report.record(f"{options.model} processor time of a record over a request's", "ratio", [share], [])
    holds = verified.is_valid and num_recorded == num_sent and num_equal == num_answers
    return 0 if holds and share < TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
