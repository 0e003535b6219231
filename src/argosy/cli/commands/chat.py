"""`argosy chat`: a conversation in the terminal.

    lines, or a pipe  ->  Conversation  ->  answers on stdout, everything else on stderr

^C stops an answer; ^C again, or twice at the prompt, quits. The conversation exists only in this process unless
/save writes it, and typed lines are kept only with `--history`. When the context is full, only `/trim` or the
`--context-policy` drops turns, and a line says which.

Elsewhere: `conversation.py` runs the turns; `cli/shared/chat_models.py` opens models, here or on the user's server;
`chat_room.py` chooses what to drop; `chat_files.py` reads and writes files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from argosy.cli.commands import chat_files, completion
from argosy.cli.commands.chat_room import ContextPolicy
from argosy.cli.commands.conversation import Conversation, say
from argosy.cli.shared.chat_models import Models
from argosy.cli.shared.declared import options
from argosy.cli.shared.help_all import Command
from argosy.cli.shared.options import (
    AskingOptions,
    asked_sampling,
    asked_thinking,
    asking_options,
    sampling_options,
)
from argosy.cli.shared.settings import Settings, read_settings
from argosy.cli.shared.texts import MOST_BYTES, text_or_file
from argosy.config import DEMO
from argosy.config.option import Option
from argosy.errors import UsageError

_DEFAULT_HISTORY = ""  # `--history` without a file


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(AskingOptions):
    """Options only for `chat`."""

    system: Annotated[
        str | None, Option("--system TEXT", "System message of the conversation; @FILE reads it.")
    ] = None
    context_policy: Annotated[
        ContextPolicy,
        Option(
            "--context-policy",
            "Full context: stop and ask (default), drop the oldest turns, or let the model summarise them.",
        ),
    ] = "stop"
    quiet: Annotated[bool, Option("-q --quiet", "Print no facts about the model and its speed.")] = False


@click.command("chat", cls=Command)
@click.argument("model", default=DEMO, shell_complete=completion.models)
@options(ChatOptions, "system", into="given")
@click.option(
    "--history",
    is_flag=False,
    flag_value=_DEFAULT_HISTORY,
    metavar="[FILE]",
    shell_complete=completion.files,
    help="Keep the lines you type, for later chats.",
)
@options(ChatOptions, "context_policy", "quiet", into="given")
@asking_options(ChatOptions)
@sampling_options
def chat(
    model: str, history: str | None, given: ChatOptions, thinking: dict[str, Any], sampling: dict[str, Any],
    flags: Settings,
) -> None:  # fmt: skip
    """Chat with MODEL, a name or a path; the default is the demo model.

    \b
    Examples:
      argosy chat
      argosy chat ./Qwen3-30B-A3B --memory 75% --temperature 0.7 --top-p 0.9
    """
    asked, params = asked_thinking(**thinking), asked_sampling(sampling)
    settings = read_settings(**flags)
    system = None if given.system is None else text_or_file(given.system)
    read = _reader(_open_history(history))
    with (
        _keys_held(),
        Models.opening(settings, given.url, no_server=given.no_server, is_quiet=given.quiet) as models,
    ):
        Conversation(
            models.open(model),
            params,
            system,
            policy=given.context_policy,
            is_quiet=given.quiet,
            thinking=asked,
            shows_thoughts=sys.stderr.isatty() if given.thoughts is None else given.thoughts,
            models=models,
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


@contextmanager
def _keys_held() -> Iterator[None]:
    """Hold keys typed while a model loads or answers for the next prompt, without echoing them or ^C."""
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    silent = list(before)
    silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH  # keep ^C from discarding them
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _reader(history: chat_files.LineHistory | None) -> Callable[[], str]:
    """A line editor on a terminal, plain lines otherwise. A backslash at the end of a line continues it."""
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
                say(f"note: {error.message}; lines are no longer kept")
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
