"""Prompt -> token events. `Engine.step` is the map of the system.

    prompt/ ─ tokens ─ scheduler ─ model/ ─ sampler ─ commit ─ events

An engine holds prompts, sequences and the scheduler; a `Model` holds weights, experts, KV cache and recurrent state.
One process uses an engine; calls from several threads take turns.

Elsewhere: `start.py` opens what an engine runs with; `scheduler.py` chooses the tokens of a step; `answers.py` turns
logits into tokens and ends answers; `loop.py` runs an engine in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from argosy.checkpoint.files import ModelFiles
from argosy.config import DEMO, EngineConfig, ModelConfig, SamplingParams
from argosy.engine import facts
from argosy.engine.admission import Admission
from argosy.engine.answers import Answers
from argosy.engine.blocking import BlockingCalls
from argosy.engine.drafter import Drafter
from argosy.engine.facts import EngineFacts, ExpertUses
from argosy.engine.ledger import Ledger
from argosy.engine.options import (
    EngineOptions,
    configure,
    locate_ears,
    locate_model,
    open_files,
    with_recorder,
)
from argosy.engine.requests import PromptLike, Requests
from argosy.engine.scheduler import MediaFailed, Scheduled, Scheduler
from argosy.engine.sequence import FinishReason, Result, TokenEvent
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.engine.start import start
from argosy.errors import ArgosyError, CheckpointError, ReadFailed, RunnerFailed, UsageError
from argosy.experts.recording import OpenRecorder, RouteLog, StepRoutes
from argosy.experts.resident import Progress
from argosy.media.parts import Hearing, Kind
from argosy.model.decoder import RouteObserver
from argosy.plan.work import work_of
from argosy.prompt.builder import PromptBuilder

if TYPE_CHECKING:
    from argosy.engine.ears import Transcriber


class Engine(BlockingCalls):
    """Runs one model within one memory budget.

        with Engine.open("path/or/demo", memory="8GiB") as engine:
            print(engine.generate("Why is the sky blue?").text)

    Args:
        files: the model, from `open_files`.
        config: every setting, from `configure`; `open` calls both.
        drafter: proposes tokens, at most `config.draft_tokens` per sequence and step.
        progress: called with the progress of startup.
        observe_routes: called with (layer, expert_ids [tokens, k]) in every step. Routing can reveal text: keep it
            private. Every step stops at every layer to call it; a recorder costs next to nothing.
        recorder: opens a recorder that receives the choices of all steps, several steps at a time; not called for a
            model without routed experts.

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
    ) -> None:
        config, told = with_recorder(config, files, recorder)
        started = start(files, config, progress=progress, observe_routes=observe_routes, recorder=told)
        self.config: ModelConfig = files.config
        self.settings = config
        self.work = work_of(files, config.kv_dtype)  # what predictions of its speed start from
        self.plan = plan = started.plan
        self.tokenizer = started.tokenizer
        self._clock, self._store, self._runtime = started.clock, started.store, started.runtime
        self._model, self._cache, self._media = started.model, started.cache, started.media
        self._log = started.log
        self._scheduler = Scheduler(
            self._cache,
            chunk_tokens=plan.chunk_tokens,
            max_sequences=config.max_sequences,
            num_axes=files.config.rope.num_axes,
            drafter=drafter,
            draft_tokens=config.draft_tokens,
        )
        self._requests = Requests(
            started.prompts,
            self.tokenizer,
            started.grammars,
            self._cache,
            context_tokens=plan.context_tokens,
            chunk_tokens=plan.chunk_tokens,
            model=files.config,
        )
        self.admission = Admission(config.max_sequences, config.max_waiting)
        self._answers = Answers(
            started.eos_ids, self.admission, clock=self._clock, experts=self._model.experts
        )
        self._uses = ExpertUses(self._model)
        self._sequences: list[EngineSequence] = []
        self._has_failed = False  # the last step failed, and the next one retries it
        self._lock = started.turns
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
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Open a model with the settings that are given, and the defaults for the others.

        Args:
            model: a checkpoint or pack directory, a GGUF file, or `demo` for the embedded default model.
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
        )

    # ── one step ────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[TokenEvent]:
        """Prefill a chunk, decode a token or confirm proposed ones, for every sequence in the next step.

        A step whose read fails runs once more. If the read fails again, the sequences that need the expert end with
        the error, and the others continue unaffected. If anything else fails midway, including ^C, every sequence in
        the engine is cancelled.
        """
        with self._lock:
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
                except MediaFailed as failed:
                    self._finish(failed.sequence, "error", failed.error)
                    return []
                finally:
                    self._clock.mark_encoding(self._scheduler.take_making_s())
                if scheduled is None:  # all that can run are encoders of pictures and sound
                    return []
                try:  # layers -> router -> experts -> kernels
                    logits = self._model.forward(scheduled.step)
                except (CheckpointError, ReadFailed, RunnerFailed) as error:
                    self._recover(scheduled, error)
                    return []
                self._has_failed = False
                return self._commit(scheduled, logits)
            except BaseException:
                for sequence in list(self._sequences):
                    self._finish(sequence, "cancelled")
                raise

    def _commit(self, scheduled: Scheduled, logits: NDArray[np.float32]) -> list[TokenEvent]:
        """Choose tokens, then count what was computed, then end the answers that are finished."""
        answers = self._answers
        self._uses.count(scheduled.step.num_tokens)
        if self._log is not None:
            self._note_routes(self._log, scheduled)
        ended = answers.note_prompts(scheduled, self._model, at_once=self.settings.max_sequences)
        rows = scheduled.rows(logits)
        if ended:
            failed = [one.sequence for one in ended]
            rows = [each for each in rows if each[0] not in failed]
        accepted = [answers.accept(*each) for each in rows]
        if scheduled.proposals:
            self._scheduler.commit(scheduled, {one.sequence: one.num_confirmed for one in accepted})
        else:
            self._scheduler.commit(scheduled)
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

    def _note_routes(self, log: RouteLog, scheduled: Scheduled) -> None:
        step, decoder, experts = scheduled.step, self._model.decoder, self._model.experts
        assert decoder.choices is not None
        assert experts is not None
        numbers = [sequence.number for sequence in scheduled.sequences]
        log.note(StepRoutes(decoder.choices, step.is_decode, step.sequence, numbers), experts)

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
        self._sequences.remove(sequence)
        return self._answers.result(sequence, reason, error)

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

    def enqueue(self, sequences: Sequence[EngineSequence], *, has_room: bool = False) -> None:
        """Queue sequences from `prepare`, all or none. With `has_room`, the caller has already checked for room.

        Raises:
            Overloaded: too many sequences are already waiting.
        """
        with self._lock:
            self._require_open()
            if not has_room:
                self.admission.require_room(len(sequences), num_live=len(self._sequences))
            counters = self.ledger
            for sequence in sequences:
                sequence.counters_at_start = counters
                self._sequences.append(sequence)
                self._scheduler.add(sequence)

    def cancel(self, sequence: EngineSequence) -> None:
        """Stop a sequence and free what it holds; does nothing once it has finished."""
        with self._lock:
            if sequence in self._sequences:
                self._finish(sequence, "cancelled")

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
        """Next-token logits at every position: float32 [tokens, vocab_size]. Needs no tokenizer."""
        out = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        with self._lock:
            (sequence,) = self.prepare(list(token_ids), SamplingParams(max_tokens=1))
            sequence.can_reuse = False
            self.enqueue([sequence])
            try:
                if self._sequences[:-1]:
                    raise UsageError("logits() runs alone; finish or cancel the other sequences first")
                at = 0
                while at < len(out):
                    self._clock.mark("other")
                    scheduled = self._scheduler.next_step()
                    assert scheduled is not None  # a prompt of ids has no media
                    self._model.forward(step := scheduled.step)
                    self._scheduler.commit(scheduled)
                    # A few rows at a time, because the vocabulary is wide.
                    for start in range(0, step.num_tokens, 16):
                        rows = np.arange(start, min(start + 16, step.num_tokens))
                        out[at + rows] = self._model.logits(rows)
                    at += step.num_tokens
            finally:
                self.cancel(sequence)
        return out

    @property
    def prompts(self) -> PromptBuilder:
        """Turns prompts into token ids. The engine ends its chat-template process."""
        return self._requests.prompts

    @property
    def media_kinds(self) -> tuple[Kind, ...]:
        """What a prompt may have beside text: "picture", "sound"."""
        return () if self._media is None else self._media.kinds

    @property
    def media_faults(self) -> Mapping[Kind, ArgosyError]:
        """Why a prompt may not have media of a kind that the model has a tower for, such as too small a budget."""
        return {} if self._media is None else self._media.faults

    @property
    def hears(self) -> Hearing:
        """What becomes of a sound in a prompt: the model takes none, hears it itself, or reads its transcript."""
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
        """What the engine runs and uses, for monitoring; taken between two steps."""
        with self._lock:
            self._require_open()
            lent_slots = 0 if self._media is None else self._media.memory.lent_slots
            return facts.collect(
                self._scheduler, self._cache, self._model, self._answers, self._uses, self.plan, lent_slots
            )

    @property
    def has_work(self) -> bool:
        """Whether a step would run any sequence."""
        return self._scheduler.has_work

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
            self._cache.close()
            self._store.close()
            self._runtime.close()
            self._model.close()
            del self._requests, self._uses, self._scheduler, self._cache, self._answers, self._media

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError("the engine is closed")
