"""Turn a GGUF file's tensor names into `ModelFiles`.

    ModelConfig + GgufFile  ->  read_gguf_layout  ->  ModelFiles

The names are llama.cpp's, the same for all families: `blk.{layer}.attn_q.weight` and so on. The experts of a layer are
stacked in one tensor per matrix, [experts, rows, cols], and an expert is a slice of each, read in place. Files made
with `--fuse-gate-up-exps` have the rows of gate and up in one tensor, with `--fuse-qkv` those of q, k and v; files from
early 2024 have one tensor per expert (`blk.{layer}.ffn_gate.{expert}.weight`). Every tensor is accounted for, as in
`layout.py` for safetensors. A matrix in NVFP4 may have a factor in a tensor named `scale`, experts one each;
`input_scale` belongs to activations in FP4, which no kernel uses.

Elsewhere: `checkpoint/geometry.py` knows shapes; `checkpoint/gguf.py` finds the bytes; `native/store/` turns blocks
into slot formats while they land.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

from argosy.checkpoint.block_types import SLOT_FORMATS, TYPE_HINT
from argosy.checkpoint.files import (
    DraftFiles,
    ExpertRecord,
    ExpertRecords,
    ModelFiles,
    TableRef,
    require_one_format_a_layer,
)
from argosy.checkpoint.geometry import dense_shapes, expert_shapes, require_countable, shapes_together
from argosy.checkpoint.gguf import GgufFile
from argosy.checkpoint.landing import (
    AS_STORED,
    Landing,
    MatrixRef,
    PairedRows,
    Piece,
    Transcode,
    Transcoded,
)
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import AttentionConfig, Format, MambaConfig, ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.model.reading.accounts import TensorAccounts, read_draft

_FLOAT_FORMATS: Mapping[str, Format] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
FORMAT_OF_TYPE: Mapping[str, Format] = {**_FLOAT_FORMATS, **SLOT_FORMATS}

_MODEL_NAMES = {"embed": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "sinks": "attn_sinks.weight",
    "attn_gate": "attn_gate.weight",
    "shortconv_in": "shortconv.in_proj.weight",
    "shortconv_conv": "shortconv.conv.weight",
    "shortconv_out": "shortconv.out_proj.weight",
    "mamba_in": "ssm_in.weight",
    "mamba_conv": "ssm_conv1d.weight",
    "mamba_conv_bias": "ssm_conv1d.bias",
    "mamba_rate": "ssm_a",
    "mamba_dt_bias": "ssm_dt.bias",
    "mamba_skip": "ssm_d",
    "mamba_norm": "ssm_norm.weight",
    "mamba_out": "ssm_out.weight",
    "q_down": "attn_q_a.weight",
    "q_down_norm": "attn_q_a_norm.weight",
    "q_up": "attn_q_b.weight",
    "kv_down": "attn_kv_a_mqa.weight",
    "kv_norm": "attn_kv_a_norm.weight",
    "kv_up": "attn_kv_b.weight",
    "k_up": "attn_k_b.weight",
    "v_up": "attn_v_b.weight",
    "index_q": "indexer.attn_q_b.weight",
    "index_k": "indexer.attn_k.weight",
    "index_k_norm": "indexer.k_norm.weight",
    "index_k_norm_bias": "indexer.k_norm.bias",
    "index_weights": "indexer.proj.weight",
    "index_gate": "indexer_compressor_gate.weight",
    "index_gate_bias": "indexer_compressor_ape.weight",
    "mlp_norm": "ffn_norm.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "latent_down": "ffn_latent_down.weight",
    "latent_up": "ffn_latent_up.weight",
    "choice_bias": "exp_probs_b.bias",
    "token_experts": "ffn_gate_tid2eid.weight",
    "expert_gate_bias": "ffn_gate_exps.bias",
    "expert_up_bias": "ffn_up_exps.bias",
    "expert_down_bias": "ffn_down_exps.bias",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
    "shared_score": "ffn_gate_inp_shexp.weight",
    "draft_token_norm": "nextn.enorm.weight",
    "draft_state_norm": "nextn.hnorm.weight",
    "draft_join": "nextn.eh_proj.weight",
    "draft_final_norm": "nextn.shared_head_norm.weight",
}
_EXPERT_NAMES = ("ffn_gate", "ffn_up", "ffn_down")
# The rows of one tensor, `attn_qkv`, in some files.
_QKV, _QKV_BIAS = ("q", "k", "v"), ("q_bias", "k_bias", "v_bias")
# A constant that old converters left behind.
_LEFTOVERS = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
# The same constant, and a tensor that families read into their config.
_NOT_WEIGHTS = re.compile(rf"rope_freqs\.weight|{_LEFTOVERS.pattern}")
# ik_llama.cpp's converter writes the keys and values in `attn_kv_b` of latent attention twice (DeepseekV2Model).
_COPIES = re.compile(r"blk\.\d+\.attn_[kv]_b\.weight")


def dense_name(canonical: str, names: Mapping[str, str] = {}) -> str:
    """Return the GGUF name of a dense tensor such as `head` or `layers.3.q_bias`; `names` are an architecture's own
    names, of one layer (`layers.3.q_bias`) or of all (`q_bias`).
    """
    if "." not in canonical:
        return names.get(canonical) or _MODEL_NAMES[canonical]
    _, layer, last = canonical.split(".")
    return f"blk.{layer}.{names.get(canonical) or names.get(last) or _LAYER_NAMES[last]}"


def read_gguf_layout(
    file: GgufFile,
    config: ModelConfig,
    *,
    is_paired: bool,
    has_rope_freqs: bool,
    names: Mapping[str, str] = {},
    table_name: str = "",
    passed_over: Sequence[str] = (),
) -> ModelFiles:
    """Account for every tensor of a GGUF file.

    Args:
        is_paired: rows of q and k are in the order of adjacent rotary pairs, as in the llama architecture.
        has_rope_freqs: the family reads `rope_freqs.weight`.
        names: the architecture's unusual names, those of layers below `blk.{layer}.`.
        table_name: the n-gram table, with {layer} if each layer has its own.
        passed_over: regular expressions for whole names of tensors that are not used.

    Raises:
        CheckpointError: a tensor is missing, extra, or has another shape than the metadata require.
        UnsupportedModel: no kernel reads a tensor's type, or there are too many experts.
    """
    accounts = _Accounts(file.path, file.tensors, FORMAT_OF_TYPE, hint=TYPE_HINT)

    def take_dense(
        reader: _Accounts, config: ModelConfig, canonical: str, shape: tuple[int, ...]
    ) -> MatrixRef:
        last = canonical.rpartition(".")[2]
        if last == "token_experts":
            return reader.indices(dense_name(canonical, names), (shape[0], shape[1]), config.num_experts)
        heads = stacked = 0
        mixer = None if last == canonical else config.layers[int(canonical.split(".")[1])].mixer
        if is_paired and last in ("q", "k"):
            assert isinstance(mixer, AttentionConfig)
            heads = mixer.num_heads if last == "q" else mixer.num_kv_heads
        if config.latent is not None and last in ("k_up", "v_up"):
            stacked = config.latent.num_heads
        if isinstance(mixer, MambaConfig):
            heads_and_groups = {
                "mamba_rate": mixer.num_heads,
                "mamba_skip": mixer.num_heads,
                "mamba_norm": mixer.num_groups,
            }
            stacked = heads_and_groups.get(last, 0)
        name = dense_name(canonical, names)
        together = _QKV_BIAS if last.endswith("_bias") else _QKV
        if isinstance(mixer, AttentionConfig) and last in together and name not in reader:
            layer = int(canonical.split(".")[1])
            joined = f"blk.{layer}.attn_qkv.{name.rpartition('.')[2]}"
            if joined in reader:
                shapes = shapes_together(config, layer, together)
                return reader.part(joined, list(shapes.values()), list(shapes).index(last), heads)
        return reader.dense(name, shape, heads, stacked)

    dense = {name: take_dense(accounts, config, name, shape) for name, shape in dense_shapes(config)}
    require_countable(config)
    experts = ExpertRecords()
    for layer in config.moe_layers:
        accounts.experts(config, layer, experts)
    tables = {layer: accounts.table(config, layer, table_name) for layer in config.ngram_layers}
    leftovers = [_NOT_WEIGHTS if has_rope_freqs else _LEFTOVERS, *map(re.compile, passed_over)]
    if config.latent is not None and not config.latent.is_up_split:
        leftovers.append(_COPIES)
    accounts.refuse_extra(
        config,
        lambda name: any(each.fullmatch(name) for each in leftovers) or _layer_of(name) in config.mtp_layers,
        "these metadata",
    )
    require_one_format_a_layer(experts, file.path)
    draft: DraftFiles | ArgosyError | None = None
    if config.draft_form and dense_name(f"layers.{config.num_layers}.draft_join") in file.tensors:
        reader = _Accounts(file.path, file.tensors, FORMAT_OF_TYPE, hint=TYPE_HINT)
        draft = read_draft(
            config,
            file.path,
            partial(take_dense, reader),
            lambda alone: reader.experts(alone, config.num_layers, ExpertRecords()),
        )
    return ModelFiles(file.path, config, dense, experts, header=file, tables=tables, draft=draft)


def _layer_of(name: str) -> int | None:
    """Return the layer of a tensor, or None if it belongs to the model as a whole."""
    layer = re.match(r"blk\.(\d{1,9})\.", name)
    return int(layer[1]) if layer else None


class _Accounts(TensorAccounts):
    """Tensors of a GGUF file, as dense matrices and experts."""

    def dense(self, name: str, shape: tuple[int, ...], paired_heads: int, stacked: int) -> MatrixRef:
        """Take a matrix or vector; `stacked` is the number of matrices, or of parts of the vector, that its tensor
        may stack; 0: none.
        """
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        shapes: tuple[tuple[int, ...], ...] = (shape,)
        if stacked and len(shape) == 1:
            shapes = (shape, (stacked, cols // stacked))
        elif stacked > 1:
            shapes = ((stacked, rows // stacked, cols),)
        elif len(shape) == 2 and rows == 1:
            shapes = (shape, (cols,))  # GGUF stores the single row that scores the shared expert as a vector
        ref, _ = self.take(name, *shapes)
        return _matrix(ref, rows, cols, paired_heads, factor=self._factor(ref))

    def part(self, name: str, shapes: Sequence[tuple[int, ...]], number: int, paired_heads: int) -> MatrixRef:
        """Take one of the matrices or vectors that a tensor holds one after another (`--fuse-qkv`)."""
        ref, _ = self.take_rows(name, shapes, number)
        rows, cols = ref.shape if len(ref.shape) == 2 else (1, ref.shape[0])
        return _matrix(ref, rows, cols, paired_heads, factor=self._factor(ref))

    def table(self, config: ModelConfig, layer: int, name: str) -> TableRef:
        """Take the table of a layer, which may have more rows than n-grams choose from."""
        ngrams, name = config.layers[layer].ngrams, name.format(layer=layer)
        assert ngrams is not None
        if name not in self:
            raise CheckpointError(f"{self.path.name}: {name} is missing", path=self.path, tensor=name)
        return TableRef.of([self.take_any(name)], ngrams.num_rows, ngrams.row_dim)

    def experts(self, config: ModelConfig, layer: int, records: ExpertRecords) -> ExpertRecords:
        """Append the routed experts of a layer."""
        shapes = tuple(expert_shapes(config, layer))
        if f"blk.{layer}.ffn_gate_exps.weight" not in self and f"blk.{layer}.ffn_gate.0.weight" in self:
            for expert in range(config.num_experts):
                refs = [
                    self.take(f"blk.{layer}.{name}.{expert}.weight", shape)[0]
                    for name, shape in zip(_EXPERT_NAMES[-len(shapes) :], shapes, strict=True)
                ]
                records.add((layer, expert), _record(refs, [self._factor(ref) for ref in refs]))
            return records
        stacks = self._stacks(config, layer)
        factors = [self._factor(ref, config.num_experts) for ref, _ in stacks]

        def record(expert: int) -> ExpertRecord:
            slices = [
                ref.at(expert).rows(first, rows)
                for (ref, first), (rows, _) in zip(stacks, shapes, strict=True)
            ]
            return _record(slices, [factor and factor.at(expert) for factor in factors])

        records.add_stacked(layer, config.num_experts, record(0), record(min(1, config.num_experts - 1)))
        return records

    def _stacks(self, config: ModelConfig, layer: int) -> list[tuple[TensorRef, int]]:
        """Take the tensors of all gates, ups and downs of a layer, and each one's first row in its tensor."""
        shapes = expert_shapes(config, layer)
        names = [f"blk.{layer}.{name}_exps.weight" for name in _EXPERT_NAMES[-len(shapes) :]]
        if (joined := f"blk.{layer}.ffn_gate_up_exps.weight") in self and config.activation.has_gate:
            (rows, cols), _, down = shapes
            both, _ = self.take(joined, (config.num_experts, 2 * rows, cols))
            return [(both, 0), (both, rows), (self.take(names[-1], (config.num_experts, *down))[0], 0)]
        return [
            (self.take(name, (config.num_experts, *shape))[0], 0)
            for name, shape in zip(names, shapes, strict=True)
        ]

    def _factor(self, ref: TensorRef, count: int = 1) -> TensorRef | None:
        """Take the factors of a tensor's `count` matrices, or return None if it has none."""
        if ref.dtype != "NVFP4":
            return None
        base = ref.name.removesuffix("weight")
        if (of_activations := base + "input_scale") in self:
            self.take_part(of_activations, {"F32": ""}, (count,))
        # A family may read the factors of an expert's output as its routing weights' (Gemma-4).
        if (name := base + "scale") not in self or name in self._taken:
            return None
        return self.take_part(name, {"F32": "nvfp4_factor"}, (count,))[0]


def _record(refs: Sequence[TensorRef], factors: Sequence[TensorRef | None]) -> ExpertRecord:
    matrices = (_matrix(ref, *ref.shape, factor=factor) for ref, factor in zip(refs, factors, strict=True))
    return ExpertRecord.of(*matrices)


def _matrix(
    ref: TensorRef, rows: int, cols: int, paired_heads: int = 0, *, factor: TensorRef | None = None
) -> MatrixRef:
    format = FORMAT_OF_TYPE[ref.dtype]
    block_type = ref.dtype if ref.dtype in SLOT_FORMATS else None
    landing: Landing = AS_STORED if block_type is None else Transcoded(block_type)
    if factor is not None:
        if paired_heads:
            raise UnsupportedModel(
                f"{ref.path.name}: {ref.name} is {ref.dtype} with a factor in {factor.name}, and its rows must be put "
                "into another order; supported in that case: every type without a factor",
                hint="get a file of the model whose attn_q and attn_k have another type, such as Q8_0",
                path=ref.path,
                tensor=ref.name,
            )
        piece = Piece.of(factor, Transcode("nvfp4_factor", format, rows, cols), completes=0)
        landing = Transcoded("nvfp4_blocks", (piece,))
    elif paired_heads:
        landing = PairedRows(paired_heads, block_type)
    return MatrixRef.of(ref, format, rows, cols, landing)
