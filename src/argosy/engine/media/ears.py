"""Turn speech into text with a Whisper checkpoint, between the steps of a model or without an engine.

    Audio("talk.mp3")  ->  decoded in a process that may be killed  ->  features  ->  windows  ->  Transcript

The caller's thread does the work in small pieces, each of which takes a turn at the engine: a step of the model waits
for at most one piece, and a piece for at most one step. One sound is transcribed at a time; others wait for it.

A text-only model gets the transcript as text in its prompt, marked as a transcript. Transcripts are kept for the next
prompt that contains the same sound.

Elsewhere: `model/whisper/` runs the network; `prompt_media.py` serves models that hear sounds themselves.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from argosy import _native
from argosy.budget.allowances import TRANSCRIPTS_KEPT_BYTES
from argosy.config import TINY_EN
from argosy.errors import Overloaded, UsageError
from argosy.machine import tuning
from argosy.media.decoder import FileDecoder
from argosy.media.parts import PROMPT_LIMITS, Audio, Content, RequestMedia
from argosy.media.transcript import Transcript, TranscriptOptions
from argosy.model.weights import load_dense
from argosy.model.whisper.files import WhisperFiles, open_whisper
from argosy.model.whisper.network import Whisper
from argosy.model.whisper.transcription import Transcription, check_options, prepare
from argosy.prompt.replay import TenantMemory

_MOST_WAITING = 8  # sounds that may wait for the current one
_RETRY_S = 10
_NUM_READERS = 2

Report = Callable[[Transcription], object]
"""Called after each piece of work; an exception from it ends the transcription."""


class Transcriber:
    """Transcribes sounds. Safe from any thread.

        with Transcriber.open("tiny.en") as transcriber:
            print(transcriber.transcribe(Audio("talk.mp3")).text)

    Attributes:
        name: the checkpoint's name for clients.

    Args:
        files: the checkpoint.
        store, runtime: read and compute; the caller closes them.
        turns: held for each piece of work.
        decoder: decodes files; the caller closes it.
    """

    def __init__(
        self,
        files: WhisperFiles,
        store: _native.Store,
        runtime: _native.Runtime,
        *,
        turns: AbstractContextManager[object],
        decoder: FileDecoder,
    ) -> None:
        self.files = files
        self.name = TINY_EN if files.path.name.startswith(f"whisper-{TINY_EN}-") else files.path.name
        self._store, self._runtime, self._turns, self._decoder = store, runtime, turns, decoder
        # Held while a sound is transcribed: at other times the memory for this may be lent.
        self.use_memory: Callable[[], AbstractContextManager[object]] = nullcontext
        self._network: Whisper | None = None
        self._one_sound = threading.Lock()
        self._guard = threading.Lock()
        self._num_asking = 0
        self._kept: TenantMemory[_Kept] = TenantMemory(max_bytes=TRANSCRIPTS_KEPT_BYTES)
        self._owns: list[Callable[[], object]] = []
        self._is_closed = False

    @classmethod
    def open_alone(cls, path: Path, *, threads: int | None = None) -> Self:
        """Open a checkpoint without an engine.

        Args:
            path: a directory with a checkpoint of `transformers` or CTranslate2.
            threads: compute threads; None: as many as an engine has.

        Raises:
            CheckpointError, UnsupportedModel: `open_whisper` refuses the files.
        """
        files = open_whisper(path)
        store = _native.Store(_NUM_READERS)
        runtime = _native.Runtime(threads or tuning.known_threads())
        decoder = FileDecoder(PROMPT_LIMITS)
        made = cls(files, store, runtime, turns=threading.RLock(), decoder=decoder)
        made._owns = [decoder.close, store.close, runtime.close]
        return made

    def transcribe(
        self,
        sound: Audio | Content,
        options: TranscriptOptions | None = None,
        *,
        report: Report = lambda transcription: None,
        request: RequestMedia | None = None,
    ) -> Transcript:
        """Transcribe one sound.

        Args:
            request: counts the sound with the other sounds of its request.

        Raises:
            BadMedia: the sound cannot be decoded, or is too long.
            UsageError: the checkpoint does not support `options`.
            Overloaded: too many sounds are waiting.
            CheckpointError: the weights are damaged.   ReadFailed: the drive failed.
        """
        options = options or TranscriptOptions()
        check_options(options, self.files)
        content = sound.read(PROMPT_LIMITS) if isinstance(sound, Audio) else sound
        with self._guard:
            if self._num_asking > _MOST_WAITING:
                raise Overloaded("too many sounds wait to be transcribed", retry_after_s=_RETRY_S)
            self._num_asking += 1
        try:
            with self._one_sound, self.use_memory():
                return self._transcribe(content, options, report, request)
        finally:
            with self._guard:
                self._num_asking -= 1

    def text_for(self, content: Content, tenant: str, request: RequestMedia) -> str:
        """Return the transcript of a sound in the form used in prompts. Raises what `transcribe` raises."""
        if (kept := self._kept.get(tenant, content.digest)) is None:
            kept = _Kept(self.transcribe(content, report=lambda _: request.check(), request=request))
            self._kept.put(tenant, content.digest, kept)
        else:  # so that kept transcripts do not decide whether a conversation is refused
            request.add_transcribed(kept.duration_s)
        self._kept.touch(tenant, [content.digest])
        return f"[transcript of a sound: {kept.text}]" if kept.text else "[a sound in which nobody speaks]"

    def forget(self, tenant: str) -> None:
        """Forget the transcripts kept for a tenant."""
        self._kept.forget(tenant)

    def drop(self) -> None:
        """Free the weights; the next sound reads them again. Call this while nothing is transcribed."""
        self._network = None

    def close(self) -> None:
        """End the transcription in progress, and free the weights. Closing twice is harmless."""
        self._is_closed = True
        with self._one_sound:
            self._network = None
            for close in self._owns:
                close()
            self._owns = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _transcribe(
        self,
        content: Content,
        options: TranscriptOptions,
        report: Report,
        request: RequestMedia | None,
    ) -> Transcript:
        self._require_open()
        rate = self.files.processor.rate
        samples = self._decoder.sound(content, rate)
        duration_s = samples.size / rate
        if request is not None:
            request.add_transcribed(duration_s)
        features = prepare(self.files, samples)
        del samples
        transcription = Transcription(self.files, self._opened(), features, duration_s, options)
        steps = transcription.steps()
        try:
            while True:
                self._require_open()
                try:
                    with self._turns:
                        next(steps)
                except StopIteration as end:
                    transcript: Transcript = end.value
                    return transcript
                report(transcription)
        finally:
            steps.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("the transcriber is closed")

    def _opened(self) -> Whisper:
        """Return the network; read it if it is not in memory."""
        if self._network is None:
            open_file = functools.cache(self._store.open)
            weights = load_dense(self._store, self.files.tensors, open_file=open_file)
            self._network = Whisper(self.files.config, weights, self._runtime)
        return self._network


class _Kept:
    """A kept transcript."""

    def __init__(self, transcript: Transcript) -> None:
        self.text, self.duration_s = transcript.text, transcript.duration_s
        self.nbytes = len(self.text.encode()) + 128
