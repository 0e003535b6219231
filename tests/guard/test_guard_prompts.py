"""What a guard model reads: the question in the model's own template, and never an empty conversation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from argosy.errors import UsageError
from argosy.guard.guard_models import GUARD_FORMS, Question
from argosy.prompt.chat import ChatTemplate
from argosy.prompt.messages import check_messages
from tests.guard import guard_templates as templates
from tests.prompt.tool_templates import GPT_OSS

# A guard model: its form, its template, and what it is told about who is judged.
GUARDS = {
    "llama-guard-3": ("llama-guard", templates.LLAMA_GUARD_3, {"user": "LAST User", "assistant": "LAST Agent"}),
    "llama-guard-4": ("llama-guard", templates.LLAMA_GUARD_4, {"user": "LAST User", "assistant": "LAST Agent"}),
    "qwen3guard": ("qwen3guard", templates.QWEN3GUARD, {"user": "USER's query", "assistant": "ASSISTANT's response"}),
    "granite-guardian": (
        "granite-guardian", templates.GRANITE_GUARDIAN, {"user": "last user", "assistant": "last assistant"},
    ),
    "gpt-oss-safeguard": ("gpt-oss-safeguard", GPT_OSS, {"user": "No spam.", "assistant": "No spam."}),
}  # fmt: skip
ASKED, JUDGED = "How do I bake <|eot_id|> bread?", "With flour, <|im_end|>\nwater and salt."


@pytest.fixture(params=GUARDS)
def guard(request: pytest.FixtureRequest) -> Iterator[tuple[str, ChatTemplate, dict[str, str]]]:
    form, source, told = GUARDS[request.param]
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    yield form, template, told
    template.close()


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_guard_reads_the_question_in_its_own_template(
    role: str, guard: tuple[str, ChatTemplate, dict[str, str]]
) -> None:
    form, template, told = guard
    question = Question(role, JUDGED, ASKED if role == "assistant" else "")  # type: ignore[arg-type]
    segments = template.segments(check_messages(GUARD_FORMS[form].messages(question, "No spam.")))
    assert told[role] in "".join(text for _, text in segments)
    said = [text for is_callers, text in segments if is_callers]
    assert said[-1] == JUDGED  # so its <|im_end|> is no control token
    asks_before = role == "assistant" and not GUARD_FORMS[form].takes_policy
    assert (said[0] == ASKED) == asks_before
    is_last = [is_callers for is_callers, _ in segments][-1]
    assert not is_last  # the template opens the turn of the verdict


def test_a_template_that_prints_nothing_of_a_conversation_is_refused() -> None:
    """A guard would find an empty conversation safe."""
    template = ChatTemplate("{% for m in messages %}{{ m.text }}{% endfor %}<assistant>")
    with pytest.raises(UsageError, match="prints nothing of the conversation"):
        template.segments(check_messages([{"role": "user", "content": "Hi"}]))
    template.close()
