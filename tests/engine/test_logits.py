"""The engine agrees with transformers on tiny checkpoints of every family, with every flag on in one checkpoint and
off in another, and with the numpy model on random configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import sleep

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import Engine, SamplingParams, _native
from argosy.errors import UsageError
from tests.helpers.examples import few_of
from tests.models.configuration import Configuration
from tests.models.numpy_model import NumpyModel
from tests.models.random_models import (
    random_configuration,
    random_gpt_oss,
    random_latent_configuration,
    write_decided_model,
)
from tests.models.references import LARGEST_DIFFERENCE, REFERENCES, Reference, difference
from tests.models.runnable import runnable

INSTRUCTION_SETS = _native.instruction_sets()


@pytest.mark.covering(1)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_logits_and_greedy_continuation_equal_transformers(
    reference: Reference, instruction_set: str, tmp_path: Path
) -> None:
    greedy = SamplingParams(max_tokens=len(reference.greedy), temperature=0, ignore_eos=True)
    model = runnable(reference.directory, tmp_path)
    with Engine.open(model, memory="4GiB", threads=1, instruction_set=instruction_set) as engine:
        logits = engine.logits(reference.input_ids)
        result = engine.generate(reference.input_ids, greedy)

    assert difference(logits, reference.logits) <= LARGEST_DIFFERENCE
    assert result.token_ids == reference.greedy


@pytest.mark.parametrize("draw", [random_configuration, random_latent_configuration])
@pytest.mark.parametrize("seed", few_of(range(24), range(12)))
def test_logits_equal_the_numpy_model_on_random_configurations(
    seed: int, draw: Callable[[int], Configuration], tmp_path: Path
) -> None:
    prompt = write_decided_model(tmp_path, draw(seed), num_tokens=1 + 7 * seed % 41)
    expected = NumpyModel(tmp_path).logits(prompt)
    with Engine.open(
        tmp_path,
        memory="4GiB",
        threads=1 + seed % 2,
        chunk_tokens=(1, 3, 16, 256)[seed % 4],
        instruction_set=INSTRUCTION_SETS[seed % len(INSTRUCTION_SETS)],
        expert_slots=smallest_cache(tmp_path) if seed % 5 < 3 else None,
    ) as engine:
        logits = engine.logits(prompt)

    assert difference(logits, expected) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("seed", range(8))
def test_logits_equal_the_numpy_model_on_random_configurations_of_gpt_oss(seed: int, tmp_path: Path) -> None:
    prompt = write_decided_model(tmp_path, random_gpt_oss(seed), num_tokens=1 + 7 * seed % 41)
    expected = NumpyModel(tmp_path).logits(prompt)
    with Engine.open(
        runnable(tmp_path, tmp_path),
        memory="4GiB",
        threads=1 + seed % 2,
        chunk_tokens=(1, 3, 16, 256)[seed % 4],
        instruction_set=INSTRUCTION_SETS[seed % len(INSTRUCTION_SETS)],
        expert_slots=smallest_cache(tmp_path) if seed % 5 < 3 else None,
    ) as engine:
        logits = engine.logits(prompt)

    assert difference(logits, expected) <= LARGEST_DIFFERENCE


def smallest_cache(directory: Path) -> int:
    return int(NumpyModel(directory).config["num_experts_per_tok"])


def test_greedy_tokens_equal_the_numpy_model_past_the_window_and_a_block_boundary(tmp_path: Path) -> None:
    configuration = random_configuration(0)
    prompt = write_decided_model(tmp_path, configuration, num_tokens=12)
    with Engine.open(tmp_path, memory="4GiB", threads=1) as engine:
        result = engine.generate(prompt, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        logits = engine.logits(prompt + result.token_ids)

    assert difference(logits, NumpyModel(tmp_path).logits(prompt + result.token_ids)) <= LARGEST_DIFFERENCE
    assert result.token_ids == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_logits_are_read_alone_while_another_thread_asks() -> None:
    reference = REFERENCES[0]
    prompt = reference.input_ids * 3
    answers: list[list[int]] = []
    num_live: list[int] = []
    with Engine.open(reference.directory, memory="2GiB", threads=1, chunk_tokens=8) as engine:
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        other = Thread(target=lambda: answers.append(engine.generate(reference.input_ids, params).token_ids))

        def take(first: int, rows: NDArray[np.float32]) -> None:
            facts = engine.facts()
            num_live.append(facts.num_running + facts.num_waiting)
            if not first:
                other.start()
                sleep(0.1)  # it waits for the engine

        engine.read_logits(prompt, take)
        other.join()
        alone = engine.generate(reference.input_ids, params).token_ids

    assert set(num_live) == {1}
    assert answers == [alone]


def test_logits_that_wait_while_another_thread_closes_the_engine_are_refused() -> None:
    reference = REFERENCES[0]
    errors: list[Exception] = []

    def read() -> None:
        try:
            engine.logits(reference.input_ids)
        except Exception as error:
            errors.append(error)

    engine = Engine.open(reference.directory, memory="2GiB", threads=1)
    other = Thread(target=read)
    with engine._lock:  # a step
        other.start()
        while not engine._lock._waiting:
            sleep(0.001)
        engine.close()
    other.join()

    assert not engine.has_work
    assert [(type(error), str(error)) for error in errors] == [(UsageError, "the engine is closed")]
