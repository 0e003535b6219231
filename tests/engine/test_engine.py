"""One engine: requests come and go, fail and are cut short, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from argosy import Budget, Engine, SamplingParams
from argosy.errors import PromptTooLong, UsageError
from tests.models.references import REFERENCES

REFERENCE = next(reference for reference in REFERENCES if reference.name == "qwen3_moe_plain")
PROMPT = REFERENCE.input_ids


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(REFERENCE.directory, memory="1GiB", threads=1, expert_slots=4) as engine:
        yield engine


def answer(engine: Engine, max_tokens: int = 8) -> list[int]:
    return engine.generate(PROMPT, SamplingParams(max_tokens=max_tokens, ignore_eos=True)).token_ids


def num_free_blocks(engine: Engine) -> int:
    return engine._blocks.num_free


def test_streamed_tokens_are_those_of_the_whole_answer(engine: Engine) -> None:
    events = list(engine.stream(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True)))

    assert [event.token_id for event in events] == answer(engine)
    assert [event.result is not None for event in events] == [False] * 7 + [True]
    assert events[-1].finish_reason == "length"


def test_a_stream_that_is_closed_early_gives_its_kv_blocks_back(engine: Engine) -> None:
    before = num_free_blocks(engine)
    stream = engine.stream(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    list(islice(stream, 3))
    assert num_free_blocks(engine) < before

    stream.close()  # type: ignore[attr-defined]

    assert num_free_blocks(engine) == before


def test_a_step_that_fails_cancels_what_runs_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = answer(engine), num_free_blocks(engine)
    forward = engine._decoder.forward
    calls = 0

    def interrupted(batch: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(engine)

    assert num_free_blocks(engine) == before
    assert answer(engine) == expected


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    available = engine.plan.context_tokens
    with pytest.raises(PromptTooLong, match=f"{available + 5} tokens.*{available}"):
        engine.generate([1] * (available + 5))


def test_an_answer_ends_with_length_where_the_context_ends(engine: Engine) -> None:
    available = engine.plan.context_tokens
    prompt = [1] * (available - 3)
    result = engine.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


def test_an_end_token_stops_the_answer_unless_it_is_to_be_ignored(engine: Engine) -> None:
    eos = engine.config.eos_ids[0]
    wants_eos = SamplingParams(max_tokens=5, logit_bias={eos: 100.0})
    stopped = engine.generate(PROMPT, wants_eos)
    assert (stopped.token_ids, stopped.finish_reason) == ([eos], "stop")

    ignored = engine.generate(PROMPT, SamplingParams(max_tokens=5, logit_bias={eos: 100.0}, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 5, "length")


def test_the_ledger_adds_up(engine: Engine) -> None:
    ledger = engine.generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True)).ledger
    assert ledger.wall_s == pytest.approx(sum(ledger.parts.values()))
    assert (ledger.prompt_tokens, ledger.new_tokens) == (len(PROMPT), 8)
    assert ledger.lookups > ledger.hits > 0
    assert ledger.bytes_read > 0
    assert ledger.time_to_first_token_s is not None
    assert 0 < ledger.time_to_first_token_s < ledger.wall_s
    assert engine.ledger.new_tokens >= 8


def test_more_requests_than_run_at_once_all_get_their_answer(engine: Engine) -> None:
    expected = answer(engine)
    results = engine.generate_batch([PROMPT] * 11, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [result.token_ids for result in results] == [expected] * 11


def test_what_an_engine_cannot_honour_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown instruction set 'sse9'"):
        Engine(REFERENCE.directory, memory="1GiB", instruction_set="sse9")
    with pytest.raises(UsageError, match="expert_slots must be at least experts_per_token"):
        Engine(REFERENCE.directory, memory="1GiB", expert_slots=1)
    with pytest.raises(UsageError, match="unknown unit 'Gigs'"):
        Engine(REFERENCE.directory, memory="2Gigs")


def test_a_closed_engine_says_so() -> None:
    engine = Engine(REFERENCE.directory, memory=Budget(ram_bytes=1 << 30, context_tokens=64), threads=1)
    assert engine.plan.context_tokens == 64
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.generate([1])


def test_the_demo_model_runs_with_a_quarter_of_its_experts_unless_a_budget_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("argosy.demo.locate.locate", lambda progress=None: REFERENCE.directory)
    with Engine("demo", threads=1) as engine:
        assert engine.plan.num_slots == engine.plan.num_experts // 4
    with Engine("demo", threads=1, memory="1GiB") as engine:
        assert engine.plan.is_resident


def test_a_step_without_work_does_nothing(engine: Engine) -> None:
    assert engine.step() == []
