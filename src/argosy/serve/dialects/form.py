"""Bodies that are forms: multipart/form-data, as clients send files.

    parts of the body  ->  one part after another, in memory  ->  {name: text, texts or a file}  ->  the route's model

The bytes are charged to the memory for all bodies as they arrive (`serve/http/incoming.py`), and a file is held
only once. Nothing is written to a drive. An unknown field is refused, as in JSON.

Elsewhere: JSON bodies are `body.py`; the library python-multipart parses forms.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from argosy.errors import UsageError
from argosy.serve.answer.service import no_ears
from argosy.serve.dialects.body import refusal
from argosy.serve.http.access import FORM_TYPE
from argosy.serve.http.caller import Caller
from argosy.serve.models.models import models_of

_MOST_PARTS = 64
_MOST_TEXT_BYTES = 64 << 10  # for all fields other than files together
_LONGEST_NAME = 64

Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True)
class _Part:
    name: str
    is_file: bool
    data: bytearray = field(default_factory=bytearray)


class _Form:
    """Collects the parts of a form."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.is_whole = False
        self._num_text_bytes = 0
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin,
            "on_part_data": self._add,
            "on_end": self._end,
        }

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _begin(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None:
            raise UsageError("the body: a part of the form has no name")
        if len(self.parts) == _MOST_PARTS:
            raise UsageError(f"the body: a form may have at most {_MOST_PARTS} parts")
        self.parts.append(_Part(name.decode("utf-8", "replace")[:_LONGEST_NAME], b"filename" in options))

    def _add(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        if not part.is_file:
            self._num_text_bytes += end - start
            if self._num_text_bytes > _MOST_TEXT_BYTES:
                raise UsageError(
                    f"the body: the texts of a form may have at most {_MOST_TEXT_BYTES} bytes together",
                    param=part.name,
                )
        part.data += memoryview(data)[start:end]

    def _end(self) -> None:
        self.is_whole = True


def answering_form(
    handler: Callable[..., Awaitable[Response]], model: type[BaseModel]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a route that takes a form: `handler(body, request)`. Only a server with ears has such a route."""

    async def answer(request: Request) -> Response:
        if (service := models_of(request).hearing()) is None:  # checked before a long body is read
            raise no_ears()
        request.state.service = service
        caller: Caller = request.state.caller
        caller.uses = (service.ears_id,)
        caller.go_on()
        body = await read_form(request, model)
        service.require_ears(body.model)  # type: ignore[attr-defined]
        return await handler(body, request)

    return answer


async def read_form(request: Request, model: type[Model]) -> Model:
    """Read the form in the body of `request` as `model`.

    A field whose name ends in [] is a list. Numbers and flags are written as in JSON.

    Raises:
        UsageError: the body is not a form, or has an unknown, repeated or invalid field.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    form = _Form()
    try:
        parser = MultipartParser(options.get(b"boundary", b""), form.callbacks())  # type: ignore[arg-type]
        async for data in request.stream():
            parser.write(data)
    except FormParserError:
        raise UsageError(
            f"the body is not {FORM_TYPE}, or does not fit the boundary in its content type"
        ) from None
    if not form.is_whole:
        raise UsageError("the body: the form ends before its closing boundary")
    values = _values(form.parts, model)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False), values, model) from None


def _values(parts: list[_Part], model: type[BaseModel]) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    for part in parts:
        value: Any = part.data
        if not part.is_file:
            try:
                value = part.data.decode()
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{part.name}: the text is not UTF-8: byte {error.start} is invalid", param=part.name
                ) from None
        if part.name.endswith("[]"):
            values.setdefault(part.name, []).append(value)
        elif part.name in values:
            raise UsageError(f"the form gives the field '{part.name}' twice", param=part.name)
        else:
            values[part.name] = value
    return values
