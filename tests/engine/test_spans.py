"""Media spans of a prompt: what a step needs for their positions, where prompts are cut, and how prefixes are found."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from argosy.engine.media.spans import Spans
from argosy.engine.prompt_turns import MAKING_S
from argosy.engine.sequence import Sequence
from argosy.engine.steps import CannotRun
from argosy.errors import ArgosyError, UsageError
from argosy.prompt.media_span import MakeRows, Making, MediaSpan, SpanRows
from argosy.prompt.prompt import Prompt
from tests.engine.scheduling import BLOCK_TOKENS, Rig

HIDDEN, LAYERS, AXES = 3, 4, 3


def span(num_positions: int, number: int = 1, *, made: list[int] | None = None, **more: Any) -> MediaSpan:
    """Make a span whose rows hold `number` and their index."""

    def make_rows() -> SpanRows:
        if made is not None:
            made.append(number)
        rows = np.zeros((num_positions, HIDDEN), np.float32)
        rows[:, 0], rows[:, 1] = number, np.arange(num_positions)
        return SpanRows(rows, {0: rows + 100, 2: rows + 200})

    given = {"kind": "picture", "digest": bytes([number]) * 32, "token_id": 7, "make_rows": make_rows}
    return MediaSpan(num_positions=num_positions, **{**given, **more})


def spans_of(prompt: Prompt) -> Spans:
    return Spans(prompt.spans, hidden_size=HIDDEN, num_layers=LAYERS, num_axes=AXES)


def angles_of_grid(height: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    row, column = np.divmod(np.arange(height * width), width)
    return np.stack([np.zeros_like(row), row, column]).astype(np.float32)


def test_a_prompt_of_segments_has_placeholders_for_media() -> None:
    first, second = span(3), span(2, 2)
    prompt = Prompt.of([1, 2], first, [3], second)
    assert prompt.token_ids == (1, 2, 7, 7, 7, 3, 7, 7)
    assert prompt.spans == ((2, first), (6, second))
    assert Prompt.of([1, 2]) == Prompt((1, 2))


def test_text_after_a_picture_continues_from_its_largest_angle() -> None:
    picture = span(6, angles=angles_of_grid(2, 3), num_angles=3)
    spans = spans_of(Prompt.of([1, 2], picture, [3, 4], picture, [5]))
    time, row, column = spans.angles(0, 17).tolist()
    assert time == [0, 1, *[2] * 6, 5, 6, *[7] * 6, 10]
    assert row == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 7, 7, 8, 8, 8, 10]
    assert column == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8, 9, 10]
    assert spans.shift == -6
    for start in range(17):
        for count in range(1, 18 - start):
            assert np.array_equal(spans.angles(start, count), spans.angles(0, 17)[:, start : start + count])


def test_only_a_span_that_sees_both_ways_sees_ahead_and_is_never_cut() -> None:
    spans = spans_of(Prompt.of([1], span(3, sees_both_ways=True), [2], span(3, 2), [3]))
    assert spans.sees_until(0, 9).tolist() == [1, 4, 4, 4, 5, 6, 7, 8, 9]
    assert [spans.cut(0, end) for end in range(1, 10)] == [1, 1, 1, 4, 5, 6, 7, 8, 9]
    assert [spans.cut(2, end) for end in range(3, 6)] == [2, 4, 5]  # the rest of the span after a prefix hit
    assert [spans.whole(at) for at in range(9)] == [1, 3, 2, 1, 1, 1, 1, 1, 1]


def test_rows_are_made_once_for_all_parts_and_again_after_preemption() -> None:
    made: list[int] = []
    spans = spans_of(Prompt.of([1], span(5, made=made), [2]))
    assert list(spans.rows(0, 1)) == []
    assert spans.make_some(1)
    (places, first), (more_places, second) = *spans.rows(0, 3), *spans.rows(3, 4)
    assert (places.tolist(), more_places.tolist()) == ([1, 2], [0, 1, 2])
    assert first.embeddings[:, 1].tolist() == [0, 1]
    assert second.embeddings[:, 1].tolist() == [2, 3, 4]
    assert second.additions[2][:, 1].tolist() == [202, 203, 204]
    assert made == [1]
    assert spans.has_rows_until(0, 7) == 1
    assert spans.make_some(1)
    assert made == [1, 1]


def test_tokens_in_a_span_keep_their_own_embeddings() -> None:
    picture = span(6, tokens={2: 8, 5: 9})
    prompt = Prompt.of([1], picture, [3])
    assert prompt.token_ids == (1, 7, 7, 8, 7, 7, 9, 3)
    spans = spans_of(prompt)
    for start in range(8):
        for end in range(start + 1, 9):
            assert spans.make_some(1)
            found = list(spans.rows(start, end - start))
            expected = [at for at in (1, 2, 4, 5) if start <= at < end]
            assert [start + at for places, _ in found for at in places] == expected
            for _, made in found:
                assert made.embeddings[:, 1].tolist() == [at - 1 for at in expected]
                assert made.additions[2][:, 1].tolist() == [at + 199 for at in expected]
            assert spans.holds_rows != (start < 7 <= end)  # the last token of a span frees its rows


def made_slowly(num_pieces: int, num_positions: int, log: list[str]) -> MakeRows:
    """Rows that take `num_pieces` pieces of work; `log` hears of each, and of their end."""

    def make() -> Generator[None, None, SpanRows]:
        try:
            for piece in range(num_pieces):
                log.append(f"piece {piece}")
                yield
            log.append("made")
            return SpanRows(np.ones((num_positions, HIDDEN), np.float32))
        finally:
            log.append("closed")

    return make


def test_rows_are_made_piece_by_piece_and_nothing_goes_beyond_them() -> None:
    log: list[str] = []
    spans = spans_of(Prompt.of([1], span(3, make_rows=made_slowly(2, 3, log)), [2], span(2, 2), [3]))
    assert [spans.has_rows_until(at, 8) for at in range(8)] == [1, 1, 2, 3, 5, 5, 6, 8]
    assert [spans.make_some(1) for _ in range(4)] == [False, False, True, True]
    assert log == ["piece 0", "piece 1", "made", "closed"]
    assert [spans.has_rows_until(at, 8) for at in (0, 2, 4)] == [5, 5, 5]
    assert spans.make_some(5)
    assert spans.has_rows_until(0, 8) == 8


def test_rows_that_are_not_needed_any_more_are_not_made_further() -> None:
    log: list[str] = []
    spans = spans_of(Prompt.of(span(3, make_rows=made_slowly(9, 3, log)), span(2, 2)))
    assert not spans.make_some(0)
    assert spans.make_some(3)  # a hit of the prefix cache went past the first
    assert log == ["piece 0", "closed"]
    assert not spans.make_some(0)
    spans.drop_rows()
    assert log == ["piece 0", "closed"] * 2
    assert spans.has_rows_until(3, 5) == 3


def test_the_share_of_a_span_that_is_made_is_told_as_long_as_it_is_being_made() -> None:
    def make() -> Making:
        yield None  # nothing is known yet
        yield 0.25
        yield None
        yield 0.75
        return SpanRows(np.ones((3, HIDDEN), np.float32))

    spans = spans_of(Prompt.of([1], span(3, make_rows=make), span(2, 2), [3]))
    told = [spans.share_made]
    while not spans.make_some(1):
        told.append(spans.share_made)
    assert [*told, spans.share_made] == [None, 0.0, 0.25, 0.25, 0.75, None]
    assert spans.make_some(4)
    assert spans.share_made is None


class Pieces:
    """A clock on which each piece of work for rows takes `piece_s`, and each step `step_s`."""

    def __init__(self, piece_s: float) -> None:
        self.now, self.piece_s = 0.0, piece_s

    def __call__(self) -> float:
        return self.now

    def rows(self, num_pieces: int, num_positions: int) -> MakeRows:
        def make() -> Generator[None, None, SpanRows]:
            for _ in range(num_pieces):
                self.now += self.piece_s
                yield
            return SpanRows(np.ones((num_positions, HIDDEN), np.float32))

        return make


def test_others_decode_while_rows_are_made_and_get_half_of_the_time() -> None:
    clock = Pieces(piece_s=0.004)
    rig = Rig(chunk_tokens=16, num_blocks=128, clock=clock)
    rig.scheduler._steps._num_axes = AXES
    talker = rig.sequence(4, max_new=60)
    rig.add(talker)
    rig.step()
    prompt = Prompt.of([1], span(3, make_rows=clock.rows(100, 3)), [2])
    assert prompt.token_ids is not None
    seer = rig.sequence_of(list(prompt.token_ids), max_new=1, spans=spans_of(prompt))
    rig.add(seer)
    waits = []
    while seer not in rig.finished:
        before = clock.now
        scheduled = rig.scheduler.next_step()
        assert scheduled is not None
        assert talker in scheduled.sequences  # in every step
        waits.append(clock.now - before)
        clock.now += 0.01  # the step itself
        rig.scheduler.commit(scheduled)
        for one in scheduled.ready:
            one.new_ids.append(1)
            if one is seer:
                rig.end(seer)
    assert max(waits) <= MAKING_S
    assert 0.4 <= sum(waits) / clock.now <= 0.6
    assert seer.num_computed == 0  # it ended, and gave everything back


def test_a_step_gives_way_after_a_while_if_there_are_only_rows_to_make() -> None:
    clock = Pieces(piece_s=0.009)
    rig = Rig(chunk_tokens=16, clock=clock)
    rig.scheduler._steps._num_axes = AXES
    prompt = Prompt.of(span(3, make_rows=clock.rows(25, 3)), [2])
    assert prompt.token_ids is not None
    rig.add(one := rig.sequence_of(list(prompt.token_ids), max_new=1, spans=spans_of(prompt)))
    given_way = 0
    while (scheduled := rig.scheduler.next_step()) is None:
        given_way += 1
    assert given_way == 12  # after two pieces each
    assert scheduled.sequences == [one]
    assert rig.scheduler.making.take_making_s() == pytest.approx(0.225)
    assert rig.scheduler.making.take_making_s() == 0


def test_a_text_that_comes_while_rows_are_made_runs_in_the_next_step() -> None:
    clock = Pieces(piece_s=0.01)
    rig = Rig(chunk_tokens=16, clock=clock)
    rig.scheduler._steps._num_axes = AXES
    prompt = Prompt.of(span(3, make_rows=clock.rows(1000, 3)), [2])
    assert prompt.token_ids is not None
    rig.add(rig.sequence_of(list(prompt.token_ids), spans=spans_of(prompt)))
    assert rig.scheduler.next_step() is None
    rig.add(text := rig.sequence(5))
    before = clock.now
    scheduled = rig.scheduler.next_step()
    assert scheduled is not None
    assert scheduled.sequences == [text]
    assert scheduled.ready == [text]
    assert clock.now == before  # and no more rows are made first


def test_one_encode_is_in_progress_at_a_time_and_tenants_take_turns() -> None:
    clock = Pieces(piece_s=0.009)
    rig = Rig(chunk_tokens=2, num_blocks=128, max_sequences=8, clock=clock)
    rig.scheduler._steps._num_axes = AXES
    begun: list[Sequence] = []
    prompts = [Prompt.of([1], span(6, i, make_rows=clock.rows(5, 6)), [2]) for i in range(5)]
    seers = [
        rig.sequence_of(list(prompt.token_ids or ()), max_new=1, spans=spans_of(prompt), tenant=tenant)
        for prompt, tenant in zip(prompts, "aaabb", strict=True)
    ]
    rig.add(*seers)
    while rig.scheduler.has_work:
        scheduled = rig.scheduler.next_step()
        holding = [one for one in seers if one.spans is not None and one.spans.holds_rows]
        assert len(holding) <= 1
        begun += [one for one in holding if one not in begun]
        if scheduled is None:
            continue
        rig.scheduler.commit(scheduled)
        for one in scheduled.ready:
            one.new_ids.append(1)
            rig.end(one)
    assert [one.tenant for one in begun] == list("ababa")
    assert [one for one in begun if one.tenant == "a"] == seers[:3]


DECODE_S, PROMPT_S = 0.03, 0.05


def first_token_s(arrival_s: float, *, piece_s: float, has_picture: bool, has_talker: bool) -> float:
    """How long a short text waits for its first token, if it comes at a time of its own; checks the gaps of others."""
    clock = Pieces(piece_s)
    rig = Rig(chunk_tokens=16, num_blocks=128, clock=clock)
    rig.scheduler._steps._num_axes = AXES
    if has_talker:
        rig.add(talker := rig.sequence(4, max_new=200))
        rig.step()
    if has_picture:
        prompt = Prompt.of([1], span(3, make_rows=clock.rows(10_000, 3)), [2])
        assert prompt.token_ids is not None
        rig.add(rig.sequence_of(list(prompt.token_ids), spans=spans_of(prompt)))
    text = rig.sequence(5)
    while True:
        if text not in rig.sequences and (clock.now >= arrival_s or not rig.scheduler.has_work):
            clock.now = max(clock.now, arrival_s)
            rig.add(text)
        before = clock.now
        if (scheduled := rig.scheduler.next_step()) is None:
            continue
        assert not has_talker or talker in scheduled.sequences
        is_prompt = not scheduled.step.is_decode.all()
        assert clock.now - before <= max(MAKING_S, DECODE_S, piece_s) + 1e-9
        clock.now += DECODE_S + is_prompt * PROMPT_S
        rig.scheduler.commit(scheduled)
        if text in scheduled.ready:
            return clock.now - arrival_s
        for one in scheduled.ready:
            one.new_ids.append(1)


@pytest.mark.covering(1)
@pytest.mark.parametrize("has_talker", [False, True])
@pytest.mark.parametrize("piece_s", [0.001, 0.007, 0.025])
def test_a_picture_delays_the_first_token_of_a_text_by_at_most_one_step(
    piece_s: float, has_talker: bool
) -> None:
    arrivals = np.linspace(0.5, 0.9, 201).tolist()
    without, beside = (
        [
            first_token_s(arrival_s, piece_s=piece_s, has_picture=has_picture, has_talker=has_talker)
            for arrival_s in arrivals
        ]
        for has_picture in (False, True)
    )
    assert max(without) < max(beside)
    # Arrivals 2 ms apart may miss the longest wait by as much.
    assert max(beside) <= max(without) + DECODE_S + 0.002


def test_a_cancelled_sequence_makes_no_more_rows() -> None:
    log: list[str] = []
    clock = Pieces(piece_s=0.0)
    rig = Rig(chunk_tokens=16, clock=clock)
    prompt = Prompt.of(span(3, make_rows=made_slowly(1000, 3, log)), [2])
    assert prompt.token_ids is not None
    rig.add(one := rig.sequence_of(list(prompt.token_ids), spans=spans_of(prompt)))
    ticks = itertools.count()
    rig.scheduler.making._clock = rig.scheduler._clock = lambda: MAKING_S * next(ticks)
    assert rig.scheduler.next_step() is None
    rig.end(one)
    assert log[-1] == "closed"
    assert len(log) < 10
    assert not rig.scheduler.has_work


@pytest.mark.parametrize("chunk_tokens", [6, 8, 100])
@pytest.mark.parametrize("sees_both_ways", [False, True])
def test_a_step_has_the_rows_of_its_part_of_a_prompt(chunk_tokens: int, sees_both_ways: bool) -> None:
    picture = span(6, angles=angles_of_grid(2, 3), num_angles=3, sees_both_ways=sees_both_ways)
    prompt = Prompt.of([1, 2, 3], picture, [4, 5], picture, [6])
    assert prompt.token_ids is not None
    spans = spans_of(prompt)
    rig = Rig(chunk_tokens=chunk_tokens)
    rig.scheduler._steps._num_axes = AXES
    one = rig.sequence_of(list(prompt.token_ids), spans=spans)
    rig.add(rig.sequence(3), one, rig.sequence(9, first_id=50))
    num_rows = 0
    while one.num_computed < 18:
        start = one.num_computed
        step = (scheduled := rig.step()).step
        if one not in scheduled.sequences:
            continue
        own = np.flatnonzero(step.sequence == scheduled.sequences.index(one))
        assert np.array_equal(step.order[own], np.arange(start, start + len(own)))
        assert step.angles is not None
        assert np.array_equal(step.angles[:, own], spans.angles(start, len(own)))
        others = np.setdiff1d(np.arange(step.num_tokens), own)
        assert (step.angles[:, others] == step.order[others]).all()
        if sees_both_ways:
            assert step.sees_until is not None
            assert np.array_equal(step.sees_until[own], spans.sees_until(start, len(own)))
            assert (step.sees_until[others] == step.order[others] + 1).all()
            assert (step.sees_until <= start + len(own))[own].all()  # every position it sees is in the step
        else:
            assert step.sees_until is None
        is_media = step.token_ids[own] == picture.token_id
        if not is_media.any():
            assert step.overrides is None
            assert step.additions == ()
            continue
        assert step.overrides is not None
        assert step.overrides.rows.tolist() == own[is_media].tolist()
        index = (step.order[own[is_media]] - 3) % 8
        assert step.overrides.embeddings[:, 1].tolist() == index.tolist()
        assert [addition.layer for addition in step.additions] == [0, 2]
        for addition in step.additions:
            assert addition.rows.tolist() == own[is_media].tolist()
            assert addition.vectors[:, 1].tolist() == (index + 100 * (1 + addition.layer // 2)).tolist()
        num_rows += int(is_media.sum())
    assert num_rows == 12
    while rig.scheduler.has_work:  # answers continue from the shifted angle
        step = (scheduled := rig.step()).step
        if one in scheduled.sequences:
            own = scheduled.sequences.index(one)
            assert step.angles is not None
            assert step.angles[:, own].tolist() == [float(step.order[own] - 6)] * AXES


def test_a_span_that_runs_as_a_whole_gets_its_turn_beside_other_prompts() -> None:
    rig = Rig(chunk_tokens=8, num_blocks=128)
    prompt = Prompt.of([1], span(8, sees_both_ways=True), [2])
    assert prompt.token_ids is not None
    one = rig.sequence_of(list(prompt.token_ids), tenant="a", spans=spans_of(prompt))
    rig.add(rig.sequence(40, tenant="b", first_id=100), one, rig.sequence(40, tenant="c", first_id=200))
    rig.run()
    assert one in rig.finished


def test_text_alone_needs_no_angles_overrides_or_additions() -> None:
    rig = Rig()
    rig.add(rig.sequence(5))
    step = rig.step().step
    assert (step.angles, step.sees_until, step.overrides, step.additions) == (None, None, None, ())


def contents(prompt: Prompt) -> list[bytes]:
    rig = Rig(reuse=True)
    assert prompt.token_ids is not None
    one = rig.sequence_of(list(prompt.token_ids), spans=spans_of(prompt) if prompt.spans else None)
    return [content.key for content in one.chain.contents(one, len(prompt.token_ids) // BLOCK_TOKENS)]


def test_two_pictures_with_the_same_placeholders_share_no_block() -> None:
    text = [1, 2, 3, 4, 5, 6]
    one, same, other = (contents(Prompt.of(text, span(6, number), text)) for number in (1, 1, 2))
    sound = contents(Prompt.of(text, span(6, 1, kind="sound"), text))
    placeholders = contents(Prompt.of(text, [7] * 6, text))
    assert one == same
    for different in (other, sound, placeholders):
        assert different[0] == one[0]  # the text before it
        assert not set(different[1:]) & set(one)


def test_a_prefix_with_a_picture_is_found_without_making_its_rows_again() -> None:
    made: list[int] = []
    rig = Rig(reuse=True, num_blocks=64, chunk_tokens=64)

    def ask(number: int) -> int:
        prompt = Prompt.of([1, 2], span(8, number, made=made), [3, 4, 5])
        assert prompt.token_ids is not None
        one = rig.sequence_of(list(prompt.token_ids), 2, spans=spans_of(prompt))
        rig.add(one)
        rig.run()
        assert one.cached_tokens is not None
        return one.cached_tokens

    assert [ask(1), ask(1), ask(2), ask(2), ask(1)] == [0, 12, 0, 12, 12]
    assert made == [1, 2]


@pytest.mark.parametrize("sees_both_ways", [False, True])
def test_a_preempted_sequence_makes_its_rows_again(sees_both_ways: bool) -> None:
    made: list[int] = []
    rig = Rig(num_blocks=12, chunk_tokens=16)
    older = rig.sequence(8, max_new=24)
    prompt = Prompt.of([1], span(9, made=made, sees_both_ways=sees_both_ways), [2])
    assert prompt.token_ids is not None
    one = rig.sequence_of(list(prompt.token_ids), 20, spans=spans_of(prompt))
    rig.add(older, one)
    rig.run()
    assert rig.scheduler.num_preempted > 0
    assert len(made) > 1
    assert len(one.new_ids) == 20


def test_rows_that_cannot_be_made_end_only_their_sequence() -> None:
    def fails() -> SpanRows:
        raise ArgosyError("the picture cannot be read")

    rig = Rig(chunk_tokens=64)
    prompt = Prompt.of([1], span(4, make_rows=fails), [2])
    assert prompt.token_ids is not None
    bad, good = rig.sequence_of(list(prompt.token_ids), spans=spans_of(prompt)), rig.sequence(6)
    rig.add(bad, good)
    assert bad in rig.step().sequences  # the text before the picture
    with pytest.raises(CannotRun) as failed:
        rig.step()
    assert failed.value.sequence is bad
    rig.end(bad)
    rig.run()
    assert good in rig.finished
    rig.require_sound()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (SpanRows(np.zeros((4, 2), np.float32)), r"needs float32 rows \[4, 3\], found float32 \[4, 2\]"),
        (SpanRows(np.zeros((4, 3), np.float64)), "found float64"),  # type: ignore[arg-type]
        (SpanRows(np.zeros((4, 3), np.float32), {4: np.zeros((4, 3), np.float32)}), "adds to layer 4"),
        (
            SpanRows(np.zeros((4, 3), np.float32), {0: np.zeros((3, 3), np.float32)}),
            r"found float32 \[3, 3\]",
        ),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(rows: SpanRows, sentence: str) -> None:
    spans = spans_of(Prompt.of(span(4, make_rows=lambda: rows)))
    with pytest.raises(ArgosyError, match=sentence):
        spans.make_some(0)


def test_an_invalid_span_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="at least 1 position, found 0"):
        span(0)
    with pytest.raises(UsageError, match="must have 32 bytes, found 3"):
        span(2, digest=b"abc")
    with pytest.raises(UsageError, match=r"must be \[axes, 2\], found \[3, 4\]"):
        span(2, angles=np.zeros((3, 4), np.float32))
    with pytest.raises(UsageError, match="angles on 2 axes, and this model rotates on 3"):
        spans_of(Prompt.of(span(2, angles=np.zeros((2, 2), np.float32))))
