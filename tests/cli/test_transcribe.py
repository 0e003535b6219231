from __future__ import annotations

import json
from pathlib import Path

import pytest

from argosy.cli.main import main
from argosy.media.parts import Audio
from argosy.media.transcript import Segment, Transcript, as_srt, as_vtt
from argosy.open.ears import Transcriber
from tests.cli.tiny_chat_model import write_chat_model
from tests.media.samples import RATE, wav
from tests.models.tiny_whisper import TINY, sound, write_transformers

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper")
    write_transformers(path, TINY["english"])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sounds")
    found = []
    for number in (1, 2):
        path = folder / f"{number}.wav"
        path.write_bytes(wav(sound(2.5, number).reshape(-1, 1).astype("float64"), RATE))
        found.append(str(path))
    return found


def test_each_format_has_what_the_python_interface_gives(
    whisper: Path, files: list[str], capsys: Captured
) -> None:
    with Transcriber.open(whisper, threads=1) as transcriber:
        expected = [transcriber.transcribe(Audio(file)) for file in files]
    asked = ["transcribe", "--threads", "1", "--model", str(whisper)]
    assert main([*asked, *files]) == 0
    assert capsys.readouterr() == (f"{expected[0].text}\n{expected[1].text}\n", f"{files[0]}:\n{files[1]}:\n")
    assert main([*asked, "--format", "json", files[0]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["file"], found["text"], found["duration"]) == (files[0], expected[0].text, 2.5)
    assert [one["tokens"] for one in found["segments"]] == [list(s.token_ids) for s in expected[0].segments]
    assert main([*asked, "--format", "srt", files[1]]) == 0
    assert capsys.readouterr().out == as_srt(expected[1])
    assert main([*asked, "--format", "vtt", files[1]]) == 0
    assert capsys.readouterr().out == as_vtt(expected[1])


def test_what_cannot_be_done_is_one_sentence(whisper: Path, files: list[str], capsys: Captured) -> None:
    for more, message in (
        (["--translate", files[0]], "error: this model knows English only, so it cannot translate"),
        (["--language", "de", files[0]], "error: the model does not know the language 'de'; known: en"),
        (["nothing.wav"], "error: cannot read the sound nothing.wav: No such file or directory"),
        ([str(whisper / "config.json")], "error: unsupported sound format; use WAV"),
    ):
        assert main(["transcribe", "--model", str(whisper), *more]) == 2
        assert capsys.readouterr().err.startswith(message)
    assert main(["transcribe", "--model", str(whisper / "none"), files[0]]) == 4
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_the_ledger_says_that_the_model_read_and_did_not_hear(
    whisper: Path, files: list[str], tmp_path: Path, capsys: Captured
) -> None:
    model = write_chat_model(tmp_path / "model")
    asked = [
        "run",
        "-m",
        str(model),
        "--memory",
        "3GiB",
        "--threads",
        "1",
        "-n",
        "4",
        "--ears",
        str(whisper),
        "?",
    ]
    said = "ears     2 sounds transcribed: the model read the text, and did not hear it"
    assert main([*asked, "--audio", files[0], "--audio", files[1]]) == 0
    assert said in capsys.readouterr().err.splitlines()
    assert main([*asked, "--json", "--audio", files[0]]) == 0
    assert json.loads(capsys.readouterr().out)["hears"] == "transcript"
    assert main(asked) == 0
    assert "ears   " not in capsys.readouterr().err


def test_subtitles_are_what_players_expect() -> None:
    def segment(start_s: float, end_s: float, text: str) -> Segment:
        return Segment(
            window_start_s=0, start_s=start_s, end_s=end_s, text=text, token_ids=(), temperature=0,
            average_logprob=0, compression_ratio=1, no_speech_probability=0,
        )  # fmt: skip

    transcript = Transcript(
        text="", language="en", task="transcribe", duration_s=4000,
        segments=(segment(0, 1.5, " One,\n\ntwo --> three."), segment(3599.9996, 3723.25, " End.")),
    )  # fmt: skip
    assert as_srt(transcript) == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne, two -> three.\n\n2\n01:00:00,000 --> 01:02:03,250\nEnd.\n"
    )
    assert as_vtt(transcript) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne, two -> three.\n\n01:00:00.000 --> 01:02:03.250\nEnd.\n"
    )
