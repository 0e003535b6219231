"""Drafts, randomly right or wrong, never change an answer, only the number of steps it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine, Grammar, SamplingParams, _native
from argosy.engine.sequence import Result
from argosy.model.layers import state_shapes
from tests.engine.random_drafter import RandomDrafter
from tests.engine.test_constraint import VOCAB, byte_level, byte_level_json
from tests.models.references import REFERENCES
from tests.models.runnable import runnable
from tests.models.tiny import RawConfig, prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_dense import gemma3_text
from tests.models.tiny_kda import bailing_hybrid
from tests.models.tiny_latent import glm_moe_dsa
from tests.models.tiny_llama4 import llama4_text
from tests.models.tiny_mamba import nemotron_h
from tests.models.tiny_minimax import minimax
from tests.models.tiny_recurrent import lfm2_moe

Request = tuple[Sequence[int], SamplingParams]

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}'


def write_text_model(directory: Path) -> Path:
    """Write a model with a tokenizer, for grammars and stop strings."""
    config = qwen3_moe(vocab_size=VOCAB, max_position_embeddings=1024, eos_token_id=byte_level().eos_ids[0])
    write_model(directory, config, seed=2)
    (directory / "tokenizer.json").write_text(byte_level_json())
    return directory


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def delta_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = qwen3_next(max_position_embeddings=512)
    return write_model(tmp_path_factory.mktemp("delta"), config, seed=1)


def run(engine: Engine, requests: Sequence[Request]) -> tuple[list[Result], int]:
    """Run the requests together; return their results and the number of steps after the last prompt.

    How many steps prompts take depends on how long steps take, so they do not count.
    """
    sequences = [engine.submit(list(prompt), params) for prompt, params in requests]
    steps = 0
    while any(one.result is None for one in sequences):
        steps += all(one.new_ids for one in sequences)
        engine.step()
    return [one.result for one in sequences if one.result is not None], steps


def told(result: Result) -> tuple[object, ...]:
    return (
        result.token_ids,
        result.text,
        result.finish_reason,
        result.stopped_by,
        result.logprobs,
        result.prompt_logprobs,
    )


def known_answers(requests: Sequence[Request], results: Sequence[Result]) -> list[list[int]]:
    return [[*prompt, *result.token_ids] for (prompt, _), result in zip(requests, results, strict=True)]


def compare(
    model: Path, requests: Sequence[Request], draft_tokens: int, seed: int, **options: Any
) -> tuple[int, int, Engine]:
    """Answer twice without and twice with a drafter; the second time finds prefixes.

    Returns:
        The steps of the first time without and with the drafter, and the closed engine that had it.
    """
    settings = {"memory": "2GiB", "threads": 1, "chunk_tokens": 16, "max_sequences": 4, **options}
    with Engine.open(model, **settings) as engine:
        expected, plain_steps = run(engine, requests)
    drafter = RandomDrafter(seed, engine.config.vocab_size, known_answers(requests, expected))
    with Engine.open(model, drafter=drafter, draft_tokens=draft_tokens, **settings) as engine:
        results, steps = run(engine, requests)
        again, _ = run(engine, requests)
        assert engine._started.cache.blocks.num_held == 0
    assert drafter.num_proposed > 0
    assert [told(one) for one in results] == [told(one) for one in expected]
    assert [told(one) for one in again] == [told(one) for one in expected]
    return plain_steps, steps, engine


def params(number: int, **more: Any) -> SamplingParams:
    """Return greedy and sampled parameters in turn."""
    return SamplingParams(
        **{"max_tokens": 40, "temperature": float(number % 2), "seed": number, "ignore_eos": True, **more}
    )


@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 4])
def test_text_is_the_same_with_a_drafter_and_takes_fewer_steps(text_model: Path, draft_tokens: int) -> None:
    prompts = [prompt_ids({"vocab_size": VOCAB}, seed, 5 + 9 * seed) for seed in range(4)]
    requests = [
        (prompt, params(number, logprobs=2, prompt_logprobs=1)) for number, prompt in enumerate(prompts)
    ]
    plain, drafted, _ = compare(text_model, requests, draft_tokens, seed=draft_tokens)
    assert drafted < plain - 5


@pytest.mark.parametrize(
    ("make", "draft_tokens"),
    [
        (qwen3_next, 1),
        (qwen3_next, 4),
        (lfm2_moe, 4),
        (nemotron_h, 4),
        *(pytest.param(make, 4, marks=pytest.mark.full) for make in (bailing_hybrid, minimax)),
    ],
)
def test_a_recurrent_state_is_rolled_back_when_drafts_are_rejected(
    make: Callable[..., RawConfig], draft_tokens: int, tmp_path: Path
) -> None:
    config = make(max_position_embeddings=512)
    model = write_model(tmp_path, config, seed=1)
    requests = [(prompt_ids(config, seed, 20 + seed), params(seed, max_tokens=150)) for seed in range(3)]
    plain, drafted, engine = compare(model, requests, draft_tokens, seed=7)
    assert drafted < plain
    assert engine.plan.state_bytes == 2 * engine.plan.num_states * _state_bytes(engine)


@pytest.mark.full
@pytest.mark.parametrize(
    "config",
    [
        glm_moe_dsa(max_position_embeddings=512, index_topk=19),
        llama4_text(max_position_embeddings=512, attention_chunk_size=23),
        gemma3_text(max_position_embeddings=512),
    ],
    ids=lambda config: config["model_type"],
)
def test_positions_of_rejected_drafts_are_neither_chosen_nor_seen(config: RawConfig, tmp_path: Path) -> None:
    """By an indexer, across a chunk's end, and in windows without experts."""
    model = write_model(tmp_path, config, seed=1)
    requests = [(prompt_ids(config, seed, 20 + seed), params(seed, max_tokens=150)) for seed in range(3)]
    plain, drafted, _ = compare(runnable(model, tmp_path), requests, 4, seed=7)
    assert drafted < plain


def test_an_answer_that_runs_again_gets_no_proposals_so_its_step_fits_the_plan(delta_model: Path) -> None:
    config = qwen3_next(max_position_embeddings=512)
    requests = [(prompt_ids(config, seed, 20), params(seed, max_tokens=60)) for seed in range(2)]
    compare(delta_model, requests, 8, seed=3, chunk_tokens=1, max_sequences=2)


def _state_bytes(engine: Engine) -> int:
    return _native.recurrent_state_bytes(1, state_shapes(engine.config))


@pytest.mark.parametrize(
    "draft_tokens", [1, *(pytest.param(number, marks=pytest.mark.full) for number in (2, 3)), 4]
)
def test_grammars_stop_strings_and_limits_end_an_answer_at_the_same_token(
    text_model: Path, draft_tokens: int
) -> None:
    prompt = [3, 4, 5]
    with Engine.open(text_model, memory="2GiB", threads=1) as engine:
        free = engine.generate(prompt, params(1)).text
    grammar = Grammar(kind="json_schema", text=SCHEMA)
    more: list[dict[str, Any]] = [
        {"grammar": grammar, "ignore_eos": False, "max_tokens": 200},
        {"grammar": grammar, "ignore_eos": False, "max_tokens": 200, "logprobs": 1},
        {"stop": (free[12:15],)},
        {"max_tokens": 7},
        {"max_tokens": 1},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"min_tokens": 5, "ignore_eos": False},
        {"max_tokens": 0, "prompt_logprobs": 0},
    ]
    requests = [(prompt, params(1, **own)) for own in more]
    compare(text_model, requests, draft_tokens, seed=draft_tokens, grammars=True)


@pytest.mark.parametrize("model", ["text_model", "delta_model"])
def test_preempted_sequences_and_shared_prefixes_give_the_same_text(
    model: str, request: pytest.FixtureRequest
) -> None:
    shared = prompt_ids({"vocab_size": 80}, 1, 40)
    requests = [([*shared, 5 + number], params(number, max_tokens=60)) for number in range(5)]
    *_, engine = compare(request.getfixturevalue(model), requests, 4, seed=3, context=160)
    assert engine.plan.context_tokens == 160


def test_preemption_happens_with_a_drafter(text_model: Path) -> None:
    """Otherwise the test above would prove nothing."""
    requests = [
        (prompt_ids({"vocab_size": 80}, number, 40), params(number, max_tokens=60)) for number in range(5)
    ]
    drafter = RandomDrafter(1, VOCAB)
    with Engine.open(
        text_model, memory="2GiB", threads=1, context=160, drafter=drafter, draft_tokens=4
    ) as engine:
        run(engine, requests)
        assert engine.facts().num_preempted > 0


def test_answers_to_one_prompt_fork_with_a_drafter(text_model: Path) -> None:
    prompt, own = [7, 8, 9] * 6, SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True)

    def answers(engine: Engine) -> list[list[int]]:
        sequences = engine.requests.prepare(prompt, own, num_answers=4)
        engine.enqueue(sequences)
        while any(one.result is None for one in sequences):
            engine.step()
        return [one.new_ids for one in sequences]

    with Engine.open(text_model, memory="2GiB", threads=1) as engine:
        expected = answers(engine)
    drafter = RandomDrafter(2, VOCAB, [[*prompt, *new] for new in expected])
    with Engine.open(text_model, memory="2GiB", threads=1, drafter=drafter, draft_tokens=3) as engine:
        assert answers(engine) == expected
    assert drafter.num_proposed > 0


def test_a_rejected_token_is_never_published_as_a_prefix(text_model: Path) -> None:
    """The content of every kept block is part of a prompt and its answer."""
    prompt = [9, 8, 7] * 4
    drafter = RandomDrafter(4, VOCAB)  # it knows no answer: nearly all of its drafts are rejected
    with Engine.open(text_model, memory="2GiB", threads=1, drafter=drafter, draft_tokens=4) as engine:
        result = engine.generate(prompt, params(0, max_tokens=100))
        kept = [content for content in engine._started.cache.blocks._contents if content is not None]
        assert len(kept) == (len(prompt) + 100 - 1) // 16
        whole = [*prompt, *result.token_ids]
        for content in kept:
            tokens = memoryview(content.tokens).cast("i").tolist()
            assert any(whole[at : at + 16] == tokens for at in range(0, len(whole), 16))


@pytest.mark.parametrize("residency", ["resident", "smallest cache"])
def test_a_drafter_works_at_every_budget_and_thread_count(residency: str) -> None:
    reference = next(one for one in REFERENCES if one.name == "qwen3_moe_plain")
    slots = {"expert_slots": 4} if residency == "smallest cache" else {}
    requests = [(reference.input_ids, params(number, max_tokens=24)) for number in range(3)]
    for threads in (1, 2):
        compare(reference.directory, requests, 3, seed=threads, threads=threads, **slots)
