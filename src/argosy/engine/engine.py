"""Prompt -> token events. `Engine.step` is the map of the system.

    prompt/ ─ tokens ─ scheduler ─ model/ ─ sampler ─ commit ─ events

An engine owns everything that has a size: the memory plan, the dense weights, the KV cache, the recurrent state, the
working buffers and the expert source. One process uses it; calls from several threads take turns.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import (
    AskAhead,
    Budget,
    EngineConfig,
    KvDir,
    KvDtype,
    ModelConfig,
    SamplingParams,
    parse_size,
)
from argosy.engine.facts import EngineFacts, ExpertUses, Pace
from argosy.engine.kv_cache import KvBlocks
from argosy.engine.ledger import Ledger
from argosy.engine.memory_plan import (
    KV_BLOCK_TOKENS,
    TOKENIZER_ROOM_BYTES,
    MemoryPlan,
    held_bytes,
    kv_bytes,
    page_table_bytes,
    plan_memory,
    process_bytes,
    quarter_of_experts,
    require_mappable,
    state_bytes,
)
from argosy.engine.prefix import PrefixCache, identify
from argosy.engine.prefix_files import SECRET_BYTES, PrefixFiles
from argosy.engine.recurrent_state import StateSlots
from argosy.engine.sampler import Sampler, SamplerState, derived_seed, with_logprobs
from argosy.engine.scheduler import Scheduled, Scheduler
from argosy.engine.sequence import FinishReason, Result, TokenEvent, TokenLogprob
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.errors import (
    ArgosyError,
    CheckpointError,
    DoesNotFit,
    Overloaded,
    PromptTooLong,
    ReadFailed,
    UnsupportedModel,
    UsageError,
)
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
from argosy.prompt.tokenizer import StreamDecoder, Tokenizer, has_chat_template

if TYPE_CHECKING:
    from argosy.engine.constraint import Constraint, GrammarCompiler
    from argosy.prompt.chat import Worker

DEMO = "demo"  # selects the embedded default model; a directory of that name is `./demo`
DEMO_CONTEXT, DEMO_CHUNK = 2048, 256  # default tokens for the demo model
PromptLike = str | Sequence[int] | Sequence[Message] | Prompt


@contextmanager
def _no_collections() -> Iterator[None]:
    """Disable garbage collection: startup makes a hundred thousand objects that stay, and no cycles."""
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
        model: a checkpoint or pack directory, a GGUF file, or `demo` for the embedded default model. Without `memory`
            and `expert_slots`, a quarter of the demo model's experts are in memory.
        memory: the budget of the whole process: bytes, `8GiB`, `8GB`, `75%`, or a `Budget`. None: free memory less a
            margin (`plan.machine.default_budget`).
        threads: compute threads; None: the cores this process may use.
        context: positions of the KV cache, shared by all sequences, at most the model's context length; None: as many
            as the budget allows.
        kv_dtype: `f32`, or `f16`, which halves the memory and rounds keys and values.
        instruction_set: the most capable one to use: `plain`, `avx2` or `avx512`.
        ask_ahead: how products prefetch weights: `off`, `one_level` or `two_levels`; None: measure and choose.
        chunk_tokens: maximum prompt tokens in one step; None: the memory plan decides.
        expert_slots: a fixed size for the expert cache; None: what the budget leaves.
        look_ahead: prefetch the experts that the next layer will probably need while decode leaves the drive idle.
        experts_off: leave routed experts out of every sum, to compare with a dense base.
        max_sequences, max_waiting: maximum sequences running, and waiting; None: no limit on waiting.
        prefix_reuse: reuse the keys and values of a prompt prefix that was computed before.
        kv_dir: keeps those keys and values across restarts; a path, or a `KvDir` with its bounds.
        grammars: support answers that follow a `Grammar`; takes memory for the vocabulary.
        replay_bytes: memory that the plan leaves for a `ReplayMemory` beside this engine.
        request_bytes: memory that the plan leaves for requests that a server prepares for this engine.
        progress: called with the progress of startup.
        observe_routes: called with (layer, expert_ids [tokens, k]) in every step. Routing can reveal text: keep it
            private.

    Raises:
        DoesNotFit, UsageError, and `CheckpointError` and related errors: see `errors`.
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
        ask_ahead: AskAhead | None = None,
        chunk_tokens: int | None = None,
        max_sequences: int = 8,
        readers: int = 4,
        expert_slots: int | None = None,
        look_ahead: bool = True,
        experts_off: bool = False,
        max_waiting: int | None = None,
        prefix_reuse: bool = True,
        kv_dir: str | Path | KvDir | None = None,
        grammars: bool = False,
        replay_bytes: int = 0,
        request_bytes: int = 0,
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
                hint=f"run `argosy pack {directory} DIR --format source`, then use DIR",
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
            ask_ahead=ask_ahead,
            chunk_tokens=chunk_tokens,
            max_sequences=max_sequences,
            readers=readers,
            look_ahead=look_ahead,
            experts_off=experts_off,
            max_waiting=max_waiting,
            prefix_reuse=prefix_reuse,
            kv_dir=kv_dir if kv_dir is None or isinstance(kv_dir, KvDir) else KvDir(path=Path(kv_dir)),
            grammars=grammars,
            replay_bytes=replay_bytes,
            request_bytes=request_bytes,
        )
        if expert_slots is not None and not files.config.experts_per_token <= expert_slots:
            raise UsageError(
                f"expert_slots must be at least experts_per_token = {files.config.experts_per_token},"
                f" found {expert_slots}"
            )
        require_mappable(files, self.settings, expert_slots=expert_slots)
        self._clock = PartClock()
        with ExitStack() as undo:
            with _thread_limits():
                self._store = _native.Store(readers)
                undo.callback(self._store.close)
                # Measured before anything is loaded: the plan counts more for the process than this takes.
                self._runtime = _native.Runtime(
                    self.settings.threads, ask_ahead or _measured_ask_ahead(self.settings.threads)
                )
                undo.callback(self._runtime.close)
            open_file = functools.cache(self._store.open)
            self._files = self._open_kv_dir(files)
            if self._files is not None:
                undo.callback(self._files.close)
            worker = _start_worker() if has_chat_template(directory) else None
            if worker is not None:
                undo.callback(worker.stop)
            self._load(directory, files, expert_slots, open_file, progress)
            if worker is None and self.tokenizer is not None and self.tokenizer.chat_template is not None:
                worker = _start_worker()  # a GGUF's template is known only now
                undo.callback(worker.stop)
            self._prompts = PromptBuilder(
                self.tokenizer,
                vocab_size=files.config.vocab_size,
                worker=worker,
                context_tokens=self.plan.context_tokens,
            )
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
        """Read the weights, build the tokenizer meanwhile, and plan with the memory that the process then holds.

        Experts are read early, too, if all of them fit beside any tokenizer of reasonable size.
        """
        held = held_bytes()
        plan_with = functools.partial(plan_memory, files, self.settings, expert_slots=expert_slots)
        self._experts: ExpertSource | None = None
        landed_bytes = 0  # the plan counts these separately
        with ExitStack() as undo:
            reading = experts_reading = None
            # If not even this fits, nothing is read, and the plan below raises the error.
            with suppress(DoesNotFit):
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
            self._eos_ids = set(files.config.eos_ids) | set(self.tokenizer.eos_ids if self.tokenizer else ())
            self._grammars = self._compiler(files.config)
            if reading is not None:
                self._weights = reading.finish()
                landed_bytes += self._weights.nbytes
            if experts_reading is not None:
                self._experts = experts_reading.finish(progress)
                landed_bytes += self._experts.arena.nbytes
            landed_bytes += self._store.staging_held_bytes
            landed_bytes += page_table_bytes(landed_bytes, num_mappings=0)
        self.plan: MemoryPlan = plan_with(
            process_bytes=max(held, process_bytes(self.tokenizer) - landed_bytes)
        )
        if self._experts is not None and not self.plan.is_resident:  # an unreasonably large tokenizer
            self._experts.close()
            self._experts = None

    def _compiler(self, config: ModelConfig) -> GrammarCompiler | UsageError:
        """Returns the grammar compiler, or the error to raise when a request asks for one."""
        if not self.settings.grammars:
            return UsageError(
                "this engine does not support grammars", hint="create it with Engine(..., grammars=True)"
            )
        if self.tokenizer is None:
            return UsageError("a grammar needs a tokenizer, and this checkpoint has no tokenizer.json")
        from argosy.engine.constraint import GrammarCompiler  # imports modules that few engines need

        try:
            return GrammarCompiler(self.tokenizer, vocab_size=config.vocab_size, end_ids=self._eos_ids)
        except UsageError as error:
            return error

    def _open_kv_dir(self, files: ModelFiles) -> PrefixFiles | None:
        settings = self.settings
        if settings.kv_dir is None:
            return None
        return PrefixFiles(
            settings.kv_dir,
            identity=identify(files, settings.kv_dtype, settings.experts_off),
            block_bytes=kv_bytes(files.config, 1, settings.kv_dtype),
            state_bytes=state_bytes(files.config, 1),
        )

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
        self._states = None
        if config.delta is not None and plan.num_states:
            num_slots = plan.num_states + plan.num_snapshots
            self._states = StateSlots(
                _native.RecurrentState(num_slots, len(config.delta_layers), config.delta.sizes),
                plan.num_states,
            )
        self._blocks = KvBlocks(
            -(-plan.context_tokens // KV_BLOCK_TOKENS),
            KV_BLOCK_TOKENS,
            forgotten=(lambda key: None) if self._states is None else self._states.forget,
        )
        kv = _native.KvCache(kv_shapes(config), self._blocks.num_blocks, KV_BLOCK_TOKENS, settings.kv_dtype)
        self._cache = PrefixCache(
            self._blocks,
            kv,
            secret=os.urandom(SECRET_BYTES) if self._files is None else self._files.secret,
            identity=b"" if self._files is None else self._files.identity,
            states=self._states,
            files=self._files,
            is_on=settings.prefix_reuse,
        )
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
            self._cache,
            chunk_tokens=plan.chunk_tokens,
            max_sequences=settings.max_sequences,
            states=self._states,
        )
        self._sampler = Sampler(self._eos_ids)
        self._sequences: list[EngineSequence] = []
        self._numbers = itertools.count()
        self._has_failed = False  # the last step failed, and the next one retries it
        self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._uses = ExpertUses(self._decoder)
        self._pace = Pace()
        self._clock.mark("other")
        self._started_at = perf_counter()
        self._seconds_at_start = dict(self._clock.seconds)

    # ── one step ────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[TokenEvent]:
        """Prefill one chunk, or decode one token, for every sequence in the next batch.

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
                scheduled = self._scheduler.next_batch()
                self._clock.mark("other")
                try:  # layers -> router -> expert source -> kernel
                    logits = self._decoder.forward(scheduled.batch)
                except (CheckpointError, ReadFailed) as error:
                    self._recover(scheduled, error)
                    return []
                self._has_failed = False
                self._scheduler.committed(scheduled)
                return self._commit(scheduled, logits)
            except BaseException:
                for sequence in list(self._sequences):
                    self._finish(sequence, "cancelled")
                raise

    def _commit(self, scheduled: Scheduled, logits: NDArray[np.float32]) -> list[TokenEvent]:
        """Sample, append, finish, and free KV blocks."""
        self._uses.count(scheduled.batch.num_tokens)
        for sequence in scheduled.sequences:
            noted = sequence.prompt_logprobs
            if noted is not None and len(noted) < len(sequence.prompt_ids):
                self._note_prompt(sequence, scheduled)
        events = []
        for sequence, row in zip(scheduled.ready, logits, strict=True):
            if sequence.result is not None:
                continue  # its prompt's log-probabilities could not be computed
            for one in (sequence, *self._scheduler.fork(sequence)):
                one.prompt_logprobs = sequence.prompt_logprobs
                event = self._next_token(one, row)
                if event is not None:
                    events.append(event)
                self._clock.mark("other")
        return events

    def _next_token(self, sequence: EngineSequence, logits: NDArray[np.float32]) -> TokenEvent | None:
        """Choose and append a token, or return None if the sequence ended without one."""
        if sequence.first_token_at is None:
            sequence.first_token_at = perf_counter()
            self._prompt_tokens += len(sequence.prompt_ids)
            self._cached_tokens += sequence.cached_tokens or 0
        if not sequence.max_new_tokens:
            self._finish(sequence, "length")
            return None
        try:
            sampled = self._sampler.sample(
                logits, sequence.params, sequence.sampler_state, sequence.constraint
            )
        except ArgosyError as error:  # concerns this sequence alone
            self._finish(sequence, "error", error)
            return None
        self._clock.mark("sampling")
        self._new_tokens += 1
        logprob = None
        if sequence.logprobs is not None and sampled.logprob is not None:
            logprob = TokenLogprob(sampled.token_id, sampled.logprob, sampled.top_logprobs)
            sequence.logprobs.append(logprob)
        text, reason = sequence.append(sampled.token_id, self._eos_ids)
        result = self._finish(sequence, reason) if reason is not None else None
        event = TokenEvent(sampled.token_id, text, logprob, reason, result)
        sequence.events.append(event)
        return event

    def _note_prompt(self, sequence: EngineSequence, scheduled: Scheduled) -> None:
        """Record log-probabilities of the prompt tokens that follow this batch's tokens."""
        noted, prompt, batch = sequence.prompt_logprobs, sequence.prompt_ids, scheduled.batch
        assert noted is not None
        assert sequence.params.prompt_logprobs is not None
        rows = np.flatnonzero(batch.sequence == scheduled.sequences.index(sequence))
        wanted = batch.positions[rows]
        rows = rows[(wanted >= len(noted) - 1) & (wanted < len(prompt) - 1)]
        at_once = self.settings.max_sequences  # the memory plan has room for this many
        try:
            for start in range(0, len(rows), at_once):
                for logits in self._decoder.logits(rows[start : start + at_once]):
                    found = with_logprobs(prompt[len(noted)], logits, sequence.params.prompt_logprobs)
                    assert found.logprob is not None
                    noted.append(TokenLogprob(found.token_id, found.logprob, found.top_logprobs))
        except ArgosyError as error:  # concerns this sequence alone
            self._finish(sequence, "error", error)

    def _recover(self, scheduled: Scheduled, error: ArgosyError) -> None:
        """Run a step with failed reads once more; the second time, end the sequences that need the failed expert."""
        self._scheduler.failed(scheduled)
        self._has_failed = not self._has_failed
        if self._has_failed:
            return
        expert = error.facts.get("expert")
        concerned = scheduled.sequences
        if isinstance(expert, int):
            rows = self._decoder.rows_of(scheduled.batch, expert)
            concerned = [concerned[i] for i in np.unique(scheduled.batch.sequence[rows])]
        for sequence in concerned or scheduled.sequences:
            self._finish(sequence, "error", error)

    def _finish(
        self, sequence: EngineSequence, reason: FinishReason, error: ArgosyError | None = None
    ) -> Result:
        self._scheduler.remove(sequence)
        self._sequences.remove(sequence)
        self._pace.count(perf_counter())
        prompt, new = len(sequence.prompt_ids), len(sequence.new_ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        sequence.result = Result(
            text=sequence.text,
            token_ids=sequence.new_ids,
            finish_reason=reason,
            logprobs=sequence.logprobs,
            usage=usage | {"cached_tokens": sequence.cached_tokens or 0},
            seed=sequence.sampler_state.seed,
            ledger=self._ledger_since(sequence),
            stopped_by=sequence.stopped_by,
            prompt_logprobs=sequence.prompt_logprobs,
            error=error,
        )
        return sequence.result

    # ── public calls ────────────────────────────────────────────────────────────────────────────────────────

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
        params = params or SamplingParams()
        started_at = perf_counter()
        self._require_open()
        if num_answers < 1:
            raise UsageError(f"num_answers must be at least 1, found {num_answers}")
        built = self._prompts.build(prompt)
        prompt_ids = list(built.token_ids or ())
        available, least = self.plan.context_tokens, max(1, params.min_tokens)
        if len(prompt_ids) + least > available:
            raise PromptTooLong.of(len(prompt_ids), available, for_answer=least)
        self._require_possible(params)
        left = available - len(prompt_ids)
        sequences: list[EngineSequence] = []
        for number in range(num_answers):
            seed = params.seed if not sequences else derived_seed(sequences[0].sampler_state.seed, number)
            sequence = EngineSequence(
                prompt_ids,
                params,
                number=next(self._numbers),
                max_new_tokens=left if params.max_tokens is None else min(params.max_tokens, left),
                sampler_state=SamplerState(prompt_ids, seed),
                chain=self._cache.chain(tenant),
                decoder=self._decoder_of(built, params),
                tenant=tenant,
                constraint=self._constraint(params, tenant),
            )
            sequence.started_at = started_at
            if sequences:
                sequence.leader = sequences[0]
                sequences[0].followers.append(sequence)
            sequences.append(sequence)
        return sequences

    def enqueue(self, sequences: Sequence[EngineSequence], *, has_room: bool = False) -> None:
        """Queue sequences from `prepare`, all or none. With `has_room`, the caller has already checked for room.

        Raises:
            Overloaded: too many sequences are already waiting.
        """
        with self._lock:
            self._require_open()
            if not has_room:
                self.require_room(len(sequences), num_live=len(self._sequences))
            counters = self.ledger
            for sequence in sequences:
                sequence.counters_at_start = counters
                self._sequences.append(sequence)
                self._scheduler.add(sequence)

    def require_room(self, num_more: int, *, num_live: int) -> None:
        """Refuse sequences that would exceed the waiting limit; `num_live` already run or wait.

        Raises:
            Overloaded: they exceed it.
        """
        limit, num_waiting = self.settings.max_waiting, max(0, num_live - self.settings.max_sequences)
        if limit is not None and num_live + num_more > self.settings.max_sequences + limit:
            raise Overloaded(
                f"too many requests: {num_waiting} waiting, and the limit is {limit}",
                retry_after_s=self._pace.seconds_to_next(),
                hint="try again later",
                waiting=num_waiting,
                limit=limit,
            )

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
            if not isinstance(self._grammars, UsageError):
                self._grammars.forget(tenant)

    def forget_others(self, tenants: Collection[str]) -> None:
        """Forget what earlier processes kept in `kv_dir` for any tenant not listed."""
        if self._files is not None:
            self._files.forget_others(tenants)

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Yield the events of one answer as they come; the last has the result. Closing the iterator cancels it.

        Raises:
            ArgosyError: the answer cannot be finished, because a read failed or its grammar cannot be followed.
        """
        sequence = self.submit(prompt, params)
        try:
            while sequence.events or sequence.result is None:
                while sequence.events:
                    yield sequence.events.popleft()
                if sequence.result is None:
                    self.step()
            sequence.result.require()
        finally:
            self.cancel(sequence)

    def generate(self, prompt: PromptLike, params: SamplingParams | None = None) -> Result:
        """Return one whole answer. Raises what `stream` raises."""
        return self.generate_batch([prompt], params)[0]

    def generate_batch(
        self,
        prompts: Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> list[Result]:
        """Answer several prompts together, each as it would be alone. Raises what `stream` raises."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        sequences: list[EngineSequence] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                sequences.append(self.submit(prompt, own))
            while any(sequence.result is None for sequence in sequences):
                self.step()
            return [one.result.require() for one in sequences if one.result is not None]
        finally:
            for sequence in sequences:
                self.cancel(sequence)

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
                    scheduled = self._scheduler.next_batch()
                    batch = scheduled.batch
                    self._decoder.forward(batch)
                    self._scheduler.committed(scheduled)
                    # A few rows at a time, because the vocabulary is wide.
                    for start in range(0, batch.num_tokens, 16):
                        rows = np.arange(start, min(start + 16, batch.num_tokens))
                        out[at + rows] = self._decoder.logits(rows)
                    at += batch.num_tokens
            finally:
                self.cancel(sequence)
        return out

    @property
    def prompts(self) -> PromptBuilder:
        """Turns prompts into token ids. The engine ends its chat-template process."""
        return self._prompts

    @property
    def ledger(self) -> Ledger:
        """Totals since the engine started."""
        stats = self._experts.stats if self._experts is not None else None
        self._clock.mark("other")
        return Ledger(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            new_tokens=self._new_tokens,
            wall_s=sum(self._clock.seconds.values()) - sum(self._seconds_at_start.values()),
            lookups=stats.lookups if stats else 0,
            hits=stats.hits if stats else 0,
            bytes_read=stats.bytes_read if stats else 0,
            peak_bytes=machine.peak_bytes(),
            parts={part: s - self._seconds_at_start[part] for part, s in self._clock.seconds.items()},
        )

    def close(self) -> None:
        """Cancel running sequences and free everything. Closing twice is harmless."""
        with self._lock:
            if not self._is_open:
                return
            for sequence in list(self._sequences):
                self._finish(sequence, "cancelled")
            self._is_open = False
            self._prompts.close()
            self._cache.close()
            self._store.close()
            self._runtime.close()
            del (
                self._decoder,
                self._uses,
                self._scheduler,
                self._cache,
                self._states,
                self._weights,
                self._experts,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_work(self) -> bool:
        """Whether a step would run any sequence."""
        return self._scheduler.has_work

    @property
    def is_writing(self) -> bool:
        """Whether prefixes are waiting to be written to `kv_dir`. Every step writes some, even with no other work."""
        return self._cache.is_writing

    def facts(self) -> EngineFacts:
        """What the engine runs and uses, for monitoring; taken between two steps."""
        with self._lock:
            self._require_open()
            scheduler, blocks, states = self._scheduler, self._blocks, self._states
            return EngineFacts(
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting,
                num_put_back=scheduler.num_put_back,
                kv_blocks=blocks.num_blocks,
                kv_blocks_held=blocks.num_held,
                kv_blocks_kept=blocks.num_kept,
                kv_blocks_free=blocks.num_free,
                states_held=0 if states is None else states.num_sequences - states.num_free,
                states_free=0 if states is None else states.num_free,
                snapshots=0 if states is None else states.num_snapshots,
                num_experts=self.plan.num_experts,
                expert_slots=self.plan.num_slots,
                num_resident=0 if self._experts is None else self._experts.num_resident,
                file_bytes=0 if self._files is None else self._files.num_bytes,
                tokens_run=self._uses.num_tokens_run,
                totals=self.ledger,
                memory=tuple(self.plan.lines()),
                budget_bytes=self.plan.budget_bytes,
                expert_uses=self._uses.last_window,
                expert_use_tokens=self._uses.last_window_tokens,
            )

    # ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────

    def _ledger_since(self, sequence: EngineSequence) -> Ledger:
        now, before = self.ledger, sequence.counters_at_start
        first = sequence.first_token_at
        return Ledger(
            prompt_tokens=len(sequence.prompt_ids),
            cached_tokens=sequence.cached_tokens or 0,
            new_tokens=len(sequence.new_ids),
            wall_s=now.wall_s - before.wall_s,
            time_to_first_token_s=None if first is None else first - sequence.started_at,
            lookups=now.lookups - before.lookups,
            hits=now.hits - before.hits,
            bytes_read=now.bytes_read - before.bytes_read,
            peak_bytes=now.peak_bytes,
            parts={part: seconds - before.parts[part] for part, seconds in now.parts.items()},
        )

    def _decoder_of(self, prompt: Prompt, params: SamplingParams) -> StreamDecoder | None:
        if self.tokenizer is None:
            return None
        return self.tokenizer.stream(
            keep_special=not params.skip_special_tokens, is_start=prompt.is_conversation
        )

    def _constraint(self, params: SamplingParams, tenant: str) -> Constraint | None:
        if params.grammar is None:
            return None
        if isinstance(self._grammars, UsageError):
            raise self._grammars
        return self._grammars.compile(params.grammar, tenant)

    def _require_possible(self, params: SamplingParams) -> None:
        """Refuse parameters that this model cannot honour."""
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
        for name, token_ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < self.config.vocab_size:
                    raise UsageError(
                        f"{name} names token {token_id}; the vocabulary has {self.config.vocab_size}"
                    )

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError("the engine is closed")


def _start_worker() -> Worker:
    """Start the chat-template process now, so that it is ready for the first prompt."""
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


@contextmanager
def _thread_limits() -> Iterator[None]:
    """Turn a refused thread into an ArgosyError."""
    try:
        yield
    except RuntimeError as error:
        raise ArgosyError(
            str(error), hint="raise that limit, or ask for fewer threads: `--threads N`"
        ) from error


def _measured_ask_ahead(threads: int) -> AskAhead:
    return _ask_ahead_of(_native.instruction_set(), threads)


@functools.cache
def _ask_ahead_of(instruction_set: str, threads: int) -> AskAhead:
    """Measured once per argument pair: the machine stays the same."""
    return _native.ask_ahead_probe(threads)


def locate_model(model: str | Path, progress: Progress | None = None) -> Path:
    """Locate a model; makes the demo model on first use."""
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
    """Settings and expert slots with defaults filled in, as `Engine` runs and `argosy show` plans.

    Raises:
        UsageError: a setting is invalid, or the requested context is longer than the model supports.
    """
    if expert_slots is None and memory is None and str(model) == DEMO:
        expert_slots = quarter_of_experts(files)
        context = context or min(DEMO_CONTEXT, files.config.context_tokens)
        chunk_tokens = chunk_tokens or DEMO_CHUNK
    config = EngineConfig(
        budget=_budget(memory, context),
        threads=threads or machine.usable_cores(),
        chunk_tokens=chunk_tokens,
        **others,
    )
    require_context(files.config, config.budget.context_tokens)
    return config, expert_slots


def require_context(model: ModelConfig, context_tokens: int | None) -> None:
    """Check that the model supports an explicitly requested context.

    Raises:
        UsageError: the model has fewer positions.
    """
    if context_tokens is None or context_tokens <= model.context_tokens:
        return
    beyond = "a longer one needs rope scaling, and max_position_embeddings (context_length in a GGUF) that includes it"
    if model.rope.kind == "dynamic":
        beyond = "longer ones would need this model's dynamic rope scaling, which is not built in"
    raise UsageError(
        f"a context of {context_tokens} tokens was requested, and the model supports {model.context_tokens}",
        hint=f"`--context {model.context_tokens}` is the longest; {beyond}",
        needed=context_tokens,
        available=model.context_tokens,
    )


def _budget(memory: str | int | Budget | None, context: int | None) -> Budget:
    if isinstance(memory, Budget):
        return memory
    limit = machine.memory_limit()
    if memory is None:
        ram_bytes, _ = machine.default_budget(limit)
    else:
        ram_bytes = parse_size(memory, total_bytes=limit.total_bytes)
    return Budget(ram_bytes=ram_bytes, context_tokens=context)
