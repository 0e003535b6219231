"""Send many requests of all kinds through several engines in turn, and cancel most of them at random times.

    python -m tests.engine.mixed_requests [--requests N] [--module _native.so]

There is one engine for each kind of layer, and one for a quantised pack. Each has several threads and readers, a small
expert cache, look-ahead, and sequences that wait and are preempted, while another thread reads its facts. At the end
nothing is left in the engine, and it still answers as a fresh one does. Under ThreadSanitizer (`make test-sanitize`)
this shows that the native module has no data race.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.models.references import REFERENCES
from tests.native.other_build import open_module

if TYPE_CHECKING:
    from argosy.engine.loop import EngineLoop, Request

MODELS = (
    "qwen3_moe_plain", "qwen3_next_plain", "deepseek_v3_plain", "mixtral_window_top1", "deepseek_v4_plain",
    "glm5_next_chosen_pools", "qwen4_exp_text_plain",
)  # fmt: skip
MOST_OPEN = 6
PATIENCE_S = 300.0


class Heard:
    """Count the answers of a request that have ended."""

    def __init__(self, num_answers: int) -> None:
        self._left = num_answers
        self._ended = threading.Event()

    def __call__(self, event: Any) -> None:
        from argosy.engine.loop import AnswerEnd

        if isinstance(event, AnswerEnd):
            self._left -= 1
            if not self._left:
                self._ended.set()

    def wait(self) -> None:
        assert self._ended.wait(PATIENCE_S), "an answer has no end"


def send(loop: EngineLoop, rng: random.Random, prompt: list[int]) -> tuple[Request, Heard]:
    from argosy import SamplingParams

    num_answers = rng.choice([1, 1, 1, 2])
    params = SamplingParams(
        max_tokens=rng.randrange(1, 24),
        temperature=rng.choice([0.0, 1.0]),
        logprobs=rng.choice([None, 2]),
        ignore_eos=True,
    )
    heard = Heard(num_answers)
    own = prompt[: rng.randrange(1, len(prompt) + 1)] + [rng.randrange(3)] * rng.randrange(3)
    request = loop.submit(own, params, heard, num_answers=num_answers, tenant=rng.choice("ab"))
    return request, heard


def run(directory: Path, prompt: list[int], num_requests: int, **options: Any) -> int:
    """Run the requests; return how many were cancelled."""
    from argosy import Engine, SamplingParams
    from argosy.engine.loop import EngineLoop

    settings: dict[str, Any] = {"memory": "2GiB", "expert_slots": 4, "chunk_tokens": 8, "context": 64}
    settings |= {"threads": 3, "readers": 3, "max_sequences": 3} | options
    short = SamplingParams(max_tokens=8, ignore_eos=True)
    with Engine.open(directory, **settings) as engine:
        expected = engine.generate(prompt, short).token_ids
    rng, num_cancelled, is_over = random.Random(directory.name), 0, threading.Event()
    with Engine.open(directory, **settings) as engine, EngineLoop(engine) as loop:

        def look() -> None:
            while not is_over.wait(0.002):
                loop.snapshot()

        looker = threading.Thread(target=look)
        looker.start()
        try:
            open_ones: list[tuple[Request, Heard]] = []
            for number in range(num_requests):
                open_ones.append(send(loop, rng, prompt))
                while len(open_ones) > (MOST_OPEN if number + 1 < num_requests else 0):
                    request, heard = open_ones.pop(rng.randrange(len(open_ones)))
                    if rng.random() < 0.7:
                        time.sleep(rng.random() * 0.004)
                        loop.cancel(request)
                        num_cancelled += 1
                    heard.wait()
        finally:
            is_over.set()
            looker.join()
        until = time.monotonic() + PATIENCE_S
        while (facts := engine.facts()).num_running + facts.num_waiting and time.monotonic() < until:
            time.sleep(0.001)
        left = (facts.num_running, facts.num_waiting, facts.kv_blocks_held, facts.states_held)
        assert left == (0, 0, 0, 0), left
        assert engine._started.store.pending() == 0
        assert engine.generate(prompt, short).token_ids == expected
    return num_cancelled


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--module", type=Path, help="a build of argosy._native; default: the installed one")
    options = parser.parse_args()
    open_module(options.module)
    from argosy.checkpoint.pack import pack
    from argosy.model.families import open_model

    references = [reference for reference in REFERENCES if reference.name in MODELS]
    num_cancelled, share = 0, options.requests // (len(references) + 2)
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / "q4"
        first = references[0]
        pack(open_model(first.directory), packed, format="q4")
        for reference in references:
            num_cancelled += run(reference.directory, reference.input_ids[:36], share)
            print(f"{reference.name}: {share} requests", flush=True)
        num_cancelled += run(packed, first.input_ids, share, kv_dir=Path(temporary) / "kv")
        rest = options.requests - (len(references) + 1) * share
        num_cancelled += run(packed, first.input_ids, rest, expert_slots=None)
    print(f"{options.requests} requests, {num_cancelled} of them cancelled; nothing is left behind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
