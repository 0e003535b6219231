"""`argosy chat` when the context is full, and answers that go on after a cut."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy import Engine
from argosy.cli.commands import chat_room
from argosy.cli.commands.conversation import Conversation
from argosy.cli.main import main
from argosy.cli.shared.chat_models import LocalModel
from argosy.config import SamplingParams
from argosy.errors import PromptTooLong, UsageError
from tests.cli.fake_engine import FakeEngine
from tests.cli.tiny_chat_model import write_chat_model

Captured = pytest.CaptureFixture[str]
Chat = Callable[..., tuple[str, str]]

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}


def said(role: str, content: object = "text", **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture
def chat(chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Chat:
    """Chats with a real model whose context has 256 tokens; returns stdout and stderr."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        command = ["chat", str(chat_model), "-t", "0", "--threads", "1", "--no-record"]
        assert main([*command, *options]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


# Which turns go


def test_a_turn_begins_with_the_users_message_and_the_system_message_stays() -> None:
    system, tool = said("system"), said("tool")
    messages = [system, USER, ANSWER, tool, ANSWER, USER, ANSWER]
    assert chat_room.split_turns(messages) == ([system], [[USER, ANSWER, tool, ANSWER], [USER, ANSWER]])
    assert chat_room.without_oldest(messages, 1) == [system, USER, ANSWER]
    assert chat_room.split_turns([ANSWER, USER]) == ([], [[ANSWER], [USER]])


def test_as_few_turns_go_as_make_room_and_the_last_one_never() -> None:
    messages = [said("system"), *[USER, ANSWER] * 50]
    counted: list[int] = []

    def count(left: Any) -> int:
        counted.append(len(left))
        return len(left)

    assert chat_room.num_to_drop(messages, 101, count) == 0
    counted.clear()
    assert chat_room.num_to_drop(messages, 41, count) == 30
    assert len(counted) <= 7  # each is a rendering of the conversation
    assert chat_room.num_to_drop(messages, 0, count) == 49
    assert chat_room.num_to_drop([], 0, count) == 0


@pytest.mark.parametrize(
    ("text", "wanted"), [("", 500), ("120", 120), ("25%", 250), ("0", 0), ("1000", 1000), ("100%", 1000)]
)
def test_trim_takes_tokens_or_a_share_of_the_context(text: str, wanted: int) -> None:
    assert chat_room.wanted_tokens(text, 1000) == wanted


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "%", "1001", "101%", "9" * 5000, "10 20"])
def test_trim_refuses_what_is_no_share_of_the_context(text: str) -> None:
    with pytest.raises(UsageError, match="/trim"):
        chat_room.wanted_tokens(text, 1000)


# Answers that go on


def test_an_answer_cut_by_n_goes_on_token_for_token(chat: Chat) -> None:
    sampled = ("-t", "0.9", "--seed", "4")
    for options in ((), sampled):
        whole, _ = chat("Hi", options=("-n", "24", "--ignore-eos", *options))
        cut, err = chat("Hi", "/continue", "/continue", options=("-n", "8", "--ignore-eos", *options))
        # A character that the cut divides shows twice as damaged.
        assert re.sub("[\n\ufffd]", "", cut) == re.sub("[\n\ufffd]", "", whole)
        assert "(cut off after 8 tokens, the limit of -n: /continue goes on)" in err
        assert "(cut off after 24 tokens" in err


def test_an_answer_that_went_on_is_one_message(chat: Chat, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    chat("Hi", f"/save {whole}", options=("-n", "24", "--ignore-eos"))
    chat("Hi", "/continue", f"/save {cut}", options=("-n", "12", "--ignore-eos"))
    assert json.loads(cut.read_text()) == json.loads(whole.read_text())


def test_a_saved_answer_goes_on_from_its_text(chat: Chat, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    saved.write_text(json.dumps([USER, said("assistant", "Yes")]))
    options = ("-n", "4", "--ignore-eos")
    out, _ = chat(f"/load {saved}", "/continue", "/continue", f"/save {saved}", options=options)
    _, answer = json.loads(saved.read_text())
    assert answer["content"].startswith("Yes")
    assert answer["content"].replace("\n", "") == "Yes" + out.replace("\n", "")


def test_an_answer_stopped_in_its_thoughts_goes_on_in_them(
    engine: type[FakeEngine], capsys: Captured
) -> None:
    engine.family = "harmony"
    engine.answer = ("<|channel|>", "analysis", "<|message|>", "User says", " hi", "<|end|>", "<|start|>", "assistant",
                     "<|channel|>", "final", "<|message|>", "Hello", "!", "<|return|>")  # fmt: skip
    at = iter([4])  # ^C before the fifth token, once

    def interrupt(step: int) -> None:
        if step == 4 and next(at, None) is not None:
            signal.raise_signal(signal.SIGINT)

    engine.before_token = staticmethod(interrupt)
    talk = Conversation(LocalModel(engine("model")), SamplingParams(), shows_thoughts=True)  # type: ignore[arg-type]
    lines = iter(["Hi", "/continue"])
    talk.talk(lambda: next(lines, "/quit"))
    assert talk.messages == [USER, said("assistant", "Hello!", reasoning_content="User says hi")]
    assert capsys.readouterr().out == "\nHello!\n"


# A full context

LONG = "word " * 50  # some 130 tokens: two of these turns do not fit


def test_a_message_that_does_not_fit_waits_for_trim_and_nothing_is_lost(chat: Chat, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    out, err = chat("Hi", LONG, f"/save {saved}", LONG, "/trim", options=("-n", "4", "--ignore-eos"))
    assert len(json.loads(saved.read_text())) == 4
    assert "nothing is lost: /trim drops the oldest turns and answers; /save FILE keeps all" in err
    assert "/reset starts over" in err
    assert re.search(r"dropped 2 turns \(\d+ tokens\) to make room: 1\d\d of 256 tokens are used", err)
    assert out.count("\n") >= 3  # the message that waited was answered


def test_retry_sends_a_message_that_was_refused(chat: Chat) -> None:
    _, err = chat("Hi", LONG, LONG, "/retry", options=("-n", "4"))
    assert err.count("the context holds 256") == 2


def test_a_message_too_long_for_any_context_is_said_to_be(chat: Chat) -> None:
    _, err = chat(LONG * 3, "Hi", LONG * 3, options=("-n", "4", "--context-policy", "trim"))
    assert err.count("error: the prompt has") == 2
    assert "hint: shorten the message" in err
    assert "dropped" not in err  # the turn before could not make room


@pytest.fixture(scope="module")
def policies(chat_model: Path) -> Iterator[Engine]:
    with Engine.open(chat_model, memory="2GiB", threads=1) as engine:
        yield engine


def talked(engine: Engine, policy: chat_room.ContextPolicy, *lines: str, **params: Any) -> Conversation:
    talk = Conversation(LocalModel(engine), SamplingParams(**params), "Be kind.", policy=policy)
    waiting = iter(lines)
    talk.talk(lambda: next(waiting, "/quit"))
    return talk


def test_the_end_of_the_context_is_not_the_limit_of_n(policies: Engine, capsys: Captured) -> None:
    for earlier, way in (([], "/save the conversation"), ([USER, ANSWER], "/trim drops the oldest turns")):
        talk = Conversation(LocalModel(policies), SamplingParams(max_tokens=None, ignore_eos=True))
        talk.messages = list(earlier)
        talk._turn("word " * 20)
        with pytest.raises(PromptTooLong) as caught:
            talk._continue("")
        assert (caught.value.hint or "").startswith(way)
        cut = rf"\(cut off after \d+ tokens, the context of 256 tokens is full: {way}"
        assert re.search(cut, capsys.readouterr().err)


def test_after_trim_an_answer_goes_on_that_the_context_had_cut(policies: Engine, capsys: Captured) -> None:
    talk = Conversation(LocalModel(policies), SamplingParams(max_tokens=120, ignore_eos=True))
    talk.messages = [USER, ANSWER] * 4
    talk._turn("word " * 20)
    before = talk.messages[-1]["content"].rstrip("\ufffd")
    talk._trim("")
    talk._continue("")
    assert talk.messages[-1]["content"].startswith(before)
    assert len(talk.messages) == 2
    err = capsys.readouterr().err
    assert "tokens is full: /trim drops the oldest turns, and then /continue goes on" in err
    assert "dropped 4 turns (" in err


def test_the_policy_trim_goes_on_and_says_what_it_dropped(policies: Engine, capsys: Captured) -> None:
    talk = talked(policies, "trim", "Hi", LONG, LONG, max_tokens=4, ignore_eos=True)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert talk.messages[1]["content"] == LONG.strip()
    err = capsys.readouterr().err
    assert re.search(r"dropped 2 turns \(\d+ tokens\) to make room", err)
    assert "error" not in err


def test_the_policy_trim_makes_room_in_the_middle_of_an_answer(policies: Engine, capsys: Captured) -> None:
    talk = talked(policies, "trim", "Hi", "And?", max_tokens=120, ignore_eos=True)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    err = capsys.readouterr().err
    assert re.search(r"dropped 1 turn \(\d+ tokens\) to make room", err)
    assert "(cut off after 120 tokens, the limit of -n" in err  # all of them, not those that fitted first


def test_the_policy_summarise_keeps_a_summary_as_a_turn_of_its_own(tmp_path: Path, capsys: Captured) -> None:
    model = write_chat_model(tmp_path / "model", context_tokens=1024)
    with Engine.open(model, memory="2GiB", threads=1) as engine:
        talk = talked(engine, "summarise", *[LONG] * 6, max_tokens=4, ignore_eos=True)
        _, question, summary, *_ = talk.messages
        assert question["content"].startswith("Summarise our conversation so far in at most 76 words")
        assert summary["role"] == "assistant"
        err = capsys.readouterr().err
        assert re.search(r"summarising (\d) turns \((\d+) tokens\) to make room; \^C stops", err)
        assert re.search(
            r"summarised (\d) turns \((\d+) tokens\) to make room: \d+ of 1,024 tokens are used", err
        )
        assert summary["content"][:20] in err


def test_a_summary_that_fails_leaves_plain_dropping_and_says_so(policies: Engine, capsys: Captured) -> None:
    talk = talked(policies, "summarise", "Hi", LONG, LONG, max_tokens=4, ignore_eos=True)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    err = capsys.readouterr().err
    assert "note: " in err
    assert re.search(r"dropped 2 turns", err)


# Models that cannot take what came before


def test_notes_replace_what_a_model_does_not_take_and_only_that() -> None:
    from argosy.media.parts import Content

    picture = Content(kind="picture", data=b"", digest=b"")
    asked = said("user", [picture, {"type": "text", "text": "What?"}])
    call = said("assistant", None, tool_calls=[{"function": {"name": "look", "arguments": '{"x": 1}'}}])
    messages = [asked, call, said("tool", "a cat", tool_call_id="1"), ANSWER]
    assert chat_room.with_notes(messages, ("picture",), takes_calls=True) == (messages, [])
    noted, replaced = chat_room.with_notes(messages, (), takes_calls=False)
    assert noted == [
        said("user", [{"type": "text", "text": "[picture omitted: this model cannot take it]"},
                      {"type": "text", "text": "What?"}]),
        said("assistant", '[called look: {"x": 1}]'),
        said("user", [{"type": "text", "text": "[result of a tool]"}, {"type": "text", "text": "a cat"}]),
        ANSWER,
    ]  # fmt: skip
    assert replaced == ["picture", "tool call"]
