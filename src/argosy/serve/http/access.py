"""Who may send a request to a route, how large its body may be, and whose errors it gets: a row of the table.

Elsewhere: the table is `app.py`; `gate.py` checks requests against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from argosy.guard.keys import Scope as KeyScope

MAX_BODY_BYTES = 8 << 20
FORM_TYPE = "multipart/form-data"
Dialect = Literal["openai", "anthropic", "ollama"]
Screens = Literal["answers", "texts", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Access to a route: the scope that it needs, None for everyone, and the largest body that it takes.

    screens: what the key's content policy is applied to: texts that a model gets, or its answers as well. Every route
        says so; None fails a test.
    """

    method: str
    path: str
    scope: KeyScope | None
    screens: Screens | None = None
    is_counted: bool = False  # the key's limits apply
    takes_media: bool = False  # a body may be as large as pictures and sounds need, if the model takes them
    takes_form: bool = False  # the body is a form with a file, not JSON
    max_body_bytes: int = MAX_BODY_BYTES
    ends_in_name: bool = (
        False  # the path ends with its one parameter, which may contain slashes: `OWNER/NAME`
    )

    @property
    def is_recorded(self) -> bool:
        """Whether the audit has a line for each request: those that do work or change something."""
        return self.scope is not None and self.method != "GET"


def dialect_of(path: str) -> Dialect:
    """The dialect of errors at `path`."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"
