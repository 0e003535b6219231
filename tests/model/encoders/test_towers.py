"""Towers give the rows of transformers, within their bounds of memory and work."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from argosy import _native
from argosy.model.encoders import blocks
from argosy.model.encoders.reading import EncoderFiles
from argosy.model.encoders.table import ENCODERS
from argosy.prompt.media_span import SpanRows
from tests.model.encoders.open_tower import PARTS, Part, Shape, dense_weights, finish, peak_of
from tests.models.references import difference
from tests.models.safetensors_file import Array, read_safetensors
from tests.models.tiny_encoders import CONFIGS, REFERENCE, Sizes, random_tensors

# float32 sums in another order differ by less than 3e-6 of the largest value here; a wrong term by more than 1e-2. The
# bound leaves room for other processors.
LARGEST_DIFFERENCE = 2e-5
# Products of bfloat16 round their inputs to 8 bits.
LARGEST_DIFFERENCE_IN_BFLOAT16 = 3e-2

# Python objects of an encoder at work: 8,400 bytes at most here, without those that the interpreter keeps for reuse.
MOST_OBJECT_BYTES = 12 << 10

# Towers whose patches have two frames; GGUF files hold the kernel of each.
OF_TWO_FRAMES = ("qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe", "glm4v_moe")

NUM_CASES = 4
CASES = [(name, case) for name in PARTS for case in range(NUM_CASES)]


@cache
def reference(name: str) -> tuple[Any, dict[str, Array], dict[str, Array]]:
    """The tower's config, its weights, and the inputs and answers of transformers."""
    directory = REFERENCE / name
    config = PARTS[name].read(json.loads((directory / "config.json").read_text()))
    return (
        config,
        read_safetensors(directory / "model.safetensors"),
        read_safetensors(directory / "ref.safetensors"),
    )


def open_tower(name: str, *, threads: int = 1, is_exact: bool = True) -> tuple[Part, Any, Any]:
    part = PARTS[name]
    config, values, _ = reference(name)
    weights = dense_weights(part.tensors(config), part.prefix, values)
    return part, config, part.tower(config, weights, _native.Runtime(threads), is_exact=is_exact)


def shape_of(name: str, case: int) -> Shape:
    return tuple(int(size) for size in reference(name)[2][f"{case}.shape"])


def encoding(name: str, tower: Any, case: int) -> Generator[None, None, SpanRows]:
    return PARTS[name].encode(tower, reference(name)[2][f"{case}.input"], shape_of(name, case))


def encode(name: str, tower: Any, case: int) -> SpanRows:
    return finish(encoding(name, tower, case))


def test_every_part_has_all_its_cases() -> None:
    for name in PARTS:
        cases = {key.partition(".")[0] for key in reference(name)[2]}
        assert cases == {str(case) for case in range(NUM_CASES)}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_rows_equal_those_of_transformers(name: str, case: int) -> None:
    part, config, tower = open_tower(name)
    expected = reference(name)[2]
    rows = encode(name, tower, case)
    assert difference(rows.embeddings, expected[f"{case}.embeddings"]) <= LARGEST_DIFFERENCE
    assert len(rows.embeddings) == part.num_positions(config, shape_of(name, case))
    additions = [key for key in expected if key.startswith(f"{case}.additions.")]
    assert len(rows.additions) == len(additions)
    for layer, addition in rows.additions.items():
        assert difference(addition, expected[f"{case}.additions.{layer}"]) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(("name", "case"), CASES)
def test_angles_equal_those_of_transformers(name: str, case: int) -> None:
    expected = reference(name)[2]
    angles = PARTS[name].angles
    assert (angles is not None) == (f"{case}.angles" in expected)
    if angles is None:
        return
    found, num_angles = angles(reference(name)[0], shape_of(name, case))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected[f"{case}.angles"])
    assert num_angles == expected[f"{case}.num_angles"][0]


@pytest.mark.parametrize("name", PARTS)
def test_the_files_hold_exactly_the_tensors_of_the_tower(name: str) -> None:
    config, values, _ = reference(name)
    part = PARTS[name]
    assert {part.prefix + tensor.name: tensor.shape for tensor in part.tensors(config).values()} == {
        key: value.shape for key, value in values.items()
    }


def assert_same(found: SpanRows, expected: SpanRows) -> None:
    assert np.array_equal(found.embeddings, expected.embeddings)
    assert found.additions.keys() == expected.additions.keys()
    for layer, addition in expected.additions.items():
        assert np.array_equal(found.additions[layer], addition)


@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", PARTS)
def test_rows_do_not_depend_on_threads(name: str, is_exact: bool) -> None:
    alone, together = (
        encode(name, open_tower(name, threads=threads, is_exact=is_exact)[2], NUM_CASES - 1)
        for threads in (1, 3)
    )
    assert_same(together, alone)


@pytest.mark.parametrize("name", PARTS)
def test_rows_do_not_depend_on_blocks_if_products_are_exact(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, tower = open_tower(name)
    expected = encode(name, tower, NUM_CASES - 1)
    monkeypatch.setattr(blocks, "MOST_ROWS", 3)
    assert_same(encode(name, tower, NUM_CASES - 1), expected)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_rows_of_fast_products_are_near_those_of_transformers(name: str, case: int) -> None:
    rows = encode(name, open_tower(name, is_exact=False)[2], case)
    assert (
        difference(rows.embeddings, reference(name)[2][f"{case}.embeddings"])
        <= LARGEST_DIFFERENCE_IN_BFLOAT16
    )


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.kind == "picture"])
def test_the_operations_of_a_picture_are_known_before_it_is_encoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, config, tower = open_tower(name)
    grid = part.shapes(config)[1]
    done = 0
    linear, attend = _native.linear, _native.attend

    def counted_linear(runtime: Any, matrix: Any, x: Array, *rest: Any, **more: Any) -> None:
        nonlocal done
        done += 2 * matrix.rows * matrix.cols * len(x)
        linear(runtime, matrix, x, *rest, **more)

    def counted_attend(runtime: Any, query: Array, key: Array, *rest: Any) -> None:
        nonlocal done
        done += 4 * query.size * len(key)
        attend(runtime, query, key, *rest)

    monkeypatch.setattr(_native, "linear", counted_linear)
    monkeypatch.setattr(_native, "attend", counted_attend)
    finish(part.encode(tower, part.make_input(config, grid, 1), grid))

    family = {"unlimited_ocr": "deepseek_vl_v2"}.get(part.family, part.family)
    (encoder,) = [one for one in ENCODERS[family] if one.kind == "picture"]
    tensors: Any = part.tensors(config)
    files = EncoderFiles(encoder, config, tensors, token_id=0, marks=None, settings=({}, ""))
    assert files.flop(grid) == done > 0


@pytest.mark.parametrize("name", PARTS)
def test_pictures_are_encoded_side_by_side(name: str) -> None:
    _, _, tower = open_tower(name)
    alone = [encode(name, tower, case).embeddings for case in range(NUM_CASES)]
    steps = {case: encoding(name, tower, case) for case in range(NUM_CASES)}
    found = {}
    while steps:
        for case in list(steps):
            try:
                next(steps[case])
            except StopIteration as end:
                del steps[case]
                found[case] = end.value.embeddings
    assert all(np.array_equal(found[case], rows) for case, rows in enumerate(alone))


def count_flop(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count what products and attention do; returns a function that gives the count and starts a new one."""
    done = [0]
    linear, attend = _native.linear, _native.attend

    def counted_linear(runtime: Any, matrix: Any, x: Array, *rest: Any, **how: Any) -> None:
        done[0] += 2 * len(x) * matrix.rows * matrix.cols
        linear(runtime, matrix, x, *rest, **how)

    def counted_attend(runtime: Any, query: Array, key: Array, *rest: Any) -> None:
        done[0] += 4 * query.size * len(key)
        attend(runtime, query, key, *rest)

    monkeypatch.setattr(_native, "linear", counted_linear)
    monkeypatch.setattr(_native, "attend", counted_attend)

    def take() -> int:
        count, done[0] = done[0], 0
        return count

    return take


@pytest.mark.parametrize(("shapes", "limit"), [("large_shapes", 400_000), ("shapes", 30_000)])
@pytest.mark.parametrize("name", PARTS)
def test_it_yields_before_much_is_done(
    name: str, shapes: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a large tower, with lower limits."""
    monkeypatch.setattr(blocks, "MOST_FLOP", limit)
    take = count_flop(monkeypatch)
    part, config, tower = open_tower(name)
    shape = getattr(part, shapes)(config)[-1]
    counts = [take() for _ in part.encode(tower, part.make_input(config, shape, 0), shape)]
    assert max(counts) <= limit
    assert take() == 0, "work after the last yield"
    assert len(counts) >= sum(counts) / limit


@pytest.mark.parametrize("name", OF_TWO_FRAMES)
def test_a_kernel_for_each_frame_makes_the_same_rows(name: str) -> None:
    part, config, tower = open_tower(name)
    apart = replace(config, are_frames_apart=True)
    values = dict(reference(name)[1])
    kernel = values.pop(f"{part.prefix}patch_embed.proj.weight")  # [hidden, channels, frames, side, side]
    values[f"{part.prefix}patch_embed.proj.weight"] = kernel[:, :, 0]
    values[f"{part.prefix}patch_embed.proj.weight.1"] = kernel[:, :, 1]
    weights = dense_weights(part.tensors(apart), part.prefix, values)
    other = part.tower(apart, weights, _native.Runtime(1), is_exact=True)
    for case in range(NUM_CASES):  # the values of the two frames differ
        expected, found = encode(name, tower, case), encode(name, other, case)
        assert difference(found.embeddings, expected.embeddings) <= LARGEST_DIFFERENCE


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "sizes",
    [Sizes(channels=1), Sizes(heads=4, head_dim=16, mlp=300, out=96, channels=64)],
    ids=["small", "wide"],
)
@pytest.mark.parametrize(
    "tower",
    [*((name, {}) for name in PARTS), *((name, {"are_frames_apart": True}) for name in OF_TWO_FRAMES)],
    ids=lambda tower: "-".join([tower[0], *tower[1]]),
)
def test_memory_stays_within_its_bound(tower: tuple[str, dict[str, Any]], sizes: Sizes) -> None:
    require_memory(tower[0], tower[1], sizes)


def test_rows_wider_than_the_tower_stay_within_its_bound() -> None:
    require_memory("deepseek_v4", {}, Sizes(layers=1, heads=1, out=600, patch=2, merge=1))


def require_memory(name: str, stored: dict[str, Any], sizes: Sizes) -> None:
    part = PARTS[name]
    config = replace(part.read(CONFIGS[part.family](sizes)), **stored)
    weights = dense_weights(
        part.tensors(config), part.prefix, random_tensors(part.tensors(config), part.prefix, 1)
    )
    opened = part.tower(config, weights, _native.Runtime(1))
    for shape in part.large_shapes(config):
        value = part.make_input(config, shape, 1)
        peak = peak_of(part.encode(opened, value, shape))
        bound = part.peak_bytes(config, shape)
        # The rest of the overhead is for what the interpreter keeps for reuse.
        assert peak <= bound - blocks.OVERHEAD_BYTES + MOST_OBJECT_BYTES, (shape, peak, bound)
        assert bound <= 2 * peak + blocks.OVERHEAD_BYTES, (shape, peak, bound)
