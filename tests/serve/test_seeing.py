"""Pictures and sounds over HTTP: they reach the engine as they would from Python, or are refused in one sentence."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from argosy.config import SamplingParams
from argosy.engine.media.prompt_media import PromptMedia
from argosy.errors import BadMedia, DoesNotFit, Overloaded, UsageError
from argosy.guard.keys import KeyRing
from argosy.media.parts import Audio, Image, MediaLimits, Part, Text, Video
from argosy.media.patches import PictureProcessor
from argosy.open.engine import Engine
from argosy.serve.answer.media_parts import Intake, MediaPart
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.dialects.anthropic_messages_bodies import AddressSource, VideoBlock
from argosy.serve.dialects.openai_chat_bodies import PictureAddress, PicturePart, VideoAddress, VideoPart
from argosy.serve.dialects.openai_responses_bodies import VideoInput
from argosy.serve.http.caller import Caller
from argosy.serve.http.held import Files, Pool, PoolShare
from argosy.serve.models.opened import facts_of_engine
from tests.media.samples import pattern, png, raw_png, wav, wave
from tests.media.video_samples import clip_file
from tests.serve.conftest import only, serving, start
from tests.serve.dialects import MAX_TOKENS, PATHS, TOOLS
from tests.serve.record import read_events
from tests.serve.seeing_model import write_seeing_model
from tests.serve.test_replaced import read_tool, text

CHATTING = ("chat", "responses", "messages")
CAT, DOG = png(pattern(40, 60)), png(pattern(70, 30, seed=9))
TONE = wav(wave(0.5, 16_000), 16_000)
NUM_NEW = 6


@dataclass(frozen=True)
class Seeing:
    """A server of the model, the prompts that reached its engine, and what Python's API answers."""

    service: Service
    url: str
    prompts: list[Any]
    python_prompt: Any
    python_text: str


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    model = write_seeing_model(tmp_path_factory.mktemp("seeing") / "model")
    asked: list[Part] = [Text("What is"), Image(CAT), Text("and"), Image(DOG), Text("?")]
    with Engine.open(model, memory="3GiB", threads=2, grammars=True, image_tokens=64) as engine:
        prompt = engine.prompts.build(asked)
        answer = engine.generate(asked, SamplingParams(max_tokens=NUM_NEW, temperature=0))
        with serving(engine) as service:
            prompts: list[Any] = []
            submit = service.loop.submit

            def spied(prompt: Any, *given: Any, **more: Any) -> Any:
                prompts.append(prompt)
                return submit(prompt, *given, **more)

            service.loop.submit = spied  # type: ignore[method-assign]
            for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
                yield Seeing(service, url, prompts, prompt, answer.text)


@pytest.fixture
def viewer(seeing: Seeing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=seeing.url, timeout=60) as client:
        yield client


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def picture(dialect: str, content: bytes | str, form: str = "image/png") -> dict[str, Any]:
    data = content if isinstance(content, str) else encoded(content)
    return {
        "chat": {"type": "image_url", "image_url": {"url": f"data:{form};base64,{data}"}},
        "responses": {"type": "input_image", "image_url": f"data:{form};base64,{data}"},
        "messages": {"type": "image", "source": {"type": "base64", "media_type": form, "data": data}},
    }[dialect]


def sound(content: bytes | str, form: str = "wav") -> dict[str, Any]:
    data = content if isinstance(content, str) else encoded(content)
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}


def question(dialect: str) -> list[dict[str, Any]]:
    return [
        text(dialect, "What is"), picture(dialect, CAT), text(dialect, "and"), picture(dialect, DOG),
        text(dialect, "?"),
    ]  # fmt: skip


def ask(viewer: httpx.Client, dialect: str, content: list[dict[str, Any]], **more: Any) -> httpx.Response:
    return converse(viewer, dialect, [{"role": "user", "content": content}], **more)


def converse(
    viewer: httpx.Client, dialect: str, conversation: list[dict[str, Any]], **more: Any
) -> httpx.Response:
    name = "input" if dialect == "responses" else "messages"
    body = {name: conversation, MAX_TOKENS[dialect]: NUM_NEW, "temperature": 0}
    return viewer.post(PATHS[dialect], json=body | more)


def said(dialect: str, answer: httpx.Response) -> tuple[str, int]:
    """The text of an answer, streamed or whole, and the number of its prompt tokens."""
    if answer.headers["content-type"] == "application/json":
        whole = answer.json()
    else:
        events = [event["data"] for event in read_events(answer.text) if event["data"] != "[DONE]"]
        if dialect == "responses":
            whole = events[-1]["response"]
        elif dialect == "messages":
            parts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
            usage = next(event["usage"] for event in events if event["type"] == "message_delta")
            whole = {"content": [{"text": "".join(parts)}], "usage": usage}
        else:
            parts = [choice["delta"].get("content", "") for event in events for choice in event["choices"]]
            whole = {"choices": [{"message": {"content": "".join(parts)}}], "usage": events[-1]["usage"]}
    usage = whole["usage"]
    if dialect == "chat":
        return whole["choices"][0]["message"]["content"], usage["prompt_tokens"]
    if dialect == "responses":
        return whole["output"][0]["content"][0]["text"], usage["input_tokens"]
    return whole["content"][0]["text"], usage["input_tokens"] + usage["cache_read_input_tokens"]


def digests(prompt: Any) -> list[tuple[int, bytes]]:
    return [(at, span.digest) for at, span in prompt.spans]


@pytest.mark.parametrize("dialect", CHATTING)
@pytest.mark.parametrize("stream", [False, True])
def test_pictures_give_the_prompt_and_the_answer_of_the_python_api(
    seeing: Seeing, viewer: httpx.Client, dialect: str, stream: bool
) -> None:
    more = {"stream_options": {"include_usage": True}} if stream and dialect == "chat" else {}
    answer = ask(viewer, dialect, question(dialect), stream=stream, **more)
    assert answer.status_code == 200, answer.text
    assert "x-replaced-blocks" not in answer.headers
    assert said(dialect, answer) == (seeing.python_text, len(seeing.python_prompt.token_ids))
    assert seeing.prompts[-1].token_ids == seeing.python_prompt.token_ids
    assert digests(seeing.prompts[-1]) == digests(seeing.python_prompt)


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_a_sound_reaches_the_engine(seeing: Seeing, viewer: httpx.Client, dialect: str) -> None:
    answer = ask(viewer, dialect, [sound(TONE), text(dialect, "Who?")])
    assert answer.status_code == 200, answer.text
    expected = seeing.service.prompts.build([Audio(TONE), Text("Who?")])
    assert seeing.prompts[-1].token_ids == expected.token_ids
    assert digests(seeing.prompts[-1]) == digests(expected) != []


@pytest.mark.parametrize("dialect", CHATTING)
def test_a_picture_in_the_result_of_a_tool_is_seen(
    seeing: Seeing, viewer: httpx.Client, dialect: str
) -> None:
    found = [text(dialect, "Here:"), picture(dialect, CAT), text(dialect, "done")]
    answer = converse(viewer, dialect, read_tool(dialect, found, []), tools=TOOLS[dialect])
    assert answer.status_code == 200, answer.text
    assert "x-replaced-blocks" not in answer.headers
    ((_, span),) = seeing.prompts[-1].spans
    assert span.digest == seeing.python_prompt.spans[0][1].digest
    rendered = seeing.prompts[-1].text
    assert "Here:<|vision_start|>" in rendered
    assert "<|vision_end|>done" in rendered


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses/input_tokens", {"input": [{"role": "user", "content": question("responses")}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": question("messages")}]}),
    ],
)
def test_pictures_are_counted(seeing: Seeing, viewer: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = viewer.post(path, json=body)
    assert answer.json()["input_tokens"] == len(seeing.python_prompt.token_ids)


def test_a_document_of_blocks_keeps_its_pictures(seeing: Seeing, viewer: httpx.Client) -> None:
    inside = [text("messages", "Page 1"), picture("messages", CAT), text("messages", "Page 2")]
    block = {"type": "document", "title": "Cats", "source": {"type": "content", "content": inside}}
    assert ask(viewer, "messages", [block, text("messages", "?")]).status_code == 200
    written = (
        "<document>\n<title>Cats</title>\n<document_content>\nPage 1<|vision_start|><|image_pad|><|vision_end|>"
        "Page 2\n</document_content>\n</document>\n?"
    )
    assert written in seeing.prompts[-1].text
    assert len(seeing.prompts[-1].spans) == 1


def test_a_picture_is_kept_for_the_response_that_continues(
    seeing: Seeing, viewer: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(viewer, "responses", question("responses")).json()
    threads, build = [], seeing.service.prompts.build

    def built(*given: Any, **more: Any) -> Any:
        threads.append(threading.current_thread().name)
        return build(*given, **more)

    monkeypatch.setattr(seeing.service.prompts, "build", built)
    later = converse(
        viewer, "responses", [{"role": "user", "content": "And?"}], previous_response_id=first["id"]
    )
    assert later.status_code == 200, later.text
    assert digests(seeing.prompts[-1]) == digests(seeing.python_prompt)
    # Only earlier items have the pictures, and they must not keep a thread from short requests.
    assert threads[0].startswith("argosy-large")


def test_the_template_shows_where_pictures_are(viewer: httpx.Client) -> None:
    messages = [{"role": "user", "content": question("chat")}]
    prompt = viewer.post("/apply-template", json={"messages": messages}).json()["prompt"]
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"What is{mark}and{mark}?<|im_end|>" in prompt


# Refusals


def address(dialect: str, url: str) -> dict[str, Any]:
    return {
        "chat": {"type": "image_url", "image_url": {"url": url}},
        "responses": {"type": "input_image", "image_url": url},
        "messages": {"type": "image", "source": {"type": "url", "url": url}},
    }[dialect]


REFUSALS: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "a space in base64": (
        lambda dialect: picture(dialect, encoded(CAT)[:40] + " " + encoded(CAT)[40:]),
        "the data of the picture is not base64\nhint: use the standard alphabet",
    ),
    "base64 of another alphabet": (lambda dialect: picture(dialect, "_-_-"), "is not base64"),
    "base64 without padding": (lambda dialect: picture(dialect, "AAA"), "is not base64"),
    "text beyond ASCII": (lambda dialect: picture(dialect, "ÄÖÜß"), "is not base64"),
    "another type": (
        lambda dialect: picture(dialect, CAT, "image/svg+xml"),
        "expected a picture of type image/png, image/jpeg, image/webp or image/gif, found \"image/svg+xml\"",
    ),
    "an address": (
        lambda dialect: address(dialect, "https://example.org/cat.png"),
        "expected the data of a picture, found an address",
    ),
    "a file": (lambda dialect: address(dialect, "file:///etc/passwd"), "found an address"),
    "nothing": (lambda dialect: picture(dialect, ""), "the picture is empty: it has 0 bytes"),
    "a truncated picture": (lambda dialect: picture(dialect, CAT[: len(CAT) // 2]), "the picture"),
    "another content": (lambda dialect: picture(dialect, b"<svg/>" * 9), "PNG, JPEG, WebP or GIF"),
    "too many pixels": (
        lambda dialect: picture(dialect, raw_png(16_000, 16_000, 8, 2, b"")),
        "a picture may have at most 24 megapixels, found 16,000 x 16,000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dialect", CHATTING)
@pytest.mark.parametrize("what", REFUSALS)
def test_data_that_is_no_picture_is_refused_in_the_dialects_shape(
    viewer: httpx.Client, seeing: Seeing, dialect: str, what: str
) -> None:
    make, sentence = REFUSALS[what]
    part = make(dialect)
    answer = ask(viewer, dialect, [text(dialect, "?"), part], stream=True)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == (
        {"type", "message"} if dialect == "messages" else {"message", "type", "param", "code"}
    )
    for foreign in (
        "PIL",
        "Traceback",
        "binascii",
        "pydantic",
        "passwd",
        "broken data stream",
        encoded(CAT)[:30],
    ):
        assert foreign not in answer.text
    place = "input" if dialect == "responses" else "messages"
    if "the picture " not in sentence and "base64" in sentence:
        assert error["message"].startswith(f"{place}.0.content.1: ")


@pytest.mark.parametrize("dialect", CHATTING)
def test_what_is_not_sent_becomes_a_note_in_the_result_of_a_tool(
    seeing: Seeing, viewer: httpx.Client, dialect: str
) -> None:
    part = address(dialect, "https://example.org/cat.png")
    drawing = picture(dialect, CAT, "image/svg+xml")
    found = [text(dialect, "Here:"), part, drawing, picture(dialect, CAT)]
    answer = converse(viewer, dialect, read_tool(dialect, found, []), tools=TOOLS[dialect])
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-replaced-blocks"] == f"2 {part['type']}"
    assert "omitted: expected the data of a picture, found an address" in seeing.prompts[-1].text
    assert 'or image/gif, found "image/svg+xml"]' in seeing.prompts[-1].text
    assert len(seeing.prompts[-1].spans) == 1


DAMAGED: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "a truncated picture": (
        lambda dialect: picture(dialect, CAT[: len(CAT) // 2]), "the picture is damaged or incomplete",
    ),
    "nothing": (lambda dialect: picture(dialect, ""), "the picture is empty: it has 0 bytes"),
    "no picture": (lambda dialect: picture(dialect, b"<svg/>" * 9), "unsupported picture format"),
    "no base64": (lambda dialect: picture(dialect, "AAA"), "the data of the picture is not base64"),
    "too many pixels": (
        lambda dialect: picture(dialect, raw_png(16_000, 16_000, 8, 2, b"")),
        "a picture may have at most 24 megapixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dialect", CHATTING)
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_picture_becomes_a_note_in_the_result_of_a_tool_and_in_an_earlier_turn(
    seeing: Seeing, viewer: httpx.Client, dialect: str, what: str
) -> None:
    make, reason = DAMAGED[what]
    bad = make(dialect)
    of_tool = read_tool(dialect, [text(dialect, "Here:"), bad, picture(dialect, CAT)], [])
    earlier = [
        {"role": "user", "content": [text(dialect, "Here:"), bad, picture(dialect, CAT)]},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "What?"},
    ]
    for conversation in (of_tool, earlier):
        answer = converse(viewer, dialect, conversation, tools=TOOLS[dialect])
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-replaced-blocks"] == f"1 {bad['type']}"
        assert f"[{bad['type']} omitted: {reason}" in seeing.prompts[-1].text
        ((_, span),) = seeing.prompts[-1].spans
        assert span.digest == seeing.python_prompt.spans[0][1].digest


def test_a_turn_of_only_a_damaged_picture_becomes_text(seeing: Seeing, viewer: httpx.Client) -> None:
    conversation = [
        {"role": "user", "content": [picture("chat", b"")]},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "What?"},
    ]
    assert converse(viewer, "chat", conversation).status_code == 200
    assert seeing.prompts[-1].spans == ()
    body = {"messages": conversation}
    assert (
        "[image_url omitted: the picture is empty"
        in viewer.post("/apply-template", json=body).json()["prompt"]
    )
    read = [{"role": "user", "content": [picture("messages", b"")]}, *conversation[1:]]
    assert viewer.post("/v1/messages/count_tokens", json={"messages": read}).status_code == 200


def test_a_file_id_is_refused_by_name(viewer: httpx.Client) -> None:
    for dialect, part in (
        ("responses", {"type": "input_image", "file_id": "file-1", "detail": "auto"}),
        ("messages", {"type": "image", "source": {"type": "file", "file_id": "file-1"}}),
    ):
        message = ask(viewer, dialect, [part]).json()["error"]["message"]
        assert (
            "expected the data of a picture, found a file id\nhint: this server opens no address" in message
        )
    message = ask(viewer, "responses", [{"type": "input_image"}]).json()["error"]["message"]
    assert "found no image_url" in message


@pytest.mark.parametrize("url", ["data:image/png,AAAA", "data:image/png;charset=utf-8,AAAA", "data:"])
def test_a_data_url_without_base64_is_refused(viewer: httpx.Client, url: str) -> None:
    for dialect in ("chat", "responses"):
        message = ask(viewer, dialect, [address(dialect, url)]).json()["error"]["message"]
        assert "expected the data of a picture, found a data URL that is not base64" in message


@pytest.mark.parametrize("form", ["image/jpeg", "image/jpg", "IMAGE/PNG", "image/webp", "image/gif"])
def test_the_content_decides_what_a_picture_is(viewer: httpx.Client, form: str) -> None:
    for dialect in CHATTING:
        assert ask(viewer, dialect, [picture(dialect, CAT, form)]).status_code == 200


def test_a_sound_of_an_unknown_format_is_refused_by_name(viewer: httpx.Client) -> None:
    message = ask(viewer, "chat", [sound(TONE, "midi")]).json()["error"]["message"]
    assert message.startswith(
        'messages.0.content.0: expected a sound of type wav, mp3, flac or ogg, found "midi"'
    )
    assert "unsupported sound format" in ask(viewer, "chat", [sound(b"RIFF" * 20)]).json()["error"]["message"]


def video(dialect: str, content: bytes, form: str = "video/mp4") -> dict[str, Any]:
    data = encoded(content)
    return {
        "chat": {"type": "video_url", "video_url": {"url": f"data:{form};base64,{data}"}},
        "responses": {"type": "input_video", "video_url": f"data:{form};base64,{data}"},
        "messages": {"type": "video", "source": {"type": "base64", "media_type": form, "data": data}},
    }[dialect]


needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None,
    reason="needs the programs ffmpeg and ffprobe (`apt install ffmpeg`)",
)


@needs_ffmpeg
@pytest.mark.parametrize("dialect", CHATTING)
def test_a_video_reaches_the_engine_as_from_python_with_its_sound(
    seeing: Seeing, viewer: httpx.Client, dialect: str
) -> None:
    file = clip_file(20)
    content = [text(dialect, "What happens?"), video(dialect, file), picture(dialect, CAT)]
    answer = ask(viewer, dialect, content)
    assert answer.status_code == 200, answer.text
    assert "x-replaced-blocks" not in answer.headers
    expected = seeing.service.prompts.build([Text("What happens?"), Video(file), Image(CAT)])
    assert seeing.prompts[-1].token_ids == expected.token_ids
    assert digests(seeing.prompts[-1]) == digests(expected)
    kinds = [span.kind for _, span in expected.spans]
    # Two groups of two frames, a second apart, and two seconds of sound: 13 positions of it a second.
    assert kinds == ["video", "sound", "video", "sound", "picture"]
    assert expected.spans[1][1].num_positions == 13
    # The same tokens are told before anything is sent to the model.
    if dialect == "responses":
        body = {"input": [{"role": "user", "content": content}]}
        counted = viewer.post("/v1/responses/input_tokens", json=body).json()
        pictures = sum(span.num_positions for _, span in expected.spans if span.kind != "sound")
        sounds = sum(span.num_positions for _, span in expected.spans if span.kind == "sound")
        assert counted["input_tokens_details"] == {"image_tokens": pictures, "audio_tokens": sounds}
    elif dialect == "messages":
        body = {"messages": [{"role": "user", "content": content}]}
        counted = viewer.post("/v1/messages/count_tokens", json=body).json()
        assert counted["input_tokens"] == len(expected.token_ids)


@needs_ffmpeg
@pytest.mark.parametrize("dialect", CHATTING)
def test_a_video_in_the_result_of_a_tool_is_seen(seeing: Seeing, viewer: httpx.Client, dialect: str) -> None:
    found = [text(dialect, "Here:"), video(dialect, clip_file(20))]
    answer = converse(viewer, dialect, read_tool(dialect, found, []), tools=TOOLS[dialect])
    assert answer.status_code == 200, answer.text
    assert "x-replaced-blocks" not in answer.headers
    assert [span.kind for _, span in seeing.prompts[-1].spans] == ["video", "sound", "video", "sound"]


@needs_ffmpeg
def test_a_response_that_continues_one_with_a_video_is_prepared_in_the_thread_for_videos(
    seeing: Seeing, viewer: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(viewer, "responses", [video("responses", clip_file(20))]).json()
    threads, build = [], seeing.service.prompts.build

    def built(*given: Any, **more: Any) -> Any:
        threads.append(threading.current_thread())
        return build(*given, **more)

    monkeypatch.setattr(seeing.service.prompts, "build", built)
    earlier = first["id"]
    for question in ("And?", "And then?"):
        later = converse(
            viewer, "responses", [{"role": "user", "content": question}], previous_response_id=earlier
        )
        assert later.status_code == 200, later.text
        earlier = later.json()["id"]
        assert [span.kind for _, span in seeing.prompts[-1].spans] == ["video", "sound", "video", "sound"]
    without = ask(viewer, "responses", [text("responses", "Hello")]).json()["id"]
    converse(viewer, "responses", [{"role": "user", "content": "And?"}], previous_response_id=without)
    one, other, *without_video = threads
    assert one is other
    assert len(without_video) == 2
    assert one not in without_video


@needs_ffmpeg
def test_a_picture_does_not_wait_for_a_film(
    seeing: Seeing, viewer: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_decoded, may_end = threading.Event(), threading.Event()
    prepare = PromptMedia._prepare_video

    def slowly(*given: Any, **more: Any) -> Any:
        is_decoded.set()
        assert may_end.wait(60)
        return prepare(*given, **more)

    monkeypatch.setattr(PromptMedia, "_prepare_video", slowly)
    answers: list[httpx.Response] = []
    film = [video("chat", clip_file(20)), text("chat", "What happens?")]
    asking = threading.Thread(target=lambda: answers.append(ask(viewer, "chat", film)))
    asking.start()
    try:
        assert is_decoded.wait(60)
        assert (
            ask(viewer, "chat", [picture("chat", png(pattern(33, 44))), text("chat", "?")]).status_code == 200
        )
        assert not answers
    finally:
        may_end.set()
        asking.join()
    assert answers[0].status_code == 200


def test_pictures_are_not_prepared_for_a_client_that_has_left(
    seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_left, may_end = threading.Event(), threading.Event()
    prepared, prepare, end = list[object](), PromptMedia._prepare, Caller.end

    def slowly(*given: Any) -> Any:
        prepared.append(given)
        assert may_end.wait(60)
        return prepare(*given)

    def noticed(caller: Caller, why: Exception) -> None:
        end(caller, why)
        has_left.set()

    monkeypatch.setattr(PromptMedia, "_prepare", slowly)
    monkeypatch.setattr(Caller, "end", noticed)
    pictures = [picture("chat", png(pattern(33, width))) for width in (44, 45, 46)]
    connection = http.client.HTTPConnection(seeing.url.removeprefix("http://"))
    said = json.dumps({"messages": [{"role": "user", "content": pictures}]})
    connection.request("POST", PATHS["chat"], said, {"content-type": "application/json"})
    while not prepared:
        time.sleep(0.005)
    connection.close()
    try:
        assert has_left.wait(60)
    finally:
        may_end.set()
    queue = seeing.service.work._large
    while queue._num_idle < queue._num_running:
        time.sleep(0.005)
    assert len(prepared) == 1


@pytest.mark.parametrize("dialect", CHATTING)
def test_a_video_that_cannot_be_shown_is_refused_by_name(
    viewer: httpx.Client, client: httpx.Client, dialect: str
) -> None:
    url = "https://example.com/a.mp4"
    address = {
        "chat": {"type": "video_url", "video_url": {"url": url}},
        "responses": {"type": "input_video", "video_url": url},
        "messages": {"type": "video", "source": {"type": "url", "url": url}},
    }[dialect]
    for part, sentence in (
        (address, "expected the data of a video, found an address"),
        (
            video(dialect, b"x", "video/ogg"),
            "expected a video of type video/mp4, video/quicktime, video/webm",
        ),
        (video(dialect, b""), "the video is empty: it has 0 bytes"),
        (video(dialect, b"#EXTM3U\nfile:///etc/passwd\n"), "unsupported video format"),
    ):
        answer = ask(viewer, dialect, [part])
        assert answer.status_code == 400
        assert sentence in answer.json()["error"]["message"]
    refused = ask(client, dialect, [video(dialect, b"x")])
    assert refused.status_code == 400
    said = f"this model reads text only, and this part has type '{address['type']}'"
    assert said in refused.json()["error"]["message"]


def test_a_client_learns_that_the_budget_has_no_room_for_pictures(tmp_path: Path) -> None:
    model = write_seeing_model(tmp_path / "model")
    with pytest.raises(DoesNotFit) as caught, Engine.open(model, memory="1MiB", threads=1, media=True):
        raise AssertionError
    needed = caught.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    with Engine.open(model, memory=needed - (128 << 20), threads=1) as engine:
        facts = facts_of_engine(engine, "m")
    assert not facts.media_kinds
    intake = Intake((), Pool(1 << 20).share(), faults=facts.media_faults)
    with pytest.raises(UsageError, match="memory budget has no room for pictures, and this part"):
        intake.piece(part_of(CAT), "here", is_new=True)


def test_only_the_data_of_a_video_is_taken(viewer: httpx.Client) -> None:
    for dialect, part in (
        ("chat", {"type": "video_url"}),
        ("chat", {"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}),
        ("responses", {"type": "input_video"}),
        ("responses", {"type": "input_video", "video_url": None}),
        ("responses", {"type": "input_video", "video_url": {"url": "data:video/mp4;base64,AAAA"}}),
        ("messages", {"type": "video"}),
        ("messages", {"type": "video", "source": {"type": "base64", "data": "AAAA"}}),
    ):
        assert ask(viewer, dialect, [part]).status_code == 400, part


def test_a_part_of_another_kind_is_replaced_or_refused_with_what_the_model_reads(
    viewer: httpx.Client,
) -> None:
    pdf = {"type": "file", "file": {"file_data": "x"}}
    reads = "this model reads text, pictures, sounds and videos"
    refused = ask(viewer, "chat", [pdf])
    assert refused.json()["error"]["message"].startswith(
        f"messages.0.content.0: {reads}, and this part has type"
    )
    answer = converse(viewer, "chat", read_tool("chat", [pdf], []), tools=TOOLS["chat"])
    assert answer.headers["x-replaced-blocks"] == "1 file"


def test_only_users_and_tools_show_pictures(viewer: httpx.Client) -> None:
    conversation = [{"role": "system", "content": [picture("chat", CAT)]}, {"role": "user", "content": "Hi"}]
    message = converse(viewer, "chat", conversation).json()["error"]["message"]
    assert "a message of role system takes text only" in message


LARGE = png(pattern(400, 300, seed=3))  # 64 tokens at most here, so a lower cap shows


def with_detail(dialect: str, content: bytes, detail: str | None) -> dict[str, Any]:
    part = picture(dialect, content)
    if dialect == "chat":
        part["image_url"]["detail"] = detail
        return part
    return part | {"detail": detail}


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_low_detail_takes_fewer_tokens_and_is_another_picture(
    seeing: Seeing, viewer: httpx.Client, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = seeing.service.prompts._media
    assert isinstance(media, PromptMedia)
    high = media._processors["picture"]
    assert isinstance(high, PictureProcessor)
    # As for an engine that allows more tokens than the tiny model does.
    fewer = replace(high, fit=replace(high.fit, most_pixels=16 * 8**2))  # type: ignore[type-var]
    monkeypatch.setattr(media, "_low_detail", fewer)
    found = {}
    for detail in ("low", "high", "auto", "original", None):
        answer = ask(viewer, dialect, [with_detail(dialect, LARGE, detail)])
        assert answer.status_code == 200, answer.text
        assert "x-ignored-params" not in answer.headers
        ((_, span),) = seeing.prompts[-1].spans
        usage = answer.json()["usage"]
        details = usage["prompt_tokens_details" if dialect == "chat" else "input_tokens_details"]
        assert details["image_tokens"] == span.num_positions
        assert "audio_tokens" not in details
        found[detail] = (span.num_positions, span.digest)
    assert found["low"][0] < found["high"][0]
    assert found["low"][1] != found["high"][1]
    assert found["high"] == found["auto"] == found["original"] == found[None]
    assert ask(viewer, dialect, [with_detail(dialect, CAT, "lots")]).status_code == 400


def test_a_small_picture_with_low_detail_is_not_taken_for_the_other(
    seeing: Seeing, viewer: httpx.Client
) -> None:
    spans = []
    for detail in ("low", "high"):
        assert ask(viewer, "chat", [with_detail("chat", CAT, detail)]).status_code == 200
        spans.append(seeing.prompts[-1].spans[0][1])
    assert spans[0].num_positions == spans[1].num_positions
    assert spans[0].digest != spans[1].digest


def test_tokens_of_pictures_and_sounds_are_told(seeing: Seeing, viewer: httpx.Client) -> None:
    content = [sound(TONE), picture("responses", CAT), picture("responses", DOG)]
    told = viewer.post(
        "/v1/responses/input_tokens", json={"input": [{"role": "user", "content": content}]}
    ).json()
    answer = ask(viewer, "responses", content)
    counts = {"image_tokens": 0, "audio_tokens": 0}
    for _, span in seeing.prompts[-1].spans:
        counts["audio_tokens" if span.kind == "sound" else "image_tokens"] += span.num_positions
    assert min(counts.values()) > 0
    assert told["input_tokens_details"] == counts
    details = answer.json()["usage"]["input_tokens_details"]
    assert {name: details[name] for name in counts} == counts


def test_the_progress_of_an_encode_is_told(viewer: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argosy.engine.prompt_turns.MAKING_S", 0.0)  # a piece of work for each step
    seen = [picture("chat", png(pattern(90, 90, seed=seed))) for seed in (21, 22)]  # not encoded before
    answer = ask(viewer, "chat", seen, stream=True, return_progress=True)
    chunks = [event["data"] for event in read_events(answer.text) if event["data"] != "[DONE]"]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    shares = [one["encoded"] for one in told if "encoded" in one]
    assert shares == 2 * [0, 0.25, 0.5, 0.75]  # the tower has four layers
    assert told[-1]["processed"] == told[-1]["total"]
    assert "encoded" not in told[-1]
    assert [one["processed"] for one in told] == sorted(one["processed"] for one in told)


# Memory and time


def part_of(content: bytes) -> PicturePart:
    url = f"data:image/png;base64,{encoded(content)}"
    return PicturePart(type="image_url", image_url=PictureAddress(url=url))


def test_the_size_is_checked_and_charged_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> bytes:
        raise AssertionError("decoded")

    monkeypatch.setattr("argosy.serve.answer.media_parts.binascii.a2b_base64", decode)
    pool = Pool(2 << 20)
    with pytest.raises(BadMedia, match="a picture may have at most 10 bytes, found 11"):
        Intake(["picture"], pool.share(), MediaLimits(file_bytes=10)).piece(
            part_of(b"x" * 11), "here", is_new=True
        )
    with pytest.raises(Overloaded):
        Intake(["picture"], pool.share()).piece(part_of(b"x" * (2 << 20)), "here", is_new=True)
    assert pool.num_bytes == 0


@pytest.mark.parametrize(
    "part",
    [
        VideoPart(type="video_url", video_url=VideoAddress(url="https://example.org/a.mp4")),
        VideoInput(type="input_video", video_url="https://example.org/a.mp4"),
        VideoBlock(type="video", source=AddressSource(type="url", url="https://example.org/a.mp4")),
    ],
)
def test_a_video_at_an_address_is_taken_once_it_is_fetched(part: MediaPart) -> None:
    files = Files()
    intake = Intake(["video"], Pool(2 << 20).share(), files=files)
    assert intake.piece(part, "here", is_new=True) == ""
    assert list(files.wanted) == ["https://example.org/a.mp4"]
    files.found["https://example.org/a.mp4"] = b"film"
    piece = intake.piece(part, "here", is_new=True)
    assert isinstance(piece, dict)
    assert (type(piece["video"]), piece["video"].source) == (Video, b"film")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_exactly_the_decoded_bytes_are_charged(size: int) -> None:
    share = Pool(2 << 20).share()
    piece = Intake(["picture"], share).piece(part_of(b"x" * size), "here", is_new=True)
    assert isinstance(piece, dict)
    assert share.num_bytes == len(piece["image"].source) == size


@pytest.mark.parametrize("is_refused", [False, True])
def test_decoded_bytes_are_given_back_once_the_prompt_is_built(
    seeing: Seeing, viewer: httpx.Client, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    shares, threads = [], []
    make, build = seeing.service.intake, seeing.service.prompts.build

    def intake(caller: Any) -> Intake:
        shares.append((caller.held.share, caller.held.share.num_bytes))
        return make(caller)

    def built(*given: Any, **more: Any) -> Any:
        (share, before) = shares[-1]
        threads.append((threading.current_thread().name, share.num_bytes - before))
        return build(*given, **more)

    def submit(*_: Any, **__: Any) -> Any:
        raise Overloaded("full", retry_after_s=1)

    monkeypatch.setattr(seeing.service, "intake", intake)
    monkeypatch.setattr(seeing.service.prompts, "build", built)
    if is_refused:
        monkeypatch.setattr(seeing.service.loop, "submit", submit)
    held_at_end, is_released = [], threading.Event()

    def release(share: PoolShare) -> None:
        held_at_end.append(share.num_bytes)
        share.shrink(0)
        is_released.set()

    monkeypatch.setattr(PoolShare, "release", release)
    answer = ask(viewer, "chat", [picture("chat", CAT)])
    assert answer.status_code == (503 if is_refused else 200)
    ((thread, charged),) = threads
    assert is_released.wait(20)  # the client may have the whole answer before the request has ended
    assert charged == len(CAT)
    # The base64 is forgotten too, once the request is accepted.
    dropped = 0 if is_refused else len(picture("chat", CAT)["image_url"]["url"])
    assert held_at_end == [shares[0][1] - dropped]
    # Decoding takes long even if the file is short, so it must not keep a thread from short requests.
    assert thread.startswith("argosy-large")


# What clients read and send


def test_models_lists_what_the_model_takes(viewer: httpx.Client, client: httpx.Client) -> None:
    for one, inputs in ((viewer, ["text", "image", "audio", "video"]), (client, ["text"])):
        for entry in (one.get("/v1/models").json()["data"][0], one.get("/v1/models/tiny").json()):
            assert entry["architecture"] == {"input_modalities": inputs, "output_modalities": ["text"]}


def test_openais_client_sends_a_picture_and_a_sound(seeing: Seeing) -> None:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none") as client:
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question("chat")}],  # type: ignore[list-item, misc]
            temperature=0, max_tokens=NUM_NEW,
        )  # fmt: skip
        assert made.choices[0].message.content == seeing.python_text
        response = client.responses.create(
            model="tiny", input=[{"role": "user", "content": question("responses")}],  # type: ignore[list-item, misc]
            temperature=0, max_output_tokens=NUM_NEW,
        )  # fmt: skip
        assert response.output_text == seeing.python_text
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [sound(TONE), text("chat", "Who?")]}],  # type: ignore[list-item, misc]
            max_tokens=1,
        )  # fmt: skip
        assert (
            digests(seeing.prompts[-1])
            == digests(seeing.service.prompts.build([Audio(TONE), Text("Who?")]))
            != []
        )
        with pytest.raises(openai.BadRequestError, match="the picture is empty"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": [picture("chat", b"")]}]  # type: ignore[list-item, misc]
            )  # fmt: skip


def test_anthropics_client_sends_a_picture(seeing: Seeing) -> None:
    with anthropic.Anthropic(base_url=seeing.url, api_key="none") as client:
        made = client.messages.create(
            model="tiny", messages=[{"role": "user", "content": question("messages")}],  # type: ignore[typeddict-item]
            max_tokens=NUM_NEW, extra_body={"temperature": 0},
        )  # fmt: skip
        assert made.content[0].text == seeing.python_text  # type: ignore[union-attr]
        with pytest.raises(anthropic.BadRequestError, match="the picture is empty"):
            client.messages.create(
                model="tiny", max_tokens=1,
                messages=[{"role": "user", "content": [picture("messages", b"")]}],  # type: ignore[typeddict-item, list-item]
            )  # fmt: skip


def test_the_document_describes_pictures_sounds_and_videos(viewer: httpx.Client) -> None:
    shown = json.dumps(viewer.get("/openapi.json").json())
    for name in (
        "PicturePart",
        "SoundPart",
        "VideoPart",
        "PictureInput",
        "VideoInput",
        "ImageBlock",
        "VideoBlock",
    ):
        assert f'"#/components/schemas/{name}"' in shown
