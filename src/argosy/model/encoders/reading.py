"""Find the towers of a model in its files, and read them when they are first needed.

    ModelFiles  ->  find_encoders  ->  EncoderFiles: config, places of tensors  ->  Encoders.open  ->  a tower
                                                    processor settings          ->  processor

A tower that cannot run does not prevent text from running: its error is raised for the first picture or sound.

Elsewhere: a tower's file says where families keep it, `mmproj.py` how GGUF files describe them;
`engine/media/prompt_media.py` gives them pictures and sounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from argosy import _native
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.gguf_names import GGUF_METADATA_FILE
from argosy.checkpoint.landing import MatrixRef, Widened
from argosy.checkpoint.safetensors import TensorRef
from argosy.checkpoint.untrusted_file import read_object
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.media.parts import PROMPT_LIMITS, Kind
from argosy.media.patches import PictureProcessor
from argosy.media.pictures import read_picture_processor
from argosy.media.settings import PROCESSOR_FILES, VIDEO_FILES
from argosy.media.sounds import SoundProcessor, read_sound_processor
from argosy.media.videos import VideoProcessor, read_video_processor
from argosy.model.encoders.blocks import FLOAT_BYTES, attention_flop
from argosy.model.encoders.encoder import Encoder, Shape, Tower, VideoForm
from argosy.model.encoders.mlx_towers import has_tower, in_mlx, mlx_name
from argosy.model.encoders.mmproj import TowerInFile, is_of, read_towers
from argosy.model.encoders.table import ENCODERS
from argosy.model.families import CONFIG_FILE
from argosy.model.reading.accounts import FLOAT_FORMATS, TensorAccounts
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.mistral_params import find_config, read_raw
from argosy.model.weights import DenseReading, dense_footprint, is_vector

# Bytes of a tower read between two steps: reads in flight when a step begins compete with the step's expert reads,
# so they are few, and yield to those. Waiting for one tensor takes no longer than this, however slow the drive.
READ_BYTES = 16 << 20
READ_MS = 5
MEL_FRAMES_PER_SECOND = 100  # in every encoder here: 16,000 samples in hops of 160
_TOKENIZER_CONFIG, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"
_MMPROJ_HINT = "take the Q8_0, F16, BF16 or F32 file; those are published beside others"
_BLOCKS, _BLOCK_VALUES, _BLOCK_BYTES = "Q8_0", 32, 34

Processor = PictureProcessor | SoundProcessor | VideoProcessor


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """The video settings of a checkpoint.

    token_id: the placeholder that the chat template writes.
    settings: the processor's settings, as `EncoderFiles.settings`.
    angles_per_second: the rotary positions that a second takes, in families where they tell time.
    """

    token_id: int
    settings: tuple[Mapping[str, object], str] | ArgosyError
    angles_per_second: int = 0


@dataclass(frozen=True)
class EncoderFiles:
    """One tower on disk.

    config: the config that the tower's file in this package reads.
    tensors: by canonical name.
    token_id: the placeholder that the chat template writes.
    marks: token ids before and after a span, if the chat template does not write them.
    settings: settings of the tower's processor, and the name of their file; or the reason for their absence.
    video: None if the tower is not used for video, or the files name no placeholder for a video.
    """

    encoder: Encoder
    config: Any
    tensors: Mapping[str, MatrixRef]
    token_id: int
    marks: tuple[int, int] | None
    settings: tuple[Mapping[str, object], str] | ArgosyError
    video: VideoFiles | None = None

    @property
    def weight_bytes(self) -> int:
        """The bytes of memory of the weights."""
        return dense_footprint(self.tensors)

    def processor(self, image_tokens: int) -> Processor:
        """Create the processor of the tower's media; a picture gets at most `image_tokens` positions.

        Raises:
            CheckpointError, UnsupportedModel: its settings are missing, malformed, not supported, or for another tower.
            UsageError: the cap is below this processor's minimum.
        """
        if isinstance(self.settings, ArgosyError):
            raise self.settings
        raw, where = self.settings
        processor: Processor
        if self.encoder.kind == "picture":
            implied = {} if self.encoder.settings is None else self.encoder.settings(self.config)
            processor = read_picture_processor(raw, implied, most_tokens=image_tokens, where=where)
            sizes = {
                "patch_size": (processor.patch_size, self.config.patch_size),
                "merge_size": (processor.merge_size, self.config.merge),
                "temporal_patch_size": (processor.frames, getattr(self.config, "patch_frames", 1)),
            }
            for name, side in processor.sides.items():
                of_tower = self.config.position_side if name == "size" else self.config.window_side
                sizes[name] = (side, of_tower * self.config.patch_size)
        else:
            processor = read_sound_processor(raw, padding=self.encoder.sound_padding, where=where)
            sizes = {"feature_size": (processor.num_bands, self.config.num_mels)}
        self._require_sizes(sizes, where)
        return processor

    def video_processor(self, video_tokens: int, image_tokens: int) -> VideoProcessor:
        """Create the processor of videos, with caps on the positions of a video and of a group of frames.

        Raises:
            CheckpointError, UnsupportedModel: as `processor`; or the checkpoint names no placeholder for videos.
        """
        assert self.encoder.video is not None
        if self.video is None:
            key = self.encoder.video.placeholder
            raise UnsupportedModel(
                f"the model's files name no placeholder for videos in the vocabulary ({key}), so it cannot take any",
                key=key,
                hint="pass pictures of its frames",
            )
        if isinstance(self.video.settings, ArgosyError):
            raise self.video.settings
        raw, where = self.video.settings
        processor = read_video_processor(
            raw, most_tokens=video_tokens, most_group_tokens=image_tokens, where=where
        )
        frames = max(getattr(self.config, "patch_frames", 1), self.encoder.video.most_frames(self.config))
        sizes = {
            "patch_size": (processor.patch_size, self.config.patch_size),
            "merge_size": (processor.merge_size, self.config.merge),
            "temporal_patch_size": (processor.group_frames, frames),
        }
        self._require_sizes(sizes, where)
        return processor

    def _require_sizes(self, sizes: Mapping[str, tuple[int, int]], where: str) -> None:
        """Compare the sizes that a processor makes with those that the tower expects."""
        for name, (made, taken) in sizes.items():
            if made != taken:
                raise CheckpointError(
                    f"{where} has {name} {made}, and the encoder of {self.encoder.kind}s takes {taken}",
                    key=name,
                )

    def largest_shape(self, processor: Processor) -> Shape:
        """Return the shape of the largest input that this processor makes."""
        if isinstance(processor, PictureProcessor):
            return processor.largest_grid()
        if isinstance(processor, VideoProcessor):
            assert processor.most_group_tokens is not None
            frames = 1 if processor.are_joined else processor.group_frames
            return (frames, self.config.merge, self.config.merge * processor.most_group_tokens)
        return (round(PROMPT_LIMITS.sound_s * MEL_FRAMES_PER_SECOND),)

    def num_positions(self, shape: Shape) -> int:
        return self.encoder.num_positions(self.config, shape)

    def written(self, shape: Shape) -> Mapping[int, str]:
        """Return what `Encoder.written` returns."""
        return {} if self.encoder.written is None else self.encoder.written(self.config, shape)

    def flop(self, grid: Shape) -> int:
        """Floating-point operations of the products and of the attention of a picture."""
        if self.encoder.flop is not None:
            return self.encoder.flop(self.config, grid)
        (rows, pairs), cells = self._extent(grid), self.num_positions(grid) - len(self.written(grid))
        found = 0
        for name, ref in self.tensors.items():
            if is_vector(name) or name.startswith(("position", "cls")):
                continue
            # The part after the layers joins patches: it runs once for each position of the prompt.
            times = rows if name.startswith(("layers.", "patch")) else cells
            found += 2 * ref.rows * ref.cols * times
        width: int = getattr(self.config, "query_size", self.config.hidden_size)
        attention: int = self.config.num_layers * attention_flop(pairs, width)
        return found + attention

    def _extent(self, grid: Shape) -> tuple[int, int]:
        """Return what `Encoder.extent` returns."""
        if self.encoder.extent is not None:
            return self.encoder.extent(self.config, grid)
        return math.prod(grid), math.prod(grid) * math.prod(grid[1:])

    def peak_bytes(self, shape: Shape) -> int:
        """Return the most bytes that encoding an input of this shape allocates, rows and a picture's
        patches included.
        """
        values = self._extent(shape)[0] * self.config.patch_values if self.encoder.kind == "picture" else 0
        return FLOAT_BYTES * values + self.encoder.peak_bytes(self.config, shape)


def find_encoders(files: ModelFiles) -> dict[Kind, EncoderFiles | ArgosyError]:
    """Find the towers whose tensors exist; a tower that cannot run is represented by the error that says why.

    A pack contains the towers that were found when it was made.
    """
    found: dict[Kind, EncoderFiles | ArgosyError] = {}
    if files.mmproj is not None:
        try:
            return _read_mmproj(files)
        except (UnsupportedModel, CheckpointError) as error:
            return {"picture": error}
    for encoder in ENCODERS.get(files.config.family, ()):
        if has_tower(files.config.family, encoder.prefix or encoder.first_prefix, files.others):
            try:
                found[encoder.kind] = _read(files, encoder)
            except (UnsupportedModel, CheckpointError) as error:
                found[encoder.kind] = error
    return found


def runnable(encoders: Mapping[Kind, EncoderFiles | ArgosyError]) -> dict[Kind, EncoderFiles]:
    """Select the towers that can run."""
    return {kind: one for kind, one in encoders.items() if isinstance(one, EncoderFiles)}


def tensor_names(encoders: Mapping[Kind, EncoderFiles | ArgosyError]) -> set[str]:
    """Return the names, in the files, of all tensors that these towers need."""
    return {ref.name for tower in runnable(encoders).values() for ref in tower.tensors.values()}


def _read_settings(
    directory: Path, kind: Kind, *, is_needed: bool = True
) -> tuple[Mapping[str, object], str] | ArgosyError:
    names = VIDEO_FILES if kind == "video" else PROCESSOR_FILES
    paths = [path for name in names if (path := directory / name).exists()]
    if not paths and not is_needed:
        return {}, find_config(directory).name
    if not paths:
        return CheckpointError(
            f"{directory} has no {names[0]}, which says how a {kind} is prepared for its encoder",
            hint="copy it from where the model came from",
            path=directory,
        )
    try:
        # A file that all processors share takes precedence over older files.
        for path in paths if kind == "video" else ():
            if "video_processor" in (raw := read_object(path)):
                return raw, path.name
        return read_object(paths[0]), paths[0].name
    except CheckpointError as error:
        return error


def _read(files: ModelFiles, encoder: Encoder) -> EncoderFiles:
    raw, path = read_raw(files.path)
    around = ConfigReader(raw, files.config.family, path)
    for key in encoder.path[:-1]:
        around = _inner(around, key, files.config.family)
    own = _inner(around, encoder.path[-1], files.config.family)
    config = encoder.read(own, around, files.config)
    accounts = TensorAccounts(files.path, files.others, FLOAT_FORMATS)
    tensors = encoder.tensors(config)
    names = {canonical: encoder.prefix + tensor.name for canonical, tensor in tensors.items()}
    for theirs in (
        {canonical: mlx_name(files.config.family, name) for canonical, name in names.items()},
        {canonical: f"model.{name}" for canonical, name in names.items()},  # the modules of transformers
    ):
        if any(name != names[canonical] and name in accounts for canonical, name in theirs.items()):
            names = theirs
            break
    _require_floats(accounts, names.values())
    return EncoderFiles(
        encoder,
        config,
        _take_tensors(accounts, encoder, config, names, is_gguf=False),
        token_id=_token_id(around, encoder.placeholders, files),
        marks=_marks(around, encoder, files),
        settings=_read_settings(files.path, encoder.kind, is_needed=encoder.settings is None)
        if encoder.has_processor_file
        else ({}, path.name),
        video=None if encoder.video is None else _video(around, encoder.video, files),
    )


def _read_mmproj(files: ModelFiles) -> dict[Kind, EncoderFiles | ArgosyError]:
    """Find the towers of a GGUF model."""
    if isinstance(files.mmproj, ArgosyError):
        raise files.mmproj
    assert files.mmproj is not None
    header = files.header or read_gguf(files.path / GGUF_METADATA_FILE)
    tokens = header.texts("tokenizer.ggml.tokens")
    found: dict[Kind, EncoderFiles | ArgosyError] = {}
    for kind, tower in read_towers(files.mmproj, files.config).items():
        try:
            found[kind] = tower if isinstance(tower, ArgosyError) else _in_gguf(tower, files, header, tokens)
        except (UnsupportedModel, CheckpointError) as error:
            found[kind] = error
    return found


def _in_gguf(tower: TowerInFile, files: ModelFiles, header: GgufFile, tokens: list[str]) -> EncoderFiles:
    assert isinstance(files.mmproj, GgufFile)
    path, kind, projector = files.mmproj.path, tower.encoder.kind, tower.projector
    of_kind = {name: _with_blocks(ref) for name, ref in files.others.items() if is_of(kind, name)}
    accounts = TensorAccounts(path, of_kind, {**FLOAT_FORMATS, _BLOCKS: "f32"}, hint=_MMPROJ_HINT)
    tensors = _take_tensors(accounts, tower.encoder, tower.config, tower.names, is_gguf=True)
    accounts.refuse_extra(
        files.config,
        lambda name: name in projector.unused,
        f"the tower that {path.name} describes for {kind}s",
    )

    def id_of(token: str) -> int:
        if token not in tokens:
            raise CheckpointError(
                f"{header.path.name} has no token {token}, which stands for a {kind}, or is beside one",
                path=header.path,
                key="tokenizer.ggml.tokens",
            )
        return _in_vocabulary(tokens.index(token), token, header.path, files)

    return EncoderFiles(
        tower.encoder,
        tower.config,
        tensors,
        token_id=id_of(projector.placeholder),
        marks=None if projector.marks is None else (id_of(projector.marks[0]), id_of(projector.marks[1])),
        settings=(tower.settings, path.name),
    )


def _with_blocks(ref: TensorRef) -> TensorRef:
    """Return a tensor of a GGUF file; a pack stores its blocks as rows of bytes."""
    if ref.dtype != "U8" or not ref.shape or ref.shape[-1] % _BLOCK_BYTES:
        return ref
    return replace(ref, dtype=_BLOCKS, shape=(*ref.shape[:-1], ref.shape[-1] // _BLOCK_BYTES * _BLOCK_VALUES))


def _require_floats(accounts: TensorAccounts, names: Iterable[str]) -> None:
    """Refuse a tower that MLX quantised: its products would round activations, which no reference of it does."""
    for name in names:
        scales = f"{name.removesuffix('weight')}scales"
        if name.endswith(".weight") and scales in accounts:
            raise UnsupportedModel(
                f"{accounts.path.name}: {name} is quantised (its scales are {scales}); supported: towers in "
                f"{', '.join(FLOAT_FORMATS)}",
                hint="text runs; for pictures and sound, get a conversion whose tower is not quantised",
                path=accounts.path,
                tensor=name,
            )


def _take_tensors(
    accounts: TensorAccounts, encoder: Encoder, config: Any, names: Mapping[str, str], *, is_gguf: bool
) -> dict[str, MatrixRef]:
    """Take the tensors of a tower by canonical name; `names` are their names in the files."""
    tensors = {}
    for canonical, tensor in encoder.tensors(config).items():
        # llama.cpp's converter gives the bias of a convolution two more axes.
        other, other_landing = ((*tensor.shape, 1, 1), tensor.landing) if is_gguf else in_mlx(tensor)
        ref, format = accounts.take(names[canonical], tensor.shape, other)
        block_type = _BLOCKS if ref.dtype == _BLOCKS else None
        if block_type is not None and (is_vector(canonical) or tensor.taps):
            raise CheckpointError(
                f"{ref.path.name}: {ref.name} is {_BLOCKS}, and a norm, a bias or a convolution is not quantised",
                path=ref.path,
                tensor=ref.name,
            )
        landing = tensor.landing if ref.shape == tensor.shape else other_landing
        if block_type is not None:
            landing = Widened(block_type)
        tensors[canonical] = MatrixRef.of(ref, format, tensor.rows, tensor.cols, landing)
    return tensors


def _inner(reader: ConfigReader, key: str, family: str) -> ConfigReader:
    raw = reader.beginning_with(key[:-1]) if key.endswith("*") else reader.mapping(key)
    if raw is None:
        raise CheckpointError(
            f"{CONFIG_FILE} has no {key}, and the files have a tower that it describes", key=key
        )
    return ConfigReader(
        # mlx-vlm once noted with `skip_vision` that a tower keeps its floats.
        {name: value for name, value in raw.items() if name not in ("model_type", "skip_vision")},
        family,
        within=key,
    )


def _video(around: ConfigReader, form: VideoForm, files: ModelFiles) -> VideoFiles | None:
    token_id = next(iter(around.token_ids(form.placeholder)), None)
    if token_id is None or token_id >= files.config.vocab_size:
        return None
    per_second = 0 if form.time_key is None else around.integer(form.time_key, default=25)
    return VideoFiles(token_id, _read_settings(files.path, "video"), per_second)


def _marks(around: ConfigReader, encoder: Encoder, files: ModelFiles) -> tuple[int, int] | None:
    if encoder.marks is None:
        return None
    before, after = encoder.marks
    return _token_id(around, (before,), files), _token_id(around, (after,), files)


def _token_id(around: ConfigReader, keys: Sequence[str], files: ModelFiles) -> int:
    """Return the token id under the first of these keys that exists; a key that is no name is the token itself."""
    for key in keys:
        if not key.isidentifier():
            for name in (_TOKENIZER_CONFIG, _TOKENIZER):
                if (token_id := _added_tokens(files.path / name).get(key)) is not None:
                    return _in_vocabulary(token_id, key, files.path / name, files)
            raise CheckpointError(
                f"{_TOKENIZER_CONFIG} has no token {key} in added_tokens_decoder, which stands for a picture",
                key=key,
            )
        for token_id in around.token_ids(key):
            return _in_vocabulary(token_id, key, files.path / CONFIG_FILE, files)
    raise CheckpointError(f"{CONFIG_FILE} has no {keys[0]}", key=keys[0])


def _added_tokens(path: Path) -> dict[str, int]:
    """Return the ids of the tokens that a file of the tokenizer adds; the two files spell them differently."""
    if not path.exists():
        return {}
    raw = read_object(path)
    found, listed = raw.get("added_tokens_decoder"), raw.get("added_tokens")
    tokens: list[tuple[object, object]] = []
    if isinstance(found, dict):
        tokens = [
            (int(token_id), token)
            for token_id, token in found.items()
            if token_id.isdecimal() and len(token_id) < 10
        ]
    elif isinstance(listed, list):
        tokens = [(token.get("id"), token) for token in listed if isinstance(token, dict)]
    return {
        str(token.get("content")): token_id
        for token_id, token in tokens
        if type(token_id) is int and token_id >= 0 and isinstance(token, dict)
    }


def _in_vocabulary(token_id: int, key: str, path: Path, files: ModelFiles) -> int:
    if token_id >= files.config.vocab_size:
        raise CheckpointError(
            f"{path.name} gives {key} as {token_id}; the vocabulary has {files.config.vocab_size}",
            path=path,
            key=key,
        )
    return token_id


class Encoders:
    """The towers of a model; each is read on first use, and stays until it is dropped."""

    def __init__(
        self,
        files: Mapping[Kind, EncoderFiles],
        store: _native.Store,
        runtime: _native.Runtime,
        *,
        open_file: Callable[[str], int],
    ) -> None:
        self.files = files
        self._store = store
        self._runtime = runtime
        self._open_file = open_file
        self._open: dict[Kind, Tower] = {}
        self._reading: dict[Kind, DenseReading] = {}

    def open(self, kind: Kind) -> Generator[None, None, Tower]:
        """Return the tower for this kind, read in pieces if it is not in memory; concurrent callers share the reads.

        Raises:
            ReadFailed: the drive failed.   CheckpointError: a norm or bias holds NaN or infinity.
            CorruptRecord: a packed tensor does not match its checksum.
        """
        while kind not in self._open:
            files = self.files[kind]
            if kind not in self._reading:
                self._reading[kind] = DenseReading(
                    self._store,
                    files.tensors,
                    open_file=self._open_file,
                    urgency="maybe",
                    most_bytes=READ_BYTES,
                )
            try:
                weights = self._reading[kind].advance(READ_MS)
            except BaseException:
                del self._reading[kind]
                raise
            if weights is None:
                yield
                continue
            del self._reading[kind]
            self._open[kind] = files.encoder.open(files.config, weights, self._runtime)
        return self._open[kind]

    def drop(self) -> None:
        """Free the weights of all towers. A tower that is encoding keeps its weights until it is done."""
        for reading in self._reading.values():
            reading.cancel()
        self._reading.clear()
        self._open.clear()
