"""The meaning of a pack's bytes, in plain numpy and Python: the tests' own decoder, independent of the kernels.

q8, q4    groups of 32 columns share a float16 scale; a panel of 16 rows holds the scales, then the quants, per group
checksum  crc32c of four quarters, then crc32c of the four results
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]

ROWS, GROUP = 16, 32
NUMPY = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


def panel_bytes(format: str, cols: int) -> int:
    groups = -(-cols // GROUP)
    used = groups * GROUP * ROWS // {"q8": 1, "q4": 2}[format] + groups * ROWS * 2
    return -(-used // 64) * 64


def nbytes(format: str, rows: int, cols: int) -> int:
    if format in NUMPY:
        return rows * cols * np.dtype(NUMPY[format]).itemsize
    return -(-rows // ROWS) * panel_bytes(format, cols)


def decode(format: str, stored: bytes, rows: int, cols: int) -> Float32:
    """The weights of a stored matrix."""
    assert len(stored) == nbytes(format, rows, cols)
    if format == "bf16":
        bits = np.frombuffer(stored, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(rows, cols)
    if format in NUMPY:
        return np.frombuffer(stored, NUMPY[format]).astype(np.float32).reshape(rows, cols)
    quants, scales = quants_and_scales(format, stored, rows, cols)
    return quants * np.repeat(scales, GROUP, axis=1)[:, :cols]


def quants_and_scales(format: str, stored: bytes, rows: int, cols: int) -> tuple[Float32, Float32]:
    """The integers [rows, cols] and the scales [rows, groups], unpacked byte by byte."""
    groups = -(-cols // GROUP)
    quants = np.zeros((rows, groups * GROUP), np.float32)
    scales = np.zeros((rows, groups), np.float32)
    size = panel_bytes(format, cols)
    block_bytes = ROWS * 2 + GROUP * ROWS // {"q8": 1, "q4": 2}[format]
    for row in range(rows):
        r = row % ROWS
        for group in range(groups):
            block = stored[row // ROWS * size + group * block_bytes :][:block_bytes]
            scales[row, group] = np.frombuffer(block, "<f2", 1, offset=2 * r)[0]
            for inside in range(GROUP):
                chunk, j = divmod(inside if format == "q8" else inside % 16, 4)
                byte = block[ROWS * 2 + chunk * 64 + r * 4 + j]
                code, zero = (byte, 128) if format == "q8" else (byte >> 4 if inside >= 16 else byte & 15, 8)
                quants[row, group * GROUP + inside] = code - zero
    return quants[:, :cols], scales


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def crc32c_wide(data: bytes) -> int:
    quarter = -(-len(data) // 4)
    parts = [crc32c(data[i * quarter : (i + 1) * quarter]) for i in range(4)]
    return crc32c(b"".join(part.to_bytes(4, "little") for part in parts))
