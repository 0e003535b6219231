"""The cost of an answer: tokens, speed, reads, memory, and where the wall time went; and that of decode steps.

A request's ledger is the difference of the engine's counters between its start and its end. Requests that run together
share steps, so their hit rates and reads are those of the shared steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from argosy.model.clock import PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Seconds are wall time; bytes are bytes; `parts` sum to `wall_s`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    new_tokens: int = 0
    wall_s: float = 0.0
    time_to_first_token_s: float | None = None
    lookups: int = 0
    hits: int = 0
    bytes_read: int = 0
    peak_bytes: int | None = None  # of the process since it started, without page cache; None: unknown
    parts: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def hit_rate(self) -> float | None:
        """Share of expert look-ups that found the expert in memory, 0 to 1."""
        return self.hits / self.lookups if self.lookups else None

    @property
    def prefill_tok_per_s(self) -> float | None:
        """Prompt tokens computed before the first token of the answer, per second."""
        first = self.time_to_first_token_s
        return (self.prompt_tokens - self.cached_tokens) / first if first else None

    @property
    def decode_tok_per_s(self) -> float | None:
        """Answer tokens after the first, per second."""
        if self.time_to_first_token_s is None or self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(1e-9, self.wall_s - self.time_to_first_token_s)

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "wall_s": self.wall_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "decode_tok_per_s": self.decode_tok_per_s,
            "lookups": self.lookups,
            "hits": self.hits,
            "hit_rate": self.hit_rate,
            "bytes_read": self.bytes_read,
            "peak_bytes": self.peak_bytes,
            "parts": dict(self.parts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSteps:
    """What steps cost that computed no prompt tokens. `parts` sum to `seconds`.

    context: positions of each sequence, mean over the steps.
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
        """The steps between two ledgers of an engine."""
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
