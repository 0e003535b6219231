"""Turn a checkpoint's tensor names into `ModelFiles`.

    ModelConfig + Layout + {name: TensorRef}  ->  read_layout  ->  ModelFiles

A family has one or several layouts. Files on the hub have one tensor per expert matrix, and `transformers` 5 can also
write all experts of a layer as one fused tensor, [experts, 2 * width, hidden] with gate before up. Other layouts
alternate rows of gate and up, in MXFP4 blocks and scales; or store fused tensors transposed, [experts, hidden, 2 *
width]: these can be packed, but not run in place. MLX stacks the experts of gate, of up and of down (`mlx.py`). A
weight may be codes, scales and zero points (`coded_weights.py`). The first layout whose expert tensors exist is used;
if fused and transposed tensors have the same name, their shape tells them apart.

If the files contain a layer for multi-token prediction with DeepSeek-V3's names, it is found as well (`DraftFiles`);
an engine reads it only to speculate. Its copies of embedding and head equal the model's, and are not read.

Every tensor is accounted for: a tensor that is missing, has another shape, has a dtype that no kernel reads, or is
unexpected is an error that names it. Only known tensors that text does not need are ignored: constants that old
exporters leave behind (`_LEFTOVERS`), layers for multi-token prediction, and tensors that a layout lists, such as a
vision tower.

Elsewhere: `checkpoint/geometry.py` knows shapes; `checkpoint/safetensors.py` finds the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from argosy.checkpoint.files import (
    DraftFiles,
    ExpertMatrix,
    ExpertRecord,
    ExpertRecords,
    ModelFiles,
    TableRef,
    require_one_format_a_layer,
)
from argosy.checkpoint.formats import BYTES_PER_VALUE, matrix_bytes
from argosy.checkpoint.geometry import (
    dense_shapes,
    expert_shapes,
    is_kept_exact,
    require_countable,
    shapes_together,
)
from argosy.checkpoint.landing import Exact, MatrixRef, Piece, Strided, Transcode, Transcoded
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import open_regular, quote, read_at
from argosy.config import LatentConfig, ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.reading.accounts import read_draft
from argosy.model.reading.coded_weights import (
    E8M0,
    MXFP4_GROUP,
    PASSED_OVER,
    Rows,
    Slice,
    WeightAccounts,
    is_there,
)
from argosy.model.reading.schemes import Quantization

# Constants that old exporters saved with the weights; Argosy computes them from the config.
_LEFTOVERS = (
    r"({prefix})?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|{prefix}layers\.\d+\.self_attn\.bias"
)

ATTENTION_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
_DRAFT_NAMES = {
    "draft_token_norm": "enorm.weight",
    "draft_state_norm": "hnorm.weight",
    "draft_join": "eh_proj.weight",
    "draft_final_norm": "shared_head.norm.weight",
}
# Qwen's, outside the layer (vLLM's `qwen3_next_mtp.py`).
_MTP_NAMES = {
    "draft_token_norm": "pre_fc_norm_embedding.weight",
    "draft_state_norm": "pre_fc_norm_hidden.weight",
    "draft_join": "fc.weight",
    "draft_final_norm": "norm.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names below `{prefix}layers.{i}.`: dense tensors by canonical name, experts one by one or fused."""

    layer_names: Mapping[str, str]
    model_names: Mapping[str, str] = field(default_factory=dict)  # of tensors behind the layers, whole names
    expert_names: tuple[str, ...] | None = None  # gate, up and down, or up and down, with {expert}
    stacked_names: tuple[str, ...] | None = None  # the same, all experts in one
    fused_names: tuple[str, str] | None = None  # gate and up in one, down
    transposed_names: tuple[str, str] | None = None  # the same, transposed
    has_turns: bool = False  # columns of gate and up alternate in transposed tensors
    mxfp4_names: tuple[str, str, str, str] | None = None  # blocks, scales of alternating gate and up; of down
    by_turns: tuple[str, str] | None = None  # canonical names of two tensors whose values alternate in one
    # Canonical names of tensors whose rows follow each other in one: those with the same name in `layer_names`.
    joined: tuple[str, ...] = ()
    prefix: str = "model."
    head_name: str = "lm_head.weight"
    embed_name: str = "embed_tokens.weight"  # after the prefix
    may_lack_head: bool = False  # a model that only embeds: without a head, its embedding table stands for it
    has_optional_bias: bool = False  # without `choice_bias`, routers have none, whatever the config says
    final_norm_name: str = "norm.weight"  # after the prefix
    passed_over: str | None = None  # regular expression for whole names of tensors that text does not need
    # The prefix of a draft layer numbered 0. None: its number follows the model's layers.
    mtp_prefix: str | None = None
    first_layer: int = 0  # the layer that is numbered 0 in the files
    # Takes a layer's tensor, by canonical name, that files store in a way of this family's own; None for others.
    take_own: Callable[[WeightAccounts, ModelConfig, int, str], MatrixRef | None] | None = None
    is_mlx: bool = False  # norms and axes are as `mlx.py` says
    # Of an n-gram table: as one tensor, or divided into numbered ones.
    table_names: tuple[str, str] | None = None
    # Integers that follow from the config: multipliers, primes, and the first row of each head.
    table_constants: tuple[str, str, str] | None = None

    def dense_name(self, canonical: str) -> str:
        """Return the checkpoint's name of a dense tensor."""
        if canonical == "head":
            return self.head_name
        if canonical in ("embed", "final_norm"):
            return self.prefix + (self.embed_name if canonical == "embed" else self.final_norm_name)
        if canonical in self.model_names:
            return self.model_names[canonical]
        if "." not in canonical:
            return self.prefix + self.layer_names[canonical]
        _, layer, last = canonical.split(".")
        if self.first_layer and last in _MTP_NAMES:
            return self.prefix + _MTP_NAMES[last]
        name = self.layer_names.get(last) or _DRAFT_NAMES[last]
        return f"{self.prefix}layers.{int(layer) - self.first_layer}.{name}"

    def of_draft(self, number: int) -> Layout:
        """Return the layout of the draft layer with this number."""
        if self.mtp_prefix is None:
            return self
        return replace(self, prefix=self.mtp_prefix, first_layer=number)

    def names_of_expert(self, layer: int, expert: int) -> tuple[str, ...]:
        """Return the checkpoint's names of an expert's tensors."""
        prefix = f"{self.prefix}layers.{layer - self.first_layer}."
        stacked = self.stacked_names or self.fused_names or self.transposed_names or self.mxfp4_names
        if stacked is not None:
            return tuple(prefix + name for name in stacked)
        assert self.expert_names is not None
        return tuple(prefix + name.format(expert=expert) for name in self.expert_names)

    def gate_up_shape(self, config: ModelConfig) -> tuple[int, int, int]:
        """Return the shape of the first tensor of stacked float experts, in the first layer with experts."""
        rows, cols = 2 * config.expert_width_in(config.moe_layers[0]), config.expert_hidden
        return (config.num_experts, *((rows, cols) if self.transposed_names is None else (cols, rows)))

    def is_passed_over(self, config: ModelConfig) -> Callable[[str], bool]:
        """Return a predicate for the names of tensors that a checkpoint of `config` may contain but that are never
        read.
        """
        prefix = re.escape(self.prefix)
        known = re.compile("|".join(filter(None, (_LEFTOVERS.format(prefix=prefix), self.passed_over))))
        layer_of = re.compile(prefix + r"layers\.(\d{1,9})\..+")

        def is_known(name: str) -> bool:
            layer = layer_of.fullmatch(name)
            return known.fullmatch(name) is not None or (
                layer is not None and int(layer[1]) in config.mtp_layers
            )

        return is_known


def separate_and_fused(
    layer_names: Mapping[str, str], passed_over: str | None = None, mtp_prefix: str | None = None
) -> tuple[Layout, ...]:
    """Return the two layouts of most families: one tensor per expert matrix, or two fused tensors per layer."""
    separate = Layout(
        layer_names=layer_names,
        expert_names=(
            "mlp.experts.{expert}.gate_proj.weight",
            "mlp.experts.{expert}.up_proj.weight",
            "mlp.experts.{expert}.down_proj.weight",
        ),
        passed_over=passed_over,
        mtp_prefix=mtp_prefix,
    )
    fused = replace(
        separate, expert_names=None, fused_names=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    )
    return separate, fused


def read_layout(
    directory: Path,
    config: ModelConfig,
    layouts: tuple[Layout, ...],
    tensors: Mapping[str, TensorRef],
    quantization: Quantization | None = None,
) -> ModelFiles:
    """Account for every tensor of a checkpoint.

    Args:
        quantization: the description of quantised tensors in its config.

    Raises:
        CheckpointError: a tensor is missing, extra, or has another shape than the config requires.
        UnsupportedModel: no kernel reads a tensor's dtype, or there are too many experts.
    """
    layout = _choose(layouts, config, tensors)
    if config.is_embedding_tied and layout.head_name in tensors:
        # The config says tied, but the files contain a head: the files win, as in transformers 5.
        config = replace(config, is_embedding_tied=False)
    elif layout.may_lack_head and layout.head_name not in tensors:
        config = replace(config, is_embedding_tied=True)
    if layout.is_mlx:
        config = _as_in_mlx(config, layout, tensors)
    if layout.has_optional_bias:
        bias = layout.dense_name(f"layers.{config.moe_layers[0]}.choice_bias")
        config = replace(config, router=replace(config.router, has_choice_bias=bias in tensors))
    reader = _Accounts(directory, tensors, quantization)
    dense = {
        canonical: reader.dense(config, canonical, shape, layout) for canonical, shape in dense_shapes(config)
    }
    require_countable(config)
    experts = reader.experts(config, layout)
    if quantization is not None:
        reader.pass_over(PASSED_OVER)
        reader.pass_over_zero_biases()
    tables = {number: reader.table(config, layout, number) for number in config.ngram_layers}
    others = reader.refuse_extra(config, layout.is_passed_over(config), "this config.json")
    require_one_format_a_layer(experts, directory)
    draft = _read_draft(_Accounts(directory, tensors, quantization), config, layouts, layout)
    return ModelFiles(directory, config, dense, experts, others=others, tables=tables, draft=draft)


def _read_draft(
    reader: _Accounts, config: ModelConfig, layouts: tuple[Layout, ...], layout: Layout
) -> DraftFiles | ArgosyError | None:
    """Find the first layer for multi-token prediction, in `layout` or another one; None if there is none."""
    # A layer in a file beside MLX's would have norms minus one.
    if layout.is_mlx or not config.moe_layers or config.draft_form is None:
        return None
    number = config.num_layers
    choices = [one.of_draft(number) for one in (layout, *layouts)]
    found = next((one for one in choices if is_there(one.names_of_expert(number, 0)[0], reader)), choices[0])
    if found.dense_name(f"layers.{number}.draft_join") not in reader:
        return None
    return read_draft(
        config,
        reader.path,
        lambda alone, name, shape: reader.dense(alone, name, shape, found),
        lambda alone: reader.experts(alone, found),
    )


def _as_in_mlx(config: ModelConfig, layout: Layout, tensors: Mapping[str, TensorRef]) -> ModelConfig:
    """The config of MLX's checkpoint: norms are stored whole, and kv_up may be stored as its two halves."""
    if "k_up" in layout.layer_names:
        latent = next(i for i, one in enumerate(config.layers) if isinstance(one.mixer, LatentConfig))
        is_split = layout.dense_name(f"layers.{latent}.k_up") in tensors
        config = config.with_mixers(LatentConfig, is_up_split=is_split)
    return replace(config, norm_offset=0.0)


def _choose(layouts: tuple[Layout, ...], config: ModelConfig, tensors: Mapping[str, TensorRef]) -> Layout:
    """Choose the first layout whose expert tensors, or without experts whose embedding, exist; if several share the
    names, the one whose router exists, with the right shape.
    """
    if not config.moe_layers:
        return next((one for one in layouts if one.dense_name("embed") in tensors), layouts[0])
    probe = config.moe_layers[0]
    there = [one for one in layouts if is_there(one.names_of_expert(probe, 0)[0], tensors)]
    if not there:
        return layouts[0]
    there = [one for one in there if is_there(one.dense_name(f"layers.{probe}.router"), tensors)] or there
    names = there[0].names_of_expert(probe, 0)
    alike = [one for one in there if one.names_of_expert(probe, 0) == names]
    if len(alike) == 1:
        return there[0]
    ref = tensors[names[0]]
    fitting = [one for one in alike if one.gate_up_shape(config) == ref.shape]
    if len(fitting) > 1:
        raise UnsupportedModel(
            f"{ref.path.name}: {names[0]} is {list(ref.shape)}, which is also its shape transposed; "
            "supported: experts for which twice the width is not hidden_size",
            path=ref.path,
            tensor=names[0],
        )
    return (fitting or alike)[0]


def _around_number(patterns: Sequence[str], names: Sequence[str], name: str) -> tuple[str, str]:
    """Return what comes before and after the number of expert 0 in the name of one of its tensors."""
    for pattern, whole in zip(patterns, names, strict=True):
        head = whole[: len(whole) - len(pattern.format(expert=0)) + pattern.index("{")]
        if name.startswith(head):
            return head, name[len(head) + 1 :]
    raise AssertionError(name)


class _Accounts(WeightAccounts):
    """Tensors of safetensors files, as dense matrices and experts."""

    def dense(self, config: ModelConfig, canonical: str, shape: tuple[int, ...], layout: Layout) -> MatrixRef:
        name, last = layout.dense_name(canonical), canonical.rpartition(".")[2]
        if layout.take_own is not None and last != canonical:
            own = layout.take_own(self, config, int(canonical.split(".")[1]), last)
            if own is not None:
                return own
        if last == "token_experts":
            return self.indices(name, (shape[0], shape[1]), config.num_experts)
        turn = layout.by_turns.index(last) if layout.by_turns and last in layout.by_turns else None
        in_file = shape if turn is None else (*shape[:-1], 2 * shape[-1])
        if last.endswith("conv"):  # each has one input channel
            in_file = (*in_file, 1) if layout.is_mlx else (in_file[0], 1, *in_file[1:])
        num_heads = (
            config.latent.num_heads if layout.is_mlx and config.latent and last in ("k_up", "v_up") else 0
        )
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        if last in layout.joined:
            names = layout.layer_names
            together = [one for one in layout.joined if names[one] == names[last]]
            shapes = shapes_together(config, int(canonical.split(".")[1]), together)
            counts, number = [one[0] for one in shapes.values()], list(shapes).index(last)
            return self.weight(name, shape, Rows(sum(counts), sum(counts[:number]), counts[number]))
        if turn is None:
            matrix = replace(self.weight(name, in_file, num_heads=num_heads), rows=rows, cols=cols)
            is_quantised = isinstance(matrix.landing, Transcoded)
            return Exact.of(matrix) if is_quantised and is_kept_exact(canonical) else matrix
        tensor, format = self.take(name, in_file)  # codes cannot alternate
        return MatrixRef.of(tensor, format, rows, cols, Strided((2 * cols, 2), turn))

    def table(self, config: ModelConfig, layout: Layout, layer: int) -> TableRef:
        """Take the tensors of a layer's n-gram table, and compare the constants beside it with those of the config."""
        ngrams = config.layers[layer].ngrams
        assert ngrams is not None
        assert layout.table_names is not None
        prefix = f"{layout.prefix}layers.{layer}."
        whole, part = (prefix + name for name in layout.table_names)
        names = [whole]
        if whole not in self:
            names = list(takewhile(self.__contains__, map(part.format, count())))
        if not names:
            raise CheckpointError(f"{whole} is missing from {self.path}", path=self.path, tensor=whole)
        if layout.table_constants is not None:
            first = np.cumsum((0, *ngrams.primes[:-1])).tolist()
            expected = ngrams.multipliers, ngrams.primes, first
            for name, values in zip(layout.table_constants, expected, strict=True):
                if prefix + name in self:
                    self._compare(prefix + name, values)
        tensors = [self.take_any(name) for name in names]
        scales = []
        if tensors[0].dtype == "F8_E4M3":
            for tensor in tensors:
                shape = *tensor.shape[:1], -(-ngrams.row_dim // MXFP4_GROUP)
                name = tensor.name.removesuffix("weight") + "scale"
                scales.append(self.take_part(name, dict.fromkeys(E8M0, ""), shape)[0])
        return TableRef.of(tensors, ngrams.num_rows, ngrams.row_dim, scales)

    def _compare(self, name: str, expected: Sequence[int]) -> None:
        ref, _ = self.take_part(name, {"I64": "I64"}, (len(expected),))
        with open_regular(ref.path) as (descriptor, _):
            found = np.frombuffer(read_at(descriptor, ref.nbytes, ref.offset, ref.path), "<i8").tolist()
        if found != list(expected):
            raise CheckpointError(
                f"{ref.path.name}: {quote(name)} holds {found[0]}, and {expected[0]} follows from the config",
                path=ref.path,
                tensor=name,
            )

    def experts(self, config: ModelConfig, layout: Layout) -> ExpertRecords:
        """Take the routed experts of all layers."""
        read = self._single_expert
        if layout.fused_names is not None:
            read = self._fused_expert
        elif layout.transposed_names is not None:
            read = self._transposed_expert
        elif layout.stacked_names is not None:
            read = self._stacked_expert
        elif layout.mxfp4_names is not None:
            read = self._mxfp4_expert
        records = ExpertRecords()
        for layer in config.moe_layers:

            def one(expert: int, layer: int = layer) -> ExpertRecord:
                return read(config, layout, layer, expert, layout.names_of_expert(layer, expert))

            if layout.expert_names is None:
                records.add_stacked(layer, config.num_experts, one(0), one(min(1, config.num_experts - 1)))
                continue
            self._taken.last.clear()
            first = one(0)
            alike = self._like_first(layout, layer, first)
            records.add((layer, 0), first)
            for expert in range(1, config.num_experts):
                if (places := alike(expert)) is None:
                    records.add((layer, expert), one(expert))
                else:
                    records.add_like((layer, expert), first, places)
        return records

    def _like_first(
        self, layout: Layout, layer: int, first: ExpertRecord
    ) -> Callable[[int], list[tuple[Path, int, int | None]] | None]:
        """Return a function that takes the tensors of another expert if they differ from those of the first, which were
        taken last, in nothing but their places; otherwise it returns None and takes nothing.

        A giant has hundreds of thousands of them, and the full account of a tensor takes ten times as long.
        """
        assert layout.expert_names is not None
        tensors, said = self._tensors, self._quantization
        names = layout.names_of_expert(layer, 0)
        taken = [(name, self._tensors[name]) for name in self._taken.last]
        numbers = {(ref.path, ref.offset, ref.nbytes): i for i, (_, ref) in enumerate(taken)}
        order = [numbers[piece.path, piece.offset, piece.nbytes] for piece in first.pieces]
        around = [_around_number(layout.expert_names, names, name) for name, _ in taken]
        kinds = [tensors.kind(tensors.rows[name]) for name in self._taken.last]
        # A name that takes precedence over that of the codes, or an optional part that the first expert lacks, is
        # refused as extra in the end.
        modules = [
            (_around_number(layout.expert_names, names, name), said.scheme_of(name.removesuffix(".weight")))
            for name in names
            if said is not None and self.codes_of(name) is not None
        ]

        def alike(expert: int) -> list[tuple[Path, int, int | None]] | None:
            found = [tensors.rows.get(f"{head}{expert}{tail}") for head, tail in around]
            rows = [row for row in found if row is not None]
            if len(rows) < len(kinds) or [tensors.kind(row) for row in rows] != kinds:
                return None
            for (head, tail), scheme in modules:
                assert said is not None
                if said.scheme_of(f"{head}{expert}{tail}".removesuffix(".weight")) != scheme:
                    return None
            self._taken.add_rows(rows)
            return [(*tensors.place(rows[at]), None) for at in order]

        return alike

    def _single_expert(
        self, config: ModelConfig, layout: Layout, layer: int, expert: int, names: tuple[str, ...]
    ) -> ExpertRecord:
        matrices = zip(names, expert_shapes(config, layer), strict=True)
        return ExpertRecord.of(*(self.weight(name, shape) for name, shape in matrices))

    def _stacked_expert(
        self, config: ModelConfig, layout: Layout, layer: int, expert: int, names: tuple[str, ...]
    ) -> ExpertRecord:
        slice = Slice(config.num_experts, expert)
        matrices = zip(names, expert_shapes(config, layer), strict=True)
        return ExpertRecord.of(*(self.weight(name, shape, slice) for name, shape in matrices))

    def _fused_expert(
        self, config: ModelConfig, layout: Layout, layer: int, expert: int, names: tuple[str, ...]
    ) -> ExpertRecord:
        gate, _, down = expert_shapes(config, layer)
        if self.codes_of(names[0]) is not None:
            halves = [self.weight(names[0], gate, Slice(config.num_experts, expert, 2, at)) for at in (0, 1)]
            return ExpertRecord.of(*halves, self.weight(names[1], down, Slice(config.num_experts, expert)))
        gate_up_ref, gate_up_format = self.take(names[0], (config.num_experts, 2 * gate[0], gate[1]))
        down_ref, down_format = self.take(names[1], (config.num_experts, *down))
        return ExpertRecord(
            (Piece.of(gate_up_ref.at(expert)), Piece.of(down_ref.at(expert))),
            gate=ExpertMatrix(0, 0, gate_up_format, *gate),
            up=ExpertMatrix(0, matrix_bytes(gate_up_format, *gate), gate_up_format, *gate),
            down=ExpertMatrix(1, 0, down_format, *down),
        )

    def _transposed_expert(
        self, config: ModelConfig, layout: Layout, layer: int, expert: int, names: tuple[str, ...]
    ) -> ExpertRecord:
        (width, hidden), _, _ = expert_shapes(config, layer)
        pieces, formats = [], []
        for name, shape in zip(names, ((hidden, 2 * width), (width, hidden)), strict=True):
            ref, format = self.take(name, (config.num_experts, *shape))
            pieces.append(Piece.of(ref.at(expert)))
            formats.append(format)
        gate_up, down = formats
        strides, up_at = ((2, 2 * width), 1) if layout.has_turns else ((1, 2 * width), width)
        up_offset = up_at * BYTES_PER_VALUE[gate_up]
        return ExpertRecord(
            tuple(pieces),
            gate=ExpertMatrix(0, 0, gate_up, width, hidden, strides),
            up=ExpertMatrix(0, up_offset, gate_up, width, hidden, strides),
            down=ExpertMatrix(1, 0, down, hidden, width, strides=(1, hidden)),
        )

    def _require_mxfp4(self, blocks: str, shape: tuple[int, int]) -> None:
        """Prove that the config describes the codes of stacked experts."""
        scheme = self.scheme_of(blocks.removesuffix("_blocks"), self._tensors[blocks])
        if scheme.storage != "mxfp4-blocks":
            raise self.unread(self._tensors[blocks], shape, scheme, "mxfp4")

    def _mxfp4_expert(
        self, config: ModelConfig, layout: Layout, layer: int, expert: int, names: tuple[str, ...]
    ) -> ExpertRecord:
        """Blocks [experts, rows, cols / 32, 16] and scales [experts, rows, cols / 32] of OCP MXFP4."""
        gate, _, down = expert_shapes(config, layer)
        for key, size in (("hidden_size", gate[1]), ("intermediate_size", down[1])):
            if size % MXFP4_GROUP:
                raise CheckpointError(
                    f"config.json gives {key} as {size}, but MXFP4 rows are blocks of {MXFP4_GROUP}",
                    key=key,
                )
        pieces: list[Piece] = []
        for blocks, scales, (rows, cols), interleaved in (
            (names[0], names[1], gate, 2),
            (names[2], names[3], down, 1),
        ):
            groups = (config.num_experts, interleaved * rows, cols // MXFP4_GROUP)
            first = len(pieces)
            if blocks in self:
                self._require_mxfp4(blocks, (rows, cols))
            for name, block_type, shape in (
                (blocks, "mxfp4_quants", (*groups, MXFP4_GROUP // 2)),
                (scales, "mxfp4_scales", groups),
            ):
                blocks_of = Transcode(block_type, "mxfp4", rows, cols, interleaved)
                completes = first if block_type == "mxfp4_scales" else None
                pieces.append(Piece.of(self.take_bytes(name, shape).at(expert), blocks_of, completes))
        return ExpertRecord(
            tuple(pieces),
            gate=ExpertMatrix(0, 0, "mxfp4", *gate),
            up=ExpertMatrix(0, matrix_bytes("mxfp4", *gate), "mxfp4", *gate),
            down=ExpertMatrix(2, 0, "mxfp4", *down),
        )
