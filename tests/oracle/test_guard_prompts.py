"""What a guard model reads equals what transformers makes of the same conversation and template."""

from __future__ import annotations

import pytest
import tokenizers
import transformers

from argosy.guard.guard_models import GUARD_FORMS, Question
from argosy.prompt.chat import ChatTemplate
from argosy.prompt.messages import check_messages
from tests.guard.test_guard_prompts import ASKED, GUARDS, JUDGED


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_reads_what_transformers_would_give_it(guard: str, role: str) -> None:
    form, source, _ = GUARDS[guard]
    question = Question(role, JUDGED, ASKED if role == "assistant" else "")  # type: ignore[arg-type]
    messages = [dict(one) for one in GUARD_FORMS[form].messages(question, "No spam.")]
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    found = "".join(text for _, text in template.segments(check_messages(messages)))
    template.close()
    given: list[dict[str, object]] = [*messages]
    if guard == "llama-guard-4":  # its card passes lists of parts
        given = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages]
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert found == tokenizer.apply_chat_template(
        given, chat_template=source, tokenize=False, add_generation_prompt=True
    )
