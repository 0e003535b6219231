"""A stream that another server repeats: every dialect, cut in several places."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy.route.events import BadStream, Event, NotTheSame, Splitter, Transcript, is_failure, parse_event
from argosy.serve.http.streams import JSON_LINES, SSE, Encoding

TRANSCRIPTS = Path(__file__).parents[1] / "serve" / "transcripts"
STREAMS = sorted(
    path.stem.removesuffix("_stream")
    for path in TRANSCRIPTS.glob("*_stream.json")
    if not any(part in path.stem for part in ("failed", "too_long"))
)
_COUNTED = ("usage", "timings", "prompt_eval_count", "total_duration")


def load(name: str) -> tuple[Encoding, list[dict[str, Any]]]:
    recorded = json.loads((TRANSCRIPTS / f"{name}_stream.json").read_text())
    encoding = SSE if recorded["headers"]["content-type"].startswith(SSE.media_type) else JSON_LINES
    return encoding, recorded["events"]


def written(encoding: Encoding, events: list[dict[str, Any]]) -> list[bytes]:
    return [encoding.write(one["data"], one["event"]) for one in events]


def by_another_server(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same answer with other ids and times."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(one) for one in value]
        if not isinstance(value, dict):
            return value
        made = {}
        for key, one in value.items():
            if key in ("id", "item_id", "call_id") and isinstance(one, str):
                made[key] = f"other-{one}"
            elif key in ("created", "created_at"):
                made[key] = 1234 if isinstance(one, int) else "1971-01-01T00:00:00.000000Z"
            else:
                made[key] = changed(one)
        return made

    return [{**one, "data": changed(one["data"])} for one in events]


def taken(transcript: Transcript, raws: list[bytes]) -> list[bytes]:
    found = (transcript.take(raw, parse_event(raw)) for raw in raws)
    return [one for one in found if one is not None]


def as_seen(raws: list[bytes]) -> list[Any]:
    """The events as a client sees them: ids as the number of their first use; no counts, times or signs of life."""
    numbers: dict[Any, int] = {}

    def seen(value: Any) -> Any:
        if isinstance(value, list):
            return [seen(one) for one in value]
        if not isinstance(value, dict):
            return value
        made = {}
        for key, one in value.items():
            if key in ("id", "item_id", "call_id") and isinstance(one, str):
                made[key] = numbers.setdefault(one, len(numbers))
            elif key not in _COUNTED and not (key == "created_at" and isinstance(one, str)):
                made[key] = seen(one)
        return made

    found = [(event.name, seen(event.data)) for event in map(parse_event, raws)]
    return [one for one in found if not says_nothing(one[1])]


def says_nothing(data: Any) -> bool:
    if isinstance(data, str) or "choices" not in data:
        return False
    return not data["choices"] or data["choices"] == [
        {"index": data["choices"][0]["index"], "text": "", "logprobs": None, "finish_reason": None}
    ]


def test_there_are_streams_of_every_dialect() -> None:
    assert {name.partition("_")[0] for name in STREAMS} == {
        "chat", "completions", "messages", "ollama", "responses",
    }  # fmt: skip


@pytest.mark.parametrize("num_cuts", [5, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", STREAMS)
def test_a_client_gets_the_same_events_wherever_its_server_dies(name: str, num_cuts: int) -> None:
    encoding, events = load(name)
    first, second = written(encoding, events), written(encoding, by_another_server(events))
    step = max(1, len(first) // num_cuts)
    for num_taken in [*range(0, len(first), step), len(first) - 1]:
        transcript = Transcript(encoding)
        got = taken(transcript, first[:num_taken])
        transcript.begin_replay()
        got += taken(transcript, second)
        assert not transcript.is_catching_up
        if num_taken:
            assert as_seen(got) == as_seen(first), num_taken
        assert transcript.is_whole


@pytest.mark.parametrize("name", ["chat_tools", "messages_thoughtful_tools", "responses_thoughtful_tools"])
def test_a_third_server_continues_what_the_second_could_not_finish(name: str) -> None:
    encoding, events = load(name)
    first, other = written(encoding, events), written(encoding, by_another_server(events))
    third = written(encoding, by_another_server(by_another_server(events)))
    transcript = Transcript(encoding)
    got = taken(transcript, first[: len(first) // 3])
    transcript.begin_replay()
    got += taken(transcript, other[: len(first) // 2])
    transcript.begin_replay()
    got += taken(transcript, third)
    assert as_seen(got) == as_seen(first)


def chunk(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    return SSE.write({"id": "chatcmpl-1", "choices": [choice]}, None)


def said(raws: list[bytes]) -> str:
    texts = []
    for raw in raws:
        data = parse_event(raw).data
        assert isinstance(data, dict)
        texts.append(data["choices"][0]["delta"]["content"])
    return "".join(texts)


def test_events_may_carry_more_or_less_text_than_those_of_the_first_server() -> None:
    text = "The sky is blue – naïve, 🙂 and so on. " * 4
    random.seed(7)

    def pieces() -> Iterator[bytes]:
        at = 0
        while at < len(text):
            size = random.randrange(0, 6)
            yield chunk(text[at : at + size])
            at += size

    for _ in range(50):
        first = list(pieces())
        transcript = Transcript(SSE)
        got = taken(transcript, first[: random.randrange(len(first))])
        transcript.begin_replay()
        got += taken(transcript, list(pieces()))
        assert said(got) == text


@pytest.mark.parametrize("second", ["The sea is blue.", "The sky was", "The sky ié", "The s"])
def test_another_answer_is_noticed_before_the_client_gets_any_of_it(second: str) -> None:
    transcript = Transcript(SSE)
    taken(transcript, [chunk("The sky"), chunk(" is")])
    transcript.begin_replay()
    got: list[bytes] = []
    if second == "The s":  # it may still become the same answer
        got = taken(transcript, [chunk(second)])
        assert transcript.is_catching_up
    else:
        with pytest.raises(NotTheSame):
            got = taken(transcript, [chunk(second)])
    assert got == []


def test_another_role_or_tool_is_another_answer() -> None:
    transcript = Transcript(SSE)
    taken(transcript, [chunk("a", tool="x"), chunk("b")])
    transcript.begin_replay()
    with pytest.raises(NotTheSame):
        taken(transcript, [chunk("a", tool="y"), chunk("b")])


def test_a_text_that_is_cut_keeps_no_logprobs_of_what_the_client_has() -> None:
    scores = {"content": [{"token": "a"}, {"token": "b"}]}
    transcript = Transcript(SSE)
    taken(transcript, [chunk("a", logprobs=scores)])
    transcript.begin_replay()
    with pytest.raises(NotTheSame, match="logprobs"):
        taken(transcript, [chunk("ab", logprobs=scores)])


def test_signs_of_life_are_no_part_of_an_answer() -> None:
    transcript = Transcript(SSE)
    got = taken(transcript, [b": keep-alive\n\n", chunk("a"), b": keep-alive\n\n"])
    assert len(got) == 3
    transcript.begin_replay()
    assert taken(transcript, [b": keep-alive\n\n"]) == []
    assert said(taken(transcript, [chunk("a"), chunk("b")])) == "b"


def test_a_stream_is_cut_into_events_wherever_its_parts_end() -> None:
    stream = chunk("a") + b": keep-alive\n\n" + chunk("b\n\nc")
    for size in (1, 2, 7, len(stream)):
        splitter = Splitter(SSE, lambda num_bytes: None)
        raws = [raw for at in range(0, len(stream), size) for raw in splitter.feed(stream[at : at + size])]
        splitter.end()
        assert b"".join(raws) == stream
        assert [parse_event(raw).data is None for raw in raws] == [False, True, False]


def test_an_event_that_never_ends_is_refused_and_its_memory_counted() -> None:
    held: list[int] = []
    splitter = Splitter(SSE, held.append)
    for _ in range(128):
        assert list(splitter.feed(b"x" * 65536)) == []
    with pytest.raises(BadStream, match="larger than"):
        list(splitter.feed(b"x"))
    assert sum(held) >= 8 << 20


@pytest.mark.parametrize(
    "raw",
    [b"data: {\n\n", b"data: [1]\n\n", b"garbage\n\n", b'data: {"a":1,"a":2}\n\n', b"data: \xff\n\n",
     b"data: " + b"[" * 10_000 + b"\n\n", b"data: NaN\n\n"],
)  # fmt: skip
def test_what_is_no_event_is_refused(raw: bytes) -> None:
    with pytest.raises(BadStream):
        parse_event(raw)


def test_a_stream_that_ends_inside_an_event_is_refused() -> None:
    splitter = Splitter(SSE, lambda num_bytes: None)
    list(splitter.feed(b"data: {}"))
    with pytest.raises(BadStream, match="inside an event"):
        splitter.end()


@pytest.mark.parametrize(
    ("data", "failed"),
    [({"error": "out of memory"}, True), ({"type": "error", "error": {}}, True), ({"type": "response.failed"}, True),
     ({"error": None}, False), ({"choices": []}, False), ("[DONE]", False)],
)  # fmt: skip
def test_a_failure_is_known_in_every_dialect(data: Any, failed: bool) -> None:
    assert is_failure(Event(None, data)) is failed
