"""Tiny Whisper checkpoints against the committed answers of transformers, and checkpoints that lie."""

from __future__ import annotations

import functools
import json
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.errors import CheckpointError, UnsupportedModel, UsageError
from argosy.media.parts import PROMPT_LIMITS, Audio
from argosy.media.transcript import TranscriptOptions
from argosy.model.weights import load_dense
from argosy.model.whisper.files import SpecialTokens, open_whisper, whisper_tensors
from argosy.model.whisper.network import Decoding, Whisper, peak_bytes
from argosy.model.whisper.rules import TokenRules
from argosy.model.whisper.transcription import prepare, working_bytes
from argosy.open.ears import Transcriber
from tests.helpers.generators import finish
from tests.media.samples import RATE
from tests.model.encoders.open_tower import dense_weights
from tests.models.references import difference
from tests.models.safetensors_file import Array, read_safetensors, write_safetensors
from tests.models.tiny_whisper import (
    LANGUAGES,
    REFERENCE,
    SUPPRESSED,
    SUPPRESSED_FIRST,
    TINY,
    bin_variables,
    sound,
    write_ctranslate2,
    write_transformers,
)
from tests.models.tiny_whisper import (
    weights as weights_of,
)
from tests.models.whisper_cases import CASES, FED_TOKENS, cases_of, require_equal

# Random weights amplify the rounding of float32 sums; a wrong flag changes more than 1e-2.
LARGEST_DIFFERENCE = 2e-4

FORMS = (("transformers", "multilingual"), ("transformers", "english"), ("ctranslate2", "english"))
WRITERS = {"transformers": write_transformers, "ctranslate2": write_ctranslate2}


@functools.cache
def reference(name: str) -> dict[str, Array]:
    return read_safetensors(REFERENCE / f"{name}.safetensors")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Tiny checkpoints by form and name."""
    found = {}
    for form, name in FORMS:
        found[form, name] = tmp_path_factory.mktemp(f"{form}_{name}")
        WRITERS[form](found[form, name], TINY[name])
    return found


@pytest.fixture(scope="module")
def transcribers(directories: dict[tuple[str, str], Path]) -> Iterator[dict[tuple[str, str], Transcriber]]:
    found = {key: Transcriber.open(path, threads=1) for key, path in directories.items()}
    yield found
    for transcriber in found.values():
        transcriber.close()


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_features_encoder_and_logits_equal_those_of_transformers(
    form: str, name: str, directories: dict[tuple[str, str], Path]
) -> None:
    expected, tiny = reference(name), TINY[name]
    files = open_whisper(directories[form, name])
    features = prepare(files, sound(1.3, 0))
    assert abs(features - expected["features"]).max() <= 1e-3

    with _native_parts() as (store, runtime):
        weights = load_dense(store, files.tensors, open_file=functools.cache(store.open))
        network = Whisper(files.config, weights, runtime, is_exact=True)
        heard = finish(network.encode(expected["features"].astype(np.float32)))
        value = heard[0][1].reshape(files.config.sound_positions, -1)
        projected = network.operations.linear(
            "decoder.layers.0.cross.v", expected["hidden"].astype(np.float32)
        )
        assert difference(value, projected) <= LARGEST_DIFFERENCE

        fed = [tiny.id_of("startoftranscript"), *FED_TOKENS]
        at_once, in_pieces = Decoding(network, heard), Decoding(network, heard)
        hidden = finish(at_once.feed(fed))
        logits = np.stack([finish(at_once.logits(row)) for row in hidden])
        assert difference(logits, expected["logits"]) <= LARGEST_DIFFERENCE

        finish(in_pieces.feed(fed[:3]))
        finish(in_pieces.feed([7, 8]))
        in_pieces.rewind(3)
        assert (finish(in_pieces.feed(fed[3:])) == hidden[3:]).all()


@contextmanager
def _native_parts() -> Iterator[tuple[_native.Store, _native.Runtime]]:
    store, runtime = _native.Store(1), _native.Runtime(1)
    try:
        yield store, runtime
    finally:
        store.close()
        runtime.close()


@pytest.mark.parametrize(
    ("form", "name", "case"), [(form, name, case) for form, name in FORMS for case in cases_of(TINY[name])]
)
def test_transcripts_equal_those_of_transformers(
    form: str, name: str, case: str, transcribers: dict[tuple[str, str], Transcriber]
) -> None:
    require_equal(transcribers[form, name], TINY[name], case, reference(name))


def test_the_first_token_is_chosen_among_fewer() -> None:
    special, vocab_size = _special("english")
    rules = TokenRules(special, vocab_size, has_timestamps=False)
    logits = np.zeros(vocab_size, np.float32)
    first, later = rules.log_probabilities(logits, []), rules.log_probabilities(logits, [65])
    assert set(np.flatnonzero(np.isneginf(first))) == {*SUPPRESSED, *SUPPRESSED_FIRST}
    assert set(np.flatnonzero(np.isneginf(later))) == set(SUPPRESSED)
    assert np.exp(later.astype(np.float64)).sum() == pytest.approx(1)


def test_the_first_timestamp_is_at_most_one_second() -> None:
    special, vocab_size = _special("english")
    rules = TokenRules(special, vocab_size, has_timestamps=True)
    allowed = np.isfinite(rules.log_probabilities(np.zeros(vocab_size, np.float32), []))
    first = special.timestamps
    assert list(np.flatnonzero(allowed)) == list(range(first, first + 51))


def _special(name: str) -> tuple[SpecialTokens, int]:
    tiny = TINY[name]
    special = SpecialTokens(
        start=tiny.id_of("startoftranscript"),
        end=tiny.id_of("endoftext"),
        previous=tiny.id_of("startofprev"),
        no_timestamps=tiny.id_of("notimestamps"),
        transcribe=tiny.id_of("transcribe"),
        translate=tiny.id_of("translate"),
        languages={},
        suppressed=SUPPRESSED,
        suppressed_first=SUPPRESSED_FIRST,
        most_initial_positions=50,
    )
    return special, tiny.config.vocab_size


def test_a_window_that_looks_wrong_is_tried_again_and_the_likeliest_result_is_kept(
    transcribers: dict[tuple[str, str], Transcriber],
) -> None:
    """A random model is never sure, so every temperature is tried."""
    transcriber = transcribers["transformers", "english"]
    heard = Audio(sound(1.5, 1), rate=RATE)
    options = replace(CASES["short"].options, logprob_threshold=-0.001)
    (kept,) = transcriber.transcribe(heard, options).segments
    alone = {
        temperature: transcriber.transcribe(heard, replace(CASES["short"].options, temperature=temperature))
        for temperature in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    }
    tried = {
        temperature: each.segments[0].average_logprob for temperature, each in alone.items() if each.segments
    }
    assert kept.average_logprob == max(tried.values())
    assert kept.temperature == max(tried, key=lambda temperature: tried[temperature])
    assert len({each.text for each in alone.values()}) > 1
    again = transcriber.transcribe(heard, replace(CASES["short"].options, temperature=1.0))
    assert again == alone[1.0]


def test_a_window_in_which_nobody_speaks_is_passed_over(
    transcribers: dict[tuple[str, str], Transcriber],
) -> None:
    transcriber = transcribers["transformers", "english"]
    heard = Audio(sound(5.0, 6), rate=RATE)
    silent = replace(CASES["long"].options, logprob_threshold=-0.001, no_speech_threshold=0.0)
    assert transcriber.transcribe(heard, replace(silent, no_speech_threshold=1.0)).segments
    transcript = transcriber.transcribe(heard, silent)
    assert (transcript.text, transcript.segments, transcript.duration_s) == ("", (), 5.0)


def test_the_language_is_the_likeliest_that_the_model_knows(
    transcribers: dict[tuple[str, str], Transcriber],
) -> None:
    transcriber = transcribers["transformers", "multilingual"]
    heard = Audio(sound(1.1, 1), rate=RATE)
    detected = transcriber.transcribe(heard, CASES["short"].options)
    assert detected.language in LANGUAGES
    given = replace(CASES["short"].options, language=detected.language)
    assert transcriber.transcribe(heard, given) == detected
    others = [
        transcriber.transcribe(heard, replace(given, language=code)).text
        for code in LANGUAGES
        if code != detected.language
    ]
    assert detected.text not in others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "translate"}, "knows English only, so it cannot translate"),
        ({"language": "de"}, "does not know the language 'de'; known: en"),
        ({"temperature": 1.5}, "temperature is 1.5, expected 0 to 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "x" * 9000}, "the prompt has 9000 characters"),
        ({"task": "sing"}, "unknown task 'sing'; known: transcribe, translate"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused_by_name(
    options: dict[str, Any], message: str, transcribers: dict[tuple[str, str], Transcriber]
) -> None:
    with pytest.raises(UsageError, match=message):
        transcribers["transformers", "english"].transcribe(
            Audio(sound(1.0, 1), rate=RATE), TranscriptOptions(**options)
        )


def test_a_prompt_never_becomes_a_control_token(transcribers: dict[tuple[str, str], Transcriber]) -> None:
    transcriber = transcribers["transformers", "english"]
    seen: list[list[int]] = []
    feed = Decoding.feed

    def watched(self: Decoding, token_ids: Sequence[int]) -> Any:
        seen.append(list(token_ids))
        return feed(self, token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoding, "feed", watched)
        options = replace(CASES["short"].options, prompt="<|translate|>")
        transcriber.transcribe(Audio(sound(1.0, 1), rate=RATE), options)
    special = transcriber.files.special
    previous, *before, start, no_timestamps = seen[0]
    assert (previous, start, no_timestamps) == (special.previous, special.start, special.no_timestamps)
    assert bytes(transcriber.files.tokenizer.token_bytes(token)[0] for token in before) == b" <|translate|>"
    assert max(before) < special.end


@pytest.mark.parametrize(
    "seconds", [0.01, 1.999, 2.0, 2.001, 10.0, pytest.param(100.0, marks=pytest.mark.full)]
)
def test_sounds_of_any_length_are_transcribed(
    seconds: float, transcribers: dict[tuple[str, str], Transcriber]
) -> None:
    progress: list[float] = []
    transcript = transcribers["ctranslate2", "english"].transcribe(
        Audio(sound(seconds, 1), rate=RATE),
        CASES["long"].options,
        report=lambda transcription: progress.append(transcription.done_s),
    )
    assert transcript.duration_s == pytest.approx(seconds)
    assert progress == sorted(progress)
    assert all(0 <= segment.start_s <= segment.end_s for segment in transcript.segments)


def test_without_timestamps_each_window_is_one_segment(
    transcribers: dict[tuple[str, str], Transcriber],
) -> None:
    transcriber, found = transcribers["transformers", "english"], []
    options = replace(CASES["long"].options, has_timestamps=False)
    transcriber.transcribe(Audio(sound(5.0, 0), rate=RATE), options, report=found.append)
    segments, first = found[0].segments, transcriber.files.special.timestamps
    assert any(
        min(pair) >= first for one in segments for pair in pairwise(one.token_ids)
    )  # it was told not to
    assert [(one.start_s, one.end_s) for one in segments] == [(0.0, 2.0), (2.0, 4.0), (4.0, 5.0)]


def test_silence_is_transcribed(transcribers: dict[tuple[str, str], Transcriber]) -> None:
    silence = Audio(np.zeros(3 * RATE, np.float32), rate=RATE)
    assert transcribers["transformers", "english"].transcribe(silence).duration_s == 3


def test_a_transcription_ends_when_its_reporter_raises(
    transcribers: dict[tuple[str, str], Transcriber],
) -> None:
    class Cancelled(Exception):
        pass

    def cancel(transcription: object) -> None:
        raise Cancelled

    transcriber = transcribers["transformers", "english"]
    with pytest.raises(Cancelled):
        transcriber.transcribe(Audio(sound(1.0, 1), rate=RATE), report=cancel)
    assert transcriber.transcribe(Audio(sound(1.0, 1), rate=RATE)).duration_s == 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_transformers(tmp_path, TINY["english"])
    return tmp_path


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        ("config.json", {"vocab_size": 2**31 - 1}, CheckpointError, r"embed_tokens.weight is \[.*expected"),
        ("config.json", {"d_model": 65_536}, CheckpointError, r"not a multiple|expected \[65536"),
        ("config.json", {"encoder_layers": 4096}, CheckpointError, "encoder.layers.2.*is missing"),
        ("config.json", {"encoder_layers": 10**9}, CheckpointError, "encoder_layers is 1000000000"),
        ("config.json", {"max_target_positions": 65_536}, CheckpointError, r"embed_positions.weight is"),
        ("config.json", {"max_source_positions": 1500}, CheckpointError, r"embed_positions.weight is"),
        ("config.json", {"num_mel_bins": None}, CheckpointError, "num_mel_bins is null"),
        ("config.json", {"decoder_attention_heads": 7}, CheckpointError, "not a multiple"),
        ("config.json", {"activation_function": "relu"}, UnsupportedModel, "activation_function"),
        ("config.json", {"scale_embedding": True}, UnsupportedModel, "scale_embedding"),
        ("config.json", {"model_type": "bart"}, UnsupportedModel, "model_type 'bart'|\"bart\""),
        ("config.json", {"surprise": 1}, UnsupportedModel, "surprise"),
        ("generation_config.json", {"no_timestamps_token_id": 3}, CheckpointError, "is token 3, and the"),
        ("generation_config.json", {"suppress_tokens": [9999]}, CheckpointError, "token 9999 is needed"),
        ("generation_config.json", {"suppress_tokens": "all"}, CheckpointError, "suppress_tokens is"),
        ("generation_config.json", {"lang_to_id": {"<|en|>": 1.5}}, CheckpointError, "maps '<|en|>' to no"),
        ("preprocessor_config.json", {"chunk_length": 30}, CheckpointError, "makes 16 bands and 3000 frames"),
        ("preprocessor_config.json", {"feature_size": 80}, CheckpointError, "makes 80 bands"),
    ],
)
def test_settings_that_lie_are_refused_by_name(
    file: str, changes: dict[str, object], error: type[Exception], message: str, checkpoint: Path
) -> None:
    path = checkpoint / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=message.replace("<|", r"<\|").replace("|>", r"\|>")):
        open_whisper(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name if name != "model.safetensors" else "safetensors"):
        open_whisper(checkpoint)


def test_weights_that_are_not_numbers_end_in_an_error(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = read_safetensors(path)
    name = "model.decoder.layers.1.fc1.weight"
    tensors[name][0, 0] = np.nan
    write_safetensors(path, {key: ("F16", value) for key, value in tensors.items()})
    with (
        Transcriber.open(checkpoint, threads=1) as transcriber,
        pytest.raises(CheckpointError, match="finite"),
    ):
        transcriber.transcribe(Audio(sound(1.0, 1), rate=RATE))

    tensors["model.encoder.layer_norm.bias"][3] = np.inf
    write_safetensors(path, {key: ("F16", value) for key, value in tensors.items()})
    holds = r"encoder.layer_norm.bias holds inf"
    with Transcriber.open(checkpoint, threads=1) as transcriber, pytest.raises(CheckpointError, match=holds):
        transcriber.transcribe(Audio(sound(1.0, 1), rate=RATE))


def test_a_checkpoint_that_suppresses_every_token_ends_in_an_error(checkpoint: Path) -> None:
    path = checkpoint / "generation_config.json"
    everything = list(range(TINY["english"].config.vocab_size))
    path.write_text(json.dumps({**json.loads(path.read_text()), "suppress_tokens": everything}))
    with Transcriber.open(checkpoint, threads=1) as transcriber:
        for has_timestamps in (False, True):
            with pytest.raises(CheckpointError, match="every token that may come next is suppressed"):
                transcriber.transcribe(
                    Audio(sound(1.0, 1), rate=RATE), TranscriptOptions(has_timestamps=has_timestamps)
                )


def test_a_model_bin_of_integers_is_refused_by_name(tmp_path: Path) -> None:
    write_ctranslate2(tmp_path, TINY["english"])
    path = tmp_path / "model.bin"
    content = path.read_bytes()
    embeddings = bin_variables(TINY["english"])["decoder/embeddings/weight"]
    head = b"decoder/embeddings/weight\0\2" + struct.pack("<II", *embeddings.shape)
    whole = head + struct.pack("<BI", 4, embeddings.nbytes) + embeddings.tobytes()
    integers = head + struct.pack("<BI", 1, embeddings.size) + bytes(embeddings.size)
    path.write_bytes(content.replace(whole, integers))
    with pytest.raises(UnsupportedModel, match="embeddings/weight is I8; supported: F32, F16, BF16"):
        open_whisper(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            b"encoder/layer_1/ffn/linear_0/weight",
            b"encoder/layer_9/ffn/linear_0/weight",
            "which no Whisper has",
        ),
        (b"decoder/alibi", b"decoder/other", "sets 'decoder/other'"),
        (b"WhisperSpec", b"WhisperNext", "holds 'WhisperNext'"),
        (b"decoder/projection/weight", b"decoder/projection/weighs", "weights of its own"),
    ],
)
def test_variables_that_are_not_known_are_refused(
    before: bytes, after: bytes, message: str, tmp_path: Path
) -> None:
    write_ctranslate2(tmp_path, TINY["english"])
    path = tmp_path / "model.bin"
    path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(CheckpointError, match=message):
        open_whisper(tmp_path)


def test_the_features_of_the_longest_sound_take_what_is_planned(checkpoint: Path) -> None:
    files = open_whisper(checkpoint)
    samples = np.tile(sound(20.0, 6), 30)
    assert samples.size == PROMPT_LIMITS.sound_s * RATE
    tracemalloc.start()
    try:
        features = prepare(files, samples)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert features.shape == (16, 60_000)
    assert peak + samples.nbytes <= working_bytes(files)


def test_the_peak_of_a_window_holds_what_is_allocated() -> None:
    """Measured with tracemalloc, which sees the arrays of numpy."""
    tiny = replace(TINY["multilingual"], hidden=48)
    config = replace(tiny.config, text_positions=40)
    weights = dense_weights(whisper_tensors(config), "model.", weights_of(tiny))
    network = Whisper(config, weights, _native.Runtime(1))
    features = np.zeros((config.num_mels, config.num_frames), np.float32)
    finish(network.encode(features))
    tracemalloc.start()
    try:
        decoding = Decoding(network, finish(network.encode(features)))
        hidden = finish(decoding.feed(list(range(39))))
        finish(decoding.logits(hidden[0]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = peak_bytes(config)
    assert peak <= bound
    assert bound <= 3 * peak
