"""Quantised weights as compressed-tensors, GPTQ, AWQ and MLX store them, each packed by its own rule.

A `Stored` has random codes, scales and zeros (or biases), and the values that they stand for; its functions return the
tensors of a packing.  The rules are written as the packers state them, one code at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row, of eight, of each nibble of a word


def halves(
    values: npt.NDArray[np.float32], scale: str
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
    """Round to f16 or bf16: return the bits, and the values that they stand for."""
    if scale == "f16":
        rounded = values.astype(np.float16)
        return rounded.view(np.uint16), rounded.astype(np.float32)
    bits = values.view(np.uint32) >> 16
    return bits.astype(np.uint16), (bits << 16).view(np.float32)


def packed(codes: Ints, bits: int, axis: int) -> npt.NDArray[np.uint32]:
    """Pack codes along an axis: code i takes bits i * bits and up of a stream of words, the lowest bits first."""
    codes = np.moveaxis(codes, axis, -1)
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 32)), np.uint64)
    for i in range(codes.shape[-1]):
        for bit in range(bits):
            at = i * bits + bit
            words[..., at // 32] |= (
                codes[..., i].astype(np.uint64) >> np.uint64(bit) & np.uint64(1)
            ) << np.uint64(at % 32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).astype(np.uint32)


def packed_awq(codes: Ints) -> npt.NDArray[np.uint32]:
    """Pack [..., rows] into [..., rows / 8] in AWQ's order."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for nibble, row in enumerate(AWQ_ORDER):
        words |= codes[..., row::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words


def raw(tensor: npt.NDArray[np.generic]) -> Bytes:
    """Return the bytes of a tensor in a file."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


@dataclass
class Stored:
    """Codes [rows, cols]; scales, zeros and biases [rows, groups]; `values` is what they stand for."""

    kind: str  # int, uint or affine
    bits: int
    group: int
    scale: str  # f16 or bf16
    codes: Ints
    scales: npt.NDArray[np.uint16]
    zeros: Ints
    biases: npt.NDArray[np.uint16]
    values: npt.NDArray[np.float32]

    @classmethod
    def random(
        cls, format: str, rows: int, cols: int, *, per_channel: bool = False, least_zero: int = 0
    ) -> Stored:
        name, group_text, scale = format.split("_")
        kind, bits, group = name.rstrip("0123456789"), int(name[-1]), int(group_text)
        rng = np.random.default_rng([rows, cols, bits, group])
        groups = -(-cols // group)
        shape = (rows, 1 if per_channel else groups)
        codes = rng.integers(0, 1 << bits, (rows, cols))
        scales, scale_values = halves((rng.standard_normal(shape) * 0.02).astype(np.float32), scale)
        biases, bias_values = halves((rng.standard_normal(shape) * 0.1).astype(np.float32), scale)
        zeros = rng.integers(least_zero, 1 << bits, shape)
        if kind == "int":
            zeros[:] = 1 << (bits - 1)

        def by_col(each: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
            return np.repeat(each, cols if per_channel else group, axis=1)[:, :cols]

        if kind == "affine":  # products of codes and scales are exact in float64
            values = by_col(scale_values).astype(np.float64) * codes + by_col(bias_values)
        else:
            values = by_col(scale_values).astype(np.float64) * (codes - by_col(zeros))
        return cls(kind, bits, group, scale, codes, scales, zeros, biases, values.astype(np.float32))

    @property
    def format(self) -> str:
        return f"{self.kind}{self.bits}_{self.group}_{self.scale}"

    def compressed_tensors(self) -> dict[str, Bytes]:
        """pack-quantized: a word holds the first columns in its lowest bits, and zeros are packed along rows."""
        parts = {"codes": raw(packed(self.codes, self.bits, 1)), self._rowwise("scales"): raw(self.scales)}
        if self.kind == "uint":
            parts[self._rowwise("zeros")] = raw(packed(self.zeros, self.bits, 0))
        return parts

    def int8(self) -> dict[str, Bytes]:
        """int-quantized: signed bytes."""
        parts = {
            "int8_codes": raw((self.codes - 128).astype(np.int8)),
            self._rowwise("scales"): raw(self.scales),
        }
        if self.kind == "uint":
            name = "int8_channel_zeros" if self.is_per_channel else "int8_zeros"
            parts[name] = raw((self.zeros - 128).astype(np.int8))
        return parts

    def gptq(self, version: int = 1) -> dict[str, Bytes]:
        """Codes down the columns; the first version stores zeros less one."""
        parts = {"gptq_codes": raw(packed(self.codes.T, self.bits, 0))}
        parts["channel_scales" if self.is_per_channel else "scales_by_group"] = raw(self.scales.T)
        if self.kind == "uint":
            stored = raw(packed(self.zeros.T - (version == 1), self.bits, 1))
            name = {(1, False): "gptq_zeros", (2, False): "gptq_v2_zeros", (1, True): "gptq_channel_zeros"}
            parts[name.get((version, self.is_per_channel), "channel_zeros")] = stored
        return parts

    def awq(self) -> dict[str, Bytes]:
        parts = {"awq_codes": raw(packed_awq(self.codes.T)), "scales_by_group": raw(self.scales.T)}
        if self.kind == "uint":
            parts["awq_zeros"] = raw(packed_awq(self.zeros.T))
        return parts

    def mlx(self) -> dict[str, Bytes]:
        return {
            "codes": raw(packed(self.codes, self.bits, 1)),
            "scales": raw(self.scales),
            "biases": raw(self.biases),
        }

    @property
    def is_per_channel(self) -> bool:
        return self.scales.shape[1] == 1

    def _rowwise(self, name: str) -> str:
        return f"channel_{name}" if self.is_per_channel else name
