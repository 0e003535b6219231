"""OpenAI's transcriptions and translations of sound: a form with a file becomes a transcript.

    form  ->  TranscriptionBody, TranslationBody  ->  Service.transcribe  ->  json, text, srt, vtt, verbose_json
                                                                          ->  events, segment by segment

A server with ears (`argosy serve --ears`) offers these routes. A transcription takes turns with the model's steps,
and ends when its client leaves.

Elsewhere: `serve/dialects/form.py` reads the body; `engine/media/ears.py` transcribes; `media/transcript.py` writes
subtitles.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import BadMedia, UsageError
from argosy.media.parts import Content
from argosy.media.transcript import WRITERS, Task, Transcript, TranscriptOptions, as_dict
from argosy.serve.answer.check import check_of
from argosy.serve.answer.fields import Flag, Short, Strict, few
from argosy.serve.answer.service import service_of
from argosy.serve.http.access import RouteRule
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import OpenAIError
from argosy.serve.http.route import Route
from argosy.serve.http.streams import EventStream, answer_whole, sse

MOST_FILE_BYTES = 25 << 20
MOST_BODY_BYTES = MOST_FILE_BYTES + (1 << 20)
_STREAM_FORMATS = ("json", "text")


def _file(value: object) -> bytearray:
    if not isinstance(value, bytearray):
        raise PydanticCustomError("file", "Input should be a file, with a filename")
    return value


def _number(value: object) -> object:
    """Parse a number in a form."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _flag(value: object) -> object:
    return {"true": True, "True": True, "false": False, "False": False}.get(str(value), value)


File = Annotated[
    Any,
    PlainValidator(_file),
    WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"}),
]
Temperature = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True), BeforeValidator(_number)]
Format = Literal["json", "text", "srt", "verbose_json", "vtt"]


class TranslationBody(Strict):
    """A sound whose speech becomes English text. `temperature` 0 tries higher ones where the result looks wrong."""

    file: File
    model: Short
    prompt: Annotated[str, Field(max_length=8192)] = ""
    response_format: Format = "json"
    temperature: Temperature = 0.0


class TranscriptionBody(TranslationBody):
    """A sound whose speech becomes text."""

    language: Short | None = None
    stream: Annotated[Flag, BeforeValidator(_flag)] = False
    granularities: Annotated[list[Literal["segment", "word"]], few(2)] = Field(
        default_factory=list, alias="timestamp_granularities[]"
    )


class Duration(Closed):
    type: Literal["duration"]
    seconds: int


class Transcribed(Closed):
    text: str
    usage: Duration


class SegmentFacts(Closed):
    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class Verbose(Closed):
    task: Task
    language: str
    duration: float
    text: str
    segments: list[SegmentFacts]
    usage: Duration


class TextDelta(Closed):
    type: Literal["transcript.text.delta"]
    delta: str


class TextDone(Closed):
    type: Literal["transcript.text.done"]
    text: str
    usage: Duration


Answer = Transcribed | Verbose
Event = TextDelta | TextDone


async def transcriptions(body: TranscriptionBody, request: Request) -> Response:
    """Transcribe the speech in a sound."""
    if "word" in body.granularities:
        raise UsageError(
            "timestamp_granularities: word is not supported; supported: segment",
            param="timestamp_granularities[]",
        )
    if body.granularities and body.response_format != "verbose_json":
        raise UsageError(
            "timestamp_granularities needs response_format verbose_json", param="timestamp_granularities[]"
        )
    if body.stream and body.response_format not in _STREAM_FORMATS:
        raise UsageError(
            f"stream needs response_format {' or '.join(_STREAM_FORMATS)}, found {body.response_format}",
            param="stream",
        )
    options = await _options(body, request, "transcribe", body.language)
    if not body.stream:
        return await _whole(body, options, request)
    work = _Work(body, options, request)
    first = await work.next_event()  # until it is there, a refusal still gets a status
    return EventStream(work.events(first), request.state.caller)


async def translations(body: TranslationBody, request: Request) -> Response:
    """Transcribe the speech in a sound into English."""
    return await _whole(body, await _options(body, request, "translate", None), request)


async def _options(
    body: TranslationBody, request: Request, task: Task, language: str | None
) -> TranscriptOptions:
    """The request's options. Raises what `Check.passed` raises."""
    caller: Caller = request.state.caller
    (prompt,) = await check_of(caller).passed([body.prompt], service_of(request), caller)
    return TranscriptOptions(
        task=task,
        language=None if language is None else language.lower(),
        prompt=str(prompt),
        temperature=body.temperature,
    )


async def _whole(body: TranslationBody, options: TranscriptOptions, request: Request) -> Response:
    work = _Work(body, options, request)
    if (write := WRITERS.get(body.response_format)) is not None:
        return Response(write(await work.run()), media_type="text/plain")
    return await answer_whole(_json(body, work), request.state.caller, dialect="openai")


async def _json(body: TranslationBody, work: _Work) -> Response:
    transcript = await work.run()
    usage = _usage(transcript)
    if body.response_format == "verbose_json":
        return JSONResponse({**as_dict(transcript), "usage": usage})
    return JSONResponse({"text": transcript.text, "usage": usage})


def _usage(transcript: Transcript) -> Duration:
    return {"type": "duration", "seconds": math.ceil(transcript.duration_s)}


class _Work:
    """One transcription, which runs in a thread and delivers its events here."""

    def __init__(self, body: TranslationBody, options: TranscriptOptions, request: Request) -> None:
        service = service_of(request)
        self._service, self._options = service, options
        self._caller: Caller = request.state.caller
        self._content = _content(body)
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._running: asyncio.Task[None] | None = None
        self._num_told = 0  # segments
        self._num_counted = 0  # tokens

    async def run(self, told: Callable[[Any], None] = lambda transcription: None) -> Transcript:
        """Run it and return the whole transcript. Raises what `Transcriber.transcribe` raises."""

        def report(transcription: Any) -> None:
            self._count(transcription.segments)
            self._caller.go_on()
            told(transcription)

        transcript = await self._service.transcribe(self._caller, self._content, self._options, report)
        self._count(transcript.segments)
        return transcript

    def _count(self, segments: Sequence[Any]) -> None:
        """Count the new tokens among those of all segments so far."""
        num_tokens = sum(len(segment.token_ids) for segment in segments if segment.text.strip())
        self._caller.count(new=num_tokens - self._num_counted)
        self._num_counted = num_tokens

    async def next_event(self) -> Event:
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())
            self._caller.ending.callback(self._running.cancel)
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    async def events(self, first: Event) -> AsyncGenerator[bytes, None]:
        event = first
        while True:
            yield sse(event)
            if event["type"] == "transcript.text.done":
                return
            event = await self.next_event()

    async def _run(self) -> None:
        try:
            transcript = await self.run(self._tell)
            self._tell_segments(transcript.segments)
        except BaseException as error:
            self._events.put_nowait(error)
            return
        self._events.put_nowait(
            {"type": "transcript.text.done", "text": transcript.text, "usage": _usage(transcript)}
        )

    def _tell(self, transcription: Any) -> None:
        if len(transcription.segments) > self._num_told:
            self._loop.call_soon_threadsafe(self._tell_segments, tuple(transcription.segments))

    def _tell_segments(self, segments: tuple[Any, ...]) -> None:
        """Send the text of new segments; joined, these texts are the transcript."""
        said = [segment.text for segment in segments if segment.text.strip()]
        for text in said[self._num_told :]:
            delta = text if self._num_told else text.lstrip()
            self._num_told += 1
            self._events.put_nowait({"type": "transcript.text.delta", "delta": delta})


def _content(body: TranslationBody) -> Content:
    """Take the file out of the body, so that it is held only once."""
    data, body.file = body.file, None
    if len(data) > MOST_FILE_BYTES:
        raise BadMedia(
            f"file: the file of a sound may have at most {MOST_FILE_BYTES:,} bytes, found {len(data):,}",
            kind="sound", needed=MOST_FILE_BYTES, found=len(data), param="file",
        )  # fmt: skip
    if not data:
        raise BadMedia("file: the sound is empty: it has 0 bytes", kind="sound", found=0, param="file")
    return Content("sound", data, blake3(data).digest())


def _form(path: str, handler: Callable[..., Any], **described: Any) -> Route:
    rule = RouteRule(
        method="POST", path=path, scope="infer", screens="texts", is_counted=True, takes_form=True,
        max_body_bytes=MOST_BODY_BYTES,
    )  # fmt: skip
    return Route(rule=rule, handler=handler, answer=Answer, media=("text/plain",), **described)


ROUTES = (
    _form("/v1/audio/transcriptions", transcriptions, events=Event | OpenAIError),
    _form("/v1/audio/translations", translations),
)  # fmt: skip
