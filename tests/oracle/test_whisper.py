"""Whisper against transformers, with sizes and weights of other seeds than the committed references."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from argosy import _native
from argosy.media.transcript import LANGUAGE_NAMES
from argosy.model.weights import load_dense
from argosy.model.whisper.files import open_whisper
from argosy.model.whisper.network import Decoding, Whisper
from argosy.model.whisper.transcription import prepare
from argosy.open.ears import Transcriber
from tests.helpers.generators import finish
from tests.models.make_whisper import answers
from tests.models.references import difference
from tests.models.tiny_whisper import Tiny, sound, write_transformers
from tests.models.whisper_cases import FED_TOKENS, cases_of, require_equal

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_quiet_thread")]

# Random weights amplify the rounding of float32 sums; a wrong flag changes more than 1e-2.
LARGEST_DIFFERENCE = 3e-4


def random_tiny(seed: int) -> Tiny:
    rng = np.random.default_rng([seed, 15])
    heads = int(rng.choice([1, 2, 4]))
    return Tiny(
        seed=seed,
        is_multilingual=bool(seed % 2),
        dtype=("F32", "F16")[seed // 2 % 2],
        hidden=heads * int(rng.choice([4, 10, 16])),
        heads=heads,
        encoder_layers=int(rng.choice([1, 3])),
        decoder_layers=int(rng.choice([1, 2, 4])),
        mels=int(rng.choice([8, 20, 80])),
    )


@pytest.mark.parametrize("seed", range(20, 28))
def test_whisper_equals_transformers(seed: int, tmp_path: Path) -> None:
    tiny = random_tiny(seed)
    write_transformers(tmp_path, tiny)
    expected = answers(tmp_path, tiny)
    files = open_whisper(tmp_path)
    assert abs(prepare(files, sound(1.3, 0)) - expected["features"]).max() <= 1e-3
    store, runtime = _native.Store(1), _native.Runtime(1)
    try:
        weights = load_dense(store, files.tensors, open_file=functools.cache(store.open))
        network = Whisper(files.config, weights, runtime, is_exact=True)
        decoding = Decoding(network, finish(network.encode(expected["features"])))
        hidden = finish(decoding.feed([tiny.id_of("startoftranscript"), *FED_TOKENS]))
        logits = np.stack([finish(decoding.logits(row)) for row in hidden])
        assert difference(logits, expected["logits"]) <= LARGEST_DIFFERENCE
    finally:
        store.close()
        runtime.close()
    with Transcriber.open(tmp_path, threads=1) as transcriber:
        for name in cases_of(tiny):
            require_equal(transcriber, tiny, name, expected)


def test_languages_have_the_names_of_the_reference() -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    assert LANGUAGE_NAMES == LANGUAGES
