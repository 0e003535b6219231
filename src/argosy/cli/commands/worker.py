"""`argosy worker`: run experts of a model for engines on other machines."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import choices
from argosy.cli.shared.settings import Settings, read_settings
from argosy.config import format_bytes
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.cluster.worker import Worker, WorkerSettings

_FILE = click.Path(path_type=Path)


@click.command("worker")
@click.argument("model", shell_complete=completion.models)
@click.option("--bind", required=True, metavar="HOST:PORT", help="Address of one interface; port 0: any.")
@choices(Settings, "memory", into="flags", memory={"help": "Budget of the whole process: 56GiB, 75%."})
@click.option("--key-file", type=_FILE, metavar="FILE", help="Key that coordinators must have.")
@click.option("--tls-cert", type=_FILE, metavar="FILE", help="Certificate, to speak TLS.")
@click.option("--tls-key", type=_FILE, metavar="FILE", help="Key of the certificate.")
@click.option(
    "--share",
    "shares",
    multiple=True,
    metavar="K/N",
    help="Run only part K of N of the experts; may be repeated.",
)
@click.option(
    "--copy",
    "is_copy",
    is_flag=True,
    help="MODEL is a directory: fill it with the experts to run, from the coordinator.",
)
@choices(Settings, "threads", "instruction_set", into="flags")
@click.option(
    "--coordinators",
    "most_coordinators",
    default=2,
    show_default=True,
    type=click.IntRange(1, 64),
    metavar="N",
    help="Engines that may be connected at once.",
)
@click.option(
    "--expert-slots",
    "num_slots",
    type=click.IntRange(min=1),
    hidden=True,
    metavar="N",
    help="Size of the expert cache.",
)
@click.option(
    "--disk-rate", metavar="SIZE", hidden=True, help="Bytes per second of the drive; default: measured."
)
@click.option("--disk-limit", metavar="SIZE", hidden=True, help="Limit of reads, in bytes per second.")
def worker(
    model: str, bind: str, key_file: Path | None, tls_cert: Path | None, tls_key: Path | None,
    shares: tuple[str, ...], is_copy: bool, most_coordinators: int,
    num_slots: int | None, disk_rate: str | None, disk_limit: str | None, flags: Settings,
) -> None:  # fmt: skip
    """Run experts of MODEL for engines on other machines, until SIGTERM.

    The worker needs the same model files as the engine. With --copy it needs only a directory, which it fills with
    its experts from the engine; after an interruption, run the same command to resume.

    \b
    Examples:
      argosy worker Kimi-K2.pack --bind 10.0.0.2:7070 --memory 56GiB --key-file key
      argosy worker /data/copy --copy --bind 10.0.0.3:7070 --memory 56GiB --key-file key
    """
    from argosy.cli.shared.output import progress_bar
    from argosy.cluster.group import parse_host
    from argosy.cluster.hello import read_key
    from argosy.cluster.secure import server_context
    from argosy.cluster.worker import Worker, WorkerSettings
    from argosy.cluster.worker import bind as bind_socket
    from argosy.config import parse_size
    from argosy.engine.options import budget_of, choose_instruction_set, locate_model
    from argosy.model.families import open_model

    if (tls_cert is None) != (tls_key is None):
        raise UsageError(
            "--tls-cert and --tls-key belong together", hint="TLS takes a certificate and its key"
        )
    settings = read_settings(**flags)
    host, port = parse_host(bind, lowest_port=0)
    key = b"" if key_file is None else read_key(key_file)
    wanted = WorkerSettings(
        budget_bytes=budget_of(settings.get("memory"), None).ram_bytes,
        threads=settings.get("threads"),
        instruction_set=choose_instruction_set(settings.get("instruction_set")),
        ask_ahead=settings.get("ask_ahead"),
        shards=shards_of(shares),
        num_slots=num_slots,
        most_coordinators=most_coordinators,
        disk_bytes_per_s=None if disk_rate is None else float(parse_size(disk_rate)),
        most_disk_bytes_per_s=None if disk_limit is None else float(parse_size(disk_limit)),
        key=key,
        tls=None if tls_cert is None or tls_key is None else server_context(tls_cert, tls_key),
    )
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    # Bound first, so that a port in use is reported before experts are read.
    listener = bind_socket(host, port, has_key=bool(key))
    if is_copy:
        port = listener.getsockname()[1]
        found = _copied(
            Path(model), listener, f"{host}:{port}", wanted if shares else replace(wanted, shards=0)
        )
        if found is None:
            return
        path, wanted = found
        listener = bind_socket(host, port, has_key=bool(key))
    with listener:
        with progress_bar() as progress:
            if not is_copy:
                path = locate_model(model, progress)
            files = open_model(path, shards=wanted.shards, is_copy=is_copy)
            running = Worker(files, wanted, progress=progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: running.drain())
        try:
            running.serve(listener, started=lambda: _tell(running, f"{host}:{listener.getsockname()[1]}"))
        finally:
            running.close()


def _copied(
    directory: Path, listener: socket, address: str, wanted: WorkerSettings
) -> tuple[Path, WorkerSettings] | None:
    """Copy the missing bytes; return the path to open and the settings to run it with, or None after SIGTERM."""
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
    """The shards of some shares `K/N`, as a mask; all of them without any share.

    Raises:
        UsageError: a share has another form.
    """
    from argosy.checkpoint.shards import ALL_SHARDS, NUM_SHARDS, shards_of_share

    mask = 0
    for share in shares:
        part, _, of = share.partition("/")
        if not (part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of) <= NUM_SHARDS):
            raise UsageError(
                f"--share takes K/N with K from 1 to N and N up to {NUM_SHARDS}, found '{share}'",
                hint="for example 1/4",
            )
        mask |= shards_of_share(int(part), int(of))
    return mask or ALL_SHARDS
