"""Machines to plan for without having them: a small table, or a file in the same format.

    aws:i7i.8xlarge, box:desktop-64, FILE, FILE:NAME  ->  find_machine  ->  Machine

`machines.csv` has a row per machine, with the source and date of its facts. Your own file needs the same header:

    name,cpu,cores,memory_gib,drive_gb,drive_gb_per_s,network_gbit_per_s,usd_per_hour,usd,watts,source

`name`, `cpu` (as /proc/cpuinfo prints it), `cores` (physical) and `memory_gib` are required; an empty field means
unknown. `usd_per_hour` is the rent, `usd` the purchase price, `watts` the power drawn while answering.

Elsewhere: `machine/rates.py` guesses speeds from the processor's name.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from argosy.config import GIB
from argosy.errors import UsageError, did_you_mean
from argosy.machine.rates import Rates, guess

TABLE = Path(__file__).with_name("machines.csv")
_LARGEST_FILE = 1 << 20
_NUMBERS = {
    "cores": 1e5, "memory_gib": 1e6, "drive_gb": 1e9, "drive_gb_per_s": 1e5, "network_gbit_per_s": 1e5,
    "usd_per_hour": 1e6, "usd": 1e9, "watts": 1e6,
}  # fmt: skip
COLUMNS = ("name", "cpu", *_NUMBERS, "source")
_REQUIRED = ("name", "cpu", "cores", "memory_gib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One row; None means unknown."""

    name: str
    cpu: str
    cores: int
    memory_gib: float
    drive_gb: float | None = None
    drive_gb_per_s: float | None = None
    network_gbit_per_s: float | None = None
    usd_per_hour: float | None = None
    usd: float | None = None
    watts: float | None = None
    source: str = ""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    def rates(self) -> Rates:
        drive = None if self.drive_gb_per_s is None else self.drive_gb_per_s * 1e9
        return guess(self.cpu, self.cores, drive_bytes_per_s=drive)


def find_machine(text: str) -> Machine:
    """Find a machine in the table or in a file: `FILE` with one row, or `FILE:NAME`.

    Raises:
        UsageError: there is no such machine, or the file is malformed.
    """
    table = read_machines(TABLE)
    for machine in table:
        if machine.name == text:
            return machine
    path, _, name = text.rpartition(":")
    if Path(text).is_file():
        path, name = text, ""
    if path and Path(path).is_file():
        rows = read_machines(Path(path))
        chosen = [row for row in rows if row.name == name] if name else rows
        if len(chosen) == 1:
            return chosen[0]
        names = ", ".join(row.name for row in rows[:12])
        raise UsageError(f"{path} has {len(chosen)} machines of that name, expected one; it has: {names}")
    names_of_table = [machine.name for machine in table]
    raise UsageError(
        f"unknown machine '{text}'; known: here, {', '.join(names_of_table)}",
        hint=did_you_mean(text, names_of_table, quote="")
        or "or a CSV file: `argosy plan --help` names its columns",
    )


def read_machines(path: Path) -> list[Machine]:
    """Read all rows of a file.

    Raises:
        UsageError: a value is wrong; names its line and column.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise UsageError(
            f"{path.name} is larger than {_LARGEST_FILE} bytes, too large for a table of machines"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            header: Sequence[str] = reader.fieldnames or ()
            unknown = [column for column in header if column not in COLUMNS]
            missing = [column for column in _REQUIRED if column not in header]
            if unknown or missing or len(set(header)) != len(header):
                raise UsageError(
                    f"{path.name}: the header has {', '.join(header) or 'nothing'}",
                    hint=f"it may have {', '.join(COLUMNS)}, and must have {', '.join(_REQUIRED)}",
                )
            found = [_machine(row, path, number) for number, row in enumerate(reader, start=2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path.name} is not a CSV file: {error}") from None
    if not found:
        raise UsageError(f"{path.name} has no machine below its header")
    return found


def _machine(row: dict[str, str | None], path: Path, line: int) -> Machine:
    values: dict[str, str | float | int] = {}
    if None in row:
        raise UsageError(f"{path.name}, line {line}: there are more fields than in the header")
    for column, field in row.items():
        text = (field or "").strip()
        if not text:
            if column in _REQUIRED:
                raise UsageError(f"{path.name}, line {line}: {column} is empty")
            continue
        if column not in _NUMBERS:
            values[column] = text[:200]
            continue
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 < number <= _NUMBERS[column] or (column == "cores" and number != int(number)):
            kind = "a whole number" if column == "cores" else "a number"
            raise UsageError(
                f"{path.name}, line {line}: {column} must be {kind} above zero, found '{text[:40]}'"
            )
        values[column] = int(number) if column == "cores" else number
    return Machine(**values)  # type: ignore[arg-type]
