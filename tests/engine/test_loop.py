"""One thread steps the engine: callers never wait for it, every answer ends with an event, nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, SamplingParams
from argosy.config import KV_BLOCK_TOKENS
from argosy.engine.facts import EngineFacts
from argosy.engine.loop import AnswerEnd, AnswerToken, EngineLoop, Event, LoopFacts, PromptProgress, Request
from argosy.errors import ArgosyError, Overloaded, PromptTooLong
from argosy.model.decoder import Decoder
from tests.models.references import REFERENCES

REFERENCE = next(reference for reference in REFERENCES if reference.name == "qwen3_moe_plain")
DELTA = next(reference for reference in REFERENCES if reference.name == "qwen3_next_plain")
PROMPT = REFERENCE.input_ids
SHORT = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1)
LONG = SamplingParams(max_tokens=None, ignore_eos=True)
PATIENCE_S = 20.0


def open_engine(directory: Path = REFERENCE.directory, **options: Any) -> Engine:
    return Engine.open(
        directory, **{"memory": "2GiB", "threads": 1, "expert_slots": 4, "chunk_tokens": 8} | options
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine() as engine:
        yield engine


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    with EngineLoop(engine) as loop:
        yield loop


class Heard:
    """Events of one request, in order."""

    def __init__(self, num_answers: int = 1) -> None:
        self.events: list[Event] = []
        self._left = num_answers
        self._ended = threading.Event()
        self.on_token: Callable[[], None] = lambda: None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, AnswerToken):
            self.on_token()
        if isinstance(event, AnswerEnd):
            self._left -= 1
            if not self._left:
                self._ended.set()

    def wait(self) -> list[Event]:
        assert self._ended.wait(PATIENCE_S)
        return self.events

    def result(self, answer: int = 0) -> Any:
        ends = [event for event in self.wait() if isinstance(event, AnswerEnd) and event.answer == answer]
        assert len(ends) == 1
        return ends[0].result


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)


def is_idle(loop: EngineLoop) -> bool:
    facts = loop.snapshot().engine
    return facts.num_running + facts.num_waiting == 0


def require_nothing_left(engine: Engine) -> None:
    facts = engine.facts()
    assert (facts.num_running, facts.num_waiting, facts.kv_blocks_held, facts.states_held) == (0, 0, 0, 0)
    assert engine._started.store.pending() == 0


@pytest.mark.parametrize("method", ["facts", "close"])
def test_facts_and_an_end_come_between_two_steps(engine: Engine, method: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with engine._lock:  # as during a step
            called = pool.submit(getattr(engine, method))
            assert not wait([called], 0.2).done
            assert engine.facts().tokens_run == 0
        called.result(PATIENCE_S)


def test_the_facts_give_the_numbers_of_resident_experts_slots_and_experts(loop: EngineLoop) -> None:
    def experts() -> tuple[int, int, int]:
        facts = loop.snapshot().engine
        return facts.num_resident, facts.expert_slots, facts.num_experts

    total = 3 * 8
    assert experts() == (0, 4, total)
    heard = Heard()
    loop.submit(PROMPT, SHORT, heard)
    heard.wait()
    wait_until(lambda: experts() == (4, 4, total))  # a snapshot may be one step old


def test_after_a_resize_the_facts_of_an_idle_engine_have_the_slots_and_blocks_of_now() -> None:
    def room(facts: EngineFacts) -> tuple[int, int, int]:
        return facts.expert_slots, facts.num_resident, facts.kv_blocks

    with open_engine(expert_slots=None) as engine, EngineLoop(engine) as loop:
        plan, slots_before = engine.plan, engine.facts().expert_slots
        for budget_bytes in (plan.total_bytes - 8 * plan.slots.slot_bytes, plan.budget_bytes):
            loop.resize(budget_bytes)
            assert room(loop.snapshot().engine) == room(engine.facts())
            assert (engine.facts().expert_slots == slots_before) is (budget_bytes == plan.budget_bytes)


def test_a_request_hears_of_its_prompt_then_of_each_token_then_of_its_end(
    loop: EngineLoop, engine: Engine
) -> None:
    heard = Heard()
    request = loop.submit(PROMPT, SHORT, heard)
    result = heard.result()
    assert [type(event) for event in heard.events] == [PromptProgress] * 4 + [AnswerToken] * 8 + [AnswerEnd]
    assert heard.events[:4] == [PromptProgress(0, n, 32, 0) for n in (8, 16, 24, 32)]
    tokens = [event.event.token_id for event in heard.events if isinstance(event, AnswerToken)]
    assert tokens == result.token_ids == REFERENCE.greedy[:8]
    assert request.prompt_ids == PROMPT
    assert request.seeds == [result.seed]
    again = Heard()
    loop.submit(PROMPT, SHORT, again)
    again.wait()
    assert again.events[0] == PromptProgress(0, 24, 32, 16)  # a prefix of 16 is found, then one chunk runs
    assert again.result().usage["cached_tokens"] == 16


def test_several_answers_are_told_apart(loop: EngineLoop) -> None:
    heard = Heard(3)
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, ignore_eos=True)
    request = loop.submit(PROMPT, params, heard, num_answers=3)
    for answer in range(3):
        own = [event for event in heard.wait() if event.answer == answer]
        assert [type(event) for event in own[-7:]] == [AnswerToken] * 6 + [AnswerEnd]
        assert [e.event.token_id for e in own if isinstance(e, AnswerToken)] == heard.result(answer).token_ids
        assert heard.result(answer).seed == request.seeds[answer]
    assert len({tuple(heard.result(answer).token_ids) for answer in range(3)}) == 3


def test_an_invalid_request_is_refused_at_once_in_the_callers_thread(loop: EngineLoop) -> None:
    with pytest.raises(PromptTooLong):
        loop.submit([1] * 500, SHORT, Heard())
    heard = Heard()
    loop.submit(PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=0), heard)
    assert len(heard.result().prompt_logprobs) == 32
    assert [type(event) for event in heard.events][-1] is AnswerEnd


def test_submitting_does_not_wait_for_a_step(
    loop: EngineLoop, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, entered = threading.Event(), threading.Event()
    forward = engine._started.model.forward

    def slow(batch: Any) -> Any:
        entered.set()
        assert go_on.wait(PATIENCE_S)
        return forward(batch)

    monkeypatch.setattr(engine._started.model, "forward", slow)
    first, second, third = Heard(), Heard(), Heard()
    loop.submit(PROMPT, SHORT, first)
    assert entered.wait(PATIENCE_S)
    begin = time.monotonic()
    loop.submit(PROMPT, SHORT, second)
    request = loop.submit(PROMPT, LONG, third)
    loop.cancel(request)
    facts = loop.snapshot().engine
    assert (facts.num_running, facts.num_waiting) == (1, 2)  # not as they were before the step
    assert time.monotonic() - begin < 1.0
    assert second.events == []
    go_on.set()
    assert first.result().token_ids == second.result().token_ids == REFERENCE.greedy[:8]
    assert third.result().finish_reason == "cancelled"


def test_a_cancelled_request_frees_all_it_holds_before_the_next_step(
    loop: EngineLoop, engine: Engine
) -> None:
    heard = Heard()
    steps_at_cancel: list[int] = []
    request: list[Request] = []

    def cancel_at_the_third() -> None:
        if sum(isinstance(event, AnswerToken) for event in heard.events) == 3:
            steps_at_cancel.append(loop._meter.num_steps)
            loop.cancel(request[0])

    heard.on_token = cancel_at_the_third
    is_known = threading.Event()  # the first event may come before `submit` has returned

    def hear(event: Event) -> None:
        assert is_known.wait(PATIENCE_S)
        heard(event)

    request.append(loop.submit(PROMPT, LONG, hear))
    is_known.set()
    assert heard.result().finish_reason == "cancelled"
    assert len(heard.result().token_ids) == 3
    wait_until(lambda: is_idle(loop))
    assert loop._meter.num_steps == steps_at_cancel[0]
    require_nothing_left(engine)


@pytest.mark.parametrize("num_requests", [60, pytest.param(250, marks=pytest.mark.full)])
def test_hundreds_of_cancelled_requests_leave_nothing_behind(num_requests: int) -> None:
    """Streams, several answers, shared prefixes and waiting requests; cancelled at any time, or never."""
    for reference in (REFERENCE, DELTA):
        with (
            open_engine(reference.directory, context=128, max_sequences=3) as engine,
            EngineLoop(engine) as loop,
        ):
            rng = random.Random(4)
            expected = engine_answer(reference.directory, reference.input_ids)
            open_ones: list[tuple[Request, Heard]] = []
            for number in range(num_requests):
                num_answers = rng.choice([1, 1, 1, 2])
                heard = Heard(num_answers)
                prompt = reference.input_ids[: rng.randrange(1, 33)] + [rng.randrange(3)] * rng.randrange(3)
                params = SamplingParams(
                    max_tokens=rng.randrange(1, 40), temperature=rng.choice([0.0, 1.0]), ignore_eos=True
                )
                request = loop.submit(prompt, params, heard, num_answers=num_answers, tenant=rng.choice("ab"))
                open_ones.append((request, heard))
                while len(open_ones) > 6 or (open_ones and number == num_requests - 1):
                    request, heard = open_ones.pop(rng.randrange(len(open_ones)))
                    if rng.random() < 0.8:
                        time.sleep(rng.random() * 0.004)
                        loop.cancel(request)
                    heard.wait()
            last = Heard()
            loop.submit(reference.input_ids, SHORT, last)
            assert last.result().token_ids == expected
            wait_until(lambda: is_idle(loop))
            require_nothing_left(engine)


def test_the_thread_beats_while_it_is_idle_and_between_layers_and_not_in_a_step_that_hangs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.engine.loop.BEAT_S", 0.02)
    now = [time.monotonic()]
    monkeypatch.setattr("argosy.engine.loop.monotonic", lambda: now[0])
    monkeypatch.setattr("argosy.model.decoder.monotonic", lambda: now[0])
    forward, hangs, may_go_on = engine._started.model.forward, threading.Event(), threading.Event()

    def hang(step: Any) -> Any:
        engine._started.model.decoder.progressed_at = 0.0
        hangs.set()
        assert may_go_on.wait(PATIENCE_S)
        return forward(step)

    monkeypatch.setattr(engine._started.model, "forward", hang)
    with EngineLoop(engine) as loop:
        now[0] += 1000
        wait_until(lambda: loop.snapshot().silent_s == 0)
        heard = Heard()
        loop.submit(PROMPT, SHORT, heard)
        assert hangs.wait(PATIENCE_S)
        now[0] += 1000
        assert loop.snapshot().silent_s == 1000
        engine._started.model.decoder._pause()
        assert loop.snapshot().silent_s == 0
        may_go_on.set()
        heard.wait()


def engine_answer(directory: Path, prompt: list[int]) -> list[int]:
    with open_engine(directory) as engine:
        return engine.generate(prompt, SHORT).token_ids


def test_a_loop_tells_its_facts_while_its_engine_is_closed_and_after_that(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server shows its models until they are out of memory, which takes a while for a large one."""
    seen: list[LoopFacts] = []
    with EngineLoop(engine) as loop:
        loop.submit(PROMPT, SHORT, heard := Heard())
        heard.wait()
        wait_until(lambda: is_idle(loop))
    free = engine._started.model.close
    monkeypatch.setattr(engine._started.model, "close", lambda: (free(), seen.append(loop.snapshot())))
    engine.close()
    seen.append(loop.snapshot())
    assert [(one.is_stopping, one.requests, one.engine.num_running) for one in seen] == [(True, (), 0)] * 2


class PanicException(BaseException):
    """As pyo3 raises it for a panic of a Rust library: not an Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, PanicException])
def test_a_step_that_fails_ends_running_requests_with_an_error_and_the_loop_continues(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    reported: list[BaseException] = []
    with EngineLoop(engine, report=reported.append) as loop:
        forward = engine._started.model.forward
        calls = 0

        def fails_once(batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise kind("a word of the prompt")
            return forward(batch)

        monkeypatch.setattr(engine._started.model, "forward", fails_once)
        heard = Heard()
        loop.submit(PROMPT, LONG, heard)
        result = heard.result()
        assert result.finish_reason == "error"
        assert isinstance(result.error, ArgosyError)
        assert "a word of the prompt" not in str(result.error)
        assert [str(error.__cause__ or error) for error in reported] == ["a word of the prompt"]
        again = Heard()
        loop.submit(PROMPT, SHORT, again)
        assert again.result().token_ids == REFERENCE.greedy[:8]
        require_nothing_left(engine)


def test_answers_continue_when_no_more_files_can_be_opened(loop: EngineLoop) -> None:
    """Ledgers read /proc; without it, only the peak of memory may be missing."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    heard = Heard()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        loop.submit(PROMPT, SHORT, heard)
        heard.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert heard.result().token_ids == REFERENCE.greedy[:8]
    assert heard.result().ledger.peak_bytes is None
    again = Heard()
    loop.submit(PROMPT, SHORT, again)
    assert again.result().ledger.peak_bytes > 0


def become(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, attribute: Any) -> None:
    """Replace an attribute of this engine's class; idle loops of other engines in this process use `Engine`."""
    monkeypatch.setattr(engine, "__class__", type("Altered", (Engine,), {name: attribute}))


@pytest.mark.parametrize("where", ["enqueue", "_finish", "has_work", "facts"])
def test_when_anything_fails_in_the_thread_every_request_ends_and_the_next_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    reported: list[BaseException] = []
    with EngineLoop(engine, report=reported.append) as loop:
        monkeypatch.setattr("argosy.engine.loop._FACTS_SECONDS", 0.0)
        real: Any = getattr(Engine, where)
        once = iter([OSError("a word of the prompt")])

        def fails_once(self: Engine, *given: Any, **more: Any) -> Any:
            if (error := next(once, None)) is not None:
                raise error
            return real.fget(self) if isinstance(real, property) else real(self, *given, **more)

        become(engine, monkeypatch, where, property(fails_once) if isinstance(real, property) else fails_once)
        heard = Heard()
        loop.submit(PROMPT, SHORT, heard)
        if where != "facts":  # facts belong to no request
            assert heard.result().finish_reason == "error"
            assert "a word of the prompt" not in str(heard.result().error)
        heard.wait()
        assert "a word of the prompt" in [str(error) for error in reported]
        again = Heard()
        loop.submit(PROMPT, SHORT, again)
        assert again.result().token_ids == REFERENCE.greedy[:8]
        assert not loop.snapshot().has_failed


def test_when_the_thread_ends_running_and_waiting_requests_end_with_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[BaseException] = []
    entered, go_on = threading.Event(), threading.Event()

    def ends(batch: Any) -> None:
        entered.set()
        assert go_on.wait(PATIENCE_S)
        raise SystemExit

    with EngineLoop(engine, report=reported.append) as loop:
        monkeypatch.setattr(engine._started.model, "forward", ends)
        heard = [Heard() for _ in range(3)]
        loop.submit(PROMPT, SHORT, heard[0])
        assert entered.wait(PATIENCE_S)
        for one in heard[1:]:
            loop.submit(PROMPT, SHORT, one)
        assert not loop.snapshot().has_failed
        go_on.set()
        for one in heard:
            assert isinstance(one.result().error, Overloaded)
            assert "the engine has failed" in str(one.result().error)
        assert loop.snapshot().has_failed
        with pytest.raises(Overloaded, match="the engine has failed"):
            loop.submit(PROMPT, SHORT, Heard())
        assert loop.drain(PATIENCE_S)
    assert [type(error) for error in reported] == [SystemExit]


def test_an_engine_that_fails_repeatedly_while_idle_is_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.engine.loop._AFTER_FAILURE_S", 0.0)
    with EngineLoop(engine) as loop:
        become(engine, monkeypatch, "is_writing", property(lambda _: 1 / 0))
        loop.revoke("nobody")  # a round begins
        wait_until(lambda: loop.snapshot().has_failed)
        with pytest.raises(Overloaded, match="the engine has failed"):
            loop.submit(PROMPT, SHORT, Heard())


def test_a_listener_that_fails_ends_its_own_request(engine: Engine) -> None:
    reported: list[BaseException] = []
    with EngineLoop(engine, report=reported.append) as loop:

        def fails(event: Event) -> None:
            raise ConnectionError("nobody there")

        loop.submit(PROMPT, LONG, fails)
        heard = Heard()
        loop.submit(PROMPT, SHORT, heard)
        assert heard.result().token_ids == REFERENCE.greedy[:8]
        wait_until(lambda: is_idle(loop))
        assert [type(error) for error in reported] == [ConnectionError]
        require_nothing_left(engine)


def test_requests_beyond_max_waiting_are_refused_until_others_end() -> None:
    with open_engine(max_sequences=1, max_waiting=1) as engine, EngineLoop(engine) as loop:
        heard = [Heard() for _ in range(3)]
        requests = [loop.submit(PROMPT, LONG, one) for one in heard[:2]]
        with pytest.raises(Overloaded) as refused:
            loop.submit(PROMPT, LONG, heard[2])
        assert refused.value.retry_after_s >= 1
        loop.cancel(requests[0])
        heard[0].wait()
        loop.submit(PROMPT, SHORT, heard[2])
        loop.cancel(requests[1])
        assert heard[2].result().finish_reason == "length"


def test_draining_finishes_running_requests_and_takes_no_more(loop: EngineLoop, engine: Engine) -> None:
    heard = Heard()
    loop.submit(PROMPT, LONG, heard)
    assert loop.drain(PATIENCE_S)
    assert heard.result().finish_reason == "length"
    assert loop.snapshot().is_stopping
    with pytest.raises(Overloaded, match="is stopping"):
        loop.submit(PROMPT, SHORT, Heard())
    require_nothing_left(engine)


def test_a_drain_that_takes_too_long_returns_false_and_closing_cancels(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine._started.model.forward
    monkeypatch.setattr(engine._started.model, "forward", lambda batch: time.sleep(0.02) or forward(batch))  # type: ignore[func-returns-value]
    loop = EngineLoop(engine)
    heard = Heard()
    loop.submit(PROMPT, LONG, heard)
    assert not loop.drain(0.05)
    loop.close()
    loop.close()
    assert heard.result().finish_reason == "cancelled"
    assert not loop._thread.is_alive()
    require_nothing_left(engine)


def test_facts_describe_the_engine_and_rates_cover_the_last_seconds(engine: Engine) -> None:
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    with EngineLoop(engine, clock=clock) as loop:
        assert loop.snapshot().new_tok_per_s == 0.0
        heard = Heard()
        heard.on_token = lambda: setattr(clock, "now", clock.now + 0.5)
        loop.submit(PROMPT, SHORT, heard)
        heard.wait()
        wait_until(lambda: is_idle(loop))
        facts = loop.snapshot()
        # The first sample is from the step before the first token: 8 tokens in 4 s, and 32 of the prompt.
        assert facts.engine.totals.new_tokens == 8
        assert facts.new_tok_per_s == pytest.approx(8 / 4, rel=0.3)
        assert facts.bytes_read_per_s > 0
        assert facts.num_steps == 4 + 7
        assert facts.recent_parts["expert_compute"] > 0
        assert min(facts.recent_parts.values()) >= 0
        decode = facts.recent_decode  # without the steps of the prompt
        assert decode is not None
        assert (decode.num_steps, decode.num_tokens) == (7, 7)
        assert 0 < decode.bytes_read < facts.engine.totals.bytes_read
        assert 0 <= decode.hits < decode.lookups < facts.engine.totals.lookups
        assert sum(decode.parts.values()) == pytest.approx(decode.seconds)
        assert len(PROMPT) <= decode.context <= len(PROMPT) + 2 * KV_BLOCK_TOKENS
        clock.now += 100
        assert loop.snapshot().recent_decode is None
        assert loop.snapshot().new_tok_per_s == 0.0
        assert sum(loop.snapshot().recent_parts.values()) == 0


class Clock:
    """A clock that steps of an engine move, by `step_s` each."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step_s = 1000.0, 1.0
        self.in_step: Callable[[], None] = lambda: None
        forward = engine._started.model.forward

        def step(batch: Any) -> Any:
            self.now += self.step_s
            self.in_step()
            return forward(batch)

        monkeypatch.setattr(engine._started.model, "forward", step)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("step_s", [0.001, 1.0, 30.0, 300.0])
def test_rates_are_right_for_steps_of_any_length_and_zero_after_them(
    step_s: float, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.engine.loop._FACTS_SECONDS", 0.0)
    clock = Clock(engine, monkeypatch)
    clock.step_s = step_s
    with EngineLoop(engine, clock=clock) as loop:
        clock.now += 3600  # nothing of it counts
        seen: list[tuple[float, float]] = []

        def look() -> None:
            facts = loop.snapshot()
            seen.append((facts.prompt_tok_per_s * step_s, facts.new_tok_per_s * step_s))
            assert sum(facts.recent_parts.values()) < 60  # of this machine, not of the idle hour

        clock.in_step = look
        heard = Heard()
        loop.submit(PROMPT, SHORT, heard)
        heard.wait()
        wait_until(lambda: is_idle(loop) and loop._meter._step_began is None)
        # 4 steps with 8 prompt tokens each, then 7 with a new token each; the first new one is of the fourth step.
        long_ones = step_s > 10
        assert seen[0] == (0.0, 0.0)
        assert [round(prompt, 6) for prompt, _ in seen[1:4]] == [8.0] * 3
        assert [round(new, 6) for _, new in seen[1:4]] == [0.0] * 3
        if long_ones:  # means are of the last step alone
            assert [round(new, 6) for _, new in seen[4:]] == [1.0] * 7
            assert [round(prompt, 6) for prompt, _ in seen[4:]] == [8.0 - 1] + [0.0] * 6  # less the new token
        else:
            assert all(0 < new <= 1.0 for _, new in seen[5:])
            assert seen[-1][1] == pytest.approx(7 / 10, rel=0.01)
        assert loop.snapshot().new_tok_per_s > 0
        clock.now += 11
        facts = loop.snapshot()
        assert (facts.prompt_tok_per_s, facts.new_tok_per_s, facts.bytes_read_per_s) == (0.0, 0.0, 0.0)


def test_requests_that_wait_are_told_in_order_with_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(max_sequences=1) as engine, EngineLoop(engine) as loop:
        forward, runs, may_go_on = engine._started.model.forward, threading.Event(), threading.Event()

        def hold(step: Any) -> Any:
            runs.set()
            assert may_go_on.wait(PATIENCE_S)
            return forward(step)

        monkeypatch.setattr(engine._started.model, "forward", hold)
        heard = [Heard(2), Heard(), Heard()]
        loop.submit(PROMPT, SHORT, heard[0], name="req_1", num_answers=2)
        assert runs.wait(PATIENCE_S)
        for number in (1, 2):
            loop.submit(PROMPT[number:], SHORT, heard[number], name=f"req_{number + 1}")
        facts = loop.snapshot()
        assert [one.name for one in facts.requests] == ["req_1"]
        assert [(one.name, one.why, one.ahead) for one in facts.waiting] == [
            ("req_2", "turn", 0), ("req_3", "turn", 1),
        ]  # fmt: skip
        assert all(one.seconds > 0 for one in facts.waiting)
        may_go_on.set()
        for one in heard:
            one.wait()
        assert loop.snapshot().waiting == ()


def test_a_prompt_is_followed_within_its_step_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoopFacts] = []

    def end_layer(decoder: Decoder) -> None:
        pause(decoder)
        clock.now += 100.0
        # In another thread than the one that holds the engine's lock.
        thread = threading.Thread(target=lambda: seen.append(loop.snapshot()))
        thread.start()
        thread.join(PATIENCE_S)

    pause = Decoder._pause
    monkeypatch.setattr(Decoder, "_pause", end_layer)
    # Someone who observes routes makes a step stop at every layer, as slow reads do.
    with open_engine(observe_routes=lambda *_: None) as engine:
        clock = Clock(engine, monkeypatch)
        loop = EngineLoop(engine, clock=clock)
        heard = Heard()
        loop.submit(PROMPT, SHORT, heard, name="req_1")
        heard.wait()
        wait_until(lambda: is_idle(loop))
        assert loop.snapshot().requests == ()
        loop.close()
    (first,) = seen[0].requests
    assert (first.name, first.prompt_tokens, first.prompt_done, first.answer_tokens) == ("req_1", 32, 2, 0)
    # Each of the 4 chunks of 8 tokens runs 3 layers.
    done = [facts.requests[0].prompt_done for facts in seen[:12]]
    assert done == [8 * chunk + 8 * layer // 3 for chunk in range(4) for layer in (1, 2, 3)]
    assert all(facts.requests[0].tok_per_s for facts in seen[:12])
    assert seen[1].prompt_tok_per_s == pytest.approx(8 * 2 / 3 / 201)
    assert [facts.requests[0].answer_tokens for facts in seen[12::3]] == list(range(1, 8))
    assert not any(facts.requests[0].is_reading for facts in seen[12:])


def test_prompts_are_written_to_files_while_the_engine_is_idle(tmp_path: Path) -> None:
    with open_engine(kv_dir=tmp_path, context=128) as engine, EngineLoop(engine) as loop:
        heard = Heard()
        loop.submit([*PROMPT, *PROMPT, *PROMPT], SamplingParams(max_tokens=1), heard)
        heard.wait()
        wait_until(lambda: len(list(tmp_path.glob("*/*.kv"))) == 6)


def test_an_event_loop_receives_events_through_its_own_queue(loop: EngineLoop) -> None:
    async def ask() -> list[Event]:
        running, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        loop.submit(PROMPT, SHORT, lambda event: running.call_soon_threadsafe(queue.put_nowait, event))
        events = []
        while not (events and isinstance(events[-1], AnswerEnd)):
            events.append(await asyncio.wait_for(queue.get(), PATIENCE_S))
        return events

    events = asyncio.run(ask())
    assert isinstance(events[-1], AnswerEnd)
    assert events[-1].result.token_ids == REFERENCE.greedy[:8]
