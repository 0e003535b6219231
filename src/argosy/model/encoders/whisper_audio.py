"""Whisper's encoder as a model's ear, with the projector of Voxtral: mel features of a sound of any length.

    features -> windows -> 2 convolutions, 2 frames become 1 -> + positions -> layers -> LayerNorm
                                                              -> several joined -> linear, GELU, linear -> embeddings

A window is as long as the table of positions, and hears nothing of its neighbours. The last window is padded with
silence; rows of that silence are dropped. Positions in the decoder are like those of text.

Whisper transcribes with the same encoder (`model/whisper/network.py`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from argosy.media.sounds import silence_after
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    OVERHEAD_BYTES,
    Operations,
    Rows,
    Steps,
    Tower,
    attention_floats,
    block_floats,
    gelu_mlp_floats,
    in_blocks,
)
from argosy.model.encoders.encoder import Encoder
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.prompt.media_span import Making, SpanRows

_NORM_EPS = 1e-5
_KERNEL = 3
_FRAMES_PER_POSITION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WhisperAudioConfig:
    """Sizes of the tower. A window has `positions` positions, of which `joined` become one."""

    num_layers: int
    hidden_size: int
    mlp_width: int
    num_heads: int
    num_mels: int
    positions: int
    joined: int
    out_size: int

    @property
    def window_frames(self) -> int:
        return self.positions * _FRAMES_PER_POSITION

    @property
    def window_rows(self) -> int:
        """Rows that a whole window becomes."""
        return self.positions // self.joined


def read_config(reader: ConfigReader, *, hidden_size: int) -> WhisperAudioConfig:
    """Read `audio_config`, as `VoxtralEncoderConfig` in transformers 5.24 does.

    Args:
        hidden_size: the decoder's; the projector's inner size as well.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("activation_function", "gelu", ("gelu",))
    reader.neutral("scale_embedding", False)
    reader.passed("vocab_size", "attention_dropout", "dropout", "layerdrop", "activation_dropout")
    config = WhisperAudioConfig(
        num_layers=reader.integer("num_hidden_layers", "encoder_layers", default=32, most=MOST_LAYERS),
        hidden_size=reader.integer("hidden_size", "d_model", default=1280),
        mlp_width=reader.integer("intermediate_size", "encoder_ffn_dim", default=5120),
        num_heads=reader.integer("num_attention_heads", "encoder_attention_heads", default=20),
        num_mels=reader.integer("num_mel_bins", default=128),
        positions=reader.integer("max_source_positions", default=1500),
        joined=1,
        out_size=hidden_size,
    )
    if config.hidden_size % config.num_heads:
        raise reader.unsupported("hidden_size", f"a multiple of the number of heads, {config.num_heads}")
    joined, rest = divmod(config.mlp_width, config.hidden_size)
    if rest or joined > config.positions:
        raise reader.unsupported(
            "intermediate_size", f"a multiple of {config.hidden_size}: positions are joined up to this size"
        )
    reader.finish()
    return replace(config, joined=joined)


def encoder_tensors(
    *, num_layers: int, hidden: int, width: int, num_mels: int, positions: int, prefix: str
) -> dict[str, EncoderTensor]:
    """The encoder's tensors by canonical name; in the checkpoint their names begin with `prefix`."""
    found = with_bias("convolution.0", f"{prefix}conv1", (hidden, num_mels, _KERNEL), taps=_KERNEL)
    found |= with_bias("convolution.1", f"{prefix}conv2", (hidden, hidden, _KERNEL), taps=_KERNEL)
    found["encoder.positions"] = EncoderTensor(f"{prefix}embed_positions.weight", (positions, hidden))
    for layer in range(num_layers):
        ours, theirs = f"encoder.layers.{layer}", f"{prefix}layers.{layer}"
        found |= attention_tensors(ours, f"{theirs}.self_attn", hidden)
        found |= mlp_tensors(ours, theirs, hidden, width)
    return found | with_bias("encoder.final_norm", f"{prefix}layer_norm", (hidden,))


def attention_tensors(ours: str, theirs: str, hidden: int) -> dict[str, EncoderTensor]:
    found = with_bias(f"{ours}.attn_norm", f"{theirs}_layer_norm", (hidden,))
    for name, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        found |= with_bias(f"{ours}.{name}", f"{theirs}.{module}", (hidden, hidden), has_bias=name != "k")
    return found


def mlp_tensors(ours: str, theirs: str, hidden: int, width: int) -> dict[str, EncoderTensor]:
    found = with_bias(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm", (hidden,))
    found |= with_bias(f"{ours}.up", f"{theirs}.fc1", (width, hidden))
    return found | with_bias(f"{ours}.down", f"{theirs}.fc2", (hidden, width))


def tensors(config: WhisperAudioConfig) -> dict[str, EncoderTensor]:
    """The tower's tensors by canonical name; there is no prefix."""
    out, hidden = config.out_size, config.hidden_size
    found = encoder_tensors(
        num_layers=config.num_layers,
        hidden=hidden,
        width=config.mlp_width,
        num_mels=config.num_mels,
        positions=config.positions,
        prefix="audio_tower.",
    )
    for ours, theirs, cols in (("up", "linear_1", config.joined * hidden), ("down", "linear_2", out)):
        found[f"projector.{ours}"] = EncoderTensor(f"multi_modal_projector.{theirs}.weight", (out, cols))
    return found


def num_positions(config: WhisperAudioConfig, num_frames: int) -> int:
    """Return the positions that a sound of `frames` mel frames fills: one more than needed, but never
    beyond a window.
    """
    windows, rest = divmod(num_frames, config.window_frames)
    needed = -(-rest // (_FRAMES_PER_POSITION * config.joined)) + 1 if rest else 0
    return windows * config.window_rows + min(needed, config.window_rows)


def window_floats(*, num_mels: int, hidden: int, width: int, positions: int) -> int:
    """Most float32 values that `encode_window` allocates, its result included."""
    frames = positions * _FRAMES_PER_POSITION
    return max(
        (frames + 2) * (num_mels + hidden) + positions * hidden,
        4 * positions * hidden
        + max(
            block_floats(positions, 6 * hidden**2, 2 * hidden),
            attention_floats(positions, hidden, hidden, 2 * hidden**2),
        ),
        positions * hidden + gelu_mlp_floats(positions, hidden, width),
    )


def peak_bytes(config: WhisperAudioConfig, num_frames: int) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    rows = num_positions(config, num_frames)
    encoding = window_floats(
        num_mels=config.num_mels,
        hidden=config.hidden_size,
        width=config.mlp_width,
        positions=config.positions,
    )
    projecting = config.positions * config.hidden_size + 2 * config.window_rows * config.out_size
    floats = rows * config.out_size + config.window_frames * config.num_mels + max(encoding, projecting)
    return FLOAT_BYTES * floats + OVERHEAD_BYTES


def encode_window(
    ops: Operations, features: Rows, *, num_layers: int, num_heads: int
) -> Generator[None, None, Rows]:
    """Encode mel features [num_mels, frames]; returns [frames / 2, hidden_size]."""
    num_mels, num_frames = features.shape
    width = len(ops.vector("convolution.0_bias"))
    mels, x = (np.zeros((num_frames + 2, size), np.float32) for size in (num_mels, width))
    mels[1:-1] = features.T
    yield from _convolve(ops, "convolution.0", mels, x[1:-1], stride=1)
    del mels
    hidden = np.empty((-(-num_frames // _FRAMES_PER_POSITION), width), np.float32)
    yield from _convolve(ops, "convolution.1", x, hidden, stride=_FRAMES_PER_POSITION)
    del x
    hidden += ops.rows_of("encoder.positions", np.arange(len(hidden), dtype=np.int32))
    for layer in range(num_layers):
        name = f"encoder.layers.{layer}"
        yield from ops.self_attention(
            name, hidden, _NORM_EPS, num_heads=num_heads, segments=[range(len(hidden))]
        )
        yield from ops.gelu_mlp(name, hidden, _NORM_EPS, "gelu_erf")
    return ops.layer_norm("encoder.final_norm", hidden, _NORM_EPS)


def _convolve(ops: Operations, name: str, x: Rows, out: Rows, *, stride: int) -> Steps:
    """Convolve x [frames + 2, channels], a frame of zeros at each end, with kernels of three frames, then GELU.

    Args:
        stride: frames between the kernels of two rows of `out`.
    """
    # The frames under a kernel are adjacent, and share memory with those under the next.
    under = sliding_window_view(x.reshape(-1), _KERNEL * x.shape[1])[:: stride * x.shape[1]]

    def work(rows: slice) -> None:
        ops.linear(name, under[rows], out[rows], finish="gelu_erf")

    return in_blocks(work, range(len(out)), ops.flop_per_row(name))


class WhisperAudioTower(Tower[WhisperAudioConfig]):
    """The tower with its weights; `encode` may be run for several sounds at the same time."""

    def encode(self, features: Rows) -> Making:
        """Make the rows of a sound.

        Args:
            features: [num_mels, frames], at least one frame.
        """
        config, ops = self._config, self._operations
        embeddings = np.empty((num_positions(config, features.shape[1]), config.out_size), np.float32)
        silence = silence_after(features)
        starts = range(0, features.shape[1], config.window_frames)
        for window, start in enumerate(starts):
            heard = np.full((config.num_mels, config.window_frames), silence, np.float32)
            part = features[:, start : start + config.window_frames]
            heard[:, : part.shape[1]] = part
            hidden = yield from encode_window(
                ops, heard, num_layers=config.num_layers, num_heads=config.num_heads
            )
            out = embeddings[window * config.window_rows :][: config.window_rows]
            joined = hidden[: len(out) * config.joined].reshape(len(out), -1)
            ops.linear("projector.down", ops.linear("projector.up", joined, finish="gelu_erf"), out)
            del hidden, joined, heard
            yield (window + 1) / len(starts)
        return SpanRows(embeddings)


TOWERS: Mapping[str, Encoder] = {
    # The demo model's ear.
    "qwen2_moe": Encoder(
        kind="sound",
        path=("audio_config",),
        placeholders=("audio_token_id",),
        prefix="",
        read=lambda own, around, model: read_config(own, hidden_size=model.hidden_size),
        tensors=tensors,
        open=WhisperAudioTower,
        sound_padding="silence",
        num_positions=lambda config, shape: num_positions(config, *shape),
        peak_bytes=lambda config, shape: peak_bytes(config, *shape),
    ),
}
