"""Files of a made-up base tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"


def write_base(
    directory: Path,
    *,
    template: str = TEMPLATE,
    tokens: tuple[str, ...] = ("<jupyter_output>", "<empty_output>"),
) -> Path:
    """The directory, with special tokens whose ids are 15, 16, ..."""
    directory.mkdir()
    added = [{"content": token, "id": 15 + at} for at, token in enumerate(tokens)]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory
