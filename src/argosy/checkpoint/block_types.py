"""The block types of GGUF files, and the formats that hold them in memory without loss.

Elsewhere: `native/kernels/transcode.h` describes their layouts; `formats.py` lists the formats in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from argosy.config import Format

# ggml's table: type number -> name, values per block, bytes per block. Tensors of all these types can be located, so
# a type without a kernel is refused by name, and only if the model needs the tensor.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
BLOCK_SIZES: Mapping[str, tuple[int, int]] = {name: size for name, *size in TENSOR_TYPES.values()}  # type: ignore[misc]
# GGUF block type -> the slot format that holds it without loss.
SLOT_FORMATS: Mapping[str, Format] = {
    "Q8_0": "q8",
    "Q4_0": "q4",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "Q2_K": "q2_k",
    "Q3_K": "q3_k",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
    "MXFP4": "mxfp4",
}
RUNNABLE_TYPES = ("F32", "F16", "BF16", *SLOT_FORMATS)
TYPE_HINT = "Q4_K_M, Q6_K, Q8_0, Q2_K, Q3_K_M, IQ4_XS and BF16 files of a model use only these types"
# First parts of format names, such as IQ2, for which no type has a kernel.
_UNREAD_FORMATS = {name.partition("_")[0] for name in BLOCK_SIZES} - {
    name.partition("_")[0] for name in RUNNABLE_TYPES
}


def may_run(format: str) -> bool:
    """Whether files in a format, as `format_in_name` returns it, may run here. Only the header is certain."""
    return format.removeprefix("UD-").partition("_")[0] not in _UNREAD_FORMATS
