"""Write `tests/native/packed_weights.npz`: weights that the packers of other programs pack, and what they read in them.

    PYTHON tests/models/make_packed_weights.py OUT.npz compressed-tensors|gptq|awq|mlx ...

Run by hand, where the packers are: compressed-tensors (for act-order 0.10), AutoGPTQ 0.7.1 (its `qlinear_cuda_old`, for
act-order `qlinear_cuda`), AutoRound's AWQ (`export_to_awq.utils`), and mlx. Each run adds its arrays to OUT, named
`FORMAT/PACKER/PART`, with the values as `FORMAT/PACKER/values`. Sizes are small: the file is in the repository.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS, COLS, GROUP = 32, 64, 32
Arrays = dict[str, np.ndarray]


def codes_of(bits: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes [rows, cols], scales and zeros [rows, groups]: the first and the last code are there."""
    rng = np.random.default_rng([bits, seed])
    groups = COLS // GROUP
    scales = (rng.standard_normal((ROWS, groups)) * 0.02 + 0.1).astype(np.float16).astype(np.float32)
    return rng.integers(0, 1 << bits, (ROWS, COLS)), scales, rng.integers(1, 1 << bits, (ROWS, groups))


def compressed_tensors() -> Iterator[tuple[str, Arrays]]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    for bits in (2, 3, 4, 8):
        codes, scales, zeros = codes_of(bits, 1)
        half = 1 << (bits - 1)
        q, z = (torch.tensor(each - half, dtype=torch.int8) for each in (codes, zeros))
        scale = torch.tensor(scales).to(torch.bfloat16)
        for is_symmetric in (True, False):
            if is_symmetric and bits not in (4, 8):
                continue
            args = QuantizationArgs(num_bits=bits, group_size=GROUP, strategy="group", symmetric=is_symmetric)
            packed = pack_to_int32(q, bits)
            assert torch.equal(unpack_from_int32(packed, bits, q.shape), q)
            zero_point = None if is_symmetric else z
            values = dequantize(q, scale.float(), zero_point, args=args)
            parts = {
                "codes": packed.numpy(),
                "scales": scale.view(torch.int16).numpy(),
                "values": values.float().numpy(),
            }
            if not is_symmetric:
                parts["zeros"] = pack_to_int32(z, bits, packed_dim=0).numpy()
            yield f"{'int' if is_symmetric else 'uint'}{bits}_{GROUP}_bf16", parts


def gptq() -> Iterator[tuple[str, Arrays]]:
    import torch
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    for bits in (2, 3, 4, 8):
        codes, scales, zeros = codes_of(bits, 2)
        layer = QuantLinear(bits, GROUP, COLS, ROWS, False, weight_dtype=torch.float32)
        linear = torch.nn.Linear(COLS, ROWS, bias=False)
        spread = [np.repeat(each, GROUP, axis=1) for each in (scales, zeros)]
        linear.weight.data = torch.tensor(spread[0] * (codes - spread[1]), dtype=torch.float32)
        layer.pack(linear, torch.tensor(scales), torch.tensor(zeros, dtype=torch.float32), None)
        values = layer(torch.eye(COLS)).T.contiguous()
        yield (
            f"uint{bits}_{GROUP}_f16",
            {
                "gptq_codes": layer.qweight.numpy(),
                "gptq_zeros": layer.qzeros.numpy(),
                "scales_by_group": layer.scales.half().numpy(),
                "values": values.float().numpy(),
            },
        )


def act_order_of(bits: int) -> np.ndarray:
    return np.random.default_rng([bits, 9]).permutation(COLS) // GROUP


def gptq_act_order() -> Iterator[tuple[str, Arrays]]:
    import torch
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    for bits in (2, 3, 4, 8):
        codes, scales, zeros = codes_of(bits, 4)
        groups = act_order_of(bits)
        layer = QuantLinear(bits, GROUP, COLS, ROWS, False, weight_dtype=torch.float32)
        linear = torch.nn.Linear(COLS, ROWS, bias=False)
        weight = scales[:, groups] * (codes - zeros[:, groups])
        linear.weight.data = torch.tensor(weight, dtype=torch.float32)
        g_idx = torch.tensor(groups, dtype=torch.int32)
        layer.pack(linear, torch.tensor(scales), torch.tensor(zeros, dtype=torch.float32), g_idx)
        yield (
            f"uint{bits}_{GROUP}_f16_act_order",
            {
                "gptq_codes": layer.qweight.numpy(),
                "gptq_zeros": layer.qzeros.numpy(),
                "scales_by_group": layer.scales.half().numpy(),
                "g_idx": layer.g_idx.numpy(),
                "values": layer(torch.eye(COLS)).T.contiguous().float().numpy(),
            },
        )


def compressed_tensors_act_order() -> Iterator[tuple[str, Arrays]]:
    import torch
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    for bits in (4, 8):
        codes, scales, zeros = codes_of(bits, 5)
        half = 1 << (bits - 1)
        q, z = (torch.tensor(each - half, dtype=torch.int8) for each in (codes, zeros))
        scale = torch.tensor(scales).to(torch.bfloat16)
        g_idx = torch.tensor(act_order_of(bits), dtype=torch.int32)
        for is_symmetric in (True, False):
            values = dequantize(q, scale.float(), None if is_symmetric else z, g_idx=g_idx)
            parts = {
                "codes": pack_to_int32(q, bits).numpy(),
                "scales": scale.view(torch.int16).numpy(),
                "g_idx": g_idx.numpy(),
                "values": values.float().numpy(),
            }
            if not is_symmetric:
                parts["zeros"] = pack_to_int32(z, bits, packed_dim=0).numpy()
            yield f"{'int' if is_symmetric else 'uint'}{bits}_{GROUP}_bf16_act_order", parts


def awq() -> Iterator[tuple[str, Arrays]]:
    import torch
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    codes, scales, zeros = codes_of(4, 3)
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    spread = [np.repeat(each, GROUP, axis=1) for each in (scales, zeros)]
    linear.weight.data = torch.tensor(spread[0] * (codes - spread[1]), dtype=torch.float32)
    given = torch.tensor(scales.T.copy()), torch.tensor(zeros.T.copy(), dtype=torch.float32)
    layer = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=given[0], zeros=given[1])
    values = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T.contiguous()
    yield (
        f"uint4_{GROUP}_f16",
        {
            "awq_codes": layer.qweight.numpy(),
            "awq_zeros": layer.qzeros.numpy(),
            "scales_by_group": layer.scales.half().numpy(),
            "values": values.float().numpy(),
        },
    )


def mlx() -> Iterator[tuple[str, Arrays]]:
    import mlx.core as mx

    for bits in (2, 3, 4, 5, 6, 8):
        rng = np.random.default_rng(bits)
        weight = mx.array(rng.standard_normal((ROWS, COLS)).astype(np.float32)).astype(mx.float16)
        codes, scales, biases = mx.quantize(weight, group_size=GROUP, bits=bits)
        # In float32, so that mlx does not round the values.
        wide = [each.astype(mx.float32) for each in (scales, biases)]
        values = mx.dequantize(codes, *wide, group_size=GROUP, bits=bits)
        yield (
            f"affine{bits}_{GROUP}_f16",
            {
                "codes": np.array(codes),
                "scales": np.array(scales),
                "biases": np.array(biases),
                "values": np.array(values),
            },
        )


PACKERS = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "mlx": mlx,
    "gptq-act-order": gptq_act_order,
    "compressed-tensors-act-order": compressed_tensors_act_order,
}


def main() -> None:
    path = Path(sys.argv[1])
    arrays = dict(np.load(path)) if path.exists() else {}
    for packer in sys.argv[2:]:
        for format, parts in PACKERS[packer]():
            arrays |= {f"{format}/{packer}/{part}": values for part, values in parts.items()}
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main()
