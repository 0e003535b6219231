"""Prompt -> token events. `Engine.step` is the map of the system.

    prompt/ ─ tokens ─ scheduler ─ model/ ─ sampler ─ commit ─ events

An engine owns everything that has a size: the memory plan, the dense weights, the KV cache, the recurrent state, the
working buffers and the expert source. It is one process's single user of them; calls from several threads take turns.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import Budget, EngineConfig, KvDtype, ModelConfig, SamplingParams, parse_size
from argosy.engine.kv_cache import KvBlocks
from argosy.engine.ledger import Ledger
from argosy.engine.memory_plan import (
    KV_BLOCK_TOKENS,
    TOKENIZER_ROOM_BYTES,
    MemoryPlan,
    plan_memory,
    process_bytes,
    quarter_of_experts,
)
from argosy.engine.recurrent_state import StateSlots
from argosy.engine.sampler import Sampler, SamplerState
from argosy.engine.scheduler import Scheduled, Scheduler
from argosy.engine.sequence import FinishReason, Result, TokenEvent, TokenLogprob
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.errors import DoesNotFit, PromptTooLong, UnsupportedModel, UsageError
from argosy.experts.cache import CachedSource
from argosy.experts.source import ExpertFiles, ExpertSource, Progress, ResidentReading, load_resident
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder, RouteObserver
from argosy.model.families import open_model
from argosy.model.layers import kv_shapes
from argosy.model.weights import DenseReading
from argosy.model.workspace import Workspace
from argosy.plan import machine
from argosy.prompt.messages import Message
from argosy.prompt.prompt import Prompt, PromptBuilder
from argosy.prompt.tokenizer import Tokenizer, has_chat_template

if TYPE_CHECKING:
    from argosy.prompt.chat import Worker

DEMO = "demo"  # the word for the embedded default model; a directory of that name is `./demo`
DEMO_CONTEXT, DEMO_CHUNK = 2048, 256  # tokens, where nothing is said
PromptLike = str | Sequence[int] | Sequence[Message] | Prompt


@contextmanager
def _no_collections() -> Iterator[None]:
    """No search for garbage: a start makes a hundred thousand objects that stay, and no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Engine:
    """Runs one model within one memory budget.

    Args:
        model: a checkpoint or pack directory, a GGUF file, or `demo` for the embedded default model; with neither
            `memory` nor `expert_slots` given, a quarter of the demo model's experts are in memory.
        memory: the whole process's budget: bytes, `8GiB`, `8GB`, `75%`, or a `Budget`. None: what is free, less a
            margin (`plan.machine.default_budget`).
        threads: compute threads; None: the cores this process may use.
        context: positions of the KV cache, shared by all sequences; None: as the budget carries.
        kv_dtype: `f32`, or `f16` for half the memory and rounded keys and values.
        instruction_set: caps the choice of kernels: `plain`, `avx2` or `avx512`.
        chunk_tokens: most prompt tokens in one step; None: as the memory plan finds best.
        expert_slots: fixes the size of the expert cache instead of giving it what the budget leaves.
        look_ahead: while decode leaves the drive idle, read what the next layer will probably ask for.
        experts_off: leave routed experts out of every sum, to compare with a dense base.
        progress: hears what start-up is doing.
        observe_routes: hears (layer, expert_ids [tokens, k]) of every step. Routing can reveal text: keep it private.

    Raises:
        DoesNotFit, CheckpointError and its kin, UsageError: see `errors`.
    """

    @_no_collections()
    def __init__(
        self,
        model: str | Path = "demo",
        *,
        memory: str | int | Budget | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv_dtype: KvDtype = "f32",
        instruction_set: str | None = None,
        chunk_tokens: int | None = None,
        max_sequences: int = 8,
        readers: int = 4,
        expert_slots: int | None = None,
        look_ahead: bool = True,
        experts_off: bool = False,
        progress: Progress | None = None,
        observe_routes: RouteObserver | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._is_open = False
        _choose_instruction_set(instruction_set)
        directory = locate_model(model, progress)
        files = open_model(directory)
        if files.has_strided_experts:
            raise UnsupportedModel(
                f"{directory} keeps its experts transposed, and they cannot be read row by row",
                hint=f"`argosy pack {directory} DIR --format source` puts them in order, and DIR runs",
                path=directory,
                key="experts",
            )
        self.config: ModelConfig = files.config
        self.settings, expert_slots = settle(
            model,
            files,
            memory=memory,
            context=context,
            expert_slots=expert_slots,
            threads=threads,
            kv_dtype=kv_dtype,
            instruction_set=instruction_set,
            chunk_tokens=chunk_tokens,
            max_sequences=max_sequences,
            readers=readers,
            look_ahead=look_ahead,
            experts_off=experts_off,
        )
        if expert_slots is not None and not files.config.experts_per_token <= expert_slots:
            raise UsageError(
                f"expert_slots must be at least experts_per_token = {files.config.experts_per_token},"
                f" found {expert_slots}"
            )
        self._clock = PartClock()
        with ExitStack() as undo:
            self._store = _native.Store(readers)
            undo.callback(self._store.close)
            open_file = functools.cache(self._store.open)
            worker = _start_worker() if has_chat_template(directory) else None
            if worker is not None:
                undo.callback(worker.stop)
            self._load(directory, files, expert_slots, open_file, progress)
            if worker is None and self.tokenizer is not None and self.tokenizer.chat_template is not None:
                worker = _start_worker()  # a GGUF tells only now
                undo.callback(worker.stop)
            self._prompts = PromptBuilder(self.tokenizer, vocab_size=files.config.vocab_size, worker=worker)
            self._start(files, open_file, progress, observe_routes)
            undo.pop_all()
        self._is_open = True

    def _load(
        self,
        directory: Path,
        files: ModelFiles,
        expert_slots: int | None,
        open_file: Callable[[str], int],
        progress: Progress | None,
    ) -> None:
        """Read weights, build the tokenizer meanwhile, and plan with what the process then holds.

        Experts are read this early where all of them fit whatever the tokenizer will hold, within reason.
        """
        held = machine.process_footprint().resident_bytes
        plan_with = functools.partial(plan_memory, files, self.settings, expert_slots=expert_slots)
        self._experts: ExpertSource | None = None
        landed_bytes = 0  # the plan counts them by themselves
        with ExitStack() as undo:
            reading = experts_reading = None
            with suppress(
                DoesNotFit
            ):  # if it does not fit even so: nothing is read, and the plan below says why
                plan = plan_with(process_bytes=held)
                reading = DenseReading(
                    self._store,
                    files.dense,
                    open_file=open_file,
                    norm_offset=files.config.norm_offset,
                    progress=progress,
                )
                undo.callback(reading.cancel)
                to_spare = plan.budget_bytes - plan.total_bytes
                if self._has_experts(files) and plan.is_resident and to_spare >= TOKENIZER_ROOM_BYTES:
                    expert_files = ExpertFiles(self._store, files.experts, open_file=open_file)
                    experts_reading = ResidentReading(self._store, expert_files)
                    undo.callback(experts_reading.cancel)
            self.tokenizer = Tokenizer.open(directory, files.header)
            if reading is not None:
                self._weights = reading.finish()
                landed_bytes += self._weights.nbytes
            if experts_reading is not None:
                self._experts = experts_reading.finish(progress)
                landed_bytes += self._experts.arena.nbytes
            landed_bytes += self._store.staging_held_bytes
        self.plan: MemoryPlan = plan_with(
            process_bytes=max(held, process_bytes(self.tokenizer) - landed_bytes)
        )
        if self._experts is not None and not self.plan.is_resident:  # a tokenizer beyond reason
            self._experts.close()
            self._experts = None

    def _has_experts(self, files: ModelFiles) -> bool:
        return bool(files.experts) and not self.settings.experts_off

    def _start(
        self,
        files: ModelFiles,
        open_file: Callable[[str], int],
        progress: Progress | None,
        observe_routes: RouteObserver | None,
    ) -> None:
        plan, config, settings = self.plan, self.config, self.settings
        if self._has_experts(files) and self._experts is None:
            expert_files = ExpertFiles(self._store, files.experts, open_file=open_file)
            if plan.is_resident:
                self._experts = load_resident(self._store, expert_files, progress=progress)
            else:
                self._experts = CachedSource(
                    self._store,
                    expert_files,
                    num_slots=plan.num_slots,
                    num_layers=config.num_layers,
                    experts_per_token=config.experts_per_token,
                    look_ahead=settings.look_ahead,
                )
        self._blocks = KvBlocks(-(-plan.context_tokens // KV_BLOCK_TOKENS), KV_BLOCK_TOKENS)
        kv = _native.KvCache(kv_shapes(config), self._blocks.num_blocks, KV_BLOCK_TOKENS, settings.kv_dtype)
        self._states = None
        if config.delta is not None and plan.num_states:
            self._states = StateSlots(
                _native.RecurrentState(plan.num_states, len(config.delta_layers), config.delta.sizes)
            )
        self._runtime = _native.Runtime(settings.threads)
        self._decoder = Decoder(
            config,
            self._weights,
            self._experts,
            kv,
            self._runtime,
            Workspace(config, plan.chunk_tokens + settings.max_sequences),
            clock=self._clock,
            recurrent=None if self._states is None else self._states.state,
            observe=observe_routes,
        )
        self._scheduler = Scheduler(
            self._blocks,
            chunk_tokens=plan.chunk_tokens,
            max_sequences=settings.max_sequences,
            states=self._states,
        )
        self._sampler = Sampler()
        self._sequences: list[EngineSequence] = []
        self._eos_ids = set(config.eos_ids) | set(self.tokenizer.eos_ids if self.tokenizer else ())
        self._prompt_tokens = self._new_tokens = 0
        self._clock.mark("other")
        self._started_at = perf_counter()
        self._seconds_at_start = dict(self._clock.seconds)

    # ── one step ────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[TokenEvent]:
        """Prefill one chunk, or decode one token, for every sequence in the next batch.

        If anything fails half-way, ^C included, every sequence in the engine is cancelled: their KV is not whole.
        """
        with self._lock:
            self._require_open()
            if not self._scheduler.has_work:  # another thread's step finished it
                return []
            try:
                self._clock.mark("other")
                scheduled = self._scheduler.next_batch()
                self._clock.mark("other")
                logits = self._decoder.forward(scheduled.batch)  # layers -> router -> expert source -> kernel
                return self._commit(scheduled, logits)
            except BaseException:
                for sequence in list(self._sequences):
                    self._finish(sequence, "cancelled")
                raise

    def _commit(self, scheduled: Scheduled, logits: NDArray[np.float32]) -> list[TokenEvent]:
        """Sample, append, finish, free KV blocks."""
        events = []
        for sequence, row in zip(scheduled.ready, logits, strict=True):
            sampled = self._sampler.sample(row, sequence.params, sequence.sampler_state)
            self._clock.mark("sampling")
            if sequence.first_token_at is None:
                sequence.first_token_at = perf_counter()
                self._prompt_tokens += len(sequence.prompt_ids)
            self._new_tokens += 1
            logprob = None
            if sequence.logprobs is not None and sampled.logprob is not None:
                logprob = TokenLogprob(sampled.token_id, sampled.logprob, sampled.top_logprobs)
                sequence.logprobs.append(logprob)
            events.append(self._append(sequence, sampled.token_id, logprob))
            self._clock.mark("other")
        return events

    def _append(self, sequence: EngineSequence, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        sequence.new_ids.append(token_id)
        text = ""
        reason: FinishReason | None = None
        if token_id in self._eos_ids and not sequence.params.ignore_eos:
            reason = "stop"
        elif sequence.decoder is not None:
            text = sequence.decoder.push(token_id)
        if reason is None and len(sequence.new_ids) >= sequence.max_new_tokens:
            reason = "length"
        if reason is not None and sequence.decoder is not None:
            text += sequence.decoder.finish()
        if sequence.stop_strings is not None:
            text, hit = sequence.stop_strings.push(text)
            if hit:
                reason = "stop"
            elif reason is not None:
                text += sequence.stop_strings.finish()
        sequence.text += text
        result = self._finish(sequence, reason) if reason is not None else None
        event = TokenEvent(token_id, text, logprob, reason, result)
        sequence.events.append(event)
        return event

    def _finish(self, sequence: EngineSequence, reason: FinishReason) -> Result:
        self._scheduler.remove(sequence)
        self._sequences.remove(sequence)
        prompt, new = len(sequence.prompt_ids), len(sequence.new_ids)
        sequence.result = Result(
            text=sequence.text,
            token_ids=sequence.new_ids,
            finish_reason=reason,
            logprobs=sequence.logprobs,
            usage={"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
            seed=sequence.sampler_state.seed,
            ledger=self._ledger_since(sequence),
        )
        return sequence.result

    # ── what a caller uses ──────────────────────────────────────────────────────────────────────────────────

    def submit(self, prompt: PromptLike, params: SamplingParams | None = None) -> EngineSequence:
        """Queue a prompt. Its events collect in `.events` as `step` is called.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            UsageError: what `PromptBuilder.build` refuses, or parameters that this model cannot honour.
        """
        params = params or SamplingParams()
        started_at = perf_counter()
        with self._lock:
            self._require_open()
            prompt_ids = list(self._prompts.build(prompt).token_ids or ())
            available = self.plan.context_tokens
            if len(prompt_ids) >= available:
                raise PromptTooLong(
                    f"the prompt has {len(prompt_ids)} tokens, and the context holds {available}"
                    " with at least one for the answer",
                    hint="raise --context (more memory), or shorten the prompt",
                    needed=len(prompt_ids) + 1,
                    available=available,
                )
            if params.stop and self.tokenizer is None:
                raise UsageError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
            for token_id in params.logit_bias:
                if not 0 <= token_id < self.config.vocab_size:
                    raise UsageError(
                        f"logit_bias names token {token_id}; the vocabulary has {self.config.vocab_size}"
                    )
            sequence = EngineSequence(
                prompt_ids,
                params,
                max_new_tokens=min(params.max_tokens, available - len(prompt_ids)),
                sampler_state=SamplerState(prompt_ids, params.seed),
                decoder=self.tokenizer.stream() if self.tokenizer else None,
            )
            sequence.started_at = started_at
            sequence.counters_at_start = self.ledger
            self._sequences.append(sequence)
            self._scheduler.add(sequence)
            return sequence

    def cancel(self, sequence: EngineSequence) -> None:
        """Stop a sequence and free what it holds; harmless when it has finished."""
        with self._lock:
            if sequence in self._sequences:
                self._finish(sequence, "cancelled")

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Events of one answer, as they come; the last has the result. Closing the iterator cancels the rest."""
        sequence = self.submit(prompt, params)
        try:
            while sequence.events or sequence.result is None:
                while sequence.events:
                    yield sequence.events.popleft()
                if sequence.result is None:
                    self.step()
        finally:
            self.cancel(sequence)

    def generate(self, prompt: PromptLike, params: SamplingParams | None = None) -> Result:
        """One whole answer."""
        return self.generate_batch([prompt], params)[0]

    def generate_batch(
        self,
        prompts: Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> list[Result]:
        """Answers of several prompts that run together; each is what it would be alone."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        sequences: list[EngineSequence] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                sequences.append(self.submit(prompt, own))
            while any(sequence.result is None for sequence in sequences):
                self.step()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
        return [sequence.result for sequence in sequences if sequence.result is not None]

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Next-token logits at every position: float32 [tokens, vocab_size]. Works without a tokenizer."""
        out = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        with self._lock:
            sequence = self.submit(list(token_ids), SamplingParams(max_tokens=1))
            try:
                if self._sequences[:-1]:
                    raise UsageError("logits() runs alone; finish or cancel what was submitted before")
                at = 0
                while at < len(out):
                    self._clock.mark("other")
                    batch = self._scheduler.next_batch().batch
                    self._decoder.forward(batch)
                    for start in range(
                        0, batch.num_tokens, 16
                    ):  # a few rows at a time: the vocabulary is wide
                        rows = np.arange(start, min(start + 16, batch.num_tokens))
                        out[at + rows] = self._decoder.logits(rows)
                    at += batch.num_tokens
            finally:
                self.cancel(sequence)
        return out

    @property
    def ledger(self) -> Ledger:
        """Totals since the engine started."""
        stats = self._experts.stats if self._experts is not None else None
        self._clock.mark("other")
        return Ledger(
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            wall_s=sum(self._clock.seconds.values()) - sum(self._seconds_at_start.values()),
            lookups=stats.lookups if stats else 0,
            hits=stats.hits if stats else 0,
            bytes_read=stats.bytes_read if stats else 0,
            peak_bytes=machine.process_footprint().peak_bytes,
            parts={part: s - self._seconds_at_start[part] for part, s in self._clock.seconds.items()},
        )

    def close(self) -> None:
        """Cancel what runs and give everything back; harmless the second time."""
        with self._lock:
            if not self._is_open:
                return
            for sequence in list(self._sequences):
                self._finish(sequence, "cancelled")
            self._is_open = False
            self._prompts.close()
            self._store.close()
            self._runtime.close()
            del self._decoder, self._weights, self._experts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────

    def _ledger_since(self, sequence: EngineSequence) -> Ledger:
        now, before = self.ledger, sequence.counters_at_start
        first = sequence.first_token_at
        return Ledger(
            prompt_tokens=len(sequence.prompt_ids),
            new_tokens=len(sequence.new_ids),
            wall_s=now.wall_s - before.wall_s,
            time_to_first_token_s=None if first is None else first - sequence.started_at,
            lookups=now.lookups - before.lookups,
            hits=now.hits - before.hits,
            bytes_read=now.bytes_read - before.bytes_read,
            peak_bytes=now.peak_bytes,
            parts={part: seconds - before.parts[part] for part, seconds in now.parts.items()},
        )

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError("the engine is closed")


def _start_worker() -> Worker:
    """The process that renders chat templates, to be ready with the first prompt."""
    from argosy.prompt.chat import Worker

    return Worker()


def _choose_instruction_set(cap: str | None) -> None:
    available = _native.instruction_sets()
    if cap is None:
        _native.use_instruction_set(available[-1])
        return
    if cap not in available:
        raise UsageError(f"unknown instruction set '{cap}'; this processor has: {', '.join(available)}")
    _native.use_instruction_set(cap)


def locate_model(model: str | Path, progress: Progress | None = None) -> Path:
    """Where a model is; makes the demo model where it is asked for the first time."""
    if str(model) == DEMO:
        from argosy.demo.locate import locate

        return locate(progress=progress)
    return Path(model)


def settle(
    model: str | Path,
    files: ModelFiles,
    *,
    memory: str | int | Budget | None = None,
    context: int | None = None,
    expert_slots: int | None = None,
    threads: int | None = None,
    chunk_tokens: int | None = None,
    **others: Any,
) -> tuple[EngineConfig, int | None]:
    """Settings and expert slots where some are left open: what `Engine` runs with and `argosy show` plans with."""
    if expert_slots is None and memory is None and str(model) == DEMO:
        expert_slots = quarter_of_experts(files)
        context, chunk_tokens = context or DEMO_CONTEXT, chunk_tokens or DEMO_CHUNK
    config = EngineConfig(
        budget=_budget(memory, context),
        threads=threads or machine.usable_cores(),
        chunk_tokens=chunk_tokens,
        **others,
    )
    return config, expert_slots


def _budget(memory: str | int | Budget | None, context: int | None) -> Budget:
    if isinstance(memory, Budget):
        return memory
    limit = machine.memory_limit()
    if memory is None:
        ram_bytes, _ = machine.default_budget(limit)
    else:
        ram_bytes = parse_size(memory, total_bytes=limit.total_bytes)
    return Budget(ram_bytes=ram_bytes, context_tokens=context)
