"""`argosy completion`: scripts that complete commands, options, models and sizes in a shell, and their answers.

    argosy completion SHELL              ->  the shell's script, from click
    the script, on each press of Tab     ->  `argosy` with _ARGOSY_COMPLETE set  ->  answer

To keep Tab fast, answering imports only the completed command and, for a model, the code that finds models.
"""

from __future__ import annotations

import re
from contextlib import suppress

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from argosy.config import DEMO, INSTRUCTION_SETS
from argosy.errors import ArgosyError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_ARGOSY_COMPLETE"
_MEMORY = ("8GiB", "16GiB", "24GiB", "32GiB", "48GiB", "64GiB", "96GiB", "128GiB", "50%", "75%", "90%")
_CONTEXT = ("2048", "4096", "8192", "16384", "32768", "65536", "131072")
Items = list[CompletionItem[str]]


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes argosy's commands, options, models and sizes in SHELL.

    \b
    Examples:
      argosy completion bash > ~/.local/share/bash-completion/completions/argosy
      argosy completion fish > ~/.config/fish/completions/argosy.fish

    For zsh, put it as _argosy into a directory of fpath. Bash needs the package bash-completion for this;
    `source <(argosy completion bash)` works without, in the running shell.
    """
    group = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None  # click has all of SHELLS
    print(kind(group, {}, "argosy", VARIABLE).source())


def answer(group: click.Group, asked: str) -> int:
    """Print the completions of the words in the environment; return the exit code.

    Args:
        asked: `bash_complete` or similar, from the variable that the shell's script sets.
    """
    if asked not in {f"{shell}_complete" for shell in SHELLS}:
        return 2
    try:
        return shell_complete(group, {}, "argosy", VARIABLE, asked)
    except (KeyError, ValueError):  # not from our script: words or their number are missing
        return 2


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Names and aliases of models, presets, and files and directories."""
    from argosy.library import kept, places

    names = [DEMO, *_preset_names()]
    # A damaged file is reported when a command reads it, not between keystrokes.
    with suppress(ArgosyError, OSError):
        names += kept.read().aliases
        names += [model.name for model in places.find_models().models]
    return [*files(ctx, param, incomplete), *_beginning_with(incomplete, tuple(dict.fromkeys(names)))]


def presets(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Names of presets."""
    return _beginning_with(incomplete, tuple(_preset_names()))


def _preset_names() -> list[str]:
    from argosy.library import presets

    with suppress(ArgosyError, OSError):
        return presets.names()
    return []


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Files and directories, which the shell itself completes."""
    return [CompletionItem(incomplete, type="file")]


def memory_sizes(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Common budgets, or the units for a number."""
    sizes: tuple[str, ...] = _MEMORY
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", incomplete):
        sizes += (f"{incomplete}GiB", f"{incomplete}MiB")
    return _beginning_with(incomplete, tuple(dict.fromkeys(sizes)))


def context_sizes(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    return _beginning_with(incomplete, _CONTEXT)


def instruction_sets(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    return _beginning_with(incomplete, INSTRUCTION_SETS)


def _beginning_with(incomplete: str, values: tuple[str, ...]) -> Items:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]
