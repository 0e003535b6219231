"""Prompt -> token events. `Engine.step` is the map of the system.

    prompt/ ─ tokens ─ scheduler ─ model/ ─ sampler ─ commit ─ events

An engine holds prompts, sequences and the scheduler; a `Model` holds weights, experts, KV cache and recurrent state.
One process uses an engine; calls from several threads take turns.

Elsewhere: `start.py` opens what an engine runs with; `scheduler.py` chooses the tokens of a step; `answers.py` turns
logits into tokens and ends answers; `loop.py` runs an engine in a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from argosy.budget.expert_memory import OWN, ExpertMemory
from argosy.budget.footprint import kv_blocks
from argosy.budget.idle_memory import KV
from argosy.budget.memory_plan import MemoryPlan, in_slots, replan, require_budget
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.fingerprint import fingerprint
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.pooling import declared_pooling
from argosy.checkpoint.sampling import declared_sampling
from argosy.config import (
    DEMO,
    KV_BLOCK_TOKENS,
    MIB,
    EngineConfig,
    ModelConfig,
    Pooling,
    SamplingParams,
    format_bytes,
)
from argosy.engine import facts
from argosy.engine.admission import Admission
from argosy.engine.answers import Answers
from argosy.engine.blocking import BlockingCalls
from argosy.engine.drafts.drafter import Drafter
from argosy.engine.drafts.governor import Governor
from argosy.engine.drafts.lookup import LookupDrafter
from argosy.engine.drafts.mtp import MtpDrafter
from argosy.engine.energy import EnergyShares
from argosy.engine.facts import EngineFacts, ExpertUses
from argosy.engine.ledger import Ledger
from argosy.engine.options import (
    EngineOptions,
    configure,
    locate_ears,
    locate_model,
    open_files,
    with_group,
    with_recorder,
)
from argosy.engine.progress import RequestProgress, RunningStep, progress_of
from argosy.engine.requests import PromptLike, Requests
from argosy.engine.scheduler import CannotRun, Scheduled, Scheduler
from argosy.engine.sequence import FinishReason, Result, TokenEvent, WaitReason
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.engine.start import Share, idle_memory, reserved_slots, start
from argosy.engine.watermark import Watermark
from argosy.errors import (
    ArgosyError,
    CheckpointError,
    DoesNotFit,
    PromptTooLong,
    ReadFailed,
    RunnerFailed,
    UsageError,
)
from argosy.experts.recording import OpenRecorder, RouteLog, StepRoutes
from argosy.experts.resident import Progress
from argosy.experts.runner import ExpertGroup
from argosy.machine.energy import EnergyMeter
from argosy.machine.kept_rates import DriveReads
from argosy.media.parts import Hearing, Kind
from argosy.model.decoder import RouteObserver
from argosy.model.step import Step
from argosy.model.work import work_of
from argosy.prompt.builder import PromptBuilder

if TYPE_CHECKING:
    from argosy.engine.media.ears import Transcriber


class Engine(BlockingCalls):
    """Runs one model within one memory budget.

        with Engine.open("path/or/demo", memory="8GiB") as engine:
            print(engine.generate("Why is the sky blue?").text)

    Args:
        files: the model, from `open_files`.
        config: every setting, from `configure`; `open` calls both.
        drafter: proposes tokens, at most `config.draft_tokens` per sequence and step, whether or not that pays;
            `config.speculate` has drafters of the engine's own, which propose while it does.
        progress: called with the progress of startup.
        observe_routes: called with (layer, expert_ids [tokens, k]) in every step. Routing can reveal text: keep it
            private. Every step stops at every layer to call it; a recorder costs next to nothing.
        recorder: opens a recorder that receives the choices of all steps, several steps at a time; not called for a
            model without routed experts. With one, the user's cache keeps the rate that the drive had.
        share: its part of a process that runs other engines, too; None: the budget is its own.
        experts: other processes that run experts, too, such as a `cluster.Group`; it serves this engine only.

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
        share: Share | None = None,
        experts: ExpertGroup | None = None,
    ) -> None:
        watermark = None if config.watermark is None else Watermark.read(config.watermark)
        self.sampling = declared_sampling(files).overridden(config.sampling)
        if drafter is not None and config.speculate != "off":
            raise UsageError(f"a drafter is given, and speculate='{config.speculate}' chooses another one")
        config, told = with_recorder(config, files, recorder)
        config = with_group(config, files, experts)
        started = start(
            files,
            config,
            progress=progress,
            observe_routes=observe_routes,
            recorder=told,
            share=share,
            experts=experts,
        )
        self.config: ModelConfig = files.config
        self.settings = config
        self._files = files
        self.plan = plan = started.plan
        self.work = work_of(files, plan.kv_dtype)  # predictions of its speed start from this
        self.tokenizer = started.vocabulary.tokenizer
        self._clock, self._store, self._runtime = started.clock, started.store, started.runtime
        self._model, self._cache, self._media = started.model, started.cache, started.media
        self._experts, self._idle = started.experts, started.idle
        self._footprint = started.footprint
        self._opened_with = plan
        self._resizing = threading.Lock()
        self._log = started.log
        self._reads = None if told is None else DriveReads()
        self._governor: Governor | None = None
        self._mtp: MtpDrafter | None = None
        if config.speculate != "off":
            store = started.store
            self._governor = Governor(config.draft_tokens, lambda: store.stats()["busy_seconds"])
            if config.speculate == "mtp":
                self._mtp = MtpDrafter(started.model, KV_BLOCK_TOKENS)
            drafter = self._mtp or LookupDrafter()
        self._scheduler = Scheduler(
            self._cache,
            chunk_tokens=plan.chunk_tokens,
            max_sequences=config.max_sequences,
            num_axes=files.config.rope.num_axes,
            drafter=drafter,
            draft_tokens=config.draft_tokens,
            governor=self._governor,
        )
        self._requests = Requests(
            started.prompts,
            self.tokenizer,
            started.vocabulary.grammars,
            self._cache,
            context_tokens=plan.context_tokens,
            chunk_tokens=plan.chunk_tokens,
            model=files.config,
            watermark=watermark,
            defaults=self.sampling,
        )
        self._pooling = _find_pooling(files, config)
        self.admission = Admission(config.max_sequences, config.max_waiting)
        model = started.model
        self._energy = EnergyShares(
            EnergyMeter.find(), lambda: 0 if model.experts is None else model.experts.stats.bytes_read
        )
        self._answers = Answers(
            started.vocabulary.eos_ids,
            self.admission,
            clock=self._clock,
            model=model,
            energy=self._energy,
            governor=self._governor,
        )
        self._uses = ExpertUses(self._model)
        self._sequences: list[EngineSequence] = []
        self._in_step: Scheduled | None = None  # while the layers run
        self._has_failed = False  # the last step failed, and the next one retries it
        self._lock, self._turns = started.lock, started.turns  # taken in this order
        self._foreground: AbstractContextManager[object] = nullcontext()  # held for each step
        self._share = share
        self._loading = share  # until no expert slot is free for the first time; None: it is over
        self._ears = started.ears
        self._is_open = True

    @classmethod
    def open(
        cls,
        model: str | Path = DEMO,
        *,
        drafter: Drafter | None = None,
        progress: Progress | None = None,
        observe_routes: RouteObserver | None = None,
        recorder: OpenRecorder | None = None,
        experts: ExpertGroup | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Open a model with the settings that are given, and the defaults for the others.

        Args:
            model: a checkpoint or pack directory, a GGUF file, the name of a model in the library, or `demo` for the
                embedded default model.
            options: see `EngineOptions`.
        """
        files = open_files(locate_model(model, progress), mmproj=options.get("mmproj"))
        if (ears := options.get("ears")) is not None:
            options["ears"] = locate_ears(ears, progress)
        config = configure(model, files, **options)
        return cls(
            files,
            config,
            drafter=drafter,
            progress=progress,
            observe_routes=observe_routes,
            recorder=recorder,
            experts=experts,
        )

    # ── one step ────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[TokenEvent]:
        """Prefill a chunk, decode a token or confirm proposed ones, for every sequence in the next step.

        A step whose read fails runs once more. If the read fails again, the sequences that need the expert end with
        the error, and the others continue unaffected. If anything else fails midway, including ^C, every sequence in
        the engine is cancelled, and prefixes in memory are forgotten.
        """
        with self._lock, self._foreground, self._turns:
            self._require_open()
            self._cache.write_some()
            if not self._scheduler.has_work:  # another thread's step finished the work
                return []
            try:
                self._clock.mark("other")
                if self._media is not None:
                    self._media.memory.settle()
                try:
                    scheduled = self._scheduler.next_step()
                except CannotRun as failed:
                    self._finish(failed.sequence, "error", failed.error)
                    return []
                finally:
                    self._clock.mark_encoding(self._scheduler.take_making_s())
                if scheduled is None:  # all that can run are encoders of pictures and sound
                    return []
                self._energy.begin()
                self._in_step = scheduled
                try:  # layers -> router -> experts -> kernels
                    logits = self._forward(scheduled.step)
                except (CheckpointError, ReadFailed, RunnerFailed) as error:
                    self._recover(scheduled, error)
                    return []
                finally:
                    self._in_step = None
                self._has_failed = False
                return self._commit(scheduled, logits)
            except BaseException:
                self._cancel_all()
                raise

    def _cancel_all(self) -> None:
        """Cancel every sequence and free all that they held, after a failure that may have left one half moved."""
        self._scheduler.reset(self._sequences)
        self._energy.settle()
        for sequence in self._sequences:
            if sequence.result is None:
                self._answers.result(sequence, "cancelled")
        self._sequences.clear()
        self._has_failed = False

    def _forward(self, step: Step) -> NDArray[np.float32]:
        """Run the layers: float32 [wanted rows, vocab_size]."""
        if self._idle is not None:
            self._idle.before_step(step.num_tokens, has_prompts=not step.is_decode.all())
        before = None if self._reads is None else self._store.stats()
        began = perf_counter()
        try:
            return self._forward_giving_way(step)
        finally:
            if before is not None and self._reads is not None:
                self._reads.add(before, self._store.stats(), is_decode=bool(step.is_decode.all()))
            if self._experts is not None:
                self._experts.step_s = perf_counter() - began

    def _forward_giving_way(self, step: Step) -> NDArray[np.float32]:
        """Run the layers.

        The first prompts of a model that is loaded beside others read most of its experts. They lend the cores to
        others meanwhile. Once no slot is free, the model is like any other, and others that are loaded give way to it.
        """
        if (loading := self._loading) is None:
            return self._model.forward(step)
        if (cache := self._model.cache) is not None:
            cache.lent = None if step.is_decode.all() else self._turns
        logits = self._model.forward(step)
        if cache is None or cache.slots.is_full:
            if cache is not None:
                cache.lent = None
            self._loading, self._foreground = None, loading.foreground
            self._store.leave_background()
        return logits

    def _commit(self, scheduled: Scheduled, logits: NDArray[np.float32]) -> list[TokenEvent]:
        """Choose tokens, then count what was computed, then end the answers that are finished."""
        answers = self._answers
        self._energy.note(scheduled)
        self._uses.count(scheduled.step.num_tokens)
        at_once = self.settings.max_sequences
        ended = answers.note_prompts(scheduled, self._model, at_once=at_once)
        ended += answers.pool(scheduled, self._model, at_once=at_once)
        rows = scheduled.rows(logits)
        if ended:
            failed = [one.sequence for one in ended]
            rows = [each for each in rows if each[0] not in failed]
        accepted = [answers.accept(*each) for each in rows]
        if scheduled.proposals:
            self._scheduler.commit(scheduled, {one.sequence: one.num_confirmed for one in accepted})
        else:
            self._scheduler.commit(scheduled)
        if self._log is not None:
            self._note_routes(self._log, scheduled)
        self._note_drafts(scheduled, {one.sequence for one in accepted if one.reason is not None})
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

    def _note_drafts(self, scheduled: Scheduled, ended: Collection[EngineSequence] = ()) -> None:
        """Show the draft layer, if there is one, what a step has committed."""
        if self._mtp is None or self._governor is None:
            return
        began = perf_counter()
        self._mtp.note(scheduled, ended)
        self._governor.count_upkeep(scheduled.sequences, perf_counter() - began)

    def _note_routes(self, log: RouteLog, scheduled: Scheduled) -> None:
        """Note the choices of a step that is committed; tokens that were rejected, or will run again, do not count."""
        step, choices, experts = scheduled.step, self._model.decoder.choices, self._model.experts
        assert choices is not None
        assert experts is not None
        numbers = [sequence.number for sequence in scheduled.sequences]
        is_decode, sequence = step.is_decode, step.sequence
        if scheduled.proposals:
            computed = np.array([one.num_computed for one in scheduled.sequences])
            counts = step.order < computed[sequence]
            choices = log.keep(choices, counts)
            is_decode, sequence = is_decode[counts], sequence[counts]
        log.note(StepRoutes(choices, is_decode, sequence, numbers), experts)

    def _recover(self, scheduled: Scheduled, error: ArgosyError) -> None:
        """Run a step with failed reads once more; the second time, end the sequences that need the failed expert."""
        self._scheduler.failed(scheduled)
        self._has_failed = not self._has_failed
        if self._has_failed:
            return
        expert = error.facts.get("expert")
        concerned = scheduled.sequences
        if isinstance(expert, int):
            rows = self._model.rows_of(expert)
            concerned = [concerned[i] for i in np.unique(scheduled.step.sequence[rows])]
        for sequence in concerned or scheduled.sequences:
            self._finish(sequence, "error", error)

    def _finish(
        self, sequence: EngineSequence, reason: FinishReason, error: ArgosyError | None = None
    ) -> Result:
        self._scheduler.remove(sequence)
        self._energy.settle()
        result = self._answers.result(sequence, reason, error)
        self._sequences.remove(sequence)
        return result

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, tenant: str = ""
    ) -> EngineSequence:
        """Queue a prompt. Its events collect in `.events` as `step` is called.

        Args:
            tenant: the request's owner. Tenants get equal shares of the engine and never share prefixes.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            Overloaded: too many sequences are already waiting.
            UsageError: `PromptBuilder.build` refuses the prompt, or this model cannot honour the parameters.
        """
        sequences = self.prepare(prompt, params, tenant=tenant)
        self.enqueue(sequences)
        return sequences[0]

    def prepare(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        num_answers: int = 1,
        tenant: str = "",
    ) -> list[EngineSequence]:
        """Check a request and make one sequence per answer. Safe from any thread, even while another one steps.

        The first answer computes the prompt, and the others continue from there. Each has its own seed, derived from
        the request's. Raises what `submit` raises, except `Overloaded`.
        """
        self._require_open()
        return self._requests.prepare(prompt, params, num_answers=num_answers, tenant=tenant)

    def prepare_embedding(
        self, text: str | Sequence[int], *, pooling: Pooling | None = None, tenant: str = ""
    ) -> list[EngineSequence]:
        """Check a text and make the sequence that computes its embedding. Safe from any thread, as `prepare`.

        Args:
            text: as it is, without a chat template, between the tokens that the tokenizer adds to a text; or token ids.
            pooling: None: the engine's.

        Raises:
            PromptTooLong: the text is longer than the context.
            UnsupportedModel: the checkpoint declares a pooling that is not supported.
            UsageError: the text is empty, or the model cannot take it.
        """
        self._require_open()
        return [self._requests.prepare_embedding(text, pooling=pooling or self.pooling, tenant=tenant)]

    @property
    def pooling(self) -> Pooling:
        """How embeddings are made of hidden states, if a request does not say.

        Raises:
            UnsupportedModel: the checkpoint declares a pooling that is not supported.
        """
        if isinstance(self._pooling, ArgosyError):
            raise self._pooling
        return self._pooling

    def enqueue(self, sequences: Sequence[EngineSequence], *, has_room: bool = False) -> None:
        """Queue sequences from `prepare`, all or none. With `has_room`, the caller has already checked for room.

        Raises:
            Overloaded: too many sequences are already waiting.
        """
        with self._lock:
            self._require_open()
            if not has_room:
                self.admission.require_room(len(sequences), num_live=len(self._sequences))
            for one in sequences:  # the context may be shorter than when they were made
                if len(one.prompt_ids) + one.max_new_tokens > self._requests.context_tokens:
                    raise PromptTooLong.of(
                        len(one.prompt_ids), self._requests.context_tokens, for_answer=one.max_new_tokens
                    )
            counters = self.ledger
            try:
                for sequence in sequences:
                    sequence.counters_at_start = counters
                    self._energy.start(sequence)
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
        """Forget what is kept of a tenant's prompts, answers and grammars, in memory and in `kv_dir`."""
        with self._lock:
            self._require_open()
            self._cache.forget(tenant)
            self._requests.forget(tenant)
            if self._media is not None:
                self._media.forget(tenant)

    def forget_others(self, tenants: Collection[str]) -> None:
        """Forget what earlier processes kept in `kv_dir` for any tenant not listed."""
        self._cache.forget_others(tenants)

    def resize_experts(self, num_slots: int) -> None:
        """Have so many expert slots from now on, of an engine with a `Share`.

        The memory of slots that go is with the system when this returns. Steps go on meanwhile, a little slower. What
        is resident decides no token.
        """
        self._require_open()
        experts = self._experts
        assert experts is not None
        experts.allow_between_steps(lambda: {OWN: num_slots * self.plan.slot_bytes})
        with self._lock:
            self.plan = replace(self.plan, num_slots=num_slots)

    def resize(self, budget_bytes: int) -> MemoryPlan:
        """Have another memory budget from now on. From any thread; steps go on meanwhile.

        Experts leave first, then KV blocks, with prefixes that are kept in them. A running answer may be computed again
        because of that, and stays the same. With fewer blocks the context is shorter for new requests. Everything that
        the plan no longer has is with the system when this returns. A larger budget brings back what left. If all
        experts were in memory, end to end, the first budget that is too small for that makes all of them leave; they
        are read again as tokens ask for them.

        Returns:
            The plan for the budget.

        Raises:
            DoesNotFit: it is less than the engine needs now, or more than the machine has; nothing has changed.
            UsageError: the engine shares its budget with others, or has a fixed number of experts.
        """
        if self._share is not None:
            raise UsageError("models share this budget: resize that of the server")
        if self.settings.expert_slots is not None:
            raise UsageError("the number of experts in memory is fixed", hint="leave out `expert_slots`")
        require_budget(budget_bytes)
        with self._resizing, self._shrinking_early(budget_bytes):
            with self._lock:
                self._require_open()
                try:
                    plan = self._replan(budget_bytes)
                except DoesNotFit:
                    if self._experts is not None:  # within a step, some may have left or all moved to slots
                        if self.plan.is_packed:
                            self.plan = self._replan(self.plan.budget_bytes)
                        self._experts.allow(OWN, self.plan.num_slots * self.plan.slot_bytes)
                    raise
                self._move_to_slots(plan)
                experts, idle = self._experts, self._idle
                if experts is not None and idle is not None:
                    self._requests.context_tokens = plan.context_tokens
                    self._scheduler.resize_kv(kv_blocks(plan.context_tokens))
                    idle.forget_blocks()
                    experts.most_slots = max(plan.reachable_slots, experts.most_slots)
            if experts is not None and idle is not None:
                own_bytes = plan.num_slots * plan.slot_bytes
                experts.allow_between_steps(lambda: {KV: idle.idle_kv_bytes(), OWN: own_bytes})
                experts.most_slots = plan.reachable_slots
            self.plan = plan
            return plan

    @contextmanager
    def _shrinking_early(self, budget_bytes: int) -> Iterator[None]:
        """Within this context, a running step lets experts leave between two of its layers.

        A prompt's step may take seconds, and a lowered limit does not wait for it.
        """
        self._require_open()
        decoder = self._model.decoder

        def shrink() -> None:
            decoder.between_layers = None
            with suppress(ArgosyError, MemoryError):  # `resize` raises it, and answers go on
                plan = self._replan(budget_bytes)
                self._move_to_slots(plan)
                if self._experts is not None:
                    self._experts.shrink(OWN, plan.num_slots * plan.slot_bytes)

        decoder.between_layers = shrink
        try:
            yield
        finally:
            decoder.between_layers = None

    def _replan(self, budget_bytes: int) -> MemoryPlan:
        opened, cache = self._opened_with, self._model.cache
        if cache is None:
            if budget_bytes >= opened.total_bytes:
                return replace(opened, budget_bytes=budget_bytes)
            if not self._model.is_packed:
                raise DoesNotFit(
                    f"needs {format_bytes(opened.total_bytes)} of memory, and the budget would be "
                    f"{format_bytes(budget_bytes)}: nothing of it can leave while it runs",
                    hint=f"start again with `--memory {budget_bytes // MIB}MiB`",
                    needed_bytes=opened.total_bytes,
                    budget_bytes=budget_bytes,
                )
        if opened.is_packed:
            opened = in_slots(self._footprint, self.settings, opened)
        return replan(
            self._footprint,
            opened,
            budget_bytes,
            kv_bytes=self._model.kv.held_bytes,
            fewest_blocks=max(1, self._scheduler.num_blocks_needed),
            most_slots=opened.num_experts if cache is None else cache.most_slots,
        )

    def _move_to_slots(self, plan: MemoryPlan) -> None:
        """If the experts lie end to end and the plan has slots, move to slots. KV blocks stay as they are.

        Call it with the lock, between two steps or layers.
        """
        if not self._model.is_packed or plan.is_packed:
            return
        self._tell_recorder()
        cache = self._model.move_to_slots(
            self._store,
            plan.num_slots,
            most_slots=reserved_slots(plan, plan.reachable_slots),
            look_ahead=self.settings.look_ahead,
        )
        self._experts = ExpertMemory(
            cache,
            num_slots=plan.num_slots,
            slot_bytes=plan.slot_bytes,
            most_slots=plan.reachable_slots,
            lock=self._lock,
        )
        self._idle = idle_memory(
            self._experts, self._model, self._cache, self._footprint, self.settings, plan
        )

    def forbid_experts(self, experts: Mapping[int, Collection[int]]) -> None:
        """From the next step on, let no token choose these experts, given by layer. Replaces what was forbidden before.

        Routers distribute the weights among the remaining experts, as if the others had never existed.

        Raises:
            UsageError: a layer has no such experts or would keep too few; or prefixes are reused, which hold what the
                experts did before.
        """
        if self.settings.prefix_reuse:
            raise UsageError(
                "experts cannot be forbidden while prefixes are reused",
                hint="open the engine with prefix_reuse=False",
            )
        with self._lock:
            self._require_open()
            try:
                for layer in self.config.moe_layers:
                    self._model.forbid(layer, ())
                for layer, forbidden in experts.items():
                    self._model.forbid(layer, tuple(forbidden))
            except ValueError as error:
                raise UsageError(f"these experts cannot be forbidden: {error}") from None

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Next-token logits at every position: float32 [tokens, vocab_size]. Needs no tokenizer.

        The array is not part of the memory plan; `read_logits` gives the same rows a few at a time, within it.
        """
        out = np.empty((len(token_ids), self.config.vocab_size), np.float32)

        def keep(first: int, rows: NDArray[np.float32]) -> None:
            out[first : first + len(rows)] = rows

        self.read_logits(token_ids, keep)
        return out

    def read_logits(self, token_ids: Sequence[int], take: Callable[[int, NDArray[np.float32]], None]) -> None:
        """Call `take` with the next-token logits of all positions, in order, a few at a time.

        Args:
            take: gets the position of the first row, and the rows: float32 [rows, vocab_size], at most
                `settings.max_sequences` of them. The memory plan has room for these and two copies.

        Raises:
            UsageError: the engine has other sequences.
        """
        at_once = self.settings.max_sequences
        with self._lock, self._foreground, self._turns:
            (sequence,) = self.prepare(list(token_ids), SamplingParams(max_tokens=1))
            sequence.can_reuse = False
            self.enqueue([sequence])
            try:
                if self._sequences[:-1]:
                    raise UsageError("logits are read alone; finish or cancel the other sequences first")
                at = 0
                while at < len(token_ids):
                    self._clock.mark("other")
                    scheduled = self._scheduler.next_step()
                    assert scheduled is not None  # a prompt of ids has no media
                    self._forward(step := scheduled.step)
                    self._scheduler.commit(scheduled)
                    self._note_drafts(scheduled)
                    for start in range(0, step.num_tokens, at_once):
                        rows = np.arange(start, min(start + at_once, step.num_tokens))
                        take(at + start, self._model.logits(rows))
                    at += step.num_tokens
            finally:
                self.cancel(sequence)

    @property
    def prompts(self) -> PromptBuilder:
        """Turns prompts into token ids. The engine ends its chat-template process."""
        return self._requests.prompts

    @property
    def num_parameters(self) -> int:
        """Parameters of the model with all of its experts, without encoders."""
        return count_parameters(self.config)[0]

    @property
    def fingerprint(self) -> str:
        """The digest that identifies the model (`checkpoint/fingerprint.py`); it reads samples of the files."""
        return fingerprint(self._files)

    @property
    def media_kinds(self) -> tuple[Kind, ...]:
        """The media that a prompt may contain: "picture", "sound"."""
        return () if self._media is None else self._media.kinds

    @property
    def media_faults(self) -> Mapping[Kind, ArgosyError]:
        """Why a prompt may not have media of a kind that the model has a tower for, such as too small a budget."""
        return {} if self._media is None else self._media.faults

    @property
    def hears(self) -> Hearing:
        """How the engine treats a sound in a prompt: it is refused, heard by the model, or transcribed."""
        return "none" if self._media is None else self._media.hears

    @property
    def ears(self) -> Transcriber | None:
        """Transcribes sounds beside the steps of the model; None if the engine was opened without `ears`."""
        return self._ears

    @property
    def ledger(self) -> Ledger:
        """Totals since the engine started."""
        return self._answers.ledger

    def tell_recorder(self) -> None:
        """Pass the steps logged so far to the recorder, if there is one. `close` does this, too."""
        with self._lock:
            self._require_open()
            self._tell_recorder()

    def _tell_recorder(self) -> None:
        if self._log is not None and self._model.experts is not None:
            self._log.flush(self._model.experts)

    def facts(self) -> EngineFacts:
        """A snapshot for monitoring, taken between two steps."""
        with self._lock:
            self._require_open()
            num_slots = self.plan.num_slots if self._experts is None else self._experts.num_slots
            return facts.collect(
                self._scheduler, self._cache, self._model, self._answers, self._uses, self.plan, num_slots,
                self._runtime,
            )  # fmt: skip

    @property
    def has_work(self) -> bool:
        """Whether a step would run any sequence."""
        return self._scheduler.has_work

    @property
    def running_step(self) -> RunningStep | None:
        """The step that runs now and how far it is, without waiting for it; None: none runs."""
        scheduled = self._in_step
        return None if scheduled is None else RunningStep(scheduled, self._model.decoder.share_done)

    def progress(
        self, sequences: Sequence[EngineSequence] | None = None, name: str = ""
    ) -> RequestProgress | None:
        """How far a request is, without waiting for the running step; None: it has not run yet. From any thread.

        Args:
            sequences: its answers; None: all sequences of the engine, if it has one request.
        """
        sequences = list(self._sequences) if sequences is None else sequences
        return progress_of(name, sequences, lambda: self.running_step, now=perf_counter())

    def why_waiting(self, sequence: EngineSequence) -> WaitReason:
        """What a sequence waits for that has not run yet, without waiting for the running step. From any thread."""
        return self._scheduler.why_waiting(sequence)

    @property
    def progressed_at(self) -> float:
        """Monotonic seconds at which a step was last between two layers, without waiting for the step; 0: closed."""
        return self._model.decoder.progressed_at if self._is_open else 0.0

    @property
    def is_writing(self) -> bool:
        """Whether prefixes are waiting to be written to `kv_dir`. Every step writes some, even with no other work."""
        return self._cache.is_writing

    def close(self) -> None:
        """Cancel running sequences and free everything. Closing twice is harmless."""
        if self._ears is not None:
            self._ears.close()  # without the lock, for which a transcription may wait
        with self._lock:
            if not self._is_open:
                return
            for sequence in list(self._sequences):
                self._finish(sequence, "cancelled")
            self._is_open = False
            self._tell_recorder()
            self._requests.prompts.close()
            if self._media is not None:
                self._media.close()
            if self._idle is not None:
                self._idle.close()
            if self._experts is not None:
                self._experts.close()
            self._idle = self._experts = None
            self._cache.close()
            self._store.close()
            self._runtime.close()
            self._model.close()
            del self._requests, self._uses, self._scheduler, self._cache, self._mtp
            del self._answers, self._energy, self._media
        if self._reads is not None:
            with suppress(OSError):
                self._reads.note(self._files.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError("the engine is closed")


def _find_pooling(files: ModelFiles, config: EngineConfig) -> Pooling | ArgosyError:
    """The pooling of embeddings, or the error to raise when one is wanted: other answers do not need it."""
    try:
        return config.pooling or declared_pooling(files) or "last"
    except CheckpointError as error:
        return error
