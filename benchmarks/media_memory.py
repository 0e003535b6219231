"""Does `--memory` hold with pictures and sounds, and what do experts gain while there are none?

    python benchmarks/media_memory.py [--memory 4400MiB] [--recording 600] [--short]

A model with the vision and audio towers of Qwen3-Omni in their real sizes (random weights, bf16) runs in a memory
cgroup that is limited to the budget, with swap forbidden. Two texts are answered all the time, while there come a
photograph of 12 megapixels, ten such photographs at once, and a long recording. Then a minute passes on the engine's
clock, and the experts have the memory of the towers back. The kernel's own peak counts all processes, page cache and
page tables. The same texts are answered with that memory reserved, for slots and hit rates.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from argosy import Engine, SamplingParams
from argosy.budget.media_memory import IDLE_S
from argosy.config import format_bytes, parse_size
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import ArgosyError
from argosy.machine import resources
from argosy.media.parts import Audio, Image, RequestMedia
from argosy.prompt.prompt import Prompt
from cgroup import NoMemoryCap, run_capped
from common import Report, Sample, drop_page_cache, print_plan, run_inside
from make_checkpoint import GEOMETRIES, make_model, raw_config
from random_weights import DOCUMENT_TOKENS

TEXT_TOKENS = 24  # in each text prompt
RATE = 16_000


def photograph(seed: int, height: int = 3000, width: int = 4000) -> bytes:
    """A JPEG with as much detail as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Pillow.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Pillow.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def recording(seconds: float) -> bytes:
    """A WAV of noise."""
    samples = np.random.default_rng(1).integers(-8000, 8000, round(seconds * RATE)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(samples.tobytes())
    return file.getvalue()


class Run:
    """An engine under two texts that never end, and media that come meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._texts = self._documents()
        self._talkers = [self._talk(), self._talk()]
        self.facts: list[dict[str, Any]] = []
        self.now = 0.0
        assert isinstance(engine.media, PromptMedia)
        engine.media.memory._clock = lambda: self.now

    def _documents(self) -> Iterator[list[int]]:
        number = 0
        while True:
            first = number * DOCUMENT_TOKENS % (self.engine.config.vocab_size - DOCUMENT_TOKENS)
            yield list(range(first, first + TEXT_TOKENS))
            number += 1

    def _talk(self) -> Any:
        params = SamplingParams(max_tokens=DOCUMENT_TOKENS - TEXT_TOKENS - 8, temperature=0, ignore_eos=True)
        return self.engine.submit(next(self._texts), params)

    def step(self) -> None:
        self._talkers = [one if one.result is None else self._talk() for one in self._talkers]
        self.engine.step()

    def phase(self, name: str, parts: list[Image | Audio], num_tokens: int = 0) -> None:
        """Answer the parts, all at once, in prompts of their own; or texts alone for so many tokens."""
        before, refused = self.engine.ledger, []
        answers: list[Any] = []

        def ask(part: Image | Audio) -> None:
            media = self.engine.media
            assert media is not None
            try:
                segments = media.segments(media.read(part), "", RequestMedia())  # type: ignore[union-attr]
                prompt = Prompt.of([5, 6], *segments, [7, 8])
                params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
                answers.append(self.engine.submit(prompt, params))
            except ArgosyError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=ask, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        while (
            any(thread.is_alive() for thread in threads)
            or any(one.result is None for one in answers)
            or (not parts and self.engine.ledger.new_tokens - before.new_tokens < num_tokens)
        ):
            self.step()
        for one in answers:
            one.result.require()
        after = self.engine.ledger
        facts = self.engine.facts()
        lookups, hits = after.lookups - before.lookups, after.hits - before.hits
        self.facts.append(
            {
                "name": name,
                "slots": facts.expert_slots,
                "resident": facts.num_resident,
                "hit_rate": hits / max(1, lookups),
                "answered": len(answers),
                "refused": refused,
                "process": resources.process_footprint().resident_bytes,
            }
        )


def inside(model: Path, options: argparse.Namespace) -> None:
    """Run all phases in this process, and print what was found as JSON."""
    settings: dict[str, Any] = {
        "memory": options.memory,
        "threads": options.threads,
        "context": options.context,
        "image_tokens": options.image_tokens,
        "max_sequences": 16,
        "prefix_reuse": False,
    }
    with Engine.open(model, **settings) as engine:
        plan = engine.plan
        run = Run(engine)
        run.phase("texts, cold", [], options.new)
        run.phase("texts, memory lent", [], options.new)
        run.phase("a photograph", [Image(photograph(1))])
        run.phase("ten photographs", [Image(photograph(2 + i)) for i in range(options.pictures)])
        run.phase(f"a recording of {options.recording:g} s", [Audio(recording(options.recording))])
        run.phase("texts, memory kept", [], options.new)
        run.now += IDLE_S
        run.phase("texts, lent again", [], options.new)
        run.phase("texts, lent again", [], options.new)
        run.phase("a photograph again", [Image(photograph(99))])
        print(
            json.dumps(
                {"plan": plan.lines(), "budget": plan.budget_bytes, "phases": run.facts, **plan.as_dict()}
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", default="4400MiB")
    parser.add_argument("--recording", type=float, default=600, help="seconds")
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--image-tokens", type=int, default=1024, help="most positions of a picture")
    parser.add_argument("--context", type=int, default=12_288)
    parser.add_argument("--new", type=int, default=600, help="tokens of text in each phase")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="keep the checkpoint here for the next run")
    parser.add_argument("--short", action="store_true", help="small pictures, 10 s of sound")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, options)
        return 0
    if options.short:
        options.recording, options.pictures, options.new, options.context = 10, 2, 60, 4096
        options.image_tokens = 64
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(
            (options.models or Path(scratch)) / "omni", raw_config(**GEOMETRIES["omni"]), routing="recorded"
        )
        return measure(model, options)


def measure(model: Path, options: argparse.Namespace) -> int:
    budget = parse_size(options.memory)
    report = Report("media_memory", state="page cache of the model dropped, swap forbidden")
    names = ("memory", "recording", "pictures", "image-tokens", "context", "new", "threads")
    arguments: list[object] = ["--inside", model]
    for name in names:
        arguments += [f"--{name}", getattr(options, name.replace("-", "_"))]
    drop_page_cache(model)
    try:
        with Sample() as sample:
            capped = run_capped(run_inside("media_memory.py", arguments), limit_bytes=budget, timeout_s=3600)
    except NoMemoryCap as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0
    if capped.returncode:
        raise SystemExit(
            f"ended with {capped.returncode}, {capped.num_oom_kills} kills:\n{capped.stderr[-3000:]}"
        )
    found = json.loads(capped.stdout)
    answered = sum(phase["answered"] for phase in found["phases"])
    report.correct(f"{answered} of {options.pictures + 3} pictures and sounds were answered")
    report.opening()
    print_plan(report, found["plan"], budget)
    for phase in found["phases"]:
        report.line(
            phase["name"],
            f"{phase['slots']} slots, {phase['resident']} experts in memory, hit rate {phase['hit_rate']:.3f}, "
            f"process {format_bytes(phase['process'])}"
            + "".join(f"; refused: {why}" for why in phase["refused"]),
        )
    sample.values = {
        "peak": capped.peak_bytes / 2**20,
        "anonymous": capped.peak_anonymous_bytes / 2**20,
        "planned": found["total_bytes"] / 2**20,
    }
    report.figure("peak of all processes, page cache included", "MiB", [sample], "peak")
    report.figure("peak of anonymous memory (sampled)", "MiB", [sample], "anonymous")
    report.figure("planned", "MiB", [sample], "planned")
    report.ratio("peak / budget", capped.peak_bytes, budget, target="<= 1.00")
    by_name = {phase["name"]: phase["hit_rate"] for phase in found["phases"]}
    report.ratio(
        "hit rate of texts, memory lent / kept", by_name["texts, lent again"], by_name["texts, memory kept"]
    )
    report.line(
        "kernel",
        f"cgroup {capped.hierarchy}: {capped.num_oom_kills} kills, {capped.peak_swap_bytes} bytes of swap, "
        f"limit met {capped.num_limit_hits} times",
    )
    report.neighbours([sample])
    is_good = capped.peak_bytes <= budget and not capped.num_oom_kills and not capped.num_limit_hits
    report.line("verdict", "holds" if is_good else "DOES NOT HOLD")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
