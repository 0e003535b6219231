"""The body of a request: JSON read strictly, and one sentence about what is wrong with it.

    bytes  ->  UTF-8, no key twice, no NaN, no half character, bounded depth and numbers  ->  the route's model

What JSON lets two readers read in two ways does not come in. What a model refuses is told by its place, by what is
needed there and by what was found; of unions, the branch that went furthest is told of.

Elsewhere: bounds of fields are `fields.py`; size and time of a body are `gate.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from argosy.errors import UsageError
from argosy.prompt.json_text import read_json

_READ_AT_ONCE_BYTES = 64 << 10  # a longer body is read in a thread: others are answered meanwhile
_LONGEST_SHOWN = 64
_LONGEST_PLACE = 256


class StrictRoute(APIRoute):
    """A route whose body is read by `read_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> object:
        data = await self.body()
        return (
            read_body(data) if len(data) < _READ_AT_ONCE_BYTES else await asyncio.to_thread(read_body, data)
        )


def read_body(data: bytes) -> object:
    """The value of a body.

    Raises:
        UsageError: it is not UTF-8, or not JSON that every reader reads alike.
    """
    try:
        return read_json(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8 text: byte {error.start} is wrong") from None
    except ValueError as error:
        raise UsageError(f"the body cannot be read: {error}") from None


def refusal(errors: Sequence[Mapping[str, Any]], body: object, model: type[BaseModel] | None) -> UsageError:
    """What `model` says of `body`, as the sentence that the client hears; fact: `param`."""
    places = [_place(error, body) for error in errors]
    deepest = max(places, key=len)
    here = [error for error, place in zip(errors, places, strict=True) if place == deepest]
    first, where = here[0], ".".join(map(str, deepest))[:_LONGEST_PLACE]
    if first["type"] in ("extra_forbidden", "none_required"):
        known = ", ".join(model.model_fields) if model is not None and len(deepest) == 1 else ""
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
    location, value = error["loc"][1:], body
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
