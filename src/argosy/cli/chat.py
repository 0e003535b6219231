"""`argosy chat`: a conversation in the terminal.

    lines, or a pipe  ->  Conversation  ->  answers on stdout, everything else on stderr

^C stops an answer; ^C again, or twice at the prompt, quits. The conversation exists only in this process unless /save
writes it; nothing that is typed is kept without `--history`.

Elsewhere: `chat_files.py` has the files of both; `output.py` shows answers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from argosy.cli import chat_files, completion
from argosy.cli.help_all import Command
from argosy.cli.options import (
    engine_options,
    open_engine,
    sampling_options,
    split_options,
    thoughts_option,
    watermark_option,
)
from argosy.cli.output import AnswerWriter, ledger_lines, write_text
from argosy.cli.texts import MOST_BYTES, text_or_file
from argosy.config import DEMO
from argosy.errors import ArgosyError, PromptTooLong, UsageError

if TYPE_CHECKING:
    from argosy.cli.settings import Settings
    from argosy.config import SamplingParams
    from argosy.engine.engine import Engine
    from argosy.engine.sequence import Result
    from argosy.media.parts import Content
    from argosy.prompt.formats import Answer

HELP = """/help          list the commands
/image FILE    show a picture with the next message
/audio FILE    let the model hear a sound with the next message
/video FILE    show a video with the next message
/system TEXT   set the system message; @FILE reads it from a file, "" removes it, no TEXT shows it
/retry         answer the last message again
/tokens        show how many tokens the conversation has, and how many are left
/model NAME    go on with another model; no NAME shows the model
/save FILE     write the conversation as JSON
/load FILE     go on with a saved conversation
/reset         forget the conversation
/ledger        show the use of time and memory
/quit          quit; ^D does the same
A line with nothing but the path of a picture, sound or video attaches it, too.
Alt-Enter, or a backslash at the end of a line, starts a new line. ^C stops an answer; pressed twice, it quits."""

_DEFAULT_HISTORY = ""  # `--history` without a file


@click.command("chat", cls=Command)
@click.argument("model", default=DEMO, shell_complete=completion.models)
@click.option("--system", metavar="TEXT", help="System message of the conversation; @FILE reads it.")
@click.option(
    "--history",
    is_flag=False,
    flag_value=_DEFAULT_HISTORY,
    metavar="[FILE]",
    shell_complete=completion.files,
    help="Keep the lines you type, for later chats.",
)
@watermark_option
@thoughts_option
@engine_options
@sampling_options
def chat(model: str, system: str | None, history: str | None, thoughts: bool | None, **options: Any) -> None:
    """Chat with MODEL, a name or a path; the default is the demo model.

    \b
    Examples:
      argosy chat
      argosy chat ./Qwen3-30B-A3B --memory 75% --temperature 0.7 --top-p 0.9
    """
    settings, params = split_options(options)
    system = None if system is None else text_or_file(system)
    read = _reader(_open_history(history))
    if thoughts is None:
        thoughts = sys.stderr.isatty()
    with _Engines(settings) as engines:
        Conversation(
            engines.open(model),
            params,
            system,
            model=model,
            shows_thoughts=thoughts,
            switch=engines.switch,
        ).talk(read)


def _open_history(history: str | None) -> chat_files.LineHistory | None:
    if history is None:
        return None
    if not sys.stdin.isatty():
        raise UsageError("--history keeps what is typed, and stdin is not a terminal")
    path = chat_files.default_history() if history == _DEFAULT_HISTORY else Path(history)
    lines = chat_files.LineHistory(path)
    print(f"lines are kept in {lines.path}, {len(lines.lines)} of them from before", file=sys.stderr)
    return lines


class _Engines:
    """Opens one engine at a time, because the budget has room for one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened = ExitStack()
        self._engine: Engine | None = None
        self._model = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def open(self, model: str) -> Engine:
        self._engine = self._opened.enter_context(open_engine(model, self._settings))
        self._model = model
        return self._engine

    def switch(self, model: str) -> tuple[Engine, ArgosyError | None]:
        """Close the engine, and open another. Returns the engine to go on with, and why it is not the one asked for.

        Raises:
            ArgosyError: neither can be opened.
        """
        from argosy.engine.options import locate_model, open_files

        assert self._engine is not None
        try:
            open_files(locate_model(model))
        except ArgosyError as error:
            return self._engine, error
        before, settings = self._model, self._settings
        self._engine = None
        self._opened.close()
        self._settings = replace(settings, mmproj=None)  # it belongs to the first model
        try:
            return self.open(model), None
        except (ArgosyError, KeyboardInterrupt) as error:
            self._settings = settings
            why = error if isinstance(error, ArgosyError) else UsageError(f"{model} was not opened")
            return self.open(before), why


class Conversation:
    """The turns of one chat; `talk` reads until the end of its input.

    Args:
        model: its name.
        switch: opens another model; see `_Engines.switch`.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None = None,
        *,
        model: str = DEMO,
        shows_thoughts: bool = False,
        switch: Callable[[str], tuple[Engine, ArgosyError | None]] | None = None,
    ) -> None:
        self._engine: Engine | None = engine
        self._params = params
        self._model = model
        self._switch = switch
        self._shows_thoughts = shows_thoughts
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._start)
        self._attached: list[Content] = []  # media for the next message
        self._last: Result | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/image": lambda path: self._attach("image", path),
            "/audio": lambda path: self._attach("audio", path),
            "/video": lambda path: self._attach("video", path),
            "/system": self._set_system,
            "/retry": self._retry,
            "/tokens": self._count_tokens,
            "/model": self._change_model,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/ledger": self._show_ledger,
        }

    def talk(self, read: Callable[[], str]) -> None:
        """Answer each message from `read`, until it raises EOFError or returns /quit.

        Raises:
            KeyboardInterrupt: ^C twice, at the prompt or while an answer was being stopped.
        """
        _say("/help lists the commands, ^D quits")
        is_leaving = False
        while True:
            try:
                said = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if is_leaving:
                    raise
                is_leaving = True
                _say("press ^C again to quit")
                continue
            is_leaving = False
            if said == "/quit":
                return
            try:
                self._take(said)
            except ArgosyError as error:
                if self._engine is None:
                    raise
                _say(f"error: {error}")

    def _take(self, said: str) -> None:
        """Do what a line says, or answer it."""
        if (dropped := _dropped(said)) is not None:
            self._attach(*dropped)
        elif said.startswith("/"):
            name, *rest = said.split(maxsplit=1)
            command = self._commands.get(name)
            if command is None:
                known = " ".join([*self._commands, "/quit"])
                raise UsageError(f"unknown command '{name}'; known: {known}")
            command("".join(rest))
        elif said:
            self._turn(said)

    @property
    def _open_engine(self) -> Engine:
        assert self._engine is not None  # only None while another is opened
        return self._engine

    def _set_system(self, text: str) -> None:
        if not text:
            found = [message["content"] for message in self._start]
            _say(*found or ["there is no system message"])
            return
        text = "" if text == '""' else text_or_file(text)
        turns = self.messages[len(self._start) :]
        self._start = [{"role": "system", "content": text}] if text else []
        self.messages = [*self._start, *turns]

    def _reset(self, _: str) -> None:
        self.messages = list(self._start)
        self._attached.clear()
        _say("the conversation starts over")

    def _count_tokens(self, _: str) -> None:
        engine, used = self._open_engine, 0
        if self.messages:
            prompt = engine.prompts.build(self.messages, add_generation_prompt=False, is_counted=True)
            used = len(prompt.token_ids or ())
        context = engine.plan.context_tokens
        _say(f"tokens   {used} used, {max(0, context - used)} left of {context}")

    def _change_model(self, name: str) -> None:
        if name and self._switch is not None:
            self._engine = None  # if the switch fails, there is none
            self._engine, why = self._switch(name)
            if why is not None:
                raise why
            self._last = None
            self._model = name
        _say(f"model    {self._model}")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        chat_files.save(path, self.messages)
        _say(f"{len(self.messages)} messages saved in {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        self.messages = chat_files.load(path)
        self._start = [one for one in self.messages[:1] if one["role"] == "system"]
        self._attached.clear()
        _say(f"{len(self.messages)} messages loaded from {path}")

    def _show_ledger(self, _: str) -> None:
        engine = self._open_engine
        if self._last is not None:
            _say("last answer", *ledger_lines(self._last.ledger, None, self._last.finish_reason))
        _say("since the start", *ledger_lines(engine.ledger, engine.plan))

    def _attach(self, kind: str, name: str) -> None:
        """Read a picture, sound or video now, so that the conversation does not depend on its file later."""
        from argosy.media.parts import PROMPT_LIMITS, Audio, Image, Video

        engine = self._open_engine
        part = {"image": Image, "audio": Audio, "video": Video}[kind](_path(name, f"/{kind}"))
        if part.kind not in engine.media_kinds:
            fault = engine.media_faults.get(part.kind)
            raise UsageError(f"this model does not take a {part.kind}" if fault is None else fault.message)
        self._attached.append(part.read(PROMPT_LIMITS))
        is_read = part.kind == "sound" and engine.hears == "transcript"
        how = "; the model does not hear it, but reads its transcript" if is_read else ""
        _say(f"({part.kind} attached; it goes with your next message{how})")

    def _turn(self, said: str) -> None:
        content: object = said
        if self._attached:
            content = [*self._attached, {"type": "text", "text": said}]
        self._exchange({"role": "user", "content": content})
        self._attached.clear()

    def _retry(self, _: str) -> None:
        turns = self.messages[len(self._start) :]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise UsageError("there is no message to answer again")
        if self._params.temperature == 0 or self._params.seed is not None:
            _say("note: the same answer will come: `argosy chat -t 0.7` without --seed makes answers differ")
        before, self.messages = self.messages, [*self._start, *turns[:-1]]
        try:
            self._exchange(turns[-1])
        except BaseException:
            self.messages = before
            raise

    def _exchange(self, message: dict[str, Any]) -> None:
        """Send a message, and keep it with its answer. One that is refused is forgotten."""
        self.messages.append(message)
        try:
            result, answer = self._answer()
        except ArgosyError as error:
            self.messages.pop()
            if isinstance(error, PromptTooLong):
                error.hint = "/reset forgets the conversation; a larger --context makes room for a longer one"
            raise
        self._last = result
        # Thoughts are kept apart from the text: the chat template decides whether the model sees them again.
        thought = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        self.messages.append({"role": "assistant", "content": answer.text, **thought})
        if result.finish_reason == "cancelled":
            _say("(stopped)")
        elif result.finish_reason == "length":
            _say(f"(cut off after {len(result.token_ids)} tokens)")

    def _answer(self) -> tuple[Result, Answer]:
        """Show one answer; ^C ends it cleanly, between two steps."""
        engine = self._open_engine
        prompt = engine.prompts.build(self.messages)
        writer = AnswerWriter(engine.prompts.parser(prompt), shows_thoughts=self._shows_thoughts)
        sequence = engine.submit(prompt, self._params)
        try:
            with writer, _interrupts() as was_interrupted:
                while sequence.result is None and not was_interrupted():
                    engine.step()
                    while sequence.events:
                        writer.push(sequence.events.popleft())
        finally:
            engine.cancel(sequence)
        write_text("\n")
        assert sequence.result is not None  # finished, or cancelled just now
        return sequence.result.require(), writer.answer


def _say(*lines: str) -> None:
    write_text("".join(f"{line}\n" for line in lines), sys.stderr)


def _path(name: str, command: str) -> Path:
    """The file that a command names, perhaps in quotes."""
    if not name:
        raise UsageError(f"{command} needs the path of a file: {command} FILE")
    return Path(os.path.expanduser(name.strip("'\"")))


_KINDS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif"), "image"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg"), "audio"),
    **dict.fromkeys((".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi"), "video"),
}


def _dropped(said: str) -> tuple[str, str] | None:
    """The kind and path of a line that is nothing but the path of a media file, as a dropped file is pasted."""
    path = Path(said.strip("'\"").replace("\\ ", " "))
    kind = _KINDS.get(path.suffix.lower())
    try:
        return (kind, str(path)) if kind is not None and path.is_file() else None
    except (OSError, ValueError):
        return None


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Remember the first ^C instead of raising; the second ^C raises."""
    count = 0

    def remember(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _reader(history: chat_files.LineHistory | None) -> Callable[[], str]:
    """A line editor on a terminal, and plain lines otherwise. A backslash at the end of a line continues it."""
    if not sys.stdin.isatty():
        return _read_piped

    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    before = InMemoryHistory(history.lines if history is not None else ())
    session: PromptSession[str] = PromptSession("> ", history=before, key_bindings=keys)

    def read() -> str:
        nonlocal history
        line = session.prompt().encode(errors="surrogateescape").decode(errors="replace")
        if history is not None:
            try:
                history.add(line)
            except UsageError as error:
                _say(f"note: {error.message}; lines are no longer kept")
                history = None
        return line

    return read


def _read_piped() -> str:
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\\n"):
        try:
            line = sys.stdin.readline(MOST_BYTES + 1)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the text on stdin is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
        if not line:
            break
        lines.append(line)
        if sum(map(len, lines)) > MOST_BYTES:
            raise UsageError(f"a message on stdin has more than {MOST_BYTES:,} characters")
    if not lines:
        raise EOFError
    return "".join(line.removesuffix("\\\n") + "\n" * line.endswith("\\\n") for line in lines)
