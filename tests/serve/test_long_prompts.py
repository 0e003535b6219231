"""A prompt that takes ten minutes: its client hears of it, and one that leaves finds what was computed."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from argosy.model.model import Model
from tests.serve.conftest import alive_at_once
from tests.serve.dialects import DIALECTS, PATHS, greedy

NUM_SIGNS = 60  # in ten minutes
NUM_ANSWERED = 16  # tokens of an answer
ROUTES = PATHS | {"ollama chat": "/api/chat", "ollama generate": "/api/generate"}


def asked(dialect: str, said: str, *, stream: bool) -> dict[str, Any]:
    if dialect in DIALECTS:
        return greedy(dialect, said, NUM_ANSWERED) | {"stream": stream}
    options = {"temperature": 0, "num_predict": NUM_ANSWERED}
    given = {"prompt": said} if "generate" in dialect else {"messages": [{"role": "user", "content": said}]}
    return given | {"options": options, "stream": stream}


class SlowModel:
    """Counts the tokens that the model computes, and holds it in a step of a prompt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens: list[int] = []
        self.release = threading.Event()
        forward = Model.forward

        def held(model: Model, step: Any, *arguments: Any, **options: Any) -> Any:
            self.num_tokens.append(step.num_tokens)
            if len(self.num_tokens) == 2:
                assert self.release.wait(60)
            return forward(model, step, *arguments, **options)

        monkeypatch.setattr(Model, "forward", held)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("dialect", ROUTES)
def test_a_prompt_of_ten_minutes_keeps_its_client_and_is_not_computed_again_for_the_next(
    speaker: httpx.Client, monkeypatch: pytest.MonkeyPatch, dialect: str, stream: bool
) -> None:
    alive_at_once(monkeypatch, NUM_SIGNS)
    monkeypatch.setattr("argosy.serve.http.streams.WHOLE_S", 0)
    model = SlowModel(monkeypatch)
    body = asked(
        dialect, f"{dialect}, {stream}. " + "The ferry leaves at nine. " * 60 + "#plain", stream=stream
    )
    with speaker.stream("POST", ROUTES[dialect], json=body) as answer:
        assert answer.status_code == 200
        received = b""
        for part in answer.iter_raw():
            received += part
            if received.count(b"\n") >= NUM_SIGNS:
                break
    model.release.set()  # the client has left
    again = speaker.post(ROUTES[dialect], json=body)
    assert again.status_code == 200
    assert "thank" in again.text
    step, *_ = model.num_tokens
    assert 2 * step < sum(model.num_tokens) < 3 * step  # a third time, and another answer, would be more
