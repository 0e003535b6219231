"""`argosy keys`: make, list and revoke the API keys of a server."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from argosy.cli.shared.numbers import WholeNumber

_FILE = click.option(
    "--keys", "path", type=click.Path(path_type=Path), default=Path("argosy-keys.json"), show_default=True,
    metavar="FILE", help="File with the keys.",
)  # fmt: skip


@click.group("keys")
def keys() -> None:
    """Make, list and revoke the API keys of a server. A running server sees a change within a second.

    \b
    Examples:
      argosy keys add laptop --keys keys.json --requests-per-minute 60
      argosy keys revoke laptop --keys keys.json
    """


@keys.command("add")
@click.argument("name")
@_FILE
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("infer",),
    metavar="SCOPE",
    help="infer, grammar (answers that follow a regex or a grammar), metrics or admin; may be repeated.",
)
@click.option(
    "--requests-per-minute",
    type=WholeNumber(1),
    metavar="N",
    help="Most requests a minute; default: no limit.",
)
@click.option(
    "--concurrent-requests",
    type=WholeNumber(1),
    metavar="N",
    help="Most requests at once; default: no limit.",
)
@click.option(
    "--tokens-per-day", type=WholeNumber(1), metavar="N",
    help="Most tokens a day, of prompts and answers; default: no limit.",
)  # fmt: skip
def add(name: str, path: Path, **limits: object) -> None:
    """Make a key and print it. It is shown only once."""
    from argosy.guard.keys import KeyFile

    key, secret = KeyFile(path).add(name, **limits)
    print(secret)
    print(
        f"added {key.id} for '{key.name}' to {path}, which does not contain the key itself", file=sys.stderr
    )


@keys.command("list")
@_FILE
def list_keys(path: Path) -> None:
    """List keys: id, name, scopes, limits."""
    from argosy.cli.shared.output import table_lines
    from argosy.guard.keys import KeyFile

    rows = []
    for key in KeyFile(path).read():
        limits = (key.requests_per_minute, key.concurrent_requests, key.tokens_per_day)
        names = ("requests/min", "at once", "tokens/day")
        told = [f"{value} {name}" for value, name in zip(limits, names, strict=True) if value is not None]
        # the file may have been written by hand
        name = key.name if key.name.isprintable() else ascii(key.name)
        rows.append((key.id, name, ",".join(key.scopes), ", ".join(told) or "no limits"))
    print(*table_lines(("ID", "NAME", "SCOPES", "LIMITS"), rows), sep="\n")


@keys.command("revoke")
@click.argument("name")
@_FILE
def revoke(name: str, path: Path) -> None:
    """Revoke a key by its name or id."""
    from argosy.guard.keys import KeyFile

    key = KeyFile(path).revoke(name)
    print(f"revoked {key.id} for '{key.name}'", file=sys.stderr)
