"""Options of commands that may also run experts on other machines, converted to a `Group`.

Elsewhere: `cluster/group.py` is the group; `cli/commands/worker.py` starts a worker on another machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from argosy.cli.shared.declared import options
from argosy.config import parse_size
from argosy.config.option import Further
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.cluster.group import Group
    from argosy.cluster.ray_control import RayWorkers

AUTO = "auto"  # in place of hosts: workers that Ray starts
_NEED_CLUSTER = ("cluster_key_file", "cluster_ca", "verify", "copy_rate", "no_local_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedGroup:
    """The group that a command's options describe, after checks.

    copy_rate: None for the group's default.
    workers, worker_memory: for workers that Ray starts; None: all of them, and a worker's default.
    """

    cluster: Annotated[
        str | None, Further("--cluster HOST:PORT,...", "Also run experts on these workers, or auto.")
    ] = None
    workers: Annotated[int | None, Further("--workers N", "With auto: workers in use.", least=1)] = None
    worker_memory: Annotated[
        str | None, Further("--worker-memory SIZE", "With auto: budget of each worker.")
    ] = None
    replicas: Annotated[int, Further("--replicas", "Owners of each expert.", least=1, shows_default=True)] = 2
    cluster_key_file: Annotated[
        Path | None, Further("--cluster-key-file FILE", "Key that the workers share.")
    ] = None
    cluster_ca: Annotated[Path | None, Further("--cluster-ca FILE", "Certificates to trust; speaks TLS.")] = (
        None
    )
    verify: Annotated[
        str | None, Further("--verify PERCENT", "Check this share of answers on a second worker.")
    ] = None
    copy_rate: Annotated[
        str | None, Further("--copy-rate SIZE", "Limit of copying while answering, per second.")
    ] = None
    no_local_experts: Annotated[bool, Further("--no-local-experts", "Run no experts in this process.")] = (
        False
    )

    def __post_init__(self) -> None:
        if self.cluster != AUTO and (self.workers is not None or self.worker_memory is not None):
            option = "--workers" if self.worker_memory is None else "--worker-memory"
            raise UsageError(
                f"{option} needs --cluster auto", hint="set `--memory` where you start each `argosy worker`"
            )
        if self.cluster is None:
            for name in _NEED_CLUSTER:
                if getattr(self, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} needs --cluster",
                        hint="--cluster HOST:PORT,... names the workers",
                    )
            return
        if not self.hosts:
            raise UsageError("--cluster names no worker", hint="--cluster HOST:PORT,...")
        if self.hosts != (AUTO,):
            from argosy.cluster.member import parse_host

            for host in self.hosts:
                parse_host(host)
        if self.hosts == (AUTO,) and self.cluster_ca is not None:
            raise UsageError(
                "--cluster auto starts workers without TLS, but --cluster-ca requires it",
                hint="start the workers by hand, with --tls-cert and --tls-key",
            )
        if self.verify is not None:
            parse_percent(self.verify)
        if self.copy_rate is not None:
            parse_size(self.copy_rate)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Addresses of workers; only AUTO: Ray finds them; empty: no group is wanted."""
        return tuple(host.strip() for host in (self.cluster or "").split(",") if host.strip())

    @contextmanager
    def open(self, model: str) -> Iterator[Group | None]:
        """The group, which connects when an engine is opened with it, or None if no group is wanted.

        Args:
            model: the model for workers that Ray starts.

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

        key = b"" if self.cluster_key_file is None else read_key(self.cluster_key_file)
        rate = {} if self.copy_rate is None else {"copy_bytes_per_s": float(parse_size(self.copy_rate))}
        with ExitStack() as opened:
            workers = opened.enter_context(self._found(model, key)) if self.hosts == (AUTO,) else None
            group = opened.enter_context(
                Group(
                    self.hosts if workers is None else workers.hosts(tell=_say),
                    replicas=self.replicas,
                    key=key,
                    tls=None if self.cluster_ca is None else client_context(self.cluster_ca),
                    verify=0.0 if self.verify is None else parse_percent(self.verify),
                    local=not self.no_local_experts,
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
        return RayWorkers([model, *memory], key=key, num_workers=self.workers)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


group_options = options(WantedGroup, into="group")


def parse_percent(text: str) -> float:
    """Parse `1%` or `0.5%` into a fraction from 0 to 1.

    Raises:
        UsageError: it is not a percentage.
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
