"""The facts about a request that a router needs: its size, whether it can be repeated, and who must answer it.

    path, body  ->  read_asked  ->  Asked, whose body has a seed

Another server can repeat an answer that follows from its request alone: a greedy answer, or a sampled one with a
seed. A request without a seed gets a random one here, which changes nothing for the client because the server would
have drawn one. A request that refers to kept responses goes to the server that keeps them, and no other can repeat
it.

Elsewhere: servers check bodies (`serve/dialects/body.py`). Only what the router needs is read here, and nothing is
refused that a server would accept.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import RootModel

from argosy.route.prefixes import Mark, Prefixes, parts_of
from argosy.serve.app import ROUTES
from argosy.serve.dialects.body import validated
from argosy.serve.dialects.openai_responses_bodies import kind_of
from argosy.serve.http.held import PoolShare

# Routes with a JSON body whose answers a model generates.
GENERATED = {
    route.rule.path for route in ROUTES if route.rule.screens == "answers" and not route.rule.takes_form
}
# Those whose bodies hold the seed in `options`; the others hold it at the top level.
_OLLAMA = ("/api/chat", "/api/generate")
# A request needs one of these fields; without any it only loads or unloads the model.
_PROMPTS = {"/api/chat": ("messages",), "/api/generate": ("prompt", "images", "suffix")}
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")
_MOST_REFERENCES = 1024


class AnyObject(RootModel[dict[str, Any]]):
    """A JSON object; its contents are the server's business."""


@dataclass(slots=True, kw_only=True)
class Asked:
    """A request as the router sees it.

    Attributes:
        route: the path without its query.
        method, path, headers, body: as sent to a server.
        streams: the answer is a stream of events.
        limit: the most tokens of the answer, if the request limits it.
        references: ids of responses and items that a server must have kept.
        loads_only: it only loads or unloads a model.
        is_repeatable: another server may answer it, even after one has begun.
        marks: digests of the beginnings of its prompt.
    """

    route: str
    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes = b""
    streams: bool = False
    limit: int | None = None
    references: Sequence[str] = ()
    loads_only: bool = False
    is_repeatable: bool = True
    marks: Sequence[Mark] = ()


def read_asked(
    asked: Asked, share: PoolShare, keep: Callable[[int], None], prefixes: Prefixes, tenant: bytes
) -> None:
    """Read the JSON body of `asked`, and give it a seed if its answer is generated.

    Args:
        share: the memory for parsing; returned afterwards.
        keep: takes memory if the body grows.
        tenant: the caller's key; empty if there is none.

    Raises:
        UsageError: the body is not a JSON object that all parsers read alike.
        Refused, Overloaded: parsing it would take too much memory.
    """
    route = asked.route
    try:
        body = validated(asked.body, AnyObject, share).root
        options = body.get("options")
        inside = options if route in _OLLAMA and isinstance(options, dict) else {}
        limits = [*(body.get(name) for name in _LIMITS), inside.get("num_predict")]
        asked.limit = next((one for one in limits if type(one) is int and one > 0), None)
        asked.streams = body.get("stream", route in _OLLAMA) is True
        model = body.get("model")
        if route in ("/v1/responses", "/v1/responses/input_tokens"):
            asked.references = _references(body)
            asked.is_repeatable = not asked.references
        asked.loads_only = route in _PROMPTS and not any(body.get(name) for name in _PROMPTS[route])
        if route in GENERATED and not asked.loads_only:
            asked.marks = prefixes.marks(tenant, model if isinstance(model, str) else "", parts_of(body))
            asked.body = _seeded(asked.body, body, route, keep)
    finally:
        share.release()


def _references(body: Mapping[str, Any]) -> Sequence[str]:
    """The ids of kept items that this request needs."""
    items = body.get("input")
    named = [
        item.get("id")
        for item in (items if isinstance(items, list) else [])
        if isinstance(item, dict) and kind_of(item) == "item_reference"
    ]
    return [one for one in (body.get("previous_response_id"), *named) if isinstance(one, str)][
        :_MOST_REFERENCES
    ]


def _seeded(data: bytes, body: dict[str, Any], route: str, keep: Callable[[int], None]) -> bytes:
    """Add a seed to a body that has none."""
    seed = secrets.randbits(63)
    options = body.get("options")
    if route in _OLLAMA:
        if options is not None and not isinstance(options, dict):
            return data  # the server will refuse it
        holder = {} if options is None else options
        if holder.get("seed") not in (None, -1):
            return data
        if "options" not in body:
            return _with_first(data, f'"options":{{"seed":{seed}}}', has_more=bool(body))
        body["options"] = {**holder, "seed": seed}
    elif "seed" not in body:
        return _with_first(data, f'"seed":{seed}', has_more=bool(body))
    elif body["seed"] in (None, -1):
        body["seed"] = seed
    else:
        return data
    keep(4 * len(data))  # written as text, then as bytes
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _with_first(data: bytes, member: str, *, has_more: bool) -> bytes:
    """Put one more member into a JSON object and leave its other bytes unchanged."""
    start = data.index(b"{") + 1
    return data[:start] + member.encode() + (b"," if has_more else b"") + data[start:]
