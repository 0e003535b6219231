"""`argosy chat`: turns, commands, and ^C."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from argosy.cli.chat import Conversation
from argosy.cli.main import main
from argosy.config import SamplingParams
from argosy.errors import PromptTooLong, UsageError
from tests.cli.fake_engine import FakeEngine

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
    return Conversation(engine("model"), SamplingParams(), system)  # type: ignore[arg-type]


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
    again = talk._engine.prompts.build(engine.asked[1])
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
    conversation(engine).talk(reading("/help", "Hi", "/ledger", "/legder", "/quit", "never read"))
    captured = capsys.readouterr()
    assert captured.out == "Paris is it.\n"
    assert "/reset         forget the conversation" in captured.err
    assert "hit rate 0.60" in captured.err
    assert "unknown command '/legder'; known: /help /image /audio /video /reset /ledger /quit" in captured.err
    assert len(engine.asked) == 1


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(engine: Engine, capsys: Captured) -> None:
    engine.before_token = staticmethod(lambda at: signal.raise_signal(signal.SIGINT) if at == 1 else None)
    talk = conversation(engine)
    talk.talk(reading("Hi"))
    assert talk.messages[-1] == {"role": "assistant", "content": "Paris is"}
    captured = capsys.readouterr()
    assert captured.out == "Paris is\n"
    assert captured.err.endswith("(stopped)\n")
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
    ("error", "hint"), [(PromptTooLong("too long"), "hint: /reset forgets"), (UsageError("no such role"), "")]
)
def test_a_refused_turn_is_forgotten(
    error: UsageError, hint: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def refuse(self: object, prompt: object, params: object) -> None:
        raise error

    talk = conversation(engine)
    monkeypatch.setattr(engine, "submit", refuse)
    talk.talk(reading("Hi"))
    assert talk.messages == []
    said = capsys.readouterr().err
    assert f"error: {error.message}" in said
    assert hint in said


def test_a_real_model_talks_over_several_turns(
    chat_model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert main(["chat", str(chat_model), "--threads", "1", "-n", "8"]) == 0
        return capsys.readouterr()

    alone, _ = said("Hi\n")
    out, err = said("Hi\nAnd now?\n" + "word " * 400 + "\n/reset\nHi\n")
    assert "and the context holds 256" in err
    assert out.startswith(alone)
    assert out.endswith(alone)  # after /reset the same question gets the same answer
    assert len(out) > 2 * len(alone)


def test_the_line_editor_reads_a_line_and_quits_on_interrupts(chat_model: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "argosy", "chat", str(chat_model), "--threads", "1", "-n", "4"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([master], [], [], 1)[0]:
                part = os.read(master, 4096)
                shown += part
                if b"\x1b[6n" in part:
                    os.write(master, b"\x1b[1;1R")  # the terminal's answer: its cursor position
        shown = shown[shown.index(text) + len(text) :]

    until(b">")
    os.write(master, b"Hi\r")
    until(b"(cut off after 4 tokens)")
    until(b">")
    os.write(master, b"\x03")
    until(b"press ^C again to quit")
    until(b">")
    os.write(master, b"\x03")
    until(b"interrupted")
    assert process.wait(timeout=30) == 130
    os.close(master)
