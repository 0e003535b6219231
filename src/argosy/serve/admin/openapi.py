"""The OpenAPI document, generated from the table of routes and the models that validate requests.

    ROUTES: rule, handler's body, answer, events  ->  document  ->  /openapi.json

Nothing is written twice: a body is the model that its handler takes, an answer is the type that its handler
returns, an error is the type that `gate.error_body` returns, and the statuses follow from the rule. Streams are
described as in OpenAPI 3.2, by `itemSchema`: a line of JSON, or an event whose `data` is JSON text described by
`contentSchema`.

Elsewhere: the table is `app.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from argosy.serve.http.access import FORM_TYPE, RouteRule, dialect_of
from argosy.serve.http.failures import AnthropicError, OllamaError, OpenAIError
from argosy.serve.http.route import Route
from argosy.serve.http.streams import DONE, JSON_LINES, SSE

_REFUSALS = {
    "400": "The request is invalid.",
    "401": "The API key is missing or invalid.",
    "403": "The key lacks the required scope, or the request's host or origin is not allowed.",
    "404": "The path, model or item does not exist.",
    "408": "The body took too long to arrive.",
    "409": "The server runs without workers, or not with this one.",
    "413": "The body is too large.",
    "415": "The content type is not the one that the route takes.",
    "429": "The key has reached one of its limits.",
    "500": "The answer could not be finished.",
    "503": "The server has no room for the request, or is stopping.",
}
_RETRY = {
    "retry-after": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer"}}
}
_NOTES = {
    name: {"description": description, "schema": {"type": "string"}, "required": False}
    for name, description in {
        "x-ignored-params": "Fields that were accepted and have no effect.",
        "x-replaced-blocks": "Number of blocks, by type, that the model cannot read; notes replace them.",
        "x-unused-adapter": "The adapter that a prompt lacks the invocation tokens of, so that the base answers it.",
        "x-truncated-texts": "Number of texts of which only the beginning, as much as fits, is embedded.",
    }.items()
}
_GENERATED = {
    "x-ai-generated": {"description": "A model wrote the answer.", "schema": {"const": "1"}, "required": True}
}
_BYTES: dict[str, Any] = {"type": "string"}


def document(routes: Sequence[Route], version: str, *, base_path: str = "") -> dict[str, Any]:
    """Build the OpenAPI document of `routes`, whose paths follow `base_path` on the server."""
    inputs: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = []
    errors = {"openai": OpenAIError, "anthropic": AnthropicError, "ollama": OllamaError}
    for name, error in errors.items():
        inputs.append((name, "serialization", TypeAdapter(error)))
    for route in routes:
        for what in ("body", "answer", "events"):
            kind = getattr(route, what)
            if kind is not None:
                mode: JsonSchemaMode = "validation" if what == "body" else "serialization"
                inputs.append((f"{what} {route.rule.method} {route.rule.path}", mode, TypeAdapter(kind)))
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    found = {str(name): schema for (name, _), schema in schemas.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.rule.path, {})[route.rule.method.lower()] = _operation(route, found)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Argosy", "version": version},
        **({"servers": [{"url": base_path}]} if base_path else {}),
        "paths": paths,
        "components": {
            "schemas": shared.get("$defs", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }  # fmt: skip


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    rule = route.rule
    key = f"{rule.method} {rule.path}"
    content: dict[str, Any] = {media: {"schema": _BYTES} for media in route.media}
    if route.answer is not None:
        content["application/json"] = {"schema": schemas[f"answer {key}"]}
    if route.encoding is JSON_LINES:
        content[JSON_LINES.media_type] = {"itemSchema": schemas[f"events {key}"]}
    elif route.events is not None:
        data: dict[str, Any] = {
            "type": "string", "contentMediaType": "application/json", "contentSchema": schemas[f"events {key}"],
        }  # fmt: skip
        if route.has_done:
            data = {"anyOf": [{"const": DONE}, data]}
        event = {"type": "object", "properties": {"event": _BYTES, "data": data}, "required": ["data"]}
        content[SSE.media_type] = {"itemSchema": event}
    answered: dict[str, Any] = {"description": "The answer.", "content": content}
    if rule.is_counted:
        answered["headers"] = _NOTES | (_GENERATED if rule.screens == "answers" else {})
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__, "summary": (route.handler.__doc__ or "").strip(),
        "responses": {"200": answered} | {status: _refused(status, rule, schemas) for status in _statuses(route)},
    }  # fmt: skip
    names = re.findall(r"\{(\w+)\}", rule.path)
    if names:
        text = {"type": "string", "minLength": 1, "maxLength": 256}
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": text} for name in names
        ]
    if route.query:
        operation.setdefault("parameters", []).extend(
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in route.query.items()
        )
    if route.body is not None:
        media = FORM_TYPE if rule.takes_form else "application/json"
        body = {media: {"schema": schemas[f"body {key}"]}}
        operation["requestBody"] = {"required": True, "content": body}
    if rule.scope is not None:
        operation["security"] = [{"bearer": []}, {"header": []}]
    return operation


def _statuses(route: Route) -> list[str]:
    """The statuses with which a request can be refused."""
    rule = route.rule
    found = {"400", "403", "500", "503", *route.refusals}
    found |= {"401"} if rule.scope is not None else set()
    names_model = "model" in getattr(route.body, "model_fields", ())
    found |= {"404"} if "{" in rule.path or names_model else set()
    found |= {"408", "413", "415"} if rule.method == "POST" else set()
    found |= {"429"} if rule.is_counted else set()
    return sorted(found)


def _refused(status: str, rule: RouteRule, schemas: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas[dialect_of(rule.path)]}}
    refused: dict[str, Any] = {"description": _REFUSALS[status], "content": content}
    return refused | ({"headers": _RETRY} if status in ("429", "503") else {})
