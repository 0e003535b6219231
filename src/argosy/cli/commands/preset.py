"""`argosy preset`: a model under another name, with a system message, sampling and limits of its own.

Elsewhere: `library/presets.py` keeps presets; `library/modelfile.py` reads Ollama's format.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import choices
from argosy.cli.shared.help_all import Command
from argosy.cli.shared.texts import STDIN, text_or_file
from argosy.config import ENDING, THINKING, Preset, SamplingParams
from argosy.directory import read_named
from argosy.errors import UsageError


@click.command("preset", cls=Command)
@click.argument("name", required=False, shell_complete=completion.presets)
@click.option(
    "-m", "--model", metavar="MODEL", shell_complete=completion.models, help="Model: a name or path."
)
@click.option("--system", metavar="TEXT", help='System message; @FILE reads it, "" removes it.')
@choices(Preset, "context", *THINKING, into="given")
@choices(SamplingParams, *ENDING, into="given")
@click.option(
    "--modelfile",
    metavar="FILE",
    shell_complete=completion.files,
    help="Import Ollama's Modelfile; - is stdin.",
)
@click.option("--remove", "removes", is_flag=True, help="Forget the preset NAME.")
def preset(
    name: str | None,
    model: str | None,
    system: str | None,
    modelfile: str | None,
    removes: bool,
    given: dict[str, Any],
) -> None:
    """Make or change the preset NAME: a model with defaults of its own, listed and used as a model.

    Without options, show it as a Modelfile, which --modelfile takes; without NAME, list the presets. A running server
    of the model has a change at its next request.

    \b
    Examples:
      argosy preset coder -m Qwen3-30B-A3B --system @coder.txt -t 0.2
      argosy preset mario --modelfile Modelfile
    """
    from argosy.library import presets

    changes = bool(given) or model is not None or system is not None
    if name is None:
        if changes or removes or modelfile is not None:
            raise UsageError("preset needs NAME", hint="`argosy preset --help`")
        found, faults = presets.find_all()
        for line in lines(found):
            print(line)
        if not found:
            print("no presets yet: `argosy preset NAME -m MODEL` makes one")
        for fault in faults:
            print(f"note: {fault}", file=sys.stderr)
    elif sum((changes, removes, modelfile is not None)) > 1:
        raise UsageError("--remove, --modelfile and the options of a preset exclude each other")
    elif removes:
        presets.remove(name)
        print(f"forgot {name}")
    elif modelfile is not None:
        _save(_imported(name, modelfile))
    elif changes:
        _save(_changed(name, model, system, given))
    else:
        _show(name)


def lines(found: list[Preset]) -> list[str]:
    """A line for each preset."""
    from argosy.library import presets

    return [
        f"{one.name} = {one.model}" + (f", {said}" if (said := presets.summary(one)) else "") for one in found
    ]


def _save(preset: Preset) -> None:
    from argosy.library import presets

    presets.save(preset)
    print(*lines([preset]))


def _show(name: str) -> None:
    from argosy.library import modelfile, presets

    preset = presets.find(name)
    if preset is None:
        raise _unknown(name)
    print(modelfile.written(preset, preset.model), end="")
    texts = [preset.system or "", *preset.stop, *(message["content"] for message in preset.messages)]
    if not all(map(modelfile.fits, texts)):
        print(
            f'note: a text has a line that ends with """, which a Modelfile cannot hold: copy '
            f"{presets.path_of(name)} instead",
            file=sys.stderr,
        )


def _unknown(name: str) -> UsageError:
    from argosy.checkpoint.untrusted_file import quote

    return UsageError(
        f"'{quote(name)}' is not a preset", hint=f"`argosy preset {quote(name)} -m MODEL` makes one"
    )


def _changed(name: str, model: str | None, system: str | None, given: Mapping[str, Any]) -> Preset:
    """The preset changed by the options, or a new one.

    Raises:
        UsageError: a new preset has no model, or a value is out of bounds.   CheckpointError: no such model.
    """
    from argosy.library import names, presets

    before = presets.find(name)
    if before is None and model is None:
        raise _unknown(name)
    fields = {} if before is None else {**presets.facts_of(before), "messages": before.messages}
    for thinking, other in (("thinks", "effort"), ("effort", "thinks")):
        if thinking in given and other not in given:  # the last option wins
            fields.pop(other, None)
    fields |= given
    if fields.get("max_tokens") == -1:
        del fields["max_tokens"]
    if system is not None:
        fields["system"] = text_or_file(system) or None
    fields["model"] = names.base_of(name, fields["model"] if model is None else model)
    return presets.made(name, **fields)


def _imported(name: str, source: str) -> Preset:
    """Import the preset from a Modelfile, reporting what has no effect.

    Raises:
        UsageError: the file cannot be read, or a preset cannot express it.
        CheckpointError: no such model.
    """
    from argosy.library import modelfile, names, presets

    said = "stdin" if source == STDIN else source
    try:
        if source == STDIN:
            data = sys.stdin.buffer.read(modelfile.MOST_BYTES + 1)
        else:
            data = read_named(Path(source), modelfile.MOST_BYTES + 1)
        found = modelfile.read(data, Path() if source == STDIN else Path(source).parent)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        return presets.made(name, **found.fields, model=names.base_of(name, found.model))
    except OSError as error:
        raise UsageError(f"{said} cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{said}: {error.message}", hint=error.hint) from None
