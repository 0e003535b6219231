"""A checkpoint that runs steps: weights, experts, KV cache, recurrent state and decoder, opened and closed as one.

    ModelFiles ─ ModelReading: reads have begun ─ sizes ─> Model.forward: step -> logits

A memory plan needs to know how large the tokenizer is, and reading weights takes as long as building it. So a model is
opened in two steps: `ModelReading` starts the reads, and `finish` allocates the rest once the plan is made.

Elsewhere: `budget/footprint.py` computes a model's memory beforehand; `decoder.py` runs a step; an engine owns the
threads and the store, which models share.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import KV_BLOCK_TOKENS, ExpertSlots, KvDtype
from argosy.errors import UnsupportedModel, UsageError
from argosy.experts.cache import CachedRunner, ExpertCache
from argosy.experts.files import ExpertFiles
from argosy.experts.recording import RouteLog
from argosy.experts.resident import Progress, ResidentReading, ResidentRunner, load_resident
from argosy.experts.runner import AdapterParts, ExpertGroup, ExpertRunner
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder, RouteObserver
from argosy.model.draft_layer import MOST_DRAFT_ROWS, DraftLayer
from argosy.model.layers import describe_experts, kv_shapes, state_shapes
from argosy.model.step import Step
from argosy.model.tables import TableCounts, Tables
from argosy.model.weights import DenseReading, DenseWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The sizes of a model's parts, as a memory plan decided them."""

    kv_blocks: int
    kv_dtype: KvDtype
    step_tokens: int  # maximum tokens of a step
    num_states: int  # slots of the recurrent state; ignored if no layer has one
    slots: ExpertSlots | None  # for experts; None: every expert, packed end to end
    window_blocks: int | None = None  # for layers with a sliding window; None: as many as for other layers
    most_experts: int = 0  # that get addresses in slots
    table_cache_bytes: int = 0  # for the cached rows of each n-gram table


class ModelReading:
    """Reads a model's weights while the caller does something else.

    Reads start at construction. `finish` or `cancel` ends them.

    Args:
        with_experts: also read every expert now, because all of them will fit.
        experts_off: leave routed experts out of every sum, and read none.
    """

    def __init__(
        self,
        files: ModelFiles,
        store: _native.Store,
        *,
        with_experts: bool = False,
        experts_off: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._files = files
        self._store = store
        self._progress = progress
        self._has_experts = bool(files.experts) and not experts_off
        self._open_file = functools.cache(store.open)
        self._weights: DenseWeights | None = None
        self._experts_reading: ResidentReading | None = None
        self._dense_reading = DenseReading(
            store,
            files.dense,
            open_file=self._open_file,
            norm_offset=files.config.norm_offset,
            progress=progress,
        )
        if with_experts and self._has_experts:
            try:
                self._experts_reading = ResidentReading(store, self._expert_files())
            except BaseException:
                self._dense_reading.cancel()
                raise

    def _expert_files(self) -> ExpertFiles:
        return ExpertFiles(self._store, self._files.experts, open_file=self._open_file)

    def wait(self) -> int:
        """Wait for the started reads; return the bytes of memory that they filled.

        Raises:
            ReadFailed, CorruptRecord, CheckpointError: as `DenseReading.finish` and `ResidentReading.wait`.
        """
        self._weights = self._dense_reading.finish()
        nbytes = self._weights.nbytes
        if self._experts_reading is not None:
            self._experts_reading.wait(self._progress)
            nbytes += self._experts_reading.nbytes
        return nbytes + self._store.staging_held_bytes

    def finish(
        self,
        sizes: ModelSizes,
        runtime: _native.Runtime,
        *,
        clock: PartClock,
        look_ahead: bool = True,
        observe: RouteObserver | None = None,
        log: RouteLog | None = None,
        group: ExpertGroup | None = None,
        foreground: _native.Foreground | None = None,
        token_map: NDArray[np.int32] | None = None,
    ) -> Model:
        """Open the model within `sizes`, after `wait`.

        Experts that were read are dropped if `sizes` has no room for all of them.

        Args:
            group: other processes that also run experts.
            foreground: the work to which committing memory for experts gives way; None: it gives way to nothing.
            token_map: the folded ids of tokens, for n-gram tables that need them.

        Raises:
            ReadFailed, CorruptRecord, CheckpointError: an expert cannot be read, or tables do not fit the tokens.
            ArgosyError: the group cannot be used.
        """
        assert self._weights is not None
        experts: ExpertRunner | None = None
        cache: ExpertCache | None = None
        cache_bytes = 0
        if self._has_experts and sizes.slots is None:
            experts = self._resident_runner(self._weights, runtime)
            cache_bytes = self._files.expert_bytes
        elif self._has_experts and sizes.slots is not None:
            if self._experts_reading is not None:
                self._experts_reading.close()
            expert_files = self._expert_files()
            cache = _cache(
                self._files,
                self._weights,
                expert_files,
                sizes.slots,
                most=sizes.most_experts,
                look_ahead=look_ahead,
                foreground=foreground,
            )
            experts = CachedRunner(runtime, cache)
            cache_bytes = cache.slots.num_slots * cache.slot_bytes
        if group is not None and experts is not None:
            experts = group.open(
                self._files,
                experts,
                instruction_set=runtime.instruction_set,
                cache_bytes=cache_bytes,
                step_tokens=sizes.step_tokens,
            )
        if self._files.tables:
            tables = Tables(
                self._files.config,
                self._files.tables,
                self._store,
                self._open_file,
                cached_bytes=sizes.table_cache_bytes,
                step_tokens=sizes.step_tokens,
                token_map=token_map,
            )
            self._weights = replace(self._weights, tables=tables)
        return Model(
            self._files,
            self._weights,
            experts,
            runtime,
            sizes,
            clock=clock,
            cache=cache,
            observe=observe,
            log=log,
        )

    def _resident_runner(self, weights: DenseWeights, runtime: _native.Runtime) -> ExpertRunner:
        arithmetic = describe_experts(self._files.config, weights)
        if self._experts_reading is not None:
            return self._experts_reading.finish(runtime, arithmetic)
        files = self._expert_files()
        return load_resident(self._store, files, runtime, arithmetic, progress=self._progress)

    def cancel(self) -> None:
        """Wait until no read moves bytes, and discard all reads; harmless after `wait`."""
        self._dense_reading.cancel()
        if self._experts_reading is not None:
            self._experts_reading.cancel()


def _cache(
    files: ModelFiles,
    weights: DenseWeights,
    expert_files: ExpertFiles,
    slots: ExpertSlots,
    *,
    most: int,
    look_ahead: bool,
    foreground: _native.Foreground | None = None,
) -> ExpertCache:
    """A cache for the experts of a model; see `ExpertCache` for the arguments."""
    return ExpertCache(
        expert_files,
        num_slots=slots.own,
        most=most,
        reads_all=bool(slots.most),
        experts_per_token=files.config.experts_per_token,
        arithmetic=describe_experts(files.config, weights),
        look_ahead=look_ahead,
        foreground=foreground,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter in memory, for `Model.set_adapter`; `adapters/loaded.py` makes it.

    stack: dense pairs, the pair of the embedding, and replaced matrices.
    nbytes: the memory of `stack`, with the scratch memory that steps take for it.
    experts: pairs beside routed experts; None: it has none.
    """

    stack: _native.StackAdapter
    nbytes: int
    experts: AdapterParts | None = None


class Model:
    """Runs steps. Nothing else touches its weights and experts; engines assign its KV blocks and state slots.

    Attributes:
        kv: keys and values of all layers, in blocks of `KV_BLOCK_TOKENS` positions.
        recurrent: the recurrent state of the layers that have one; None if no layer does.
        cache: experts in this process; None if all of them are resident (`is_packed`), or there are none.
        draft: the layer that predicts one more token; None: not in memory.
    """

    def __init__(
        self,
        files: ModelFiles,
        weights: DenseWeights,
        experts: ExpertRunner | None,
        runtime: _native.Runtime,
        sizes: ModelSizes,
        *,
        clock: PartClock,
        cache: ExpertCache | None = None,
        observe: RouteObserver | None = None,
        log: RouteLog | None = None,
    ) -> None:
        self.config = config = files.own_config
        self._files, self._runtime = files, runtime
        self.cache = cache
        self.weights = weights
        self.experts = experts
        self.kv = _native.KvCache(
            kv_shapes(files.config), sizes.kv_blocks, KV_BLOCK_TOKENS, sizes.kv_dtype, sizes.window_blocks
        )
        self.recurrent: _native.RecurrentState | None = None
        if config.recurrent_layers and sizes.num_states:
            self.recurrent = _native.RecurrentState(sizes.num_states, state_shapes(config))
        self.decoder = Decoder(
            files.config,  # further stores lie behind those of all layers, the draft layer's included
            weights,
            experts,
            self.kv,
            runtime,
            sizes.step_tokens,
            clock=clock,
            recurrent=self.recurrent,
            observe=observe,
            layers=range(config.num_layers),
        )
        if log is not None:
            self.decoder.room_for_choices = log.room
        self.draft: DraftLayer | None = None
        if files.num_draft_layers:
            self.draft = DraftLayer(
                files.config,
                weights,
                experts,
                self.kv,
                runtime,
                min(sizes.step_tokens, MOST_DRAFT_ROWS),
                clock=clock,
            )

    def forward(self, step: Step) -> NDArray[np.float32]:
        """Run a step; return the logits of its wanted rows: float32 [rows, vocab_size], a new array.

        Raises:
            ReadFailed, CheckpointError, RunnerFailed: an expert cannot be run; the step may be repeated.
        """
        return self.decoder.forward(step)

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return logits of any rows of the last step: float32 [rows, vocab_size], a new array."""
        return self.decoder.logits(rows)

    def final_states(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return hidden states after the final norm, of rows of the last step: float32 [rows, hidden_size]."""
        return self.decoder.final_states(rows)

    def set_adapter(self, number: int, loaded: LoadedAdapter | None) -> None:
        """From the next step on, tokens with this number in `Step.adapters` have this adapter; None: none may have it.

        Raises:
            ValueError: a step runs with tokens of this number.
            UnsupportedModel: the adapter changes experts that run on other machines.
        """
        stack, parts = (None, None) if loaded is None else (loaded.stack, loaded.experts)
        if parts is not None and not isinstance(self.experts, ResidentRunner | CachedRunner):
            raise UnsupportedModel(
                "the adapter changes routed experts, which run on other machines here",
                hint="answer with this adapter on one machine",
            )
        self.decoder.set_adapter(number, stack)
        if isinstance(self.experts, ResidentRunner | CachedRunner):
            self.experts.set_adapter(number, parts)

    def forbid_experts(self, experts: Mapping[int, Collection[int]]) -> None:
        """From the next step on, prevent tokens from choosing these experts, given by layer; all others are allowed
        again.

        Routers distribute the weights among the remaining experts, as if the forbidden ones had never existed. In
        layers whose experts follow from the token id, a forbidden expert still runs, and its weight is zero.

        Raises:
            UsageError: a layer lacks such experts or would keep too few.
        """
        try:
            for layer in self._files.own_config.moe_layers:
                self.decoder.forbid(layer, ())
            for layer, forbidden in experts.items():
                self.decoder.forbid(layer, tuple(forbidden))
        except ValueError as error:
            raise UsageError(f"these experts cannot be forbidden: {error}") from None

    @property
    def table_counts(self) -> TableCounts:
        """Counts of rows of n-gram tables."""
        return TableCounts() if self.weights.tables is None else self.weights.tables.counts

    @property
    def is_packed(self) -> bool:
        """Whether this process has all experts, end to end."""
        return isinstance(self.experts, ResidentRunner)

    def unpack(self, store: _native.Store, slots: ExpertSlots, *, most: int, look_ahead: bool) -> ExpertCache:
        """From the next step on, keep experts in slots instead of all in memory, end to end.

        All experts leave first, so that the two memories never add up, and are read again when tokens choose them.
        Once there is a slot for every expert, the others are read as well. Counters continue.

        Args:
            most: limit of the cache's `resize`; the cache reserves addresses for this many.

        Raises:
            ArgosyError, MemoryError: a file cannot be opened, or there is too little address space; nothing changed.
        """
        packed = self.experts
        assert isinstance(packed, ResidentRunner)
        for parts in packed.parts.values():
            parts.write()
        cache = _cache(
            self._files,
            self.weights,
            ExpertFiles(store, self._files.experts, open_file=functools.cache(store.open)),
            replace(slots, own=0),
            most=most,
            look_ahead=look_ahead,
        )
        cache.earlier = replace(packed.stats)
        for number, parts in packed.parts.items():
            cache.set_adapter(number, parts)
        self.cache, self.experts = cache, CachedRunner(self._runtime, cache)
        self.decoder.run_with(self.experts)
        if self.draft is not None:
            self.draft.run_with(self.experts)
        packed.give_back()
        cache.resize(slots.own)
        return cache

    def rows_of(self, expert: int) -> NDArray[np.int64]:
        """Return the tokens of the last step that chose `expert` in the layer at which the step last stopped."""
        return self.decoder.rows_of(expert)

    def take_uses(self) -> NDArray[np.int64]:
        """Return how often tokens chose each expert since the last call: int64 [layers, experts]. Routing reveals
        text.
        """
        return self.decoder.take_uses()

    def close(self) -> None:
        """Free everything. No step may run; the store must be closed, so that no read moves bytes."""
        if self.experts is not None:
            self.experts.close()
        del self.decoder, self.draft, self.kv, self.recurrent, self.weights, self.experts, self.cache
