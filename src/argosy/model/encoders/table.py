"""The towers of each family: where a checkpoint describes and stores them, and the functions of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from argosy import _native
from argosy.config import ModelConfig
from argosy.media.parts import Kind
from argosy.media.sounds import Padding
from argosy.model.encoders import (
    EncoderTensor,
    gemma_vision,
    glm_vision,
    moon_vit,
    omni_audio,
    qwen_vision,
    whisper_audio,
)
from argosy.model.encoders.blocks import Rows
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.weights import DenseWeights
from argosy.prompt.media_span import Making

Shape = tuple[int, ...]  # a grid of patches (frames, rows, columns), or the number of mel frames alone


class Tower(Protocol):
    """Encodes patches of a picture with their grid, or mel features of a sound."""

    def encode(self, values: Rows, *shape: Any) -> Making: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoForm:
    """How a family's prompts have a video that its tower for pictures encodes, group by group.

    placeholder: key of the token that the chat template writes for a video, beside that of a picture.
    is_shown_as_pictures: its positions carry the token of a picture, not the video's own.
    most_frames: frames in the grid of a group, where frames are not joined in patches.
    time_key: key of the rotary positions that a second takes, beside `placeholder`; None: time is told in text, and
        each group is placed as a picture is.
    angles: as `Encoder.angles`, for all groups together: from the config, their grid, the seconds between groups, and
        what is under `time_key`.
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

    path: the keys that lead to the tower's config in `config.json`.
    placeholders: keys of the placeholder's token id, in the object around that config; the first that exists counts.
    marks: keys of the token ids that the family's processor writes before and after a span; other families have
        such marks in their chat templates.
    prefix: how the names of its tensors begin.
    read: the tower's config, from its object and the one around it.
    tensors, num_positions, peak_bytes, open: functions of the tower's file.
    angles: the rotary positions of a span of a shape, and how far the text after it moves on; None: as text.
    sees_both_ways: each position of a span sees the whole span in the decoder.
    sound_padding: how a sound is padded (`media/sounds.py`).
    video: how it is used for video; None: it is not.
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
    sound_padding: Padding = "none"
    marks: tuple[str, str] | None = None
    video: VideoForm | None = None


_OMNI_VIDEO = VideoForm(
    time_key="position_id_per_seconds",
    angles=lambda config, grid, seconds, per_second: qwen_vision.omni_angles(
        config, grid, seconds_per_frame=seconds, angles_per_second=per_second
    ),
    sound=("<|audio_start|>", "<|audio_end|>"),
)


def _qwen(
    *path: str, prefix: str = "model.visual.", has_deepstack: bool = True, is_omni: bool = False
) -> Encoder:
    return Encoder(
        kind="picture",
        path=path,
        placeholders=("image_token_id",),
        prefix=prefix,
        read=lambda own, around, model: qwen_vision.read_config(own, has_deepstack=has_deepstack),
        tensors=partial(qwen_vision.tensors, is_omni=is_omni),
        open=qwen_vision.QwenVisionTower,
        num_positions=qwen_vision.num_positions,
        peak_bytes=qwen_vision.peak_bytes,
        angles=lambda config, grid: qwen_vision.span_angles(grid, config.merge),
        video=_OMNI_VIDEO if is_omni else VideoForm(),
    )


ENCODERS: Mapping[str, tuple[Encoder, ...]] = {
    "qwen3_vl_moe": (_qwen("vision_config"),),
    "qwen3_5_moe": (_qwen("vision_config", has_deepstack=False),),
    "qwen3_omni_moe": (
        _qwen("thinker_config", "vision_config", prefix="thinker.visual.", is_omni=True),
        Encoder(
            kind="sound",
            path=("thinker_config", "audio_config"),
            placeholders=("audio_token_id",),
            prefix="thinker.audio_tower.",
            read=lambda own, around, model: omni_audio.read_config(own),
            tensors=omni_audio.tensors,
            open=omni_audio.OmniAudioTower,
            num_positions=lambda config, shape: omni_audio.num_positions(config, *shape),
            peak_bytes=lambda config, shape: omni_audio.peak_bytes(config, *shape),
        ),
    ),
    "glm4v_moe": (
        Encoder(
            kind="picture",
            path=("vision_config",),
            placeholders=("image_token_id",),
            prefix="model.visual.",
            read=lambda own, around, model: glm_vision.read_config(own),
            tensors=glm_vision.tensors,
            open=glm_vision.GlmVisionTower,
            num_positions=glm_vision.num_positions,
            peak_bytes=glm_vision.peak_bytes,
            angles=lambda config, grid: glm_vision.span_angles(grid, config.merge),
            video=VideoForm(is_shown_as_pictures=True),
        ),
    ),
    "gemma4": (
        Encoder(
            kind="picture",
            path=("vision_config",),
            placeholders=("image_token_id",),
            prefix="model.",
            read=lambda own, around, model: gemma_vision.read_config(own, hidden_size=model.hidden_size),
            tensors=gemma_vision.tensors,
            open=gemma_vision.GemmaVisionTower,
            num_positions=gemma_vision.num_positions,
            peak_bytes=gemma_vision.peak_bytes,
            sees_both_ways=True,
            marks=("boi_token_id", "eoi_token_id"),
            video=VideoForm(),
        ),
    ),
    "kimi_k25": (
        Encoder(
            kind="picture",
            path=("vision_config",),
            placeholders=("media_placeholder_token_id", "image_token_id"),
            prefix="",
            read=lambda own, around, model: moon_vit.read_config(own, around, hidden_size=model.hidden_size),
            tensors=moon_vit.tensors,
            open=moon_vit.MoonViT,
            num_positions=moon_vit.num_positions,
            peak_bytes=moon_vit.peak_bytes,
            video=VideoForm(most_frames=lambda config: int(config.most_frames)),
        ),
    ),
    # The demo model's eye and ear; no model of transformers combines the three.
    "qwen2_moe": (
        replace(_qwen("vision_config", prefix="visual."), angles=None, video=None),
        Encoder(
            kind="sound",
            path=("audio_config",),
            placeholders=("audio_token_id",),
            prefix="",
            read=lambda own, around, model: whisper_audio.read_config(own, hidden_size=model.hidden_size),
            tensors=whisper_audio.tensors,
            open=whisper_audio.WhisperAudioTower,
            sound_padding="silence",
            num_positions=lambda config, shape: whisper_audio.num_positions(config, *shape),
            peak_bytes=lambda config, shape: whisper_audio.peak_bytes(config, *shape),
        ),
    ),
}
"""By the family of a `ModelConfig`."""
