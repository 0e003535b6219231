"""The entry point: find the command, run it, and turn every outcome into a sentence and an exit code.

0 ok   1 unexpected   2 usage   3 does not fit   4 corrupt or unreadable   5 disk full   130 interrupted
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from inspect import getdoc
from typing import TYPE_CHECKING

import click

from argosy.errors import (
    ArgosyError,
    DiskFull,
    UsageError,
    as_exception,
    did_you_mean,
    is_disk_full,
    refused_by_system,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

INTERRUPTED = 130
_LONGEST_UNEXPECTED = 300
_SHOW = "hint: ARGOSY_TRACEBACK=1 shows the traceback"
# Library threads would only compete with the model's. Where the system refuses a thread, OpenBLAS ends the process
# while numpy is imported, as ^C would.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# Subject -> name -> (module, attribute, one line of help). A command is imported when it is called.
_SUBJECTS = {
    "First steps": {
        "plan": (
            "argosy.cli.commands.plan",
            "plan",
            "Estimate whether a model fits, its speed and its cost.",
        ),
        "pull": ("argosy.cli.commands.pull", "pull", "Download a model, after saying whether it fits."),
        "run": ("argosy.cli.commands.run", "run", "Answer one prompt."),
        "chat": ("argosy.cli.commands.chat", "chat", "Chat with a model in the terminal."),
        "serve": ("argosy.cli.commands.serve", "serve", "Serve models to other programs over HTTP."),
    },
    "Models": {
        "search": (
            "argosy.cli.commands.search",
            "search",
            "Search the hub for models by words of their names.",
        ),
        "list": ("argosy.cli.commands.library", "list_models", "List local models."),
        "show": (
            "argosy.cli.commands.show",
            "show",
            "Describe a model and whether it fits, without loading it.",
        ),
        "alias": ("argosy.cli.commands.library", "alias", "Give a model a short name."),
        "preset": (
            "argosy.cli.commands.preset",
            "preset",
            "Name a system message, sampling and limits for a model.",
        ),
        "rm": ("argosy.cli.commands.library", "rm", "Remove a model."),
        "pack": (
            "argosy.cli.commands.pack",
            "pack",
            "Convert a model so that each expert is one aligned read.",
        ),
        "card": ("argosy.cli.commands.card", "card", "Write a model card: licence, hashes, drift, limits."),
        "upcycle": (
            "argosy.cli.commands.upcycle",
            "upcycle",
            "Make a mixture of experts from a dense model.",
        ),
        "adapt": ("argosy.cli.commands.adapt", "adapt", "Train a LoRA adapter on a CPU (an experiment)."),
    },
    "A running server": {
        "up": ("argosy.cli.commands.background", "up", "Start a server in the background."),
        "ps": ("argosy.cli.commands.background", "ps", "Show the server's models, memory and requests."),
        "logs": ("argosy.cli.commands.background", "logs", "Show the log of the server in the background."),
        "stop": ("argosy.cli.commands.background", "stop", "Stop that server, or unload a model from it."),
        "top": ("argosy.cli.commands.top", "top", "Watch a server: memory, speed, experts, queue."),
        "connect": (
            "argosy.cli.commands.connect",
            "connect",
            "Print the settings with which an editor or agent uses a server.",
        ),
        "memory": ("argosy.cli.commands.memory", "memory", "Change the memory budget."),
        "keys": ("argosy.cli.commands.keys", "keys", "Make, list and revoke API keys."),
        "audit": ("argosy.cli.commands.audit", "audit", "Verify, show and export the audit log."),
        "data": (
            "argosy.cli.commands.data",
            "data",
            "List what is stored about users; erase what belongs to a key.",
        ),
        "watermark": (
            "argosy.cli.commands.watermark",
            "watermark",
            "Make a watermark key, and detect its watermark in a text.",
        ),
    },
    "Several machines": {
        "worker": ("argosy.cli.commands.worker", "worker", "Run experts for engines on other machines."),
        "cluster": ("argosy.cli.commands.cluster", "cluster", "Show, add or drain the workers of a server."),
        "route": ("argosy.cli.commands.route", "route", "Distribute requests over several servers."),
    },
    "Studies": {
        "routes": (
            "argosy.cli.commands.routes",
            "routes",
            "Show which experts a model uses for given texts.",
        ),
        "eval": (
            "argosy.cli.commands.eval",
            "eval_group",
            "Measure how much a converted model differs from the original.",
        ),
        "bench": (
            "argosy.cli.commands.bench",
            "bench",
            "Measure a model's speed on this machine, for a bug report.",
        ),
    },
    "Everything else": {
        "transcribe": ("argosy.cli.commands.transcribe", "transcribe", "Transcribe audio files."),
        "doctor": (
            "argosy.cli.commands.doctor",
            "doctor",
            "Check this machine: cores, memory, drive, and advice.",
        ),
        "completion": (
            "argosy.cli.commands.completion",
            "completion",
            "Print a script that completes commands in a shell.",
        ),
        "help": ("argosy.cli.shared.help_all", "show_help", "Show the help of a command."),
    },
}
_COMMANDS = {name: row for rows in _SUBJECTS.values() for name, row in rows.items()}


class _Commands(click.Group):
    """Commands by name, each imported when called. Commands of rooms that are not installed are not listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _, _) in _COMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=line)
            for name, (_, _, line) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def get_help(self, ctx: click.Context) -> str:
        from argosy.cli.shared.settings import VARIABLES

        self.help = f"{getdoc(self.callback)}\n\nEnvironment: {', '.join(VARIABLES)}, NO_COLOR."
        return super().get_help(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        installed = self.list_commands(ctx)
        width = max(map(len, installed))  # the same column for every subject
        for subject, rows in _SUBJECTS.items():
            if here := [(name.ljust(width), rows[name][2]) for name in rows if name in installed]:
                with formatter.section(subject):
                    formatter.write_dl(here)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            said = did_you_mean(args[0], _COMMANDS, most=2)
            raise click.UsageError(f"No such command '{args[0]}'" + (f"; {said}" if said else ""), ctx)
        return super().resolve_command(ctx, args)


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from argosy import __version__

        print(f"argosy {__version__}")
        ctx.exit()


@click.group(
    cls=_Commands, context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]}
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version.",
)
def cli() -> None:
    """Run mixture-of-experts models bigger than your memory.

    \b
    Examples:
      argosy run "Why is the sky blue?"
      argosy plan Qwen/Qwen3-30B-A3B --memory 16GiB
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Errors are printed, never raised."""
    for name, value in _ONE_THREAD.items():
        os.environ.setdefault(name, value)
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # print '?' for characters that the terminal cannot show
        if asked := os.environ.get("_ARGOSY_COMPLETE"):
            from argosy.cli.commands import completion

            return completion.answer(cli, asked)
        with cli.make_context("argosy", list(sys.argv[1:] if args is None else args)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:  # --help and --version end this way
        return done.exit_code
    except BrokenPipeError:
        _drop_output()  # the reader is gone
        return 1
    except (KeyboardInterrupt, click.Abort) as stop:
        # A command that says where it stopped has ended its line; otherwise ^C is on the line.
        print(str(stop) or "\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as help:
        help.show()
        return help.exit_code
    except click.ClickException as error:
        _print_click_error(error)
        return error.exit_code
    except SystemExit:
        raise
    except BaseException as error:  # a sentence rather than a traceback, even when a library panics
        if _wants_traceback():
            raise
        return _tell(refused_by_system(error) or as_exception(error))


def _tell(error: Exception) -> int:
    """Print an error as a sentence and return the exit code."""
    if isinstance(error, ArgosyError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("argosy."):
        print(
            f"error: this installation is without `{error.name}`\nhint: install the whole of argosy",
            file=sys.stderr,
        )
        return UsageError.exit_code
    if isinstance(error, OSError) and is_disk_full(error):
        _drop_output()  # stdout itself may be the file that cannot be written
        print(
            f"error: {error.filename or 'the output'} cannot be written: {error.strerror}\n"
            "hint: free some space, and run the same command again",
            file=sys.stderr,
        )
        return DiskFull.exit_code
    if isinstance(error, OSError) and error.strerror:  # a failing drive, for example
        print(f"error: {error.filename or 'the system'}: {error.strerror}\n{_SHOW}", file=sys.stderr)
        return UsageError.exit_code
    line = " ".join(str(error).split())[:_LONGEST_UNEXPECTED]  # the last of several lines may name the cause
    print(f"error: unexpected {type(error).__name__}: {line}\n{_SHOW}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Discard buffered output, including what the interpreter would flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wants_traceback() -> bool:
    from argosy.cli.shared.settings import wants_traceback

    return wants_traceback()


def _print_click_error(error: click.ClickException) -> None:
    message = error.format_message()
    print(f"error: {message[:1].lower()}{message[1:]}", file=sys.stderr)
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        what = "commands" if isinstance(context.command, click.Group) else "options"
        hint = f"`{context.command_path} --help` lists the {what}"
        if isinstance(error, click.NoSuchOption) and any(
            one.name == "prompt" for one in context.command.params
        ):
            hint += "; a prompt with such a word needs quotes"
        print(f"hint: {hint}", file=sys.stderr)
