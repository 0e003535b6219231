"""Videos through a whole engine: the tokens that transformers' processors make, and the answers of its models."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import argosy.engine.media.prompt_media
from argosy import Engine, _native
from argosy.checkpoint.pack import pack
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import BadMedia, PromptTooLong, UnsupportedModel
from argosy.media.frames import Frame, Frames, each_in_turn
from argosy.media.parts import (
    FFMPEG_BYTES,
    Audio,
    Content,
    Image,
    MediaLimits,
    RequestMedia,
    Video,
)
from argosy.media.resize import Resizer
from argosy.model.encoders.reading import find_encoders, tensor_names
from argosy.model.families import open_model
from argosy.prompt.conversation_media import ConversationMedia
from argosy.prompt.media_span import MediaSpan
from argosy.prompt.messages import Turn
from argosy.prompt.prompt import Prompt
from tests.engine.test_seeing import GREEDY, require_answer
from tests.models.safetensors_file import read_safetensors
from tests.models.seeing import GROUP_TOKENS, RATE, REFERENCE, VIDEO_PROMPTS, VIDEO_TOKENS, encode_text

CASES = [*((family, "video") for family in sorted(VIDEO_PROMPTS)), ("qwen3_omni_moe", "heard")]

# The largest instruction set multiplies in bfloat16 where it can (decision 31).
EXACT = _native.instruction_sets()[min(2, len(_native.instruction_sets())) - 1]


def opened(directory: Path, **options: Any) -> Engine:
    defaults = {"memory": "3GiB", "threads": 2, "image_tokens": GROUP_TOKENS, "video_tokens": VIDEO_TOKENS}
    engine = Engine.open(directory, **defaults | options)
    assert isinstance(engine.media, PromptMedia)
    engine.media._encode_text = encode_text  # these models have no tokenizer
    return engine


def parts_of(reference: dict[str, NDArray[Any]]) -> list[Image | Audio | Video]:
    """The media in the order of the prompt: a picture and a sound lie between two videos."""
    parts: list[Image | Audio | Video] = []
    for name in ("video.0", "picture.0", "sound.0", "video.1"):
        if name not in reference:
            continue
        if name.startswith("video"):
            rate = float(reference[name.replace("video", "rate")][0])
            parts.append(Video(reference[name], rate=rate))
        else:
            parts.append(Image(reference[name]) if name == "picture.0" else Audio(reference[name], rate=RATE))
    return parts


def prompt_of(engine: Engine, reference: dict[str, NDArray[Any]], tenant: str = "") -> Prompt:
    """The reference's prompt, with spans instead of placeholders."""
    assert isinstance(engine.media, PromptMedia)
    media = ConversationMedia(engine.media, RequestMedia(), tenant=tenant)
    media.read(Turn("user", "", pieces=tuple(parts_of(reference))))
    return media.fill(Prompt(tuple(reference["prompt"].tolist()), None), None)


def with_tracks(reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the videos of the reference its sound tracks, if it has any."""
    tracks = {
        reference[f"video.{number}"].shape: reference[f"track.{number}"]
        for number in (0, 1)
        if f"track.{number}" in reference
    }

    @contextlib.contextmanager
    def open_frames(content: Content, *_: Any, **__: Any) -> Iterator[Frames]:
        data, rate = content.data, content.rate
        assert isinstance(data, np.ndarray)
        assert rate is not None
        track = tracks[data.shape]
        yield Frames(
            len(data), rate, each_in_turn(lambda at: data[at], None, RequestMedia()), lambda _: track
        )

    if tracks:
        monkeypatch.setattr(argosy.engine.media.prompt_media, "open_frames", open_frames)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """A family and its reference."""
    family, name = request.param
    reference = read_safetensors(REFERENCE / family / f"{name}.safetensors")
    with_tracks(reference, monkeypatch)
    return family, reference


def test_tokens_logits_and_answers_equal_those_of_transformers(case: tuple[str, dict[str, Any]]) -> None:
    family, reference = case
    with opened(REFERENCE / family, prefix_reuse=False, instruction_set=EXACT) as engine:
        prompt = prompt_of(engine, reference)
        assert list(prompt.token_ids or ()) == reference["input_ids"].tolist()
        require_answer(engine, prompt, reference["logits"], reference["greedy"])


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [{"chunk_tokens": 16, "threads": 1}, {"expert_slots": 4}], ids=str)
def test_no_setting_changes_an_answer(case: tuple[str, dict[str, Any]], options: dict[str, Any]) -> None:
    family, reference = case
    if family == "gemma4":  # rounding sends a token of this tiny model to another expert
        options = options | {"instruction_set": EXACT}
    with opened(REFERENCE / family, **options) as engine:
        for _ in range(2):  # the second finds the prefix
            answer = engine.generate(prompt_of(engine, reference), GREEDY).token_ids
            assert answer[: len(reference["greedy"])] == reference["greedy"].tolist()


def test_a_pack_watches_with_the_settings_of_its_source(tmp_path: Path) -> None:
    reference = read_safetensors(REFERENCE / "qwen3_5_moe" / "video.safetensors")
    files = open_model(REFERENCE / "qwen3_5_moe")
    pack(files, tmp_path / "packed", format="source", encoder_tensors=tensor_names(find_encoders(files)))
    with opened(tmp_path / "packed") as engine:
        assert engine.generate(prompt_of(engine, reference), GREEDY).token_ids == reference["greedy"].tolist()


def test_a_prefix_that_ends_within_a_video_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = read_safetensors(REFERENCE / "qwen3_vl_moe" / "video.safetensors")
    other = dict(reference)
    other["video.1"] = 255 - reference["video.1"]
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert isinstance(engine.media, PromptMedia)
        encoded: list[str] = []
        encode = engine.media._encode
        monkeypatch.setattr(
            engine.media, "_encode", lambda *given: encoded.append(given[0]) or encode(*given)
        )
        engine.generate(prompt_of(engine, reference), GREEDY)
        num_all = len(encoded)
        result = engine.generate(prompt_of(engine, other), GREEDY)
        changed = next(
            start
            for start, span in prompt_of(engine, other).spans
            if span.digest not in {one.digest for _, one in prompt_of(engine, reference).spans}
        )
        assert changed - 32 < result.usage["cached_tokens"] <= changed
        # Only what differs is encoded: the groups of the second video.
        assert encoded[num_all:] == ["video"] * 2
        assert result.token_ids != reference["greedy"].tolist()


def test_each_group_takes_at_most_the_tokens_of_a_picture_and_all_those_of_a_video() -> None:
    wide, many = (Video(np.zeros((count, 90, 120, 3), np.uint8), rate=4) for count in (2, 40))

    def counts(video: Video, **caps: int) -> list[int]:
        with opened(REFERENCE / "qwen3_vl_moe", **caps) as engine:
            assert isinstance(engine.media, PromptMedia)
            parts = engine.media.segments(engine.media.read(video), "", RequestMedia())
            return [part.num_positions for part in parts if isinstance(part, MediaSpan)]

    assert counts(wide, image_tokens=64, video_tokens=64) == [48]
    assert counts(wide, image_tokens=16, video_tokens=64) == [12]
    assert counts(many, image_tokens=16, video_tokens=64) == [2] * 10
    assert counts(many, image_tokens=16, video_tokens=16) == [1] * 10
    long = Video(np.zeros((200, 8, 8, 3), np.uint8), rate=2)
    with opened(REFERENCE / "qwen3_vl_moe", video_tokens=50) as engine:
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(
            BadMedia, match=r"may take at most 50 tokens, and 200 frames of 8 x 8 need at least 100"
        ):
            engine.media.segments(engine.media.read(long), "", RequestMedia())


def test_frames_wait_in_bounded_memory_and_give_it_back() -> None:
    reference = read_safetensors(REFERENCE / "qwen3_vl_moe" / "video.safetensors")
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert isinstance(engine.media, PromptMedia)
        prompt = prompt_of(engine, reference)
        assert engine.media._waiting.held_bytes > 0
        engine.generate(prompt, GREEDY)
        del prompt
        assert engine.media._waiting.held_bytes == 0


def test_pictures_are_decoded_between_the_frames_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never beside a frame, which takes the same memory, and without waiting for the whole film."""
    happened: list[str] = []
    frame_of_film = weakref.ref(np.zeros(1))

    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        media = engine.media
        assert media is not None
        film, picture = (np.zeros((*count, 40, 40, 3), np.uint8) for count in ((8,), ()))
        asking = threading.Thread(
            target=lambda: media.segments(media.read(Image(picture)), "", RequestMedia())
        )
        decode = media._decoder.picture

        def decoded(content: Content, *check: Any) -> NDArray[np.uint8]:
            happened.append("picture")
            assert frame_of_film() is None
            return decode(content, *check)

        @contextlib.contextmanager
        def open_frames(content: Content, *_: Any, turn: Any, **__: Any) -> Iterator[Frames]:
            def read(indices: Sequence[int]) -> Generator[Frame, None, None]:
                nonlocal frame_of_film
                for index in indices:
                    with turn:
                        happened.append("frame")
                        if index == 2:
                            asking.start()
                            while not media._one_decoded._waiting:
                                time.sleep(0.001)
                        frame = film[index].copy()
                        frame_of_film = weakref.ref(frame)
                        yield frame
                        del frame

            yield Frames(len(film), 4.0, read)

        monkeypatch.setattr(argosy.engine.media.prompt_media, "open_frames", open_frames)
        monkeypatch.setattr(media._decoder, "picture", decoded)
        media.segments(media.read(Video(film, rate=4.0)), "", RequestMedia())
        asking.join()
    assert happened == ["frame", "frame", "picture", "frame", "frame"]


def test_a_video_that_cannot_fit_the_context_is_refused_after_its_first_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_scaled = count_calls(monkeypatch, Resizer, "resize")
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert isinstance(engine.media, PromptMedia)
        film = engine.media.read(Video(np.zeros((40, 90, 120, 3), np.uint8), rate=4))
        with pytest.raises(PromptTooLong, match="at least 20 tokens, and the context holds 20"):
            engine.media.segments(film, "", RequestMedia(most_tokens=19))
        assert num_scaled() == 0
        segments = engine.media.segments(film, "", RequestMedia())
        assert sum(part.num_positions for part in segments if isinstance(part, MediaSpan)) == 20
    assert num_scaled() == 20


def test_work_on_a_video_ends_between_two_frames_when_it_is_not_wanted_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_scaled = count_calls(monkeypatch, Resizer, "resize")

    def check() -> None:
        if num_scaled() == 3:
            raise InterruptedError

    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        assert isinstance(engine.media, PromptMedia)
        film = engine.media.read(Video(np.zeros((40, 90, 120, 3), np.uint8), rate=4))
        with pytest.raises(InterruptedError):
            engine.media.segments(film, "", RequestMedia(check=check))
    assert num_scaled() == 3


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], int]:
    """Count the calls of a method; returns their number so far."""
    calls, method = list[object](), getattr(owner, name)

    def counted(*given: object) -> object:
        calls.append(given)
        return method(*given)

    monkeypatch.setattr(owner, name, counted)
    return lambda: len(calls)


def test_a_refused_video_gives_up_its_turn() -> None:
    pictures = [np.zeros((40, width, 3), np.uint8) for width in (40, 44)]
    with opened(REFERENCE / "qwen3_vl_moe") as engine:
        media = engine.media
        assert media is not None
        with pytest.raises(BadMedia, match="must all have the same size") as refusal:
            media.segments(media.read(Video(pictures, rate=1.0)), "", RequestMedia())
        assert refusal.tb is not None  # it keeps the frames of the functions that it went through
        asking = threading.Thread(
            target=lambda: media.segments(media.read(Image(pictures[0])), "", RequestMedia())
        )
        asking.start()
        asking.join(20)
        assert not asking.is_alive()


def test_a_video_costs_memory_only_where_the_model_takes_it(tmp_path: Path) -> None:
    source = REFERENCE / "qwen3_vl_moe"
    for name in ("model.safetensors", "preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / name).symlink_to(source / name)
    config = json.loads((source / "config.json").read_text())
    del config["video_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with opened(source) as engine:
        assert engine.media.kinds == ("picture", "video")
        with_video = engine.plan.encoder_bytes
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ("picture",)
        limits = MediaLimits()  # of its file, and of a process beside the one that decodes pictures
        assert (
            with_video - engine.plan.encoder_bytes > limits.video_bytes + limits.decode_bytes + FFMPEG_BYTES
        )
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(
            UnsupportedModel, match=r"name no placeholder for videos in the vocabulary \(video_token_id\)"
        ):
            engine.media.read(Video(np.zeros((2, 8, 8, 3), np.uint8), rate=2))


def test_the_settings_of_videos_are_asked_for_when_one_comes(tmp_path: Path) -> None:
    source = REFERENCE / "qwen3_vl_moe"
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(source / name)
    with opened(tmp_path) as engine:
        assert engine.media.kinds == ("picture",)
        assert isinstance(engine.media, PromptMedia)
        with pytest.raises(UnsupportedModel, match=r"preprocessor_config.json has no video_processor_type"):
            engine.media.read(Video(np.zeros((2, 8, 8, 3), np.uint8), rate=2))
