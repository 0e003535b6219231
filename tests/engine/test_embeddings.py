"""Embeddings: pooled hidden states, equal to those of transformers and the same bits whatever else runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.config import Pooling
from argosy.engine.loop import AnswerEnd, EngineLoop, Event
from argosy.engine.pooling import normalised, shortened
from argosy.errors import ArgosyError, PromptTooLong, UnsupportedModel, UsageError
from tests.models.references import EMBEDDED, EMBEDDINGS, REFERENCES, Reference, difference
from tests.models.runnable import runnable
from tests.models.safetensors_file import Array, read_safetensors
from tests.models.tiny import prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_latent import deepseek_v3

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
# Sums in another order differ by a few 1e-6 here; one wrong layer or the state before the norm by more than 1e-1.
LARGEST_DIFFERENCE = 3e-4
CONFIGS = {
    "attention": qwen3_moe(max_position_embeddings=512, num_experts=12, hidden_size=72),
    "latent": deepseek_v3(max_position_embeddings=512),
    "delta": qwen3_next(max_position_embeddings=512),
}
LENGTHS = (40, 1, 33, 17, 90)


@pytest.fixture(scope="module", params=CONFIGS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    config = CONFIGS[request.param]
    directory = write_model(tmp_path_factory.mktemp("embed") / request.param, config, seed=11)
    return directory, [prompt_ids(config, 20 + at, length) for at, length in enumerate(LENGTHS)]


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.open(directory, **{"memory": "1GiB", "threads": 2, "context": 512} | options)


@pytest.mark.parametrize("reference", [r for r in REFERENCES if r.name in EMBEDDED], ids=lambda r: r.name)
def test_embeddings_are_those_of_transformers(reference: Reference, tmp_path: Path) -> None:
    expected = read_safetensors(EMBEDDINGS)
    with open_engine(runnable(reference.directory, tmp_path), context=128, chunk_tokens=16) as engine:
        for pooling in POOLINGS:
            found = engine.embed([reference.input_ids], pooling=pooling)[0]
            assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
            assert difference(found, expected[f"{reference.name}.{pooling}"]) < LARGEST_DIFFERENCE


def test_a_vector_has_the_same_bits_in_every_chunk_batch_and_cache(
    model: tuple[Path, list[list[int]]],
) -> None:
    directory, prompts = model
    found: list[dict[str, Array]] = []
    for chunk_tokens, threads, num_slots in ((128, 1, None), (7, 2, None), (16, 1, 4)):
        with open_engine(
            directory, chunk_tokens=chunk_tokens, threads=threads, expert_slots=num_slots
        ) as engine:
            found.append({pooling: engine.embed(prompts, pooling=pooling) for pooling in POOLINGS})
            alone = [engine.embed([prompt], pooling="mean")[0] for prompt in prompts]
            np.testing.assert_array_equal(np.array(alone), found[-1]["mean"])
    for other in found[1:]:
        for pooling in POOLINGS:
            np.testing.assert_array_equal(other[pooling], found[0][pooling])


def test_a_vector_has_the_same_bits_after_prefix_hits_and_preemption(
    model: tuple[Path, list[list[int]]],
) -> None:
    directory, prompts = model
    with open_engine(directory, prefix_reuse=False) as engine:
        expected = {pooling: engine.embed(prompts, pooling=pooling) for pooling in POOLINGS}
    with open_engine(directory, chunk_tokens=8) as engine:
        engine.generate_batch(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
        for pooling in POOLINGS:
            np.testing.assert_array_equal(engine.embed(prompts, pooling=pooling), expected[pooling])
        again = engine.requests.prepare_embedding(prompts[0], pooling="last")
        engine.enqueue([again])
        while again.result is None:
            engine.step()
        assert again.result.usage["cached_tokens"] > 0
        mean = engine.requests.prepare_embedding(prompts[-1], pooling="mean")
        engine.enqueue([mean])
        for _ in range(3):
            engine.step()
        engine._scheduler.preempt(mean)
        while mean.result is None:
            engine.step()
        assert mean.result.embedding is not None
        np.testing.assert_array_equal(mean.result.embedding, expected["mean"][-1])


def test_texts_that_are_pooled_run_beside_answers_and_change_none(
    model: tuple[Path, list[list[int]]],
) -> None:
    directory, prompts = model
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
    with open_engine(directory, chunk_tokens=8) as engine:
        alone = engine.generate(prompts[0], params)
        vector = engine.embed([prompts[4]], pooling="mean")[0]
        answer = engine.submit(prompts[0], params)
        engine.step()
        pooled = [engine.requests.prepare_embedding(prompts[4], pooling="mean")]
        engine.enqueue(pooled)
        while answer.result is None or pooled[0].result is None:
            engine.step()
    assert answer.result.token_ids == alone.token_ids
    assert answer.result.logprobs == alone.logprobs
    assert pooled[0].result.embedding is not None
    np.testing.assert_array_equal(pooled[0].result.embedding, vector)
    assert (pooled[0].result.text, pooled[0].result.token_ids) == ("", [])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = write_model(tmp_path_factory.mktemp("embed") / "model", CONFIGS["attention"], seed=3)
    with open_engine(directory, context=64, chunk_tokens=8) as engine:
        yield engine


def test_a_text_may_fill_the_context_and_not_more(engine: Engine) -> None:
    room = engine.plan.context_tokens
    assert engine.embed([[5] * room]).shape == (1, engine.config.hidden_size)
    with pytest.raises(PromptTooLong, match=f"has {room + 1} tokens, and the context holds {room}"):
        engine.embed([[5] * (room + 1)])
    with pytest.raises(UsageError, match="needs at least one token"):
        engine.embed([[]])
    with pytest.raises(UsageError, match="not in the vocabulary"):
        engine.embed([[engine.config.vocab_size]])
    assert not engine.has_work


def test_fewer_dimensions_are_the_first_ones_of_length_one(engine: Engine) -> None:
    whole, short = engine.embed([[5, 6, 7]])[0], engine.embed([[5, 6, 7]], dimensions=8)[0]
    np.testing.assert_allclose(short, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-6)
    for wrong in (0, len(whole) + 1):
        with pytest.raises(UsageError, match=f"dimensions must be from 1 to {len(whole)}"):
            engine.embed([[5]], dimensions=wrong)


def test_broken_weights_end_only_the_text_that_they_break() -> None:
    with pytest.raises(ArgosyError, match="not finite"):
        normalised(np.array([1.0, np.nan]))
    assert not normalised(np.zeros(3)).any()
    assert shortened(np.array([0.6, 0.8], np.float32), 1)[0] == 1.0


def test_the_loop_ends_a_text_with_its_vector_or_with_its_cancellation(engine: Engine) -> None:
    ended: list[Event] = []
    with EngineLoop(engine) as loop:
        loop.submit_embedding([5, 6, 7], ended.append)
        loop.cancel(loop.submit_embedding([8] * 60, ended.append))
        assert loop.drain(20)
    results = [event.result for event in ended if isinstance(event, AnswerEnd)]
    assert [result.finish_reason for result in results] == ["stop", "cancelled"]
    assert results[0].embedding is not None
    assert results[1].embedding is None
    assert not engine.has_work


@pytest.mark.parametrize("declared", [{"pooling_mode_mean_tokens": True}, None])
def test_a_checkpoint_says_how_it_pools_and_an_option_overrules_it(
    tmp_path: Path, declared: dict[str, bool] | None
) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["attention"], seed=3)
    if declared is not None:
        write_pooling(directory, declared)
    with open_engine(directory) as engine:
        assert engine.requests.pooling == ("last" if declared is None else "mean")
        by_default = engine.embed([[5, 6, 7]])
        np.testing.assert_array_equal(by_default, engine.embed([[5, 6, 7]], pooling=engine.requests.pooling))
        assert (by_default != engine.embed([[5, 6, 7]], pooling="last")).any() == (declared is not None)
    with open_engine(directory, pooling="last") as engine:
        assert engine.requests.pooling == "last"


def test_a_pooling_that_is_not_supported_keeps_no_answer_from_running(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", CONFIGS["attention"], seed=3)
    write_pooling(directory, {"pooling_mode_cls_token": True})
    with open_engine(directory) as engine:
        assert engine.generate([5, 6], SamplingParams(max_tokens=1)).token_ids
        with pytest.raises(UnsupportedModel, match="asks for pooling 'cls_token' of embeddings"):
            engine.embed([[5]])


def write_pooling(directory: Path, config: dict[str, bool]) -> None:
    import json

    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
