"""Run simulated requests through simulated servers, step by step, and report how long they wait.

    requests + SimulatedServer             ->  simulate        ->  Outcome: p50, p90, p99, queue, refusals
    the same, all requests at once         ->  requests_per_s  ->  what one server can do
    a target                               ->  servers_needed  ->  the fewest servers that meet it
    all of these, slow, likely and fast    ->  predict_traffic ->  Prediction

A server composes its steps as `engine/scheduler.py` does, and `tests/engine/test_simulation.py` compares the two:
every decoding sequence gets a token in every step; prompts share the chunk in order of arrival and get at most
about half of the time while others decode; a sequence starts when there are KV blocks for its prompt; the youngest
is preempted when none are left. Consecutive decode steps that cannot differ are simulated as one, so ten thousand
requests take seconds.

All requests come from one tenant and share no prefix. Clients do not retry refused requests.

Elsewhere: `traffic.py` makes the requests; `step_times.py` gives the time of a step.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from argosy.errors import UsageError
from argosy.forecast.step_times import StepTimes
from argosy.forecast.traffic import TrafficRequest

_WARM_SHARE = 0.1  # fraction of random requests that arrive before the queue reaches its usual length
_SATURATING = 1000  # the fewest requests that show a server's capacity
_NEVER = math.inf
MOST_SERVERS = 100
# The most steps in a simulation; a request takes a few in addition to those of its tokens.
_MOST_COST, _FIXED_COST = 3e5, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServer:
    """The cost of a step, and how much fits into it.

    context_tokens: for all sequences together, in blocks of `block_tokens`.
    max_waiting: the limit of the queue; None: no limit.
    """

    step_times: StepTimes
    chunk_tokens: int
    max_sequences: int
    max_waiting: int | None
    context_tokens: int
    block_tokens: int


class Times(NamedTuple):
    """The mean and the 50th, 90th and 99th percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        """Compute them; NaN if there are no values."""
        if not values:
            return cls(*[math.nan] * 4)
        return cls(
            float(np.mean(values)), *np.percentile(values, (50, 90, 99), method="inverted_cdf").tolist()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What happened to the requests. Seconds count from a request's arrival; refused and warm-up requests are left
    out.

    first_token_s: until its first token.   token_s: mean time between its tokens.   request_s: until its last token.
    num_running, num_waiting: means over time.   busy: fraction of the time in which steps run.   Over all servers.
    """

    num_servers: int
    num_requests: int
    num_refused: int
    num_preempted: int
    first_token_s: Times
    token_s: Times
    request_s: Times
    num_running: float
    num_waiting: float
    busy: float
    tokens_per_s: float
    seconds: float  # simulated


class _Sequence:
    """A request on a server."""

    __slots__ = (
        "at_s",
        "blocks",
        "computed",
        "end_s",
        "first_s",
        "left",
        "num_new",
        "prefill_until",
        "tokens",
    )

    def __init__(self, request: TrafficRequest, most_tokens: int) -> None:
        self.at_s = request.at_s
        self.first_s = self.end_s = _NEVER
        self.tokens = request.prompt_tokens  # so far: the prompt's and the answer's
        self.num_new = min(request.answer_tokens, most_tokens - request.prompt_tokens)
        self.left = self.num_new  # remaining tokens of the answer
        self.computed = 0
        self.prefill_until = 0
        self.blocks = 0


class _Running:
    """A running server. Time passes only in `advance`."""

    def __init__(self, server: SimulatedServer) -> None:
        self.server = server
        self._times = server.step_times
        self._free = -(-server.context_tokens // server.block_tokens)
        self._waiting: deque[_Sequence] = deque()  # in order of arrival
        self._running: list[_Sequence] = []  # likewise
        self._owed_s = 0.0  # time that prompts owe to decoding sequences
        self._decode_s = 0.0  # time of the last step that had no prompts
        self._num_ended = 0  # in the last step
        self.now = 0.0  # the end of the last step
        self.ended: list[_Sequence] = []
        self.num_refused = self.num_preempted = 0
        self.busy_s = 0.0
        self.running_s = self.waiting_s = 0.0  # summed over sequences

    def num_live(self, at_s: float) -> int:
        """The number of unanswered requests at a time up to `now`."""
        return len(self._running) + len(self._waiting) + (self._num_ended if at_s < self.now else 0)

    def submit(self, request: TrafficRequest) -> None:
        """Add a request. The server must have advanced to its arrival, and its context must have room for the
        prompt.
        """
        server, live = self.server, self.num_live(request.at_s)
        if server.max_waiting is not None and live >= server.max_sequences + server.max_waiting:
            self.num_refused += 1
            return
        self.now = max(self.now, request.at_s)
        self.waiting_s += self.now - request.at_s  # until the current step ends
        self._waiting.append(_Sequence(request, server.context_tokens))

    def advance(self, until_s: float) -> None:
        """Run the steps that begin before `until_s`."""
        while self.now < until_s and (self._running or self._waiting):
            self._step(until_s)

    def _step(self, until_s: float) -> None:
        self._start_waiting()
        self._grow()
        decoding = [one for one in self._running if one.computed >= one.prefill_until]
        streams, seen = len(decoding), sum(one.tokens for one in decoding)
        if streams and (streams == len(self._running) or self._owed_s > 0.0):
            self._decode(decoding, seen / streams, until_s, is_owed=streams < len(self._running))
            return
        left, positions = self.server.chunk_tokens, 0.0
        parts = []
        for one in self._running:
            if left and one.computed < one.prefill_until:
                count = min(left, one.prefill_until - one.computed)
                parts.append((one, count))
                positions += count * (one.computed + (count + 1) / 2)
                left -= count
        tokens = self.server.chunk_tokens - left
        seconds = self._times.mixed_s(streams, seen / streams if streams else 0.0, tokens, positions / tokens)
        self._pass(seconds, 1)
        self._owed_s = self._owed_s + max(0.0, seconds - self._decode_s) if streams else 0.0
        for one, count in parts:
            one.computed += count
        for one in decoding:
            one.computed += 1
        self._answer([one for one in self._running if one.computed == one.tokens], 1)

    def _decode(self, decoding: list[_Sequence], context: float, until_s: float, *, is_owed: bool) -> None:
        """Run identical decode steps: only the last may end an answer, and none begins after `until_s`."""
        seconds = self._times.decode_s(len(decoding), context)
        size = self.server.block_tokens
        until_end = min(one.left for one in decoding)
        until_full = min(one.blocks * size - one.tokens for one in decoding) + 1
        count = min(until_end, until_full, self._times.steps_alike(context))
        if (until_s - self.now) < count * seconds:
            count = max(1, math.ceil((until_s - self.now) / seconds))
        if is_owed and self._owed_s < count * seconds:
            count = max(1, math.ceil(self._owed_s / seconds))
        self._pass(seconds, count)
        self._decode_s = seconds
        self._owed_s = max(0.0, self._owed_s - count * seconds)
        for one in decoding:
            one.computed += count
        self._answer(decoding, count)

    def _pass(self, seconds: float, count: int) -> None:
        """Let the time of `count` equal steps pass."""
        total = seconds * count
        self.now += total
        self.busy_s += total
        self.running_s += total * len(self._running)
        self.waiting_s += total * len(self._waiting)
        self._num_ended = 0

    def _answer(self, ready: Sequence[_Sequence], count: int) -> None:
        """Give sequences their next tokens, one per step, and end those that are complete."""
        for one in ready:
            one.tokens += count
            one.left -= count
            one.first_s = min(one.first_s, self.now)
            if not one.left:
                one.end_s = self.now
                self._running.remove(one)
                self._free += one.blocks
                self.ended.append(one)
                self._num_ended += 1

    def _start_waiting(self) -> None:
        size = self.server.block_tokens
        while self._waiting and len(self._running) < self.server.max_sequences:
            one = self._waiting[0]
            needed = -(-one.tokens // size)
            if needed + (len(self._running) + 1 if self._running else 0) > self._free:
                return
            self._waiting.popleft()
            self._free -= needed
            one.blocks, one.computed, one.prefill_until = needed, 0, one.tokens
            self._running.append(one)

    def _grow(self) -> None:
        """Give each decoding sequence a block for its next token; preempt the youngest if none are left."""
        size = self.server.block_tokens
        for one in list(self._running):
            if one.computed < one.prefill_until or one.tokens <= one.blocks * size:
                continue
            while not self._free and one in self._running:
                self._preempt()
            if one in self._running:
                one.blocks += 1
                self._free -= 1

    def _preempt(self) -> None:
        youngest = self._running.pop()
        self._free += youngest.blocks
        youngest.blocks = 0
        self._waiting.appendleft(youngest)
        self.num_preempted += 1


def simulate(
    requests: Sequence[TrafficRequest],
    server: SimulatedServer,
    *,
    num_servers: int = 1,
    warm_share: float = 0.0,
) -> Outcome:
    """Run requests in order of arrival on equal servers.

    Each goes to the server with the fewest requests; ties take turns.

    Args:
        warm_share: the fraction of first requests whose times do not count.
    """
    servers = [_Running(server) for _ in range(num_servers)]
    last = 0
    for request in requests:
        for one in servers:
            one.advance(request.at_s)
        if num_servers > 1:
            last = min(
                range(num_servers),
                key=lambda at: (servers[at].num_live(request.at_s), (at - last - 1) % num_servers),
            )
        servers[last].submit(request)
    for one in servers:
        one.advance(_NEVER)
    return _outcome(requests, servers, warm_share)


def _outcome(requests: Sequence[TrafficRequest], servers: Sequence[_Running], warm_share: float) -> Outcome:
    ended = [one for server in servers for one in server.ended]
    seconds = max((one.end_s for one in ended), default=0.0) - requests[0].at_s
    counted_from_s = requests[int(warm_share * len(requests))].at_s
    counted = [one for one in ended if one.at_s >= counted_from_s]
    several = [one for one in counted if one.num_new > 1]
    return Outcome(
        num_servers=len(servers),
        num_requests=len(requests),
        num_refused=sum(one.num_refused for one in servers),
        num_preempted=sum(one.num_preempted for one in servers),
        first_token_s=Times.of([one.first_s - one.at_s for one in counted]),
        token_s=Times.of([(one.end_s - one.first_s) / (one.num_new - 1) for one in several]),
        request_s=Times.of([one.end_s - one.at_s for one in counted]),
        num_running=sum(one.running_s for one in servers) / seconds,
        num_waiting=sum(one.waiting_s for one in servers) / seconds,
        busy=sum(one.busy_s for one in servers) / seconds / len(servers),
        tokens_per_s=sum(one.num_new for one in ended) / seconds,
        seconds=seconds,
    )


def requests_per_s(requests: Sequence[TrafficRequest], server: SimulatedServer) -> float:
    """How many requests of these lengths a saturated server answers per second.

    If more arrive, the queue grows without bound.
    """
    count = max(_SATURATING, 20 * server.max_sequences)
    mean = sum(_cost(request, server) for request in requests) / len(requests)
    count = max(4 * server.max_sequences, min(count, int(_MOST_COST / mean)))
    running = _Running(replace(server, max_waiting=None))
    for number in range(count):
        running.submit(requests[number % len(requests)]._replace(at_s=0.0))
    running.advance(_NEVER)
    # Between filling up and running empty.
    first, last = max(count // 10, server.max_sequences - 1), min(count - 1, count - count // 10)
    return (last - first) / (running.ended[last].end_s - running.ended[first].end_s)


def _cost(request: TrafficRequest, server: SimulatedServer) -> float:
    """Roughly how many steps a simulation takes for a request."""
    return (
        _FIXED_COST
        + request.prompt_tokens / server.chunk_tokens
        + request.answer_tokens / server.block_tokens
    )


def _affordable(requests: Sequence[TrafficRequest], server: SimulatedServer) -> int:
    """How many of the first requests can be simulated within a few seconds."""
    total = 0.0
    for number, request in enumerate(requests):
        total += _cost(request, server)
        if total > _MOST_COST and number:
            return number
    return len(requests)


# ── a target ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Target(NamedTuple):
    """The limits that 99 of 100 requests must meet."""

    what: Literal["first-token", "token", "request"]
    seconds: float

    def is_met(self, outcome: Outcome) -> bool:
        found = {
            "first-token": outcome.first_token_s, "token": outcome.token_s, "request": outcome.request_s,
        }[self.what]  # fmt: skip
        return not outcome.num_refused and found.p99 <= self.seconds

    def __str__(self) -> str:
        return f"{_TARGETS[self.what]} within {self.seconds:g} s"


_TARGETS = {"first-token": "a first token", "token": "each further token", "request": "a whole answer"}
_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_target(text: str) -> Target:
    """Parse `first-token=2s`, `token=200ms` or `request=1min`.

    Raises:
        UsageError: it has another form.
    """
    found = re.fullmatch(r"(first-token|token|request)=([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|min)", text)
    if found is None or not float(found[2]):
        raise UsageError(
            f"--target takes first-token=2s, token=200ms or request=1min, found '{text[:40]}'",
            hint="99 of 100 requests must meet it",
        )
    return Target(found[1], float(found[2]) * _UNITS[found[3]])  # type: ignore[arg-type]


def servers_needed(
    requests: Sequence[TrafficRequest],
    server: SimulatedServer,
    target: Target,
    *,
    fewest: int = 1,
    warm_share: float = 0.0,
) -> Outcome | None:
    """Simulate the fewest servers that meet a target; None if MOST_SERVERS do not.

    Args:
        fewest: where to start.   warm_share: see `simulate`.
    """

    def attempt(count: int) -> Outcome | None:
        outcome = simulate(requests, server, num_servers=count, warm_share=warm_share)
        return outcome if target.is_met(outcome) else None

    too_few, enough, step, best = fewest - 1, fewest, 1, None
    while enough <= MOST_SERVERS and (best := attempt(enough)) is None:
        too_few, enough, step = enough, enough + step, 2 * step
    if best is None:
        enough = MOST_SERVERS
        if too_few >= MOST_SERVERS or (best := attempt(enough)) is None:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if (found := attempt(middle)) is None:
            too_few = middle
        else:
            enough, best = middle, found
    return best


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Case(NamedTuple):
    """The outcome on one server, and on the number that the target needs, if there is a target.

    capacity: requests per second that one server can handle.
    """

    capacity: float
    outcome: Outcome
    needed: Outcome | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The outcome on fast, likely and slow servers."""

    rate_per_s: float
    is_random: bool  # arrivals are random; otherwise they follow a file
    num_too_long: int  # prompts longer than the context, which are refused and not simulated
    target: Target | None
    fast: Case
    likely: Case
    slow: Case

    @property
    def cases(self) -> tuple[Case, Case, Case]:
        return self.fast, self.likely, self.slow

    def keeps_up(self, case: Case) -> bool:
        """Whether one server keeps up with the requests. If not, times only reflect how long they kept arriving."""
        return self.rate_per_s < case.capacity


def predict_traffic(
    requests: Sequence[TrafficRequest],
    servers: tuple[SimulatedServer, SimulatedServer, SimulatedServer],
    *,
    rate_per_s: float | None,
    target: Target | None,
) -> Prediction:
    """Simulate requests on one server, and find how many servers a target needs.

    Args:
        servers: fast, likely and slow ones.
        rate_per_s: the rate of random arrivals; None: arrivals follow a file.

    Raises:
        UsageError: no prompt fits the context.
    """
    context = servers[0].context_tokens
    fitting = [request for request in requests if request.prompt_tokens < context]
    if not fitting:
        raise UsageError(
            f"the shortest prompt has {min(request.prompt_tokens for request in requests)} tokens, and the context is "
            f"{context}",
            hint="`--context` makes it longer",
        )
    num_too_long = len(requests) - len(fitting)
    fitting = fitting[: _affordable(fitting, servers[0])]
    is_random = rate_per_s is not None
    if rate_per_s is None:
        rate_per_s = (len(fitting) - 1) / max(1e-9, fitting[-1].at_s - fitting[0].at_s)
    warm_share = _WARM_SHARE if is_random else 0.0

    def case(server: SimulatedServer) -> Case:
        capacity = requests_per_s(fitting, server)
        outcome = simulate(fitting, server, warm_share=warm_share)
        needed = None
        if target is not None:
            # With fewer servers, the queue would grow without bound.
            fewest = math.floor(rate_per_s / capacity) + 1 if is_random else 1
            needed = servers_needed(fitting, server, target, fewest=fewest, warm_share=warm_share)
        return Case(capacity, outcome, needed)

    fast, likely, slow = map(case, servers)
    return Prediction(
        rate_per_s=rate_per_s,
        is_random=is_random,
        num_too_long=num_too_long,
        target=target,
        fast=fast,
        likely=likely,
        slow=slow,
    )
