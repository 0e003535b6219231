"""A router in front of two real servers: dialects, choices, and servers that die."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.route.app import _usage
from argosy.route.servers import Health
from tests.route.conftest import RealServer, RunningRouter, routing

LONG = 400  # tokens: long enough to kill its server in the middle
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": LONG}),
    "completions": ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": LONG}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": LONG}),
    "responses": ("/v1/responses", {"input": "Tell me", "max_output_tokens": LONG}),
    "ollama": (
        "/api/chat", {"messages": [{"role": "user", "content": "Tell me"}], "options": {"num_predict": LONG}},
    ),
}  # fmt: skip
TEXTS = {"content", "text", "response"}


def body_of(dialect: str, **more: Any) -> tuple[str, dict[str, Any]]:
    path, body = DIALECTS[dialect]
    body = {"model": "tiny", "stream": True, "ignore_eos": True, **body, **more}
    if dialect == "ollama":
        del body["ignore_eos"]
    return path, body


def events_of(line: str) -> dict[str, Any] | None:
    line = line.removeprefix("data: ")
    return json.loads(line) if line.startswith("{") else None


def text_of(dialect: str, event: dict[str, Any]) -> str:
    match dialect:
        case "chat":
            choices = event["choices"]
            return (choices[0]["delta"].get("content") or "") if choices else ""
        case "completions":
            return event["choices"][0]["text"] if event["choices"] else ""
        case "messages":
            return event.get("delta", {}).get("text", "")
        case "responses":
            return event["delta"] if event["type"] == "response.output_text.delta" else ""
    return event["message"]["content"]


def streamed(
    router: RunningRouter, dialect: str, on_event: Any = None, **more: Any
) -> tuple[str, list[dict[str, Any]]]:
    """The text and the events of a stream; `on_event` is called with the number of each event."""
    path, body = body_of(dialect, **more)
    found: list[dict[str, Any]] = []
    with router.client() as client, client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            event = events_of(line)
            if event is not None:
                assert "error" not in event or event["error"] is None, event
                found.append(event)
                if on_event is not None:
                    on_event(len(found))
    return "".join(text_of(dialect, event) for event in found), found


def whole_text(events: list[dict[str, Any]]) -> str:
    """The text in the last event of a response, which repeats all of it."""
    messages = [item for item in events[-1]["response"]["output"] if item["type"] == "message"]
    return "".join(part["text"] for message in messages for part in message["content"])


def all_busy(router: RunningRouter, servers: list[RealServer]) -> list[RealServer]:
    """The servers that answer now."""
    urls = {str(server.address) for server in router.fleet.servers if server.replies}
    return [server for server in servers if server.url in urls]


def busy(router: RunningRouter, servers: list[RealServer]) -> RealServer:
    """The server that answers now."""
    (one,) = all_busy(router, servers)
    return one


def killing(router: RunningRouter, servers: list[RealServer], at: int = 5) -> Any:
    """Kill the server that answers, at an event; at an early one, so that it cannot have sent the rest already."""
    killed: list[RealServer] = []

    def on_event(number: int) -> None:
        if number == at:
            for victim in all_busy(router, servers):  # none if the answer was short
                victim.kill()
                killed.append(victim)

    on_event.killed = killed  # type: ignore[attr-defined]
    return on_event


def revive(router: RunningRouter, servers: list[RealServer]) -> None:
    for server in servers:
        if server.process is None or not server.process.is_alive():
            server.start()
        router.until(server, "up")


@pytest.fixture
def router(servers: list[RealServer], module_router: RunningRouter) -> RunningRouter:
    """A router in front of two servers that are up, whatever the test before did to them."""
    revive(module_router, servers)
    return module_router


@pytest.mark.parametrize("dialect", DIALECTS)
def test_greedy_stream_outlives_its_server(
    dialect: str, router: RunningRouter, servers: list[RealServer]
) -> None:
    greedy = (
        {"options": {"num_predict": LONG, "temperature": 0}} if dialect == "ollama" else {"temperature": 0}
    )
    expected, events = streamed(router, dialect, **greedy)
    assert len(expected) > 100
    kill = killing(router, servers)
    got, again = streamed(router, dialect, kill, **greedy)
    assert kill.killed
    assert got == expected
    if "type" in events[0]:  # other dialects have events that say nothing, and may come twice
        assert [event["type"] for event in again] == [event["type"] for event in events]
    if dialect == "responses":
        assert [event["sequence_number"] for event in again] == list(range(len(again)))
        assert again[-1]["response"]["id"] == again[0]["response"]["id"]
        assert whole_text(again) == expected


@pytest.mark.parametrize(
    "number", [0, 3, *(pytest.param(number, marks=pytest.mark.full) for number in (1, 2, 4))]
)
def test_sampled_stream_without_a_seed_outlives_its_server(
    number: int, router: RunningRouter, servers: list[RealServer]
) -> None:
    """The router gives it a seed; with the kills of the test above, ten in all."""
    dialect = list(DIALECTS)[number]
    for _ in range(10):
        kill = killing(router, servers, at=2 + 10 * (4 - number))
        got, events = streamed(router, dialect, kill)
        if kill.killed:
            break  # Ollama's answers may end earlier
    assert kill.killed
    assert got
    if (
        dialect == "responses"
    ):  # the whole text, which the second server says at the end, is what the client got
        assert whole_text(events) == got


def test_two_sampled_requests_get_two_seeds(router: RunningRouter) -> None:
    texts = {streamed(router, "chat", max_tokens=20)[0] for _ in range(3)}
    assert len(texts) == 3


def test_a_whole_answer_is_given_by_another_server(router: RunningRouter, servers: list[RealServer]) -> None:
    path, body = body_of("chat", stream=False, temperature=0)
    with router.client() as client:
        expected = client.post(path, json=body).json()["choices"]
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(client.post(path, json=body)))
        asking.start()
        while not any(server.replies for server in router.fleet.servers):
            time.sleep(0.001)
        busy(router, servers).kill()
        asking.join()
    assert answers[0].json()["choices"] == expected


def test_frozen_server_is_noticed_and_its_stream_continues(
    router: RunningRouter, servers: list[RealServer]
) -> None:
    expected, _ = streamed(router, "chat", temperature=0)
    frozen: list[RealServer] = []
    impatient = Health(period_s=0.05, timeout_s=0.4)
    with routing([server.url for server in servers], health=impatient) as other:

        def freeze(number: int) -> None:
            if number == 30:
                frozen.append(busy(other, servers))
                frozen[0].kill(signal.SIGSTOP)

        try:
            assert streamed(other, "chat", freeze, temperature=0)[0] == expected
            assert other.state(frozen[0]) == "down"
        finally:
            for server in frozen:
                server.kill(signal.SIGCONT)
    assert frozen


def test_the_next_turn_goes_to_the_server_that_knows_the_conversation(router: RunningRouter) -> None:
    def ask(messages: list[dict[str, str]]) -> tuple[int, str]:
        before = [server.num_requests for server in router.fleet.servers]
        with router.client() as client:
            body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body).json()
        after = [server.num_requests for server in router.fleet.servers]
        (chosen,) = [at for at in range(2) if after[at] > before[at]]
        return chosen, answer["choices"][0]["message"]["content"]

    for number in range(4):
        messages = [{"role": "user", "content": f"{number}: a long question about something " * 4}]
        homes = []
        for turn in range(3):
            home, said = ask(messages)
            homes.append(home)
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"and {turn}?"}]
        assert len(set(homes)) == 1


def test_requests_go_to_the_server_that_owes_the_fewest_tokens(router: RunningRouter) -> None:
    """Twelve long answers at once: six for each, although nobody waits for an answer before the next request."""
    before = [server.num_requests for server in router.fleet.servers]

    def ask(number: int) -> None:
        streamed(router, "completions", prompt=f"{number} {number * 7919}", max_tokens=60)

    asking = [threading.Thread(target=ask, args=[number]) for number in range(12)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    counts = [server.num_requests - was for server, was in zip(router.fleet.servers, before, strict=True)]
    assert sum(counts) == 12
    assert max(counts) <= 7
    router.until_idle()
    assert all(abs(server.owed_tokens) < 1e-6 for server in router.fleet.servers)


def test_kept_responses_are_asked_of_the_server_that_has_them(router: RunningRouter) -> None:
    with router.client() as client:
        firsts = [
            client.post("/v1/responses", json={"input": f"Hello {number}", "max_output_tokens": 4}).json()
            for number in range(4)
        ]
        for first in firsts:
            more = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 4}
            following = client.post("/v1/responses", json=more)
            assert following.status_code == 200, following.text
            assert following.json()["previous_response_id"] == first["id"]
            assert client.get(f"/v1/responses/{first['id']}").json()["id"] == first["id"]
            for item in ({"id": first["output"][0]["id"], "type": None}, {"id": first["output"][0]["id"]}):
                asked = {"input": [item, {"role": "user", "content": "And?"}]}
                assert client.post("/v1/responses", json=asked | {"max_output_tokens": 2}).status_code == 200
                assert client.post("/v1/responses/input_tokens", json=asked).status_code == 200
            counted = {"input": "And?", "previous_response_id": first["id"]}
            assert client.post("/v1/responses/input_tokens", json=counted).status_code == 200
        router_that_knows_nothing = [str(server.address) for server in router.fleet.servers]
    with routing(router_that_knows_nothing) as other, other.client() as client:
        for first in firsts:
            more = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 4}
            assert client.post("/v1/responses", json=more).status_code == 200
            assert client.delete(f"/v1/responses/{first['id']}").json()["deleted"]
        assert client.get("/v1/responses/resp_unknown").status_code == 404


def test_a_continued_response_is_kept_under_the_id_that_the_client_knows(
    router: RunningRouter, servers: list[RealServer]
) -> None:
    kill = killing(router, servers)
    _, events = streamed(router, "responses", kill, temperature=0)
    name = events[0]["response"]["id"]
    with router.client() as client:
        more = {"input": "And?", "previous_response_id": name, "max_output_tokens": 4}
        following = client.post("/v1/responses", json=more)
        assert following.status_code == 200, following.text
        assert following.json()["previous_response_id"] == name
        assert client.get(f"/v1/responses/{name}").json()["id"] == name


def test_a_request_for_what_a_dead_server_kept_says_so(
    router: RunningRouter, servers: list[RealServer]
) -> None:
    with router.client() as client:
        first = client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 4}).json()
        (owner,) = [
            server
            for server in servers
            if httpx.get(f"{server.url}/v1/responses/{first['id']}").status_code == 200
        ]
        owner.kill()
        router.until(owner, "down")
        more = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 4}
        refused = client.post("/v1/responses", json=more)
        assert refused.status_code == 503
        assert "keeps what this request refers to is down" in refused.json()["error"]["message"]


def test_without_any_server_a_request_is_refused_in_its_dialect(
    router: RunningRouter, servers: list[RealServer]
) -> None:
    for server in servers:
        server.kill()
    for server in servers:
        router.until(server, "down")
    shapes = Counter[str]()
    with router.client() as client:
        assert client.get("/healthz").status_code == 503
        assert client.get("/health").status_code == 200
        for dialect in DIALECTS:
            path, body = body_of(dialect)
            refused = client.post(path, json=body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "2"
            assert "0 of 2 are up" in refused.text
            error = refused.json()["error"]
            shapes["text" if isinstance(error, str) else error["type"]] += 1
    assert shapes == {"text": 1, "overloaded_error": 4}
    revive(router, servers)
    with router.client() as client:
        assert client.get("/healthz").status_code == 200


def test_a_server_that_is_stopped_hands_its_answers_over(model: Path) -> None:
    """SIGTERM: it takes no new requests, and what it cannot finish in time another server continues."""
    both = [RealServer(model, options=("--drain", "0")), RealServer(model)]
    for server in both:
        server.start()
    try:
        with routing([server.url for server in both]) as router:
            expected, _ = streamed(router, "messages", temperature=0)
            stopped: list[RealServer] = []

            def stop(number: int) -> None:
                if number == 30:
                    stopped.append(busy(router, both))
                    stopped[0].kill(signal.SIGTERM)

            assert streamed(router, "messages", stop, temperature=0)[0] == expected
            assert stopped
    finally:
        for server in both:
            server.kill()


def test_metrics_tell_of_servers_and_replays(router: RunningRouter) -> None:
    with router.client() as client:
        text = client.get("/metrics").text
    for server in router.fleet.servers:
        assert f'argosy_route_server_up{{server="{server.address}"}} 1.0' in text
    assert 'argosy_route_replays_total{outcome="continued"}' in text
    assert 'argosy_requests_total{route="/v1/chat/completions",status="200"}' in text


def test_other_routes_are_answered_by_a_server(router: RunningRouter) -> None:
    with router.client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/v1/models/tiny").json()["id"] == "tiny"
        assert client.post("/tokenize", json={"content": "Hello"}).json()["count"] > 0
        assert client.get("/").headers["content-type"].startswith("text/html")
        assert client.get("/nowhere").status_code == 404
        with client.stream("GET", "/v1/engine/events") as events:
            assert next(events.iter_lines()).startswith("data: {")


def test_cached_tokens_count_as_part_of_a_prompt_in_every_dialect() -> None:
    of_openai = {"prompt_tokens": 54, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 48}}
    of_responses = {"input_tokens": 54, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 48}}
    of_anthropic = [
        {
            "output_tokens": 3,
            "input_tokens": fresh,
            "cache_read_input_tokens": 48,
            "cache_creation_input_tokens": made,
        }
        for fresh, made in ((6, 0), (0, 6))
    ]
    for usage in (of_openai, of_responses, *of_anthropic):
        assert _usage({"usage": usage}) == (54, 3)
        assert _usage({"type": "message_start", "message": {"usage": usage}}) == (54, 3)
    assert _usage({"usage": {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 0}}) == (
        None,
        None,
    )
