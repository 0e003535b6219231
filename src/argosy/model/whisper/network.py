"""Whisper's arithmetic: a window of sound is encoded once, then tokens are decoded that attend to it.

    mel features -> 2 convolutions, 2 frames become 1 -> + positions -> layers -> norm -> keys and values of each
                                                                                          decoder layer: `Heard`
    token ids -> embedding + positions -> layers: own tokens so far, Heard, MLP -> norm -> embedding^T -> logits

The decoder's cache holds keys and values of one sequence; `rewind` forgets its end. Work is done in pieces that are so
small that decoding of text never waits long for one (`encoders/blocks.py`).

Elsewhere: `rules.py` chooses tokens from logits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    MOST_FLOP,
    OVERHEAD_BYTES,
    Operations,
    Rows,
    Steps,
    attention_flop,
    block_rows,
    in_blocks,
)
from argosy.model.encoders.whisper_audio import encode_window, window_floats
from argosy.model.weights import DenseWeights
from argosy.model.whisper.files import WhisperConfig

_NORM_EPS = 1e-5
# Products with fewer rows wait for weights from memory, so they take as long as this many.
_FEWEST_ROWS = 8

Heard = list[tuple[Rows, Rows]]
"""For each decoder layer, keys and values [positions, heads, head_dim] of a window."""


def peak_bytes(config: WhisperConfig) -> int:
    """Most bytes that encoding and decoding one window allocate, its features not counted."""
    hidden, positions = config.hidden_size, config.sound_positions
    heard = 2 * config.decoder_layers * positions * hidden
    encoding = window_floats(
        num_mels=config.num_mels, hidden=hidden, width=config.encoder_width, positions=positions
    )
    cache = 2 * config.decoder_layers * config.text_positions * hidden
    rows = config.text_positions * (8 * hidden + config.decoder_width)
    # Logits, and their copies while a token is chosen: float32 and float64.
    choosing = 10 * config.vocab_size
    return (
        FLOAT_BYTES * (positions * hidden + heard + max(encoding, cache + rows + choosing)) + OVERHEAD_BYTES
    )


class Whisper:
    """The network with its weights.

    Args:
        is_exact: products are float32; otherwise the CPU may multiply blocks of rows in bfloat16.
    """

    def __init__(
        self,
        config: WhisperConfig,
        weights: DenseWeights,
        runtime: _native.Runtime,
        *,
        is_exact: bool = False,
    ) -> None:
        self.config = config
        self.operations = Operations(weights, runtime, is_exact=is_exact)

    def encode(self, features: Rows) -> Generator[None, None, Heard]:
        """Encode a window.

        Args:
            features: [num_mels, num_frames].
        """
        config, ops = self.config, self.operations
        hidden = yield from encode_window(
            ops, features, num_layers=config.encoder_layers, num_heads=config.encoder_heads
        )
        heard: Heard = []
        for layer in range(config.decoder_layers):
            key, value = (np.empty_like(hidden) for _ in range(2))
            for name, out in (
                (f"decoder.layers.{layer}.cross.k", key),
                (f"decoder.layers.{layer}.cross.v", value),
            ):
                yield from self._project(name, hidden, out)
            heard.append((self.in_heads(key), self.in_heads(value)))
        return heard

    def _project(self, name: str, x: Rows, out: Rows) -> Steps:
        def work(rows: slice) -> None:
            self.operations.linear(name, x[rows], out[rows])

        return in_blocks(work, range(len(x)), self.operations.flop_per_row(name))

    def in_heads(self, x: Rows) -> Rows:
        return x.reshape(len(x), self.config.decoder_heads, -1)


class Decoding:
    """One sequence of tokens about one window."""

    def __init__(self, network: Whisper, heard: Heard) -> None:
        config = network.config
        self._network, self._heard = network, heard
        shape = (config.text_positions, config.decoder_heads, config.hidden_size // config.decoder_heads)
        self._kept = [
            (np.empty(shape, np.float32), np.empty(shape, np.float32)) for _ in range(config.decoder_layers)
        ]
        self._scale = float(shape[2]) ** -0.5
        self._cost = 0
        self.num_tokens = 0

    def rewind(self, num_tokens: int) -> None:
        """Forget the tokens after the first `num_tokens`."""
        assert 0 <= num_tokens <= self.num_tokens
        self.num_tokens = num_tokens

    def feed(self, token_ids: Sequence[int]) -> Generator[None, None, Rows]:
        """Add tokens, at least one; all of them fit `text_positions`.

        Returns:
            [tokens, hidden_size], from which `logits` are made.
        """
        assert 0 < len(token_ids) <= self._network.config.text_positions - self.num_tokens
        ops = self._network.operations
        step = block_rows(len(token_ids), self._layer_flop(0))
        blocks = []
        for start in range(0, len(token_ids), step):
            ids = np.array(token_ids[start : start + step], np.int32)
            places = np.arange(self.num_tokens, self.num_tokens + len(ids), dtype=np.int32)
            hidden = ops.rows_of("embed", ids)
            hidden += ops.rows_of("decoder.positions", places)
            for layer in range(self._network.config.decoder_layers):
                self._layer(layer, hidden)
                yield from self._pause(len(ids), self._layer_flop(layer))
            blocks.append(ops.layer_norm("decoder.final_norm", hidden, _NORM_EPS))
            self.num_tokens += len(ids)
        return np.concatenate(blocks)

    def logits(self, hidden: Rows) -> Generator[None, None, NDArray[np.float32]]:
        """The logits [vocab_size] of the token after one row of `feed`."""
        ops = self._network.operations
        logits: NDArray[np.float32] = ops.linear("embed", hidden[None])[0]
        yield from self._pause(1, ops.flop_per_row("embed"))
        return logits

    def _layer_flop(self, layer: int) -> int:
        """Floating-point operations of a layer for one row."""
        name, config = f"decoder.layers.{layer}", self._network.config
        matrices = [f"{name}.{one}" for one in ("q", "k", "v", "o", "cross.q", "cross.o", "up", "down")]
        seen = config.text_positions + config.sound_positions
        return self._network.operations.flop_per_row(*matrices) + attention_flop(seen, config.hidden_size)

    def _pause(self, num_rows: int, flop: int) -> Steps:
        """Yield once work that is worth a pause has been done."""
        self._cost += max(num_rows, _FEWEST_ROWS) * flop
        if self._cost >= MOST_FLOP:
            self._cost = 0
            yield

    def _layer(self, layer: int, hidden: Rows) -> None:
        """Apply a layer in place."""
        name, ops = f"decoder.layers.{layer}", self._network.operations
        key, value = self._kept[layer]
        start, end = self.num_tokens, self.num_tokens + len(hidden)
        normed = ops.layer_norm(f"{name}.attn_norm", hidden, _NORM_EPS)
        query = self._heads(f"{name}.q", normed)
        key[start:end], value[start:end] = self._heads(f"{name}.k", normed), self._heads(f"{name}.v", normed)
        out = np.empty_like(query)
        for row, seen in enumerate(range(start + 1, end + 1)):  # a token sees those before it, and itself
            self._attend(query[row : row + 1], key[:seen], value[:seen], out[row : row + 1])
        ops.linear(f"{name}.o", out.reshape(hidden.shape), hidden, finish="add")

        query = self._heads(f"{name}.cross.q", ops.layer_norm(f"{name}.cross.attn_norm", hidden, _NORM_EPS))
        self._attend(query, *self._heard[layer], out)
        ops.linear(f"{name}.cross.o", out.reshape(hidden.shape), hidden, finish="add")
        for _ in ops.gelu_mlp(name, hidden, _NORM_EPS, "gelu_erf"):
            pass  # `feed` has made the rows one block

    def _heads(self, name: str, x: Rows) -> Rows:
        return self._network.in_heads(self._network.operations.linear(name, x))

    def _attend(self, query: Rows, key: Rows, value: Rows, out: Rows) -> None:
        self._network.operations.attend_all(query, key, value, self._scale, out)
