"""`argosy chat`: turns, commands, and ^C."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import argosy.open.engine
from argosy.cli.commands.conversation import Conversation
from argosy.cli.main import main
from argosy.cli.shared.chat_models import LocalModel
from argosy.config import SamplingParams
from argosy.errors import DoesNotFit, PromptTooLong, ReadFailed, UsageError
from argosy.prompt.thinking import Thinking
from tests.cli.fake_engine import FakeEngine
from tests.cli.terminal import on_terminal
from tests.helpers.forks import argosy_command

GOLDEN = Path(__file__).parent / "golden"

Engine = type[FakeEngine]
Captured = pytest.CaptureFixture[str]


def reading(*lines: object) -> Callable[[], str]:
    """Return the lines one by one, raise those that are exceptions, then end the input."""
    waiting: Iterator[object] = iter(lines)

    def read() -> str:
        line = next(waiting, EOFError)
        if isinstance(line, type) and issubclass(line, BaseException):
            raise line
        return str(line)

    return read


def conversation(engine: Engine, system: str | None = None) -> Conversation:
    return Conversation(LocalModel(engine("model"), "demo"), SamplingParams(), system)  # type: ignore[arg-type]


def test_each_turn_is_sent_with_all_turns_before_it(engine: Engine, capsys: Captured) -> None:
    conversation(engine, "Be brief.").talk(reading("Hi", "", "And now?"))
    system, hi = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Paris is it."}
    assert engine.asked == [[system, hi], [system, hi, answer, {"role": "user", "content": "And now?"}]]
    assert capsys.readouterr().out == "Paris is it.\nParis is it.\n"


HARMONY = ("<|channel|>", "analysis", "<|message|>", "User says", " hi", "<|end|>", "<|start|>", "assistant",
           "<|channel|>", "final", "<|message|>", "Hello", "!", "<|return|>")  # fmt: skip


def test_only_the_answer_is_shown_and_thoughts_are_sent_back_as_thoughts(
    engine: Engine, capsys: Captured
) -> None:
    engine.family, engine.answer = "harmony", HARMONY
    talk = conversation(engine)
    talk.talk(reading("Hi", "And now?"))
    assert capsys.readouterr().out == "Hello!\nHello!\n"
    said = {"role": "assistant", "content": "Hello!", "reasoning_content": "User says hi"}
    assert engine.asked[1] == [
        {"role": "user", "content": "Hi"},
        said,
        {"role": "user", "content": "And now?"},
    ]
    again = engine.prompts.build(engine.asked[1])
    assert "<|start|>assistant<|channel|>final<|message|>Hello!<|end|>" in again.text
    assert "analysis" not in again.text  # this template omits the thoughts of earlier turns


def test_an_answer_stopped_while_thinking_is_sent_back_without_text(engine: Engine, capsys: Captured) -> None:
    engine.family, engine.answer = "harmony", HARMONY
    engine.before_token = staticmethod(lambda at: signal.raise_signal(signal.SIGINT) if at == 3 else None)
    talk = conversation(engine)
    talk.talk(reading("Hi"))
    assert talk.messages[-1] == {"role": "assistant", "content": "", "reasoning_content": "User says"}


def test_reset_keeps_only_the_system_message(engine: Engine, capsys: Captured) -> None:
    talk = conversation(engine, "Be brief.")
    talk.talk(reading("Hi", "/reset"))
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_commands_answer_on_stderr(engine: Engine, capsys: Captured) -> None:
    conversation(engine).talk(reading("/help", "Hi", "/ledger", "/legder", "/quit now", "never read"))
    captured = capsys.readouterr()
    assert captured.out == "Paris is it.\n"
    assert "/reset         forget the conversation" in captured.err
    assert "hit rate 0.60" in captured.err
    assert (
        "unknown command '/legder'; known: /help /image /audio /video /system /think /retry /continue /trim /tokens"
        in captured.err
    )
    assert len(engine.asked) == 1


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(engine: Engine, capsys: Captured) -> None:
    engine.before_token = staticmethod(lambda at: signal.raise_signal(signal.SIGINT) if at == 1 else None)
    talk = conversation(engine)
    talk.talk(reading("Hi"))
    assert talk.messages[-1] == {"role": "assistant", "content": "Paris is"}
    captured = capsys.readouterr()
    assert captured.out == "Paris is\n"
    assert "(stopped; /continue goes on)\n" in captured.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_quits(engine: Engine, capsys: Captured) -> None:
    def twice(at: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    engine.before_token = staticmethod(twice)
    with pytest.raises(KeyboardInterrupt):
        conversation(engine).talk(reading("Hi"))


def test_two_interrupts_in_a_row_at_the_prompt_quit(engine: Engine, capsys: Captured) -> None:
    conversation(engine).talk(reading(KeyboardInterrupt, "Hi", KeyboardInterrupt, "Hi"))
    assert capsys.readouterr().err.count("press ^C again to quit") == 2
    with pytest.raises(KeyboardInterrupt):
        conversation(engine).talk(reading(KeyboardInterrupt, KeyboardInterrupt))


@pytest.mark.parametrize(
    ("error", "hint"),
    [(PromptTooLong("too long"), "hint: shorten the message"), (UsageError("no such role"), "")],
)
def test_a_refused_turn_is_forgotten(
    error: UsageError, hint: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def refuse(self: object, prompt: object, params: object, **_: Any) -> None:
        raise error

    talk = conversation(engine)
    monkeypatch.setattr(engine, "submit", refuse)
    talk.talk(reading("Hi"))
    assert talk.messages == []
    said = capsys.readouterr().err
    assert f"error: {error.message}" in said
    assert hint in said


def test_think_switches_thoughts_within_a_chat(engine: Engine, capsys: Captured) -> None:
    engine.family = "qwen3"
    lines = iter(["/think", "/think off", "Hi", "/think on", "Hi", "/think high", "/think maybe", "/quit"])
    talk = Conversation(LocalModel(engine("model")), SamplingParams(), thinking=Thinking(effort="low"))  # type: ignore[arg-type]
    talk.talk(lambda: next(lines))
    first, second = (one.text for one in engine.prompts.built)
    assert first.endswith("</think>\n\n")
    assert second.endswith("<|im_start|>assistant\n")
    err = capsys.readouterr().err
    assert "thinking low\n" in err
    assert "thinking off\n" in err
    assert err.count("this model knows no effort") == 2
    assert "thinking high" not in err
    assert "error: /think takes on, off, low, medium, high, found 'maybe'" in err


def test_an_answer_of_thoughts_alone_is_said_to_be_one(engine: Engine, capsys: Captured) -> None:
    engine.family, engine.answer, engine.ends = "qwen3", ("<think>", "Let me ", "see"), "length"
    lines = iter(["Hi", "/quit"])
    Conversation(LocalModel(engine("model")), SamplingParams()).talk(lambda: next(lines))  # type: ignore[arg-type]
    said = "(cut off after 3 tokens, all of them thoughts, the limit of -n: /continue goes on, /think off skips them)"
    assert said in capsys.readouterr().err


def test_a_real_model_talks_over_several_turns(
    chat_model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert main(["chat", str(chat_model), "--threads", "1", "-n", "8", "-t", "0"]) == 0
        return capsys.readouterr()

    alone, _ = said("Hi\n")
    out, err = said("Hi\nAnd now?\n" + "word " * 400 + "\n/reset\nHi\n")
    assert "and the context holds 256" in err
    assert out.startswith(alone)
    assert out.endswith(alone)  # after /reset the same question gets the same answer
    assert len(out) > 2 * len(alone)


def test_the_line_editor_reads_a_line_and_quits_on_interrupts(chat_model: Path) -> None:
    options = ["--threads", "1", "-n", "4", "-t", "0", "--ignore-eos"]
    with on_terminal([argosy_command, "chat", str(chat_model), *options]) as terminal:
        terminal.until(b">")
        terminal.send(b"Hi\r")
        terminal.until(b"(cut off after 4 tokens, the limit of -n: /continue goes on)")
        terminal.until(b">")
        terminal.send(b"\x03")
        terminal.until(b"press ^C again to quit")
        terminal.until(b">")
        terminal.send(b"\x03")
        terminal.until(b"interrupted")
        assert terminal.process.wait(timeout=30) == 130


def fake_chat(*arguments: str) -> int:
    """Chat with the fake engine on a terminal: print what it was asked, and a text with escape sequences."""

    class Engine(FakeEngine):
        opened: ClassVar[list[dict[str, object]]] = []
        asked: ClassVar[list[Any]] = []
        params: ClassVar[list[SamplingParams]] = []
        answer = ("a\x1b[2J", "\n```py\n", "x = 1\n", "```\n", "end")

    argosy.open.engine.Engine = Engine  # type: ignore[misc, assignment]
    code = main(["chat", "demo", *arguments])
    print([message["content"] for message in Engine.asked[-1]])
    return code


def test_a_message_has_several_lines_and_history_returns_in_the_next_chat(tmp_path: Path) -> None:
    history = tmp_path / "own" / "lines"
    chat = [fake_chat, "--history", str(history), "--no-record"]
    with on_terminal(chat, {"NO_COLOR": "1"}) as terminal:
        terminal.until(f"lines are kept in {history}, 0 of them".encode())
        terminal.until(b">")
        terminal.send(b"one\\\r")  # a backslash at the end
        terminal.send(b"two\x1b\r")  # Alt-Enter
        terminal.send(b"\x1b[200~three\nfour\x1b[201~\r")  # a paste
        terminal.until(b"end")
        terminal.until(b">")
        terminal.send(b"\x04")
        terminal.until(b"['one\\ntwo\\nthree\\nfour']")
        assert terminal.process.wait(timeout=30) == 0
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.read_text() == '"one\\ntwo\\nthree\\nfour"\n'
    with on_terminal(chat) as terminal:
        terminal.until(b"1 of them from before")
        terminal.until(b">")
        terminal.send(b"\x1b[A\r")  # the key that goes back
        shown = terminal.until(b"end")
        facts = terminal.until(b">")
        terminal.send(b"\x04")
        terminal.until(b"['one\\ntwo\\nthree\\nfour']")
    answer = shown[shown.rindex(b"a\xef\xbf\xbd[2J") :]  # no escape sequence of the model's
    assert b"\x1b[2m[12 of 256 tokens of context, 4.0 tok/s, first token after 0.5 s]\x1b[22m" in facts
    fences = b"\r\n\x1b[2m```py\r\n\x1b[22m\x1b[36mx = 1\r\n\x1b[39m\x1b[2m```\r\n\x1b[22m"
    assert answer.removeprefix(b"a\xef\xbf\xbd[2J") == fences


def waiting_chat(*arguments: str) -> int:
    """Show the beginning of an answer, then wait for ^C."""
    told, woken = os.pipe()
    os.set_blocking(woken, False)

    def wait(at: int) -> None:
        if at == 0:
            signal.set_wakeup_fd(woken)
        if at == 1:
            select.select([told], [], [])

    FakeEngine.before_token = staticmethod(wait)  # type: ignore[method-assign]
    return fake_chat(*arguments)


def test_keys_typed_during_an_answer_wait_for_the_prompt_and_neither_they_nor_an_interrupt_mark_it() -> None:
    with on_terminal([waiting_chat, "--no-record", "-q"], {"NO_COLOR": "1"}) as terminal:
        terminal.until(b">")
        terminal.send(b"Hi\r")
        terminal.until(b"[2J")  # the end of the first token
        terminal.send(b"/tokens\r\x03")
        terminal.until("stopping after this step …\r\n".encode())
        shown = terminal.until(b"(stopped; /continue goes on)")
        assert shown.replace(b"```py", b"").strip() == b""  # the next token may have come
        terminal.until(b"tokens   ")
        terminal.until(b">")
        terminal.send(b"\x04")
        terminal.until(b"['Hi']")
        assert terminal.process.wait(timeout=30) == 0


def test_history_needs_a_terminal_and_a_file_of_its_own(tmp_path: Path, capsys: Captured) -> None:
    assert main(["chat", "--history"]) == 2
    assert "stdin is not a terminal" in capsys.readouterr().err


# Commands


def test_a_session_of_commands_shows_what_the_golden_file_has(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "system.txt").write_text("Be kind.\n")
    lines = (
        "/tokens", "/system", "/system Be brief.", "Hi", "/tokens", "/save talk.json", "/retry", "/continue",
        "/trim 200", "/trim x", "/system @system.txt", "/system", "/reset", "/tokens", "/retry", "/continue",
        "/load talk.json", "/system", "And?", '/system ""', "/system", "/model", "/save", "/load", "/load nowhere.json",
        "/image", "/nothing",
    )  # fmt: skip

    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)

    def read() -> str:
        for line in waiting:
            shown.write(f"> {line}\n")
            return line
        raise EOFError

    waiting = iter(lines)
    conversation(engine).talk(read)
    golden = GOLDEN / "chat-session.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(shown.getvalue(), encoding="utf-8")
    assert shown.getvalue() == golden.read_text("utf-8")
    system, hi = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Paris is it."}
    assert engine.asked == [
        [system, hi],
        [system, hi],  # /retry
        [system, hi, answer, {"role": "user", "content": "And?"}],
    ]


def test_a_retry_that_fails_keeps_the_answer_it_would_have_replaced(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def refuse(self: object, prompt: object, params: object, **_: Any) -> None:
        raise ReadFailed("the drive is gone")

    talk = conversation(engine)
    talk.talk(reading("Hi"))
    before = list(talk.messages)
    monkeypatch.setattr(engine, "submit", refuse)
    talk.talk(reading("/retry"))
    assert talk.messages == before
    assert "error: the drive is gone" in capsys.readouterr().err


def test_retry_says_when_the_same_answer_will_come(engine: Engine, capsys: Captured) -> None:
    for params, is_said in (
        (SamplingParams(), True),
        (SamplingParams(temperature=0.7, seed=3), True),
        (SamplingParams(temperature=0.7), False),
    ):
        Conversation(LocalModel(engine("model")), params).talk(reading("Hi", "/retry"))  # type: ignore[arg-type]
        assert ("the same answer will come" in capsys.readouterr().err) == is_said
    assert engine.asked[0] == engine.asked[1]


def chat_lines(monkeypatch: pytest.MonkeyPatch, *arguments: str, lines: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *arguments, "--no-record"])


def test_another_model_opens_after_the_first_has_closed_and_the_conversation_goes_on(
    engine: Engine, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    events: list[str] = []
    exit_of = engine.__exit__
    monkeypatch.setattr(engine, "__exit__", lambda self, *why: (events.append("close"), exit_of(self, *why)))
    engine.before_open = staticmethod(lambda: events.append("open"))
    lines = f"Hi\n/model {chat_model}\nAnd?\n/model\n"
    assert chat_lines(monkeypatch, "demo", lines=lines) == 0
    assert events == ["open", "close", "open", "close"]
    assert [opened["model"] for opened in engine.opened] == ["demo", str(chat_model)]
    assert len(engine.asked[1]) == 3
    assert capsys.readouterr().err.count(f"model    {chat_model}\n") == 2


def test_a_model_that_is_nowhere_leaves_the_engine_open(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert chat_lines(monkeypatch, "demo", lines="/model /nowhere/model\nHi\n") == 0
    assert len(engine.opened) == 1
    captured = capsys.readouterr()
    assert "error: /nowhere/model does not exist" in captured.err
    assert captured.out == "Paris is it.\n"


@pytest.mark.parametrize("error", [DoesNotFit("too large"), KeyboardInterrupt()])
def test_a_model_that_does_not_open_brings_the_first_one_back(
    error: BaseException, engine: Engine, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def refuse_the_second() -> None:
        if len(engine.opened) == 1:
            engine.opened.append({"model": "refused"})
            raise error

    engine.before_open = staticmethod(refuse_the_second)
    lines = f"Hi\n/model {chat_model}\nAnd?\n/model\n"
    assert chat_lines(monkeypatch, "demo", lines=lines) == 0
    assert [opened["model"] for opened in engine.opened] == ["demo", "refused", "demo"]
    assert len(engine.asked[1]) == 3
    said = capsys.readouterr().err
    assert ("error: too large" in said) == isinstance(error, DoesNotFit)
    assert said.endswith("model    demo\n")


def test_the_chat_ends_if_no_model_opens_any_more(
    engine: Engine, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def refuse_others() -> None:
        if engine.opened:
            raise DoesNotFit("too large")

    engine.before_open = staticmethod(refuse_others)
    assert chat_lines(monkeypatch, "demo", lines=f"/model {chat_model}\nHi\n") == 3
    assert engine.asked == []


def test_a_backslash_continues_a_line_of_a_pipe(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert chat_lines(monkeypatch, "demo", "--system", "Be brief.", lines="one\\\ntwo\nthree\\") == 0
    assert [messages[-1]["content"] for messages in engine.asked] == ["one\ntwo", "three\\"]


def test_text_on_a_pipe_that_is_not_utf_8_ends_the_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n"), encoding="utf-8"))
    assert main(["chat", "demo", "--no-record"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
