"""Residual streams in a stack, against float64 arithmetic in numpy, and in steps of other sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from tests.model.test_stack_flags import (
    EMBEDDING,
    EXPERTS,
    FINAL,
    HEAD,
    HIDDEN,
    IDS,
    SILU,
    TOKENS,
    VOCABULARY,
    Attention,
    Network,
    Routed,
    Values,
    begin,
    matrix,
    normal,
    require_close,
    rms,
    sigmoid,
    stack_of,
)

STREAMS, RANK, STREAM_EPS = 3, 5, 1e-3
MAGNITUDE = 1.3  # of streams that are not mixed


class Sinkhorn:
    def __init__(self, *, is_head: bool = False) -> None:
        rows = STREAMS if is_head else STREAMS * (2 + STREAMS)
        self.matrix, self.base = normal(rows, STREAMS * HIDDEN, scale=0.1), normal(rows)
        self.scale = normal(1 if is_head else 3)

    def native(self) -> Any:
        return _native.sinkhorn_mix(matrix(self.matrix), self.base, self.scale)

    def weights(self, streams: Values, iterations: int) -> tuple[Values, Values, Values]:
        flat = rms(streams.reshape(len(streams), -1), 1.0) @ self.matrix.T
        n, base = STREAMS, self.base
        pre = sigmoid(flat[:, :n] * self.scale[0] + base[:n]) + STREAM_EPS
        if len(base) == n:
            return pre, pre, pre
        post = 2 * sigmoid(flat[:, n : 2 * n] * self.scale[1] + base[n : 2 * n])
        mixed = np.exp((flat[:, 2 * n :] * self.scale[2] + base[2 * n :]).reshape(-1, n, n))
        mixed = mixed / mixed.sum(axis=2, keepdims=True) + STREAM_EPS
        mixed = mixed / (mixed.sum(axis=1, keepdims=True) + STREAM_EPS)
        for _ in range(iterations - 1):
            mixed = mixed / (mixed.sum(axis=2, keepdims=True) + STREAM_EPS)
            mixed = mixed / (mixed.sum(axis=1, keepdims=True) + STREAM_EPS)
        return pre, post, mixed


class Independent(Sinkhorn):
    """Streams are written, and not mixed."""

    def __init__(self, *, is_head: bool = False) -> None:
        rows = STREAMS if is_head else 2 * STREAMS
        self.matrix, self.base = normal(rows, STREAMS * HIDDEN, scale=0.1), normal(rows)
        self.scale = normal(1 if is_head else 2)

    def weights(self, streams: Values, iterations: int) -> tuple[Values, Values, Values]:
        flat = rms(streams.reshape(len(streams), -1), 1.0) @ self.matrix.T
        gates = sigmoid(flat * np.repeat(self.scale, STREAMS) + self.base)
        mixed = np.repeat(np.eye(STREAMS)[None], len(streams), axis=0)
        return gates[:, :STREAMS] + STREAM_EPS, MAGNITUDE * gates[:, STREAMS:] + STREAM_EPS, mixed


class Gated:
    def __init__(self, *, is_head: bool = False) -> None:
        width = STREAMS * HIDDEN
        self.norm, self.down = 1 + normal(width, scale=0.3), normal(RANK, width, scale=0.2)
        self.up = normal(width, RANK, scale=0.4)
        self.inject = None if is_head else normal(STREAMS, width, scale=0.2)

    def native(self) -> Any:
        inject = None if self.inject is None else matrix(self.inject)
        return _native.gated_mix(self.norm, matrix(self.down), matrix(self.up), inject)

    def read(self, streams: Values) -> tuple[Values, Values]:
        normed = rms(streams, self.norm.reshape(STREAMS, HIDDEN))
        flat = normed.reshape(len(streams), -1)
        low = flat @ self.down.T / STREAMS
        gates = sigmoid((low * sigmoid(low)) @ self.up.T).reshape(streams.shape)
        into = np.zeros(0) if self.inject is None else 2 * sigmoid(flat @ self.inject.T / STREAMS)
        return (gates * normed).mean(axis=1), into


class Bank:
    """The first of two sublayers of a layer starts a block."""

    def __init__(self) -> None:
        self.weight, self.starts_block = normal(HIDDEN, scale=0.5), False

    def native(self) -> Any:
        return _native.bank_mix(self.weight, self.starts_block)

    def read(self, states: list[Values]) -> Values:
        scores = np.stack([rms(one, self.weight).sum(axis=1) for one in states])
        shares = np.exp(scores) / np.exp(scores).sum(axis=0)
        mixed: Values = (shares[..., None] * np.stack(states)).sum(axis=0)
        return mixed


class Part:
    """A sublayer with its norm and its mix."""

    def __init__(self, run: Any, mix: Any) -> None:
        self.run, self.mix, self.norm = run, mix, 1 + normal(HIDDEN, scale=0.3)


def build(kind: type, *, is_routed: bool = False) -> list[Part]:
    runs = [Attention(), Routed() if is_routed else Network(), Attention(), Network()]
    parts = [Part(run, kind()) for run in runs]
    for part in parts[::2]:
        if isinstance(part.mix, Bank):
            part.mix.starts_block = True
    return parts


def native_layers(parts: list[Part]) -> list[Any]:
    layers = []
    for mixer, ffn in zip(parts[::2], parts[1::2], strict=True):
        network = ffn.run.native() if isinstance(ffn.run, Routed) else _native.dense_ffn(*ffn.run.matrices())
        layers.append(
            _native.Layer(
                mixer.norm, mixer.run.native(), ffn.norm, network, rotary=None,
                mixer_mix=mixer.mix.native(), ffn_mix=ffn.mix.native(),
            )
        )  # fmt: skip
    return layers


def expected_of(parts: list[Part], head: Any, *, is_lagged: bool, iterations: int) -> Values:
    """Logits of IDS; `head` is a mix, or "mean" or "carried"."""
    streams = np.repeat(EMBEDDING[IDS].astype(float)[:, None], STREAMS, axis=1)
    carried = np.zeros((TOKENS, STREAMS))
    carried[:, 0] = 1
    bank: list[Values] = []
    for part in parts:
        if isinstance(part.mix, Bank):
            state = streams[:, 0].copy()
            out = part.run(rms(part.mix.read([*bank, state]), part.norm))
            bank, state = ([*bank, state], 0 * state) if part.mix.starts_block else (bank, state)
            streams[:, 0] = state + out
            continue
        if isinstance(part.mix, Gated):
            read, into = part.mix.read(streams)
            streams = streams + into[..., None] * part.run(rms(read, part.norm))[:, None]
            continue
        pre, post, mixed = part.mix.weights(streams, iterations)
        read = ((carried if is_lagged else pre)[..., None] * streams).sum(axis=1)
        out = part.run(rms(read, part.norm))
        streams = post[..., None] * out[:, None] + np.einsum("nij,nid->njd", mixed, streams)
        carried = pre
    if isinstance(head, Bank):
        last = head.read([*bank, streams[:, 0]])
    elif isinstance(head, Gated):
        last = head.read(streams)[0]
    elif isinstance(head, Sinkhorn):
        last = (head.weights(streams, 1)[0][..., None] * streams).sum(axis=1)
    else:
        last = streams.mean(axis=1) if head == "mean" else (carried[..., None] * streams).sum(axis=1)
    return rms(last, FINAL) @ HEAD.T


def residual_of(head: Any, *, is_lagged: bool = False, iterations: int = 1) -> Any:
    made = {"mean": _native.mean_mix, "carried": _native.carried_mix}
    mix = made[head]() if isinstance(head, str) else head.native()
    return _native.Residual(
        STREAMS, mix, iterations=iterations, eps=STREAM_EPS, is_lagged=is_lagged,
        magnitude=2.0 if iterations else MAGNITUDE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "head", "is_lagged", "iterations"),
    [
        (Sinkhorn, Sinkhorn(is_head=True), False, 4),
        (Sinkhorn, "mean", False, 1),
        (Sinkhorn, "carried", True, 3),
        (Independent, Independent(is_head=True), False, 0),
        (Independent, "carried", True, 0),
        (Gated, Gated(is_head=True), False, 0),
        (Bank, Bank(), False, 0),
    ],
    ids=["own head", "mean", "lagged", "independent", "independent lagged", "gated", "bank"],
)
def test_streams_are_mixed_as_the_formulas_say(
    kind: type, head: Any, is_lagged: bool, iterations: int
) -> None:
    parts = build(kind)
    rule = residual_of(head, is_lagged=is_lagged, iterations=iterations)
    expected = expected_of(parts, head, is_lagged=is_lagged, iterations=iterations)
    found = []
    for threads in (1, 2):
        stack = stack_of(native_layers(parts), residual=rule, runtime=_native.Runtime(threads))
        found.append(begin(stack))
        assert stack.advance() is None
        require_close(found[-1], expected)
    assert np.array_equal(*found)
    for token in range(TOKENS):  # alone as beside others
        alone = begin(stack, IDS[token : token + 1])
        assert stack.advance() is None
        assert np.array_equal(alone[0], found[0][token])


def test_experts_write_to_streams_and_the_look_ahead_reads_them() -> None:
    parts = build(Sinkhorn, is_routed=True)
    rule = residual_of("mean")
    expected = expected_of(parts, "mean", is_lagged=False, iterations=1)
    routed = parts[1].run
    whole = stack_of(native_layers(parts), residual=rule, resident=routed.table())
    found = begin(whole)
    assert whole.advance() is None
    require_close(found, expected)

    stack = stack_of(native_layers(parts), residual=rule)
    waiting = begin(stack)
    result = stack.advance()
    assert result is not None
    dispatch = result[1]
    rows, out = stack.rows(), stack.expert_out()
    stack.run_shared()
    routed.table().run(_native.Runtime(1), 0, dispatch.experts, dispatch, rows, out)
    assert stack.look_ahead() == []
    stack.finish_experts(dispatch.experts)
    assert stack.advance() is None
    assert np.array_equal(waiting, found)


@pytest.mark.parametrize(
    ("kind", "head", "is_lagged"),
    [
        (Sinkhorn, "mean", False),
        (Sinkhorn, "carried", True),
        (Independent, "mean", False),
        (Gated, Gated(is_head=True), False),
        (Bank, Bank(), False),
    ],
    ids=["mean", "lagged", "independent", "gated", "bank"],
)
def test_a_look_ahead_is_right_about_streams_to_which_nothing_is_added(
    kind: type, head: Any, is_lagged: bool
) -> None:
    runs: list[Any] = [Attention(), Network(), Attention(), Routed(), Attention(), Routed(k=EXPERTS)]
    runs[4].o *= 0
    parts = [Part(run, kind()) for run in runs]
    for number, part in enumerate(parts):
        if type(part.mix) is Sinkhorn:  # each sublayer writes to one stream, and streams change places
            write, mixed = np.split(part.mix.base[STREAMS:], [STREAMS])
            write[:] = 8 * np.eye(STREAMS)[number % STREAMS] - 4
            mixed[:] = 8 * np.roll(np.eye(STREAMS), 1, axis=1).ravel()
    rule = residual_of(head, is_lagged=is_lagged, iterations=0 if kind is Independent else 2)
    stack = stack_of(native_layers(parts), residual=rule)
    for token in range(TOKENS):
        begin(stack, IDS[token : token + 1])
        _, dispatch = stack.advance()
        guessed = stack.look_ahead()
        stack.expert_out()[:] = 0
        stack.finish_experts(dispatch.experts)
        assert stack.advance() is not None
        assert guessed == [[expert] for expert in stack.expert_ids()[0]]


@pytest.mark.parametrize(("kind", "head"), [(Sinkhorn, "mean"), (Bank, Bank())], ids=["streams", "bank"])
def test_taps_and_additions_see_all_streams_or_the_hidden_state(kind: type, head: Any) -> None:
    parts = build(kind)
    stack = stack_of(native_layers(parts), residual=residual_of(head))
    added = normal(1, HIDDEN)

    def tapped(additions: Any) -> NDArray[np.float32]:
        count, rows = len(IDS), np.arange(len(IDS))
        hidden = np.empty((count, HIDDEN), np.float32)
        stack.begin(
            IDS, rows.astype(np.int32), 4 * rows, np.zeros(count, bool), rows.astype(np.int32)[:, None],
            np.zeros(count, np.int32), rows, np.empty((count, VOCABULARY), np.float32), additions=additions,
            taps=[(0, hidden)],
        )  # fmt: skip
        assert stack.advance() is None
        return hidden

    plain, more = tapped([]), tapped([(0, np.array([2]), added)])
    difference = more - plain
    np.testing.assert_allclose(difference[2], added[0], atol=1e-5)
    assert not difference[[0, 1, 3, 4, 5, 6]].any()


@pytest.mark.parametrize(
    ("layer", "flags", "message"),
    [
        ({"ffn_mix": None}, {}, "have a mix each"),
        ({"scale": 2.0}, {}, "neither scale nor normed_residual"),
        ({"ffn_mix": Gated(is_head=True).native()}, {}, "inject belongs to every mix"),
        ({"ffn_mix": _native.mean_mix()}, {}, "only the head reads"),
        (
            {"ffn_mix": Gated().native()},
            {"residual": residual_of("carried", is_lagged=True)},
            "carry no weights",
        ),
        ({"ffn_mix": _native.bank_mix(FINAL)}, {}, "all mixes of a stack"),
        ({}, {"residual": None}, "but the stack has one stream"),
        ({}, {"residual": _native.Residual(STREAMS + 1, _native.mean_mix())}, "rows of a mix"),
        ({}, {"residual": _native.Residual(STREAMS, _native.carried_mix())}, "unless is_lagged"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_mixes_that_do_not_fit_are_refused(layer: Any, flags: Any, message: str) -> None:
    mixes = {"mixer_mix": Sinkhorn().native(), "ffn_mix": Sinkhorn().native()}
    made = _native.Layer(
        FINAL, Attention().native(), FINAL, _native.dense_ffn(*Network(SILU).matrices()), **mixes | layer
    )
    with pytest.raises(ValueError, match=message):
        stack_of([made], **{"residual": residual_of("mean")} | flags)


def test_a_bank_has_room_for_its_blocks_and_the_size_of_the_hidden_state() -> None:
    parts = build(Bank)
    layers = native_layers(parts)
    with pytest.raises(ValueError, match="blocks that start is 2, expected 0 to 1"):
        stack_of(layers, residual=_native.Residual(2, Bank().native()))
    with pytest.raises(ValueError, match="size of weight"):
        stack_of(layers, residual=_native.Residual(3, _native.bank_mix(FINAL[:-1])))
    with pytest.raises(ValueError, match="only sublayers start a block"):
        stack_of(layers, residual=_native.Residual(3, _native.bank_mix(FINAL, starts_block=True)))


def test_a_residual_has_two_streams_or_more() -> None:
    for count in (1, 17):
        with pytest.raises(ValueError, match="num_streams"):
            _native.Residual(count, _native.mean_mix())
