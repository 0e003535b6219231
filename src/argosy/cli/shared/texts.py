"""Texts from the command line: a prompt, files, stdin.

    PROMPT...                   ->  prompt_of     ->  its words, as one text
    that, -f FILE..., stdin     ->  prompt_text   ->  one text, in the order in which the model reads it
    --system TEXT | @FILE       ->  text_or_file  ->  the text

Files and stdin are UTF-8 and bounded. They are read before an engine opens, so the memory plan counts them.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from argosy.directory import read_named
from argosy.errors import UsageError

STDIN = "-"
MOST_BYTES = 8 << 20  # for all texts of a command; an engine renders 2 Mi characters of at most 4 bytes each
_PATIENCE_S = 3.0


def prompt_of(words: Sequence[str], *, may_name_model: bool) -> str | None:
    """Join the words of a prompt, which needs no quotes; None if there are none.

    Args:
        may_name_model: refuse a first word that names a model, because other programs expect one there.

    Raises:
        UsageError: the first word names a model.
    """
    from argosy.library import names

    if not words:
        return None
    if may_name_model and names.is_name(words[0]):
        raise UsageError(
            f"'{words[0]}' is a model, and `run` takes its prompt here",
            hint=f"`argosy run -m {words[0]} PROMPT` asks the model, `argosy chat {words[0]}` opens a chat; "
            "a prompt that begins with this word needs quotes",
        )
    for word in words:
        if ("." in word or "/" in word) and os.path.isfile(word):
            print(
                f"note: the model sees the name {word}, not the file; -f, --image, --audio or --video shows a file",
                file=sys.stderr,
            )
    return " ".join(words)


def prompt_text(prompt: str | None, files: Sequence[str], *, has_media: bool, is_raw: bool) -> str:
    """Assemble a prompt: the text on stdin, then files, then PROMPT. Without PROMPT, stdin comes last.

    Each file is preceded by a line with its name, unless it is the only text. Raw texts have no names.

    Args:
        prompt: from `prompt_of`; "-" or None: read it from stdin.
        files: paths; "-" is stdin.
        has_media: there are pictures, sounds or videos, so no text is needed.
        is_raw: the model continues the text.

    Raises:
        UsageError: there is no text; a text cannot be read, is too long, or is not UTF-8.
    """
    num_asked = [prompt, *files].count(STDIN)
    if num_asked > 1:
        raise UsageError(f"stdin can be read only once, but {STDIN} occurs {num_asked} times")
    is_needed = prompt is None and not files and not has_media
    piped = None
    if prompt == STDIN or (num_asked == 0 and (is_needed or _is_piped())):
        piped = read_stdin(MOST_BYTES, is_needed=is_needed)
    texts: list[tuple[str | None, str]] = []
    if piped and prompt not in (None, STDIN):
        texts.append((None, piped))
    num_left = MOST_BYTES - _num_bytes(piped or "")
    for name in files:
        text = (
            read_stdin(num_left, is_needed=False) if name == STDIN else read_file(Path(name), num_left, name)
        )
        num_left -= _num_bytes(text)
        texts.append((None if name == STDIN else name, text))
    last = piped if prompt in (None, STDIN) else prompt
    if last:
        texts.append((None, last))
    if not any(text for _, text in texts) and not has_media:
        source = "stdin" if prompt in (None, STDIN) and not files else "what it was given"
        raise UsageError(f"run needs a prompt, and {source} is empty")
    if is_raw:
        return "\n".join(text for _, text in texts)
    is_alone = len(texts) == 1
    return "\n\n".join(text if name is None or is_alone else f"{name}:\n{text}" for name, text in texts)


def text_or_file(value: str) -> str:
    """`value`, or the text of FILE if it is `@FILE`.

    Raises:
        UsageError: the file cannot be read, is too large, or is not UTF-8.
    """
    return read_file(Path(os.path.expanduser(value[1:]))) if value.startswith("@") else value


def read_file(path: Path, most_bytes: int = MOST_BYTES, name: str | None = None) -> str:
    """The text of a file or pipe, without a trailing newline.

    Args:
        name: the name for errors; None: the path.

    Raises:
        UsageError: it cannot be read, is too large, or is not UTF-8.
    """
    name = str(path) if name is None else name
    try:
        data = read_named(path, most_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is invalid"
        raise UsageError(f"{name} cannot be read: {reason}") from None
    if len(data) > most_bytes:
        raise _too_long(name, most_bytes)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_stdin(most_bytes: int, *, is_needed: bool) -> str:
    """The text on stdin, without a trailing newline.

    Args:
        is_needed: there is no other text, so stdin must not be a terminal.

    Raises:
        UsageError: it is missing, too large, or not UTF-8.
    """
    if sys.stdin is None or (is_needed and sys.stdin.isatty()):
        raise UsageError(
            "run needs a prompt", hint='`argosy run "Why is the sky blue?"`, or pass text on stdin'
        )
    _tell_if_silent()
    try:
        text = sys.stdin.read(most_bytes + 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"the text on stdin is not UTF-8: {error.reason} at byte {error.start}") from None
    if _num_bytes(text) > most_bytes:
        raise _too_long("the text on stdin", most_bytes)
    return text.removesuffix("\n")


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _too_long(name: str, most_bytes: int) -> UsageError:
    return UsageError(
        f"{name} is too long: the texts of a prompt may have {MOST_BYTES:,} bytes together, "
        f"and it has more than the {most_bytes:,} that are left"
    )


def _is_piped() -> bool:
    """Whether stdin is a pipe, a file or a socket, which may contain text for the prompt."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _tell_if_silent() -> None:
    """Say that the command is waiting, because a program may leave its pipe open without writing."""
    if _is_piped() and not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
        print("note: waiting for text on stdin; `< /dev/null` answers without it", file=sys.stderr)
