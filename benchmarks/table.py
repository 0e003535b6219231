"""How do the results compare with their targets? A Markdown table from the newest rows of benchmarks/results/*.csv.

    python benchmarks/table.py [--since 2026-11-24T20:00] [--write docs/performance.md]

`--write` puts the table between the two markers of the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS

BEGIN, END = "<!-- results: benchmarks/table.py -->", "<!-- end of results -->"
QUESTIONS = {
    0: "agreement with llama.cpp on the same file, KL in nats",
    1: "resident decode: weight bytes/s over the memory's read bandwidth",
    2: "resident decode over llama.cpp",
    3: "prefill of 512 tokens over llama.cpp",
    4: "prefill: int8 operations/s over the measured peak",
    5: "streamed decode over llama.cpp at its best, read-ahead 128 KiB",
    6: "streamed decode over llama.cpp as the machine comes, read-ahead 8192 KiB",
    7: "streamed decode over max(compute, missed bytes / drive)",
    8: "demand reads over raw O_DIRECT at the record size",
    9: "prefill of 512 tokens at 25 % over llama.cpp at its best",
    10: "8 sequences at once over what the union of their experts allows",
    11: "process start to first token: seconds, and over llama.cpp",
    12: "Python's share of a decode step",
    13: "decode next to a busy process over decode on the quiet machine",
    14: "peak memory of a resident model over its file",
    15: "first token of a prompt of 2040 tokens over the same prompt found computed",
    16: "serving clients at once over llama.cpp's llama-server: resident",
    17: "the same in a memory limit, over its best of one and two threads",
}


def newest(since: str) -> dict[tuple[int, str], dict[str, Any]]:
    """Maps row number and label to the newest record."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open(newline="") as file:
            for record in csv.DictReader(file):
                facts = json.loads(record["facts"])
                number = facts.get("row")
                if number is not None and record["time"] >= since and facts.get("geometry") != "tiny":
                    found[int(number), record["label"]] = record | {"facts": facts}
    return found


def markdown(found: dict[tuple[int, str], dict[str, Any]]) -> str:
    lines = ["| # | what | reached | target |", "|---|---|---|---|"]
    for number, question in QUESTIONS.items():
        of_row = {
            label: record["facts"] | record for (row, label), record in sorted(found.items()) if row == number
        }
        targets = sorted({record.get("target", "") for record in of_row.values()} - {""})
        metrics = {label.partition(": ")[2] for label in of_row}
        names = {label: label.partition(": ")[0] if len(metrics) == 1 else label for label in of_row}
        cases = [
            f"{names[label]}: {_case(record, names_target=len(targets) > 1)}"
            for label, record in of_row.items()
        ]
        target = targets[0] if len(targets) == 1 else ""
        lines.append(f"| {number or '-'} | {question} | {'; '.join(cases) or 'not measured'} | {target} |")
    machines = sorted({record["machine"] for record in found.values()})
    return "\n".join([*lines, "", *(f"Measured on {machine}." for machine in machines)])


def _case(record: dict[str, Any], *, names_target: bool) -> str:
    """The value of a case, with its target if the others of its row have another one, and whether it was missed."""
    value = float(record["median"])
    shown = f"{value:.4f}" if abs(value) < 0.1 else f"{value:.2f}"
    notes = [record["target"]] if names_target and record.get("target") else []
    notes += ["missed"] if record.get("verdict") == "missed" else []
    return f"{shown} ({', '.join(notes)})" if notes else shown


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--since", default="", help="leave out what is older than this time (UTC)")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    table = markdown(newest(options.since))
    if options.write is None:
        print(table)
        return 0
    text = options.write.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{options.write} has no line '{BEGIN}' followed by '{END}'")
    head, rest = text.split(BEGIN, 1)
    options.write.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
