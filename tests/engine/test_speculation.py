"""An engine that speculates gives the text that it gives without, counts its drafts, and records no rejected token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import Engine, SamplingParams
from argosy.budget.footprint import ModelFootprint
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import plan_memory
from argosy.checkpoint.files import ModelFiles
from argosy.config import DRAFT_TOKENS, DRAFTED_AT_ONCE, EngineConfig
from argosy.engine.drafts.drafter import Drafter
from argosy.engine.drafts.lookup import LookupDrafter
from argosy.engine.sequence import Result
from argosy.errors import UsageError
from argosy.experts.recording import StepRoutes
from argosy.model.families import open_model
from argosy.open.models import configure
from tests.engine.random_drafter import RandomDrafter
from tests.models.tiny import prompt_ids, qwen3_moe, write_model
from tests.models.tiny_delta import qwen3_next

CONFIG = qwen3_moe(max_position_embeddings=1024)
# Prompts that repeat themselves, so that a lookup finds something to propose.
PROMPTS = [3 * prompt_ids(CONFIG, seed, 12 + seed) for seed in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("text") / "model", CONFIG, seed=2)


@pytest.fixture(scope="module")
def delta_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("delta"), qwen3_next(max_position_embeddings=512), seed=1)


def params(temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=64, temperature=temperature, seed=5, ignore_eos=True, top_k=4)


def answers(engine: Engine, temperature: float) -> list[Result]:
    return [engine.generate(prompt, params(temperature)) for prompt in PROMPTS]


@pytest.mark.covering(1)
@pytest.mark.parametrize("slots", [None, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_the_same_with_lookup_at_every_budget(
    model: Path, slots: int | None, temperature: float
) -> None:
    settings = {"memory": "2GiB", "threads": 1, "max_sequences": 1}
    with Engine.open(model, **settings) as engine:
        expected = [one.token_ids for one in answers(engine, temperature)]
    if slots is not None:
        settings["expert_slots"] = slots
    # With a governor, and without one, so that as many drafts as possible run.
    for more in ({"speculate": "lookup"}, {"drafter": LookupDrafter(), "draft_tokens": 3}):
        with Engine.open(model, **settings, **more) as engine:
            results = answers(engine, temperature)
            total = engine.ledger
        assert [one.token_ids for one in results] == expected
        assert total.proposed_tokens > total.confirmed_tokens > 0
        assert total.proposed_tokens == sum(one.ledger.proposed_tokens for one in results)
        assert total.confirmed_tokens == sum(one.ledger.confirmed_tokens for one in results)
        assert (total.won_s is None) == ("drafter" in more)
        if total.won_s is not None:
            assert total.won_s == pytest.approx(sum(one.ledger.won_s or 0.0 for one in results))


def test_the_plan_counts_what_drafts_take(model: Path) -> None:
    files = open_model(model)

    def plan(**options: Any) -> tuple[EngineConfig, MemoryPlan]:
        config = configure(model, files, **{"memory": "2GiB", "threads": 1, "max_sequences": 8, **options})
        return config, plan_memory(ModelFootprint(files, config), config, process_bytes=0)

    _, plain = plan()
    config, found = plan(speculate="lookup")
    assert config.draft_tokens == DRAFT_TOKENS
    assert config.decode_tokens == 8 + DRAFTED_AT_ONCE * DRAFT_TOKENS
    assert found.working_bytes > plain.working_bytes
    # Ids and searches of two sequences that fill the context, at least 8 bytes a token.
    assert found.process_bytes - plain.process_bytes >= DRAFTED_AT_ONCE * found.context_tokens * 8
    assert plan(speculate="lookup", max_sequences=1)[0].decode_tokens == 1 + DRAFT_TOKENS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": "guess"}, "unknown speculate 'guess'; known: off, lookup, mtp"),
        ({"speculate": "lookup", "draft_tokens": 0}, "draft_tokens must be at least 1 to speculate, found 0"),
        ({"draft_tokens": 65}, "draft_tokens must be at most 64, found 65"),
        ({"speculate": "lookup", "drafter": LookupDrafter()}, "a drafter is given, and speculate='lookup'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    model: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.open(model, memory="2GiB", threads=1, **options)


class Told:
    """A recorder that keeps the choices of decode tokens by sequence, in order."""

    nbytes = 0

    def __init__(self) -> None:
        self.choices: dict[int, list[NDArray[np.int32]]] = {}

    def __call__(self, files: ModelFiles, config: EngineConfig) -> Told:
        return self

    def record(self, steps: Sequence[StepRoutes], lookups: int, hits: int) -> None:
        for step in steps:
            for row in np.flatnonzero(step.is_decode):
                number = step.numbers[step.sequence[row]]
                self.choices.setdefault(number, []).append(step.choices[:, row].copy())


@pytest.mark.parametrize("kind", ["model", "delta_model"])
def test_rejected_tokens_and_those_that_run_again_are_not_recorded(
    kind: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    small = {"vocab_size": 80}  # fits both models
    prompts = [prompt_ids(small, seed, 20) for seed in range(3)]

    def run(drafter: Drafter | None) -> tuple[list[list[int]], Told]:
        told = Told()
        with Engine.open(
            path, memory="2GiB", threads=1, recorder=told, drafter=drafter, draft_tokens=3 if drafter else 0
        ) as engine:
            sequences = [engine.submit(prompt, params(0.0)) for prompt in prompts]
            while engine.has_work:
                engine.step()
        return [[*one.prompt_ids, *one.new_ids] for one in sequences], told

    texts, expected = run(None)
    drafter = RandomDrafter(3, small["vocab_size"], texts, right_share=0.6)
    again, found = run(drafter)
    assert again == texts
    assert drafter.num_proposed > 50
    assert found.choices.keys() == expected.choices.keys()
    for number, choices in expected.choices.items():
        assert np.array_equal(found.choices[number], choices)
