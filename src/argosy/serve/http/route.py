"""A row of the table of routes: who may call it, its handler, and the types of its answers.

Elsewhere: the table is `serve/app.py`; `serve/admin/openapi.py` makes a document of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from argosy.guard.keys import Scope as KeyScope
from argosy.serve.http.access import RouteRule, Screens
from argosy.serve.http.streams import SSE, Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row of the table.

    answer: the type of the handler's JSON answer; None if the answer is not JSON.
    events: the type of each streamed event's data; None if the handler does not stream.
    encoding: how the stream writes events.
    has_done: the last event is DONE.
    media: content types other than JSON.
    refusals: statuses with which the handler refuses, in addition to those that follow from the rule.
    query: schemas of the query parameters that the handler reads, by name.
    """

    rule: RouteRule
    handler: Callable[..., Any]
    answer: Any = None
    events: Any = None
    encoding: Encoding = SSE
    has_done: bool = False
    media: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def body(self) -> Any:
        """The model of the request body; None if the handler takes no body."""
        return get_type_hints(self.handler).get("body")


def get_route(
    path: str, handler: Callable[..., Any], scope: KeyScope | None, *, ends_in_name: bool = False, **described: Any
) -> Route:  # fmt: skip
    rule = RouteRule(method="GET", path=path, scope=scope, screens="nothing", ends_in_name=ends_in_name)
    return Route(rule=rule, handler=handler, **described)


def post_route(
    path: str, handler: Callable[..., Any], answer: Any, *, screens: Screens,
    takes_media: bool = False, **described: Any,
) -> Route:  # fmt: skip
    rule = RouteRule(
        method="POST", path=path, scope="infer", screens=screens, is_counted=True, takes_media=takes_media
    )
    return Route(rule=rule, handler=handler, answer=answer, **described)


def admin_route(path: str, handler: Callable[..., Any], answer: Any, **described: Any) -> Route:
    return Route(
        rule=RouteRule(method="POST", path=path, scope="admin", screens="nothing"), handler=handler, answer=answer,
        **described,
    )  # fmt: skip
