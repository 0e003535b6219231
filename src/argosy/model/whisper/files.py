"""Read a Whisper checkpoint: its sizes, its special tokens, and where its tensors are.

    config.json, model.safetensors, generation_config.json, preprocessor_config.json, tokenizer.json  ─┐
                                                                                                       ├─> WhisperFiles
    model.bin (CTranslate2), config.json, tokenizer.json  ─────────────────────────────────────────────┘

Any size of the model is supported. Sizes that a CTranslate2 model leaves out follow from its tensors. Every tensor is
proved to have the required shape before anything is allocated.

Elsewhere: `checkpoint/` finds tensors; `rules.py` applies what the special tokens mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from argosy.checkpoint.ctranslate2 import ModelBin, read_model_bin
from argosy.checkpoint.formats import BYTES_PER_VALUE
from argosy.checkpoint.landing import MatrixRef
from argosy.checkpoint.safetensors import TensorRef, open_tensors
from argosy.checkpoint.untrusted_file import read_object
from argosy.errors import CheckpointError, UnsupportedModel
from argosy.media.sounds import SoundProcessor, read_sound_processor
from argosy.model.encoders import EncoderTensor, with_bias
from argosy.model.encoders.whisper_audio import attention_tensors, encoder_tensors, mlp_tensors
from argosy.model.reading.accounts import FLOAT_FORMATS, TensorAccounts
from argosy.model.reading.config_reader import MOST_LAYERS, ConfigReader
from argosy.model.weights import dense_footprint
from argosy.prompt.tokenizer import Tokenizer

MODEL_BIN = "model.bin"
_CONFIG, _GENERATION, _PROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
# Multilingual checkpoints have at least this many tokens.
_MULTILINGUAL_VOCABULARY = 51_865
# The first timestamp is at most one second (50 positions) after the start of a window.
_MOST_INITIAL_POSITIONS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class WhisperConfig:
    """Sizes. An encoder position stands for two mel frames; `text_positions` is the longest sequence of tokens."""

    hidden_size: int
    num_mels: int
    vocab_size: int
    encoder_layers: int
    encoder_heads: int
    encoder_width: int
    decoder_layers: int
    decoder_heads: int
    decoder_width: int
    sound_positions: int
    text_positions: int

    @property
    def num_frames(self) -> int:
        """Mel frames of a window."""
        return 2 * self.sound_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Special ids; those from `timestamps` on are positions in the window.

    languages: code -> id; empty if the model knows only English, and therefore cannot translate either.
    suppressed: never chosen.   suppressed_first: not chosen as the first token of a window.
    most_initial_positions: the largest first timestamp; None: any.
    """

    start: int
    end: int
    previous: int
    no_timestamps: int
    transcribe: int
    translate: int
    languages: Mapping[str, int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    most_initial_positions: int | None

    @property
    def no_speech(self) -> int:
        return self.no_timestamps - 1

    @property
    def timestamps(self) -> int:
        return self.no_timestamps + 1


@dataclass(frozen=True)
class WhisperFiles:
    """A checkpoint on disk. `tensors` by canonical name."""

    path: Path
    config: WhisperConfig
    special: SpecialTokens
    tokenizer: Tokenizer = field(repr=False)
    processor: SoundProcessor
    tensors: Mapping[str, MatrixRef] = field(repr=False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory of the weights."""
        return dense_footprint(self.tensors)

    @property
    def seconds_per_position(self) -> float:
        return 2 * self.processor.hop / self.processor.rate


def open_whisper(path: Path) -> WhisperFiles:
    """Read a checkpoint of `transformers` or CTranslate2 in the directory `path`.

    Raises:
        CheckpointError: a file is missing, damaged or inconsistent.
        UnsupportedModel: it is another model, or needs an unsupported feature.
    """
    tokenizer = Tokenizer.open(path) if path.is_dir() else None
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json, which a Whisper checkpoint needs", path=path)
    if (path / MODEL_BIN).exists():
        config, tensors, rules = _read_ctranslate2(path)
    else:
        config, tensors, rules = _read_transformers(path)
    special = _special_tokens(rules, tokenizer, config, path)
    if (path / _PROCESSOR).exists():
        processor = read_sound_processor(read_object(path / _PROCESSOR), padding="chunk")
    else:
        raw = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": config.num_mels}
        processor = read_sound_processor(raw, padding="chunk")
    found = (processor.num_bands, processor.num_frames(0))
    if found != (config.num_mels, config.num_frames):
        raise CheckpointError(
            f"{_PROCESSOR} makes {found[0]} bands and {found[1]} frames; the model takes {config.num_mels} and "
            f"{config.num_frames}",
            path=path,
        )
    return WhisperFiles(path, config, special, tokenizer, processor, tensors)


def whisper_tensors(config: WhisperConfig) -> dict[str, EncoderTensor]:
    """The tensors of `transformers` by canonical name; the prefix is `model.`."""
    hidden = config.hidden_size
    found = encoder_tensors(
        num_layers=config.encoder_layers,
        hidden=hidden,
        width=config.encoder_width,
        num_mels=config.num_mels,
        positions=config.sound_positions,
        prefix="encoder.",
    )
    found["decoder.positions"] = EncoderTensor(
        "decoder.embed_positions.weight", (config.text_positions, hidden)
    )
    for layer in range(config.decoder_layers):
        name = f"decoder.layers.{layer}"
        found |= attention_tensors(name, f"{name}.self_attn", hidden)
        found |= mlp_tensors(name, name, hidden, config.decoder_width)
        found |= attention_tensors(f"{name}.cross", f"{name}.encoder_attn", hidden)
    found |= with_bias("decoder.final_norm", "decoder.layer_norm", (hidden,))
    found["embed"] = EncoderTensor("decoder.embed_tokens.weight", (config.vocab_size, hidden))
    return found


def _ref(tensor: EncoderTensor, place: TensorRef) -> MatrixRef:
    return MatrixRef.of(place, FLOAT_FORMATS[place.dtype], tensor.rows, tensor.cols, tensor.landing)


def _require_heads(config: WhisperConfig, path: Path) -> WhisperConfig:
    for heads in (config.encoder_heads, config.decoder_heads):
        if config.hidden_size % heads:
            raise CheckpointError(
                f"{path}: the hidden size {config.hidden_size} is not a multiple of the number of heads, {heads}",
                path=path,
            )
    return config


# ── checkpoints of transformers ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """The rules of decoding in a checkpoint's files; None if a file does not say.

    ids: name of a special token in the files -> its id, to compare with the tokenizer's.
    """

    ids: Mapping[str, int]
    is_multilingual: bool | None
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    most_initial_positions: int | None


def _read_transformers(path: Path) -> tuple[WhisperConfig, dict[str, MatrixRef], _Rules]:
    raw = read_object(path / _CONFIG)
    reader = ConfigReader(raw, "whisper", path / _CONFIG)
    reader.one_of("model_type", "", ("whisper",))
    config = _require_heads(_read_config(reader), path)
    accounts = TensorAccounts(path, open_tensors(path), FLOAT_FORMATS)
    tensors = {}
    for canonical, tensor in whisper_tensors(config).items():
        place, _ = accounts.take("model." + tensor.name, tensor.shape)
        tensors[canonical] = _ref(tensor, place)
    generation = read_object(path / _GENERATION) if (path / _GENERATION).exists() else raw
    return (
        config,
        tensors,
        _read_rules(generation, path / (_GENERATION if generation is not raw else _CONFIG)),
    )


def _read_config(reader: ConfigReader) -> WhisperConfig:
    """Read `config.json`, as `WhisperConfig` in transformers 5.24 does."""
    reader.one_of("activation_function", "gelu", ("gelu",))
    reader.neutral("scale_embedding", False)
    reader.neutral("tie_word_embeddings", True)
    reader.neutral("is_encoder_decoder", True)
    reader.passed(
        "bos_token_id", "eos_token_id", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids",
        "encoder_layerdrop", "decoder_layerdrop", "dropout", "activation_dropout", "init_std",
        "use_weighted_layer_sum", "classifier_proj_size", "apply_spec_augment", "mask_time_prob",
        "mask_time_length", "mask_time_min_masks", "mask_feature_prob", "mask_feature_length",
        "mask_feature_min_masks", "median_filter_width",
    )  # fmt: skip
    encoder_layers = reader.integer("encoder_layers", default=4, most=MOST_LAYERS)
    reader.passed("num_hidden_layers")  # the encoder's, or null
    config = WhisperConfig(
        hidden_size=reader.integer("d_model", default=384, most=1 << 16),
        num_mels=reader.integer("num_mel_bins", default=80, most=1024),
        vocab_size=reader.integer("vocab_size", default=51865),
        encoder_layers=encoder_layers,
        encoder_heads=reader.integer("encoder_attention_heads", default=6),
        encoder_width=reader.integer("encoder_ffn_dim", default=1536),
        decoder_layers=reader.integer("decoder_layers", default=4, most=MOST_LAYERS),
        decoder_heads=reader.integer("decoder_attention_heads", default=6),
        decoder_width=reader.integer("decoder_ffn_dim", default=1536),
        sound_positions=reader.integer("max_source_positions", default=1500, most=1 << 16),
        text_positions=reader.integer("max_target_positions", default=448, least=16, most=1 << 16),
    )
    reader.finish()
    return config


def _read_rules(raw: Mapping[str, object], path: Path) -> _Rules:
    """Read what `generation_config.json` says; in old checkpoints `config.json` says less."""
    reader = ConfigReader(raw, "whisper", path)
    ids = {}
    for name in ("decoder_start_token_id", "eos_token_id", "no_timestamps_token_id", "prev_sot_token_id"):
        if found := reader.token_ids(name):
            ids[name] = found[0]
    for group in ("lang_to_id", "task_to_id"):
        for name, token_id in (reader.mapping(group) or {}).items():
            if type(token_id) is not int:
                raise CheckpointError(f"{path.name}: {group} maps {name!r:.40} to no token id", path=path)
            ids[name if group == "lang_to_id" else f"<|{name}|>"] = token_id
    multilingual = reader.flag("is_multilingual", False) if reader.has("is_multilingual") else None
    return _Rules(
        ids=ids,
        is_multilingual=multilingual,
        suppressed=reader.token_ids("suppress_tokens"),
        suppressed_first=reader.token_ids("begin_suppress_tokens"),
        most_initial_positions=reader.optional_integer("max_initial_timestamp_index", least=0),
    )


_SPELLINGS = {
    "decoder_start_token_id": "<|startoftranscript|>",
    "eos_token_id": "<|endoftext|>",
    "no_timestamps_token_id": "<|notimestamps|>",
    "prev_sot_token_id": "<|startofprev|>",
}


def _special_tokens(rules: _Rules, tokenizer: Tokenizer, config: WhisperConfig, path: Path) -> SpecialTokens:
    def find(spelling: str) -> int:
        token_id = tokenizer.control_id(spelling)
        if token_id is None:
            raise CheckpointError(f"{path}: the tokenizer has no token {spelling}", path=path)
        return token_id

    for name, token_id in rules.ids.items():
        if (own := find(_SPELLINGS.get(name, name))) != token_id:
            raise CheckpointError(
                f"{path}: {name} is token {token_id}, and the tokenizer has it as {own}", path=path, key=name
            )
    is_multilingual = rules.is_multilingual
    if is_multilingual is None:
        is_multilingual = config.vocab_size >= _MULTILINGUAL_VOCABULARY
    languages = {}
    if is_multilingual:
        for token_id in sorted(tokenizer.control_ids):
            if (match := _LANGUAGE.fullmatch(tokenizer.token_text(token_id))) is not None:
                languages[match[1]] = token_id
    special = SpecialTokens(
        start=find("<|startoftranscript|>"),
        end=find("<|endoftext|>"),
        previous=find("<|startofprev|>"),
        no_timestamps=find("<|notimestamps|>"),
        transcribe=find("<|transcribe|>"),
        translate=find("<|translate|>"),
        languages=languages,
        suppressed=rules.suppressed,
        suppressed_first=rules.suppressed_first,
        most_initial_positions=rules.most_initial_positions,
    )
    largest = max(special.timestamps + config.sound_positions, *rules.suppressed, *rules.suppressed_first, 0)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the model has {config.vocab_size} tokens, and token {largest} is needed for timestamps or "
            "suppressed",
            path=path,
            needed=largest + 1,
            found=config.vocab_size,
        )
    if special.end >= special.no_timestamps or (is_multilingual and not languages):
        raise CheckpointError(
            f"{path}: the special tokens of the tokenizer are not those of Whisper", path=path
        )
    return special


# ── models of CTranslate2 ───────────────────────────────────────────────────────────────────────────────────────

_BIN_NAME, _BIN_REVISION = "WhisperSpec", 3
_GELU = 3
# Values that change the mathematics, and the only ones that Whisper has.
_BIN_SCALARS = {
    "decoder/activation": _GELU,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
    "encoder/activation": _GELU,
}
_BIN_PASSED = frozenset({"decoder/alignment_heads", "decoder/alignment_layer"})


def _read_ctranslate2(path: Path) -> tuple[WhisperConfig, dict[str, MatrixRef], _Rules]:
    model = read_model_bin(path / MODEL_BIN)
    if (model.name, model.revision) != (_BIN_NAME, _BIN_REVISION):
        raise UnsupportedModel(
            f"{MODEL_BIN} holds {model.name!r:.40}, revision {model.revision}; supported: {_BIN_NAME}, revision "
            f"{_BIN_REVISION}",
            path=path,
            key="name",
            value=model.name,
            supported=[_BIN_NAME],
        )
    if model.aliases.get("decoder/projection/weight") != "decoder/embeddings/weight":
        raise UnsupportedModel(
            f"{MODEL_BIN}: the last product has weights of its own; supported: those of the embeddings",
            path=path,
            key="decoder/projection/weight",
            value=model.aliases.get("decoder/projection/weight"),
            supported=["decoder/embeddings/weight"],
        )
    config = _require_heads(_bin_config(model, path), path)
    tensors = _bin_tensors(model, config, path)
    raw = read_object(path / _CONFIG)
    reader = ConfigReader(raw, "whisper", path / _CONFIG)
    reader.passed("alignment_heads", "lang_ids")
    suppressed = reader.token_ids("suppress_ids")
    suppressed_first = reader.token_ids("suppress_ids_begin")
    reader.finish()
    return config, tensors, _Rules(
        ids={},
        is_multilingual=None,
        suppressed=suppressed,
        suppressed_first=suppressed_first,
        most_initial_positions=_MOST_INITIAL_POSITIONS,
    )  # fmt: skip


def _bin_config(model: ModelBin, path: Path) -> WhisperConfig:
    def shape(name: str, num_axes: int = 2) -> tuple[int, ...]:
        ref = model.tensors.get(name)
        if ref is None or len(ref.shape) != num_axes or not all(ref.shape):
            raise CheckpointError(
                f"{MODEL_BIN} has no {name} with {num_axes} axes", path=path / MODEL_BIN, tensor=name
            )
        return ref.shape

    def heads(side: str) -> int:
        value = model.scalars.get(f"{side}/num_heads", 0)
        if value < 1:
            raise CheckpointError(f"{MODEL_BIN}: {side}/num_heads is {value}, expected 1 or more", path=path)
        return int(value)

    def layers(side: str) -> int:
        """As many as follow each other; one beyond a gap is a tensor that nothing takes."""
        count = 0
        while f"{side}/layer_{count}/ffn/linear_0/weight" in model.tensors:
            count += 1
        return count

    vocab_size, hidden_size = shape("decoder/embeddings/weight")
    return WhisperConfig(
        hidden_size=hidden_size,
        num_mels=shape("encoder/conv1/weight", 3)[1],
        vocab_size=vocab_size,
        encoder_layers=layers("encoder"),
        encoder_heads=heads("encoder"),
        encoder_width=shape("encoder/layer_0/ffn/linear_0/weight")[0],
        decoder_layers=layers("decoder"),
        decoder_heads=heads("decoder"),
        decoder_width=shape("decoder/layer_0/ffn/linear_0/weight")[0],
        sound_positions=shape("encoder/position_encodings/encodings")[0],
        text_positions=shape("decoder/position_encodings/encodings")[0],
    )


def _bin_tensors(model: ModelBin, config: WhisperConfig, path: Path) -> dict[str, MatrixRef]:
    """Places by canonical name; matrices that CTranslate2 keeps one below the other are taken apart."""
    for name, value in model.scalars.items():
        if name not in _BIN_SCALARS and not name.endswith("/num_heads") and name not in _BIN_PASSED:
            raise UnsupportedModel(
                f"{MODEL_BIN} sets {name!r:.80} to {value}, which is not known here", key=name
            )
    for name, needed in _BIN_SCALARS.items():
        if (value := model.scalars.get(name, needed)) != needed:
            raise UnsupportedModel(
                f"{MODEL_BIN} asks for {name} {value:g}; supported: {needed}",
                path=path,
                key=name,
                value=value,
                supported=[needed],
            )
    accounts = TensorAccounts(
        path, model.tensors, FLOAT_FORMATS, hint="convert the model with --quantization float16"
    )
    expected = whisper_tensors(config)
    tensors: dict[str, MatrixRef] = {}
    taken: set[str] = set(_BIN_PASSED)

    def take(theirs: str, *names: str) -> None:
        """The rows of one tensor belong to the canonical `names` in turn."""
        shapes = [expected[name].shape if name in expected else (config.hidden_size,) for name in names]
        rows = sum(shape[0] for shape in shapes)
        place, format = accounts.take(theirs, (rows, *shapes[0][1:]))
        taken.add(theirs)
        at = place.offset
        for name, shape in zip(names, shapes, strict=True):
            tensor = expected.get(name, EncoderTensor(name, shape))
            nbytes = tensor.rows * tensor.cols * BYTES_PER_VALUE[format]
            tensors[name] = replace(_ref(tensor, place), offset=at, nbytes=nbytes)
            at += nbytes

    def linear(theirs: str, *names: str) -> None:
        take(f"{theirs}/weight", *names)
        take(f"{theirs}/bias", *(f"{name}_bias" for name in names))

    def norm(theirs: str, name: str) -> None:
        take(f"{theirs}/gamma", name)
        take(f"{theirs}/beta", f"{name}_bias")

    linear("encoder/conv1", "convolution.0")
    linear("encoder/conv2", "convolution.1")
    take("decoder/embeddings/weight", "embed")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        take(f"{side}/position_encodings/encodings", f"{side}.positions")
        norm(f"{side}/layer_norm", f"{side}.final_norm")
        for layer in range(layers):
            ours, theirs = f"{side}.layers.{layer}", f"{side}/layer_{layer}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.attn_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.{one}" for one in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.o")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.up")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.down")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.cross.attn_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.cross.q")
                linear(f"{theirs}/attention/linear_1", f"{ours}.cross.k", f"{ours}.cross.v")
                linear(f"{theirs}/attention/linear_2", f"{ours}.cross.o")
    for name in model.tensors.keys() - taken:
        raise CheckpointError(
            f"{MODEL_BIN} has the tensor {name!r:.80}, which no Whisper has", path=path, tensor=name
        )
    return tensors
