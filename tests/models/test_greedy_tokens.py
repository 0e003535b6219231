"""The script that compares versions runs, and its answers differ only between instruction sets."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from tests.models.greedy_tokens import NUM_NEW, PROMPT_LENGTHS, answers, models


def test_every_setting_of_an_instruction_set_gives_the_same_answers(tmp_path: Path) -> None:
    (model,) = (model for model in models() if model.name == "mixtral_window_top1")
    answers_of = defaultdict(set)
    lines = list(answers(model, model.make(tmp_path)))
    for line in lines:
        assert tuple(line["tokens"]) == PROMPT_LENGTHS
        assert {len(tokens) for tokens in line["tokens"].values()} == {NUM_NEW}
        answers_of[line["instruction_set"]].add(json.dumps([line["tokens"], line["logits_sha256"]]))
    assert {line["budget"] for line in lines} == {"resident", "smallest cache"}
    assert all(len(different) == 1 for different in answers_of.values())
