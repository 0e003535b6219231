"""The cost of an answer or of decode steps: tokens, speed, reads, memory, and where the wall time went.

A request's ledger is the difference of the engine's counters between its start and its end. Requests that run together
share steps, so their hit rates and reads are those of the shared steps. Energy is different: each request pays its own
share (`energy.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from argosy.model.clock import PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Seconds are wall time; bytes are bytes; `parts` sum to `wall_s`.

    `wall_s` begins when a request is queued, `time_to_first_token_s` earlier: when its prompt is built.
    proposed_tokens, confirmed_tokens: counts of drafts; confirmed ones are among `new_tokens`.
    rows, rows_found, rows_late: rows of n-gram tables that tokens needed, those found in memory, and those that were
        not there when their layer needed them.
    won_s: estimated seconds that drafts saved: the recent time of steps without proposals for the same number of
        tokens, less the time of these steps. Below zero if drafts cost time. None: the engine does not speculate.
    energy_j: measured joules of the processors and their memory, without the drive; None: this machine does not
        measure them.
    drive_energy_j: an estimate of the least and the most that the drive used; None if `energy_j` is None.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    new_tokens: int = 0
    proposed_tokens: int = 0
    confirmed_tokens: int = 0
    won_s: float | None = None
    wall_s: float = 0.0
    queue_s: float | None = None  # until its first step; None: it never ran
    time_to_first_token_s: float | None = None
    decode_s: float | None = None  # from the first token to the end
    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    rows: int = 0
    rows_found: int = 0
    rows_late: int = 0
    peak_bytes: int | None = None  # since the process started, without page cache; None: unknown
    energy_j: float | None = None
    drive_energy_j: tuple[float, float] | None = None
    parts: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def total_energy_j(self) -> tuple[float, float] | None:
        """The least and the most energy: the measured part plus the drive's estimate."""
        if self.energy_j is None or self.drive_energy_j is None:
            return None
        low, high = self.drive_energy_j
        return self.energy_j + low, self.energy_j + high

    @property
    def j_per_token(self) -> tuple[float, float] | None:
        """The least and the most energy per token of the answer, its prompt included."""
        if self.total_energy_j is None or not self.new_tokens:
            return None
        low, high = self.total_energy_j
        return low / self.new_tokens, high / self.new_tokens

    @property
    def hit_rate(self) -> float | None:
        """The share of expert look-ups that found the expert in memory, 0 to 1."""
        return self.hits / self.lookups if self.lookups else None

    @property
    def prefill_tok_per_s(self) -> float | None:
        """Prompt tokens computed before the first token of the answer, per second."""
        first = self.time_to_first_token_s
        return (self.prompt_tokens - self.cached_tokens) / first if first else None

    @property
    def decode_tok_per_s(self) -> float | None:
        """Answer tokens after the first, per second."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else None

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "proposed_tokens": self.proposed_tokens,
            "confirmed_tokens": self.confirmed_tokens,
            "won_s": self.won_s,
            "wall_s": self.wall_s,
            "queue_s": self.queue_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "decode_tok_per_s": self.decode_tok_per_s,
            "lookups": self.lookups,
            "hits": self.hits,
            "hit_rate": self.hit_rate,
            "bytes_read": self.bytes_read,
            "rows": self.rows,
            "rows_found": self.rows_found,
            "rows_late": self.rows_late,
            "peak_bytes": self.peak_bytes,
            "energy_j": self.energy_j,
            "drive_energy_j": None if self.drive_energy_j is None else list(self.drive_energy_j),
            "parts": dict(self.parts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSteps:
    """The cost of steps that computed no prompt tokens. `parts` sum to `seconds`.

    context: mean positions per sequence over the steps.
    """

    num_steps: int
    num_tokens: int
    seconds: float
    context: float
    lookups: int
    hits: int
    bytes_read: int
    parts: Mapping[str, float]

    @classmethod
    def between(cls, before: Ledger, after: Ledger, *, num_steps: int, context: float) -> Self:
        """Return the steps between two ledgers of an engine."""
        return cls(
            num_steps=num_steps,
            num_tokens=after.new_tokens - before.new_tokens,
            seconds=after.wall_s - before.wall_s,
            context=context,
            lookups=after.lookups - before.lookups,
            hits=after.hits - before.hits,
            bytes_read=after.bytes_read - before.bytes_read,
            parts={part: seconds - before.parts[part] for part, seconds in after.parts.items()},
        )

    def __add__(self, other: DecodeSteps) -> DecodeSteps:
        num_steps = self.num_steps + other.num_steps
        context = self.context * self.num_steps + other.context * other.num_steps
        return DecodeSteps(
            num_steps=num_steps,
            num_tokens=self.num_tokens + other.num_tokens,
            seconds=self.seconds + other.seconds,
            context=context / num_steps,
            lookups=self.lookups + other.lookups,
            hits=self.hits + other.hits,
            bytes_read=self.bytes_read + other.bytes_read,
            parts={part: seconds + other.parts[part] for part, seconds in self.parts.items()},
        )
