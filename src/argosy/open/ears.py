"""`argosy.Transcriber`: a transcriber opened by path or name."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from argosy.config import TINY_EN
from argosy.engine.media import ears
from argosy.experts.resident import Progress
from argosy.open.models import locate_ears


class Transcriber(ears.Transcriber):
    """Transcribes sounds with a Whisper checkpoint, without an engine."""

    @classmethod
    def open(
        cls, model: str | Path = TINY_EN, *, threads: int | None = None, progress: Progress | None = None
    ) -> Self:
        """Open a checkpoint.

        Args:
            model: a directory with a checkpoint of `transformers` or CTranslate2, or `tiny.en`, which is fetched once.
            threads: compute threads; None: as many as an engine has.

        Raises:
            FetchFailed: `tiny.en` could not be fetched.
            CheckpointError, UnsupportedModel: `open_whisper` refuses the files.
        """
        return cls.open_alone(locate_ears(model, progress), threads=threads)
