"""Requests name adapters: each is answered as it would be alone, and reuses no prefix that another adapter made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, SamplingParams
from argosy.adapters import needs, registry
from argosy.adapters.files import AdapterFiles
from argosy.checkpoint.files import ModelFiles
from argosy.config import KV_BLOCK_TOKENS
from argosy.engine.sequence import Sequence
from argosy.errors import CheckpointError, UsageError
from argosy.model.step import Step
from tests.adapters.random_adapter import random_adapter
from tests.models.references import REFERENCES

REFERENCE = next(reference for reference in REFERENCES if reference.name == "qwen3_moe_plain")
RECURRENT = next(reference for reference in REFERENCES if reference.name.startswith("qwen3_next"))
TARGETS = {"q", "k", "v", "o", "router", "head", "embed"}
INVOCATION = (7, 9)
PROMPT = [(5 * at + 3) % 90 + 10 for at in range(3 * KV_BLOCK_TOKENS + 5)]  # without 7 and 9
SHORT = PROMPT[:9]  # several of these run in one step
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _made_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are numbers: seeds of random adapters. `invoked-N` has invocation tokens."""

    def open_adapter(path: str | Path, files: ModelFiles, *, columns: str = "") -> AdapterFiles:
        kind, _, seed = Path(path).name.rpartition("-")
        if kind == "missing":
            raise CheckpointError(f"{path} does not exist")
        tokens = INVOCATION if kind == "invoked" else ()
        return random_adapter(files.own_config, seed=int(seed), targets=TARGETS, invocation_tokens=tokens)

    for module in (registry, needs):
        monkeypatch.setattr(module, "open_adapter", open_adapter)


def open_engine(model: Path = REFERENCE.directory, **options: Any) -> Engine:
    return Engine.open(model, **{"memory": "2GiB", "threads": 1, "kv_dtype": "f32", **options})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine(expert_slots=4) as engine:
        yield engine


@pytest.fixture
def two(engine: Engine) -> Iterator[Engine]:
    """An engine with the adapters `one`, `two`, `none` of no effect, and `invoked`."""
    for name, path, factor in (
        ("one", "1", 1.0),
        ("two", "2", 1.0),
        ("none", "1", 0.0),
        ("invoked", "invoked-3", 1.0),
    ):
        engine.load_adapter(name, path, factor)
    yield engine
    for adapter in engine.adapters:
        engine.drop_adapter(adapter.name)


def tokens(engine: Engine, adapter: str | None = None, prompt: list[int] = PROMPT) -> list[int]:
    return engine.generate(prompt, GREEDY, adapter=adapter).token_ids


def cached(engine: Engine, adapter: str | None, prompt: list[int] = PROMPT) -> int:
    return engine.generate(prompt, GREEDY, adapter=adapter).usage["cached_tokens"]


def alone(
    adapter: str | None, model: Path = REFERENCE.directory, prompt: list[int] = PROMPT, **options: Any
) -> list[int]:
    """The answer of a new engine, which has no prefixes."""
    with open_engine(model, loras={"one": "1", "two": "2", "invoked": "invoked-3"}, **options) as engine:
        return tokens(engine, adapter, prompt)


def test_answers_of_a_mixed_batch_equal_those_of_each_adapter_alone(two: Engine) -> None:
    wanted = {name: alone(name, prompt=SHORT) for name in (None, "one", "two")}
    assert len({tuple(one) for one in wanted.values()}) == 3

    names = ["one", None, "two", "one", "none"]
    found = two.generate_batch([SHORT] * len(names), GREEDY, adapter=names)

    assert [one.token_ids for one in found] == [wanted[None if name == "none" else name] for name in names]


def test_a_prefix_is_reused_by_its_own_adapter_alone(two: Engine) -> None:
    prompt = [11, *PROMPT]

    assert [cached(two, name, prompt) for name in (None, "one", "two")] == [0, 0, 0]
    assert all(cached(two, name, prompt) for name in (None, "one", "two"))
    assert [tokens(two, name, prompt) for name in (None, "one", "two")] == [
        alone(name, prompt=prompt) for name in (None, "one", "two")
    ]


def test_an_adapter_with_another_factor_or_other_content_reuses_no_prefix(two: Engine) -> None:
    prompt = [12, *PROMPT]
    two.load_adapter("half", "1", 0.5)
    tokens(two, "one", prompt)

    assert cached(two, "half", prompt) == 0
    two.drop_adapter("one")
    two.load_adapter("one", "4")
    assert cached(two, "one", prompt) == 0
    two.drop_adapter("one")
    two.load_adapter("one", "1")
    assert cached(two, "one", prompt)  # the very same adapter, loaded again


def test_an_adapter_with_factor_zero_is_the_base(two: Engine) -> None:
    np.testing.assert_array_equal(two.logits(PROMPT, adapter="none"), two.logits(PROMPT))
    prompt = [13, *PROMPT]
    tokens(two, None, prompt)
    assert cached(two, "none", prompt)


def test_an_activated_adapter_shares_the_prefix_before_its_invocation(two: Engine) -> None:
    before = [14, *PROMPT][: 2 * KV_BLOCK_TOKENS + 4]
    prompt = [*before, *INVOCATION, *PROMPT[:20]]
    tokens(two, None, prompt)

    first = two.generate(prompt, GREEDY, adapter="invoked")

    assert first.usage["cached_tokens"] == 2 * KV_BLOCK_TOKENS  # of the base; not the block of the invocation
    assert first.token_ids == alone("invoked", prompt=prompt)
    assert first.token_ids != tokens(two, None, prompt)
    assert cached(two, "invoked", prompt) == len(prompt) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
    logits, base = two.logits(prompt, adapter="invoked"), two.logits(prompt)
    np.testing.assert_array_equal(logits[: len(before)], base[: len(before)])
    assert (logits[len(before) :] != base[len(before) :]).any(axis=1).all()


def test_an_activated_adapter_begins_where_its_tokens_appear_last(two: Engine) -> None:
    prompt = [15, *INVOCATION, *PROMPT[:30], *INVOCATION, 20, 21]
    logits, base = two.logits(prompt, adapter="invoked"), two.logits(prompt)

    assert (logits != base).any(axis=1).tolist() == [False] * 33 + [True] * 4
    np.testing.assert_array_equal(
        two.logits([16, 7, *PROMPT], adapter="invoked"), two.logits([16, 7, *PROMPT])
    )


def test_blocks_differ_when_an_invocation_begins_elsewhere_in_them(two: Engine) -> None:
    """The same tokens of a block, computed with the adapter from another position on."""
    head = [17, *INVOCATION, *PROMPT[: KV_BLOCK_TOKENS - 4], INVOCATION[0]]
    assert len(head) == KV_BLOCK_TOKENS
    from_first, from_last = [*head, 30, *PROMPT[:20]], [*head, INVOCATION[1], *PROMPT[:20]]
    tokens(two, "invoked", from_first)

    assert tokens(two, "invoked", from_last) == alone("invoked", prompt=from_last)


@pytest.mark.parametrize("prefix", [True, False])
def test_recurrent_states_are_reused_by_their_own_adapter_alone(
    prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.engine.prefix.SNAPSHOT_PROMPT_TOKENS", 32)

    def adapted(engine: Engine) -> list[int]:
        return tokens(engine, "one", prompt)

    prompt = [(7 * at + 3) % 45 + 10 for at in range(100)]
    with open_engine(RECURRENT.directory, loras={"one": "1"}, prefix_reuse=prefix) as engine:
        base, first = tokens(engine, None, prompt), adapted(engine)
        again = engine.generate(prompt, GREEDY, adapter="one")
        assert (again.usage["cached_tokens"] > 80) == prefix
        assert [base, first, again.token_ids] == [tokens(engine, None, prompt), first, first]
    assert first == alone("one", RECURRENT.directory, prompt)
    assert first != base


def test_prefixes_in_files_belong_to_their_adapter(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    loras = {"one": "1", "two": "2"}
    with open_engine(loras=loras, kv_dir=kept) as engine:
        wanted = {name: tokens(engine, name) for name in (None, "one")}
    with open_engine(loras={"two": "2", "one": "1"}, kv_dir=kept) as engine:  # other numbers
        assert [cached(engine, name) for name in ("two", "one", None)] == [0, *[3 * KV_BLOCK_TOKENS] * 2]
    with open_engine(loras=loras, kv_dir=kept) as engine:
        assert {name: tokens(engine, name) for name in (None, "one")} == wanted


def test_several_answers_to_a_prompt_have_its_adapter(two: Engine) -> None:
    sequences = two.requests.prepare([18, *PROMPT], GREEDY, num_answers=3, adapter="two")
    two.enqueue(sequences)
    while two.has_work:
        two.step()

    wanted = alone("two", prompt=[18, *PROMPT])
    assert [one.new_ids for one in sequences] == [wanted] * 3


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, {"chunk_tokens": 7}),
        (SHORT, {"context": 64, "max_sequences": 6}),  # 4 blocks for 6 answers, most of which take 2
        (SHORT * 2, {"speculate": "lookup"}),
    ],
)
def test_chunks_preemption_and_drafts_change_no_answer(prompt: list[int], options: dict[str, Any]) -> None:
    longer = replace(GREEDY, max_tokens=30)
    names = ["one", None, "two", "one", "two", None]
    with open_engine(loras={"one": "1", "two": "2"}, prefix_reuse=False) as engine:
        wanted = {name: engine.generate(prompt, longer, adapter=name).token_ids for name in names}
    with open_engine(loras={"one": "1", "two": "2"}, **options) as engine:
        found = engine.generate_batch([prompt] * len(names), longer, adapter=names)
        assert ("context" in options) == bool(engine.facts().num_preempted)
        assert [one.token_ids for one in found] == [wanted[name] for name in names]


def test_embeddings_have_an_adapter(two: Engine) -> None:
    base, adapted = two.embed([PROMPT]), two.embed([PROMPT], adapter="one")

    assert not np.allclose(base, adapted, atol=1e-3)
    np.testing.assert_array_equal(two.embed([PROMPT], adapter="none"), base)


def test_a_dropped_adapter_ends_its_requests_and_only_then_frees_its_number(two: Engine) -> None:
    wanted = alone("one")
    sequence = two.submit(PROMPT, GREEDY, adapter="one")
    two.step()
    assert [one.num_requests for one in two.adapters if one.name == "one"] == [1]
    assert sequence.adapter is not None

    two.drop_adapter("one")
    with pytest.raises(UsageError, match="unknown adapter 'one'; this model has: two, none, invoked"):
        two.submit(PROMPT, GREEDY, adapter="one")
    two.load_adapter("one", "4")
    other = two.submit(PROMPT, GREEDY, adapter="one")
    assert other.adapter is not None
    assert other.adapter.number != sequence.adapter.number
    while two.has_work:
        two.step()

    assert sequence.new_ids == wanted
    assert other.new_ids != wanted
    assert two.load_adapter("five", "5").num_requests == 0
    assert two.submit(PROMPT, GREEDY, adapter="five").adapter == replace(
        sequence.adapter,
        name="five",
        identity=two.requests.adapters._named["five"].identity,  # type: ignore[union-attr]
    )
    two.generate(PROMPT, GREEDY)


def test_a_replaced_adapter_ends_its_requests_with_its_own_pairs(two: Engine) -> None:
    wanted, adapters = alone("one"), two.requests.adapters
    assert adapters is not None
    begun = two.submit(PROMPT, GREEDY, adapter="one")
    two.step()
    with pytest.raises(UsageError, match="there is already an adapter one"):
        two.load_adapter("one", "4")
    with pytest.raises(CheckpointError):
        two.load_adapter("one", "missing-4", replaces=True)
    two.load_adapter("one", "4", replaces=True)
    then = two.submit(PROMPT, GREEDY, adapter="one")
    while two.has_work:
        two.step()
    assert begun.new_ids == wanted != then.new_ids
    two.load_adapter("one", "1", replaces=True)
    assert adapters._leaving == []
    assert tokens(two, "one") == wanted


def test_a_request_prepared_before_its_adapter_is_dropped_is_refused(two: Engine) -> None:
    sequences = two.requests.prepare(PROMPT, GREEDY, adapter="one")
    two.drop_adapter("one")
    with pytest.raises(UsageError, match="unknown adapter 'one'"):
        two.enqueue(sequences)

    two.load_adapter("one", "4")
    with pytest.raises(UsageError, match="the adapter one was replaced"):
        two.enqueue(sequences)


def test_a_cancelled_request_frees_its_dropped_adapter(two: Engine) -> None:
    sequence = two.submit(PROMPT, GREEDY, adapter="one")
    two.drop_adapter("one")
    adapters = two.requests.adapters
    assert adapters is not None
    assert len(adapters._leaving) == 1

    two.cancel(sequence)

    assert adapters._leaving == []


def test_a_step_without_adapters_has_none(two: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Step] = []
    forward = two._started.model.forward

    def noting(step: Step) -> Any:
        steps.append(step)
        return forward(step)

    monkeypatch.setattr(two._started.model, "forward", noting)
    tokens(two)
    assert all(step.adapters is None for step in steps)
    two.generate_batch([SHORT, SHORT], GREEDY, adapter=["two", None])
    assert {tuple(np.unique(step.adapters)) for step in steps if step.adapters is not None} == {(-1, 1)}


@pytest.mark.parametrize(
    ("name", "path", "factor", "said"),
    [
        ("a b", "1", 1.0, "cannot be named 'a b'"),
        ("", "1", 1.0, "cannot be named ''"),
        ("latest", "1", 1.0, "cannot be named 'latest'"),
        ("a" * 65, "1", 1.0, "cannot be named"),
        ("../up", "1", 1.0, "cannot be named"),
        ("one", "2", 1.0, "already an adapter one"),
        ("nan", "1", float("nan"), "a number from -10000 to 10000"),
        ("huge", "1", 1e30, "a number from -10000 to 10000"),
    ],
)  # fmt: skip
def test_invalid_adapters_are_refused(two: Engine, name: str, path: str, factor: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        two.load_adapter(name, path, factor)


def test_an_engine_has_at_most_64_adapters(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOST_ADAPTERS", 2)
    for name in "ab":
        engine.load_adapter(name, "1", 0)
    with pytest.raises(UsageError, match="there are 2 adapters"):
        engine.load_adapter("c", "1")
    for name in "ab":
        engine.drop_adapter(name)


def test_an_engine_whose_adapter_cannot_be_read_does_not_open() -> None:
    with pytest.raises(CheckpointError, match="missing-1 does not exist"):
        open_engine(loras={"one": "missing-1"})


def test_a_closed_engine_takes_no_adapter() -> None:
    with open_engine() as engine:
        with pytest.raises(UsageError, match="unknown adapter 'x': this engine has none"):
            engine.generate(PROMPT, GREEDY, adapter="x")
        with pytest.raises(UsageError, match="unknown adapter 'x': this engine has none"):
            engine.drop_adapter("x")
    with pytest.raises(UsageError, match="closed"):
        engine.load_adapter("one", "1")


def test_a_sequence_without_adapter_marks_nothing(engine: Engine) -> None:
    (sequence,) = engine.requests.prepare(PROMPT, GREEDY)
    assert isinstance(sequence, Sequence)
    assert sequence.marks_from(0, 16) == b""
