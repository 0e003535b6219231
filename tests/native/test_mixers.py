"""Each flag of grouped-query and latent attention, in a stack of one layer, agrees with numpy in float64.

The layer's feed-forward network is zero, so that the hidden state after it is the embedding plus what the mixer adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native as native
from argosy.config import KvDtype

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

HIDDEN, VOCABULARY, LENGTH, BLOCK_TOKENS = 20, 60, 45, 16
HEADS, KV_HEADS, DIM, VALUE_DIM, PAIRS = 6, 2, 12, 12, 4
EPS, SCALE = 1e-5, 0.4


def normal(*shape: int, seed: int) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def matrix_of(weights: Floats) -> native.Matrix:
    return native.Matrix(np.ascontiguousarray(weights).view(np.uint8).reshape(-1), 0, "f32", *weights.shape)


def rms(x: Doubles, weight: Floats) -> Doubles:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


def gated(x: Doubles, kind: str) -> Doubles:
    return np.log1p(np.exp(x)) if kind == "softplus" else 1 / (1 + np.exp(-x))


FREQUENCY = 0.3 ** np.arange(PAIRS)


def turned(x: Doubles, positions: Doubles | None = None) -> Doubles:
    """Rotate the first dimensions of x [tokens, heads, dim], in halves."""
    positions = np.arange(len(x)) if positions is None else positions
    angle = positions[:, None, None] * FREQUENCY
    first, second = x[..., :PAIRS], x[..., PAIRS : 2 * PAIRS]
    sides = (
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    )
    return np.concatenate([*sides, x[..., 2 * PAIRS :]], axis=-1)


@dataclass(frozen=True)
class Flags:
    """What a layer does; `rotates` is the layer's, the others are the mixer's."""

    value_dim: int = VALUE_DIM
    value_scale: float = 1.0
    rotates: bool = True
    norms: str = ""  # "first" or "last": before or after rotary
    gate_rows: int = 0
    gate_kind: Any = "sigmoid"
    window: int = 0
    is_chunked: bool = False
    query_scale: tuple[float, int, int] = (0.0, 1, 0)
    pool: tuple[int, bool] | None = None  # ratio, whether groups overlap
    num_chosen: int = 0
    candidates: tuple[int, int] | None = None  # blocks of so many entries; index keys are made of entries

    def factor(self) -> Doubles:
        beta, period, offset = self.query_scale
        return 1 + beta * np.log1p((np.arange(LENGTH) + offset) // period)[:, None, None]

    def first(self, position: int) -> int:
        if self.is_chunked:
            return position // self.window * self.window
        return max(0, position - self.window + 1) if self.window else 0


def attended(flags: Flags, query: Doubles, key: Doubles, value: Doubles) -> Doubles:
    """Compute causal attention [tokens, heads * value_dim] from [tokens, heads, dim]."""
    out = np.empty((LENGTH, HEADS, value.shape[-1]))
    for t in range(LENGTH):
        for head in range(HEADS):
            seen = slice(flags.first(t), t + 1)
            scores = key[seen, head * key.shape[1] // HEADS] @ query[t, head] * SCALE
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ value[seen, head * value.shape[1] // HEADS] / weights.sum()
    return out.reshape(LENGTH, -1)


class Layer:
    """What a layer keeps besides its own store."""

    further: Sequence[native.KvShape] = ()
    state: native.StateShape | None = None


@dataclass
class GroupedQuery(Layer):
    flags: Flags
    kv: native.KvShape = field(init=False)
    mixer: native.Mixer = field(init=False)

    def __post_init__(self) -> None:
        flags = self.flags
        rows = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * flags.value_dim)
        self.query, self.key, self.value = (
            normal(n, HIDDEN, seed=i) * np.float32(0.4) for i, n in enumerate(rows)
        )
        self.output = normal(HIDDEN, HEADS * flags.value_dim, seed=3)
        self.norms = [1 + normal(DIM, seed=seed) * np.float32(0.2) for seed in (4, 5)]
        self.gate = normal(flags.gate_rows, HIDDEN, seed=6) if flags.gate_rows else None
        query_norm, key_norm = self.norms if flags.norms else (None, None)
        self.kv = native.KvShape.keys_values(KV_HEADS, DIM, value_dim=flags.value_dim)
        self.mixer = native.grouped_query_attention(
            *(matrix_of(matrix) for matrix in (self.query, self.key, self.value, self.output)),
            num_heads=HEADS,
            window=flags.window,
            scale=SCALE,
            query_norm=query_norm,
            key_norm=key_norm,
            is_norm_last=flags.norms == "last",
            value_scale=flags.value_scale,
            is_chunked=flags.is_chunked,
            gate=None if self.gate is None else matrix_of(self.gate),
            gate_kind=flags.gate_kind,
            query_scale=flags.query_scale,
        )

    def add_sizes(self, sizes: native.StackSizes) -> None:
        rows = self.flags.gate_rows
        sizes.add_attention(HEADS, KV_HEADS, DIM, False, value_dim=self.flags.value_dim, gate_rows=rows)

    def expected(self, x: Doubles) -> Doubles:
        flags = self.flags
        query, key = (x @ matrix.T for matrix in (self.query, self.key))
        query, key = query.reshape(LENGTH, HEADS, DIM), key.reshape(LENGTH, KV_HEADS, DIM)
        value = (x @ self.value.T).reshape(LENGTH, KV_HEADS, -1) * flags.value_scale
        if flags.norms == "first":
            query, key = rms(query, self.norms[0]), rms(key, self.norms[1])
        if flags.rotates:
            query, key = turned(query), turned(key)
        if flags.norms == "last":
            query, key = rms(query, self.norms[0]), rms(key, self.norms[1])
        out = attended(flags, query * flags.factor(), key, value)
        if self.gate is not None:
            by = gated(x @ self.gate.T, flags.gate_kind)
            out *= np.repeat(by, out.shape[1] // by.shape[1], axis=1)
        return out @ self.output.T


RANK, NOPE = 10, 7


@dataclass
class Latent(Layer):
    flags: Flags
    kv: native.KvShape = field(init=False)
    mixer: native.Mixer = field(init=False)

    def __post_init__(self) -> None:
        flags, rope = self.flags, 2 * PAIRS
        self.query = normal(HEADS * (NOPE + rope), HIDDEN, seed=10) * np.float32(0.4)
        self.down = normal(RANK + rope, HIDDEN, seed=11) * np.float32(0.4)
        self.key_up = normal(HEADS, RANK, NOPE, seed=12)
        self.value_up = normal(HEADS, flags.value_dim, RANK, seed=13)
        self.output = normal(HIDDEN, HEADS * flags.value_dim, seed=14) * np.float32(0.5)
        self.norm = 1 + normal(RANK, seed=15) * np.float32(0.2)
        self.gate = normal(flags.gate_rows, HIDDEN, seed=16) if flags.gate_rows else None
        self.kv = native.KvShape.latent(RANK + rope)
        self.mixer = native.multi_head_latent_attention(
            matrix_of(self.query),
            matrix_of(self.down),
            matrix_of(self.key_up.reshape(-1, NOPE)),
            matrix_of(self.value_up.reshape(-1, RANK)),
            matrix_of(self.output),
            num_heads=HEADS,
            rope_dim=rope,
            scale=SCALE,
            norm_eps=EPS,
            kv_norm=self.norm,
            gate=None if self.gate is None else matrix_of(self.gate),
            gate_kind=flags.gate_kind,
            query_scale=flags.query_scale,
        )

    def add_sizes(self, sizes: native.StackSizes) -> None:
        flags = self.flags
        sizes.add_latent_attention(
            HEADS, NOPE, 2 * PAIRS, RANK, flags.value_dim, 0, gate_rows=flags.gate_rows
        )

    def expected(self, x: Doubles) -> Doubles:
        flags = self.flags
        query, down = (x @ self.query.T).reshape(LENGTH, HEADS, -1), x @ self.down.T
        latent, rope = rms(down[:, :RANK], self.norm), down[:, None, RANK:]
        turning = query[..., NOPE:]
        if flags.rotates:
            turning, rope = turned(turning), turned(rope)
        key = np.concatenate(
            [
                np.einsum("tr,hrn->thn", latent, self.key_up),
                np.broadcast_to(rope, (LENGTH, HEADS, 2 * PAIRS)),
            ],
            axis=-1,
        )
        query = np.concatenate([query[..., :NOPE], turning], axis=-1) * flags.factor()
        out = attended(flags, query, key, np.einsum("tr,hvr->thv", latent, self.value_up))
        if self.gate is not None:
            by = gated(x @ self.gate.T, flags.gate_kind)
            out *= np.repeat(by, out.shape[1] // by.shape[1], axis=1)
        return out @ self.output.T


GROUPS, GROUP_RANK = 3, 4
INDEX_HEADS, INDEX_DIM = 2, 10


class Pooling:
    """The weights of a pool, and its entries."""

    def __init__(self, ratio: int, has_overlap: bool, dim: int, store: int) -> None:
        columns = 2 * dim if has_overlap else dim
        self.ratio, self.dim, self.sizes = ratio, dim, (ratio, dim, has_overlap)
        self.vectors, self.gates = (normal(columns, HIDDEN, seed=seed) for seed in (40, 41))
        self.bias = normal(ratio, columns, seed=42)
        self.norm = 1 + normal(dim, seed=43) * np.float32(0.2)
        self.native = native.Pool(
            matrix_of(self.vectors),
            matrix_of(self.gates),
            sizes=self.sizes,
            bias=self.bias,
            norm=self.norm,
            store=store,
        )

    def entries(self, x: Doubles) -> Doubles:
        return self.placed(self.unplaced(x))

    def placed(self, entries: Doubles) -> Doubles:
        return turned_last(entries[:, None], positions=self.ratio * np.arange(len(entries)))[:, 0]

    def unplaced(self, x: Doubles) -> Doubles:
        count = LENGTH // self.ratio
        groups = x[: count * self.ratio].reshape(count, self.ratio, HIDDEN)
        vectors, gates = groups @ self.vectors.T, groups @ self.gates.T + self.bias
        if vectors.shape[-1] > self.dim:  # the first halves join the next entry
            before = np.zeros_like(vectors[:1, :, : self.dim])
            vectors, gates = (
                np.concatenate([np.concatenate([first, y[:-1, :, : self.dim]]), y[..., self.dim :]], axis=1)
                for y, first in ((vectors, before), (gates, before - np.inf))
            )
        weights = np.exp(gates - gates.max(axis=1, keepdims=True))
        return rms((weights * vectors).sum(axis=1) / weights.sum(axis=1), self.norm)


def turned_last(x: Doubles, *, back: bool = False, positions: Doubles | None = None) -> Doubles:
    # Turning back is turning with the two halves of the pairs exchanged.
    order = np.roll(np.arange(2 * PAIRS), PAIRS if back else 0)
    first, last = x[..., : -2 * PAIRS], x[..., -2 * PAIRS :]
    return np.concatenate([first, turned(last[..., order], positions)[..., order]], axis=-1)


@dataclass
class Compressed(Layer):
    flags: Flags
    kv: native.KvShape = field(init=False)
    mixer: native.Mixer = field(init=False)

    def __post_init__(self) -> None:
        flags = self.flags
        self.down, self.key_value = normal(RANK, HIDDEN, seed=30), normal(DIM, HIDDEN, seed=31)
        self.query = normal(HEADS * DIM, RANK, seed=32) * np.float32(0.4)
        self.group_output = normal(GROUPS, GROUP_RANK, HEADS // GROUPS * DIM, seed=33) * np.float32(0.4)
        self.output = normal(HIDDEN, GROUPS * GROUP_RANK, seed=34)
        self.norms = [1 + normal(dim, seed=35) * np.float32(0.2) for dim in (RANK, DIM, DIM)]
        self.sinks = normal(HEADS, seed=36)
        self.kv = native.KvShape.latent(DIM)
        self.pool, self.keys, indexer = None, None, None
        if flags.pool:
            self.pool = Pooling(*flags.pool, DIM, 1)
            self.further = [native.KvShape.pooled(DIM, flags.pool[0])]
            pools = [self.pool.sizes]
            if flags.num_chosen:
                self.further.append(native.KvShape.pooled(INDEX_DIM, flags.pool[0]))
                self.key, self.key_norm = normal(INDEX_DIM, DIM, seed=44), 1 + normal(INDEX_DIM, seed=45) / 9
                if not flags.candidates:
                    self.keys = Pooling(*flags.pool, INDEX_DIM, 2)
                    pools.append(self.keys.sizes)
                self.index_query = normal(INDEX_HEADS * INDEX_DIM, RANK, seed=37)
                self.index_weights = normal(INDEX_HEADS, HIDDEN, seed=38)
                indexer = native.EntryIndexer(
                    matrix_of(self.index_query),
                    matrix_of(self.index_weights),
                    pool=self.keys and self.keys.native,
                    key=matrix_of(self.key) if flags.candidates else None,
                    key_norm=self.key_norm if flags.candidates else None,
                    store=2,
                    candidates=flags.candidates,
                    finds_candidates=flags.candidates is not None,
                )
            state = native.StateShape.pools(pools)
            self.state = state if state.matrix_floats else None
        self.mixer = native.compressed_attention(
            *(matrix_of(matrix) for matrix in (self.down, self.query, self.key_value)),
            matrix_of(self.group_output.reshape(GROUPS * GROUP_RANK, -1)),
            matrix_of(self.output),
            num_heads=HEADS,
            num_groups=GROUPS,
            rope_dim=2 * PAIRS if flags.rotates else 0,
            window=flags.window,
            scale=SCALE,
            norm_eps=EPS,
            query_norm=self.norms[0],
            kv_norm=self.norms[1],
            head_norm=self.norms[2] if flags.norms else None,
            sinks=self.sinks,
            pool=self.pool and self.pool.native,
            indexer=indexer,
            num_chosen=flags.num_chosen,
        )

    def add_sizes(self, sizes: native.StackSizes) -> None:
        sizes.add_compressed_attention(
            HEADS,
            DIM,
            RANK,
            GROUPS,
            GROUP_RANK,
            rope_dim=2 * PAIRS,
            pool=self.pool and self.pool.sizes,
            has_gates=True,
            num_chosen=self.flags.num_chosen,
            index=(INDEX_HEADS, INDEX_DIM) if self.flags.num_chosen else None,
            keys=self.keys and self.keys.sizes,
            has_entry_keys=self.flags.candidates is not None,
            candidates=self.flags.candidates,
        )

    def chosen(self, x: Doubles, query_latent: Doubles) -> list[NDArray[np.intp]]:
        """Return the entries that each token sees."""
        assert self.pool is not None
        counts = (np.arange(LENGTH) + 1) // self.pool.ratio
        if not self.flags.num_chosen:
            return [np.arange(count) for count in counts]
        if self.keys is not None:
            keys = self.keys.entries(x)
        else:
            keys = self.pool.placed(rms(self.pool.unplaced(x) @ self.key.T, self.key_norm))
        query = turned_last((query_latent @ self.index_query.T).reshape(LENGTH, INDEX_HEADS, -1))
        scores = np.einsum("th,thk->tk", x @ self.index_weights.T, np.maximum(query @ keys.T, 0))
        best = (np.argsort(-scores[t, :count], kind="stable") for t, count in enumerate(counts))
        return [np.sort(one[: self.flags.num_chosen]) for one in best]

    def expected(self, x: Doubles) -> Doubles:
        flags = self.flags
        query_latent = rms(x @ self.down.T, self.norms[0])
        query = (query_latent @ self.query.T).reshape(LENGTH, HEADS, DIM)
        query = rms(query, self.norms[2]) if flags.norms else query
        vectors = rms(x @ self.key_value.T, self.norms[1])
        if flags.rotates:
            query, vectors = turned_last(query), turned_last(vectors[:, None])[:, 0]
        entries = self.pool.entries(x) if self.pool else np.empty((0, DIM))
        chosen = self.chosen(x, query_latent) if self.pool else [np.empty(0, int)] * LENGTH
        out = np.empty_like(query)
        for t in range(LENGTH):
            seen = np.concatenate([vectors[flags.first(t) : t + 1], entries[chosen[t]]])
            weights = np.exp(query[t] @ seen.T * SCALE)
            out[t] = weights @ seen / (weights.sum(axis=1) + np.exp(self.sinks))[:, None]
        out = turned_last(out, back=True) if flags.rotates else out
        grouped = out.reshape(LENGTH, GROUPS, -1)
        return np.einsum("tgd,grd->tgr", grouped, self.group_output).reshape(LENGTH, -1) @ self.output.T


Case = GroupedQuery | Latent | Compressed


def run(runtime: native.Runtime, case: Case, dtype: KvDtype, chunk: int) -> tuple[Floats, Floats]:
    """Run LENGTH tokens, `chunk` at a time; return their embeddings, and their hidden states after the layer."""
    embedding, ones, zeros = (
        normal(VOCABULARY, HIDDEN, seed=20),
        np.ones(HIDDEN, np.float32),
        matrix_of(np.zeros((HIDDEN, HIDDEN), np.float32)),
    )
    layer = native.Layer(
        ones,
        case.mixer,
        ones,
        native.dense_ffn(zeros, zeros, zeros),
        rotary=0 if case.flags.rotates else None,
    )
    num_blocks = -(-LENGTH // BLOCK_TOKENS)
    stack = native.Stack(
        runtime,
        native.KvCache([case.kv, *case.further], num_blocks, BLOCK_TOKENS, dtype),
        embedding=matrix_of(embedding),
        head=matrix_of(embedding),
        final_norm=ones,
        norm_eps=EPS,
        rotaries=[native.Rotary(FREQUENCY, 1.0)],
        activation=("silu", 0.0, 0.0),
        layers=[layer],
        max_tokens=LENGTH,
        recurrent=None if case.state is None else native.RecurrentState(1, [case.state]),
    )
    sizes = native.StackSizes(HIDDEN, PAIRS)
    case.add_sizes(sizes)
    sizes.add_dense(HIDDEN)
    assert stack.sizes == sizes
    ids = np.arange(LENGTH, dtype=np.int32)
    hidden = np.empty((LENGTH, HIDDEN), np.float32)
    for begin in range(0, LENGTH, chunk):
        order = ids[begin : begin + chunk]
        stack.begin(
            order,
            np.zeros_like(order),
            order.astype(np.int64),
            np.zeros(len(order), np.bool_),
            np.arange(num_blocks, dtype=np.int32)[None],
            order,
            np.empty(0, np.int64),
            np.empty((0, VOCABULARY), np.float32),
            taps=[(0, hidden[begin : begin + chunk])],
            state_slots=None if case.state is None else np.zeros(1, np.int32),
        )
        assert stack.advance() is None
    return embedding[:LENGTH], hidden


FLAGS = {
    "plain": Flags(),
    "values_narrower": Flags(value_dim=5),
    "values_wider": Flags(value_dim=33),
    "value_scale": Flags(value_scale=0.707),
    "no_rotary": Flags(rotates=False),
    "norms": Flags(norms="first"),
    "norms_last": Flags(norms="last"),
    "gate_of_heads": Flags(gate_rows=HEADS),
    "gate_of_elements": Flags(gate_rows=HEADS * VALUE_DIM),
    "softplus_of_heads": Flags(gate_rows=HEADS, gate_kind="softplus"),
    "softplus_of_elements": Flags(gate_rows=HEADS * VALUE_DIM, gate_kind="softplus"),
    "chunks": Flags(window=14, is_chunked=True),
    "query_scale": Flags(query_scale=(0.7, 9, 1)),
    "all": Flags(
        value_dim=9, value_scale=1.4, norms="last", gate_rows=HEADS, window=14, is_chunked=True,
        query_scale=(0.7, 9, 0),
    ),
}  # fmt: skip
OF_LATENT = ("plain", "values_narrower", "no_rotary", "gate_of_heads", "softplus_of_elements", "query_scale")
CASES = [
    *(pytest.param(GroupedQuery, flags, id=name) for name, flags in FLAGS.items()),
    *(pytest.param(Latent, FLAGS[name], id=f"latent-{name}") for name in OF_LATENT),
    pytest.param(Compressed, Flags(window=14), id="compressed"),
    pytest.param(Compressed, Flags(window=99, norms="first"), id="compressed-norms"),
    pytest.param(Compressed, Flags(window=1, rotates=False), id="compressed-no_rotary"),
    pytest.param(Compressed, Flags(window=9, pool=(4, True)), id="compressed-pool"),
    pytest.param(Compressed, Flags(window=9, pool=(32, False)), id="compressed-pool_of_blocks"),
    pytest.param(Compressed, Flags(window=9, pool=(1, False), num_chosen=7), id="compressed-every_position"),
    pytest.param(Compressed, Flags(window=9, pool=(4, True), num_chosen=5), id="compressed-index"),
    # The choice inside the best blocks is that among all entries.
    pytest.param(
        Compressed,
        Flags(window=9, pool=(1, False), num_chosen=5, candidates=(6, 3)),
        id="compressed-candidates",
    ),
    pytest.param(
        Compressed,
        Flags(window=9, pool=(2, False), num_chosen=7, candidates=(5, 2)),
        id="compressed-few_blocks",
    ),
]


@pytest.mark.parametrize(("kind", "flags"), CASES)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_a_flag_of_a_mixer_meets_numpy_in_every_format_and_chunk(
    kind: type[Case], flags: Flags, instruction_set: str
) -> None:
    case, runtime = kind(flags), native.Runtime(2, instruction_set=instruction_set)
    for dtype in get_args(KvDtype):
        embedding, together = run(runtime, case, dtype, LENGTH)
        added = case.expected(rms(embedding.astype(np.float64), np.ones(HIDDEN, np.float32)))
        error = np.abs(together - embedding - added).max() / np.abs(added).max()
        exact = 2e-4 if instruction_set == "amx" else 4e-6  # tiles keep 16 bits of a number
        # Rounded index keys may choose other entries.
        if dtype == "f32" or not flags.num_chosen:
            assert error < {"f32": exact, "f16": max(exact, 2e-3), "q8": 5e-2}[dtype]
        for chunk in (1, 7):
            assert np.array_equal(run(runtime, case, dtype, chunk)[1], together)
    runtime.close()


def test_sizes_of_gates_and_values_are_checked() -> None:
    runtime = native.Runtime(1)
    for flags, message in (
        (Flags(gate_rows=HEADS + 1), "rows of gate is 7, expected 72"),
        (Flags(query_scale=(0.1, 0, 0)), "period"),
        (Flags(gate_kind="tanh"), "gate_kind"),
    ):
        with pytest.raises(ValueError, match=message):
            run(runtime, GroupedQuery(flags), "f32", 1)
    case = GroupedQuery(Flags(value_dim=9))
    case.kv = native.KvShape.keys_values(KV_HEADS, DIM)
    with pytest.raises(ValueError, match="rows of value"):
        run(runtime, case, "f32", 1)
    runtime.close()
