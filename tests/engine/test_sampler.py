"""The sampler agrees with a plain reference, and draws as often as probabilities say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from argosy.config import SamplingParams
from argosy.engine.sampler import Sampler, SamplerState
from argosy.errors import ArgosyError, GrammarError, UsageError
from tests.helpers.examples import given_few

SAMPLER = Sampler()


def reference(
    logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int]
) -> dict[int, float]:
    """Return the probability of each token that may be drawn, by the nine steps of the docstring in plain Python."""
    scores = {i: float(np.float32(score)) for i, score in enumerate(logits)}
    for i, bias in params.logit_bias.items():
        scores[i] += bias
    for i in {*prompt, *answer}:
        scores[i] = (
            scores[i] / params.repetition_penalty if scores[i] > 0 else scores[i] * params.repetition_penalty
        )
    for i in set(answer):
        scores[i] -= params.presence_penalty + params.frequency_penalty * answer.count(i)
    best_first = sorted(scores, key=lambda i: (-scores[i], i))
    if params.temperature == 0:
        return {best_first[0]: 1.0}
    kept = best_first[: params.top_k or None]

    def probabilities(ids: list[int]) -> dict[int, float]:
        weights = {i: math.exp((scores[i] - scores[best_first[0]]) / params.temperature) for i in ids}
        total = sum(weights.values())
        return {i: weight / total for i, weight in weights.items()}

    inside, total = [], 0.0
    for i, probability in probabilities(kept).items():
        if total < params.top_p:
            inside.append(i)
        total += probability
    after = probabilities(inside)
    floor = params.min_p * max(after.values())
    return probabilities([i for i in inside if after[i] >= floor])


def reference_draw(chances: dict[int, float], uniform: float) -> int:
    total = 0.0
    for i, chance in chances.items():
        total += chance
        if uniform < total:
            return i
    return list(chances)[-1]


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    logit_bias=st.sampled_from([{}, {0: 3.0, 2: -100.0}]),
    seed=st.integers(0, 2**63 - 1),
)


@given_few(
    logits=st.lists(st.sampled_from([-3.0, -1.5, -0.25, 0.0, 0.5, 1.25, 4.0]), min_size=4, max_size=12),
    params=parameters,
    prompt=st.lists(st.integers(0, 3), max_size=4),
    answer=st.lists(st.integers(0, 3), max_size=5),
    few=50,
    many=200,
)
def test_the_choice_equals_the_plain_references(
    logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int]
) -> None:
    state = SamplerState(prompt, params.seed)
    for token_id in answer:
        state.accept(token_id)
    uniform = state.uniform()
    sampled = SAMPLER.sample(np.array(logits, np.float32), params, state)
    assert sampled.token_id == reference_draw(reference(logits, params, prompt, answer), uniform)
    assert state.step == len(answer) + 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.2, repetition_penalty=1.2),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(params: SamplingParams) -> None:
    logits = np.random.default_rng(5).normal(0, 1.5, 12).astype(np.float32)
    draws = 1000
    counts = np.zeros(logits.size)
    for seed in range(draws):
        counts[SAMPLER.sample(logits, params, SamplerState([1, 2], seed)).token_id] += 1
    chances = np.zeros(logits.size)
    for token_id, chance in reference(logits.tolist(), params, [1, 2], []).items():
        chances[token_id] = chance
    assert (counts[chances == 0] == 0).all()
    expected = draws * chances[chances > 0]
    chi_square = ((counts[chances > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 40  # 11 degrees of freedom: exceeded once in 30,000 sets of seeds


def test_one_seed_gives_one_answer_and_another_seed_another() -> None:
    logits = np.zeros(50, np.float32)
    params = SamplingParams(temperature=1.0)

    def answer(seed: int) -> list[int]:
        state = SamplerState([], seed)
        return [SAMPLER.sample(logits, params, state).token_id for _ in range(20)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert len(set(answer(7))) > 5  # each step has a number of its own


def test_a_sequence_draws_the_same_alone_and_among_others() -> None:
    logits = np.zeros(50, np.float32)
    params = SamplingParams(temperature=1.0)
    alone = SamplerState([], 3)
    expected = [SAMPLER.sample(logits, params, alone).token_id for _ in range(10)]
    states = [SamplerState([], seed) for seed in (1, 3, 3, 9)]
    together = [[SAMPLER.sample(logits, params, state).token_id for state in states] for _ in range(10)]
    assert [row[1] for row in together] == expected
    assert [row[2] for row in together] == expected


def test_without_a_seed_a_fresh_one_is_chosen_and_reported() -> None:
    first, second = SamplerState([]), SamplerState([])
    assert first.seed != second.seed
    assert SamplerState([], first.seed).uniform() == first.uniform()


def test_equal_scores_are_taken_in_the_order_of_their_ids() -> None:
    logits = np.zeros(30_000, np.float32)
    params = SamplingParams(temperature=1.0, top_p=0.5)
    for seed in range(20):
        state = SamplerState([], seed)
        uniform = state.uniform()
        assert SAMPLER.sample(logits, params, state).token_id == int(uniform * 15_000)


def test_the_random_number_of_a_seed_and_a_step_equals_numpys() -> None:
    state = SamplerState([], 12345)
    for step in range(5):
        expected = np.random.Generator(np.random.Philox(key=12345, counter=step)).random()
        assert state.uniform() == expected
        state.accept(0)


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    logits = np.array([0, 3, 1, 3, 3], np.float32)
    assert SAMPLER.sample(logits, SamplingParams(), SamplerState([])).token_id == 1


def test_top_k_keeps_exactly_k_tokens_and_the_lower_ids_of_a_tie() -> None:
    logits = np.array([1, 2, 1, 1, 1], np.float32)
    params = SamplingParams(temperature=5.0, top_k=3)
    drawn = {SAMPLER.sample(logits, params, SamplerState([], seed)).token_id for seed in range(200)}
    assert drawn == {0, 1, 2}


@pytest.mark.covering(1)
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(
    "cut",
    [(0, 1.0, 0.0), (0, 0.999, 0.0), (0, 0.5, 0.0), (0, 1.0, 1e-4), (0, 0.9999999, 1e-9), (5000, 0.9, 0.0)],
    ids=str,
)
def test_a_large_vocabulary_is_cut_like_a_small_one(spread: float, cut: tuple[int, float, float]) -> None:
    top_k, top_p, min_p = cut
    logits = np.random.default_rng(1).normal(0, spread, 20_000).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    chances = reference(logits.tolist(), params, [], [])
    for seed in range(30):
        state = SamplerState([], seed)
        uniform = state.uniform()
        assert SAMPLER.sample(logits, params, state).token_id == reference_draw(chances, uniform)


def test_logprobs_are_the_models_own_whatever_the_sampling_settings() -> None:
    logits = np.array([1.0, 2.0, 3.0, 2.0], np.float32)
    log_total = math.log(sum(math.exp(score) for score in logits))
    params = SamplingParams(
        temperature=0.1, top_k=1, logprobs=3, logit_bias={0: 100.0}, repetition_penalty=2.0
    )
    sampled = SAMPLER.sample(logits, params, SamplerState([2], 1))
    assert sampled.token_id == 0
    assert sampled.logprob == pytest.approx(1.0 - log_total)
    assert [token_id for token_id, _ in sampled.top_logprobs] == [2, 1, 3]
    assert [value for _, value in sampled.top_logprobs] == pytest.approx(
        [3 - log_total, 2 - log_total, 2 - log_total]
    )

    none = SAMPLER.sample(logits, SamplingParams(), SamplerState([]))
    assert (none.logprob, none.top_logprobs) == (None, ())
    only = SAMPLER.sample(logits, SamplingParams(logprobs=0), SamplerState([]))
    assert only.logprob == pytest.approx(3.0 - log_total)
    assert only.top_logprobs == ()


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0], np.float32)
    for params in (
        SamplingParams(temperature=9.0),
        SamplingParams(temperature=9.0, top_k=3),
        SamplingParams(),
    ):
        drawn = {SAMPLER.sample(logits, params, SamplerState([], seed)).token_id for seed in range(50)}
        assert drawn <= {1, 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_a_number_is_named(bad: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(ArgosyError, match=r"token 1 of the answer.*largest logit is"):
        SAMPLER.sample(logits, SamplingParams(), SamplerState([]))
    with pytest.raises(ArgosyError, match="largest logit is -inf"):
        SAMPLER.sample(np.full(3, -np.inf, np.float32), SamplingParams(), SamplerState([]))


def test_extreme_settings_stay_finite() -> None:
    logits = np.array([1.0, 2.0, 50.0], np.float32)
    params = SamplingParams(temperature=5e-324, repetition_penalty=5e-324, top_p=0.5)
    # The logits of tokens 1 and 2 both become the largest float.
    assert SAMPLER.sample(logits, params, SamplerState([1, 2], 1)).token_id == 1


def test_a_bias_outside_the_vocabulary_is_named() -> None:
    params = SamplingParams(logit_bias={9: 1.0})
    with pytest.raises(UsageError, match="token 9; the vocabulary is 0 to 2"):
        SAMPLER.sample(np.zeros(3, np.float32), params, SamplerState([]))


@pytest.mark.parametrize("bias", [-100.5, 100.5])
def test_a_bias_that_is_too_large_is_named(bias: float) -> None:
    SamplingParams(logit_bias={1: -100.0, 2: 100.0})
    with pytest.raises(UsageError, match=f"from -100 to 100, found {bias} for token 2"):
        SamplingParams(logit_bias={1: 0.0, 2: bias})


def test_the_logits_are_left_unchanged() -> None:
    logits = np.arange(5, dtype=np.float32)
    params = replace(
        SamplingParams(temperature=1.0), logit_bias={1: 5.0}, repetition_penalty=2.0, presence_penalty=1.0
    )
    SAMPLER.sample(logits, params, SamplerState([0, 1], 4))
    assert (logits == np.arange(5)).all()


class OnlyThese:
    """A grammar that always allows the same tokens."""

    is_finished = is_waiting = False

    def __init__(self, *token_ids: int) -> None:
        self._mask = np.zeros(6, np.bool_)
        self._mask[list(token_ids)] = True

    def allowed(self) -> Any:
        return self._mask

    def accept(self, token_id: int) -> bool:
        return True


LIKES_THE_END = np.array([0, 1, 2, 3, 4, 9], np.float32)  # of the vocabulary's six tokens, 5 is an end token


def first_tokens(params: SamplingParams, constraint: Any = None) -> list[int]:
    sampler, state = Sampler(end_ids=[5]), SamplerState([0], 1)
    return [sampler.sample(LIKES_THE_END, params, state, constraint).token_id for _ in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_no_end_token_is_chosen_before_min_tokens(
    temperature: float,
) -> None:
    asked = SamplingParams(temperature=temperature, min_tokens=2)
    assert first_tokens(asked) == [4, 4, 5, 5]
    assert first_tokens(replace(asked, stop_token_ids=(4, 3))) == [2, 2, 5, 5]
    assert first_tokens(replace(asked, ignore_eos=True)) == [5, 5, 5, 5]
    assert first_tokens(replace(asked, ignore_eos=True, stop_token_ids=(5,))) == [4, 4, 5, 5]


def test_a_grammar_that_allows_only_the_end_ends_the_answer_despite_min_tokens() -> None:
    asked = SamplingParams(min_tokens=3)
    assert first_tokens(asked, OnlyThese(1, 5)) == [1, 1, 1, 5]
    assert first_tokens(asked, OnlyThese(5)) == [5, 5, 5, 5]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=2, top_p=0.5)],
)
def test_a_grammar_that_no_token_follows_is_named_at_every_temperature(params: SamplingParams) -> None:
    with pytest.raises(GrammarError, match="no token of this model follows the grammar here"):
        first_tokens(params, OnlyThese())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_end_token_is_chosen_before_min_tokens_if_every_token_ends_the_answer(temperature: float) -> None:
    asked = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=range(6))
    assert first_tokens(asked) == [5, 5, 5, 5]


def test_log_probabilities_are_the_models_own_before_min_tokens() -> None:
    sampled = Sampler(end_ids=[5]).sample(
        LIKES_THE_END, SamplingParams(min_tokens=1, logprobs=1), SamplerState([0], 1)
    )
    assert sampled.token_id == 4
    assert sampled.top_logprobs[0][0] == 5
    assert sampled.logprob is not None
    assert sampled.logprob < sampled.top_logprobs[0][1]
