"""What a server shows of running requests: in its state, by the id that their clients have, and in its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.engine.progress import RequestProgress, RequestWait
from argosy.guard.keys import KeyRing
from argosy.open.engine import Engine
from argosy.serve.admin.state import PROMPT_SAID_S, log_prompts
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.models.entry import _told
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine.open(write_chat_model(tmp_path / "model"), memory="2GiB", threads=1) as engine:
        yield engine


def test_the_state_shows_a_request_that_runs_by_the_id_that_its_client_has(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = own_engine._started.model.forward, list[Any]()

    def look(step: Any) -> Any:  # a state is shown while the step runs
        state = httpx.get(f"{url}/v1/engine/state").json()
        seen.append(state["running"])
        assert state["waiting"] == []
        return forward(step)

    monkeypatch.setattr(own_engine._started.model, "forward", look)
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    with serving(own_engine) as service:
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
            answer = httpx.post(f"{url}/v1/chat/completions", json=ask)
            assert httpx.get(f"{url}/v1/engine/state").json()["running"] == []
    (first,) = seen[0]
    total = answer.json()["usage"]["prompt_tokens"]
    assert (first["id"], first["model"]) == (answer.headers["x-request-id"], "tiny")
    assert (first["prompt_tokens"], first["prompt_done"], first["answer_tokens"]) == (total, 0, 0)
    assert (first["tok_per_s"], first["seconds_left"]) == (None, None)
    (last,) = seen[-1]
    assert (last["prompt_done"], last["answer_tokens"]) == (total, len(seen) - 1)


def test_the_log_tells_of_prompts_and_waits_that_take_long_and_of_no_others(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = RequestProgress(
        name="req_1", prompt_tokens=22851, prompt_done=9216, answer_tokens=0, tok_per_s=61.0,
        seconds=PROMPT_SAID_S, seconds_left=223.5,
    )  # fmt: skip
    short = replace(long, name="req_2", seconds=PROMPT_SAID_S - 1)
    answering = replace(long, name="req_3", prompt_done=22851)
    waits = RequestWait(name="req_4", why="turn", ahead=2, seconds=PROMPT_SAID_S)
    waiting = (waits, replace(waits, name="req_5", seconds=PROMPT_SAID_S - 1))
    facts = replace(service.loop.snapshot(), requests=(long, short, answering), waiting=waiting)
    monkeypatch.setattr(service.loop, "snapshot", lambda: facts)
    with caplog.at_level(logging.INFO, "argosy.serve"):
        log_prompts(only(service))
    record, of_wait = caplog.records
    assert of_wait.getMessage() == "req_4 waits for its turn, 2 before it"
    assert of_wait.facts == {  # type: ignore[attr-defined]
        "event": "request_waits", "request_id": "req_4", "model": "tiny", "why": "turn", "ahead": 2,
    }  # fmt: skip
    assert record.getMessage() == "req_1 prompt 9,216 of 22,851 tokens (40 %), about 4 min left"
    assert record.facts == {  # type: ignore[attr-defined]
        "event": "prompt_progress", "request_id": "req_1", "model": "tiny", "prompt_tokens": 22851,
        "prompt_done": 9216, "seconds_left": 224,
    }  # fmt: skip


def test_the_log_tells_of_the_first_waits_alone_when_many_wait(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait = RequestWait(name="", why="turn", ahead=0, seconds=PROMPT_SAID_S)
    waiting = tuple(replace(wait, name=f"req_{ahead}", ahead=ahead) for ahead in range(100))
    facts = replace(service.loop.snapshot(), waiting=waiting)
    monkeypatch.setattr(service.loop, "snapshot", lambda: facts)
    with caplog.at_level(logging.INFO, "argosy.serve"):
        log_prompts(only(service))
    told = [record.facts["request_id"] for record in caplog.records]  # type: ignore[attr-defined]
    assert told == [f"req_{ahead}" for ahead in range(8)]


def test_the_log_tells_every_ten_seconds_how_far_a_model_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    now, num_checked = [0.0], [0]
    tell = _told("tiny", lambda *_: num_checked.__setitem__(0, num_checked[0] + 1), lambda: now[0])
    with caplog.at_level(logging.INFO, "argosy.serve"):
        for second in range(25):
            now[0] = float(second)
            tell("reading weights", second / 25)
    assert [record.getMessage() for record in caplog.records] == [
        "loading tiny: reading weights (40 %)", "loading tiny: reading weights (80 %)",
    ]  # fmt: skip
    assert num_checked == [25]
