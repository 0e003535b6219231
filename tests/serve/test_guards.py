"""Guard models over HTTP: each judges questions and answers with its own template, and in its own words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy.guard.keys import KeyRing
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.replay import ReplayMemory
from argosy.prompt.tokenizer import Tokenizer
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from tests.guard.test_guard_prompts import GUARDS
from tests.serve.conftest import only, start
from tests.serve.speaking import END, FAMILY

POLICY = """
default = "questions"
[policies.questions]
input = ["judge"]
may-choose = ["answers"]
[policies.answers]
output = ["judge"]
[checks.judge]
model = "tiny"
form = "{form}"
{policy}
timeout-s = 60
"""


@pytest.fixture(params=GUARDS)
def guarded(
    request: pytest.FixtureRequest, speaking_service: Service, tmp_path: Path
) -> Iterator[tuple[str, httpx.Client]]:
    """A server whose only model is the guard; it says what `speaking.py` scripts."""
    form, template, _ = GUARDS[request.param]
    tokenizer = Tokenizer(FAMILY.tokenizer._core, config={"eos_token": END}, chat_template=template)
    prompts = PromptBuilder(tokenizer, vocab_size=tokenizer.vocab_size, memory=ReplayMemory())
    service = Service(speaking_service.loop, prompts, tokenizer, speaking_service.model)
    (tmp_path / "rules.md").write_text("No spam.")
    takes_policy = form == "gpt-oss-safeguard"
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.format(form=form, policy='policy = "rules.md"' if takes_policy else ""))
    app = make_app(
        only(service),
        KeyRing(None),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(path)),
    )
    for url in start(app):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield form, client
    prompts.close()


def test_a_guard_judges_questions_and_answers(guarded: tuple[str, httpx.Client]) -> None:
    form, client = guarded

    def ask(policy: str, said: str) -> httpx.Response:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": said}], "temperature": 0}
        return client.post("/v1/chat/completions", json=body, headers={"x-argosy-policy": policy})

    assert ask("questions", f"#good-{form}").status_code == 200
    refused = ask("questions", f"#bad-{form}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
    assert ask("questions", "#odd").status_code == 503  # it answers in no known form
    for asked, said, end in (
        (f"#kind-{form}", f"Water it. #good-{form}", "stop"),
        (f"#harm-{form}", "", "content_filter"),
    ):
        choice = ask("answers", asked).json()["choices"][0]
        assert (choice["message"]["content"] or "", choice["finish_reason"]) == (said, end)
    assert client.post("/v1/moderations", json={"input": f"#bad-{form}"}).json()["results"][0]["flagged"]
