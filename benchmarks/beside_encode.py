"""Does an answer wait when a picture is encoded beside it? Times of a text stream, with and without (A B A B).

    python benchmarks/beside_encode.py [--memory 8GiB] [--rounds 4] [--texts 40] [--short]

A model with the vision tower of Qwen3-Omni in its real size (random weights, bf16). One text is answered all the time.
Others come at random moments, each for its first token only: that time, and the gaps between the tokens of the long
answer, are measured while there is nothing else (A), and while pictures are encoded one after another (B). What counts
is the 99th percentile of the first token's time: B's may exceed A's by at most one step, the median gap of A or the
least that is encoded between two steps. Both sides answer the same texts with the same tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from argosy import Engine, SamplingParams
from argosy.config import format_bytes
from argosy.engine.loop import AnswerEnd, AnswerToken, EngineLoop, Event
from argosy.engine.media.prompt_media import PromptMedia
from argosy.engine.scheduler import MAKING_S
from argosy.media.parts import Image
from argosy.prompt.prompt import Prompt
from common import Report, alternate
from make_checkpoint import GEOMETRIES, make_model, raw_config
from random_weights import DOCUMENT_TOKENS

TEXT_TOKENS = 24
ALONE, BESIDE = "text alone", "beside an encode"


class Answer:
    """An answer in progress: when its tokens came."""

    def __init__(self, loop: EngineLoop, prompt: Any, num_new: int) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.done = threading.Event()
        self.began = time.perf_counter()
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        self._loop, self._request = loop, loop.submit(prompt, params, self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, AnswerToken):
            self.times.append(time.perf_counter())
            self.tokens.append(event.event.token_id)
        elif isinstance(event, AnswerEnd):
            self.done.set()

    def end(self) -> None:
        self._loop.cancel(self._request)
        self.done.wait()


def document(engine: Engine, number: int) -> list[int]:
    first = number * DOCUMENT_TOKENS % (engine.config.vocab_size - DOCUMENT_TOKENS)
    return list(range(first, first + TEXT_TOKENS))


class Looker:
    """Has pictures encoded, one after another, each a new one, until it is told to stop."""

    def __init__(self, engine: Engine, loop: EngineLoop, seed: int) -> None:
        self._engine, self._loop = engine, loop
        self._rng = np.random.default_rng(seed)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        media = self._engine.media
        assert isinstance(media, PromptMedia)
        while not self._is_stopping:
            picture = Image(self._rng.integers(0, 256, (1024, 1024, 3), np.uint8))
            prompt = Prompt.of([5, 6], *media.segments(media.read(picture), ""), [7, 8])
            answer = Answer(self._loop, prompt, 1)
            while not answer.done.wait(0.02):
                if self._is_stopping:
                    answer.end()

    def stop(self) -> None:
        self._is_stopping = True
        self._thread.join()


def measure(
    engine: Engine, num_texts: int, seed: int, *, beside: bool, said: dict[str, Any]
) -> dict[str, float]:
    """First tokens and gaps of one round, in milliseconds; `said` collects all of them and the tokens."""
    rng = random.Random(seed)
    firsts: list[float] = []
    with EngineLoop(engine) as loop:
        looker = Looker(engine, loop, seed) if beside else None
        talker = Answer(loop, document(engine, 0), DOCUMENT_TOKENS - TEXT_TOKENS - 8)
        gaps: list[float] = []

        def note_gaps() -> None:
            gaps.extend(1e3 * (after - before) for before, after in pairwise(talker.times))

        while len(talker.times) < 8 or (looker is not None and not engine.media._encoders._open):  # type: ignore[union-attr]
            time.sleep(0.01)
        for number in range(num_texts):
            if talker.done.is_set():
                note_gaps()
                talker = Answer(loop, document(engine, 0), DOCUMENT_TOKENS - TEXT_TOKENS - 8)
            time.sleep(rng.uniform(0.05, 0.3))
            text = Answer(loop, document(engine, 1 + seed * num_texts + number), 1)
            text.done.wait()
            firsts.append(1e3 * (text.times[0] - text.began))
            said["tokens"].append(text.tokens[0])
        talker.end()
        note_gaps()
        if looker is not None:
            looker.stop()
    said["firsts"] += firsts
    said["gaps"] += gaps
    return {
        "first p50": percentile(firsts, 50),
        "first p99": percentile(firsts, 99),
        "gap p50": percentile(gaps, 50),
    }


def percentile(values: list[float], share: int) -> float:
    return float(np.percentile(values, share))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", default="8GiB", help="by default all experts are in memory")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--texts", type=int, default=40, help="in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="keep the checkpoint here for the next run")
    parser.add_argument("--short", action="store_true", help="one round of eight texts")
    options = parser.parse_args()
    if options.short:
        options.rounds, options.texts = 1, 8
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(
            (options.models or Path(scratch)) / "omni", raw_config(**GEOMETRIES["omni"]), routing="recorded"
        )
        settings: dict[str, Any] = {"memory": options.memory, "threads": options.threads, "context": 8192}
        with Engine.open(model, prefix_reuse=False, **settings) as engine:
            return compare(engine, options)


def compare(engine: Engine, options: argparse.Namespace) -> int:
    said: dict[str, dict[str, Any]] = {
        name: {"tokens": [], "firsts": [], "gaps": []} for name in (ALONE, BESIDE)
    }
    rounds = dict.fromkeys(said, 0)

    def run(name: str) -> dict[str, float]:
        rounds[name] += 1
        return measure(engine, options.texts, rounds[name], beside=name == BESIDE, said=said[name])

    samples = alternate({name: (lambda name=name: run(name)) for name in said}, options.rounds)
    report = Report("beside_encode", state=f"{format_bytes(engine.plan.budget_bytes)}, experts warm")
    equal = said[ALONE]["tokens"] == said[BESIDE]["tokens"]
    report.correct(f"{len(said[ALONE]['tokens'])} first tokens {'equal' if equal else 'DIFFER'}")
    report.opening()
    for name, all_samples in samples.items():
        for key in ("first p50", "first p99", "gap p50"):
            report.figure(f"{name}: {key}", "ms", all_samples, key)
        report.line("gaps", f"p99 {percentile(said[name]['gaps'], 99):.0f} ms")
    step_ms = max(1e3 * MAKING_S, statistics.median(said[ALONE]["gaps"]))
    growth_ms = percentile(said[BESIDE]["firsts"], 99) - percentile(said[ALONE]["firsts"], 99)
    label = f"growth of first p99 ({growth_ms:.0f} ms) / step ({step_ms:.0f} ms)"
    report.ratio(label, growth_ms, step_ms, target="<= 1.00")
    report.neighbours([one for each in samples.values() for one in each])
    return 0 if equal and growth_ms <= step_ms else 1


if __name__ == "__main__":
    sys.exit(main())
