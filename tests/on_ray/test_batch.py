"""Answers as a class of Ray Data's `map_batches`."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from argosy.batch import Answers
from tests.cli.tiny_chat_model import write_chat_model

# Ray's own files and sockets are not closed before the interpreter ends.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_data_set_is_answered_as_a_list_would_be(cluster: Cluster, tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    options = {"memory": "1GiB", "threads": 1, "max_tokens": 6}
    rows = [{"number": number, "prompt": f"Question {number}"} for number in range(12)]
    rows[5]["prompt"] = "x" * 10_000
    # One block: by itself, Ray Data makes a task of each row.
    answered = ray.data.from_items(rows, override_num_blocks=1).map_batches(
        Answers, fn_constructor_args=[str(model)], fn_constructor_kwargs=options, batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1,
    )  # fmt: skip
    found = sorted(answered.take_all(), key=lambda row: row["number"])
    answers = Answers(model, **options)  # type: ignore[arg-type]
    expected = answers({"prompt": [row["prompt"] for row in rows]})
    answers.close()
    assert [row["answer"] for row in found] == list(expected["answer"])
    assert [row["new_tokens"] for row in found] == list(expected["new_tokens"])
    assert [bool(row["error"]) for row in found] == [number == 5 for number in range(12)]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
