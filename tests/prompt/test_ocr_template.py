"""DeepSeek-OCR has no chat template, and its GGUF files one that prints no pictures: both get one that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers

from argosy.prompt.tokenizer import Tokenizer, has_chat_template
from tests.prompt.tokenizers_for_tests import byte_level_json, write_tokenizer

CONVERTERS = "{% for m in messages %}{{m['content']}}{% endfor %}"
OTHER = "{% for m in messages %}{{ m.content }}{% endfor %}"
PARTS = [{"type": "image"}, {"type": "text", "text": "Free OCR."}]


def template_of(directory: Path, tokens: list[str], **config: Any) -> str | None:
    core = tokenizers.Tokenizer.from_str(byte_level_json())
    core.add_special_tokens(tokens)
    added = {str(core.token_to_id(token)): {"content": token} for token in tokens}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added, **config}
    write_tokenizer(directory, core.to_str(), config)
    template = Tokenizer.open(directory).chat_template
    assert has_chat_template(directory) == (template is not None)
    return template


@pytest.mark.parametrize("config", [{}, {"chat_template": CONVERTERS}], ids=["none", "converter's"])
def test_a_picture_is_the_placeholder_and_a_line_break(config: dict[str, Any], tmp_path: Path) -> None:
    template = template_of(tmp_path, ["<image>", "<|grounding|>"], **config)
    assert template is not None
    render = jinja2.Template(template).render
    assert render(messages=[{"content": PARTS}], bos_token="<s>") == "<s><image>\nFree OCR."
    assert render(messages=[{"content": "Hello."}, {"content": "Hi."}]) == "Hello.Hi."


def test_other_models_keep_what_they_have(tmp_path: Path) -> None:
    assert template_of(tmp_path / "without", ["<image>"]) is None
    assert template_of(tmp_path / "own", ["<image>", "<|grounding|>"], chat_template=OTHER) == OTHER
