"""Media on the command line: `argosy run --image --video`, and `/image`, `/video` and dropped paths in chat."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures

from argosy import Audio, Engine, Image, SamplingParams, Text, Video
from argosy.cli.commands.conversation import Conversation
from argosy.cli.main import main
from argosy.cli.shared.chat_models import LocalModel
from argosy.errors import UsageError
from tests.media.video_samples import clip_file
from tests.models.seeing import write_seeing_chat_model
from tests.prompt.tokenizers_for_tests import CHATML

Captured = pytest.CaptureFixture[str]
LIMITS = [
    "--memory",
    "3GiB",
    "--threads",
    "1",
    "--image-tokens",
    "64",
    "--video-tokens",
    "64",
    "-n",
    "8",
    "-t",
    "0",
]
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None,
    reason="needs the programs ffmpeg and ffprobe (`apt install ffmpeg`)",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_chat_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = [directory / "one picture.png", directory / "two.png"]
    for path in paths:
        Pictures.fromarray(rng.integers(0, 256, (30, 44, 3)).astype(np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine.open(model, memory="3GiB", threads=1, image_tokens=64, video_tokens=64) as opened:
        yield opened


def answered(capsys: Captured, model: Path, *arguments: str) -> dict[str, Any]:
    assert main(["run", "-m", str(model), *LIMITS, "--json", *arguments]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_pictures_of_the_command_line_keep_their_order(
    model: Path, pictures: list[Path], engine: Engine, capsys: Captured
) -> None:
    one, two = map(str, pictures)
    params = SamplingParams(max_tokens=8, temperature=0)
    found = answered(capsys, model, "What is this?", "--image", two, f"--image={one}")
    expected = engine.generate([Image(two), Image(one), Text("What is this?")], params)
    assert found["token_ids"] == list(expected.token_ids)
    assert found["usage"]["prompt_tokens"] == expected.usage["prompt_tokens"]
    other = engine.generate([Image(one), Image(two), Text("What is this?")], params)
    assert found["token_ids"] != list(other.token_ids)


def test_a_picture_may_be_the_whole_prompt(
    model: Path,
    pictures: list[Path],
    engine: Engine,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("never read"))
    found = answered(capsys, model, "--image", str(pictures[0]))
    expected = engine.generate([Image(pictures[0])], SamplingParams(max_tokens=8, temperature=0))
    assert found["token_ids"] == list(expected.token_ids)
    assert found["usage"]["prompt_tokens"] == expected.usage["prompt_tokens"]
    piped = answered(capsys, model, "--image", str(pictures[0]), "-")
    assert piped["usage"]["prompt_tokens"] > found["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "/nowhere.png"], "cannot read the picture /nowhere.png: No such file or directory"),
        (
            ["--audio", "x.wav"],
            "this model takes text, pictures and videos, and the conversation has a sound",
        ),
        (["--raw", "--image", "x.png"], "--raw and media exclude each other"),
        (
            ["--no-media", "--image", "x.png"],
            "this model takes text only, and the conversation has a picture",
        ),
        (["--image-tokens", "3"], "image_tokens must be at least 16, found 3"),
        (["--video-tokens", "3"], "video_tokens must be at least 16, found 3"),
        (["--video", "/nowhere.mp4"], "cannot read the video /nowhere.mp4: No such file or directory"),
        (
            ["--video", __file__],
            "unsupported video format; use MP4, MOV, WEBM, MKV, AVI or GIF",
        ),
        (
            ["--no-media", "--video", "x.mp4"],
            "this model takes text only, and the conversation has a video",
        ),
    ],
)
def test_what_cannot_be_shown_is_an_error_with_its_reason(
    model: Path, arguments: list[str], sentence: str, capsys: Captured
) -> None:
    assert main(["run", "-m", str(model), *LIMITS, *arguments, "Hi"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "a clip.mp4"
    path.write_bytes(clip_file(20))
    return path


@needs_ffmpeg
def test_a_video_is_shown_in_its_place_with_the_times_of_its_frames(
    model: Path, pictures: list[Path], video: Path, engine: Engine, capsys: Captured
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    found = answered(capsys, model, "What happens?", "--video", str(video), "--image", str(pictures[0]))
    parts = [Video(video), Image(pictures[0]), Text("What happens?")]
    assert found["token_ids"] == list(engine.generate(parts, params).token_ids)
    prompt = engine.prompts.build(parts)
    assert [span.kind for _, span in prompt.spans] == ["video", "video", "picture"]
    assert engine.tokenizer is not None
    text = engine.tokenizer.decode(prompt.token_ids or (), keep_special=True)
    pads = "<|video_pad|>" * prompt.spans[0][1].num_positions
    assert (
        f"user\n<0.3 seconds><|vision_start|>{pads}<|vision_end|><1.6 seconds><|vision_start|>{pads}<|vision_end|>"
        "<|vision_start|><|image_pad|>"
    ) in text


def test_frames_are_a_video_without_ffmpeg(
    engine: Engine, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    params = SamplingParams(max_tokens=4, temperature=0)
    pixels = [np.asarray(Pictures.open(path)) for path in pictures]
    answers = [
        engine.generate([Video(source, rate=1), Text("?")], params).token_ids
        for source in (pictures, pixels, np.stack(pixels), [path.read_bytes() for path in pictures])
    ]
    assert answers == answers[:1] * 4
    with pytest.raises(
        UsageError, match=r"needs the program ffmpeg, version 6\.0 or later, and it is not installed"
    ):
        engine.prompts.build([Video(b"\0\0\0\x18ftypmp42" + bytes(20)), Text("?")])


@needs_ffmpeg
def test_chat_attaches_a_video(engine: Engine, video: Path, capsys: Captured) -> None:
    talk = Conversation(LocalModel(engine), SamplingParams(max_tokens=2, temperature=0))
    lines = iter([f"/video {video}", str(video), "What happens?"])

    def read() -> str:
        for line in lines:
            return line
        raise EOFError

    talk.talk(read)
    assert [part.kind for part in talk.messages[0]["content"][:2]] == ["video", "video"]
    assert talk.messages[1]["role"] == "assistant"
    assert capsys.readouterr().err.count("(video attached; it goes with your next message)") == 2


def test_a_damaged_picture_is_an_error_without_a_librarys_words(
    model: Path, pictures: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    damaged = tmp_path / "cut.png"
    damaged.write_bytes(pictures[0].read_bytes()[:200])
    assert main(["run", "-m", str(model), *LIMITS, "--image", str(damaged), "Hi"]) == 2
    error = capsys.readouterr().err
    assert "picture" in error
    assert not any(word in error for word in ("PIL", "Traceback", "OSError"))


def test_chat_attaches_pictures_to_the_next_message(
    engine: Engine, pictures: list[Path], capsys: Captured
) -> None:
    one, two = pictures
    lines = iter(
        [f"/image {one}", "'" + str(two) + "'", "What?", "And?", "/image /nowhere.png", "/audio x.wav"]
    )
    talk = Conversation(LocalModel(engine), SamplingParams(max_tokens=4, temperature=0))

    def read() -> str:
        for line in lines:
            return line
        raise EOFError

    talk.talk(read)
    asked = [message["content"] for message in talk.messages if message["role"] == "user"]
    assert [part.kind for part in asked[0][:2]] == ["picture", "picture"]
    assert asked[0][0].digest == Image(one).read(_limits()).digest
    assert asked[0][2] == {"type": "text", "text": "What?"}
    assert asked[1] == "And?"
    said = capsys.readouterr().err
    assert said.count("(picture attached; it goes with your next message)") == 2
    assert "cannot read the picture /nowhere.png" in said
    assert "this model does not take a sound" in said


def test_chat_reads_a_picture_when_it_is_attached(
    engine: Engine, tmp_path: Path, pictures: list[Path]
) -> None:
    path = tmp_path / "gone.png"
    path.write_bytes(pictures[0].read_bytes())
    talk = Conversation(LocalModel(engine), SamplingParams(max_tokens=2, temperature=0))
    talk._attach("image", str(path))
    path.unlink()
    talk._turn("What?")
    talk._turn("And?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_a_picture_of_earlier_turns_becomes_a_note_for_a_model_without_eyes(
    model: Path,
    chat_model: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    """Also for a model with eyes whose chat template has no place for pictures. The first model gets it back."""
    placeless = shutil.copytree(model, tmp_path / "placeless")
    config = json.loads((placeless / "tokenizer_config.json").read_text())
    (placeless / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    for blind in (chat_model, placeless):
        lines = (f"/image {pictures[0]}", "What?", f"/model {blind}", "And?", f"/model {model}", "/tokens")
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert main(["chat", str(model), *LIMITS, "--no-record", "--ignore-eos"]) == 0
        err = capsys.readouterr().err
        assert err.count("note: this model cannot take the picture earlier in this conversation") == 1
        assert "error" not in err
        assert err.count("(cut off") == 2
        assert int(re.findall(r"tokens   (\d+) used", err)[0]) > 60  # the picture again


def test_an_array_is_a_picture_too(engine: Engine, pictures: list[Path]) -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    pixels = np.asarray(Pictures.open(pictures[0]))
    data = io.BytesIO(pictures[0].read_bytes()).getvalue()
    answers = [engine.generate([Image(source), Text("?")], params).token_ids for source in (pixels, data)]
    assert answers[0] == answers[1]


def test_parts_are_public_names() -> None:
    assert {Audio.kind, Image.kind, Video.kind} == {"sound", "picture", "video"}


def _limits() -> Any:
    from argosy.media.parts import MediaLimits

    return MediaLimits()
