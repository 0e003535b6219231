"""A server with a key marks what it samples, tells it, and records how much; a policy may leave it out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.engine.watermark import Watermark, make_key
from argosy.guard.audit import Audit, AuditSettings
from argosy.guard.keys import KeyRing
from argosy.guard.watermark import first_ngrams, judge
from argosy.open.engine import Engine
from argosy.serve.app import ROUTES, make_app
from argosy.serve.guards.audited import Auditor
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.guards.transparency import Practice
from tests.cli.tiny_chat_model import write_chat_model
from tests.serve.conftest import only, serving, start
from tests.serve.test_audited import Server

POLICIES = """
default = "house"
[policies.house]
may-choose = ["free"]
[policies.free]
watermark = false
"""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mark") / "mark.key"
    make_key(path)
    return path


@pytest.fixture(scope="module")
def server(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("marking")
    policy = root / "policy.toml"
    policy.write_text(POLICIES)
    settings = AuditSettings(directory=root / "audit")
    audit = Audit(settings, facts={})
    practice = Practice(has_watermark=True, responses_s=60.0, audit=settings)
    model = write_chat_model(root / "model", context_tokens=1024)
    with (
        Engine.open(model, memory="2GiB", threads=2, grammars=True, watermark=key) as engine,
        serving(engine) as service,
    ):
        app = make_app(
            only(service),
            KeyRing(None),
            block_tokens=16,
            max_sequences=8,
            governance=Governing(
                guarding=Guarding(policy), auditor=Auditor(audit, policy="p" * 64), practice=practice
            ),
        )
        for url in start(app):
            yield Server(url, {}, {}, "none", audit, root / "audit")
    audit.close()


@pytest.fixture(scope="module")
def ask(server: Server) -> dict[str, Any]:
    """Asks for digits, which this tokenizer reads as they were written."""
    digits = "0123456789"
    ids = [server.post("/tokenize", {"content": digit}).json()["tokens"][0] for digit in digits]
    return {
        "prompt": "Hello", "max_tokens": 120, "temperature": 1.0, "seed": 4, "ignore_eos": True,
        "logit_bias": {str(token_id): 50 for token_id in ids},
    }  # fmt: skip


def p_value_of(server: Server, key: Path, answer: httpx.Response) -> float:
    """The p-value of an answer's text, as a reader has it."""
    token_ids = server.post("/tokenize", {"content": text_of(answer)}).json()["tokens"]
    return judge(Watermark.read(key).words(first_ngrams(token_ids))).p_value


def text_of(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["text"]
    return text


def marked_tokens(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'^argosy_marked_tokens_total\{model="tiny"\} ([0-9.]+)$', text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def test_an_answer_is_marked_counted_and_recorded(server: Server, key: Path, ask: dict[str, Any]) -> None:
    before = marked_tokens(server)
    answer = server.post("/v1/completions", ask)
    assert answer.headers["x-ai-generated"] == "1"
    assert p_value_of(server, key, answer) < 1e-4
    line = server.line_of(answer)
    assert 50 < line["marked_tokens"] <= line["new_tokens"]
    assert marked_tokens(server) - before == line["marked_tokens"]
    assert key.read_bytes().hex() not in str(line)
    again = server.post("/v1/completions", ask)
    assert text_of(again) == text_of(answer)


def test_a_request_may_choose_an_unmarked_policy_if_its_own_allows_that(
    server: Server, key: Path, ask: dict[str, Any]
) -> None:
    answer = server.post("/v1/completions", ask, **{"x-argosy-policy": "free"})
    assert p_value_of(server, key, answer) > 1e-4
    assert answer.headers["x-ai-generated"] == "1"  # it is generated all the same
    line = server.line_of(answer)
    assert (line["marked_tokens"], line["new_tokens"]) == (0, 120)
    assert "policy free" in line["verdicts"]
    refused = server.post("/v1/completions", ask, **{"x-argosy-policy": "other"})
    assert refused.status_code == 400


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"response_format": {"type": "json_object"}},
        {
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
            "tool_choice": "required",
        },
    ],
    ids=["greedy", "JSON", "a call"],
)
def test_greedy_answers_json_and_calls_are_not_marked(server: Server, more: dict[str, Any]) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 40,
        "temperature": 1.0,
        "seed": 1,
    }
    answer = server.post("/v1/chat/completions", body | more)
    assert answer.status_code == 200, answer.text
    assert server.line_of(answer)["marked_tokens"] == 0


def test_everybody_who_may_ask_is_told_what_the_server_does(server: Server) -> None:
    told = httpx.get(f"{server.url}/v1/engine/transparency").json()
    assert "AI" in told["notice"]
    assert (told["is_ai_generated"], told["models"], told["watermark"]["is_on"]) == (True, ["tiny"], True)
    assert told["kept"] == {
        "logs_content": False, "responses_s": 60.0, "prefix_files_s": None,
        "audit": {"keeps_envelopes_s": 365 * 86_400.0, "keeps_contents": False, "keeps_contents_s": None},
    }  # fmt: skip
    assert (told["checks"]["policy"], told["checks"]["checks_requests"]) == ("house", False)


def test_a_server_without_a_watermark_says_so(client: httpx.Client) -> None:
    told = client.get("/v1/engine/transparency").json()
    assert not told["watermark"]["is_on"]
    assert (told["kept"]["audit"], told["kept"]["responses_s"], told["checks"]) == (None, None, None)


def test_the_header_is_on_answers_of_models_and_on_nothing_else(client: httpx.Client) -> None:
    ask = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    assert client.post("/v1/messages", json=ask).headers["x-ai-generated"] == "1"
    with client.stream("POST", "/v1/chat/completions", json=ask | {"stream": True}) as answer:
        assert answer.headers["x-ai-generated"] == "1"
    for answer in (
        client.get("/v1/models"),
        client.get("/"),
        client.post("/tokenize", json={"content": "Hello"}),
        client.post("/v1/embeddings", json={"input": "Hello"}),
        client.post("/v1/chat/completions", json={"messages": 7}),
    ):
        assert "x-ai-generated" not in answer.headers, answer.url


def test_the_document_has_the_header_where_models_answer(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for route in ROUTES:
        rule = route.rule
        headers = paths[rule.path][rule.method.lower()]["responses"]["200"].get("headers", {})
        assert ("x-ai-generated" in headers) == (rule.screens == "answers")


def test_a_policy_with_another_word_for_the_watermark_is_refused(tmp_path: Path) -> None:
    from argosy.errors import UsageError

    path = tmp_path / "policy.toml"
    path.write_text('[policies.a]\nwatermark = "off"\n')
    with pytest.raises(UsageError, match=r"policies\.a\.watermark"):
        Guarding(path)
