"""Blocks that a model cannot take: replaced by a note in the history, refused where they are new.

A tool that reads a picture, or a conversation begun with another model, must not end a session: every later request
would carry the same block and be refused again. So a block of an earlier turn, or of a tool's result, becomes a note,
and `x-replaced-blocks` counts such notes. A picture that the user sends now is refused, as no answer could be about it.

Elsewhere: each dialect knows which of its blocks are new; their data is read past and not kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from argosy.errors import UsageError

TEXT_ONLY = "this model reads text only"


class UnreadPart(BaseModel):
    """A part of which nothing but its type is kept."""

    model_config = ConfigDict(extra="ignore")


def last_asked(roles: Iterable[str]) -> int:
    """The index of the user's last turn, whose parts count as new; -1 if there is none."""
    return max((at for at, role in enumerate(roles) if role == "user"), default=-1)


class Replaced:
    """The notes of one request."""

    def __init__(self) -> None:
        self._num_by_kind: Counter[str] = Counter()

    def note(self, kind: str, where: str, *, is_new: bool, reason: str = TEXT_ONLY) -> str:
        """The text that stands for a block.

        Args:
            kind: what it is, as its dialect calls it.
            where: its place in the body.
            is_new: the user sends it now.
            reason: why the model does not get it.

        Raises:
            UsageError: it is new.
        """
        if is_new:
            raise UsageError(
                f"{where}: {reason}, and this is of type '{kind}'",
                param=where,
                hint="leave it out or put it into words; in earlier turns and in tool results it becomes a note",
            )
        self._num_by_kind[kind] += 1
        return f"[{kind} omitted: {reason}]"

    def header(self) -> dict[str, str]:
        """The header that counts what was replaced; kinds are of a fixed set."""
        counts = [f"{number} {kind}" for kind, number in self._num_by_kind.items()]
        return {"x-replaced-blocks": ", ".join(counts)} if counts else {}
