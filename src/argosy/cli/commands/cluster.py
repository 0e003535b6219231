"""`argosy cluster`: show the workers of a running server, add one, or take one out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from argosy.cli.commands.top import worker_lines
from argosy.cli.shared.remote import server_options


@click.group("cluster")
def cluster() -> None:
    """Show the workers of a running server, add one, or take one out.

    \b
    Examples:
      argosy cluster status --url http://10.0.0.1:8080
      argosy cluster drain 10.0.0.3:7070
    """


@cluster.command("status")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
def status(url: str, key_file: Path | None, as_json: bool) -> None:
    """Show each worker: its state, experts, hits, times and bytes."""
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    workers = RemoteServer(url, api_key(key_file)).workers()
    if as_json:
        print(json.dumps(workers))
    else:
        _show(workers)


@cluster.command("add")
@click.argument("host")
@server_options
def add(host: str, url: str, key_file: Path | None) -> None:
    """Add the worker at HOST:PORT, or add one again that was drained or set aside."""
    _change("add", host, url, key_file)


@cluster.command("drain")
@click.argument("host")
@server_options
def drain(host: str, url: str, key_file: Path | None) -> None:
    """Take the worker at HOST:PORT out: its experts go to other owners, and no request fails."""
    _change("drain", host, url, key_file)


def _change(what: str, host: str, url: str, key_file: Path | None) -> None:
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    _show(RemoteServer(url, api_key(key_file)).change_worker(what, host))


def _show(workers: list[dict[str, Any]]) -> None:
    from argosy.cli.shared.output import print_facts

    print_facts(worker_lines(workers) or ["this server runs without workers"])
