"""What a router reads in a request: every answer that is generated gets a seed, and its limit is known."""

from __future__ import annotations

import json

import pytest

from argosy.route.asked import GENERATED, Asked, read_asked
from argosy.route.prefixes import Prefixes
from argosy.serve.http.held import Pool


def read(route: str, body: dict[str, object]) -> Asked:
    asked = Asked(route=route, method="POST", path=route, headers=(), body=json.dumps(body).encode())
    read_asked(asked, Pool(1 << 20).share(), lambda num_bytes: None, Prefixes(), b"")
    return asked


def test_every_route_whose_answers_a_model_writes_gets_a_seed() -> None:
    """Without one, a second server would continue the answer with other random choices."""
    openai = {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
    assert {*openai, "/v1/messages", "/infill", "/api/chat", "/api/generate"} == GENERATED


@pytest.mark.parametrize("route", sorted(GENERATED))
def test_a_seed_is_where_its_server_reads_it(route: str) -> None:
    body = json.loads(read(route, {"prompt": "a", "messages": [{}], "input": "a"}).body)
    assert isinstance((body["options"] if route.startswith("/api/") else body)["seed"], int)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"])
def test_the_limit_of_an_answer_is_known_by_each_of_its_names(name: str) -> None:
    assert read("/infill", {name: 7}).limit == 7
    assert read("/infill", {name: -1}).limit is None
