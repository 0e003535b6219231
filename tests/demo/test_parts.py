"""Messages with sounds and pictures, in the chat template of the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

from argosy.demo.parts import token_id, write_part_files
from argosy.errors import CheckpointError
from tests.demo.base_files import write_base


def sense(content_type: str, placeholder: str, **settings: object) -> Any:
    return SimpleNamespace(content_type=content_type, placeholder=placeholder, processor=lambda: settings)


SENSES = [
    sense("audio", "<empty_output>", feature_size=80),
    sense("image", "<jupyter_output>", patch_size=12),
]


def test_the_template_puts_sounds_and_pictures_where_they_are_in_a_message(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_part_files(base, SENSES)
    template = jinja2.Template(json.loads((base / "tokenizer_config.json").read_text())["chat_template"])
    parts = [
        {"type": "image"},
        {"type": "text", "text": "a"},
        {"type": "audio"},
        {"type": "text", "text": "b"},
    ]
    assert template.render(message={"role": "user", "content": parts}) == (
        "<|im_start|>user\n<jupyter_output>a<empty_output>b<|im_end|>\n"
    )
    assert template.render(message={"role": "user", "content": "a"}) == "<|im_start|>user\na<|im_end|>\n"


def test_the_settings_of_all_senses_are_in_one_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_part_files(base, SENSES)
    assert json.loads((base / "preprocessor_config.json").read_text()) == {
        "feature_size": 80,
        "patch_size": 12,
    }


def test_a_base_with_another_template_or_without_the_placeholder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the base's chat template is not the expected one"):
        write_part_files(write_base(tmp_path / "other", template="{{ message['content'] }}"), SENSES)
    base = write_base(tmp_path / "none", tokens=("<pad>",))
    with pytest.raises(CheckpointError, match="the base's tokenizer has no <empty_output>"):
        token_id(base, "<empty_output>")
    assert token_id(base, "<pad>") == 15
