"""The response to a failure: its status, its headers, and a body in the dialect's shape.

A message of our own faults may contain paths, so the client gets "internal error" and the id under which the log
has it.

Elsewhere: the errors in the package's `errors.py` carry their statuses; `streams.py` ends a stream that fails.
"""

from __future__ import annotations

import json
import logging
from typing import Literal, NotRequired

from starlette.types import Send

from argosy.errors import ArgosyError, PromptTooLong, refused_by_system
from argosy.guard.strangers import Stranger
from argosy.serve.http.access import Dialect
from argosy.serve.http.closed import Closed
from argosy.serve.http.log import where_it_failed

log = logging.getLogger("argosy.serve")


class Refused(ArgosyError):
    """A request is refused."""

    def __init__(self, status: int, message: str, *, hint: str | None = None, **facts: object) -> None:
        super().__init__(message, hint=hint, **facts)
        self.http_status = status


class BadFrame(Refused):
    """The end of a request is unknown, so nothing more is read from its connection."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("overloaded_error", "overloaded_error"),
}


class OpenAIFacts(Closed):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Closed):
    """An error."""

    error: OpenAIFacts


class AnthropicFacts(Closed):
    type: str
    message: str


class AnthropicError(Closed):
    """An error."""

    type: Literal["error"]
    error: AnthropicFacts
    request_id: NotRequired[str]


class OllamaError(Closed):
    """An error."""

    error: str


def error_body(
    error: BaseException, dialect: Dialect, request_id: str
) -> tuple[int, OpenAIError | AnthropicError | OllamaError]:
    """Status and body of a failure in the dialect's shape; for our own faults, the body gives the id in the log."""
    error = refused_by_system(error) or error
    status = error.http_status if isinstance(error, ArgosyError) else 500
    message, is_ours = str(error), status >= 500 and status != 503
    if isinstance(error, PromptTooLong):
        message = _overflow(error, dialect)
    if is_ours:  # the full message, which may contain paths, is not sent
        known = f"{type(error).__name__}: the answer could not be finished"
        message = f"{known if isinstance(error, ArgosyError) else 'internal error'} (request {request_id})"
    if dialect == "ollama":
        return status, {"error": message}
    unnamed = "invalid_request_error" if status < 500 else "api_error"
    kind, anthropic = _TYPES.get(status, (unnamed.replace("api_error", "server_error"), unnamed))
    if dialect == "anthropic":
        body: AnthropicError = {"type": "error", "error": {"type": anthropic, "message": message}}
        return status, {**body, "request_id": request_id} if is_ours else body
    param, code = (_text_fact(error, name) for name in ("param", "code"))
    if isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _text_fact(error: BaseException, name: str) -> str | None:
    found = error.facts.get(name) if isinstance(error, ArgosyError) else None
    return found if isinstance(found, str) else None


def _overflow(error: PromptTooLong, dialect: Dialect) -> str:
    """Word the error so that clients recognize that they must shorten the conversation, and find the numbers.

    Claude Code looks for "prompt is too long: N tokens > M maximum", LiteLLM for "This model's maximum context length".
    """
    needed, available = error.facts.get("needed"), error.facts.get("available")
    new = error.facts.get("for_answer", 1)
    if not (isinstance(needed, int) and isinstance(available, int) and isinstance(new, int)):
        return str(error)
    prompt, least = needed - new, "at least " if error.facts.get("is_at_least") else ""
    if dialect != "anthropic":
        said = (
            f"This model's maximum context length is {available} tokens. However, you requested {least}{needed} tokens"
            f" ({prompt} in the messages, {new} in the completion)."
            " Please reduce the length of the messages or completion."
        )
    elif prompt < available:
        said = (
            f"input length and `min_tokens` exceed context limit: {prompt} + {new} > {available}, "
            "decrease input length or `min_tokens` and try again"
        )
    else:
        said = f"prompt is too long: {prompt} tokens > {available - 1} maximum"
    return f"{said}\nhint: {error.hint}" if error.hint else said


def error_headers(error: BaseException, status: int) -> dict[str, str]:
    """Headers of the response to a failure."""
    headers = {}
    error = refused_by_system(error) or error
    retry = getattr(error, "retry_after_s", None)
    if retry is not None:
        headers["retry-after"] = str(int(retry))
    for status_with, name in ((405, "allow"), (308, "location")):
        if status == status_with and isinstance(error, ArgosyError):
            headers[name] = str(error.facts[name])
    if status in (401, 403):  # some clients would otherwise retry a refused key for minutes
        headers["x-should-retry"] = "false"
    if status in (408, 413, 503) or isinstance(error, BadFrame | Stranger):
        headers["connection"] = "close"
    return headers


async def send_error(error: BaseException, dialect: Dialect, send: Send, request_id: str) -> None:
    status, body = error_body(error, dialect, request_id)
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    headers += [(name.encode(), value.encode()) for name, value in error_headers(error, status).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def report(error: BaseException, request_id: str) -> None:
    """Log an unexpected exception."""
    if not isinstance(error, ArgosyError):
        where = where_it_failed(error)
        facts = {"event": "internal_error", "request_id": request_id, "where": where}
        log.error("%s internal error: %s", request_id, where, extra={"facts": facts})
