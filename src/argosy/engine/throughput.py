"""The speed of an engine under a loop: means over the last seconds, updated at the end of each step.

A step counts as if its tokens came evenly while it ran, so a mean is right however long steps take. Of the running
step only prompt tokens are known; other means end where it began.

Elsewhere: `loop.py` takes a sample after each step; `ledger.py` holds the sums.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Literal, NamedTuple

from argosy.config import KV_BLOCK_TOKENS
from argosy.engine.facts import EngineFacts
from argosy.engine.ledger import DecodeSteps, Ledger
from argosy.engine.progress import Watch
from argosy.model.clock import PARTS

RATE_SECONDS = 10.0  # rates are means over this many seconds, or over the last step if that took longer
DECODE_SECONDS = 60.0  # how long decode steps are kept and compared with predictions
_TOGETHER_SECONDS = 5.0  # decode steps within this time are kept as one sum


class Throughput(NamedTuple):
    """Means per second over the last RATE_SECONDS, and the time that steps took.

    prompt_tok_per_s: computed tokens only, not prefix-cache hits.
    parts: seconds by part, of the steps that ended in that time, or of the last step; `other` includes idle time.
    decode: steps without prompt tokens in the last DECODE_SECONDS; None: there were none.
    """

    new_tok_per_s: float
    prompt_tok_per_s: float
    bytes_read_per_s: float
    parts: Mapping[str, float]
    decode: DecodeSteps | None


class ThroughputMeter:
    """Meters the work of an engine over the last minute. One thread notes it, and any thread may read it.

    Args:
        facts: the engine's facts at `now`.
    """

    def __init__(self, facts: EngineFacts, now: float) -> None:
        self._step_began: float | None = None  # while a step runs
        self._work_began: float | None = None  # the first step since the last sample
        self.num_steps = 0
        self._samples = deque([self._sample(facts, now)])  # work is counted between two samples
        self._decodes: deque[tuple[float, DecodeSteps]] = deque()  # when they began, and the time they took

    def begin_step(self, now: float) -> None:
        self.num_steps += 1
        self._step_began = now
        if self._work_began is None:
            self._work_began = now

    def end_step(self) -> None:
        self._step_began = None

    def note(self, facts: EngineFacts, now: float) -> None:
        """Note the facts between two steps."""
        sample = self._sample(facts, now)
        if (steps := self._samples[-1].decode_until(sample)) is not None:
            self._keep_decode(now, steps)
        self._samples.append(sample)
        # One older sample stays: work of the later samples is counted from it.
        while len(self._samples) > 1 and now - self._samples[1].at > RATE_SECONDS:
            self._samples.popleft()

    def read(self, now: float, watch: Watch) -> Throughput:
        """Return the means until now, including the prompt tokens of the running step."""
        running = self._step_began
        samples = list(self._samples)
        window = _Window(samples, now if running is None else running)
        prompt_rate, step = window.mean("prompt_tokens"), watch.running_step
        if running is not None and step is not None and (num_done := step.prompt_tokens_done):
            share = min(1.0, RATE_SECONDS / (now - running)) if now > running else 1.0
            prompt_rate = _Window(samples, now, running).mean("prompt_tokens", share * num_done)
        decodes = [steps for at, steps in list(self._decodes) if now - at <= DECODE_SECONDS]
        return Throughput(
            new_tok_per_s=window.mean("new_tokens"),
            prompt_tok_per_s=prompt_rate,
            bytes_read_per_s=window.mean("bytes_read"),
            parts=window.parts(),
            decode=reduce(add, decodes) if decodes else None,
        )

    def _sample(self, facts: EngineFacts, now: float) -> _Sample:
        context = facts.kv_blocks_held * KV_BLOCK_TOKENS / facts.num_running if facts.num_running else 0.0
        began, self._work_began = self._work_began, None
        return _Sample(
            now, now if began is None else began, facts.totals, facts.tokens_run, self.num_steps, context
        )

    def _keep_decode(self, now: float, steps: DecodeSteps) -> None:
        if self._decodes and now - self._decodes[-1][0] < _TOGETHER_SECONDS:
            begun, earlier = self._decodes[-1]
            self._decodes[-1] = begun, earlier + steps
            return
        self._decodes.append((now, steps))
        while now - self._decodes[0][0] > DECODE_SECONDS:
            self._decodes.popleft()


_Counted = Literal["new_tokens", "prompt_tokens", "bytes_read"]


class _Window:
    """The last RATE_SECONDS before `end`; less, if work began later.

    Args:
        samples: in order of time; the work between two samples counts as even since the later one's `began`.
        running: the start of the step that runs at `end`, or None.
    """

    def __init__(self, samples: SequenceOf[_Sample], end: float, running: float | None = None) -> None:
        self._end = end
        self._begin = end - RATE_SECONDS
        # Each sample with its predecessor.
        self._steps = [(before, one) for before, one in pairwise(samples) if one.at > self._begin]
        began = [one.began for _, one in self._steps] + ([] if running is None else [running])
        self._begin = max(self._begin, min(began, default=end))

    def mean(self, what: _Counted, more: float = 0.0) -> float:
        """Return the mean per second; `more` is the running step's contribution."""
        seconds = self._end - self._begin
        count = more + sum(
            (one.count(what) - before.count(what)) * self._share(one) for before, one in self._steps
        )
        return max(0.0, count) / seconds if seconds > 0 else 0.0

    def _share(self, sample: _Sample) -> float:
        """Return the share of a sample's work that lies in the window."""
        inside = min(sample.at, self._end) - max(sample.began, self._begin)
        return max(0.0, inside) / (sample.at - sample.began) if sample.at > sample.began else 1.0

    def parts(self) -> dict[str, float]:
        """Return seconds by part, of the work that overlaps the window."""
        if not self._steps:
            return dict.fromkeys(PARTS, 0.0)
        (first, one), last = self._steps[0], self._steps[-1][1]
        parts = {part: last.totals.parts[part] - first.totals.parts[part] for part in PARTS}
        parts["other"] = max(0.0, parts["other"] - (one.began - first.at))  # without the idle time before
        return parts


class _Sample(NamedTuple):
    """Totals at one moment, and positions of each running sequence.

    began: when the first step since the last sample began.
    """

    at: float
    began: float
    totals: Ledger
    tokens_run: int
    num_steps: int
    context: float

    def count(self, what: _Counted) -> int:
        if what == "prompt_tokens":  # computed tokens, without those from the prefix cache
            return self.tokens_run - self.totals.new_tokens
        return self.totals.new_tokens if what == "new_tokens" else self.totals.bytes_read

    def decode_until(self, later: _Sample) -> DecodeSteps | None:
        """Return the steps since this sample; None if a step had prompt tokens, or there are no steps."""
        num_new = later.totals.new_tokens - self.totals.new_tokens
        num_steps = later.num_steps - self.num_steps
        if not num_steps or not num_new or later.tokens_run - self.tokens_run != num_new:
            return None
        return DecodeSteps.between(self.totals, later.totals, num_steps=num_steps, context=self.context)
