"""The n-gram sublayer in a stack, against float64 arithmetic in numpy, and in steps of other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from argosy import _native
from argosy.errors import ReadFailed
from tests.model.test_residual import Gated, residual_of
from tests.model.test_stack_flags import (
    EMBEDDING,
    FINAL,
    HEAD,
    HIDDEN,
    IDS,
    TOKENS,
    VOCABULARY,
    Network,
    Values,
    matrix,
    normal,
    require_close,
    rms,
    sigmoid,
    stack_of,
)
from tests.native._native_testing import FaultyFileSystem

STREAMS = 3  # of test_residual.py
TABLE_ROWS, ROW_DIM, PER_TOKEN = 90, 12, 4
WIDTH, TAPS, DILATION = ROW_DIM * PER_TOKEN, 3, 2
TABLE = normal(TABLE_ROWS, ROW_DIM)
ROWS = np.random.default_rng(5).integers(0, TABLE_ROWS, (TOKENS, PER_TOKEN))


class Sublayer:
    def __init__(self, streams: int, *, has_conv: bool) -> None:
        width = streams * HIDDEN
        self.streams, self.has_conv = streams, has_conv
        self.key, self.value = normal(width, WIDTH, scale=0.3), normal(HIDDEN, WIDTH, scale=0.3)
        self.norms = [1 + normal(width, scale=0.3) for _ in range(3)]
        self.taps = normal(TAPS, width)

    @property
    def span(self) -> int:
        return (TAPS - 1) * DILATION + 1

    def native(self, table: Any) -> Any:
        conv = np.zeros((self.span, self.streams * HIDDEN), np.float32)
        conv[::DILATION] = self.taps
        more = {"conv": conv, "conv_norm": self.norms[2]} if self.has_conv else {}
        return _native.ngrams(
            table,
            matrix(self.key),
            matrix(self.value),
            key_norm=self.norms[0],
            query_norm=self.norms[1],
            **more,
        )

    def __call__(self, streams: Values) -> Values:
        """Add to [tokens of one sequence, streams, hidden]."""
        x = TABLE[ROWS].reshape(len(streams), -1).astype(float)
        key_norm, query_norm, conv_norm = (norm.reshape(self.streams, HIDDEN) for norm in self.norms)
        keys = rms((x @ self.key.T).reshape(streams.shape), key_norm)
        dots = (keys * rms(streams, query_norm)).sum(axis=2) / np.sqrt(HIDDEN)
        gates = sigmoid(np.sign(dots) * np.sqrt(np.maximum(np.abs(dots), 1e-6)))
        gated = gates[:, :, None] * (x @ self.value.T)[:, None]
        if not self.has_conv:
            return streams + gated
        normed = rms(gated, conv_norm)
        mixed = np.zeros_like(gated)
        for tap, weights in enumerate(self.taps.reshape(TAPS, self.streams, HIDDEN)):
            back = (TAPS - 1 - tap) * DILATION
            mixed[back:] += weights * normed[: len(normed) - back]
        return streams + gated + mixed * sigmoid(mixed)


@pytest.fixture
def table(tmp_path: Path) -> Any:
    (tmp_path / "table.bin").write_bytes(TABLE.tobytes())
    store = _native.Store(1)
    parts = [(None, [(0, store.open(str(tmp_path / "table.bin")), 0)])]
    yield _native.TableRows(store, "f32", TABLE_ROWS, ROW_DIM, parts, 2000, TOKENS * PER_TOKEN)
    store.close()


class Rig:
    """A stack of two networks, with the sublayer before the second."""

    def __init__(self, streams: int, table: Any, *, has_conv: bool, threads: int = 1) -> None:
        self.sublayer, self.networks = Sublayer(streams, has_conv=has_conv), [Network(), Network()]
        self.norms = [1 + normal(HIDDEN, scale=0.3) for _ in self.networks]
        self.mixes = [Gated() for _ in self.networks] if streams > 1 else [None, None]
        self.head = Gated(is_head=True)
        self.table, self.streams = table, streams
        self.state = _native.RecurrentState(
            1, [_native.StateShape.short_conv(streams * HIDDEN, self.sublayer.span)]
        )
        layers = [
            _native.Layer(
                None, None, norm, _native.dense_ffn(*network.matrices()), rotary=None,
                ffn_mix=None if mix is None else mix.native(), ngrams=ngrams,
            )
            for norm, network, mix, ngrams in zip(
                self.norms, self.networks, self.mixes, (None, self.sublayer.native(table)), strict=True
            )
        ]  # fmt: skip
        residual = residual_of(self.head) if streams > 1 else None
        self.stack = stack_of(
            layers, has_mixer=False, residual=residual, recurrent=self.state, runtime=_native.Runtime(threads)
        )

    def begin(self, start: int, end: int, *, rows: NDArray[np.int64] = ROWS) -> NDArray[np.float32]:
        count, wanted = end - start, np.arange(end - start)
        logits = np.full((count, VOCABULARY), np.nan, np.float32)
        self.table.begin(np.ascontiguousarray(rows[start:end]).reshape(-1))
        self.stack.begin(
            IDS[start:end], np.zeros(count, np.int32), np.arange(start, end), np.zeros(count, bool),
            np.arange(2, dtype=np.int32)[None], np.arange(start, end, dtype=np.int32), wanted, logits,
            np.zeros(1, np.int32),
        )  # fmt: skip
        return logits

    def logits(self, chunk: int) -> NDArray[np.float32]:
        made = []
        for start in range(0, TOKENS, chunk):
            made.append(self.begin(start, min(start + chunk, TOKENS)))
            assert self.stack.advance() is None
        return np.concatenate(made)

    def expected(self) -> Values:
        streams = np.repeat(EMBEDDING[IDS].astype(float)[:, None], self.streams, axis=1)
        for number, (network, norm, mix) in enumerate(
            zip(self.networks, self.norms, self.mixes, strict=True)
        ):
            if number == 1:
                streams = self.sublayer(streams)
            if mix is None:
                streams = streams + network(rms(streams[:, 0], norm))[:, None]
                continue
            read, into = mix.read(streams)
            streams = streams + into[..., None] * network(rms(read, norm))[:, None]
        last = streams[:, 0] if self.streams == 1 else self.head.read(streams)[0]
        return rms(last, FINAL) @ HEAD.T


@pytest.mark.parametrize("has_conv", [False, True])
@pytest.mark.parametrize("streams", [1, STREAMS])
def test_rows_are_gated_by_the_streams_that_they_join(table: Any, streams: int, has_conv: bool) -> None:
    rig = Rig(streams, table, has_conv=has_conv)
    whole = rig.logits(TOKENS)
    require_close(whole, rig.expected())
    for chunk in (1, 2, 3):
        np.testing.assert_array_equal(rig.logits(chunk), whole)


def test_a_key_that_is_not_a_number_does_not_pass_for_a_gate(
    table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ngrams, broken = _native.ngrams, matrix(np.full((HIDDEN, WIDTH), np.nan, np.float32))
    monkeypatch.setattr(
        _native, "ngrams", lambda table, key, *parts, **more: ngrams(table, broken, *parts, **more)
    )
    assert np.isnan(Rig(1, table, has_conv=False).logits(TOKENS)).all()


def test_a_step_whose_table_reads_other_rows_is_refused(table: Any) -> None:
    rig = Rig(1, table, has_conv=False)
    rig.begin(0, 2)
    table.begin(ROWS[0])
    with pytest.raises(ValueError, match="has begun to read 4 rows, but the step has 2 tokens"):
        rig.stack.advance()


def test_a_step_whose_rows_cannot_be_read_goes_no_further_and_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "table.bin").write_bytes(TABLE.tobytes())
    store = _native.Store(1, FaultyFileSystem(1, "eio"))
    parts = [(None, [(0, store.open(str(tmp_path / "table.bin")), 0)])]
    table = _native.TableRows(store, "f32", TABLE_ROWS, ROW_DIM, parts, 2000, TOKENS * PER_TOKEN)
    rig = Rig(1, table, has_conv=False)
    rig.begin(0, TOKENS)

    def give_up() -> None:
        if table.fault is not None:
            raise ReadFailed(table.fault[0])

    with pytest.raises(ReadFailed):
        rig.stack.advance(give_up)
    require_close(rig.logits(TOKENS), rig.expected())
    store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": 2}, "rows of key"),
        ({"value": normal(HIDDEN + 1, WIDTH)}, "modulo rows of value"),
        ({"conv_norm": None}, "belong together"),
        ({"state_layer": 1}, "state_layer is 1"),
        ({"state": None}, "needs a recurrent state"),
    ],
)
def test_parts_that_do_not_fit_are_refused(table: Any, change: dict[str, Any], message: str) -> None:
    made = Sublayer(change.get("streams", 1), has_conv=True)
    conv = np.zeros((made.span, len(made.key)), np.float32)
    parts = {"key_norm": made.norms[0], "query_norm": made.norms[1], "conv": conv, "conv_norm": made.norms[2]}
    parts |= {name: value for name, value in change.items() if name in ("conv_norm", "state_layer")}
    state = _native.RecurrentState(1, [_native.StateShape.short_conv(HIDDEN, made.span)])
    network = _native.dense_ffn(*Network().matrices())

    def build() -> Any:
        ngrams = _native.ngrams(table, matrix(made.key), matrix(change.get("value", made.value)), **parts)
        layer = _native.Layer(None, None, FINAL, network, rotary=None, ngrams=ngrams)
        return stack_of([layer], has_mixer=False, recurrent=change.get("state", state))

    with pytest.raises(ValueError, match=message):
        build()
