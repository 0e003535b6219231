"""Answers to columns of prompts, as Ray Data calls them and as a list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from argosy.batch import COLUMNS, Answers
from argosy.config import SamplingParams
from tests.cli.tiny_chat_model import write_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("batch") / "model")


@pytest.fixture(scope="module")
def answers(model: Path) -> Iterator[Answers]:
    answers = Answers(model, memory="1GiB", threads=1, max_tokens=6)
    yield answers
    answers.close()


def test_a_batch_is_answered_in_its_order_and_keeps_its_columns(answers: Answers) -> None:
    prompts = [f"Question {number}" for number in range(40)]  # more than run at once
    found = answers({"prompt": np.array(prompts, object), "number": np.arange(40)})
    assert found.keys() == {"prompt", "number", *COLUMNS}
    assert list(found["prompt"]) == prompts
    assert list(found["number"]) == list(range(40))
    assert all(found["error"] == "")
    assert all((found["new_tokens"] >= 1) & (found["new_tokens"] <= 6))
    assert all(found["prompt_tokens"] > 0)
    assert set(found["finish_reason"]) <= {"length", "stop"}
    alone = [answers({"prompt": [prompt]})["answer"][0] for prompt in prompts[:3]]
    assert list(found["answer"][:3]) == alone


def test_a_bad_row_has_its_error_and_the_others_have_their_answers(answers: Answers) -> None:
    found = answers(
        {
            "prompt": [
                "Hello",
                [],
                "x" * 10_000,
                None,
                {"x": [1]},
                [{"role": "user", "content": "Hello"}],
                "Bye",
            ]
        }
    )
    assert [bool(error) for error in found["error"]] == [False, True, True, True, True, False, False]
    assert [bool(answer) for answer in found["answer"]] == [True, False, False, False, False, True, True]
    assert found["finish_reason"][1] == "error"
    assert "context holds" in found["error"][2]
    assert found["answer"][0] == found["answer"][5]


def test_sampled_answers_are_the_same_every_time(model: Path) -> None:
    sampled = Answers(model, memory="1GiB", threads=1, params=SamplingParams(temperature=1.0), max_tokens=12)
    batch = {"prompt": ["Hello", "Hello", "Bye"]}
    first, second = sampled(batch)["answer"], sampled(batch)["answer"]
    sampled.close()
    assert list(first) == list(second)
    assert len(set(first)) > 1


def test_an_empty_batch_has_every_column(answers: Answers) -> None:
    found = answers({"prompt": []})
    assert {len(column) for column in found.values()} == {0}


def test_a_batch_without_the_column_is_refused(answers: Answers) -> None:
    with pytest.raises(KeyError, match="prompt"):
        answers({"question": ["Hello"]})
