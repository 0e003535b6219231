"""A tower as the program knows it: where a family's checkpoints describe and store it, and what its file can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from argosy import _native
from argosy.config import ModelConfig
from argosy.media.parts import Kind
from argosy.media.sounds import Padding
from argosy.model.encoders import EncoderTensor
from argosy.model.encoders.blocks import Rows
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.weights import DenseWeights
from argosy.prompt.media_span import Making

Shape = tuple[int, ...]  # a grid of patches (frames, rows, columns), or just the number of mel frames


class Tower(Protocol):
    """Encodes patches of a picture with their grid, or mel features of a sound."""

    def encode(self, values: Rows, *shape: Any) -> Making: ...


class FillingTower(Tower, Protocol):
    """Also makes the rows of positions before a span."""

    def fillers(self, count: int) -> Rows: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoForm:
    """How a family's prompts contain a video, which its tower for pictures encodes group by group.

    placeholder: key of the token that the chat template writes for a video, in the same object as that of a picture.
    is_shown_as_pictures: its positions carry the token of a picture, not the video's own.
    most_frames: frames in the grid of a group, where frames are not joined in patches.
    time_key: key of the rotary positions per second, in the same object as `placeholder`; None: text gives the time,
        and each group is placed like a picture.
    angles: as `Encoder.angles`, for all groups together: from the config, their grid, the seconds between groups, and
        the value of `time_key`.
    sound: the texts around a video with sound, in which groups and sound follow each other by time; None: the model
        does not listen.
    """

    placeholder: str = "video_token_id"
    is_shown_as_pictures: bool = False
    most_frames: Callable[[Any], int] = lambda config: 1
    time_key: str | None = None
    angles: Callable[[Any, Any, float, int], tuple[Rows, float]] | None = None
    sound: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One tower of a family.

    path: the keys that lead to the tower's config in `config.json`; a last one that ends with * is the beginning of
        each key.
    placeholders: keys of the placeholder's token id, in the object around that config; the first existing key counts.
    marks: keys of the token ids that the family's processor writes before and after a span; other families have
        such marks in their chat templates.
    label: returns the texts before and after a picture from its height and width in pixels, as it came.
    prefix: the prefix of its tensors' names.
    first_prefix: without `prefix`, how names begin that only the tower has; empty: other tensors are the tower's.
    read: reads the tower's config from its object and the object around it.
    tensors, num_positions, peak_bytes, open: functions of the tower's file.
    angles: returns the rotary positions of a span of a shape, and the advance for the text after it; None: as text.
    sees_both_ways: each position of a span sees the whole span in the decoder.
    num_fillers: returns the number of positions before a span that the tower fills (`FillingTower`), from where they
        begin.
    sound_padding: how a sound is padded (`media/sounds.py`).
    video: how the tower is used for video; None: it is not.
    written: returns the texts of the control tokens that fill positions of a span of a shape instead of rows, by
        position; None: rows fill all positions.
    placeholder: the token that the chat template writes for a picture, if rows have another one.
    extent: returns the patches of a shape, and the pairs of a patch and one that it sees; None: all of its grid sees
        its frame.
    flop: returns the operations of a picture; None: all layers see the pairs of its extent.
    settings: returns the processor's settings that follow from the tower's config; None: none do. Those in the
        processor's file take precedence.
    has_processor_file: whether the checkpoints have a file with the processor's settings that describes it.
    """

    kind: Kind
    path: tuple[str, ...]
    placeholders: tuple[str, ...]
    prefix: str
    read: Callable[[ConfigReader, ConfigReader, ModelConfig], Any]
    tensors: Callable[[Any], dict[str, EncoderTensor]]
    open: Callable[[Any, DenseWeights, _native.Runtime], Tower]
    num_positions: Callable[[Any, Any], int]
    peak_bytes: Callable[[Any, Any], int]
    angles: Callable[[Any, Any], tuple[Rows, float]] | None = None
    sees_both_ways: bool = False
    num_fillers: Callable[[int], int] | None = None
    first_prefix: str = ""
    sound_padding: Padding = "none"
    marks: tuple[str, str] | None = None
    label: Callable[[int, int], tuple[str, str]] | None = None
    video: VideoForm | None = None
    written: Callable[[Any, Any], Mapping[int, str]] | None = None
    placeholder: str | None = None
    extent: Callable[[Any, Any], tuple[int, int]] | None = None
    flop: Callable[[Any, Any], int] | None = None
    settings: Callable[[Any], Mapping[str, object]] | None = None
    has_processor_file: bool = True
