"""A simulated server against queues whose waiting times are known, and laws that hold for every run."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.errors import UsageError
from argosy.forecast.simulation import (
    SimulatedServer,
    Target,
    parse_target,
    predict_traffic,
    requests_per_s,
    servers_needed,
    simulate,
)
from argosy.forecast.step_times import StepTimes, Table
from argosy.forecast.traffic import TrafficRequest, parse_traffic, requests_of


def constant(seconds: float) -> Table:
    return Table((0.0,), (0.0,), ((seconds,),))


def by_tokens(seconds: float) -> Table:
    """A chunk takes so long for each token."""
    return Table((0.0, 1e9), (0.0,), ((0.0,), (1e9 * seconds,)))


def server(decode: Table, chunk: Table, **more: object) -> SimulatedServer:
    limits = {
        "chunk_tokens": 10**9, "max_sequences": 1, "max_waiting": None, "context_tokens": 10**10, "block_tokens": 16,
    }  # fmt: skip
    return SimulatedServer(step_times=StepTimes(decode, chunk), **{**limits, **more})  # type: ignore[arg-type]


def random_requests(rate: float, count: int, prompt: object = 1, answer: object = 1) -> list[TrafficRequest]:
    """Poisson arrivals; lengths are a number, or drawn by a function of the generator and a count."""
    random = np.random.default_rng(7)
    times = np.cumsum(random.exponential(1 / rate, count)).tolist()
    lengths = [(one(random, count) if callable(one) else [one] * count) for one in (prompt, answer)]
    return [TrafficRequest(at, int(p), int(a)) for at, p, a in zip(times, *lengths, strict=True)]


REALISTIC = server(
    Table((1.0, 4.0, 16.0), (0.0, 4000.0), ((0.02, 0.03), (0.03, 0.06), (0.06, 0.15))),
    Table((1.0, 512.0, 528.0), (0.0, 4000.0), ((0.02, 0.03), (1.0, 1.2), (1.02, 1.24))),
    chunk_tokens=512, max_sequences=16, max_waiting=64, context_tokens=8192,
)  # fmt: skip


# ── queues that are known ───────────────────────────────────────────────────────────────────────────────────────────


NUM = 30_000


def exponential(random: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    return 1 + random.exponential(1e5, count)


each_load = pytest.mark.parametrize("load", [0.3, pytest.param(0.6, marks=pytest.mark.full), 0.85])


@each_load
def test_with_one_place_and_equal_requests_the_queue_is_m_d_1(load: float) -> None:
    found = simulate(random_requests(load, NUM), server(constant(1.0), constant(1.0)))
    wait = load / (2 * (1 - load))  # Pollaczek and Khinchine
    assert found.num_waiting == pytest.approx(load * wait, rel=3 * standard_error(load))
    assert found.first_token_s.mean == pytest.approx(1 + wait, rel=3 * standard_error(load))
    assert found.busy == pytest.approx(load, rel=0.02)


@each_load
def test_with_one_place_and_exponential_requests_the_queue_is_m_m_1(load: float) -> None:
    found = simulate(random_requests(load, NUM, prompt=exponential), server(constant(1.0), by_tokens(1e-5)))
    tolerance = 3 * standard_error(load)
    assert found.num_waiting == pytest.approx(load**2 / (1 - load), rel=tolerance)
    # The time until the answer is exponential with rate 1 - load.
    assert found.request_s.p50 == pytest.approx(math.log(2) / (1 - load), rel=tolerance)
    assert found.request_s.p90 == pytest.approx(math.log(10) / (1 - load), rel=tolerance)
    assert found.request_s.p99 == pytest.approx(math.log(100) / (1 - load), rel=1.5 * tolerance)


def standard_error(load: float) -> float:
    """Relative standard error of the mean wait of NUM requests, M/M/1 (N. Blomqvist, 1967). M/D/1 varies less."""
    variance = load * (2 + 5 * load - 4 * load**2 + load**3) / (1 - load) ** 4 / NUM
    return math.sqrt(variance) / (load / (1 - load))


@pytest.mark.parametrize("places", [1, 4])
def test_requests_wait_for_the_place_that_is_free_first(places: int) -> None:
    """The recursion of J. Kiefer and J. Wolfowitz, for the same arrivals and lengths."""
    mean, step_s = 100, 0.01
    requests = random_requests(
        0.85 * places, 6000, answer=lambda random, count: random.geometric(1 / mean, count)
    )
    found = simulate(requests, server(constant(step_s), constant(step_s), max_sequences=places))
    free_at, waits = [0.0] * places, []
    for request in requests:
        begin = max(request.at_s, heapq.heappop(free_at))
        waits.append(begin - request.at_s)
        heapq.heappush(free_at, begin + request.answer_tokens * step_s)
    # A request begins with a step, so it waits half a step longer if another one is running.
    assert -1e-6 < found.first_token_s.mean - step_s - np.mean(waits) < step_s
    assert found.num_running == pytest.approx(0.85 * places, rel=0.05)
    assert found.token_s.p50 == pytest.approx(step_s)


def test_two_servers_do_nearly_as_well_as_one_queue_for_both() -> None:
    """Each request to the server with the fewest: between two separate queues and one for both servers."""
    load = 0.8
    found = simulate(
        random_requests(2 * load, NUM, prompt=exponential),
        server(constant(1.0), by_tokens(1e-5)),
        num_servers=2,
    )
    joint, separate = 1 / (1 - load**2), 1 / (1 - load)
    assert joint < found.request_s.mean < joint + 0.2 * (separate - joint)


def test_what_a_server_can_do_is_where_its_queue_begins_to_grow() -> None:
    slots = server(constant(0.01), constant(0.01), max_sequences=5)
    assert requests_per_s([TrafficRequest(0.0, 8, 100)], slots) == pytest.approx(5 / (100 * 0.01), rel=0.02)
    one = server(constant(0.01), constant(0.01))
    assert requests_per_s([TrafficRequest(0.0, 8, 10**6)], one) == pytest.approx(1 / (10**6 * 0.01), rel=0.02)
    source = parse_traffic("prompt=300~2,answer=60~2")
    most = requests_per_s(requests_of(source, 1.0, count=2000), REALISTIC)
    queues = [
        simulate(
            requests_of(source, share * most, count=2000), replace(REALISTIC, max_waiting=None)
        ).num_waiting
        for share in (0.9, 1.2)
    ]
    assert queues[0] < 10
    assert queues[1] > 100


# ── laws ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=60)
@given(
    rate=st.floats(0.2, 8.0),
    prompt=st.integers(1, 900),
    answer=st.integers(1, 90),
    places=st.integers(1, 20),
    chunk=st.integers(16, 600),
    context=st.integers(1000, 5000),
    servers=st.integers(1, 3),
)
def test_littles_law_and_conservation_of_tokens(
    rate: float, prompt: int, answer: int, places: int, chunk: int, context: int, servers: int
) -> None:
    requests = requests_of(parse_traffic(f"prompt={prompt}~1.5,answer={answer}~2"), rate, count=150)
    requests = tuple(one for one in requests if one.prompt_tokens < context)
    limits = {"max_sequences": places, "chunk_tokens": chunk, "context_tokens": context, "max_waiting": None}
    found = simulate(requests, replace(REALISTIC, **limits), num_servers=servers)  # type: ignore[arg-type]

    in_system = (found.num_running + found.num_waiting) * found.seconds
    assert in_system == pytest.approx(found.request_s.mean * len(requests))
    wanted = sum(min(one.answer_tokens, context - one.prompt_tokens) for one in requests)
    assert found.tokens_per_s * found.seconds == pytest.approx(wanted)
    assert found.num_running < places * servers * (1 + 1e-9)
    assert 0 < found.busy < 1 + 1e-9
    assert found.num_refused == 0


def test_the_same_requests_have_the_same_outcome() -> None:
    requests = requests_of(parse_traffic("prompt=300~2,answer=60~2"), 1.0, count=500)
    assert simulate(requests, REALISTIC, num_servers=2) == simulate(requests, REALISTIC, num_servers=2)


def test_a_server_refuses_what_exceeds_its_places_and_its_queue() -> None:
    at_once = [TrafficRequest(0.0, 8, 4)] * 10
    found = simulate(at_once, server(constant(1.0), constant(1.0), max_sequences=2, max_waiting=3))
    assert found.num_refused == 5
    assert found.tokens_per_s * found.seconds == pytest.approx(5 * 4)
    # One that comes before the first answers end is refused; one that comes after them is not.
    late = [*at_once[:5], TrafficRequest(3.5, 8, 4), TrafficRequest(4.5, 8, 4)]
    assert (
        simulate(late, server(constant(1.0), constant(1.0), max_sequences=2, max_waiting=3)).num_refused == 1
    )


def test_an_answer_ends_with_the_context() -> None:
    found = simulate([TrafficRequest(0.0, 30, 100)], server(constant(1.0), constant(1.0), context_tokens=40))
    assert found.seconds == 10


def test_prompts_get_half_of_the_time_while_others_decode() -> None:
    """A long prompt beside an answer: each chunk of 4 s is paid back in steps of 1 s."""
    slow_chunks = server(constant(1.0), constant(4.0), chunk_tokens=10, max_sequences=2)
    requests = [TrafficRequest(0.0, 10, 100), TrafficRequest(4.5, 40, 1)]
    # First token at 4, a decode step to 5; then four chunks of 4 s, each but the last followed by three steps of 1 s.
    found = simulate(requests, slow_chunks)
    assert found.first_token_s.p99 == 5 + 4 * 4 + 3 * 3 - 4.5


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_fewest_servers_meet_a_target_and_one_less_does_not() -> None:
    source = parse_traffic("prompt=300~2,answer=60~2")
    requests = requests_of(source, 3.0, count=1000)
    target = Target("first-token", 5.0)
    found = servers_needed(requests, REALISTIC, target)
    assert found is not None
    assert found.num_servers > 1
    assert found.first_token_s.p99 <= 5.0
    fewer = simulate(requests, REALISTIC, num_servers=found.num_servers - 1)
    assert not target.is_met(fewer)


def test_a_target_below_what_a_request_takes_alone_is_never_met() -> None:
    requests = requests_of(parse_traffic("prompt=300,answer=60"), 1.0, count=100)
    assert servers_needed(requests, REALISTIC, Target("request", 0.5)) is None


def test_a_target_is_not_met_by_refusing() -> None:
    requests = [TrafficRequest(0.0, 8, 4)] * 10
    few = server(constant(1.0), constant(1.0), max_sequences=2, max_waiting=0)
    assert not Target("request", 100.0).is_met(simulate(requests, few))
    needed = servers_needed(requests, few, Target("request", 100.0))
    assert needed is not None
    assert needed.num_servers == 5


@pytest.mark.parametrize(
    ("text", "what", "seconds"),
    [
        ("first-token=2s", "first-token", 2.0),
        ("token=200ms", "token", 0.2),
        ("request=1.5min", "request", 90.0),
    ],
)
def test_targets_have_a_unit(text: str, what: str, seconds: float) -> None:
    assert parse_target(text) == (what, pytest.approx(seconds))


@pytest.mark.parametrize(
    "text", ["first-token=2", "2s", "first-token=0s", "first-token=-1s", "token=nans", "ttft=2s", ""]
)
def test_targets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--target takes"):
        parse_target(text)


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def slower(factor: float) -> SimulatedServer:
    tables = (REALISTIC.step_times._decode, REALISTIC.step_times._chunk)
    scaled = [
        replace(one, values=tuple(tuple(v * factor for v in row) for row in one.values)) for one in tables
    ]
    return replace(REALISTIC, step_times=StepTimes(*scaled))


def test_a_prediction_says_which_ends_of_the_range_keep_up() -> None:
    source = parse_traffic("prompt=300~2,answer=60~2")
    servers = slower(0.7), REALISTIC, slower(1.5)
    most = requests_per_s(requests_of(source, 1.0, count=2000), REALISTIC)
    rate = 0.9 * most
    found = predict_traffic(requests_of(source, rate, count=2000), servers, rate_per_s=rate, target=None)
    assert [found.keeps_up(case) for case in found.cases] == [True, True, False]
    assert found.fast.capacity == pytest.approx(found.likely.capacity / 0.7, rel=0.01)
    assert found.slow.outcome.num_refused > 0
    assert found.fast.outcome.request_s.p99 < found.likely.outcome.request_s.p99


def test_prompts_longer_than_the_context_are_counted_and_not_simulated() -> None:
    requests = [TrafficRequest(0.0, 9000, 4), TrafficRequest(1.0, 8, 4), TrafficRequest(2.0, 8192, 4)]
    found = predict_traffic(requests, (REALISTIC,) * 3, rate_per_s=None, target=None)
    assert found.num_too_long == 2
    assert found.likely.outcome.num_requests == 1
    with pytest.raises(UsageError, match="the shortest prompt has 9000 tokens, and the context is 8192"):
        predict_traffic(requests[:1], (REALISTIC,) * 3, rate_per_s=None, target=None)


def test_requests_that_come_at_once_have_no_rate_and_are_still_answered() -> None:
    found = predict_traffic(
        [TrafficRequest(0.0, 8, 4)] * 20, (REALISTIC,) * 3, rate_per_s=None, target=Target("request", 60.0)
    )
    assert found.likely.needed is not None
    assert found.likely.needed.num_servers == 1


@pytest.mark.full
def test_ten_thousand_requests_take_seconds() -> None:
    requests = requests_of(parse_traffic("prompt=300~2,answer=200~2"), 0.3, count=10_000)
    began = time.process_time()
    simulate(requests, REALISTIC)
    assert time.process_time() - began < 5  # about 1


def test_huge_requests_are_simulated_only_as_far_as_they_take_seconds() -> None:
    requests = [TrafficRequest(float(number), 8000, 10_000_000) for number in range(1000)]
    found = predict_traffic(requests, (REALISTIC,) * 3, rate_per_s=None, target=None)
    assert found.likely.outcome.num_requests == 1
