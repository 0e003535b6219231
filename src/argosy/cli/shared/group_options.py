"""Options of commands that may also run experts on other machines, converted to a `Group`.

Elsewhere: `cluster/group.py` is the group; `cli/commands/worker.py` starts what answers on the other machines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from argosy.cli.shared.help_all import Further
from argosy.config import parse_size
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.cluster.group import Group
    from argosy.cluster.ray_control import RayWorkers

Command = TypeVar("Command", bound=Callable[..., Any])

AUTO = "auto"  # instead of hosts: workers that Ray starts
_FILE = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--cluster", metavar="HOST:PORT,...", cls=Further, help="Also run experts on these workers, or auto."),
    click.option("--workers", type=click.IntRange(1), metavar="N", cls=Further, help="With auto: workers in use."),
    click.option("--worker-memory", metavar="SIZE", cls=Further, help="With auto: budget of each worker."),
    click.option(
        "--replicas", type=click.IntRange(1), default=2, show_default=True, cls=Further, help="Owners of each expert."
    ),
    click.option("--cluster-key-file", type=_FILE, metavar="FILE", cls=Further, help="Key that the workers share."),
    click.option("--cluster-ca", type=_FILE, metavar="FILE", cls=Further, help="Certificates to trust; speaks TLS."),
    click.option("--verify", metavar="PERCENT", cls=Further, help="Check this share of answers on a second worker."),
    click.option("--copy-rate", metavar="SIZE", cls=Further, help="Limit of copying while answering, per second."),
    click.option("--no-local-experts", is_flag=True, cls=Further, help="Run no experts in this process."),
)  # fmt: skip


def group_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedGroup:
    """The group that options describe; no hosts: none.

    hosts: addresses of workers; AUTO alone: Ray finds them.
    copy_bytes_per_s: rate at which workers copy files beside answers; None: the group's own rate.
    num_workers, worker_memory: for workers that Ray starts; None: all of them, and a worker's own default.
    """

    hosts: tuple[str, ...] = ()
    replicas: int = 2
    key_file: Path | None = None
    authorities: Path | None = None
    verify: float = 0.0
    local: bool = True
    copy_bytes_per_s: float | None = None
    num_workers: int | None = None
    worker_memory: str | None = None

    @contextmanager
    def open(self, model: str) -> Iterator[Group | None]:
        """The group, which connects when an engine is opened with it; None: no group is wanted.

        Args:
            model: the model that workers open if Ray starts them.

        Raises:
            UsageError: an option or its file is invalid.
            NoWorkers: Ray has no workers.
        """
        if not self.hosts:
            yield None
            return
        from argosy.cluster.group import Group
        from argosy.cluster.hello import read_key
        from argosy.cluster.secure import client_context

        key = b"" if self.key_file is None else read_key(self.key_file)
        rate = {} if self.copy_bytes_per_s is None else {"copy_bytes_per_s": self.copy_bytes_per_s}
        with ExitStack() as opened:
            workers = opened.enter_context(self._found(model, key)) if self.hosts == (AUTO,) else None
            group = opened.enter_context(
                Group(
                    self.hosts if workers is None else workers.hosts(tell=_say),
                    replicas=self.replicas,
                    key=key,
                    tls=None if self.authorities is None else client_context(self.authorities),
                    verify=self.verify,
                    local=self.local,
                    tell=_say,
                    **rate,
                )
            )
            if workers is not None:
                workers.follow(group)
            yield group

    def _found(self, model: str, key: bytes) -> RayWorkers:
        """Workers on the nodes of a Ray cluster."""
        from argosy.cluster.ray_control import RayWorkers

        memory = () if self.worker_memory is None else ("--memory", self.worker_memory)
        return RayWorkers([model, *memory], key=key, num_workers=self.num_workers)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def take_group(options: dict[str, Any]) -> WantedGroup:
    """Take the options of this module out of those of a command.

    Raises:
        UsageError: one of them is invalid, or is given without --cluster.
    """
    hosts, replicas = options.pop("cluster"), options.pop("replicas")
    key_file, authorities = options.pop("cluster_key_file"), options.pop("cluster_ca")
    verify, no_local = options.pop("verify"), options.pop("no_local_experts")
    copy_rate = options.pop("copy_rate")
    num_workers, memory = options.pop("workers"), options.pop("worker_memory")
    if hosts != AUTO and (num_workers is not None or memory is not None):
        option = "--workers" if memory is None else "--worker-memory"
        raise UsageError(
            f"{option} needs --cluster auto", hint="start other workers with the memory they may use"
        )
    if hosts is None:
        for option, value in (
            ("--cluster-key-file", key_file), ("--cluster-ca", authorities), ("--verify", verify),
            ("--copy-rate", copy_rate), ("--no-local-experts", no_local),
        ):  # fmt: skip
            if value:
                raise UsageError(
                    f"{option} needs --cluster", hint="--cluster HOST:PORT,... names the workers"
                )
        return WantedGroup()
    named = tuple(host.strip() for host in hosts.split(",") if host.strip())
    if not named:
        raise UsageError("--cluster names no worker", hint="--cluster HOST:PORT,...")
    if named == (AUTO,) and authorities is not None:
        raise UsageError(
            "--cluster auto starts workers without TLS, and --cluster-ca asks for it",
            hint="start the workers by hand, with --tls-cert and --tls-key",
        )
    return WantedGroup(
        hosts=named, replicas=replicas, key_file=key_file, authorities=authorities,
        verify=0.0 if verify is None else parse_percent(verify), local=not no_local, num_workers=num_workers,
        worker_memory=memory, copy_bytes_per_s=None if copy_rate is None else float(parse_size(copy_rate)),
    )  # fmt: skip


def parse_percent(text: str) -> float:
    """Turn `1%` or `0.5%` into a share from 0 to 1.

    Raises:
        UsageError: it is no percentage.
    """
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UsageError(
            f"--verify takes a percentage from 0% to 100%, found '{text}'", hint="for example 1%"
        )
    return share
