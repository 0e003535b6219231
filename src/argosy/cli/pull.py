"""`argosy pull`: fetch a model from a hub, after saying whether it fits."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from argosy.cli.library import ask
from argosy.cli.output import FITS, disk_size, print_facts, short_number
from argosy.config import format_bytes

if TYPE_CHECKING:
    from argosy.engine.forecast import Forecast
    from argosy.library.pull import Download, Moment, Watch

_LINE_S = 10.0  # between lines of progress, if there is no terminal
_RATES = ((12.5e6, "100 Mbit/s"), (125e6, "1 Gbit/s"))


@click.command("pull")
@click.argument("model", metavar="OWNER/NAME[:FORMAT]")
@click.option("--memory", metavar="SIZE", help="Budget to plan with: 8GiB, 8GB, 75%; default: what is free.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit; default: the main branch.")
@click.option("--yes", is_flag=True, help="Fetch without asking: you accept the licence.")
def pull(model: str, memory: str | None, revision: str | None, yes: bool) -> None:
    """Fetch a model into the hub's cache, where other programs find it, too.

    First it says whether the model fits, how fast it will be, how large it is and which licence it has; then it asks,
    and notes when you accepted that licence.
    FORMAT chooses one of several GGUF files by a part of its name. The name of the model means the revision that was
    pulled last. Every file is checked against the hub's digest.
    After ^C or a lost connection, the same command continues. Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE,
    HF_HOME, HF_HUB_OFFLINE.

    \b
    Examples:
      argosy pull Qwen/Qwen3-30B-A3B
      argosy pull unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M --memory 16GiB --yes
    """
    from argosy.cli.output import progress_bar
    from argosy.cli.settings import Settings
    from argosy.engine.planning import plan_remote
    from argosy.library.pull import fetch, look_up

    settings = Settings.read(memory=memory)
    download = look_up(model, revision)
    missing_bytes = download.nbytes - download.here_bytes
    accepted_at = None
    if missing_bytes:
        with progress_bar() as progress:
            _, forecast = plan_remote(download.source, memory=settings.memory, progress=progress)
        print_facts(_lines(download, forecast, missing_bytes))
        sys.stdout.flush()
        if not yes:
            licence = f", under the licence {download.licence}" if download.licence else ""
            also = " and accepts the licence" if download.licence else ""
            ask(f"Fetch it{licence}?", f"downloads {disk_size(missing_bytes)}{also}")
        accepted_at = int(time.time())
    with _watch(download.here_bytes) as watch:
        try:
            path = fetch(download, watch, accepted_at=accepted_at)
        except KeyboardInterrupt:
            done, unit = disk_size(download.here_bytes).split()
            total = disk_size(download.nbytes)
            done += "" if total.endswith(f" {unit}") else f" {unit}"
            raise KeyboardInterrupt(
                f"Stopped at {done} of {total}. Run the same command to resume."
            ) from None
    print(f'ready     argosy run -m {download.name} "Why is the sky blue?"')
    print(f"path      {path}")


def _lines(download: Download, forecast: Forecast, missing_bytes: int) -> list[str]:
    from argosy.plan import machine

    fits = FITS[forecast.verdict]
    if forecast.plan is not None:
        budget_bytes = forecast.plan.budget_bytes
        fits += f"; {format_bytes(forecast.plan.total_bytes)} of {format_bytes(budget_bytes)}"
    here = f", {disk_size(download.here_bytes)} of them are here" if download.here_bytes else ""
    num_files = "1 file" if len(download.files) == 1 else f"{len(download.files)} files"
    times = ", ".join(f"{_duration(missing_bytes / rate)} at {name}" for rate, name in _RATES)
    lines = [
        f"model     {download.name}, revision {_revision(download)}",
        f"licence   {download.licence or 'not stated'}, see {download.source.url}/{download.source.repository}",
        f"fits      {fits}",
        f"budget    smallest {format_bytes(forecast.smallest_bytes)}; all experts in memory with "
        f"{format_bytes(forecast.resident_bytes)}",
    ]
    if forecast.decode:
        speed = forecast.decode[0].tokens_per_s
        low, likely, high = map(short_number, (speed.low, speed.likely, speed.high))
        lines.append(f"speed     {low} to {high} tok/s, likely {likely}, for one answer, estimated")
    return [
        *lines,
        f"size      {disk_size(download.nbytes)} in {num_files}{here}",
        f"time      {times}",
        f"drive     {disk_size(machine.free_disk_bytes(download.root))} free in {download.root}",
    ]


def _revision(download: Download) -> str:
    commit = download.source.revision
    return f"{download.asked}, {commit[:12]}" if download.asked not in ("", commit) else commit[:12]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def _watch(here_bytes: int) -> Iterator[Watch]:
    """Shows how far a fetch is: a bar on a terminal, otherwise a line now and then."""
    waits = _Waits()
    if not sys.stderr.isatty():
        yield _Lines(here_bytes, waits)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fetching", total=None, completed=here_bytes)

        def show(moment: Moment) -> None:
            waits.tell(moment)
            bar.update(task, total=moment.total_bytes, completed=moment.done_bytes)

        yield show


class _Waits:
    """Says once of each file that another program is fetching it."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, moment: Moment) -> None:
        for name in moment.waits_for:
            if name not in self._told:
                self._told.add(name)
                print(f"waiting for another program that is fetching {name}", file=sys.stderr, flush=True)


class _Lines:
    """A line of progress every ten seconds."""

    def __init__(self, here_bytes: int, waits: _Waits) -> None:
        self._start = self._last = time.monotonic()
        self._here_bytes, self._waits = here_bytes, waits

    def __call__(self, moment: Moment) -> None:
        self._waits.tell(moment)
        now = time.monotonic()
        if now - self._last < _LINE_S:
            return
        self._last = now
        rate = (moment.done_bytes - self._here_bytes) / (now - self._start)
        left = f", {_duration((moment.total_bytes - moment.done_bytes) / rate)} left" if rate > 0 else ""
        print(
            f"{disk_size(moment.done_bytes)} of {disk_size(moment.total_bytes)}, {rate / 1e6:.1f} MB/s{left}",
            file=sys.stderr,
            flush=True,
        )
