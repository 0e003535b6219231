"""`argosy doctor`: facts about this machine, its drive measured, and one line of advice."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from argosy.cli.shared.settings import Settings, read_settings
from argosy.config import GIB, KIB, MIB, counted, format_bytes
from argosy.errors import DiskFull, UsageError, is_disk_full

if TYPE_CHECKING:
    from argosy.cli.shared.output import Progress

_RECORD_BYTES = (256 * KIB, MIB, 4 * MIB)
_NUM_READERS = (1, 4)
_SMALLEST_FILE_BYTES = 64 * MIB
_CHUNK_BYTES = 8 * MIB
_CELL_SECONDS = 0.25
# Streaming from a slower drive takes patience, because a large model misses about a GB per token.
_SLOW_BYTES_PER_S = 0.5e9
_AMX_STATES = {
    "absent": "none",
    "refused": "refused by the system, perhaps a sandbox: AVX-512 is used",
    "unused": "unused: the instruction set is set to another one",
    "usable": "used for products with many tokens where it was measured to be faster",
}


@click.command("doctor")
@click.option(
    "--path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("."),
    help="Directory on the drive to measure: where models are, or will be.",
)
@click.option("--size", metavar="SIZE", default="1GiB", help="Size of the temporary file (default: 1GiB).")
@click.option("--products", is_flag=True, help="Add how matrix products of each format run.")
@click.option("--tune", is_flag=True, help="Measure that again, and keep the fastest way.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def doctor(path: Path, size: str, products: bool, tune: bool, as_json: bool) -> None:
    """Show cores, memory limits and the drive of this machine, with advice.

    The drive is measured with a temporary file, which takes at most a tenth of the free space and is removed
    afterwards. The fastest way to multiply matrices of each format was measured when a model first ran here.

    \b
    Examples:
      argosy doctor
      argosy doctor --path /data/models --size 4GiB --json
    """
    from argosy.cli.shared.output import print_facts, progress_bar
    from argosy.config import parse_size

    size_bytes = parse_size(size)
    facts = machine_facts(path, tune=tune)
    with progress_bar() as progress:
        facts["drive"] |= measure_drive(path, size_bytes, progress)
    facts["advice"] = advice(facts)
    if as_json:
        import json

        print(json.dumps(facts, ensure_ascii=False))
    else:
        print_facts(fact_lines(facts, shows_products=products or tune))


def machine_facts(path: Path, *, tune: bool = False) -> dict[str, Any]:
    """Facts about the machine that need no measurement of the drive; `tune` measures kernel choices again."""
    from argosy import _native
    from argosy.machine import resources

    known = _native.instruction_sets()
    settings = read_settings()
    chosen = settings.get("instruction_set") or known[-1]
    limit = resources.memory_limit()
    budget_bytes, margin_bytes = resources.default_budget(limit)
    drive = resources.drive_of(path)
    return {
        "cores": resources.usable_cores(),
        "cpu": resources.cpu_model(),
        "instruction_sets": known,
        "instruction_set": chosen,
        "amx": _native.amx_state() if chosen in {"amx", known[-1]} else "unused",
        "choices": _choices(settings, chosen, tune=tune),
        "memory": {
            "total_bytes": limit.total_bytes,
            "free_bytes": limit.free_bytes,
            "limited_by": limit.source,
            "default_budget_bytes": budget_bytes,
            "margin_bytes": margin_bytes,
            "swap_bytes": resources.swap_bytes(),
        },
        "drive": {
            "path": str(path.resolve()),
            "file_system": drive.file_system if drive else None,
            "device": drive.device if drive else None,
            "read_ahead_kb": drive.read_ahead_kb if drive else None,
            "free_bytes": resources.free_disk_bytes(path),
        },
    }


def _choices(settings: Settings, instruction_set: str, *, tune: bool) -> dict[str, Any]:
    """How products run, as measured when a model first ran here, or now."""
    from argosy.machine import tuning

    threads = settings.get("threads") or tuning.known_threads(instruction_set)
    choices = tuning.measure(threads, instruction_set) if tune else tuning.kept(threads, instruction_set)
    why_not = "nothing was measured yet; the first model that runs here does it, or `argosy doctor --tune`"
    number = tuning.kept_threads(instruction_set)
    return {
        "is_used": tuning.is_on(),
        "threads": threads,
        "all_cores_gain": None if number is None else number.gain,
        "fixed_ask_ahead": settings.get("ask_ahead"),
        "file": str(tuning.kept_file(instruction_set)),
        "why_not_kept": why_not if choices is None else choices.why_not,
        "default": tuning.default_tuning()._asdict(),
        "formats": {
            name: {
                **choice.tuning._asdict(),
                "bytes_per_s": choice.bytes_per_s,
                "gain": choice.gain,
                "few_tokens_gain": choice.few_tokens_gain,
                "amx_gain": choice.amx_gain,
            }
            for name, choice in ({} if choices is None else choices.formats).items()
        },
    }


def measure_drive(path: Path, size_bytes: int, progress: Progress | None = None) -> dict[str, Any]:
    """Measure random reads of records from a temporary file, which is removed even after ^C or a kill.

    Raises:
        DiskFull: the file does not fit.   UsageError: the directory cannot be written to.
    """
    from argosy.machine import resources

    file_bytes = min(size_bytes, resources.free_disk_bytes(path) // 10) // _CHUNK_BYTES * _CHUNK_BYTES
    if file_bytes < _SMALLEST_FILE_BYTES:
        needed = format_bytes(_SMALLEST_FILE_BYTES)
        why = f"the temporary file would be smaller than {needed}"
        return {"file_bytes": 0, "measured": [], "why_not_measured": why, "why_not_direct": None}
    tell = progress or (lambda what, share: None)
    try:
        # The file has no name, so the kernel removes it no matter how this process ends.
        with tempfile.TemporaryFile(dir=path) as file:
            _fill(file, file_bytes, tell)
            measured, why_not_direct = _measure(f"/proc/self/fd/{file.fileno()}", file_bytes, tell)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"the temporary file needs {format_bytes(file_bytes)} in {path}, which has no room for it",
                hint="choose a smaller --size",
                path=str(path),
                needed_bytes=file_bytes,
                free_bytes=resources.free_disk_bytes(path),
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UsageError(
                f"{path} cannot be written to, and measuring the drive needs a file there",
                hint="choose a directory of your own on the same drive: `argosy doctor --path DIR`",
            ) from error
        raise
    return {
        "file_bytes": file_bytes,
        "measured": measured,
        "why_not_measured": None,
        "why_not_direct": why_not_direct,
    }


def _fill(file: IO[bytes], file_bytes: int, tell: Callable[[str, float], None]) -> None:
    """Fill the file with random bytes, so that compression and shared blocks do not distort the result."""
    import numpy as np

    generator = np.random.default_rng()
    for done in range(0, file_bytes, _CHUNK_BYTES):
        file.write(generator.bytes(_CHUNK_BYTES))
        tell("writing a temporary file", 0.5 * done / file_bytes)
    file.flush()
    os.fsync(file.fileno())


def _measure(
    name: str, file_bytes: int, tell: Callable[[str, float], None]
) -> tuple[list[dict[str, Any]], str | None]:
    from argosy import _native

    cells = [
        (direct, record_bytes, num_readers)
        for direct in (True, False)
        for record_bytes in _RECORD_BYTES
        for num_readers in _NUM_READERS
    ]
    measured: list[dict[str, Any]] = []
    why_not_direct = None
    for number, (direct, record_bytes, num_readers) in enumerate(cells):
        tell("measuring reads", 0.5 + 0.5 * number / len(cells))
        if direct and why_not_direct is not None:
            continue
        try:
            few = 16 * MIB // record_bytes
            first = _native.drive_probe(name, record_bytes, few, num_readers, direct)
            enough = int(min(first * _CELL_SECONDS, file_bytes)) // record_bytes
            speed = _native.drive_probe(name, record_bytes, max(few, enough), num_readers, direct)
        except RuntimeError as refusal:
            why_not_direct = str(refusal).removeprefix(f"{name}: ")
            continue
        measured.append(
            {
                "is_direct": direct,
                "record_bytes": record_bytes,
                "num_readers": num_readers,
                "bytes_per_s": speed,
            }
        )
    return measured, why_not_direct


def best_speed(facts: dict[str, Any], *, is_direct: bool) -> float | None:
    """The fastest measured speed, in bytes per second."""
    speeds = [cell["bytes_per_s"] for cell in facts["drive"]["measured"] if cell["is_direct"] == is_direct]
    return max(speeds, default=None)


def advice(facts: dict[str, Any]) -> str:
    """The most important piece of advice for this machine."""
    drive, memory = facts["drive"], facts["memory"]
    if drive["why_not_measured"] is not None:
        return f"free some space at {drive['path']}: {drive['why_not_measured']}"
    if drive["file_system"] in ("tmpfs", "ramfs"):
        return f"{drive['path']} is memory, not a drive: models there take the memory that experts need"
    if memory["free_bytes"] < GIB:
        return (
            f"only {format_bytes(memory['free_bytes'])} of memory is free ({memory['limited_by']}): the demo model"
            " runs; for larger models close other programs or raise the limit"
        )
    direct, buffered = best_speed(facts, is_direct=True), best_speed(facts, is_direct=False)
    if direct is None:
        return (
            f"keep models on a file system with direct reads, such as ext4 or xfs: {drive['why_not_direct']}"
        )
    fastest = max(direct, buffered or 0.0)
    if fastest < _SLOW_BYTES_PER_S:
        return (
            f"this drive reads {fastest / 1e9:.2f} GB/s: prefer models that fit in"
            f" {format_bytes(memory['default_budget_bytes'])}, or keep large ones on an NVMe drive"
        )
    if memory["swap_bytes"]:
        return "keep --memory below the free memory: this machine has swap, and swapped weights are slow"
    return (
        f"ready: reading 1 GB of experts takes {1e9 / direct:.2f} s, so a token that misses 1 GB takes that much"
        " longer; `argosy pack` makes each expert one aligned read"
    )


def fact_lines(facts: dict[str, Any], *, shows_products: bool = False) -> list[str]:
    """The facts as lines of text, with `shows_products` including how products of each format run."""
    memory, drive = facts["memory"], facts["drive"]
    free, total = format_bytes(memory["free_bytes"]), format_bytes(memory["total_bytes"])
    ahead = "" if drive["read_ahead_kb"] is None else f", read-ahead {drive['read_ahead_kb']} KiB"
    swap = format_bytes(memory["swap_bytes"]) if memory["swap_bytes"] else "none"
    lines = [
        f"cores     {facts['cores']} usable, {facts['cpu']}",
        f"  instruction sets  {', '.join(facts['instruction_sets'])}; {facts['instruction_set']} is used",
        f"  AMX               {_AMX_STATES[facts['amx']]}",
        *_choice_lines(facts["choices"], has_amx=facts["amx"] == "usable", is_whole=shows_products),
        f"memory    {free} free of {total} ({memory['limited_by']})",
        f"  default budget    {format_bytes(memory['default_budget_bytes'])},"
        f" a margin of {format_bytes(memory['margin_bytes'])} left free",
        f"  swap              {swap}",
        f"drive     {drive['path']}",
        f"  file system       {drive['file_system'] or 'unknown'} on {drive['device'] or 'an unknown device'},"
        f" {format_bytes(drive['free_bytes'])} free{ahead}",
    ]
    if drive["measured"]:
        lines.append(
            f"  random reads      measured, GB/s, on a temporary file of {format_bytes(drive['file_bytes'])}"
        )
        lines += _table(drive)
    if drive["why_not_direct"] is not None:
        lines.append(f"  O_DIRECT          refused: {drive['why_not_direct']}")
    if drive["why_not_measured"] is not None:
        lines.append(f"  random reads      not measured: {drive['why_not_measured']}")
    lines.append(f"advice    {facts['advice']}")
    return lines


def _choice_lines(choices: dict[str, Any], *, has_amx: bool, is_whole: bool) -> list[str]:
    threads, default, fixed = choices["threads"], choices["default"], choices["fixed_ask_ahead"]
    lines = [f"  threads           {threads}"]
    if (gain := choices["all_cores_gain"]) is not None:
        lines[0] += f"; one for each usable core in place of each physical one: {_gain(gain)}, measured"
    if not choices["is_used"]:
        return [*lines, "  products          not tuned: ARGOSY_TUNE is off"]
    if not choices["formats"]:
        return [*lines, f"  products          not tuned: {choices['why_not_kept']}"]
    why_not = choices["why_not_kept"]
    if not is_whole:
        kept = "" if why_not is None else f", which cannot be kept: {why_not}"
        return [*lines, f"  products          tuned by a measurement{kept}; --products shows it"]
    kept = f"kept in {choices['file']}" if why_not is None else f"not kept: {why_not}"
    lines += [
        f"  products          measured with {counted(threads, 'thread')}, {kept}",
        f"    {'':<8}{'one token: prefetch':<21}{'GB/s':>5}{'gain':>7}"
        f"   {'few tokens: prefetch, two panels':<34}{'gain':>5}"
        + (f"   {'many tokens: AMX':<16}{'gain':>7}" if has_amx else ""),
    ]
    for name, choice in choices["formats"].items():
        if not choice["bytes_per_s"]:  # the time was up
            lines.append(f"    {name:<8}not measured")
            continue
        few = f"{choice['few_ask_ahead']}, from {choice['two_panels_from']} tokens"
        lines.append(
            f"    {name:<8}{choice['ask_ahead']:<21}{choice['bytes_per_s'] / 1e9:>5.1f}{_gain(choice['gain']):>7}"
            f"   {few:<34}{_gain(choice['few_tokens_gain']):>5}"
            + (f"   {_amx_choice(choice):<16}{_gain(choice['amx_gain']):>7}" if has_amx else "")
        )
    usual = f"{default['ask_ahead']}; {default['few_ask_ahead']}, from {default['two_panels_from']} tokens"
    lines.append(f"    gains are over the defaults: {usual}")
    if fixed is not None:
        lines.append(f"    ARGOSY_ASK_AHEAD={fixed} is used for every format")
    return lines


def _amx_choice(choice: dict[str, Any]) -> str:
    if choice["amx_gain"] == 0:
        return "off: wrong"  # its results differed
    return f"from {choice['amx_from']}" if choice["amx_from"] else "off"


def _gain(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %"


def _table(drive: dict[str, Any]) -> list[str]:
    speeds = {
        (cell["is_direct"], cell["num_readers"], cell["record_bytes"]): cell["bytes_per_s"]
        for cell in drive["measured"]
    }
    lines = [f"    {'record':<26}" + "".join(f"{format_bytes(nbytes):>10}" for nbytes in _RECORD_BYTES)]
    for direct in (True, False):
        for num_readers in _NUM_READERS:
            row = [speeds.get((direct, num_readers, nbytes)) for nbytes in _RECORD_BYTES]
            if None not in row:
                readers = "1 reader" if num_readers == 1 else f"{num_readers} readers"
                label = f"{'O_DIRECT' if direct else 'page cache'}, {readers}"
                lines.append(f"    {label:<26}" + "".join(f"{speed / 1e9:>10.2f}" for speed in row if speed))
    return lines
