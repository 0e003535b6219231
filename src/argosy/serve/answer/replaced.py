"""Unreadable and damaged blocks: replaced by a note in earlier turns, refused in the newest.

A tool that returns a picture, or a conversation that began with another model, must not end a session: every later
request would contain the same block and be refused again. A note therefore replaces a block in an earlier turn or a
tool result, and `x-replaced-blocks` counts the notes. A picture in the user's newest turn is refused, because the
answer could not be about it. Damage is found only when the prompt is built, so such a note is written then.

Elsewhere: each dialect decides which of its blocks are new. Their data is skipped, not kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from pydantic import BaseModel, ConfigDict

from argosy.errors import BadMedia, UsageError
from argosy.media.parts import Audio, Image, Kind, Video


class UnreadPart(BaseModel):
    """A part that the model cannot read; only its type is kept."""

    model_config = ConfigDict(extra="ignore")


def last_asked(roles: Iterable[str]) -> int:
    """The index of the user's last turn, whose parts count as new; -1 if there is none."""
    return max((at for at, role in enumerate(roles) if role == "user"), default=-1)


class Replaced:
    """The notes in one request; `kinds` are the media that the model takes in addition to text."""

    def __init__(self, kinds: Collection[Kind] = ()) -> None:
        self._num_by_kind: Counter[str] = Counter()
        self._replaceable: dict[
            object, str
        ] = {}  # pictures and sounds of earlier turns and tool results: their types
        taken = ["text", *(f"{kind}s" for kind in kinds)]
        listed = " and ".join([", ".join(taken[:-1]), taken[-1]]) if kinds else "text only"
        self._reason = f"this model reads {listed}"

    def note(self, kind: str, where: str, *, is_new: bool, reason: str | None = None) -> str:
        """Return the text that replaces a block.

        Args:
            kind: its type, as the dialect calls it.
            where: its place in the body.
            is_new: it is in the user's newest turn.
            reason: why the model does not get it; None: it cannot read this kind.

        Raises:
            UsageError: the block is new.
        """
        reason = reason or self._reason
        if is_new:
            raise UsageError(
                f"{where}: {reason}, and this part has type '{kind}'",
                param=where,
                hint="leave it out, or describe it in words; in earlier turns and tool results a note replaces it",
            )
        self._num_by_kind[kind] += 1
        return f"[{kind} omitted: {reason}]"

    def allow(self, part: Image | Audio | Video, kind: str) -> None:
        """Let a note replace a picture or sound if it is damaged; `kind` is its type, as the dialect calls it."""
        self._replaceable[part] = kind

    def replace_damaged(self, part: object, error: BadMedia) -> str | None:
        """Return the text that replaces a damaged picture or sound, or None if it must be refused."""
        kind = self._replaceable.get(part)
        return None if kind is None else self.note(kind, "", is_new=False, reason=error.message)

    def header(self) -> dict[str, str]:
        """The header that counts replaced blocks; their types come from a fixed set."""
        counts = [f"{number} {kind}" for kind, number in self._num_by_kind.items()]
        return {"x-replaced-blocks": ", ".join(counts)} if counts else {}
