"""The operations of `argosy._native` agree with numpy, and other tokens do not change a token's result.

Every test of an operation runs once per instruction set of this CPU. Tolerances: sums of n float32 products in another
order differ by about n * 2^-24 of the sum of magnitudes; `close` allows this for the sizes used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.config import KvDtype
from tests.native import _native_testing
from tests.native.kv_formats import rounded

Floats = NDArray[np.float32]
FORMATS = ["f32", "f16", "bf16", "q8", "q4"]
# Sizes around a vector (8, 16), a panel (16) and a group (32).
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70]


@pytest.fixture(scope="module", params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runtime(instruction_set: str) -> Iterator[native.Runtime]:
    runtime = native.Runtime(2, instruction_set=instruction_set)
    assert runtime.instruction_set == instruction_set
    yield runtime
    runtime.close()


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def runtimes(instruction_set: str) -> tuple[native.Runtime, native.Runtime]:
    """Make a runtime with one thread and one with three."""
    one, three = (native.Runtime(threads, instruction_set=instruction_set) for threads in (1, 3))
    return one, three


def pack(
    format: str, weights: Floats, *, misalign: int = 0, runtime: native.Runtime | None = None
) -> NDArray[np.uint8]:
    """Return the bytes of a matrix, placed about `misalign` bytes after a 64-byte boundary."""
    memory = np.zeros(native.matrix_bytes(format, *weights.shape) + misalign, np.uint8)
    native.quantize(format, weights, memory[misalign:], runtime)
    return memory


def matrix_of(format: str, weights: Floats, *, misalign: int = 0) -> native.Matrix:
    return native.Matrix(pack(format, weights, misalign=misalign), misalign, format, *weights.shape)


def multiply(runtime: native.Runtime, matrix: native.Matrix, x: Floats) -> Floats:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    native.matmul(runtime, [matrix], x, [out])
    return out


def quantized_activations(format: str, x: Floats) -> Floats:
    """Return x as products with quantised weights see it, in groups of 32.

    q8: 16 bits, scale = absmax / 32512, rounded to nearest even; q4: the high byte of that, rounded.
    """
    if format not in ("q8", "q4"):
        return x
    padded = np.zeros((len(x), -(-x.shape[1] // 32) * 32), np.float32)
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(len(x), -1, 32)
    absmax = np.abs(groups).max(axis=2, keepdims=True, initial=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(absmax > 0, np.float32(32512) / absmax, np.float32(0))
    quants = np.rint(groups * inverse)
    quants = quants / 256 if format == "q8" else np.floor((quants + 128) / 256)
    return (quants * (absmax / np.float32(127))).reshape(padded.shape)[:, : x.shape[1]].astype(np.float32)


def close(
    found: Floats,
    expected: NDArray[np.floating],
    magnitude: NDArray[np.floating] | float = 1.0,
    error: float = 2e-6,
) -> bool:
    return bool(np.all(np.abs(found - expected) <= error * magnitude + 1e-30))


def splits_activations(runtime: native.Runtime, format: str) -> bool:
    """Whether products keep 16 bits of an activation."""
    return runtime.instruction_set == "amx" and format in ("bf16", "f8")


# Products.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cols", SIZES)
def test_matmul_equals_the_product_with_the_dequantised_weights(
    runtime: native.Runtime, format: str, cols: int
) -> None:
    for rows in (0, 1, 15, 16, 17, 33, 49):
        weights = normal(rows, cols)
        memory = pack(format, weights)
        seen = native.dequantize(format, memory, rows, cols).astype(np.float64)
        x = normal(3, cols, seed=1)
        x_seen = quantized_activations(format, x)
        found = multiply(runtime, native.Matrix(memory, 0, format, rows, cols), x)
        error = 2**-16 if splits_activations(runtime, format) else 2e-6
        assert close(found, x_seen @ seen.T, np.abs(x_seen) @ np.abs(seen).T, error)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (49, 70), (40, 32), (64, 200)])
def test_a_token_gets_the_same_bits_whatever_the_number_of_tokens(
    runtime: native.Runtime, format: str, shape: tuple[int, int]
) -> None:
    matrix = matrix_of(format, normal(*shape))
    x = normal(53, shape[1], seed=2)
    alone = np.concatenate([multiply(runtime, matrix, x[i : i + 1]) for i in range(len(x))])
    for count in [*range(1, 18), 53]:
        assert np.array_equal(multiply(runtime, matrix, x[:count]), alone[:count])


@pytest.mark.parametrize("format", FORMATS)
def test_threads_alignment_and_row_ranges_change_no_bit(instruction_set: str, format: str) -> None:
    weights, x = normal(531, 300), normal(5, 300, seed=3)
    one, many = runtimes(instruction_set)
    expected = multiply(one, matrix_of(format, weights), x)
    assert np.array_equal(multiply(many, matrix_of(format, weights), x), expected)
    for misalign in (1, 2, 3, 61):
        assert np.array_equal(multiply(many, matrix_of(format, weights, misalign=misalign), x), expected)
    for rows in (1, 4, 16, 17, 35):
        assert np.array_equal(multiply(many, matrix_of(format, weights[:rows]), x), expected[:, :rows])
    one.close()
    many.close()


def test_matrices_of_different_formats_share_one_call(runtime: native.Runtime) -> None:
    matrices = [matrix_of(format, normal(20 + i, 64)) for i, format in enumerate(FORMATS)]
    x = normal(4, 64, seed=4)
    outs = [np.empty((4, matrix.rows), np.float32) for matrix in matrices]
    native.matmul(runtime, matrices, x, outs)
    for matrix, out in zip(matrices, outs, strict=True):
        assert np.array_equal(out, multiply(runtime, matrix, x))


@pytest.mark.parametrize("format", FORMATS)
def test_a_nan_weight_affects_only_its_row(runtime: native.Runtime, format: str) -> None:
    weights = normal(20, 70)
    weights[3, 40] = np.nan
    weights[7, 69] = np.inf
    found = multiply(runtime, matrix_of(format, weights), normal(3, 70))
    assert np.isnan(found[:, 3]).all()
    assert not np.isfinite(found[:, 7]).any()
    assert np.isfinite(np.delete(found, [3, 7], axis=1)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_affects_only_its_token(
    runtime: native.Runtime, format: str, value: float
) -> None:
    x = normal(5, 70)
    x[2, 33] = value
    found = multiply(runtime, matrix_of(format, normal(20, 70, seed=5)), x)
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


# Formats.


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 100])
def test_q8_is_within_half_a_step_and_q4_beats_scaling_by_the_maximum(cols: int) -> None:
    weights = normal(37, cols)
    padded = np.zeros((37, -(-cols // 32), 32), np.float32)
    padded.reshape(37, -1)[:, :cols] = weights
    absmax = np.abs(padded).max(axis=2, keepdims=True)
    restored = {}
    for format in ("q8", "q4"):
        memory = pack(format, weights)
        restored[format] = native.dequantize(format, memory, 37, cols)
    step = np.broadcast_to(absmax / 127, padded.shape).reshape(37, -1)[:, :cols]
    # Half a step, plus the error of the largest weight from rounding the scale to float16 (2^-11).
    assert np.all(np.abs(restored["q8"] - weights) <= step * (0.5 + 127 * 2.0**-11))
    naive = np.clip(np.rint(padded / (absmax / 7)), -8, 7) * (absmax / 7)
    naive_error = np.square(naive - padded).sum()
    assert np.square(restored["q4"] - weights).sum() < (0.9 if cols >= 31 else 1.0) * naive_error + 1e-6


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_every_instruction_set_packs_the_same_bytes(runtime: native.Runtime, format: str) -> None:
    weights = np.concatenate([normal(16, 96), 1e-6 * normal(16, 96), np.zeros((3, 96), np.float32)])
    assert np.array_equal(pack(format, weights, runtime=runtime), pack(format, weights))


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_quantising_again_changes_almost_nothing(format: str) -> None:
    once = native.dequantize(format, pack(format, normal(19, 77)), 19, 77)
    twice = native.dequantize(format, pack(format, once), 19, 77)
    assert np.abs(once - twice).max() <= 2.0**-10 * np.abs(once).max()


def test_bf16_and_f16_round_to_nearest() -> None:
    values = np.array(
        [[1.0, -0.0, 1e-8, 6e-8, 3.1e-5, 65519.0, 65520.0, 1 + 2**-11, 1 + 3 * 2**-11, -1e38]], np.float32
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    assert np.array_equal(native.dequantize("f16", pack("f16", values), 1, values.shape[1]), expected)
    bits = np.array([[0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F7F_FFFF]], np.uint32)
    found = native.dequantize("bf16", pack("bf16", bits.view(np.float32)), 1, 4).view(np.uint32)
    assert found.tolist() == [[0x3F80_0000, 0x3F82_0000, 0x3F81_0000, 0x7F80_0000]]


@pytest.mark.parametrize("format", FORMATS)
def test_embed_returns_rows_of_the_dequantised_matrix(runtime: native.Runtime, format: str) -> None:
    memory = pack(format, normal(33, 45))
    ids = np.array([32, 0, 15, 16, 32], np.int32)
    out = np.empty((5, 45), np.float32)
    native.embed(runtime, native.Matrix(memory, 0, format, 33, 45), ids, out)
    assert np.array_equal(out, native.dequantize(format, memory, 33, 45)[ids])


# Between the products.


@pytest.mark.parametrize("size", SIZES[1:])
def test_rms_norm(runtime: native.Runtime, size: int) -> None:
    x, weight = normal(5, size), normal(size, seed=1)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + 1e-6) * weight
    out = np.empty_like(x)
    native.rms_norm(runtime, x, weight, 1e-6, out)
    assert close(out, expected, np.abs(expected))
    native.rms_norm(runtime, x, weight, 1e-6, x)
    assert np.array_equal(x, out)


@pytest.mark.parametrize("pairs", [0, 1, 8, 17, 32])
def test_rope_rotates_the_first_dimensions_in_half_split_pairs(runtime: native.Runtime, pairs: int) -> None:
    x, angle = normal(4, 3, 70), normal(4, pairs)
    cosine, sine = np.cos(angle), np.sin(angle)
    a, b = x[:, :, :pairs], x[:, :, pairs : 2 * pairs]
    c, s = cosine[:, None], sine[:, None]
    expected = np.concatenate([a * c - b * s, b * c + a * s, x[:, :, 2 * pairs :]], axis=2)
    native.rope(runtime, x, cosine, sine)
    assert close(x, expected)


@pytest.mark.parametrize("pairs", [0, 1, 8, 17, 32])
def test_interleaved_rope_rotates_adjacent_dimensions(runtime: native.Runtime, pairs: int) -> None:
    x, angle = normal(4, 3, 70), normal(4, pairs)
    turned = (x[:, :, : 2 * pairs : 2] + 1j * x[:, :, 1 : 2 * pairs : 2]) * np.exp(1j * angle)[:, None]
    expected = x.copy()
    expected[:, :, : 2 * pairs : 2], expected[:, :, 1 : 2 * pairs : 2] = turned.real, turned.imag
    native.rope(runtime, x, np.cos(angle), np.sin(angle), is_interleaved=True)
    assert close(x, expected)


def routed(
    runtime: native.Runtime, logits: Floats, k: int, *, renormalize: bool = False, **rule: Any
) -> tuple[NDArray[np.int32], Floats]:
    ids, weights = np.full((len(logits), k), -1, np.int32), np.full((len(logits), k), np.nan, np.float32)
    rule = {"score": "softmax"} | rule
    _native_testing.route(runtime, native.Routing(k, renormalize=renormalize, **rule), logits, ids, weights)
    return ids, weights


def best_first(worth: Floats, k: int) -> NDArray[np.int64]:
    return np.argsort(-worth, axis=-1, kind="stable")[..., :k]


def expected_routes(
    logits: Floats,
    k: int,
    *,
    score: str,
    choice_bias: Floats | None,
    num_groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_least: float,
    scale: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Apply the rules of native/kernels/route.h in float64."""
    x = logits.astype(np.float64)
    if score == "softmax":
        scores = np.exp(x - x.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-x)) if score == "sigmoid" else np.sqrt(np.logaddexp(0, x))
    worth = scores if choice_bias is None else scores + choice_bias
    grouped = worth.reshape(len(x), num_groups, -1)
    best_two = -np.sort(-grouped, axis=2)[:, :, :2]
    kept = best_first(best_two[:, :, 0] if group_score == "max" else best_two.sum(axis=2), kept_groups)
    is_kept = np.zeros((len(x), num_groups), bool)
    np.put_along_axis(is_kept, kept, True, axis=1)
    ids = best_first(np.where(is_kept[:, :, None], grouped, -np.inf).reshape(worth.shape), k)
    weights = np.take_along_axis(scores, ids, axis=1)
    if renormalize:
        weights = weights / np.maximum(
            weights.sum(axis=1, keepdims=True) + renormalize_eps, renormalize_least
        )
    return ids, weights * scale


@pytest.mark.parametrize("seed", range(40))
def test_routes_follow_the_rule(runtime: native.Runtime, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_groups = int(rng.choice([1, 2, 3, 8]))
    size = int(rng.choice([2, 5, 16, 48]))
    num_experts = num_groups * size
    kept_groups = int(rng.integers(1, num_groups + 1))
    rule: dict[str, Any] = {
        "score": str(rng.choice(["softmax", "sigmoid", "sqrt_softplus"])),
        "choice_bias": rng.normal(0, 0.5, num_experts).astype(np.float32) if rng.random() < 0.6 else None,
        "num_groups": num_groups,
        "kept_groups": kept_groups,
        "group_score": str(rng.choice(["max", "top2"])),
        "renormalize": bool(rng.integers(2)),
        "renormalize_eps": float(rng.choice([0.0, 1e-20, 0.125])),
        "renormalize_least": float(rng.choice([0.0, 0.5])),
        "scale": float(rng.choice([1.0, 2.5])),
    }
    k = int(rng.integers(1, min(8, kept_groups * size) + 1))
    logits = rng.normal(0, 2, (9, num_experts)).astype(np.float32)
    ids, weights = routed(runtime, logits, k, **rule)
    expected_ids, expected = expected_routes(logits, k, **rule)
    assert np.array_equal(ids, expected_ids)
    assert np.allclose(weights, expected, rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("num_experts", [1, 5, 8, 16, 17, 60, 128])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_weights_of_a_token_sum_to_the_scale(
    runtime: native.Runtime, num_experts: int, score: str
) -> None:
    k = min(4, num_experts)
    _, weights = routed(runtime, normal(9, num_experts), k, score=score, renormalize=True, scale=1.5)
    assert np.allclose(weights.sum(axis=1), 1.5, rtol=1e-6)


def test_the_choice_bias_changes_the_choice_and_not_the_weights(runtime: native.Runtime) -> None:
    logits = normal(1, 4)
    plain_ids, plain_weights = routed(runtime, logits, 4, score="sigmoid")
    least_wanted = plain_ids[0, -1]
    bias = np.zeros(4, np.float32)
    bias[least_wanted] = 9
    ids, weights = routed(runtime, logits, 4, score="sigmoid", choice_bias=bias)
    assert ids[0, 0] == least_wanted
    assert dict(zip(ids[0], weights[0], strict=True)) == dict(
        zip(plain_ids[0], plain_weights[0], strict=True)
    )


def test_route_prefers_the_lower_id_on_a_tie_and_survives_nan(runtime: native.Runtime) -> None:
    logits = np.array([[1, 3, 3, 2, 3], [np.nan, 1, np.nan, 2, 0]], np.float32)
    ids, weights = routed(runtime, logits, 3, renormalize=True)
    assert ids.tolist() == [[1, 2, 4], [3, 1, 4]]
    assert np.isnan(weights[1]).all()
    ids, weights = routed(runtime, logits, 4, score="sigmoid", choice_bias=np.zeros(5, np.float32))
    assert ids.tolist() == [[1, 2, 4, 3], [3, 1, 4, 0]]
    assert np.isnan(weights[1]).tolist() == [False, False, False, True]


def test_a_routing_that_does_not_fit_the_experts_is_refused(runtime: native.Runtime) -> None:
    logits = normal(1, 12)
    for rule, sentence in (
        ({"score": "tanh"}, "unknown score 'tanh'; known: softmax, sigmoid"),
        ({"group_score": "mean"}, "unknown group_score 'mean'; known: max, top2"),
        ({"choice_bias": np.zeros(11, np.float32)}, r"choice_bias has shape \[11\], expected \[12\]"),
        ({"num_groups": 5}, "experts modulo groups is 2, expected 0"),
        ({"num_groups": 3, "kept_groups": 4}, "kept_groups is 4, expected 1 to 3"),
        ({"num_groups": 6, "kept_groups": 1}, "experts_per_token is 3, expected 1 to 2"),
        ({"num_groups": 12, "kept_groups": 4}, "experts of a group is 1, expected 2 to 12"),
    ):
        with pytest.raises(ValueError, match=sentence):
            routed(runtime, logits, 3, **rule)


def test_combine_and_the_shared_gate_add_to_the_output(runtime: native.Runtime) -> None:
    expert_out, weights, hidden = normal(6, 300), normal(3, 2), normal(3, 300, seed=1)
    out = hidden.copy()
    _native_testing.combine(runtime, expert_out, weights, out)
    assert close(out, hidden + np.einsum("tk,tkh->th", weights, expert_out.reshape(3, 2, 300)), 10.0)
    gate = np.array([-1e4, 0, 3], np.float32)
    out = hidden.copy()
    _native_testing.add_sigmoid_gated(runtime, expert_out[:3], gate, out)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-gate.astype(np.float64)))
    assert close(out, hidden + sigmoid[:, None] * expert_out[:3], 10.0)


# Experts.


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x.astype(np.float64)))


class Experts:
    """Some experts in an arena, run for a batch of tokens, and the expected outputs by numpy."""

    def __init__(self, format: str, *, num: int = 5, hidden: int = 70, width: int = 45) -> None:
        self.format, self.hidden, self.width = format, hidden, width
        shapes = [(width, hidden), (width, hidden), (hidden, width)]
        sizes = [native.matrix_bytes(format, *shape) for shape in shapes]
        self.arena = native.Arena(num * (sum(sizes) + 3))
        memory = self.arena.array()
        self.offsets = np.zeros((num, 3), np.int64)
        self.weights: list[list[Floats]] = []
        at = 0
        for expert in range(num):
            self.weights.append([])
            for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
                native.quantize(format, normal(*shape, seed=100 * expert + i) * 0.2, memory[at : at + size])
                self.weights[-1].append(native.dequantize(format, memory[at : at + size], *shape))
                self.offsets[expert, i] = at
                at += size + 1

    def matrix(self, expert: int, i: int) -> native.Matrix:
        rows, cols = self.weights[expert][i].shape
        return native.Matrix(self.arena, int(self.offsets[expert, i]), self.format, rows, cols)

    def run(self, runtime: native.Runtime, x: Floats, chosen: NDArray[np.int32], **options: Any) -> Floats:
        """Return out[t * k + j] = expert chosen[t, j] of x[t]."""
        flat = chosen.reshape(-1)
        row = np.argsort(flat, kind="stable").astype(np.int32)
        token = row // np.int32(chosen.shape[1])
        counts = np.bincount(flat, minlength=len(self.offsets))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        out = np.full((len(flat), self.hidden), np.nan, np.float32)
        _native_testing.swiglu_experts(
            runtime,
            self.arena,
            (self.format,) * 3,
            self.hidden,
            self.width,
            self.offsets,
            x,
            starts,
            token,
            row,
            out,
            **options,
        )
        return out

    def expected(self, x: Floats, expert: int) -> tuple[Floats, Floats]:
        gate, up, down = self.weights[expert]
        x = quantized_activations(self.format, x)
        inner = quantized_activations(self.format, (silu(x @ gate.T) * (x @ up.T)).astype(np.float32))
        return inner @ down.T, np.abs(inner) @ np.abs(down.T)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_run_their_tokens(runtime: native.Runtime, format: str) -> None:
    experts = Experts(format)
    x = normal(60, 70, seed=9)
    chosen = np.random.default_rng(1).integers(0, 5, (60, 2)).astype(np.int32)
    chosen[chosen == 3] = 1  # an expert without tokens
    out = experts.run(runtime, x, chosen)
    for expert in (0, 1, 2, 4):
        rows = np.flatnonzero(chosen.reshape(-1) == expert)
        expected, magnitude = experts.expected(x[rows // 2], expert)
        # An inner value that rounds to another int8 changes the sum by one step of one product.
        slack = 2e-5 if format in ("f32", "f16", "bf16") else 5e-3
        slack = 1e-4 if splits_activations(runtime, format) else slack
        assert np.all(np.abs(out[rows] - expected) <= slack * (magnitude + 1))


@pytest.mark.parametrize("format", FORMATS)
def test_experts_add_their_biases_and_clamp_inner_values(runtime: native.Runtime, format: str) -> None:
    experts = Experts(format)
    x = 3 * normal(60, 70, seed=9)
    chosen = np.random.default_rng(1).integers(0, 5, (60, 2)).astype(np.int32)
    gate_bias, up_bias, down_bias = normal(5, 45, seed=1), normal(5, 45, seed=2), 4 * normal(5, 70, seed=3)
    limit, alpha = 2.0, 1.702
    out = experts.run(
        runtime,
        x,
        chosen,
        activation=("clamped", limit, alpha),
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
    )
    for expert, (gate, up, down) in enumerate(experts.weights):
        rows = np.flatnonzero(chosen.reshape(-1) == expert)
        seen = quantized_activations(format, x[rows // 2])
        g = np.minimum(seen @ gate.T + gate_bias[expert], limit)
        u = np.clip(seen @ up.T + up_bias[expert], -limit, limit)
        assert all(at.any() for at in (g == limit, u == limit, u == -limit))
        inner = quantized_activations(format, (g / (1 + np.exp(-alpha * g)) * (u + 1)).astype(np.float32))
        slack = 2e-5 if format in ("f32", "f16", "bf16") else 5e-3
        slack = 1e-4 if splits_activations(runtime, format) else slack
        magnitude = np.abs(inner) @ np.abs(down.T)
        assert np.all(np.abs(out[rows] - inner @ down.T - down_bias[expert]) <= slack * (magnitude + 1))


@pytest.mark.parametrize("format", FORMATS)
def test_products_take_as_much_scratch_as_the_sizes_say(format: str) -> None:
    has_quants = format in ("q8", "q4")
    experts = Experts(format, num=1, hidden=200, width=4800)
    x = normal(300, 200, seed=9)
    sizes = native.StackSizes(200, 0)
    sizes.add_dense(4800)
    most, needed = sizes.scratch_bytes(300, 2), sizes.scratch_bytes(300, 2, has_quants)
    assert (needed < most) is not has_quants
    for run in (
        lambda runtime: _native_testing.swiglu(
            runtime, experts.matrix(0, 0), experts.matrix(0, 1), experts.matrix(0, 2), x, np.empty_like(x)
        ),
        lambda runtime: native.matmul(
            runtime, [experts.matrix(0, 0)], x, [np.empty((300, 4800), np.float32)]
        ),
    ):
        runtime = native.Runtime(2)
        run(runtime)
        assert runtime.scratch_bytes <= needed
        runtime.close()


@pytest.mark.parametrize("format", FORMATS)
def test_an_expert_gives_a_token_the_same_bits_alone_and_among_others(
    instruction_set: str, format: str
) -> None:
    experts = Experts(format, num=2, hidden=200, width=130)
    x = normal(101, 200, seed=9)
    one, many = runtimes(instruction_set)
    zeros, ones = np.zeros((101, 1), np.int32), np.ones((101, 1), np.int32)
    together = experts.run(many, x, np.concatenate([zeros, ones], axis=1))
    for token in (0, 1, 46, 47, 48, 49, 100):
        alone = experts.run(one, x[token : token + 1], np.array([[1]], np.int32))
        assert np.array_equal(alone[0], together[2 * token + 1])
    for count in range(1, 18):
        assert np.array_equal(experts.run(many, x[:count], zeros[:count]), together[0 : 2 * count : 2])
    dense = np.empty((101, 200), np.float32)
    _native_testing.swiglu(many, experts.matrix(0, 0), experts.matrix(0, 1), experts.matrix(0, 2), x, dense)
    assert np.array_equal(dense, together[::2])
    one.close()
    many.close()


# Attention.


class Conversation:
    """Keys and values of one sequence in blocks in random order, and attention over them by numpy."""

    def __init__(
        self,
        runtime: native.Runtime,
        kv: native.KvCache,
        blocks: list[int],
        block_tokens: int,
        k: Floats,
        v: Floats,
    ) -> None:
        self.blocks, self.k, self.v = blocks, k, v
        position = np.arange(len(k))
        slots = np.array(blocks, np.int64)[position // block_tokens] * block_tokens + position % block_tokens
        native.kv_write(runtime, kv, 1, k, v, slots)

    def expected(
        self, q: Floats, position: int, window: int, *, is_chunked: bool = False
    ) -> tuple[Floats, Floats]:
        first = max(0, position - window + 1) if window else 0
        if is_chunked:
            first = position - position % window
        k, v = (
            self.k[first : position + 1].astype(np.float64),
            self.v[first : position + 1].astype(np.float64),
        )
        group = q.shape[0] // k.shape[1]
        out = []
        for head in range(q.shape[0]):
            scores = k[:, head // group] @ q[head] * 0.3
            weights = np.exp(scores - scores.max())
            out.append(weights @ v[:, head // group] / weights.sum())
        return np.array(out), np.abs(v).max()


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "block_tokens", "window", "dtype"),
    [  # every pair of a format with another size
        (*shape, block_tokens, window, get_args(KvDtype)[(i + j + k) % 3])
        for i, shape in enumerate(
            [(4, 4, (16, 16)), (8, 2, (64, 64)), (6, 2, (20, 20)), (12, 1, (128, 40)), (3, 1, (7, 33))]
        )
        for j, block_tokens in enumerate([16, 5, 32])
        for k, window in enumerate([0, 1, 20, -20])
    ],
)
def test_attention_is_the_same_for_a_token_alone_in_a_chunk_and_in_a_batch(
    runtime: native.Runtime,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    block_tokens: int,
    window: int,
    dtype: KvDtype,
) -> None:
    length, (dim, value_dim) = 75, dims
    window, is_chunked = abs(window), window < 0
    needed = -(-length // block_tokens)
    shape = native.KvShape.keys_values(kv_heads, dim, value_dim=value_dim)
    kv = native.KvCache(
        [native.KvShape.latent(3), shape, native.KvShape.none()], 2 * needed + 3, block_tokens, dtype
    )
    order = np.random.default_rng(0).permutation(2 * needed + 3).tolist()
    k, v = normal(2, length, kv_heads, dim), normal(2, length, kv_heads, value_dim, seed=1)
    # The content of other sequences' blocks and beyond the end must not matter.
    everything = np.arange((2 * needed + 3) * block_tokens, dtype=np.int64)
    keys, values = (np.full((len(everything), kv_heads, width), np.nan, np.float32) for width in dims)
    native.kv_write(runtime, kv, 1, keys, values, everything)
    tables = [order[:needed], order[needed : 2 * needed]]
    talks = [Conversation(runtime, kv, tables[i], block_tokens, k[i], v[i]) for i in range(2)]
    for talk in talks:
        talk.k, talk.v = rounded(talk.k, dtype), rounded(talk.v, dtype)
    block_table = np.array(tables, np.int32)
    q = normal(2, length, heads, dim, seed=2)

    def attend(sequence: list[int], position: list[int]) -> Floats:
        out = np.full((len(sequence), heads * value_dim), np.nan, np.float32)
        native.attention(
            runtime, kv, 1, q[sequence, position], block_table, np.array(sequence, np.int32),
            np.array(position, np.int32), 0.3, window, out, is_chunked=is_chunked,
        )  # fmt: skip
        return out

    error = 1e-4 if runtime.instruction_set == "amx" else 2e-6  # tiles keep 16 bits of a number
    alone = [np.concatenate([attend([s], [p]) for p in range(length)]) for s in range(2)]
    for sequence, talk in enumerate(talks):
        for position in (0, 1, 4, 15, 16, 17, 31, 32, 74):
            expected, magnitude = talk.expected(
                q[sequence, position], position, window, is_chunked=is_chunked
            )
            found = alone[sequence][position].reshape(heads, value_dim)
            assert np.all(np.abs(found - expected) <= error * magnitude)
        for begin, end in ((0, length), (0, 1), (3, 10), (15, 33), (40, 75)):
            found = attend([sequence] * (end - begin), list(range(begin, end)))
            assert np.array_equal(found, alone[sequence][begin:end])
    mixed = attend([0, 1, 1, 0, 0, 0, 1], [74, 3, 4, 20, 21, 22, 60])
    assert np.array_equal(mixed[[0, 3, 4, 5]], alone[0][[74, 20, 21, 22]])
    assert np.array_equal(mixed[[1, 2, 6]], alone[1][[3, 4, 60]])


@pytest.mark.parametrize(("dtype", "element", "scale"), [("f32", 4, 0), ("f16", 2, 0), ("q8", 1, 2)])
def test_the_size_of_a_kv_cache_follows_from_the_shapes_of_its_layers(
    dtype: KvDtype, element: int, scale: int
) -> None:
    keys_values, latent, none = (
        native.KvShape.keys_values(3, 52),
        native.KvShape.latent(7),
        native.KvShape.none(),
    )

    def nbytes(*layers: native.KvShape) -> int:
        kv = native.KvCache(layers, 5, 9, dtype)
        assert kv.nbytes == native.kv_cache_bytes(layers, 5, 9, dtype)
        return kv.nbytes

    # Positions of a block and dimensions of values are padded to 16; latent vectors are not. In q8, 32 dimensions of a
    # position share a scale.
    assert nbytes(keys_values) == 5 * 16 * 3 * ((52 + 64) * element + 2 * 2 * scale)
    narrow = native.KvShape.keys_values(3, 52, value_dim=20)
    assert nbytes(narrow) == 5 * 16 * 3 * ((52 + 32) * element + (2 + 1) * scale)
    keys, values = native.kv_layer_parts(narrow, 5, 9, dtype)
    assert keys == 5 * 16 * 3 * (52 * element + 2 * scale)
    assert values == 5 * 16 * 3 * (32 * element + scale)
    assert native.kv_layer_parts(latent, 5, 9, dtype) == [nbytes(latent)]
    assert native.kv_layer_parts(none, 5, 9, dtype) == []
    assert nbytes(latent) == 5 * 9 * (7 * element + scale)
    assert nbytes(none) == 0
    assert nbytes(none, latent, keys_values, latent) == nbytes(keys_values) + 2 * nbytes(latent)
    for refused in ([], [native.KvShape.latent(0)], [native.KvShape.keys_values(1, 1 << 61)]):
        with pytest.raises(ValueError, match=r"a KV cache (has a size of 0|would take more than)"):
            native.kv_cache_bytes(refused, 5, 9, dtype)


@pytest.mark.parametrize("dtype", get_args(KvDtype))
def test_copying_a_block_copies_everything_its_layers_keep_and_nothing_else(
    runtime: native.Runtime, dtype: KvDtype
) -> None:
    shapes = [native.KvShape.keys_values(2, 20), native.KvShape.none(), native.KvShape.latent(7)]
    block_tokens, num_blocks = 5, 4

    def filled(seed: int) -> native.KvCache:
        kv = native.KvCache(shapes, num_blocks, block_tokens, dtype)
        slots = np.arange(num_blocks * block_tokens, dtype=np.int64)
        for layer, at in ((0, seed), (2, seed + 7)):
            if layer:
                _native_testing.latent_write(runtime, kv, layer, normal(len(slots), 7, seed=at), slots)
            else:
                keys, values = normal(2, len(slots), 2, 20, seed=at)
                native.kv_write(runtime, kv, layer, keys, values, slots)
        return kv

    def block(kv: native.KvCache, index: int) -> bytes:
        out = np.empty(kv.block_bytes, np.uint8)
        kv.copy_out(index, out)
        return out.tobytes()

    kv, other = filled(1), filled(2)
    assert num_blocks * kv.block_bytes == kv.nbytes
    before = [block(other, index) for index in range(num_blocks)]
    assert len({*before, *(block(kv, index) for index in range(num_blocks))}) == 2 * num_blocks
    other.copy_in(1, np.frombuffer(block(kv, 3), np.uint8))
    other.copy_block(0, 2)
    other.copy_block(3, 3)
    assert [block(other, index) for index in range(num_blocks)] == [
        before[0],
        block(kv, 3),
        before[0],
        before[3],
    ]
    for call in (lambda: kv.copy_block(0, 4), lambda: kv.copy_out(-1, np.empty(kv.block_bytes, np.uint8))):
        with pytest.raises(ValueError, match=r"block is -?[14], expected 0 to 3"):
            call()
    with pytest.raises(ValueError, match="saved has shape"):
        kv.copy_in(0, np.empty(kv.block_bytes - 1, np.uint8))


def test_an_operation_refuses_a_layer_that_keeps_something_else(runtime: native.Runtime) -> None:
    kv = native.KvCache([native.KvShape.latent(8), native.KvShape.none()], 1, 16, "f32")
    for layer, kept in enumerate(("latent vectors", "nothing")):
        with pytest.raises(ValueError, match=f"keeps {kept}, expected one that keeps keys and values"):
            native.kv_write(runtime, kv, layer, normal(1, 1, 8), normal(1, 1, 8), np.zeros(1, np.int64))


def test_bytes_of_keys_and_values_hide_no_damage_and_keep_zeros(runtime: native.Runtime) -> None:
    """Each case is one value in the second group of the only key and value that a token sees."""
    table, zero = np.array([[0]], np.int32), np.zeros(1, np.int32)
    for wrong in (np.nan, np.inf, -np.inf, 1e9):  # the last has no float16 scale
        kv = native.KvCache([native.KvShape.keys_values(1, 64), native.KvShape.latent(64)], 1, 16, "q8")
        k, v, out = normal(1, 1, 64), normal(1, 1, 64, seed=1), np.empty((1, 64), np.float32)
        v[0, 0, 40] = wrong
        native.kv_write(runtime, kv, 0, k, v, np.zeros(1, np.int64))
        native.attention(runtime, kv, 0, normal(1, 1, 64), table, zero, zero, 0.3, 0, out)
        assert np.array_equal(out[0, :32], rounded(v[..., :32], "q8")[0, 0])
        assert np.isnan(out[0, 32:]).all()
        k[0, 0, 40] = wrong
        native.kv_write(runtime, kv, 0, k, normal(1, 1, 64), np.zeros(1, np.int64))
        native.attention(runtime, kv, 0, normal(1, 1, 64), table, zero, zero, 0.3, 0, out)
        assert np.isnan(out).all()
    kv = native.KvCache([native.KvShape.keys_values(1, 64)], 1, 16, "q8")
    v = normal(1, 1, 64, seed=1)
    v[0, 0, :32] = 0
    # The scale is the smallest of float16, which is 1.4 times too small: quants stop at 127.
    v[0, 0, 32:] *= np.float32(127 * 1.4 * 2.0**-24) / abs(v[0, 0, 32:]).max()
    native.kv_write(runtime, kv, 0, normal(1, 1, 64), v, np.zeros(1, np.int64))
    native.attention(runtime, kv, 0, normal(1, 1, 64), table, zero, zero, 0.3, 0, out)
    assert not out[0, :32].any()
    assert np.abs(out[0, 32:] - v[0, 0, 32:]).max() < 127 * 0.41 * 2.0**-24


def test_large_scores_neither_overflow_nor_vanish(runtime: native.Runtime) -> None:
    kv = native.KvCache([native.KvShape.keys_values(1, 8)] * 2, 4, 16, "f32")
    k, v = normal(40, 1, 8) * 300, normal(40, 1, 8, seed=1)
    talk = Conversation(runtime, kv, [0, 1, 2], 16, k, v)
    q = normal(1, 2, 8, seed=2) * 300
    out = np.empty((1, 16), np.float32)
    zero = np.zeros(1, np.int32)
    native.attention(runtime, kv, 1, q, np.array([[0, 1, 2]], np.int32), zero, zero + 39, 0.3, 0, out)
    expected, _ = talk.expected(q[0], 39, 0)
    assert np.allclose(out.reshape(2, 8), expected, atol=1e-2)


# Arguments that are refused with both numbers.


def test_wrong_arguments_are_refused_with_both_numbers(runtime: native.Runtime) -> None:
    matrix = matrix_of("q8", normal(16, 64))
    x, out = normal(2, 64), np.empty((2, 16), np.float32)

    def refused(sentence: str) -> pytest.RaisesExc[ValueError]:
        return pytest.raises(ValueError, match=sentence)

    with refused("columns of x is 63, expected 64"):
        native.matmul(runtime, [matrix], normal(2, 63), [out])
    with refused(r"out has shape \[2, 16\], expected \[3, 16\]"):
        native.matmul(runtime, [matrix], normal(3, 64), [out])
    with refused("number of outs is 0, expected 1"):
        native.matmul(runtime, [matrix], x, [])
    with refused("x is float64, expected float32"):
        native.matmul(runtime, [matrix], x.astype(np.float64), [out])
    with refused("x is not C-contiguous"):
        native.matmul(runtime, [matrix], np.asfortranarray(x), [out])
    with refused(r"a matrix of 1088 bytes at offset 1 does not lie inside memory of 1088 bytes"):
        native.Matrix(np.zeros(1088, np.uint8), 1, "q8", 16, 64)
    with refused("at offset -1 does not lie inside"):
        native.Matrix(np.zeros(1088, np.uint8), -1, "q8", 16, 64)
    with refused("unknown format 'q5'; known: f32, f16, bf16, f8, f8_row, f8_32, mxfp8, int8_row, bnb4, "):
        native.matrix_bytes("q5", 1, 1)
    with refused("rows is -1, expected 0 to"):
        native.matrix_bytes("f32", -1, 1)
    with refused(r"ids\[1\] is 16, expected 0 to 15"):
        native.embed(runtime, matrix, np.array([0, 16], np.int32), np.empty((2, 64), np.float32))
    with refused("experts_per_token is 9, expected 1 to 8"):
        routed(runtime, normal(1, 8), 9)
    with refused("rotated dimensions is 10, expected 0 to 8"):
        native.rope(runtime, normal(1, 1, 8), normal(1, 5), normal(1, 5))
    with refused("num_threads is 0, expected 1 to 1024"):
        native.Runtime(0)
    with refused("this CPU does not support instruction set 'mmx'; supported: plain"):
        native.Runtime(1, instruction_set="mmx")
    closed = native.Runtime(1)
    closed.close()
    with refused("this runtime is closed"):
        native.matmul(closed, [matrix], x, [out])


def test_attention_refuses_positions_outside_the_cache(runtime: native.Runtime) -> None:
    kv = native.KvCache([native.KvShape.keys_values(2, 8)], 2, 16, "f16")
    q, out, zero = normal(1, 4, 8), np.empty((1, 32), np.float32), np.zeros(1, np.int32)
    table = np.array([[1, 2]], np.int32)
    with pytest.raises(ValueError, match=r"block_table\[1\] is 2, expected 0 to 1"):
        native.attention(runtime, kv, 0, q, table, zero, zero + 16, 1.0, 0, out)
    native.attention(runtime, kv, 0, q, table, zero, zero + 15, 1.0, 0, out)
    with pytest.raises(ValueError, match=r"order\[0\] is 32, expected 0 to 31"):
        native.attention(runtime, kv, 0, q, table, zero, zero + 32, 1.0, 0, out)
    with pytest.raises(ValueError, match=r"sequence\[0\] is 1, expected 0 to 0"):
        native.attention(runtime, kv, 0, q, table, zero + 1, zero, 1.0, 0, out)
    with pytest.raises(ValueError, match="q has 3 heads, expected a multiple of the 2 KV heads"):
        native.attention(runtime, kv, 0, q[:, :3].copy(), table, zero, zero, 1.0, 0, out[:, :24].copy())
    with pytest.raises(ValueError, match="layer is 1, expected 0 to 0"):
        native.attention(runtime, kv, 1, q, table, zero, zero, 1.0, 0, out)
    with pytest.raises(ValueError, match="a slot is 32, expected 0 to 31"):
        native.kv_write(runtime, kv, 0, q[:, :2].copy(), q[:, :2].copy(), np.array([32], np.int64))
    with pytest.raises(ValueError, match="unknown KV dtype 'f64'; known: f32, f16, q8"):
        native.KvCache([native.KvShape.none()], 1, 16, "f64")


def test_a_matrix_keeps_its_memory_alive(runtime: native.Runtime) -> None:
    weights, x = normal(16, 64), normal(1, 64)
    expected = multiply(runtime, matrix_of("f32", weights), x)
    arena = native.Arena(4096)
    arena.array()[:] = pack("f32", weights)
    matrix = native.Matrix(arena, 0, "f32", 16, 64)
    del arena
    assert np.array_equal(multiply(runtime, matrix, x), expected)
