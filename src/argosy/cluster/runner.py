"""A coordinator's expert runner: workers run their experts, this machine its own, and the outputs meet here.

    dispatch ─ choose ─>  local experts (`CachedRunner`)          ─┐
                      └>  the owners' experts (`Exchange`, native) ─┴>  groups of outputs, as they arrive

What happens when something fails within a layer, cheapest first:

    a connection ends, or a read of a worker fails    the second owner is sent the same rows at once
    a worker is later than its deadline               the same; it is not asked again until it has answered, and of
                                                      two workers the answer that comes first counts
    no owner is left                                  this machine runs the experts out of its own files
    and it has none                                   RunnerFailed, which names the shard; a server answers 503

Outputs come back as float32, a row for each token and expert, and the stack adds them in the router's order. So it
does not matter which host computed an output, or whether two did.

While nothing goes wrong, native code runs layers without Python (`GroupExperts`). This module takes over a layer
with a failed or late owner, a layer that takes more than a moment, and one whose experts this machine must read or
verify.

Elsewhere: `group.py` keeps the connections; ownership, frames and buffers are native (`native/cluster`).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np

from argosy import _native
from argosy._native import Owner, Owners
from argosy.checkpoint.shards import shard_of
from argosy.config import ModelConfig
from argosy.errors import RunnerFailed
from argosy.experts.runner import ExpertRunner, Rows, RunnerStats

log = logging.getLogger("argosy.cluster")

_LONGEST_S = 60.0  # a layer waits this long for its last owner
_AGAIN_S = 1.0  # from one deadline of a late owner to the next
_LOOK_S = 0.25  # the longest wait between two checks of deadlines
_MOST_VERIFIED = 256  # assignments per layer that may be verified; bounds the scratch memory


def most_verification_bytes(config: ModelConfig) -> int:
    """The most bytes that verifying takes: a layer's outputs, computed twice more."""
    return 2 * _MOST_VERIFIED * 4 * config.expert_hidden


class Members(Protocol):
    """The methods of a group that a runner needs."""

    @property
    def layout(self) -> Owners: ...
    def lost(self, owner: Owner, why: str) -> None: ...
    def set_aside(self, owner: Owner, why: str) -> None: ...


class ClusterRunner:
    """Runs a layer's experts on their owners; see `ExpertRunner`.

    Args:
        local: the runner of this process.
        here: this machine as an owner; None: it never runs experts.
        verify: the fraction of answers that a second owner also computes.
    """

    resident = None  # not all experts are in this process

    def __init__(
        self,
        group: Members,
        exchange: _native.Exchange,
        local: ExpertRunner,
        *,
        here: Owner | None,
        verify: float = 0.0,
    ) -> None:
        self.group = group
        self.exchange = exchange
        self.local = local
        self.here = here
        self.verify = verify
        self.experts = _native.GroupExperts(exchange)
        self._draw = random.Random(0)
        self._has_guessed = False  # whether native code has passed on a guess for the current layer
        self.last_run_at = 0.0  # monotonic seconds

    @property
    def elsewhere(self) -> _native.LayerExperts | None:
        """See `ExpertRunner.elsewhere`; None if this machine reads or verifies experts."""
        self.last_run_at = time.monotonic()
        table = self.local.resident
        if self.verify or (self.here is not None and table is None):
            self.experts.abandon()  # a step was cut short
            return None
        self.experts.use(self.group.layout, None if self.here is None else table)
        return self.experts

    @property
    def stats(self) -> RunnerStats:
        """Counters of this process and of its requests to others. An expert that its owner probably had in memory
        is a hit.
        """
        local, remote = self.local.stats, self.experts.counts
        return replace(
            local,
            lookups=local.lookups + remote.lookups,
            hits=local.hits + remote.hits,
            decode_lookups=local.decode_lookups + remote.decode_lookups,
            decode_hits=local.decode_hits + remote.decode_hits,
        )

    @property
    def num_resident(self) -> int:
        return self.local.num_resident

    @contextmanager
    def run(
        self, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> Iterator[Iterator[Sequence[int]]]:
        round = _Round(self, layer, dispatch, rows, out)
        self.last_run_at = time.monotonic()
        try:
            begun = self.experts.take_over()
            self._has_guessed = begun is not None
            if begun is None:
                round.begin()
            else:
                round.take_over(begun)
            yield round.groups()
        finally:
            round.end()

    def is_verified(self) -> bool:
        """Draw whether to verify this answer."""
        return self.verify > 0.0 and self._draw.random() < self.verify

    def wants_guess(self, *, is_sweep: bool) -> bool:
        if self._has_guessed:
            return False
        if self.here is not None and self.local.wants_guess(is_sweep=is_sweep):
            return True
        return _native.GroupExperts.wants_guess(self.group.layout)

    def guess(self, layer: int, by_rank: Sequence[Sequence[int]], *, is_sweep: bool) -> None:
        """Pass a guess on to the owners likely to be asked."""
        ranks = self.experts.guess(self.group.layout, layer, by_rank, is_sweep=is_sweep)
        if ranks and self.local.wants_guess(is_sweep=is_sweep):
            self.local.guess(layer, ranks, is_sweep=is_sweep)

    def close(self) -> None:
        self.experts.abandon()
        self.local.close()


class _Round:
    """The experts of one layer in flight."""

    def __init__(
        self, runner: ClusterRunner, layer: int, dispatch: _native.Dispatch, rows: Rows, out: Rows
    ) -> None:
        self._runner, self._exchange = runner, runner.exchange
        self._layer, self._dispatch, self._rows, self._out = layer, dispatch, rows, out
        self._experts = dispatch.experts
        self._layout = runner.group.layout
        self._ticket: int | None = None
        self._done: list[int] = []  # written, not yet handed over
        self._failures: list[_native.ExchangeEvent] = []  # not yet acted upon
        self._peers: dict[int, Owner] = {}  # as of the time they were asked
        self._missing: set[int] = set()  # asked of workers, not yet written
        self._owed: dict[Owner, set[int]] = {}  # by the worker asked
        self._to_send: dict[Owner, list[int]] = {}  # decided, not yet sent
        self._deadlines: dict[Owner, float] = {}
        self._tried: dict[int, list[Owner]] = {}
        self._held: list[tuple[int, Owner]] = []  # written, to be verified before use
        self._local_next: list[int] = []  # to be run here after the current local run
        self._local_stack = ExitStack()
        self._local_groups: Iterator[Sequence[int]] | None = None
        self._told: str = ""  # the last message from a worker that could not run an expert
        self._began = time.monotonic()

    # ── start and end ───────────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        given: set[int] = set()
        for owner, experts in self._layout.choose(self._layer, self._experts):
            given.update(experts)
            self._ask(owner, experts)
        if len(given) < len(self._experts):
            self._reroute([expert for expert in self._experts if expert not in given])
        self._send()
        self._run_local()

    def take_over(self, begun: _native.BegunLayer) -> None:
        """Continue a layer that native code began."""
        self._ticket = begun.ticket
        self._layout = begun.owners
        self._done, self._failures = begun.done, begun.failures
        for owner, peer, owed, deadline in begun.shares:
            for expert in owed:
                self._tried[expert] = [owner]
            self._peers[peer] = owner
            self._owed[owner] = set(owed)
            self._missing.update(owed)
            self._deadlines[owner] = deadline

    def end(self) -> None:
        """End the round; nothing is written to `out` afterwards."""
        try:
            self._local_stack.close()
        finally:
            if self._ticket is not None:
                self._exchange.forget(self._ticket)
                self._ticket = None

    def _candidates(self, expert: int) -> list[Owner]:
        return self._layout.candidates(self._layer, expert, self._tried.get(expert, []))

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, owner: Owner, experts: list[int]) -> None:
        """Assign experts to an owner; `_send` and `_run_local` start them."""
        for expert in experts:
            self._tried.setdefault(expert, []).append(owner)
        if owner is self._runner.here:
            self._local_next += experts
            return
        self._missing.update(experts)
        self._to_send.setdefault(owner, []).extend(experts)

    def _send(self) -> None:
        """Send what `_ask` assigned."""
        if not self._to_send:
            return
        shares: dict[int, list[int]] = {}
        now = time.monotonic()
        failed: list[int] = []
        for owner, experts in self._to_send.items():
            peer = owner.peer
            if peer is None:  # it has gone away since
                failed += experts
                continue
            self._runner.experts.count_asked(owner, self._layer, self._dispatch, experts)
            shares[peer] = sorted(experts)
            self._peers[peer] = owner
            self._owed.setdefault(owner, set()).update(experts)
            self._deadlines[owner] = now + self._patience(owner, peer, experts)
        self._to_send.clear()
        if shares:
            if self._ticket is None:
                self._ticket = self._exchange.send(self._layer, self._dispatch, self._rows, self._out, shares)
            else:
                self._exchange.resend(self._ticket, shares)
        if failed:
            self._reroute(failed)
            self._send()

    def _patience(self, owner: Owner, peer: int, experts: Sequence[int]) -> float:
        """Seconds after which an answer is late."""
        num_rows = self._dispatch.num_tokens
        return self._runner.experts.patience_s(owner, peer, self._layer, num_rows, experts)

    def _run_local(self) -> None:
        """Start the experts waiting for this machine, unless it is busy."""
        if self._local_groups is not None or not self._local_next:
            return
        experts, self._local_next = sorted(self._local_next), []
        dispatch = self._dispatch
        part = dispatch if len(experts) == len(self._experts) else dispatch.only(experts)
        groups = self._local_stack.enter_context(
            self._runner.local.run(self._layer, part, self._rows, self._out)
        )
        self._local_groups = iter(groups)
        assert self._runner.here is not None
        self._runner.here.note(self._layer, experts)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def groups(self) -> Iterator[Sequence[int]]:
        if self._done:
            yield self._done
        if self._failures:
            yield from self._take(self._failures)
        while True:
            if self._missing:
                yield from self._receive(0.0)
            if self._local_groups is not None:
                group = next(self._local_groups, None)
                if group is not None:
                    assert self._runner.here is not None
                    self._runner.here.num_run += len(group)
                    yield group
                    continue
                self._local_groups = None
                self._local_stack.close()
            if self._local_next:
                self._run_local()
                continue
            if not self._missing:
                break
            yield from self._receive(self._wait_s())
            self._pass_over()
        if self._held:
            yield from self._verified()

    def _wait_s(self) -> float:
        """Seconds until the next deadline, at most a moment."""
        waiting = (owner for owner, owed in self._owed.items() if owed & self._missing)
        until = min((self._deadlines[owner] for owner in waiting), default=0.0)
        return min(_LOOK_S, max(0.0005, until - time.monotonic()))

    def _receive(self, timeout_s: float) -> Iterator[Sequence[int]]:
        """Return the experts whose outputs have arrived; reroute those that failed."""
        if self._ticket is not None:
            yield from self._take(self._exchange.receive(self._ticket, round(timeout_s * 1e6)))

    def _take(self, events: Sequence[_native.ExchangeEvent]) -> Iterator[Sequence[int]]:
        for event in events:
            owner = self._peers[event.peer]
            owed = self._owed.get(owner, set())
            if event.failure is None:
                fresh = [expert for expert in event.experts if expert in self._missing]
                self._missing.difference_update(fresh)
                owed.difference_update(event.experts)
                owner.note(self._layer, event.experts)
                owner.num_run += len(fresh)
                yield from self._release(owner, fresh)
                continue
            if event.failure not in ("refused", "full"):
                self._runner.group.lost(owner, event.message or event.failure)
            self._told = f"{owner.name}: {event.message or event.failure}"
            lost = [expert for expert in sorted(owed) if expert in self._missing]
            self._owed.pop(owner, None)
            self._move(owner, lost)

    def _release(self, owner: Owner, experts: list[int]) -> Iterator[Sequence[int]]:
        """Hand experts over, except those that must first be verified."""
        runner = self._runner
        if runner.verify and self._dispatch.num_assignments <= _MOST_VERIFIED:
            held = [expert for expert in experts if runner.is_verified()]
            self._held += [(expert, owner) for expert in held]
            experts = [expert for expert in experts if expert not in held]
        if experts:
            yield experts

    def _pass_over(self) -> None:
        """Reroute late experts. A late answer still counts if it arrives before another worker's, but once this
        machine runs an expert, a worker's answer for it is ignored.
        """
        now = time.monotonic()
        for owner in list(self._owed):
            late = sorted(self._owed[owner] & self._missing)
            if not late or now < self._deadlines[owner]:
                continue
            owner.is_slow = True
            elsewhere = [
                expert for expert in late if any(other is not owner for other in self._candidates(expert))
            ]
            if elsewhere:
                self._move(owner, elsewhere)
            if now - self._began > _LONGEST_S:
                raise self._failed(late[0], f"{owner.name} has not answered for {now - self._began:.0f} s")
            self._deadlines[owner] = now + _AGAIN_S

    def _move(self, owner: Owner, experts: list[int]) -> None:
        """Ask owners other than `owner` for experts, unless one that is not late owes them already."""
        if not experts:
            return
        owner.num_rerouted += len(experts)
        asked = set(self._local_next)
        for other, owed in self._owed.items():
            if other is not owner and not other.is_slow:
                asked |= owed
        self._reroute([expert for expert in experts if expert not in asked])
        self._send()
        self._run_local()

    def _reroute(self, experts: list[int]) -> None:
        """Assign experts to owners that have not been asked for them.

        Raises:
            RunnerFailed: no such owner is left.
        """
        for expert in experts:
            candidates = self._candidates(expert)
            if not candidates:
                raise self._failed(expert, self._told or "none of its owners is available")
            owner = candidates[0]
            if owner is self._runner.here:
                # Its outputs now come from here, so nobody else may write them.
                self._missing.discard(expert)
                if self._ticket is not None:
                    self._exchange.drop(self._ticket, [expert])
                for owed in self._owed.values():
                    owed.discard(expert)
            self._ask(owner, [expert])

    def _failed(self, expert: int, why: str) -> RunnerFailed:
        """The error for an expert that no host can run. Clients see it, so workers' addresses go only into the log."""
        shard = shard_of(self._layer, expert)
        names = ", ".join(owner.name for owner in self._layout.owners_of(self._layer, expert)) or "nobody"
        log.error(
            "cluster: layer %d, expert %d of shard %d, owned by %s: %s",
            self._layer,
            expert,
            shard,
            names,
            why,
        )
        return RunnerFailed(
            f"shard {shard} cannot be run: no worker can compute layer {self._layer}, expert {expert}",
            hint="`argosy cluster status` shows the workers; you can send the request again",
            layer=self._layer,
            expert=expert,
            shard=shard,
        )

    # ── verification ────────────────────────────────────────────────────────────────────────────────────────────

    def _verified(self) -> Iterator[Sequence[int]]:
        """Have other hosts also compute the held experts, and hand over those whose bits agree.

        Raises:
            RunnerFailed: two workers disagree, and no third can decide.
        """
        for expert, owner in self._held:
            at = self._dispatch.assignments(expert)
            check = np.empty_like(self._out)
            other = self._second(expert, owner)
            if other is not None and self._compute(other, expert, check):
                owner.num_verified += 1
                if not _same_bits(self._out[at], check[at]):
                    self._settle(expert, owner, other, at, check)
            yield [expert]
        self._held.clear()

    def _second(self, expert: int, owner: Owner) -> Owner | None:
        """The host that verifies an answer: another owner, or this machine."""
        layout = self._layout
        owners = layout.owners_of(self._layer, expert)
        others = [one for one in owners if one is not owner and layout.is_usable(one)]
        return others[0] if others else self._runner.here

    def _compute(self, owner: Owner, expert: int, out: Rows) -> bool:
        """Have one expert computed into `out`; return whether that worked."""
        runner = self._runner
        if owner is runner.here:
            part = self._dispatch.only([expert])
            with runner.local.run(self._layer, part, self._rows, out) as groups:
                for _ in groups:
                    pass
            return True
        peer = owner.peer
        if peer is None:
            return False
        until = time.monotonic() + self._patience(owner, peer, [expert])
        ticket = self._exchange.send(self._layer, self._dispatch, self._rows, out, {peer: [expert]})
        try:
            while (left := until - time.monotonic()) > 0:
                for event in self._exchange.receive(ticket, round(left * 1e6)):
                    if event.failure is None:
                        return True
                    if event.failure not in ("refused", "full"):
                        runner.group.lost(owner, event.message or event.failure)
                    return False
            return False
        finally:
            self._exchange.forget(ticket)

    def _settle(self, expert: int, owner: Owner, other: Owner, at: list[int], check: Rows) -> None:
        """When two owners disagree, let a third decide which is set aside, and use its outputs.

        Raises:
            RunnerFailed: there is no third. Both are set aside, because either may be wrong.
        """
        runner = self._runner
        truth, arbiter = check, other if other is runner.here else self._arbiter(owner, other)
        if arbiter is not None and arbiter is not other:
            truth = np.empty_like(self._out)
            arbiter = arbiter if self._compute(arbiter, expert, truth) else None
        where = f"layer {self._layer}, expert {expert}"
        found = ((owner, self._out), (other, check))
        for one, outputs in found:
            if arbiter is not None and _same_bits(outputs[at], truth[at]):
                continue
            one.num_mismatches += 1
            against = (other if one is owner else owner) if arbiter is None else arbiter
            runner.group.set_aside(one, f"{where}: its outputs differ from those of {against.name}")
        if arbiter is None:
            raise self._failed(expert, f"{owner.name} and {other.name} compute different outputs")
        self._out[at] = truth[at]

    def _arbiter(self, owner: Owner, other: Owner) -> Owner | None:
        """The host that decides between two owners: this machine or a third worker."""
        if self._runner.here is not None:
            return self._runner.here
        layout = self._layout
        others = (one for one in layout.hosts if one not in (owner, other) and layout.is_usable(one))
        return next(others, None)


def _same_bits(one: Rows, other: Rows) -> bool:
    return bool(np.array_equal(one.view(np.uint32), other.view(np.uint32)))
