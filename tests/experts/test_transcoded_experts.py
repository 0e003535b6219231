"""Experts in GGUF blocks over the real store: each lands as panels, in a slot or in its permanent place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from argosy import _native
from argosy.checkpoint.block_types import SLOT_FORMATS
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord
from argosy.checkpoint.formats import matrix_bytes
from argosy.checkpoint.landing import Piece, Transcode
from argosy.config import Format
from argosy.experts.cache import ExpertCache
from argosy.experts.files import ExpertFiles, Key, memory_of, resident_bytes
from argosy.experts.resident import load_resident
from tests.native import _native_testing
from tests.native.gguf_blocks import random_blocks

RUNTIME = _native.Runtime(1)
NUM_EXPERTS = 6
HIDDEN, WIDTH = 512, 256
SHAPES = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))  # gate, up, down
# As in a Q4_K_M file, `down` has more bits in some layers; the last layer is not quantised at all.
LAYERS: tuple[tuple[str, str, str], ...] = (
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q4_K", "Q4_K", "Q4_K"),
    ("Q8_0", "Q5_0", "Q4_0"),
    ("f32", "Q4_1", "f32"),
    ("f32", "f32", "f32"),
)


class Model:
    """A file laid out as in GGUF: for each matrix of a layer, one 32-byte aligned tensor with all experts."""

    def __init__(self, directory: Path) -> None:
        path = directory / "model.gguf"
        content: list[bytes] = [b"\xff" * 4128]
        end = 4128
        self.truth: dict[Key, list[bytes]] = {}
        pieces: dict[Key, list[Piece]] = {}
        formats: dict[int, list[Format]] = {}
        for layer, types in enumerate(LAYERS):
            for i, (kind, (rows, cols)) in enumerate(zip(types, SHAPES, strict=True)):
                formats.setdefault(layer, []).append(SLOT_FORMATS.get(kind, "f32"))
                for expert in range(NUM_EXPERTS):
                    seed = (layer * 3 + i) * NUM_EXPERTS + expert
                    if kind == "f32":
                        blocks = np.random.default_rng(seed).standard_normal(rows * cols, np.float32)
                        in_file = landed = blocks.tobytes()
                        transcode = None
                    else:
                        raw = random_blocks(kind, rows, cols, seed=seed)
                        in_file = raw.tobytes()
                        landed = _native.transcode(kind, raw, rows, cols).tobytes()
                        transcode = Transcode(kind, SLOT_FORMATS[kind], rows, cols)
                    piece = Piece(path, end, len(in_file), transcode=transcode)
                    assert piece.landed_bytes == len(landed)
                    pieces.setdefault((layer, expert), []).append(piece)
                    self.truth.setdefault((layer, expert), []).append(landed)
                    content.append(in_file)
                    end += len(in_file)
        path.write_bytes(b"".join(content))
        self.records = {
            key: ExpertRecord(
                tuple(each),
                *(
                    ExpertMatrix(i, 0, formats[key[0]][i], rows, cols)
                    for i, (rows, cols) in enumerate(SHAPES)
                ),
            )
            for key, each in sorted(pieces.items())
        }

    def check(self, layer: int, experts: Sequence[int], table: _native.ExpertTable) -> None:
        """Check that running the experts gives the outputs of their transcoded blocks."""
        rows = np.random.default_rng(layer).standard_normal((len(experts), HIDDEN), np.float32)
        choices, found = np.array(experts, np.int32)[:, None], np.empty_like(rows)
        dispatch = _native.Dispatch(choices, np.ones(len(experts), np.bool_), NUM_EXPERTS)
        table.run(RUNTIME, layer, experts, dispatch, rows, found)
        formats = self.records[layer, 0].formats
        for token, expert in enumerate(experts):
            gate, up, down = (
                _native.Matrix(np.frombuffer(data, np.uint8), 0, format, *shape)
                for data, format, shape in zip(self.truth[layer, expert], formats, SHAPES, strict=True)
            )
            expected = np.empty((1, HIDDEN), np.float32)
            _native_testing.swiglu(RUNTIME, gate, up, down, rows[token : token + 1], expected)
            assert np.isfinite(expected).all()
            np.testing.assert_array_equal(found[token], expected[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("transcoded"))


def open_files(model: Model, store: _native.Store) -> ExpertFiles:
    return ExpertFiles(store, model.records, open_file=store.open)


@pytest.mark.parametrize("num_slots", [2, 7, 20])
def test_leased_experts_equal_the_transcoded_blocks(model: Model, num_slots: int) -> None:
    store = _native.Store(3)
    files = open_files(model, store)
    cache = ExpertCache(files, num_slots=num_slots, experts_per_token=2)
    for _ in range(2):
        for layer in range(len(LAYERS)):
            found: list[int] = []
            with cache.lease(layer, range(NUM_EXPERTS), range(NUM_EXPERTS)) as lease:
                cache.guess((layer + 1) % len(LAYERS), [range(NUM_EXPERTS)], is_sweep=True)
                for group in lease:
                    model.check(layer, group, cache.table)
                    found += group
            assert sorted(found) == list(range(NUM_EXPERTS))
    cache.close()
    store.close()


def test_resident_experts_are_contiguous_and_keep_their_formats(model: Model) -> None:
    store = _native.Store(3)
    runner = load_resident(store, open_files(model, store), RUNTIME)
    assert runner.resident.nbytes == resident_bytes(model.records)
    assert resident_bytes(model.records) < max(map(memory_of, model.records.values())) * len(model.records)
    for layer in range(len(LAYERS)):
        model.check(layer, range(NUM_EXPERTS), runner.resident)
    assert runner.stats.lookups == runner.stats.hits == NUM_EXPERTS * len(LAYERS)
    assert runner.stats.bytes_read == sum(record.nbytes for record in model.records.values())


def test_experts_in_blocks_take_exactly_the_memory_of_their_matrices(model: Model) -> None:
    blocks_only = {key: record for key, record in model.records.items() if key[0] < 3}
    exact = sum(
        matrix_bytes(matrix.format, matrix.rows, matrix.cols)
        for record in blocks_only.values()
        for matrix in record.matrices
    )
    assert resident_bytes(blocks_only) == exact
