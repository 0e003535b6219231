"""How far a request is: the share of its prompt that is done, its own rates, the time to go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from argosy.engine.progress import progress_of, prompt_line, rough_time, wait_line


def sequence(**known: Any) -> Any:
    made: dict[str, Any] = {
        "prompt_ids": [0] * 1000, "num_computed": 0, "cached_tokens": 0, "new_ids": [], "scheduled_at": 100.0,
        "first_token_at": None, "computed_at": 0.0, "is_prefilling": True,
    }  # fmt: skip
    return SimpleNamespace(**made | known)


def progress(*sequences: Any, step: Any = None, now: float = 200.0) -> Any:
    return progress_of("req_1", sequences, lambda: step, now=now)


def test_a_request_that_waits_has_no_progress() -> None:
    assert progress(sequence(scheduled_at=None)) is None


def test_the_rate_of_a_prompt_leaves_out_what_was_found_and_the_time_to_go_follows_from_it() -> None:
    found = progress(sequence(num_computed=600, cached_tokens=200, computed_at=180.0))
    assert (found.prompt_done, found.prompt_tokens, found.is_reading) == (600, 1000, True)
    assert found.tok_per_s == 400 / 80
    assert found.seconds == 100
    assert found.seconds_left == 400 / 5 - 20  # 20 seconds of the running step are over


def test_nothing_is_estimated_before_the_first_tokens_are_done() -> None:
    for one in (
        sequence(),
        sequence(num_computed=200, cached_tokens=200),
        sequence(num_computed=0, cached_tokens=9),
    ):
        found = progress(one)
        assert (found.tok_per_s, found.seconds_left) == (None, None)


def test_the_layers_of_the_running_step_count() -> None:
    one = sequence(num_computed=500, computed_at=150.0)
    step = SimpleNamespace(num_done=lambda sequence: 100.0 if sequence is one else 0.0)
    found = progress(one, step=step)
    assert (found.prompt_done, found.tok_per_s, found.seconds_left) == (600, 6.0, pytest.approx(400 / 6))


def test_the_rate_of_answers_begins_with_their_second_tokens_and_ends_with_their_last() -> None:
    first = sequence(first_token_at=110.0, computed_at=170.0, new_ids=[1, 2, 3], num_computed=1002)
    found = progress(first, sequence(first_token_at=110.0, computed_at=170.0, new_ids=[1, 2]))
    assert (found.prompt_done, found.is_reading, found.answer_tokens) == (1000, False, 5)
    assert (found.tok_per_s, found.seconds_left) == (3 / 60, None)
    assert progress(sequence(first_token_at=110.0, computed_at=110.1, new_ids=[1])).tok_per_s is None


def test_an_answer_that_is_computed_again_keeps_its_prompt() -> None:
    found = progress(sequence(first_token_at=110.0, computed_at=170.0, new_ids=[1, 2], num_computed=0))
    assert (found.prompt_done, found.is_reading) == (1000, False)


def test_a_line_says_how_much_is_done_and_about_how_long_the_rest_takes() -> None:
    assert prompt_line(9216, 22851, 222.6) == "prompt 9,216 of 22,851 tokens (40 %), about 4 min left"
    assert prompt_line(0, 22851, None) == "prompt 0 of 22,851 tokens (0 %)"
    times = [0, 7, 52, 56, 100, 5399, 5400, 86400]
    assert [rough_time(seconds) for seconds in times] == [
        "5 s", "5 s", "50 s", "1 min", "2 min", "90 min", "1.5 h",
        "24.0 h",
    ]  # fmt: skip


def test_a_line_says_what_a_request_waits_for_and_how_many_are_before_it() -> None:
    assert wait_line("turn", 2) == "waits for its turn, 2 before it"
    assert wait_line("memory", 0) == "waits for memory"
    assert wait_line("model", 0, 0.431) == "waits for the model to load (43 %)"
    assert wait_line("a newer reason", 1) == "waits, 1 before it"
