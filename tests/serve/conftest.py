"""Servers on loopback with a tiny random model or a speaking one, and their clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from argosy.engine.loop import EngineLoop
from argosy.guard.keys import KeyRing
from argosy.open.engine import Engine
from argosy.prompt.replay import ReplayMemory
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Common, Service
from argosy.serve.app import make_app
from argosy.serve.http.listen import bind
from argosy.serve.http.server import WokenServer, uvicorn_config
from argosy.serve.http.streams import EventStream
from argosy.serve.models.entry import Entry, Offer
from argosy.serve.models.models import Models
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.fake_server import fake_server
from tests.serve.speaking import speaking, write_speaking_model

if TYPE_CHECKING:
    from selenium import webdriver

    from tests.serve.page_browser import Browser


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = write_chat_model(tmp_path_factory.mktemp("serve") / "model")
    with Engine.open(model, memory="2GiB", threads=2, grammars=True, max_waiting=64) as engine:
        yield engine


@pytest.fixture(scope="session")
def service(engine: Engine) -> Iterator[Service]:
    with serving(engine) as service:
        yield service


@contextmanager
def serving(engine: Engine) -> Iterator[Service]:
    config = engine.config
    facts = ModelFacts(
        id="tiny", family=config.family, context_tokens=engine.plan.context_tokens, num_layers=len(config.layers),
        num_experts=config.num_experts, experts_per_token=config.experts_per_token, vocab_size=config.vocab_size,
        media_kinds=engine.media.kinds, hears=engine.media.hears, hidden_size=config.hidden_size,
    )  # fmt: skip
    prompts = engine.prompts.remembering(ReplayMemory())
    with EngineLoop(engine) as loop:
        yield Service(loop, prompts, engine.tokenizer, facts, ears=engine.ears)
    prompts.close()


def only(service: Service, **options: Any) -> Models:
    """The models of a server that has one, whose engine is open from start to end."""
    common = Common(kept=service.kept, work=service.work, any_model=service.any_model)
    offer = Offer(facts=service.model, key=service, serve=lambda _: service)
    budget_bytes = service.loop.snapshot().engine.budget_bytes
    return Models(
        [offer], partial(Entry, common=common), common, budget_bytes=budget_bytes, process_bytes=0, **options
    )


def start(app: Any, **options: Any) -> Iterator[str]:
    server = WokenServer(uvicorn_config(app, grace_s=5, **options))
    with bind("127.0.0.1", 0) as sockets:
        port = sockets[0].getsockname()[1]
        thread = threading.Thread(target=server.run, args=[sockets])
        thread.start()
        while not server.started:
            time.sleep(0.001)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.end()
            thread.join()


def alive_at_once(monkeypatch: pytest.MonkeyPatch, num_signs: int = 1) -> None:
    """From now on, a stream that begins sends `num_signs` signs of life at once."""
    keep_alive = EventStream._keep_alive

    async def at_once(self: EventStream, write: Any) -> None:
        for _ in range(num_signs):
            await write(self._idle)
        await keep_alive(self, write)

    monkeypatch.setattr(EventStream, "_keep_alive", at_once)


@pytest.fixture(scope="session")
def url(service: Service) -> Iterator[str]:
    yield from start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8))


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def speaking_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service of a model that says what `speaking.py` scripts."""
    model = write_speaking_model(tmp_path_factory.mktemp("speaking") / "model")
    with (
        speaking(),
        Engine.open(model, memory="2GiB", threads=2, grammars=True, max_waiting=64) as engine,
        serving(engine) as service,
    ):
        yield service


@pytest.fixture(scope="session")
def speaking_url(speaking_service: Service) -> Iterator[str]:
    yield from start(make_app(only(speaking_service), KeyRing(None), block_tokens=16, max_sequences=8))


@pytest.fixture
def speaker(speaking_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=speaking_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    from tests.serve.page_browser import open_chromium

    driver = open_chromium()
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(driver: webdriver.Chrome) -> Iterator[Browser]:
    """Chromium with the page of a fake server, whose address no test has used before."""
    from tests.serve.page_browser import Browser

    with fake_server() as server:
        browser = Browser(driver, server.url)
        browser.server = server
        browser.complaints()  # clears the messages of the test before
        yield browser
        driver.get("about:blank")
