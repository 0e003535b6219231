# Imports of src/argosy/_native.pyi, which `make stubs` writes, and its names for types that native/bind mentions.

argosy._native.__prefix__:
    # Written by `make stubs` from native/bind: edit it there.

    \from argosy.config import Format, KvDtype, Tuning
    \from typing import Any, Literal
    \from numpy.typing import NDArray
    \import numpy
    InstructionSet = Literal["plain", "avx2", "amx", "avx512"]
    Activation = tuple[Literal["silu", "clamped", "gelu_tanh", "silu_limited", "silu_capped", "relu2", "situ"], float, float]  # kind, limit, alpha
    Gelu = Literal["erf", "tanh", "quick"]
    Finish = Literal["store", "add", "multiply", "gelu_erf", "gelu_tanh", "gelu_quick", "silu"]
    Urgency = Literal["now", "soon", "maybe"]
    # file_id, offset, nbytes, dest_offset. A piece to transcode adds block_type, rows, cols, optionally followed by
    # the number of interleaved matrices with that many rows.
    Piece = (
        tuple[int, int, int, int]
        | tuple[int, int, int, int, str, int, int]
        | tuple[int, int, int, int, str, int, int, int]
    )
    _DeltaSizes = tuple[int, int, int, int, int]  # key heads, value heads, key dim, value dim, conv width
    _MambaSizes = tuple[int, int, int, int, int]  # heads, head dim, state dim, groups, conv width
    _PoolSizes = tuple[int, int, bool]  # ratio, dim, whether groups overlap
    _Buffer = bytes | bytearray | memoryview | NDArray[Any]

tests.native._native_testing.__prefix__:
    # Written by `make stubs` from native/tests/native_testing.cpp: edit it there.

    \from argosy._native import Activation, Urgency, _DeltaSizes, _MambaSizes, _PoolSizes
    \from argosy.config import Format
    \from typing import Any, Literal
    \from numpy.typing import NDArray
    \import numpy

