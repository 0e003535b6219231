"""Layers with multi-head latent attention in the stack match the formula, with the same bits however they are run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from argosy import _native
from argosy.budget.footprint import kv_bytes
from argosy.checkpoint.block_types import SLOT_FORMATS
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.formats import matrix_bytes
from argosy.checkpoint.landing import AS_STORED, Halves, MatrixRef, Transcoded
from argosy.checkpoint.latent_up import KeyValueRows
from argosy.config import F8_FORMATS, Format, IndexConfig, KvDtype, LatentConfig, ModelConfig
from argosy.errors import UnsupportedModel
from argosy.model.clock import PartClock
from argosy.model.decoder import Decoder
from argosy.model.layers import kv_shapes, stack_sizes
from argosy.model.weights import dense_footprint, load_dense
from tests.model.latent_model import (
    GROUPS,
    INDEX,
    PLAIN_QUERY,
    QUERY_RANK,
    LatentModel,
    grouped_config,
    indexed_config,
    latent_config,
)
from tests.model.open_parts import Parts, Run, decode, make_steps
from tests.model.reference_step import Floats, ReferenceDecoder
from tests.native.gguf_blocks import dequantized, random_blocks

STEPS = [
    [Run(0, 7)],
    [Run(0, 21), Run(1, 3)],
    [decode(0), Run(1, 11)],
    [decode(0), decode(1), Run(2, 35)],
    [decode(2), decode(0), decode(1)],
]
MAX_TOKENS = 90


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def opened(model: LatentModel, *, threads: int = 1, instruction_set: str | None = None) -> Iterator[Parts]:
    store = _native.Store(2)
    try:
        weights = load_dense(store, model.files.dense, open_file=store.open)
        yield Parts(model.config, weights, None, _native.Runtime(threads, instruction_set=instruction_set))
    finally:
        store.close()


def decoder_of(parts: Parts) -> Decoder:
    return Decoder(
        parts.config,
        parts.weights,
        None,
        parts.kv(),
        parts.runtime,
        MAX_TOKENS,
        clock=PartClock(),
        recurrent=parts.recurrent(),
    )


def run(parts: Parts, decoder: Decoder | ReferenceDecoder) -> list[Floats]:
    run_step = decoder.forward if isinstance(decoder, Decoder) else decoder.logits
    return [run_step(step) for step in make_steps(parts.config, STEPS)]


@pytest.mark.parametrize(
    ("latent", "is_interleaved"), [(QUERY_RANK, True), (QUERY_RANK, False), (PLAIN_QUERY, True)]
)
@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_logits_match_those_of_the_plain_form(
    latent: LatentConfig, is_interleaved: bool, format: Format, instruction_set: str, tmp_path: Path
) -> None:
    model = LatentModel(tmp_path, latent_config(latent, is_interleaved=is_interleaved), format)
    with opened(model, instruction_set=instruction_set) as parts:
        (step,) = make_steps(parts.config, [[Run(0, 70)]])
        found = decoder_of(parts).forward(step)
    np.testing.assert_allclose(found, model.logits(step.token_ids.tolist()), atol=2e-5)


@pytest.mark.parametrize("index", [INDEX, replace(INDEX, is_interleaved=True, num_chosen=69, num_heads=5)])
def test_logits_match_those_of_a_mask_over_the_chosen_positions(
    index: IndexConfig, instruction_set: str, tmp_path: Path
) -> None:
    model = LatentModel(tmp_path, indexed_config(index))
    with opened(model, instruction_set=instruction_set) as parts:
        (step,) = make_steps(parts.config, [[Run(0, 70)]])
        found = decoder_of(parts).forward(step)
    expected = model.logits(step.token_ids.tolist())
    np.testing.assert_allclose(found, expected, atol=2e-5)
    dense = LatentModel(tmp_path, replace(model.config, layers=latent_config(QUERY_RANK).layers[:1] * 3))
    dense.values = model.values
    without_mask = dense.logits(step.token_ids.tolist())
    few = index.num_chosen
    np.testing.assert_allclose(expected[:few], without_mask[:few], atol=1e-12)
    assert np.abs(expected[few:] - without_mask[few:]).max() > 1e-3


@pytest.mark.parametrize("group_size", [2, 4, 16, 32])
def test_logits_match_those_of_a_mask_over_the_chosen_groups(
    group_size: int, instruction_set: str, tmp_path: Path
) -> None:
    """Groups of a size that divides a KV block, and of two blocks; the last one is unfinished."""
    config = grouped_config(replace(GROUPS, group_size=group_size, num_chosen=max(16, group_size)))
    model = LatentModel(tmp_path, config)
    with opened(model, instruction_set=instruction_set, threads=2) as parts:
        (step,) = make_steps(parts.config, [[Run(0, 79)]])
        found = decoder_of(parts).forward(step)
    np.testing.assert_allclose(found, model.logits(step.token_ids.tolist()), atol=2e-5)


@pytest.mark.parametrize("format", ["f32", "q8", "q4"])
@pytest.mark.parametrize("config", [latent_config(QUERY_RANK), latent_config(PLAIN_QUERY), indexed_config()])
def test_a_step_has_the_bits_of_its_operations_on_any_number_of_threads(
    config: ModelConfig, format: Format, instruction_set: str, tmp_path: Path
) -> None:
    model = LatentModel(tmp_path, config, format)
    with opened(model, instruction_set=instruction_set) as parts:
        expected = run(parts, ReferenceDecoder(parts.config, parts.weights, None, parts.kv(), parts.runtime))
        alone = run(parts, decoder_of(parts))
    with opened(model, threads=3, instruction_set=instruction_set) as parts:
        shared = run(parts, decoder_of(parts))
        assert parts.runtime.scratch_bytes == stack_sizes(parts.config).scratch_bytes(MAX_TOKENS, 3)
    for ours, theirs, threads in zip(alone, expected, shared, strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(threads, theirs)


@pytest.mark.parametrize("config", [latent_config(QUERY_RANK), indexed_config(), grouped_config()])
def test_decode_equals_prefill(config: ModelConfig, instruction_set: str, tmp_path: Path) -> None:
    model = LatentModel(tmp_path, config, "bf16")
    with opened(model, instruction_set=instruction_set) as parts:
        (whole,) = make_steps(parts.config, [[Run(0, 60)]])
        together = decoder_of(parts).forward(whole)
        decoder = decoder_of(parts)
        for at in range(60):
            step = whole._replace(
                token_ids=whole.token_ids[at : at + 1],
                order=whole.order[at : at + 1],
                sequence=whole.sequence[at : at + 1],
                slots=whole.slots[at : at + 1],
                is_decode=np.array([at >= 20]),
                wanted=np.zeros(1, np.int64),
            )
            np.testing.assert_array_equal(decoder.forward(step)[0], together[at])


@pytest.mark.parametrize(("dtype", "nbytes"), [("f32", 576 * 4), ("f16", 576 * 2), ("q8", 576 + 2 * 18)])
def test_the_cache_holds_one_vector_for_each_position_and_layer(dtype: KvDtype, nbytes: int) -> None:
    latent = replace(PLAIN_QUERY, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128)
    config = latent_config(latent, num_heads=64)
    kimi_k2 = replace(config, layers=config.layers[:1] * 61)
    assert kv_bytes(kimi_k2, 4096, dtype) == 4096 * 61 * nbytes
    assert _native.KvCache(kv_shapes(kimi_k2), 2, 16, dtype).nbytes == 32 * 61 * nbytes


# ── how kv_up is split ──────────────────────────────────────────────────────────────────────────────────────────


def halves_of(values: Floats, rows: KeyValueRows) -> tuple[Floats, Floats]:
    heads = values.reshape(rows.num_heads, rows.key_rows + rows.value_rows, -1)
    keys, rest = heads[:, : rows.key_rows], heads[:, rows.key_rows :]
    cols = values.shape[1]
    return keys.transpose(0, 2, 1).reshape(-1, rows.key_rows), rest.reshape(-1, cols)


def rows_of(matrix: _native.Matrix) -> Floats:
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    runtime = _native.Runtime(1)
    _native.embed(runtime, matrix, np.arange(matrix.rows, dtype=np.int32), out)
    runtime.close()
    return out


def load_one(ref: MatrixRef) -> tuple[_native.Matrix, _native.Matrix]:
    store = _native.Store(1)
    try:
        weights = load_dense(store, {"layers.0.kv_up": ref}, open_file=store.open)
    finally:
        store.close()
    assert set(weights.matrices) == {"layers.0.k_up", "layers.0.v_up"}
    assert weights.arena.nbytes <= dense_footprint({"layers.0.kv_up": ref})
    return weights.matrices["layers.0.k_up"], weights.matrices["layers.0.v_up"]


ENDS_AT_PANELS, ENDS_BETWEEN = KeyValueRows(3, 32, 16), KeyValueRows(3, 12, 14)


@pytest.mark.parametrize("rows", [ENDS_AT_PANELS, ENDS_BETWEEN])
@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "q8", "q4"])
def test_each_weight_lands_once_and_float_formats_keep_their_bits(
    format: Format, rows: KeyValueRows, tmp_path: Path
) -> None:
    num_rows, cols = rows.num_heads * (rows.key_rows + rows.value_rows), 72
    data = np.empty(_native.matrix_bytes(format, num_rows, cols), np.uint8)
    _native.quantize(format, np.random.default_rng(0).standard_normal((num_rows, cols), np.float32), data)
    (tmp_path / "dense.bin").write_bytes(b"\xff" * 192 + data.tobytes())
    checksum = _native.crc32c_wide(data.tobytes())
    path = tmp_path / "dense.bin"
    ref = MatrixRef("kv_b", path, 192, data.nbytes, format, num_rows, cols, checksum, Halves(AS_STORED, rows))
    keys, values = halves_of(_native.dequantize(format, data, num_rows, cols), rows)

    key_up, value_up = load_one(ref)

    if format in ("q8", "q4"):
        keys = keys.astype(np.float16).astype(np.float32)
        assert key_up.format == "f16"
        if rows is ENDS_AT_PANELS:
            assert value_up.format == format
        else:
            values = values.astype(np.float16).astype(np.float32)
    else:
        assert key_up.format == value_up.format == format
    np.testing.assert_array_equal(rows_of(key_up), keys)
    np.testing.assert_array_equal(rows_of(value_up), values)


def test_heads_that_end_inside_a_panel_are_refused_by_name(tmp_path: Path) -> None:
    config = latent_config(replace(PLAIN_QUERY, kv_rank=40, is_up_split=True))
    ref = MatrixRef("blk.0.attn_k_b.weight", tmp_path, 0, 1, "q8", 5 * 40, 32)
    with pytest.raises(UnsupportedModel, match=r"attn_k_b.weight is q8 with 40 rows per head; .* of 16"):
        ModelFiles(tmp_path, config, {"layers.0.k_up": ref}, {})
    whole = ModelFiles(tmp_path, config, {"layers.0.k_up": replace(ref, rows=5 * 48)}, {})
    assert whole.dense["layers.0.k_up"].landing is AS_STORED


@pytest.mark.parametrize(
    ("rows", "cols", "format"),
    [
        (KeyValueRows(3, 128, 256), 256, "f8"),
        (KeyValueRows(2, 256, 128), 384, "f8"),
        (KeyValueRows(3, 128, 120), 256, "f32"),
        (KeyValueRows(2, 128, 128), 200, "f32"),
    ],
)
def test_blocks_of_f8_are_transposed_with_their_scales(
    rows: KeyValueRows, cols: int, format: Format, tmp_path: Path
) -> None:
    num_rows = rows.num_heads * (rows.key_rows + rows.value_rows)
    rng = np.random.default_rng(0)
    data = bytearray()
    for begin in range(0, num_rows, 128):
        scales = rng.uniform(0.5, 2, -(-cols // 128)).astype(np.float32).tobytes()
        codes = rng.integers(0, 256, (min(128, num_rows - begin), cols), dtype=np.uint8)
        codes[codes % 128 == 127] = 0  # this code is NaN
        data += scales + bytes(-len(scales) % 64) + codes.tobytes()
    path = tmp_path / "dense.bin"
    path.write_bytes(data)
    assert len(data) == _native.matrix_bytes("f8", num_rows, cols) == matrix_bytes("f8", num_rows, cols)
    keys, values = halves_of(_native.dequantize("f8", np.frombuffer(data, np.uint8), num_rows, cols), rows)

    key_up, value_up = load_one(
        MatrixRef("kv_b", path, 0, len(data), "f8", num_rows, cols, landing=Halves(AS_STORED, rows))
    )

    assert key_up.format == value_up.format == format
    np.testing.assert_array_equal(rows_of(key_up), keys)
    np.testing.assert_array_equal(rows_of(value_up), values)


@pytest.mark.parametrize("rows", [KeyValueRows(3, 32, 48), KeyValueRows(2, 24, 40)])
@pytest.mark.parametrize("format", sorted(F8_FORMATS - {"f8", "bnb4", "bnb4_double"}))
def test_values_keep_fp8_with_scales_of_rows_and_keys_become_float32(
    rows: KeyValueRows, format: Format, tmp_path: Path
) -> None:
    num_rows, cols = rows.num_heads * (rows.key_rows + rows.value_rows), 96
    rng = np.random.default_rng(0)
    data = _native.transcode(
        f"{format}_codes", rng.integers(0, 127, num_rows * cols, np.uint8), num_rows, cols
    )
    count = num_rows if format in ("f8_row", "int8_row") else num_rows * 3
    scales = (
        rng.integers(110, 130, count, np.uint8)
        if format == "mxfp8"
        else rng.uniform(0.5, 2, count).astype(np.float32).view(np.uint8)
    )
    _native.transcode(f"{format}_scales", scales, num_rows, cols, out=data)
    path = tmp_path / "dense.bin"
    path.write_bytes(data)
    keys, values = halves_of(_native.dequantize(format, data, num_rows, cols), rows)

    key_up, value_up = load_one(
        MatrixRef("kv_b", path, 0, len(data), format, num_rows, cols, landing=Halves(AS_STORED, rows))
    )

    has_whole_stretches = rows.key_rows % 16 == rows.value_rows % 16 == 0
    assert (key_up.format, value_up.format) == ("f32", format if has_whole_stretches else "f32")
    np.testing.assert_array_equal(rows_of(key_up), keys)
    np.testing.assert_array_equal(rows_of(value_up), values)


@pytest.mark.parametrize("block_type", SLOT_FORMATS)
def test_blocks_of_a_gguf_are_split_too(block_type: str, tmp_path: Path) -> None:
    rows, cols = ENDS_AT_PANELS, 256
    num_rows = rows.num_heads * (rows.key_rows + rows.value_rows)
    blocks = random_blocks(block_type, num_rows, cols, seed=1)
    keys, values = halves_of(dequantized(block_type, blocks, num_rows, cols), rows)
    path = tmp_path / "dense.gguf"
    path.write_bytes(b"\xff" * 32 + blocks.tobytes())
    format = SLOT_FORMATS[block_type]
    key_up, value_up = load_one(
        MatrixRef(
            "kv_b",
            path,
            32,
            blocks.nbytes,
            format,
            num_rows,
            cols,
            landing=Halves(Transcoded(block_type), rows),
        )
    )
    assert (key_up.format, value_up.format) == ("f16", format)
    np.testing.assert_array_equal(rows_of(key_up), keys.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(rows_of(value_up), values)
