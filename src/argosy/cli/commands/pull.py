"""`argosy pull`: fetch a model from a hub, after saying whether it fits."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from argosy.checkpoint.block_types import type_in_name
from argosy.checkpoint.untrusted_file import quote
from argosy.cli.commands.library import ask
from argosy.cli.shared.declared import choices
from argosy.cli.shared.output import FITS, fits_text, print_facts, short_number, table_lines
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.config import counted, disk_size, format_bytes
from argosy.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from argosy.checkpoint.hub import RemoteFile
    from argosy.experts.resident import Progress
    from argosy.forecast.forecast import Forecast
    from argosy.forecast.planning import Fit
    from argosy.library.pull import Download, Moment, Offer, Repository, Watch

_FITS = {"resident": FITS["resident"], "streams": FITS["streams"], "thrashes": "barely"}
_MOST_FORMATS = 100  # formats to compare; repositories have up to 40
_MOST_BASES = 3  # headers read to estimate all formats of a repository
_LINE_S = 10.0  # between lines of progress without a terminal
_RATES = ((12.5e6, "100 Mbit/s"), (125e6, "1 Gbit/s"))


@click.command("pull")
@click.argument("model", metavar="OWNER/NAME[:FORMAT]")
@choices(
    Settings,
    "memory",
    into="flags",
    memory={"help": "Budget to plan with: 8GiB, 8GB, 75%; default: what is free."},
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit; default: the main branch.")
@click.option("--formats", "lists", is_flag=True, help="List the repository's formats, and fetch nothing.")
@click.option("--fit", is_flag=True, help="Fetch the format that fits this machine best.")
@click.option("--yes", is_flag=True, help="Fetch without asking: you accept the licence.")
def pull(model: str, revision: str | None, lists: bool, fit: bool, yes: bool, flags: Settings) -> None:
    """Download a model into the hub's cache, where other programs also find it.

    First it shows whether the model fits, its speed, size and licence; then it asks, and records when you accepted the
    licence.
    FORMAT chooses one of several GGUF files by a part of its name; without it, the formats are listed. --fit takes the
    largest with every expert in memory, of up to 8 bits a weight; if none is, the smallest of 4 bits or more.
    The name of the model means the revision that was pulled last. Every file is checked against the hub's digest.
    After ^C or a lost connection, the same command resumes. Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HOME,
    HF_HUB_OFFLINE.

    \b
    Examples:
      argosy pull unsloth/Qwen3-30B-A3B-GGUF --fit
      argosy pull unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M --memory 16GiB --yes
    """
    from argosy.cli.shared.output import progress_bar
    from argosy.forecast.planning import plan_remote
    from argosy.library.pull import ask_hub, fetch

    if lists and fit:
        raise UsageError("--formats lists and --fit fetches; give one of them")
    memory = for_engine(read_settings(**flags)).get("memory")
    repository = ask_hub(model, revision)
    if lists or fit or repository.is_open:
        best = _formats(repository, memory, lists=lists, fit=fit)
        if best is None:
            return
        repository = replace(repository, source=best.source)
    download = repository.download()
    missing_bytes = download.nbytes - download.here_bytes
    accepted_at = None
    if missing_bytes:
        with progress_bar() as progress:
            _, forecast = plan_remote(download.source, memory=memory, progress=progress)
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


def _formats(repository: Repository, memory: str | int | None, *, lists: bool, fit: bool) -> Offer | None:
    """The format that fits best, if requested; None after listing the formats, if that was requested.

    Raises:
        UsageError: neither was requested, so the formats are listed on stderr.   DoesNotFit: none fits.
        What `fetch_headers` raises, if the model runs in no format.
    """
    from argosy.cli.shared.output import progress_bar

    part, owner = repository.source.part, repository.source.repository
    num_formats = len(repository.offers())
    offers = repository.offers(part) or repository.offers()
    if len(offers) > _MOST_FORMATS:
        raise UsageError(
            f"{owner} has {len(offers)} files or formats of that name, too many to list",
            hint=f"name one by a longer part of its name, for example {owner}:Q4_K_M",
        )
    with progress_bar() as progress:
        fits = _compare(offers, memory, progress)
    best = _best(fits)
    if part and not repository.has_part:
        fit = False  # the requested format is missing; do not take another one silently
    if fit and best is not None:
        return best
    if fit:
        smallest = min((found.smallest_bytes for _, found in fits if found is not None), default=0)
        raise DoesNotFit(
            f"none of the {len(offers)} formats of {owner} fits this machine",
            hint=f"the smallest needs about {format_bytes(smallest, rounds_up=True)}" if smallest else None,
        )
    print(*_table(fits, best, repository.tower), sep="\n", file=sys.stdout if lists else sys.stderr)
    at = f" --revision {repository.asked}" if repository.asked else ""
    advice = (
        "" if best is None else f"`argosy pull {best.name}{at}` fetches the best that fits, as --fit does"
    )
    if lists:
        print(advice or "none of them fits this machine")
        return None
    told = f"none of them has '{quote(part)}' in its name"
    if not part:
        told = "none was named"
    elif repository.has_part:
        told = f"'{quote(part)}' is a part of {len(offers)} names"
    raise UsageError(f"{owner} has {num_formats} formats, and {told}", hint=advice or None)


def _compare(
    offers: Sequence[Offer], memory: str | int | None, progress: Progress | None
) -> list[tuple[Offer, Fit | None]]:
    """How each format fits, from the header of one; None if it cannot run or is incomplete."""
    from argosy.errors import UnsupportedModel
    from argosy.forecast.planning import compare_sizes

    able = [offer for offer in offers if offer.may_run and offer.nbytes is not None]
    # The others are estimated from the header of a common format, whose name may hide a type without a kernel.
    bases = sorted(able, key=lambda offer: (offer.format != "Q4_K_M", offer.nbytes))[:_MOST_BASES]
    for base in bases:
        try:
            found = compare_sizes(
                base.source, [offer.nbytes or 0 for offer in able], memory=memory, progress=progress
            )
        except UnsupportedModel:
            if base is bases[-1]:
                raise
            continue
        fits = {offer.name: fit for offer, fit in zip(able, found, strict=True)}
        return [(offer, fits.get(offer.name)) for offer in offers]
    return [(offer, None) for offer in offers]


def _best(fits: Sequence[tuple[Offer, Fit | None]]) -> Offer | None:
    """The format to take, as `pull --help` describes."""
    able = [(offer, fit) for offer, fit in fits if fit is not None and fit.verdict != "no"]

    def rank(one: tuple[Offer, Fit]) -> tuple[bool, ...] | tuple[float, ...]:
        offer, fit = one
        bits = _bits(offer.format)
        size = offer.nbytes or 0
        if fit.verdict == "resident" and bits <= 8:
            return (3, size)
        if fit.verdict == "resident":
            return (2, -size)
        return (1 if fit.verdict == "streams" else 0, bits >= 4, -size if bits >= 4 else size)

    return max(able, key=rank)[0] if able else None


def _bits(format: str) -> int:
    """Bits per weight according to a format's name; 16 for safetensors."""
    found = re.search(r"\d{1,2}", format)
    return 16 if found is None else int(found[0])


def _table(
    fits: Sequence[tuple[Offer, Fit | None]], best: Offer | None, tower: RemoteFile | None
) -> list[str]:
    rows = []
    for offer, fit in fits:
        size = "incomplete" if offer.nbytes is None else disk_size(offer.nbytes)
        parts = f" in {offer.num_parts} parts" if offer.num_parts > 1 and offer.nbytes is not None else ""
        told, speed = (
            "-" if offer.may_run else f"no, {type_in_name(offer.format) or quote(offer.format)} is not read",
            "",
        )
        if fit is not None:
            told = _FITS.get(fit.verdict) or f"no, needs {format_bytes(fit.smallest_bytes, rounds_up=True)}"
        if fit is not None and fit.tokens_per_s is not None:
            speed = f"about {short_number(fit.tokens_per_s)} tok/s"
        mark = "best that fits" if offer is best else ""
        rows.append((quote(offer.format), size + parts, told, speed, mark))
    lines = table_lines(("FORMAT", "SIZE", "FITS", "SPEED, ESTIMATED", "CHOICE"), rows)
    if tower is not None and tower.nbytes is not None:
        lines.append(
            f"with each: {quote(tower.name)}, {disk_size(tower.nbytes)}, which reads pictures or sound"
        )
    return lines


def _lines(download: Download, forecast: Forecast, missing_bytes: int) -> list[str]:
    from argosy.engine.progress import rough_time
    from argosy.machine import resources

    fits = fits_text(forecast)
    if forecast.plan is not None:
        budget_bytes = forecast.plan.budget_bytes
        fits += f"; {format_bytes(forecast.plan.total_bytes)} of {format_bytes(budget_bytes)}"
    here = f", {disk_size(download.here_bytes)} of them are here" if download.here_bytes else ""
    num_files = counted(len(download.files), "file")
    times = ", ".join(f"{rough_time(missing_bytes / rate)} at {name}" for rate, name in _RATES)
    lines = [
        f"model     {download.name}, revision {_revision(download)}",
        f"licence   {download.licence or 'not stated'}, see {download.source.url}/{download.source.repository}",
        f"fits      {fits}",
        f"budget    smallest {format_bytes(forecast.smallest_bytes, rounds_up=True)}; "
        f"{'all experts in memory' if forecast.work.num_moe_layers else 'the largest that it uses'} "
        f"{format_bytes(forecast.resident_bytes, rounds_up=True)}",
    ]
    if forecast.decode:
        speed = forecast.decode[0].tokens_per_s
        low, likely, high = map(short_number, (speed.low, speed.likely, speed.high))
        lines.append(f"speed     {low} to {high} tok/s, likely {likely}, for one answer, estimated")
    return [
        *lines,
        f"size      {disk_size(download.nbytes)} in {num_files}{here}",
        *_tower_lines(download),
        f"time      {times}",
        f"drive     {disk_size(resources.free_disk_bytes(download.root))} free in {download.root}",
    ]


def _tower_lines(download: Download) -> list[str]:
    from argosy.checkpoint.gguf_names import is_tower

    return [
        f"          {quote(file.name)}, {disk_size(file.nbytes or 0)} of it, reads pictures or sound"
        for file in download.files[1:]
        if is_tower(file.name)
    ]


def _revision(download: Download) -> str:
    commit = download.source.revision
    return f"{download.asked}, {commit[:12]}" if download.asked not in ("", commit) else commit[:12]


@contextmanager
def _watch(here_bytes: int) -> Iterator[Watch]:
    """Shows the progress of a fetch: a bar on a terminal, otherwise occasional lines."""
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
    """Says once for each file that another program is fetching it."""

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
        from argosy.engine.progress import rough_time

        rate = (moment.done_bytes - self._here_bytes) / (now - self._start)
        left = f", {rough_time((moment.total_bytes - moment.done_bytes) / rate)} left" if rate > 0 else ""
        print(
            f"{disk_size(moment.done_bytes)} of {disk_size(moment.total_bytes)}, {rate / 1e6:.1f} MB/s{left}",
            file=sys.stderr,
            flush=True,
        )
