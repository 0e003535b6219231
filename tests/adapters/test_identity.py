"""Budget, chunks, batches, threads, prefixes and preemption change how fast a token of an adapter comes, never which.

Every comparison is exact to the bit. A batch mixes three adapters of different ranks and scales, and the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from tests.helpers.adapters import open_adapted
from tests.models.references import ADAPTERS, DIRECTORY, Reference
from tests.models.runnable import runnable
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors

# Prompt and answer of each fit one block of KV positions, and eight blocks are the whole context.
PROMPT_TOKENS, NUM_NEW = 8, 8
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_tokens=NUM_NEW, temperature=0.9, seed=5, ignore_eos=True, logprobs=2)
LONG = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=2)
NAMES = ("deepseek_v3_plain", "glm4_moe_plain", "gpt_oss_plain", "qwen3_moe_plain")
# Which adapter each prompt of a batch asks for.
BATCH = ("own", None, "half", "attention", "own", "silent", None, "attention")

Answers = list[tuple[list[int], Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A base and its adapters: the committed one, the same at half its scale, its attention alone, and scale zero."""

    base: Path
    adapters: Mapping[str, Path | tuple[Path, float]]
    prompts: tuple[list[int], ...]

    @contextmanager
    def opened(self, **options: Any) -> Iterator[Engine]:
        with open_adapted(self.base, self.adapters, **{"context": 128} | options) as engine:
            yield engine

    def answers(self, params: SamplingParams = GREEDY, **options: Any) -> Answers:
        """All of the batch, together."""
        with self.opened(**{"max_sequences": len(BATCH)} | options) as engine:
            found = engine.generate_batch(self.prompts, params, adapter=BATCH)
            return [(one.token_ids, one.logprobs) for one in found]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param)
    own = part_of(ADAPTERS / request.param, root / "own", lambda name: True)
    attention = part_of(own, root / "attention", lambda name: "self_attn" in name)
    adapters = {"own": own, "half": (own, 0.5), "attention": attention, "silent": (own, 0.0)}
    ids = Reference(DIRECTORY / request.param).input_ids
    prompts = tuple(ids[number : number + PROMPT_TOKENS] for number in range(len(BATCH)))
    return Case(base=runnable(DIRECTORY / request.param, root), adapters=adapters, prompts=prompts)


def part_of(adapter: Path, out: Path, is_kept: Callable[[str], bool]) -> Path:
    """The same adapter with some of its tensors."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    kept = {name: ("F32", values) for name, values in tensors.items() if is_kept(name)}
    write_safetensors(out / "adapter_model.safetensors", kept)
    return out


_ALONE: dict[tuple[Case, str], Answers] = {}


def alone(case: Case, params: SamplingParams = GREEDY) -> Answers:
    """Each prompt by itself, with every expert in memory: what all others must equal."""
    if (key := (case, repr(params))) not in _ALONE:
        with case.opened(max_sequences=1, prefix_reuse=False) as engine:
            found = [
                engine.generate(prompt, params, adapter=adapter)
                for prompt, adapter in zip(case.prompts, BATCH, strict=True)
            ]
        _ALONE[key] = [(one.token_ids, one.logprobs) for one in found]
    return _ALONE[key]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_mixed_batch_answers_as_each_prompt_alone(case: Case, params: SamplingParams) -> None:
    assert case.answers(params) == alone(case, params)


@pytest.mark.parametrize("expert_slots", [None, 3, 5, 9])
def test_a_budget_changes_no_answer(case: Case, expert_slots: int | None) -> None:
    assert case.answers(expert_slots=expert_slots) == alone(case)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_answer(case: Case, threads: int) -> None:
    assert case.answers(threads=threads, expert_slots=6) == alone(case)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 17])
def test_chunks_change_no_answer(case: Case, chunk_tokens: int) -> None:
    assert case.answers(chunk_tokens=chunk_tokens, expert_slots=7) == alone(case)


def test_a_prefix_belongs_to_its_adapter(case: Case) -> None:
    """The same prompt, asked with each adapter in turn and again: what is found again is its own."""
    prompt = case.prompts[0] * 5
    names = ("own", None, "attention", "half", "silent")
    with case.opened(max_sequences=1, prefix_reuse=False) as engine:
        expected = [engine.generate(prompt, GREEDY, adapter=name).token_ids for name in names]
    with case.opened(max_sequences=2) as engine:
        first = [engine.generate(prompt, GREEDY, adapter=name) for name in names]
        second = [engine.generate(prompt, GREEDY, adapter=name) for name in names]
    assert [one.token_ids for one in first] == [one.token_ids for one in second] == expected
    assert all(one.usage["cached_tokens"] > 0 for one in second)
    assert first[0].usage["cached_tokens"] == first[2].usage["cached_tokens"] == 0


def test_preemption_changes_no_answer(case: Case) -> None:
    """A KV cache with room for few sequences: others are put back, and computed again."""
    with case.opened(max_sequences=len(BATCH), context=96) as engine:
        found = engine.generate_batch(case.prompts, LONG, adapter=BATCH)
        assert engine.facts().num_preempted > 0
    assert [(one.token_ids, one.logprobs) for one in found] == alone(case, LONG)


def test_an_adapter_of_scale_zero_has_the_bits_of_the_base(case: Case) -> None:
    prompt = case.prompts[0]
    with case.opened() as engine:
        silent, base = engine.logits(prompt, adapter="silent"), engine.logits(prompt)
    np.testing.assert_array_equal(silent, base)
    np.testing.assert_array_equal(base, base_logits(case, prompt))


def base_logits(case: Case, prompt: list[int]) -> Array:
    with open_adapted(case.base, {}, context=128) as engine:
        return engine.logits(prompt)


def test_an_adapter_that_is_loaded_again_answers_as_before(case: Case) -> None:
    own = case.adapters["own"]
    assert isinstance(own, Path)
    with case.opened(expert_slots=6) as engine:
        before = engine.generate(case.prompts[0], GREEDY, adapter="own")
        engine.drop_adapter("own")
        base = engine.generate(case.prompts[0], GREEDY)
        engine.load_adapter("own", own)
        again = engine.generate(case.prompts[0], GREEDY, adapter="own")
    assert (before.token_ids, before.logprobs) == (again.token_ids, again.logprobs) == alone(case)[0]
    assert base.token_ids != before.token_ids


def test_adapters_in_memory_change_nothing_of_the_base(case: Case) -> None:
    with open_adapted(case.base, {}, context=128) as engine:
        expected = engine.generate(case.prompts[1], GREEDY)
    assert (expected.token_ids, expected.logprobs) == alone(case)[1]
