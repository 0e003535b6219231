"""Sequences with synthetic media spans: random vectors stand in for the output of an encoder.

    seed + config.json  ->  MediaSequence  ->  Spans for `NumpyModel`
                                           ->  Pieces of steps, for any chunk that cuts no span

The vectors of a picture or sound replace the embeddings of its tokens. A picture also has positions on three axes, if
the model uses three, and vectors that are added after the first layers (Qwen3-VL's deepstack). Its tokens may see the
whole picture, in both directions. All values are exact in float32.

Elsewhere: `Spans` in `tests/models/numpy_model.py` defines the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tests.models.numpy_model import AXES, Spans
from tests.models.tiny import RawConfig, text_of

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The fields of a step that describe T tokens of one or more sequences. A part that no token has is absent.

    token_ids, order: int32 [T]; `order` is a token's index in its sequence.
    angles: float32 [axes, T]; None: `order` on every axis.
    sees_until: int32 [T], one more than the last index that a token sees; None: `order` + 1.
    overrides: rows [R] of the T, and float32 [R, hidden], which replaces their embeddings.
    additions: layer, rows [R] of the T, and float32 [R, hidden], which is added to the hidden state after the layer.
    """

    token_ids: NDArray[np.int32]
    order: NDArray[np.int32]
    angles: Floats | None
    sees_until: NDArray[np.int32] | None
    overrides: tuple[Rows, Floats] | None
    additions: tuple[tuple[int, Rows, Floats], ...]


@dataclass(frozen=True, kw_only=True)
class MediaSequence:
    """T tokens, some of them in spans. Arrays are like those of `Pieces`; rows count from the sequence's start."""

    token_ids: NDArray[np.int32]
    spans: tuple[range, ...]
    rows: Rows
    vectors: Floats
    angles: Floats | None
    sees_until: NDArray[np.int32] | None
    additions: Mapping[int, tuple[Rows, Floats]]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def numpy_spans(self) -> Spans:
        return Spans(
            embeddings=(self.rows, self.vectors),
            angles=self.angles,
            sees_until=self.sees_until,
            additions=self.additions,
        )

    def pieces(self, tokens: range) -> Pieces:
        """Return the pieces of a chunk, which must not cut a span."""
        for span in self.spans:
            assert not any(span.start < end < span.stop for end in (tokens.start, tokens.stop)), (
                tokens,
                span,
            )
        part = slice(tokens.start, tokens.stop)
        overrides = _within(self.rows, self.vectors, tokens)
        additions = ((layer, *_within(*added, tokens)) for layer, added in sorted(self.additions.items()))
        return Pieces(
            token_ids=self.token_ids[part],
            order=np.arange(tokens.start, tokens.stop, dtype=np.int32),
            angles=None if self.angles is None else np.ascontiguousarray(self.angles[:, part]),
            sees_until=None if self.sees_until is None else self.sees_until[part],
            overrides=overrides if len(overrides[0]) else None,
            additions=tuple(added for added in additions if len(added[1])),
        )

    def chunks(self, most: int) -> list[range]:
        """Split the sequence into chunks of at most `most` tokens, or of a whole span if it is longer."""
        found, start = [], 0
        while start < self.num_tokens:
            stop = min(start + most, self.num_tokens)
            for span in self.spans:
                if span.start < stop < span.stop:
                    stop = span.start if span.start > start else span.stop
            found.append(range(start, stop))
            start = stop
        return found


def _within(rows: Rows, vectors: Floats, tokens: range) -> tuple[Rows, Floats]:
    is_in = (rows >= tokens.start) & (rows < tokens.stop)
    return rows[is_in] - tokens.start, vectors[is_in]


def media_sequence(
    config: RawConfig,
    seed: int,
    *,
    kinds: Sequence[Literal["picture", "sound"]] = ("picture",),
    sees_both_ways: bool = False,
    num_added_layers: int = 3,
    num_text_before: int | None = None,
) -> MediaSequence:
    """Make a sequence of text, then each span followed by text. Spans may be adjacent. Without kinds it is all text.

    Args:
        config: the model's config.json.
        kinds: the kind of each span, in order.
        sees_both_ways: whether the tokens of a picture see the whole picture.
        num_added_layers: the number of layers after which pictures add vectors, at most the model's layers.
        num_text_before: text tokens before the first span; None: a few.
    """
    text, rng = text_of(config), np.random.default_rng([seed, 17])
    hidden, num_layers = text["hidden_size"], text["num_hidden_layers"]
    positions: list[tuple[float, float, float]] = []
    spans: list[range] = []
    pictures: list[range] = []

    def append_text(num_tokens: int) -> None:
        start = 1 + max((max(place) for place in positions), default=-1)
        positions.extend((start + i,) * 3 for i in range(num_tokens))

    append_text(int(rng.integers(2, 7)) if num_text_before is None else num_text_before)
    for kind in kinds:
        first = len(positions)
        if kind == "sound":
            append_text(int(rng.integers(3, 9)))
        else:
            start = 1 + max(map(max, positions))
            num_frames, height, width = (int(n) for n in rng.integers([1, 2, 2], [3, 4, 5]))
            frame_positions = float(rng.choice([1, 0.5, 6.5]))  # a video's frames may lie between two tokens
            positions += [
                (start + frame_positions * frame, start + y, start + x)
                for frame in range(num_frames)
                for y in range(height)
                for x in range(width)
            ]
            pictures.append(range(first, len(positions)))
        spans.append(range(first, len(positions)))
        append_text(int(rng.integers(0 if len(spans) < len(kinds) else 2, 6)))

    num_tokens = len(positions)
    sees_until = np.arange(1, num_tokens + 1, dtype=np.int32)
    for picture in pictures:
        sees_until[picture.start : picture.stop] = picture.stop
    rows, in_pictures = (
        np.concatenate([np.arange(s.start, s.stop) for s in of] or [[]]).astype(np.int64)
        for of in (spans, pictures)
    )
    added = [
        rng.standard_normal((len(in_pictures), hidden), np.float32)
        for _ in range(min(num_added_layers, num_layers))
    ]
    return MediaSequence(
        token_ids=rng.integers(3, text["vocab_size"], num_tokens, dtype=np.int32),
        spans=tuple(spans),
        rows=rows,
        # As large as rows of the embedding table; see `random_tensors`.
        vectors=rng.standard_normal((len(rows), hidden), np.float32)
        * np.float32(0.5 * hidden**-0.5 if text.get("tie_word_embeddings") else 1.0),
        angles=np.array(positions, np.float32).T if spans and has_axes(text) else None,
        sees_until=sees_until if sees_both_ways and pictures else None,
        additions={layer: (in_pictures, vectors) for layer, vectors in enumerate(added) if len(vectors)},
    )


def has_axes(text: RawConfig) -> bool:
    """Return whether a model's positions have three axes; `text` is the text part of its config."""
    return text["model_type"].removesuffix("_text") + "_text" in AXES


def joined(pieces: Sequence[Pieces]) -> Pieces:
    """Join pieces into a step of several sequences. A part that only some have gets its default in the others."""
    starts = np.cumsum([0, *(len(one.token_ids) for one in pieces)])
    num_axes = max((len(one.angles) for one in pieces if one.angles is not None), default=0)
    has_sight = any(one.sees_until is not None for one in pieces)
    overrides = [
        (at + one.overrides[0], one.overrides[1])
        for at, one in zip(starts, pieces, strict=False)
        if one.overrides is not None
    ]
    return Pieces(
        token_ids=np.concatenate([one.token_ids for one in pieces]),
        order=np.concatenate([one.order for one in pieces]),
        angles=None
        if num_axes == 0
        else np.concatenate([angles_of(one, num_axes) for one in pieces], axis=1),
        sees_until=np.concatenate(
            [one.order + 1 if one.sees_until is None else one.sees_until for one in pieces]
        )
        if has_sight
        else None,
        overrides=None if not overrides else tuple(map(np.concatenate, zip(*overrides, strict=True))),  # type: ignore[arg-type]
        additions=tuple(
            (layer, at + rows, vectors)
            for at, one in zip(starts, pieces, strict=False)
            for layer, rows, vectors in one.additions
        ),
    )


def angles_of(pieces: Pieces, num_axes: int) -> Floats:
    """Return angles, float32 [axes, T]; the default if `pieces` has none."""
    if pieces.angles is not None:
        return pieces.angles
    return np.tile(pieces.order.astype(np.float32), (num_axes, 1))
