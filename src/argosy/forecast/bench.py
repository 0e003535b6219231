"""Measure how fast a model answers within a budget, for `argosy bench`.

    measure_alone  ->  an engine in a fresh process  ->  short prompts with answers: first token, decode, hit rate
                                                     ->  long prompts: prefill

Each budget gets a fresh process, because the memory plan counts what a process already holds.

Sequences run one at a time, greedily, without prefix reuse. Each kind of prompt runs once before it is timed. A
step is timed from its call until the token id is known. `benchmarks/` uses the same method.

Elsewhere: `verification.py` compares the result with a forecast; `machine/probes.py` measures the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from argosy import errors
from argosy.budget.memory_plan import MemoryPlan
from argosy.config import SamplingParams
from argosy.errors import ArgosyError
from argosy.experts.resident import Progress
from argosy.open.engine import Engine
from argosy.prompt.tokenizer import Tokenizer

CONTEXT_TOKENS = 1024  # unless the command line says otherwise
SHORT_TOKENS, ANSWER_TOKENS, LONG_TOKENS = 16, 64, 512
NUM_PROMPTS = 4  # per kind, including one for warm-up
_FEWEST_NEW, _FEWEST_LONG = 8, 32
_LIMIT_S = 10.0  # for an answer, and for the timed prompts of a kind: no new prompt starts after that
# A prompt token, computed in a batch, takes at most this fraction of a decoded token's compute time.
_BATCHED = 0.25
_SLOW_DRIVE = 1e9  # bytes per second to assume if the drive was not measured

# Real text, because routers choose different experts for random tokens.
_TEXT = """\
The harbour opens at first light. Before the ferries move, the pilots read the wind from the flags on the customs house
and compare it with the forecast that came in the night. Cargo is weighed, listed and stowed: salt, timber, engines in
crates, three grand pianos for a hotel on the far island. "How long will the crossing take?" asks a passenger, and the
mate answers that it depends on the tide, which turns at a quarter past nine, and on how much of the deck is already
full. A ship can carry more than it was built to carry only if somebody decides, every hour, what stays on board and
what is fetched on the next run. In the office a clerk writes the manifest as a table: name, mass in kilograms, port of
origin, price. The sum of the masses must not exceed 4,200 tonnes; if it does, the last crate in goes out first.

def stow(crates, limit):
    total, kept = 0, []
    for crate in sorted(crates, key=lambda crate: crate.priority):
        if total + crate.mass <= limit:
            kept.append(crate)
            total += crate.mass
    return kept

By noon the fog has lifted. The pianos are ashore, nothing is broken, and the orchestra, which had waited since Tuesday,
begins to tune. Some of the music was written for exactly this room, with its low ceiling and its one tall window, and
the first chord shows why: the sound comes back a moment later, softer, as if the building agreed.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The measured speed of one model at one budget; counters cover decode steps."""

    plan: MemoryPlan
    first_token_s: float  # median over prompts of `short_tokens`
    short_tokens: int
    decode_tok_per_s: float
    num_decoded: int
    lookups: int
    hits: int
    bytes_read: int
    prefill_tok_per_s: float  # median over prompts of `long_tokens`
    long_tokens: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups if self.lookups else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.as_dict(),
            "first_token_s": self.first_token_s,
            "first_token_prompt_tokens": self.short_tokens,
            "decode_tok_per_s": self.decode_tok_per_s,
            "num_decoded": self.num_decoded,
            "hit_rate": self.hit_rate,
            "hits": self.hits,
            "lookups": self.lookups,
            "bytes_read_per_token": self.bytes_read / self.num_decoded,
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "prefill_prompt_tokens": self.long_tokens,
        }


def prompts(tokenizer: Tokenizer | None, vocab_size: int, num_tokens: int) -> list[list[int]]:
    """Yield prompts that begin at different places in a text; random tokens for a model without a tokenizer."""
    if tokenizer is None:
        random = np.random.default_rng(0)
        found: list[list[int]] = random.integers(0, vocab_size, (NUM_PROMPTS, num_tokens)).tolist()
        return found
    token_ids = tokenizer.encode(_TEXT)
    starts = [len(token_ids) * number // NUM_PROMPTS for number in range(NUM_PROMPTS)]
    return [[token_ids[(at + i) % len(token_ids)] for i in range(num_tokens)] for at in starts]


def measure(
    engine: Engine, *, drive_bytes_per_s: float | None = None, progress: Progress | None = None
) -> Speed:
    """Measure an engine that was opened with `max_sequences=1` and `prefix_reuse=False`.

    Args:
        drive_bytes_per_s: the rate of the drive that holds its experts; long prompts are shortened if reads would
            take too long.

    Raises:
        ArgosyError: an answer could not be finished.
    """
    tell = progress or (lambda what, share: None)
    context = engine.plan.context_tokens
    short_tokens = max(1, min(SHORT_TOKENS, context // 4))
    num_new = max(1, min(ANSWER_TOKENS, context - short_tokens - 1))
    tell("measuring decode", 0.0)
    answers = _answer(engine, short_tokens, num_new)
    long_tokens = _long_tokens(
        engine, answers.computing_s / answers.num_new, drive_bytes_per_s or _SLOW_DRIVE
    )
    tell("measuring prefill", 0.5)
    prefills = _answer(engine, long_tokens, 0)
    return Speed(
        plan=engine.plan,
        first_token_s=median(answers.first_s),
        short_tokens=short_tokens,
        decode_tok_per_s=answers.num_new / answers.seconds,
        num_decoded=answers.num_new,
        lookups=answers.lookups,
        hits=answers.hits,
        bytes_read=answers.bytes_read,
        prefill_tok_per_s=median(long_tokens / seconds for seconds in prefills.first_s),
        long_tokens=long_tokens,
    )


@dataclass(slots=True)
class _Answers:
    """Seconds to the first token of each answer, and totals over the steps that follow."""

    first_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    computing_s: float = 0.0  # excluding waits for the drive
    num_new: int = 0
    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0

    def add(self, engine: Engine, prompt: Sequence[int], num_new: int) -> None:
        """Run one prompt and `num_new` steps after its first token, or fewer on a slow machine."""
        began = time.perf_counter()
        sequence = engine.submit(prompt, SamplingParams(max_tokens=num_new + 1, ignore_eos=True))
        try:
            while not sequence.new_ids and sequence.result is None:
                engine.step()
            self.first_s.append(time.perf_counter() - began)
            before, began = engine.ledger, time.perf_counter()
            while sequence.result is None:
                engine.step()
                self.num_new += 1
                if len(sequence.new_ids) > _FEWEST_NEW and time.perf_counter() - began > _LIMIT_S:
                    break
            self.seconds += (seconds := time.perf_counter() - began)
            after, waiting = engine.ledger, "waiting_for_reads"
            self.computing_s += seconds - (after.parts[waiting] - before.parts[waiting])
            self.lookups += after.lookups - before.lookups
            self.hits += after.hits - before.hits
            self.bytes_read += after.bytes_read - before.bytes_read
        finally:
            engine.cancel(sequence)
        assert sequence.result is not None  # finished or just cancelled
        sequence.result.require()


def _answer(engine: Engine, prompt_tokens: int, num_new: int) -> _Answers:
    """Answer one prompt as a warm-up, then others while time remains, but at least one."""
    first, *others = prompts(engine.tokenizer, engine.config.vocab_size, prompt_tokens)
    _Answers().add(engine, first, num_new)
    timed, began = _Answers(), time.perf_counter()
    for prompt in others:
        timed.add(engine, prompt, num_new)
        if time.perf_counter() - began > _LIMIT_S:
            break
    return timed


def _long_tokens(engine: Engine, computing_s: float, drive_bytes_per_s: float) -> int:
    """The longest prompt that should finish in time if a decoded token computes for `computing_s`."""
    plan, model = engine.plan, engine.config
    missing_bytes = max(0, plan.slots.num_experts - plan.slots.own) * plan.slots.slot_bytes
    num_tokens = max(1, min(LONG_TOKENS, plan.context_tokens // 2))

    def expected_s(num_tokens: int) -> float:
        chosen = min(1.0, num_tokens * model.experts_per_token / max(1, model.num_experts))
        return num_tokens * computing_s * _BATCHED + chosen * missing_bytes / drive_bytes_per_s

    while num_tokens > _FEWEST_LONG and expected_s(num_tokens) > _LIMIT_S:
        num_tokens //= 2
    return num_tokens


# ── in a process of its own ─────────────────────────────────────────────────────────────────────────────────────────


def measure_alone(
    model: str,
    options: dict[str, Any],
    *,
    drive_bytes_per_s: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Open a model in a fresh process and measure it there.

    Args:
        options: for `Engine.open`; each must be a JSON value.
        drive_bytes_per_s: see `measure`.

    Returns:
        `Speed.as_dict`.

    Raises:
        ArgosyError: what `Engine.open` and `measure` raise, or the process ended early.
    """
    job = {"model": model, "options": options, "drive_bytes_per_s": drive_bytes_per_s}
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                told: dict[str, Any] = json.loads(line)
                if "speed" in told:
                    speed: dict[str, Any] = told["speed"]
                    return speed
                if "error" in told:
                    raise getattr(errors, told["error"])(told["message"], hint=told["hint"])
                if progress is not None:
                    progress(told["what"], told["share"])
        except BrokenPipeError:
            pass  # it ended before it read its job
        except BaseException:
            process.kill()
            raise
    raise ArgosyError(f"the process that measures ended with code {process.returncode}")


def _main() -> None:
    """Run the job described on stdin. Progress, the result and errors are lines of JSON on stdout."""
    job = json.loads(sys.stdin.read())

    def tell(**facts: object) -> None:
        print(json.dumps(facts), flush=True)

    def progress(what: str, share: float) -> None:
        tell(what=what, share=share)

    try:
        with Engine.open(
            job["model"], progress=progress, max_sequences=1, prefix_reuse=False, **job["options"]
        ) as engine:
            speed = measure(engine, drive_bytes_per_s=job["drive_bytes_per_s"], progress=progress)
            tell(speed=speed.as_dict())
    except ArgosyError as error:
        tell(error=type(error).__name__, message=error.message, hint=error.hint)


if __name__ == "__main__":
    try:
        _main()
    except KeyboardInterrupt:  # the parent reports it
        sys.exit(130)
