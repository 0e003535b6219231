"""Pictures on the command line: `argosy run --image`, and `/image` and dropped paths in `argosy chat`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures

from argosy import Audio, Engine, Image, SamplingParams, Text
from argosy.cli.chat import Conversation
from argosy.cli.main import main
from tests.models.seeing import write_seeing_chat_model

Captured = pytest.CaptureFixture[str]
LIMITS = ["--memory", "3GiB", "--threads", "1", "--image-tokens", "64", "-n", "8"]


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
    with Engine.open(model, memory="3GiB", threads=1, image_tokens=64) as opened:
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "/nowhere.png"], "cannot read the picture /nowhere.png: No such file or directory"),
        (["--audio", "x.wav"], "this model takes text and pictures, and the conversation has a sound"),
        (["--raw", "--image", "x.png"], "--raw and media exclude each other"),
        (
            ["--no-media", "--image", "x.png"],
            "this model takes text only, and the conversation has a picture",
        ),
        (["--image-tokens", "3"], "image_tokens must be at least 16, found 3"),
    ],
)
def test_what_cannot_be_shown_is_an_error_with_its_reason(
    model: Path, arguments: list[str], sentence: str, capsys: Captured
) -> None:
    assert main(["run", "-m", str(model), *LIMITS, *arguments, "Hi"]) == 2
    assert sentence in capsys.readouterr().err


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
    talk = Conversation(engine, SamplingParams(max_tokens=4, temperature=0))

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
    talk = Conversation(engine, SamplingParams(max_tokens=2, temperature=0))
    talk._attach("image", str(path))
    path.unlink()
    talk._turn("What?")
    talk._turn("And?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_an_array_is_a_picture_too(engine: Engine, pictures: list[Path]) -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    pixels = np.asarray(Pictures.open(pictures[0]))
    data = io.BytesIO(pictures[0].read_bytes()).getvalue()
    answers = [engine.generate([Image(source), Text("?")], params).token_ids for source in (pixels, data)]
    assert answers[0] == answers[1]


def test_parts_are_public_names() -> None:
    assert {Audio.kind, Image.kind} == {"sound", "picture"}


def _limits() -> Any:
    from argosy.media.parts import MediaLimits

    return MediaLimits()
