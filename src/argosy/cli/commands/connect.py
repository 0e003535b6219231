"""`argosy connect`: the exact settings for an editor, an agent or a chat client to use a running server.

Settings go to stdout, ready for the file or the shell. Their destination and further notes go to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from argosy.cli.shared import own_server
from argosy.cli.shared.numbers import WholeNumber
from argosy.cli.shared.remote import server_options
from argosy.errors import ServerNotUsable, UsageError

if TYPE_CHECKING:
    from argosy.cli.shared.clients import Connection, Setup
    from argosy.cli.shared.remote import RemoteServer
    from argosy.prompt.prompt import ToolCalling

CLIENTS = (
    "claude-code", "codex", "opencode", "openwebui", "ollama", "continue", "zed", "aider", "llm", "cline", "roo",
    "jan",
)  # fmt: skip
_CONTEXT_TOKENS = 32_768  # assumed if the server does not say


@click.command("connect")
@click.argument("client", metavar="CLIENT", type=click.Choice(CLIENTS))
@server_options
@click.option("--model", metavar="NAME", help="Name of the model; default: the served model.")
@click.option("--context", type=WholeNumber(256), metavar="N", help="Context length; default: the server's.")
@click.option("--write", is_flag=True, help="Change the client's file, and keep the old one beside it.")
@click.option(
    "--file", type=click.Path(dir_okay=False, path_type=Path), help="File to use instead of the client's own."
)
@click.option(
    "--show-key", is_flag=True, help="Print the key itself instead of a reference to ARGOSY_API_KEY."
)
def connect(
    client: str,
    url: str,
    key_file: Path | None,
    model: str | None,
    context: int | None,
    write: bool,
    file: Path | None,
    show_key: bool,
) -> None:
    """Print the settings for CLIENT to use a running server, and where they belong.

    The server reports its model and context, so start it first. Otherwise give --model and --context.

    CLIENT: claude-code, codex, opencode, openwebui, ollama, continue, zed, aider, llm, cline, roo or jan.

    \b
    Examples:
      argosy connect claude-code
      argosy connect opencode --url http://10.0.0.7:8080 --write
    """
    from argosy.cli.shared.clients import SETUPS
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    key = api_key(key_file)
    server = RemoteServer(url, key)
    connection = describe(server, key, model=model, context=context, show_key=show_key)
    setup = SETUPS[client](connection, file, os.environ)
    if write:
        write_files(setup)
    else:
        print_files(setup)
    for note in (*setup.notes, *connection.tool_notes):
        print(f"note: {note}", file=sys.stderr)


def describe(
    server: RemoteServer,
    key: str | None,
    *,
    model: str | None,
    context: int | None,
    show_key: bool,
) -> Connection:
    """Describe the served model, or the given options if the server does not answer.

    Raises:
        ServerNotUsable: it refuses the key, is not an Argosy server, or does not answer and an option is missing.
        UsageError: it serves no model with that name.
    """
    from argosy.cli.shared.clients import Connection

    inputs: tuple[str, ...] = ("text",)
    tools: ToolCalling = "native"
    try:
        entries = server.models()
    except ServerNotUsable as error:
        if not error.facts.get("is_absent"):
            raise
        if model is None or context is None:
            raise ServerNotUsable(
                error.message,
                hint="start the server first: `argosy serve`; or describe the model that it will serve: "
                "`--model NAME --context N`",
                **error.facts,
            ) from error
    else:
        names = [entry["id"] for entry in entries]
        if not names or (model is not None and model not in names):
            raise UsageError(
                f"{server.url} serves no model {model or 'at all'}",
                hint=f"it serves: {', '.join(names)}" if names else None,
            )
        entry = entries[names.index(model) if model is not None else 0]
        model = entry["id"]
        served = entry.get("context_length")
        if context is None and isinstance(served, int) and served > 0:
            context = served
        kinds = _part(entry, "architecture").get("input_modalities")
        if isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds):
            inputs = tuple(kinds)
        served_tools = _part(entry, "capabilities").get("tools")
        if served_tools in ("native", "generic", "none"):
            tools = cast("ToolCalling", served_tools)
    if not model.isprintable():
        raise UsageError(f"{server.url} serves a model whose name cannot be written to settings: {model!r}")
    process = own_server.found() if server.url == own_server.socket_url() else None
    return Connection(
        url=server.url if process is None else process.address,  # clients connect to a port
        model=model,
        context_tokens=context or _CONTEXT_TOKENS,
        inputs=inputs,
        tools=tools,
        key=key,
        is_key_shown=show_key,
    )


def _part(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = entry.get(name)
    return found if isinstance(found, dict) else {}


def print_files(setup: Setup) -> None:
    place = setup.place
    if setup.form:
        print(f"{place}:", file=sys.stderr, flush=True)
        print(setup.form, end="", flush=True)
    for file in setup.files:
        print(f"{place or file.path}:", file=sys.stderr, flush=True)
        print(file.shown, end="", flush=True)
        place = None


def write_files(setup: Setup) -> None:
    """Change every file, the one that refers to the others last.

    Raises:
        UsageError: a file cannot be changed, or the client has no files.
    """
    from argosy.cli.shared.edit_file import edit_file

    if not setup.files:
        raise UsageError(
            "this client keeps its settings where no other program can change them",
            hint="leave out --write, and type them into it",
        )
    for file in reversed(setup.files):
        is_changed, backup = edit_file(file.path, file.change)
        kept = f"; the old one is {backup}" if backup is not None else ""
        print(f"{file.path}: {'written' + kept if is_changed else 'already up to date'}", file=sys.stderr)
