"""Origins whose pages the operator allows to use the server (CORS).

    --allow-origin  ->  Origins  ->  gate: preflights, and headers of every answer

Origins are compared as a whole: scheme, host and port. There is no wildcard. No answer allows credentials, because
the server reads no cookies: a page sends its key in a header. The host of a request is checked before its origin,
so a site that points its name at this machine gains nothing.

Elsewhere: `gate.py` refuses requests from other pages.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from argosy.errors import UsageError

Headers = list[tuple[bytes, bytes]]

_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,31})://(?P<host>[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}  # browsers leave them out
_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(?:\s*,\s*[A-Za-z0-9-]{1,64}){0,63}")
_PREFLIGHT_S = 600  # how long a browser may cache the answer to a preflight
# Answer headers that scripts of other origins may read, in addition to those that they always may.
_EXPOSED = (
    b"request-id, retry-after, x-ai-generated, x-ignored-params, x-replaced-blocks, x-request-id, x-should-retry, "
    b"x-truncated-texts, x-unused-adapter"
)


def origin_of(text: str) -> str:
    """Check an origin, written as browsers send it.

    Raises:
        UsageError: `text` is not an origin, or stands for several.
    """
    if text in ("*", "null"):
        raise UsageError(
            f"--allow-origin {text} would let pages of unknown sites use this server",
            hint="name each origin: --allow-origin https://chat.example.org --allow-origin app://obsidian.md",
        )
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise UsageError(
            f"--allow-origin {text}: an origin is SCHEME://HOST or SCHEME://HOST:PORT, without a path",
            hint="the browser's console shows the origin of a refused page",
        )
    is_default = found["port"] is None or found["port"] == _DEFAULT_PORTS.get(found["scheme"])
    return f"{found['scheme']}://{found['host']}" + ("" if is_default else f":{found['port']}")


class Origins:
    """The allowed origins. Raises what `origin_of` raises."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(map(origin_of, allowed))

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether a request comes from a page of an allowed origin."""
        return headers.get("origin", "").lower() in self._allowed

    def headers(self, headers: Mapping[str, str]) -> Headers:
        """The headers of every answer to a request with these headers."""
        if not self._allowed:
            return []
        made: Headers = [(b"vary", b"origin")]
        if self.allow(headers):
            made.append((b"access-control-allow-origin", headers["origin"].encode("latin-1")))
            made.append((b"access-control-expose-headers", _EXPOSED))
        return made

    def asked_method(self, method: str, headers: Mapping[str, str]) -> str | None:
        """The method requested by a preflight from an allowed origin; None for any other request."""
        is_preflight = method == "OPTIONS" and self.allow(headers)
        return headers.get("access-control-request-method") if is_preflight else None


def granted(method: str, headers: Mapping[str, str]) -> Headers:
    """The headers that answer a preflight for `method`, in addition to those of every answer.

    Headers are granted by name: only a key and the content type mean anything to the server.
    """
    asked = headers.get("access-control-request-headers", "")
    names = asked if _NAMES.fullmatch(asked) else "authorization, content-type, x-api-key"
    made: Headers = [
        (b"access-control-allow-methods", method.encode()),
        (b"access-control-allow-headers", names.encode()),
        (b"access-control-max-age", str(_PREFLIGHT_S).encode()),
    ]
    # A public page requests a private address.
    if headers.get("access-control-request-private-network") == "true":
        made.append((b"access-control-allow-private-network", b"true"))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The names and paths under which a server is reached.

    hosts: accepted host names, in addition to addresses and `localhost`.
    origins: origins whose pages may use it.
    base_path: the prefix of all paths, or empty.
    """

    hosts: Collection[str] = ()
    origins: Origins = field(default_factory=Origins)
    base_path: str = ""
