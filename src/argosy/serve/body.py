"""The body of a request: JSON parsed strictly, and one sentence for a body that is invalid.

    bytes  ->  counted, charged  ->  UTF-8, no key twice, no NaN, no half character, few levels  ->  the route's model

The values of a body are counted before any of them is created, and the memory they need is charged to the pool of all
requests (`held.py`). A long body is counted, parsed and validated in a thread. Ambiguous JSON, which two parsers could
read in two ways, is refused. A refusal names the place, the expected value and the value found; for a union, it
describes the branch that matched furthest.

Elsewhere: bounds of fields are `fields.py`; limits on size and time of a body are `gate.py`; threads are `work.py`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import UsageError
from argosy.prompt.json_text import count_values
from argosy.serve.core import Service
from argosy.serve.gate import Caller, Refused
from argosy.serve.held import Share
from argosy.serve.media_parts import has_media
from argosy.strict_json import parse_json

_READ_AT_ONCE_BYTES = 32 << 10  # a longer body is read in a thread, so other requests do not wait
# Memory that a value needs as a Python object, as part of a model, and as input of the prompt. Measured with
# tracemalloc on a dozen shapes: 69 to 226 bytes for a part, 47 for an item that is a token id. Arguments given as text
# are parsed as JSON again, one long body at a time; the memory plan counts that with long texts.
_PART_BYTES = 256  # an object, a list or a text
_ITEM_BYTES = 56  # any other
_LONGEST_SHOWN = 64
_LONGEST_PLACE = 256

Model = TypeVar("Model", bound=BaseModel)


def answering(
    handler: Callable[..., Awaitable[Any]], model: type[BaseModel] | None
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a route: `handler(body, request)`, or `handler(request)` if the route takes no body.

    If a body names a model, it must be the served one.
    """

    async def answer(request: Request) -> Response:
        if model is None:
            made = await handler(request)
        else:
            body = await read_model(request, model)
            service: Service = request.app.state.service
            if "model" in model.model_fields:
                service.require_model(body.model)  # type: ignore[attr-defined]
            caller: Caller = request.state.caller
            caller.takes_long = caller.takes_long or (bool(service.model.media_kinds) and has_media(body))
            made = await handler(body, request)
        return made if isinstance(made, Response) else JSONResponse(made)

    return answer


async def read_model(request: Request, model: type[Model]) -> Model:
    """Read the body of `request` as `model`.

    Raises:
        UsageError: the body is invalid.
        Refused: parsing the body would take more memory than there is for all bodies.
        Overloaded: parsing the body would take more memory than other requests leave.
    """
    caller: Caller = request.state.caller
    data = b"".join([part async for part in request.stream()])
    if len(data) < _READ_AT_ONCE_BYTES:
        return validated(data, model, caller.share)
    caller.takes_long = True
    num_bytes = len(data)
    parts = [data]
    del data  # the thread frees the bytes as soon as it has decoded them
    service: Service = request.app.state.service
    made = await service.run(caller, lambda: validated(parts.pop(), model, caller.share))
    caller.share.shrink(max(num_bytes, caller.share.num_bytes - num_bytes))
    return made


def validated(data: bytes, model: type[Model], share: Share) -> Model:
    """Parse and validate a body, and charge the memory to `share`. Raises what `read_model` raises."""
    if not data:
        raise UsageError("the body: expected a value, found nothing")
    _charge(data, share)
    value = read_body(data)
    del data
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False), value, model) from None


def _charge(data: bytes, share: Share) -> None:
    """Hold the memory for parsing a body; its bytes are already held."""
    try:
        num_parts, num_items = count_values(data)
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None
    # The text and the strings in it: one character beyond the BMP makes every character of a string take four bytes.
    num_bytes = len(data) * (2 if data.isascii() else 8) + num_parts * _PART_BYTES + num_items * _ITEM_BYTES
    if num_bytes + len(data) > share.max_bytes:
        raise Refused(
            413,
            f"parsing the body would take {num_bytes + len(data)} bytes of memory, and there are"
            f" {share.max_bytes} for all bodies",
            hint="send fewer values, or split them over several requests",
        )
    share.hold(num_bytes)


def read_body(data: bytes) -> object:
    """Parse a body.

    Raises:
        UsageError: the body is not UTF-8, or is not unambiguous JSON.
    """
    try:
        return parse_json(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8 text: byte {error.start} is invalid") from None
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None


def refusal(errors: Sequence[Mapping[str, Any]], body: object, model: type[BaseModel]) -> UsageError:
    """Turn the errors of `model` about `body` into one sentence for the client; fact: `param`."""
    places = [_place(error, body) for error in errors]
    deepest = max(places, key=len)
    here = [error for error, place in zip(errors, places, strict=True) if place == deepest]
    first, where = here[0], ".".join(map(str, deepest))[:_LONGEST_PLACE]
    if first["type"] in ("extra_forbidden", "none_required"):
        known = ", ".join(model.model_fields) if len(deepest) == 1 else ""
        return UsageError(
            f"unknown field '{where}'" + (f"; known: {known}" if known else ""), param=where,
            hint="leave it out; /openapi.json lists the fields of every route",
        )  # fmt: skip
    needed = " or ".join(dict.fromkeys(_needed(error) for error in here))
    found = (
        "nothing" if first["type"] == "missing" else _shown(first.get("ctx", {}).get("tag", first["input"]))
    )
    return UsageError(f"{where or 'the body'}: expected {needed}, found {found}", param=where or None)


def _place(error: Mapping[str, Any], body: object) -> tuple[str | int, ...]:
    """The place in the body, without the names of union branches in pydantic's location, which no client knows."""
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
            return f"at most {context['max_length']} items"
        case "too_short":
            return f"at least {context['min_length']} items"
        case "string_too_long":
            return f"at most {context['max_length']} characters"
        case "string_too_short":
            return f"at least {context['min_length']} characters"
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
