"""Count what one model reads and computes for a token: the start of every prediction of its speed.

    ModelFiles, format of the KV cache  ->  work_of  ->  Work

A module of its own, because every engine has its `Work` and few predict anything.

Elsewhere: `forecast/speed.py` turns it into seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import matrix_bytes
from argosy.config import (
    KV_BLOCK_TOKENS,
    AttentionConfig,
    CompressedConfig,
    EngineConfig,
    KvDtype,
    LatentConfig,
    ModelConfig,
    RecurrentMixer,
)
from argosy.model.mixers import kv_shape


class Attention(NamedTuple):
    """Layers that see equally far: 0 is all positions. Bytes and operations are for a token and a position it sees."""

    window: int
    token_bytes: float
    operations: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The reads and operations of one model.

    experts_per_token: in a layer; layers may differ, and this is their mean.
    dense: bytes and parameters in memory by format, of all layers.
    head: the same for the head, which only the last token of a prompt needs.
    expert: the same for one routed expert, the mean of those that a token chooses.
    record_bytes: the mean size on the drive of those experts, read in pieces of `piece_bytes`.
    table_pages: pages on the drive that hold the rows of n-gram tables of one token, if none were in memory.
    is_transcoded: whether readers transcode records to the formats in memory.
    attention: kinds of layers with keys and values.
    kv_dtype: of the KV cache.
    reaches: `ModelConfig.reaches`; () stands for zeros.
    """

    num_layers: int
    num_moe_layers: int
    num_experts: int  # per layer
    experts_per_token: float
    dense: Mapping[str, tuple[float, float]]
    head: Mapping[str, tuple[float, float]]
    expert: Mapping[str, tuple[float, float]]
    record_bytes: float
    piece_bytes: float
    table_pages: int = 0
    is_transcoded: bool = False
    attention: tuple[Attention, ...]
    kv_dtype: KvDtype = "f16"
    reaches: tuple[int, ...] = ()

    @property
    def dense_bytes(self) -> float:
        """Bytes of layers and head; one row of a table of tokens is read, which counts as nothing."""
        return sum(nbytes for part in (self.dense, self.head) for nbytes, _ in part.values())

    @property
    def expert_bytes(self) -> float:
        return sum(nbytes for nbytes, _ in self.expert.values())

    def keys_values(self, context: float) -> tuple[float, float]:
        """Bytes that a token reads, and operations that it takes, with `context` positions before it."""
        seen = [(one, min(context, one.window or context)) for one in self.attention]
        return sum(n * one.token_bytes for one, n in seen), sum(n * one.operations for one, n in seen)

    def runs(self, num_tokens: int, to_end: int) -> Mapping[int, float]:
        """Return for how many of `num_tokens` of a prompt layers run, each with the share of layers that do.

        Args:
            to_end: tokens of the prompt after these.
        """
        if not self.reaches:
            return {num_tokens: 1.0}
        counts = Counter(
            min(num_tokens, max(0, reach - to_end)) if reach else num_tokens for reach in self.reaches
        )
        return {count: layers / len(self.reaches) for count, layers in counts.items() if count}

    def routed_token_bytes(self) -> float:
        """Bytes on the drive of the experts that one token chooses: its traffic if none were in memory."""
        return self.num_moe_layers * self.experts_per_token * self.record_bytes


def work_of(files: ModelFiles, kv_dtype: KvDtype, engine: EngineConfig | None = None) -> Work:
    """Count a model's reads and operations with an engine's settings; None: the default ones."""
    config = files.config
    leaves_out = any(config.reaches) and (engine is None or engine.leaves_out_tokens)
    dense: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    head: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, ref in files.dense.items():
        if name == "embed" != config.head_name or name.endswith("token_experts"):  # a row for each token
            continue
        part = head if name == config.head_name else dense
        part[ref.format][0] += ref.landed_bytes
        part[ref.format][1] += ref.rows * ref.cols
    expert: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    records = [(files.experts[layer, 0], config.chosen_in(layer)) for layer in config.moe_layers]
    num_chosen = sum(chosen for _, chosen in records)
    for record, chosen in records:
        for matrix in record.matrices:
            nbytes = matrix_bytes(matrix.format, matrix.rows, matrix.cols)
            expert[matrix.format][0] += chosen * nbytes / num_chosen
            expert[matrix.format][1] += chosen * matrix.rows * matrix.cols / num_chosen
    token_bytes = sum(chosen * record.nbytes for record, chosen in records)
    num_pieces = sum(chosen * len(record.pieces) for record, chosen in records)
    return Work(
        num_layers=config.num_layers,
        num_moe_layers=len(config.moe_layers),
        num_experts=config.num_experts,
        experts_per_token=config.mean_experts_per_token,
        dense={format: (nbytes, count) for format, (nbytes, count) in dense.items()},
        head={format: (nbytes, count) for format, (nbytes, count) in head.items()},
        expert={format: (nbytes, count) for format, (nbytes, count) in expert.items()},
        record_bytes=token_bytes / max(1, num_chosen),
        piece_bytes=token_bytes / num_pieces if records else 1.0,
        table_pages=sum(
            layer.ngrams.num_heads * len(files.tables[number].parts)
            for number, layer in enumerate(config.layers)
            if layer.ngrams is not None
        ),
        is_transcoded=any(piece.transcode is not None for record, _ in records for piece in record.pieces),
        attention=_attention(config, kv_dtype),
        kv_dtype=kv_dtype,
        reaches=config.reaches if leaves_out else (),
    )


def _attention(config: ModelConfig, kv_dtype: KvDtype) -> tuple[Attention, ...]:
    kinds: Counter[tuple[int, float, float]] = Counter()

    def add(window: int, shape: _native.KvShape, operations: float, part: float = 1.0) -> None:
        nbytes = _native.kv_cache_bytes([shape], 1, KV_BLOCK_TOKENS, kv_dtype)
        kinds[window, part * nbytes / KV_BLOCK_TOKENS, part * operations] += 1

    def add_index(num_heads: int, dim: int, part: float = 1.0, window: int = 0) -> None:
        add(window, _native.KvShape.latent(dim), 2.0 * num_heads * dim, part)

    for layer in config.layers:
        if isinstance(layer.mixer, RecurrentMixer):
            continue
        match layer.mixer:
            case LatentConfig() as latent:
                operations = 2.0 * latent.num_heads * (latent.cached_dim + latent.kv_rank)
                add(latent.num_chosen, _native.KvShape.latent(latent.cached_dim), operations)
                if (index := latent.own_index) is not None:
                    add_index(index.num_heads, index.head_dim, 1 / index.group_size)
            case CompressedConfig() as compressed:
                operations = 4.0 * compressed.num_heads * compressed.head_dim
                add(compressed.sliding_window, kv_shape(compressed), operations)
                if (pool := compressed.pool) is None:
                    continue
                chosen, part = compressed.index, 1 / pool.ratio
                seen = 0 if chosen is None else chosen.num_chosen * pool.ratio
                add(seen, _native.KvShape.latent(compressed.head_dim), operations, part)
                if (own := compressed.own_index) is not None:
                    inside = own.candidates
                    limit = 0 if inside is None or inside.is_source else inside.num_entries * pool.ratio
                    add_index(own.num_heads, own.head_dim, part, limit)
            case AttentionConfig() as attention:
                operations = 2.0 * attention.num_heads * (attention.head_dim + attention.width_of_values)
                if (blocks := attention.index) is None:
                    add(attention.sliding_window, kv_shape(attention), operations)
                else:
                    add(blocks.num_positions, kv_shape(replace(attention, index=None)), operations)
                    part = 1 / blocks.block_size if blocks.joint_heads else 1.0
                    add_index(blocks.joint_heads or attention.num_kv_heads, blocks.head_dim, part)
    return tuple(
        Attention(window, count * token_bytes, count * operations)
        for (window, token_bytes, operations), count in kinds.items()
    )
