"""Start an engine: threads, weights, tokenizer, memory plan, model; if any of them fails, nothing stays open.

    reads of weights begin  ─ tokenizer, grammars ─  weights have landed  ─ plan ─  model

The tokenizer is built while weights are read. Its memory is known only afterwards, so the budget is divided twice:
before anything is read, to refuse early, and again with the memory that the process then holds. Experts are also read
early if all of them fit next to any tokenizer of reasonable size.

An engine that shares its process with others gets tokenizer and plan in its `ProcessShare`: its memory cannot be
measured while others run. It reads its experts when they are needed, into a changing number of slots. It starts in the
background: its reads give way to the steps and reads of other engines.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.budget.allowances import lendable_bytes, process_bytes
from argosy.budget.expert_memory import ExpertMemory
from argosy.budget.footprint import ModelFootprint, files_to_run, kv_blocks, state_bytes
from argosy.budget.idle_memory import IdleMemory
from argosy.budget.memory_plan import MemoryPlan
from argosy.budget.planner import grown, plan_with_media
from argosy.budget.requirements import TOKENIZER_ROOM_BYTES, require_mappable, require_memory
from argosy.checkpoint.files import ModelFiles
from argosy.config import KV_BLOCK_TOKENS, EngineConfig, ExpertSlots
from argosy.engine.media.text_only import TextOnly
from argosy.engine.options import choose_instruction_set
from argosy.engine.prefix import PrefixCache, identify
from argosy.engine.turns import Turns
from argosy.errors import ArgosyError, DoesNotFit, UnsupportedModel, UsageError
from argosy.experts.recording import RouteLog, RoutingRecorder
from argosy.experts.resident import Progress
from argosy.experts.runner import ExpertGroup
from argosy.kept.kv_cache import KvBlocks
from argosy.kept.kv_windows import KvWindows
from argosy.kept.prefix_files import SECRET_BYTES, PrefixFiles
from argosy.kept.recurrent_state import StateSlots
from argosy.kept.tails import Tail
from argosy.machine import tuning
from argosy.machine.resources import held_bytes, may_reserve, memory_limit, page_table_bytes
from argosy.media.decoder import FileDecoder
from argosy.media.parts import PROMPT_LIMITS
from argosy.model.clock import PartClock
from argosy.model.decoder import RouteObserver
from argosy.model.model import Model, ModelReading, ModelSizes
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.tokenizer import Tokenizer, has_chat_template

if TYPE_CHECKING:
    from argosy.engine.grammar.constraint import GrammarCompiler
    from argosy.engine.media.ears import Transcriber
    from argosy.engine.media.prompt_media import PromptMedia
    from argosy.model.whisper.files import WhisperFiles
    from argosy.prompt.chat import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokenizer and the grammar compiler of a model."""

    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    grammars: GrammarCompiler | UsageError  # the compiler, or the error to raise when a request has a grammar
    token_map: NDArray[np.int32] | None = None  # the folded id of each token, if n-gram tables need it

    @classmethod
    def open(cls, files: ModelFiles, config: EngineConfig) -> Self:
        """Read a model's tokenizer; it takes up to a second."""
        tokenizer = Tokenizer.open(files.path, files.header)
        eos_ids = frozenset(files.config.eos_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())
        return cls(
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            grammars=_open_grammars(files, config, tokenizer, eos_ids),
            token_map=tokenizer.fold() if tokenizer is not None and files.config.folds_tokens else None,
        )

    def forget_grammars(self) -> None:
        """Forget all compiled grammars; no answer may follow one."""
        if not isinstance(self.grammars, UsageError):
            self.grammars.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessShare:
    """An engine's share of its process: a part of it, or all of it.

    turns: the lock for the cores, common to all engines of the process, so that their steps do not compete.
    foreground: the steps of all engines that are not being loaded; None: there is no other engine.
    vocabulary, floor: from `plan_share`; None: the engine is alone, and creates both while it reads its weights.
    budget_bytes: its initial budget, at least the total of its floor.
    """

    footprint: ModelFootprint
    turns: Turns
    foreground: _native.Foreground | None = None
    vocabulary: Vocabulary | None = None
    floor: MemoryPlan | None = None
    budget_bytes: int = 0

    @classmethod
    def alone(cls, files: ModelFiles, config: EngineConfig) -> Self:
        """Give an engine the whole process.

        Raises:
            DoesNotFit: the machine has less memory than the budget, or an `ulimit` is too small.
        """
        footprint = ModelFootprint(files, config)
        require_mappable(footprint, config)
        require_memory(footprint, config)
        return cls(footprint=footprint, turns=Turns())


@dataclass(slots=True, kw_only=True)
class Started:
    """Everything that an engine runs with, closed as one. Small parts survive closing: plan, vocabulary, lock and ears.

    plan, experts, idle: `resizing.py` sets them while the engine runs.
    """

    clock: PartClock
    store: _native.Store
    runtime: _native.Runtime
    vocabulary: Vocabulary
    plan: MemoryPlan
    first_plan: MemoryPlan  # the basis of plans for other budgets
    prompts: PromptBuilder
    media: PromptMedia | TextOnly
    ears: Transcriber | None
    lock: Turns  # guards the engine's state: held for each step, and for each call between two steps
    turns: Turns  # shares the cores: held for each step, and for each piece of other work
    foreground: _native.Foreground | None  # steps of other engines that are not being loaded
    model: Model
    footprint: ModelFootprint
    experts: ExpertMemory | None  # None: the number of experts in memory never changes
    idle: IdleMemory | None  # None: idle memory of prompts and sequences stays unused
    log: RouteLog | None  # None: nothing is recorded
    cache: PrefixCache
    is_open: bool = True

    def require_open(self) -> None:
        if not self.is_open:
            raise UsageError("the engine is closed")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            """Refuse what `close` deleted, also for threads that saw the engine open and do not hold the lock."""
            if name in self.__dataclass_fields__:
                raise UsageError("the engine is closed")
            raise AttributeError(f"Started has no {name}")

    def close(self) -> None:
        """Free everything, even if a part of it fails to close. Call it with the lock, once."""
        self.is_open = False
        # No read of the store may still move bytes when the model frees their destination.
        with ExitStack() as last_first:
            last_first.callback(self.model.close)
            last_first.callback(self.runtime.close)
            last_first.callback(self.store.close)
            last_first.callback(self.cache.close)
            for one in (self.experts, self.idle, self.media, self.prompts):
                if one is not None:
                    last_first.callback(one.close)
            del self.prompts, self.media, self.idle, self.experts
            del self.cache, self.store, self.runtime, self.model


def start(
    files: ModelFiles,
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    observe_routes: RouteObserver | None = None,
    recorder: RoutingRecorder | None = None,
    share: ProcessShare | None = None,
    experts: ExpertGroup | None = None,
) -> Started:
    """Open everything that an engine needs.

    Args:
        share: None: the engine has the budget and the process for itself (`ProcessShare.alone`).
        experts: other processes that also run experts; `config.claims` includes their memory in this process.

    Raises:
        DoesNotFit: the budget or an `ulimit` is too small.
        UnsupportedModel, UsageError, and `CheckpointError` and related errors: see `errors`.
    """
    files = files_to_run(files, config)
    _require_readable(files)
    instruction_set = choose_instruction_set(config.instruction_set)
    share = ProcessShare.alone(files, config) if share is None else share
    ears_files = share.footprint.ears  # read before memory is measured
    clock = PartClock()
    with _no_collections(), ExitStack() as undo:
        store, runtime = _open_native(config, instruction_set, share.foreground, undo)
        prefix_files = _open_prefix_files(share.footprint, config, runtime, undo)
        worker = _start_worker(undo) if has_chat_template(files.path) else None
        read = _read(files, config, share, store, progress, undo)
        plan, footprint, tokenizer = read.plan, read.footprint, read.vocabulary.tokenizer
        if worker is None and tokenizer is not None and tokenizer.chat_template is not None:
            worker = _start_worker(undo)  # a GGUF's template is known only now
        log = None if recorder is None else _open_log(recorder, files, plan, config)
        model = read.reading.finish(
            _model_sizes(read, config, share.floor),
            runtime,
            clock=clock,
            look_ahead=config.look_ahead,
            observe=observe_routes,
            log=log,
            group=experts,
            foreground=share.foreground,
            token_map=read.vocabulary.token_map,
        )
        lock = Turns()
        memory = None if model.cache is None else ExpertMemory(model.cache, plan.slots, lock=lock)
        ears, media = _open_media(read, ears_files, store, runtime, share.turns, lock, memory, undo)
        prompts = PromptBuilder(
            tokenizer,
            vocab_size=files.config.vocab_size,
            worker=worker,
            context_tokens=plan.context_tokens,
            media=None if isinstance(media, TextOnly) else media,
        )
        cache = _open_cache(model, plan, config, prefix_files)
        idle = None if memory is None else idle_memory(memory, model, cache, footprint, config, plan)
        undo.pop_all()
    return Started(
        clock=clock,
        store=store,
        runtime=runtime,
        vocabulary=read.vocabulary,
        plan=plan,
        first_plan=read.first_plan,
        prompts=prompts,
        media=media,
        ears=ears,
        lock=lock,
        turns=share.turns,
        foreground=share.foreground,
        model=model,
        footprint=footprint,
        experts=memory,
        idle=idle,
        log=log,
        cache=cache,
    )


def _open_native(
    config: EngineConfig, instruction_set: str, foreground: _native.Foreground | None, undo: ExitStack
) -> tuple[_native.Store, _native.Runtime]:
    """Start the reader threads and the compute threads."""
    with _thread_limits():
        store = _native.Store(config.readers, foreground=foreground)
        undo.callback(store.close)
        # Measured before anything is loaded: the plan counts more for the process than this uses.
        choices = tuning.choose(
            config.threads,
            instruction_set,
            tune=config.tune,
            room_bytes=config.budget.ram_bytes - held_bytes(),
        )
        runtime = _native.Runtime(config.threads, choices.tunings(config.ask_ahead), instruction_set)
        undo.callback(runtime.close)
    return store, runtime


class _Read(NamedTuple):
    """A model whose weights have been read. The two plans differ if the engine may get more than its floor."""

    vocabulary: Vocabulary
    footprint: ModelFootprint
    first_plan: MemoryPlan
    plan: MemoryPlan  # to begin with
    reading: ModelReading


def _read(
    files: ModelFiles,
    config: EngineConfig,
    share: ProcessShare,
    store: _native.Store,
    progress: Progress | None,
    undo: ExitStack,
) -> _Read:
    """Read weights, and at the same time the tokenizer unless it exists; divide the budget."""
    footprint, vocabulary = share.footprint, share.vocabulary
    with_experts, held = False, held_bytes()
    reading = None
    with suppress(DoesNotFit):  # nothing is read then, and the plan below raises the error
        if share.floor is None:
            _, plan = plan_with_media(footprint, config, process_bytes=held)
            with_experts = plan.slots.is_resident and plan.left_bytes >= TOKENIZER_ROOM_BYTES
        reading = ModelReading(
            files, store, with_experts=with_experts, experts_off=config.experts_off, progress=progress
        )
        undo.callback(reading.cancel)
    if vocabulary is None:
        vocabulary = Vocabulary.open(files, config)
    landed = 0 if reading is None else reading.wait()  # the plan counts these bytes separately
    if share.floor is None:
        landed += page_table_bytes(landed, num_mappings=0)
        measured = max(held, process_bytes(vocabulary.tokenizer) - landed)
        footprint, first_plan = plan_with_media(footprint, config, process_bytes=measured)
        plan = first_plan
    else:
        first_plan, plan = share.floor, grown(footprint, share.floor, share.budget_bytes)
    assert reading is not None
    return _Read(vocabulary, footprint, first_plan, plan, reading)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Disable garbage collection: startup creates a hundred thousand lasting objects, and no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _thread_limits() -> Iterator[None]:
    """Turn the failure to start a thread into an ArgosyError."""
    try:
        yield
    except RuntimeError as error:
        raise ArgosyError(
            str(error), hint="raise that limit, or ask for fewer threads: `--threads N`"
        ) from error


def _require_readable(files: ModelFiles) -> None:
    if files.has_strided_experts:
        raise UnsupportedModel(
            f"{files.path} keeps its experts transposed, and they cannot be read row by row",
            hint=f"run `argosy pack {files.path} DIR --format source`, then use DIR",
            path=files.path,
            key="experts",
        )


def _start_worker(undo: ExitStack) -> Worker:
    """Start the chat-template process now, so that it is ready for the first prompt."""
    from argosy.prompt.chat import Worker

    worker = Worker()
    undo.callback(worker.stop)
    return worker


def _open_log(
    recorder: RoutingRecorder, files: ModelFiles, plan: MemoryPlan, config: EngineConfig
) -> RouteLog:
    return RouteLog(
        recorder,
        plan.model_sizes(config).step_tokens,
        num_layers=len(files.own_config.moe_layers),
        experts_per_token=files.config.experts_per_token,
    )


def most_experts(slots: ExpertSlots) -> int:
    """Return how many experts get addresses: the budget may grow while the engine runs."""
    if not may_reserve():
        return slots.reachable
    return max(slots.reachable, min(slots.num_experts, slots.fitting(memory_limit().total_bytes)))


def _model_sizes(read: _Read, config: EngineConfig, floor: MemoryPlan | None) -> ModelSizes:
    plan = read.plan
    if floor is not None:  # other engines may leave it the whole budget
        plan = grown(read.footprint, floor, max(floor.budget_bytes, plan.budget_bytes))
    return read.plan.model_sizes(config, most_experts=most_experts(plan.slots))


def idle_memory(
    experts: ExpertMemory,
    model: Model,
    cache: PrefixCache,
    footprint: ModelFootprint,
    config: EngineConfig,
    plan: MemoryPlan,
) -> IdleMemory:
    """From now on, lend the idle memory of prompts and sequences to experts."""
    return IdleMemory(
        experts,
        model.kv,
        cache.blocks,
        model.decoder,
        buffer_bytes=footprint.buffer_bytes if plan.idle_buffer_bytes else None,
        step_tokens=plan.model_sizes(config).step_tokens,
        decode_tokens=config.decode_tokens,
    )


def _open_media(
    read: _Read,
    ears_files: WhisperFiles | None,
    store: _native.Store,
    runtime: _native.Runtime,
    turns: Turns,
    lock: Turns,
    lends_to: ExpertMemory | None,
    undo: ExitStack,
) -> tuple[Transcriber | None, PromptMedia | TextOnly]:
    """Open ears and media, if the model has any; modules that only media need are imported here."""
    footprint, plan, ears = read.footprint, read.first_plan, None
    decoder = FileDecoder(PROMPT_LIMITS)
    undo.callback(decoder.close)
    if ears_files is not None:
        from argosy.engine.media.ears import Transcriber

        ears = Transcriber(ears_files, store, runtime, turns=turns, decoder=decoder)
    if not footprint.encoders and ears is None:
        return None, TextOnly()
    from argosy.budget.media_memory import MediaMemory
    from argosy.engine.media.prompt_media import open_media
    from argosy.model.encoders.reading import Encoders, runnable

    lend = functools.partial(
        MediaMemory,
        experts=lends_to,
        nbytes=lendable_bytes(plan.encoder_bytes) if plan.slots.lent else 0,
        lock=lock,
    )
    towers = runnable(footprint.encoders)
    encoders = Encoders(towers, store, runtime, open_file=functools.cache(store.open))
    tokenizer = read.vocabulary.tokenizer
    media = open_media(encoders, footprint.processors, decoder, footprint.low_detail, tokenizer, lend, ears)
    undo.callback(media.close)
    return ears, media


def _open_prefix_files(
    footprint: ModelFootprint, config: EngineConfig, runtime: _native.Runtime, undo: ExitStack
) -> PrefixFiles | None:
    if config.kv_dir is None:
        return None
    files = footprint.files
    opened = PrefixFiles(
        config.kv_dir,
        identity=identify(files, runtime.instruction_set, footprint.kv_dtype, config.experts_off),
        block_bytes=footprint.kv_bytes(1),
        state_bytes=state_bytes(files.config, 1),
    )
    undo.callback(opened.close)
    return opened


def _open_cache(
    model: Model, plan: MemoryPlan, config: EngineConfig, files: PrefixFiles | None
) -> PrefixCache:
    states = None
    if model.recurrent is not None:
        can_roll_back = config.draft_tokens > 0
        states = StateSlots(model.recurrent, plan.num_states, can_roll_back=can_roll_back)
    blocks = KvBlocks(
        kv_blocks(plan.context_tokens),
        KV_BLOCK_TOKENS,
        forgotten=(lambda key: None) if states is None else states.forget,
        windows=None
        if plan.windows is None
        else KvWindows(kv_blocks(plan.context_tokens), KV_BLOCK_TOKENS, plan.windows),
    )
    return PrefixCache(
        blocks,
        model.kv,
        secret=os.urandom(SECRET_BYTES) if files is None else files.secret,
        identity=b"" if files is None else files.identity,
        states=states,
        files=files,
        is_on=config.prefix_reuse,
        tail=_tail(model, config),
    )


def _tail(model: Model, config: EngineConfig) -> Tail | None:
    """Return the layers that only the ends of prompts need; None: all layers run for all tokens."""
    reach = max(model.config.reaches)
    if not reach or not config.leaves_out_tokens:
        return None
    return Tail(reach, max(layer.kept_window for layer in model.config.layers), KV_BLOCK_TOKENS)


def _open_grammars(
    files: ModelFiles, config: EngineConfig, tokenizer: Tokenizer | None, eos_ids: frozenset[int]
) -> GrammarCompiler | UsageError:
    if not config.grammars:
        return UsageError(
            "this engine does not support grammars", hint="create it with Engine.open(..., grammars=True)"
        )
    if tokenizer is None:
        return UsageError("a grammar needs a tokenizer, and this checkpoint has no tokenizer.json")
    from argosy.engine.grammar.constraint import GrammarCompiler  # imports modules that few engines need

    try:
        return GrammarCompiler(tokenizer, vocab_size=files.config.vocab_size, end_ids=eos_ids)
    except UsageError as error:
        return error
