"""The progress of requests, and why they wait: counts, rates and times, never text.

A step can take minutes, so reading the progress never waits for one: within a step, progress follows from the layers
that have run. Any thread may call `progress_of`; a number may be one step old.

Elsewhere: `loop.py` reports the progress of every request; the server's log, `/v1/engine/state` and terminals show it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argosy.engine.scheduler import Scheduler
    from argosy.engine.sequence import Sequence, WaitReason
    from argosy.engine.start import Started
    from argosy.engine.steps import Scheduled


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProgress:
    """One prompt and its answers.

    name: the request's id.
    prompt_done: tokens of the prompt that are computed or came from the prefix cache.
    answer_tokens: the tokens of all of its answers.
    tok_per_s: its mean rate, of the prompt until the first token, and of its answers after that; None: not known yet.
    seconds: since it first ran.
    seconds_left: until its first token, at this rate; None: not known yet, or the prompt is done.
    """

    name: str
    prompt_tokens: int
    prompt_done: int
    answer_tokens: int
    tok_per_s: float | None
    seconds: float
    seconds_left: float | None

    @property
    def is_reading(self) -> bool:
        """Whether the prompt is not done."""
        return self.prompt_done < self.prompt_tokens


MOST_WAITS = 100  # of one model that are reported one by one
_REASONS = {
    "turn": "waits for its turn", "memory": "waits for memory", "model": "waits for the model to load",
    "room": "waits for the memory of other models", "prompt": "waits for the same prompt of another request",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestWait:
    """A request that has not run yet.

    ahead: earlier requests of the same model that also wait; a request of another tenant may still overtake.
    seconds: how long it has waited.
    share_done: the finished share of the thing it waits for; None: unknown.
    """

    name: str
    why: WaitReason
    ahead: int
    seconds: float
    share_done: float | None = None


@dataclass(frozen=True, slots=True)
class RunningStep:
    """The running step.

    share_done: the share of its layers that have run.
    """

    scheduled: Scheduled
    share_done: float

    @property
    def prompt_tokens_done(self) -> float:
        """The prompt tokens that this step has computed, over all sequences."""
        step = self.scheduled.step
        return self.share_done * float(step.num_tokens - step.is_decode.sum())

    def num_done(self, sequence: Sequence) -> float:
        """Return the same for one sequence."""
        scheduled = self.scheduled
        if scheduled.counts is None or not self.share_done or sequence not in scheduled.sequences:
            return 0.0
        return self.share_done * scheduled.counts[scheduled.sequences.index(sequence)]


def progress_of(
    name: str, sequences: SequenceOf[Sequence], step: Callable[[], RunningStep | None], *, now: float
) -> RequestProgress | None:
    """Return the progress of one request, or None if it has not run yet.

    Args:
        sequences: its answers, which share the prompt.
        step: returns the running step. It is called last, so that a step that ends meanwhile is not counted twice.
        now: from `perf_counter`.
    """
    started = [one for one in sequences if one.scheduled_at is not None]
    if not started:
        return None
    first = started[0]  # computes the prompt for the others
    total, began = len(first.prompt_ids), first.scheduled_at or now
    answering = [one for one in started if one.first_token_at is not None]
    if answering:
        num_new = sum(len(one.new_ids) for one in answering)
        since = min(one.first_token_at or now for one in answering)
        until = max(one.computed_at for one in answering)
        # The first token of each answer does not count: it ends the prompt.
        return RequestProgress(
            name=name, prompt_tokens=total, prompt_done=total, answer_tokens=num_new,
            tok_per_s=_rate(num_new - len(answering), until - since), seconds=now - began, seconds_left=None,
        )  # fmt: skip
    at, done = first.computed_at, float(first.num_computed)
    running = step() if first.is_prefilling else None
    if running is not None and (more := running.num_done(first)):
        at, done = now, min(float(total), done + more)
    rate = _rate(done - (first.cached_tokens or 0), at - began)
    left = None if rate is None else max(0.0, (total - done) / rate - (now - at))
    return RequestProgress(
        name=name, prompt_tokens=total, prompt_done=min(int(done), total), answer_tokens=0, tok_per_s=rate,
        seconds=now - began, seconds_left=left,
    )  # fmt: skip


class Watch:
    """The progress of one engine's running step and requests. Safe from any thread; nothing here waits for a step.

    Attributes:
        scheduled: the step whose layers run now, or None. The engine sets it.
    """

    def __init__(self, started: Started, scheduler: Scheduler, sequences: list[Sequence]) -> None:
        self._started, self._scheduler, self._sequences = started, scheduler, sequences
        self.scheduled: Scheduled | None = None

    @property
    def running_step(self) -> RunningStep | None:
        """Return the step that runs now, or None."""
        scheduled = self.scheduled
        return None if scheduled is None else RunningStep(scheduled, self._started.model.decoder.share_done)

    @property
    def progressed_at(self) -> float:
        """The monotonic time at which a step was last between two layers; 0: the engine is closed."""
        return self._started.model.decoder.progressed_at if self._started.is_open else 0.0

    def progress(
        self, sequences: SequenceOf[Sequence] | None = None, name: str = ""
    ) -> RequestProgress | None:
        """Return the progress of a request, or None if it has not run yet.

        Args:
            sequences: the request's answers; None: all sequences of an engine with a single request.
        """
        sequences = list(self._sequences) if sequences is None else sequences
        return progress_of(name, sequences, lambda: self.running_step, now=perf_counter())

    def why_waiting(self, sequence: Sequence) -> WaitReason:
        """Return the reason why a sequence that has not run yet is waiting."""
        return self._scheduler.why_waiting(sequence)

    def close(self) -> None:
        """Close: no sequence waits any more."""
        del self._scheduler


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def rough_time(seconds: float) -> str:
    """Format an estimated time for people: `4 min`. More digits would claim too much precision."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60) or 1} min"
    return f"{seconds / 3600:.1f} h"


def prompt_count(done: int, total: int) -> str:
    """Format the tokens of a prompt for people."""
    return f"prompt {done:,} of {total:,} tokens"


def wait_line(why: str, ahead: int, share_done: float | None = None) -> str:
    """Format why a request waits, for people: `waits for its turn, 2 before it`."""
    line = _REASONS.get(why, "waits")
    if share_done is not None:
        line += f" ({100 * share_done:.0f} %)"
    return f"{line}, {ahead:,} before it" if ahead else line


def prompt_line(done: int, total: int, seconds_left: float | None) -> str:
    """Format the progress of a prompt for people: `prompt 9,216 of 22,851 tokens (40 %), about 4 min left`."""
    line = f"{prompt_count(done, total)} ({100 * done // max(1, total)} %)"
    return line if seconds_left is None else f"{line}, about {rough_time(seconds_left)} left"
