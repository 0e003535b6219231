"""Transcribe one sound of any length, window after window, as openai-whisper and `transformers` do.

    mel features -> window of 30 s -> tokens -> segments -> the next window begins where the last segment ended

A window is decoded at temperature 0 first. If the result repeats itself or is unlikely, it is decoded again at higher
temperatures; if all of them look wrong, the likeliest that does not repeat itself is kept. The text of windows before
is given to the next one as its prompt. Each temperature gets one try, and there is no beam search.

Elsewhere: `network.py` computes; `rules.py` says what may come next.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from argosy.errors import CheckpointError, UsageError
from argosy.media.parts import PROMPT_LIMITS
from argosy.media.transcript import TASKS, Segment, Transcript, TranscriptOptions
from argosy.model.encoders.blocks import FLOAT_BYTES, Rows, Steps
from argosy.model.whisper.files import WhisperFiles
from argosy.model.whisper.network import Decoding, Whisper, peak_bytes
from argosy.model.whisper.rules import TokenRules, log_softmax, sample

_HIGHER_TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
_HIGHEST_TEMPERATURE = 1.0
# A text chosen at a higher temperature is too unsure to be the prompt of the next window.
_WARMEST_PROMPT = 0.5
_MOST_PROMPT_CHARACTERS = 8192
# A model may hear so little in each window that a sound would take thousands. After so many in the time of one, the
# rest of a window is passed over.
_MOST_WINDOWS_PER_LENGTH = 20


def check_options(options: TranscriptOptions, files: WhisperFiles) -> None:
    """Refuse what the checkpoint cannot do.

    Raises:
        UsageError: names the option.
    """
    languages = files.special.languages
    if options.task not in TASKS:
        raise UsageError(f"unknown task {options.task!r:.40}; known: {', '.join(TASKS)}")
    if not languages and options.task == "translate":
        raise UsageError(
            "this model knows English only, so it cannot translate",
            hint="use a model that knows other languages",
        )
    if options.language is not None and options.language not in (languages or {"en"}):
        known = ", ".join(sorted(languages)) if languages else "en"
        raise UsageError(
            f"the model does not know the language {options.language!r:.40}; known: {known}", param="language"
        )
    if not 0 <= options.temperature <= _HIGHEST_TEMPERATURE:
        raise UsageError(
            f"temperature is {options.temperature}, expected 0 to {_HIGHEST_TEMPERATURE:g}",
            param="temperature",
        )
    if len(options.prompt) > _MOST_PROMPT_CHARACTERS:
        raise UsageError(
            f"the prompt has {len(options.prompt)} characters; at most {_MOST_PROMPT_CHARACTERS} are read, and only "
            f"the last {files.config.text_positions // 2 - 1} tokens are seen"
        )


def working_bytes(files: WhisperFiles) -> int:
    """Most bytes that the longest sound takes beside the weights: samples, features, one window."""
    num_samples = round(PROMPT_LIMITS.sound_s * files.processor.rate)
    preparing = replace(files.processor, chunk_samples=None).working_bytes(num_samples)
    return FLOAT_BYTES * num_samples + preparing + peak_bytes(files.config)


def prepare(files: WhisperFiles, samples: NDArray[np.float32]) -> Rows:
    """Features [num_mels, frames] of a sound; one that is shorter than a window is padded with silence."""
    processor = files.processor
    assert processor.chunk_samples is not None
    if samples.size > processor.chunk_samples:
        processor = replace(processor, chunk_samples=None)
    return processor.prepare(samples)


@dataclass(slots=True)
class _Result:
    """The decoded tokens of a window, without the end token."""

    tokens: list[int]
    text: str
    temperature: float
    average_logprob: float
    no_speech_probability: float

    @property
    def compression_ratio(self) -> float:
        data = self.text.encode()
        return len(data) / len(zlib.compress(data))


class Transcription:
    """One sound in progress.

    Attributes:
        done_s, duration_s: seconds of the sound that are done, and all of them.
        segments: the transcript so far.

    Args:
        features: from `prepare`.
        duration_s: seconds of the sound, without the padding.
    """

    def __init__(
        self,
        files: WhisperFiles,
        network: Whisper,
        features: Rows,
        duration_s: float,
        options: TranscriptOptions,
    ) -> None:
        check_options(options, files)
        self._files, self._network, self._special = files, network, files.special
        self._features, self.duration_s, self._options = features, duration_s, options
        self._rules = TokenRules(
            files.special, files.config.vocab_size, has_timestamps=options.has_timestamps
        )
        self._language = options.language if files.special.languages else "en"
        prompt = options.prompt.strip()
        # Like text in the middle of a transcript, where a word begins with a space.
        self._before = files.tokenizer.encode(f" {prompt}") if prompt else []
        self.segments: list[Segment] = []
        self.done_s = 0.0

    def steps(self) -> Generator[None, None, Transcript]:
        """Transcribe; yields after each small piece of work, and returns the transcript.

        Raises:
            CheckpointError: the model computes values that are not finite, or may choose no token.
        """
        config, rate = self._files.config, self._files.processor.rate / self._files.processor.hop
        total = self._features.shape[1]
        num_content = min(total, max(1, int(np.ceil(self.duration_s * rate))))
        most_windows = _MOST_WINDOWS_PER_LENGTH * -(-total // config.num_frames)
        start = num_windows = 0
        while start < num_content:
            num_frames = min(total - start, config.num_frames)
            window = np.zeros((config.num_mels, config.num_frames), np.float32)
            window[:, :num_frames] = self._features[:, start : start + num_frames]
            offset_s = start / rate
            content_s = min(num_frames / rate, self.duration_s - offset_s)
            result = yield from self._decode(window)
            if result is None:
                num_positions = None
            else:
                num_positions = self._split(result, offset_s, content_s)
                if not self._options.is_conditioned or result.temperature > _WARMEST_PROMPT:
                    self._before = []
            num_windows += 1
            if num_positions is None or num_windows > most_windows:
                start += num_frames
            else:
                start += 2 * num_positions
            self.done_s = min(self.duration_s, start / rate)
        text = "".join(segment.text for segment in self.segments)
        assert self._language is not None
        return Transcript(
            text=text.strip(),
            language=self._language,
            task=self._options.task,
            duration_s=self.duration_s,
            segments=tuple(segment for segment in self.segments if segment.text.strip()),
        )

    def _decode(self, window: Rows) -> Generator[None, None, _Result | None]:
        """Decode a window; None if nobody speaks in it."""
        options = self._options
        heard = yield from self._network.encode(window)
        decoding = Decoding(self._network, heard)
        if self._language is None:
            yield from self._detect(decoding)
        most_before = self._files.config.text_positions // 2 - 1
        before = [self._special.previous, *self._before[-most_before:]] if self._before else []
        hidden = yield from decoding.feed(before + self._task_tokens())
        first_logits = yield from self._logits(decoding, hidden[-1])
        start_logits = yield from self._logits(decoding, hidden[len(before)])
        no_speech = float(np.exp(log_softmax(start_logits)[self._special.no_speech]))
        temperatures = (options.temperature,) if options.temperature else (0.0, *_HIGHER_TEMPERATURES)
        most = options.compression_ratio_threshold
        results = []
        for temperature in temperatures:
            decoding.rewind(len(hidden))
            result = yield from self._choose(decoding, first_logits, temperature, no_speech)
            is_unlikely = (
                options.logprob_threshold is not None and result.average_logprob < options.logprob_threshold
            )
            if (
                is_unlikely
                and options.no_speech_threshold is not None
                and no_speech > options.no_speech_threshold
            ):
                return None
            repeats = most is not None and result.compression_ratio > most
            if not is_unlikely and not repeats:
                return result
            results.append((not repeats, result.average_logprob, result))
        return max(results, key=lambda each: each[:2])[2]

    def _task_tokens(self) -> list[int]:
        special, options = self._special, self._options
        tokens = [special.start]
        if self._language is not None and special.languages:
            task = special.translate if options.task == "translate" else special.transcribe
            tokens += [special.languages[self._language], task]
        return tokens if options.has_timestamps else [*tokens, special.no_timestamps]

    def _detect(self, decoding: Decoding) -> Steps:
        """Find the language, and leave the sequence empty."""
        hidden = yield from decoding.feed([self._special.start])
        logits = yield from self._logits(decoding, hidden[-1])
        decoding.rewind(0)
        languages = self._special.languages
        self._language = max(languages, key=lambda code: float(logits[languages[code]]))

    def _choose(
        self, decoding: Decoding, logits: NDArray[np.float32], temperature: float, no_speech: float
    ) -> Generator[None, None, _Result]:
        """Choose tokens until the end token, or until the sequence is full."""
        generator = np.random.default_rng((self._options.seed, len(self.segments), round(100 * temperature)))
        chosen: list[int] = []
        total = 0.0
        while True:
            scores = self._rules.log_probabilities(logits, chosen)
            if not np.isfinite(scores.max()):
                raise CheckpointError(
                    f"{self._files.path}: every token that may come next is suppressed", path=self._files.path
                )
            token = sample(scores, temperature, generator)
            total += float(scores[token])
            chosen.append(token)
            if token == self._special.end or decoding.num_tokens == self._files.config.text_positions - 1:
                break
            hidden = yield from decoding.feed([token])
            logits = yield from self._logits(decoding, hidden[-1])
        average = total / len(chosen)
        if chosen[-1] == self._special.end:
            chosen.pop()
        return _Result(chosen, self._text(chosen), temperature, average, no_speech)

    def _logits(self, decoding: Decoding, hidden: Rows) -> Generator[None, None, NDArray[np.float32]]:
        logits = yield from decoding.logits(hidden)
        if not np.isfinite(logits).all():
            raise CheckpointError(
                f"{self._files.path}: the model computes values that are not finite numbers",
                hint="the file is damaged, or the model was already broken when it was saved",
                path=self._files.path,
            )
        return logits

    def _text(self, tokens: list[int]) -> str:
        return self._files.tokenizer.decode(token for token in tokens if token < self._special.end)

    def _split(self, result: _Result, offset_s: float, content_s: float) -> int | None:
        """Add the segments of a window.

        Returns:
            where the next window begins, in positions of this one; None: after this one.
        """
        tokens, first = result.tokens, self._special.timestamps
        if not self._options.has_timestamps:
            self._add(result, tokens, offset_s, offset_s, offset_s + content_s)
            return None
        is_time = [token >= first for token in tokens]
        ends = [at for at in range(1, len(tokens)) if is_time[at - 1] and is_time[at]]
        if not ends:
            times = [token - first for token in tokens if token > first]
            end_s = times[-1] * self._files.seconds_per_position if times else content_s
            self._add(result, tokens, offset_s, offset_s, offset_s + end_s)
            return None
        # One timestamp at the end: nobody speaks after it. A pair: speech goes on, and the rest is heard again.
        is_finished = is_time[-2:] == [False, True]
        if is_finished:
            ends.append(len(tokens))
        for start, end in zip([0, *ends], ends, strict=False):
            piece = tokens[start:end]
            begin_s, end_s = (
                offset_s + (token - first) * self._files.seconds_per_position
                for token in (piece[0], piece[-1])
            )
            self._add(result, piece, offset_s, begin_s, end_s)
        return None if is_finished else tokens[ends[-1] - 1] - first

    def _add(
        self, result: _Result, tokens: list[int], window_start_s: float, start_s: float, end_s: float
    ) -> None:
        self._before += tokens
        self.segments.append(
            Segment(
                window_start_s=window_start_s,
                start_s=start_s,
                end_s=end_s,
                text=self._text(tokens),
                token_ids=tuple(tokens),
                temperature=result.temperature,
                average_logprob=result.average_logprob,
                compression_ratio=result.compression_ratio,
                no_speech_probability=result.no_speech_probability,
            )
        )
