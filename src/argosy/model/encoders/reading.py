"""Find the towers of a model in its files, and read them when they are first needed.

    ModelFiles  ->  find_encoders  ->  EncoderFiles: config, places of tensors  ->  Encoders.open  ->  a tower

A tower that cannot be run does not keep text from running: the error is raised for the first picture or sound.

Elsewhere: `table.py` knows where a family keeps its towers; `engine/media.py` gives them pictures and sounds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from argosy import _native
from argosy.checkpoint.files import MatrixRef, ModelFiles
from argosy.checkpoint.untrusted_file import read_object
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.media.parts import PROMPT_LIMITS, Kind
from argosy.model.encoders.table import ENCODERS, Encoder, Shape, Tower
from argosy.model.families import CONFIG_FILE
from argosy.model.families.accounts import FLOAT_FORMATS, TensorAccounts
from argosy.model.families.config_reader import ConfigReader
from argosy.model.weights import dense_footprint, load_dense

MEL_FRAMES_PER_SECOND = 100  # of every encoder here: 16,000 samples in hops of 160


@dataclass(frozen=True)
class EncoderFiles:
    """One tower on disk.

    config: as its file in this package reads it.
    tensors: by canonical name.
    token_id: the placeholder that the chat template writes.
    """

    encoder: Encoder
    config: Any
    tensors: Mapping[str, MatrixRef]
    token_id: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory of the weights."""
        return dense_footprint(self.tensors)

    def largest_shape(self, image_tokens: int) -> Shape:
        """The shape of the largest input: a picture of so many positions, or the longest sound."""
        if self.encoder.kind == "picture":
            merge: int = self.config.merge
            return (1, merge, merge * image_tokens)
        return (round(PROMPT_LIMITS.sound_s * MEL_FRAMES_PER_SECOND),)

    def num_positions(self, shape: Shape) -> int:
        return self.encoder.num_positions(self.config, shape)

    def peak_bytes(self, shape: Shape) -> int:
        """Most bytes that encoding an input of this shape allocates, its rows included."""
        return self.encoder.peak_bytes(self.config, shape)


def find_encoders(files: ModelFiles) -> dict[Kind, EncoderFiles | ArgosyError]:
    """Find the towers whose tensors are there; for one that cannot be run, the error says why.

    A GGUF file has none: its tower is in a file of its own. A pack has those that were found when it was made.
    """
    found: dict[Kind, EncoderFiles | ArgosyError] = {}
    for encoder in ENCODERS.get(files.config.family, ()):
        if any(name.startswith(encoder.prefix) for name in files.others):
            try:
                found[encoder.kind] = _read(files, encoder)
            except (UnsupportedModel, CheckpointError) as error:
                found[encoder.kind] = error
    return found


def runnable(encoders: Mapping[Kind, EncoderFiles | ArgosyError]) -> dict[Kind, EncoderFiles]:
    """The towers among those that were found which can be run."""
    return {kind: one for kind, one in encoders.items() if isinstance(one, EncoderFiles)}


def tensor_names(encoders: Mapping[Kind, EncoderFiles | ArgosyError]) -> set[str]:
    """Names in the files of all tensors that these towers need."""
    return {ref.name for tower in runnable(encoders).values() for ref in tower.tensors.values()}


def _read(files: ModelFiles, encoder: Encoder) -> EncoderFiles:
    path = files.path / CONFIG_FILE
    around = ConfigReader(read_object(path), files.config.family, path)
    for key in encoder.path[:-1]:
        around = _inner(around, key, files.config.family)
    own = _inner(around, encoder.path[-1], files.config.family)
    config = encoder.read(own, around, files.config)
    accounts = TensorAccounts(files.path, files.others, FLOAT_FORMATS)
    tensors = {}
    for canonical, tensor in encoder.tensors(config).items():
        ref, format = accounts.take(encoder.prefix + tensor.name, tensor.shape)
        tensors[canonical] = MatrixRef(
            ref.name, ref.path, ref.offset, ref.nbytes, format, tensor.rows, tensor.cols, ref.checksum
        )
    return EncoderFiles(encoder, config, tensors, _placeholder(around, encoder, files))


def _inner(reader: ConfigReader, key: str, family: str) -> ConfigReader:
    raw = reader.mapping(key)
    if raw is None:
        raise CheckpointError(
            f"{CONFIG_FILE} has no {key}, and the files have a tower that it describes", key=key
        )
    return ConfigReader(
        {name: value for name, value in raw.items() if name != "model_type"}, family, within=key
    )


def _placeholder(around: ConfigReader, encoder: Encoder, files: ModelFiles) -> int:
    for key in encoder.placeholders:
        for token_id in around.token_ids(key):
            if token_id >= files.config.vocab_size:
                raise CheckpointError(
                    f"{CONFIG_FILE} gives {key} as {token_id}; the vocabulary has {files.config.vocab_size}",
                    key=key,
                )
            return token_id
    raise CheckpointError(f"{CONFIG_FILE} has no {encoder.placeholders[0]}", key=encoder.placeholders[0])


class Encoders:
    """The towers of a model; each is read when it is first needed, and stays until it is dropped."""

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
        self._lock = threading.Lock()

    def open(self, kind: Kind) -> Tower:
        """The tower for this kind, read if it is not in memory.

        Raises:
            ReadFailed: the drive failed.   CheckpointError: a norm or bias holds NaN or infinity.
            CorruptRecord: a packed tensor does not match its checksum.
        """
        with self._lock:
            if kind not in self._open:
                files = self.files[kind]
                weights = load_dense(self._store, files.tensors, open_file=self._open_file)
                self._open[kind] = files.encoder.open(files.config, weights, self._runtime)
            return self._open[kind]

    def drop(self) -> None:
        """Free the weights of all towers. One that is encoding keeps its own until it is done."""
        with self._lock:
            self._open.clear()
