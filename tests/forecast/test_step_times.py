"""Times of steps are those that `speed.py` predicts, at points and in between, and factors correct them."""

from __future__ import annotations

import pytest

from argosy.forecast.speed import predict_chunk, predict_decode, predict_prompt
from argosy.forecast.step_times import StepTimes, Table, tabulate
from tests.forecast.test_speed import ALL, MEASURED, PRIOR, WORK

FAST, LIKELY, SLOW = tabulate(
    WORK, MEASURED, PRIOR, num_slots=80, most_streams=12, chunk_tokens=512, context_tokens=8192
)


def test_a_table_is_linear_between_its_points_and_constant_beyond() -> None:
    table = Table((1.0, 3.0), (0.0, 10.0), ((1.0, 2.0), (5.0, 8.0)))
    assert [table(x, y) for x, y in ((1, 0), (3, 10), (2, 0), (1, 5), (2, 5))] == [1.0, 8.0, 3.0, 1.5, 4.0]
    assert [table(x, y) for x, y in ((0, 0), (9, 0), (1, 99), (9, 99))] == [1.0, 5.0, 2.0, 8.0]
    factors = Table((1.0, 3.0), (0.0,), ((2.0,), (10.0,)))
    assert table.times(factors).values == ((2.0, 4.0), (50.0, 80.0))


@pytest.mark.parametrize("streams", [1, 2, 5, 12])
@pytest.mark.parametrize("context", [32, 800, 7000])
def test_decode_steps_take_what_speed_predicts(streams: int, context: int) -> None:
    expected = predict_decode(
        WORK, MEASURED, PRIOR, num_slots=80, context=context // 64 * 64 + 32, streams=streams
    ).step_s
    for times, seconds in zip((FAST, LIKELY, SLOW), expected, strict=True):
        assert times.decode_s(streams, context) == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize("tokens", [1, 10, 100, 512])
def test_chunks_take_what_speed_predicts(tokens: int) -> None:
    for seen in (0.0, 700.0, 8000.0):
        expected = predict_chunk(WORK, MEASURED, PRIOR, num_slots=80, num_tokens=tokens, seen=seen)
        assert LIKELY.mixed_s(0, 0.0, tokens, seen) == pytest.approx(expected.likely, rel=0.03)


def test_the_chunks_of_a_prompt_take_as_long_as_the_prompt() -> None:
    whole = predict_prompt(
        WORK, MEASURED, PRIOR, num_slots=ALL, num_tokens=1300, chunk_tokens=512
    ).seconds.likely
    chunks = (
        predict_chunk(WORK, MEASURED, PRIOR, num_slots=ALL, num_tokens=tokens, seen=done + (tokens + 1) / 2)
        for done, tokens in ((0, 512), (512, 512), (1024, 276))
    )
    assert sum(chunk.likely for chunk in chunks) == pytest.approx(whole)


def test_a_step_with_both_takes_longer_than_either_and_less_than_one_after_the_other() -> None:
    both = LIKELY.mixed_s(8, 500.0, 100, 50.0)
    prompt, decode = LIKELY.mixed_s(0, 0.0, 100, 50.0), LIKELY.decode_s(8, 500.0)
    assert max(prompt, decode) < both < prompt + decode


def test_steps_are_alike_until_the_context_reaches_the_next_of_its_steps() -> None:
    assert [LIKELY.steps_alike(context) for context in (0, 0.5, 63.9, 64, 100)] == [64, 64, 1, 64, 28]
    assert LIKELY.decode_s(3, 128) == LIKELY.decode_s(3, 191.9) < LIKELY.decode_s(3, 192)


def test_factors_correct_each_kind_of_step() -> None:
    decode = Table((1.0, 12.0), (0.0,), ((2.0,), (3.0,)))
    found = LIKELY.corrected(decode, Table((1.0,), (0.0,), ((5.0,),)))
    assert found.decode_s(1, 100) == pytest.approx(2 * LIKELY.decode_s(1, 100))
    assert found.decode_s(12, 100) == pytest.approx(3 * LIKELY.decode_s(12, 100))
    assert found.mixed_s(0, 0.0, 64, 9.0) == pytest.approx(5 * LIKELY.mixed_s(0, 0.0, 64, 9.0))
    beside = LIKELY.corrected(Table((1.0,), (0.0,), ((1.0,),)), Table((1.0,), (0.0,), ((1.0,),)), both=0.5)
    assert beside.mixed_s(4, 90.0, 64, 9.0) == pytest.approx(0.5 * LIKELY.mixed_s(4, 90.0, 64, 9.0))
    assert beside.mixed_s(0, 0.0, 64, 9.0) == LIKELY.mixed_s(0, 0.0, 64, 9.0)
    assert LIKELY.scaled(2.0).mixed_s(4, 90.0, 64, 9.0) == pytest.approx(2 * LIKELY.mixed_s(4, 90.0, 64, 9.0))


def test_a_server_for_one_sequence_has_a_table() -> None:
    _, times, _ = tabulate(
        WORK, MEASURED, PRIOR, num_slots=ALL, most_streams=1, chunk_tokens=16, context_tokens=64
    )
    assert isinstance(times, StepTimes)
    assert 0 < times.decode_s(1, 10) < times.mixed_s(1, 10, 16, 8.0)
