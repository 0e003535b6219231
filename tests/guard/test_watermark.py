"""The p-value of a score is exact, and no n-gram counts twice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from argosy.config import WATERMARK_CONTEXT, WATERMARK_DEPTH
from argosy.errors import UsageError
from argosy.guard.watermark import MOST_TOKENS, first_ngrams, judge, log10_p_value

WEIGHTS = [290 - 9 * i for i in range(WATERMARK_DEPTH)]
MOST = sum(WEIGHTS)


def chances(num_ngrams: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The distribution of the sum, coin by coin."""
    found = np.ones(1)
    for weight in WEIGHTS * num_ngrams:
        found = (np.pad(found, (0, weight)) + np.pad(found, (weight, 0))) / 2
    return found


@pytest.mark.parametrize("num_ngrams", [1, 2, 5])
def test_a_p_value_is_the_share_of_coins_that_give_the_sum_or_more(num_ngrams: int) -> None:
    tails = np.cumsum(chances(num_ngrams)[::-1])[::-1]
    most = num_ngrams * MOST
    totals = [0, 1, 29, most // 3, most // 2, most // 2 + 1, 2 * most // 3, most - 300, most - 29, most]
    for total in totals:
        assert log10_p_value(num_ngrams, total) == pytest.approx(
            math.log10(tails[total]), rel=1e-6, abs=1e-9
        ), total


def test_the_smallest_p_values_are_as_precise_as_the_largest() -> None:
    """All coins are 1 with probability 2^-n; all but one of the lightest as well: n of them, 29 less."""
    num_ngrams = 400
    coins = num_ngrams * WATERMARK_DEPTH
    most = num_ngrams * MOST
    assert log10_p_value(num_ngrams, most) == pytest.approx(-coins * math.log10(2), rel=1e-9)
    expected = math.log10(1 + num_ngrams) - coins * math.log10(2)
    assert log10_p_value(num_ngrams, most - 29) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_ngrams", [200, 5_000])
def test_p_values_of_fair_coins_are_uniform_or_nearly(num_ngrams: int) -> None:
    """Quantiles of the normal distribution that the sum comes near to: 1.2816 deviations for a tenth, and so on."""
    deviation = math.sqrt(num_ngrams * sum(weight**2 for weight in WEIGHTS)) / 2
    for share, distance in ((0.5, 0.0), (0.1, 1.28155), (1e-4, 3.71902), (1e-9, 5.99781)):
        total = round(num_ngrams * MOST / 2 + distance * deviation)
        # The tails of coins are lighter than those of the normal distribution, the less so the more coins there are.
        assert 10 ** log10_p_value(num_ngrams, total) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("num_texts", [60, pytest.param(300, marks=pytest.mark.full)])
def test_random_words_are_called_marked_as_often_as_the_p_value_says(num_texts: int) -> None:
    rng = np.random.default_rng(7)
    p_values = [judge(rng.integers(2**64, size=8, dtype=np.uint64)).p_value for _ in range(num_texts)]
    for share in (0.5, 0.1, 0.02):
        found = sum(p <= share for p in p_values)
        assert abs(found - num_texts * share) < 4 * math.sqrt(num_texts * share * (1 - share))


def test_the_score_is_the_weighted_mean_of_the_reference() -> None:
    """`weighted_mean_score` of synthid-text: weights from 10 to 1 with the sum of their number."""
    words = np.random.default_rng(3).integers(2**64, size=50, dtype=np.uint64)
    bits = np.array([[int(word) >> i & 1 for i in range(WATERMARK_DEPTH)] for word in words])
    weights = np.linspace(10, 1, WATERMARK_DEPTH)
    weights *= WATERMARK_DEPTH / weights.sum()
    assert judge(words).score == pytest.approx((bits * weights).mean())


def test_nothing_to_count_is_no_evidence() -> None:
    for token_ids in ([], [1, 2, 3, 4]):
        evidence = judge(np.zeros(len(first_ngrams(token_ids)), np.uint64))
        assert (evidence.num_counted, evidence.score, evidence.p_value) == (0, None, 1.0)


def test_only_the_first_ngram_of_a_context_counts() -> None:
    token_ids = [5, 6, 7, 8, 1, 5, 6, 7, 8, 2, 5, 6, 7, 8, 1]
    found = first_ngrams(token_ids).tolist()
    assert found == [[5, 6, 7, 8, 1], [6, 7, 8, 1, 5], [7, 8, 1, 5, 6], [8, 1, 5, 6, 7], [1, 5, 6, 7, 8],
                     [6, 7, 8, 2, 5], [7, 8, 2, 5, 6], [8, 2, 5, 6, 7], [2, 5, 6, 7, 8]]  # fmt: skip
    contexts = [tuple(one[:WATERMARK_CONTEXT]) for one in found]
    assert len(set(contexts)) == len(contexts)
    # A text that only repeats itself shows no more the longer it is.
    assert len(first_ngrams(list(itertools.islice(itertools.cycle(range(9)), 5000)))) == 9


def test_a_text_beyond_the_limit_is_refused() -> None:
    with pytest.raises(UsageError, match=str(MOST_TOKENS)):
        first_ngrams(range(MOST_TOKENS + 1))
