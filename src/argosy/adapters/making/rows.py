"""Read the rows that an adapter learns from, and turn them into token ids.

    {"text": "..."}                                                                   every token is learned
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}    the assistant's turns are

Sizes are bounded before anything is parsed, and a malformed row is refused with the number of its line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from argosy.directory import read_named
from argosy.errors import ArgosyError, UsageError
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.tokenizer import Tokenizer
from argosy.strict_json import JsonError, parse_json

MOST_FILE_BYTES = 64 << 20
MOST_LINE_BYTES = 1 << 20
MOST_ROWS = 100_000
_ROLES = ("system", "user", "assistant")
_HINT = (
    'a line is {"text": "..."}, or {"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]}'
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row: `content` is its text, or its messages as (role, content)."""

    line: int
    content: str | tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens. `is_learned[i]`: the model learns to write token i after those before it; never token 0."""

    ids: NDArray[np.int64]
    is_learned: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Examples:
    """The rows that can be learned, and what happened to the others.

    num_same: rows that repeat an earlier one.   num_cut: rows cut to the context.
    num_left_out: rows with nothing to learn in their first tokens.
    """

    examples: tuple[Example, ...]
    num_same: int
    num_cut: int
    num_left_out: int


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, in order; lines of spaces are passed over.

    Raises:
        UsageError: the file cannot be read, is too large, has no row, or a row is malformed.
    """
    try:
        data = read_named(path, MOST_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MOST_FILE_BYTES:
        raise UsageError(
            f"{path} has more than {MOST_FILE_BYTES >> 20} MiB, the most that is read",
            hint=f"`head -n 10000 {path.name}` is smaller",
        )
    rows: list[Row] = []
    start, number = 0, 0
    while start < len(data):  # no list of lines: a file may have millions of empty ones
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        if data[start:end].strip():
            if len(rows) == MOST_ROWS:
                raise UsageError(f"{path} has more than {MOST_ROWS:,} rows, the most that are read")
            rows.append(_row(path, number, data[start:end]))
        start = end + 1
    if not rows:
        raise UsageError(f"{path} has no row", hint=_HINT)
    return rows


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        if len(line) > MOST_LINE_BYTES:
            raise JsonError(f"has {len(line):,} bytes; at most {MOST_LINE_BYTES:,} are read")
        value = parse_json(line)
        if isinstance(value, dict) and value.keys() == {"text"}:
            return Row(number, _text(value["text"], "`text`"))
        if isinstance(value, dict) and value.keys() == {"messages"}:
            return Row(number, _messages(value["messages"]))
        found = f"the keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        raise JsonError(f"needs `text` or `messages`, and nothing else; found {found[:200]}")
    except JsonError as error:
        raise UsageError(f"{path}, line {number}: {error}", hint=_HINT) from None


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise JsonError(f"needs text in {name}; found {_kind(value)}")
    return value


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise JsonError(f"needs a list in `messages`; found {_kind(value)}")
    turns = []
    for place, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise JsonError(f"needs `role` and `content`, and nothing else, in message {place}")
        if message["role"] not in _ROLES:
            raise JsonError(f"needs one of {', '.join(_ROLES)} as the role of message {place}")
        turns.append((str(message["role"]), _text(message["content"], f"message {place}")))
    if not turns or turns[-1][0] != "assistant":
        raise JsonError("needs an assistant's message at the end of `messages`, because that is learned")
    return tuple(turns)


def _kind(value: object) -> str:
    return "none" if value is None else "no text" if isinstance(value, str) else type(value).__name__


def encode_rows(
    path: Path, rows: Sequence[Row], tokenizer: Tokenizer, builder: PromptBuilder, *, context_tokens: int
) -> Examples:
    """Turn rows into examples of at most `context_tokens` tokens.

    Args:
        path: named in errors.
        builder: renders messages; without a context of its own.

    Raises:
        UsageError: a conversation cannot be rendered, or no row has anything to learn.
    """
    examples: list[Example] = []
    seen: set[object] = set()
    num_cut = num_left_out = 0
    for row in rows:
        if row.content in seen:
            continue
        seen.add(row.content)
        try:
            whole = (
                _of_text(row.content, tokenizer)
                if isinstance(row.content, str)
                else _of_turns(row.content, builder)
            )
        except ArgosyError as error:
            raise UsageError(f"{path}, line {row.line}: {error.message}", hint=error.hint) from error
        num_cut += len(whole.ids) > context_tokens
        cut = Example(whole.ids[:context_tokens], whole.is_learned[:context_tokens])
        if cut.is_learned.any():
            examples.append(cut)
        else:
            num_left_out += 1
    if not examples:
        raise UsageError(
            f"{path}: no row has anything to learn in its first {context_tokens} tokens",
            hint="shorten what comes before the answers, or raise `--context`",
        )
    return Examples(tuple(examples), len(rows) - len(seen), num_cut, num_left_out)


def _of_text(text: str, tokenizer: Tokenizer) -> Example:
    ids = np.array([*tokenizer.prefix_ids, *tokenizer.encode(text), *tokenizer.eos_ids[:1]], np.int64)
    is_learned = np.ones(len(ids), np.bool_)
    is_learned[: max(1, len(tokenizer.prefix_ids))] = False
    return Example(ids, is_learned)


def _of_turns(turns: tuple[tuple[str, str], ...], builder: PromptBuilder) -> Example:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]

    def ids_of(count: int, *, opens: bool) -> tuple[int, ...]:
        built = builder.build(messages[:count], add_generation_prompt=opens, continues=False)
        return tuple(built.token_ids or ())

    whole = ids_of(len(turns), opens=False)
    is_learned = np.zeros(len(whole), np.bool_)
    for number, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        before, after = ids_of(number, opens=True), ids_of(number + 1, opens=False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise UsageError(
                f"the model's template writes the conversation before message {number + 1} differently later",
                hint="give each answer a row of its own, as the last message",
            )
        is_learned[len(before) : len(after)] = True
    return Example(np.array(whole, np.int64), is_learned)
