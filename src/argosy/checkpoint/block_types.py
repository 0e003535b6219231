"""The block types of GGUF files, and the formats that hold them in memory without loss.

Elsewhere: `native/kernels/transcode.h` describes their layouts; `formats.py` lists the formats in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from argosy.config import FLOAT_FORMATS, MEASURED_FORMATS, Format

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
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
    # Those of ik_llama.cpp.
    137: ("IQ2_K", 256, 76), 138: ("IQ3_K", 256, 110), 139: ("IQ4_K", 256, 144), 140: ("IQ5_K", 256, 176),
    141: ("IQ6_K", 256, 212), 144: ("IQ4_KS", 256, 136), 145: ("IQ2_KS", 256, 70), 152: ("IQ5_KS", 256, 168),
    156: ("IQ3_KS", 256, 102), 157: ("IQ2_KL", 256, 86),
}  # fmt: skip
BLOCK_SIZES: Mapping[str, tuple[int, int]] = {name: size for name, *size in TENSOR_TYPES.values()}  # type: ignore[misc]
# Bytes of the scale that precedes the blocks of each row.
ROW_SCALE_BYTES: Mapping[str, int] = {"IQ2_KS": 2, "IQ3_KS": 2, "IQ2_KL": 2, "IQ4_KS": 4, "IQ5_KS": 4}
# ik_llama.cpp's other types (its ggml.h), so that a refusal can name them.
IK_TYPES: Mapping[int, str] = {
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 146: "IQ4_KSS", 151: "Q8_KV", 153: "IQ2_KT", 154: "IQ3_KT",
    155: "IQ4_KT", 158: "IQ1_KT",
}  # fmt: skip
_IK_NUMBERS = range(97, 512)  # of all its own types
# GGUF block type -> the slot format that holds it without loss, which has the type's name, except for two.
SLOT_FORMATS: Mapping[str, Format] = {
    block_type: slot
    for slot in MEASURED_FORMATS
    if slot not in FLOAT_FORMATS
    and (block_type := {"q8": "Q8_0", "q4": "Q4_0"}.get(slot, slot.upper())) in BLOCK_SIZES
}
RUNNABLE_TYPES = ("F32", "F16", "BF16", *SLOT_FORMATS)
TYPE_HINT = (
    "get a file of the model named Q4_K_M, Q6_K, Q8_0, Q2_K, IQ1_S to IQ4_XS, MXFP4 or BF16; "
    "they hold only these types"
)
# No file holds Q8_K, which is for activations; UD-Q8_K_XL is a mixture with Q8_0.
_ALL_NAMES = sorted({*BLOCK_SIZES, *IK_TYPES.values()} - {"Q8_K"}, key=len, reverse=True)
# The ends of names of types that interleave rows, such as IQ2_K_R4 of ik_llama.cpp and the former Q4_0_8_8.
_INTERLEAVED = re.compile(r"_(?:R\d{1,2}|[48]_[48])$")


def unread_type(kind: int) -> tuple[str, str]:
    """Return how an error names a type that is not in `TENSOR_TYPES`, and a hint what to get instead."""
    name = IK_TYPES.get(kind, "")
    called = f"{name} ({kind})" if name else f"{kind}"
    if kind in _IK_NUMBERS:
        called += ", one of ik_llama.cpp's own"
    why = (
        "KT types compute every weight from a hash, which is slow on a CPU; " if name.endswith("_KT") else ""
    )
    return called, why + TYPE_HINT


def type_in_name(format: str) -> str | None:
    """Return the type after which a format, as `format_in_name` returns it, is named; None if it is a mixture's name
    alone, such as IQ2_M.
    """
    bare = format.removeprefix("UD-")
    if _INTERLEAVED.search(bare):
        return bare
    return next((name for name in _ALL_NAMES if bare == name or bare.startswith(name + "_")), None)


def may_run(format: str) -> bool:
    """Whether files in a format, as `format_in_name` returns it, may run here. Only the header is certain."""
    named = type_in_name(format)
    return named is None or named in RUNNABLE_TYPES
