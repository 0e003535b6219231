"""The body of a request: strict JSON, and a one-sentence refusal of an invalid body.

    bytes  ->  counted, charged  ->  UTF-8, no key twice, no NaN, no half character, few levels  ->  the route's model

The values of a body are counted before any is created, and their memory is charged to the pool of all requests
(`serve/http/held.py`); memory needed only for parsing is released afterwards. A long body is counted, parsed and
validated in a thread. Ambiguous JSON, which two parsers could read differently, is refused. A refusal names the
place, the expected value and the value found; for a union, it describes the branch that matched furthest.

Elsewhere: bounds of fields are `serve/answer/fields.py`; limits on size and time of a body are
`serve/http/incoming.py`; threads are `serve/answer/work.py`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.config import counted
from argosy.errors import UsageError, did_you_mean
from argosy.prompt.json_text import count_values
from argosy.serve.answer.fields import Strict, names_with_effect
from argosy.serve.answer.media_parts import media_in
from argosy.serve.answer.work import Work
from argosy.serve.http.caller import Caller
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import PoolShare
from argosy.serve.models.models import use_model
from argosy.strict_json import parse_json

_READ_AT_ONCE_BYTES = 32 << 10  # a longer body is read in a thread, so that other requests do not wait
# The memory that a value needs as a Python object, as part of a model, and as input of the prompt. Measured with
# tracemalloc on a dozen shapes: 69 to 226 bytes for a part, 47 for an item that is a token id. Arguments given as
# text are parsed as JSON again, one long body at a time; the memory plan counts that with long texts.
_PART_BYTES = 256  # an object, a list or a text
_ITEM_BYTES = 56  # any other
_SHORTEST_DATA = 64 << 10  # a shorter string is not worth checking
# Base64, and what precedes it in a data URL.
_IN_DATA = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=:;,-."
_CHECKED_AT_ONCE = 1 << 18  # bytes; other threads may run between pieces
_LONGEST_SHOWN = 64
_LONGEST_PLACE = 256

Model = TypeVar("Model", bound=BaseModel)


def answering(
    handler: Callable[..., Awaitable[Any]], model: type[Strict] | None
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a route: `handler(body, request)`, or `handler(request)` if the route takes no body.

    If the body needs its model, the model is in memory before the handler runs and stays there until the request
    ends.
    """

    async def answer(request: Request) -> Response:
        if model is None:
            made = await handler(request)
        else:
            body = await read_model(request, model)
            caller: Caller = request.state.caller
            caller.persons = body.persons
            caller.go_on()
            if (person := body.person) is not None:
                for watch in caller.watches:
                    watch.named(person)
            if body.needs_model:
                service = await use_model(request, getattr(body, "model", None))
                kinds = {part.KIND for part in media_in(body)}
                caller.held.takes_long = caller.held.takes_long or bool(kinds and service.model.media_kinds)
                caller.held.takes_video = "video" in kinds and "video" in service.model.media_kinds
            made = await handler(body, request)
        return made if isinstance(made, Response) else JSONResponse(made)

    return answer


async def read_model(request: Request, model: type[Model]) -> Model:
    """Read the body of `request` as `model`.

    Raises:
        UsageError: the body is invalid.
        Refused: parsing the body would exceed the memory for all bodies.
        Overloaded: parsing the body would exceed the memory that other requests leave.
    """
    caller: Caller = request.state.caller
    try:
        data = await _received(request)
        if len(data) < _READ_AT_ONCE_BYTES:
            return validated(data, model, caller.held.share)
        caller.held.takes_long = True
        parts = [data]
        del data  # the thread frees the bytes as soon as it has decoded them
        work: Work = request.app.state.models.work
        return await work.run(caller, lambda: validated(parts.pop(), model, caller.held.share))
    except BaseException:
        caller.held.share.release()  # at once, because the rest of a refused body is still read and dropped
        raise


async def _received(request: Request) -> bytes:
    received = io.BytesIO()  # because joining a list of parts would take twice the memory
    try:
        async for part in request.stream():
            received.write(part)
        return received.getvalue()
    finally:
        received.close()  # an exception would keep this frame alive


def validated(data: bytes, model: type[Model], share: PoolShare) -> Model:
    """Parse and validate a body, charging the memory to `share`. Raises what `read_model` raises."""
    if not data:
        raise UsageError("the body: expected a value, found nothing")
    kept_bytes = _charge(data, share)
    text = _decoded(data)
    del data
    value = _parsed(text)
    del text
    try:
        made = model.model_validate(value)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False), value, model) from None
    share.shrink(kept_bytes)
    return made


def _charge(data: bytes, share: PoolShare) -> int:
    """Hold the memory for parsing a body whose bytes are already held; return how much the parsed body keeps."""
    num_bytes, kept_bytes = _cost_of_parsing(data)
    if num_bytes > share.max_bytes:
        raise Refused(
            413,
            f"parsing the body would take {num_bytes} bytes of memory, and there are {share.max_bytes} for all bodies",
            hint="send fewer values, or split them over several requests",
        )
    share.hold(max(0, num_bytes - share.num_bytes))
    return kept_bytes


def charge_more(data: bytes, share: PoolShare) -> None:
    """Hold the memory for JSON that becomes part of a request and is about to be parsed.

    Raises:
        Refused: it would exceed the memory for all bodies.
        Overloaded: other requests leave too little room.
    """
    num_bytes, kept_bytes = _cost_of_parsing(data)
    held_before = share.num_bytes
    if held_before + num_bytes > share.max_bytes:
        raise Refused(
            413,
            f"the request and the earlier items that it refers to would take {held_before + num_bytes} bytes of memory,"
            f" and there are {share.max_bytes} for all requests",
            hint="send a shorter conversation",
        )
    share.hold(num_bytes)
    share.shrink(held_before + kept_bytes)


def _cost_of_parsing(data: bytes) -> tuple[int, int]:
    """The most bytes of memory that parsing a body takes, and the bytes that the parsed body keeps."""
    try:
        num_parts, num_items = count_values(data)
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None
    num_data = _num_data_bytes(data)
    num_other = len(data) - num_data
    value_bytes = num_parts * _PART_BYTES + num_items * _ITEM_BYTES
    text_bytes = len(data) * _character_bytes(data, with_escapes=False)
    other_bytes = num_other * _character_bytes(data, with_escapes=True)
    # Decoding copies everything before the first wide character; a string with escapes is copied once, and text is
    # copied into the prompt. Data is never copied.
    decoding_bytes = len(data) + text_bytes + (0 if data.isascii() else len(data))
    kept_bytes = num_data + 2 * other_bytes + value_bytes
    return max(decoding_bytes, text_bytes + kept_bytes), kept_bytes


def _character_bytes(data: bytes, *, with_escapes: bool) -> int:
    """The most bytes that a character takes in a string with the characters of `data`."""
    has_escapes = with_escapes and b"\\u" in data
    is_wide = not data.isascii()
    if (is_wide and _finds(_BEYOND_BMP, data)) or (has_escapes and _finds(_ESCAPED_PAIR, data)):
        return 4
    return 2 if has_escapes or (is_wide and _finds(_BEYOND_LATIN, data)) else 1


_BEYOND_LATIN, _BEYOND_BMP = re.compile(rb"[\xc4-\xff]"), re.compile(rb"[\xf0-\xff]")
_ESCAPED_PAIR = re.compile(rb"\\u[dD][89abAB]")


def _finds(pattern: re.Pattern[bytes], data: bytes) -> bool:
    steps = range(0, len(data), _CHECKED_AT_ONCE)
    return any(pattern.search(data, at, at + _CHECKED_AT_ONCE + 4) for at in steps)


def _num_data_bytes(data: bytes) -> int:
    """The bytes in long strings that look like base64: one byte per character, never part of a prompt's text."""
    num_bytes, start = 0, data.find(b'"')
    while start >= 0:
        end = data.find(b'"', start + 1)
        if (
            end - start > _SHORTEST_DATA
            and data[start - 1 : start] != b"\\"  # not a quote inside a string
            and not any(
                data[at : min(at + _CHECKED_AT_ONCE, end)].translate(None, _IN_DATA)
                for at in range(start + 1, end, _CHECKED_AT_ONCE)
            )
        ):
            num_bytes += end - start
        start = end
    return num_bytes


def read_body(data: bytes) -> object:
    """Parse a body.

    Raises:
        UsageError: the body is not UTF-8, or not unambiguous JSON.
    """
    return _parsed(_decoded(data))


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8 text: byte {error.start} is invalid") from None


def _parsed(text: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None


def refusal(errors: Sequence[Mapping[str, Any]], body: object, model: type[BaseModel]) -> UsageError:
    """Turn `model`'s errors about `body` into one sentence for the client, with `param` as a fact."""
    places = [_place(error, body) for error in errors]
    deepest = max(places, key=len)
    here = [error for error, place in zip(errors, places, strict=True) if place == deepest]
    first, where = here[0], ".".join(map(str, deepest))[:_LONGEST_PLACE]
    if first["type"] in ("extra_forbidden", "none_required"):
        known = names_with_effect(model) if len(deepest) == 1 else ()
        said = did_you_mean(where, known, most=2)
        return UsageError(
            f"unknown field '{where}'" + (f"; {said}" if said else ""), param=where,
            hint="leave it out; /openapi.json lists the fields of every route",
        )  # fmt: skip
    needed = " or ".join(dict.fromkeys(_needed(error) for error in here))
    found = (
        "nothing" if first["type"] == "missing" else _shown(first.get("ctx", {}).get("tag", first["input"]))
    )
    is_used = len(deepest) != 1 or where in names_with_effect(model)
    return UsageError(
        f"{where or 'the body'}: expected {needed}, found {found}", param=where or None,
        hint=None if is_used else "Argosy does not support this setting: leave it out",
    )  # fmt: skip


def _place(error: Mapping[str, Any], body: object) -> tuple[str | int, ...]:
    """The place in the body, without the names of union branches in pydantic's location, which mean nothing to
    clients.
    """
    place: list[str | int] = []
    location, value = error["loc"], body
    for at, part in enumerate(location):
        is_item = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_item or (isinstance(value, dict) and part in value):
            value = value[part]  # type: ignore[index]
        elif not (error["type"] == "missing" and at == len(location) - 1):
            continue
        place.append(part)
    return tuple(place)


def _needed(error: Mapping[str, Any]) -> str:
    """Reword `error["msg"]` to follow "expected"."""
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "a value"
        case "too_long":
            return f"at most {counted(context['max_length'], 'item')}"
        case "too_short":
            return f"at least {counted(context['min_length'], 'item')}"
        case "string_too_long":
            return f"at most {counted(context['max_length'], 'character')}"
        case "string_too_short":
            return f"at least {counted(context['min_length'], 'character')}"
        case "union_tag_invalid":
            return f"{_tag_field(context)} to be one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"an object with {_tag_field(context)}"
        case "model_attributes_type" | "model_type" | "dict_type":
            return "an object"
    return str(error["msg"]).removeprefix("Input should be ")


def _tag_field(context: Mapping[str, Any]) -> str:
    name = str(context["discriminator"]).strip("'")
    return name if name.isidentifier() else "type"  # "type" if the discriminator is a function


def _shown(value: object) -> str:
    match value:
        case dict():
            return "an object"
        case list():
            return f"a list of {len(value)}"
        case str() if len(value) > _LONGEST_SHOWN:
            return f"text of {len(value)} characters"
        case None | bool() | int() | float() | str():
            shown = json.dumps(value, ensure_ascii=True)
            return shown if len(shown) <= 2 * _LONGEST_SHOWN else "a longer value"
    return "nothing"
