"""Redirects of a hub: where a request may go, and which host gets the token."""

from __future__ import annotations

import http.client
import ipaddress
import urllib.parse
import urllib.request
from threading import local
from typing import IO

from argosy.checkpoint.untrusted_file import quote
from argosy.errors import FetchFailed

_MOST_REDIRECTS = 4


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, only to https; only the first host gets the token."""

    max_redirections = _MOST_REDIRECTS

    def __init__(self, url: str, token: str) -> None:
        self._origin = origin_of(url)
        self._token = token
        self._asked = local()  # each thread has one request at a time

    @property
    def has_token(self) -> bool:
        return bool(self._token)

    @property
    def asked_host(self) -> str:
        """The host of this thread's request, or of its last redirect."""
        return quote(urllib.parse.urlsplit(self._asked.url).netloc)

    @property
    def proxy(self) -> str:
        """The proxy in use, without a password; "" if there is none."""
        parts = urllib.parse.urlsplit(self._asked.url)
        found = urllib.request.getproxies().get(parts.scheme, "")
        if not found or urllib.request.proxy_bypass(parts.netloc):
            return ""
        return quote(found.rpartition("@")[2].rpartition("//")[2].rstrip("/"))

    def authorize(self, request: urllib.request.Request) -> None:
        """Note where a request goes, and add the token if it belongs to that host."""
        self._asked.url = request.full_url
        if self._token and origin_of(request.full_url) == self._origin:
            # Unredirected headers are not sent to another host.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        parts = urllib.parse.urlsplit(newurl)
        is_local = is_this_machine(self._origin[1]) and is_this_machine(parts.hostname or "")
        if parts.scheme != "https" and not (parts.scheme == "http" and is_local):
            fp.close()
            raise FetchFailed(
                f"the server redirects to {quote(parts.scheme)}://{quote(parts.hostname or '')}; only https is opened",
                what=file_name(req.full_url),
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            self.authorize(request)
        return request


def origin_of(url: str) -> tuple[str, str, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def file_name(url: str) -> str:
    return urllib.parse.urlsplit(url).path.rpartition("/")[2]
