"""Media of a request: base64 in the body becomes parts of the prompt, if the model takes their kind.

    part of a dialect  ->  Intake.piece  ->  {"type": "image", "image": Image(bytes)}
                                └── not taken by the model, or damaged  ->  a note, or a refusal (`replaced.py`)

A client sends the data itself, or an address if the operator allows its host; the server keeps no files. The
decoded bytes are charged to the memory for bodies (`serve/http/held.py`) before decoding, and released when the
prompt is built.

Elsewhere: `media_hosts.py` fetches addresses; the fields of a part are in its dialect's file; `media/decoder.py`
finds out whether the bytes are a picture.
"""

from __future__ import annotations

import binascii
import io
import json
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from argosy.errors import BadMedia, UsageError
from argosy.media.parts import PROMPT_LIMITS, Audio, Image, Kind, MediaLimits, Video
from argosy.serve.answer.fields import Lenient, Short
from argosy.serve.answer.replaced import Replaced
from argosy.serve.http.held import Files, PoolShare

# The types that clients may declare. The decoder goes by the content.
_FORMS: Mapping[Kind, tuple[str, ...]] = {
    "picture": ("image/png", "image/jpeg", "image/webp", "image/gif"),
    "sound": ("wav", "mp3", "flac", "ogg"),
    "video": (
        "video/mp4",
        "video/quicktime",
        "video/webm",
        "video/x-matroska",
        "video/x-msvideo",
        "image/gif",
    ),
}
_OTHER_SPELLINGS = {
    "image/jpg": "image/jpeg", "audio/wav": "wav", "audio/x-wav": "wav", "audio/mp3": "mp3", "audio/mpeg": "mp3",
    "audio/flac": "flac", "audio/ogg": "ogg",
}  # fmt: skip
_LONGEST_SHOWN = 64
_LONGEST_HEAD = 1024  # characters of a data URL up to its comma
_DECODED_AT_ONCE = 1 << 20  # characters, a multiple of four; other threads may run between pieces

# Types that cannot contain media: most values in a body, and a list may have a million of them.
_PLAIN = frozenset({type(None), str, int, float, bool, dict})

AskedDetail = Literal["low", "high", "auto", "original"]
Piece = str | dict[str, Any]
"""Text, or a picture, sound or video as in messages."""


@dataclass(frozen=True, slots=True)
class Data:
    """Base64, and its type according to the client: a media type or a format; None if it does not say.

    start: where the base64 begins in `text`, because cutting it out would copy megabytes.
    """

    text: str = field(repr=False)
    form: str | None
    start: int = 0

    @property
    def num_characters(self) -> int:
        return len(self.text) - self.start


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A reference instead of data; `found` describes it in errors.

    address: where it can be fetched.
    """

    found: str
    address: str | None = None


class MediaPart(Lenient):
    """A picture, sound or video in a body."""

    KIND: ClassVar[Kind]
    REMEDY: ClassVar[str]

    type: str

    @abstractmethod
    def data(self) -> Data | Elsewhere:
        """The data that the client sent, or a reference to it."""

    @abstractmethod
    def drop(self) -> int:
        """Drop the data once the prompt is built; return its number of characters."""

    @property
    def detail_asked(self) -> AskedDetail | None:
        """The requested detail of a picture, if the dialect has a field for it."""
        return None


class SoundData(Lenient):
    data: str
    format: Short


class SoundPart(MediaPart):
    """A sound in OpenAI's dialects."""

    KIND = "sound"
    REMEDY = "send the sound itself: base64 in `data`"

    type: Literal["input_audio"]
    input_audio: SoundData

    def data(self) -> Data | Elsewhere:
        return Data(self.input_audio.data, self.input_audio.format)

    def drop(self) -> int:
        dropped, self.input_audio.data = self.input_audio.data, ""
        return len(dropped)


URL_REMEDY = "send a data URL: data:image/png;base64,..."
VIDEO_URL_REMEDY = "send a data URL: data:video/mp4;base64,..."


def data_of_url(url: str) -> Data | Elsewhere:
    """The data in a data URL."""
    scheme, separator, _ = url[:_LONGEST_SHOWN].partition(":")
    if scheme.lower() != "data" or not separator:
        return Elsewhere(f"an address ({scheme}:)", url) if separator else Elsewhere("text that is not a URL")
    end = url.find(",", 0, _LONGEST_HEAD)
    form, *options = url[len("data:") : end].split(";") if end >= 0 else ("",)
    if options[-1:] != ["base64"]:
        return Elsewhere("a data URL that is not base64")
    return Data(url, form, end + 1)


class Intake:
    """Takes the pictures, sounds and videos of one request.

    Args:
        kinds: media that the model takes in addition to text.
        share: the request's memory; decoded bytes are added to it.
        files: data fetched from other hosts or yet to be fetched; None: fetching is off.
        faults: why the model gets no media of a kind for which it has a tower; shown to the client.

    Attributes:
        replaced: the notes that replace what the model cannot read.
        share: the memory that the request holds.
    """

    def __init__(
        self,
        kinds: Collection[Kind],
        share: PoolShare,
        limits: MediaLimits = PROMPT_LIMITS,
        *,
        files: Files | None = None,
        faults: Mapping[Kind, str] = MappingProxyType({}),
    ) -> None:
        self._kinds, self.share, self._files, self._faults = kinds, share, files, faults
        self._limits = limits
        self.replaced = Replaced(kinds)

    def piece(self, part: MediaPart, where: str, *, is_new: bool) -> Piece:
        """The picture, sound or video for the prompt, or the note that replaces it.

        Args:
            where: its place in the body.
            is_new: it is in the user's newest turn.

        Raises:
            UsageError: it is new and the model does not take its kind; it is an address or a file id; its declared
                type is unsupported; or the data is not base64.
            BadMedia: it is too large.
            Overloaded: other requests leave too little memory.
        """
        kind = part.KIND
        if kind not in self._kinds:
            return self.replaced.note(part.type, where, is_new=is_new, reason=self._faults.get(kind))
        sent, forms = part.data(), _FORMS[kind]
        form = sent.form.lower() if isinstance(sent, Data) and sent.form is not None else None
        remedy = part.REMEDY
        if isinstance(sent, Elsewhere) and sent.address is not None and self._files is not None:
            content = self._files.found.get(sent.address)
            if isinstance(content, bytes):
                return self._taken(part, content, is_new=is_new)
            if content is None:
                self._files.wanted[sent.address] = None
                return ""  # the request is read again once the file has been fetched
            fault = f"the {kind} cannot be fetched: {content}"
        elif isinstance(sent, Elsewhere):
            fault = f"expected the data of a {kind}, found {sent.found}"
            if self._files is None:
                remedy = f"this server opens no address and keeps no files; {remedy}"
        elif form is not None and _OTHER_SPELLINGS.get(form, form) not in forms:
            fault = f"expected a {kind} of type {', '.join(forms[:-1])} or {forms[-1]}"
            fault += f", found {json.dumps(form[:_LONGEST_SHOWN])}"
        else:
            try:
                return self._taken(part, self._decoded(sent, kind, where), is_new=is_new)
            except UsageError as error:
                if is_new:
                    raise
                fault = error.message.removeprefix(f"{where}: ")
        if is_new:
            raise UsageError(f"{where}: {fault}", param=where, hint=remedy)
        return self.replaced.note(part.type, where, is_new=False, reason=fault)

    def _taken(self, part: MediaPart, content: bytes, *, is_new: bool) -> Piece:
        made: Image | Audio | Video
        if part.KIND == "picture":
            kind, made = "image", Image(content, "low" if part.detail_asked == "low" else "high")
        elif part.KIND == "video":
            kind, made = "video", Video(content)
        else:
            kind, made = "audio", Audio(content)
        if not is_new:
            self.replaced.allow(made, part.type)
        return {"type": kind, kind: made}

    def _decoded(self, sent: Data, kind: Kind, where: str) -> bytes:
        num_bytes = max(0, sent.num_characters * 3 // 4 - sent.text[-2:].count("="))
        most = self._limits.video_bytes if kind == "video" else self._limits.file_bytes
        if num_bytes > most:
            raise BadMedia(
                f"{where}: the file of a {kind} may have at most {most:,} bytes, found {num_bytes:,}",
                kind=kind,
                needed=most,
                found=num_bytes,
                param=where,
            )
        held_bytes = self.share.num_bytes + num_bytes
        self.share.hold(num_bytes + num_bytes // 8 + _DECODED_AT_ONCE)  # while the buffer grows
        try:
            content = _decode(sent)
        except ValueError:
            raise UsageError(
                f"{where}: the data of the {kind} is not base64",
                param=where,
                hint="use the standard alphabet (A-Z a-z 0-9 + /) with padding, and no spaces or line breaks",
            ) from None
        self.share.shrink(held_bytes)
        return content


def _decode(sent: Data) -> bytes:
    """Decode base64 in pieces, without copying it.

    Raises:
        ValueError: it is not base64.
    """
    made = io.BytesIO()
    for start in range(sent.start, len(sent.text), _DECODED_AT_ONCE):
        piece = sent.text[start : start + _DECODED_AT_ONCE]
        num_bytes = made.write(binascii.a2b_base64(piece, strict_mode=True))
        if start + len(piece) < len(sent.text) and num_bytes < len(piece) // 4 * 3:
            raise ValueError("padding before the end")
    return made.getvalue()


def content_of(pieces: Sequence[Piece], *, between: str) -> str | list[dict[str, Any]]:
    """The content of a message: text, with `between` between the pieces, or a list of parts if it contains media."""
    parts: list[dict[str, Any]] = []
    for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
        if is_text:
            parts.append({"type": "text", "text": between.join(map(str, run))})
        else:
            parts.extend(piece for piece in run if isinstance(piece, dict))
    if not parts:
        return ""
    return str(parts[0]["text"]) if len(parts) == 1 and parts[0]["type"] == "text" else parts


def media_in(given: object) -> Iterator[MediaPart]:
    """Yield the media in a body or in a part of it."""
    if isinstance(given, MediaPart):
        yield given
    elif isinstance(given, list | BaseModel):
        for inside in given if isinstance(given, list) else vars(given).values():
            if type(inside) not in _PLAIN:
                yield from media_in(inside)
