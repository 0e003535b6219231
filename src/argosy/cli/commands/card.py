"""`argosy card`: describe a model on a card, with known facts and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from argosy.cli.commands import completion
from argosy.cli.shared.output import progress_bar, write_file
from argosy.config import DEMO

if TYPE_CHECKING:
    from argosy.evaluate.card import Guard

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("card")
@click.argument("model", metavar="MODEL", shell_complete=completion.models)
@click.option(
    "--drift", type=_FILE, metavar="FILE", help="A report of `argosy eval drift --save`; default: the pack's."
)
@click.option("--policy", type=_FILE, metavar="FILE", help="The policy file of its server.")
@click.option("--hash", "hashes", is_flag=True, help="Read files whose hash is not known.")
@click.option(
    "--save", "save", type=_FILE, metavar="FILE", help="Write FILE instead, as JSON if it ends in .json."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown.")
def card(
    model: str, drift: Path | None, policy: Path | None, hashes: bool, save: Path | None, as_json: bool
) -> None:
    """Write a card of MODEL: hashes, licence, conversion, drift, memory, guard settings and known limits.

    The card contains what the files, the library and your reports say. Anything else is marked as unknown.

    \b
    Examples:
      argosy card ./Qwen3-30B-A3B-q4 --save ./Qwen3-30B-A3B-q4/card.md
      argosy card Qwen/Qwen3-30B-A3B --policy policy.toml --json
    """
    from argosy.cli.commands.eval import REPORT_FILE
    from argosy.demo.locate import LICENCE
    from argosy.evaluate.card import gather, markdown
    from argosy.evaluate.measure import identity_of
    from argosy.evaluate.reports import read_report
    from argosy.forecast.planning import summarise
    from argosy.library import kept, names
    from argosy.open.models import open_files

    with progress_bar() as progress:
        text, path, name = names.look_up(model)
        files = open_files(_located(text, path))
        if drift is None and files.is_packed and (files.path / REPORT_FILE).exists():
            drift = files.path / REPORT_FILE
        facts = gather(
            name or Path(text).name or text,
            files,
            budget=summarise(files.path),
            licence=LICENCE if DEMO in (text, name) else None,
            pulled=None if name is None else kept.read().pulled.get(name),
            drift=None if drift is None else read_report(drift, identity_of(files)),
            guard=None if policy is None else _guard(policy),
            hashes=hashes,
            progress=progress,
        )
    is_json = as_json or (save is not None and save.suffix == ".json")
    shown = json.dumps(facts, ensure_ascii=False, indent=1) + "\n" if is_json else markdown(facts)
    if save is None:
        print(shown, end="")
    else:
        write_file(save, shown)
        print(f"written  {save}")


def _located(text: str, path: Path | None) -> Path:
    from argosy.open.models import locate_model

    return locate_model(text if path is None or text == DEMO else path)


def _guard(path: Path) -> Guard:
    from argosy.evaluate.card import Guard
    from argosy.guard.policy import read_policies

    policies = read_policies(path)
    return Guard(digest=policies.digest, default=policies.default, policies=tuple(sorted(policies.policies)))
