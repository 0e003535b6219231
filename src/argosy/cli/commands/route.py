"""`argosy route`: one address for several servers of the same models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.commands.listening import listening_options, take_listening
from argosy.cli.shared.help_all import Command, Further

if TYPE_CHECKING:
    from argosy.serve.http.log import LogFormat


@click.command("route", cls=Command)
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port, or 0 for any."
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="API keys of clients: the same file as the servers', which also check them.",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Also accept requests for this host name.")
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="Let pages of this origin use the router."
)
@click.option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds to shut down.",
    cls=Further,
)
@click.option(
    "--max-connections",
    default=512,
    show_default=True,
    type=click.IntRange(1, 65535),
    metavar="N",
    help="Open connections of clients.",
    cls=Further,
)
@listening_options
def route(
    urls: tuple[str, ...], host: str, port: int, keys: Path | None, allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...], drain: float, max_connections: int, check: bool, log_format: LogFormat,
    **options: Any,
) -> None:  # fmt: skip
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
    from argosy.route.run import RouterSettings
    from argosy.route.run import route as run
    from argosy.route.upstream import parse_address
    from argosy.serve.http.origins import Origins
    from argosy.serve.run import require_keys, require_keys_behind_proxy

    addresses = [parse_address(url) for url in urls]
    for address in addresses:
        if addresses.count(address) > 1:
            raise UsageError(f"{address} is given twice", hint="give each server once")
    listening = take_listening(options, host=host, port=port)
    require_keys(listening.host, keys)
    require_keys_behind_proxy(listening.front, keys)
    if keys is not None:
        KeyFile(keys).read()
    settings = RouterSettings(
        addresses=addresses, host=listening.host, keys=keys, hosts=allow_host, origins=Origins(allow_origin),
        drain_s=drain, max_connections=max_connections, front=listening.front, log_format=log_format,
    )  # fmt: skip
    if check:
        print("the settings are valid")
        return
    with listening.bind() as sockets:
        run(sockets, settings)
