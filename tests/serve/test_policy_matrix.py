"""Every route, for every kind of key and state: nobody gets an answer that their scope, quota or policy does not allow.

    ROUTES x (no key, a wrong one, each scope, a used-up quota, a stopped key)  ->  the status that the table promises
    ROUTES that screen  x  a text that the policy does not allow  ->  refused

A new route is in the table by itself. Without a declared policy, or without a body here, it fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.guard.keys import SCOPES, KeyFile, KeyRing
from argosy.serve.app import ROUTES, make_app
from argosy.serve.core import Service
from argosy.serve.openapi import Route
from argosy.serve.screening import Guarding
from tests.serve.conftest import start

NOT_ALLOWED = "a blue moon"
# For each route with a JSON body, a valid one, around a text.
BODIES: dict[str, Any] = {
    "/tokenize": lambda text: {"content": text},
    "/detokenize": lambda text: {"tokens": [1]},
    "/apply-template": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 1},
    "/v1/embeddings": lambda text: {"input": text},
    "/v1/rerank": lambda text: {"query": "what", "documents": ["fine", text]},
    "/rerank": lambda text: {"query": text, "documents": ["fine"]},
    "/v1/moderations": lambda text: {"input": text},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 1},
    "/v1/responses/input_tokens": lambda text: {"input": text},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    "/v1/messages/count_tokens": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/engine/stops": lambda text: {"kind": "user", "name": text, "is_stopped": False},
    "/v1/engine/memory": lambda text: {"memory": "100TiB"},
    "/v1/cluster/add": lambda text: {"host": "127.0.0.1:1"},
    "/v1/cluster/drain": lambda text: {"host": "127.0.0.1:1"},
    "/infill": lambda text: {"input_prefix": text, "input_suffix": "", "n_predict": 1},
    "/api/chat": lambda text: {
        "messages": [{"role": "user", "content": text}],
        "options": {"num_predict": 1},
    },
    "/api/generate": lambda text: {"prompt": text, "options": {"num_predict": 1}},
    "/api/embed": lambda text: {"input": text},
    "/api/embeddings": lambda text: {"prompt": text},
    "/api/show": lambda text: {"model": "tiny"},
}
WITHOUT = ("/v1/rerank", "/rerank", "/infill")  # this model cannot; tests below have those that can
STREAMS = ("/v1/engine/events",)  # it never ends
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.policy.method} {r.policy.path}")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("matrix") / "keys.json")


@pytest.fixture(scope="module")
def secrets(keys: KeyFile) -> dict[str, str]:
    made = {scope: keys.add(scope, scopes=(scope,))[1] for scope in SCOPES}
    made["used up"] = keys.add("used-up", scopes=("admin", "infer"), requests_per_minute=1)[1]
    made["stopped"] = keys.add("stopped", scopes=("admin", "infer"))[1]
    return made


@pytest.fixture(scope="module")
def matrix(
    service: Service, keys: KeyFile, secrets: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.with_name("words.txt").write_text(f"{NOT_ALLOWED}\n")
    path.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    guarding = Guarding(path)
    guarding.stops.set("key", "stopped", is_stopped=True)
    app = make_app(service, KeyRing(keys), block_tokens=16, max_sequences=8, guarding=guarding)
    for url in start(app):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def send(client: httpx.Client, route: Route, secret: str | None, text: str = "fine") -> httpx.Response:
    policy = route.policy
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    path = policy.path.replace("{id}", "tiny").replace("{name}", "app.js").replace("{key}", "nobody")
    given: dict[str, Any] = {}
    if policy.takes_form:
        given = {"files": {"file": ("a.wav", b"RIFF")}, "data": {"model": "whisper-1"}}
    elif policy.method == "POST":
        given = {"json": BODIES[policy.path](text)}
    with client.stream(policy.method, path, headers=headers, **given) as answer:
        if policy.path not in STREAMS or answer.status_code != 200:
            answer.read()
    return answer


@every_route
def test_every_route_declares_what_it_screens_and_has_a_body_here(route: Route) -> None:
    policy = route.policy
    assert policy.screens is not None, "say what the content policy is applied to: screens="
    if policy.method == "POST":
        assert (policy.path in BODIES) == (not policy.takes_form)
    if policy.screens != "nothing":
        assert (policy.method, policy.scope) == ("POST", "infer")


@every_route
def test_only_a_key_with_the_scope_of_a_route_gets_an_answer(
    matrix: httpx.Client, secrets: dict[str, str], route: Route
) -> None:
    needed = route.policy.scope
    for name, secret in (
        ("none", None),
        ("wrong", "ak-wrong"),
        *((scope, secrets[scope]) for scope in SCOPES),
    ):
        status = send(matrix, route, secret).status_code
        if needed is None:
            assert status == 200, name
        elif name in ("none", "wrong"):
            assert status == 401, name
        elif name in (needed, "admin"):
            assert status in (200, 400, 404, 409, 415), (name, status)  # its scope lets it in
            assert status != 403
        else:
            assert status == 403, name


@every_route
def test_a_stopped_key_gets_no_answer_and_a_used_up_one_none_that_counts(
    matrix: httpx.Client, secrets: dict[str, str], route: Route
) -> None:
    if route.policy.scope is None:
        return
    stopped = send(matrix, route, secrets["stopped"])
    assert stopped.status_code == 403
    used_up = [send(matrix, route, secrets["used up"]).status_code for _ in range(2)]
    if route.policy.is_counted:
        assert used_up[1] == 429
    else:
        assert 429 not in used_up


@every_route
def test_a_text_that_the_policy_does_not_allow_is_refused_where_a_route_screens(
    matrix: httpx.Client, secrets: dict[str, str], route: Route
) -> None:
    policy = route.policy
    if policy.screens in (None, "nothing") or policy.path in WITHOUT:
        return
    fine, refused = (send(matrix, route, secrets["infer"], text) for text in ("fine", NOT_ALLOWED))
    assert fine.status_code == 200, fine.text
    if policy.path == "/v1/moderations":  # it says so
        assert refused.json()["results"][0]["flagged"] is True
        return
    assert refused.status_code == 400
    assert "not allowed by the policy" in refused.text


def test_a_route_without_a_policy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from argosy.serve.app import _post
    from argosy.serve.openai_embeddings import Embeddings, embeddings

    with pytest.raises(AssertionError, match="say what the content policy"):
        test_every_route_declares_what_it_screens_and_has_a_body_here(_post("/new", embeddings, Embeddings))


def test_rerank_screens_query_and_documents(service: Service, tmp_path: Path) -> None:
    from argosy.prompt.reranking import RerankForm, Reranking

    words = tmp_path / "words.txt"
    words.write_text(f"{NOT_ALLOWED}\n")
    path = tmp_path / "policy.toml"
    path.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    form = RerankForm(before="", between="\n", after="\n", yes="a", no="b")
    ranking = Service(
        service.loop, service.prompts, service.tokenizer, service.model,
        reranking=Reranking(form, service.tokenizer, context_tokens=service.model.context_tokens),
    )  # fmt: skip
    app = make_app(ranking, KeyRing(None), block_tokens=16, max_sequences=8, guarding=Guarding(path))
    for url in start(app):
        for query, document, status in (("q", "d", 200), (NOT_ALLOWED, "d", 400), ("q", NOT_ALLOWED, 400)):
            body = {"query": query, "documents": ["x", document]}
            assert httpx.post(f"{url}/v1/rerank", json=body, timeout=60).status_code == status
