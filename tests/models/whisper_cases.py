"""What is asked of tiny Whisper checkpoints, by `make_whisper.py` and by the tests."""

from __future__ import annotations

from dataclasses import dataclass

from argosy.media.transcript import Task, TranscriptOptions
from tests.models.tiny_whisper import Tiny

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
