"""Chooses the tokens of the next step, and the sequences that wait.

    submitted -> waiting -> prefill, chunk by chunk -> decode, a token in every step -> finished
                    ^                                     |
                    └── preempted: its blocks are needed ─┘

- Every decoding sequence gets its one token in every step. Prompts share the chunk: tenants in equal parts, and a
  tenant's prompts in order of arrival. A chunk may take seconds while weights are streamed, so prompts get at most
  about half of the time while others decode (`PromptTurns`). Rows of media are made between steps, so that a prompt
  waits for them as long as one step at most (`_may_make`).
- A sequence starts when there are KV blocks for its tokens, plus one more for every running sequence; it takes further
  blocks one by one. When none are left, the youngest sequence is preempted: it gives up everything and waits again, to
  be recomputed from its tokens, so its answer is the same. The oldest one is never preempted.
- A sequence whose prefix another one is computing waits for it instead of computing the prefix a second time.
- Among waiting sequences, the first one of the tenant with the fewest running goes next. If there is no room for it,
  none behind it may pass, so it gets its turn.

A decoding sequence may run proposed tokens behind its own (`drafts/drafter.py`). They count only if the sampler chooses
them, so `commit` comes after sampling: what was computed for a rejected token is overwritten and never published. A
recurrent state cannot be overwritten, so it is saved before proposals run, and restored if one is rejected; the
confirmed tokens then run again.

Elsewhere: `prefix.py` finds prefixes; `engine.py` runs the step; `answers.py` confirms proposals; `drafts/governor.py`
says whether they pay.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy.engine.drafts.drafter import Drafter
from argosy.engine.drafts.governor import Governor, Outcome
from argosy.engine.prefix import Prefix, PrefixCache
from argosy.engine.sequence import Sequence, WaitReason
from argosy.errors import ArgosyError
from argosy.model.step import Addition, Overrides, Step

# KV blocks of a prompt loaded from files in one step: a moment's work if others wait for it, more otherwise.
LOADED_BESIDE_OTHERS, LOADED_ALONE = 8, 128
# Seconds of encoding between two steps, or the duration of a decode step if that is longer. Long enough that switching
# costs little; short enough that no stream visibly pauses, and that a new prompt starts soon.
MAKING_S = 0.02
_NONE_CONFIRMED: Mapping[Sequence, int] = MappingProxyType({})
_SPARE_COLUMNS = 8  # this many blocks can be added to a block table before a new table is made


class Scheduled(NamedTuple):
    """A step, and the sequences that it produces next tokens for."""

    step: Step
    sequences: list[Sequence]  # rows of `step.block_table`
    counts: list[int] | None  # tokens of each sequence; None: one each, and all of them decode
    # In the order of `step.wanted`: one row each, and one more for every proposal. A text whose hidden states are
    # pooled wants no logits.
    ready: list[Sequence]
    proposals: dict[Sequence, list[int]]  # the last tokens of some decoding sequences, not confirmed yet

    def rows(self, logits: NDArray[np.float32]) -> list[tuple[Sequence, NDArray[np.float32], ListLike[int]]]:
        """Divide logits [rows, vocab_size] among the ready sequences: (sequence, its rows, its proposals)."""
        divided: list[tuple[Sequence, NDArray[np.float32], ListLike[int]]] = []
        at = 0
        for sequence in self.ready:
            proposals = self.proposals.get(sequence, ()) if self.proposals else ()
            end = at + 1 + len(proposals)
            divided.append((sequence, logits[at:end], proposals))
            at = end
        return divided


class CannotRun(Exception):
    """One sequence cannot run. No other sequence is affected, and nothing has run."""

    def __init__(self, sequence: Sequence, error: ArgosyError) -> None:
        super().__init__(str(error))
        self.sequence = sequence
        self.error = error


class PromptTurns:
    """Gives prompts at most about half of the time while others decode.

    A step with prompt tokens takes longer than one without. The difference is owed to the decoding sequences: no prompt
    continues until steps without prompts have made up for it. Time for rows of media is owed likewise, but only more
    rows wait for it: a prompt never waits because rows were made.
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
        """Count work for rows of media between two steps, while others decode."""
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


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Arrays that stay the same from step to step while the same sequences decode and there are no prompts."""

    sequences: list[Sequence]
    rows: NDArray[np.int32]  # 0, 1, 2 ...
    wanted: NDArray[np.int64]  # the same
    is_decode: NDArray[np.bool_]
    block_table: NDArray[np.int32]
    state_slots: NDArray[np.int32] | None
    shifts: NDArray[np.float32] | None  # rotary positions' shifts; None: no sequence has media

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _Decoding:
        count = len(sequences)
        return cls(
            sequences,
            np.arange(count, dtype=np.int32),
            np.arange(count),
            np.ones(count, np.bool_),
            _block_table(sequences, spare=_SPARE_COLUMNS),
            _state_slots(sequences),
            _shifts(sequences),
        )


class Scheduler:
    """Assigns batch tokens, KV blocks and state slots to sequences.

    Args:
        cache: known prefixes, with the KV blocks and slots of the recurrent state that sequences take.
        chunk_tokens: maximum prompt tokens in a step.   max_sequences: maximum running sequences.
        num_axes: axes of the model's rotary embedding.
        drafter: proposes at most `draft_tokens` tokens per sequence and step; None: nothing is proposed.
        governor: lets the drafter propose while that pays; None: always.
        clock: seconds, for `PromptTurns`.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        chunk_tokens: int,
        max_sequences: int,
        num_axes: int = 1,
        drafter: Drafter | None = None,
        draft_tokens: int = 0,
        governor: Governor | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._blocks = cache.blocks
        self._cache = cache
        self._states = cache.states
        self._windows = cache.windows
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences
        self._num_axes = num_axes
        self._drafter = drafter
        self._draft_tokens = draft_tokens
        self._governor = governor
        self._clock = clock
        self._turns = PromptTurns()
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # likewise
        self._coming: dict[bytes, Sequence] = {}  # blocks that running prompts are about to compute
        # The sequence that did not fit, and the number of block releases at that time.
        self._refused: tuple[Sequence, int] | None = None
        self._decoding = _Decoding.of([])
        self._began_at = 0.0
        self._num_steps = 0
        self._has_just_made = False  # rows of media, the last time that prompts could run
        self._made_for: str | None = None  # the tenant for whom rows were made last
        self._making_s = 0.0  # seconds spent on rows of media since `take_making_s`
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def why_waiting(self, sequence: Sequence) -> WaitReason:
        """What a sequence waits for that does not run, as of the last step. Any thread may call this."""
        if sequence.waits_for in self._coming:
            return "prompt"
        refused = self._refused
        has_no_memory = refused is not None and refused[0] in self._waiting
        return "memory" if has_no_memory and len(self._running) < self._max_sequences else "turn"

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda one: one.number)

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished or cancelled sequence and free all it holds."""
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        self._release_followers(sequence)
        if sequence in self._running:
            self._stop(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def reset(self, sequences: Iterable[Sequence]) -> None:
        """Remove all sequences and forget all prefixes, in whatever state an interrupted call left them.

        Args:
            sequences: all that were added; one that a call was moving is in neither list.
        """
        self._waiting, self._running, self._coming = [], [], {}
        self._refused = None
        self._decoding = _Decoding.of([])
        self._blocks.reset()
        if self._states is not None:
            self._states.reset()
        for sequence in sequences:
            sequence.blocks.clear()
            sequence.state_slot = None
            sequence.leader = None
            sequence.followers.clear()
            self._let_go(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Preempt a running sequence: it waits again, and is recomputed from its tokens."""
        self._stop(sequence)
        self.add(sequence)
        self.num_preempted += 1

    @property
    def num_blocks_needed(self) -> int:
        """KV blocks with which each of its sequences can come to its end, one after another."""
        each = (len(one.prompt_ids) + one.max_new_tokens for one in (*self._running, *self._waiting))
        return max((self._blocks.blocks_for(count) for count in each), default=0)

    def resize_kv(self, num_blocks: int) -> None:
        """Have so many KV blocks, between two steps; sequences that hold others wait again, and are recomputed."""
        for sequence in reversed(list(self._running)):
            if max(sequence.blocks, default=-1) >= num_blocks:
                self.preempt(sequence)
        self._blocks.resize(num_blocks)

    def next_step(self) -> Scheduled | None:
        """Returns the next step's tokens. Call it only while `has_work`.

        Sequences whose media have no rows yet have them made a little further first. None: no other can run.

        Raises:
            CannotRun: the rows of a sequence's media cannot be made, or it does not start while nothing else runs.
        """
        self._began_at = self._clock()
        self._num_steps += 1
        while True:
            self._start_waiting()
            if not self._running:  # nothing will give it more room than it has now
                raise self._stuck()
            self._load()
            self._grow()
            decoding = [one for one in self._running if not one.is_prefilling]
            if decoding and len(decoding) == len(self._running):
                proposals = self._propose(decoding)
                if not proposals and not any(_must_rerun(one) for one in decoding):
                    return self._decode()
                return self._gather(_not_computed(decoding), proposals)
            prompts: list[tuple[Sequence, int]] = []
            is_making = False
            if not decoding or self._turns.is_open:
                can_prefill = [one for one in self._running if self._can_prefill(one)]
                waiting = [one for one in can_prefill if _waits_for_rows(one)]
                seer = self._choose_seer(waiting)
                if seer and self._may_make(decoding, has_prompts=len(waiting) < len(can_prefill)):
                    self._make_rows(seer, decoding)
                    is_making = True
                self._has_just_made = is_making
                prompts = self._share_chunk([one for one in can_prefill if not _waits_for_rows(one)])
            if decoding or prompts:
                # A governor compares steps without prompts.
                proposals = {} if self._governor is not None else self._propose(decoding)
                return self._gather(_not_computed(decoding) + prompts, proposals)
            if is_making:
                return None
            # Every running sequence loads from files, and got further, or will start again without them.

    def commit(self, scheduled: Scheduled, confirmed: Mapping[Sequence, int] = _NONE_CONFIRMED) -> None:
        """Count a step's tokens as computed: only now do their keys and values exist for others.

        Args:
            confirmed: how many of its proposals became part of each sequence; none where it is not named.
        """
        size, now = self._blocks.block_tokens, self._clock()
        if scheduled.counts is None:
            for sequence in scheduled.sequences:
                sequence.num_computed += 1
                sequence.computed_at = now
                if not sequence.num_computed % size:
                    self._cache.grown(sequence, sequence.num_computed - 1)
                    if self._windows is not None:
                        self._windows.leave(sequence, sequence.num_computed)
            num_prompt, num_decode = 0, len(scheduled.sequences)
        else:
            num_decode = int(scheduled.step.is_decode.sum())
            num_prompt = scheduled.step.num_tokens - num_decode
            for sequence, count in zip(scheduled.sequences, scheduled.counts, strict=True):
                num_rejected = len(scheduled.proposals.get(sequence, ())) - confirmed.get(sequence, 0)
                if num_rejected and self._states is not None:
                    self._roll_back(sequence)
                    continue
                before = sequence.num_computed
                sequence.num_computed += count - num_rejected
                sequence.computed_at = now
                self._cache.grown(sequence, before)
                if self._windows is not None:
                    self._windows.leave(sequence, sequence.num_computed)
                self._has_come(sequence, sequence.num_computed // size)
        now = self._clock()
        self._turns.count(now - self._began_at, num_prompt=num_prompt, num_decode=num_decode)
        if self._governor is None:
            return
        if num_prompt:
            self._governor.count_other()
            return
        outcomes = {}
        for sequence in scheduled.sequences:
            num_proposed = len(scheduled.proposals.get(sequence, ()))
            num_confirmed = confirmed.get(sequence, 0)
            must_rerun = self._states is not None and num_confirmed < num_proposed
            outcomes[sequence] = Outcome(num_proposed, num_confirmed, must_rerun)
        self._governor.count(outcomes, seconds=now - self._began_at, now=now)

    def failed(self, scheduled: Scheduled) -> None:
        """Record that a step was not computed. Its tokens can run again as if nothing had happened.

        Their keys and values will be written again in place. A sequence with an invalid recurrent state is preempted.
        """
        if self._states is None:
            return
        for sequence in scheduled.sequences:
            assert sequence.state_slot is not None
            if scheduled.proposals.get(sequence):
                self._roll_back(sequence)
            elif self._states.state.position(sequence.state_slot) < 0:
                self.preempt(sequence)

    def _roll_back(self, sequence: Sequence) -> None:
        assert self._states is not None
        assert sequence.state_slot is not None
        self._states.roll_back(sequence.state_slot)

    def fork(self, leader: Sequence) -> list[Sequence]:
        """Let sequences that wait for `leader` to compute their prompt continue from its current position.

        Returns:
            The sequences for which there is room. The others find the prefix in the cache when they start.
        """
        return [one for one in self._release_followers(leader) if self._fork(leader, one)]

    def _release_followers(self, leader: Sequence) -> list[Sequence]:
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.leader = None
        return followers

    def _fork(self, leader: Sequence, follower: Sequence) -> bool:
        num_full, num_more = divmod(leader.num_computed, self._blocks.block_tokens)
        num_own = 1 if num_more else 0
        if len(self._running) >= self._max_sequences or self._blocks.num_available < num_own:
            return False
        if self._states is not None:
            if not self._states.num_free:
                return False
            follower.state_slot = self._states.take()
        self._waiting.remove(follower)
        self._blocks.hold(leader.blocks[:num_full])
        follower.blocks = leader.blocks[:num_full] + self._blocks.take(num_own)
        insort(self._running, follower, key=lambda one: one.number)
        self._cache.copy_beginning(leader, follower)
        self._note_start(follower)
        return True

    # ── choosing sequences ──────────────────────────────────────────────────────────────────────────────────────

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            if self._refused is not None:
                refused, num_releases = self._refused
                if num_releases == self._blocks.num_releases and refused in self._waiting:
                    return
            chosen = self._choose_waiting()
            if chosen is None:
                return
            if not self._start(*chosen):
                self._refused = (chosen[0], self._blocks.num_releases)
                return

    def _stuck(self) -> CannotRun:
        """The error of a sequence that does not start while nothing runs; without it `next_step` would not return."""
        sequence = self._waiting[0]
        if self._refused is not None and self._refused[0] in self._waiting:
            sequence = self._refused[0]
        needed = self._blocks.blocks_for(sequence.num_tokens)
        return CannotRun(
            sequence,
            ArgosyError(
                f"the request cannot start: it needs {needed} KV blocks, and {self._blocks.num_available} of"
                f" {self._blocks.num_blocks} are free while no other runs"
            ),
        )

    def _choose_waiting(self) -> tuple[Sequence, Prefix] | None:
        """The first sequence of the tenant with the fewest running; on a tie, the oldest."""
        running = Counter(one.tenant for one in self._running)
        best: tuple[int, Sequence, Prefix] | None = None
        seen: set[str] = set()
        for sequence in self._waiting:
            if sequence.tenant in seen:
                continue
            if (prefix := self._find(sequence)) is None:
                continue
            seen.add(sequence.tenant)
            if best is None or running[sequence.tenant] < best[0]:
                best = (running[sequence.tenant], sequence, prefix)
        return None if best is None else best[1:]

    def _find(self, sequence: Sequence) -> Prefix | None:
        """The known prefix of a sequence, or None while it waits for another one to compute more of it."""
        if sequence.leader is not None or sequence.waits_for in self._coming:
            return None
        prefix = self._cache.find(sequence)
        sequence.waits_for = prefix.next_key
        if prefix.next_key is None or (owner := self._coming.get(prefix.next_key)) is None:
            return prefix
        self._cache.want_snapshot(owner, prefix.contents)
        return None

    def _start(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Start a waiting sequence; returns False if there is no room."""
        blocks, states = self._blocks, self._states
        if states is not None and not states.num_free:
            return False
        num_more = blocks.blocks_for(sequence.num_tokens) - len(prefix.blocks)
        num_left = len(self._running) + 1 if self._running else 0  # so that every sequence can grow by one
        blocks.hold(prefix.blocks)
        if num_more + num_left > blocks.num_available:
            blocks.give_back(list(prefix.blocks))
            return False
        self._waiting.remove(sequence)
        sequence.blocks = [*prefix.blocks, *blocks.take(num_more)]
        sequence.prefill_until = sequence.num_tokens
        if states is not None:
            sequence.state_slot = states.take()
        insort(self._running, sequence, key=lambda one: one.number)
        self._cache.begin(sequence, prefix)
        self._note_start(sequence)
        for content in prefix.contents[prefix.num_matching : prefix.num_blocks]:
            self._coming.setdefault(content.key, sequence)
        return True

    @staticmethod
    def _note_start(sequence: Sequence) -> None:
        if sequence.scheduled_at is None:  # not one that was preempted
            sequence.scheduled_at = perf_counter()

    def _stop(self, sequence: Sequence) -> None:
        """Stop a running sequence and free all it holds."""
        self._running.remove(sequence)
        if sequence in self._decoding.sequences:  # it gets different blocks if it runs again
            self._decoding = _Decoding.of([])
        self._has_come(sequence, len(sequence.blocks))
        self._cache.stopped(sequence)
        self._blocks.give_back(sequence.blocks)
        if self._states is not None and sequence.state_slot is not None:
            self._states.give_back(sequence.state_slot)
            sequence.state_slot = None
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Forget the progress of a sequence that holds no blocks any more."""
        sequence.num_computed = 0
        sequence.loading = None
        sequence.snapshots_at.clear()
        if sequence.spans is not None:
            sequence.spans.drop_rows()
        for one in (self._drafter, self._governor):
            if one is not None:
                one.forget(sequence)

    def _has_come(self, sequence: Sequence, num_blocks: int) -> None:
        """Stop others from waiting for the first blocks of a sequence."""
        for content in sequence.chain.contents(sequence, 0)[:num_blocks]:
            if self._coming.get(content.key) is sequence:
                del self._coming[content.key]

    def _load(self) -> None:
        """Load known prefixes from files, a part of each."""
        is_alone = all(one.loading is not None for one in self._running)
        at_once = LOADED_ALONE if is_alone else LOADED_BESIDE_OTHERS
        for sequence in list(self._running):
            if sequence.loading is None:
                continue
            if not self._cache.load(sequence, at_once):
                self.preempt(sequence)
            else:
                self._has_come(sequence, sequence.num_computed // self._blocks.block_tokens)

    def _grow(self) -> None:
        """Give each decoding sequence a block for its next token; preempt the youngest sequences if none are left."""
        size = self._blocks.block_tokens
        for sequence in list(self._running):
            if sequence.is_prefilling or sequence.num_tokens <= len(sequence.blocks) * size:
                continue
            while not self._blocks.num_available and sequence in self._running:
                self.preempt(self._running[-1])
            if sequence in self._running:
                sequence.blocks += self._blocks.take(1)
                self._note_growth(sequence)

    def _note_growth(self, sequence: Sequence) -> None:
        same = self._decoding
        if sequence in same.sequences:
            count = len(sequence.blocks)
            if count <= same.block_table.shape[1]:
                same.block_table[same.sequences.index(sequence), :count] = sequence.blocks
            else:
                self._decoding = _Decoding.of([])

    def _propose(self, decoding: list[Sequence]) -> dict[Sequence, list[int]]:
        """Ask the drafter, within the room that is left; nobody is preempted for a proposal.

        An answer whose tokens run again gets none: a step has room for one token of each answer, and its proposals.
        """
        proposals: dict[Sequence, list[int]] = {}
        if self._drafter is None:
            return proposals
        size = self._blocks.block_tokens
        for sequence in decoding:
            if _must_rerun(sequence):
                continue
            room = (len(sequence.blocks) + self._blocks.num_available) * size - sequence.num_tokens
            most = self._draft_tokens
            if self._governor is not None:
                most = self._governor.most(sequence, len(self._running))
            most = min(
                most,
                sequence.max_new_tokens - len(sequence.new_ids) - 1,
                self._cache.tokens_to_snapshot(sequence),
                room,
            )
            if most < 1 or not (proposed := list(self._drafter.propose(sequence, most))[:most]):
                continue
            proposals[sequence] = proposed
            num_more = self._blocks.blocks_for(sequence.num_tokens + len(proposed)) - len(sequence.blocks)
            if num_more > 0:
                sequence.blocks += self._blocks.take(num_more)
                self._note_growth(sequence)
            if self._states is not None:
                assert sequence.state_slot is not None
                self._states.save(sequence.state_slot)
        return proposals

    def _may_make(self, decoding: list[Sequence], *, has_prompts: bool) -> bool:
        """Whether rows of media may be made now: they keep no prompt waiting in two steps in a row.

        So a prompt of one chunk, whenever it comes, waits for one slice at most: the one it came in, or the next.
        """
        if has_prompts and self._has_just_made:
            return False
        return not decoding or self._turns.is_open_for_making

    def _choose_seer(self, waiting: list[Sequence]) -> Sequence | None:
        """The prompt to make rows of media for, among those that wait for theirs.

        The plan has room for one encode and its rows, so the next begins when a step has used them. Tenants take turns.
        """
        for one in self._running:
            if one.spans is not None and one.spans.holds_rows:
                return one if one in waiting else None
        if not waiting:
            return None
        # The oldest of another tenant, if any.
        chosen = min(waiting, key=lambda one: one.tenant == self._made_for)
        self._made_for = chosen.tenant
        return chosen

    def _make_rows(self, sequence: Sequence, decoding: list[Sequence]) -> None:
        """Make rows of a sequence's media for about `MAKING_S`.

        Beside sequences that decode this may take as long as a step of theirs. It ends before a piece of work that
        would take longer, going by the one before.
        """
        slice_s = max(MAKING_S, self._turns.step_s) if decoding else MAKING_S
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
            self._began_at = self._clock()
            self._making_s += self._began_at - begin
            if decoding:
                self._turns.count_making(self._began_at - begin)

    def take_making_s(self) -> float:
        """Seconds spent on rows of media since the last call."""
        seconds, self._making_s = self._making_s, 0.0
        return seconds

    # ── building steps ────────────────────────────────────────────────────────────────────────────────────────

    def _can_prefill(self, sequence: Sequence) -> bool:
        return sequence.is_prefilling and sequence.loading is None

    def _share_chunk(self, prompts: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Number of tokens to run of each prompt: tenants get equal parts, and none gets more than it needs.

        A span of media whose positions see one another runs as a whole. It may need more than its tenant's part, so
        the first prompt gets what it needs before the others share the rest.
        """
        wanted = {sequence: self._chunk_end(sequence) - sequence.num_computed for sequence in prompts}
        reserved: dict[Sequence, int] = {}
        for sequence in prompts[:1]:
            if sequence.spans is not None and sequence.spans.has_both_ways:
                reserved[sequence] = sequence.spans.whole(sequence.num_computed)
        of_tenant = Counter[str]()
        for sequence, count in wanted.items():
            of_tenant[sequence.tenant] += count - reserved.get(sequence, 0)
        left = _equal_parts(of_tenant, self._chunk_tokens - sum(reserved.values()), first=self._num_steps)
        shared = []
        for sequence, count in wanted.items():
            least, at = reserved.get(sequence, 0), sequence.num_computed
            given = least + min(count - least, left[sequence.tenant])
            if sequence.spans is not None:
                given = sequence.spans.cut(at, at + given) - at
            if least < given < count:
                given = self._whole_blocks(sequence, given, least)
            left[sequence.tenant] -= given - least
            if given:
                shared.append((sequence, given))
        return shared

    def _whole_blocks(self, sequence: Sequence, given: int, least: int) -> int:
        """End a part of a prompt after a full block, if it reaches one: a recurrent state is found again only there."""
        at, spans = sequence.num_computed, sequence.spans
        end = at + given - (at + given) % self._blocks.block_tokens
        if self._states is None or end <= at + least or (spans is not None and spans.cut(at, end) != end):
            return given
        return end - at

    @staticmethod
    def _chunk_end(sequence: Sequence) -> int:
        """The position up to which a prompt can run in one step, however much room there is."""
        at, spans = sequence.num_computed, sequence.spans
        stops = [stop for stop in sequence.snapshots_at if stop > at]
        if spans is not None:
            stops = [stop for stop in stops if spans.cut(at, stop) == stop]
        stop = min([sequence.prefill_until, *stops])
        return stop if spans is None else spans.has_rows_until(at, stop)

    def _decode(self) -> Scheduled:
        """One token for every sequence. This step runs most often and must cost next to nothing."""
        if self._decoding.sequences != self._running:
            self._decoding = _Decoding.of(list(self._running))
        same, block_tokens = self._decoding, self._blocks.block_tokens
        positions = [s.num_computed for s in same.sequences]
        slots = [
            s.blocks[at // block_tokens] * block_tokens + at % block_tokens
            for s, at in zip(same.sequences, positions, strict=True)
        ]
        order = np.array(positions, np.int32)
        if self._windows is not None:
            for sequence, at in zip(same.sequences, positions, strict=True):
                if not at % block_tokens:
                    self._windows.reach(sequence, at + 1)
        step = Step(
            token_ids=np.array([s.new_ids[-1] for s in same.sequences], np.int32),
            sequence=same.rows,
            slots=np.array(slots, np.int64),
            block_table=same.block_table,
            is_decode=same.is_decode,
            order=order,
            wanted=same.wanted,
            state_slots=same.state_slots,
            angles=None
            if same.shifts is None
            else np.tile((order + same.shifts).astype(np.float32), (self._num_axes, 1)),
            window_blocks=None if self._windows is None else self._windows.of_block,
        )
        return Scheduled(step, same.sequences, None, same.sequences, {})

    def _gather(self, parts: list[tuple[Sequence, int]], proposals: dict[Sequence, list[int]]) -> Scheduled:
        """Chunks of prompts and what each decoding sequence has not computed yet, with its proposals after it."""
        block_tokens = self._blocks.block_tokens
        sequences, counts = [sequence for sequence, _ in parts], []
        table = _block_table(sequences)
        token_ids: list[int] = []
        orders, slots, ready = [], [], []
        wanted: list[int] = []
        for row, (sequence, num_known) in enumerate(parts):
            start, proposed = sequence.num_computed, proposals.get(sequence, [])
            token_ids += sequence.tokens_from(start, num_known)
            if start + num_known == sequence.num_tokens and sequence.pool is None:
                ready.append(sequence)
                wanted += range(len(token_ids) - 1, len(token_ids) + len(proposed))
            token_ids += proposed
            counts.append(count := num_known + len(proposed))
            if self._windows is not None:
                self._windows.reach(sequence, start + count)
            order = np.arange(start, start + count, dtype=np.int32)
            orders.append(order)
            slots.append(
                table[row, order // block_tokens].astype(np.int64) * block_tokens + order % block_tokens
            )
        step = Step(
            token_ids=np.array(token_ids, np.int32),
            sequence=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            slots=np.concatenate(slots),
            block_table=table,
            is_decode=np.repeat([not sequence.is_prefilling for sequence in sequences], counts),
            order=np.concatenate(orders),
            wanted=np.array(wanted, np.int64),
            state_slots=_state_slots(sequences),
            window_blocks=None if self._windows is None else self._windows.of_block,
        )
        if any(sequence.spans is not None for sequence in sequences):
            step = self._with_media(step, sequences, counts)
        return Scheduled(step, sequences, counts, ready, proposals)

    def _with_media(self, step: Step, sequences: list[Sequence], counts: list[int]) -> Step:
        """Add what media need: rows, additions, angles, and what positions see."""
        angles: list[NDArray[np.float32]] = []
        sees_until: list[NDArray[np.int32]] = []
        rows: list[NDArray[np.int64]] = []
        embeddings: list[NDArray[np.float32]] = []
        additions: dict[int, list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = {}
        first_row = 0
        for sequence, count in zip(sequences, counts, strict=True):
            start, spans = sequence.num_computed, sequence.spans
            if spans is None:
                order = step.order[first_row : first_row + count]
                angles.append(np.tile(order.astype(np.float32), (self._num_axes, 1)))
                sees_until.append(order + np.int32(1))
            else:
                angles.append(spans.angles(start, count))
                sees_until.append(spans.sees_until(start, count))
                for at, made in spans.rows(start, count):
                    own = np.arange(first_row + at, first_row + at + len(made.embeddings))
                    rows.append(own)
                    embeddings.append(made.embeddings)
                    for layer, vectors in made.additions.items():
                        additions.setdefault(layer, []).append((own, vectors))
            first_row += count
        with_spans = [sequence.spans for sequence in sequences if sequence.spans is not None]
        return step._replace(
            angles=np.concatenate(angles, axis=1) if any(one.has_angles for one in with_spans) else None,
            sees_until=np.concatenate(sees_until) if any(one.has_both_ways for one in with_spans) else None,
            overrides=Overrides(np.concatenate(rows), np.concatenate(embeddings)) if rows else None,
            additions=tuple(
                Addition(
                    layer,
                    np.concatenate([own for own, _ in parts]),
                    np.concatenate([vectors for _, vectors in parts]),
                )
                for layer, parts in sorted(additions.items())
            ),
        )


def _not_computed(decoding: list[Sequence]) -> list[tuple[Sequence, int]]:
    """Decoding sequences, each with the number of its tokens that have not run."""
    return [(one, one.num_tokens - one.num_computed) for one in decoding]


def _must_rerun(sequence: Sequence) -> bool:
    """Whether confirmed tokens of an answer run again, because its recurrent state went back."""
    return sequence.num_tokens - sequence.num_computed > 1


def _waits_for_rows(sequence: Sequence) -> bool:
    """Whether its next position belongs to media whose rows are not made."""
    at = sequence.num_computed
    return sequence.spans is not None and sequence.spans.has_rows_until(at, at + 1) == at


def _equal_parts(wanted: Mapping[str, int], total: int, *, first: int) -> dict[str, int]:
    """Divide `total` so that none gets more than it wants, and the smallest part is as large as possible.

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


def _block_table(sequences: list[Sequence], *, spare: int = 0) -> NDArray[np.int32]:
    """int32 [sequences, blocks]; entries beyond a sequence's own are 0."""
    longest = max((len(s.blocks) for s in sequences), default=0)
    table = np.zeros((len(sequences), longest + spare), np.int32)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.blocks)] = sequence.blocks
    return table


def _state_slots(sequences: Iterable[Sequence]) -> NDArray[np.int32] | None:
    """int32 [sequences], or None where no layer has a recurrent state."""
    slots = [sequence.state_slot for sequence in sequences if sequence.state_slot is not None]
    return np.array(slots, np.int32) if slots else None


def _shifts(sequences: Iterable[Sequence]) -> NDArray[np.float32] | None:
    """float32 [sequences]: how far the rotary positions of answers are from their indices; None if all are equal."""
    shifts = [0 if sequence.spans is None else sequence.spans.shift for sequence in sequences]
    return np.array(shifts, np.float32) if any(shifts) else None
