"""Large bodies with pictures: memory for them is charged before it is taken, and many at once are refused, not read."""

from __future__ import annotations

import base64
import io
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from argosy.budget.allowances import media_bytes
from argosy.guard.keys import KeyRing
from argosy.open.engine import Engine
from argosy.serve.answer import kept_items
from argosy.serve.answer.answers import Answers
from argosy.serve.answer.kept_items import KeptItems
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.claims import TEXT_BYTES, server_claims
from argosy.serve.dialects.body import validated
from argosy.serve.dialects.openai_chat_bodies import ChatBody, sent
from argosy.serve.http.access import MAX_BODY_BYTES
from argosy.serve.http.failures import Refused
from argosy.serve.http.gate import Gate
from argosy.serve.http.held import BODY_BYTES, MEDIA_BODIES_BYTES, MEDIA_BODY_BYTES, Pool
from tests.serve.conftest import only, serving, start
from tests.serve.dialects import MAX_TOKENS, PATHS
from tests.serve.seeing_model import write_seeing_model
from tests.serve.test_seeing import picture

CHAT, JSON = "/v1/chat/completions", {"content-type": "application/json"}
ROOM = BODY_BYTES + MEDIA_BODIES_BYTES


def noise(num_bytes: int) -> bytes:
    """A PNG of random pixels, which nothing can compress."""
    side = int((num_bytes / 3) ** 0.5)
    made = io.BytesIO()
    pixels = np.random.default_rng(14).integers(0, 256, (side, side, 3), np.uint8)
    Pillow.fromarray(pixels).save(made, "PNG", compress_level=0)
    return made.getvalue()


def chat(data: str, text: str, **how: Any) -> bytes:
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 1}, **how).encode()


MILLION = 1 << 20
# Each takes about the room that it has, or a fraction of it.
BODIES: dict[str, Callable[[int], bytes]] = {
    "one large picture": lambda part: chat("A" * (42 * MILLION // part), "What is this?"),
    "with an escaped emoji": lambda part: chat("A" * (30 * MILLION // part), "What is this? \U0001f600"),
    "with an emoji as it is": lambda part: chat(
        "A" * (20 * MILLION // part), "What is this? \U0001f600", ensure_ascii=False
    ),
    "with Chinese": lambda part: chat(
        "A" * (20 * MILLION // part), "\u4ec0\u4e48" * 1000, ensure_ascii=False
    ),
    "with an accent": lambda part: chat("A" * (20 * MILLION // part), "Qu\u00e9 es?", ensure_ascii=False),
    "an emoji inside the data": lambda part: chat(
        "A" * (8 * MILLION // part) + "\U0001f600", "What is this?", ensure_ascii=False
    ),
    "an escaped emoji inside the data": lambda part: chat(
        "A" * (8 * MILLION // part) + "\U0001f600", "What is this?"
    ),
    "data after an escaped quote": lambda part: chat(
        '\U0001f600"' + "A" * (8 * MILLION // part), "What is this?"
    ),
    "data in a text": lambda _: chat("AAAA", "\U0001f600" + "A" * (4 * MILLION - 1)),
    "many pictures": lambda _: chat("AAAA", "?").replace(
        b'}}]', b'}}' + (b',{"type":"text","text":"a"}' * 4000) + b"]", 1
    ),
}  # fmt: skip
whole_and_small = pytest.mark.parametrize("part", [4, pytest.param(1, marks=pytest.mark.full)])


@whole_and_small
@pytest.mark.parametrize("name", BODIES)
def test_no_more_memory_is_taken_than_was_charged(name: str, part: int) -> None:
    pool = Pool(ROOM)
    share = pool.share()
    tracemalloc.start()
    try:
        parts = [BODIES[name](part)]
        share.hold(len(parts[0]))
        tracemalloc.reset_peak()
        body = validated(parts.pop(), ChatBody, share)
        peak = tracemalloc.get_traced_memory()[1]
        assert peak <= pool.peak_bytes + MILLION
        assert tracemalloc.get_traced_memory()[0] <= share.num_bytes + MILLION
        if "inside" not in name and "quote" not in name:
            pool.peak_bytes = 0
            tracemalloc.reset_peak()
            messages = sent(body.messages, Intake(["picture"], share))
            assert tracemalloc.get_traced_memory()[1] <= pool.peak_bytes + MILLION
            assert isinstance(messages[0]["content"], list)
    finally:
        tracemalloc.stop()
    assert pool.peak_bytes <= ROOM


def test_a_body_that_would_take_more_than_all_memory_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("argosy.serve.dialects.body.parse_json", lambda text: pytest.fail("parsed"))
    data = chat("A" * (40 * MILLION), "\U0001f600", ensure_ascii=False)
    share = Pool(ROOM).share()
    share.hold(len(data))
    with pytest.raises(Refused, match="parsing the body would take") as refused:
        validated(data, ChatBody, share)
    assert refused.value.http_status == 413


def test_pictures_that_do_not_fit_the_memory_for_items_are_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = KeptItems(max_bytes=MILLION)
    written: list[object] = []
    write = kept_items._written

    def noted(value: object) -> bytes:
        written.append(value)
        return write(value)  # type: ignore[arg-type]

    monkeypatch.setattr(kept_items, "_written", noted)
    asked = [{"type": "message", "content": [{"type": "input_image", "image_url": "A" * (2 * MILLION)}]}]
    kept.keep("", "resp_1", None, asked, [{"id": "msg_1"}])
    assert written == [{"id": "msg_1"}]
    assert kept.item("", "msg_1")
    with pytest.raises(Refused, match="Previous response"):
        kept.conversation("", "resp_1")


# The server


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gate, str, Service]]:
    model = write_seeing_model(tmp_path_factory.mktemp("bodies") / "model")
    with Engine.open(model, memory="3GiB", threads=1, claims=server_claims(keeps_content=False)) as engine:
        assert (
            engine.plan.claimed["request_bytes"] == BODY_BYTES + TEXT_BYTES + MEDIA_BODIES_BYTES + TEXT_BYTES
        )  # it takes videos
        assert engine.plan.encoder_bytes > media_bytes(takes_pictures=True, takes_video=False)
        with serving(engine) as service:
            gate = make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=4)
            assert gate.bodies.max_bytes == ROOM
            for url in start(gate):
                yield gate, url, service


@whole_and_small
def test_many_large_bodies_at_once_are_answered_or_told_to_wait(
    seeing: tuple[Gate, str, Service], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, url, _ = seeing
    monkeypatch.setattr(gate.bodies, "max_bytes", ROOM // part)
    data = chat(base64.b64encode(noise(21 * MILLION // part)).decode(), "What is this?")
    assert len(data) > 3 * MAX_BODY_BYTES // part
    gate.bodies.peak_bytes = 0
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            answers.append(client.post(CHAT, content=data, headers=JSON))

    callers = [threading.Thread(target=ask) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}, [answer.text[:200] for answer in answers]
    for answer in answers:
        if answer.status_code == 503:
            assert "no memory is left for another request body" in answer.text
            assert "retry-after" in answer.headers
    assert 2 * len(data) < gate.bodies.peak_bytes <= ROOM // part


@pytest.mark.parametrize(
    ("dialect", "stores"),
    [
        ("chat", False),
        ("responses", False),
        ("responses", True),
        ("messages", False),
        *(pytest.param(dialect, True, marks=pytest.mark.full) for dialect in ("chat", "messages")),
    ],
)
def test_the_data_of_pictures_is_freed_when_the_prompt_is_built(
    seeing: tuple[Gate, str, Service], dialect: str, stores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, url, service = seeing
    held: list[int] = []
    step = Answers._step

    def noted(self: Answers, event: Any) -> Any:
        held.append(gate.bodies.num_bytes)
        return step(self, event)

    monkeypatch.setattr(Answers, "_step", noted)
    monkeypatch.setattr(service, "kept", KeptItems(max_bytes=8 * MILLION if stores else MILLION))
    part = picture(dialect, noise(2 * MILLION))
    answer = httpx.post(
        url + PATHS[dialect],
        json={("input" if dialect == "responses" else "messages"): [{"role": "user", "content": [part]}]}
        | {MAX_TOKENS[dialect]: 3},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    is_kept = dialect == "responses" and stores
    assert max(held) > 2 * MILLION if is_kept else max(held) < MILLION // 2
    if dialect == "responses":
        more = {"input": "And?", "previous_response_id": answer.json()["id"], "max_output_tokens": 1}
        assert httpx.post(url + PATHS[dialect], json=more, timeout=60).status_code == (200 if stores else 400)


def test_the_larger_limit_is_for_routes_that_take_pictures(seeing: tuple[Gate, str, Service]) -> None:
    _, url, _ = seeing
    for path, most in (
        (CHAT, MEDIA_BODY_BYTES),
        ("/tokenize", MEDIA_BODY_BYTES),
        ("/detokenize", MAX_BODY_BYTES),
        ("/v1/completions", MAX_BODY_BYTES),
    ):
        with httpx.Client(base_url=url, timeout=120) as client:
            answer = client.post(path, content=b" " * (most + 1), headers=JSON)
        assert answer.status_code == 413
        assert f"the body is larger than {most} bytes" in answer.text


def test_a_model_without_eyes_keeps_the_smaller_limit(url: str) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        answer = client.post(CHAT, content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)
    assert f"the body is larger than {MAX_BODY_BYTES} bytes" in answer.text
