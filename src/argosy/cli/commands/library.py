"""`argosy list`, `argosy rm` and `argosy alias`: local models, by name."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.shared.output import print_facts, table_lines, time_span
from argosy.config import CHOOSING, counted, disk_size, format_bytes
from argosy.errors import ArgosyError, UsageError

if TYPE_CHECKING:
    from argosy.library.places import Model

_FACTS = {
    "family": str, "format": str, "num_experts": int, "experts_per_token": int, "smallest_bytes": int,
    "resident_bytes": int, "context_tokens": int, "num_layers": int, "vocab_size": int, "num_parameters": int,
    "weight_bytes": int, "media_kinds": list, "sampling": dict,
}  # fmt: skip  # of `Summary`
_MOST_FILES_SHOWN = 20
_MOST_REVISION = 20  # characters of a revision in the table


@click.command("list")
@click.option("--all", "shows_all", is_flag=True, help="Also list models that Argosy does not run.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def list_models(shows_all: bool, as_json: bool) -> None:
    """List local models, including those that Hugging Face tools, LM Studio and Ollama downloaded.

    FITS says whether a model runs in the memory that is free now: with all its experts in memory, or by streaming them
    from the drive.

    \b
    Examples:
      argosy list
      argosy list --json
    """
    from argosy.cli.commands.preset import lines as preset_lines
    from argosy.library import kept, presets
    from argosy.library.places import find_models
    from argosy.machine import resources

    found, known = find_models(), kept.read()
    named, faults = presets.find_all()
    notes = [*found.notes, *faults]
    budget_bytes, _ = resources.default_budget(resources.memory_limit())
    rows = [
        _row(model, facts, known.used.get(model.name), budget_bytes)
        for model, facts in model_facts(found.models)
    ]
    here = {model.name for model in found.models}
    rows += [
        {
            "name": name,
            "place": "hub",
            "revision": one.asked or None,
            "size_bytes": one.nbytes,
            "path": None,
            "fault": f"download incomplete; `argosy pull {name}{at}` finishes it",
            "is_partial": True,
        }
        for name, one in known.pulled.items()
        if name not in here
        for at in (f" --revision {one.asked}" if one.asked else "",)
    ]
    if as_json:
        print(
            json.dumps(
                {
                    "models": rows,
                    "aliases": known.aliases,
                    "presets": {
                        one.name: {**presets.facts_of(one), "messages": one.messages} for one in named
                    },
                    "notes": notes,
                },
                ensure_ascii=False,
            )
        )
        return
    shown = [row for row in rows if shows_all or "family" in row or row.get("is_partial")]
    if shown:
        _print_table(shown)
    else:
        print_facts(["no models yet: `argosy search WORDS` finds some to pull, and `demo` comes with Argosy"])
    print_facts(f"alias     {alias} = {target}" for alias, target in known.aliases.items())
    print_facts(f"preset    {line}" for line in preset_lines(named))
    if len(shown) < len(rows):
        others = len(rows) - len(shown)
        print(
            f"note: Argosy cannot run {counted(others, 'other model')}; --all lists {'it' if others == 1 else 'them'}",
            file=sys.stderr,
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def model_facts(models: list[Model]) -> list[tuple[Model, dict[str, Any]]]:
    """Read the headers of each model, or find out why it does not run."""
    from argosy.library.facts import FactsCache

    cache, result = FactsCache(), []
    for model in models:
        if model.num_missing:
            fault = f"{model.num_missing} of its files are missing"
            result.append((model, {"fault": fault, "is_partial": True}))
            continue
        try:
            facts = cache.get(model)
            if facts is None or not _are_facts(facts):
                facts = _read_facts(model)
                cache.put(model, facts)
        except OSError as error:  # removed meanwhile
            facts = {"fault": f"cannot be read: {error.strerror}"}
        result.append((model, facts))
    cache.save()
    return result


def _are_facts(found: dict[str, Any]) -> bool:
    """Whether these are what `_read_facts` returns; the file may be damaged or from another version."""
    if found.keys() == {"fault"}:
        return isinstance(found["fault"], str)
    return (
        found.keys() == _FACTS.keys()
        and all(type(found[name]) is kind for name, kind in _FACTS.items())
        and found["sampling"].keys() == set(CHOOSING)
        and all(type(value) in (int, float) for value in found["sampling"].values())
    )


def _read_facts(model: Model) -> dict[str, Any]:
    from dataclasses import asdict

    from argosy.forecast.planning import summarise

    try:
        return asdict(summarise(model.path))
    except ArgosyError as error:
        return {"fault": error.message}


def _row(model: Model, facts: dict[str, Any], used: int | None, budget_bytes: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": model.name,
        "place": model.place,
        "revision": model.asked or None,
        "path": str(model.path),
        "size_bytes": model.nbytes,
        "last_used": used,
        **facts,
    }
    if "smallest_bytes" in facts:
        fits = budget_bytes >= facts["smallest_bytes"]
        row["fits"] = "resident" if budget_bytes >= facts["resident_bytes"] else "streams" if fits else "no"
    return row


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        size, place = disk_size(row["size_bytes"]), row["place"]
        if row["revision"] is not None:
            place += f" at {row['revision'][:_MOST_REVISION]}"
        if "family" not in row:
            table.append((row["name"], "-", size, "-", "-", "-", row["fault"], place))
            continue
        fits = {
            "resident": "yes",
            "streams": "yes, it streams",
            "no": f"no, needs {format_bytes(row['smallest_bytes'], rounds_up=True)}",
        }[row["fits"]]
        experts = f"{row['experts_per_token']} of {row['num_experts']}" if row["num_experts"] else "-"
        table.append(
            (row["name"], row["family"], size, row["format"], experts, _ago(row["last_used"]), fits, place)
        )
    header = ("NAME", "FAMILY", "SIZE", "FORMAT", "EXPERTS", "USED", "FITS", "PLACE")
    for line in table_lines(header, table):
        print("".join(char if char.isprintable() else "?" for char in line))


def _ago(when: int | None) -> str:
    if when is None:
        return "-"
    seconds = int(time.time()) - when
    return "just now" if seconds < 60 else f"{time_span(seconds)} ago"


@click.command("rm")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Delete without asking, other programs' files too.")
def rm(name: str, yes: bool) -> None:
    """Remove the model NAME: its files, and nothing that another model uses.

    What Argosy pulled is removed at once. If another program put the files there, rm says which and asks.

    \b
    Examples:
      argosy rm Qwen/Qwen3-30B-A3B
      argosy rm qwen3:30b --yes
    """
    from argosy.library.remove import plan_removal, remove

    removal = plan_removal(name)
    shared = (
        f"; {counted(removal.num_shared, 'file')} used by other models will stay"
        if removal.num_shared
        else ""
    )
    print(
        f"removes  {removal.name}: {counted(len(removal.files), 'file')}, {disk_size(removal.nbytes)}{shared}"
    )
    if removal.whose is not None and not yes:
        for path in removal.files[:_MOST_FILES_SHOWN]:
            print(f"  {path}")
        if len(removal.files) > _MOST_FILES_SHOWN:
            print(f"  and {len(removal.files) - _MOST_FILES_SHOWN} more")
        print(f"Argosy did not pull this model: {removal.whose}.")
        ask("Remove it?", f"removes {removal.name}")
    remove(removal)
    print(f"removed  {removal.name}")


@click.command("alias")
@click.argument("name", required=False)
@click.argument("target", required=False)
@click.option("--remove", "removes", is_flag=True, help="Forget the alias NAME.")
def alias(name: str | None, target: str | None, removes: bool) -> None:
    """Let NAME stand for the model TARGET, a name or a path. Without arguments, list the aliases.

    \b
    Examples:
      argosy alias coder Qwen/Qwen3-Coder-30B-A3B-Instruct
      argosy alias coder --remove
    """
    from argosy.library import kept, names

    if name is None and not removes:
        aliases = kept.read().aliases
        for one, stands_for in aliases.items():
            print(f"{one} = {stands_for}")
        if not aliases:
            print("no aliases yet: `argosy alias NAME TARGET` makes one")
        return
    if name is None or (target is None) != removes:
        raise UsageError("alias needs NAME and TARGET, or NAME and --remove", hint="`argosy alias --help`")
    if target is None:
        print(f"forgot {name}, which stood for {names.remove_alias(name)}")
        return
    print(f"{name} = {names.add_alias(name, target)}")


def ask(question: str, yes: str) -> None:
    """Ask on the terminal.

    Args:
        yes: what the option --yes does, for the hint if there is no terminal.

    Raises:
        UsageError: there is no terminal.   click.exceptions.Exit: the answer is no.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("cannot ask for confirmation: stdin is not a terminal", hint=f"`--yes` {yes}")
    if not click.confirm(question, err=True):
        raise click.exceptions.Exit(1)
