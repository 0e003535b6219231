"""`argosy chat`: a conversation in the terminal.

^C stops an answer; ^C again, or twice at the prompt, quits. The conversation exists only in this process, and nothing
of it is written to a file.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.options import (
    engine_options,
    open_engine,
    sampling_options,
    split_options,
    thoughts_option,
)
from argosy.cli.output import AnswerWriter, ledger_lines, write_text
from argosy.config import DEMO
from argosy.errors import PromptTooLong, UsageError

if TYPE_CHECKING:
    from argosy.config import SamplingParams
    from argosy.engine.engine import Engine
    from argosy.engine.sequence import Result
    from argosy.media.parts import Content
    from argosy.prompt.formats import Answer

HELP = """/help          list the commands
/image FILE    show a picture with the next message
/audio FILE    let the model hear a sound with the next message
/video FILE    show a video with the next message
/reset         forget the conversation
/ledger        show the use of time and memory
/quit          quit; ^D does the same
A line with nothing but the path of a picture, sound or video attaches it, too.
Alt-Enter starts a new line. ^C stops an answer; pressed twice, it quits."""


@click.command("chat")
@click.argument("model", default=DEMO)
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@thoughts_option
@engine_options
@sampling_options
def chat(model: str, system: str | None, thoughts: bool | None, **options: Any) -> None:
    """Chat with MODEL, a directory or a GGUF file; the default is the demo model.

    \b
    Examples:
      argosy chat
      argosy chat ./Qwen3-30B-A3B --memory 75% --temperature 0.7 --top-p 0.9
    """
    settings, params = split_options(options)
    if thoughts is None:
        thoughts = sys.stderr.isatty()
    with open_engine(model, settings) as engine:
        Conversation(engine, params, system, shows_thoughts=thoughts).talk(_reader())


class Conversation:
    """The turns of one chat; `talk` reads until the end of its input."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None = None,
        *,
        shows_thoughts: bool = False,
    ) -> None:
        self._engine = engine
        self._params = params
        self._shows_thoughts = shows_thoughts
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._start)
        self._attached: list[Content] = []  # media for the next message
        self._last: Result | None = None

    def talk(self, read: Callable[[], str]) -> None:
        """Answer each message from `read`, until it raises EOFError or returns /quit.

        Raises:
            KeyboardInterrupt: ^C twice, at the prompt or while an answer was being stopped.
        """
        print("/help lists the commands, ^D quits", file=sys.stderr)
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
                print("press ^C again to quit", file=sys.stderr)
                continue
            is_leaving = False
            if said == "/quit":
                return
            if (dropped := _dropped(said)) is not None:
                self._attach(*dropped)
            elif said.startswith("/"):
                self._command(said)
            elif said:
                self._turn(said)

    def _command(self, said: str) -> None:
        if said == "/help":
            print(HELP, file=sys.stderr)
        elif said.startswith(("/image ", "/audio ", "/video ")):
            command, path = said.split(maxsplit=1)
            self._attach(command[1:], path)
        elif said == "/reset":
            self.messages = list(self._start)
            self._attached.clear()
            print("the conversation starts over", file=sys.stderr)
        elif said == "/ledger":
            if self._last is not None:
                print("last answer", file=sys.stderr)
                print(
                    *ledger_lines(self._last.ledger, None, self._last.finish_reason),
                    sep="\n",
                    file=sys.stderr,
                )
            print("since the start", file=sys.stderr)
            print(*ledger_lines(self._engine.ledger, self._engine.plan), sep="\n", file=sys.stderr)
        else:
            known = "/help /image /audio /video /reset /ledger /quit"
            print(f"unknown command '{said.split(maxsplit=1)[0]}'; known: {known}", file=sys.stderr)

    def _attach(self, kind: str, path: str) -> None:
        """Read a picture, sound or video now, so that the conversation does not depend on its file later."""
        from argosy.media.parts import PROMPT_LIMITS, Audio, Image, Video

        part = {"image": Image, "audio": Audio, "video": Video}[kind](path)
        if part.kind not in self._engine.media_kinds:
            fault = self._engine.media_faults.get(part.kind)
            reason = f"this model does not take a {part.kind}" if fault is None else fault.message
            print(f"error: {reason}", file=sys.stderr)
            return
        try:
            self._attached.append(part.read(PROMPT_LIMITS))
        except UsageError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return
        is_read = part.kind == "sound" and self._engine.hears == "transcript"
        how = "; the model does not hear it, but reads its transcript" if is_read else ""
        print(f"({part.kind} attached; it goes with your next message{how})", file=sys.stderr)

    def _turn(self, said: str) -> None:
        content: object = said
        if self._attached:
            content = [*self._attached, {"type": "text", "text": said}]
            self._attached.clear()
        self.messages.append({"role": "user", "content": content})
        try:
            result, answer = self._answer()
        except UsageError as error:
            self.messages.pop()
            print(f"error: {error.message}", file=sys.stderr)
            if isinstance(error, PromptTooLong):
                print(
                    "hint: /reset forgets the conversation; a larger --context makes room for a longer one",
                    file=sys.stderr,
                )
            return
        self._last = result
        # Thoughts are kept apart from the text: the chat template decides whether the model sees them again.
        thought = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        self.messages.append({"role": "assistant", "content": answer.text, **thought})
        if result.finish_reason == "cancelled":
            print("(stopped)", file=sys.stderr)
        elif result.finish_reason == "length":
            print(f"(cut off after {len(result.token_ids)} tokens)", file=sys.stderr)

    def _answer(self) -> tuple[Result, Answer]:
        """Show one answer; ^C ends it cleanly, between two steps."""
        engine = self._engine
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


def _reader() -> Callable[[], str]:
    """A line editor on a terminal, and plain lines otherwise."""
    if not sys.stdin.isatty():

        def read_line() -> str:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line

        return read_line

    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession("> ", history=InMemoryHistory(), key_bindings=keys)
    return session.prompt
