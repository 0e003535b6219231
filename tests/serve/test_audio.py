"""OpenAI's routes for sound: transcripts as the Python interface gives them, and forms that are refused."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from argosy.engine.media.ears import Transcriber
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.limits import Limits
from argosy.guard.word_list import digest_of
from argosy.media.parts import PROMPT_LIMITS, Audio
from argosy.media.transcript import LANGUAGE_NAMES, Transcript, TranscriptOptions, as_srt, as_vtt
from argosy.open.engine import Engine
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.dialects import openai_audio
from argosy.serve.dialects.openai_audio import MOST_BODY_BYTES, MOST_FILE_BYTES
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from tests.cli.tiny_chat_model import write_chat_model
from tests.media.samples import RATE, wav
from tests.models.tiny_whisper import TINY, sound, write_transformers
from tests.serve.conftest import only, serving, start

SPEECH = wav(sound(4.5, 6).reshape(-1, 1).astype("float64"), RATE)
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


@pytest.fixture(scope="module", params=["english", "multilingual"])
def hearing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, str, Transcriber]]:
    model = write_chat_model(tmp_path_factory.mktemp("chat") / "model")
    whisper = tmp_path_factory.mktemp("whisper") / request.param
    write_transformers(whisper, TINY[request.param])
    with (
        Engine.open(model, memory="3GiB", threads=2, grammars=True, ears=whisper) as engine,
        serving(engine) as service,
    ):
        assert engine.ears is not None
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
            yield service, url, engine.ears


english = pytest.mark.parametrize("hearing", ["english"], indirect=True)  # one checkpoint is enough


def expected(hearing: tuple[Service, str, Transcriber], **options: Any) -> Transcript:
    return hearing[2].transcribe(Audio(SPEECH), TranscriptOptions(**options))


@pytest.fixture
def client(hearing: tuple[Service, str, Transcriber]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hearing[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, path: str = TRANSCRIPTIONS, *, file: Any = SPEECH, **fields: Any) -> httpx.Response:
    return httpx.post(
        url + path, files={"file": ("a.wav", file)}, data={"model": "whisper-1", **fields}, timeout=60
    )


def test_the_openai_client_gets_every_format(
    hearing: tuple[Service, str, Transcriber], client: openai.OpenAI
) -> None:
    whole, ask = expected(hearing), client.audio.transcriptions.create
    speech = ("speech.wav", SPEECH)
    assert whole.text
    short = ask(file=speech, model="whisper-1")
    assert short.text == whole.text
    assert short.usage.seconds == 5  # type: ignore[union-attr]
    assert ask(file=speech, model="whisper-1", response_format="text") == whole.text + "\n"
    assert ask(file=speech, model="whisper-1", response_format="srt") == as_srt(whole)
    assert ask(file=speech, model=hearing[2].name, response_format="vtt") == as_vtt(whole)
    verbose = ask(
        file=speech, model="whisper-1", response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert (verbose.text, verbose.duration) == (whole.text, 4.5)
    assert verbose.language == LANGUAGE_NAMES[whole.language]
    assert verbose.segments is not None
    assert [one.tokens for one in verbose.segments] == [list(one.token_ids) for one in whole.segments]
    assert [one.end for one in verbose.segments] == pytest.approx([one.end_s for one in whole.segments])
    assert verbose.segments[0].no_speech_prob == pytest.approx(whole.segments[0].no_speech_probability)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # translations are, in newer clients
def test_options_reach_the_transcriber(
    hearing: tuple[Service, str, Transcriber], client: openai.OpenAI
) -> None:
    ask = client.audio.transcriptions.create
    given: dict[str, Any] = {"prompt": "Argosy", "temperature": 0.4}
    assert ask(file=SPEECH, model="whisper-1", **given).text == expected(hearing, **given).text
    if hearing[2].name == "english":
        return
    assert ask(file=SPEECH, model="whisper-1", language="yue").text == expected(hearing, language="yue").text
    verbose = ask(file=SPEECH, model="whisper-1", language="yue", response_format="verbose_json")
    assert verbose.language == "cantonese"
    english = client.audio.translations.create(file=SPEECH, model="whisper-1")
    assert english.text == expected(hearing, task="translate").text
    assert english.text != expected(hearing).text


def test_a_stream_has_the_text_of_the_whole_answer(
    hearing: tuple[Service, str, Transcriber], client: openai.OpenAI
) -> None:
    whole = expected(hearing)
    with client.audio.transcriptions.create(
        file=SPEECH, model="whisper-1", stream=True, response_format="json"
    ) as stream:
        events = list(stream)
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == whole.text
    deltas = [event.delta for event in events[:-1] if event.type == "transcript.text.delta"]
    assert len(deltas) == len(events) - 1 == len(whole.segments)
    assert "".join(deltas).strip() == whole.text


def test_a_chat_reads_the_transcript(
    hearing: tuple[Service, str, Transcriber], client: openai.OpenAI
) -> None:
    service, _, ears = hearing
    content = [
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(SPEECH).decode(), "format": "wav"}},
        {"type": "text", "text": "What?"},
    ]
    written = f"[transcript of a sound: {ears.transcribe(Audio(SPEECH)).text}]\nWhat?"
    ask = client.chat.completions.create
    heard = ask(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0)  # type: ignore[list-item, misc]
    read = ask(model="tiny", messages=[{"role": "user", "content": written}], max_tokens=4, temperature=0)
    assert heard.usage == read.usage or heard.usage.prompt_tokens == read.usage.prompt_tokens  # type: ignore[union-attr]
    assert heard.choices[0].message.content == read.choices[0].message.content
    assert service.model.hears == "transcript"


@english
def test_a_transcript_in_a_prompt_is_judged_like_a_text(
    hearing: tuple[Service, str, Transcriber], tmp_path: Path
) -> None:
    service, _, ears = hearing
    path = tmp_path / "policy.toml"
    path.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    said = ears.transcribe(Audio(SPEECH)).text
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(SPEECH).decode(), "format": "wav"},
    }
    body = {"messages": [{"role": "user", "content": [sound]}], "max_tokens": 1}
    for words, status in (("another", 200), (said, 400)):
        path.with_name("words.txt").write_text(f"{digest_of(words)}\n")
        app = make_app(
            only(service),
            KeyRing(None),
            block_tokens=16,
            max_sequences=8,
            governance=Governing(guarding=Guarding(path)),
        )
        for url in start(app):
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == status, answer.text


@english
def test_too_much_sound_in_a_conversation_is_refused_with_both_numbers(
    hearing: tuple[Service, str, Transcriber], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is spread over turns, and if the transcripts are there already."""
    limits = replace(PROMPT_LIMITS, transcribed_s=7)
    monkeypatch.setattr("argosy.prompt.builder.PROMPT_LIMITS", limits)
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(SPEECH).decode(), "format": "wav"},
    }
    said = [{"role": "user", "content": [sound]}]
    body = {"model": "tiny", "messages": said, "max_tokens": 1}
    assert httpx.post(f"{hearing[1]}/v1/chat/completions", json=body, timeout=60).status_code == 200
    body["messages"] = [*said, {"role": "assistant", "content": "Yes."}, *said]
    refused = httpx.post(f"{hearing[1]}/v1/chat/completions", json=body, timeout=60)
    assert refused.status_code == 400
    assert "at most 7 seconds together, found at least 10.0" in refused.json()["error"]["message"]


@english
def test_models_tell_what_transcribes(hearing: tuple[Service, str, Transcriber]) -> None:
    url = hearing[1]
    text, ears = httpx.get(f"{url}/v1/models").json()["data"]
    assert (text["id"], text["capabilities"]["sound"]) == ("tiny", "transcript")
    assert text["architecture"]["input_modalities"] == ["text", "audio"]
    assert (ears["id"], ears["architecture"]["input_modalities"]) == ("english", ["audio"])
    assert httpx.get(f"{url}/v1/models/english").json() == ears
    assert httpx.get(f"{url}/v1/models/whisper").status_code == 404


@english
@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"model": "gpt-4o"}, 'the model "gpt-4o" does not transcribe; this server has: english', "model"),
        ({"response_format": "xml"}, "response_format: expected 'json', 'text', 'srt'", "response_format"),
        ({"temperature": "hot"}, 'temperature: expected a valid number, found "hot"', "temperature"),
        ({"temperature": "1.5"}, "temperature: expected less than or equal to 1", "temperature"),
        ({"temperature": "nan"}, "temperature: expected a finite number, found NaN", "temperature"),
        ({"language": "de"}, "does not know the language 'de'; known: en", "language"),
        ({"language": "x" * 300}, "language: expected at most 256 characters", "language"),
        ({"prompt": "x" * 9000}, "prompt: expected at most 8192 characters", "prompt"),
        ({"prompt": "x" * 90_000}, "the texts of a form may have at most 65536 bytes together", "prompt"),
        ({"timestamp_granularities[]": "word"}, "word is not supported; supported: segment", None),
        ({"timestamp_granularities[]": "segment"}, "needs response_format verbose_json", None),
        ({"stream": "perhaps"}, "stream: expected", "stream"),
        ({"stream": "true", "response_format": "srt"}, "stream needs response_format json or text", "stream"),
        ({"colour": "red"}, "unknown field 'colour'\nhint: leave it out", "colour"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    fields: dict[str, str], message: str, param: str | None, hearing: tuple[Service, str, Transcriber]
) -> None:
    answer = post(hearing[1], **fields)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert message in error["message"]
    assert param is None or error["param"] == param


@english
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "the sound is empty: it has 0 bytes"),
        (b"no sound", "sound"),
        (SPEECH[:50], "sound"),
        (b"\0" * (MOST_FILE_BYTES + 1), "may have at most 26,214,400 bytes, found 26,214,401"),
    ],
)
def test_a_file_that_is_no_sound_is_refused(
    file: bytes, message: str, hearing: tuple[Service, str, Transcriber]
) -> None:
    answer = post(hearing[1], file=file)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@english
def test_translating_with_an_english_model_is_refused_by_name(
    hearing: tuple[Service, str, Transcriber],
) -> None:
    answer = post(hearing[1], TRANSLATIONS)
    assert answer.status_code == 400
    assert "knows English only, so it cannot translate" in answer.json()["error"]["message"]
    assert (
        "unknown field 'language'" in post(hearing[1], TRANSLATIONS, language="en").json()["error"]["message"]
    )


BOUNDARY = "frontier"
HEAD = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="'
FILE = f'{HEAD}file"; filename="a.wav"\r\n\r\n'.encode() + SPEECH + b"\r\n"
MODEL = f'{HEAD}model"\r\n\r\nwhisper-1\r\n'.encode()
END = f"--{BOUNDARY}--\r\n".encode()


@english
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the form ends before its closing boundary"),
        (FILE + MODEL, "the form ends before its closing boundary"),
        (FILE[:2000], "the form ends before its closing boundary"),
        (b"{}", "is not multipart/form-data"),
        (FILE.replace(BOUNDARY.encode(), b"other") + MODEL + END, "does not fit the boundary"),
        (MODEL + END, "file: expected a value, found nothing"),
        (FILE + END, "model: expected a value, found nothing"),
        (FILE + MODEL + MODEL + END, "gives the field 'model' twice"),
        (FILE + FILE + MODEL + END, "gives the field 'file' twice"),
        (f'{HEAD}file"\r\n\r\nabc\r\n'.encode() + MODEL + END, "file: expected a file, with a filename"),
        (f'{HEAD}model"\r\n\r\n'.encode() + b"\xff\xfe\r\n" + FILE + END, "model: the text is not UTF-8"),
        (b"--frontier\r\nx-name: a\r\n\r\nb\r\n" + END, "a part of the form has no name"),
        (MODEL * 65 + END, "at most 64 parts"),
        (b"--frontier\r\n" + b"x-many: 1\r\n" * 100 + b"\r\nb\r\n" + END, "is not multipart/form-data"),
        (b"--frontier\r\nx-long: " + b"y" * 100_000 + b"\r\n\r\nb\r\n" + END, "is not multipart/form-data"),
    ],
)
def test_a_form_that_is_malformed_is_refused(
    body: bytes, message: str, hearing: tuple[Service, str, Transcriber]
) -> None:
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = httpx.post(hearing[1] + TRANSCRIPTIONS, content=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@english
@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "b" * 5000])
def test_a_content_type_without_a_usable_boundary_is_refused(
    boundary: str, hearing: tuple[Service, str, Transcriber]
) -> None:
    headers = {"content-type": f"multipart/form-data{boundary}"}
    answer = httpx.post(hearing[1] + TRANSCRIPTIONS, content=FILE + MODEL + END, headers=headers, timeout=60)
    assert answer.status_code == 400


@english
def test_other_content_types_and_larger_bodies_are_refused(hearing: tuple[Service, str, Transcriber]) -> None:
    assert httpx.post(hearing[1] + TRANSCRIPTIONS, json={"model": "whisper-1"}).status_code == 415
    assert httpx.post(hearing[1] + "/tokenize", files={"content": b"a"}).status_code == 415
    answer = post(hearing[1], file=b"\0" * (MOST_BODY_BYTES + 1))
    assert answer.status_code == 413


def test_a_server_without_ears_says_how_to_get_them(url: str) -> None:
    answer = post(url)
    assert answer.status_code == 404
    assert "argosy serve --ears tiny.en" in answer.json()["error"]["message"]
    (only,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert only["capabilities"]["sound"] == "none"


@english
def test_a_key_is_needed_and_its_tokens_are_counted(
    hearing: tuple[Service, str, Transcriber], tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key, secret = keys.add("quota", tokens_per_day=1)
    limits = Limits()
    num_tokens = sum(len(segment.token_ids) for segment in expected(hearing).segments)
    for url in start(
        make_app(only(hearing[0]), KeyRing(keys), block_tokens=16, max_sequences=8, limits=limits)
    ):
        assert post(url).status_code == 401
        headers = {"Authorization": f"Bearer {secret}"}
        files, data = {"file": ("a.wav", SPEECH)}, {"model": "whisper-1"}
        first, second = (
            httpx.post(url + TRANSCRIPTIONS, files=files, data=data, headers=headers, timeout=60)
            for _ in range(2)
        )
        assert (first.status_code, second.status_code) == (200, 429)
        assert limits._uses[key.id].tokens_today == num_tokens > 0


@english
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_transcription_ends_when_its_client_leaves(
    is_streamed: bool, hearing: tuple[Service, str, Transcriber], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url, ears = hearing
    tell, has_left = openai_audio._Work._tell, threading.Event()

    def tell_and_wait(work: Any, transcription: Any) -> None:
        tell(work, transcription)
        if transcription.segments:
            assert has_left.wait(30)

    monkeypatch.setattr(openai_audio._Work, "_tell", tell_and_wait)
    long = wav(sound(40.0, 6).reshape(-1, 1).astype("float64"), RATE)
    fields = {"model": "whisper-1", "stream": json.dumps(is_streamed)}
    files = {"file": ("a.wav", io.BytesIO(long))}
    if is_streamed:
        with httpx.stream("POST", url + TRANSCRIPTIONS, files=files, data=fields, timeout=60) as answer:
            next(read_events_of(answer))
            assert ears._num_asking == 1
        has_left.set()
    else:
        # No piece of work gets a turn until the client has left, so it cannot be done before.
        with ears._turns, pytest.raises(httpx.ReadTimeout):
            httpx.post(url + TRANSCRIPTIONS, files=files, data=fields, timeout=httpx.Timeout(60, read=0.5))
    until = time.monotonic() + 30
    while ears._num_asking:
        assert time.monotonic() < until
        time.sleep(0.01)


def read_events_of(answer: httpx.Response) -> Iterator[str]:
    return (line for line in answer.iter_lines() if line)


@english
def test_answers_stream_while_a_sound_is_transcribed(hearing: tuple[Service, str, Transcriber]) -> None:
    _, url, ears = hearing
    long = wav(sound(40.0, 6).reshape(-1, 1).astype("float64"), RATE)
    outcome: list[int] = []
    thread = threading.Thread(target=lambda: outcome.append(post(url, file=long).status_code))
    thread.start()
    while not ears._one_sound.locked():
        time.sleep(0.01)
    answer = httpx.post(
        f"{url}/v1/completions", json={"prompt": "abc", "max_tokens": 20, "ignore_eos": True}, timeout=60
    )
    assert answer.status_code == 200
    assert ears._one_sound.locked()
    thread.join()
    assert outcome == [200]
