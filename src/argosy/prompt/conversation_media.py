"""The media of a conversation: read turn by turn, then put in place of the chat template's placeholders.

Elsewhere: `media_span.py` defines the interface of media readers; `builder.py` renders conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from argosy.errors import BadMedia, PromptTooLong, UsageError
from argosy.media.parts import Audio, Content, RequestMedia
from argosy.prompt.media_span import EARS_HINT, MediaReader, MediaSpan, PlaceSpan
from argosy.prompt.messages import joined
from argosy.prompt.prompt import Prompt

if TYPE_CHECKING:
    from argosy.prompt.messages import Media, Message, Piece, Turn

ReplaceDamaged = Callable[["Media", BadMedia], str | None]
"""Returns the text that replaces a damaged picture or sound, or None if it must be refused."""


class Placed(NamedTuple):
    """A picture, sound or video: the template's token for it, and what replaces that token.

    surroundings: token ids before and after the placeholder that are replaced with it, if present.
    """

    placeholder: int
    surroundings: tuple[list[int], list[int]]
    segments: Sequence[Sequence[int] | MediaSpan | PlaceSpan]


class ConversationMedia:
    """The media of one conversation.

    Args:
        reader: reads the media; None: the model takes text only.
        request: counts their cost.
        tenant: owner of the conversation.
        replace_damaged: as in `PromptBuilder.build`.
    """

    def __init__(
        self,
        reader: MediaReader | None,
        request: RequestMedia,
        *,
        tenant: str = "",
        replace_damaged: ReplaceDamaged | None = None,
    ) -> None:
        self._reader = reader
        self._request = request
        self._tenant = tenant
        self._replace_damaged = replace_damaged
        self.placed: list[Placed] = []

    def read(self, turn: Turn) -> Turn:
        """Read the media of a turn.

        Media that the model does not take are replaced by text; damaged media are too, where that is allowed.
        """
        if not turn.media:
            return turn
        if self._reader is None:
            kind = turn.media[0].kind
            raise UsageError(
                f"this model takes text only, and the conversation has a {kind}",
                hint=EARS_HINT if kind == "sound" else None,
            )
        pieces: list[Piece] = []
        for piece in turn.pieces:
            if isinstance(piece, tuple):
                pieces.append(piece)
                continue
            try:
                content = piece if isinstance(piece, Content) else self._reader.read(piece)
                text = self._reader.as_text(content, self._tenant, self._request)
                if text is None:
                    segments = self._reader.segments(content, self._tenant, self._request)
                    self._request.add_tokens(sum(map(_num_positions, segments)))
                    self.placed.append(
                        Placed(
                            self._reader.placeholder(content), self._reader.surroundings(content), segments
                        )
                    )
            except BadMedia as error:
                text = None if self._replace_damaged is None else self._replace_damaged(piece, error)
                if text is None:
                    raise
            pieces.append(content if text is None else (True, text))
        all_text, pieces_left = joined(pieces)
        return replace(turn, content=all_text, pieces=pieces_left)

    @property
    def placeholders(self) -> list[int]:
        """The template's tokens for the media, in their order."""
        return [one.placeholder for one in self.placed]

    def fill(self, prompt: Prompt, max_tokens: int | None) -> Prompt:
        """Put the media in place of the template's placeholders.

        Only the template can have written a placeholder: a caller's text never becomes a control token, and the tokens
        of an answer with a placeholder are not used again.
        """
        if not (media := self.placed):
            return prompt
        token_ids, placeholders = list(prompt.token_ids or ()), self.placeholders
        known = set(placeholders)
        places = [at for at, token_id in enumerate(token_ids) if token_id in known]
        if [token_ids[at] for at in places] != placeholders:
            raise UsageError(
                f"the conversation has {len(media)} pictures, sounds and videos, and this model's chat template "
                f"writes {len(places)} placeholders for them",
                hint="put them in user messages",
            )
        segments: list[Sequence[int] | MediaSpan] = []
        num_placed = end = 0
        for at, one in zip(places, media, strict=True):
            before, after = one.surroundings
            start, stop = at - len(before), at + 1 + len(after)
            if start < end or token_ids[start:stop] != [*before, token_ids[at], *after]:
                start, stop = at, at + 1
            for segment in (token_ids[end:start], *one.segments):
                segments.append(placed := segment(num_placed) if callable(segment) else segment)
                num_placed += _num_positions(placed)
            end = stop
        filled = Prompt.of(*segments, token_ids[end:])
        num_tokens = len(filled.token_ids or ())
        if max_tokens is not None and num_tokens > max_tokens:
            raise PromptTooLong.of(num_tokens, max_tokens + 1)
        return replace(prompt, token_ids=filled.token_ids, spans=filled.spans)


def with_transcripts(
    reader: MediaReader | None, messages: Sequence[Message], tenant: str, request: RequestMedia
) -> list[Message]:
    """A conversation with sounds replaced by transcripts, if the model takes them as text.

    A damaged sound stays for `build` to refuse or replace. Transcripts are cached by sound.

    Raises:
        UsageError: the sounds together are too long.   Overloaded: too many are waiting to be transcribed.
    """

    def heard(part: object) -> object:
        sound = part.get("audio") if isinstance(part, Mapping) else None
        if reader is None or not isinstance(sound, Audio):
            return part
        try:
            text = reader.as_text(reader.read(sound), tenant, request)
        except BadMedia:
            return part
        return part if text is None else {"type": "text", "text": text}

    return [
        {**message, "content": list(map(heard, message["content"]))}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _num_positions(segment: Sequence[int] | MediaSpan | PlaceSpan) -> int:
    if callable(segment):  # at the start of a prompt it fills the most
        segment = segment(0)
    return segment.num_positions if isinstance(segment, MediaSpan) else len(segment)
