"""`argosy search`: models of a hub by words of their names, or those of this machine if no hub can be asked."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from argosy.cli.shared.output import parameter_count, table_lines
from argosy.config import counted, disk_size
from argosy.errors import FetchFailed

if TYPE_CHECKING:
    from argosy.library.search import Hit

_MOST_SHOWN = 25


@click.command("search")
@click.argument("words", nargs=-1, required=True)
@click.option("--all", "shows_all", is_flag=True, help="Also list models that Argosy does not run.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def search(words: tuple[str, ...], shows_all: bool, as_json: bool) -> None:
    """Search the hub for models by words of their names, the most downloaded first.

    Models that Argosy cannot run are left out, as far as the hub tells. If the hub cannot be reached, or HF_HUB_OFFLINE
    is set, local models are searched. Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    \b
    Examples:
      argosy search qwen3 30b gguf
      argosy search deepseek --json
    """
    from argosy.library import search as library

    asked = " ".join(words)
    try:
        hits = library.search(asked)
    except FetchFailed as error:
        if not error.facts.get("is_absent"):
            raise
        _search_here(asked, error, as_json=as_json)
        return
    shown = [hit for hit in hits if shows_all or hit.may_run is not False]
    if as_json:
        print(json.dumps({"from": "hub", "models": [asdict(hit) for hit in shown]}, ensure_ascii=False))
        return
    if shown:
        _print_hits(shown[:_MOST_SHOWN])
        print("`argosy plan NAME` says whether one fits, and `argosy pull NAME` downloads it")
    else:
        print(f"the hub has no model {'of that name' if shows_all else 'that Argosy runs'} for: {asked}")
    for note in _notes(len(hits), len(shown), library.MOST_ASKED):
        print(f"note: {note}", file=sys.stderr)


def _notes(num_found: int, num_shown: int, most: int) -> list[str]:
    notes = []
    if num_shown > _MOST_SHOWN:
        notes.append(f"{num_shown - _MOST_SHOWN} more are not shown; --json prints all")
    if others := num_found - num_shown:
        notes.append(f"Argosy does not run {counted(others, 'other')}; --all lists them")
    if num_found >= most:
        notes.append(f"only the {most} most downloaded were looked at; more words narrow the search")
    return notes


def _print_hits(hits: list[Hit]) -> None:
    rows = []
    for hit in hits:
        size = "-" if hit.num_parameters is None else parameter_count(hit.num_parameters)
        downloads = "-" if hit.downloads is None else f"{hit.downloads:,}"
        licence = (hit.licence or "not stated") + (", gated" if hit.is_gated else "")
        unknown = " (not known whether it runs)" if hit.may_run is None else ""
        rows.append((hit.name, size, (hit.format or "-") + unknown, downloads, licence))
    print(*table_lines(("NAME", "PARAMETERS", "FORMAT", "DOWNLOADS", "LICENCE"), rows), sep="\n")


def _search_here(asked: str, error: FetchFailed, *, as_json: bool) -> None:
    from argosy.library.search import search_here

    found = search_here(asked)
    if as_json:
        models = [{"name": model.name, "size_bytes": model.nbytes, "place": model.place} for model in found]
        print(json.dumps({"from": "library", "models": models, "notes": [error.message]}, ensure_ascii=False))
        return
    print(f"note: {error.message}; only this machine is searched", file=sys.stderr)
    if found:
        rows = [(model.name, disk_size(model.nbytes), model.place) for model in found]
        print(*table_lines(("NAME", "SIZE", "PLACE"), rows), sep="\n")
    else:
        print(f"no local model matches: {asked}")
