"""Calls every binding of the native module with odd arguments: each answers with a result or an exception.

    python -m tests.native.odd_arguments [--module _native.so] [--note FILE]

Every callable has one valid call here, made anew each time. Then each argument in turn becomes odd: None, of another
type, negative, zero, huge, empty, of the wrong dtype or shape, not contiguous, read-only, not aligned, never
initialised, closed; and so does each item of a list. At the end several of them at once, drawn from a fixed seed. A
crash ends the process, and FILE then names the call. A callable without a valid call here fails, so a new binding
cannot be forgotten.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import gc
import os
import random
import resource
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.native.other_build import open_module

HUGE = (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**64, -(2**63))
SCALARS: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1000, *HUGE, -0.5, float("nan"), float("inf"), "", "f32", "no such", b"x", (), [], [None],
    [[None]], {}, {"a": None}, object(), (None, None, None), (0, -1, 2**63 - 1), range(3), np.float32(1),
    np.array(None), np.zeros(0, np.float32), np.zeros((3, 0), np.float32), np.array(["a"]),
    np.zeros(2, "datetime64[s]"), np.zeros(3, np.complex64), np.zeros((1,) * 30, np.uint8),
    np.datetime64(0, "s"), np.timedelta64(0, "s"),
)  # fmt: skip
HEADROOM_BYTES = 3 << 30
# Refused where bfloat16 is not the faster product.
NEED_ROUNDING = frozenset({"round_keys", "attend_rounded"})
MADE_BY_OTHERS = {
    "FileSystem", "KvShape", "StateShape", "StreamMix", "Mixer", "Ffn", "Ngrams", "ExchangeTimes", "PeerStats",
    "ExchangeEvent", "WorkerRequest", "WorkerGuess", "LayerExperts", "ExpertReads", "AskedCounts", "BegunLayer",
    "LeaseCounts",
}  # fmt: skip
NUM_MIXED = 40  # calls of each callable with several odd arguments
# Arguments that fill so much memory, or start so many threads.
FILLS_MEMORY = {
    "memory_probe": 2**29,
    "int8_probe": 64,
    "product_probe": 64,
    "Runtime": 64,
    "Store": 64,
    "drive_probe": 2**20,
}


COMPRESSED = (
    "num_heads", "num_groups", "rope_dim", "window", "scale", "norm_eps", "query_norm", "kv_norm", "head_norm", "sinks",
    "pool", "entries", "indexer", "num_chosen", "state_layer",
)  # fmt: skip


class Case:
    """Everything that the valid calls need, small, and new for each call."""

    TOKENS, HIDDEN, WIDTH, EXPERTS, VOCABULARY = 3, 64, 32, 4, 24

    def __init__(self, native: Any, runtime: Any, path: str) -> None:
        from tests.native import _native_testing  # of the same build: see `open_module`

        self.native, self.runtime, self.path = native, runtime, path
        self.testing: Any = _native_testing
        self._fds: dict[int, int] = {}  # sockets that a call may take over, and their inodes
        self._kept: Any = None

    def floats(self, *shape: int) -> Any:
        return np.full(shape, 0.25, np.float32)

    def ints(self, *values: int) -> Any:
        return np.array(values, np.int32)

    def longs(self, *values: int) -> Any:
        return np.array(values, np.int64)

    def matrix(self, rows: int, cols: int, format: str = "q4") -> Any:
        data = np.zeros(self.native.matrix_bytes(format, rows, cols), np.uint8)
        return self.native.Matrix(data, 0, format, rows, cols)

    def kv(self, kind: str = "keys_values") -> Any:
        shapes = {
            "keys_values": self.native.KvShape.keys_values(1, 32),
            "latent": self.native.KvShape.latent(48),
            "indexed": self.native.KvShape.latent(48, 16),
            "blocks": self.native.KvShape.keys_values(1, 32, index_dim=16),
        }
        return self.native.KvCache([shapes[kind]], 4, 16, "f32")

    def pool(self, dim: int = 16, store: int = 2) -> Any:
        """Overlapping groups of four positions."""
        columns, ones = self.matrix(2 * dim, 64), np.ones(dim, np.float32)
        sizes, bias = (4, dim, True), self.floats(4, 2 * dim)
        return self.native.Pool(columns, columns, sizes=sizes, bias=bias, norm=ones, store=store)

    def entry_indexer(self) -> Any:
        query, weights, keys = self.matrix(32, 32), self.matrix(2, 64), self.pool(store=3)
        return self.native.EntryIndexer(query, weights, pool=keys, candidates=(2, 8), finds_candidates=True)

    def block_indexer(self) -> Any:
        ones = np.ones(16, np.float32)
        return self.native.BlockIndexer(
            self.matrix(16, 64), self.matrix(16, 64), query_norm=ones, key_norm=ones, num_chosen=2, block_size=16,
            num_local=1,
        )  # fmt: skip

    def compressed(self, *, is_source: bool = True) -> tuple[Any, ...]:
        """Four heads of 16 in two groups; a layer that is no source sees what an earlier one has chosen."""
        ones, m = np.ones(32, np.float32), self.matrix
        return (
            m(32, 64), m(64, 32), m(16, 64), m(32, 32), m(64, 32), 4, 2, 8, 8, 0.1, 1e-5, ones, ones[:16], ones[:16],
            self.floats(4), self.pool() if is_source else None, None if is_source else (2, 4),
            self.entry_indexer() if is_source else None, 2, 0,
        )  # fmt: skip

    def stream_mix(self, num_streams: int = 2) -> Any:
        rows = num_streams * (2 + num_streams)
        return self.native.sinkhorn_mix(
            self.matrix(rows, 64 * num_streams, "f32"), self.floats(rows), self.floats(3)
        )

    def state(self) -> Any:
        return self.native.RecurrentState(2, [self.native.StateShape.delta_net(self.sizes)])

    sizes = (1, 2, 16, 16, 4)  # channels: 2 * 16 + 32
    kimi_sizes = (2, 2, 16, 16, 4)
    table_sizes = ("f32", 8, 16, [(None, [(0, 0, 0)])], 4096, 8)
    mamba_sizes = (2, 16, 8, 1, 4)  # channels: 32, and 48 of the convolution

    def arena(self) -> Any:
        arena = self.native.Arena(1 << 16)
        arena.array()[:] = 0
        return arena

    def offsets(self) -> Any:
        size = self.native.matrix_bytes("q4", 64, 64)
        return np.arange(self.EXPERTS * 3, dtype=np.int64).reshape(self.EXPERTS, 3) * (size // 2 // 64 * 64)

    def routing(self) -> Any:
        return self.native.Routing(2, score="softmax", renormalize=True)

    def indexer(self) -> Any:
        query, key, weights = self.matrix(32, 32), self.matrix(16, 64), self.matrix(2, 64)
        ones = np.ones(16, np.float32)
        return self.native.PositionIndexer(
            query, key, weights, key_norm=ones, key_norm_bias=ones, norm_eps=1e-6, has_interleaved_pairs=True
        )

    def gqa(self) -> Any:
        query, key, value, output = (self.matrix(rows, 64) for rows in (64, 32, 32, 64))
        return self.native.grouped_query_attention(
            query, key, value, output, num_heads=2, window=0, scale=0.1
        )

    def routed(self) -> Any:
        shared = (self.matrix(32, 64), self.matrix(32, 64), self.matrix(64, 32))
        return self.native.routed_ffn(
            self.matrix(self.EXPERTS, 64, "f32"),
            self.routing(),
            width=32,
            shared=shared,
        )

    def layer(self) -> Any:
        return self.native.Layer(self.floats(64), self.gqa(), self.floats(64), self.routed())

    def table(self, *, is_placed: bool = True) -> Any:
        table = self.native.ExpertTable(self.arena(), hidden=64, activation=("silu", 0.0, 0.0))
        table.add_layer(0, formats=("q4", "q4", "q4"), width=32, starts=self.offsets())
        if is_placed:
            table.place([((0, expert), 0) for expert in range(self.EXPERTS)])
        return table

    def policy(self) -> Any:
        policy = self.native.CachePolicy(num_slots=3, layers=[0], experts_per_token=2)
        policy.admit((0, 1), is_scan=False)
        policy.admit((0, 2), is_scan=True)
        policy.unpin(0, [1, 2])
        return policy

    def expert_adapter(self) -> Any:
        adapter = self.native.ExpertAdapter(self.arena())
        adapter.add_layer(
            0,
            format="f32",
            ranks=(1, 0, 0),
            scales=(1.0, 1.0, 1.0),
            hidden=64,
            width=32,
            num_experts=self.EXPERTS,
        )
        return adapter

    def part_cache(self) -> Any:
        policy = self.native.CachePolicy(num_slots=3, layers=[0], experts_per_token=2)
        return self.native.PartCache(
            self.part_reads(), policy, self.expert_adapter(), slot_bytes=4096, num_parts=self.EXPERTS
        )

    def pair(
        self, down: tuple[int, int] = (2, 64), up: tuple[int, int] = (2, 64)
    ) -> tuple[Any, Any, float, Any]:
        arena, matrix = self.arena(), self.native.Matrix
        return matrix(arena, 0, "f32", *down), matrix(arena, 1 << 15, "f32", *up), 0.5, None

    def stack_adapter(self, embedding: Any = None) -> Any:
        embedding = embedding or self.matrix(self.VOCABULARY, 64)
        adapter = self.native.StackAdapter(8)
        adapter.add_embedding(embedding, self.pair((self.VOCABULARY, 2)))
        return adapter

    def part_reads(self) -> Any:
        return self.native.PartReads(
            self.store(), self.arena(), 0, stride=4096, layers={0: (0, 100, [1] * self.EXPERTS)}
        )

    def cached_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        reads = self.native.StoreReads(self.store(), self.arena(), lambda key: self.record())
        return (reads, self.table(is_placed=False)), {
            "kinds": [
                (self.native.CachePolicy(num_slots=3, layers=[0], experts_per_token=2), [0], [0, 4096, 8192])
            ],
            "keys": [(0, expert) for expert in range(self.EXPERTS)],
            "experts_per_token": 2,
            "look_ahead": True,
            "reads_all": False,
        }

    def cached(self, *, is_open: bool = False) -> Any:
        args, kwargs = self.cached_arguments()
        cached = self.native.CachedExperts(*args, **kwargs)
        if is_open:
            cached.open(0, [0, 3], [])
        return cached

    def dispatch(self) -> Any:
        return self.native.Dispatch(np.array([[0, 1], [1, 3], [3, 0]], np.int32), np.zeros(3, np.bool_), 4)

    def limits(self) -> dict[str, Any]:
        return {"hidden": 64, "num_experts": [4], "most_rows": 8, "most_assignments": 16}

    def fd(self) -> int:
        """A connected socket whose other end is closed; those that nobody took over are closed."""
        for fd, inode in self._fds.items():
            with contextlib.suppress(OSError):
                if os.fstat(fd).st_ino == inode:
                    os.close(fd)
        fd = socket.socketpair()[0].detach()
        self._fds = {fd: os.fstat(fd).st_ino}
        return fd

    def host(self) -> Any:
        host = self.native.Owner("10.0.0.2:7070")
        host.remember(2, num_layers=1, num_experts=4)
        host.peer = 1
        return host

    def hosts(self) -> list[Any]:
        return [self.host(), self.host()]

    def owners(self) -> Any:
        return self.native.Owners(self.hosts(), np.array([[[0], [1], [0], [1]]], np.int16))

    def group_experts(self) -> Any:
        experts = self.native.GroupExperts(self.exchange())
        experts.use(self.owners(), None)
        return experts

    def exchange(self) -> Any:
        """With a peer that takes everything and never answers, and a ticket that waits for nobody."""
        exchange = self.native.Exchange(**self.limits())
        ours, theirs = socket.socketpair()
        self._kept = theirs
        peer = exchange.add(ours.detach())
        exchange.send(0, self.dispatch(), self.floats(3, 64), self.floats(6, 64), {peer: []})
        return exchange

    def link(self, *, has_request: bool = True) -> Any:
        """The other end has sent a request, or is closed."""
        ours, theirs = socket.socketpair()
        link = self.native.WorkerLink(theirs.detach(), **self.limits())
        if has_request:
            self._kept = exchange = self.native.Exchange(**self.limits())
            peer = exchange.add(ours.detach())
            exchange.send(0, self.dispatch(), self.floats(3, 64), self.floats(6, 64), {peer: [0, 3]})
        return link

    def asked_link(self) -> Any:
        link = self.link()
        link.next(0)
        return link

    def stack_sizes(self) -> Any:
        sizes = self.native.StackSizes(64, 8)
        sizes.add_attention(2, 1, 32, False)
        sizes.add_routed(self.EXPERTS, 2, 32, 32)
        return sizes

    def stack_arguments(self, *, is_resident: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.runtime, self.kv()), {
            "embedding": self.matrix(self.VOCABULARY, 64),
            "head": self.matrix(self.VOCABULARY, 64),
            "final_norm": self.floats(64),
            "norm_eps": 1e-5,
            "rotaries": [self.native.Rotary(np.ones(8), 1.0)],
            "activation": ("silu", 0.0, 0.0),
            "layers": [self.layer()],
            "max_tokens": self.TOKENS,
            "resident": self.table() if is_resident else None,
            "experts_off": False,
        }

    def stack_of_streams(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """With two residual streams, pooled entries, an indexer of them, and a layer that leaves tokens out."""
        n, mix, norm = self.native, self.stream_mix(), self.floats(64)
        layers = []
        for is_source in (True, False):
            values = self.compressed(is_source=is_source)
            mixer = n.compressed_attention(*values[:5], **dict(zip(COMPRESSED, values[5:], strict=True)))
            reach = 8 if is_source else 1
            layers.append(n.Layer(norm, mixer, norm, self.routed(), mixer_mix=mix, ffn_mix=mix, reach=reach))
        kv = n.KvCache([*[n.KvShape.latent(16)] * 2, *[n.KvShape.pooled(16, 4)] * 2], 4, 16, "f32")
        more = {
            "layers": layers, "residual": n.Residual(2, n.mean_mix(), iterations=2, eps=1e-6),
            "recurrent": n.RecurrentState(2, [n.StateShape.pools([(4, 16, True)] * 2)]),
            "rotaries": [n.Rotary(np.ones(4), 1.0)],
        }  # fmt: skip
        return (self.runtime, kv), self.stack_arguments()[1] | more

    def step_of_streams(self) -> tuple[Any, ...]:
        step = list(self.step())
        step[8], step[9], step[10], step[14] = self.ints(0), None, None, np.zeros((2, 3, 2), np.int32)
        return tuple(step)

    def step_of_ends(self) -> tuple[Any, ...]:
        """The last token alone reaches the second layer."""
        return *self.step_of_streams()[:12], [], [], np.zeros((2, 3, 2), np.int32), None, self.ints(9, 8, 0)

    def stack_of_ends(self) -> Any:
        stack = self.stack(has_streams=True)
        stack.begin(*self.step_of_ends())
        return stack

    def stack(self, *, steps: int = 0, has_streams: bool = False, has_adapter: bool = False) -> Any:
        """steps 1: a step has begun; 2: its layer waits for experts; 3: it is done."""
        args, kwargs = self.stack_of_streams() if has_streams else self.stack_arguments()
        stack = self.native.Stack(*args, **kwargs)
        if has_adapter:
            stack.set_adapter(1, self.stack_adapter(kwargs["embedding"]))
        if steps:
            step = self.step_of_streams() if has_streams else self.step()
            stack.begin(*step, *((None, None, self.ints(1, -1, 1)) if has_adapter else ()))
        if steps > 1:
            waits = stack.advance()
        while steps > 2 and waits:
            stack.run_shared()
            stack.finish_experts(waits[1].experts)
            waits = stack.advance()
        return stack

    def step(self) -> tuple[Any, ...]:
        return (
            self.ints(1, 2, 3), self.ints(0, 0, 0), self.longs(0, 1, 2), np.zeros(3, np.bool_),
            np.zeros((1, 2), np.int32), self.ints(0, 1, 2), self.longs(2), self.floats(1, self.VOCABULARY), None,
            self.floats(3, 3), self.ints(3, 3, 3), (self.longs(0, 2), self.floats(2, self.HIDDEN)),
            [(0, self.longs(1), self.floats(1, self.HIDDEN))], [(0, self.floats(3, self.HIDDEN))],
            np.zeros((1, 3, 2), np.int32),
        )  # fmt: skip

    def store(self) -> Any:
        store = self.native.Store(1, self.testing.RealFileSystem(False))  # a kernel's queue takes long to end
        store.open(self.path, False)
        return store

    def record(self) -> Any:
        return self.native.Record([(0, 0, 4096, 0)])

    def rows(self, *, begun: bool = False) -> Any:
        rows = self.native.TableRows(self.store(), *self.table_sizes)
        if begun:
            rows.begin(np.zeros(2, np.int64))
            rows.advance(1000)
        return rows

    def delta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        floats = self.floats
        return (
            self.runtime, self.state(), 0, floats(3, 64), floats(3, 32), floats(3, 2), floats(3, 2),
            np.array([[0, 3, 0]], np.int64),
        ), {
            "conv": floats(4, 64), "rate": floats(2), "dt_bias": floats(2), "norm": floats(16), "eps": 1e-5,
            "sizes": self.sizes, "is_tiled": False, "out": floats(3, 32),
        }  # fmt: skip

    def causal_conv(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        f, runs = self.floats, np.array([[0, 3, 0]], np.int64)
        state = self.native.RecurrentState(1, [self.native.StateShape.short_conv(64, 3)])
        given = (self.runtime, state, 0, f(3, 64), f(3, 64), f(3, 64), runs)
        return given, {"weights": f(3, 64), "bias": f(64), "out": f(3, 64)}

    def mamba(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        f, runs = self.floats, np.array([[0, 3, 0]], np.int64)
        state = self.native.RecurrentState(1, [self.native.StateShape.mamba(self.mamba_sizes)])
        return (self.runtime, state, 0, f(3, 82), runs), {
            "conv": f(4, 48), "conv_bias": f(48), "rate": f(2), "dt_bias": f(2), "skip": f(2), "norm": f(32),
            "eps": 1e-5, "sizes": self.mamba_sizes, "dt_limit": (0.0, 1.0), "out": f(3, 32),
        }  # fmt: skip


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def valid_calls(case: Case) -> dict[str, Callable[[], Call]]:
    """One valid call of every callable, by name."""
    n, m, f, i, j, runtime = case.native, case.matrix, case.floats, case.ints, case.longs, case.runtime
    functions: dict[str, Callable[[], tuple[Any, ...]]] = {
        "instruction_sets": lambda: (),
        "amx_state": lambda: (),
        "amx_formats": lambda: (),
        "coded_formats": lambda: (),
        "product_scratch_bytes": lambda: (2,),
        "matrix_bytes": lambda: ("q4", 3, 64),
        "measured_as": lambda: ("uint4_128_f16",),
        "f8_scales_bytes": lambda: (300,),
        "quantize": lambda: ("q8", f(16, 64), np.zeros(n.matrix_bytes("q8", 16, 64), np.uint8), runtime),
        "transcode": lambda: ("Q4_0", np.zeros(16 * 2 * 18, np.uint8), 16, 64, 1, None),
        "put_in_act_order": lambda: (
            "int4_32_f16_act_order",
            np.full(n.matrix_bytes("int4_32_f16_act_order", 16, 64), 0xFF, np.uint8),
            16,
            64,
        ),
        "dequantize": lambda: ("q4", np.zeros(n.matrix_bytes("q4", 16, 64), np.uint8), 16, 64),
        "matmul": lambda: (runtime, [m(16, 64), m(20, 64, "f16")], f(3, 64), [f(3, 16), f(3, 20)]),
        "embed": lambda: (runtime, m(8, 64), i(0, 7), f(2, 64)),
        "merged_squares": lambda: (m(8, 64), 3, f(5, 2), f(2, 64), np.zeros(5)),
        "rms_norm": lambda: (runtime, f(3, 64), f(64), 1e-5, f(3, 64)),
        "linear": lambda: (runtime, m(16, 64, "bf16"), f(17, 64), f(17, 16), f(16), "add", False),
        "layer_norm": lambda: (runtime, f(3, 64), f(64), f(64), 1e-5, f(3, 64)),
        "gelu": lambda: (runtime, f(3, 64), "erf"),
        "attend": lambda: (runtime, f(3, 4, 16), f(5, 2, 16), f(5, 2, 16), 0.25, f(3, 4, 16)),
        "rounded_keys_bytes": lambda: (5, 2, 16),
        "round_keys": lambda: (
            runtime, f(5, 2, 16), f(5, 2, 16), np.zeros(n.rounded_keys_bytes(5, 2, 16), np.uint8),
        ),
        "attend_rounded": lambda: (
            runtime, f(3, 4, 16), np.zeros(n.rounded_keys_bytes(5, 2, 16), np.uint8), 5, 2, 0.25, f(3, 4, 16),
        ),
        "rope": lambda: (runtime, f(3, 2, 32), f(3, 8), f(3, 8), False),
        "route": lambda: (runtime, case.routing(), f(3, 4), np.zeros((3, 2), np.int32), f(3, 2)),
        "combine": lambda: (runtime, f(6, 64), f(3, 2), f(3, 64)),
        "mul_gate": lambda: (runtime, f(3, 64), f(3, 64)),
        "soft_cap": lambda: (runtime, f(3, 64), 30.0),
        "add_sigmoid_gated": lambda: (runtime, f(3, 64), f(3), f(3, 64)),
        "swiglu_experts": lambda: (
            runtime, case.arena(), ("q4", "q4", "q4"), 64, 32, case.offsets(), f(3, 64), i(0, 1, 2, 3, 3), i(0, 1, 2),
            i(0, 1, 2), f(3, 64), ("clamped", 7.0, 1.7), f(4, 32), f(4, 32), f(4, 64),
        ),
        "swiglu": lambda: (runtime, m(32, 64), m(32, 64), m(64, 32), f(3, 64), f(3, 64), ("silu", 0.0, 0.0)),
        "kv_layer_parts": lambda: (n.KvShape.keys_values(1, 32), 4, 16, "f32"),
        "kv_cache_bytes": lambda: ([n.KvShape.keys_values(1, 32), n.KvShape.none()], 4, 16, "f16"),
        "kv_write": lambda: (runtime, case.kv(), 0, f(2, 1, 32), f(2, 1, 32), j(0, 17)),
        "attention": lambda: (
            runtime, case.kv(), 0, f(3, 2, 32), np.zeros((1, 2), np.int32), i(0, 0, 0), i(0, 1, 2), 0.1, 0, f(3, 64),
            f(2), i(2, 2, 3),
        ),
        "latent_write": lambda: (runtime, case.kv("latent"), 0, f(2, 48), j(0, 17)),
        "latent_attention": lambda: (
            runtime, case.kv("latent"), 0, f(3, 2, 48), m(64, 32), m(64, 32), np.zeros((1, 2), np.int32), i(0, 0, 0),
            i(0, 1, 2), 0.1, f(3, 64), i(2, 2, 3), np.zeros((3, 1), np.int32),
        ),
        "index_write": lambda: (runtime, case.kv("indexed"), 0, f(2, 16), j(0, 17)),
        "choose_positions": lambda: (
            runtime, case.kv("indexed"), 0, f(3, 2, 16), f(3, 2), np.zeros((1, 2), np.int32), i(0, 0, 0), i(0, 1, 2),
            np.zeros((3, 1), np.int32), i(2, 2, 3),
        ),
        "block_attention": lambda: (
            runtime, case.kv("blocks"), 0, f(3, 2, 32), f(3, 1, 16), np.zeros((1, 2), np.int32), i(0, 0, 0),
            i(0, 1, 2), 16, 1, 0.1, np.zeros((3, 1, 2), np.int32), f(3, 64),
        ),
        "joint_attention": lambda: (
            runtime, case.kv(), 0, f(3, 2, 32), np.zeros((1, 2), np.int32), i(0, 0, 0), i(0, 1, 2),
            np.zeros((3, 1), np.int32), 4, 0.1, f(2), f(3, 64),
        ),
        "BlockIndexer": lambda: (m(16, 64), m(16, 64), f(16), f(16), 2, 16, 1),
        "Pool": lambda: (m(32, 64), m(32, 64), (4, 16, True), f(4, 32), f(16), 1),
        "EntryIndexer": lambda: (m(32, 32), m(2, 64), None, m(16, 16), f(16), 3, (2, 8), True),
        "compressed_attention": case.compressed,
        "sinkhorn_mix": lambda: (m(8, 128, "f32"), f(8), f(3)),
        "gated_mix": lambda: (f(128), m(16, 128, "f32"), m(128, 16, "f32"), m(2, 128, "f32")),
        "bank_mix": lambda: (f(64), True),
        "mean_mix": lambda: (),
        "carried_mix": lambda: (),
        "StreamMix": lambda: (),
        "Residual": lambda: (2, case.stream_mix(), 2, 1e-6, True),
        "recurrent_state_bytes": lambda: (2, [n.StateShape.delta_net(case.sizes)]),
        "grouped_query_attention": lambda: (
            m(64, 64), m(32, 64), m(32, 64), m(64, 64), 2, 0, 0.1, f(64), f(32), f(32), f(64), f(32), f(32), False, 0.0,
            f(2), False, f(32), True, True, 0.5, True, m(2, 64), "softplus", (0.1, 8, 1), case.block_indexer(),
        ),
        "table_rows_bytes": lambda: case.table_sizes,
        "TableRows": lambda: (case.store(), *case.table_sizes),
        "ngrams": lambda: (case.rows(), m(64, 32), m(64, 32), f(64), f(64), f(3, 64), f(64), 0),
        "short_conv": lambda: (m(192, 64), m(64, 64), f(3, 64), f(64), f(192), f(64), 0),
        "mamba": lambda: (
            m(82, 64), m(64, 32), f(4, 48), f(48), f(2), f(2), f(2), f(32), case.mamba_sizes, (0.0, 1.0), f(82), f(64),
            0,
        ),
        "gated_delta_net": lambda: (
            m(64, 64), m(2, 64), m(64, 32), m(32, 64), m(2, 64), f(4, 64), f(2), f(2), f(16), case.sizes, False, 0,
        ),
        "kimi_delta_attention": lambda: (
            m(32, 64), m(32, 64), m(32, 64), m(2, 64), m(32, 32), m(32, 32), m(64, 32), m(32, 64), m(32, 64),
            (f(4, 32), f(4, 32), f(4, 32)), f(2), f(32), f(16), -5.0, case.kimi_sizes, 0,
        ),
        "lightning_attention": lambda: (
            m(64, 64), m(64, 64), m(64, 64), m(64, 64), m(64, 64), 2, True, f(32), f(32), f(2), f(64), 1e-5, 1, 0.1, 0,
        ),
        "multi_head_latent_attention": lambda: (
            m(96, 32), m(48, 64), m(64, 32), m(64, 32), m(64, 64), 2, 16, 0.1, 1e-5, f(32), m(32, 64), f(32), 4,
            case.indexer(),
            m(64, 64), "sigmoid", (0.1, 8, 0),
        ),
        "PositionIndexer": lambda: (m(32, 32), m(16, 64), m(2, 64), f(16), f(16), 1e-6, True),
        "dense_ffn": lambda: (m(32, 64), m(32, 64), m(64, 32), ("silu_capped", 7.0, 0.0)),
        "routed_ffn": lambda: (
            m(4, 64, "f32"), case.routing(), f(4), 32, (m(32, 64), m(32, 64), m(64, 32)), m(1, 64, "f32"), f(64), None,
            f(64), f(64), ("silu_limited", 7.0, 0.0), (m(48, 64), m(64, 48)), 30.0, False, f(48),
            m(case.VOCABULARY, 2, "f32"),
        ),
        "Layer": lambda: (
            f(64), case.gqa(), f(64), case.routed(), 1, f(64), f(64), 0.5, False, 0.5, 0.5, 0.5, case.stream_mix(),
            case.stream_mix(), None, 3,
        ),
        "Dispatch": lambda: (np.array([[0, 3], [3, 1]], np.int32), np.array([True, False]), 4, i(-1, 3)),
        "ExpertTable": lambda: (case.arena(), 64, ("silu", 0.0, 0.0)),
        "memory_probe": lambda: (1, 4 << 20, "plain"),
        "int8_probe": lambda: (1, "plain"),
        "product_probe": lambda: (1, [("q4", 2, ("off", "one_level", 4, 0))], 1 << 20, 1, n.instruction_sets()[-1]),
        "default_tuning": lambda: (),
        "crc32c_wide": lambda: (b"bytes",),
        "trim_heap": lambda: (),
        "record_bytes": lambda: (3, True),
        "request_bytes": lambda: ([4096, 2**20],),
        "replay": lambda: (np.array([[[0, 1]], [[1, 3]], [[2, 0]]], np.uint16), j(0, 0, 1), 4, "lru", 2, 1),
        "ngram_words": lambda: (bytes(16), np.zeros((3, 5), np.uint32), np.zeros(3, np.uint64)),
        "tournament": lambda: (np.zeros(3, np.uint64), np.full(3, 1 / 3), 30),
        "drive_probe": lambda: (case.path, 4096, 2, 1, False),
        "Arena": lambda: (1 << 16,),
        "RealFileSystem": lambda: (True,),
        "FaultyFileSystem": lambda: (1, "eio", 1, 0.0, case.testing.RealFileSystem()),
        "Record": lambda: ([(0, 0, 4096, 0), (0, 0, 2 * 18 * 16, 0, "Q4_0", 16, 64)], None),
        "Store": lambda: (1, case.testing.RealFileSystem(), 10**9, n.Foreground(1.0)),
        "Foreground": lambda: (0.5,),
        "Runtime": lambda: (2, {"q4": ("two_levels", "off", 9, 0)}, "plain"),
        "Matrix": lambda: (np.zeros(1 << 12, np.uint8), 0, "q4", 16, 64),
        "Routing": lambda: (2, "sigmoid", f(4), 2, 1, "top2", True, 0.0, 0.5, 1.0, f(4)),
        "KvCache": lambda: ([n.KvShape.keys_values(1, 32), n.KvShape.latent(16)], 4, 16, "f32"),
        "RecurrentState": lambda: (2, [n.StateShape.delta_net(case.sizes)]),
        "Rotary": lambda: (np.ones(8), 1.0, True, (0, 1, 2, 0, 1, 2, 0, 0)),
        "StackSizes": lambda: (64, 8),
        "Exchange": lambda: (64, [0, 4], 8, 16),
        "WorkerLink": lambda: (case.fd(), 64, [0, 4], 8, 16),
        "LinkError": lambda: ("the connection was lost",),
        "worker_link_bytes": lambda: (64, [0, 4], 8, 16),
        "exchange_bytes": lambda: (64, [0, 4], 8, 16, 3),
        "sources_hash": lambda: (),
        "ExchangeTimes": lambda: (),
        "PeerStats": lambda: (),
        "ExchangeEvent": lambda: (),
        "WorkerRequest": lambda: (),
        "WorkerGuess": lambda: (),
        "LayerExperts": lambda: (),
        "ExpertReads": lambda: (),
        "StoreReads": lambda: (case.store(), case.arena(), lambda key: case.record()),
        "PartReads": lambda: (case.store(), case.arena(), 0, 4096, {0: (0, 100, [1, 2])}),
        "PartCache": lambda: (case.part_reads(), case.policy(), case.expert_adapter(), 4096, 4),
        "ExpertAdapter": lambda: (case.arena(),),
        "StackAdapter": lambda: (8,),
        "ReadsInPython": lambda: (case.store(), lambda places, urgency: [1] * len(places), lambda key: 4096),
        "AskedCounts": lambda: (),
        "BegunLayer": lambda: (),
        "LeaseCounts": lambda: (),
        "CachePolicy": lambda: (3, [0, 2], 2),
        "Owner": lambda: ("10.0.0.2:7070",),
        "Owners": lambda: (case.hosts(), np.zeros((1, 4, 1), np.int16), None),
        "GroupExperts": lambda: (case.exchange(),),
        "FileSystem": lambda: (),
        "KvShape": lambda: (),
        "StateShape": lambda: (),
        "Mixer": lambda: (),
        "Ngrams": lambda: (),
        "Ffn": lambda: (),
    }  # fmt: skip
    # Arguments behind these are given by name.
    first_by_name = {"swiglu_experts": 11, "grouped_query_attention": 4, "gated_delta_net": 3, "routed_ffn": 2,
                     "kimi_delta_attention": 7, "lightning_attention": 5,
                     "short_conv": 2, "mamba": 2, "ngrams": 3,
                     "compressed_attention": 5, "BlockIndexer": 2, "EntryIndexer": 2, "Pool": 2, "Residual": 2,
                     "multi_head_latent_attention": 5, "PositionIndexer": 3, "Routing": 1, "ExpertTable": 1, "Layer": 4,
                     "dense_ffn": 3,
                     "replay": 2, "tournament": 2, "linear": 5, "Exchange": 0, "WorkerLink": 1, "worker_link_bytes": 0,
                     "exchange_bytes": 0, "CachePolicy": 0, "PartReads": 3, "PartCache": 3}  # fmt: skip
    names = {
        "swiglu_experts": "activation gate_bias up_bias down_bias",
        "linear": "finish exact",
        "grouped_query_attention": "num_heads window scale query_bias key_bias value_bias output_bias query_norm"
        " key_norm is_norm_flat limit sinks has_gate value_norm is_causal is_norm_last value_scale is_chunked gate"
        " gate_kind query_scale indexer",
        "gated_delta_net": "z a conv rate dt_bias norm sizes is_tiled state_layer",
        "kimi_delta_attention": "decay_down gate_down conv rate dt_bias norm floor sizes state_layer",
        "lightning_attention": "num_heads has_silu query_norm key_norm decay norm norm_eps num_groups scale"
        " state_layer",
        "compressed_attention": " ".join(COMPRESSED),
        "BlockIndexer": "query_norm key_norm num_chosen block_size num_local",
        "EntryIndexer": "pool key key_norm store candidates finds_candidates",
        "Pool": "sizes bias norm store",
        "Residual": "iterations eps is_lagged",
        "ngrams": "key_norm query_norm conv conv_norm state_layer",
        "short_conv": "conv conv_bias input_bias output_bias state_layer",
        "mamba": "conv conv_bias rate dt_bias skip norm sizes dt_limit input_bias output_bias state_layer",
        "routed_ffn": "router_bias width shared shared_score router_norm norm post_norm shared_post_norm"
        " shared_activation latent router_logit_cap weighs_input latent_norm token_experts",
        "dense_ffn": "activation",
        "Layer": "rotary mixer_post_norm ffn_post_norm scale is_parallel mixer_scale ffn_scale normed_residual"
        " mixer_mix ffn_mix ngrams reach",
        "ExpertTable": "hidden activation",
        "replay": "num_experts policy num_slots counted_from",
        "tournament": "depth",
        "CachePolicy": "num_slots layers experts_per_token",
        "PartReads": "stride layers",
        "PartCache": "slot_bytes num_parts",
        "Exchange": "hidden num_experts most_rows most_assignments",
        "WorkerLink": "hidden num_experts most_rows most_assignments",
        "worker_link_bytes": "hidden num_experts most_rows most_assignments",
        "exchange_bytes": "hidden num_experts most_rows most_assignments num_peers",
        "multi_head_latent_attention": "num_heads rope_dim scale norm_eps kv_norm query_down query_norm num_chosen"
        " indexer gate gate_kind query_scale",
        "PositionIndexer": "key_norm key_norm_bias norm_eps has_interleaved_pairs",
        "Routing": "score choice_bias num_groups kept_groups group_score renormalize renormalize_eps"
        " renormalize_least scale expert_scale",
    }

    def call_of(name: str, arguments: Callable[[], tuple[Any, ...]]) -> Callable[[], Call]:
        def make() -> Call:
            values, first = arguments(), first_by_name.get(name)
            kwargs = {} if first is None else dict(zip(names[name].split(), values[first:], strict=True))
            owner = n if hasattr(n, name) else case.testing
            return getattr(owner, name), values[:first], kwargs

        return make

    methods: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]] = {
        "Arena.array": (case.arena, lambda: ()),
        "Arena.populate": (case.arena, lambda: (n.Foreground(0.5),)),
        "Arena.resize": (case.arena, lambda: (1 << 15,)),
        "Arena.close": (case.arena, lambda: ()),
        "FaultyFileSystem.release": (lambda: case.testing.FaultyFileSystem(1, "hold"), lambda: ()),
        "Store.open": (case.store, lambda: (case.path, True)),
        "Store.info": (case.store, lambda: (0,)),
        "Store.fetch": (case.store, lambda: (case.arena(), [(0, 0, 4096, 0), (0, 64, 100, 8192)], [1, 2])),
        "Store.fetch_many": (
            case.store,
            lambda: (case.arena(), [(case.record(), 0), (case.record(), 4096)], "soon"),
        ),
        "Store.hurry": (case.store, lambda: ([1, 2],)),
        "Store.wait_any": (case.store, lambda: ([], 0)),
        "Store.drop": (case.store, lambda: ([1, 2],)),
        "Store.cancel": (case.store, lambda: (1,)),
        "Store.pending": (case.store, lambda: ()),
        "Store.stats": (case.store, lambda: ()),
        "Store.leave_background": (
            lambda: n.Store(1, case.testing.RealFileSystem(False), foreground=n.Foreground(0.1)),
            lambda: (),
        ),
        "Foreground.give_way": (lambda: n.Foreground(0.5), lambda: (0.1,)),
        "Store.close": (case.store, lambda: ()),
        "Runtime.close": (lambda: n.Runtime(2), lambda: ()),
        "KvShape.keys_values": (lambda: n.KvShape, lambda: (1, 32)),
        "KvShape.latent": (lambda: n.KvShape, lambda: (16,)),
        "KvShape.none": (lambda: n.KvShape, lambda: ()),
        "KvShape.pooled": (lambda: n.KvShape, lambda: (16, 4)),
        "StateShape.pools": (lambda: n.StateShape, lambda: ([(4, 16, True), (128, 8, False)],)),
        "StateShape.delta_net": (lambda: n.StateShape, lambda: (case.sizes,)),
        "StateShape.mamba": (lambda: n.StateShape, lambda: (case.mamba_sizes,)),
        "TableRows.begin": (case.rows, lambda: (j(0, 1),)),
        "TableRows.advance": (lambda: case.rows(begun=True), lambda: (0,)),
        "TableRows.write": (lambda: case.rows(begun=True), lambda: (runtime, f(2, 16))),
        "StateShape.short_conv": (lambda: n.StateShape, lambda: (64, 3)),
        "KvCache.copy_out": (case.kv, lambda: (0, np.zeros(case.kv().block_bytes, np.uint8))),
        "KvCache.copy_in": (case.kv, lambda: (0, np.zeros(case.kv().block_bytes, np.uint8))),
        "KvCache.held_bytes": (case.kv, lambda: (2,)),
        "KvCache.release": (case.kv, lambda: (2,)),
        "KvCache.copy_block": (case.kv, lambda: (0, 3)),
        "RecurrentState.position": (case.state, lambda: (0,)),
        "RecurrentState.restart": (case.state, lambda: (0,)),
        "RecurrentState.copy_out": (case.state, lambda: (0, f(case.state().slot_floats))),
        "RecurrentState.copy_in": (case.state, lambda: (0, f(case.state().slot_floats), 5)),
        "RecurrentState.copy_slot": (case.state, lambda: (0, 1)),
        "Dispatch.assignments": (case.dispatch, lambda: (3,)),
        "Dispatch.choices": (case.dispatch, lambda: ()),
        "Dispatch.only": (case.dispatch, lambda: ([3, 0],)),
        "Exchange.add": (case.exchange, lambda: (case.fd(),)),
        "Exchange.remove": (case.exchange, lambda: (1,)),
        "Exchange.send": (
            case.exchange,
            lambda: (0, case.dispatch(), f(3, 64), f(6, 64), {1: [0, 3]}),
        ),
        "Exchange.resend": (case.exchange, lambda: (1, {1: [1]})),
        "Exchange.receive": (case.exchange, lambda: (1, 0)),
        "Exchange.drop": (case.exchange, lambda: (1, [1])),
        "Exchange.forget": (case.exchange, lambda: (1,)),
        "Exchange.tend": (case.exchange, lambda: (10**6,)),
        "Exchange.status": (case.exchange, lambda: (1,)),
        "Exchange.stats": (case.exchange, lambda: (1,)),
        "Exchange.close": (case.exchange, lambda: ()),
        "Owner.set_rates": (case.host, lambda: (10**6, 1e9)),
        "Owner.forget": (case.host, lambda: ()),
        "Owner.note": (case.host, lambda: (0, [0, 3])),
        "Owner.has": (case.host, lambda: (0, 3)),
        "Owners.owners_of": (case.owners, lambda: (0, 3)),
        "Owners.candidates": (case.owners, lambda: (0, 3, [case.host()])),
        "Owners.choose": (case.owners, lambda: (0, [0, 3])),
        "Owners.split_guess": (case.owners, lambda: (0, [[1], [0, 2]])),
        "Owners.is_usable": (case.owners, lambda: (case.host(),)),
        "GroupExperts.use": (case.group_experts, lambda: (case.owners(), case.table())),
        "GroupExperts.take_over": (case.group_experts, lambda: ()),
        "GroupExperts.abandon": (case.group_experts, lambda: ()),
        "GroupExperts.wants_guess": (lambda: n.GroupExperts, lambda: (case.owners(),)),
        "GroupExperts.patience_s": (case.group_experts, lambda: (case.host(), 1, 0, 3, [0, 3])),
        "GroupExperts.count_asked": (case.group_experts, lambda: (case.host(), 0, case.dispatch(), [0, 3])),
        "WorkerLink.next": (lambda: case.link(has_request=False), lambda: (0,)),
        "WorkerLink.answer": (case.asked_link, lambda: ([3, 0],)),
        "WorkerLink.refuse": (case.asked_link, lambda: (5, "why")),
        "WorkerLink.serve_resident": (
            lambda: case.link(has_request=False),
            lambda: (runtime, case.table()),
        ),
        "WorkerLink.interrupt": (case.link, lambda: ()),
        "WorkerLink.close": (case.link, lambda: ()),
        "ExpertTable.place": (lambda: case.table(is_placed=False), lambda: ([((0, 1), 64), ((0, 3), 0)],)),
        "ExpertTable.run": (case.table, lambda: (runtime, 0, [0, 3], case.dispatch(), f(3, 64), f(6, 64))),
        "CachePolicy.copy": (case.policy, lambda: ()),
        "CachePolicy.resize": (case.policy, lambda: (2,)),
        "CachePolicy.moves": (case.policy, lambda: (3,)),
        "CachePolicy.begin": (case.policy, lambda: (0,)),
        "CachePolicy.find": (case.policy, lambda: (0, [1, 3])),
        "CachePolicy.unpin": (case.policy, lambda: (0, [1, 2])),
        "CachePolicy.drop": (case.policy, lambda: ((0, 1),)),
        "CachePolicy.slot": (case.policy, lambda: ((0, 2),)),
        "CachePolicy.resident": (case.policy, lambda: ()),
        "CachePolicy.pinned": (case.policy, lambda: ()),
        "CachePolicy.window": (case.policy, lambda: ()),
        "CachePolicy.ages": (case.policy, lambda: ()),
        "CachedExperts.open": (case.cached, lambda: (0, [1, 3], [3], [(1, 0)])),
        "CachedExperts.open_for": (case.cached, lambda: (0, case.dispatch())),
        "CachedExperts.set_parts": (case.cached, lambda: (1, case.part_cache())),
        "ExpertAdapter.part_bytes": (case.expert_adapter, lambda: (0,)),
        "ExpertAdapter.offsets": (case.expert_adapter, lambda: (0,)),
        "ExpertAdapter.place": (case.expert_adapter, lambda: ([((0, 1), 0), ((0, 3), 64)],)),
        "ExpertAdapter.has_places": (case.expert_adapter, lambda: (0, [1, 3])),
        "ExpertTable.set_adapter": (case.table, lambda: (1, case.expert_adapter())),
        "Stack.set_adapter": (case.stack, lambda: (1, case.stack_adapter())),
        "StackAdapter.add_pair": (
            case.stack_adapter,
            lambda: (m(64, 64), (*case.pair(up=(2, 32))[:3], n.Matrix(case.arena(), 0, "f32", 1, 32)), 32),
        ),
        "StackAdapter.add_network": (
            case.stack_adapter,
            lambda: (m(32, 64), case.pair(up=(2, 32)), case.pair(up=(2, 32)), case.pair((2, 32))),
        ),
        "StackAdapter.add_latent": (
            case.stack_adapter,
            lambda: (m(64, 32), m(64, 32), 2, case.pair((4, 32), (2, 32)), case.pair((2, 32), (4, 32))),
        ),
        "StackAdapter.add_embedding": (
            case.stack_adapter,
            lambda: (m(case.VOCABULARY, 64), case.pair((case.VOCABULARY, 2))),
        ),
        "StackAdapter.replace": (
            case.stack_adapter,
            lambda: (m(4, 64, "f32"), n.Matrix(case.arena(), 0, "f32", 4, 64)),
        ),
        "StackAdapter.replace_embedding": (
            case.stack_adapter,
            lambda: (m(case.VOCABULARY, 64), n.Matrix(case.arena(), 0, "f32", case.VOCABULARY, 64)),
        ),
        "CachedExperts.group": (lambda: case.cached(is_open=True), lambda: ()),
        "CachedExperts.collect": (lambda: case.cached(is_open=True), lambda: ()),
        "CachedExperts.is_running": (lambda: case.cached(is_open=True), lambda: (case.dispatch(),)),
        "CachedExperts.take_done": (lambda: case.cached(is_open=True), lambda: ()),
        "CachedExperts.forget_hint": (case.cached, lambda: ()),
        "CachedExperts.collect_early": (case.cached, lambda: ()),
        "CachedExperts.trust": (case.cached, lambda: (0.5,)),
        "CachedExperts.cancel_early": (case.cached, lambda: ()),
        "Rotary.angles": (
            lambda: n.Rotary(np.ones(8), 1.0, False, (0, 1, 2, 0, 1, 2, 0, 0)),
            lambda: (runtime, f(3, 3), f(3, 8), f(3, 8)),
        ),
        "StackSizes.add_attention": (case.stack_sizes, lambda: (4, 2, 16, True)),
        "StackSizes.add_latent_attention": (case.stack_sizes, lambda: (2, 32, 16, 32, 8, 24, 2, 16, 4)),
        "StackSizes.add_compressed_attention": (
            case.stack_sizes,
            lambda: (4, 16, 32, 2, 16, 8, (4, 16, True), True, 2, (2, 16), (4, 16, True), False, (2, 8)),
        ),
        "StackSizes.add_residual": (case.stack_sizes, lambda: (2, 8, 16)),
        "StackSizes.add_delta_net": (case.stack_sizes, lambda: (case.sizes,)),
        "StackSizes.add_kimi_delta": (case.stack_sizes, lambda: (case.kimi_sizes, 16)),
        "StackSizes.add_short_conv": (case.stack_sizes, lambda: (64,)),
        "StackSizes.add_ngrams": (case.stack_sizes, lambda: (32, 4)),
        "StackSizes.add_mamba": (case.stack_sizes, lambda: (case.mamba_sizes,)),
        "StackSizes.add_dense": (case.stack_sizes, lambda: (32,)),
        "StackSizes.add_routed": (case.stack_sizes, lambda: (8, 2, 32, 16, True)),
        "StackSizes.add_ffn_post_norm": (case.stack_sizes, lambda: ()),
        "StackSizes.dispatch_bytes": (case.stack_sizes, lambda: (8,)),
        "StackSizes.buffer_bytes": (case.stack_sizes, lambda: (8,)),
        "StackSizes.scratch_bytes": (case.stack_sizes, lambda: (8, 2)),
        "Stack.resize": (lambda: case.stack(steps=2), lambda: (1,)),
        "Stack.hidden": (lambda: case.stack(steps=2), lambda: ()),
        "Stack.expert_ids": (lambda: case.stack(steps=2), lambda: ()),
        "Stack.begin": (case.stack, case.step),
        "Stack.begin, streams": (lambda: case.stack(has_streams=True), case.step_of_streams),
        "Stack.begin, ends": (lambda: case.stack(has_streams=True), case.step_of_ends),
        "Stack.begin, adapters": (
            lambda: case.stack(has_adapter=True),
            lambda: (*case.step(), None, None, i(1, -1, 1)),
        ),
        "Stack.advance, adapters": (
            lambda: case.stack(steps=1, has_adapter=True),
            lambda: (lambda: None,),
        ),
        "Stack.advance, ends": (case.stack_of_ends, lambda: (lambda: None,)),
        "Stack.advance, streams": (lambda: case.stack(steps=1, has_streams=True), lambda: (lambda: None,)),
        "Stack.logits, streams": (
            lambda: case.stack(steps=3, has_streams=True),
            lambda: (j(0, 2), f(2, case.VOCABULARY)),
        ),
        "Stack.advance": (lambda: case.stack(steps=1), lambda: (lambda: None,)),
        "Stack.look_ahead": (lambda: case.stack(steps=2), lambda: ()),
        "Stack.run_shared": (lambda: case.stack(steps=2), lambda: ()),
        "Stack.rows": (lambda: case.stack(steps=2), lambda: ()),
        "Stack.expert_out": (lambda: case.stack(steps=2), lambda: ()),
        "Stack.finish_experts": (lambda: case.stack(steps=2), lambda: ([0, 1],)),
        "Stack.logits": (lambda: case.stack(steps=3), lambda: (j(0, 2), f(2, case.VOCABULARY))),
        "Stack.final_states": (lambda: case.stack(steps=3), lambda: (j(0, 2), f(2, case.HIDDEN))),
        "Stack.use_experts": (case.stack, lambda: (case.table(),)),
        "Stack.take_seconds": (case.stack, lambda: ()),
        "Stack.forbid": (case.stack, lambda: (0, [1, 3])),
        "Stack.take_uses": (case.stack, lambda: (np.zeros((1, 4), np.int64),)),
    }

    def method_of(
        name: str, owner: Callable[[], Any], arguments: Callable[[], tuple[Any, ...]]
    ) -> Callable[[], Call]:
        return lambda: (getattr(owner(), name.partition(",")[0].partition(".")[2]), arguments(), {})

    calls = {name: call_of(name, arguments) for name, arguments in functions.items()}
    calls |= {name: method_of(name, owner, arguments) for name, (owner, arguments) in methods.items()}
    calls["gated_delta"] = lambda: (case.testing.gated_delta, *case.delta())
    calls["causal_conv"] = lambda: (case.testing.causal_conv, *case.causal_conv())
    calls["mamba_recurrence"] = lambda: (case.testing.mamba_recurrence, *case.mamba())
    calls["Stack"] = lambda: (n.Stack, *case.stack_arguments(is_resident=True))
    calls["Stack, streams"] = lambda: (n.Stack, *case.stack_of_streams())
    calls["pool"] = lambda: (
        case.testing.pool,
        (
            runtime, n.RecurrentState(1, [n.StateShape.pools([(2, 16, True)])]), 0, f(3, 32), f(3, 32), f(2, 32),
            np.array([[0, 3, 0]], np.int64),
        ),
        {"sizes": (2, 16, True), "out": f(3, 16), "begins": f(9)},
    )  # fmt: skip
    calls["ExpertAdapter.add_layer"] = lambda: (
        case.expert_adapter().add_layer,
        (1,),
        {
            "format": "bf16", "ranks": (1, 2, 0), "scales": (1.0, 0.5, 0.0), "hidden": 64, "width": 32,
            "num_experts": 4,
        },
    )  # fmt: skip
    calls["CachedExperts"] = lambda: (n.CachedExperts, *case.cached_arguments())
    calls["CachedExperts.end"] = lambda: (case.cached(is_open=True).end, (), {"is_whole": True})
    calls["CachedExperts.wants_guess"] = lambda: (case.cached().wants_guess, (), {"is_sweep": False})
    calls["CachedExperts.guess"] = lambda: (case.cached().guess, (0, [[1], [0, 2]]), {"is_sweep": True})
    calls["CachedExperts.is_trusted"] = lambda: (case.cached().is_trusted, (1,), {"is_sweep": False})
    calls["CachePolicy.use"] = lambda: (case.policy().use, (0, [1, 2]), {"is_scan": True})
    calls["CachePolicy.admit"] = lambda: (
        case.policy().admit,
        ((0, 3),),
        {"is_scan": False, "is_guess": False},
    )
    calls["CachePolicy.bytes"] = lambda: (
        n.CachePolicy.bytes,
        (),
        {"num_slots": 3, "num_layers": 2, "num_experts": 4},
    )
    calls["ExpertTable.add_layer"] = lambda: (
        n.ExpertTable(case.arena(), hidden=64, activation=("silu", 0.0, 0.0)).add_layer,
        (2,),
        {
            "formats": ("q4", "q4", "q4"), "width": 32, "starts": case.offsets(), "gate_bias": f(4, 32),
            "up_bias": f(4, 32), "down_bias": f(4, 64),
        },
    )  # fmt: skip
    calls["Exchange.guess"] = lambda: (case.exchange().guess, (1, 0, [[1], [0, 2]]), {"is_sweep": True})
    calls["Owner.remember"] = lambda: (case.host().remember, (2,), {"num_layers": 1, "num_experts": 4})
    calls["GroupExperts.guess"] = lambda: (
        case.group_experts().guess,
        (case.owners(), 0, [[1], [0, 2]]),
        {"is_sweep": True},
    )
    calls["Exchange.inject"] = lambda: (
        case.exchange().inject,
        (1,),
        {"delay_us": 0, "bytes_per_s": 10**9, "bytes_to_live": 10**6, "is_stalled": False},
    )
    return calls


def callables(native: Any) -> set[str]:
    """Every public function, class and method."""
    found = set()
    for name, value in vars(native).items():
        if name.startswith("_") or not callable(value):
            continue
        found.add(name)
        if isinstance(value, type):
            found |= {
                f"{name}.{each}" for each, one in vars(value).items() if each[0] != "_" and callable(one)
            }
            found |= {
                f"{name}.{each}"
                for each, one in vars(value).items()
                if each[0] != "_" and isinstance(one, staticmethod)
            }
    return found


def odd_arrays(array: Any) -> Iterator[Any]:
    for dtype in (np.float64, np.float16, np.float32, np.int64, np.int32, np.uint8, np.bool_, ">f4", ">i4"):
        yield array.astype(dtype)
    yield array[..., None]
    yield array.reshape(-1)
    yield array[:0]
    yield np.concatenate([array, array])
    yield array[:-1]
    yield np.repeat(array, 2, axis=-1)[..., ::2]
    yield np.asfortranarray(array)
    yield array[::-1]
    yield np.broadcast_to(array.reshape(-1)[:1], array.shape)
    yield np.array(0, array.dtype)
    yield np.zeros((2**31, 0), array.dtype)
    read_only = array.copy()
    read_only.flags.writeable = False
    yield read_only
    odd_bytes = np.zeros(array.nbytes + 1, np.uint8)[1:]
    yield odd_bytes.view(array.dtype).reshape(array.shape)
    limits = np.finfo if array.dtype.kind == "f" else np.iinfo
    if array.dtype.kind != "b":
        for value in (
            limits(array.dtype).min,
            limits(array.dtype).max,
            0,
            1,
            *((-1,) if array.dtype.kind != "u" else ()),
        ):
            yield np.full_like(array, value)
            if array.size:
                last = array.copy()
                last.reshape(-1)[-1] = value
                yield last
    if array.dtype.kind == "f":
        yield np.full_like(array, np.nan)


@functools.cache
def odd_objects(native: Any) -> list[Any]:
    """Objects that were never initialised, or closed."""
    names = ("Matrix", "Runtime", "Arena", "Store", "KvCache", "Routing", "Mixer", "Ffn", "Layer", "Rotary",
             "Record", "Dispatch", "ExpertTable", "CachePolicy", "CachedExperts")  # fmt: skip
    kinds = [getattr(native, name) for name in names]
    closed = [native.Arena(4096), native.Runtime(1), native.Store(1)]
    for one in closed:
        one.close()
    return [kind.__new__(kind) for kind in kinds] + closed


def odd_values(native: Any, valid: Any) -> Iterator[Any]:
    """Odd ones in place of an argument, derived from a valid one."""
    yield from SCALARS
    yield from odd_objects(native)
    if isinstance(valid, np.ndarray):
        yield from odd_arrays(valid)
    elif isinstance(valid, dict):
        for name in valid:
            yield {key: value for key, value in valid.items() if key != name}
            for odd in (None, 3, *(odd_arrays(valid[name]) if isinstance(valid[name], np.ndarray) else ())):
                yield valid | {name: odd}
    elif isinstance(valid, (list, tuple)):
        kind = type(valid)
        yield kind(valid[:-1])
        yield kind([*valid, *valid])
        for at, item in enumerate(valid):
            for odd in odd_values(native, item):
                yield kind([*valid[:at], odd, *valid[at + 1 :]])


def bounded(name: str, value: Any) -> bool:
    """Whether a call with it stays within what the machine of a test has."""
    most = FILLS_MEMORY.get(name)
    return most is None or not isinstance(value, int) or value < most or value > 2**40


class Walker:
    def __init__(self, native: Any, note: Path | None) -> None:
        self._native = native
        self._note = None if note is None else os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.num_calls = self.num_answers = 0

    def call(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], odd: str) -> None:
        if self._note is not None:
            os.pwrite(self._note, f"{name}: {odd}"[:300].ljust(300).encode(errors="replace"), 0)
        self.num_calls += 1
        try:
            result = function(*args, **kwargs)
        except Exception:  # whatever it is: it is no crash
            return
        self.num_answers += 1
        if hasattr(result, "close"):
            result.close()

    def walk(self, name: str, make: Callable[[], Call], draw: random.Random) -> None:
        function, args, kwargs = make()
        function(*args, **kwargs)  # a valid call gives a result, or nothing below means anything
        valid = {**dict(enumerate(args)), **kwargs}
        odd = {
            key: [one for one in odd_values(self._native, value) if bounded(name, one)]
            for key, value in valid.items()
        }
        for key, values in odd.items():
            for value in values:
                self._call_with(name, make, {key: value})
        for _ in range(NUM_MIXED if odd else 0):
            chosen = draw.sample(list(odd), k=min(len(odd), draw.randint(2, 3)))
            self._call_with(name, make, {key: draw.choice(odd[key]) for key in chosen})
        for extra in ((), (None,), (None,) * 20):
            function, _, _ = make()
            self.call(name, function, extra, {}, f"{len(extra)} arguments")
        function, args, kwargs = make()
        self.call(name, function, args, kwargs | {"no_such": 1}, "an unknown name")

    def _call_with(self, name: str, make: Callable[[], Call], odd: dict[Any, Any]) -> None:
        function, args, kwargs = make()
        values = tuple(odd.get(at, value) for at, value in enumerate(args))
        named = {key: odd.get(key, value) for key, value in kwargs.items()}
        self.call(
            name, function, values, named, " ".join(f"{key}={describe(one)}" for key, one in odd.items())
        )


def describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} strides {value.strides}"
    with contextlib.suppress(Exception):
        return repr(value)
    return type(value).__name__


def walk_orders(case: Case, walker: Walker) -> None:
    """The methods of a Stack in every order of two or three, from every stage of a step."""
    table = case.table()
    calls: dict[str, Callable[[Any], tuple[Any, ...]]] = {
        "begin": lambda _: case.step(),
        "advance": lambda _: (),
        "look_ahead": lambda _: (),
        "run_shared": lambda _: (),
        "finish_experts": lambda _: ([0],),
        "rows": lambda _: (),
        "expert_out": lambda _: (),
        "logits": lambda _: (case.longs(0), case.floats(1, case.VOCABULARY)),
        "final_states": lambda _: (case.longs(0), case.floats(1, case.HIDDEN)),
        "use_experts": lambda _: (table,),
        "forbid": lambda _: (0, [1]),
    }
    for steps in range(4):
        for first in calls:
            for second in calls:
                stack = case.stack(steps=steps)
                for name in (first, second, first):
                    order = f"after {steps} steps, in the order {first}, {second}"
                    walker.call(f"Stack.{name}", getattr(stack, name), calls[name](stack), {}, order)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--module", type=Path, help="a build of argosy._native; default: the installed one")
    parser.add_argument("--note", type=Path, help="where the call that runs is named")
    parser.add_argument("--only", help="one callable")
    options = parser.parse_args()
    native = open_module(options.module)
    if not options.module:  # a sanitizer reserves terabytes
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM_BYTES,) * 2)
    np.set_printoptions(threshold=4, edgeitems=1)
    warnings.simplefilter("ignore", RuntimeWarning)  # nanobind's, of objects that were never initialised
    walker = Walker(native, options.note)
    gc.freeze()  # there is a collection after each callable
    atexit.register(gc.unfreeze)  # nanobind reports as leaked what is never collected
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(range(256)) * 64)
        file.flush()
        case = Case(native, native.Runtime(2), file.name)
        calls = valid_calls(case)
        if forgotten := (callables(native) | callables(case.testing)) - calls.keys():
            print(f"no valid call of: {', '.join(sorted(forgotten))}")
            return 1
        for name, make in calls.items():
            if options.only in (None, name):
                if name in MADE_BY_OTHERS:
                    walker.call(name, getattr(native, name), (), {}, "made by itself")
                elif name in NEED_ROUNDING and not case.runtime.rounds:
                    walker.call(name, *make(), "refused on this CPU")
                else:
                    walker.walk(name, make, random.Random(name))
                gc.collect()
        walk_orders(case, walker)
    print(
        f"{walker.num_calls} calls of {len(calls)} callables, {walker.num_answers} of them answered with a result"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
