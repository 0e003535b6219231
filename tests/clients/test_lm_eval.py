"""`lm-eval` with `local-completions`: the same log-likelihoods as the engine gives directly, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, SamplingParams
from tests.clients.conftest import Server

TASKS = Path(__file__).parent / "lm_eval_tasks"
FIRST_ID = 0  # the prefix of rolling log-likelihoods: this model has no such token, so the test names one


@pytest.fixture(scope="module")
def results(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of lm-eval's results. It runs in the tasks' folder, because they name their files relative to it."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model = {
        "model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote",
        "custom_prefix_token_id": FIRST_ID, "num_concurrent": 3,
    }  # fmt: skip
    command = [
        Path(sys.executable).with_name("lm-eval"), "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks", "argosy_sums,argosy_plays,argosy_said", "--include_path", TASKS,
        "--batch_size", "2", "--log_samples", "--output_path", folder,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        command, cwd=TASKS, env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def engine(server: Server) -> Iterator[Engine]:
    with Engine.open(server.model, memory="2GiB", threads=1) as engine:
        yield engine


def samples(results: Path, task: str) -> list[dict[str, Any]]:
    (found,) = results.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def score(engine: Engine, token_ids: list[int], num_given: int) -> tuple[float, bool]:
    """The log-likelihood of the tokens after the first `num_given`, and whether each of them is the most likely."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    found = engine.generate(token_ids, params).prompt_logprobs
    assert found is not None
    scored = [one for one in found[num_given:] if one is not None]
    return sum(one.logprob for one in scored), all(one.logprob == one.top[0][1] for one in scored)


def test_choices_are_scored_as_the_engine_scores_them(results: Path, engine: Engine) -> None:
    assert engine.tokenizer is not None
    items = samples(results, "argosy_sums")
    assert len(items) == 4
    for item in items:
        question = f"Question: {item['doc']['question']}\nAnswer:"
        for choice, ((told, is_greedy),) in zip(item["doc"]["choices"], item["resps"], strict=True):
            given = engine.tokenizer.encode(question)
            whole = engine.tokenizer.encode(f"{question} {choice}")
            assert whole[: len(given)] == given
            direct, is_best = score(engine, whole, len(given))
            assert (float(told), str(is_greedy)) == (direct, str(is_best))
            assert direct < -1


def test_a_text_is_scored_as_the_engine_scores_it(results: Path, engine: Engine) -> None:
    assert engine.tokenizer is not None
    items = samples(results, "argosy_plays")
    assert len(items) == 2
    for item in items:
        ids = engine.tokenizer.encode(item["doc"]["text"])
        direct, _ = score(engine, [FIRST_ID, *ids], 1)
        assert float(item["resps"][0][0]) == direct


def test_the_models_answer_is_an_exact_match(results: Path) -> None:
    (item,) = samples(results, "argosy_said")
    assert item["exact_match"] == 1.0
