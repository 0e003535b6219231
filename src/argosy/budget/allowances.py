"""Memory of a process that does not follow from the model's sizes: measured values, rounded up."""

from __future__ import annotations

from argosy import _native
from argosy.config import (
    DRAFTED_AT_ONCE,
    KIB,
    MIB,
    EngineConfig,
)
from argosy.machine.resources import PROCESS_GROWTH_BYTES, THREAD_BYTES, held_bytes
from argosy.media.parts import FFMPEG_BYTES, PROMPT_LIMITS
from argosy.prompt.tokenizer import Tokenizer

_DECODED_PIXEL_BYTES = 3 + 4  # decoded, and while Pillow scales it
MEDIA_WAITING_BYTES = 64 * MIB  # prepared pictures, sounds and frames of requests whose encode has not begun
MEDIA_KEPT_BYTES = 64 * MIB  # rows kept for prompts that repeat a picture
TRANSCRIPTS_KEPT_BYTES = 1 * MIB  # transcripts kept for prompts that repeat a sound
_DECODER_BYTES = 96 * MIB  # the process that decodes files, beyond what one file may take
_HIGHEST_MEDIA_RATE = 48_000  # samples per second that a model expects
# Growth of a process after the plan that no part of the plan covers: allowances, above the measured values.
MEDIA_GROWTH_BYTES = 18 * MIB  # libraries for media, which are imported when the model is opened
TOKEN_OBJECT_BYTES = 160  # ids as Python objects, and an entry in the index of prefixes: about 100
# Contexts of an answer with a watermark, as `watermark.MarkedAnswer` keeps them.
MARKED_ANSWER_BYTES = 12 * KIB
# A lookup drafter takes this per token of a sequence: its id, room to grow, a copy while that grows, and a search.
LOOKUP_TOKEN_BYTES = 20
TEMPLATE_WORKER_BYTES = 24 * MIB  # the process that renders chat templates: 22 MiB measured
PROCESS_VARIES_BYTES = 2 * MIB  # process size differs by this much from one start to the next
OTHER_THREADS = 8  # threads of the interpreter, the engine and the server, beside compute and reader threads
GRAMMAR_BYTES = 64 * MIB  # compiled grammars, and the state they build up while answers follow them


def process_bytes(tokenizer: Tokenizer | None) -> int:
    """Return the bytes that this process holds now, plus the worker that it will start if the model has a chat
    template.

    Memory that was freed while files were read is first returned to the system: the engine needs it again, and other
    parts of the plan count it.
    """
    _native.trim_heap()
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    return held_bytes() + (TEMPLATE_WORKER_BYTES if has_template else 0)


def growth_bytes(config: EngineConfig, context_tokens: int, *, has_media: bool) -> int:
    """Return the growth of a process after planning that no part of the plan covers."""
    threads = config.threads + config.readers + OTHER_THREADS
    nbytes = PROCESS_GROWTH_BYTES + threads * THREAD_BYTES + context_tokens * TOKEN_OBJECT_BYTES
    if config.watermark is not None:
        nbytes += (config.max_sequences + (config.max_waiting or 0)) * MARKED_ANSWER_BYTES
    if config.speculate == "lookup":
        nbytes += DRAFTED_AT_ONCE * context_tokens * LOOKUP_TOKEN_BYTES
    return nbytes + (MEDIA_GROWTH_BYTES if has_media else 0)


def media_bytes(*, takes_pictures: bool, takes_video: bool) -> int:
    """Return the memory for media besides their encoders: a file being decoded, waiting requests, kept rows."""
    sound_bytes = round(4 * PROMPT_LIMITS.sound_s * _HIGHEST_MEDIA_RATE)
    decoded = max(_DECODED_PIXEL_BYTES * PROMPT_LIMITS.pixels if takes_pictures else 0, sound_bytes)
    # Pictures are decoded while a video is: ffmpeg needs its own memory.
    ffmpeg_bytes = FFMPEG_BYTES + PROMPT_LIMITS.decode_bytes
    video = ffmpeg_bytes + PROMPT_LIMITS.video_bytes + sound_bytes if takes_video else 0
    return (
        _DECODER_BYTES + PROMPT_LIMITS.decode_bytes + decoded + video + MEDIA_WAITING_BYTES + MEDIA_KEPT_BYTES
    )


def lendable_bytes(encoder_bytes: int) -> int:
    """Return the part of `MemoryPlan.encoder_bytes` that is unused while nothing is decoded, encoded or transcribed."""
    return max(0, encoder_bytes - MEDIA_WAITING_BYTES - MEDIA_KEPT_BYTES - TRANSCRIPTS_KEPT_BYTES)
