"""The access rule of a route: who may call it, how large its body may be, and which dialect its errors use.

Elsewhere: the table of routes is `app.py`; `gate.py` checks requests against it.
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
class RouteRule:
    """Access to a route: the scope that it needs (None: open to everyone) and the largest body that it accepts.

    screens: whether the key's content policy applies to the texts that a model gets, or to its answers as well.
        Every route must say; a test fails on None.
    """

    method: str
    path: str
    scope: KeyScope | None
    screens: Screens | None = None
    is_counted: bool = False  # the key's limits apply
    # the body may be as large as pictures and sounds require, if the model takes them
    takes_media: bool = False
    takes_form: bool = False  # the body is a form with a file, not JSON
    max_body_bytes: int = MAX_BODY_BYTES
    ends_in_name: bool = False  # the path ends with a parameter that may contain slashes: `OWNER/NAME`

    @property
    def is_recorded(self) -> bool:
        """Whether the audit records each request, which is so if it does work or changes something."""
        return self.scope is not None and self.method != "GET"


def dialect_of(path: str) -> Dialect:
    """The dialect of errors at `path`."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"
