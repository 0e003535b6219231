"""`argosy memory`: change the memory budget of a running server."""

from __future__ import annotations

import json
from pathlib import Path

import click

from argosy.checkpoint.untrusted_file import quote
from argosy.cli.shared.remote import server_options
from argosy.config import GIB, format_bytes, parse_size


@click.command("memory")
@click.argument("size")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def memory(size: str, url: str, key_file: Path | None, as_json: bool) -> None:
    """Change the memory budget of a running server, while it answers.

    SIZE is written as for `argosy serve --memory`. A smaller budget evicts experts first, then unused parts of the KV
    cache; a larger one brings them back. The key needs the scope `admin`.

    \b
    Examples:
      argosy memory 4GiB
      argosy memory 50% --url http://10.0.0.1:8080
    """
    from argosy.cli.shared.remote import RemoteServer
    from argosy.cli.shared.settings import api_key

    parse_size(size, total_bytes=GIB)  # checks only the format: the server knows the total
    state = RemoteServer(url, api_key(key_file)).resize(size)
    if as_json:
        print(json.dumps(state))
        return
    print(f"budget {format_bytes(state['budget_bytes'])}")
    for line in state["lines"]:
        print(
            f"  {quote(line['name']):<18}{format_bytes(line['bytes']):>10}   {quote(line['note'])}".rstrip()
        )
