"""MiMo-V2.5's q, k and v: one FP8 tensor with the rows of each tensor-parallel rank in turn, as its makers serve it.

    rows [q k v] of a rank, [q k v] of the next ...   scales of blocks, which begin again with each rank

A block of 128 rows may hold keys and values. Queries are whole blocks and keep a scale for each; keys and values get
their block's scale row by row, so no weight changes. vLLM, SGLang's port to JAX and llama.cpp's converter read it so.
The number of ranks is that of KV heads in layers that see everything. A tensor of floats has all of q, then k, then v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from argosy import _native
from argosy.checkpoint.formats import F8_BLOCK
from argosy.checkpoint.geometry import shapes_together
from argosy.checkpoint.landing import Bytes, MatrixRef, Moved, read_values
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import ModelConfig
from argosy.errors import CheckpointError
from argosy.model.reading.coded_weights import WeightAccounts

_ROWS = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class RankedRows(Moved):
    """A matrix that has `count` of the `of_rank` FP8 rows of each rank, from row `first` on."""

    first: int
    count: int
    of_rank: int
    scales: TensorRef  # float32 [ranks * blocks of a rank, blocks of columns]

    @property
    def needs_scratch(self) -> bool:
        return True

    def own_bytes(self, ref: MatrixRef) -> int:
        return ref.rows * ref.cols

    def working_bytes(self, ref: MatrixRef) -> int:
        return ref.rows * (ref.cols + 4 * -(-ref.cols // F8_BLOCK)) + self.scales.nbytes

    def land(self, ref: MatrixRef, landed: Bytes, places: Sequence[Bytes]) -> None:
        num_ranks, end = ref.rows // self.count, self.first + self.count
        codes = landed.reshape(num_ranks, self.of_rank, ref.cols)[:, self.first : end]
        rows_of_scale = F8_BLOCK if ref.format == "f8" else 1
        blocks = np.arange(self.first, end, rows_of_scale) // F8_BLOCK
        scales = read_values(self.scales).reshape(num_ranks, -1, self.scales.shape[1])[:, blocks]
        places[0][:] = 0
        try:
            for part, values in (
                ("codes", codes),
                (f"scales_{rows_of_scale}x{F8_BLOCK}", np.ascontiguousarray(scales).view(np.uint8)),
            ):
                data = np.ascontiguousarray(values).reshape(-1)
                _native.transcode(f"{ref.format}_{part}", data, ref.rows, ref.cols, 1, places[0])
        except ValueError as error:
            raise CheckpointError(
                f"{ref.path.name}: {ref.name}: {error}", path=ref.path, tensor=ref.name
            ) from error


def take_rows(accounts: WeightAccounts, config: ModelConfig, layer: int, last: str) -> MatrixRef | None:
    """Take q, k or v of a layer from the tensor that has all three; None for other tensors, or if there is none.

    Raises:
        CheckpointError: the tensor or its scales have another shape.   UnsupportedModel: it is stored in another way.
    """
    name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
    if last not in _ROWS or name not in accounts:
        return None
    shapes, number = list(shapes_together(config, layer, _ROWS).values()), _ROWS.index(last)
    rows, cols = shapes[number]
    if (codes := accounts.codes_of(name)) is None:
        ref, format = accounts.take_rows(name, shapes, number)
        return MatrixRef.of(ref, format, rows, cols)
    scheme, num_ranks = accounts.scheme_of(name, codes), config.attention.num_kv_heads
    if (
        scheme.storage != "fp8"
        or scheme.block != (F8_BLOCK, F8_BLOCK)
        or any(s[0] % num_ranks for s in shapes)
    ):
        raise accounts.unread(
            codes, (rows, cols), scheme, f"FP8 in blocks of {F8_BLOCK}, for {num_ranks} ranks"
        )
    counts = [shape[0] // num_ranks for shape in shapes]
    first, of_rank = sum(counts[:number]), sum(counts)
    ref, _ = accounts.take_part(name, {"F8_E4M3": ""}, (num_ranks * of_rank, cols))
    in_file = num_ranks * -(-of_rank // F8_BLOCK), -(-cols // F8_BLOCK)
    scales, _ = accounts.take_part(name + "_scale_inv", {"F32": ""}, in_file)
    is_whole = first % F8_BLOCK == 0 and counts[number] % F8_BLOCK == 0
    landing = RankedRows(first, counts[number], of_rank, scales)
    return MatrixRef.of(ref, "f8" if is_whole else "f8_32", rows, cols, landing)
