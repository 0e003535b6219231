"""The tournament reweighs as transformers' does, and `tests/helpers/synthid.py` has its bits."""

from __future__ import annotations

import numpy as np
import torch
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor

from argosy import _native
from argosy.config import WATERMARK_CONTEXT, WATERMARK_DEPTH
from argosy.engine.watermark import KEY_BYTES, Watermark
from argosy.guard.watermark import judge
from tests.helpers.synthid import TABLE_SEED, TABLE_SIZE, ReferenceWatermark, keys_of

KEY = bytes(range(KEY_BYTES))


def reference() -> SynthIDTextWatermarkLogitsProcessor:
    return SynthIDTextWatermarkLogitsProcessor(
        ngram_len=WATERMARK_CONTEXT + 1, keys=keys_of(KEY), sampling_table_size=TABLE_SIZE,
        sampling_table_seed=TABLE_SEED, context_history_size=1024, device=torch.device("cpu"),
    )  # fmt: skip


def bits_of(
    words: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    shifts = np.arange(WATERMARK_DEPTH, dtype=np.uint64)
    return (words[:, None] >> shifts & np.uint64(1)).astype(np.int64)


def test_our_tournament_is_the_references_for_our_bits() -> None:
    rng = np.random.default_rng(1)
    for spread in (0.1, 1.5, 6.0):
        scores = torch.tensor(rng.normal(0, spread, (1, 500)))  # float64
        ngrams = rng.integers(2**31, size=(500, WATERMARK_CONTEXT + 1), dtype=np.uint32)
        words = Watermark(KEY).words(ngrams)
        expected = reference().update_scores(scores, torch.tensor(bits_of(words))[None]).exp()[0]
        weights = torch.softmax(scores, dim=1)[0].numpy().copy()
        _native.tournament(words, weights, depth=WATERMARK_DEPTH)
        np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-9, atol=1e-15)


def test_the_helper_has_the_references_bits_and_our_score_is_their_weighted_mean() -> None:
    ids = np.random.default_rng(2).integers(50_000, size=300)
    expected = reference().compute_g_values(torch.tensor(ids)[None])[0].numpy()
    ngrams = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint32), WATERMARK_CONTEXT + 1)
    words = ReferenceWatermark(KEY).words(np.ascontiguousarray(ngrams))
    np.testing.assert_array_equal(bits_of(words), expected)
    weights = np.linspace(10, 1, WATERMARK_DEPTH)
    weights *= WATERMARK_DEPTH / weights.sum()
    score = judge(words).score
    assert score is not None
    np.testing.assert_allclose(score, (expected * weights).mean(), rtol=1e-12)


def test_the_reference_marks_the_contexts_that_count_here() -> None:
    """It watermarks the first n-gram of each context, and its mask of repeated contexts keeps just these."""
    from argosy.guard.watermark import first_ngrams

    ids = np.random.default_rng(3).integers(4, size=200)  # contexts repeat
    mask = reference().compute_context_repetition_mask(torch.tensor(ids)[None])[0].numpy()
    ngrams = np.lib.stride_tricks.sliding_window_view(ids, WATERMARK_CONTEXT + 1)
    assert first_ngrams(ids.tolist()).tolist() == ngrams[mask].tolist()
