"""The audio tower of Qwen3-Omni: mel features of a sound of any length.

    features -> chunks of 100 frames -> 3 convolutions, 8 frames become 1 -> + times -> layers -> LayerNorm, MLP

Convolutions see one chunk, and times restart in each chunk. The last chunk is padded with zeros to the length of the
others; a sound shorter than a chunk is not padded. A layer is LayerNorm, attention within a window of several chunks,
LayerNorm, MLP. Positions in the decoder are like those of text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from argosy import _native
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.blocks import (
    FLOAT_BYTES,
    OVERHEAD_BYTES,
    Rows,
    Steps,
    Tower,
    attention_floats,
    block_floats,
    gelu_mlp_floats,
    in_blocks,
    sinusoids,
)
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.halving import halve, halved, halving_floats, halving_tensors
from argosy.model.encoders.projector import Projector
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader
from argosy.model.weights import DenseWeights
from argosy.prompt.media_span import Making, SpanRows

_NUM_CONVOLUTIONS = 3
# Rows that a whole chunk becomes; transformers relies on this.
_CHUNK_ROWS = 13
_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniAudioConfig:
    """Sizes of the tower. A chunk has `chunk_frames` frames, and attention sees `window_chunks` chunks."""

    num_layers: int
    hidden_size: int
    mlp_width: int
    num_heads: int
    num_mels: int
    channels: int
    chunk_frames: int
    window_chunks: int
    out_size: int

    @property
    def image_rows(self) -> int:
        """Rows of mel bins after the convolutions."""
        return _after_convolutions(self.num_mels)


def read_config(reader: ConfigReader) -> OmniAudioConfig:
    """Read `audio_config`, as `Qwen3OmniMoeAudioEncoderConfig` in transformers 5.24 does.

    Raises:
        UnsupportedModel: a key or value that is not supported.   CheckpointError: a key is malformed.
    """
    reader.one_of("activation_function", "gelu", ("gelu",))
    reader.neutral("scale_embedding", False)
    reader.passed("dropout", "activation_dropout", "conv_chunksize", "bos_token_id", "eos_token_id")
    reader.integer("max_source_positions", default=1500, least=_CHUNK_ROWS)
    half_chunk = reader.integer("n_window", default=50)
    window_frames = reader.integer("n_window_infer", default=800)
    config = OmniAudioConfig(
        num_layers=reader.integer("encoder_layers", "num_hidden_layers", default=32, most=MOST_LAYERS),
        hidden_size=reader.integer("d_model", "hidden_size", default=1280, least=4),
        mlp_width=reader.integer("encoder_ffn_dim", "intermediate_size", default=5120),
        num_heads=reader.integer("encoder_attention_heads", "num_attention_heads", default=20),
        num_mels=reader.integer("num_mel_bins", default=128),
        channels=reader.integer("downsample_hidden_size", default=480),
        chunk_frames=2 * half_chunk,
        window_chunks=window_frames // (2 * half_chunk),
        out_size=reader.integer("output_dim", default=3584),
    )
    if _after_convolutions(config.chunk_frames) != _CHUNK_ROWS:
        raise reader.unsupported("n_window", f"49 to 52, for which a chunk becomes {_CHUNK_ROWS} rows")
    if not config.window_chunks:
        raise reader.unsupported("n_window_infer", f"{config.chunk_frames} or more, the frames of a chunk")
    if config.hidden_size % math.lcm(2, config.num_heads):
        raise reader.unsupported("d_model", f"an even multiple of the number of heads, {config.num_heads}")
    reader.finish()
    return config


def tensors(config: OmniAudioConfig) -> dict[str, EncoderTensor]:
    """The tower's tensors by canonical name; the prefix is `thinker.audio_tower.`."""
    hidden, wide, channels = config.hidden_size, config.mlp_width, config.channels
    found: dict[str, EncoderTensor] = {}
    for i in range(_NUM_CONVOLUTIONS):
        found |= halving_tensors(f"convolution.{i}", f"conv2d{i + 1}", channels, channels if i else 1)
    found |= with_bias("join", "conv_out", (hidden, channels * config.image_rows), has_bias=False)
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        found |= with_bias(f"{name}.attn_norm", f"{name}.self_attn_layer_norm", (hidden,))
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            found |= with_bias(f"{name}.{ours}", f"{name}.self_attn.{theirs}", (hidden, hidden))
        found |= with_bias(f"{name}.mlp_norm", f"{name}.final_layer_norm", (hidden,))
        found |= with_bias(f"{name}.up", f"{name}.fc1", (wide, hidden))
        found |= with_bias(f"{name}.down", f"{name}.fc2", (hidden, wide))
    found |= with_bias("final_norm", "ln_post", (hidden,))
    found |= with_bias("output.up", "proj1", (hidden, hidden))
    found |= with_bias("output.down", "proj2", (config.out_size, hidden))
    return found


def num_positions(config: OmniAudioConfig, num_frames: int) -> int:
    """Return the positions that a sound of `frames` mel frames fills."""
    chunks, rest = divmod(num_frames, config.chunk_frames)
    return chunks * _CHUNK_ROWS + _after_convolutions(rest)


def peak_bytes(config: OmniAudioConfig, num_frames: int) -> int:
    """Most bytes that `encode` allocates, its result included; native scratch memory is not counted."""
    hidden, channels, positions = config.hidden_size, config.channels, num_positions(config, num_frames)
    window = min(positions, config.window_chunks * _CHUNK_ROWS)
    height, width = config.num_mels, min(num_frames, config.chunk_frames)
    convolutions, num_inputs = [], 1
    for _ in range(_NUM_CONVOLUTIONS):
        image = height * width * num_inputs
        convolutions.append(image + halving_floats(height, width, channels, num_inputs))
        height, width, num_inputs = halved(height), halved(width), channels
    joined = 2 * height * width * channels + 4 * width * hidden
    floats = positions * hidden + max(
        *convolutions,
        height * width * channels + joined,
        3 * positions * hidden
        + max(
            block_floats(positions, 6 * hidden**2, 2 * hidden),
            attention_floats(window, hidden, hidden, 2 * hidden**2),
        ),
        gelu_mlp_floats(positions, hidden, config.mlp_width),
        positions * config.out_size
        + block_floats(positions, 2 * hidden * (hidden + config.out_size), 3 * hidden),
    )
    return FLOAT_BYTES * floats + OVERHEAD_BYTES


class OmniAudioTower(Tower[OmniAudioConfig]):
    """The tower with its weights; `encode` may be run for several sounds at the same time."""

    def __init__(
        self,
        config: OmniAudioConfig,
        weights: DenseWeights,
        runtime: _native.Runtime,
        *,
        is_exact: bool = False,
    ) -> None:
        super().__init__(config, weights, runtime, is_exact=is_exact)
        half = config.hidden_size // 2
        frequencies = 10_000.0 ** -(np.arange(half) / max(1, half - 1))
        self._times = sinusoids(np.arange(_CHUNK_ROWS), frequencies)

    def encode(self, features: Rows) -> Making:
        """Make the rows of a sound.

        Args:
            features: [num_mels, frames], at least one frame.
        """
        config, ops = self._config, self._operations
        hidden = np.empty((num_positions(config, features.shape[1]), config.hidden_size), np.float32)
        for chunk, start in enumerate(range(0, features.shape[1], config.chunk_frames)):
            rows = hidden[chunk * _CHUNK_ROWS :][:_CHUNK_ROWS]
            yield from self._embed(features, start, rows)
        step = config.window_chunks * _CHUNK_ROWS
        windows = [range(start, min(start + step, len(hidden))) for start in range(0, len(hidden), step)]
        for layer in range(config.num_layers):
            yield layer / config.num_layers
            yield from ops.self_attention(
                f"layers.{layer}", hidden, _NORM_EPS, num_heads=config.num_heads, segments=windows
            )
            yield from ops.gelu_mlp(f"layers.{layer}", hidden, _NORM_EPS, "gelu_erf")
        embeddings = np.empty((len(hidden), config.out_size), np.float32)

        def work(rows: slice) -> None:
            x = ops.layer_norm("final_norm", hidden[rows], _NORM_EPS)
            ops.linear("output.down", ops.linear("output.up", x, finish="gelu_erf"), embeddings[rows])

        yield from in_blocks(work, range(len(hidden)), ops.flop_per_row("output.up", "output.down"))
        return SpanRows(embeddings)

    def _embed(self, features: Rows, start: int, out: Rows) -> Steps:
        """Make the rows of the chunk that begins at frame `start`."""
        ops, config = self._operations, self._config
        # A chunk at the end has the silence that makes it as long as the first one.
        length = min(features.shape[1], config.chunk_frames)
        image = np.zeros((config.num_mels, length, 1), np.float32)
        frames = features[:, start : start + config.chunk_frames]
        image[:, : frames.shape[1], 0] = frames
        for i in range(_NUM_CONVOLUTIONS):
            image = yield from halve(ops, f"convolution.{i}", image, config.channels, finish="gelu_erf")
        # The channel comes before the mel bins in the product that joins them.
        x = np.ascontiguousarray(image.transpose(1, 2, 0)).reshape(image.shape[1], -1)

        def work(rows: slice) -> None:
            ops.linear("join", x[rows], out[rows])
            out[rows] += self._times[rows]

        yield from in_blocks(work, range(len(out)), ops.flop_per_row("join"))


def _after_convolutions(size: int) -> int:
    for _ in range(_NUM_CONVOLUTIONS):
        size = halved(size)
    return size


TOWERS: Mapping[str, Encoder] = {
    "qwen3_omni_moe": Encoder(
        kind="sound",
        path=("thinker_config", "audio_config"),
        placeholders=("audio_token_id",),
        prefix="thinker.audio_tower.",
        read=lambda own, around, model: read_config(own),
        tensors=tensors,
        open=OmniAudioTower,
        num_positions=lambda config, shape: num_positions(config, *shape),
        peak_bytes=lambda config, shape: peak_bytes(config, *shape),
    ),
}


def _read_omni_audio(reader: GgufConfigReader) -> dict[str, object]:
    if (eps := reader.number("audio.attention.layer_norm_epsilon", 1e-5)) != 1e-5:
        raise reader.unsupported("audio.attention.layer_norm_epsilon", eps, "1e-05")
    kernel = reader.file.tensors.get("a.conv2d.1.weight")
    return {
        "d_model": reader.integer("audio.embedding_length"),
        "downsample_hidden_size": 480 if kernel is None or not kernel.shape else kernel.shape[0],
        "encoder_attention_heads": reader.integer("audio.attention.head_count"),
        "encoder_ffn_dim": reader.integer("audio.feed_forward_length"),
        "encoder_layers": reader.integer("audio.block_count", most=MOST_LAYERS),
        "n_window": 50,  # the file has no windows: those of the released models
        "n_window_infer": 800,
        "num_mel_bins": reader.integer("audio.num_mel_bins", most=1024),
        "output_dim": reader.integer("audio.projection_dim"),
    }


def _omni_sound_settings(reader: GgufConfigReader) -> dict[str, object]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": reader.integer("audio.num_mel_bins", most=1024),
    }


PROJECTORS: Mapping[str, Projector] = {
    "qwen3a": Projector(
        kind="sound",
        families={"qwen3_vl_moe": "qwen3_omni_moe"},
        placeholder="<|audio_pad|>",
        read_config=_read_omni_audio,
        read_settings=_omni_sound_settings,
        names={
            **{f"convolution.{i}": f"a.conv2d.{i + 1}" for i in range(3)},
            "join": "a.conv_out",
            "final_norm": "a.post_ln",
            "output.up": "mm.a.mlp.1",
            "output.down": "mm.a.mlp.2",
        },
        unused=("a.position_embd.weight",),  # sinusoids, which the tower computes
    ),
}
