"""Divide steps among prompts: a part of the time while other sequences decode, and of each chunk a part for each
prompt.

A step with prompt tokens may take seconds while weights are streamed, so prompts get at most about half of the time.
Rows of media are computed between steps, in slices, so that a prompt waits for them at most as long as for one step.

Elsewhere: `scheduler.py` asks whose turn it is; `media/spans.py` holds a prompt's rows, and says where to cut it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from argosy.engine.sequence import Sequence
from argosy.engine.steps import CannotRun
from argosy.errors import ArgosyError

# Seconds of encoding between two steps, or the duration of a decode step if that is longer. Long enough that
# switching costs little; short enough that no stream visibly pauses and a new prompt starts soon.
MAKING_S = 0.02


class PromptTurns:
    """Gives prompts at most about half of the time while others decode.

    A step with prompt tokens takes longer than one without. Prompts owe the difference to the decoding sequences: no
    prompt continues until steps without prompts have made up for it. Time for rows of media is owed likewise, but only
    further rows wait for it: a prompt never waits because rows were computed.
    """

    def __init__(self) -> None:
        self._owed_s = 0.0
        self._owed_making_s = 0.0
        self._decode_s = 0.0  # duration of the last step without prompts

    @property
    def is_open(self) -> bool:
        return self._owed_s <= 0.0

    @property
    def is_open_for_making(self) -> bool:
        return self.is_open and self._owed_making_s <= 0.0

    @property
    def step_s(self) -> float:
        """The duration of the last step without prompts; 0 before the first."""
        return self._decode_s

    def count_making(self, seconds: float) -> None:
        """Count work on rows of media between two steps, while other sequences decode."""
        self._owed_making_s += seconds

    def count(self, seconds: float, *, num_prompt: int, num_decode: int) -> None:
        """Count a step."""
        if not num_decode:
            self._owed_s = self._owed_making_s = 0.0  # no sequence was kept waiting
        elif num_prompt:
            self._owed_s += max(0.0, seconds - self._decode_s)
        else:
            self._decode_s = seconds
            self._owed_s = max(0.0, self._owed_s - seconds)
            self._owed_making_s = max(0.0, self._owed_making_s - seconds)


class RowMaking:
    """Computes rows of media between steps, for one prompt after another.

    Args:
        turns: knows how long steps take, and counts the time spent here.
        clock: seconds.
    """

    def __init__(self, turns: PromptTurns, clock: Callable[[], float]) -> None:
        self._turns, self._clock = turns, clock
        self._has_just_made = False  # when prompts could last run
        self._made_for: str | None = None  # the tenant whose rows were computed last
        self._making_s = 0.0  # since `take_making_s`

    def make_some(
        self, can_prefill: list[Sequence], running: list[Sequence], *, others_decode: bool
    ) -> float | None:
        """Compute rows for a prompt that may run now and waits for its rows.

        Returns:
            The time at which the work ended, or None if nothing was done.

        Raises:
            CannotRun: the rows of a sequence's media cannot be computed.
        """
        waiting = [one for one in can_prefill if waits_for_rows(one)]
        seer = self._choose_seer(waiting, running)
        ended_at = None
        if seer is not None and self._may_make(
            others_decode=others_decode, has_prompts=len(waiting) < len(can_prefill)
        ):
            ended_at = self._make_rows(seer, others_decode=others_decode)
        self._has_just_made = ended_at is not None
        return ended_at

    def take_making_s(self) -> float:
        """Return the seconds spent on rows since the last call."""
        seconds, self._making_s = self._making_s, 0.0
        return seconds

    def _may_make(self, *, others_decode: bool, has_prompts: bool) -> bool:
        """Whether rows of media may be computed now: they must not delay a prompt at two steps in a row.

        So a prompt of one chunk waits for at most one slice: the slice during which it arrived, or the next.
        """
        if has_prompts and self._has_just_made:
            return False
        return not others_decode or self._turns.is_open_for_making

    def _choose_seer(self, waiting: list[Sequence], running: list[Sequence]) -> Sequence | None:
        """Choose the prompt whose rows of media to compute, among those that wait.

        The plan has room for one encode and its rows, so the next encode begins when a step has used them. Tenants
        take turns.
        """
        for one in running:
            if one.spans is not None and one.spans.holds_rows:
                return one if one in waiting else None
        if not waiting:
            return None
        # The oldest prompt of another tenant, if any.
        chosen = min(waiting, key=lambda one: one.tenant == self._made_for)
        self._made_for = chosen.tenant
        return chosen

    def _make_rows(self, sequence: Sequence, *, others_decode: bool) -> float:
        """Compute rows of a sequence's media for about `MAKING_S`.

        While sequences decode, this may take as long as one of their steps. It ends before a piece of work that,
        judging by the previous piece, would take longer.
        """
        slice_s = max(MAKING_S, self._turns.step_s) if others_decode else MAKING_S
        assert sequence.spans is not None
        begin = now = self._clock()
        try:
            while not sequence.spans.make_some(sequence.num_computed):
                before, now = now, self._clock()
                if now - begin + (now - before) > slice_s:
                    break
        except ArgosyError as error:
            raise CannotRun(sequence, error) from error
        finally:
            ended_at = self._clock()
            self._making_s += ended_at - begin
            if others_decode:
                self._turns.count_making(ended_at - begin)
        return ended_at


def waits_for_rows(sequence: Sequence) -> bool:
    """Whether its next position belongs to media whose rows are not ready."""
    at = sequence.num_computed
    return sequence.spans is not None and sequence.spans.has_rows_until(at, at + 1) == at


def share_chunk(
    prompts: list[Sequence], *, chunk_tokens: int, block_tokens: int | None, first: int
) -> list[tuple[Sequence, int]]:
    """Divide a chunk into tokens for each prompt: tenants get equal parts, and none gets more than it needs.

    A span of media whose positions see one another runs as a whole. It may need more than its tenant's part, so the
    first prompt gets all that it needs before the others share the rest.

    Args:
        chunk_tokens: maximum prompt tokens in a step.
        block_tokens: a part of a prompt ends after a full block of this size, if it reaches one, because a recurrent
            state can be found again only there; None: no layer has a recurrent state.
        first: the number of the tenant whose turn it is to get the remainder first.
    """
    wanted = {sequence: _chunk_end(sequence) - sequence.num_computed for sequence in prompts}
    reserved: dict[Sequence, int] = {}
    for sequence in prompts[:1]:
        if sequence.spans is not None and sequence.spans.has_both_ways:
            reserved[sequence] = sequence.spans.whole(sequence.num_computed)
    of_tenant = Counter[str]()
    for sequence, count in wanted.items():
        of_tenant[sequence.tenant] += count - reserved.get(sequence, 0)
    left = _equal_parts(of_tenant, chunk_tokens - sum(reserved.values()), first=first)
    shared = []
    for sequence, count in wanted.items():
        least, at = reserved.get(sequence, 0), sequence.num_computed
        given = least + min(count - least, left[sequence.tenant])
        if sequence.spans is not None:
            given = sequence.spans.cut(at, at + given) - at
        if least < given < count:
            given = _whole_blocks(sequence, given, least, block_tokens)
        left[sequence.tenant] -= given - least
        if given:
            shared.append((sequence, given))
    return shared


def _whole_blocks(sequence: Sequence, given: int, least: int, block_tokens: int | None) -> int:
    """End a part of a prompt after a full block, if it reaches one."""
    at, spans = sequence.num_computed, sequence.spans
    if block_tokens is None:
        return given
    end = at + given - (at + given) % block_tokens
    if end <= at + least or (spans is not None and spans.cut(at, end) != end):
        return given
    return end - at


def _chunk_end(sequence: Sequence) -> int:
    """Return the position up to which a prompt can run in one step, however much room there is."""
    at, spans = sequence.num_computed, sequence.spans
    stops = [stop for stop in sequence.snapshots_at if stop > at]
    if spans is not None:
        stops = [stop for stop in stops if spans.cut(at, stop) == stop]
    stop = min([sequence.prefill_until, *stops])
    return stop if spans is None else spans.has_rows_until(at, stop)


def _equal_parts(wanted: Mapping[str, int], total: int, *, first: int) -> dict[str, int]:
    """Divide `total` so that no name gets more than it wants, and the smallest part is as large as possible.

    The remainder goes to the names whose turn it is, by `first`.
    """
    parts: dict[str, int] = {}
    names = sorted(wanted)
    for at, name in enumerate(sorted(names, key=lambda name: wanted[name])):
        parts[name] = min(wanted[name], total // (len(names) - at))
        total -= parts[name]
    for at in range(len(names)):
        name = names[(first + at) % len(names)]
        if total and parts[name] < wanted[name]:
            parts[name] += 1
            total -= 1
    return parts
