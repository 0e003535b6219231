"""LiteLLM, which aider and DSPy use: it distinguishes errors by their wording."""

from __future__ import annotations

import litellm
import pytest

from tests.clients.conftest import Server
from tests.serve.speaking import CONTEXT_TOKENS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # LiteLLM's own types make pydantic warn


def complete(server: Server, model: str, text: str) -> str | None:
    answer = litellm.completion(
        model=model, api_base=server.url if model.startswith("anthropic") else f"{server.url}/v1",
        api_key="none", messages=[{"role": "user", "content": text}], max_tokens=16, num_retries=0,
    )  # fmt: skip
    content: str | None = answer.choices[0].message.content
    return content


@pytest.mark.parametrize("model", ["openai/tiny", "anthropic/tiny"])
def test_an_answer(server: Server, model: str) -> None:
    assert complete(server, model, "#plain") == "It is well, thank you."


@pytest.mark.parametrize("model", ["openai/tiny", "anthropic/tiny"])
def test_too_long_a_prompt_is_distinguished_from_other_errors(server: Server, model: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(server, model, "word " * 2 * CONTEXT_TOKENS)
