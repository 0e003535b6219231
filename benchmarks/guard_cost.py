"""What does a content policy cost: milliseconds for a text of 4 KB, a server's first token, and its rate?

    python benchmarks/guard_cost.py [--model demo] [--memory 1GiB] [--tokens 256] [--repeats 7] [--short]

First, texts of 4 KB are searched for personal data: prose, source code, text in another script, text full of values.
Then two servers of the same model answer the same prompts in turns, one with a policy that replaces personal data on
both sides and looks for listed phrases, and one without. What it prints are ratios of neighbours in time, because other
work on the machine slows both.

The answers of both must be equal: the prompts and answers have no values, so the policy changes nothing. The first text
comes later, because as much of an answer is held back as a listed phrase is long, and a word for a value.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from argosy.guard.pii.finder import Finder
from common import REPOSITORY, Report

MOST_MS = 1.0
LEAST_RATE = 0.99
PROMPTS = (
    "Write a short story about a ship that comes home.",
    "Write a Python function that adds two numbers.",
    "I have 5 apples and buy 7 more. How many apples do I have?",
)
POLICY = """
default = "all"
[policies.all]
pii-input = "redact"
pii-output = "redact"
input = ["words"]
output = ["words"]
[checks.words]
words = "words.txt"
"""
TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog, and 12 of 30 dogs agreed at 10:30. ",
    "code": (REPOSITORY / "src" / "argosy" / "serve" / "answer" / "core.py").read_text(),
    "umlauts": "Über schöne Grüße aus München freut sich jeder, größer als 3,5 Meter. ",
    "values": "Write to joe@example.com or +49 30 901820; the card is 4111 1111 1111 1111. ",
}


def milliseconds(finder: Finder, text: str, repeats: int) -> list[float]:
    """Processor time of one search, in turns of ten."""
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        for _ in range(10):
            finder.find(text)
        times.append((time.thread_time() - began) * 100)
    return times


@contextmanager
def served(model: str, memory: str, *more: str) -> Iterator[str]:
    """The address of a server."""
    command = [sys.executable, "-m", "argosy", "serve", model, "--memory", memory, "--port", "0", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("serving "):
                yield line.split()[-1]
                return
        raise SystemExit(f"the server of {model} did not start")
    finally:
        process.terminate()
        process.communicate()


def answer(address: str, prompt: str, num_new: int) -> tuple[float, float, str]:
    """Seconds to the first text, seconds of the rest, and the text."""
    url = urlsplit(address)
    body = {
        "messages": [{"role": "user", "content": prompt}], "max_tokens": num_new, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    first, text = 0.0, []
    with connection.getresponse() as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                said = choice["delta"].get("content", "") + choice["delta"].get("reasoning_content", "")
                if said:
                    first = first or time.perf_counter() - began
                    text.append(said)
    connection.close()
    return first, time.perf_counter() - began - first, "".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    num_new, repeats = (64, 2) if options.short else (options.tokens, options.repeats)
    report = Report("guard_cost", state=f"{options.model} in {options.memory}")
    finder = Finder()
    searches = {
        name: milliseconds(finder, (text * (4096 // len(text) + 1))[:4096], repeats)
        for name, text in TEXTS.items()
    }
    firsts, rates, added_ms = [], [], []
    num_equal = num_answers = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "words.txt").write_text("a phrase that nobody says\n")
        (folder / "policy.toml").write_text(POLICY)
        off = stack.enter_context(served(options.model, options.memory))
        on = stack.enter_context(
            served(options.model, options.memory, "--policy", str(folder / "policy.toml"))
        )
        for address in (off, on):
            answer(address, PROMPTS[0], 8)
        for turn in range(repeats):
            for prompt in PROMPTS:
                order = (off, on) if turn % 2 == 0 else (on, off)
                found = {address: answer(address, prompt, num_new) for address in order}
                num_answers += 1
                num_equal += found[off][2] == found[on][2]
                added_ms.append((found[on][0] - found[off][0]) * 1000)
                firsts.append(found[on][0] / found[off][0])
                rates.append(found[off][1] / found[on][1])
    report.correct(f"{num_equal}/{num_answers} answers equal those without a policy")
    report.opening()
    for name, times in searches.items():
        target = "" if name == "values" else f"<= {MOST_MS:g}"
        report.shares(f"{name}: ms for 4 KB", times, target=target)
    report.line(
        "first text", f"{statistics.median(added_ms):+.1f} ms ({min(added_ms):+.1f} to {max(added_ms):+.1f})"
    )
    report.shares("rate with over without", rates, target=f">= {LEAST_RATE}")
    report.shares("first text with over without", firsts)
    return 0 if num_equal == num_answers else 1


if __name__ == "__main__":
    sys.exit(main())
