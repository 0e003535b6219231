"""Stored items of responses, which clients refer to instead of sending them again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from argosy.guard.keys import KeyFile, KeyRing
from argosy.open.engine import Engine
from argosy.prompt.builder import PromptBuilder
from argosy.serve.answer import kept_items
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.kept_items import KEPT_S, KeptItems
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.service import Common, Service
from argosy.serve.app import make_app
from argosy.serve.dialects.openai_responses_bodies import ResponsesBody
from argosy.serve.http import server as http_server
from argosy.serve.http.failures import Refused
from argosy.serve.http.held import Pool, PoolShare
from argosy.serve.http.listen import bind
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start
from tests.serve.dialects import TOOLS


def message(number: int, text: str = "x") -> dict[str, Any]:
    return {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": text}


def keep(kept: KeptItems, tenant: str, number: int, previous: int | None = None, text: str = "x") -> None:
    asked = [{"role": "user", "content": f"question {number}"}]
    earlier = None if previous is None else f"resp_{previous}"
    kept.keep(tenant, f"resp_{number}", earlier, asked, [message(number, text)])


def test_a_stored_conversation_keeps_its_order() -> None:
    kept = KeptItems()
    keep(kept, "a", 1)
    keep(kept, "a", 2, previous=1)
    said = [item["content"] for item in kept.conversation("a", "resp_2")]
    assert said == ["question 1", "x", "question 2", "x"]
    assert kept.item("a", "msg_1") == message(1)


def test_another_tenant_finds_no_item_and_a_removed_tenant_leaves_none() -> None:
    kept = KeptItems()
    keep(kept, "a", 1)
    with pytest.raises(Refused, match="Item with id 'msg_1' not found"):
        kept.item("b", "msg_1")
    with pytest.raises(Refused, match="Previous response with id 'resp_1' not found"):
        kept.conversation("b", "resp_1")
    kept.forget("a")
    with pytest.raises(Refused):
        kept.item("a", "msg_1")
    keep(kept, "a", 2)  # an answer that ended just before
    assert kept.nbytes == 0


def test_an_items_id_is_not_a_responses_id() -> None:
    kept = KeptItems()
    keep(kept, "a", 1)
    with pytest.raises(Refused):
        kept.item("a", "resp_1")
    with pytest.raises(Refused):
        kept.conversation("a", "msg_1")


def test_the_budget_holds_and_recently_used_items_stay() -> None:
    kept = KeptItems(max_bytes=100_000)
    keep(kept, "a", 0, text="x" * 5_000)
    keep(kept, "a", 1, previous=0)
    for number in range(2, 60):
        keep(kept, "a", number, text="x" * 5_000)
        assert kept.nbytes <= 100_000
        assert len(kept.conversation("a", "resp_1")) == 4
    with pytest.raises(Refused):
        kept.item("a", "msg_2")
    assert kept.item("a", "msg_59")


def test_a_tenant_that_stores_a_lot_evicts_only_its_own_items() -> None:
    kept = KeptItems(max_bytes=100_000)
    keep(kept, "small", 1)
    for number in range(60):
        keep(kept, "large", number, text="x" * 5_000)
    assert kept.item("small", "msg_1")


def test_a_whole_response_is_found_listed_and_deleted() -> None:
    kept = KeptItems()
    answer = {"id": "resp_1", "status": "completed", "output": [message(1), message(2)]}
    asked = [{"role": "user", "content": "question"}, {"id": "own", "role": "user", "content": "more"}]
    kept.keep("a", "resp_1", None, asked, [message(1), message(2)], answer=answer)
    assert kept.response("a", "resp_1") == answer
    first, second = kept.asked("a", "resp_1")
    assert second == asked[1]
    assert first == {**asked[0], "id": first["id"]}  # an id to continue a list after
    for act in (kept.response, kept.asked, kept.delete):
        with pytest.raises(Refused, match="Response with id 'resp_1' not found") as refused:
            act("b", "resp_1")
        assert refused.value.http_status == 404
    kept.delete("a", "resp_1")
    assert kept.nbytes == 0
    with pytest.raises(Refused):
        kept.response("a", "resp_1")
    with pytest.raises(Refused):
        kept.item("a", "msg_1")


def test_a_response_without_one_of_its_items_is_not_found() -> None:
    kept = KeptItems(max_bytes=20_000)
    kept.keep("a", "resp_1", None, [], [message(1)], answer={"id": "resp_1"})
    kept.response("a", "resp_1")
    for number in range(2, 20):
        keep(kept, "a", number, text="x" * 2_000)
    with pytest.raises(Refused, match="not found"):
        kept.response("a", "resp_1")


def conversation(
    kept: KeptItems, share: PoolShare, items: list[dict[str, Any]], **more: Any
) -> list[dict[str, Any]]:
    """The messages of a request with these input items."""
    body = ResponsesBody.model_validate({"input": [*items, {"role": "user", "content": "x"}], **more})
    return body.request(kept, "a", Intake((), share)).messages


def test_an_item_that_many_references_name_is_read_once_and_each_of_them_is_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, text = KeptItems(), "word " * 2_000
    kept.keep("a", "resp_1", None, [], [message(1, text)])
    reads: list[object] = []
    read = kept_items._read_item
    monkeypatch.setattr(kept_items, "_read_item", lambda one: reads.append(one) or read(one))
    references = [{"type": "item_reference", "id": "msg_1"}] * 50
    share = Pool().share()
    said, _ = conversation(kept, share, references)
    assert said == {"role": "assistant", "content": text * 50}
    assert len(reads) == 1
    assert share.num_bytes >= 2 * len(said["content"])
    with pytest.raises(Refused, match="the items to which this request refers take more than") as refused:
        conversation(kept, Pool().share(), references * 10)
    assert refused.value.http_status == 413


def test_the_conversation_before_a_request_is_charged_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = KeptItems()
    keep(kept, "a", 1, text="word " * 2_000)
    share = Pool().share()
    conversation(kept, share, [], previous_response_id="resp_1")
    assert share.num_bytes >= 10_000
    monkeypatch.setattr(kept_items, "_read_item", lambda one: pytest.fail("parsed"))
    with pytest.raises(Refused, match="the earlier items that it refers to would take") as refused:
        conversation(kept, Pool(9_000).share(), [], previous_response_id="resp_1")
    assert refused.value.http_status == 413


def test_what_is_not_used_for_a_day_is_dropped() -> None:
    now = [0.0]
    kept = KeptItems(clock=lambda: now[0])
    for number in (1, 2):
        kept.keep("a", f"resp_{number}", None, [], [message(number)], answer={"id": f"resp_{number}"})
    now[0] = KEPT_S - 1
    assert kept.response("a", "resp_2")["id"] == "resp_2"
    now[0] = KEPT_S + 1
    with pytest.raises(Refused):
        kept.response("a", "resp_1")
    with pytest.raises(Refused):
        kept.item("a", "msg_1")
    assert kept.response("a", "resp_2")["output"] == [message(2)]
    one = kept.nbytes
    kept.drop_expired()
    assert 0 < kept.nbytes < one  # not only out of reach, but gone
    now[0] = 3 * KEPT_S
    kept.drop_expired()
    assert kept.nbytes == 0
    with pytest.raises(Refused):
        kept.response("a", "resp_2")


def test_a_sweep_drops_only_so_many_at_a_time() -> None:
    now = [0.0]
    kept = KeptItems(clock=lambda: now[0])
    for number in range(700):
        kept.keep(f"tenant {number % 7}", f"resp_{number}", None, [], [message(number)])
    one = kept.nbytes / 1400
    now[0] = KEPT_S + 1
    kept.drop_expired()
    assert kept.nbytes == pytest.approx((1400 - 1024) * one, rel=0.05)
    kept.drop_expired()
    assert kept.nbytes == 0


def test_a_server_frees_what_is_too_old_though_no_request_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    kept = KeptItems(clock=lambda: now[0])
    facts = ModelFacts(
        id="tiny", family="none", context_tokens=8, num_layers=1, num_experts=1, experts_per_token=1, vocab_size=8
    )  # fmt: skip
    snapshot = SimpleNamespace(engine=SimpleNamespace(budget_bytes=1 << 30))
    loop: Any = SimpleNamespace(close=lambda: None, snapshot=lambda: snapshot)
    models = only(Service(loop, PromptBuilder(None, vocab_size=8), None, facts, Common(kept=kept)))
    monkeypatch.setattr(http_server, "SWEEP_S", 0.01)
    app = make_app(models, KeyRing(None), block_tokens=16, max_sequences=8)
    listens = threading.Event()
    server = http_server.Server(
        http_server.uvicorn_config(app, grace_s=5), models, app.running, 1.0, listens.set, []
    )
    with bind("127.0.0.1", 0) as sockets:
        thread = threading.Thread(target=server.run, args=[sockets])
        thread.start()
        try:
            assert listens.wait(60)
            keep(kept, "a", 1)
            assert kept.nbytes > 0
            now[0] = KEPT_S + 1
            deadline = time.monotonic() + 60
            while kept.nbytes:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            server.end()
            thread.join()


def test_without_a_budget_nothing_is_kept() -> None:
    kept = KeptItems(max_bytes=0)
    assert not kept.can_keep
    keep(kept, "a", 1)
    assert kept.nbytes == 0
    with pytest.raises(Refused, match="--no-store"):
        kept.response("a", "resp_1")


# ── over the wire ───────────────────────────────────────────────────────────────────────────────────────────────────

GREEDY = {"temperature": 0, "max_output_tokens": 200}


def ask(client: httpx.Client, items: Any, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/responses", json=GREEDY | {"input": items} | more)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def count(client: httpx.Client, items: Any, **more: Any) -> int:
    answer = client.post("/v1/responses/input_tokens", json={"input": items} | more)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


def named(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "item_reference", "id": item["id"]} for item in items]


def results(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "#sunny"}
        for item in items
        if item["type"] == "function_call"
    ]


def test_metrics_tell_the_memory_of_what_is_kept(speaker: httpx.Client, speaking_service: Service) -> None:
    def told() -> float:
        (line,) = [
            line
            for line in speaker.get("/metrics").text.splitlines()
            if line.startswith("argosy_kept_responses_bytes ")
        ]
        return float(line.partition(" ")[2])

    before = told()
    assert before == speaking_service.kept.nbytes
    kept = ask(speaker, "#plain")
    assert told() == speaking_service.kept.nbytes > before
    assert speaker.delete(f"/v1/responses/{kept['id']}").status_code == 200
    assert told() == before


@pytest.mark.parametrize("streamed", [False, True])
def test_item_references_work_like_the_items_themselves(speaker: httpx.Client, streamed: bool) -> None:
    """Like @ai-sdk/openai, which stores by default: thoughts and calls by their ids, then the results."""
    asked = GREEDY | {"input": "#thoughtful", "tools": TOOLS["responses"]}
    if streamed:
        text = speaker.post("/v1/responses", json=asked | {"stream": True}).text
        first = json.loads(text.strip().rpartition("data: ")[2])["response"]
    else:
        first = speaker.post("/v1/responses", json=asked).json()
    assert first["store"] is True
    assert [item["type"] for item in first["output"]] == ["reasoning", "function_call", "function_call"]
    question, answers = {"role": "user", "content": "#thoughtful"}, results(first["output"])
    by_name = [question, *named(first["output"]), *answers]
    whole = [question, *first["output"], *answers]
    assert count(speaker, by_name) == count(speaker, whole)
    said = ask(speaker, by_name, tools=TOOLS["responses"])
    assert said["output"][0]["content"][0]["text"] == "It is sunny in both."
    # The type may be omitted.
    untyped = [
        question,
        *({"id": item["id"]} for item in first["output"]),
        *answers,
    ]
    assert count(speaker, untyped) == count(speaker, whole)


def test_a_response_continues_from_the_previous_one(speaker: httpx.Client) -> None:
    first = ask(speaker, "#thoughtful", tools=TOOLS["responses"])
    answers = results(first["output"])
    second = ask(speaker, answers, previous_response_id=first["id"], tools=TOOLS["responses"])
    assert second["previous_response_id"] == first["id"]
    assert second["output"][0]["content"][0]["text"] == "It is sunny in both."
    whole = [{"role": "user", "content": "#thoughtful"}, *first["output"], *answers, *second["output"]]
    more = {"previous_response_id": second["id"]}
    assert count(speaker, "And now?", **more) == count(
        speaker, [*whole, {"role": "user", "content": "And now?"}]
    )


def test_instructions_of_an_earlier_request_do_not_carry_over(speaker: httpx.Client) -> None:
    first = ask(speaker, "#plain", instructions="Be brief. " * 20)
    whole = [{"role": "user", "content": "#plain"}, *first["output"], {"role": "user", "content": "Why?"}]
    assert count(speaker, "Why?", previous_response_id=first["id"]) == count(speaker, whole)


def test_a_response_that_is_not_stored_is_not_found_and_the_error_says_what_to_do(
    speaker: httpx.Client,
) -> None:
    first = ask(speaker, "#plain", store=False)
    assert first["store"] is False
    refused = speaker.post("/v1/responses", json=GREEDY | {"input": named(first["output"])})
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert error["message"].startswith(f"Item with id '{first['output'][0]['id']}' not found.")
    assert "send the items themselves" in error["message"]
    assert error["param"] == "input"
    refused = speaker.post("/v1/responses", json=GREEDY | {"input": "x", "previous_response_id": first["id"]})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
    assert error["message"].startswith(f"Previous response with id '{first['id']}' not found.")


def test_a_server_without_a_budget_reports_that_it_stores_nothing(
    speaker: httpx.Client, speaking_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaking_service, "kept", KeptItems(max_bytes=0))
    answer = speaker.post("/v1/responses", json=GREEDY | {"input": "#plain", "store": True})
    assert answer.json()["store"] is False
    assert answer.headers["x-ignored-params"] == "store"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_is_fetched_as_it_was_sent_and_deleted(speaker: httpx.Client, streamed: bool) -> None:
    asked = GREEDY | {"input": "#thoughtful", "tools": TOOLS["responses"], "stream": streamed}
    answer = speaker.post("/v1/responses", json=asked)
    sent = json.loads(answer.text.strip().rpartition("data: ")[2])["response"] if streamed else answer.json()
    path = f"/v1/responses/{sent['id']}"
    found = speaker.get(path)
    assert found.status_code == 200
    assert found.json() == sent
    assert speaker.delete(path).json() == {"id": sent["id"], "object": "response", "deleted": True}
    for method, at in (("GET", path), ("DELETE", path), ("GET", f"{path}/input_items")):
        refused = speaker.request(method, at)
        assert refused.status_code == 404
        assert refused.json()["error"]["message"].startswith(f"Response with id '{sent['id']}' not found.")
    later = speaker.post("/v1/responses", json=GREEDY | {"input": "x", "previous_response_id": sent["id"]})
    assert later.json()["error"]["code"] == "previous_response_not_found"


def test_input_items_are_listed_page_by_page(speaker: httpx.Client) -> None:
    items = [{"role": "user", "content": "#plain"}, {"role": "assistant", "content": "Well."}]
    items += [
        {"role": "user", "content": [{"type": "input_text", "text": f"#plain {at}"}]} for at in range(3)
    ]
    path = f"/v1/responses/{ask(speaker, items)['id']}/input_items"
    listed = speaker.get(path, params={"order": "asc"}).json()
    assert (listed["object"], listed["has_more"]) == ("list", False)
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == ["#plain", "Well.", "#plain 0", "#plain 1", "#plain 2"]
    assert [item["content"][0]["type"] for item in listed["data"]][:3] == [
        "input_text",
        "output_text",
        "input_text",
    ]
    assert all(item["type"] == "message" and item["id"] for item in listed["data"])
    ids = [item["id"] for item in listed["data"]]
    assert (listed["first_id"], listed["last_id"]) == (ids[0], ids[-1])
    newest = speaker.get(path, params={"limit": 2}).json()
    assert [item["id"] for item in newest["data"]] == ids[:2:-1]
    assert newest["has_more"] is True
    rest = speaker.get(path, params={"limit": 100, "after": newest["last_id"]}).json()
    assert [item["id"] for item in rest["data"]] == ids[2::-1]
    assert rest["has_more"] is False
    past = speaker.get(path, params={"after": ids[0]}).json()
    assert (past["data"], past["first_id"], past["has_more"]) == ([], None, False)
    for wrong in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"limit": "٣"}, {"order": "up"}):
        assert speaker.get(path, params=wrong).status_code == 400
    assert speaker.get(path, params={"after": "none"}).status_code == 404


@pytest.mark.parametrize("more", [{}, {"type": None}, {"type": "item_reference"}])
def test_a_reference_without_a_type_is_listed_as_a_reference(
    speaker: httpx.Client, more: dict[str, Any]
) -> None:
    (said,) = ask(speaker, "#plain")["output"]
    items = [
        {"role": "user", "content": "#plain"},
        {"id": said["id"], **more},
        {"role": "user", "content": "?"},
    ]
    listed = speaker.get(f"/v1/responses/{ask(speaker, items)['id']}/input_items", params={"order": "asc"})
    assert listed.status_code == 200
    found = listed.json()["data"]
    assert [item["type"] for item in found] == ["message", "item_reference", "message"]
    assert found[1]["id"] == said["id"]


def test_a_path_of_the_table_is_no_id(speaker: httpx.Client) -> None:
    refused = speaker.get("/v1/responses/input_tokens")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_a_kept_response_is_not_streamed(speaker: httpx.Client) -> None:
    path = f"/v1/responses/{ask(speaker, '#plain')['id']}"
    assert speaker.get(path, params={"stream": "true"}).status_code == 400
    assert speaker.get(path, params={"stream": "false"}).status_code == 200


def test_a_response_that_failed_is_not_kept(speaker: httpx.Client, speaking_service: Service) -> None:
    before = speaking_service.kept.nbytes
    assert speaker.post("/v1/responses", json=GREEDY | {"input": "#fail"}).status_code == 400
    assert speaking_service.kept.nbytes == before


def test_a_stored_conversation_has_the_same_limit_on_items_as_a_sent_one(
    speaker: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.serve.dialects.openai_responses_bodies.MAX_ITEMS", 4)
    first = ask(speaker, "#plain")
    second = ask(speaker, "#plain", previous_response_id=first["id"])
    refused = speaker.post(
        "/v1/responses", json=GREEDY | {"input": "x", "previous_response_id": second["id"]}
    )
    assert refused.status_code == 400
    assert "has 5 items; the maximum is 4" in refused.json()["error"]["message"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service, dict[str, str]]]:
    """A server with two keys."""
    root = tmp_path_factory.mktemp("kept")
    keys = KeyFile(root / "keys.json")
    secrets = {name: keys.add(name)[1] for name in ("one", "two")}
    model = write_chat_model(root / "model")
    with Engine.open(model, memory="2GiB", threads=1) as engine, serving(engine) as service:
        for url in start(make_app(only(service), KeyRing(keys), block_tokens=16, max_sequences=8)):
            yield url, service, secrets


def test_another_key_finds_nothing_and_a_revoked_key_leaves_nothing(
    keyed: tuple[str, Service, dict[str, str]],
) -> None:
    url, service, secrets = keyed

    def post(name: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {secrets[name]}"}
        return httpx.post(f"{url}/v1/responses", json=body | {"max_output_tokens": 3}, headers=headers)

    first = post("one", {"input": "Hello"}).json()
    again = {"input": "x", "previous_response_id": first["id"]}
    assert post("one", again).status_code == 200
    assert post("two", again).json()["error"]["code"] == "previous_response_not_found"
    assert post("two", {"input": named(first["output"])}).status_code == 404
    assert service.kept.nbytes > 0
    (tenant,) = service.kept._memory._tenants
    service.revoke(tenant)
    assert service.kept.nbytes == 0
