"""The values of ik_llama.cpp's blocks, decoded from its `iqk_quantize.cpp`; no package does it.

`tests/native/test_transcode.py` has checksums of what that file itself decodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# The numbers of the types in files (ik_llama.cpp's `ggml.h`).
NUMBERS = {
    "IQ2_K": 137, "IQ3_K": 138, "IQ4_K": 139, "IQ5_K": 140, "IQ6_K": 141, "IQ4_KS": 144, "IQ2_KS": 145, "IQ5_KS": 152,
    "IQ3_KS": 156, "IQ2_KL": 157,
}  # fmt: skip
# Bytes of a block, and the type of the scale that precedes the blocks of a row.
SIZES: dict[str, tuple[int, str | None]] = {
    "IQ2_K": (76, None),
    "IQ3_K": (110, None),
    "IQ4_K": (144, None),
    "IQ5_K": (176, None),
    "IQ6_K": (212, None),
    "IQ2_KS": (70, "<f2"),
    "IQ3_KS": (102, "<f2"),
    "IQ4_KS": (136, "<f4"),
    "IQ5_KS": (168, "<f4"),
    "IQ2_KL": (86, "<f2"),
}
_VALUES_OF_BITS = {
    "2": "-31 -13 1 17 -26 -8 6 22",
    "3": "-63 -40 -23 -10 1 13 28 47 -59 -36 -19 -6 5 17 32 51",
    "4": (
        "-127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113 -123 -100 -79 -61 -45 -31 -18 -6 5 17 29 42 57 "
        "73 93 117"
    ),
    "5": (
        "-126 -114 -103 -92 -83 -74 -65 -57 -50 -43 -36 -30 -24 -18 -12 -6 -1 5 11 17 23 29 36 43 51 59 68 77 87 "
        "97 109 121 -124 -112 -101 -90 -81 -72 -63 -55 -48 -41 -34 -28 -22 -16 -10 -4 1 7 13 19 25 31 38 45 53 61 "
        "70 79 89 99 111 123"
    ),
    "6": (
        "-127 -121 -115 -109 -104 -98 -93 -88 -84 -79 -74 -70 -66 -62 -58 -54 -51 -47 -44 -40 -37 -34 -31 -28 -25 "
        "-22 -19 -16 -13 -11 -8 -5 -2 0 3 6 9 12 14 17 20 23 27 30 33 36 40 44 47 51 55 59 63 68 72 77 82 87 92 "
        "98 103 109 115 121"
    ),
}
# The values of codes in the first table, then in the second; the second of six bits is the first plus 1.
_VALUES = {bits: [int(value) for value in values.split()] for bits, values in _VALUES_OF_BITS.items()}
_VALUES["6"] += [value + 1 for value in _VALUES["6"]]
_PAIRS = "e9c1 0dc1 c1d8 f6d8 0dd8 2fd8 d8e9 e9e9 01e9 0de9 1ce9 c1f6 01f6 0df6 2ff6 e901 " + (
    "f601 0101 0d01 1c01 d80d e90d f60d 010d 0d0d c11c e91c 011c 1c1c 2f1c e92f 0d2f"
)


def dequantized(block_type: str, rows: Bytes, cols: int) -> Floats:
    """Return the values of rows [rows, bytes of a row]."""
    size, row_scale = SIZES[block_type]
    d = np.ones((len(rows), 1), np.float32)
    if row_scale is not None:
        width = np.dtype(row_scale).itemsize
        d = np.ascontiguousarray(rows[:, :width]).view(row_scale).astype(np.float32)
        rows = rows[:, width:]
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    with np.errstate(invalid="ignore", over="ignore"):
        codes, scales, tables = _DECODERS[block_type](
            blocks
        )  # [blocks, 256], [blocks, parts], [blocks, parts]
    part = 256 // scales.shape[1]
    if block_type == "IQ2_KL":
        values = codes
    else:
        bits = int(block_type[2])
        values = np.array(_VALUES[block_type[2]])[codes + (np.repeat(tables, part, axis=1) << bits)]
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.repeat(scales.astype(np.float32), part, axis=1) * values.astype(np.float32)
        return found.reshape(len(rows), cols) * d


def _u16(blocks: Bytes, at: int) -> NDArray[np.int64]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2").astype(np.int64)


def _d(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)


def _bits(words: NDArray[np.int64], shifts: NDArray[np.int64], mask: int = 1) -> NDArray[np.int64]:
    return words >> shifts & mask


def _two_bits(codes: Bytes) -> NDArray[np.int64]:
    """[blocks, 64]: of every 32 bytes, the four pairs of bits belong to four groups."""
    pairs = codes.astype(np.int64).reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1) & 3
    return pairs.reshape(-1, 256)


def _high_bits(bits: Bytes) -> NDArray[np.int64]:
    """[blocks, 32]: bit g of a byte belongs to group g."""
    return (bits.astype(np.int64)[:, None, :] >> np.arange(8).reshape(1, 8, 1) & 1).reshape(-1, 256)


def _nibbles(codes: Bytes, width: int) -> NDArray[np.int64]:
    """[blocks, n]: of every `width` bytes, first the low halves, then the high ones."""
    parts = codes.astype(np.int64).reshape(len(codes), -1, 1, width) >> np.array([0, 4]).reshape(1, 1, 2, 1)
    return (parts & 15).reshape(len(codes), -1)


def _six_bits(blocks: Bytes) -> NDArray[np.int64]:
    high = blocks[:, 4:8].astype(np.int64)[:, :, None] >> np.array([0, 2, 4, 6]) & 3
    return _nibbles(blocks[:, 8:16], 1) + 16 * high.reshape(-1, 16) - 32


def _iq2_k(b: Bytes) -> tuple[NDArray, ...]:
    return _two_bits(b[:, 12:]), _d(b) * (_nibbles(b[:, 4:12], 1) - 8), _bits(_u16(b, 2), np.arange(16))


def _iq3_k(b: Bytes) -> tuple[NDArray, ...]:
    sign = 1 - 2 * _bits(_u16(b, 4), np.arange(16))
    scales = _d(b) * ((2 * _nibbles(b[:, 6:14], 1) + 1) * sign)
    return _two_bits(b[:, 14:78]) + 4 * _high_bits(b[:, 78:]), scales, _bits(_u16(b, 2), np.arange(16))


def _iq4_k(b: Bytes) -> tuple[NDArray, ...]:
    return _nibbles(b[:, 16:], 16), _d(b) * _six_bits(b), _bits(_u16(b, 2), np.arange(16))


def _iq5_k(b: Bytes) -> tuple[NDArray, ...]:
    codes = _nibbles(b[:, 16:144], 32) + 16 * _high_bits(b[:, 144:])
    return codes, _d(b) * _six_bits(b), _bits(_u16(b, 2), np.arange(16))


def _iq6_k(b: Bytes) -> tuple[NDArray, ...]:
    codes = _nibbles(b[:, 20:148], 32) + 16 * _two_bits(b[:, 148:])
    scales = _d(b) * b[:, 4:20].view(np.int8).astype(np.float32)
    return codes, scales, _bits(_u16(b, 2), np.arange(16))


def _iq2_ks(b: Bytes) -> tuple[NDArray, ...]:
    extra = _u16(b, 0)
    scales = _nibbles(b[:, 2:6], 1) + 16 * _bits(extra, 8 + np.arange(8)) - 16
    return _two_bits(b[:, 6:]), scales, _bits(extra, np.arange(8))


def _iq3_ks(b: Bytes) -> tuple[NDArray, ...]:
    extra = _u16(b, 0)
    scales = _nibbles(b[:, 2:6], 4) + 16 * _bits(extra, np.arange(8)) - 16
    return _two_bits(b[:, 6:70]) + 4 * _high_bits(b[:, 70:]), scales, _bits(extra, 8 + np.arange(8))


def _iq4_ks(b: Bytes) -> tuple[NDArray, ...]:
    scales = b[:, :8].astype(np.int64)
    return _nibbles(b[:, 8:], 16), (scales & 254) - 127, scales & 1


def _iq5_ks(b: Bytes) -> tuple[NDArray, ...]:
    scales = b[:, :8].astype(np.int64)
    return _nibbles(b[:, 8:136], 32) + 16 * _high_bits(b[:, 136:]), (scales & 254) - 127, scales & 1


def _iq2_kl(b: Bytes) -> tuple[NDArray, ...]:
    high = (
        b[:, 70:].astype(np.int64)[:, None, :] >> np.arange(8).reshape(1, 8, 1) & 1
    )  # [blocks, group, pair]
    codes = _nibbles(b[:, 6:70], 16) + 16 * high.reshape(-1, 128)
    pairs = np.array([int(pair, 16) for pair in _PAIRS.split()], "<u2").view(np.int8).reshape(32, 2)
    scales = _nibbles(b[:, 2:6], 4) + 16 * _bits(_u16(b, 0), 2 * np.arange(8), 3) - 32
    return pairs[codes].reshape(-1, 256), scales, scales * 0


_DECODERS = {
    "IQ2_K": _iq2_k,
    "IQ3_K": _iq3_k,
    "IQ4_K": _iq4_k,
    "IQ5_K": _iq5_k,
    "IQ6_K": _iq6_k,
    "IQ2_KS": _iq2_ks,
    "IQ3_KS": _iq3_ks,
    "IQ4_KS": _iq4_ks,
    "IQ5_KS": _iq5_ks,
    "IQ2_KL": _iq2_kl,
}
