"""Answer a request: one path for every dialect, streamed or whole.

    handler  ->  respond  ->  Opening: reads, in a thread  ->  Answers.steps  ->  begin, take, end: events
                                                    stream: each event is sent        whole: fold, then whole

A dialect is one file, or two if its bodies are large: the model of its body, which becomes a `ChatRequest`; the
types of its events and its whole answer; an `Exchange`, which turns steps into events; and a handler for each
route, which calls `respond`. The rest happens here: work in threads, headers, errors, and cancelling an answer that
nobody is waiting for. A whole answer is folded from the events of its own stream, so the two always agree.

Elsewhere: prompts are `opening.py`; steps are `answers.py`; bytes on the connection are `serve/http/streams.py`; routes
are `app.py`. A new dialect can start from the one in `tests/serve/test_respond.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import PromptTooLong
from argosy.serve.answer.answers import Answers, Step
from argosy.serve.answer.media_parts import media_in
from argosy.serve.answer.opening import Opening
from argosy.serve.answer.request import Read
from argosy.serve.answer.service import Service, service_of
from argosy.serve.http.access import Dialect
from argosy.serve.http.caller import Caller
from argosy.serve.http.streams import (
    COMMENT,
    DONE,
    SSE,
    Encoding,
    EventStream,
    answer_whole,
    error_event,
    sse,
)


class Asked(Protocol):
    """The body of a request for an answer."""

    @property
    def stream(self) -> bool | None: ...


Body = TypeVar("Body", bound=Asked)
Event = TypeVar("Event", bound=Mapping[str, Any])


class Exchange(ABC, Generic[Body, Event]):
    """One request and its answer in a dialect.

    Attributes:
        errors: the dialect that shapes errors.
        encoding: how a stream writes events.
        names_events: each event is named after its `type`.
        ends_with_done: `DONE` follows the last event.
        streams_overflow: a stream whose prompt is too long begins, then fails; otherwise it is refused with a status.
        answers: set once the request is accepted.
    """

    answers: Answers

    errors: ClassVar[Dialect] = "openai"
    encoding: ClassVar[Encoding] = SSE
    names_events: ClassVar[bool] = False
    ends_with_done: ClassVar[bool] = False
    streams_overflow: ClassVar[bool] = False

    def __init__(self, body: Body, service: Service, caller: Caller) -> None:
        self.body, self.service, self.caller = body, service, caller

    @abstractmethod
    def reads(self) -> Sequence[Read]:
        """Return a function per prompt that converts it; a worker thread calls it.

        The function raises ArgosyError if the request is refused.
        """

    def drop_media(self) -> None:
        """Drop the data of pictures and sounds: the prompt is built, and an answer may take minutes."""
        num_bytes = sum(part.drop() for part in media_in(self.body))
        self.caller.held.share.shrink(self.caller.held.share.num_bytes - num_bytes)

    def begin(self) -> Iterable[Event]:
        """Return the events before the first step."""
        return ()

    @abstractmethod
    def take(self, step: Step) -> Iterable[Event]:
        """Return the events for one step."""

    async def end(self) -> Iterable[Event]:
        """Return the events after the last answer has ended."""
        return ()

    @abstractmethod
    def fold(self, event: Event) -> None:
        """Add an event to the whole answer."""

    @abstractmethod
    def whole(self) -> Mapping[str, Any]:
        """Return the whole answer, after all events have been folded."""

    def idle(self) -> bytes:
        """Encode the keep-alive of a stream without events, which must change nothing for the client."""
        return COMMENT

    def failed(self, error: Exception) -> bytes:
        """Encode the last event of a stream that fails."""
        return error_event(error, self.errors, self.caller)


async def respond(kind: type[Exchange[Body, Event]], body: Body, request: Request) -> Response:
    """Answer `request` through an Exchange of `kind`: as a stream if the body requests one, otherwise whole.

    Raises:
        ArgosyError: the request is refused, or a whole answer cannot be finished.
    """
    service = service_of(request)
    caller: Caller = request.state.caller
    exchange = kind(body, service, caller)
    try:
        exchange.answers, headers = await Opening(service, caller).answers(exchange.reads())
    except PromptTooLong as error:
        if not (body.stream and kind.streams_overflow):
            raise
        return EventStream(_refused(exchange, error), caller, failed=exchange.failed)
    exchange.drop_media()
    if body.stream:
        return EventStream(
            streamed(exchange), caller, exchange.answers.cancel, encoding=kind.encoding, idle=exchange.idle(),
            headers=headers, failed=exchange.failed,
        )  # fmt: skip

    async def whole() -> Response:
        return JSONResponse(await folded(exchange), headers=headers)

    return await answer_whole(
        whole(), caller, exchange.answers.cancel, dialect=exchange.errors, headers=headers
    )


async def streamed(exchange: Exchange[Body, Event]) -> AsyncGenerator[bytes, None]:
    """The encoded events of an accepted request."""
    async with aclosing(_events(exchange)) as events:
        async for event in events:
            yield _encoded(exchange, event)
    if exchange.ends_with_done:
        yield sse(DONE)


async def folded(exchange: Exchange[Body, Event]) -> Mapping[str, Any]:
    """The whole answer to an accepted request."""
    async with aclosing(_events(exchange)) as events:
        async for event in events:
            exchange.fold(event)
    return exchange.whole()


async def _events(exchange: Exchange[Body, Event]) -> AsyncGenerator[Event, None]:
    try:
        for event in exchange.begin():
            yield event
        async with aclosing(exchange.answers.steps()) as steps:
            async for step in steps:
                for event in exchange.take(step):
                    yield event
        for event in await exchange.end():
            yield event
    finally:
        exchange.answers.cancel()  # at once, because a client that does not read may delay the last event


async def _refused(exchange: Exchange[Body, Event], error: PromptTooLong) -> AsyncGenerator[bytes, None]:
    for event in exchange.begin():
        yield _encoded(exchange, event)
    raise error


def _encoded(exchange: Exchange[Body, Event], event: Event) -> bytes:
    return exchange.encoding.write(event, event["type"] if exchange.names_events else None)
