"""A simulated server composes its steps as the engine's scheduler does: same requests, same times, to the last step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example
from hypothesis import strategies as st

from argosy.engine.sequence import Sequence as EngineSequence
from argosy.forecast.simulation import SimulatedServer, Times, simulate
from argosy.forecast.step_times import StepTimes, Table
from argosy.forecast.traffic import TrafficRequest
from tests.engine.scheduling import BLOCK_TOKENS, Rig
from tests.helpers.examples import given_few

# Seconds that are no multiples of each other, so that no two things happen at once by rounding.
STEPS = StepTimes(
    Table((1.0, 4.0), (0.0, 500.0), ((0.0213, 0.0417), (0.0371, 0.1013))),
    Table((1.0, 64.0), (0.0, 500.0), ((0.0193, 0.0291), (0.3137, 0.5179))),
)


def scheduled(
    requests: Sequence[TrafficRequest], server: SimulatedServer
) -> tuple[list[float], list[float], int]:
    """Run requests through the scheduler on a clock of the test: seconds to first tokens and ends, and preemptions."""
    now = 0.0
    rig = Rig(
        num_blocks=server.context_tokens // BLOCK_TOKENS,
        chunk_tokens=server.chunk_tokens,
        max_sequences=server.max_sequences,
        clock=lambda: now,
    )
    first: dict[EngineSequence, float] = {}
    end: dict[EngineSequence, float] = {}
    asked: dict[EngineSequence, TrafficRequest] = {}
    waiting = list(requests)
    while waiting or rig.scheduler.has_work:
        if not rig.scheduler.has_work:
            now = max(now, waiting[0].at_s)
        while waiting and waiting[0].at_s <= now:
            request = waiting.pop(0)
            room = server.context_tokens - request.prompt_tokens
            one = rig.sequence(request.prompt_tokens, min(request.answer_tokens, room))
            asked[one] = request
            rig.add(one)
        step = rig.scheduler.next_step()
        assert step is not None
        now += seconds_of(step.step.is_decode.tolist(), step.step.order.tolist(), server.step_times)
        rig.scheduler.commit(step)
        for one in step.ready:
            one.new_ids.append(7)
            first.setdefault(one, now)
            if len(one.new_ids) == one.max_new_tokens:
                end[one] = now
                rig.end(one)
    return (
        [first[one] - asked[one].at_s for one in rig.sequences],
        [end[one] - asked[one].at_s for one in rig.sequences],
        rig.scheduler.num_preempted,
    )


def seconds_of(is_decode: list[bool], order: list[int], times: StepTimes) -> float:
    seen = [at + 1 for at, decodes in zip(order, is_decode, strict=True) if decodes]
    of_prompts = [at + 1 for at, decodes in zip(order, is_decode, strict=True) if not decodes]
    context = sum(seen) / len(seen) if seen else 0.0
    if not of_prompts:
        return times.decode_s(len(seen), context)
    return times.mixed_s(len(seen), context, len(of_prompts), sum(of_prompts) / len(of_prompts))


REQUESTS = st.lists(
    st.tuples(st.floats(0.0, 2.0), st.integers(1, 150), st.integers(1, 80)), min_size=1, max_size=12
)


@given_few(
    lengths=REQUESTS,
    chunk=st.integers(3, 64),
    places=st.integers(1, 5),
    num_blocks=st.integers(40, 120),
    few=30,
    many=150,
)
@example([(0.0, 100, 60), (0.1, 100, 60), (0.1, 100, 60)], 16, 4, 60).via("two are preempted")
@example([(0.0, 3, 80), (0.5, 150, 5)], 16, 2, 80).via("a prompt takes turns with an answer")
def test_requests_have_the_times_that_the_scheduler_gives_them(
    lengths: list[tuple[float, int, int]], chunk: int, places: int, num_blocks: int
) -> None:
    at_s, requests = 0.0, []
    for gap, prompt, answer in lengths:
        requests.append(TrafficRequest(at_s := at_s + gap, prompt, answer))
    server = SimulatedServer(
        step_times=STEPS, chunk_tokens=chunk, max_sequences=places, max_waiting=None,
        context_tokens=num_blocks * BLOCK_TOKENS, block_tokens=BLOCK_TOKENS,
    )  # fmt: skip
    first_s, request_s, num_preempted = scheduled(requests, server)
    found = simulate(requests, server)

    assert found.first_token_s == pytest.approx(Times.of(first_s))
    assert found.request_s == pytest.approx(Times.of(request_s))
    assert found.num_preempted == num_preempted
