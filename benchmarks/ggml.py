"""llama.cpp's products in this process, from its tensor library.

    products = Products("IQ2_XXS", rows, cols, num_matrices, blocks)       a matrix many times in the library's memory
    for graph in products.prepare(x, threads, count): graph.run()          x times `count` of them, then the next ones

The library is the one that `install_peer.sh` compiles for this processor. Its threads spin for a while after a product,
so a measurement of something else begins a few milliseconds later.
"""

from __future__ import annotations

import ctypes
import functools
import time
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from engines import peer_python

SPIN_S = 0.005  # how long threads of OpenMP look for more work, and some
_NODES = 4096


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(ctypes.Structure):
    """ggml_cplan of ggml 0.25."""

    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


def is_there() -> bool:
    return _folder() is not None


def _folder() -> Path | None:
    python = peer_python()
    if python is None:
        return None
    found = python.parents[1].glob("lib/python*/site-packages/llama_cpp/lib")
    return next(found, None)


@functools.cache
def _libraries() -> tuple[Any, Any]:
    """ggml's base and its products on processors, with the types of the functions used here."""
    folder = _folder()
    if folder is None:
        raise SystemExit("llama.cpp is not installed (benchmarks/install_peer.sh)")
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    for library, name, result, *arguments in (
        (base, "ggml_init", c_void_p, _InitParams),
        (base, "ggml_free", None, c_void_p),
        (base, "ggml_get_data", c_void_p, c_void_p),
        (base, "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64),
        (base, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p),
        (base, "ggml_new_graph_custom", c_void_p, c_void_p, c_size_t, c_bool),
        (base, "ggml_build_forward_expand", None, c_void_p, c_void_p),
        (cpu, "ggml_cpu_init", None),
        (cpu, "ggml_graph_plan", _Plan, c_void_p, c_int, c_void_p),
        (cpu, "ggml_graph_compute", c_int, c_void_p, ctypes.POINTER(_Plan)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


class Products:
    """One matrix many times in memory that llama.cpp owns."""

    def __init__(
        self, block_type: str, rows: int, cols: int, num_matrices: int, blocks: NDArray[np.uint8]
    ) -> None:
        self._base, self._cpu = _libraries()
        kind = gguf.GGMLQuantizationType[block_type]
        values, nbytes = gguf.GGML_QUANT_SIZES[kind]
        self.rows, self.cols, self.nbytes = rows, cols, rows * cols // values * nbytes
        self._context = self._base.ggml_init(
            _InitParams(num_matrices * (self.nbytes + 1024) + (1 << 20), None, False)
        )
        self._matrices = []
        for _ in range(num_matrices):
            matrix = self._base.ggml_new_tensor_2d(self._context, int(kind), cols, rows)
            data = _bytes_at(self._base.ggml_get_data(matrix), self.nbytes)
            data[:] = blocks
            self._matrices.append(matrix)
        self._next = 0

    def free(self) -> None:
        self._base.ggml_free(self._context)

    def prepare(self, x: NDArray[np.float32], threads: int, count: int) -> list[_Graph]:
        """Graphs that multiply x [tokens, cols] by `count` matrices each; together they use all matrices."""
        whole = len(self._matrices) - len(self._matrices) % count
        return [
            _Graph(self._base, self._cpu, self._matrices[at : at + count], self.rows, x, threads)
            for at in range(0, max(whole, count), count)
        ]


class _Graph:
    """One product of x with each of some matrices, computed again with each call."""

    def __init__(
        self, base: Any, cpu: Any, matrices: list[int], rows: int, x: NDArray[np.float32], threads: int
    ) -> None:
        self._base, self._cpu = base, cpu
        tokens, cols = x.shape
        room = 4 * tokens * (cols + (rows + 64) * len(matrices)) + (8 << 20)
        self._context = base.ggml_init(_InitParams(room, None, False))
        inputs = base.ggml_new_tensor_2d(self._context, 0, cols, tokens)
        _bytes_at(base.ggml_get_data(inputs), x.nbytes)[:] = (
            np.ascontiguousarray(x).view(np.uint8).reshape(-1)
        )
        self._graph = base.ggml_new_graph_custom(self._context, _NODES, False)
        self._outs = [base.ggml_mul_mat(self._context, matrix, inputs) for matrix in matrices]
        for out in self._outs:
            base.ggml_build_forward_expand(self._graph, out)
        self._shape = tokens, rows
        self._plan = cpu.ggml_graph_plan(self._graph, threads, None)
        self._work = np.empty(max(1, self._plan.work_size), np.uint8)
        self._plan.work_data = self._work.ctypes.data

    def run(self) -> None:
        code = self._cpu.ggml_graph_compute(self._graph, ctypes.byref(self._plan))
        assert code == 0

    def out(self, number: int) -> NDArray[np.float32]:
        """The product with one of the matrices, [tokens, rows]."""
        tokens, rows = self._shape
        data = _bytes_at(self._base.ggml_get_data(self._outs[number]), 4 * tokens * rows)
        return data.view(np.float32).reshape(tokens, rows).copy()

    def free(self) -> None:
        self._base.ggml_free(self._context)


def _bytes_at(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def wait_for_spinning_threads() -> None:
    time.sleep(SPIN_S)
