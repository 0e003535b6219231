"""Dense weights load correctly from every format and block type, with rows in the order that the kernels rotate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.block_types import SLOT_FORMATS
from argosy.checkpoint.landing import AS_STORED, Exact, Landing, MatrixRef, PairedRows, Transcoded
from argosy.errors import CheckpointError, CorruptRecord, ReadFailed
from argosy.model.weights import DenseWeights, dense_footprint, load_dense
from tests.native import _native_testing
from tests.native.gguf_blocks import dequantized, random_blocks

ROWS, COLS, HEADS = 96, 256, 3


class Dense:
    """A file with a norm, float matrices and matrices of blocks, some of them with interleaved rotary rows."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "dense.gguf"
        self.content = bytearray(b"\xff" * 96)
        self.refs: dict[str, MatrixRef] = {}
        self.truth: dict[str, NDArray[np.float32]] = {}
        norm = np.random.default_rng(0).standard_normal(COLS, np.float32)
        self._add("final_norm", norm.tobytes(), norm.reshape(1, -1))
        for i, (name, paired) in enumerate((("embed", 0), ("layers.0.q", HEADS))):
            values = np.random.default_rng(i).standard_normal((ROWS, COLS), np.float32)
            self._add(name, values.tobytes(), values, paired=paired)
        for i, block_type in enumerate(SLOT_FORMATS):
            for part, paired in (("o", 0), ("q", HEADS), ("k", 1)):
                blocks = random_blocks(block_type, ROWS, COLS, seed=10 * i + paired)
                values = dequantized(block_type, blocks, ROWS, COLS)
                self._add(f"layers.{i + 1}.{part}", blocks.tobytes(), values, block_type, paired)
        self.path.write_bytes(self.content)

    def _add(
        self,
        name: str,
        content: bytes,
        values: NDArray[np.float32],
        block_type: str | None = None,
        paired: int = 0,
    ) -> None:
        rows, cols = values.shape
        landing: Landing = AS_STORED if block_type is None else Transcoded(block_type)
        if paired:
            landing = PairedRows(paired, block_type)
        ref = MatrixRef(
            name,
            self.path,
            len(self.content),
            len(content),
            SLOT_FORMATS[block_type] if block_type else "f32",
            rows,
            cols,
            checksum=None if block_type or paired else _native.crc32c_wide(content),
            landing=landing,
        )
        self.refs[name] = ref
        self.content += content + b"\xff" * (-len(content) % 32)
        heads = values.reshape(paired or 1, -1, cols)
        if paired:  # the rows of a head become 0 2 4 ... 1 3 5 ...
            heads = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1)
        self.truth[name] = heads.reshape(rows, cols)

    def load(
        self, faults: _native_testing.FaultyFileSystem | None = None, *, norm_offset: float = 0.0
    ) -> DenseWeights:
        store = _native.Store(3, faults) if faults else _native.Store(3)
        try:
            return load_dense(store, self.refs, open_file=store.open, norm_offset=norm_offset)
        finally:
            store.close()


@pytest.fixture
def dense(tmp_path: Path) -> Dense:
    return Dense(tmp_path)


def test_every_weight_has_its_value_from_the_file_and_its_row(dense: Dense) -> None:
    weights = dense.load()
    assert set(weights.matrices) | set(weights.vectors) == set(dense.refs)
    np.testing.assert_array_equal(weights.vectors["final_norm"], dense.truth["final_norm"][0])
    runtime = _native.Runtime(1)
    for name, matrix in weights.matrices.items():
        found = np.empty((ROWS, COLS), np.float32)
        _native.embed(runtime, matrix, np.arange(ROWS, dtype=np.int32), found)
        np.testing.assert_array_equal(found, dense.truth[name], err_msg=name)
    runtime.close()


def test_quantised_rows_that_score_experts_become_float32_without_loss(dense: Dense) -> None:
    name = "layers.1.o"
    dense.refs = {name: Exact.of(dense.refs[name])}
    weights = dense.load()
    assert weights.matrices[name].format == "f32"
    found = np.empty((ROWS, COLS), np.float32)
    runtime = _native.Runtime(1)
    _native.embed(runtime, weights.matrices[name], np.arange(ROWS, dtype=np.int32), found)
    runtime.close()
    np.testing.assert_array_equal(found, dense.truth[name])
    assert dense_footprint(dense.refs) >= 2 * 4 * ROWS * COLS  # once as values, once while they land


def test_an_offset_is_added_only_to_norms_of_the_hidden_state(dense: Dense) -> None:
    ref = dense.refs["final_norm"]
    for name in ("layers.0.q_norm", "layers.0.inner_norm", "layers.0.q_bias"):
        dense.refs[name] = ref
    plain, offset = dense.load().vectors, dense.load(norm_offset=1.0).vectors
    for name in ("final_norm", "layers.0.q_norm"):
        np.testing.assert_array_equal(offset[name], plain[name] + np.float32(1))
    for name in ("layers.0.inner_norm", "layers.0.q_bias"):
        np.testing.assert_array_equal(offset[name], plain[name])


def test_the_footprint_covers_the_memory_used(dense: Dense) -> None:
    weights = dense.load()
    vectors = sum(vector.nbytes for vector in weights.vectors.values())
    in_halves = max(ref.nbytes for ref in dense.refs.values() if isinstance(ref.landing, PairedRows))
    footprint = dense_footprint(dense.refs)
    assert weights.arena.nbytes + vectors + in_halves <= footprint
    landed = sum(ref.landed_bytes for ref in dense.refs.values())
    assert weights.arena.nbytes <= landed + 2 * 4096 * len(dense.refs)


def test_a_start_that_fails_names_the_tensor(dense: Dense) -> None:
    opening = _native_testing.FaultyFileSystem(1 << 40, "eio")
    store = _native.Store(1, opening)
    store.open(str(dense.path))
    store.close()
    faults = _native_testing.FaultyFileSystem(opening.num_reads + 1, "truncated", num_faults=1 << 40)
    with pytest.raises(ReadFailed, match=r"dense\.gguf: \S+: dense\.gguf ends at byte"):
        dense.load(faults)


def test_a_packed_tensor_that_changed_is_refused(dense: Dense) -> None:
    dense.refs["embed"] = replace(dense.refs["embed"], checksum=7)
    with pytest.raises(CorruptRecord, match=r"embed: .*expected 00000007"):
        dense.load()


def test_a_norm_with_a_nan_is_refused(dense: Dense) -> None:
    ref = dense.refs["final_norm"]
    dense.refs["final_norm"] = replace(ref, checksum=None)
    dense.content[ref.offset + 8 : ref.offset + 12] = np.float32(np.nan).tobytes()
    dense.path.write_bytes(dense.content)
    with pytest.raises(CheckpointError, match="final_norm holds nan at position 2 of 256"):
        dense.load()
