"""Spans of a prompt: positions filled by a picture, a sound or a part of a video instead of text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from argosy.errors import UsageError
from argosy.media.parts import Audio, Content, Image, Kind, RequestMedia, Video

DIGEST_BYTES = 32
EARS_HINT = "open it with ears (`--ears tiny.en`), and it reads the transcripts of sounds"


@dataclass(frozen=True, slots=True)
class SpanRows:
    """The rows that a model receives at the positions of a span.

    embeddings: float32 [positions, hidden_size], instead of the embeddings of tokens.
    additions: layer -> float32 [positions, hidden_size], added to the hidden state after that layer (deepstack).
    """

    embeddings: NDArray[np.float32]
    additions: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + sum(vectors.nbytes for vectors in self.additions.values())


Making = Generator[float | None, None, SpanRows]
"""Pieces of work that end in a `yield`, between which others may run. A number is the share that is done, 0 to 1."""
MakeRows = Callable[[], SpanRows | Making]
"""Makes the rows of a span, all at once or in pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaSpan:
    """One picture, one sound, or one part of a video in a prompt.

    kind: the kind of media; part of its identity.
    digest: 32 bytes that identify its content, its shape and the model that makes its rows: spans with equal
        digests have equal rows. The prefix cache looks spans up by it.
    num_positions: how many positions it fills.
    token_id: the placeholder that stands for its rows in `Prompt.token_ids`.
    tokens: position in the span -> a token that fills it instead of a row, such as the end of a picture's rows. The
        rows have values there too, which nothing reads.
    make_rows: makes the rows when they are first needed, and again if the prompt is recomputed; never called if the
        whole span is in the prefix cache. An `ArgosyError` ends the request. A generator is closed if its rows are
        no longer needed.
    angles: [axes, positions], rotary positions relative to the span's start, where the preceding text ends; None:
        0, 1, 2 ... on every axis, as for text.
    num_angles: how far the span advances the rotary position of what follows; None: by `num_positions`.
    sees_both_ways: each position sees the whole span, not only what precedes it. Such a span runs in one step.
    """

    kind: Kind
    digest: bytes
    num_positions: int
    token_id: int
    make_rows: MakeRows = field(repr=False)
    angles: NDArray[np.floating[Any]] | None = field(default=None, repr=False)
    num_angles: float | None = None
    sees_both_ways: bool = False
    tokens: Mapping[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.digest) != DIGEST_BYTES:
            raise UsageError(f"the digest of a span must have {DIGEST_BYTES} bytes, found {len(self.digest)}")
        if self.num_positions < 1:
            raise UsageError(f"a span must fill at least 1 position, found {self.num_positions}")
        if self.angles is not None and (
            self.angles.ndim != 2 or self.angles.shape[1] != self.num_positions or not self.angles.shape[0]
        ):
            raise UsageError(
                f"the angles of a span must be [axes, {self.num_positions}], found {list(self.angles.shape)}"
            )

    @property
    def token_ids(self) -> list[int]:
        """What stands for it in `Prompt.token_ids`."""
        return [self.tokens.get(at, self.token_id) for at in range(self.num_positions)]


PlaceSpan = Callable[[int], "Sequence[int] | MediaSpan"]
"""Makes a segment from the position where it begins."""


class MediaReader(Protocol):
    """Turns the media of a conversation into spans for one model. Safe from any thread."""

    def read(self, part: Image | Audio | Video) -> Content:
        """Read the bytes of a part without decoding it.

        Raises:
            UsageError: the model does not take its kind, or the source cannot be read.   BadMedia: it is too large.
        """

    def as_text(self, content: Content, tenant: str, request: RequestMedia) -> str | None:
        """The text that replaces a content that the model does not take; None if it does.

        Args:
            request: counts the request's sounds that become text.

        Raises:
            BadMedia: it is damaged or too large.   Overloaded: too many are waiting for theirs.
            UsageError: the request's sounds together are too long.
        """

    def placeholder(self, content: Content) -> int:
        """The token that the model's chat template writes for it."""

    def surroundings(self, content: Content) -> tuple[list[int], list[int]]:
        """Token ids before and after the placeholder that `segments` replaces along with it, if present."""

    def segments(
        self, content: Content, tenant: str, request: RequestMedia
    ) -> Sequence[Sequence[int] | MediaSpan | PlaceSpan]:
        """The replacement for the placeholder in the prompt: spans and the token ids between them.

        Args:
            tenant: the owner; whatever is cached of the content serves only this tenant.
            request: bounds the tokens and the work of all media of the request.

        Raises:
            BadMedia: it is damaged or too large.   Overloaded: too many are waiting to be encoded.
            PromptTooLong, UsageError: the request's media have too many tokens or take too long.
        """
