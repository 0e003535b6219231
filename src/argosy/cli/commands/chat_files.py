"""Files of `argosy chat`: typed lines, and saved conversations.

    LineHistory(path)     one JSON string per line, at most 1000 lines and 1 MiB
    save, load            a JSON list of messages, as `prompt/messages.py` describes them, at most 2 MiB

Both are replaced atomically, and only their owner can read them. A file that does not parse completely is refused,
so another program's file is never overwritten.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argosy.directory import replacing
from argosy.errors import UsageError
from argosy.strict_json import JsonError, parse_json
from argosy.user_directories import data_directory

_MOST_LINES = 1000
_HISTORY_BYTES = 1 << 20
_LINE_BYTES = 1 << 16  # a longer line, such as a pasted file, is not kept
_CONVERSATION_BYTES = 2 << 20  # reading it takes four times the memory, which no plan counts
_MEDIA = {"image": "picture", "audio": "sound", "video": "video"}


def default_history() -> Path:
    """The file for `--history` without a name."""
    return data_directory() / "chat-history"


class LineHistory:
    """The lines typed in this chat and earlier ones. Several chats may use a file at once.

    Raises:
        UsageError: the file is not a history, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = self._read()  # oldest first
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists():
                path.chmod(0o600)
            self._write(self.lines)
        except OSError as error:
            raise self._fault(f"cannot be written: {error.strerror}") from error

    def add(self, line: str) -> None:
        """Add a line.

        Raises:
            UsageError: the file was damaged meanwhile, or cannot be written.
        """
        if not line or len(_encoded(line)) > _LINE_BYTES:
            return
        try:
            with replacing(self.path) as write:
                lines = self._read()
                if lines[-1:] != [line]:
                    write(_bounded([*lines, line]))
        except OSError as error:
            raise self._fault(f"cannot be written: {error.strerror}") from error

    def _write(self, lines: Sequence[str]) -> None:
        with replacing(self.path) as write:
            write(_bounded(lines))

    def _read(self) -> list[str]:
        data = _read_bounded(self.path, _HISTORY_BYTES, "a history")
        lines: list[str] = []
        for number, text in enumerate((data or b"").splitlines(), start=1):
            try:
                line = parse_json(text)
            except JsonError as error:
                raise self._fault(f"is not a chat history: line {number}: {error}") from None
            if not isinstance(line, str):
                raise self._fault(
                    f"is not a chat history: line {number} is a {type(line).__name__}, expected text"
                )
            lines.append(line)
        return lines

    def _fault(self, why: str) -> UsageError:
        return UsageError(f"{self.path} {why}", hint="name another file with --history FILE")


def _encoded(line: str) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _bounded(lines: Sequence[str]) -> bytes:
    """The newest lines that fit."""
    kept: list[bytes] = []
    num_left = _HISTORY_BYTES
    for line in reversed(lines[-_MOST_LINES:]):
        text = _encoded(line)
        num_left -= len(text)
        if num_left < 0:
            break
        kept.append(text)
    return b"".join(reversed(kept))


def save(path: Path, messages: Sequence[dict[str, Any]]) -> None:
    """Write a conversation, replacing an earlier one but no other file.

    Raises:
        UsageError: it is too long, the path is another kind of file, or it cannot be written.
    """
    data = json.dumps([_saved(message) for message in messages], indent=1).encode() + b"\n"
    if len(data) > _CONVERSATION_BYTES:
        raise UsageError(
            f"the conversation takes {len(data):,} bytes, and a saved one may have {_CONVERSATION_BYTES:,}",
            hint="leave out large pictures, sounds and videos",
        )
    try:
        if path.exists():
            load(path)
        with replacing(path) as write:
            write(data)
    except UsageError as error:
        raise UsageError(
            f"{path} is left unchanged, because it is not a saved conversation", hint=error.message
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is invalid"
        raise UsageError(f"{path} cannot be written: {reason}") from None


def load(path: Path) -> list[dict[str, Any]]:
    """Read a conversation that `save` wrote, or another program's list of messages.

    Raises:
        UsageError: it cannot be read, is too long, or is not a conversation.
    """
    from argosy.prompt.json_text import count_values
    from argosy.prompt.messages import check_messages

    data = _read_bounded(path, _CONVERSATION_BYTES, "a saved conversation")
    if data is None:
        raise UsageError(f"{path} does not exist")
    try:
        count_values(data)
        messages = parse_json(data)
    except ValueError as error:
        raise UsageError(f"{path} is not a saved conversation: {error}") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError(f"{path} is not a saved conversation: expected a list of messages")
    loaded = [_loaded(message, f"{path}: message {at}") for at, message in enumerate(messages)]
    try:
        check_messages(loaded, add_generation_prompt=False)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None
    return loaded


def _saved(message: dict[str, Any]) -> dict[str, Any]:
    """Encode a message's media as text."""
    from argosy.media.parts import Content

    content = message["content"]
    if isinstance(content, str):
        return message
    names = {kind: name for name, kind in _MEDIA.items()}
    parts = [
        {"type": names[part.kind], "data": base64.b64encode(part.data).decode()}  # type: ignore[arg-type]
        if isinstance(part, Content)
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _loaded(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Decode a message's media."""
    from argosy.media.parts import PROMPT_LIMITS, Audio, Image, Video

    content = message.get("content")
    if not isinstance(content, list):
        return message
    kinds = {"image": Image, "audio": Audio, "video": Video}
    parts: list[object] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            parts.append(part)
            continue
        data = part.get("data")
        try:
            if set(part) != {"type", "data"} or not isinstance(data, str):
                raise ValueError
            parts.append(kinds[kind](base64.b64decode(data, validate=True)).read(PROMPT_LIMITS))
        except (ValueError, binascii.Error):
            raise UsageError(f"{where}: the {_MEDIA[kind]} must have its file in base64 as 'data'") from None
    return {**message, "content": parts}


def _read_bounded(path: Path, most_bytes: int, what: str) -> bytes | None:
    """Read a regular file; None if there is none.

    Raises:
        UsageError: it cannot be read, is not a regular file, or is too long.
    """
    try:
        # Opening a named pipe would wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not path.is_file():
                raise UsageError(f"{path} is not a regular file")
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is invalid"
        raise UsageError(f"{path} cannot be read: {reason}") from None
    if len(data) > most_bytes:
        raise UsageError(f"{path} is too long: {what} may have at most {most_bytes:,} bytes")
    return data
