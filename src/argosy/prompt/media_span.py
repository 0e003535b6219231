"""Positions of a prompt that a picture, a sound or a part of a video fills, instead of text."""

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
"""Makes the rows of a span, at once or in pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaSpan:
    """One picture, one sound, or one part of a video in a prompt.

    kind: the kind of media; part of its identity.
    digest: 32 bytes that identify its content, its shape and whatever made its rows: spans with equal digests have
        equal rows. Prefixes are found by it.
    num_positions: how many positions it fills.
    token_id: the placeholder that stands for each of them in `Prompt.token_ids`.
    make_rows: makes the rows when they are first needed, and again if the prompt is computed again; never called if the
        whole span is found in the prefix cache. An `ArgosyError` ends the request. A generator is closed if its rows
        are not needed any more.
    angles: [axes, positions], rotary positions relative to that of the span, which is where the text before it ends;
        None: 0, 1, 2 ... on every axis, as text.
    num_angles: how far the rotary position of what follows moves on; None: as far as `num_positions`.
    sees_both_ways: each position sees the whole span, not only what is before it. Such a span runs in one step.
    """

    kind: Kind
    digest: bytes
    num_positions: int
    token_id: int
    make_rows: MakeRows = field(repr=False)
    angles: NDArray[np.floating[Any]] | None = field(default=None, repr=False)
    num_angles: float | None = None
    sees_both_ways: bool = False

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


class MediaReader(Protocol):
    """Turns the media of a conversation into spans for one model. Safe from any thread."""

    def read(self, part: Image | Audio | Video) -> Content:
        """Read a part, without looking inside.

        Raises:
            UsageError: the model does not take its kind, or the source cannot be read.   BadMedia: it is too large.
        """

    def as_text(self, content: Content, tenant: str, request: RequestMedia) -> str | None:
        """The text that stands in the prompt for a content that the model does not take itself; None: it does.

        Args:
            request: counts the sounds of the request that become text.

        Raises:
            BadMedia: it is damaged, or larger than its limits.   Overloaded: too many wait for theirs.
            UsageError: the sounds of the request are too long together.
        """

    def placeholder(self, content: Content) -> int:
        """The token that the model's chat template writes in its place."""

    def surroundings(self, content: Content) -> tuple[list[int], list[int]]:
        """Token ids before and after the placeholder that `segments` replaces with it, where they stand there."""

    def segments(
        self, content: Content, tenant: str, request: RequestMedia
    ) -> Sequence[Sequence[int] | MediaSpan]:
        """The replacement for the placeholder in the prompt: spans, and token ids between them.

        Args:
            tenant: the owner; what is kept of the content serves this tenant alone.
            request: bounds the tokens and the work of all media of the request.

        Raises:
            BadMedia: it is damaged, or larger than its limits.   Overloaded: too many wait to be encoded.
            PromptTooLong, UsageError: the media of the request have too many tokens or take too long.
        """
