"""The body of a request: JSON read strictly, and one sentence about what is wrong with it.

    bytes  ->  counted, charged  ->  UTF-8, no key twice, no NaN, no half character, few levels  ->  the route's model

A body's values are counted before any of them is made, and the memory that they will take is charged to the pool of all
requests (`held.py`). A long body is counted, parsed and validated in a thread. JSON that two readers could read in two
ways is refused. A refusal names the place, what is needed there and what was found; of a union, it speaks of the branch
that went furthest.

Elsewhere: bounds of fields are `fields.py`; size and time of a body are `gate.py`; threads are `work.py`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from argosy.errors import UsageError
from argosy.prompt.json_text import count_values, parse_json
from argosy.serve.core import Service
from argosy.serve.gate import Caller, Refused
from argosy.serve.held import Share

_READ_AT_ONCE_BYTES = 32 << 10  # a longer body is read in a thread: others are answered meanwhile
# Memory that a value takes as Python's object, as part of a model, and as what the prompt is made of. Measured with
# tracemalloc on a dozen shapes: 69 to 226 bytes for a part, 47 for an item that is a token id. Arguments that are text
# are read as JSON once more, one long body at a time; that is counted with long texts in the memory plan.
_PART_BYTES = 256  # an object, a list or a text
_ITEM_BYTES = 56  # any other
_LONGEST_SHOWN = 64
_LONGEST_PLACE = 256

Model = TypeVar("Model", bound=BaseModel)


def answering(
    handler: Callable[..., Awaitable[Any]], model: type[BaseModel] | None
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a route: `handler(body, request)`, or `handler(request)` where the route takes no body.

    A body that names a model has to name the one that is served.
    """

    async def answer(request: Request) -> Response:
        if model is None:
            made = await handler(request)
        else:
            body = await read_model(request, model)
            if "model" in model.model_fields:
                request.app.state.service.require_model(body.model)  # type: ignore[attr-defined]
            made = await handler(body, request)
        return made if isinstance(made, Response) else JSONResponse(made)

    return answer


async def read_model(request: Request, model: type[Model]) -> Model:
    """The body of `request` as `model`.

    Raises:
        UsageError: it is no such body.
        Refused: reading it would take more memory than there is for all bodies.
        Overloaded: reading it would take more memory than the bodies of other requests leave.
    """
    caller: Caller = request.state.caller
    data = b"".join([part async for part in request.stream()])
    if len(data) < _READ_AT_ONCE_BYTES:
        return validated(data, model, caller.share)
    caller.has_large_body = True
    num_bytes = len(data)
    parts = [data]
    del data  # the thread lets go of the bytes as soon as it has decoded them
    service: Service = request.app.state.service
    made = await service.run(caller, lambda: validated(parts.pop(), model, caller.share))
    caller.share.shrink(max(num_bytes, caller.share.num_bytes - num_bytes))
    return made


def validated(data: bytes, model: type[Model], share: Share) -> Model:
    """Parse and validate a body, and charge what that takes to `share`. Raises what `read_model` raises."""
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
    """Hold the memory that reading a body takes; its bytes are held already."""
    try:
        num_parts, num_items = count_values(data)
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None
    # The text, and the texts in it: a character takes four bytes where one of them lies beyond the common planes.
    num_bytes = len(data) * (2 if data.isascii() else 8) + num_parts * _PART_BYTES + num_items * _ITEM_BYTES
    if num_bytes + len(data) > share.max_bytes:
        raise Refused(
            413,
            f"reading the body would take {num_bytes + len(data)} bytes of memory, and all bodies have"
            f" {share.max_bytes}",
            hint="send fewer values, or the same in several requests",
        )
    share.hold(num_bytes)


def read_body(data: bytes) -> object:
    """The value of a body.

    Raises:
        UsageError: it is not UTF-8, or not JSON that every reader reads alike.
    """
    try:
        return parse_json(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8 text: byte {error.start} is wrong") from None
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None


def refusal(errors: Sequence[Mapping[str, Any]], body: object, model: type[BaseModel]) -> UsageError:
    """What `model` says of `body`, as the sentence that the client hears; fact: `param`."""
    places = [_place(error, body) for error in errors]
    deepest = max(places, key=len)
    here = [error for error, place in zip(errors, places, strict=True) if place == deepest]
    first, where = here[0], ".".join(map(str, deepest))[:_LONGEST_PLACE]
    if first["type"] in ("extra_forbidden", "none_required"):
        known = ", ".join(model.model_fields) if len(deepest) == 1 else ""
        return UsageError(
            f"unknown field '{where}'" + (f"; known: {known}" if known else ""), param=where,
            hint="leave it out; /openapi.json has the fields of every route",
        )  # fmt: skip
    needed = " or ".join(dict.fromkeys(_needed(error) for error in here))
    found = (
        "nothing" if first["type"] == "missing" else _shown(first.get("ctx", {}).get("tag", first["input"]))
    )
    return UsageError(f"{where or 'the body'}: expected {needed}, found {found}", param=where or None)


def _place(error: Mapping[str, Any], body: object) -> tuple[str | int, ...]:
    """Where in the body: pydantic's location has names of union branches, too, which no client knows."""
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
    """`error["msg"]` as what follows "expected"."""
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
    return name if name.isidentifier() else "type"  # where a function decides


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
            return shown if len(shown) <= 2 * _LONGEST_SHOWN else "a longer one"
    return "nothing"
