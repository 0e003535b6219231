"""Rows of n-gram tables follow from token ids alone, however the ids are divided into steps."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from argosy.config import NgramConfig
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.model.ngrams import NO_ROW, Ngrams, pcg_multipliers, primes_from, splitmix_multipliers
from argosy.model.step import Step
from argosy.prompt.folding import fold_tokens

VOCAB, EOS, PAD = 64, 2, 5
OPAQUE = 7  # the id of a picture


def config_of(*, folds: bool = False) -> NgramConfig:
    return NgramConfig(
        primes=primes_from(31, 0, 6) if folds else primes_from(31, 4, 4),
        multipliers=pcg_multipliers(14, 40, 4) if folds else splitmix_multipliers(1234, 1, VOCAB, 3),
        row_dim=4,
        blank_id=PAD if folds else EOS,
        border_id=OPAQUE if folds else EOS,
        folded_ids=40 if folds else 0,
    )


def token_map() -> np.ndarray:
    return np.arange(VOCAB, dtype=np.int32) * 5 // 8


def step_of(parts: list[tuple[list[int], list[int]]], num_earlier: int) -> Step:
    """A step of sequences, each given by the tokens before the step and its own."""
    counts = [len(own) for _, own in parts]
    earlier = [([-1] * num_earlier + before)[-num_earlier:] for before, _ in parts]
    zeros = np.zeros(sum(counts), np.int32)
    return Step(
        token_ids=np.array([token for _, own in parts for token in own], np.int32),
        sequence=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        slots=zeros.astype(np.int64),
        block_table=np.zeros((len(parts), 1), np.int32),
        is_decode=zeros.astype(np.bool_),
        order=zeros,
        wanted=np.zeros(0, np.int64),
        earlier_ids=np.array(earlier, np.int32),
    )


def hashed(config: NgramConfig, ids: list[int], folded: np.ndarray | None) -> list[list[int]]:
    """The rows of a whole sequence, by the rule of the models' own code, token by token."""
    known, blank = ids, config.blank_id
    if folded is not None:
        known, blank = [-1 if one == OPAQUE else int(folded[one]) for one in ids], int(folded[PAD])
    per_length = config.num_heads // config.num_earlier
    offsets = np.concatenate(([0], np.cumsum(config.primes)[:-1]))
    rows = []
    for at in range(len(ids)):
        window, is_blocked = [], False
        for distance in range(config.num_earlier + 1):
            source = known[at - distance] if at >= distance else None
            if folded is None:
                is_blocked = is_blocked or source is None or (distance > 0 and source == EOS)
            else:
                is_blocked = is_blocked or source is None or source == -1
            window.append(blank if is_blocked or source is None else source)
        mixed, own = window[0] * config.multipliers[0], []
        for distance in range(1, len(window)):
            mixed ^= window[distance] * config.multipliers[distance]
            heads = range((distance - 1) * per_length, distance * per_length)
            own += [mixed % config.primes[head] + int(offsets[head]) for head in heads]
        rows.append([NO_ROW] * config.num_heads if known[at] == -1 else own)
    return rows


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 7, 40])
def test_rows_are_the_same_in_any_chunks_and_batch(folds: bool, chunk: int) -> None:
    config, folded = config_of(folds=folds), token_map() if folds else None
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, VOCAB, 40).tolist() for _ in range(3)]
    for text in texts:
        text[rng.integers(0, 40)] = EOS
        text[11:13] = [EOS, EOS]
        text[20:23] = [OPAQUE] * 3
    ngrams = Ngrams(config, VOCAB, folded)
    found: list[list[list[int]]] = [[], [], []]
    for start in range(0, 40, chunk):
        parts = [(text[:start], text[start : start + chunk]) for text in texts]
        rows = ngrams.rows(step_of(parts, config.num_earlier)).tolist()
        for number, (_, own) in enumerate(parts):
            found[number] += rows[: len(own)]
            del rows[: len(own)]
    assert found == [hashed(config, text, folded) for text in texts]
    assert np.min(found) == (NO_ROW if folds else 0)
    assert np.max(found) < config.num_rows


def test_a_step_of_new_sequences_needs_no_earlier_ids() -> None:
    ngrams = Ngrams(config_of(), VOCAB)
    step = step_of([([], [3, 4, 5])], 2)
    np.testing.assert_array_equal(ngrams.rows(step._replace(earlier_ids=None)), ngrams.rows(step))


def test_more_earlier_ids_than_a_table_reads_change_nothing() -> None:
    ngrams = Ngrams(config_of(), VOCAB)
    parts = [([9, 8, 7, 6], [3, 4, 5]), ([1], [2])]
    np.testing.assert_array_equal(ngrams.rows(step_of(parts, 4)), ngrams.rows(step_of(parts, 2)))


def test_constants_are_those_of_the_released_models() -> None:
    # Qwen3.8-Flash-Next's, as transformers 5.24 computes them; heads of 20,000,000 rows.
    assert primes_from(20_000_000, 0, 3) == (20_000_003, 20_000_023, 20_000_033)
    assert primes_from(20_000_000, 15, 1) == (20_000_171,)
    assert primes_from(2, 0, 9) == (2, 3, 5, 7, 11, 13, 17, 19, 23)
    assert primes_from(2, 9, 3) == (29, 31, 37)  # beyond twice the start
    assert splitmix_multipliers(1234, 0, 248_320, 3) == (
        23_703_573_157_769,
        20_109_073_645_365,
        8_052_911_324_071,
    )
    assert all(one % 2 for one in pcg_multipliers(3, 99_092, 4))


def test_tokens_fold_by_case_accents_and_white_space() -> None:
    words = ["The", " the", "THE", "caf\u00e9", "CAFE", " ", "\n", "dog", ""]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=""))
    tokenizer.decoder = decoders.Fuse()
    assert fold_tokens(tokenizer).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4]


def test_tokens_that_a_map_lacks_have_no_rows_and_end_ngrams() -> None:
    config, folded = config_of(folds=True), token_map()
    rows = Ngrams(config, VOCAB + 3, folded).rows(step_of([([], [9, 11, VOCAB + 2, 9, 11])], 3))
    assert (rows[2] == NO_ROW).all()
    np.testing.assert_array_equal(rows[:2], rows[3:])


def test_a_map_with_another_number_of_ids_is_refused() -> None:
    for folded in (np.zeros(0, np.int32), token_map()[:-1] // 2, token_map()[: PAD - 1]):
        with pytest.raises(CheckpointError, match=r"fold to \d+ ids; its n-gram tables were made for 40"):
            Ngrams(config_of(folds=True), VOCAB, folded)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, which its n-gram tables need"):
        Ngrams(config_of(folds=True), VOCAB, None)


def test_constants_that_overflow_or_never_end_are_refused() -> None:
    config = config_of()
    with pytest.raises(CheckpointError, match="multipliers of an n-gram table reach"):
        Ngrams(config, 1 << 62)
    for start, count in ((1, 4), (1 << 50, 4), (31, 100_000)):
        with pytest.raises(UnsupportedModel, match="n-gram tables of"):
            primes_from(start, 0, count)


def test_the_rows_of_a_decoding_step_take_microseconds() -> None:
    ngrams, step = Ngrams(config_of(), VOCAB), step_of([([3, 4], [5])], 2)
    best = min(timed(ngrams, step) for _ in range(20))
    assert best < 1e-3  # 40 microseconds on the machine of 2026-12


def timed(ngrams: Ngrams, step: Step) -> float:
    started = time.perf_counter()
    ngrams.rows(step)
    return time.perf_counter() - started
