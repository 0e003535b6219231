"""Run everything that is too long for a test, one after the other, and write one page about it.

    python tests/abuse/soak.py                     all, in about two hours; exits with 1 if anything fails
    python tests/abuse/soak.py figures kills       these two
    python tests/abuse/soak.py --page FILE         where the page goes; default: build/soak.md

Each row of the page is a run: its result in its own words, whether it passed, its time, and how busy the machine was
with other work when it began. Run it on a machine that does nothing else: some rows have limits on time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_MOST_LINES = 30  # of a run, on the page


@dataclass(frozen=True)
class Run:
    """One program.

    Attributes:
        shows: the lines of its output that are its result; the last one is, if none match.
        most_s: seconds after which it has failed.
    """

    command: tuple[str, ...]
    shows: str
    most_s: int


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


RUNS = {
    "figures": Run(python("tests/abuse/figures.py"), r"^(R\d+ |  )", 6000),
    "kills": Run(python("tests/abuse/kills.py", "--points", "200"), r"", 2400),
    "kills beside links": Run(python("tests/abuse/kills.py", "--links", "--points", "200"), r"", 2400),
    "changed files": Run(python("-m", "tests.abuse.mutated_files"), r"no crash", 1800),
    "growth": Run(python("-m", "tests.abuse.growth"), r"", 600),
    "frozen workers": Run(python("benchmarks/cluster_freeze.py", "--times", "50"), r"", 1800),
    "sanitizers": Run(("make", "test-sanitize"), r"(tests passed|calls of|requests|found)", 3600),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "build" / "soak.md")
    asked = parser.parse_args()
    if unknown := set(asked.runs) - RUNS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(RUNS)}")
    asked.page.parent.mkdir(parents=True, exist_ok=True)
    names, failed = asked.runs or list(RUNS), 0
    page = [f"# Long runs of {commit()}", "", machine(), ""]
    for name in names:
        rows, passed = measured(name, RUNS[name])
        failed += not passed
        page += rows
        asked.page.write_text(
            "\n".join(page) + "\n", encoding="utf-8"
        )  # what is done is kept if the rest is not
        print("\n".join(rows), flush=True)
    print(f"{len(names) - failed} passed, {failed} failed; the page is {asked.page}")
    return 1 if failed else 0


def measured(name: str, run: Run) -> tuple[list[str], bool]:
    """The rows of one run, and whether it passed."""
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        done = subprocess.run(
            run.command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=run.most_s, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        output, ended = done.stdout, "passed" if done.returncode == 0 else f"failed with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        ended = f"failed: no end after {run.most_s} s"
    lines = [line for line in output.splitlines() if line.strip()]
    shown = [line for line in lines if re.search(run.shows, line)] or lines[-1:]
    if len(shown) > _MOST_LINES:
        shown = [*shown[: _MOST_LINES - 1], f"and {len(shown) - _MOST_LINES + 1} lines more"]
    minutes = (time.monotonic() - began) / 60
    head = f"## {name}: {ended}, {minutes:.0f} min, load {load:.2f} at its start"
    return [head, "", "```text", *shown, "```", ""], ended == "passed"


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "an unknown version"


def machine() -> str:
    cpus = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = cpus[1] if cpus else os.uname().machine
    return f"{os.cpu_count()} cores ({processor}), {gib:.0f} GiB, Linux {os.uname().release}."


if __name__ == "__main__":
    sys.exit(main())
