"""`argosy worker`: run experts of a model for engines on other machines."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import choices, options
from argosy.cli.shared.settings import Settings, read_settings
from argosy.config import format_bytes
from argosy.config.option import Option
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.cluster.worker import Worker
    from argosy.cluster.worker_plan import WorkerSettings

_LONGEST_SHARE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Options only for `worker`."""

    bind: Annotated[str, Option("--bind HOST:PORT", "Address of one interface; port 0: any.")]
    key_file: Annotated[Path | None, Option("--key-file FILE", "Key that coordinators must have.")] = None
    tls_cert: Annotated[Path | None, Option("--tls-cert FILE", "Certificate, to speak TLS.")] = None
    tls_key: Annotated[Path | None, Option("--tls-key FILE", "Key of the certificate.")] = None
    shares: Annotated[
        tuple[str, ...], Option("--share K/N", "Run only part K of N of the experts; may be repeated.")
    ] = ()
    is_copy: Annotated[
        bool,
        Option("--copy", "MODEL is a directory: fill it with the experts to run, from the coordinator."),
    ] = False
    most_coordinators: Annotated[
        int,
        Option(
            "--coordinators N", "Engines that may be connected at once.", least=1, most=64, shows_default=True
        ),
    ] = 2
    num_slots: Annotated[
        int | None, Option("--expert-slots N", "Size of the expert cache.", least=1, is_hidden=True)
    ] = None
    disk_rate: Annotated[
        str | None,
        Option("--disk-rate SIZE", "Bytes per second of the drive; default: measured.", is_hidden=True),
    ] = None
    disk_limit: Annotated[
        str | None, Option("--disk-limit SIZE", "Limit of reads, in bytes per second.", is_hidden=True)
    ] = None

    def settings(self, flags: Settings) -> WorkerSettings:
        """The checked settings of a worker.

        Raises:
            UsageError: an option, its file or an environment variable is invalid.
        """
        from argosy.cluster.hello import read_key
        from argosy.cluster.secure import server_context
        from argosy.cluster.worker_plan import WorkerSettings
        from argosy.config import parse_size
        from argosy.engine.options import budget_of, choose_instruction_set

        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError(
                "--tls-cert and --tls-key belong together", hint="TLS takes a certificate and its key"
            )
        settings = read_settings(**flags)
        return WorkerSettings(
            budget_bytes=budget_of(settings.get("memory"), None).ram_bytes,
            threads=settings.get("threads"),
            instruction_set=choose_instruction_set(settings.get("instruction_set")),
            ask_ahead=settings.get("ask_ahead"),
            shards=shards_of(self.shares),
            num_slots=self.num_slots,
            most_coordinators=self.most_coordinators,
            disk_bytes_per_s=None if self.disk_rate is None else float(parse_size(self.disk_rate)),
            most_disk_bytes_per_s=None if self.disk_limit is None else float(parse_size(self.disk_limit)),
            key=b"" if self.key_file is None else read_key(self.key_file),
            tls=None
            if self.tls_cert is None or self.tls_key is None
            else server_context(self.tls_cert, self.tls_key),
        )


@click.command("worker")
@click.argument("model", shell_complete=completion.models)
@options(WorkerOptions, "bind", into="given")
@choices(Settings, "memory", into="flags", memory={"help": "Budget of the whole process: 56GiB, 75%."})
@options(WorkerOptions, "key_file", "tls_cert", "tls_key", "shares", "is_copy", into="given")
@choices(Settings, "threads", "instruction_set", into="flags")
@options(WorkerOptions, "most_coordinators", "num_slots", "disk_rate", "disk_limit", into="given")
def worker(model: str, given: WorkerOptions, flags: Settings) -> None:
    """Run experts of MODEL for engines on other machines, until SIGTERM.

    The worker needs the same model files as the engine. With --copy it needs only a directory, which it fills with
    its experts from the engine; after an interruption, run the same command to resume.

    \b
    Examples:
      argosy worker Kimi-K2.pack --bind 10.0.0.2:7070 --memory 56GiB --key-file key
      argosy worker /data/copy --copy --bind 10.0.0.3:7070 --memory 56GiB --key-file key
    """
    from argosy.cli.shared.output import progress_bar
    from argosy.cluster.member import format_host, parse_host
    from argosy.cluster.worker import Worker
    from argosy.cluster.worker import bind as bind_socket
    from argosy.model.families import open_model
    from argosy.open.models import locate_model

    wanted = given.settings(flags)
    host, port = parse_host(given.bind, lowest_port=0)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    # Bind first, so that a port in use is reported before experts are read.
    listener = bind_socket(host, port, has_key=bool(wanted.key))
    if given.is_copy:
        port = listener.getsockname()[1]
        found = _copied(
            Path(model),
            listener,
            format_host(host, port),
            wanted if given.shares else replace(wanted, shards=0),
        )
        if found is None:
            return
        path, wanted = found
        listener = bind_socket(host, port, has_key=bool(wanted.key))
    with listener:
        with progress_bar() as progress:
            if not given.is_copy:
                path = locate_model(model, progress)
            files = open_model(path, shards=wanted.shards, is_copy=given.is_copy)
            running = Worker(files, wanted, progress=progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: running.drain())
        try:
            running.serve(
                listener, started=lambda: _tell(running, format_host(host, listener.getsockname()[1]))
            )
        finally:
            running.close()


def _copied(
    directory: Path, listener: socket, address: str, wanted: WorkerSettings
) -> tuple[Path, WorkerSettings] | None:
    """Copy the missing bytes; return the path to open and the settings to run with, or None after SIGTERM."""
    from argosy.cli.shared.output import progress_bar
    from argosy.cluster.copied import Copy, CopyingWorker

    with closing(listener), closing(Copy(directory, shards=wanted.shards)) as copy:
        if not copy.is_whole:
            with progress_bar() as progress:
                copying = CopyingWorker(copy, wanted, progress=progress)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: copying.drain())
                print(f"waits at {address} for a coordinator, to copy from it", file=sys.stderr, flush=True)
                if not copying.serve(listener):
                    return None
        return copy.path, replace(wanted, shards=copy.shards)


def _tell(running: Worker, address: str) -> None:
    plan = running.plan
    kept = "all of them" if plan.num_slots is None else f"{plan.num_slots} of them"
    print(
        f"ready at {address}: {plan.num_experts} experts, memory for {kept}, "
        f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.budget_bytes)}, "
        f"drive {running.disk_bytes_per_s / 1e9:.2f} GB/s",
        flush=True,
    )
    if not running.has_key:
        print("note: there is no key: anyone who reaches this address can use the worker", file=sys.stderr)


def shards_of(shares: Sequence[str]) -> int:
    """The shards of the shares `K/N`, as a mask; all shards if there is no share.

    Raises:
        UsageError: a share is malformed.
    """
    from argosy.checkpoint.shards import ALL_SHARDS, NUM_SHARDS, shards_of_share

    mask = 0
    for share in shares:
        part, _, of = share.partition("/")
        are_numbers = part.isdecimal() and of.isdecimal() and len(share) <= _LONGEST_SHARE
        if not (are_numbers and 1 <= int(part) <= int(of) <= NUM_SHARDS):
            raise UsageError(
                f"--share takes K/N with K from 1 to N and N up to {NUM_SHARDS}, found '{share}'",
                hint="for example 1/4",
            )
        mask |= shards_of_share(int(part), int(of))
    return mask or ALL_SHARDS
