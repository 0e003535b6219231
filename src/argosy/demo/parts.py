"""Let messages to the demo model hold sounds and pictures: its chat template, and how they are prepared.

Elsewhere: `hearing.py` and `seeing.py` hold what differs between the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from argosy.checkpoint.safetensors_write import TensorToWrite
from argosy.errors import CheckpointError

_CONTENT = "message['content']"
_OPENING = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"


class Sense(Protocol):
    """The demo model's parts for one kind of media.

    content_type: the type of such parts in a message.   placeholder: the token that stands for a part.
    """

    @property
    def content_type(self) -> str: ...

    @property
    def placeholder(self) -> str: ...

    def config(self, directory: Path) -> dict[str, Any]: ...

    def processor(self) -> Mapping[str, Any]: ...

    def tensors(self) -> Iterator[TensorToWrite]: ...


def token_id(directory: Path, token: str) -> int:
    """Return the id of a special token of the tokenizer in `directory`.

    Raises:
        CheckpointError: the tokenizer lacks the token.
    """
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    for added in tokenizer["added_tokens"]:
        if added["content"] == token:
            return int(added["id"])
    raise CheckpointError(f"the base's tokenizer has no {token}", path=directory)


def write_part_files(directory: Path, senses: Sequence[Sense]) -> None:
    """Write the settings that prepare media, and make the chat template put media where a message has them.

    Raises:
        CheckpointError: the template is not the base's.
    """
    processor = {key: value for sense in senses for key, value in sense.processor().items()}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    template = config["chat_template"]
    if template.count(_OPENING) != 1 or template.count(_CONTENT) != 1:
        raise CheckpointError("the base's chat template is not the expected one", path=path)
    config["chat_template"] = template.replace(_OPENING, _with_parts(senses))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_parts(senses: Sequence[Sense]) -> str:
    media = "".join(
        f"{{% elif part['type'] == '{sense.content_type}' %}}{{{{ '{sense.placeholder}' }}}}"
        for sense in senses
    )
    return (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{media}{{% endif %}}{{% endfor %}}{{% endif %}}{{{{'<|im_end|>' + '\n'}}}}"
    )
