"""The cases for tiny Whisper checkpoints, used by `make_whisper.py` and by the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from argosy.engine.media.ears import Transcriber
from argosy.media.parts import Audio
from argosy.media.transcript import Task, TranscriptOptions
from tests.media.samples import RATE
from tests.models.safetensors_file import Array
from tests.models.tiny_whisper import Tiny, sound

FED_TOKENS = (65, 100, 3, 255, 0, 300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A sound and how it is transcribed: at temperature 0, whatever the result looks like."""

    seconds: float
    seed: int
    has_timestamps: bool = True
    language: str | None = None
    task: Task = "transcribe"
    prompt: str = ""
    is_conditioned: bool = False

    @property
    def options(self) -> TranscriptOptions:
        return TranscriptOptions(
            language=self.language,
            task=self.task,
            prompt=self.prompt,
            has_timestamps=self.has_timestamps,
            is_conditioned=self.is_conditioned,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
        )


CASES = {
    "short": Case(seconds=1.1, seed=1, has_timestamps=False),
    "german": Case(seconds=1.7, seed=2, has_timestamps=False, language="de"),
    "translated": Case(seconds=2.0, seed=3, has_timestamps=False, language="fr", task="translate"),
    "timed": Case(seconds=2.0, seed=4),
    "prompted": Case(seconds=2.0, seed=5, has_timestamps=False, prompt="Argosy, Jason"),
    "long": Case(seconds=7.3, seed=6),
    "long_conditioned": Case(seconds=6.1, seed=7, is_conditioned=True),
    "long_prompted": Case(
        seconds=5.2, seed=8, is_conditioned=True, prompt="a very long prompt of many words"
    ),
}


def cases_of(tiny: Tiny) -> dict[str, Case]:
    """Those that the checkpoint can answer."""
    return {
        name: case
        for name, case in CASES.items()
        if tiny.is_multilingual or (case.language is None and case.task == "transcribe")
    }


def require_equal(transcriber: Transcriber, tiny: Tiny, name: str, expected: Mapping[str, Array]) -> None:
    """Transcribe a case, and compare tokens and times with what transformers made of it."""
    asked, found = CASES[name], []
    transcriber.transcribe(
        Audio(sound(asked.seconds, asked.seed), rate=RATE),
        asked.options,
        report=lambda transcription: found.append(transcription) if not found else None,
    )
    segments = found[0].segments
    tokens = [token for segment in segments for token in segment.token_ids]
    wanted = [int(token) for token in expected[f"{name}.tokens"]]
    if not asked.has_timestamps:
        # A random model may choose timestamps although none are wanted; transformers cuts its windows there.
        first = tiny.id_of("notimestamps") + 1
        pairs = [at for at in range(1, len(wanted)) if min(wanted[at - 1 : at + 1]) >= first]
        same = slice(pairs[0] if pairs else None)
        assert tokens[same] == wanted[same]
        return
    # transformers keeps both timestamps of a pair at the end of a window.
    end = tiny.id_of("endoftext")
    assert [token for token in tokens if token < end] == [token for token in wanted if token < end]
    times = np.array([(segment.start_s, segment.end_s) for segment in segments])
    assert abs(times - expected[f"{name}.times"]).max() < 1e-4
