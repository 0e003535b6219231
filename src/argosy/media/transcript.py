"""Transcripts of speech, with times, and the formats of subtitles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Task = Literal["transcribe", "translate"]
TASKS: tuple[Task, ...] = ("transcribe", "translate")

# The names of Whisper's languages, as openai-whisper and OpenAI's API spell them.
LANGUAGE_NAMES: Mapping[str, str] = {
    "af": "afrikaans", "am": "amharic", "ar": "arabic", "as": "assamese", "az": "azerbaijani",
    "ba": "bashkir", "be": "belarusian", "bg": "bulgarian", "bn": "bengali", "bo": "tibetan",
    "br": "breton", "bs": "bosnian", "ca": "catalan", "cs": "czech", "cy": "welsh", "da": "danish",
    "de": "german", "el": "greek", "en": "english", "es": "spanish", "et": "estonian", "eu": "basque",
    "fa": "persian", "fi": "finnish", "fo": "faroese", "fr": "french", "gl": "galician", "gu": "gujarati",
    "ha": "hausa", "haw": "hawaiian", "he": "hebrew", "hi": "hindi", "hr": "croatian",
    "ht": "haitian creole", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "is": "icelandic",
    "it": "italian", "ja": "japanese", "jw": "javanese", "ka": "georgian", "kk": "kazakh", "km": "khmer",
    "kn": "kannada", "ko": "korean", "la": "latin", "lb": "luxembourgish", "ln": "lingala", "lo": "lao",
    "lt": "lithuanian", "lv": "latvian", "mg": "malagasy", "mi": "maori", "mk": "macedonian",
    "ml": "malayalam", "mn": "mongolian", "mr": "marathi", "ms": "malay", "mt": "maltese", "my": "myanmar",
    "ne": "nepali", "nl": "dutch", "nn": "nynorsk", "no": "norwegian", "oc": "occitan", "pa": "punjabi",
    "pl": "polish", "ps": "pashto", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sa": "sanskrit",
    "sd": "sindhi", "si": "sinhala", "sk": "slovak", "sl": "slovenian", "sn": "shona", "so": "somali",
    "sq": "albanian", "sr": "serbian", "su": "sundanese", "sv": "swedish", "sw": "swahili", "ta": "tamil",
    "te": "telugu", "tg": "tajik", "th": "thai", "tk": "turkmen", "tl": "tagalog", "tr": "turkish",
    "tt": "tatar", "uk": "ukrainian", "ur": "urdu", "uz": "uzbek", "vi": "vietnamese", "yi": "yiddish",
    "yo": "yoruba", "yue": "cantonese", "zh": "chinese",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptOptions:
    """How a sound is transcribed; the defaults are those of openai-whisper.

    language: a code that the checkpoint knows, such as `de`; None: detected in the first window.
    task: `translate` writes English.
    prompt: preceding text, for names and style; the model sees only its last tokens.
    temperature: 0 takes the likeliest token, then tries 0.2, 0.4 .. 1.0 for a window whose result looks wrong.
    has_timestamps: segments have times; without them, each window is one segment.
    is_conditioned: a window sees the text of the windows before it.
    compression_ratio_threshold: a result that compresses better than this repeats itself; None: never.
    logprob_threshold: a result whose tokens are less likely on average looks wrong; None: never.
    no_speech_threshold: a window that looks wrong and is silent with a higher probability than this is skipped; None:
        never.
    seed: for sampling at temperatures above zero.
    """

    language: str | None = None
    task: Task = "transcribe"
    prompt: str = ""
    temperature: float = 0.0
    has_timestamps: bool = True
    is_conditioned: bool = True
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a transcript.

    window_start_s: the start of the window that contains the segment.
    token_ids: as decoded, timestamps included.
    temperature, average_logprob, compression_ratio, no_speech_probability: values of that window.
    """

    window_start_s: float
    start_s: float
    end_s: float
    text: str
    token_ids: tuple[int, ...]
    temperature: float
    average_logprob: float
    compression_ratio: float
    no_speech_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A transcript of speech. `text` joins all segments; `language` is a code such as `en`."""

    text: str
    language: str
    task: Task
    duration_s: float
    segments: tuple[Segment, ...]


def as_srt(transcript: Transcript) -> str:
    """Format SubRip subtitles."""
    blocks = [
        f"{number}\n{_clock(one.start_s, ',')} --> {_clock(one.end_s, ',')}\n{_one_line(one.text)}\n"
        for number, one in enumerate(transcript.segments, start=1)
    ]
    return "\n".join(blocks)


def as_vtt(transcript: Transcript) -> str:
    """Format WebVTT subtitles."""
    blocks = [
        f"{_clock(one.start_s, '.')} --> {_clock(one.end_s, '.')}\n{_one_line(one.text)}\n"
        for one in transcript.segments
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def as_dict(transcript: Transcript) -> dict[str, object]:
    """Return the object that OpenAI's API calls `verbose_json`, with the language's name, or its code if that is
    unknown.
    """
    return {
        "task": transcript.task,
        "language": LANGUAGE_NAMES.get(transcript.language, transcript.language),
        "duration": round(transcript.duration_s, 3),
        "text": transcript.text,
        "segments": [
            {
                "id": number,
                "seek": round(100 * one.window_start_s),
                "start": round(one.start_s, 3),
                "end": round(one.end_s, 3),
                "text": one.text,
                "tokens": list(one.token_ids),
                "temperature": one.temperature,
                "avg_logprob": one.average_logprob,
                "compression_ratio": one.compression_ratio,
                "no_speech_prob": one.no_speech_probability,
            }
            for number, one in enumerate(transcript.segments)
        ],
    }


WRITERS: Mapping[str, Callable[[Transcript], str]] = {
    "text": lambda transcript: transcript.text + "\n",
    "srt": as_srt,
    "vtt": as_vtt,
}
"""Formats that are plain text, by name."""


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def _one_line(text: str) -> str:
    """Remove empty lines and arrows, which would end a subtitle."""
    return " ".join(text.split()).replace("-->", "->")
