"""Pages of other origins: which origins can be allowed, what a preflight answers, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from argosy.errors import UsageError
from argosy.guard.keys import KeyFile, KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import ROUTES, make_app
from argosy.serve.http.origins import Origins, Site, granted, origin_of
from tests.serve.conftest import only, start

PAGE, APP = "https://chat.example.org", "app://obsidian.md"
ASK = {"content": "a"}
METHOD, HEADERS = "access-control-request-method", "access-control-request-headers"


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://chat.example.org", "https://chat.example.org"),
        ("HTTPS://Chat.Example.org:443", "https://chat.example.org"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("tauri://localhost", "tauri://localhost"),
        ("vscode-webview://0k2t", "vscode-webview://0k2t"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_an_origin_is_kept_as_browsers_send_it(given: str, origin: str) -> None:
    assert origin_of(given) == origin


@pytest.mark.parametrize("given", ["*", "null"])
def test_an_origin_that_stands_for_many_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="would let pages of unknown sites use this server"):
        origin_of(given)


@pytest.mark.parametrize(
    "given",
    ["", "example.org", "https://", "https://example.org/", "https://*.example.org", "https://a b", "https://é.org",
     "https://example.org:", "https://example.org\r\nx: y", "https://user@example.org", "javascript:alert(1)"],
)  # fmt: skip
def test_anything_else_is_not_an_origin(given: str) -> None:
    with pytest.raises(UsageError, match="an origin is SCHEME://HOST"):
        origin_of(given)


@pytest.fixture(scope="module")
def allowing(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    keys = KeyFile(tmp_path_factory.mktemp("origins") / "keys.json")
    _, secret = keys.add("one")
    origins = Origins([PAGE, APP])
    app = make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=8, site=Site(origins=origins))
    for url in start(app):
        yield url, secret


@pytest.mark.parametrize("origin", [PAGE, APP])
def test_a_page_of_an_allowed_origin_sends_requests_and_reads_answers_and_errors(
    allowing: tuple[str, str], origin: str
) -> None:
    url, secret = allowing
    page = {"origin": origin, "sec-fetch-site": "cross-site"}
    fine = httpx.post(f"{url}/tokenize", json=ASK, headers=page | {"x-api-key": secret})
    wrong = httpx.post(f"{url}/tokenize", json=ASK, headers=page)
    listed = httpx.get(f"{url}/v1/models", headers=page | {"x-api-key": secret})
    assert [answer.status_code for answer in (fine, wrong, listed)] == [200, 401, 200]
    for answer in (fine, wrong, listed):
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "origin"
        assert "x-ignored-params" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "https://evil.example"},
        {"origin": "https://chat.example.org.evil.example"},
        {"origin": "http://chat.example.org"},
        {"origin": "https://chat.example.org:8443"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"origin": PAGE, "host": "evil.example"},
    ],
)
def test_a_request_of_any_other_page_is_refused_and_its_page_may_read_nothing(
    allowing: tuple[str, str], page: dict[str, str]
) -> None:
    url, secret = allowing
    answer = httpx.post(f"{url}/tokenize", json=ASK, headers=page | {"x-api-key": secret})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    preflight = httpx.options(f"{url}/tokenize", headers=page | {METHOD: "POST"})
    assert preflight.status_code == (403 if "host" in page else 405)
    assert "access-control-allow-methods" not in preflight.headers


def test_a_preflight_is_answered_for_every_route_and_its_method_without_a_key(
    allowing: tuple[str, str],
) -> None:
    with httpx.Client(base_url=allowing[0]) as client:
        for route in ROUTES:
            rule = route.rule
            path = rule.path.replace("{id}", "x").replace("{name}", "app.js")
            asked = {
                "origin": PAGE,
                METHOD: rule.method,
                HEADERS: "authorization,content-type,x-stainless-os",
            }
            answer = client.options(path, headers=asked)
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-methods"] == rule.method
            assert answer.headers["access-control-allow-headers"] == asked[HEADERS]
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "access-control-allow-private-network" not in answer.headers
            assert client.options(path, headers=asked | {METHOD: "PATCH"}).status_code == 405
        assert client.options("/none", headers={"origin": PAGE, METHOD: "GET"}).status_code == 404
        assert client.options("/tokenize", headers={"origin": PAGE}).status_code == 405  # not a preflight


def test_only_options_is_a_preflight(allowing: tuple[str, str]) -> None:
    url, secret = allowing
    headers = {"origin": PAGE, METHOD: "POST", "x-api-key": secret}
    assert httpx.post(f"{url}/tokenize", json=ASK, headers=headers).json()["count"] == 1


def test_a_private_address_is_granted_only_where_it_is_asked_for() -> None:
    asked = {"origin": PAGE, "access-control-request-private-network": "true"}
    assert (b"access-control-allow-private-network", b"true") in granted("POST", asked)
    assert b"access-control-allow-private-network" not in dict(granted("POST", {"origin": PAGE}))


@pytest.mark.parametrize("names", ["a\r\nset-cookie: x", "a;b", "a" * 65, ",".join(["a"] * 65), "é"])
def test_names_of_headers_that_are_none_are_not_repeated(names: str) -> None:
    told = dict(granted("POST", {HEADERS: names}))[b"access-control-allow-headers"]
    assert told == b"authorization, content-type, x-api-key"


def test_without_allowed_origins_no_answer_speaks_of_them(client: httpx.Client) -> None:
    answer = client.get("/health", headers={"origin": PAGE})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]
    assert client.options("/tokenize", headers={"origin": PAGE, METHOD: "POST"}).status_code == 405
