"""Media of prompts: checked and measured when a request arrives, encoded between the steps of other requests.

    Image("cat.png")  ->  read  ->  segments: decoded, prepared, a MediaSpan  ->  make_rows: the tower, piece by piece
                                                                              ->  kept, for the next prompt with it

A video becomes several spans, one for each group of frames, with the family's texts between them.

A waiting request holds little memory: for each picture or frame only the pixels that the tower will see, one byte
each. `MEDIA_WAITING_BYTES` bounds the memory of all requests together.

Elsewhere: `media/` decodes and prepares; `model/encoders/` runs the towers; `video_layout.py` orders the parts of a
video; `spans.py` puts rows into steps; `budget/media_memory.py` lends the unused memory to experts.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from argosy.budget.allowances import MEDIA_KEPT_BYTES, MEDIA_WAITING_BYTES
from argosy.budget.media_memory import MediaMemory
from argosy.engine.media.video_layout import Group, Sound, told_by_angles, told_by_text
from argosy.engine.turns import Turns
from argosy.errors import ArgosyError, BadMedia, Overloaded, UnsupportedModel, UsageError
from argosy.media.decoder import FileDecoder
from argosy.media.frames import open_frames
from argosy.media.parts import PROMPT_LIMITS, Audio, Content, Hearing, Image, Kind, RequestMedia, Video
from argosy.media.patches import PictureProcessor
from argosy.media.sounds import SoundProcessor
from argosy.media.videos import VideoProcessor
from argosy.model.encoders.encoder import FillingTower, Shape
from argosy.model.encoders.reading import EncoderFiles, Encoders, Processor
from argosy.prompt.media_span import EARS_HINT, MakeRows, Making, MediaSpan, PlaceSpan, SpanRows
from argosy.prompt.replay import TenantMemory
from argosy.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from argosy.engine.media.ears import Transcriber

_RETRY_S = 5
_CONTROL = r"<\|\w+\|>"

# The tower that encodes each kind: a video's frames are pictures.
_TOWERS: Mapping[Kind, Kind] = {"picture": "picture", "sound": "sound", "video": "picture"}
Lend = Callable[[Callable[[], None]], MediaMemory]


class PromptMedia:
    """Reads the media of one engine's prompts. Safe from any thread; encoding runs in the engine's own thread.

    Args:
        processors: for each kind of media, its processor or the error that refuses it.
        low_detail: prepares a picture with low detail; None: the model takes no pictures.
        encode_text: returns the ids of a text that the model's own processor writes, control tokens included.
        lend: makes the `MediaMemory` of encoders and decoder, given a function that frees that memory.
        ears: transcribe sounds if the model cannot hear; they share the decoder and the memory.
    """

    def __init__(
        self,
        encoders: Encoders,
        processors: Mapping[Kind, Processor | ArgosyError],
        decoder: FileDecoder,
        low_detail: Processor | None,
        encode_text: Callable[[str], list[int]],
        lend: Lend,
        ears: Transcriber | None,
    ) -> None:
        self._encoders = encoders
        self._low_detail = low_detail
        self._processors: dict[Kind, Processor] = {}
        self._faults: dict[Kind, ArgosyError] = {}
        for kind, one in processors.items():
            if isinstance(one, ArgosyError):
                self._faults[kind] = one
            else:
                self._processors[kind] = one
        self._encode_text = encode_text
        self._decoder = decoder
        self._ears = ears
        self.memory = lend(self._clear)
        if ears is not None:
            ears.use_memory = self.memory.use
        # A decoded picture or sound is large, so only one exists at a time. Frames of a video take turns with them.
        self._one_decoded = Turns()
        self._one_video = threading.Lock()
        self._waiting = _Room(MEDIA_WAITING_BYTES)
        self._kept: TenantMemory[SpanRows] = TenantMemory(max_bytes=MEDIA_KEPT_BYTES)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of media that a prompt may contain."""
        return (*self._processors, *(("sound",) if self.hears == "transcript" else ()))

    @property
    def faults(self) -> Mapping[Kind, ArgosyError]:
        """Why a prompt may not contain media of a kind for which the model has a tower."""
        return self._faults

    @property
    def hears(self) -> Hearing:
        """How the engine treats a sound."""
        if "sound" in self._processors:
            return "native"
        return "none" if self._ears is None else "transcript"

    def settle(self) -> None:
        """See `MediaMemory.settle`."""
        self.memory.settle()

    def close(self) -> None:
        self.memory.close()
        self._clear()

    def _clear(self) -> None:
        """Free the memory that `memory` lends."""
        self._decoder.close()
        self._encoders.drop()
        if self._ears is not None:
            self._ears.drop()

    def forget(self, tenant: str) -> None:
        """Forget the rows and transcripts kept for a tenant."""
        self._kept.forget(tenant)
        if self._ears is not None:
            self._ears.forget(tenant)

    def read(self, part: Image | Audio | Video) -> Content:
        """See `MediaReader.read`."""
        if part.kind not in self.kinds:
            if part.kind in self._faults:
                raise self._faults[part.kind]
            *most, last = ["text", *(f"{kind}s" for kind in self.kinds)]
            takes = f"{', '.join(most)} and {last}" if most else f"{last} only"
            raise UsageError(
                f"this model takes {takes}, and the conversation has a {part.kind}",
                hint=EARS_HINT if part.kind == "sound" else None,
            )
        return part.read(PROMPT_LIMITS)

    def as_text(self, content: Content, tenant: str, request: RequestMedia) -> str | None:
        """See `MediaReader.as_text`."""
        if content.kind != "sound" or self._ears is None or self.hears == "native":
            return None
        return self._ears.text_for(content, tenant, request)

    def placeholder(self, content: Content) -> int:
        """See `MediaReader.placeholder`."""
        files = self._encoders.files[_TOWERS[content.kind]]
        if content.kind != "video":
            written = files.encoder.placeholder
            return files.token_id if written is None else self._encode_text(written)[0]
        assert files.video is not None
        return files.video.token_id

    def surroundings(self, content: Content) -> tuple[list[int], list[int]]:
        """See `MediaReader.surroundings`."""
        processor = self._processors[content.kind]
        if not isinstance(processor, VideoProcessor) or not processor.surroundings.before:
            return [], []
        before, after = processor.surroundings
        return self._encode_text(before), self._encode_text(after)

    def segments(
        self, content: Content, tenant: str, request: RequestMedia
    ) -> Sequence[Sequence[int] | MediaSpan | PlaceSpan]:
        """See `MediaReader.segments`."""
        processor = self._processors[content.kind]
        if isinstance(processor, VideoProcessor):
            return self._video_segments(content, processor, tenant, request)
        files = self._encoders.files[content.kind]
        if content.detail == "low":
            assert isinstance(self._low_detail, PictureProcessor)
            processor = self._low_detail
        with self.memory.use(), self._one_decoded, request.work():
            values, shape, size = self._prepare(content, processor, request)
        waiting = self._wait(values)
        kind, digest = content.kind, blake3(content.digest + repr((content.kind, shape)).encode()).digest()
        # `kind` alone, so that the content does not stay in memory.
        make_rows = self._maker(tenant, digest, lambda: self._encode(kind, waiting.values))
        tokens = {at: self._encode_text(text)[0] for at, text in files.written(shape).items()}
        span = _span(kind, files, files.token_id, shape, digest, make_rows, tokens=tokens)
        if files.encoder.label is not None:
            before, after = map(self._encode_text, files.encoder.label(*size))
            return [before, span, after]
        if files.encoder.num_fillers is not None:
            return [partial(self._fillers, files, tenant), span]
        return [span] if files.marks is None else [files.marks[:1], span, files.marks[1:]]

    def _fillers(self, files: EncoderFiles, tenant: str, position: int) -> Sequence[int] | MediaSpan:
        """Return the span before one that would begin at a position."""
        assert files.encoder.num_fillers is not None
        if not (count := files.encoder.num_fillers(position)):
            return []

        digest = blake3(f"fillers {count}".encode()).digest()

        def encode() -> Making:
            tower = yield from self._encoders.open("picture")
            return SpanRows(cast("FillingTower", tower).fillers(count))

        # A picture whose rows are kept needs no tower, so neither may these rows.
        return MediaSpan("picture", digest, count, files.token_id, self._maker(tenant, digest, encode))

    def _prepare(
        self, content: Content, processor: PictureProcessor | SoundProcessor, request: RequestMedia
    ) -> tuple[NDArray[Any], Shape, tuple[int, int]]:
        """Decode one content to pixels [height, width, 3] with their grid and a picture's own height and width, or to
        mel features [bands, frames].
        """
        if isinstance(processor, PictureProcessor):
            # Refuse a picture by its header, before decoding it.
            pixels = self._decoder.picture(
                content, lambda height, width: request.require_room(processor.num_tokens(height, width))
            )
            canvas = processor.resize(pixels)
            rows, cols = (side // processor.patch_size for side in canvas.shape[:2])
            return canvas, (1, rows, cols), (pixels.shape[0], pixels.shape[1])
        features = processor.prepare(self._decoder.sound(content, processor.rate))
        return features, (features.shape[1],), (0, 0)

    def _video_segments(
        self, content: Content, processor: VideoProcessor, tenant: str, request: RequestMedia
    ) -> list[Sequence[int] | MediaSpan]:
        files = self._encoders.files["picture"]
        form = files.encoder.video
        assert form is not None
        assert files.video is not None
        with self.memory.use(), self._one_video:
            video = self._prepare_video(content, processor, request, listens=form.sound is not None)
        groups = processor.groups(len(video.indices))
        frames = self._wait(video.canvases)
        sound = None if video.features is None else self._wait(video.features)
        sound_shape = (0,) if video.features is None else (video.features.shape[1],)
        sound_digest = blake3(content.digest + repr(("heard", sound_shape)).encode()).digest()
        num_sound = 0 if sound is None else self._encoders.files["sound"].num_positions(sound_shape)
        if form.angles is None:
            parts = told_by_text(processor.texts([index / video.rate for index in video.indices]))
        else:
            _, rows, cols = processor.grid(video.canvases[:1])
            seconds = video.seconds / len(video.indices) * processor.group_frames
            angles, num_angles = form.angles(
                files.config, (len(groups), rows, cols), seconds, files.video.angles_per_second
            )
            parts = told_by_angles(angles, num_angles, len(groups), num_sound)
            if num_sound and form.sound is not None:
                parts = [form.sound[0], *parts, form.sound[1]]
        token_id = files.token_id if form.is_shown_as_pictures else files.video.token_id

        def of_group(part: Group) -> list[Sequence[int] | MediaSpan]:
            group = groups[part.number]
            chosen = slice(group.start, group.stop)
            shape = processor.grid(video.canvases[chosen])
            # The advance of positions is part of the identity: positions after the span depend on it.
            seen = repr(("video", shape, video.indices[chosen], part.num_angles))
            digest = blake3(content.digest + seen.encode()).digest()
            make_rows = self._maker(tenant, digest, lambda: self._encode("video", frames.values[chosen]))
            span = _span("video", files, token_id, shape, digest, make_rows, part)
            return [span] if files.marks is None else [files.marks[:1], span, files.marks[1:]]

        def of_sound(part: Sound) -> MediaSpan:
            assert sound is not None
            placed = repr((part.start, part.stop, part.num_angles))
            digest = blake3(sound_digest + placed.encode()).digest()
            make_rows = self._maker(tenant, sound_digest, lambda: self._encode("sound", sound.values))
            return MediaSpan(
                "sound",
                digest,
                part.stop - part.start,
                self._encoders.files["sound"].token_id,
                lambda: _some_rows(make_rows, slice(part.start, part.stop)),
                angles=part.angles,
                num_angles=part.num_angles,
            )

        made: list[Sequence[int] | MediaSpan] = []
        for part in parts:
            if isinstance(part, str):
                made.append(self._encode_text(part))
            elif isinstance(part, Group):
                made += of_group(part)
            else:
                made.append(of_sound(part))
        return made

    def _prepare_video(
        self, content: Content, processor: VideoProcessor, request: RequestMedia, *, listens: bool
    ) -> _Video:
        """Decode the frames that the model sees, and the sound if the model hears it."""
        hearing = self._processors.get("sound") if listens else None
        for counts_decoded in (False, True):
            with open_frames(
                content,
                self._decoder,
                PROMPT_LIMITS,
                request,
                turn=self._one_decoded,
                counts_decoded=counts_decoded,
            ) as frames:
                indices = processor.sample(frames.num_frames, frames.rate)
                with closing(frames.at(indices)) as chosen:
                    canvases = processor.resize(chosen, len(indices), request)
                if len(canvases) < len(indices):  # not every packet of a file is a frame
                    continue
                features = None
                if isinstance(hearing, SoundProcessor) and frames.sound is not None:
                    samples = frames.sound(hearing.rate)
                    if samples.size > hearing.window:  # a shorter sound cannot be heard
                        with self._one_decoded, request.work():
                            features = hearing.prepare(samples)
                seconds = frames.num_frames / frames.rate
                return _Video(indices.tolist(), frames.rate, seconds, canvases, features)
        raise BadMedia(
            "the video is damaged: some of its frames cannot be decoded",
            hint="save it again, or convert it to MP4",
            kind="video",
        )

    def _wait(self, values: NDArray[Any]) -> _Waiting:
        waiting = _Waiting(values)
        self._waiting.charge(waiting, values.nbytes)
        return waiting

    def _maker(self, tenant: str, digest: bytes, encode: Callable[[], Making]) -> MakeRows:
        """Return a function that returns the kept rows, if there are any, and otherwise encodes and keeps them."""

        def make_rows() -> SpanRows | Making:
            if (kept := self._kept.get(tenant, digest)) is not None:
                self._kept.touch(tenant, [digest])
                return kept
            return self._made(tenant, digest, encode())

        return make_rows

    def _made(self, tenant: str, digest: bytes, making: Making) -> Making:
        with self.memory.use():
            rows = yield from making
        if rows.nbytes <= MEDIA_KEPT_BYTES:
            self._kept.put(tenant, digest, rows)
        return rows

    def _encode(self, kind: Kind, values: NDArray[Any]) -> Making:
        tower, processor = (yield from self._encoders.open(_TOWERS[kind])), self._processors[kind]
        if isinstance(processor, SoundProcessor):
            return (yield from tower.encode(values))
        patches, grid = processor.patches(values)
        return (yield from tower.encode(patches, grid))


@dataclass(frozen=True, slots=True)
class _Video:
    """A decoded video.

    indices: the frames that the model sees.
    rate, seconds: frames per second and length of the whole.
    canvases: uint8 [frames, height, width, 3].
    features: float32 [bands, mel frames]; None: the video has no sound, or the model does not hear it.
    """

    indices: list[int]
    rate: float
    seconds: float
    canvases: NDArray[np.uint8]
    features: NDArray[np.float32] | None


def _span(
    kind: Kind,
    files: EncoderFiles,
    token_id: int,
    shape: Shape,
    digest: bytes,
    make_rows: MakeRows,
    part: Group | None = None,
    tokens: Mapping[int, int] = MappingProxyType({}),
) -> MediaSpan:
    """Make a span, placed by its shape or by `part`."""
    angles, num_angles = (None, None) if part is None else (part.angles, part.num_angles)
    if angles is None and files.encoder.angles is not None:
        angles, num_angles = files.encoder.angles(files.config, shape)
    return MediaSpan(
        kind,
        digest,
        files.num_positions(shape),
        token_id,
        make_rows,
        angles=angles,
        num_angles=num_angles,
        sees_both_ways=files.encoder.sees_both_ways,
        tokens=tokens,
    )


def _some_rows(make_rows: MakeRows, part: slice) -> Making:
    made = make_rows()
    if not isinstance(made, SpanRows):
        made = yield from made
    additions = {layer: rows[part] for layer, rows in made.additions.items()}
    return SpanRows(made.embeddings[part], additions)


class _Waiting:
    """Prepared media; their room is freed once nothing can encode them any more."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values


class _Room:
    """Counts the bytes that objects take until they are collected."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._lock = threading.Lock()
        # An object may be collected while this thread holds the lock, so its finalizer only appends here.
        self._freed: deque[int] = deque()

    @property
    def held_bytes(self) -> int:
        """The bytes charged now."""
        with self._lock:
            return self._settle()

    def charge(self, owner: object, nbytes: int) -> None:
        """Charge bytes until `owner` is collected.

        Raises:
            Overloaded: the bytes do not fit now.   UsageError: they never fit.
        """
        if nbytes > self._most_bytes:
            raise UsageError(
                f"once it is prepared, a medium may take at most {self._most_bytes} bytes, found {nbytes}",
                hint="make it smaller or shorter",
            )
        with self._lock:
            if self._settle() + nbytes > self._most_bytes:
                raise Overloaded(
                    "too many pictures, sounds and videos wait to be encoded", retry_after_s=_RETRY_S
                )
            self._held_bytes += nbytes
        weakref.finalize(owner, self._freed.append, nbytes)

    def _settle(self) -> int:
        while self._freed:
            self._held_bytes -= self._freed.popleft()
        return self._held_bytes


def open_media(
    encoders: Encoders,
    processors: Mapping[Kind, Processor | ArgosyError],
    decoder: FileDecoder,
    low_detail: Processor | None,
    tokenizer: Tokenizer | None,
    lend: Lend,
    ears: Transcriber | None,
) -> PromptMedia:
    """Combine the towers that were found with the processors that prepare media for them."""
    for kind, processor in processors.items():
        if tokenizer is None or isinstance(processor, ArgosyError):
            continue
        missing = [
            token
            for token in _control_tokens(kind, processor, encoders)
            if tokenizer.control_id(token) is None
        ]
        if missing:
            fault = UnsupportedModel(
                f"a {kind} is written with the token {missing[0]}, and the model's tokenizer has none",
                key=missing[0],
            )
            processors = {**processors, kind: fault}

    def encode_text(text: str) -> list[int]:
        assert tokenizer is not None  # without a template, a model takes no messages
        return tokenizer.encode_segments([(False, text)])

    return PromptMedia(encoders, processors, decoder, low_detail, encode_text, lend, ears)


def _control_tokens(kind: Kind, processor: Processor, encoders: Encoders) -> list[str]:
    """Return the control tokens that are written for a kind of media, except those that the chat template writes."""
    if not isinstance(processor, VideoProcessor):
        files = encoders.files[kind]
        if files.encoder.label is not None:
            return re.findall(_CONTROL, "".join(files.encoder.label(1, 1)))
        if files.encoder.written is None:
            return []
        two_rows = (1, 2 * files.config.merge, 2 * files.config.merge)
        return [*files.written(two_rows).values(), *files.written(files.largest_shape(processor)).values()]
    form = encoders.files["picture"].encoder.video
    assert form is not None
    texts = [*processor.surroundings, *processor.label(0.0, 0.0), *(form.sound or ())]
    return re.findall(_CONTROL, "".join(texts))
