"""Marked text has the tokens that its seed and its key give, is recognised with the key, and only with the key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import Engine, Grammar, SamplingParams
from argosy.config import WATERMARK_CONTEXT
from argosy.engine.sampler import Sampler, SamplerState
from argosy.engine.watermark import KEY_BYTES, Watermark, make_key
from argosy.errors import UsageError
from argosy.guard.watermark import Evidence, first_ngrams, judge
from tests.engine.random_drafter import RandomDrafter
from tests.engine.test_constraint import VOCAB, byte_level, byte_level_json
from tests.engine.test_sampler import reference
from tests.models.tiny import prompt_ids, qwen3_moe, write_model

KEY = bytes(range(KEY_BYTES))
CONFIG = qwen3_moe(vocab_size=VOCAB, max_position_embeddings=1024, eos_token_id=byte_level().eos_ids[0])
SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
SAMPLER = Sampler()


def judged(token_ids: Sequence[int], key: bytes = KEY) -> Evidence:
    return judge(Watermark(key).words(first_ngrams(token_ids)))


def begun(key: bytes, seed: int = 0, answer: Sequence[int] = (3, 1, 4, 1)) -> SamplerState:
    """The state of an answer that has as many tokens as a context."""
    state = SamplerState([], seed, Watermark(key).begin())
    for token_id in answer:
        state.accept(token_id)
    return state


def sampled(state: SamplerState, params: SamplingParams, *, num_new: int, spread: float = 1.5) -> list[int]:
    """Tokens from logits that are new at each step, as those of a model are."""
    rng = np.random.default_rng(state.seed)
    return [
        SAMPLER.sample(rng.normal(0, spread, 300).astype(np.float32), params, state).token_id
        for _ in range(num_new)
    ]


# ── what a mark does to a draw ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.2),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_over_keys_tokens_are_drawn_as_often_as_their_probabilities_say(params: SamplingParams) -> None:
    logits = np.random.default_rng(5).normal(0, 1.5, 12).astype(np.float32)
    draws = 1000
    counts = np.zeros(logits.size)
    for number in range(draws):
        state = begun(number.to_bytes(KEY_BYTES), seed=number)
        counts[SAMPLER.sample(logits, params, state).token_id] += 1
        assert state.mark is not None
        assert state.mark.num_marked == 1
    chances = np.zeros(logits.size)
    for token_id, chance in reference(logits.tolist(), params, [], []).items():
        chances[token_id] = chance
    assert (counts[chances == 0] == 0).all()
    expected = draws * chances[chances > 0]
    assert ((counts[chances > 0] - expected) ** 2 / expected).sum() < 40  # as in test_sampler.py


def test_a_long_flat_tail_keeps_its_share_of_the_draws() -> None:
    """Only the likeliest tokens are reweighed; the others are drawn as without a mark."""
    logits = np.full(5000, -8.0, np.float32)  # 0.0003 of the best one's weight each
    logits[:4] = 0.0
    draws = 600
    in_tail = sum(
        SAMPLER.sample(logits, SamplingParams(temperature=1.0), begun(KEY, seed)).token_id >= 4
        for seed in range(draws)
    )
    share = 4996 * math.exp(-8) / (4 + 4996 * math.exp(-8))
    assert abs(in_tail - draws * share) < 4 * math.sqrt(draws * share * (1 - share))


def test_a_marked_answer_is_recognised_with_its_key_and_with_no_other() -> None:
    token_ids = sampled(begun(KEY), SamplingParams(temperature=1.0), num_new=150)
    assert judged(token_ids).log10_p < -12
    for other in range(5):
        assert judged(token_ids, bytes([other]) * KEY_BYTES).p_value > 1e-3


def test_the_less_choice_there_was_the_less_is_recognised() -> None:
    found = [
        judged(sampled(begun(KEY), SamplingParams(temperature=temperature), num_new=150)).log10_p
        for temperature in (1.0, 0.35, 0.01)
    ]
    assert found[0] < found[1] - 3
    assert found[2] > -3


def test_greedy_answers_and_tokens_without_a_choice_are_not_marked() -> None:
    logits = np.array([4.0, 0.0, -9.0, -9.0], np.float32)  # the best has 0.98 of the weight
    state = begun(KEY)
    for _ in range(5):
        SAMPLER.sample(logits, SamplingParams(temperature=1.0), state)
        SAMPLER.sample(logits, SamplingParams(temperature=0), state)
    assert state.mark is not None
    assert state.mark.num_marked == 0


def test_a_context_is_marked_once_in_an_answer() -> None:
    logits = np.zeros(8, np.float32)
    state = begun(KEY)
    mark = state.mark
    assert mark is not None
    ids, even = np.arange(8), np.full(8, 1 / 8)
    assert mark.reweigh(ids, even) is not None
    for token_id in (9, 3, 1, 4, 1):  # the same context again
        state.accept(token_id)
    assert mark.reweigh(ids, even) is None
    SAMPLER.sample(logits, SamplingParams(temperature=1.0), state)  # and another one
    assert mark.reweigh(ids, even) is not None


def test_an_answer_is_not_marked_before_it_has_a_context() -> None:
    state = SamplerState([7] * 50, 0, Watermark(KEY).begin())
    logits = np.zeros(8, np.float32)
    for _ in range(WATERMARK_CONTEXT):
        SAMPLER.sample(logits, SamplingParams(temperature=1.0), state)
        assert state.mark is not None
        assert state.mark.num_marked == 0
    SAMPLER.sample(logits, SamplingParams(temperature=1.0), state)
    assert state.mark.num_marked == 1


# ── answers of an engine ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "mark.key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("marked") / "model", CONFIG, seed=2)
    (directory / "tokenizer.json").write_text(byte_level_json())
    return directory


def opened(model: Path, **options: Any) -> Engine:
    return Engine.open(model, **({"memory": "2GiB", "threads": 1, "context": 256} | options))


@pytest.fixture(scope="module")
def expected(model: Path, key_file: Path) -> list[int]:
    """The answer alone, with every expert in memory."""
    with opened(model, watermark=key_file) as engine:
        result = engine.generate(prompt_ids(CONFIG, 1, 20), SAMPLED)
        assert result.num_marked > 10
        return list(result.token_ids)


def test_an_engine_marks_what_it_samples_unless_a_request_says_otherwise(
    model: Path, key_file: Path, expected: list[int]
) -> None:
    prompt = prompt_ids(CONFIG, 1, 20)
    unmarked = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True, watermark=False)
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    with opened(model) as engine:
        plain, plain_greedy = engine.generate(prompt, SAMPLED), engine.generate(prompt, greedy)
    assert plain.token_ids != expected
    with opened(model, watermark=key_file) as engine:
        for params, same in ((unmarked, plain), (greedy, plain_greedy)):
            found = engine.generate(prompt, params)
            assert (found.token_ids, found.num_marked) == (same.token_ids, 0)


def test_a_form_is_not_marked_and_the_text_before_a_call_is(model: Path, key_file: Path) -> None:
    from argosy.config import Trigger

    digits = Grammar(kind="regex", text="[0-9]{20}")
    later = Grammar(kind="regex", text="[0-9]{20}", trigger=Trigger(("no such text",)))
    with opened(model, watermark=key_file, grammars=True) as engine:
        prompt = prompt_ids(CONFIG, 1, 20)
        formed = engine.generate(
            prompt, SamplingParams(max_tokens=24, temperature=1.0, seed=5, grammar=digits)
        )
        free = engine.generate(prompt, SamplingParams(max_tokens=24, temperature=1.0, seed=5, grammar=later))
    assert formed.num_marked == 0
    assert free.num_marked > 0


@pytest.mark.parametrize(
    "options",
    [{"expert_slots": 2}, {"threads": 2, "max_sequences": 2}, {"chunk_tokens": 3, "expert_slots": 6}],
    ids=["smallest cache", "threads", "chunks"],
)
def test_budget_threads_neighbours_prefixes_and_preemption_change_no_marked_token(
    model: Path, key_file: Path, expected: list[int], options: dict[str, Any]
) -> None:
    prompt = prompt_ids(CONFIG, 1, 20)
    with opened(model, watermark=key_file, **options) as engine:
        others = [engine.submit(prompt_ids(CONFIG, seed, 30), SAMPLED) for seed in (7, 8)]
        one = engine.submit(prompt, SAMPLED)
        while one.result is None:
            engine.step()
            if len(one.new_ids) == 9 and not engine._scheduler.num_preempted:
                engine._scheduler.preempt(one)  # its memory goes to others, and it is computed again
        assert engine._scheduler.num_preempted
        assert list(one.result.token_ids) == expected
        for other in others:
            engine.cancel(other)
        again = engine.generate(prompt, SAMPLED)  # from the prefix that is kept
        assert list(again.token_ids) == expected


def test_proposed_tokens_change_no_marked_token(model: Path, key_file: Path, expected: list[int]) -> None:
    prompt = prompt_ids(CONFIG, 1, 20)
    drafter = RandomDrafter(1, VOCAB, [[*prompt, *expected]])
    with opened(model, watermark=key_file, drafter=drafter, draft_tokens=3) as engine:
        found = engine.generate(prompt, SAMPLED)
    assert list(found.token_ids) == expected
    assert drafter.num_proposed


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "mark.key"
    make_key(path)
    key = path.read_bytes()
    assert (len(key), path.stat().st_mode & 0o777) == (KEY_BYTES, 0o600)
    with pytest.raises(UsageError, match="never replaced"):
        make_key(path)
    assert path.read_bytes() == key
    with pytest.raises(UsageError, match="cannot be written"):
        make_key(tmp_path / "missing" / "mark.key")
    assert key.hex() not in repr(vars(Watermark.read(path)))


def test_a_file_that_is_no_key_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mark.key"
    with pytest.raises(UsageError, match=r"cannot be read.*\n?.*argosy watermark key"):
        Watermark.read(path)
    assert not path.exists()
    for size in (0, 1, KEY_BYTES - 1, KEY_BYTES + 1, 5000):
        path.write_bytes(bytes(size))
        path.chmod(0o600)
        with pytest.raises(UsageError, match=f"expected {KEY_BYTES}"):
            Watermark.read(path)
        assert path.stat().st_size == size
    path.write_bytes(KEY)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others"):
        Watermark.read(path)
