"""Host and origin headers, byte by byte: none lets a page from another site in, and none breaks the server."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from argosy.guard.keys import KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.http.origins import Site
from tests.serve.conftest import only, start

OURS = [
    "localhost", "LOCALHOST", "localhost:8080", "localhost:", "127.0.0.1", "127.0.0.1:1", "10.1.2.3:80", "[::1]",
    "[::1]:8080", "[2001:DB8::7]:80", "[::ffff:127.0.0.1]", "models.example", "Models.Example:8080",
]  # fmt: skip
OTHERS = [
    "evil.example", "localhost.evil.example", "evil.example.", "localhost.", "127.1", "2130706433", "0x7f.0.0.1",
    "127.0.0.1.evil.example", "127.0.0.256", "xn--localhost", "-", "..", "localhost_", "[1::2::3]",
]  # fmt: skip
MALFORMED = [
    "", "[", "]", "[.]", "[127.0.0.1", "[]", "[::1", "::1", "[::1]x", "[::1]]", "[[::1]]", "[v1.x]", "[::1%25eth0]",
    "[evil.example]", r"evil.example\@localhost", "evil.example@localhost", "user:password@localhost",
    "localhost@evil.example", "localhost/", "localhost/evil.example", "localhost?x", "localhost#x", r"localhost\x",
    "//localhost", "http://localhost", "localhost:8080:8080", "localhost:x", "localhost:-1", "localhost:123456",
    "localhost:+1", "localhost localhost", "localhost, localhost", "localhost,evil.example", "localhost\tx",
    "%6cocalhost", "local host", "l\u00f6calhost", "\u217ccalhost", "localhost\u3002evil.example", "a" * 300, "\x7f",
    "'", '"', "*", "$(id)", "${x}",
]  # fmt: skip


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[tuple[str, int]]:
    app = make_app(
        only(service), KeyRing(None), block_tokens=16, max_sequences=8, site=Site(hosts=["Models.Example"])
    )
    for url in start(app):
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        yield parts.hostname, parts.port


def status(address: tuple[str, int], *lines: str, method: str = "GET", path: str = "/health") -> int:
    """The status of a request with these header lines, and with a body if its method has one."""
    head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", *lines, "Connection: close", ""))
    body = b'{"content": "a"}' if method == "POST" else b""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head.encode() + body)
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", connection.makefile("rb").read())
    assert found
    return int(found[1])


@pytest.mark.parametrize("host", OURS, ids=ascii)
def test_an_address_localhost_and_an_allowed_name_are_answered(address: tuple[str, int], host: str) -> None:
    assert status(address, f"Host: {host}") == 200


@pytest.mark.parametrize("host", OTHERS, ids=ascii)
def test_any_other_name_is_refused(address: tuple[str, int], host: str) -> None:
    assert status(address, f"Host: {host}") == 403


@pytest.mark.parametrize("host", MALFORMED, ids=ascii)
def test_a_malformed_host_is_refused(address: tuple[str, int], host: str) -> None:
    assert status(address, f"Host: {host}") == 400


def test_a_request_has_exactly_one_host(address: tuple[str, int]) -> None:
    assert status(address) == 400
    assert status(address, "Host: localhost", "Host: localhost") == 400
    assert status(address, "Host: localhost", "Host: evil.example") == 400


def posted(address: tuple[str, int], *lines: str) -> int:
    more = ("Host: localhost:8080", "Content-Type: application/json", "Content-Length: 16")
    return status(address, *more, *lines, method="POST", path="/tokenize")


@pytest.mark.parametrize(
    "origin", ["http://localhost:8080", "https://localhost:8080", "http://LOCALHOST:8080"]
)
def test_the_servers_own_page_may_send_requests(address: tuple[str, int], origin: str) -> None:
    assert posted(address, f"Origin: {origin}") == 200
    assert posted(address, f"Origin: {origin}", "Sec-Fetch-Site: same-origin") == 200


@pytest.mark.parametrize(
    "origin",
    [
        "", "null", "[", "http://[", "http://[::1", "http://", "//localhost:8080", "localhost:8080",
        "http://localhost", "http://localhost:80801", "http://localhost:8080.evil.example", "http://evil.example",
        r"http://evil.example\@localhost:8080", "http://evil.example@localhost:8080", "http://localhost:8080@evil.example",
        "http://localhost:8080/", "file://localhost:8080", "chrome-extension://localhost:8080", "http:localhost:8080",
        "http://localhost:8080 http://evil.example", "http://l\u00f6calhost:8080", "*",
    ],
    ids=ascii,
)  # fmt: skip
def test_a_page_from_another_origin_may_not_send_requests(address: tuple[str, int], origin: str) -> None:
    assert posted(address, f"Origin: {origin}") == 403


def test_a_request_that_a_browser_marks_as_cross_site_is_refused(address: tuple[str, int]) -> None:
    assert [posted(address, f"Sec-Fetch-Site: {site}") for site in ("cross-site", "same-site", "[", "")] == [
        403
    ] * 4
    assert posted(address, "Origin: http://localhost:8080", "Origin: http://localhost:8080") == 400


@pytest.mark.parametrize(
    "kind", ["", "application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "[", "json"]
)
def test_content_types_that_a_foreign_form_can_send_are_refused(address: tuple[str, int], kind: str) -> None:
    lines = ("Host: localhost", f"Content-Type: {kind}", "Content-Length: 16")
    assert status(address, *lines, method="POST", path="/tokenize") == 415
