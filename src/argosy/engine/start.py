"""Start an engine: threads, weights, tokenizer, memory plan, model; or nothing, if any of them fails.

    reads of weights begin  ─ tokenizer, grammars ─  weights have landed  ─ plan ─  model

The tokenizer is built while weights are read. What it takes is known only then, so the budget is divided twice: before
anything is read, to refuse early, and with the memory that the process then holds. Experts are read early, too, if all
of them fit beside any tokenizer of reasonable size.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import KV_BLOCK_TOKENS, AskAhead, EngineConfig
from argosy.engine.kv_cache import KvBlocks
from argosy.engine.memory_plan import (
    TOKENIZER_ROOM_BYTES,
    MemoryPlan,
    held_bytes,
    page_table_bytes,
    plan_with_media,
    process_bytes,
    require_mappable,
    require_memory,
)
from argosy.engine.prefix import PrefixCache, identify
from argosy.engine.prefix_files import SECRET_BYTES, PrefixFiles
from argosy.engine.recurrent_state import StateSlots
from argosy.engine.turns import Turns
from argosy.errors import ArgosyError, DoesNotFit, UnsupportedModel, UsageError
from argosy.experts.cache import CachedRunner
from argosy.experts.recording import RouteLog, RouteRecorder
from argosy.experts.resident import Progress
from argosy.media.decoder import Decoder
from argosy.media.parts import PROMPT_LIMITS
from argosy.model.clock import PartClock
from argosy.model.decoder import RouteObserver
from argosy.model.footprint import ModelFootprint, kv_blocks, kv_bytes, state_bytes
from argosy.model.model import Model, ModelReading
from argosy.prompt.builder import PromptBuilder
from argosy.prompt.tokenizer import Tokenizer, has_chat_template

if TYPE_CHECKING:
    from argosy.engine.constraint import GrammarCompiler
    from argosy.engine.ears import Transcriber
    from argosy.engine.media import PromptMedia
    from argosy.prompt.chat import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What an engine runs with; it closes all of it."""

    clock: PartClock
    store: _native.Store
    runtime: _native.Runtime
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    grammars: GrammarCompiler | UsageError  # the compiler, or the error to raise when a request has a grammar
    plan: MemoryPlan
    prompts: PromptBuilder
    media: PromptMedia | None  # None: the model takes text only
    ears: Transcriber | None
    turns: Turns  # held for each step, and for each piece of other work
    model: Model
    log: RouteLog | None  # None: nothing is recorded
    cache: PrefixCache


def start(
    files: ModelFiles,
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    observe_routes: RouteObserver | None = None,
    recorder: RouteRecorder | None = None,
) -> Started:
    """Open everything that an engine needs.

    Raises:
        DoesNotFit: the budget or an `ulimit` is too small.
        UnsupportedModel, UsageError, and `CheckpointError` and related errors: see `errors`.
    """
    _require_readable(files)
    instruction_set = _choose_instruction_set(config.instruction_set)
    footprint = ModelFootprint(files, config)
    ears_files = footprint.ears  # read before memory is measured
    require_mappable(footprint, config)
    require_memory(footprint, config)
    clock = PartClock()
    with _no_collections(), ExitStack() as undo:
        with _thread_limits():
            store = _native.Store(config.readers)
            undo.callback(store.close)
            # Measured before anything is loaded: the plan counts more for the process than this takes.
            ask_ahead = config.ask_ahead or _measured_ask_ahead(instruction_set, config.threads)
            runtime = _native.Runtime(config.threads, ask_ahead, instruction_set)
            undo.callback(runtime.close)
        prefix_files = _open_prefix_files(files, config, runtime)
        if prefix_files is not None:
            undo.callback(prefix_files.close)
        worker = _start_worker(undo) if has_chat_template(files.path) else None

        held = held_bytes()
        reading = None
        with suppress(DoesNotFit):  # then nothing is read, and the plan below raises the error
            _, plan = plan_with_media(footprint, config, process_bytes=held)
            reading = ModelReading(
                files,
                store,
                with_experts=plan.is_resident and plan.left_bytes >= TOKENIZER_ROOM_BYTES,
                experts_off=config.experts_off,
                progress=progress,
            )
            undo.callback(reading.cancel)
        tokenizer = Tokenizer.open(files.path, files.header)
        eos_ids = frozenset(files.config.eos_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())
        grammars = _open_grammars(files, config, tokenizer, eos_ids)
        landed = 0 if reading is None else reading.wait()  # the plan counts these bytes separately
        landed += page_table_bytes(landed, num_mappings=0)
        measured = max(held, process_bytes(tokenizer) - landed)
        footprint, plan = plan_with_media(footprint, config, process_bytes=measured)
        assert reading is not None
        if worker is None and tokenizer is not None and tokenizer.chat_template is not None:
            worker = _start_worker(undo)  # a GGUF's template is known only now
        log = None if recorder is None else _open_log(recorder, files, plan, config)
        model = reading.finish(
            plan.model_sizes(config),
            runtime,
            clock=clock,
            look_ahead=config.look_ahead,
            observe=observe_routes,
            log=log,
        )
        turns = Turns()
        ears = None
        decoder = Decoder(PROMPT_LIMITS)
        undo.callback(decoder.close)
        if ears_files is not None:
            from argosy.engine.ears import Transcriber

            ears = Transcriber(ears_files, store, runtime, turns=turns, decoder=decoder)
        media = _open_media(footprint, store, runtime, decoder, ears, tokenizer, model, plan, turns)
        if media is not None:
            undo.callback(media.close)
        prompts = PromptBuilder(
            tokenizer,
            vocab_size=files.config.vocab_size,
            worker=worker,
            context_tokens=plan.context_tokens,
            media=media,
        )
        cache = _open_cache(model, plan, config, prefix_files)
        undo.pop_all()
    return Started(
        clock=clock,
        store=store,
        runtime=runtime,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        grammars=grammars,
        plan=plan,
        prompts=prompts,
        media=media,
        ears=ears,
        turns=turns,
        model=model,
        log=log,
        cache=cache,
    )


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


@contextmanager
def _thread_limits() -> Iterator[None]:
    """Turn a refused thread into an ArgosyError."""
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


def _choose_instruction_set(cap: str | None) -> str:
    available = _native.instruction_sets()
    if cap is None:
        return available[-1]
    if cap not in available:
        raise UsageError(f"unknown instruction set '{cap}'; this processor has: {', '.join(available)}")
    return cap


@functools.cache
def _measured_ask_ahead(instruction_set: str, threads: int) -> AskAhead:
    """Measured once per argument pair: the machine stays the same."""
    return _native.ask_ahead_probe(threads, instruction_set)


def _start_worker(undo: ExitStack) -> Worker:
    """Start the chat-template process now, so that it is ready for the first prompt."""
    from argosy.prompt.chat import Worker

    worker = Worker()
    undo.callback(worker.stop)
    return worker


def _open_log(recorder: RouteRecorder, files: ModelFiles, plan: MemoryPlan, config: EngineConfig) -> RouteLog:
    return RouteLog(
        recorder,
        plan.model_sizes(config).step_tokens,
        num_layers=len(files.config.moe_layers),
        experts_per_token=files.config.experts_per_token,
    )


def _open_media(
    footprint: ModelFootprint,
    store: _native.Store,
    runtime: _native.Runtime,
    decoder: Decoder,
    ears: Transcriber | None,
    tokenizer: Tokenizer | None,
    model: Model,
    plan: MemoryPlan,
    turns: Turns,
) -> PromptMedia | None:
    if not footprint.encoders and ears is None:
        return None
    from argosy.engine.media import open_media  # imports modules that only media need
    from argosy.engine.media_memory import MediaMemory
    from argosy.model.encoders.reading import Encoders, runnable

    lend = functools.partial(
        MediaMemory,
        cache=model.experts.cache if isinstance(model.experts, CachedRunner) else None,
        num_slots=plan.num_slots,
        lent_slots=plan.lent_slots,
        lock=turns,
    )
    towers = runnable(footprint.encoders)
    encoders = Encoders(towers, store, runtime, open_file=functools.cache(store.open))
    return open_media(encoders, footprint.processors, decoder, footprint.low_detail, tokenizer, lend, ears)


def _open_prefix_files(
    files: ModelFiles, config: EngineConfig, runtime: _native.Runtime
) -> PrefixFiles | None:
    if config.kv_dir is None:
        return None
    return PrefixFiles(
        config.kv_dir,
        identity=identify(files, runtime.instruction_set, config.kv_dtype, config.experts_off),
        block_bytes=kv_bytes(files.config, 1, config.kv_dtype),
        state_bytes=state_bytes(files.config, 1),
    )


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
    )
    return PrefixCache(
        blocks,
        model.kv,
        secret=os.urandom(SECRET_BYTES) if files is None else files.secret,
        identity=b"" if files is None else files.identity,
        states=states,
        files=files,
        is_on=config.prefix_reuse,
    )


def _open_grammars(
    files: ModelFiles, config: EngineConfig, tokenizer: Tokenizer | None, eos_ids: frozenset[int]
) -> GrammarCompiler | UsageError:
    if not config.grammars:
        return UsageError(
            "this engine does not support grammars", hint="create it with Engine.open(..., grammars=True)"
        )
    if tokenizer is None:
        return UsageError("a grammar needs a tokenizer, and this checkpoint has no tokenizer.json")
    from argosy.engine.constraint import GrammarCompiler  # imports modules that few engines need

    try:
        return GrammarCompiler(tokenizer, vocab_size=files.config.vocab_size, end_ids=eos_ids)
    except UsageError as error:
        return error
