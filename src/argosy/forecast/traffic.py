"""The requests for which a server is planned: their lengths and arrival times.

    prompt=800~2,answer=200       ->  Mix             ┐
    FILE.jsonl, a request a line  ->  RecordedTraffic ┴─> requests_of(..., rate) -> requests, in order of arrival

`800` is a fixed length; `800~2` is lognormal with median 800 and two thirds within a factor of 2 of it. A line of a
file is `{"prompt_tokens": 812, "answer_tokens": 230, "at_s": 3.5}`. Without `at_s`, or if a rate is given, requests
arrive at random, independently of each other (a Poisson process), and lengths are drawn from the file.

Prompt lengths count what must be computed: leave out any prefix that the server has cached.

Elsewhere: `simulation.py` runs them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json

SEED = 0
MOST_REQUESTS = 10_000  # per simulation
MOST_LINES, MOST_LINE_BYTES = 100_000, 1000
MOST_TOKENS = 10_000_000
MOST_RATE = 1e5
_MOST_FACTOR = 20.0
_MOST_SECONDS = 1e11  # limit of `at_s`, far above seconds since 1970
_KEYS = ("prompt_tokens", "answer_tokens", "at_s")
_PART = re.compile(r"(prompt|answer)=([0-9]{1,8})(?:~([0-9]{1,3}(?:\.[0-9]{1,6})?))?")

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]  # of prompts, of answers


class TrafficRequest(NamedTuple):
    """A request's arrival time and token counts."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int


class Length(NamedTuple):
    """A lognormal distribution of lengths; factor 1 makes all lengths equal."""

    median: int
    factor: float = 1.0

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = self.median * np.exp(math.log(self.factor) * random.standard_normal(count))
        tokens: NDArray[np.int64] = np.clip(np.rint(drawn), 1, MOST_TOKENS).astype(np.int64)
        return tokens

    def __str__(self) -> str:
        return f"{self.median}" if self.factor == 1.0 else f"{self.median}~{self.factor:g}"


@dataclass(frozen=True, slots=True)
class Mix:
    """Lengths drawn from two distributions."""

    prompt: Length
    answer: Length

    def draw(self, random: np.random.Generator, count: int) -> Lengths:
        return self.prompt.draw(random, count), self.answer.draw(random, count)

    def __str__(self) -> str:
        return f"prompts of {self.prompt} tokens, answers of {self.answer}"


@dataclass(frozen=True, slots=True)
class RecordedTraffic:
    """Requests listed in a file. Without `has_times`, every `at_s` is 0."""

    name: str
    requests: tuple[TrafficRequest, ...]
    has_times: bool

    def draw(self, random: np.random.Generator, count: int) -> Lengths:
        chosen = random.integers(0, len(self.requests), count)
        lengths = np.array([request[1:] for request in self.requests], np.int64)[chosen]
        return lengths[:, 0], lengths[:, 1]

    def __str__(self) -> str:
        return f"lengths of {len(self.requests)} requests in {self.name}"


def parse_traffic(text: str) -> Mix | RecordedTraffic:
    """Parse `prompt=800~2,answer=200`, or read the file of that name.

    Raises:
        UsageError: the text is neither, or the file is malformed.
    """
    if not text.startswith(("prompt=", "answer=")):
        return read_requests(Path(text))
    lengths = {}
    for part in text.split(","):
        found = _PART.fullmatch(part)
        length = Length(int(found[2]), float(found[3] or 1)) if found else Length(0)
        if found is None or not 1 <= length.median <= MOST_TOKENS or not 1 <= length.factor <= _MOST_FACTOR:
            raise UsageError(
                f"--traffic takes prompt=TOKENS,answer=TOKENS, found '{part[:60]}'",
                hint=f"from 1 to {MOST_TOKENS} tokens; `800~2` spreads them by a factor, from 1 to {_MOST_FACTOR:g}",
            )
        lengths[found[1]] = length
    if len(lengths) != 2 or text.count(",") != 1:
        raise UsageError(
            f"--traffic needs a length of prompts and one of answers, found '{text[:60]}'",
            hint="for example prompt=800,answer=200",
        )
    return Mix(lengths["prompt"], lengths["answer"])


def read_requests(path: Path) -> RecordedTraffic:
    """Read a file of requests, in order of arrival if they have times.

    Raises:
        UsageError: it cannot be read, or a line is wrong; names the line.
    """
    most_bytes = MOST_LINES * MOST_LINE_BYTES
    found: list[tuple[float | None, int, int]] = []
    try:
        if not path.is_file():
            raise UsageError(
                f"--traffic: there is no file '{path}'", hint="or describe lengths: prompt=800,answer=200"
            )
        if path.stat().st_size > most_bytes:
            raise UsageError(f"{path.name} has more than {most_bytes} bytes, which is the limit")
        with path.open("rb") as file:
            for number in range(1, MOST_LINES + 2):
                if not (line := file.readline(MOST_LINE_BYTES + 1)):
                    break
                if number > MOST_LINES:
                    raise UsageError(f"{path.name} has more than {MOST_LINES} lines, which is the limit")
                if line.strip():
                    found.append(_checked(line, f"{path.name}, line {number}"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    times = [at_s for at_s, _, _ in found if at_s is not None]
    if not found or len(times) not in (0, len(found)):
        what = "no requests" if not found else f"{len(times)} requests with `at_s` and others without"
        raise UsageError(
            f"{path.name} has {what}", hint="each line is an object with prompt_tokens and answer_tokens"
        )
    first = min(times, default=0.0)
    requests = [TrafficRequest((at_s or 0.0) - first if times else 0.0, *lengths) for at_s, *lengths in found]
    return RecordedTraffic(path.name, tuple(sorted(requests, key=lambda request: request.at_s)), bool(times))


def _checked(line: bytes, where: str) -> tuple[float | None, int, int]:
    """Check one line of a file."""
    if len(line) > MOST_LINE_BYTES:
        raise UsageError(f"{where}: it has more than {MOST_LINE_BYTES} bytes, which is the limit")
    try:
        value = parse_json(line)
    except JsonError as error:
        raise UsageError(f"{where}: {error}") from None
    if not isinstance(value, dict) or not value.keys() <= set(_KEYS):
        raise UsageError(f"{where}: it is not an object with no other keys than {', '.join(_KEYS)}")
    counts = [value.get(key) for key in _KEYS[:2]]
    for key, count in zip(_KEYS, counts, strict=False):
        if type(count) is not int or not 1 <= count <= MOST_TOKENS:
            raise UsageError(
                f"{where}: {key} must be a whole number from 1 to {MOST_TOKENS}, found {_shown(count)}"
            )
    at_s = value.get("at_s")
    if "at_s" in value and not (type(at_s) in (int, float) and 0 <= at_s <= _MOST_SECONDS):  # type: ignore[operator]
        raise UsageError(f"{where}: at_s must be seconds from 0 to {_MOST_SECONDS:g}, found {_shown(at_s)}")
    return at_s, *counts  # type: ignore[return-value]


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]


def require_rate(rate_per_s: float) -> float:
    """Check a number of requests per second.

    Raises:
        UsageError: it is out of range.
    """
    if not 1e-6 <= rate_per_s <= MOST_RATE:  # also rejects NaN
        raise UsageError(
            f"--rate takes requests per second, from 0.000001 to {MOST_RATE:g}, found {rate_per_s:g}",
            hint="0.5 is one request every two seconds",
        )
    return rate_per_s


def requests_of(
    source: Mix | RecordedTraffic, rate_per_s: float | None, *, count: int
) -> tuple[TrafficRequest, ...]:
    """Yield requests in order of arrival: at random if there is a rate, otherwise at the file's times.

    Args:
        count: the number of random requests, or the most to take from a file.

    Raises:
        UsageError: there are neither a rate nor times.
    """
    if rate_per_s is None:
        if not isinstance(source, RecordedTraffic) or not source.has_times:
            raise UsageError(
                "--traffic does not say when requests arrive", hint="`--rate 0.5` is one every two seconds"
            )
        return source.requests[:count]
    random = np.random.default_rng(SEED)
    times = np.cumsum(random.exponential(1.0 / rate_per_s, count))
    prompts, answers = source.draw(random, count)
    return tuple(map(TrafficRequest, times.tolist(), prompts.tolist(), answers.tolist()))
