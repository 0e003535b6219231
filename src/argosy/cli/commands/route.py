"""`argosy route`: one address for several servers of the same models."""

from __future__ import annotations

import click

from argosy.cli.commands.listening import ADDRESS, ListeningOptions, listening_of, listening_options
from argosy.cli.shared.declared import options
from argosy.cli.shared.help_all import Command


@click.command("route", cls=Command)
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@options(
    ListeningOptions, *ADDRESS, "drain", "max_connections", into="given", port={"default": 8000},
    keys={"help": "API keys of clients: the same file as the servers', which also check them."},
    allow_origin={"help": "Let pages of this origin use the router."}, drain={"help": "Seconds to shut down."},
    max_connections={"help": "Open connections of clients."},
)  # fmt: skip
@listening_options(ListeningOptions)
def route(urls: tuple[str, ...], given: ListeningOptions) -> None:
    """Distribute requests over several servers; an answer survives the loss of its server.

    A request goes to the server with the fewest tokens to do, and where its prompt's beginning is known. If a server
    dies, another one repeats its answers from where their clients are (docs/guides/routing.md).

    \b
    Examples:
      argosy route http://10.0.0.2:8080 http://10.0.0.3:8080
      argosy route https://a.example.org https://b.example.org --host 0.0.0.0 --keys keys.json
    """
    from argosy.errors import UsageError
    from argosy.guard.keys import KeyFile
    from argosy.route.run import route as run
    from argosy.route.upstream import parse_address
    from argosy.serve.run import require_keys, require_keys_behind_proxy

    addresses = [parse_address(url) for url in urls]
    for address in addresses:
        if addresses.count(address) > 1:
            raise UsageError(f"{address} is given twice", hint="give each server once")
    listening = listening_of(given)
    require_keys(listening.host, given.keys)
    require_keys_behind_proxy(listening.front, given.keys)
    if given.keys is not None:
        KeyFile(given.keys).read()
    endpoint = listening.endpoint(given)
    if given.check:
        print("the settings are valid")
        return
    with listening.bind() as sockets:
        run(addresses, sockets, endpoint)
