"""Each flag of a layer, alone, against float64 arithmetic in numpy: absent parts, norms, factors, activations, routers.

Every token is at position 0 of its own sequence, where attention returns its value: a layer is then a few products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native

HIDDEN, WIDTH, LATENT, EXPERTS, VOCABULARY, TOKENS = 40, 24, 16, 6, 50, 7
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
EPS = 1e-5
RNG = np.random.default_rng(11)

Values = NDArray[np.float64]
Act = tuple[str, float, float]
SILU: Act = ("silu", 0.0, 0.0)


def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def matrix(weights: NDArray[np.float32]) -> Any:
    data = np.zeros(_native.matrix_bytes("f32", *weights.shape), np.uint8)
    _native.quantize("f32", weights, data)
    return _native.Matrix(data, 0, "f32", *weights.shape)


def sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-x))


def activated(act: Act, gate: Values, up: Values) -> Values:
    kind, limit, alpha = act
    if kind == "silu":
        return gate * sigmoid(gate) * up
    if kind == "silu_limited":
        gate = np.minimum(gate, limit)
        return gate * sigmoid(gate) * up.clip(-limit, limit)
    if kind == "silu_capped":
        return np.minimum(gate * sigmoid(gate), limit) * up.clip(-limit, limit)
    if kind == "situ":
        return alpha * np.tanh(gate / alpha) * sigmoid(gate) * limit * np.tanh(up / limit)
    assert kind == "relu2"
    return np.maximum(up, 0) ** 2


def rms(x: Values, weight: Any) -> Values:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def layer_norm(x: Values, weight: Any, bias: Any = 0.0) -> Values:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weight + bias


class Attention:
    def __init__(self) -> None:
        self.q, self.k = normal(HEADS * HEAD_DIM, HIDDEN), normal(KV_HEADS * HEAD_DIM, HIDDEN)
        self.v, self.o = (
            normal(KV_HEADS * HEAD_DIM, HIDDEN, scale=0.2),
            normal(HIDDEN, HEADS * HEAD_DIM, scale=0.2),
        )

    def native(self) -> Any:
        return _native.grouped_query_attention(
            *(matrix(one) for one in (self.q, self.k, self.v, self.o)), num_heads=HEADS, window=0, scale=0.3
        )

    def __call__(self, x: Values) -> Values:
        value = (x @ self.v.T).reshape(len(x), KV_HEADS, HEAD_DIM)
        return np.repeat(value, HEADS // KV_HEADS, axis=1).reshape(len(x), -1) @ self.o.T


class Network:
    def __init__(self, act: Act = SILU, hidden: int = HIDDEN, width: int = WIDTH) -> None:
        self.act, self.up = act, normal(width, hidden, scale=0.4)
        self.down = normal(hidden, width, scale=0.2)
        self.gate = None if act[0] == "relu2" else normal(width, hidden, scale=0.4)

    def matrices(self) -> Any:
        return None if self.gate is None else matrix(self.gate), matrix(self.up), matrix(self.down)

    def __call__(self, x: Values) -> Values:
        up = x @ self.up.T
        return activated(self.act, up if self.gate is None else x @ self.gate.T, up) @ self.down.T


@dataclass
class Routed:
    """Experts, with `flags` for `routed_ffn`."""

    k: int = 2
    act: Act = SILU
    shared: Network | None = None
    has_latent: bool = False
    logit_cap: float = 0.0
    weighs_input: bool = False
    flags: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden = LATENT if self.has_latent else HIDDEN
        self.router = normal(EXPERTS, HIDDEN, scale=0.4)
        self.experts = [Network(self.act, self.hidden) for _ in range(EXPERTS)]
        self.down, self.up = normal(LATENT, HIDDEN, scale=0.3), normal(HIDDEN, LATENT, scale=0.3)

    def native(self) -> Any:
        return _native.routed_ffn(
            matrix(self.router),
            _native.Routing(self.k, score="sigmoid", renormalize=False),
            width=WIDTH,
            shared=self.shared and self.shared.matrices(),
            latent=(matrix(self.down), matrix(self.up)) if self.has_latent else None,
            router_logit_cap=self.logit_cap,
            weighs_input=self.weighs_input,
            **self.flags,
        )

    def table(self, act: Act | None = None) -> Any:
        """The experts, whose activation is the layer's if `act` is the table's."""
        sizes = [
            one.nbytes
            for one in (
                e for e in (self.experts[0].gate, self.experts[0].up, self.experts[0].down) if e is not None
            )
        ]
        starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        arena = _native.Arena(EXPERTS * sum(sizes))
        memory = arena.array()
        for number, expert in enumerate(self.experts):
            parts = [part for part in (expert.gate, expert.up, expert.down) if part is not None]
            for start, part in zip(starts, parts, strict=True):
                at = number * sum(sizes) + int(start)
                _native.quantize("f32", part, memory[at : at + part.nbytes])
        table = _native.ExpertTable(arena, hidden=self.hidden, activation=act or self.act)
        table.add_layer(
            0,
            formats=["f32"] * len(sizes),
            width=WIDTH,
            starts=np.tile(starts, (EXPERTS, 1)),
            activation=self.act if act else None,
        )
        table.place([((0, expert), expert * sum(sizes)) for expert in range(EXPERTS)])
        return table

    def routed(self, x: Values) -> Values:
        logits = x @ self.router.T
        if self.logit_cap:
            logits = self.logit_cap * np.tanh(logits / self.logit_cap)
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, : self.k]
        read = x @ self.down.T if self.has_latent else x
        out = np.zeros((len(x), self.hidden))
        for token, experts in enumerate(chosen):
            for expert in experts:
                weight = sigmoid(logits[token, expert])
                into, by = (read[token] * weight, 1.0) if self.weighs_input else (read[token], weight)
                out[token] += by * self.experts[expert](into[None])[0]
        if "latent_norm" in self.flags:
            out = rms(out, self.flags["latent_norm"])
        return out @ self.up.T if self.has_latent else out

    def __call__(self, x: Values) -> Values:
        return self.routed(x) + (self.shared(x) if self.shared else 0.0)


EMBEDDING, HEAD = normal(VOCABULARY, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.2)
NORM, OTHER, POST, FINAL = (1 + normal(HIDDEN, scale=0.3) for _ in range(4))
IDS = RNG.integers(0, VOCABULARY, TOKENS).astype(np.int32)


def stack_of(layers: list[Any], *, runtime: Any = None, has_mixer: bool = True, **flags: Any) -> Any:
    shape = _native.KvShape.keys_values(KV_HEADS, HEAD_DIM) if has_mixer else _native.KvShape.none()
    kv = _native.KvCache([shape] * len(layers), TOKENS, 4, "f32")
    return _native.Stack(
        runtime or _native.Runtime(2),
        kv,
        **{
            "embedding": matrix(EMBEDDING),
            "head": matrix(HEAD),
            "final_norm": FINAL,
            "norm_eps": EPS,
            "rotaries": [_native.Rotary(np.ones(HEAD_DIM // 2), 1.0)],
            "activation": SILU,
            "layers": layers,
            "max_tokens": TOKENS,
        }
        | flags,
    )


def begin(stack: Any, ids: NDArray[np.int32] = IDS, **more: Any) -> NDArray[np.float32]:
    """Start a step; return where its logits go."""
    count = len(ids)
    logits = np.full((count, VOCABULARY), np.nan, np.float32)
    rows = np.arange(count)
    stack.begin(
        ids, rows.astype(np.int32), 4 * rows, np.zeros(count, bool), rows.astype(np.int32)[:, None],
        np.zeros(count, np.int32), rows, logits, **more,
    )  # fmt: skip
    return logits


def logits_of(layers: list[Any], **flags: Any) -> NDArray[np.float32]:
    stack = stack_of(layers, **flags)
    logits = begin(stack)
    assert stack.advance() is None
    return logits


def require_close(found: NDArray[np.float32], expected: Values) -> None:
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


def head(x: Values) -> Values:
    return rms(x, FINAL) @ HEAD.T


X = EMBEDDING[IDS].astype(np.float64)


def test_a_layer_may_have_only_a_mixer_or_only_a_network() -> None:
    attention, network = Attention(), Network()
    mixes = _native.Layer(NORM, attention.native(), None, None)
    require_close(logits_of([mixes]), head(X + attention(rms(X, NORM))))
    feeds = _native.Layer(None, None, OTHER, _native.dense_ffn(*network.matrices()))
    require_close(logits_of([feeds], has_mixer=False), head(X + network(rms(X, OTHER))))
    routed = Routed()
    alone = _native.Layer(None, None, OTHER, routed.native())
    expected = head(X + routed(rms(X, OTHER)))
    require_close(logits_of([alone], has_mixer=False, resident=routed.table()), expected)


def test_a_layer_without_a_part_keeps_nothing_for_it() -> None:
    feeds = _native.Layer(None, None, OTHER, _native.dense_ffn(*Network().matrices()))
    with pytest.raises(ValueError, match="the layer keeps keys and values, expected one that keeps nothing"):
        stack_of([feeds])
    sizes = _native.StackSizes(HIDDEN, HEAD_DIM // 2)
    sizes.add_dense(WIDTH)
    assert stack_of([feeds], has_mixer=False).sizes == sizes


@pytest.mark.parametrize("is_routed", [False, True])
def test_a_parallel_network_reads_what_the_mixer_reads(is_routed: bool) -> None:
    attention = Attention()
    network: Any = Routed(shared=Network()) if is_routed else Network()
    ffn = network.native() if is_routed else _native.dense_ffn(*network.matrices())
    layer = _native.Layer(NORM, attention.native(), None, ffn, is_parallel=True)
    normed = rms(X, NORM)
    found = logits_of([layer], resident=network.table() if is_routed else None)
    require_close(found, head(X + attention(normed) + network(normed)))


def test_blocks_may_have_norms_only_after_them() -> None:
    attention, network = Attention(), Network()
    layer = _native.Layer(
        None, attention.native(), None, _native.dense_ffn(*network.matrices()),
        mixer_post_norm=NORM, ffn_post_norm=POST,
    )  # fmt: skip
    mixed = X + rms(attention(X), NORM)
    require_close(logits_of([layer]), head(mixed + rms(network(mixed), POST)))


@pytest.mark.parametrize("has_bias", [False, True])
def test_norms_may_be_layer_norms(has_bias: bool) -> None:
    attention, network = Attention(), Network()
    biases = [normal(HIDDEN) if has_bias else np.zeros(HIDDEN, np.float32) for _ in range(3)]
    norms = [
        np.stack([weight, bias]) if has_bias else weight
        for weight, bias in zip((NORM, OTHER, FINAL), biases, strict=True)
    ]
    layer = _native.Layer(norms[0], attention.native(), norms[1], _native.dense_ffn(*network.matrices()))
    mixed = X + attention(layer_norm(X, NORM, biases[0]))
    out = mixed + network(layer_norm(mixed, OTHER, biases[1]))
    found = logits_of([layer], final_norm=norms[2], norm_kind="layer")
    require_close(found, layer_norm(out, FINAL, biases[2]) @ HEAD.T)


@pytest.mark.parametrize("has_post_norm", [False, True])
def test_factors_multiply_what_blocks_add(has_post_norm: bool) -> None:
    attention, routed = Attention(), Routed(shared=Network())
    layer = _native.Layer(
        NORM, attention.native(), OTHER, routed.native(), mixer_scale=0.37, ffn_scale=0.5,
        ffn_post_norm=POST if has_post_norm else None,
    )  # fmt: skip
    mixed = X + np.float32(0.37) * attention(rms(X, NORM))
    added = routed(rms(mixed, OTHER))
    expected = mixed + 0.5 * (rms(added, POST) if has_post_norm else added)
    require_close(logits_of([layer], resident=routed.table()), head(expected))


def test_blocks_may_add_to_what_they_read() -> None:
    attention, network = Attention(), Network()
    layer = _native.Layer(
        NORM, attention.native(), OTHER, _native.dense_ffn(*network.matrices()), mixer_scale=0.7, ffn_scale=0.7,
        normed_residual=1.9,
    )  # fmt: skip
    read = rms(X, NORM)
    mixed = 1.9 * read + 0.7 * attention(read)
    read = rms(mixed, OTHER)
    require_close(logits_of([layer]), head(1.9 * read + 0.7 * network(read)))


def weighed(routed: Routed, x: Values, chosen: NDArray[np.int32], forbidden: int = -1) -> Values:
    """The sum of these experts [tokens, k], each with its own score."""
    out = np.zeros_like(x)
    for token, experts in enumerate(chosen):
        for expert in experts[experts != forbidden]:
            out[token] += (
                sigmoid(routed.router[expert] @ x[token]) * routed.experts[expert](x[token][None])[0]
            )
    return out


def test_a_table_gives_experts_to_tokens_and_the_router_weighs_them() -> None:
    table = RNG.integers(0, EXPERTS, (VOCABULARY, 2)).astype(np.float32)
    table[IDS[0]] = 4  # one expert twice
    routed = Routed(flags={"token_experts": matrix(table)})
    layer = _native.Layer(None, None, NORM, routed.native())
    read, chosen = rms(X, NORM), table[IDS].astype(np.int32)
    found = logits_of([layer], has_mixer=False, resident=routed.table())
    require_close(found, head(X + weighed(routed, read, chosen)))

    stack = stack_of([layer], has_mixer=False, resident=routed.table())
    stack.forbid(0, [int(chosen[1, 0])])  # still an expert of its tokens, with no weight
    logits = begin(stack)
    assert stack.advance() is None
    require_close(logits, head(X + weighed(routed, read, chosen, int(chosen[1, 0]))))

    stack = stack_of([layer], has_mixer=False, resident=routed.table())
    logits = begin(stack, overrides=(np.array([2, 5]), EMBEDDING[IDS[[2, 5]]]))  # rows without tokens choose
    assert stack.advance() is None
    expected = X + weighed(routed, read, chosen)
    expected[[2, 5]] = (X + routed(read))[[2, 5]]
    require_close(logits, head(expected))


def test_look_ahead_knows_the_experts_of_a_table() -> None:
    table = RNG.integers(0, EXPERTS, (VOCABULARY, 2)).astype(np.float32)
    first, second = Routed(), Routed(flags={"token_experts": matrix(table)})
    layers = [_native.Layer(None, None, NORM, one.native()) for one in (first, second)]
    stack = stack_of(layers, has_mixer=False)
    begin(stack)
    assert stack.advance()[0] == 0  # the first layer waits for experts
    certain, *others = stack.look_ahead()
    assert sorted(certain) == sorted({int(expert) for expert in table[IDS].ravel()})
    assert others == [[]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.full((VOCABULARY, 2), EXPERTS), "token_experts has 6.0+ in row 0; the layer has experts 0 to 5"),
        (np.full((VOCABULARY, 2), -1), "token_experts has -1"),
        (np.full((VOCABULARY, 2), np.nan), "token_experts has -?nan"),
        (np.full((VOCABULARY, 2), 0.5), "token_experts has 0.5"),
        (np.zeros((VOCABULARY, 3)), "columns of token_experts"),
        (np.zeros((VOCABULARY - 1, 2)), "rows of token_experts"),
    ],
)
def test_a_table_with_other_experts_is_refused(table: NDArray[Any], message: str) -> None:
    routed = Routed(flags={"token_experts": matrix(table.astype(np.float32))})
    with pytest.raises(ValueError, match=message):
        stack_of([_native.Layer(None, None, NORM, routed.native())], has_mixer=False)


def test_logits_are_scaled_before_they_are_capped() -> None:
    layer = _native.Layer(None, None, OTHER, _native.dense_ffn(*(network := Network()).matrices()))
    plain = head(X + network(rms(X, OTHER)))
    require_close(logits_of([layer], has_mixer=False, logit_scale=0.25), plain / 4)
    capped = logits_of([layer], has_mixer=False, logit_scale=0.25, logit_cap=0.5)
    require_close(capped, 0.5 * np.tanh(plain / 4 / 0.5))


ACTIVATIONS: list[Act] = [
    ("silu_limited", 0.4, 0.0), ("silu_capped", 0.3, 0.0), ("relu2", 0.0, 0.0), ("situ", 0.9, 0.3),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act[0])
def test_networks_and_experts_have_activations_of_their_own(act: Act) -> None:
    dense = Network(act)
    layer = _native.Layer(None, None, NORM, _native.dense_ffn(*dense.matrices(), activation=act))
    require_close(logits_of([layer], has_mixer=False), head(X + dense(rms(X, NORM))))
    shared = Routed(shared=Network(act), flags={"shared_activation": act})
    layer = _native.Layer(None, None, NORM, shared.native())
    require_close(
        logits_of([layer], has_mixer=False, resident=shared.table()), head(X + shared(rms(X, NORM)))
    )
    routed = Routed(act=act)
    layer = _native.Layer(None, None, NORM, routed.native())
    for table in (routed.table(), routed.table(SILU)):
        require_close(logits_of([layer], has_mixer=False, resident=table), head(X + routed(rms(X, NORM))))


def test_a_gate_without_its_activation_and_the_reverse_are_refused() -> None:
    relu2: Act = ("relu2", 0.0, 0.0)
    for network, act, sentence in (
        (Network(), relu2, "has a gate, which its activation does not use"),
        (Network(relu2), SILU, "has no gate, which its activation needs"),
    ):
        layer = _native.Layer(None, None, NORM, _native.dense_ffn(*network.matrices(), activation=act))
        with pytest.raises(ValueError, match=sentence):
            stack_of([layer], has_mixer=False)
    table = _native.ExpertTable(_native.Arena(64), hidden=4, activation=relu2)
    with pytest.raises(ValueError, match="of layer 0 have a gate, which their activation does not use"):
        table.add_layer(0, formats=["f32"] * 3, width=4, starts=np.zeros((1, 3), np.int64))
    with pytest.raises(ValueError, match="number of formats is 1, expected 2 to 3"):
        table.add_layer(0, formats=["f32"], width=4, starts=np.zeros((1, 1), np.int64))


ROUTED: dict[str, Callable[[], Routed]] = {
    "latent": lambda: Routed(has_latent=True, shared=Network()),
    "latent, its norm": lambda: Routed(
        has_latent=True, shared=Network(), flags={"latent_norm": POST[:LATENT]}
    ),
    "latent, post norm": lambda: Routed(has_latent=True, flags={"post_norm": POST}),
    "router cap": lambda: Routed(logit_cap=0.7),
    "weighs input": lambda: Routed(k=1, weighs_input=True, shared=Network()),
}


@pytest.mark.parametrize("name", ROUTED)
def test_routed_experts_follow_their_flags_wherever_they_run(name: str) -> None:
    routed = ROUTED[name]()
    layer = _native.Layer(None, None, NORM, routed.native())
    normed = rms(X, NORM)
    expected = rms(routed(normed), POST) if "post_norm" in routed.flags else routed(normed)
    resident = logits_of([layer], has_mixer=False, resident=routed.table())
    require_close(resident, head(X + expected))

    stack = stack_of([layer], has_mixer=False)
    logits = begin(stack)
    _, dispatch = stack.advance()
    assert stack.rows().shape == (TOKENS, routed.hidden)
    assert stack.expert_out().shape == (TOKENS * routed.k, routed.hidden)
    routed.table().run(_native.Runtime(1), 0, dispatch.experts, dispatch, stack.rows(), stack.expert_out())
    stack.run_shared()
    stack.finish_experts(dispatch.experts)
    assert stack.advance() is None
    assert np.array_equal(logits, resident)


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
def test_the_flags_keep_a_tokens_bits_in_any_batch_on_any_threads(instruction_set: str) -> None:
    routed = Routed(act=("relu2", 0.0, 0.0), has_latent=True)
    layers = [
        _native.Layer(
            NORM,
            Attention().native(),
            None,
            routed.native(),
            is_parallel=True,
            mixer_scale=0.7,
            ffn_scale=0.3,
        )
    ]
    results = []
    for threads in (1, 3):
        runtime = _native.Runtime(threads, instruction_set=instruction_set)
        stack = stack_of(layers, runtime=runtime, resident=routed.table(), norm_kind="layer")
        together = begin(stack)
        stack.advance()
        alone = []
        for token in IDS:
            logits = begin(stack, np.array([token], np.int32))
            stack.advance()
            alone.append(logits[0])
        results += [together, np.stack(alone)]
    for other in results[1:]:
        assert np.array_equal(results[0], other)


def test_a_parallel_layer_is_guessed_from_the_norm_that_it_reads() -> None:
    first, second = Routed(), Routed()
    layers = [
        _native.Layer(OTHER, Attention().native(), None, routed.native(), is_parallel=True)
        for routed in (first, second)
    ]
    stack = stack_of(layers)
    begin(stack)
    assert stack.advance() is not None
    hidden = stack.hidden().astype(np.float64)
    worth = rms(hidden, OTHER) @ second.router.T
    best = np.argsort(-worth, axis=1)[:, 0]
    assert sorted(stack.look_ahead()[0]) == sorted(set(best.tolist()))


def test_working_memory_follows_the_flags() -> None:
    routed = Routed(has_latent=True, shared=Network())
    stack = stack_of([_native.Layer(None, None, NORM, routed.native(), ffn_scale=0.5)], has_mixer=False)
    sizes = _native.StackSizes(HIDDEN, HEAD_DIM // 2)
    sizes.add_routed(EXPERTS, routed.k, WIDTH, WIDTH, latent=LATENT)
    assert stack.sizes != sizes
    sizes.add_ffn_post_norm()
    assert stack.sizes == sizes
    stack = stack_of(
        [_native.Layer(None, None, NORM, Routed(k=1, weighs_input=True).native())], has_mixer=False
    )
    sizes = _native.StackSizes(HIDDEN, HEAD_DIM // 2)
    sizes.add_routed(EXPERTS, 1, WIDTH, 0, has_own_input=True)
    assert stack.sizes == sizes


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: _native.Layer(None, None, None, None), "needs a mixer or a feed-forward network"),
    "no norm": (
        lambda: _native.Layer(None, Attention().native(), None, None),
        "needs a norm of its mixer or of its feed-forward network",
    ),
    "norm without mixer": (
        lambda: _native.Layer(NORM, None, NORM, _native.dense_ffn(*Network().matrices())),
        "norms of a mixer, but no mixer",
    ),
    "norm without network": (
        lambda: _native.Layer(NORM, Attention().native(), NORM, None),
        "norms of a feed-forward network, but no such network",
    ),
    "parallel with two norms": (
        lambda: _native.Layer(
            NORM, Attention().native(), NORM, _native.dense_ffn(*Network().matrices()), is_parallel=True
        ),
        "mixer_norm is its only norm",
    ),
    "weighed inputs of two experts": (
        lambda: Routed(weighs_input=True).native(),
        "experts_per_token with weighs_input is 2, expected 1",
    ),
    "bias of an RMSNorm": (
        lambda: stack_of([_native.Layer(np.stack([NORM, NORM]), Attention().native(), None, None)]),
        r"layers\[0\]: an RMSNorm has no bias",
    ),
    "unknown norm": (
        lambda: stack_of([_native.Layer(NORM, Attention().native(), None, None)], norm_kind="group"),
        "unknown norm_kind 'group'; known: rms, layer",
    ),
    "latent sizes that differ": (
        lambda: stack_of(
            [
                _native.Layer(None, None, NORM, Routed(has_latent=has_latent).native())
                for has_latent in (False, True)
            ],
            has_mixer=False,
        ),
        "as in the other layers, is 16, expected 40",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        make()
