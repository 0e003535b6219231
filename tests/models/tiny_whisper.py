"""Tiny Whisper checkpoints with random weights, as `transformers` and as CTranslate2 store them, without torch.

A window is two seconds, and a vocabulary is bytes, a few special tokens and timestamps. `make_whisper.py` asks
transformers what it hears.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from argosy.model.whisper.files import WhisperConfig, whisper_tensors
from tests.media.samples import RATE, wave
from tests.models.safetensors_file import Array, write_safetensors

REFERENCE = Path(__file__).parent / "reference_whisper"
SECONDS = 2  # of a window
LANGUAGES = ("en", "de", "fr", "yue")
SUPPRESSED, SUPPRESSED_FIRST = (3, 77, 120), (32, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """One checkpoint."""

    seed: int
    is_multilingual: bool
    dtype: str = "F32"
    hidden: int = 24
    heads: int = 3
    encoder_layers: int = 2
    decoder_layers: int = 3
    mels: int = 16
    encoder_width: int = 40

    @property
    def special(self) -> list[str]:
        """In the order of their ids, which begin after the bytes."""
        names = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm"]
        return [f"<|{name}|>" for name in [*names, "startofprev", "nospeech", "notimestamps"]]

    def id_of(self, name: str) -> int:
        return 256 + self.special.index(f"<|{name}|>")

    @property
    def config(self) -> WhisperConfig:
        positions = 50 * SECONDS
        return WhisperConfig(
            hidden_size=self.hidden,
            num_mels=self.mels,
            vocab_size=256 + len(self.special) + positions + 1,
            encoder_layers=self.encoder_layers,
            encoder_heads=self.heads,
            encoder_width=self.encoder_width,
            decoder_layers=self.decoder_layers,
            decoder_heads=self.heads,
            decoder_width=33,
            sound_positions=positions,
            text_positions=40,
        )


TINY = {
    "multilingual": Tiny(seed=3, is_multilingual=True),
    "english": Tiny(seed=4, is_multilingual=False, dtype="F16"),
}


def sound(seconds: float, seed: int) -> Array:
    """float32 [samples] at 16 kHz, louder and quieter by turns."""
    samples = wave(seconds, RATE, seed=seed).reshape(-1)
    beat = np.sin(np.arange(samples.size) / RATE * (5 + seed)) ** 2
    return (samples * beat).astype(np.float32)


def weights(tiny: Tiny) -> dict[str, Array]:
    """Values by the names of transformers, rounded to `tiny.dtype`."""
    rng = np.random.default_rng([tiny.seed, 14])
    values: dict[str, Array] = {}
    for canonical, tensor in whisper_tensors(tiny.config).items():
        scale = 2.0 / np.sqrt(tensor.cols) if len(tensor.shape) > 1 else 0.5
        value = rng.standard_normal(tensor.shape) * scale
        if canonical.endswith("norm"):
            value += 1.0
        values["model." + tensor.name] = value.astype("<f2" if tiny.dtype == "F16" else "<f4").astype("<f4")
    return values


def write_transformers(directory: Path, tiny: Tiny) -> None:
    """Write a checkpoint as on the hub."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny.config
    _write_json(
        directory / "config.json",
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": config.hidden_size,
            "num_mel_bins": config.num_mels,
            "vocab_size": config.vocab_size,
            "encoder_layers": config.encoder_layers,
            "encoder_attention_heads": config.encoder_heads,
            "encoder_ffn_dim": config.encoder_width,
            "decoder_layers": config.decoder_layers,
            "decoder_attention_heads": config.decoder_heads,
            "decoder_ffn_dim": config.decoder_width,
            "max_source_positions": config.sound_positions,
            "max_target_positions": config.text_positions,
            "decoder_start_token_id": tiny.id_of("startoftranscript"),
            "bos_token_id": 256,
            "eos_token_id": 256,
            "pad_token_id": 256,
        },
    )
    generation = {
        "decoder_start_token_id": tiny.id_of("startoftranscript"),
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "no_timestamps_token_id": tiny.id_of("notimestamps"),
        "prev_sot_token_id": tiny.id_of("startofprev"),
        "suppress_tokens": list(SUPPRESSED),
        "begin_suppress_tokens": list(SUPPRESSED_FIRST),
        "max_initial_timestamp_index": 50,
        "max_length": config.text_positions,
        "is_multilingual": tiny.is_multilingual,
        "return_timestamps": False,
    }
    if tiny.is_multilingual:
        generation["lang_to_id"] = {f"<|{code}|>": tiny.id_of(code) for code in LANGUAGES}
        generation["task_to_id"] = {task: tiny.id_of(task) for task in ("transcribe", "translate")}
    _write_json(directory / "generation_config.json", generation)
    _write_json(
        directory / "preprocessor_config.json",
        {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config.num_mels,
            "sampling_rate": RATE,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": SECONDS,
            "padding_side": "right",
            "padding_value": 0.0,
        },
    )
    _write_tokenizer(directory, tiny)
    tensors = {name: (tiny.dtype, value) for name, value in weights(tiny).items()}
    write_safetensors(directory / "model.safetensors", tensors)


def write_ctranslate2(directory: Path, tiny: Tiny) -> None:
    """Write the same model as ct2-transformers-converter does; its windows need a preprocessor_config.json, too."""
    write_transformers(directory, tiny)
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink()
    _write_json(
        directory / "config.json",
        {
            "alignment_heads": [[0, 0]],
            "lang_ids": [tiny.id_of(code) for code in LANGUAGES],
            "suppress_ids": list(SUPPRESSED),
            "suppress_ids_begin": list(SUPPRESSED_FIRST),
        },
    )
    (directory / "model.bin").write_bytes(model_bin(tiny))


def model_bin(tiny: Tiny) -> bytes:
    """The bytes of a CTranslate2 model, version 6."""
    variables = bin_variables(tiny)
    head = struct.pack("<I", 6) + _name("WhisperSpec") + struct.pack("<II", 3, len(variables))
    body = b"".join(map(_variable, variables.keys(), variables.values()))
    tail = struct.pack("<I", 1) + _name("decoder/projection/weight") + _name("decoder/embeddings/weight")
    return head + body + tail


def bin_variables(tiny: Tiny) -> dict[str, Array]:
    """Variables by name, in the order of their names."""
    values = weights(tiny)
    stored = np.dtype("<f2") if tiny.dtype == "F16" else np.dtype("<f4")
    out: dict[str, Array] = {
        "decoder/activation": np.int8(3),
        "decoder/alibi": np.int8(0),
        "decoder/alignment_heads": np.int16(1),
        "decoder/alignment_layer": np.int16(-1),
        "decoder/num_heads": np.int16(tiny.heads),
        "decoder/pre_norm": np.int8(1),
        "decoder/scale_embeddings": np.int8(0),
        "decoder/start_from_zero_embedding": np.int8(0),
        "encoder/num_heads": np.int16(tiny.heads),
        "decoder/embeddings/weight": values["model.decoder.embed_tokens.weight"].astype(stored),
    }  # type: ignore[assignment]

    def both(theirs: str, ours: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        out[f"{theirs}/{names[0]}"] = values[f"model.{ours}.weight"].astype(stored)
        out[f"{theirs}/{names[1]}"] = values[f"model.{ours}.bias"].astype(stored)

    def norm(theirs: str, ours: str) -> None:
        both(theirs, ours, ("gamma", "beta"))

    def joined(theirs: str, ours: str, projections: str) -> None:
        names = [f"model.{ours}.{one}_proj" for one in projections]
        out[f"{theirs}/weight"] = np.concatenate([values[f"{name}.weight"] for name in names]).astype(stored)
        biases = [values.get(f"{name}.bias", np.zeros(tiny.hidden)) for name in names]
        out[f"{theirs}/bias"] = np.concatenate(biases).astype(stored)

    both("encoder/conv1", "encoder.conv1")
    both("encoder/conv2", "encoder.conv2")
    for side, layers in (("encoder", tiny.encoder_layers), ("decoder", tiny.decoder_layers)):
        out[f"{side}/position_encodings/encodings"] = values[f"model.{side}.embed_positions.weight"].astype(
            stored
        )
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(layers):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            joined(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            both(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            both(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            both(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                joined(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", "q")
                joined(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", "kv")
                both(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    return dict(sorted(out.items()))


_BIN_TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def _variable(name: str, value: Array) -> bytes:
    value = np.asarray(value)
    shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    return (
        _name(name) + shape + struct.pack("<BI", _BIN_TYPES[value.dtype.name], value.nbytes) + value.tobytes()
    )


def _name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_tokenizer(directory: Path, tiny: Tiny) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(tiny.special)
    core.save(str(directory / "tokenizer.json"))
