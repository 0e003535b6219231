"""Compute the memory that a model takes, part by part, from its headers, before anything is loaded.

A memory plan asks here and never recomputes a size. Native code reports what native code allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.config import (
    ACT_ORDER_FORMATS,
    FLOAT_FORMATS,
    KV_BLOCK_TOKENS,
    MIB,
    AdapterNeeds,
    EngineConfig,
    ExpertSlots,
    Format,
    KvDtype,
    ModelConfig,
    WindowedMixer,
)
from argosy.errors import ArgosyError
from argosy.experts.files import bookkeeping_bytes, resident_bookkeeping_bytes, resident_bytes
from argosy.experts.recording import log_bytes
from argosy.experts.slots import SlotLayout, lay_out
from argosy.media.parts import LOW_DETAIL_TOKENS, Kind
from argosy.model.draft_layer import MOST_DRAFT_ROWS, copied_head_bytes, joining_bytes
from argosy.model.layers import kv_shapes, stack_sizes, state_shapes
from argosy.model.tables import table_bytes
from argosy.model.weights import dense_footprint

if TYPE_CHECKING:
    from argosy.model.encoders.encoder import Shape
    from argosy.model.encoders.reading import EncoderFiles, Processor
    from argosy.model.whisper.files import WhisperFiles

# Properties that depend on the towers.
_OF_MEDIA = ("encoders", "processors", "low_detail", "encoder_bytes", "unbroken_tokens", "_largest_media")
# The default context, for models that support it.
DEFAULT_CONTEXT = 8192
_SMALLEST_PROCESS_BYTES = 96 * MIB  # interpreter, libraries and a small tokenizer, before any weights
# Keys and values that would take a larger share of the smallest budget are float16 by default.
_KV_SHARE = 1 / 20
# Ids as Python objects, the arrays of a step, and native lists of runs, per token.
_STEP_TOKEN_BYTES = 256
_PAGE_BYTES = 2 * MIB  # the granularity of native memory (`native/store/arena.h`)


def kv_blocks(num_tokens: int) -> int:
    """Return the KV blocks for `num_tokens` positions."""
    return -(-num_tokens // KV_BLOCK_TOKENS)


def kv_bytes(
    config: ModelConfig, num_tokens: int, kv_dtype: KvDtype, *, window_blocks: int | None = None
) -> int:
    """Return the bytes of keys and values of all layers for `num_tokens` positions, in whole blocks.

    Args:
        window_blocks: blocks for layers with a sliding window; None: these layers also keep all positions.
    """
    blocks = kv_blocks(num_tokens)
    return _native.kv_cache_bytes(kv_shapes(config), blocks, KV_BLOCK_TOKENS, kv_dtype, window_blocks)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The layout of a KV cache, which decides how many bytes unused positions leave free.

    regions: begin and end of the keys, and of the values, of each store without a sliding window.
    """

    num_tokens: int
    regions: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, config: ModelConfig, num_tokens: int, kv_dtype: KvDtype, window_blocks: int | None
    ) -> KvLayout:
        regions, end = [], 0
        blocks = kv_blocks(num_tokens)
        for shape in kv_shapes(config):
            of_windows = window_blocks if shape.is_windowed else None
            num_blocks = blocks if of_windows is None else of_windows
            for nbytes in _native.kv_layer_parts(shape, num_blocks, KV_BLOCK_TOKENS, kv_dtype):
                if of_windows is None:
                    regions.append((end, end + nbytes))
                end += nbytes
        return cls(blocks * KV_BLOCK_TOKENS, tuple(regions))

    def free_bytes(self, num_tokens: int) -> int:
        """Return the bytes in whole pages after the first positions of each region."""
        found = 0
        for begin, end in self.regions:
            used = begin + -(-(end - begin) * num_tokens // self.num_tokens)
            found += max(0, end // _PAGE_BYTES - -(-used // _PAGE_BYTES)) * _PAGE_BYTES
        return found


def state_bytes(config: ModelConfig, num_states: int) -> int:
    """Return the bytes of recurrent state for `num_states` sequences; 0 if no layer has one."""
    shapes = state_shapes(config)
    return _native.recurrent_state_bytes(num_states, shapes) if shapes and num_states else 0


def files_to_run(files: ModelFiles, config: EngineConfig) -> ModelFiles:
    """Return the files that an engine with these settings reads, including the draft layer if it proposes tokens.

    Raises:
        UnsupportedModel, CheckpointError: the draft layer is missing or cannot be used.
    """
    needs_draft = config.speculate == "mtp" and not files.num_draft_layers
    return files.with_draft_layer() if needs_draft else files


class ModelFootprint:
    """The bytes of each part of one model that runs with the settings of `config`.

    Sums over all experts are computed once, so use one object for every plan of a model.
    """

    def __init__(self, files: ModelFiles, config: EngineConfig) -> None:
        self.files = files = files_to_run(files, config)
        self.config = files.config  # describes all layers, the draft layer included
        self.num_experts = len(files.experts)  # routed experts in all layers
        self._wanted_kv_dtype = config.kv_dtype
        self._threads = config.threads  # each has scratch memory
        # The engine refuses an instruction set that this machine lacks when it starts.
        names = _native.instruction_sets()
        self._instruction_set = config.instruction_set if config.instruction_set in names else names[-1]
        self._has_media = config.media is not False
        self._media_fault: ArgosyError | None = None  # why towers are not used
        self._image_tokens = config.image_tokens
        self._ears = config.ears
        self._video_tokens = config.video_tokens
        self._kv_layouts: dict[tuple[int, KvDtype, int | None], KvLayout] = {}  # a search asks for few, often
        self._loras = config.loras
        self._readers = config.readers  # each has a staging buffer if weights are transcoded

    @cached_property
    def dense_bytes(self) -> int:
        return dense_footprint(self.files.dense) + copied_head_bytes(self.files)

    @cached_property
    def encoders(self) -> Mapping[Kind, EncoderFiles | ArgosyError]:
        """The towers for pictures and sound; empty if the settings turn them off."""
        if not self._has_media or not (self.files.others or self.files.mmproj):
            return {}
        from argosy.model.encoders.reading import find_encoders  # imports every tower

        found = find_encoders(self.files)
        fault = self._media_fault
        return found if fault is None else dict.fromkeys(found, fault)

    def without_media(self, fault: ArgosyError) -> ModelFootprint:
        """Return the same model without its towers; a prompt with media raises `fault`."""
        other = copy(self)  # keeps the computed sums over experts
        for name in _OF_MEDIA:
            vars(other).pop(name, None)
        other._media_fault = fault
        return other

    @cached_property
    def adapters(self) -> AdapterNeeds:
        """The memory that the adapters of the settings need."""
        if not self._loras:
            return AdapterNeeds()
        from argosy.adapters.needs import wanted_needs  # few engines need it

        return wanted_needs(self._loras, self.files)

    def with_adapters(self, needs: AdapterNeeds) -> ModelFootprint:
        """Return the same model with other adapters."""
        other = copy(self)
        other.adapters = needs
        return other

    def adapter_bytes(self, step_tokens: int) -> int:
        """Return the memory of adapters without the parts in slots of experts, with the scratch memory of steps."""
        scratch = self.buffer_bytes(step_tokens, self.adapters.ranks) - self.buffer_bytes(step_tokens)
        return self.adapters.fixed_bytes + scratch

    @property
    def part_bytes(self) -> int:
        """The bytes of one more expert's parts of all adapters."""
        return -(-self.adapters.part_bytes // max(1, self.num_experts))

    def with_kv(self, kv_dtype: KvDtype) -> ModelFootprint:
        """Return the same model with keys and values in another format."""
        other = copy(self)
        other.kv_dtype = kv_dtype
        return other

    @cached_property
    def kv_dtype(self) -> KvDtype:
        """The format of keys and values: the requested format, or the model's default.

        The default is f16 if float32 would take more than a twentieth of the smallest budget that runs the model with
        the default context. It depends only on the checkpoint: a budget must not change which tokens come out.
        """
        if self._wanted_kv_dtype is not None:
            return self._wanted_kv_dtype
        in_f32 = kv_bytes(self.config, min(self.config.context_tokens, DEFAULT_CONTEXT), "f32")
        fewest = min(self.num_experts, self.config.experts_per_token)
        least = _SMALLEST_PROCESS_BYTES + self.dense_bytes + in_f32 + fewest * self._layout.slot_bytes
        return "f16" if in_f32 > _KV_SHARE * least else "f32"

    @cached_property
    def processors(self) -> Mapping[Kind, Processor | ArgosyError]:
        """The processor of each kind of media, or the error that says why that kind is refused."""
        found: dict[Kind, Processor | ArgosyError] = {}
        for kind, tower in self.encoders.items():
            try:
                found[kind] = tower if isinstance(tower, ArgosyError) else tower.processor(self._image_tokens)
            except ArgosyError as error:
                found[kind] = error
        pictures = self.encoders.get("picture")
        if isinstance(pictures, ArgosyError):
            found["video"] = pictures  # its frames are pictures
        elif pictures is not None and pictures.encoder.video is not None:
            try:
                found["video"] = pictures.video_processor(self._video_tokens, self._image_tokens)
            except ArgosyError as error:
                found["video"] = error
        return found

    @property
    def takes_pictures(self) -> bool:
        return "picture" in self.encoders

    @property
    def takes_video(self) -> bool:
        """Whether frames of videos can be prepared and encoded."""
        return not isinstance(self.processors.get("video", ArgosyError("")), ArgosyError)

    @cached_property
    def low_detail(self) -> Processor | None:
        """The processor of low-detail pictures; None if the model takes no pictures."""
        tower = self.encoders.get("picture")
        if (
            tower is None
            or isinstance(tower, ArgosyError)
            or isinstance(self.processors["picture"], ArgosyError)
        ):
            return None
        return tower.processor(min(self._image_tokens, LOW_DETAIL_TOKENS))

    @cached_property
    def encoder_bytes(self) -> int:
        """The bytes of the usable towers' weights, and of the largest encode."""
        peaks = [tower.peak_bytes(shape) for tower, shape in self._largest_media]
        towers = {tower.encoder.kind: tower for tower, _ in self._largest_media}
        return sum(tower.weight_bytes for tower in towers.values()) + max(peaks, default=0)

    def picture_work(self, height: int, width: int) -> tuple[int, int] | None:
        """Return a picture's positions, and the floating-point operations to encode it; None if pictures are refused.

        Raises:
            BadMedia: the model does not take pictures of this size.
        """
        from argosy.media.patches import PictureProcessor

        tower, processor = self.encoders.get("picture"), self.processors.get("picture")
        if tower is None or isinstance(tower, ArgosyError) or not isinstance(processor, PictureProcessor):
            return None
        grid = processor.grid(height, width)
        return tower.num_positions(grid), tower.flop(grid)

    @cached_property
    def unbroken_tokens(self) -> int:
        """The most positions of a picture that see one another and must therefore run in one step; 0 if none do."""
        spans = (
            tower.num_positions(shape) for tower, shape in self._largest_media if tower.encoder.sees_both_ways
        )
        return max(spans, default=0)

    @cached_property
    def _largest_media(self) -> list[tuple[EncoderFiles, Shape]]:
        found: list[tuple[EncoderFiles, Shape]] = []
        for kind, processor in self.processors.items():
            tower = self.encoders["picture" if kind == "video" else kind]
            if not isinstance(processor, ArgosyError) and not isinstance(tower, ArgosyError):
                found.append((tower, tower.largest_shape(processor)))
        return found

    @cached_property
    def ears(self) -> WhisperFiles | None:
        """The checkpoint that transcribes sound; reading this loads its tokenizer."""
        if self._ears is None:
            return None
        from argosy.model.whisper.files import open_whisper

        return open_whisper(self._ears)

    @cached_property
    def ears_bytes(self) -> int:
        """The bytes of the weights that transcribe, and of the longest sound."""
        if self.ears is None:
            return 0
        from argosy.model.whisper.transcription import working_bytes

        return self.ears.weight_bytes + working_bytes(self.ears)

    @cached_property
    def staging_bytes(self) -> int:
        """The bytes of the buffers from which readers transcode; 0 if every weight lands as it is stored."""
        is_transcoded = any(
            piece.transcode for one in self.files.dense.values() for piece in one.pieces
        ) or any(piece.transcode for run in self.files.records.runs() for piece in run.record.pieces)
        return self._readers * _native.STAGING_BYTES if is_transcoded else 0

    @cached_property
    def _layout(self) -> SlotLayout:
        return lay_out(self.files.experts, experts_per_token=self.config.experts_per_token)

    @property
    def slot_bytes(self) -> int:
        """The bytes of one more expert slot, whatever its kind, with its share of adapters' parts."""
        return self._layout.slot_bytes + self.part_bytes

    @cached_property
    def resident_bytes(self) -> int:
        """The bytes of all experts, one after another."""
        return resident_bytes(self.files.experts)

    def kv_bytes(self, num_tokens: int, window_blocks: int | None = None) -> int:
        return kv_bytes(self.config, num_tokens, self.kv_dtype, window_blocks=window_blocks)

    def kv_layout(self, num_tokens: int, window_blocks: int | None = None) -> KvLayout:
        key = num_tokens, self.kv_dtype, window_blocks
        if key not in self._kv_layouts:
            self._kv_layouts[key] = KvLayout.of(self.config, *key)
        return self._kv_layouts[key]

    @property
    def window(self) -> int:
        """The largest sliding window, if something other than windowed layers is kept for every position, such as
        entries of pools; otherwise 0.
        """
        mixers = [layer.mixer for layer in self.config.layers]
        windows = {mixer.sliding_window for mixer in mixers if isinstance(mixer, WindowedMixer)}
        keeps_all = any(not shape.is_windowed for shape in kv_shapes(self.config))
        return max(windows, default=0) if keeps_all else 0

    def state_bytes(self, num_states: int) -> int:
        return state_bytes(self.config, num_states)

    def table_bytes(self, cached_bytes: int, step_tokens: int) -> int:
        """Return the memory of n-gram tables with `cached_bytes` of cached rows each; 0: there are none."""
        return table_bytes(self.config, self.files.tables, cached_bytes, step_tokens)

    def working_bytes(self, step_tokens: int) -> int:
        """Return the memory of a step of at most `step_tokens` tokens."""
        sizes = self._stack_sizes
        others = sizes.dispatch_bytes(step_tokens) + _STEP_TOKEN_BYTES * step_tokens
        if self.files.num_draft_layers:
            rows = min(step_tokens, MOST_DRAFT_ROWS)
            others += sizes.buffer_bytes(rows) + sizes.dispatch_bytes(rows) + joining_bytes(self.config, rows)
        return self.buffer_bytes(step_tokens) + others

    def buffer_bytes(self, step_tokens: int, ranks: int = 0) -> int:
        """Return the buffers and scratch memory of such a step, which a `Decoder` keeps while steps may be
        that long.
        """
        sizes = self._stack_sizes
        # On `amx`, activations for bfloat16 and FP8 weights are split, which takes less memory than quantising them.
        prepares = self._has_quants or self._instruction_set == "amx"
        has_act_order = not self._formats.isdisjoint(ACT_ORDER_FORMATS)
        scratch = sizes.scratch_bytes(step_tokens, self._threads, prepares, has_act_order, ranks)
        products = _native.product_scratch_bytes(self._threads, self._instruction_set) if prepares else 0
        return sizes.buffer_bytes(step_tokens) + scratch + products

    def choices_bytes(self, step_tokens: int) -> int:
        """The bytes of logged choices that have not reached the recorder yet."""
        layers, k = len(self.files.own_config.moe_layers), self.config.experts_per_token
        return log_bytes(step_tokens, num_layers=layers, experts_per_token=k)

    @cached_property
    def _has_quants(self) -> bool:
        """Whether any weights are quantised, so that activations are quantised as well."""
        return not self._formats <= FLOAT_FORMATS or copied_head_bytes(self.files) > 0

    @cached_property
    def _formats(self) -> set[Format]:
        formats = {ref.format for ref in self.files.dense.values()}
        for run in self.files.records.runs():
            formats.update(run.record.formats)
        return formats

    @cached_property
    def _stack_sizes(self) -> _native.StackSizes:
        return stack_sizes(self.config)

    def record_bytes(self, room: ExpertSlots) -> int:
        """Return the bytes of the records about experts with this room: the place and last use of each."""
        if not self.num_experts:
            return 0
        if room.is_packed:
            return self._use_bytes + self._resident_records
        in_cache = self._layout.bookkeeping_bytes(room.reachable, num_experts=self.config.num_experts)
        return self._use_bytes + self._records + in_cache

    @property
    def _use_bytes(self) -> int:
        """`Stack.take_uses`: current counts, those being reported, the last reported ones, and half of these."""
        return 4 * 8 * self.config.num_layers * self.config.num_experts

    @cached_property
    def _records(self) -> int:
        return bookkeeping_bytes(self.files.experts)

    @cached_property
    def _resident_records(self) -> int:
        return resident_bookkeeping_bytes(self.files.experts)
