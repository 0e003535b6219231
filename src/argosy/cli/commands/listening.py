"""Options of `argosy serve` for operators: where to listen, TLS, proxies, the log, and a file of settings.

    options  ->  Listening: checked before anything is opened  ->  sockets, Front

Elsewhere: sockets and TLS are `serve/http/listen.py`, `serve/http/systemd.py`; the file is
`cli/shared/config_file.py`.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from argosy.cli.shared import own_server
from argosy.cli.shared.config_file import use_config
from argosy.cli.shared.declared import options
from argosy.config import parse_size
from argosy.config.option import Further, Option
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.serve.http.listen import Front, Listener
    from argosy.serve.http.server import Endpoint

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningOptions:
    """Options for where and to whom `serve` and `route` answer; docs/guides/deploying.md explains the rarer ones."""

    host: Annotated[str, Option("--host", "Address to listen on.", shows_default=True)] = "127.0.0.1"
    port: Annotated[int, Option("--port", "Port, or 0 for any.", least=0, most=65535, shows_default=True)] = (
        8080
    )
    keys: Annotated[Path | None, Option("--keys FILE", "API keys of clients; see `argosy keys`.")] = None
    allow_host: Annotated[
        tuple[str, ...], Option("--allow-host NAME", "Also accept requests for this host name.")
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...], Option("--allow-origin ORIGIN", "Let pages of this origin use the server.")
    ] = ()
    drain: Annotated[
        float,
        Further(
            "--drain S",
            "Seconds for running answers to finish at the end.",
            least=0,
            most=3600,
            shows_default=True,
        ),
    ] = 30.0
    max_connections: Annotated[
        int, Further("--max-connections N", "Open connections.", least=1, most=65535, shows_default=True)
    ] = 512
    check: Annotated[bool, Further("--check", "Check the settings and their files, and stop.")] = False
    listen: Annotated[
        str | None,
        Further(
            "--listen unix:PATH", "Listen on a socket file, and also on a port if --host or --port is given."
        ),
    ] = None
    socket_mode: Annotated[str, Further("--socket-mode MODE", "Mode of the socket file: 0660.")] = "0600"
    tls_cert: Annotated[Path | None, Further("--tls-cert FILE", "Certificate, to speak TLS.")] = None
    tls_key: Annotated[Path | None, Further("--tls-key FILE", "Key of the certificate.")] = None
    forwarded_from: Annotated[
        tuple[str, ...],
        Further(
            "--forwarded-from CIDR",
            "Trust the X-Forwarded headers of this proxy; `unix`: of the socket file's clients.",
        ),
    ] = ()
    base_path: Annotated[str, Further("--base-path /PATH", "Prefix of all paths.")] = ""
    log_format: Annotated[Literal["text", "json"], Further("--log-format", "Format of log lines.")] = "text"
    log_limit: Annotated[
        str | None,
        Further("--log-limit SIZE", "Keep the newest part of a log of this size, if stderr is a file: 8MiB."),
    ] = None


ADDRESS = ("host", "port", "keys", "allow_host", "allow_origin")
_FURTHER = (
    "check", "listen", "socket_mode", "tls_cert", "tls_key", "forwarded_from", "base_path", "log_format", "log_limit",
)  # fmt: skip


def listening_options(owner: type[ListeningOptions]) -> Callable[[Command], Command]:
    """Add --config and the options for operators, in the same order for every command."""

    def add(command: Command) -> Command:
        add_config = click.option(
            "--config", type=click.Path(path_type=Path), metavar="FILE", is_eager=True, expose_value=False,
            callback=use_config, help="Settings as TOML; with --check, check them and stop.",
        )  # fmt: skip
        return add_config(options(owner, *_FURTHER, into="given")(command))

    return add


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where to listen, after checks.

    path: the socket file, reachable only from this machine; None for none.
    port: None if there is only the socket file.
    passed: listening sockets from systemd, which replace our own.
    """

    host: str
    port: int | None
    path: Path | None
    mode: int
    front: Front
    passed: Sequence[Listener] = ()

    def endpoint(self, given: ListeningOptions) -> Endpoint:
        """What a server or a router needs of the options. Raises what `Origins` and `parse_size` raise."""
        from argosy.serve.http.origins import Origins
        from argosy.serve.http.server import Endpoint

        return Endpoint(
            host=self.host, keys=given.keys, hosts=given.allow_host, origins=Origins(given.allow_origin),
            front=self.front, drain_s=given.drain, max_connections=given.max_connections,
            log_format=given.log_format,
            log_bytes=None if given.log_limit is None else parse_size(given.log_limit),
        )  # fmt: skip

    @contextmanager
    def bind(self) -> Iterator[list[Listener]]:
        """Bind sockets without listening yet. Raises what `bind_file` and `bind` raise."""
        from argosy.serve.http.listen import address_of, bind, bind_file

        with ExitStack() as bound:
            if self.passed:
                sockets = [bound.enter_context(one) for one in self.passed]
                with own_server.noting(self.path, address_of(sockets[0], self.host, self.front), stays=True):
                    yield sockets
                return
            # The file first, because its lock shows if another server of this user is about to listen on the same
            # port.
            of_file = [] if self.path is None else bound.enter_context(bind_file(self.path, self.mode))
            of_port = [] if self.port is None else bound.enter_context(bind(self.host, self.port))
            sockets = [*of_port, *of_file]
            with own_server.noting(self.path, address_of(sockets[0], self.host, self.front)):
                yield sockets


def listening_of(given: ListeningOptions) -> Listening:
    """Check options and their files.

    Raises:
        UsageError: an option is invalid, or options contradict each other.
    """
    from argosy.serve.http.listen import Certificate, Front
    from argosy.serve.http.systemd import passed_sockets

    certificate, key, mode = given.tls_cert, given.tls_key, given.socket_mode
    if (certificate is None) != (key is None):
        wrong, missing = ("--tls-cert", "--tls-key") if key is None else ("--tls-key", "--tls-cert")
        raise UsageError(f"{wrong} needs {missing}", hint="TLS takes a certificate and its key")
    front = Front(
        certificate=None if certificate is None or key is None else Certificate(certificate, key),
        proxies=given.forwarded_from,
        base_path=given.base_path,
    )
    if not re.fullmatch(r"0?[0-7]{3}", mode):
        raise UsageError(f"--socket-mode must be three octal digits, found '{mode}'", hint="for example 0660")
    if passed := passed_sockets():
        return _of_passed(passed, front, given)
    path, has_port = _addresses(given.listen)
    return Listening(
        host=given.host if has_port else "localhost", port=given.port if has_port else None, path=path,
        mode=int(mode, 8), front=front,
    )  # fmt: skip


def _of_passed(passed: Sequence[Listener], front: Front, given: ListeningOptions) -> Listening:
    """Listen on the sockets that systemd passed. Options may say the same or nothing.

    Raises:
        UsageError: an option names any other address.
    """
    from argosy.serve.http.systemd import shown

    host, port, listen, mode = given.host, given.port, given.listen, int(given.socket_mode, 8)
    paths = [one.getsockname() for one in passed if one.family == socket.AF_UNIX]
    ports = [one.getsockname()[:2] for one in passed if one.family != socket.AF_UNIX]
    source = click.get_current_context().get_parameter_source
    is_given = {
        name: source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
        for name in ("host", "port", "listen", "socket_mode")
    }
    wrong = {
        f"--host {host}": is_given["host"] and host not in [own_host for own_host, _ in ports],
        f"--port {port}": is_given["port"] and port not in [own_port for _, own_port in ports],
        f"--listen {listen}": is_given["listen"] and listen not in [f"unix:{path}" for path in paths],
        f"--socket-mode {mode:04o}": is_given["socket_mode"]
        and any(stat.S_IMODE(os.stat(path).st_mode) != mode for path in paths),
    }
    for option, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(
                f"{option} contradicts the sockets that systemd passed: {', '.join(map(shown, passed))}",
                hint="leave it out: ListenStream= and SocketMode= of the .socket unit say where the server listens",
            )
    own = str(own_server.socket_path())
    path = own if own in paths else next(iter(paths), None)
    return Listening(
        host=ports[0][0] if ports else "localhost", port=None, path=None if path is None else Path(path), mode=mode,
        front=front, passed=passed,
    )  # fmt: skip


def _addresses(listen: str | None) -> tuple[Path | None, bool]:
    """The path of the socket file, if any, and whether the server listens on a port.

    Command-line options override those in a file, even if they name the other kind of address.
    """
    if listen is None:
        return None, True
    ranks = {ParameterSource.COMMANDLINE: 2, ParameterSource.DEFAULT_MAP: 1}
    source = click.get_current_context().get_parameter_source
    of_file, of_port = (
        max(ranks.get(source(name), 0) for name in names)  # type: ignore[arg-type]
        for names in (("listen",), ("host", "port"))
    )
    if of_port > of_file:
        return None, True
    kind, _, path = listen.partition(":")
    if kind != "unix" or Path(path).name in ("", ".."):
        raise UsageError(
            f"--listen takes unix:PATH, found '{listen}'", hint="TCP addresses are --host and --port"
        )
    return Path(path), of_port == of_file
