"""Choose which sequences run, and the tokens of the next step.

    submitted -> waiting -> prefill, chunk by chunk -> decode, a token in every step -> finished
                    ^                                     |
                    └── preempted: its blocks are needed ─┘

- Every decoding sequence gets its one token in every step. Prompts share the chunk: tenants in equal parts, and a
  tenant's prompts in order of arrival. A chunk may take seconds while weights are streamed, so prompts get at most
  about half of the time while others decode (`prompt_turns.py`).
- A sequence starts when there are KV blocks for its tokens, plus one more for every running sequence; it takes further
  blocks one by one. When none are left, the youngest sequence is preempted: it gives up everything and waits again, to
  be recomputed from its tokens, so its answer is the same. The oldest sequence is never preempted.
- If another sequence is computing the same prefix, a sequence waits for it instead of computing the prefix again.
- Among waiting sequences, the first one of the tenant with the fewest running goes next. If there is no room for it,
  no later sequence may pass it, so it gets its turn.

A decoding sequence may run proposed tokens after its own (`drafts/drafter.py`). Proposals count only if the sampler
chooses them, so `commit` comes after sampling: keys and values of a rejected token are overwritten and never
published. A recurrent state cannot be overwritten, so it is saved before proposals run, and restored if one is
rejected; the confirmed tokens then run again.

Elsewhere: `prefix.py` finds prefixes; `steps.py` builds the step; `engine.py` runs it;
`answers.py` confirms proposals; `drafts/governor.py` says whether they pay.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from types import MappingProxyType

from argosy.engine.drafts.drafts import NO_DRAFTS, Drafts
from argosy.engine.drafts.governor import Outcome
from argosy.engine.prefix import Prefix, PrefixCache
from argosy.engine.prompt_turns import PromptTurns, RowMaking, share_chunk, waits_for_rows
from argosy.engine.sequence import Sequence, WaitReason
from argosy.engine.steps import CannotRun, Scheduled, StepBuilder
from argosy.errors import ArgosyError

# KV blocks of a prompt loaded from files in one step: few if other sequences wait for the step, otherwise more.
LOADED_BESIDE_OTHERS, LOADED_ALONE = 8, 128
_NONE_CONFIRMED: Mapping[Sequence, int] = MappingProxyType({})


class Scheduler:
    """Assigns batch tokens, KV blocks and state slots to sequences.

    Args:
        cache: known prefixes, with the KV blocks and slots of the recurrent state that sequences take.
        chunk_tokens: maximum prompt tokens in a step.   max_sequences: maximum running sequences.
        num_axes: axes of the model's rotary embedding.
        num_earlier: tokens before a step's that its n-grams reach back to.
        drafts: propose tokens after those of decoding sequences.
        clock: seconds, for `PromptTurns`.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        chunk_tokens: int,
        max_sequences: int,
        num_axes: int = 1,
        num_earlier: int = 0,
        drafts: Drafts = NO_DRAFTS,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._blocks = cache.blocks
        self._cache = cache
        self._states = cache.states
        self._windows = cache.windows
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences
        self._drafter, self._draft_tokens, self._governor = drafts.drafter, drafts.most, drafts.governor
        self._clock = clock
        self._turns = PromptTurns()
        self.making = RowMaking(self._turns, clock)
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._coming: dict[bytes, Sequence] = {}  # blocks that running prompts are about to compute
        # The sequence that did not fit, and the number of block releases at that time.
        self._refused: tuple[Sequence, int] | None = None
        self._steps = StepBuilder(cache.blocks.block_tokens, cache.windows, num_axes, num_earlier)
        self._began_at = 0.0
        self._num_steps = 0
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
        """Return the reason why a sequence is waiting, as of the last step. Any thread may call this."""
        if sequence.waits_for in self._coming:
            return "prompt"
        refused = self._refused
        has_no_memory = refused is not None and refused[0] in self._waiting
        return "memory" if has_no_memory and len(self._running) < self._max_sequences else "turn"

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda one: one.number)

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished or cancelled sequence and free everything that it holds."""
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        self._release_followers(sequence)
        if sequence in self._running:
            self._stop(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def reset(self, sequences: Iterable[Sequence]) -> None:
        """Remove all sequences and forget all prefixes, whatever state an interrupted call left.

        Args:
            sequences: all sequences that were added; a sequence that a call was moving is in neither list.
        """
        self._waiting, self._running, self._coming = [], [], {}
        self._refused = None
        self._steps.forget()
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
        """Preempt a running sequence: it waits again and is recomputed from its tokens."""
        self._stop(sequence)
        self.add(sequence)
        self.num_preempted += 1

    @property
    def num_blocks_needed(self) -> int:
        """Return the number of KV blocks with which its sequences can finish one after another."""
        each = (len(one.prompt_ids) + one.max_new_tokens for one in (*self._running, *self._waiting))
        return max((self._blocks.blocks_for(count) for count in each), default=0)

    def resize_kv(self, num_blocks: int) -> None:
        """Change the number of KV blocks between two steps; sequences that hold removed blocks wait again and are
        recomputed.
        """
        for sequence in reversed(list(self._running)):
            if max(sequence.blocks, default=-1) >= num_blocks:
                self.preempt(sequence)
        self._blocks.resize(num_blocks)

    def next_step(self) -> Scheduled | None:
        """Return the next step's tokens. Call it only while `has_work`.

        First computes some more rows for a sequence whose media lack them. Returns None if no other sequence can run.

        Raises:
            CannotRun: the rows of a sequence's media cannot be computed, or the sequence cannot start although nothing
            else runs.
        """
        self._began_at = self._clock()
        self._num_steps += 1
        while True:
            self._start_waiting()
            if not self._running:  # the sequence will never get more room than now
                raise self._stuck()
            self._load()
            self._grow()
            decoding = [one for one in self._running if not one.is_prefilling]
            if decoding and len(decoding) == len(self._running):
                proposals = self._propose(decoding)
                if not proposals and not any(_must_rerun(one) for one in decoding):
                    return self._steps.decode(self._running)
                return self._steps.gather(_not_computed(decoding), proposals)
            prompts: list[tuple[Sequence, int]] = []
            made_at: float | None = None
            if not decoding or self._turns.is_open:
                can_prefill = [one for one in self._running if one.is_prefilling and one.loading is None]
                made_at = self.making.make_some(can_prefill, self._running, others_decode=bool(decoding))
                if made_at is not None:
                    self._began_at = made_at
                prompts = share_chunk(
                    [one for one in can_prefill if not waits_for_rows(one)],
                    chunk_tokens=self._chunk_tokens,
                    block_tokens=None if self._states is None else self._blocks.block_tokens,
                    first=self._num_steps,
                )
            if decoding or prompts:
                # A governor compares steps without prompts.
                proposals = {} if self._governor is not None else self._propose(decoding)
                return self._steps.gather(_not_computed(decoding) + prompts, proposals)
            if made_at is not None:
                return None
            # Every running sequence loads from files: it made progress, or will start again without them.

    def commit(self, scheduled: Scheduled, confirmed: Mapping[Sequence, int] = _NONE_CONFIRMED) -> None:
        """Count a step's tokens as computed: only now do their keys and values exist for others.

        Args:
            confirmed: by sequence, how many of its proposals were confirmed; 0 for a sequence that is not named.
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

        The tokens' keys and values will be rewritten in place. A sequence with an invalid recurrent state is preempted.
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
            The sequences that fit. The others find the prefix in the cache when they start.
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
        """Return the error of a sequence that cannot start although nothing runs; otherwise `next_step` would never
        return.
        """
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
        """Choose the first sequence of the tenant with the fewest running; on a tie, the oldest."""
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
        """Find the known prefix of a sequence; None while another sequence computes more of it."""
        if sequence.leader is not None or sequence.waits_for in self._coming:
            return None
        prefix = self._cache.find(sequence)
        sequence.waits_for = prefix.next_key
        if prefix.next_key is None or (owner := self._coming.get(prefix.next_key)) is None:
            return prefix
        self._cache.want_snapshot(owner, prefix.contents)
        return None

    def _start(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Start a waiting sequence; return False if there is no room."""
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
        if sequence.scheduled_at is None:  # only when it starts for the first time
            sequence.scheduled_at = perf_counter()

    def _stop(self, sequence: Sequence) -> None:
        """Stop a running sequence and free everything that it holds."""
        self._running.remove(sequence)
        self._steps.forget(sequence)
        self._has_come(sequence, len(sequence.blocks))
        self._cache.stopped(sequence)
        self._blocks.give_back(sequence.blocks)
        if self._states is not None and sequence.state_slot is not None:
            self._states.give_back(sequence.state_slot)
            sequence.state_slot = None
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Forget the progress of a sequence that no longer holds blocks."""
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
        """Load a part of each known prefix from files."""
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
                self._steps.note_growth(sequence)

    def _propose(self, decoding: list[Sequence]) -> dict[Sequence, list[int]]:
        """Ask the drafter for proposals within the remaining room; no sequence is preempted for a proposal.

        An answer whose tokens run again gets no proposals: a step has room for one token per answer and its proposals.
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
                self._steps.note_growth(sequence)
            if self._states is not None:
                assert sequence.state_slot is not None
                self._states.save(sequence.state_slot)
        return proposals


def _not_computed(decoding: list[Sequence]) -> list[tuple[Sequence, int]]:
    """Return the decoding sequences, each with the number of its tokens that have not run."""
    return [(one, one.num_tokens - one.num_computed) for one in decoding]


def _must_rerun(sequence: Sequence) -> bool:
    """Whether confirmed tokens of an answer run again because its recurrent state was restored."""
    return sequence.num_tokens - sequence.num_computed > 1
