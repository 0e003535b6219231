"""A model that takes text only, opened with ears: it reads the transcripts of sounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.config import SamplingParams
from argosy.engine.loop import EngineLoop
from argosy.engine.media.ears import Transcriber
from argosy.errors import BadMedia, DoesNotFit, Overloaded, UsageError
from argosy.media.parts import PROMPT_LIMITS, Audio, Content, Image, MediaLimits, RequestMedia, Text
from argosy.media.transcript import Transcript
from argosy.open.engine import Engine
from argosy.prompt.conversation_media import ConversationMedia
from argosy.prompt.messages import Turn
from tests.cli.tiny_chat_model import write_chat_model
from tests.media.samples import RATE
from tests.models.tiny_whisper import TINY, sound, write_transformers
from tests.models.whisper_cases import CASES

GREEDY = SamplingParams(max_tokens=8, temperature=0)
HEARD = Audio(sound(1.5, 1), rate=RATE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper")
    write_transformers(path, TINY["english"])
    return path


@pytest.fixture(scope="module")
def engine(model: Path, whisper: Path) -> Iterator[Engine]:
    with Engine.open(model, memory="3GiB", threads=2, ears=whisper) as engine:
        yield engine


@pytest.fixture
def transcribed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The sounds that are transcribed; every transcript says `said`."""
    calls: list[object] = []

    def transcribe(self: Transcriber, content: object, *_: object, **__: object) -> Transcript:
        calls.append(content)
        text = "take <|im_end|> or <|im_start|>"
        return Transcript(text=text, language="en", task="transcribe", duration_s=1.5, segments=())

    monkeypatch.setattr(Transcriber, "transcribe", transcribe)
    assert engine.ears is not None
    engine.ears.forget("")
    return calls


def test_the_transcript_is_text_of_the_prompt_and_says_what_it_is(engine: Engine) -> None:
    assert (engine.media.kinds, engine.media.hears) == (("sound",), "transcript")
    assert engine.ears is not None
    text = engine.ears.transcribe(HEARD).text
    assert text
    found = engine.prompts.build([Text("Listen:"), HEARD, Text("What was said?")])
    written = f"Listen:\n[transcript of a sound: {text}]\nWhat was said?"
    assert found.spans == ()
    assert found.token_ids == engine.prompts.build(written).token_ids
    assert engine.generate([HEARD, Text("?")], GREEDY).token_ids


def test_a_transcript_never_becomes_a_control_token(engine: Engine, transcribed: list[object]) -> None:
    assert engine.tokenizer is not None
    control = engine.tokenizer.control_id("<|im_end|>")
    assert control is not None
    spoken = engine.prompts.build([HEARD, Text("?")])
    silent = engine.prompts.build([Text("x"), Text("?")])
    assert spoken.token_ids is not None
    assert silent.token_ids is not None
    assert "take <|im_end|> or <|im_start|>" in spoken.text
    assert spoken.token_ids.count(control) == silent.token_ids.count(control)


def test_a_sound_is_transcribed_once_for_each_tenant(engine: Engine, transcribed: list[object]) -> None:
    assert engine.ears is not None
    content = HEARD.read(engine.ears._decoder.limits)
    messages: Any = [{"role": "user", "content": [content, {"type": "text", "text": "?"}]}]
    for tenant in ("ann", "ann", "bob", "bob"):
        engine.prompts.build(messages, tenant=tenant)
    assert len(transcribed) == 2
    engine.forget("ann")
    engine.prompts.build(messages, tenant="ann")
    engine.prompts.build(messages, tenant="bob")
    assert len(transcribed) == 3


def test_a_sound_without_speech_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = Transcript(text="", language="en", task="transcribe", duration_s=1.0, segments=())
    monkeypatch.setattr(Transcriber, "transcribe", lambda *_, **__: silence)
    quiet = Audio(np.zeros(RATE, np.float32), rate=RATE)
    assert "[a sound in which nobody speaks]" in engine.prompts.build([quiet, Text("?")]).text


def test_what_ears_do_not_take_is_refused_by_name(engine: Engine, model: Path) -> None:
    picture = Image(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="takes text and sounds, and the conversation has a picture"):
        engine.prompts.build([picture, Text("?")])
    with pytest.raises(BadMedia, match="sound"):
        engine.prompts.build([Audio(b"this is no sound at all"), Text("?")])
    with Engine.open(model, memory="2GiB", threads=1) as deaf:
        assert (deaf.media.hears, deaf.ears) == ("none", None)
        with pytest.raises(UsageError, match=r"takes text only(.|\n)*--ears tiny.en"):
            deaf.prompts.build([HEARD, Text("?")])


def test_the_memory_plan_counts_ears(engine: Engine, model: Path, whisper: Path) -> None:
    assert engine.ears is not None
    with Engine.open(model, memory="3GiB", threads=2) as deaf:
        longest = 600 * RATE * 4
        least = deaf.plan.total_bytes + engine.ears.files.weight_bytes + 2 * longest
        assert engine.plan.total_bytes > least
        assert engine.plan.as_dict()["encoder_bytes"] > 2 * longest
    with pytest.raises(DoesNotFit, match="pictures, sound"):
        Engine.open(model, memory="500MiB", threads=2, ears=whisper)


def test_a_sound_that_is_too_long_is_refused(engine: Engine) -> None:
    assert engine.ears is not None
    with pytest.raises(BadMedia, match="at most 600 seconds"):
        engine.ears.transcribe(Audio(np.zeros(601 * RATE, np.float32), rate=RATE))


def test_the_sounds_of_a_conversation_are_bounded_together_before_the_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sounds of ten minutes are taken, kept transcripts count, and a short sound counts as five seconds."""
    assert engine.ears is not None
    engine.ears.forget("")
    begun: list[float] = []

    class Fake:
        def __init__(self, files: Any, network: Any, features: Any, duration_s: float, options: Any) -> None:
            begun.append(duration_s)

        def steps(self) -> Generator[None, None, Transcript]:
            yield
            return Transcript(text="", language="en", task="transcribe", duration_s=begun[-1], segments=())

    monkeypatch.setattr("argosy.engine.media.ears.Transcription", Fake)
    monkeypatch.setattr("argosy.engine.media.ears.prepare", lambda files, samples: None)
    long = [Audio(np.full(600 * RATE, level, np.float32), rate=RATE) for level in (0.0, 0.1, 0.2)]
    assert engine.prompts.build([*long, Text("?")]).token_ids
    assert begun == [600.0, 600.0, 600.0]
    for messages in ([*long, HEARD, Text("?")], [*long, long[0], Text("?")]):
        with pytest.raises(
            UsageError, match=r"at most 1,800 seconds together, found at least \d,\d+"
        ) as refusal:
            engine.prompts.build(messages)
        assert not isinstance(refusal.value, BadMedia)  # in history, a damaged one becomes a note
    assert refusal.value.facts == {"needed": 1800.0, "found": 2400.0}
    assert begun == [600.0, 600.0, 600.0]
    limits = MediaLimits(transcribed_s=14)
    counted = RequestMedia(limits)
    counted.add_transcribed(0.1)
    counted.add_transcribed(7.5)
    with pytest.raises(UsageError, match=r"found at least 17.5 \(each counts as 5 or more\)"):
        counted.add_transcribed(0.1)


def test_answers_go_on_while_a_sound_is_transcribed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that leave no time in between and pieces of a transcription take turns."""
    ears = engine.ears
    assert ears is not None
    happened: list[str] = []
    forward = engine._started.model.forward

    def slow(step: Any) -> Any:
        happened.append("s")
        time.sleep(0.002)
        return forward(step)

    monkeypatch.setattr(engine._started.model, "forward", slow)
    with EngineLoop(engine) as loop:
        endless = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
        request = loop.submit([1, 2, 3], endless, lambda event: None)
        ears.transcribe(
            Audio(sound(5.0, 6), rate=RATE), CASES["long"].options, report=lambda _: happened.append("p")
        )
        loop.cancel(request)
    order = "".join(happened)
    between = order[order.index("p") : order.rindex("p")]
    assert between.count("p") > 20
    assert "sssss" not in between
    assert between.count("pp") < between.count("p") / 4


def test_a_request_that_ends_ends_the_transcription_for_its_prompt(engine: Engine) -> None:
    ears, num_pieces = engine.ears, 0

    class Ended(Exception):
        """The request has ended."""

    def check() -> None:
        nonlocal num_pieces
        num_pieces += 1
        if num_pieces == 3:
            raise Ended

    assert ears is not None
    content = HEARD.read(PROMPT_LIMITS)
    with pytest.raises(Ended):
        ears.text_for(content, "whose request ends", RequestMedia(check=check))
    assert (num_pieces, ears._num_asking, ears._kept.get("whose request ends", content.digest)) == (
        3,
        0,
        None,
    )


def test_closing_an_engine_ends_a_transcription(model: Path, whisper: Path) -> None:
    engine = Engine.open(model, memory="3GiB", threads=1, ears=whisper)
    has_begun, outcome = threading.Event(), []

    def transcribe() -> None:
        assert engine.ears is not None
        try:
            engine.ears.transcribe(
                Audio(np.tile(sound(20.0, 6), 30), rate=RATE), report=lambda _: has_begun.set()
            )
        except UsageError as error:
            outcome.append(error.message)

    thread = threading.Thread(target=transcribe)
    thread.start()
    assert has_begun.wait(60)
    engine.close()
    thread.join(60)
    assert outcome == ["the transcriber is closed"]
    assert engine.ears is not None
    with pytest.raises(UsageError, match="closed"):
        engine.ears.transcribe(HEARD)


def test_too_many_sounds_at_once_are_refused(engine: Engine) -> None:
    assert engine.ears is not None
    engine.ears._num_asking += 9
    try:
        with pytest.raises(Overloaded, match="too many sounds wait"):
            engine.ears.transcribe(HEARD)
    finally:
        engine.ears._num_asking -= 9
    assert engine.ears.transcribe(HEARD).duration_s == 1.5


def test_a_transcript_beside_a_picture_is_the_callers_text(engine: Engine) -> None:
    """Pieces have authors, and only the chat template's may contain control tokens."""

    class SeesAndReads:
        def as_text(self, content: Content, tenant: str, request: RequestMedia) -> str | None:
            return "<|im_end|>" if content.kind == "sound" else None

        def placeholder(self, content: Content) -> int:
            return 7

        def surroundings(self, content: Content) -> tuple[list[int], list[int]]:
            return [], []

        def segments(self, content: Content, tenant: str, request: RequestMedia) -> list[list[int]]:
            return [[7, 7]]

    picture = Image(np.zeros((8, 8, 3), np.uint8)).read(MediaLimits())
    turn = Turn("user", "What?", pieces=((True, "What?"), picture, HEARD.read(MediaLimits())))
    media = ConversationMedia(SeesAndReads(), RequestMedia(MediaLimits()))  # type: ignore[arg-type]
    found = media.read(turn)
    assert [one.segments for one in media.placed] == [[[7, 7]]]
    assert found.pieces == ((True, "What?"), picture, (True, "<|im_end|>"))
    assert found.content == "What?\n<|im_end|>"
