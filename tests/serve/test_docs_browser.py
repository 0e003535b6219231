"""The reader of /openapi.json in headless Chromium, on the real server and under its content policy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

import httpx
import pytest

from argosy.serve.app import ROUTES
from tests.serve.page_browser import Browser, webdriver


@pytest.fixture
def docs(driver: webdriver.Chrome, url: str) -> Iterator[Browser]:
    browser = Browser(driver, url)
    browser.complaints()  # clears the messages of the test before
    driver.get(f"{url}/docs")
    browser.until(lambda: browser.text("#status").endswith("routes"))
    yield browser
    assert browser.complaints() == []
    driver.get("about:blank")


def test_every_route_is_listed_and_the_filter_finds_some(docs: Browser) -> None:
    assert docs.text("#status") == f"{len(ROUTES)} of {len(ROUTES)} routes"
    docs.one("#filter").send_keys("/api/CHAT")
    docs.until(lambda: docs.text("#status") == f"1 of {len(ROUTES)} routes")
    assert docs.one("details.route:not([hidden]) h3").text.startswith("POST /api/chat")


def test_routes_are_in_groups_and_no_line_has_a_key_if_the_server_needs_none(docs: Browser) -> None:
    titles = docs.script("return [...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert titles[:5] == [
        "Chat and text",
        "Embeddings and ranking",
        "Audio",
        "Ollama",
        "llama.cpp and tokens",
    ]
    assert titles[5:] == ["Engine and health", "Administration", "This page"]
    docs.one("#filter").send_keys("/api/chat")
    docs.until(lambda: [one.text for one in docs.all("h2") if one.is_displayed()] == ["Ollama"])
    docs.script("document.querySelectorAll('details.route').forEach((one) => { one.open = true; })")
    docs.until(lambda: len(docs.all("details.route > div")) == len(ROUTES))
    assert "Authorization" not in docs.text("main")


def test_a_route_is_opened_with_the_keyboard_and_shows_fields_and_a_line_that_works(docs: Browser) -> None:
    docs.one("#filter").send_keys("POST /v1/chat/completions", "\t")
    docs.press("\ue007")  # Enter
    docs.until(lambda: docs.all("details.route[open] table"))
    text = docs.text("details.route[open]")
    for said in ("messages (required)", "top_logprobs", "at most 20", "text/event-stream", "429"):
        assert said in text
    words = shlex.split(docs.text("details.route[open] pre"))
    assert words[:2] == ["curl", f"{docs.url}/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert httpx.post(words[1], json=body | {"max_tokens": 1}).status_code == 200
    inner = docs.one("details.route[open] td details summary")
    inner.click()
    docs.until(lambda: docs.all("details.route[open] td details table"))


def test_every_route_can_be_drawn_and_every_example_is_accepted_or_names_what_the_server_lacks(
    docs: Browser,
) -> None:
    docs.script("document.querySelectorAll('details.route').forEach((one) => { one.open = true; })")
    docs.until(lambda: len(docs.all("details.route > div")) == len(ROUTES))
    lines = docs.script("return [...document.querySelectorAll('pre code')].map((one) => one.textContent)")
    statuses = {}
    for words in map(shlex.split, lines):
        if "-d" in words:
            body = json.loads(words[words.index("-d") + 1])
            statuses[words[1].removeprefix(docs.url)] = httpx.post(
                words[1], json=body, timeout=60
            ).status_code
    paths = httpx.get(f"{docs.url}/openapi.json").json()["paths"]
    with_body = {
        path
        for path, methods in paths.items()
        if "application/json" in methods.get("post", {}).get("requestBody", {}).get("content", {})
    }
    assert statuses.keys() == with_body
    assert {path: status for path, status in statuses.items() if status != 200} == {
        "/api/show": 404,  # it names another model
        "/infill": 400,  # this model has no tokens for it
        "/rerank": 404,  # these need a reranker
        "/v1/rerank": 404,
        "/v1/moderations": 404,  # this needs a policy
        "/v1/cluster/add": 409,  # these need a group of machines
        "/v1/cluster/drain": 409,
        "/v1/engine/stops": 404,  # this names a key of which there is none
    }


def test_the_reader_is_dark_in_the_dark_and_fits_a_narrow_screen(docs: Browser) -> None:
    docs.script("document.querySelectorAll('details.route').forEach((one) => { one.open = true; })")
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = docs.script(ground)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    docs.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert docs.script(ground) != light
    docs.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    docs.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert docs.script("return document.documentElement.scrollWidth <= 390")
    docs.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
