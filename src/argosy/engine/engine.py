"""Prompt -> token events. `Engine.step` is the map of the system.

    prompt/ ─ tokens ─ scheduler ─ model/ ─ sampler ─ commit ─ events

An engine holds the sequences, their scheduler and their answers; `Started` holds weights, experts, KV cache and
recurrent state. An engine belongs to one process; calls from several threads take turns.

Elsewhere: `start.py` opens everything that an engine needs; `requests.py` checks prompts; `scheduler.py` chooses the
tokens of a step; `answers.py` turns logits into tokens and ends answers; `resizing.py` changes the budget; `loop.py`
runs an engine in its own thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from argosy.budget.memory_plan import MemoryPlan
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.sampling import declared_sampling
from argosy.config import EngineConfig, ModelConfig
from argosy.config.engine import ExpertColumns
from argosy.engine.admission import Admission
from argosy.engine.answers import Answers
from argosy.engine.blocking import BlockingCalls
from argosy.engine.drafts.drafter import Drafter
from argosy.engine.drafts.drafts import Drafts
from argosy.engine.facts import EngineFacts, collect_facts
from argosy.engine.ledger import Ledger
from argosy.engine.options import with_group, with_recorder
from argosy.engine.progress import Watch
from argosy.engine.requests import Requests
from argosy.engine.resizing import Resizer
from argosy.engine.scheduler import Scheduler
from argosy.engine.sequence import FinishReason, Result, TokenEvent
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.engine.start import ProcessShare, start
from argosy.engine.step_log import StepLog
from argosy.engine.steps import CannotRun, Scheduled
from argosy.engine.watermark import Watermark
from argosy.errors import ArgosyError, CheckpointError, ReadFailed, RunnerFailed, UsageError
from argosy.experts.recording import OpenRecorder
from argosy.experts.resident import Progress
from argosy.experts.runner import ExpertGroup
from argosy.model.decoder import RouteObserver
from argosy.model.step import Step
from argosy.model.work import work_of

if TYPE_CHECKING:
    from argosy.adapters.registry import AdapterFacts


class Engine(BlockingCalls):
    """Runs one model within one memory budget. Users open an engine by name: `argosy.Engine.open` (`open/engine.py`).

    Args:
        files: the model, from `open_files`.
        config: every setting, from `configure`.
        drafter, progress, observe_routes, recorder, experts: see `argosy.Engine.open`.
        share: its part of a process that also runs other engines; None: the engine has the whole budget.

    Raises:
        DoesNotFit, UsageError, and `CheckpointError` and related errors: see `errors`.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: EngineConfig,
        *,
        drafter: Drafter | None = None,
        progress: Progress | None = None,
        observe_routes: RouteObserver | None = None,
        recorder: OpenRecorder | None = None,
        share: ProcessShare | None = None,
        experts: ExpertGroup | None = None,
    ) -> None:
        watermark = None if config.watermark is None else Watermark.read(config.watermark)
        self.sampling = declared_sampling(files).overridden(config.sampling)
        Drafts.require_one(config, drafter)
        config, told = with_recorder(config, files, recorder)
        config = with_group(config, files, experts)
        self._started = started = start(
            files,
            config,
            progress=progress,
            observe_routes=observe_routes,
            recorder=told,
            share=share,
            experts=experts,
        )
        self._lock = started.lock
        self.files = files
        self.config: ModelConfig = files.config
        self.settings = config
        # Predictions of the engine's speed start from this.
        self.work = work_of(files, started.plan.kv_dtype, config)
        self.tokenizer = started.vocabulary.tokenizer
        self.prompts, self.media, self.ears = started.prompts, started.media, started.ears
        self._drafts = Drafts.open(config, started.model, started.store, drafter)
        self._scheduler = Scheduler(
            started.cache,
            chunk_tokens=started.plan.chunk_tokens,
            max_sequences=config.max_sequences,
            num_axes=files.config.num_axes,
            num_earlier=files.config.num_earlier,
            drafts=self._drafts,
        )
        self.requests = Requests(
            started, files, pooling=config.pooling, watermark=watermark, defaults=self.sampling
        )
        self.admission = Admission(config.max_sequences, config.max_waiting)
        self._answers = Answers(
            started.vocabulary.eos_ids,
            self.admission,
            clock=started.clock,
            model=started.model,
            rows_at_once=config.max_sequences,
            governor=self._drafts.governor,
        )
        self._log = StepLog(started.model, started.store, started.log)
        self._resizer = Resizer(
            started, config, self._scheduler, self.requests, before_moving=self._log.flush
        )
        self._sequences: list[EngineSequence] = []
        self.watch = Watch(started, self._scheduler, self._sequences)
        try:
            for one in config.loras:
                self.load_adapter(*one, is_planned=True)
        except BaseException:
            self.close()
            raise

    def step(self) -> list[TokenEvent]:
        """Prefill a chunk, decode a token or confirm proposed ones, for every sequence in the next step.

        A step whose read fails runs once more. If a read fails again, the sequences that need the expert end with
        the error, and the others continue unaffected. If anything else fails midway, including ^C, every sequence in
        the engine is cancelled, and prefixes in memory are forgotten.
        """
        started = self._started
        with self._lock:
            started.require_open()  # before `close` deletes anything
            with self._resizer.foreground, started.turns:
                started.cache.write_some()
                return self._step()

    def _step(self) -> list[TokenEvent]:
        started = self._started
        if not self._scheduler.has_work:  # another thread's step finished the work
            return []
        try:
            started.clock.mark("other")
            self.media.settle()
            try:
                scheduled = self._scheduler.next_step()
            except CannotRun as failed:
                self._finish(failed.sequence, "error", failed.error)
                return []
            finally:
                started.clock.mark_encoding(self._scheduler.making.take_making_s())
            if scheduled is None:  # only encoders of pictures and sound can run
                return []
            self._answers.begin()
            self.watch.scheduled = scheduled
            try:  # layers -> router -> experts -> kernels
                logits = self._forward(scheduled.step)
            except (CheckpointError, ReadFailed, RunnerFailed) as error:
                self._recover(scheduled, error)
                return []
            finally:
                self.watch.scheduled = None
            return self._commit(scheduled, logits)
        except BaseException:
            self._cancel_all()
            raise

    def _forward(self, step: Step) -> NDArray[np.float32]:
        """Run the layers: float32 [wanted rows, vocab_size]."""
        with self._resizer.during(step), self._log.during(step):
            return self._started.model.forward(step)

    def _commit(self, scheduled: Scheduled, logits: NDArray[np.float32]) -> list[TokenEvent]:
        """Choose tokens, then count the computed tokens, then end the finished answers."""
        answers = self._answers
        ended = answers.read_prompts(scheduled)
        failed = [one.sequence for one in ended]
        rows = [each for each in scheduled.rows(logits) if each[0] not in failed]
        accepted = [answers.accept(*each) for each in rows]
        confirmed = {one.sequence: one.num_confirmed for one in accepted} if scheduled.proposals else {}
        self._scheduler.commit(scheduled, confirmed)
        self._log.note(scheduled)
        self._drafts.note(scheduled, {one.sequence for one in accepted if one.reason is not None})
        for leader, own, _ in rows:
            for follower in self._scheduler.fork(leader) if leader.followers else ():
                follower.prompt_logprobs = leader.prompt_logprobs
                accepted.append(answers.accept(follower, own))
        made: list[TokenEvent] = []
        for one in (*ended, *accepted):
            if one.reason is not None:
                one.end(self._finish(one.sequence, one.reason, one.error))
            one.sequence.events.extend(one.events)
            made += one.events
        return made

    def _recover(self, scheduled: Scheduled, error: ArgosyError) -> None:
        """Let a step with failed reads run once more; end the sequences that fail again before they are past it.

        A sequence with a recurrent state starts again, so steps that succeed may come in between.
        """
        step, failed = scheduled.step, []
        rows, expert = error.facts.get("rows"), error.facts.get("expert")  # rows: of an n-gram table
        if not isinstance(rows, np.ndarray):
            rows = self._started.model.rows_of(expert) if isinstance(expert, int) else np.empty(0, np.int64)
        if step.adapters is not None and "adapter" in error.facts:  # whose part of the expert cannot be read
            rows = rows[step.adapters[rows] == error.facts["adapter"]]
        for number in np.unique(step.sequence[rows] if len(rows) else step.sequence):
            sequence, order = scheduled.sequences[number], step.order[step.sequence == number]
            if order[0] < sequence.failed_until:
                failed.append(sequence)
            sequence.failed_until = int(order[-1]) + 1
        self._scheduler.failed(scheduled)
        for sequence in failed:
            self._finish(sequence, "error", error)

    def _finish(
        self, sequence: EngineSequence, reason: FinishReason, error: ArgosyError | None = None
    ) -> Result:
        self._scheduler.remove(sequence)
        result = self._answers.result(sequence, reason, error)
        self._sequences.remove(sequence)
        if self.requests.adapters is not None:
            self.requests.adapters.settle()
        return result

    def _cancel_all(self) -> None:
        """Cancel every sequence and free all memory that they held, after a failure that may have left a sequence half
        moved.
        """
        self._scheduler.reset(self._sequences)
        for sequence in self._sequences:
            if sequence.result is None:
                self._answers.result(sequence, "cancelled")
        self._sequences.clear()
        if self.requests.adapters is not None:
            self.requests.adapters.settle()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        """Whether a step would run any sequence."""
        return self._started.is_open and self._scheduler.has_work

    @property
    def is_writing(self) -> bool:
        """Whether prefixes are waiting to be written to `kv_dir`. Every step writes some, even with no other work."""
        return self._started.cache.is_writing

    def enqueue(self, sequences: Sequence[EngineSequence], *, has_room: bool = False) -> None:
        """Queue sequences from `requests`, all or none. With `has_room`, the caller has already checked for room.

        Raises:
            Overloaded: too many sequences are already waiting.
        """
        with self._lock:
            self._started.require_open()
            if not has_room:
                self.admission.require_room(len(sequences), num_live=len(self._sequences))
            self.requests.require_room(sequences)
            counters = self.ledger
            try:
                for sequence in sequences:
                    self._answers.start(sequence, counters)
                    self._sequences.append(sequence)
                    self._scheduler.add(sequence)
            except BaseException:
                self._cancel_all()
                raise

    def cancel(self, sequence: EngineSequence) -> None:
        """Stop a sequence and free what it holds; does nothing once it has finished."""
        with self._lock:
            if sequence in self._sequences:
                try:
                    self._finish(sequence, "cancelled")
                except BaseException:
                    self._cancel_all()
                    raise

    def forget(self, tenant: str) -> None:
        """Forget everything kept from a tenant's prompts, answers and grammars, in memory and in `kv_dir`."""
        with self._lock:
            self._started.require_open()
            self._started.cache.forget(tenant)
            self.requests.forget(tenant)
            self.media.forget(tenant)

    def forget_others(self, tenants: Collection[str]) -> None:
        """Forget everything that earlier processes kept in `kv_dir` for tenants not listed."""
        self._started.cache.forget_others(tenants)

    # ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def adapters(self) -> tuple[AdapterFacts, ...]:
        """Return the adapters that requests may name."""
        return () if self.requests.adapters is None else self.requests.adapters.facts()

    def load_adapter(
        self, name: str, path: str | Path, factor: float = 1.0, columns: ExpertColumns = "expert_fastest",
        *, replaces: bool = False, is_planned: bool = False,
    ) -> AdapterFacts:  # fmt: skip
        """Read an adapter, which requests may then name, while they go on; `factor` multiplies its scale. See
        `Adapters.load`, also for errors.
        """
        from argosy.adapters.registry import Adapters  # few engines need it

        with self._lock:
            self._started.require_open()
            if self.requests.adapters is None:
                self.requests.adapters = Adapters(self._started, self.files, self._sequences, self._resizer)
        return self.requests.adapters.load(
            name, path, factor, columns, replaces=replaces, is_planned=is_planned
        )

    def drop_adapter(self, name: str) -> None:
        """Let no more requests name an adapter; those that have begun end with it.

        Raises:
            UsageError: there is no such adapter.
        """
        if self.requests.adapters is None:
            raise UsageError(f"unknown adapter {name[:80]!a}: this engine has none")
        self.requests.adapters.drop(name)

    # ── memory, experts and facts ───────────────────────────────────────────────────────────────────────────────

    @property
    def plan(self) -> MemoryPlan:
        """Return the current division of the memory budget."""
        return self._started.plan

    def resize(self, budget_bytes: int, *, is_share: bool = False) -> MemoryPlan:
        """Change the memory budget; see `Resizer.resize`."""
        resizer: Resizer | None = getattr(self, "_resizer", None)  # first: `close` may delete it later
        self._started.require_open()
        assert resizer is not None
        return resizer.resize(budget_bytes, is_share=is_share)

    def forbid_experts(self, experts: Mapping[int, Collection[int]]) -> None:
        """From the next step on, prevent every token from choosing these experts, given by layer
        (`Model.forbid_experts`).

        Raises:
            UsageError: a layer lacks such experts or would keep too few; or prefixes are reused, which still contain
                the effect of these experts.
        """
        if self.settings.prefix_reuse:
            raise UsageError(
                "experts cannot be forbidden while prefixes are reused",
                hint="open the engine with prefix_reuse=False",
            )
        with self._lock:
            self._started.require_open()
            self._started.model.forbid_experts(experts)

    @property
    def ledger(self) -> Ledger:
        """Return totals since the engine started."""
        return self._answers.ledger

    def facts(self) -> EngineFacts:
        """Return a snapshot for monitoring, taken between two steps."""
        with self._lock:
            self._started.require_open()
            return collect_facts(self._started, self._scheduler, self.ledger, self._log.uses)

    def tell_recorder(self) -> None:
        """Pass the steps logged so far to the recorder, if there is one. `close` also does this."""
        with self._lock:
            self._started.require_open()
            self._log.flush()

    def close(self) -> None:
        """Cancel running sequences and free everything. Closing twice is harmless."""
        if self.ears is not None:
            self.ears.close()  # without the lock: a transcription may be waiting for it
        with self._lock:
            if not self._started.is_open:
                return
            try:
                for sequence in list(self._sequences):
                    self._finish(sequence, "cancelled")
                self._log.flush()
            finally:  # a recorder may fail
                self._started.close()
                self.watch.close()
                del self.prompts, self.media, self._scheduler, self._answers, self._drafts, self._resizer
        self._log.close(self.files.path)
